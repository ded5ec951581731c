"""The preference loss: DPO and its relatives, from the log-probabilities of whole answers.

Plain PyTorch. `pair_head` calls it; its Triton kernel is tested against it.
"""

import torch.nn.functional as F
from torch import Tensor

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

    With d = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected), sigma the logistic
    function and e = label_smoothing:

      sigmoid       -(1 - e) log sigma(beta d) - e log sigma(-beta d)
                    DPO for e = 0 (Rafailov et al. 2023, eq. 7), cDPO otherwise
      robust        (-(1 - e) log sigma(beta d) + e log sigma(-beta d)) / (1 - 2 e)
                    (Chowdhury et al. 2024)
      hinge         max(0, 1 - beta d)                                  (SLiC, Zhao et al. 2023)
      ipo           (d' - 1 / (2 beta))^2                               (Azar et al. 2023, eq. 17)
      sigmoid_norm  -log sigma(beta d')

    d' is d with each sequence's log-ratio divided by its number of completion tokens; it needs the
    lengths, (B,).

    Returns losses, chosen rewards and rejected rewards, each (B,). A reward is beta times the
    log-ratio of the sums for every loss type. If policy equals reference, the logistic losses are
    exactly ln 2 and the rewards exactly 0.

    Raises ValueError for an unknown loss_type, missing lengths, beta <= 0, and a label_smoothing that
    is outside [0, 0.5) or that the loss does not use.
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
    """The k for which the smoothed logistic loss is -log sigma(x) + k x.

    log sigma(-x) = log sigma(x) - x turns both two-term formulas into this one, which has no
    cancellation and is exactly ln 2 at x = 0.
    """
    if loss_type == "robust":
        return -label_smoothing / (1 - 2 * label_smoothing)
    return label_smoothing


def check_loss(
    beta: float, loss_type: str, label_smoothing: float, rpo_alpha: float = 0.0
) -> None:
    """Raises ValueError for settings that `dpo_loss` (or, with rpo_alpha, `pair_head`) rejects."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r}: allowed values are {', '.join(LOSS_TYPES)}")
    if not beta > 0:
        raise ValueError(f"beta={beta}: must be greater than 0")
    if label_smoothing and loss_type not in SMOOTHED:
        raise ValueError(
            f"label_smoothing={label_smoothing} has no meaning for loss_type={loss_type!r}: only"
            f" {' and '.join(SMOOTHED)} use it; set it to 0"
        )
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: must be in [0, 0.5)")
    if not rpo_alpha >= 0:
        raise ValueError(f"rpo_alpha={rpo_alpha}: must not be negative")
