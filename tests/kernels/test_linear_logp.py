"""`linear_logp`, PyTorch twins and Triton kernels alike.

The truth is autograd in float64 on the rounded inputs; the allowed error is that of eager code in the
same dtype.
"""

import math

import pytest
import torch

from srit.kernels import linear_logp
from srit.kernels.linear_logp import linear_logp_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.bfloat16, torch.float16]


def case(n, d, vocab, dtype, scale=1.0):
    x = (scale * torch.randn(n, d)).to(DEVICE, dtype).requires_grad_()
    w = torch.randn(vocab, d).to(DEVICE, dtype).requires_grad_()
    targets = torch.randint(0, vocab, (n,), device=DEVICE)
    # As from a preference loss: not uniform, both signs, several sizes, a zero.
    upstream = torch.randn(n, device=DEVICE) * torch.logspace(-3, 1, n, device=DEVICE)
    upstream[n // 2] = 0
    return x, w, targets, upstream


def run(function, x, w, targets, upstream, **options):
    logp = function(x, w, targets, **options)
    return logp.detach(), *torch.autograd.grad(logp, (x, w), upstream.to(logp.dtype))


def truth(x, w, targets, upstream):
    wide = (t.detach().double().requires_grad_() for t in (x, w))
    return run(linear_logp_ref, *wide, targets, upstream)


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("vocab", [1, 2, 127, 517, 4096, 5001])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_no_worse_than_eager_in_the_same_dtype(kernels, dtype, vocab):
    inputs = case(37, 24, vocab, dtype)
    want, eager = truth(*inputs), run(linear_logp_ref, *inputs)
    got = run(linear_logp, *inputs)
    assert got[0].dtype == torch.float32
    assert [g.dtype for g in got[1:]] == [dtype, dtype]
    assert (got[0] <= 0).all()
    slack = 1.05
    if kernels == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16:
        slack = 2.1  # the interpreter truncates float32 to bfloat16, hardware rounds
    for name, a, b, c in zip(("logp", "hidden", "weight"), got, eager, want, strict=True):
        floor = 1e-6 if dtype == torch.float32 else 1e-3
        assert error(a, c) <= max(slack * error(b, c), floor), name


@pytest.mark.parametrize("vocab", [2, 517])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_chunks_change_nothing_but_rounding(kernels, dtype, vocab):
    x, w, targets, upstream = case(37, 24, vocab, dtype)
    whole = run(linear_logp, x, w, targets, upstream)
    # Chunks of 10 rows, the last one shorter.
    got = run(linear_logp, x, w, targets, upstream, chunk_bytes=10 * vocab * dtype.itemsize)
    eps = torch.finfo(dtype).eps
    # Another number of rows may be summed in another order: a few roundings of a logit.
    largest = (x.detach().double() @ w.detach().double().t()).abs().max().item()
    torch.testing.assert_close(got[0], whole[0], rtol=0, atol=4 * eps * largest)
    assert error(got[1], whole[1].double()) <= max(eps, 1e-6)
    # The weight's gradient is a sum of one rounded part per chunk.
    split = zip(x.split(10), targets.split(10), upstream.split(10), strict=True)
    parts = [truth(a, w, b, c)[2] for a, b, c in split]
    lost = (got[2].double() - sum(parts)).norm() / sum(p.norm() for p in parts)
    assert lost <= max(eps, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_training_frozen_head_and_scoring_give_the_same_values(kernels, dtype):
    x, w, targets, _ = case(29, 16, 300, dtype)
    trained = linear_logp(x, w, targets)
    with torch.no_grad():
        scored = linear_logp(x, w, targets)
    assert torch.equal(trained, scored)
    assert torch.equal(trained, linear_logp(x, w.detach(), targets))


@pytest.mark.parametrize("frozen", ["weight", "hidden", None])
def test_gradients_against_finite_differences(monkeypatch, frozen):
    monkeypatch.setenv("SRIT_KERNELS", "torch")
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=frozen != "hidden")
    w = torch.randn(11, 5, dtype=torch.float64, requires_grad=frozen != "weight")
    targets = torch.randint(0, 11, (7,))
    for size in (None, 200):
        assert torch.autograd.gradcheck(
            lambda a, b, size=size: linear_logp(a, b, targets, chunk_bytes=size), (x, w)
        )


def test_frozen_head_gets_the_same_hidden_gradient(kernels):
    x, w, targets, upstream = case(19, 8, 77, torch.float32)
    _, dx, _ = run(linear_logp, x, w, targets, upstream)
    (frozen,) = torch.autograd.grad(linear_logp(x, w.detach(), targets), x, upstream)
    torch.testing.assert_close(frozen, dx, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_row_does_not_depend_on_where_it_stands_in_its_chunk(kernels, dtype):
    x, w, targets, _ = case(32, 16, 301, dtype)
    order = torch.randperm(32, device=DEVICE)
    with torch.no_grad():
        here = linear_logp(x, w, targets)
        there = linear_logp(x[order], w, targets[order])
    assert torch.equal(here[order], there)


def test_repeats_bit_for_bit(kernels):
    inputs = case(23, 16, 333, torch.bfloat16)
    first, second = run(linear_logp, *inputs), run(linear_logp, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_retained_graph_gives_the_same_gradients_twice(kernels):
    x, w, targets, upstream = case(9, 8, 50, torch.float32)
    logp = linear_logp(x, w, targets)
    first = torch.autograd.grad(logp, (x, w), upstream, retain_graph=True)
    second = torch.autograd.grad(logp, (x, w), upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows_give_zero_gradients(kernels):
    x, w, targets, _ = case(4, 8, 50, torch.float32)
    logp = linear_logp(x[:0], w, targets[:0])
    assert logp.shape == (0,)
    dx, dw = torch.autograd.grad(logp.sum(), (x, w))
    assert not dx.any() and not dw.any()


def test_strided_inputs_give_the_same_results(kernels):
    x, w, targets, upstream = case(12, 8, 60, torch.float32)
    strided = (
        x.detach().t().contiguous().t().requires_grad_(),
        w.detach().t().contiguous().t().requires_grad_(),
        targets.repeat_interleave(2)[::2],
        upstream.repeat_interleave(2)[::2],
    )
    for a, b in zip(run(linear_logp, *strided), run(linear_logp, x, w, targets, upstream), strict=True):
        torch.testing.assert_close(a, b)


def test_an_expanded_upstream_gradient(kernels):
    x, w, targets, _ = case(12, 8, 60, torch.float32)
    got = torch.autograd.grad(linear_logp(x, w, targets).mean(), (x, w))
    want = truth(x, w, targets, torch.full((12,), 1 / 12, device=DEVICE))[1:]
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uninitialised_memory_is_never_read(kernels, poison_empty, dtype):
    inputs = case(29, 64, 517, dtype)  # bf16 GEMMs of other shapes read no padding
    want = run(linear_logp, *inputs)
    poison_empty()
    for a, b in zip(run(linear_logp, *inputs), want, strict=True):
        assert torch.equal(a, b)


def test_entropy_and_correct_come_with_the_log_probs(kernels):
    x, w, targets, _ = case(33, 16, 5001, torch.float32)
    logits = x.detach().double() @ w.detach().double().t()
    targets[::2] = logits.argmax(1)[::2]
    p = logits.softmax(1)
    plain = linear_logp(x, w, targets)
    for weight in (w, w.detach()):
        logps, stats = linear_logp(x, weight, targets, return_stats=True)
        assert torch.equal(logps, plain) and torch.equal(stats.logps, plain) and logps.requires_grad
        torch.testing.assert_close(stats.entropy.double(), -(p * p.log()).sum(1), rtol=1e-5, atol=1e-5)
        assert torch.equal(stats.correct, (logits.argmax(1) == targets).float())
        assert not stats.entropy.requires_grad


def test_every_upstream_gradient_counts(kernels):
    """A fused cross-entropy that assumed a mean used the first one for all rows."""
    x, w, targets, _ = case(16, 8, 90, torch.float32)
    for row in (0, 5, 15):
        upstream = torch.zeros(16, device=DEVICE)
        upstream[row] = 3.0
        got = run(linear_logp, x, w, targets, upstream, chunk_bytes=4 * 90 * 4)
        want = truth(x, w, targets, upstream)
        assert error(got[2], want[2]) < 1e-6
        assert not got[1][torch.arange(16, device=DEVICE) != row].any()


@pytest.mark.parametrize("vocab", [129, 32_003, 49_152, 50_257, 128_256, 129_920, 151_936])
def test_padded_columns_do_not_enter_the_sum(kernels, vocab):
    """Vocabularies that no block divides: without the mask log-probs rose to +123."""
    x, w, targets, _ = case(3, 4, vocab, torch.bfloat16, scale=0.1)
    with torch.no_grad():
        logp = linear_logp(x, w, targets)
    assert (logp <= 0).all()
    assert error(logp, truth(x, w, targets, torch.zeros(3, device=DEVICE))[0]) < 1e-3


def test_huge_logits_stay_finite_and_confident_rows_keep_a_gradient(kernels):
    """p - 1 in bfloat16 would lose the gradient of the confident row."""
    w = torch.tensor([[1.0], [0.0], [-1.0]], device=DEVICE, requires_grad=True)
    x = torch.tensor([[1e4], [-1e4], [8.0]], device=DEVICE, requires_grad=True)
    targets = torch.tensor([0, 0, 0], device=DEVICE)
    logp = linear_logp(x, w, targets)
    assert logp[0] == 0 and logp[1] == -2e4
    (dx,) = torch.autograd.grad(logp[2], x)
    # d logp / dx = w_0 - sum p_v w_v = 1 - (p_0 - p_2)
    p = [math.exp(8 * v) / (math.exp(8) + 1 + math.exp(-8)) for v in (1, 0, -1)]
    assert dx[2].item() == pytest.approx(1 - p[0] + p[2], rel=1e-3)


def test_master_weights_in_float32_with_bfloat16_activations(kernels):
    x, w, targets, upstream = case(20, 16, 200, torch.bfloat16)
    master = w.detach().float().requires_grad_()
    logp, dx, dw = run(linear_logp, x, master, targets, upstream)
    want = truth(x, master, targets, upstream)
    assert dw.dtype == torch.float32 and dx.dtype == torch.bfloat16
    assert error(logp, want[0]) < 5e-3 and error(dw, want[2]) < 1e-2


def test_nan_hidden_states_give_nan(kernels):
    x, w, targets, _ = case(3, 4, 10, torch.float32)
    with torch.no_grad():
        x[1, 2] = float("nan")
        logp = linear_logp(x, w, targets)
    assert logp.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "liger"}, "path='liger'.*auto, gemm, fused"),
        ({"path": "fused"}, "without gradient"),
    ],
)
def test_wrong_options_are_rejected(options, message):
    x, w, targets, _ = case(3, 4, 10, torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_logp(x, w, targets, **options)


def test_targets_outside_the_vocabulary_are_rejected_on_the_cpu(monkeypatch):
    monkeypatch.setenv("SRIT_KERNELS", "torch")
    x, w = torch.randn(3, 4), torch.randn(10, 4)
    for bad in (-1, -100, 10):
        with pytest.raises(ValueError, match=f"{bad}.*allowed are 0 to 9"):
            linear_logp(x, w, torch.tensor([0, bad, 1]))


@pytest.mark.gpu
def test_targets_outside_the_vocabulary_give_nan_on_a_gpu():
    x, w, _, _ = case(3, 4, 10, torch.float32)
    logp = linear_logp(x, w, torch.tensor([0, 10, -100], device="cuda"))
    assert logp.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("x", "w", "targets", "message"),
    [
        ((2, 3, 4), (5, 4), torch.zeros(2).long(), "hidden .2, 3, 4."),
        ((2, 3), (5, 4), torch.zeros(2).long(), "weight .5, 4."),
        ((2, 4), (5, 4), torch.zeros(3).long(), "targets .3,."),
        ((2, 4), (5, 4), torch.zeros(2).int(), "int32"),
        ((2, 4), (0, 4), torch.zeros(2).long(), "at least one"),
    ],
)
def test_wrong_shapes_and_dtypes_are_rejected(x, w, targets, message):
    x, w = torch.zeros(x), torch.zeros(w)
    with pytest.raises(ValueError, match=message):
        linear_logp(x, w, targets)
    with pytest.raises(ValueError, match="hidden has dtype torch.int32"):
        linear_logp(torch.zeros(2, 4).int(), torch.zeros(5, 4), torch.zeros(2).long())


@pytest.mark.gpu
def test_more_than_2_31_logits():
    vocab, n = 151_936, 20_000
    x, w, targets, _ = case(n, 64, vocab, torch.bfloat16)
    with torch.no_grad():
        logp = linear_logp(x, w, targets, chunk_bytes=1 << 40)
        tail = linear_logp(x[-64:], w, targets[-64:])
    assert torch.equal(logp[-64:], tail)


@pytest.mark.gpu
def test_full_logits_are_never_in_memory():
    vocab, n, d = 128_256, 8192, 512
    inputs = case(n, d, vocab, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(linear_logp, *inputs, chunk_bytes=256 << 20)
    assert torch.cuda.max_memory_allocated() - before < 3 * (256 << 20) + 4 * vocab * d * 2
