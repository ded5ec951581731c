"""`pair_head` and `segment_sum` against float64, PyTorch twins and Triton kernels alike."""

import math

import pytest
import torch

from srit.kernels import dpo_loss, pair_head, segment_sum
from srit.kernels.preference_loss import LOSS_TYPES, SMOOTHED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = [(name, 0.0) for name in LOSS_TYPES] + [(name, 0.1) for name in SMOOTHED]


def batch(pairs, longest):
    lengths = torch.randint(1, longest, (2 * pairs,))
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    logps = -3 * torch.rand(int(cu[-1]))
    refs = torch.stack([p.sum() for p in logps.split(lengths.tolist())]) + torch.randn(2 * pairs)
    return logps.to(DEVICE), cu, refs.to(DEVICE)


@pytest.mark.parametrize("rpo_alpha", [0.0, 0.7])
@pytest.mark.parametrize(("loss_type", "label_smoothing"), SETTINGS)
def test_agrees_with_dpo_loss_in_float64(kernels, loss_type, label_smoothing, rpo_alpha):
    """Losses, rewards, sums and slopes; the boundaries start inside a longer batch."""
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


def test_nan_log_probs_give_a_nan_loss(kernels):
    logps = torch.tensor([-1.0, float("nan"), -1.0, -1.0], device=DEVICE)
    for loss_type in LOSS_TYPES:
        refs = torch.zeros(4, device=DEVICE)
        losses, *_ = pair_head(logps, torch.arange(5), refs, 0.1, loss_type, 0.0)
        assert losses.isnan().tolist() == [True, False], loss_type


def test_gradient_of_segment_sum_repeats_the_upstream_one(kernels):
    logps, cu, _ = batch(3, 20)
    logps.requires_grad_()
    upstream = torch.randn(6, device=DEVICE)
    (grad,) = torch.autograd.grad(segment_sum(logps, cu), logps, upstream)
    assert torch.equal(grad, upstream.repeat_interleave(cu.diff().to(DEVICE)))


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        ([0, 2, 2, 4], "sequence 1 has no completion token"),
        ([0, 2, 3], "number of tokens 4, got 0 to 3"),
        ([1, 2, 4], "number of tokens 4, got 1 to 4"),
        ([], "cu_targets"),
    ],
)
def test_wrong_boundaries_are_rejected(cu, message):
    with pytest.raises(ValueError, match=message):
        segment_sum(torch.zeros(4), torch.tensor(cu, dtype=torch.int64))


def test_a_negative_rpo_alpha_is_rejected():
    with pytest.raises(ValueError, match="rpo_alpha=-1.0"):
        pair_head(torch.zeros(2), torch.arange(3), torch.zeros(2), 0.1, "sigmoid", 0.0, -1.0)


def test_needs_one_reference_per_sequence():
    with pytest.raises(ValueError, match=r"ref_logps \(2B,\)"):
        pair_head(torch.zeros(4), torch.tensor([0, 2, 4]), torch.zeros(1), 0.1, "sigmoid", 0.0)


def test_a_forced_kernel_that_cannot_run_raises(monkeypatch):
    monkeypatch.setenv("SRIT_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        segment_sum(torch.zeros(4), torch.tensor([0, 4]))
    monkeypatch.setenv("SRIT_KERNELS", "cuda")
    with pytest.raises(ValueError, match="SRIT_KERNELS='cuda'"):
        segment_sum(torch.zeros(4), torch.tensor([0, 4]))
