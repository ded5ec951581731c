"""Splits the rows of the head into chunks: sizes, logits buffers, and the sum of the weight's gradient.

A chunk of R rows reads W twice and reads and writes the float32 sum of dW once: 12 V D bytes in bf16,
against 6 R V D FLOPs. The relative cost falls with R alone (docs/kernels.md), so chunks are as large as
the budget allows, and all of one size.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from srit.kernels import row_softmax
from srit.kernels.dispatch import use_triton

MIB = 1 << 20
CHUNK_BYTES = {"cpu": 64 * MIB, "cuda": 2048 * MIB}
ROW_ALIGNMENT = 64  # bytes
TILE_ROWS = 128  # of the GEMM libraries' kernels
SLAB_BYTES = 4 * MIB
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def chunk_limit(x: Tensor, vocab: int, chunk_bytes: int | None) -> int:
    """Number of rows whose logits, in the dtype of x, fit `chunk_bytes`; at least one."""
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["cuda"])
    return max(1, chunk_bytes // (vocab * x.element_size()))


def row_chunks(n: int, limit: int) -> list[slice]:
    """n rows in as few chunks as possible of at most `limit` rows, all of about one size."""
    if n == 0:
        return []
    rows = math.ceil(n / math.ceil(n / limit))
    tiled = math.ceil(rows / TILE_ROWS) * TILE_ROWS
    if rows >= 16 * TILE_ROWS and tiled <= limit:  # whole GEMM tiles; only the last chunk has a rest
        rows = tiled
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def group_chunks(ends: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Chunks (first, last + 1) of whole groups of rows, all of about one size.

    `ends[i]` is the row where group i ends. A group of more than `limit` rows is a chunk of its own.
    """
    chunks, first, start = [], 0, 0
    while first < len(ends):
        left = ends[-1] - start
        aim = start + math.ceil(left / math.ceil(left / limit))
        last = max(first + 1, bisect_right(ends, aim))
        if last < len(ends) and ends[last] - start <= limit and ends[last] + ends[last - 1] < 2 * aim:
            last += 1  # the end of the next group is closer to the aim
        chunks.append((first, last))
        first, start = last, ends[last - 1]
    return chunks


def row_ops(device: torch.device) -> ModuleType:
    if use_triton(device):
        from srit.kernels import row_softmax_triton

        return row_softmax_triton
    return row_softmax


def operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both detached, contiguous and in the dtype of the GEMMs, which is that of hidden."""
    return hidden.detach().contiguous(), weight.detach().to(hidden.dtype).contiguous()


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits_buffer(rows: int, weight: Tensor) -> Tensor:
    """(rows, V), uninitialised; every row starts on a 64-byte boundary, whatever V is.

    GEMM libraries need the alignment for their fast kernels; without it they choose other kernels,
    which round differently. What lies between the rows is zero: bf16 GEMMs of CPUs with AMX multiply it
    by zero, which must not make NaN.
    """
    vocab, align = len(weight), ROW_ALIGNMENT // weight.element_size()
    buffer = weight.new_empty(rows, math.ceil(vocab / align) * align)
    buffer[:, vocab:] = 0
    return buffer[:, :vocab]


def chunk_logits(x: Tensor, w: Tensor, limit: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of at most `limit` rows with their logits x w^T, (R, V), all in the same buffer."""
    parts = row_chunks(len(x), limit)
    buffer = logits_buffer(parts[0].stop if parts else 0, w)
    for part in parts:
        yield part, torch.mm(x[part], w.t(), out=buffer[: part.stop - part.start])


def new_stats(x: Tensor, n: int, extra: bool = False) -> Tensor:
    """(3, n), or (5, n) with `extra`: the row softmax's `logp` writes it and `grad` reads it."""
    return x.new_empty(5 if extra else 3, n, dtype=accum_dtype(x.dtype))


class WeightGrad:
    """The sum over chunks of G^T X, (V, D), in float32 if there is more than one chunk.

    The first chunk writes the sum, so nothing is filled with zeros. On a GPU the GEMM itself adds in
    float32. No CPU library multiplies bf16 into float32: there the product of a chunk is rounded to the
    dtype of G first, and is added one slab of V at a time so that it stays in cache.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.total: Tensor | None = None

    def add(self, g: Tensor, x: Tensor, last: bool) -> None:
        """Adds G^T X of a chunk; `last` if it is the last one."""
        out_dtype = accum_dtype(x.dtype)
        only = self.total is None and last and self.dtype == x.dtype
        if x.dtype == out_dtype or only:
            self.total = torch.mm(g.t(), x) if self.total is None else self.total.addmm_(g.t(), x)
        elif x.is_cuda and self.total is None:
            self.total = torch.mm(g.t(), x, out_dtype=out_dtype)
        elif x.is_cuda:
            torch.addmm(self.total, g.t(), x, out_dtype=out_dtype, out=self.total)
        else:
            first = self.total is None
            if first:
                self.total = torch.empty_like(self.weight, dtype=out_dtype)
            slab = max(1, SLAB_BYTES // (x.shape[1] * x.element_size()))
            for at, into in zip(g.split(slab, 1), self.total.split(slab), strict=True):
                part = torch.mm(at.t(), x)
                into.copy_(part) if first else into.add_(part)

    def result(self) -> Tensor:
        """The sum in the dtype of the parameter; zeros if there was no row."""
        if self.total is None:
            return torch.zeros_like(self.weight, dtype=self.dtype)
        return self.total.to(self.dtype)


def check_operands(name: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Raises ValueError unless hidden is (N, D), weight (V, D) and targets (N,) in [0, V)."""
    sizes = [tuple(t.shape) for t in (hidden, weight, targets)]
    shapes = "hidden {}, weight {}, targets {}".format(*sizes)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"{name} needs hidden (N, D) and weight (V, D), got {shapes}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"{name} needs targets (N,) int64, got {shapes}, {targets.dtype}")
    if len(weight) == 0:
        raise ValueError(f"{name} needs a vocabulary of at least one token, got {shapes}")
    for label, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: {label} has dtype {tensor.dtype}, allowed are {DTYPES}")
    if targets.device.type == "cpu" and len(targets):
        low, high = (int(t) for t in targets.aminmax())
        if low < 0 or high >= len(weight):
            raise ValueError(
                f"{name}: targets range from {low} to {high}, allowed are 0 to {len(weight) - 1};"
                " drop the rows without a target first"
            )
