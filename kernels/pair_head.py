"""From token log-probabilities to the preference loss.

    s_i = sum of logps over sequence i     (sequences 2b, 2b + 1: chosen and rejected of pair b)
    d = (s_c - r_c) - (s_r - r_r)          log-ratio margin against the reference sums r
    loss = f(beta d)                       one formula, `dpo_loss`, and its kernel tested against it

Loss and slope come out together, since they are wanted in the middle of a forward, between a chunk's
logits and their gradient (`fused_linear_loss.py`). The twin's slope is autograd's of `dpo_loss`, which is
thus the one place where a formula stands; the kernel, which has its own, is tested against it.

Bytes moved: 8 a token; the rest is a few numbers a pair. A gain of launches (one, for some thirty
small ones), not of bytes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from srit.kernels.dispatch import use_triton

LOSS_TYPES = ("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm")
SMOOTHED = ("sigmoid", "robust")
LENGTH_AVERAGED = ("ipo", "sigmoid_norm")


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Preference loss of B pairs from sequence log-probabilities, all (B,).

    With d = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected) and sigma the logistic
    function:

      sigmoid       -(1 - e) log sigma(beta d) - e log sigma(-beta d)
                    e = label_smoothing; e = 0 is DPO (Rafailov et al. 2023, eq. 7), else cDPO
      robust        (-(1 - e) log sigma(beta d) + e log sigma(-beta d)) / (1 - 2 e)
                    (Chowdhury et al. 2024)
      hinge         max(0, 1 - beta d)                                  (SLiC, Zhao et al. 2023)
      ipo           (d' - 1 / (2 beta))^2                               (Azar et al. 2023, eq. 17)
      sigmoid_norm  -log sigma(beta d')

    where d' averages each sequence's log-ratio over its own completion tokens, for which the
    lengths (B,) are needed.

    Returns losses, chosen rewards and rejected rewards, each (B,); rewards are beta times the
    log-ratio of the sums whatever the loss. With policy == reference the logistic losses are ln 2
    and the rewards 0, exactly.

    Raises ValueError for an unknown loss_type, missing lengths, beta <= 0, label_smoothing outside
    [0, 0.5) or given with a loss that does not use it.
    """
    check_loss(beta, loss_type, label_smoothing)
    chosen = policy_chosen - ref_chosen
    rejected = policy_rejected - ref_rejected
    rewards = beta * chosen, beta * rejected
    if loss_type in LENGTH_AVERAGED:
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError(
                f"loss_type={loss_type!r} averages over completion tokens: give chosen_lengths and"
                " rejected_lengths"
            )
        chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
    margin = chosen - rejected
    if loss_type == "hinge":
        losses = F.relu(1 - beta * margin)
    elif loss_type == "ipo":
        losses = (margin - 1 / (2 * beta)).square()
    else:
        losses = smoothing_slope(loss_type, label_smoothing) * (beta * margin)
        losses = losses - F.logsigmoid(beta * margin)
    return losses, *rewards


def smoothing_slope(loss_type: str, label_smoothing: float) -> float:
    """k such that the smoothed logistic losses are -log sigma(x) + k x.

    log sigma(-x) = log sigma(x) - x turns both two-term formulas into this one, which loses nothing
    to cancellation and is exactly ln 2 at x = 0.
    """
    if loss_type == "robust":
        return -label_smoothing / (1 - 2 * label_smoothing)
    return label_smoothing


def segment_sum(logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums of consecutive segments: logps (N,), cu_seqlens (S + 1,) int -> (S,) float32.

    A segment's sum depends on its own values alone, in a fixed order, so policy and reference agree
    bit for bit wherever their log-probabilities do. Differentiable in logps. An empty segment or
    boundaries that do not cover (N,) raise ValueError when cu_seqlens is on the CPU.
    """
    check_segments(logps, cu_seqlens)
    if use_triton(logps.device):
        from srit.kernels.pair_head_triton import SegmentSum

        return SegmentSum.apply(logps, cu_seqlens.to(logps.device, non_blocking=True))
    return _segment_sum_torch(logps, cu_seqlens)


class PairHead(NamedTuple):
    """What `pair_head` gives for B pairs of N tokens; float32, without autograd history."""

    losses: Tensor  # (B,)
    chosen_rewards: Tensor  # (B,)
    rejected_rewards: Tensor  # (B,)
    sums: Tensor  # (2B,) log-probabilities of the sequences
    slopes: Tensor  # (N,) d losses.sum() / d logps


def pair_head(
    logps: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    rpo_alpha: float = 0.0,
) -> PairHead:
    """Losses of B pairs, and their slopes, from the log-probabilities of their completion tokens.

    Args:
        logps: (N,) float32, completion tokens of all sequences; sequence 2b is the chosen and
            2b + 1 the rejected one of pair b.
        cu_seqlens: (2B + 1,) int, boundaries of the sequences; logps begins at cu_seqlens[0].
        ref_logps: (2B,) float32, `segment_sum` of the reference's logps.
        beta, loss_type, label_smoothing: as in `dpo_loss`.
        rpo_alpha: weight of the term -log p(chosen) / (tokens of chosen), which keeps log p(chosen)
            from falling (Iterative RPO, arXiv 2404.19733, eq. 1); losses include it.

    The slopes are all that a gradient needs: there is no autograd here. Raises ValueError as
    `dpo_loss` and `segment_sum` do, and for a negative rpo_alpha.
    """
    check_loss(beta, loss_type, label_smoothing, rpo_alpha)
    check_segments(logps, cu_seqlens)
    if ref_logps.dim() != 1 or len(ref_logps) % 2 or len(ref_logps) + 1 != len(cu_seqlens):
        raise ValueError(
            f"pair_head needs cu_seqlens (2B + 1,) and ref_logps (2B,), got"
            f" {tuple(cu_seqlens.shape)} and {tuple(ref_logps.shape)}"
        )
    arguments = logps, cu_seqlens.to(logps.device, non_blocking=True), ref_logps
    settings = beta, loss_type, label_smoothing, rpo_alpha
    if use_triton(logps.device):
        from srit.kernels.pair_head_triton import run_head

        return PairHead(*run_head(*arguments, *settings))
    return _pair_head_torch(*arguments, *settings)


def _pair_head_torch(
    logps: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    rpo_alpha: float,
) -> PairHead:
    lengths = cu_seqlens.diff()
    with torch.enable_grad():
        sums = _segment_sum_torch(logps.detach(), cu_seqlens).requires_grad_()
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


def _segment_sum_torch(logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    offsets = cu_seqlens.to(logps.device, torch.int64)
    offsets = offsets - offsets[0]
    sums = torch.segment_reduce(logps.double(), "sum", offsets=offsets)
    return sums.to(torch.float64 if logps.dtype == torch.float64 else torch.float32)


def check_loss(
    beta: float, loss_type: str, label_smoothing: float, rpo_alpha: float = 0.0
) -> None:
    """ValueError unless these make a loss of `dpo_loss`, or of `pair_head`."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r}: allowed values are {', '.join(LOSS_TYPES)}")
    if not beta > 0:
        raise ValueError(f"beta={beta}: must be greater than 0")
    if label_smoothing and loss_type not in SMOOTHED:
        raise ValueError(
            f"label_smoothing={label_smoothing} has no meaning for loss_type={loss_type!r}: it"
            f" goes with {' and '.join(SMOOTHED)} only; set it to 0"
        )
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: must be in [0, 0.5)")
    if not rpo_alpha >= 0:
        raise ValueError(f"rpo_alpha={rpo_alpha}: must not be negative")


def check_segments(logps: Tensor, cu_seqlens: Tensor) -> None:
    """ValueError unless cu_seqlens (S + 1,) cuts logps (N,) into segments without an empty one."""
    if logps.dim() != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(
            f"needs logps (N,) and cu_seqlens (S + 1,), got {tuple(logps.shape)} and"
            f" {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device.type != "cpu":
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if last - first != len(logps):
        raise ValueError(
            f"cu_seqlens must span the number of tokens {len(logps)}, got {first} to {last}"
        )
    empty = (cu_seqlens.diff() <= 0).nonzero()
    if len(empty):
        raise ValueError(f"sequence {int(empty[0])} has no completion token: drop its pair first")
