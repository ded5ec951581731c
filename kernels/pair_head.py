"""From token log-probabilities of pairs to losses, rewards and slopes.

    s_i = sum of logps over sequence i       (sequences 2b and 2b + 1: chosen and rejected of pair b)
    loss = dpo_loss(s, reference sums) - rpo_alpha s_chosen / length_chosen

`linear_dpo` needs the slope in the middle of its forward, between the logits of a chunk and their
gradient, so `pair_head` returns it with the loss. The twin differentiates `dpo_loss`; the kernel has
its own formulas and is tested against `dpo_loss`.

Bytes: 8 per token, and a few numbers per pair. The kernel saves launches (one instead of about thirty),
not bytes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from srit.kernels.dispatch import use_triton
from srit.kernels.preference_loss import check_loss, dpo_loss


class PairHead(NamedTuple):
    """Result of `pair_head` for B pairs of N tokens; float32, without autograd history."""

    losses: Tensor  # (B,)
    chosen_rewards: Tensor  # (B,)
    rejected_rewards: Tensor  # (B,)
    sums: Tensor  # (2B,) log-probabilities of the sequences
    slopes: Tensor  # (N,) d losses.sum() / d logps


def pair_head(
    logps: Tensor,
    cu_targets: Tensor,
    ref_logps: Tensor,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    rpo_alpha: float = 0.0,
) -> PairHead:
    """Losses of B pairs and their slopes, from the log-probabilities of the completion tokens.

    Args:
        logps: (N,) float32, completion tokens of all sequences; sequence 2b is the chosen and
            2b + 1 the rejected one of pair b.
        cu_targets: (2B + 1,) int, boundaries of the sequences; logps begins at cu_targets[0].
        ref_logps: (2B,) float32, `segment_sum` of the reference's logps.
        beta, loss_type, label_smoothing: as in `dpo_loss`.
        rpo_alpha: weight of the term -log p(chosen) / (tokens of chosen), which keeps log p(chosen)
            from falling (Iterative RPO, arXiv 2404.19733, eq. 1); losses include it.

    Not differentiable: the slopes are the gradient. Raises ValueError as `dpo_loss` and `segment_sum`
    do, and for a negative rpo_alpha.
    """
    check_loss(beta, loss_type, label_smoothing, rpo_alpha)
    check_segments(logps, cu_targets)
    if ref_logps.dim() != 1 or len(ref_logps) % 2 or len(ref_logps) + 1 != len(cu_targets):
        raise ValueError(
            f"pair_head needs cu_targets (2B + 1,) and ref_logps (2B,), got"
            f" {tuple(cu_targets.shape)} and {tuple(ref_logps.shape)}"
        )
    arguments = logps, cu_targets.to(logps.device, non_blocking=True), ref_logps
    settings = beta, loss_type, label_smoothing, rpo_alpha
    if use_triton(logps.device):
        from srit.kernels.pair_head_triton import run_head

        return PairHead(*run_head(*arguments, *settings))
    return _pair_head_torch(*arguments, *settings)


def _pair_head_torch(
    logps: Tensor,
    cu_targets: Tensor,
    ref_logps: Tensor,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    rpo_alpha: float,
) -> PairHead:
    lengths = cu_targets.diff()
    with torch.enable_grad():
        sums = _segment_sum_torch(logps.detach(), cu_targets).requires_grad_()
        losses, chosen_rewards, rejected_rewards = dpo_loss(
            sums[0::2], sums[1::2], ref_logps[0::2], ref_logps[1::2],
            beta, loss_type, label_smoothing, lengths[0::2], lengths[1::2],
        )
        if rpo_alpha:
            losses = losses - rpo_alpha * sums[0::2] / lengths[0::2]
        (slopes,) = torch.autograd.grad(losses.sum(), sums)
    slopes = slopes.repeat_interleave(lengths, output_size=len(logps))
    results = losses, chosen_rewards, rejected_rewards, sums, slopes
    return PairHead(*(t.detach() for t in results))


def segment_sum(logps: Tensor, cu_targets: Tensor) -> Tensor:
    """Sums of consecutive segments: logps (N,), cu_targets (S + 1,) int -> (S,) float32.

    A segment's sum depends on its own values only, added in a fixed order: policy and reference sums
    are equal to the bit if their log-probabilities are. Differentiable in logps. Raises ValueError for
    wrong shapes and, if cu_targets is on the CPU, for an empty segment or boundaries that do not cover
    (N,).
    """
    check_segments(logps, cu_targets)
    if use_triton(logps.device):
        from srit.kernels.pair_head_triton import SegmentSum

        return SegmentSum.apply(logps, cu_targets.to(logps.device, non_blocking=True))
    return _segment_sum_torch(logps, cu_targets)


def _segment_sum_torch(logps: Tensor, cu_targets: Tensor) -> Tensor:
    offsets = cu_targets.to(logps.device, torch.int64)
    offsets = offsets - offsets[0]
    sums = torch.segment_reduce(logps.double(), "sum", offsets=offsets)
    return sums.to(torch.float64 if logps.dtype == torch.float64 else torch.float32)


def check_segments(logps: Tensor, cu_targets: Tensor) -> None:
    """Raises ValueError unless cu_targets (S + 1,) cuts logps (N,) into non-empty segments."""
    if logps.dim() != 1 or cu_targets.dim() != 1 or len(cu_targets) == 0:
        raise ValueError(
            f"needs logps (N,) and cu_targets (S + 1,), got {tuple(logps.shape)} and"
            f" {tuple(cu_targets.shape)}"
        )
    if cu_targets.device.type != "cpu":  # reading it would wait for the device
        return
    first, last = int(cu_targets[0]), int(cu_targets[-1])
    if last - first != len(logps):
        raise ValueError(
            f"cu_targets must span the number of tokens {len(logps)}, got {first} to {last}"
        )
    empty = (cu_targets.diff() <= 0).nonzero()
    if len(empty):
        raise ValueError(f"sequence {int(empty[0])} has no completion token: drop its pair first")
