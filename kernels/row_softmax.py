"""Row softmax in PyTorch: what happens to a chunk of logits between the GEMMs.

    z = cap tanh(scale raw / cap)      raw: the GEMM's output; see `Logits`
    top = max_v z_v      inv = 1 / sum_v exp(z_v - top)      logp = (z_t - top) + log inv
    entropy = -log inv - sum_v p_v (z_v - top)               p_v = exp(z_v - top) inv
    G_v = coef * (p_v - [v = t]) * dz_v / draw_v

A few rows at a time go through float32 scratch memory that stays in cache between the steps, so
low-precision logits never exist whole in float32. Both terms of logp are <= 0, so it is.

The exponentials are all left to `torch.softmax`: exp_ on a tensor is several times slower and falls
off a cliff where its result is a denormal number.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# float32 working set: within a CPU's caches; on a GPU a few launches a chunk.
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}

# Rows of `stats`, (3, n) or (5, n). `CORRECT` is 1 where no logit exceeds the target's.
LOGP, TOP, INV, ENTROPY, CORRECT = range(5)


class Logits(NamedTuple):
    """How the head's outputs become logits: cap * tanh(scale * raw / cap); no cap when 0."""

    scale: float = 1.0
    softcap: float = 0.0


def logp(raw: Tensor, targets: Tensor, stats: Tensor, logits: Logits) -> None:
    """Fills stats, (3, n) or (5, n) float32, for every row of raw (n, V), which stays."""
    for part, z in _blocks(raw, stats.dtype):
        _apply(logits, z)
        _softmax(z, targets[part], stats[:, part])


def grad(raw: Tensor, targets: Tensor, stats: Tensor, coef: Tensor | None, logits: Logits) -> None:
    """Turns raw (n, V) into G in place; coef (n,) float32, 1 when None.

    G is rounded to the dtype of raw once, target element included: p - 1 in bf16 would lose every
    digit of a confident prediction.
    """
    for part, z in _blocks(raw, stats.dtype):
        slope = _apply(logits, z, slope=True)
        torch.softmax(z, 1, out=z)
        raw[part] = _gradient(z, targets[part], None if coef is None else coef[part], slope)


def logp_grad(
    raw: Tensor, targets: Tensor, stats: Tensor, coef: Tensor | None, logits: Logits
) -> None:
    """`logp`, then `grad`, in one go: for coefficients known beforehand."""
    for part, z in _blocks(raw, stats.dtype):
        slope = _apply(logits, z, slope=True)
        _softmax(z, targets[part], stats[:, part])
        raw[part] = _gradient(z, targets[part], None if coef is None else coef[part], slope)


def multiply_(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor (0-d) without touching memory where factor is 1."""
    if factor != 1:
        tensor.mul_(factor)


def _blocks(raw: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows with a contiguous copy of them in `dtype`, in the same scratch memory."""
    n, vocab = raw.shape
    size = BLOCK_BYTES.get(raw.device.type, BLOCK_BYTES["cuda"])
    rows = max(1, min(n, size // (vocab * dtype.itemsize)))
    scratch = raw.new_empty(rows, vocab, dtype=dtype)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        yield part, scratch[: part.stop - start].copy_(raw[part])


def _apply(logits: Logits, z: Tensor, slope: bool = False) -> Tensor | float | None:
    """Turns head outputs into logits in place; returns dz/draw when asked, None for 1."""
    scale, cap = logits
    if scale == 1 and not cap:
        return None
    if not cap:
        z.mul_(scale)
        return scale
    z.mul_(scale / cap).tanh_()
    derivative = z.square().neg_().add_(1).mul_(scale) if slope else None
    z.mul_(cap)
    return derivative


def _softmax(z: Tensor, targets: Tensor, stats: Tensor) -> None:
    """Turns logits into probabilities in place and fills stats."""
    top = torch.amax(z, 1, out=stats[TOP])
    gap = z.gather(1, targets[:, None])[:, 0] - top
    centred = z - top[:, None] if len(stats) > ENTROPY else None
    torch.softmax(z, 1, out=z)
    # The largest probability is exp(0) / sum.
    log_inv = torch.amax(z, 1, out=stats[INV]).log()
    torch.add(gap, log_inv, out=stats[LOGP])
    if centred is not None:
        torch.sub(-log_inv, torch.linalg.vecdot(z, centred), out=stats[ENTROPY])
        stats[CORRECT] = gap == 0


def _gradient(
    p: Tensor, targets: Tensor, coef: Tensor | None, slope: Tensor | float | None
) -> Tensor:
    """Turns probabilities into G in place."""
    p.scatter_add_(1, targets[:, None], p.new_full((len(p), 1), -1))
    if coef is not None:
        p.mul_(coef[:, None])
    return p if slope is None else p.mul_(slope)
