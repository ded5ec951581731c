"""Row softmax in PyTorch: what happens to a chunk of logits z (n, V) between the GEMMs.

    top = max_v z_v      inv = 1 / sum_v exp(z_v - top)      logp = (z_t - top) + log inv
    entropy = -log inv - sum_v p_v (z_v - top)               p_v = exp(z_v - top) inv
    G_v = coef (p_v - [v = t])

A few rows at a time are copied to a float32 scratch buffer that stays in cache, so low-precision logits
never exist in float32 as a whole. Both terms of logp are <= 0, so logp is too.

All exponentials come from `torch.softmax`: `Tensor.exp_` is several times slower, and much slower still
where the result is denormal.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# float32 scratch: fits the caches of a CPU; on a GPU it means a few launches per chunk.
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}

# Rows of `stats`, (3, n) or (5, n). CORRECT is 1 where no logit exceeds the target's.
LOGP, TOP, INV, ENTROPY, CORRECT = range(5)


def logp(logits: Tensor, targets: Tensor, stats: Tensor) -> None:
    """Fills stats, (3, n) or (5, n) float32, for every row of logits (n, V), which stay as they are."""
    for part, z in _blocks(logits, stats.dtype):
        _softmax(z, targets[part], stats[:, part])


def grad(logits: Tensor, targets: Tensor, stats: Tensor, coef: Tensor | None) -> None:
    """Turns logits (n, V) into G in place; coef (n,) float32, None for 1.

    G is rounded to the dtype of the logits once, target element included: p - 1 in bf16 would lose all
    digits of a confident prediction.
    """
    for part, z in _blocks(logits, stats.dtype):
        torch.softmax(z, 1, out=z)
        logits[part] = _gradient(z, targets[part], None if coef is None else coef[part])


def logp_grad(logits: Tensor, targets: Tensor, stats: Tensor, coef: Tensor | None) -> None:
    """`logp` and `grad` in one pass, for coefficients that are known beforehand."""
    for part, z in _blocks(logits, stats.dtype):
        _softmax(z, targets[part], stats[:, part])
        logits[part] = _gradient(z, targets[part], None if coef is None else coef[part])


def multiply_(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor (0-d); memory is not touched if factor is 1."""
    if factor != 1:
        tensor.mul_(factor)


def _blocks(logits: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows, each with its logits copied to the same contiguous scratch buffer in `dtype`."""
    n, vocab = logits.shape
    size = BLOCK_BYTES.get(logits.device.type, BLOCK_BYTES["cuda"])
    rows = max(1, min(n, size // (vocab * dtype.itemsize)))
    scratch = logits.new_empty(rows, vocab, dtype=dtype)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        yield part, scratch[: part.stop - start].copy_(logits[part])


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


def _gradient(p: Tensor, targets: Tensor, coef: Tensor | None) -> Tensor:
    """Turns probabilities into G in place."""
    p.scatter_add_(1, targets[:, None], p.new_full((len(p), 1), -1))
    return p if coef is None else p.mul_(coef[:, None])
