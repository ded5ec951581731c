"""Causal attention in the three layouts of the decoder: batch, packed stream, cache.

Legend: B batch, T queries, S keys, H heads, K key/value heads, hd head dimension.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from srit.models import varlen
from srit.models.cache import STRIDE, KVCache
from srit.models.paged_cache import PagedCache, Step


@dataclass
class Layout:
    """Who sees whom, worked out once a forward pass and shared by all layers."""

    positions: Tensor  # (B, T)
    cu_seqlens: Tensor | None
    attention_mask: Tensor | None
    cache: KVCache | PagedCache | None
    rows: Tensor | slice | None
    prefixes: Tensor | None = None
    end: int = 0  # keys of the cache that any row may see
    lengths: list[int] = field(default_factory=list)  # of the packed segments
    parents: list[int] = field(default_factory=list)  # the segment that each one continues, or -1
    masks: dict = field(default_factory=dict)
    step: Step | None = None  # of a paged cache

    def __post_init__(self) -> None:
        if isinstance(self.cache, PagedCache):
            self.step = self.cache.begin(len(self.positions))
        elif self.cache is not None:
            self.end = (int(self.positions.max()) // STRIDE + 1) * STRIDE
        elif self.cu_seqlens is not None:
            self.lengths = self.cu_seqlens.diff().tolist()
            none = self.prefixes is None
            self.parents = [-1] * len(self.lengths) if none else self.prefixes.tolist()

    @cached_property
    def stream(self) -> varlen.Stream:
        return varlen.make_stream(self.lengths, self.parents, self.positions.device)

    def mask(self, window: int | None, T: int) -> Tensor | None:
        """Boolean mask, True = sees; None when plain causal attention says it all."""
        if window not in self.masks:
            self.masks[window] = self._mask(window, T)
        return self.masks[window]

    def _mask(self, window: int | None, T: int) -> Tensor | None:
        device = self.positions.device
        if self.cache is not None:
            query, key = self.positions[:, :, None], torch.arange(self.end, device=device)
            seen = key <= query  # (B, T, S)
            if window is not None:
                seen = seen & (key > query - window)
            return seen[:, None]
        padded = self.attention_mask is not None and not bool(self.attention_mask.all())
        if not padded and (window is None or T <= window):
            return None
        seen = _band(T, window, device)
        if padded:
            # A padding query sees itself: a row without any key would be NaN.
            real = self.attention_mask.bool()[:, None, :]
            seen = (seen & real) | torch.eye(T, dtype=torch.bool, device=device)
            return seen[:, None]
        return seen[None, None]


    def segment_mask(self, window: int | None, before: int, T: int) -> Tensor | None:
        """(T, before + T) for queries that continue `before` keys; None for plain causal ones."""
        if not before and (window is None or T <= window):
            return None
        key = window, before, T
        if key not in self.masks:
            self.masks[key] = _band(T, window, self.positions.device, before)
        return self.masks[key]


def _band(T: int, window: int | None, device: torch.device, before: int = 0) -> Tensor:
    """(T, before + T): a query sees the keys up to itself, the last `window` of them."""
    seen = torch.ones(T, before + T, dtype=torch.bool, device=device).tril(before)
    return seen if window is None else seen.triu(before + 1 - window)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, layer: int, window: int | None,
           scale: float) -> list[Tensor]:
    """q (B, T, H, hd), k and v (B, T, K, hd) -> (B, T, H, hd), in parts along T."""
    if layout.step is not None:
        out = layout.cache.attend(q[:, 0], k[:, 0], v[:, 0], layout.step, layer, window, scale)
        return [out[:, None]]
    packed = layout.cu_seqlens is not None
    if packed and varlen.usable(q.device, q.dtype, q.shape[-1], window):
        return [varlen.attend(q[0], k[0], v[0], layout.stream, window, scale)[None]]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, hd)
    if layout.cache is not None:
        parts = [_cached(q, k, v, layout, layer, window, scale)]
    elif packed:
        parts = _packed(q, k, v, layout, window, scale)
    else:
        mask = layout.mask(window, q.shape[2])
        parts = [F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                                scale=scale, enable_gqa=True)]
    return [part.transpose(1, 2) for part in parts]


def _packed(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None,
            scale: float) -> list[Tensor]:
    """Segment by segment: exact, no (N, N) mask, no work on pairs of different sequences.

    A segment that continues another one sees all of it before itself.
    """
    parts = []
    queries, keys, values = (x.split(layout.lengths, 2) for x in (q, k, v))
    for a, b, c, parent in zip(queries, keys, values, layout.parents, strict=True):
        if parent >= 0:
            b, c = torch.cat([keys[parent], b], 2), torch.cat([values[parent], c], 2)
        mask = layout.segment_mask(window, b.shape[2] - a.shape[2], a.shape[2])
        parts.append(F.scaled_dot_product_attention(
            a, b, c, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True))
    return parts


def _cached(q: Tensor, k: Tensor, v: Tensor, layout: Layout, layer: int, window: int | None,
            scale: float) -> Tensor:
    keys, values = layout.cache.update(layer, k, v, layout.rows, layout.positions, layout.end)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=layout.mask(window, q.shape[2]),
                                          scale=scale, enable_gqa=True)
