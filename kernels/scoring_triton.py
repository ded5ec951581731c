"""Path B of `linear_logp`, forward only: a GEMM whose logits never leave the chip.

`partials_kernel`: a program takes a block of rows and one of S slices of the vocabulary, computes the
slice's logits tile by tile on tensor cores, and keeps the running maximum and sum of every row, in
powers of 2. `merge_kernel`: a program takes a row, computes the target's logit, and merges the S
partial results in a fixed order.

The logits stay float32 and are never rounded to 16 bits. S is a constant and rows never mix, so the
bits of a row do not depend on its batch. The main loop compares with neither the target nor the end of
the vocabulary: the target has its own dot product, and the last tile its own code.

Bytes: x is read once per slice, W once per group of row blocks, 8 S N for the partial results; no N V.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from srit.kernels.row_softmax_triton import LN2, LOG2E

SLICES = 16
GROUP_M = 8
DOT_BLOCK = 1024


@triton.jit
def logits_tile(
    x, w, row, col, n, VOCAB: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) logits from (row, col) on, times log2 e. Rows and columns beyond the end hold
    arbitrary finite numbers."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    ks = tl.arange(0, BLOCK_K)
    # For pointers: clamped, so that the inner loop needs no mask on rows and columns.
    rows = tl.minimum(row + tl.arange(0, BLOCK_M), n - 1).to(tl.int64)
    cols = tl.minimum(col + tl.arange(0, BLOCK_N), VOCAB - 1).to(tl.int64)
    for k in range(0, D, BLOCK_K):
        if TMA:
            a = x.load([row, k])
            b = w.load([col, k])
        elif D % BLOCK_K == 0:
            a = tl.load(x + rows[:, None] * D + (k + ks)[None, :])
            b = tl.load(w + cols[:, None] * D + (k + ks)[None, :])
        else:
            inside = (k + ks)[None, :] < D
            a = tl.load(x + rows[:, None] * D + (k + ks)[None, :], mask=inside, other=0.0)
            b = tl.load(w + cols[:, None] * D + (k + ks)[None, :], mask=inside, other=0.0)
        if WIDEN:  # the interpreter multiplies the bit patterns of bfloat16
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b.T, acc, input_precision="ieee")
    return acc * LOG2E


@triton.jit
def add_tile(z, top, total):
    """Running maximum and sum of 2^(z - top) of every row."""
    new_top = tl.maximum(top, tl.max(z, 1))
    total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(z - new_top[:, None]), 1)
    return new_top, total


@triton.jit
def partials_kernel(
    x,  # (n, D) descriptor or pointer
    w,  # (V, D) descriptor or pointer
    tops_ptr,  # (S, n)
    totals_ptr,  # (S, n)
    n,
    VOCAB: tl.constexpr,
    D: tl.constexpr,
    SLICES: tl.constexpr,
    TMA: tl.constexpr,
    WIDEN: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Row blocks run fastest within a group, so that programs running together share a panel of W.
    blocks = tl.cdiv(n, BLOCK_M)
    group = tl.program_id(0) // (GROUP_M * SLICES)
    size = tl.minimum(blocks - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * SLICES)
    block = group * GROUP_M + within % size
    slice_ = within // size
    row = block * BLOCK_M

    TILES: tl.constexpr = VOCAB // BLOCK_N
    TILES_A_SLICE: tl.constexpr = (TILES + SLICES - 1) // SLICES
    start = slice_ * TILES_A_SLICE * BLOCK_N
    end = tl.minimum(start + TILES_A_SLICE * BLOCK_N, TILES * BLOCK_N)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if TILES > 0:  # Triton 3.6 does not compile a loop that it can see is empty
        col = start
        while col < end:
            z = logits_tile(x, w, row, col, n, VOCAB, D, TMA, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K)
            top, total = add_tile(z, top, total)
            col += BLOCK_N
    if VOCAB % BLOCK_N != 0:
        if slice_ == SLICES - 1:
            z = logits_tile(x, w, row, TILES * BLOCK_N, n, VOCAB, D, TMA, WIDEN,
                            BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
            inside = TILES * BLOCK_N + tl.arange(0, BLOCK_N) < VOCAB
            top, total = add_tile(tl.where(inside[None, :], z, -float("inf")), top, total)
    rows = row + tl.arange(0, BLOCK_M)
    offset = slice_.to(tl.int64) * n + rows
    tl.store(tops_ptr + offset, top, mask=rows < n)
    tl.store(totals_ptr + offset, total, mask=rows < n)


@triton.jit
def merge_kernel(
    x_ptr,
    w_ptr,
    targets_ptr,
    tops_ptr,
    totals_ptr,
    logp_ptr,
    n,
    VOCAB: tl.constexpr,
    D: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < VOCAB)
    dot = tl.zeros([BLOCK], tl.float32)
    for k in range(0, D, BLOCK):
        ks = k + tl.arange(0, BLOCK)
        a = tl.load(x_ptr + row * D + ks, mask=ks < D, other=0.0).to(tl.float32)
        b = tl.load(w_ptr + target * D + ks, mask=(ks < D) & inside, other=0.0).to(tl.float32)
        dot += a * b
    z = tl.sum(dot, 0) * LOG2E
    slices = tl.arange(0, SLICES)
    tops = tl.load(tops_ptr + slices * n + row)
    top = tl.max(tops, 0)
    total = tl.sum(tl.load(totals_ptr + slices * n + row) * tl.exp2(tops - top), 0)
    logp = ((z - top) - tl.log2(total)) * LN2
    # The target's logit was summed in another order than in its tile, so rounding may exceed the total.
    logp = tl.where(logp > 0.0, 0.0, logp)
    tl.store(logp_ptr + row, tl.where(inside, logp, float("nan")))


def launch_options(capability: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile, warps and stages: no spill on sm_80 and sm_90 (tests/kernels/aot.py)."""
    if dtype == torch.float32:  # exact products, without tensor cores
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    if capability >= 90:
        return {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 4}


def uses_descriptors(x: Tensor, w: Tensor, capability: int) -> bool:
    """Whether TMA can fetch the tiles: sm_90, and rows on 16-byte boundaries."""
    aligned = x.shape[1] * x.element_size() % 16 == 0
    return capability >= 90 and aligned and x.data_ptr() % 16 == 0 and w.data_ptr() % 16 == 0


def score(x: Tensor, w: Tensor, targets: Tensor, **options: int) -> Tensor:
    """log p(target) of every row, (n,) float32; x (n, D) and w (V, D) contiguous, of one dtype.

    `options` override `launch_options`, for tuning. A target outside [0, V) gives NaN.
    """
    (n, d), vocab = x.shape, len(w)
    logp = torch.empty(n, dtype=torch.float32, device=x.device)
    if n == 0:
        return logp
    capability = 90
    if x.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.device)
        capability = 10 * major + minor
    options = launch_options(capability, x.dtype) | options
    tma = uses_descriptors(x, w, capability)
    a, b = x, w
    if tma:
        a = TensorDescriptor.from_tensor(x, [options["BLOCK_M"], options["BLOCK_K"]])
        b = TensorDescriptor.from_tensor(w, [options["BLOCK_N"], options["BLOCK_K"]])
    partial = torch.empty(2, SLICES, n, dtype=torch.float32, device=x.device)
    widen = not x.is_cuda and x.dtype == torch.bfloat16
    grid = (triton.cdiv(n, options["BLOCK_M"]) * SLICES,)
    partials_kernel[grid](
        a, b, *partial, n, vocab, d, SLICES, tma, widen, GROUP_M, **options,
    )
    merge_kernel[(n,)](x, w, targets, *partial, logp, n, vocab, d, SLICES, DOT_BLOCK, num_warps=4)
    return logp
