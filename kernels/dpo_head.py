"""From token log-probabilities to the preference loss.

    s_i = sum of logps over sequence i     (sequences 2b, 2b + 1: chosen and rejected of pair b)
    d = (s_c - r_c) - (s_r - r_r)          log-ratio margin against the reference sums r
    loss = f(beta d)                       one formula, `dpo_loss`, and its kernel tested against it

Bytes moved: 4 a token forward, 4 a token backward; the rest is a few numbers a pair. A gain of
launches (two, for some thirty small ones), not of bytes.
"""

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
    _check_segments(logps, cu_seqlens)
    if use_triton(logps.device):
        from srit.kernels.dpo_head_triton import SegmentSum

        return SegmentSum.apply(logps, cu_seqlens.to(logps.device))
    return _segment_sum_torch(logps, cu_seqlens)


def dpo_head(
    logps: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    beta: float,
    loss_type: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of B pairs from the log-probabilities of their completion tokens.

    Args:
        logps: (N,) float32, completion tokens of all sequences; sequence 2b is the chosen and
            2b + 1 the rejected one of pair b.
        cu_seqlens: (2B + 1,) int, boundaries of the sequences in logps.
        ref_logps: (2B,) float32, `segment_sum` of the reference's logps.
        beta, loss_type, label_smoothing: as in `dpo_loss`.

    Returns losses (B,), chosen rewards (B,), rejected rewards (B,) and the policy's sums (2B,), all
    differentiable in logps. Raises ValueError as `dpo_loss` and `segment_sum` do.
    """
    check_loss(beta, loss_type, label_smoothing)
    _check_segments(logps, cu_seqlens)
    if ref_logps.dim() != 1 or len(ref_logps) % 2 or len(ref_logps) + 1 != len(cu_seqlens):
        raise ValueError(
            f"dpo_head needs cu_seqlens (2B + 1,) and ref_logps (2B,), got"
            f" {tuple(cu_seqlens.shape)} and {tuple(ref_logps.shape)}"
        )
    if use_triton(logps.device):
        from srit.kernels.dpo_head_triton import DPOHead

        cu_seqlens = cu_seqlens.to(logps.device)
        return DPOHead.apply(logps, cu_seqlens, ref_logps, beta, loss_type, label_smoothing)
    return _dpo_head_torch(logps, cu_seqlens, ref_logps, beta, loss_type, label_smoothing)


def _dpo_head_torch(
    logps: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    beta: float,
    loss_type: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = _segment_sum_torch(logps, cu_seqlens)
    lengths = cu_seqlens.diff().to(logps.device)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        sums[0::2],
        sums[1::2],
        ref_logps[0::2],
        ref_logps[1::2],
        beta,
        loss_type,
        label_smoothing,
        lengths[0::2],
        lengths[1::2],
    )
    return losses, chosen_rewards, rejected_rewards, sums


def _segment_sum_torch(logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    offsets = cu_seqlens.to(logps.device, torch.int64)
    sums = torch.segment_reduce(logps.double(), "sum", offsets=offsets)
    return sums.to(torch.float64 if logps.dtype == torch.float64 else torch.float32)


def check_loss(beta: float, loss_type: str, label_smoothing: float) -> None:
    """ValueError unless these three make a loss of `dpo_loss`."""
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


def _check_segments(logps: Tensor, cu_seqlens: Tensor) -> None:
    if logps.dim() != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(
            f"needs logps (N,) and cu_seqlens (S + 1,), got {tuple(logps.shape)} and"
            f" {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device.type != "cpu":
        return
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != len(logps):
        raise ValueError(
            f"cu_seqlens must go from 0 to the number of tokens {len(logps)}, got"
            f" {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
        )
    empty = (cu_seqlens.diff() <= 0).nonzero()
    if len(empty):
        raise ValueError(f"sequence {int(empty[0])} has no completion token: drop its pair first")
