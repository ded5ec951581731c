"""Row pass of `linear_logp` in Triton: logits (n, V) -> log-probabilities, and G in place.

    m = max_v z_v     s = sum_v 2^((z_v - m) log2 e)     logp = (z_t - m) - ln 2 log2 s
    G_v = 2^((z_v - m) log2 e) / s - [v = t]

One program a row. Pass 1 reads the row once and keeps (m, s) online; pass 2 reads it again, out of L2
where the chunk fits, and writes G. All arithmetic is float32, and G's target element is formed before
it is rounded: p - 1 in bf16 would lose every digit of a confident prediction. Both terms of logp are
<= 0, so no rounding makes it positive.

Bytes a logit with 2-byte logits: 2 for logp, 6 with G. A program reads its own row only, so a row's
value does not depend on its neighbours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Larger blocks spill: 32768 with 32 warps does on sm_90 (compiled by Triton 3.6 and 3.8).
BLOCK = 4096


@triton.jit
def row_kernel(
    z_ptr,
    targets_ptr,
    logp_ptr,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,  # row stride, >= VOCAB: whole vectors are moved, padding included
    WRITE_GRAD: tl.constexpr,
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
        z = tl.load(z_ptr + cols, mask=cols < WIDTH, other=0.0, eviction_policy="evict_last")
        z = tl.where(cols < VOCAB, z.to(tl.float32), -float("inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp2((top - new_top) * LOG2E)
        total += tl.sum(tl.exp2((z - new_top) * LOG2E), 0)
        top = new_top
    tl.store(logp_ptr + row, (z_target - top) - LN2 * tl.log2(total))

    if WRITE_GRAD:
        scale = 1.0 / total
        for start in range(0, VOCAB, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + cols, mask=cols < WIDTH, other=0.0, eviction_policy="evict_first")
            z = tl.where(cols < VOCAB, z.to(tl.float32), -float("inf"))
            p = tl.exp2((z - top) * LOG2E) * scale
            g = tl.where(cols == target, p - 1.0, p)
            tl.store(z_ptr + cols, g.to(z_ptr.dtype.element_ty), mask=cols < WIDTH)


def launch_options(vocab: int) -> dict[str, int]:
    """Block size and warps for rows of `vocab` logits."""
    block = min(BLOCK, max(128, triton.next_power_of_2(vocab)))
    return {"BLOCK": block, "num_warps": 8 if block >= 4096 else 4}


def row_pass_triton(z: Tensor, targets: Tensor, write_grad: bool) -> Tensor:
    """log softmax(z)[target] of every row; with `write_grad` z becomes softmax(z) - onehot(target).

    z: (n, V), unit column stride. Memory between V and the row stride is padding and is overwritten.
    A target outside [0, V) gives NaN.
    """
    n, vocab = z.shape
    logp = torch.empty(n, dtype=torch.float32, device=z.device)
    if n:
        # A single row may carry any stride.
        width = z.stride(0) if n > 1 else vocab
        options = launch_options(vocab)
        row_kernel[(n,)](z, targets, logp, vocab, width, write_grad, **options)
    return logp
