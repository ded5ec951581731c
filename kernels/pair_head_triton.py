"""`pair_head` and `segment_sum` in Triton; formulas as in `pair_head.py` and `preference_loss.py`.

One program per pair: sums of both sequences in a fixed order, loss, rewards, and the slope of every
token. Bytes: 8 per token.

Both kernels add a segment in the same order (`sum_segment`), so a reference summed by `segment_sum`
cancels exactly against a policy with equal log-probabilities.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from srit.kernels.preference_loss import LENGTH_AVERAGED, smoothing_slope

BLOCK = 1024
NUM_WARPS = 4
LOGISTIC, HINGE, SQUARE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SHAPES = {"hinge": HINGE.value, "ipo": SQUARE.value}


@triton.jit
def sum_segment(logps_ptr, start, end, BLOCK: tl.constexpr):
    """Sum and length of logps[start:end], added in float64; NaN if empty."""
    total = tl.zeros([BLOCK], tl.float64)
    offset = start
    # `while`: the interpreter of Triton 3.6 rejects run-time bounds of `range` under numpy 2.4.
    while offset < end:
        cols = offset + tl.arange(0, BLOCK)
        total += tl.load(logps_ptr + cols, mask=cols < end, other=0.0)
        offset += BLOCK
    length = (end - start).to(tl.float32)
    return tl.where(end > start, tl.sum(total, 0).to(tl.float32), float("nan")), length


@triton.jit
def fill_segment(x_ptr, start, end, value, BLOCK: tl.constexpr):
    offset = start
    while offset < end:
        cols = offset + tl.arange(0, BLOCK)
        tl.store(x_ptr + cols, value + tl.zeros([BLOCK], tl.float32), mask=cols < end)
        offset += BLOCK


@triton.jit
def segment_sum_kernel(logps_ptr, cu_ptr, sums_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    origin = tl.load(cu_ptr)
    start, end = tl.load(cu_ptr + i) - origin, tl.load(cu_ptr + i + 1) - origin
    total, _ = sum_segment(logps_ptr, start, end, BLOCK)
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
    slopes_ptr,  # (N,)
    beta,
    smoothing_slope,  # of the logistic losses
    rpo_alpha,
    SHAPE: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0)
    origin = tl.load(cu_ptr)
    start = tl.load(cu_ptr + 2 * pair) - origin
    middle = tl.load(cu_ptr + 2 * pair + 1) - origin
    end = tl.load(cu_ptr + 2 * pair + 2) - origin
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
        # log(1 + e), exact where 1 + e rounds. The interpreter cannot run libdevice's log1p.
        u = 1.0 + e
        log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
        loss = smoothing_slope * x + (tl.where(x < 0.0, -x, 0.0) + log1p)
        slope = beta * (smoothing_slope - tl.where(x < 0.0, 1.0, e) / u)
    loss -= rpo_alpha * (chosen_sum / chosen_length)
    tl.store(losses_ptr + pair, loss)
    chosen_slope = slope * chosen_weight - rpo_alpha / chosen_length
    fill_segment(slopes_ptr, start, middle, chosen_slope, BLOCK)
    fill_segment(slopes_ptr, middle, end, -slope * rejected_weight, BLOCK)


class SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logps: Tensor, cu_targets: Tensor) -> Tensor:
        ctx.save_for_backward(cu_targets)
        ctx.like = logps.shape, logps.dtype
        sums = torch.empty(len(cu_targets) - 1, dtype=torch.float32, device=logps.device)
        if len(sums):
            segment_sum_kernel[(len(sums),)](
                _float_vector(logps), cu_targets.contiguous(), sums, BLOCK, num_warps=NUM_WARPS
            )
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (cu_targets,) = ctx.saved_tensors
        (n,), dtype = ctx.like
        lengths = cu_targets.diff()
        return grad.repeat_interleave(lengths, output_size=n).to(dtype), None


def run_head(
    logps: Tensor,
    cu_targets: Tensor,
    ref_logps: Tensor,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    rpo_alpha: float,
) -> tuple[Tensor, ...]:
    """The fields of `PairHead`."""
    pairs = len(ref_logps) // 2
    new = partial(torch.empty, dtype=torch.float32, device=logps.device)
    results = tuple(map(new, (pairs, pairs, pairs, 2 * pairs, len(logps))))
    if pairs:
        head_kernel[(pairs,)](
            _float_vector(logps), cu_targets.contiguous(), _float_vector(ref_logps), *results,
            float(beta), float(smoothing_slope(loss_type, label_smoothing)), float(rpo_alpha),
            SHAPES.get(loss_type, LOGISTIC.value), loss_type in LENGTH_AVERAGED, BLOCK,
            num_warps=NUM_WARPS,
        )
    return results


def _float_vector(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()
