"""Attention over a packed stream in one call: the same results, and when torch's function is used.

It does not run on a CPU. Stand-ins with its signature compute what it documents.
"""

import itertools
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import SIZES, sides, tiny_checkpoint
from torch.utils.checkpoint import checkpoint

from srit.config import DPOConfig
from srit.data.batches import collate
from srit.models import attention, load_model, varlen
from srit.train.dpo import compute_loss


def by_definition(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None,
                  window_size=(-1, -1), enable_gqa=False, diagonal="end"):
    """Each segment's queries over its keys; causal from the last query and key backwards."""
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("number of heads")
    assert window_size[1] == 0 and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    out = torch.empty_like(query)
    bounds = list(zip(cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:], strict=True))
    assert cu_seq_q[-1] == len(query) and cu_seq_k[-1] == len(key)
    assert max_q == max(b - a for a, b, _, _ in bounds) and max_k == max(b - a for *_, a, b in bounds)
    for a, b, c, d in bounds:
        q, k, v = query[a:b], key[c:d], value[c:d]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        ahead = len(k) - len(q) if diagonal == "end" else 0
        distance = torch.arange(len(q))[:, None] + ahead - torch.arange(len(k))
        seen = distance >= 0
        if window_size[0] >= 0:
            seen &= distance <= window_size[0]
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        probs = scores.masked_fill(~seen, -1e30).softmax(-1)
        out[a:b] = torch.einsum("hqk,khd->qhd", probs, v)
    return out


def without_gqa(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None,
                window_size=(-1, -1)):
    return by_definition(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale,
                         window_size=window_size)


def top_left(*args, enable_gqa=False, **options):
    return by_definition(*args, enable_gqa=enable_gqa, diagonal="start", **options)


def too_old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    raise AssertionError("not reached")


@pytest.fixture
def usable():
    varlen.usable.cache_clear()
    yield lambda windowed: varlen.usable(torch.device("cpu"), torch.float32, 16, windowed)
    varlen.usable.cache_clear()


@pytest.mark.parametrize("function", [by_definition, without_gqa])
@pytest.mark.parametrize("window", [None, 8])
def test_one_call_equals_segment_by_segment(function, window, tmp_path, monkeypatch):
    changes = {} if window is None else {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    model, _ = load_model(str(tiny_checkpoint(tmp_path / "m", scale=4.0, **changes)))
    cfg = DPOConfig("m", ["x"], str(tmp_path), beta=0.5)
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return function(*args, **options)

    # `attend` reads the signature, which the wrapper must keep.
    counted.__signature__ = varlen.inspect.signature(function)
    monkeypatch.setattr(varlen, "varlen_attn", counted)
    pairs, ref = [sides(size) for size in SIZES], -30 * torch.rand(2 * len(SIZES))
    for batch in (collate(pairs), collate([[side] for pair in pairs for side in pair])):
        results = []
        for one_call in (False, True):
            monkeypatch.setattr(attention, "_takes_varlen", lambda *_, one_call=one_call: one_call)
            model.zero_grad()
            loss, metrics = compute_loss(model, replace(batch, ref_logps=ref), cfg)
            loss.backward()
            results.append((loss.detach(), metrics, *[p.grad.clone() for p in model.parameters()]))
        for one, other in zip(*results, strict=True):
            assert (one - other).norm() <= 1e-5 * one.norm()
    assert len(calls) == 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("windowed", [False, True])
def test_a_right_function_is_trusted(usable, windowed, monkeypatch):
    for function in (by_definition, without_gqa):
        varlen.usable.cache_clear()
        monkeypatch.setattr(varlen, "varlen_attn", function)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert usable(windowed)
        varlen.usable.cache_clear()
        with torch.inference_mode():
            assert usable(windowed)


@pytest.mark.parametrize("function, reason", [(top_left, "wrong results"), (too_old, "scale")])
def test_a_wrong_or_older_function_is_named_and_not_used(usable, function, reason, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", function)
    with pytest.warns(UserWarning, match=f"varlen_attn of torch .*{reason}.*segments are computed one"):
        assert not usable(False)


def test_the_check_runs_within_a_checkpointed_block(usable, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", by_definition)
    tried = []

    def block(x):
        tried.append(usable(False))
        return x.square().sum()

    x = torch.ones(3, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).backward()
    assert tried == [True, True] and torch.equal(x.grad, torch.full((3,), 2.0))


def test_it_is_used_on_a_gpu_in_16_bits_only(monkeypatch):
    monkeypatch.setattr(varlen, "usable", lambda *_: True)
    for on_gpu, dtype in itertools.product((True, False), (torch.bfloat16, torch.float32)):
        q = SimpleNamespace(is_cuda=on_gpu, dtype=dtype, device=None, shape=(1, 9, 4, 64))
        assert attention._takes_varlen(q, None) == (on_gpu and dtype == torch.bfloat16)


def test_a_torch_without_it_goes_segment_by_segment(usable, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", None)
    assert not usable(False)


@pytest.mark.gpu
@pytest.mark.parametrize("windowed", [False, True])
def test_this_torch_has_a_right_function(windowed):
    assert varlen.usable(torch.device("cuda"), torch.bfloat16, 64, windowed)


@pytest.mark.gpu
def test_forward_and_backward_do_not_wait_for_the_gpu(tmp_path):
    """From a batch on the host to gradients on the device."""
    gpu = torch.device("cuda")
    checkpoint = str(tiny_checkpoint(tmp_path / "m"))
    model, _ = load_model(checkpoint, device=gpu, compute_dtype=torch.bfloat16)
    cfg, pairs = DPOConfig("m", ["x"], str(tmp_path)), [sides(size) for size in SIZES]
    ref = torch.zeros(2 * len(SIZES))
    for mode in ("default", "error"):  # the first step compiles and checks kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            batch = replace(collate(pairs), ref_logps=ref).to(gpu)
            compute_loss(model, batch, cfg)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
