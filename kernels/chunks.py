"""How the head's rows go through in chunks: sizes, buffers and the weight's gradient.

A chunk's GEMMs read W twice and read and write the float32 sum of dW once, 12 V D bytes in bf16,
against 6 R V D FLOPs for its R rows: a loss of time that shrinks with R alone (docs/kernels.md).
So chunks are as large as the budget allows, and all of one size.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
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
    """Rows whose logits, in the dtype of x, fit `chunk_bytes`; at least one."""
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["cuda"])
    return max(1, chunk_bytes // (vocab * x.element_size()))


def row_chunks(n: int, limit: int) -> list[slice]:
    """n rows in as few chunks of at most `limit` as do, equalised so that none is a rest."""
    if n == 0:
        return []
    rows = math.ceil(n / math.ceil(n / limit))
    tiled = math.ceil(rows / TILE_ROWS) * TILE_ROWS
    if rows >= 16 * TILE_ROWS and tiled <= limit:  # the last chunk can spare the others' rounding
        rows = tiled
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def group_chunks(ends: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Groups of rows that must not be parted, in chunks of about equal size: (first, last + 1).

    `ends[i]` is where group i ends. A group that is larger than `limit` gets a chunk of its own.
    """
    chunks, first, start = [], 0, 0
    while first < len(ends):
        left = ends[-1] - start
        aim = start + math.ceil(left / math.ceil(left / limit))
        last = max(first + 1, bisect_right(ends, aim))
        if last < len(ends) and ends[last] - start <= limit and ends[last] + ends[last - 1] < 2 * aim:
            last += 1  # its end is nearer
        chunks.append((first, last))
        first, start = last, ends[last - 1]
    return chunks


def row_ops(device: torch.device) -> ModuleType:
    if use_triton(device):
        from srit.kernels import row_softmax_triton

        return row_softmax_triton
    return row_softmax


def operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Detached, contiguous, in the dtype of the GEMMs."""
    return hidden.detach().contiguous(), weight.detach().to(hidden.dtype).contiguous()


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits_buffer(rows: int, weight: Tensor) -> Tensor:
    """(rows, V) uninitialised; rows start on a 64-byte boundary whatever V is.

    GEMM libraries need that for their fast kernels, and pick another one, with another rounding,
    where it is missing; here it makes the values independent of where a chunk's buffer begins.
    """
    vocab, align = len(weight), ROW_ALIGNMENT // weight.element_size()
    return weight.new_empty(rows, math.ceil(vocab / align) * align)[:, :vocab]


def new_stats(x: Tensor, n: int, extra: bool = False) -> Tensor:
    """(3, n), or (5, n) with `extra`: what `logp` of the row softmax writes and `grad` reads."""
    return x.new_empty(5 if extra else 3, n, dtype=wide(x.dtype))


class WeightGrad:
    """The sum over chunks of G^T X, (V, D), in float32 while there is more than one chunk.

    The first chunk writes it, so nothing is filled with zeros. On a GPU the GEMM itself adds in
    float32. On the CPU no GEMM takes bf16 and gives float32: a chunk's part is rounded to the dtype
    of G first, and goes through the cache a slab of V at a time.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.total: Tensor | None = None

    def add(self, g: Tensor, x: Tensor, last: bool) -> None:
        """Adds G^T X of a chunk; `last` when no other follows."""
        out_dtype = wide(x.dtype)
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
        """In the dtype of the parameter; zeros where there was no row."""
        if self.total is None:
            return torch.zeros_like(self.weight, dtype=self.dtype)
        return self.total.to(self.dtype)


def check_operands(name: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """ValueError unless hidden (N, D), weight (V, D), targets (N,) in [0, V) go together."""
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


def check_logits(name: str, softcap: float | None, logit_scale: float) -> row_softmax.Logits:
    """ValueError unless both are positive."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{name}: softcap={softcap}: must be greater than 0, or None for no cap")
    if not logit_scale > 0:
        raise ValueError(f"{name}: logit_scale={logit_scale}: must be greater than 0")
    return row_softmax.Logits(float(logit_scale), float(softcap or 0.0))
