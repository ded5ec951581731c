"""`dpo_loss`: values by hand, gradients against finite differences, settings it rejects."""

from contextlib import nullcontext
from typing import get_args, get_type_hints

import pytest
import torch

from srit.config import DPOConfig
from srit.kernels import dpo_loss
from srit.kernels.preference_loss import LOSS_TYPES, SMOOTHED
from srit.runtime.files import InputError

SETTINGS = [(name, 0.0) for name in LOSS_TYPES] + [(name, 0.1) for name in SMOOTHED]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing", "expected"),
    [
        # log-ratios +1 (4 tokens) and -0.5 (5 tokens): d = 1.5, beta d = 0.15, d' = 0.25 + 0.1
        ("sigmoid", 0.0, 0.6209570477895321),  # ln(1 + e^-0.15)
        ("sigmoid", 0.1, 0.6359570477895321),  # ... + 0.1 * 0.15
        ("robust", 0.1, 0.6022070477895321),  # (0.9 a - 0.1 (a + 0.15)) / 0.8
        ("hinge", 0.0, 0.85),
        ("ipo", 0.0, 21.6225),  # (0.35 - 5)^2
        ("sigmoid_norm", 0.0, 0.6758002977448283),  # ln(1 + e^-0.035)
    ],
)
def test_losses_and_rewards_by_hand(loss_type, label_smoothing, expected):
    arguments = tensor(-10), tensor(-12), tensor(-11), tensor(-11.5)
    losses, chosen, rejected = dpo_loss(
        *arguments, 0.1, loss_type, label_smoothing, torch.tensor([4]), torch.tensor([5])
    )
    assert losses.item() == pytest.approx(expected, rel=1e-14)
    assert chosen.item() == pytest.approx(0.1, rel=1e-14)
    assert rejected.item() == pytest.approx(-0.05, rel=1e-14)


def test_a_negative_margin_by_hand():
    losses, _, _ = dpo_loss(tensor(-12), tensor(-10), tensor(-11.5), tensor(-11), 0.1)
    assert losses.item() == pytest.approx(0.7709570477895321, rel=1e-14)  # ln(1 + e^0.15)


@pytest.mark.parametrize(("loss_type", "label_smoothing"), SETTINGS)
def test_gradients_against_finite_differences(loss_type, label_smoothing):
    sums = [(-20 * torch.rand(5, dtype=torch.float64)).requires_grad_() for _ in range(4)]
    lengths = torch.tensor([4, 1, 7, 2, 3]), torch.tensor([5, 2, 1, 9, 3])
    settings = 0.3, loss_type, label_smoothing, *lengths
    assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, *settings), sums)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_type": "apo"}, "loss_type='apo'.*sigmoid, hinge, ipo, robust, sigmoid_norm"),
        ({"beta": 0.0}, "beta=0.0"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5.*\[0, 0.5\)"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "no meaning for loss_type='hinge'"),
        ({"loss_type": "ipo"}, "give chosen_lengths"),
    ],
)
def test_wrong_settings_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(*[torch.zeros(1)] * 4, **arguments)


def test_the_flag_allows_these_losses_and_the_same_label_smoothing():
    assert get_args(get_type_hints(DPOConfig)["loss_type"]) == LOSS_TYPES
    for loss_type in LOSS_TYPES:
        with nullcontext() if loss_type in SMOOTHED else pytest.raises(InputError, match="smoothing"):
            DPOConfig("m", ["f"], "o", loss_type=loss_type, label_smoothing=0.1)
