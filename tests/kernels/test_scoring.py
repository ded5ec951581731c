"""Path B of `linear_logp`: fused GEMM and logsumexp, interpreted where there is no GPU."""

import numpy as np
import pytest
import torch

from srit.kernels import linear_logp, scoring_triton
from srit.kernels.linear_logp import FUSED_UP_TO, linear_logp_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    monkeypatch.setenv("SRIT_KERNELS", "triton")


@pytest.fixture(params=["descriptors", "pointers"])
def loads(request, monkeypatch):
    if request.param == "pointers":
        monkeypatch.setattr(scoring_triton, "uses_descriptors", lambda *_: False)
    elif DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("descriptors need sm_90")


def case(n, d, vocab, dtype):
    x, w = torch.randn(n, d).to(DEVICE, dtype), torch.randn(vocab, d).to(DEVICE, dtype)
    return x, w, torch.randint(0, vocab, (n,), device=DEVICE)


def fused(x, w, targets):
    with torch.no_grad():
        return linear_logp(x, w, targets, path="fused")


# One token; a tile less one, one tile, a tile and one; slices without a tile; D that no block divides.
@pytest.mark.parametrize(
    ("n", "d", "vocab"),
    [(3, 40, 1), (5, 64, 255), (130, 96, 256), (7, 33, 517), (140, 64, 4500), (2, 16, 50_257)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probs_are_exact_to_float32(loads, dtype, n, d, vocab):
    x, w, targets = case(n, d, vocab, dtype)
    got, want = fused(x, w, targets), linear_logp_ref(x.double(), w.double(), targets)
    assert got.dtype == torch.float32 and (got <= 0).all()
    # Four roundings of the largest sum that a logit is made of. Tensor cores truncate where they add.
    bound = 4 * 2**-23 * (x.double().abs() @ w.double().abs().T).max()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=bound.item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_every_batch(loads, dtype, monkeypatch):
    # The interpreter's tl.dot is np.matmul; on some CPUs BLAS sums the rows of a tile in two orders.
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("ij,jk", a, b, dtype=dtype))
    x, w, targets = case(140, 32, 600, dtype)
    got = fused(x, w, targets)
    order = torch.randperm(140, device=DEVICE)
    assert torch.equal(fused(x[order], w, targets[order]), got[order])
    for part in (slice(0, 1), slice(17, 18), slice(139, 140), slice(9, 138)):
        assert torch.equal(fused(x[part], w, targets[part]), got[part])


def test_uninitialised_memory_is_never_read(poison_empty):
    inputs = case(11, 32, 600, torch.float32)
    want = fused(*inputs)
    poison_empty()
    assert torch.equal(fused(*inputs), want)


def test_no_rows_nan_rows_and_strided_rows(loads):
    x, w, targets = case(4, 32, 600, torch.float32)
    assert fused(x[:0], w, targets[:0]).shape == (0,)
    x[1] = float("nan")
    assert fused(x, w, targets).isnan().tolist() == [False, True, False, False]
    wide = torch.randn(4, 64, device=DEVICE)[:, ::2]
    assert torch.equal(fused(wide, w, targets), fused(wide.contiguous(), w, targets))


def test_agrees_with_the_gemm_path():
    x, w, targets = case(50, 64, 3000, torch.float32)
    with torch.no_grad():
        gemm = linear_logp(x, w, targets, path="gemm")
    torch.testing.assert_close(fused(x, w, targets), gemm, rtol=0, atol=2e-5)


def test_the_fused_path_needs_triton(monkeypatch):
    monkeypatch.setenv("SRIT_KERNELS", "torch")
    with pytest.raises(ValueError, match="path='fused' is a Triton kernel"):
        fused(*case(2, 16, 30, torch.float32))


@pytest.mark.gpu
def test_auto_follows_the_measured_table(monkeypatch):
    x, w, targets = case(64, 512, 3000, torch.bfloat16)
    with torch.no_grad():
        for limit, path in ((511, "gemm"), (512, "fused")):
            monkeypatch.setitem(FUSED_UP_TO, torch.cuda.get_device_name(), limit)
            assert torch.equal(linear_logp(x, w, targets), linear_logp(x, w, targets, path=path))
