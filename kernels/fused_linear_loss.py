"""Losses of a linear head in one pass: gradients are made in the forward, chunk by chunk.

If the slope dL/dlogp of a row is known as soon as the log-probs of its chunk are, the logits are
needed only once: logits, row softmax, slope, G in place, dX = G W, dW += G^T X, next chunk. This takes
6 N D V FLOPs, or 4 with a frozen head, and the memory of one chunk for any N. The slope of the negative
log-likelihood is a constant; that of DPO depends on both sequences of a pair, so a chunk holds whole
pairs.

The backward only multiplies by the upstream gradient, and skips even that if it is 1. So pass the
factor of the loss as `scale`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srit.kernels.chunks import (
    WeightGrad,
    check_operands,
    chunk_limit,
    chunk_logits,
    group_chunks,
    logits_buffer,
    new_stats,
    operands,
    row_ops,
)
from srit.kernels.linear_logp import TokenStats
from srit.kernels.pair_head import check_segments, pair_head, segment_sum
from srit.kernels.preference_loss import check_loss
from srit.kernels.row_softmax import CORRECT, ENTROPY, LOGP


class PairStats(NamedTuple):
    """Per pair, (B,) float32, not differentiable; losses and rewards as in `dpo_loss`."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    scale: float = 1.0,
    return_stats: bool = False,
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """-scale * sum_n log softmax(hidden @ weight^T)[n, targets_n], a float32 scalar.

    Arguments as in `linear_logp`; scale = 1 / (trained tokens of the step) gives their mean.
    Differentiable in hidden and weight, once per forward: the backward scales its results in place.
    With return_stats also returns `TokenStats`.
    """
    check_operands("linear_nll", hidden, weight, targets)
    x, w = operands(hidden, weight)
    targets = targets.contiguous()
    dx, dw = _gradients(hidden, weight, x, w)
    stats, ops = new_stats(x, len(x), extra=return_stats), row_ops(x.device)
    coef = stats.new_full((len(x),), scale)
    for part, z in chunk_logits(x, w, chunk_limit(x, len(w), chunk_bytes)):
        if dx is None and dw is None:
            ops.logp(z, targets[part], stats[:, part])
            continue
        ops.logp_grad(z, targets[part], stats[:, part], coef[part])
        if dx is not None:
            torch.mm(z, w, out=dx[part])
        if dw is not None:
            dw.add(z, x[part], last=part.stop == len(x))
    loss = _with_gradients(-scale * stats[LOGP].sum(), hidden, weight, dx, dw)
    if not return_stats:
        return loss
    return loss, TokenStats(stats[LOGP], stats[ENTROPY], stats[CORRECT])


def linear_dpo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_targets: Tensor,
    ref_logps: Tensor | None = None,
    *,
    ref_hidden: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    rpo_alpha: float = 0.0,
    scale: float = 1.0,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, PairStats]:
    """Preference loss of B pairs from the hidden states of their completion tokens, in one pass.

    Args:
        hidden, weight, targets: as in `linear_logp`; row n predicts completion token targets_n.
        cu_targets: (2B + 1,) int, boundaries of the sequences in hidden; sequence 2b is the chosen and
            2b + 1 the rejected one of pair b. Keep it on the CPU: reading it elsewhere waits for the
            device.
        ref_logps: (2B,) float32, the reference's log-probability of every sequence.
        ref_hidden: (N, D), instead of ref_logps: hidden states of a reference that has the same frozen
            head (LoRA); they go through the same GEMM.
        beta, loss_type, label_smoothing, rpo_alpha: as in `pair_head`.
        scale: factor of the returned loss; 1 / (pairs of the step) gives their mean.
        chunk_bytes: as in `linear_logp`. A chunk holds whole pairs; a pair that exceeds chunk_bytes is
            a chunk of its own.

    Returns scale * the sum of the losses, a float32 scalar, and `PairStats`. Differentiable in hidden
    and weight, once per forward: the backward scales its results in place.
    Raises ValueError for wrong shapes, dtypes, targets, boundaries or loss settings, unless exactly one
    of ref_logps and ref_hidden is given, and for ref_hidden with a weight that requires a gradient.
    """
    check_operands("linear_dpo", hidden, weight, targets)
    check_loss(beta, loss_type, label_smoothing)
    offsets = cu_targets.tolist()
    _check_reference(ref_logps, ref_hidden, hidden, weight, offsets)
    check_segments(targets, cu_targets.cpu())
    x, w = operands(hidden, weight)
    targets, cu_targets = targets.contiguous(), cu_targets.to(x.device, non_blocking=True)
    dx, dw = _gradients(hidden, weight, x, w)
    sides = 1 if ref_hidden is None else 2
    limit = chunk_limit(x, len(w), chunk_bytes) // sides
    chunks = group_chunks(offsets[2::2], max(1, limit))
    longest = max((offsets[2 * b] - offsets[2 * a] for a, b in chunks), default=0)
    buffer, stats = logits_buffer(sides * longest, w), new_stats(x, sides * longest)
    ops, heads = row_ops(x.device), []
    for first, last in chunks:
        part = slice(offsets[2 * first], offsets[2 * last])
        n = part.stop - part.start
        rows, labels = x[part], targets[part]
        if ref_hidden is not None:
            rows = torch.cat([rows, ref_hidden[part].detach().to(x.dtype)])
            labels = labels.repeat(2)
        z, s = buffer[: len(rows)], stats[:, : len(rows)]
        torch.mm(rows, w.t(), out=z)
        ops.logp(z, labels, s)
        cu = cu_targets[2 * first : 2 * last + 1]
        if ref_logps is None:
            refs = segment_sum(s[LOGP, n:], cu)
        else:
            refs = ref_logps[2 * first : 2 * last]
        head = pair_head(s[LOGP, :n], cu, refs, beta, loss_type, label_smoothing, rpo_alpha)
        heads.append(head[:-1])
        if dx is None and dw is None:
            continue
        ops.grad(z[:n], labels[:n], s[:, :n], head.slopes.mul_(-scale))
        if dx is not None:
            torch.mm(z[:n], w, out=dx[part])
        if dw is not None:
            dw.add(z[:n], rows, last=last == chunks[-1][1])
    none = (stats.new_empty(0),) * 4
    losses, chosen, rejected, sums = map(torch.cat, zip(*heads or [none], strict=True))
    loss = _with_gradients(scale * losses.sum(), hidden, weight, dx, dw)
    return loss, PairStats(losses, chosen, rejected, sums[0::2], sums[1::2])


class _KnownGradient(torch.autograd.Function):
    """A scalar whose gradients are made before the backward."""

    @staticmethod
    def forward(ctx, value, hidden, weight, dx, dw):
        ctx.save_for_backward(dx, dw)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if getattr(ctx, "spent", False):
            raise RuntimeError(
                "the gradients of linear_nll and linear_dpo are scaled in place and can be taken once:"
                " run the forward again, or use linear_logp"
            )
        ctx.spent = True
        dx, dw = ctx.saved_tensors
        for gradient in (dx, dw):
            if gradient is not None and gradient.numel():
                row_ops(gradient.device).multiply_(gradient, grad)
        return None, dx, dw, None, None


def _gradients(
    hidden: Tensor, weight: Tensor, x: Tensor, w: Tensor
) -> tuple[Tensor | None, WeightGrad | None]:
    """Where dX and dW go; None for one that is not needed."""
    enabled = torch.is_grad_enabled()
    dx = torch.empty_like(x) if enabled and hidden.requires_grad else None
    return dx, WeightGrad(w, weight.dtype) if enabled and weight.requires_grad else None


def _with_gradients(
    loss: Tensor, hidden: Tensor, weight: Tensor, dx: Tensor | None, dw: WeightGrad | None
) -> Tensor:
    if dx is None and dw is None:
        return loss
    return _KnownGradient.apply(loss, hidden, weight, dx, None if dw is None else dw.result())


def _check_reference(
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    offsets: list[int],
) -> None:
    if (ref_logps is None) == (ref_hidden is None):
        raise ValueError("linear_dpo needs either ref_logps or ref_hidden")
    if len(offsets) % 2 == 0:
        raise ValueError(
            f"linear_dpo needs cu_targets (2B + 1,) for B pairs, got {len(offsets)} boundaries"
        )
    if ref_logps is not None and ref_logps.shape != (len(offsets) - 1,):
        raise ValueError(
            f"linear_dpo needs ref_logps ({len(offsets) - 1},), one per sequence, got"
            f" {tuple(ref_logps.shape)}"
        )
    if ref_hidden is not None and ref_hidden.shape != hidden.shape:
        raise ValueError(
            f"linear_dpo needs ref_hidden of the shape of hidden {tuple(hidden.shape)}, got"
            f" {tuple(ref_hidden.shape)}"
        )
    if ref_hidden is not None and torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError(
            "linear_dpo: ref_hidden needs a frozen head, but weight requires a gradient: a trained head"
            " is not the reference's; give ref_logps"
        )
