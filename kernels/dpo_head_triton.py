"""`dpo_head` and `segment_sum` in Triton; the formulas are those of `dpo_head.py`.

Forward, one program a pair: sum both segments in a fixed order, loss, rewards, and dloss/dsum of
both sequences. Backward, one program a sequence: a sum's gradient goes to all of its tokens.
Bytes: 4 a token each way.

A segment's sum has the same order in both forward kernels (`sum_segment`), so a reference summed by
`segment_sum` cancels exactly against a policy with equal log-probabilities.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from srit.kernels.dpo_head import LENGTH_AVERAGED, smoothing_slope

BLOCK = 1024
NUM_WARPS = 4
LOGISTIC, HINGE, SQUARE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SHAPES = {"hinge": HINGE.value, "ipo": SQUARE.value}


@triton.jit
def sum_segment(logps_ptr, start, end, BLOCK: tl.constexpr):
    """Sum and length of logps[start:end], added up in fp64; NaN when empty."""
    total = tl.zeros([BLOCK], tl.float64)
    offset = start
    # `while`: the interpreter of Triton 3.6 cannot take run-time bounds in `range` under numpy 2.4.
    while offset < end:
        cols = offset + tl.arange(0, BLOCK)
        total += tl.load(logps_ptr + cols, mask=cols < end, other=0.0)
        offset += BLOCK
    length = (end - start).to(tl.float32)
    return tl.where(end > start, tl.sum(total, 0).to(tl.float32), float("nan")), length


@triton.jit
def segment_sum_kernel(logps_ptr, cu_ptr, sums_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    total, _ = sum_segment(logps_ptr, tl.load(cu_ptr + i), tl.load(cu_ptr + i + 1), BLOCK)
    tl.store(sums_ptr + i, total)


@triton.jit
def head_kernel(
    logps_ptr,
    cu_ptr,
    ref_ptr,
    losses_ptr,
    chosen_rewards_ptr,
    rejected_rewards_ptr,
    sums_ptr,
    slopes_ptr,  # (2B,) dloss/dsum, for the backward
    beta,
    tilt,
    SHAPE: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0)
    start = tl.load(cu_ptr + 2 * pair)
    middle = tl.load(cu_ptr + 2 * pair + 1)
    end = tl.load(cu_ptr + 2 * pair + 2)
    chosen_sum, chosen_length = sum_segment(logps_ptr, start, middle, BLOCK)
    rejected_sum, rejected_length = sum_segment(logps_ptr, middle, end, BLOCK)
    chosen = chosen_sum - tl.load(ref_ptr + 2 * pair)
    rejected = rejected_sum - tl.load(ref_ptr + 2 * pair + 1)
    tl.store(sums_ptr + 2 * pair, chosen_sum)
    tl.store(sums_ptr + 2 * pair + 1, rejected_sum)
    tl.store(chosen_rewards_ptr + pair, beta * chosen)
    tl.store(rejected_rewards_ptr + pair, beta * rejected)

    chosen_weight = 1.0
    rejected_weight = 1.0
    if AVERAGE:
        chosen_weight = 1.0 / chosen_length
        rejected_weight = 1.0 / rejected_length
        chosen = chosen / chosen_length
        rejected = rejected / rejected_length
    margin = chosen - rejected
    if SHAPE == HINGE:
        gap = 1.0 - beta * margin
        loss = tl.where(gap < 0.0, 0.0, gap)  # tl.maximum would turn NaN into 0
        slope = tl.where(gap > 0.0, -beta, 0.0)
    elif SHAPE == SQUARE:
        gap = margin - 1.0 / (2.0 * beta)
        loss = gap * gap
        slope = 2.0 * gap
    else:
        x = beta * margin
        e = tl.exp(-tl.abs(x))
        # log(1 + e) keeping its digits where 1 + e rounds: libdevice's log1p is not interpretable.
        u = 1.0 + e
        log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
        loss = tilt * x + (tl.where(x < 0.0, -x, 0.0) + log1p)
        slope = beta * (tilt - tl.where(x < 0.0, 1.0, e) / u)
    tl.store(losses_ptr + pair, loss)
    tl.store(slopes_ptr + 2 * pair, slope * chosen_weight)
    tl.store(slopes_ptr + 2 * pair + 1, -slope * rejected_weight)


@triton.jit
def head_backward_kernel(
    grad_losses_ptr,
    grad_chosen_ptr,
    grad_rejected_ptr,
    grad_sums_ptr,
    slopes_ptr,
    cu_ptr,
    grad_logps_ptr,
    beta,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    pair = i // 2
    is_chosen = i % 2 == 0
    grad = tl.load(grad_losses_ptr + pair) * tl.load(slopes_ptr + i) + tl.load(grad_sums_ptr + i)
    grad_reward = tl.load(grad_chosen_ptr + pair, mask=is_chosen, other=0.0)
    grad_reward += tl.load(grad_rejected_ptr + pair, mask=i % 2 == 1, other=0.0)
    grad += beta * grad_reward
    offset = tl.load(cu_ptr + i)
    end = tl.load(cu_ptr + i + 1)
    while offset < end:
        cols = offset + tl.arange(0, BLOCK)
        tl.store(grad_logps_ptr + cols, grad + tl.zeros([BLOCK], tl.float32), mask=cols < end)
        offset += BLOCK


class SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logps: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.like = logps.shape, logps.dtype
        sums = torch.empty(len(cu_seqlens) - 1, dtype=torch.float32, device=logps.device)
        if len(sums):
            segment_sum_kernel[(len(sums),)](
                _float_vector(logps), cu_seqlens.contiguous(), sums, BLOCK, num_warps=NUM_WARPS
            )
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (cu_seqlens,) = ctx.saved_tensors
        (n,), dtype = ctx.like
        lengths = cu_seqlens.diff()
        return grad.repeat_interleave(lengths, output_size=n).to(dtype), None


class DPOHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logps, cu_seqlens, ref_logps, beta, loss_type, label_smoothing):
        pairs = len(ref_logps) // 2
        cu_seqlens = cu_seqlens.contiguous()
        new = partial(torch.empty, dtype=torch.float32, device=logps.device)
        losses, chosen, rejected, sums, slopes = map(new, [pairs] * 3 + [2 * pairs] * 2)
        if pairs:
            head_kernel[(pairs,)](
                _float_vector(logps),
                cu_seqlens,
                _float_vector(ref_logps),
                losses,
                chosen,
                rejected,
                sums,
                slopes,
                float(beta),
                float(smoothing_slope(loss_type, label_smoothing)),
                SHAPES.get(loss_type, LOGISTIC.value),
                loss_type in LENGTH_AVERAGED,
                BLOCK,
                num_warps=NUM_WARPS,
            )
        ctx.save_for_backward(slopes, cu_seqlens)
        ctx.beta, ctx.like = beta, (logps.shape, logps.dtype)
        return losses, chosen, rejected, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        slopes, cu_seqlens = ctx.saved_tensors
        shape, dtype = ctx.like
        grad = torch.zeros(shape, dtype=torch.float32, device=slopes.device)
        if len(slopes):
            head_backward_kernel[(len(slopes),)](
                *map(_float_vector, grads),
                slopes,
                cu_seqlens,
                grad,
                float(ctx.beta),
                BLOCK,
                num_warps=NUM_WARPS,
            )
        return grad.to(dtype), None, None, None, None, None


def _float_vector(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()
