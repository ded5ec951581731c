"""Row softmax in Triton; formulas as in `row_softmax.py`, with powers of 2 for exp.

`logp_kernel`: one program per row; reads the row once, with online maximum and sum. With GRAD it reads
the row again, from L2, and writes G in place. `grad_kernel`: one program per block of a row; reads and
writes it once, in place. All arithmetic is float32, and G is rounded once, target element included:
p - 1 in bf16 would lose all digits of a confident prediction. Both terms of logp are <= 0, so rounding
cannot make it positive. A row's values do not depend on its neighbours.

Bytes per logit of 2 bytes: 2 for logp, 4 for grad, 4 to 6 for both in one launch.
"""

import triton
import triton.language as tl
from torch import Tensor

# Larger blocks spill: 32768 with 32 warps does on sm_90 (compiled by Triton 3.6 and 3.8).
BLOCK = 4096
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_logits(
    logits_ptr, cols, VOCAB: tl.constexpr, WIDTH: tl.constexpr, POLICY: tl.constexpr
):
    """A block of columns in float32, -inf beyond VOCAB; padding up to WIDTH is read but not used."""
    z = tl.load(logits_ptr + cols, mask=cols < WIDTH, other=0.0, eviction_policy=POLICY)
    return tl.where(cols < VOCAB, z.to(tl.float32), -float("inf"))


@triton.jit
def gradient(z, cols, target, top, inv, coef):
    p = tl.exp2((z - top) * LOG2E) * inv
    return tl.where(cols == target, p - 1.0, p) * coef


@triton.jit
def logp_kernel(
    logits_ptr,
    targets_ptr,
    logp_ptr,
    top_ptr,
    inv_ptr,
    entropy_ptr,
    correct_ptr,
    coef_ptr,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,  # row stride >= VOCAB; reading the padding keeps loads 16 bytes wide
    STATS: tl.constexpr,
    GRAD: tl.constexpr,
    HAS_COEF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # n * V exceeds 2^31 at usual sizes
    logits_ptr += row * WIDTH
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < VOCAB)
    z_target = tl.load(logits_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
    keep: tl.constexpr = "evict_last" if GRAD else "evict_first"
    top = -float("inf")
    total = 0.0  # sum of e^(z - top)
    moment = 0.0  # sum of e^(z - top) (z - top)
    for start in range(0, VOCAB, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = load_logits(logits_ptr, cols, VOCAB, WIDTH, keep)
        new_top = tl.maximum(top, tl.max(z, 0))
        shrink = tl.exp2((top - new_top) * LOG2E)
        e = tl.exp2((z - new_top) * LOG2E)
        if STATS:
            moved = total * tl.where(total > 0.0, top - new_top, 0.0)
            terms = e * tl.where(e == 0.0, 0.0, z - new_top)
            moment = shrink * (moment + moved) + tl.sum(terms, 0)
        total = total * shrink + tl.sum(e, 0)
        top = new_top
    inv = 1.0 / total
    log_total = tl.log2(total) * LN2
    tl.store(logp_ptr + row, (z_target - top) - log_total)
    tl.store(top_ptr + row, top)
    tl.store(inv_ptr + row, inv)
    if STATS:
        tl.store(entropy_ptr + row, log_total - moment * inv)
        tl.store(correct_ptr + row, tl.where(z_target == top, 1.0, 0.0))
    if GRAD:
        coef = 1.0
        if HAS_COEF:
            coef = tl.load(coef_ptr + row)
        for start in range(0, VOCAB, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z = load_logits(logits_ptr, cols, VOCAB, WIDTH, "evict_first")
            g = gradient(z, cols, target, top, inv, coef)
            tl.store(logits_ptr + cols, g.to(logits_ptr.dtype.element_ty), mask=cols < WIDTH)


@triton.jit
def grad_kernel(
    logits_ptr,
    targets_ptr,
    top_ptr,
    inv_ptr,
    coef_ptr,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_COEF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * WIDTH
    target = tl.load(targets_ptr + row)
    coef = 1.0
    if HAS_COEF:
        coef = tl.load(coef_ptr + row)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = load_logits(logits_ptr, cols, VOCAB, WIDTH, "evict_first")
    top, inv = tl.load(top_ptr + row), tl.load(inv_ptr + row)
    g = gradient(z, cols, target, top, inv, coef)
    tl.store(logits_ptr + cols, g.to(logits_ptr.dtype.element_ty), mask=cols < WIDTH)


@triton.jit
def multiply_kernel(x_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:  # decided on the device: the host does not wait, and x is not read for 1
        cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + cols, mask=cols < n).to(tl.float32)
        tl.store(x_ptr + cols, (x * factor).to(x_ptr.dtype.element_ty), mask=cols < n)


def launch_options(vocab: int) -> dict[str, int]:
    """Block size and warps for rows of `vocab` logits."""
    block = min(BLOCK, max(128, triton.next_power_of_2(vocab)))
    return {"BLOCK": block, "num_warps": 8 if block >= 4096 else 4}


def logp(logits: Tensor, targets: Tensor, stats: Tensor) -> None:
    """Fills stats, (3, n) or (5, n) float32, for every row of logits (n, V), which stay as they are.

    logits has unit column stride. A target outside [0, V) gives NaN.
    """
    _logp(logits, targets, stats, None, grad=False)


def logp_grad(logits: Tensor, targets: Tensor, stats: Tensor, coef: Tensor | None) -> None:
    """`logp` and `grad` in one launch, for coefficients that are known beforehand."""
    _logp(logits, targets, stats, coef, grad=True)


def _logp(logits, targets, stats, coef, grad: bool) -> None:
    n, vocab = logits.shape
    extra = len(stats) == 5
    entropy, correct = stats[3:] if extra else (stats[0], stats[0])
    logp_kernel[(n,)](
        logits, targets, *stats[:3], entropy, correct,
        stats[0] if coef is None else coef.contiguous(), vocab, logits.stride(0),
        extra, grad, coef is not None, **launch_options(vocab),
    )


def grad(logits: Tensor, targets: Tensor, stats: Tensor, coef: Tensor | None) -> None:
    """Turns logits (n, V) into G in place; coef (n,) float32, None for 1.

    The padding between V and the row stride is overwritten.
    """
    n, vocab = logits.shape
    options = launch_options(vocab)
    top, inv = stats[1:3]
    grid = (n, triton.cdiv(vocab, options["BLOCK"]))
    grad_kernel[grid](
        logits, targets, top, inv, inv if coef is None else coef.contiguous(),
        vocab, logits.stride(0), coef is not None, **options,
    )


def multiply_(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor (0-d); memory is not touched if factor is 1, and the host does not wait."""
    n = tensor.numel()
    multiply_kernel[(triton.cdiv(n, BLOCK),)](tensor, factor, n, BLOCK, num_warps=8)
