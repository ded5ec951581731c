"""The preference loss, by hand and against autograd; the twin and the Triton kernels alike."""

import math

import pytest
import torch

from srit.kernels import dpo_loss, pair_head, segment_sum
from srit.kernels.pair_head import LOSS_TYPES, SMOOTHED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = [(name, 0.0) for name in LOSS_TYPES] + [(name, 0.1) for name in SMOOTHED]


@pytest.fixture(params=["torch", "triton"])
def kernels(request, monkeypatch):
    monkeypatch.setenv("SRIT_KERNELS", request.param)


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
def test_losses_by_hand(loss_type, label_smoothing, expected):
    arguments = tensor(-10), tensor(-12), tensor(-11), tensor(-11.5)
    losses, chosen, rejected = dpo_loss(
        *arguments, 0.1, loss_type, label_smoothing, torch.tensor([4]), torch.tensor([5])
    )
    assert losses.item() == pytest.approx(expected, rel=1e-14)
    assert chosen.item() == pytest.approx(0.1, rel=1e-14)
    assert rejected.item() == pytest.approx(-0.05, rel=1e-14)


def test_a_pair_the_wrong_way_round():
    losses, _, _ = dpo_loss(tensor(-12), tensor(-10), tensor(-11.5), tensor(-11), 0.1)
    assert losses.item() == pytest.approx(0.7709570477895321, rel=1e-14)  # ln(1 + e^0.15)


@pytest.mark.parametrize(("loss_type", "label_smoothing"), SETTINGS)
def test_gradients_in_float64(loss_type, label_smoothing):
    sums = [(-20 * torch.rand(5, dtype=torch.float64)).requires_grad_() for _ in range(4)]
    lengths = torch.tensor([4, 1, 7, 2, 3]), torch.tensor([5, 2, 1, 9, 3])
    settings = 0.3, loss_type, label_smoothing, *lengths
    assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, *settings), sums)


def batch(pairs, longest):
    lengths = torch.randint(1, longest, (2 * pairs,))
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    logps = -3 * torch.rand(int(cu[-1]))
    refs = torch.stack([p.sum() for p in logps.split(lengths.tolist())]) + torch.randn(2 * pairs)
    return logps.to(DEVICE), cu, refs.to(DEVICE)


@pytest.mark.parametrize("rpo_alpha", [0.0, 0.7])
@pytest.mark.parametrize(("loss_type", "label_smoothing"), SETTINGS)
def test_against_float64(kernels, loss_type, label_smoothing, rpo_alpha):
    """Losses, rewards, sums and slopes; boundaries count from somewhere inside a longer batch."""
    logps, cu, refs = batch(9, 2500)  # sequences longer than one block
    wide = logps.double().requires_grad_()
    sums = torch.stack([p.sum() for p in wide.split(cu.diff().tolist())])
    lengths = cu.diff().to(DEVICE)
    r = refs.double()
    setting = 0.1, loss_type, label_smoothing
    losses, *rewards = dpo_loss(
        sums[0::2], sums[1::2], r[0::2], r[1::2], *setting, lengths[0::2], lengths[1::2]
    )
    losses = losses - rpo_alpha * sums[0::2] / lengths[0::2]
    (slopes,) = torch.autograd.grad(losses.sum(), wide, retain_graph=True)
    got = pair_head(logps, cu + 1000, refs, *setting, rpo_alpha)
    # One rounding of a sum s to float32 moves a log-ratio by 2^-24 |s|.
    atol = 2**-23 * sums.abs().max().item()
    for name, a, b in zip(got._fields, got, (losses, *rewards, sums, slopes), strict=True):
        assert a.dtype == torch.float32 and not a.requires_grad
        loose = 20 if name in ("losses", "slopes") else 1
        torch.testing.assert_close(a.double(), b.detach(), rtol=1e-5, atol=loose * atol)


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "sigmoid_norm"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_policy_equal_to_reference_is_exactly_ln_2(kernels, loss_type, label_smoothing):
    if label_smoothing and loss_type not in SMOOTHED:
        label_smoothing = 0.0
    logps, cu, _ = batch(13, 1500)
    refs = segment_sum(logps, cu)
    losses, chosen, rejected, sums, _ = pair_head(logps, cu, refs, 0.1, loss_type, label_smoothing)
    assert torch.equal(losses, torch.full_like(losses, math.log(2)))
    assert not chosen.any() and not rejected.any()
    assert torch.equal(sums, refs)


def test_margins_far_from_zero_stay_finite(kernels):
    cu = torch.arange(9)
    logps = torch.tensor([0.0, -2e4, -2e4, 0.0, 0.0, -400.0, -400.0, 0.0], device=DEVICE)
    head = pair_head(logps, cu, torch.zeros(8, device=DEVICE), 0.1, "sigmoid", 0.0)
    want = torch.tensor([0.0, 2000.0, math.exp(-40), 40.0], device=DEVICE)
    torch.testing.assert_close(head.losses, want, rtol=1e-6, atol=0)
    assert head.slopes.isfinite().all()
    torch.testing.assert_close(head.slopes[2:4], torch.tensor([-0.1, 0.1], device=DEVICE))


def test_a_segment_does_not_depend_on_its_neighbours(kernels):
    logps, cu, _ = batch(8, 1800)
    sums = segment_sum(logps, cu)
    for i in (0, 7, 15):
        alone = logps[cu[i] : cu[i + 1]].clone()
        assert torch.equal(segment_sum(alone, torch.tensor([0, len(alone)])), sums[i : i + 1])


def test_nan_reaches_the_loss(kernels):
    logps = torch.tensor([-1.0, float("nan"), -1.0, -1.0], device=DEVICE)
    for loss_type in LOSS_TYPES:
        refs = torch.zeros(4, device=DEVICE)
        losses, *_ = pair_head(logps, torch.arange(5), refs, 0.1, loss_type, 0.0)
        assert losses.isnan().tolist() == [True, False], loss_type


def test_segment_sum_gradient(kernels):
    logps, cu, _ = batch(3, 20)
    logps.requires_grad_()
    upstream = torch.randn(6, device=DEVICE)
    (grad,) = torch.autograd.grad(segment_sum(logps, cu), logps, upstream)
    assert torch.equal(grad, upstream.repeat_interleave(cu.diff().to(DEVICE)))


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
def test_settings_that_make_no_loss(arguments, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(*[torch.zeros(1)] * 4, **arguments)


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        ([0, 2, 2, 4], "sequence 1 has no completion token"),
        ([0, 2, 3], "number of tokens 4, got 0 to 3"),
        ([1, 2, 4], "number of tokens 4, got 1 to 4"),
        ([], "cu_seqlens"),
    ],
)
def test_boundaries_that_do_not_fit(cu, message):
    with pytest.raises(ValueError, match=message):
        segment_sum(torch.zeros(4), torch.tensor(cu, dtype=torch.int64))


def test_a_negative_weight_of_the_nll_term():
    with pytest.raises(ValueError, match="rpo_alpha=-1.0"):
        pair_head(torch.zeros(2), torch.arange(3), torch.zeros(2), 0.1, "sigmoid", 0.0, -1.0)


def test_one_reference_a_sequence():
    with pytest.raises(ValueError, match=r"ref_logps \(2B,\)"):
        pair_head(torch.zeros(4), torch.tensor([0, 2, 4]), torch.zeros(1), 0.1, "sigmoid", 0.0)


def test_a_forced_kernel_that_cannot_run_says_so(monkeypatch):
    monkeypatch.setenv("SRIT_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        segment_sum(torch.zeros(4), torch.tensor([0, 4]))
    monkeypatch.setenv("SRIT_KERNELS", "cuda")
    with pytest.raises(ValueError, match="SRIT_KERNELS='cuda'"):
        segment_sum(torch.zeros(4), torch.tensor([0, 4]))
