"""`linear_logp`, the twin and the Triton kernels (interpreted where there is no GPU).

Truth is float64 through autograd on the inputs as rounded; what a result may be off by is what the
same computation in the same dtype is off by.
"""

import math

import pytest
import torch

from srit.kernels import linear_logp
from srit.kernels.linear_logp import linear_logp_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["torch", "triton"])
def kernels(request, monkeypatch):
    monkeypatch.setenv("SRIT_KERNELS", request.param)
    return request.param


def case(n, d, vocab, dtype, scale=1.0):
    x = (scale * torch.randn(n, d)).to(DEVICE, dtype).requires_grad_()
    w = torch.randn(vocab, d).to(DEVICE, dtype).requires_grad_()
    targets = torch.randint(0, vocab, (n,), device=DEVICE)
    # Not uniform, both signs, several sizes, a zero: what a preference loss sends back.
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
        slack = 2.1  # the interpreter cuts float32 off to bfloat16, hardware rounds
    for name, a, b, c in zip(("logp", "hidden", "weight"), got, eager, want, strict=True):
        floor = 1e-6 if dtype == torch.float32 else 1e-3
        assert error(a, c) <= max(slack * error(b, c), floor), name


@pytest.mark.parametrize("vocab", [2, 517])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_chunks_change_nothing_but_rounding(kernels, dtype, vocab):
    x, w, targets, upstream = case(37, 24, vocab, dtype)
    # Chunks of 10 rows, the last one shorter; nothing kept for the backward.
    options = {"chunk_bytes": 10 * vocab * dtype.itemsize, "stash_bytes": 0}
    whole = run(linear_logp, x, w, targets, upstream)
    got = run(linear_logp, x, w, targets, upstream, **options)
    eps = torch.finfo(dtype).eps
    # Another number of rows may be another order of summation: a few roundings of a logit.
    largest = (x.detach().double() @ w.detach().double().t()).abs().max().item()
    torch.testing.assert_close(got[0], whole[0], rtol=0, atol=4 * eps * largest)
    assert error(got[1], whole[1].double()) <= max(eps, 1e-6)
    # The weight's gradient is a sum of one rounded part a chunk.
    split = zip(x.split(10), targets.split(10), upstream.split(10), strict=True)
    parts = [truth(a, w, b, c)[2] for a, b, c in split]
    lost = (got[2].double() - sum(parts)).norm() / sum(p.norm() for p in parts)
    assert lost <= max(eps, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_stash_recompute_chunks_and_scoring_give_the_same_values(kernels, dtype):
    inputs = case(29, 16, 300, dtype)
    kept = run(linear_logp, *inputs)
    remade = run(linear_logp, *inputs, stash_bytes=0)
    with torch.no_grad():
        scored = linear_logp(*inputs[:3])
    for a, b in zip(kept, remade, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(kept[0], scored)
    frozen = linear_logp(inputs[0], inputs[1].detach(), inputs[2])
    assert torch.equal(kept[0], frozen)


@pytest.mark.parametrize("frozen", ["weight", "hidden", None])
def test_chunked_gradients_in_float64(monkeypatch, frozen):
    monkeypatch.setenv("SRIT_KERNELS", "torch")
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=frozen != "hidden")
    w = torch.randn(11, 5, dtype=torch.float64, requires_grad=frozen != "weight")
    targets = torch.randint(0, 11, (7,))
    for options in ({}, {"chunk_bytes": 200}, {"chunk_bytes": 200, "stash_bytes": 0}):
        assert torch.autograd.gradcheck(lambda a, b, o=options: linear_logp(a, b, targets, **o), (x, w))


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


def test_backward_of_a_retained_graph_twice(kernels):
    x, w, targets, upstream = case(9, 8, 50, torch.float32)
    logp = linear_logp(x, w, targets)
    first = torch.autograd.grad(logp, (x, w), upstream, retain_graph=True)
    second = torch.autograd.grad(logp, (x, w), upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows(kernels):
    x, w, targets, _ = case(4, 8, 50, torch.float32)
    logp = linear_logp(x[:0], w, targets[:0])
    assert logp.shape == (0,)
    dx, dw = torch.autograd.grad(logp.sum(), (x, w))
    assert not dx.any() and not dw.any()


def test_inputs_that_are_not_contiguous(kernels):
    x, w, targets, upstream = case(12, 8, 60, torch.float32)
    strided = (
        x.detach().t().contiguous().t().requires_grad_(),
        w.detach().t().contiguous().t().requires_grad_(),
        targets.repeat_interleave(2)[::2],
        upstream.repeat_interleave(2)[::2],
    )
    for a, b in zip(run(linear_logp, *strided), run(linear_logp, x, w, targets, upstream), strict=True):
        torch.testing.assert_close(a, b)


def test_upstream_gradient_that_is_one_number_expanded(kernels):
    x, w, targets, _ = case(12, 8, 60, torch.float32)
    got = torch.autograd.grad(linear_logp(x, w, targets).mean(), (x, w))
    want = truth(x, w, targets, torch.full((12,), 1 / 12, device=DEVICE))[1:]
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-6


def test_what_memory_held_before_does_not_matter(kernels, monkeypatch):
    inputs = case(13, 8, 61, torch.float32)
    want = run(linear_logp, *inputs)

    def poisoned(function):
        def call(*args, **kwargs):
            out = function(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return call

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    for a, b in zip(run(linear_logp, *inputs), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("logit_scale", [1.0, 0.5])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softcap_and_logit_scale(kernels, dtype, softcap, logit_scale):
    x, w, targets, upstream = case(21, 16, 301, dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    want = linear_logp_ref(*wide, targets, softcap, logit_scale)
    want = want.detach(), *torch.autograd.grad(want, wide, upstream.double())
    options = {"softcap": softcap, "logit_scale": logit_scale}
    bounds = (1e-6, 2e-6, 2e-6) if dtype == torch.float32 else (3e-3, 1e-2, 1e-2)
    for more in ({}, {"chunk_bytes": 4000, "stash_bytes": 0}):
        got = run(linear_logp, x, w, targets, upstream, **options, **more)
        for a, b, bound in zip(got, want, bounds, strict=True):
            assert error(a, b) < bound
    frozen = torch.autograd.grad(linear_logp(x, w.detach(), targets, **options), x, upstream)
    assert error(frozen[0], want[1]) < bounds[1]


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_entropy_and_correct_come_with_the_log_probs(kernels, softcap):
    x, w, targets, _ = case(33, 16, 5001, torch.float32)
    logits = x.detach().double() @ w.detach().double().t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    targets[::2] = logits.argmax(1)[::2]
    p = logits.softmax(1)
    plain = linear_logp(x, w, targets, softcap=softcap)
    for weight in (w, w.detach()):
        logps, stats = linear_logp(x, weight, targets, softcap=softcap, return_stats=True)
        assert torch.equal(logps, plain) and torch.equal(stats.logps, plain) and logps.requires_grad
        torch.testing.assert_close(stats.entropy.double(), -(p * p.log()).sum(1), rtol=1e-5, atol=1e-5)
        assert torch.equal(stats.correct, (logits.argmax(1) == targets).float())
        assert not stats.entropy.requires_grad


def test_ignored_rows_take_no_part(kernels):
    x, w, targets, upstream = case(20, 8, 70, torch.float32)
    with torch.no_grad():
        x[3] = float("nan")  # what padding may hold
    targets[[3, 7, 19]] = -100
    kept = targets != -100
    logps, stats = linear_logp(x, w, targets, ignore_index=-100, return_stats=True)
    grads = torch.autograd.grad(logps, (x, w), upstream)
    assert not logps[~kept].any() and not stats.entropy[~kept].any() and not grads[0][~kept].any()
    few = x.detach()[kept].requires_grad_()
    want = linear_logp(few, w, targets[kept])
    assert torch.equal(logps[kept], want)
    for a, b in zip((grads[0][kept], grads[1]), torch.autograd.grad(want, (few, w), upstream[kept]),
                    strict=True):
        assert torch.equal(a, b)
    none = linear_logp(x, w, torch.full_like(targets, -100), ignore_index=-100)
    assert not none.any()


def test_every_upstream_gradient_counts(kernels):
    """Not the first one for all rows, as in a fused cross-entropy that assumed a mean."""
    x, w, targets, _ = case(16, 8, 90, torch.float32)
    for row in (0, 5, 15):
        upstream = torch.zeros(16, device=DEVICE)
        upstream[row] = 3.0
        got = run(linear_logp, x, w, targets, upstream, chunk_bytes=4 * 90 * 4, stash_bytes=0)
        want = truth(x, w, targets, upstream)
        assert error(got[2], want[2]) < 1e-6
        assert not got[1][torch.arange(16, device=DEVICE) != row].any()


@pytest.mark.parametrize("vocab", [129, 32_003, 49_152, 50_257, 128_256, 129_920, 151_936])
def test_padded_columns_do_not_enter_the_sum(kernels, vocab):
    """Vocabularies that no block divides: log-probs rose to +123 in a kernel that forgot its mask."""
    x, w, targets, _ = case(3, 4, vocab, torch.bfloat16, scale=0.1)
    with torch.no_grad():
        logp = linear_logp(x, w, targets)
    assert (logp <= 0).all()
    assert error(logp, truth(x, w, targets, torch.zeros(3, device=DEVICE))[0]) < 1e-3


def test_huge_and_confident_logits(kernels):
    """No overflow at logits of 1e4; a sure row keeps a gradient that bfloat16's p - 1 would lose."""
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


def test_non_finite_hidden_is_seen_not_hidden(kernels):
    x, w, targets, _ = case(3, 4, 10, torch.float32)
    with torch.no_grad():
        x[1, 2] = float("nan")
        logp = linear_logp(x, w, targets)
    assert logp.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"logit_scale": -1.0}, "logit_scale=-1.0"),
        ({"path": "liger"}, "path='liger'.*auto, gemm, fused"),
        ({"path": "fused"}, "without gradient"),
    ],
)
def test_options_that_make_no_sense(options, message):
    x, w, targets, _ = case(3, 4, 10, torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_logp(x, w, targets, **options)


def test_targets_outside_the_vocabulary(monkeypatch):
    monkeypatch.setenv("SRIT_KERNELS", "torch")
    x, w = torch.randn(3, 4), torch.randn(10, 4)
    for bad in (-1, -100, 10):
        with pytest.raises(ValueError, match=f"{bad}.*allowed are 0 to 9"):
            linear_logp(x, w, torch.tensor([0, bad, 1]))


@pytest.mark.gpu
def test_targets_outside_the_vocabulary_on_a_gpu():
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
def test_wrong_shapes_and_dtypes_are_named(x, w, targets, message):
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
def test_no_full_logits_in_memory():
    vocab, n, d = 128_256, 8192, 512
    inputs = case(n, d, vocab, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(linear_logp, *inputs, chunk_bytes=256 << 20, stash_bytes=0)
    assert torch.cuda.max_memory_allocated() - before < 3 * (256 << 20) + 4 * vocab * d * 2
