"""Causal attention in the decoder's three layouts: padded batch, packed stream, cache.

Legend: B batch, T queries, S keys, H heads, K key/value heads, hd head dimension.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from srit.models import varlen
from srit.models.cache import STRIDE, KVCache
from srit.models.ops import recomputable
from srit.models.paged_cache import PagedCache


class AttentionMetadata:
    """Positions, and which keys each query sees; computed once per forward pass for all layers.

    Args: those of `Decoder.hidden`.
    """

    def __init__(self, input_ids: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None,
                 attention_mask: Tensor | None, cache: KVCache | PagedCache | None,
                 parents: Tensor | None) -> None:
        if positions is None:
            positions = _default_positions(input_ids, cu_seqlens, attention_mask, cache)
        self.positions = positions  # (B, T)
        self.cache, self.packed = cache, cu_seqlens is not None
        padded = attention_mask is not None and not bool(attention_mask.all())
        self.attention_mask = attention_mask if padded else None
        self._masks: dict[tuple, Tensor | None] = {}
        if isinstance(cache, PagedCache):
            self.step = cache.begin(len(input_ids))
        elif cache is not None:
            self.num_keys = (int(positions.max()) // STRIDE + 1) * STRIDE  # read from each slot
        elif self.packed:
            self.lengths = cu_seqlens.diff().tolist()  # of the segments
            # The segment that each one continues, or -1.
            self.parents = [-1] * len(self.lengths) if parents is None else parents.tolist()

    @cached_property
    def stream(self) -> varlen.Stream:
        return varlen.make_stream(self.lengths, self.parents, self.positions.device)

    def mask(self, window: int | None, T: int, before: int = 0) -> Tensor | None:
        """Boolean mask, True where a query sees a key; None for plain causal attention.

        `before`: keys of a continued segment, ahead of the T keys of the queries themselves.
        """
        key = window, T, before
        if key not in self._masks:
            self._masks[key] = self._make_mask(*key)
        return self._masks[key]

    def _make_mask(self, window: int | None, T: int, before: int) -> Tensor | None:
        device = self.positions.device
        if self.cache is not None:
            query, key = self.positions[:, :, None], torch.arange(self.num_keys, device=device)
            seen = key <= query  # (B, T, S)
            if window is not None:
                seen = seen & (key > query - window)
            return seen[:, None]
        if self.attention_mask is None and not before and (window is None or T <= window):
            return None
        seen = torch.ones(T, before + T, dtype=torch.bool, device=device).tril(before)
        if window is not None:
            seen = seen.triu(before + 1 - window)
        if self.attention_mask is None:
            return seen
        real = self.attention_mask.bool()[:, None, :]
        # A padding query sees itself: a row without any key would be NaN.
        seen = (seen & real) | torch.eye(T, dtype=torch.bool, device=device)
        return seen[:, None]


def _default_positions(input_ids: Tensor, cu_seqlens: Tensor | None, attention_mask: Tensor | None,
                       cache: KVCache | PagedCache | None) -> Tensor:
    (B, T), device = input_ids.shape, input_ids.device
    if cache is not None:
        return cache.positions(B, T)
    if cu_seqlens is not None:
        starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
        return (torch.arange(T, device=device) - starts.to(device))[None]
    if attention_mask is not None:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return torch.arange(T, device=device)[None]


def attend(q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata, layer: int,
           window: int | None, scale: float) -> Tensor:
    """q (B, T, H, hd), k and v (B, T, K, hd) -> (B, T, H, hd)."""
    cache = metadata.cache
    if isinstance(cache, PagedCache):
        out = cache.attend(q[:, 0], k[:, 0], v[:, 0], metadata.step, layer, window, scale)
        return out[:, None]
    if metadata.packed and _takes_varlen(q, window):
        return varlen.attend(q[0], k[0], v[0], metadata.stream, window, scale)[None]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, hd)
    if metadata.packed:
        return _packed(q, k, v, metadata, window, scale)
    if cache is not None:
        k, v = cache.update(layer, k, v, metadata.positions, metadata.num_keys)
    return _sdpa(q, k, v, metadata.mask(window, q.shape[2]), scale)


def _takes_varlen(q: Tensor, window: int | None) -> bool:
    """Whether one call does the whole stream: on a GPU, in 16 bits, where torch's function is right."""
    return (q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
            and varlen.usable(q.device, q.dtype, q.shape[-1], window is not None))


def _packed(q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata, window: int | None,
            scale: float) -> Tensor:
    """Segment by segment: exact, and without an (N, N) mask or work across segments.

    A segment that continues another one also sees all of that one.
    """
    parts = []
    queries, keys, values = (x.split(metadata.lengths, 2) for x in (q, k, v))
    for a, b, c, parent in zip(queries, keys, values, metadata.parents, strict=True):
        if parent >= 0:
            b, c = torch.cat([keys[parent], b], 2), torch.cat([values[parent], c], 2)
        mask = metadata.mask(window, a.shape[2], b.shape[2] - a.shape[2])
        parts.append(_sdpa(a, b, c, mask, scale))
    return parts[0] if len(parts) == 1 else recomputable(_join(*parts), _join, *parts)


def _join(*parts: Tensor) -> Tensor:
    return torch.cat(parts, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q (B, H, T, hd), k and v (B, K, S, hd) -> (B, T, H, hd)."""
    if q.device.type == "cpu" and q.dtype.itemsize == 2 and torch.is_grad_enabled() and q.numel():
        return _Float32Backward.apply(q, k, v, mask, scale).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale,
                                          enable_gqa=True).transpose(1, 2)


class _Float32Backward(torch.autograd.Function):
    """F.scaled_dot_product_attention on a CPU in 16 bits, with a backward in float32.

    The forward is the same operator. Torch's backward in bfloat16 takes two to three times as long as
    in float32 for segments of up to 150 tokens (1.5 times at 200; from 500 on less than it), and its
    gradients of keys and values are less exact by a factor of two to three.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=_bias(mask, q.dtype), scale=scale)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *tensors, lse, mask = ctx.saved_tensors
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.float(), *(x.float() for x in tensors), lse, 0.0, mask is None,
            attn_mask=_bias(mask, torch.float32), scale=ctx.scale)
        return *(x.to(grad.dtype) for x in grads), None, None


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What the operator adds to the scores: 0 where `mask` is True, else -inf."""
    if mask is None:
        return None
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
