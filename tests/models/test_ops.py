"""RMSNorm, GLU and rotary embedding against autograd through their definitions; the heap's trimming."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from srit.models import ops
from srit.models.ops import glu, rms_norm, rotate, trim_heap_in_backward


def definition_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def definition_glu(gate, up, gelu):
    return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up


def compare(function, definition, tensors, *rest):
    wide = [t.detach().double().requires_grad_() for t in tensors]
    out, want = function(*tensors, *rest), definition(*wide, *rest)
    assert out.dtype == tensors[0].dtype
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, tensors, upstream)
    truth = torch.autograd.grad(want, wide, upstream.double())
    bound = 4 * torch.finfo(out.dtype).eps
    for a, b in zip((out, *got), (want, *truth), strict=True):
        assert (a.double() - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 3, 16), (1, 0, 8)])
def test_rms_norm_is_its_definition(shape, dtype):
    x = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    compare(rms_norm, definition_norm, (x, torch.randn(shape[-1], requires_grad=True)), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gelu", [False, True])
def test_glu_is_its_definition(gelu, dtype):
    gate, up = (torch.randn(2, 9, 33).to(dtype).requires_grad_() for _ in range(2))
    compare(glu, definition_glu, (gate, up), gelu)


def test_a_frozen_weight_gets_no_gradient():
    x = torch.randn(4, 8, requires_grad=True)
    rms_norm(x, torch.ones(8), 1e-6).sum().backward()
    assert x.grad is not None


def test_only_inputs_are_saved():
    """Nothing as large as an activation but the inputs themselves."""
    x, gate, up = (torch.randn(64, 32, requires_grad=True) for _ in range(3))
    known, kept = {t.data_ptr() for t in (x, gate, up)}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, torch.ones(32), 1e-6), glu(gate, up, False)
    assert all(t.data_ptr() in known or t.numel() <= 64 for t in kept) and len(kept) == 5


def test_rotate_is_a_complex_product():
    x, cos, sin = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 4), torch.randn(2, 5, 1, 4)

    def definition(x):
        turned = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * torch.complex(cos, sin).to(
            torch.complex128)
        return torch.cat((turned.real, turned.imag), -1)

    compare(lambda x: rotate(x, cos, sin), definition, [x.requires_grad_()])


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc_trim")
def test_every_backward_of_a_second_trims_the_heap(monkeypatch):
    trims, clock = [], SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(ops, "time", clock)
    monkeypatch.setattr(ops, "_trimmed", 0.0)
    monkeypatch.setattr(ops.ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=trims.append))
    block = torch.nn.Linear(2, 2)
    trim_heap_in_backward(block)
    with torch.no_grad():
        block(torch.ones(1, 2))
    for seconds in (0.0, 0.5, 0.5, 0.5, 2.0, 2.0):
        clock.now += seconds
        block(torch.ones(1, 2)).sum().backward()
    assert len(trims) == 4  # at 0, 1.5, 3.5 and 5.5
