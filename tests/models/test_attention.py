"""Attention on a CPU against its definition in float64: causal, in a window, behind a prompt."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_checkpoint

from srit.models import load_model
from srit.models.attention import _sdpa


def definition(q, k, v, seen, scale):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (scale * q @ k.mT).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("T,before,window", [(1, 0, None), (37, 0, None), (37, 0, 5), (1, 21, None),
                                             (19, 21, None), (19, 21, 8)])
def test_values_and_gradients_are_those_of_the_definition(T, before, window, heads, dtype):
    (H, K), hd, S = heads, 16, before + T
    # As the decoder has them: (B, T, H, hd), seen as (B, H, T, hd).
    q, k, v = (torch.randn(1, n, h, hd, dtype=dtype).transpose(1, 2).requires_grad_()
               for n, h in ((T, H), (S, K), (S, K)))
    seen = torch.ones(T, S, dtype=torch.bool).tril(before)
    if window is not None:
        seen = seen.triu(before + 1 - window)
    mask = None if not before and window is None else seen
    out = _sdpa(q, k, v, mask, 0.3)
    with torch.no_grad():
        assert torch.equal(_sdpa(q, k, v, mask, 0.3), out)  # the first DPO loss is exactly ln 2
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), upstream)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = definition(*wide, seen, 0.3)
    truth = torch.autograd.grad(want, wide, upstream.double())
    # Of bfloat16 gradients, half a unit more than their rounding: torch's own backward exceeds it.
    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-14}[dtype]
    for a, b in zip((out, *got), (want, *truth), strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert (a.double() - b).norm() <= bound * max(b.norm(), upstream.norm())  # T = 1: dq is zero


def test_the_forward_is_that_of_torch():
    q, k, v = (torch.randn(2, h, 33, 16, dtype=torch.bfloat16, requires_grad=True) for h in (6, 2, 2))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    assert torch.equal(_sdpa(q, k, v, None, 0.3), want.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_segment(tmp_path, dtype):
    model, _ = load_model(tiny_checkpoint(tmp_path / "m"), compute_dtype=dtype)
    ids, bounds = torch.arange(3, 13)[None], [0, 4, 4, 10]
    hidden = model.hidden(ids, cu_seqlens=torch.tensor(bounds))[0]
    parts = [model.hidden(ids[:, a:b])[0] for a, b in pairwise(bounds) if a < b]
    assert torch.equal(hidden, torch.cat(parts)) and hidden.requires_grad
