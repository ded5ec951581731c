"""Row pass of `linear_logp` in PyTorch: what happens to a chunk of logits between the GEMMs.

    top = max_v z_v      inv = 1 / sum_v exp(z_v - top)      logp = (z_t - top) + log inv
    G_v = scale * (exp(z_v - top) inv - [v = t])

Both work on a few rows at a time in float32 scratch memory: the rows stay in cache between the
steps, and low-precision logits never exist whole in float32. Both terms of logp are <= 0, so it is.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# float32 working set: within a CPU's caches; on a GPU a few launches a chunk.
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 128 << 20}


def logp(z: Tensor, targets: Tensor, stats: Tensor) -> None:
    """Fills stats (3, n) float32 with logp, top and inv of every row of z (n, V); z stays."""
    for part, p in _blocks(z, stats.dtype):
        top = torch.amax(p, 1, out=stats[1, part])
        stats[0, part] = p.gather(1, targets[part, None])[:, 0] - top
        torch.softmax(p, 1, out=p)
        # The largest probability is exp(0) / sum.
        stats[0, part] += torch.amax(p, 1, out=stats[2, part]).log()


def grad(z: Tensor, targets: Tensor, stats: Tensor, scale: Tensor | None) -> None:
    """Turns the logits z (n, V) into G in place; scale (n,) float32, 1 when None.

    G is rounded to the dtype of z once, target element included: p - 1 in bf16 would lose every
    digit of a confident prediction.
    """
    _, top, inv = stats
    scale = torch.ones_like(inv) if scale is None else scale
    factor = inv * scale
    for part, p in _blocks(z, stats.dtype):
        p.sub_(top[part, None]).exp_().mul_(factor[part, None])
        p.scatter_add_(1, targets[part, None], -scale[part, None])
        z[part] = p


def _blocks(z: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows with a contiguous copy of them in `dtype`, in the same scratch memory."""
    n, vocab = z.shape
    size = BLOCK_BYTES.get(z.device.type, BLOCK_BYTES["cuda"])
    rows = max(1, min(n, size // (vocab * dtype.itemsize)))
    scratch = z.new_empty(rows, vocab, dtype=dtype)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        yield part, scratch[: part.stop - start].copy_(z[part])
