"""Attention over a packed stream in one call to torch's `varlen_attn`, which is FlashAttention.

A segment that continues another one also sees all of that one. Its keys are therefore a copy of the
other's keys followed by its own. With more keys than queries, causal attention aligns the last query
with the last key, which is what such a segment needs.

`varlen_attn` is new in torch and has changed with every release. So it is first checked on a small
stream, forward and backward, once per dtype, head size and with or without a window. If the check
fails, a warning says so, and segments are computed one by one.

Legend: N tokens of the stream, N' keys including the copies, H heads, K key/value heads, hd head
dimension.
"""

import inspect
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from srit.models.ops import to_device

varlen_attn = None
if torch.backends.cuda.is_built():  # it imports torch's compiler, which takes a second
    with suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn


@dataclass
class Stream:
    """Where the segments of a stream and their keys begin."""

    keys: Tensor | None  # (N',) index of each key in the stream; None: no segment continues another
    cu_queries: Tensor  # (segments + 1,) int32
    cu_keys: Tensor  # (segments + 1,) int32
    max_queries: int
    max_keys: int


def make_stream(lengths: list[int], parents: list[int], device: torch.device) -> Stream:
    """Args: the segments' lengths, and for each the segment that it continues, or -1."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    keys, before = [], []
    for start, length, parent in zip(starts, lengths, parents, strict=False):
        before.append(lengths[parent] if parent >= 0 else 0)
        if parent >= 0:
            keys.append(torch.arange(starts[parent], starts[parent] + lengths[parent]))
        keys.append(torch.arange(start, start + length))
    sizes = [a + b for a, b in zip(lengths, before, strict=True)]

    queries = to_device(torch.tensor(starts, dtype=torch.int32), device)
    if not any(before):
        return Stream(None, queries, queries, max(lengths), max(lengths))
    bounds = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    return Stream(to_device(torch.cat(keys), device), queries, to_device(bounds, device),
                  max(lengths), max(sizes))


def attend(q: Tensor, k: Tensor, v: Tensor, stream: Stream, window: int | None,
           scale: float) -> Tensor:
    """q (N, H, hd), k and v (N, K, hd) -> (N, H, hd)."""
    if stream.keys is not None:
        k, v = k.index_select(0, stream.keys), v.index_select(0, stream.keys)
    options = {}
    if k.shape[1] != q.shape[1]:
        if _accepts_gqa(varlen_attn):
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return varlen_attn(q, k, v, stream.cu_queries, stream.cu_keys, stream.max_queries,
                       stream.max_keys, scale=scale,
                       window_size=(-1 if window is None else window - 1, 0), **options)


@lru_cache  # every layer asks
def _accepts_gqa(function: Callable) -> bool:
    return "enable_gqa" in inspect.signature(function).parameters


@lru_cache
def usable(device: torch.device, dtype: torch.dtype, head_dim: int, windowed: bool) -> bool:
    """Whether a small stream gives the outputs and gradients of `eager_attention`; warns if not."""
    if varlen_attn is None:
        return False
    lengths, parents, window = [5, 3, 9, 4, 1], [-1, 0, 0, -1, 3], 4 if windowed else None
    problem = "wrong results"
    # The first call may happen in inference mode, or under the hooks of a checkpointed block.
    no_hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.inference_mode(False), torch.enable_grad(), no_hooks:
        make = torch.Generator().manual_seed(0)
        q, k, v, grad = (torch.randn(sum(lengths), heads, head_dim, generator=make).to(device, dtype)
                         for heads in (4, 2, 2, 4))
        inputs = [x.double().requires_grad_() for x in (q, k, v)]
        out = eager_attention(*inputs, lengths, parents, window, head_dim**-0.5)
        want = [out, *torch.autograd.grad(out, inputs, grad.double())]
        try:
            inputs = [x.requires_grad_() for x in (q, k, v)]
            out = attend(*inputs, make_stream(lengths, parents, device), window, head_dim**-0.5)
            got = [out, *torch.autograd.grad(out, inputs, grad)]
            close = [(a.double() - b).norm() <= 0.02 * b.norm() for a, b in zip(got, want, strict=True)]
            if all(close):
                return True
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            problem = str(error)
    warnings.warn(f"varlen_attn of torch {torch.__version__} cannot be used on {device} with {dtype} "
                  f"and heads of {head_dim} ({problem}); segments are computed one by one, which is "
                  "slower and exact", stacklevel=2)
    return False


def eager_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], parents: list[int],
                    window: int | None, scale: float) -> Tensor:
    """As `attend`, by a mask over all pairs of tokens."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    parent = torch.tensor(parents)[segment]
    at = torch.arange(len(segment)) - torch.tensor([0, *lengths]).cumsum(0)[segment]
    at = at + torch.where(parent >= 0, torch.tensor(lengths)[parent], 0)  # after the parent's
    seen = (segment[:, None] == segment) & (at[:, None] >= at) | (parent[:, None] == segment)
    if window is not None:
        seen &= at[:, None] - at < window
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(~seen.to(q.device), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
