"""Row pass of `linear_logp` in Triton: what happens to a chunk of logits between the GEMMs.

    top = max_v z_v     inv = 1 / s     s = sum_v 2^((z_v - top) log2 e)
    logp = (z_t - top) - ln 2 log2 s
    G_v = scale * (2^((z_v - top) log2 e) inv - [v = t])

`logp_kernel`: one program a row, one read, maximum and sum online. `grad_kernel`: one program a
block of a row, one read and one write in place. All arithmetic is float32; G is rounded once, target
element included: p - 1 in bf16 would lose every digit of a confident prediction. Both terms of logp
are <= 0, so no rounding makes it positive. A row's values do not depend on its neighbours.

Bytes a logit with 2-byte logits: 2 for logp, 4 for G.
"""

import triton
import triton.language as tl
from torch import Tensor

# Larger blocks spill: 32768 with 32 warps does on sm_90 (compiled by Triton 3.6 and 3.8).
BLOCK = 4096


@triton.jit
def logp_kernel(
    z_ptr,
    targets_ptr,
    logp_ptr,
    top_ptr,
    inv_ptr,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,  # row stride >= VOCAB; the padding is read: loads stay 16 bytes wide
    BLOCK: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0).to(tl.int64)  # n * V exceeds 2^31 at usual sizes
    z_ptr += row * WIDTH
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < VOCAB)
    z_target = tl.load(z_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
    top = -float("inf")
    total = 0.0
    for start in range(0, VOCAB, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
        z = tl.where(cols < VOCAB, z, -float("inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp2((top - new_top) * LOG2E)
        total += tl.sum(tl.exp2((z - new_top) * LOG2E), 0)
        top = new_top
    tl.store(logp_ptr + row, (z_target - top) - LN2 * tl.log2(total))
    tl.store(top_ptr + row, top)
    tl.store(inv_ptr + row, 1.0 / total)


@triton.jit
def grad_kernel(
    z_ptr,
    targets_ptr,
    top_ptr,
    inv_ptr,
    scale_ptr,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * WIDTH
    target = tl.load(targets_ptr + row)
    top = tl.load(top_ptr + row)
    inv = tl.load(inv_ptr + row)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    z = tl.where(cols < VOCAB, z, -float("inf"))
    p = tl.exp2((z - top) * LOG2E) * inv
    g = tl.where(cols == target, p - 1.0, p)
    if SCALED:
        g = g * tl.load(scale_ptr + row)
    tl.store(z_ptr + cols, g.to(z_ptr.dtype.element_ty), mask=cols < WIDTH)


def launch_options(vocab: int) -> dict[str, int]:
    """Block size and warps for rows of `vocab` logits."""
    block = min(BLOCK, max(128, triton.next_power_of_2(vocab)))
    return {"BLOCK": block, "num_warps": 8 if block >= 4096 else 4}


def logp(z: Tensor, targets: Tensor, stats: Tensor) -> None:
    """Fills stats (3, n) float32 with logp, top and inv of every row of z (n, V); z stays.

    z has unit column stride. A target outside [0, V) gives NaN.
    """
    n, vocab = z.shape
    logp_kernel[(n,)](z, targets, *stats, vocab, z.stride(0), **launch_options(vocab))


def grad(z: Tensor, targets: Tensor, stats: Tensor, scale: Tensor | None) -> None:
    """Turns the logits z (n, V) into G in place; scale (n,) float32, 1 when None.

    Memory between V and the row stride of z is padding and is overwritten.
    """
    n, vocab = z.shape
    options = launch_options(vocab)
    _, top, inv = stats
    grid = (n, triton.cdiv(vocab, options["BLOCK"]))
    scaled = scale is not None
    scale = scale.contiguous() if scaled else inv
    grad_kernel[grid](z, targets, top, inv, scale, vocab, z.stride(0), scaled, **options)
