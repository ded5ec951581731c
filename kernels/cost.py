"""What the linear head costs: FLOPs, and bytes of the two kinds of tensor that are large.

The tests hold the operations to these numbers, so that an extra GEMM or an extra pass over (N, V) or
(V, D) fails on any machine; docs/kernels.md derives its roofline from them. Tensors of (N, D) and
smaller are left out: D / V of the rest.
"""

from collections.abc import Sequence
from typing import NamedTuple

# GEMMs over N x D x V; accesses of a logit; readings of W per chunk. In the order of the work:
# write, logp, [write again,] G (read, write), dX, dW.
MODES = {
    "score": (1, 2, 1),
    "one_pass": (3, 6, 2),
    "stash": (3, 6, 2),
    "recompute": (4, 7, 3),
    "frozen": (2, 5, 2),
}


class Cost(NamedTuple):
    flops: int
    logits_bytes: int  # traffic of (rows, V) buffers
    weight_bytes: int  # traffic of W and dW


def head_cost(
    chunks: Sequence[int], d: int, vocab: int, mode: str, itemsize: int = 2, weight_itemsize: int = 4
) -> Cost:
    """Cost of one call, forward and backward, on `chunks` rows each.

    Args:
        chunks: rows of every chunk.
        mode: "score" (no gradient), "one_pass" (`linear_nll`, `linear_dpo`), "stash" and "recompute"
            (`linear_logp` with its logits kept or not), "frozen" (no gradient of the weight; all
            three).
        itemsize: bytes of the GEMMs' dtype.
        weight_itemsize: bytes of the parameter's dtype.

    The row softmax of "one_pass" and "frozen" reads a row twice; where its program finds the row in the
    cache the second time, a logit moves once less.
    """
    gemms, accesses, readings = MODES[mode]
    n, size = sum(chunks), d * vocab
    weight_bytes = len(chunks) * readings * size * itemsize
    if mode not in ("score", "frozen"):
        # "stash" has all rows in its backward at once: W is read there once, dW has one part.
        parts = 1 if mode == "stash" else len(chunks)
        if mode == "stash":
            weight_bytes = (len(chunks) + 1) * size * itemsize
        if parts == 1 and weight_itemsize == itemsize:
            weight_bytes += size * itemsize
        else:
            weight_bytes += size * 4 * (1 + 2 * (parts - 1))
            if weight_itemsize != 4:
                weight_bytes += size * (4 + weight_itemsize)
    return Cost(2 * gemms * n * size, n * vocab * itemsize * accesses, weight_bytes)
