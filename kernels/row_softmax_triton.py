"""Row softmax in Triton; the formulas are those of `row_softmax.py`, with powers of 2 for exp.

`logp_kernel`: one program a row, one read, maximum and sum online; with GRAD it reads the row again,
out of L2, and writes G in place. `grad_kernel`: one program a block of a row, one read and one write
in place. All arithmetic is float32; G is rounded once, target element included: p - 1 in bf16 would
lose every digit of a confident prediction. Both terms of logp are <= 0, so no rounding makes it
positive. A row's values do not depend on its neighbours.

Bytes a logit with 2-byte logits: 2 for logp, 4 for grad, 4 to 6 for both in one.
"""

import triton
import triton.language as tl
from torch import Tensor

from srit.kernels.row_softmax import Logits

# Larger blocks spill: 32768 with 32 warps does on sm_90 (compiled by Triton 3.6 and 3.8).
BLOCK = 4096
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """From exp2: libdevice's is not interpretable. Off by 1e-7 at most."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def to_logits(raw, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    z = raw.to(tl.float32)
    if SOFTCAP != 0.0:
        z = tanh(z * (SCALE / SOFTCAP)) * SOFTCAP
    elif SCALE != 1.0:
        z = z * SCALE
    return z


@triton.jit
def load_logits(
    raw_ptr, cols, VOCAB: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Logits of a block of columns, -inf beyond VOCAB; padding up to WIDTH is read, not used."""
    raw = tl.load(raw_ptr + cols, mask=cols < WIDTH, other=0.0, eviction_policy=POLICY)
    return tl.where(cols < VOCAB, to_logits(raw, SCALE, SOFTCAP), -float("inf"))


@triton.jit
def gradient(z, cols, target, top, inv, coef, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    p = tl.exp2((z - top) * LOG2E) * inv
    g = tl.where(cols == target, p - 1.0, p) * coef
    if SOFTCAP != 0.0:
        # Beyond VOCAB z is -inf and g is 0; their product must not be NaN.
        ratio = tl.where(g == 0.0, 0.0, z / SOFTCAP)
        g = g * (1.0 - ratio * ratio) * SCALE
    elif SCALE != 1.0:
        g = g * SCALE
    return g


@triton.jit
def logp_kernel(
    raw_ptr,
    targets_ptr,
    logp_ptr,
    top_ptr,
    inv_ptr,
    entropy_ptr,
    correct_ptr,
    coef_ptr,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,  # row stride >= VOCAB; the padding is read: loads stay 16 bytes wide
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
    GRAD: tl.constexpr,
    HAS_COEF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # n * V exceeds 2^31 at usual sizes
    raw_ptr += row * WIDTH
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < VOCAB)
    z_target = to_logits(
        tl.load(raw_ptr + target, mask=inside, other=float("nan")), SCALE, SOFTCAP
    )
    keep: tl.constexpr = "evict_last" if GRAD else "evict_first"
    top = -float("inf")
    total = 0.0  # sum of e^(z - top)
    moment = 0.0  # sum of e^(z - top) (z - top)
    for start in range(0, VOCAB, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = load_logits(raw_ptr, cols, VOCAB, WIDTH, SCALE, SOFTCAP, keep)
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
            z = load_logits(raw_ptr, cols, VOCAB, WIDTH, SCALE, SOFTCAP, "evict_first")
            g = gradient(z, cols, target, top, inv, coef, SCALE, SOFTCAP)
            tl.store(raw_ptr + cols, g.to(raw_ptr.dtype.element_ty), mask=cols < WIDTH)


@triton.jit
def grad_kernel(
    raw_ptr,
    targets_ptr,
    top_ptr,
    inv_ptr,
    coef_ptr,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_COEF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    raw_ptr += row * WIDTH
    target = tl.load(targets_ptr + row)
    coef = 1.0
    if HAS_COEF:
        coef = tl.load(coef_ptr + row)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = load_logits(raw_ptr, cols, VOCAB, WIDTH, SCALE, SOFTCAP, "evict_first")
    top, inv = tl.load(top_ptr + row), tl.load(inv_ptr + row)
    g = gradient(z, cols, target, top, inv, coef, SCALE, SOFTCAP)
    tl.store(raw_ptr + cols, g.to(raw_ptr.dtype.element_ty), mask=cols < WIDTH)


@triton.jit
def multiply_kernel(x_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:  # one number read instead of a pass over x, and no wait for the host
        cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + cols, mask=cols < n).to(tl.float32)
        tl.store(x_ptr + cols, (x * factor).to(x_ptr.dtype.element_ty), mask=cols < n)


def launch_options(vocab: int) -> dict[str, int]:
    """Block size and warps for rows of `vocab` logits."""
    block = min(BLOCK, max(128, triton.next_power_of_2(vocab)))
    return {"BLOCK": block, "num_warps": 8 if block >= 4096 else 4}


def logp(raw: Tensor, targets: Tensor, stats: Tensor, logits: Logits) -> None:
    """Fills stats, (3, n) or (5, n) float32, for every row of raw (n, V), which stays.

    raw has unit column stride. A target outside [0, V) gives NaN.
    """
    _logp(raw, targets, stats, None, logits, grad=False)


def logp_grad(
    raw: Tensor, targets: Tensor, stats: Tensor, coef: Tensor | None, logits: Logits
) -> None:
    """`logp`, then `grad`, in one launch: for coefficients known beforehand."""
    _logp(raw, targets, stats, coef, logits, grad=True)


def _logp(raw, targets, stats, coef, logits: Logits, grad: bool) -> None:
    n, vocab = raw.shape
    extra = len(stats) == 5
    entropy, correct = stats[3:] if extra else (stats[0], stats[0])
    logp_kernel[(n,)](
        raw, targets, *stats[:3], entropy, correct, stats[0] if coef is None else coef.contiguous(),
        vocab, raw.stride(0), *map(float, logits), extra, grad, coef is not None,
        **launch_options(vocab),
    )


def grad(raw: Tensor, targets: Tensor, stats: Tensor, coef: Tensor | None, logits: Logits) -> None:
    """Turns raw (n, V) into G in place; coef (n,) float32, 1 when None.

    Memory between V and the row stride of raw is padding and is overwritten.
    """
    n, vocab = raw.shape
    options = launch_options(vocab)
    top, inv = stats[1:3]
    grid = (n, triton.cdiv(vocab, options["BLOCK"]))
    grad_kernel[grid](
        raw, targets, top, inv, inv if coef is None else coef.contiguous(),
        vocab, raw.stride(0), *map(float, logits), coef is not None, **options,
    )


def multiply_(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor (0-d) without touching memory where factor is 1, nor waiting to know it."""
    n = tensor.numel()
    multiply_kernel[(triton.cdiv(n, BLOCK),)](tensor, factor, n, BLOCK, num_warps=8)
