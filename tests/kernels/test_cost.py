"""FLOPs and bytes of the head: an extra GEMM, or an extra pass over (N, V) or (V, D), fails here.

docs/kernels.md derives its roofline from these counts. Tensors of (N, D) and smaller are left out: they
are D / V of the rest.
"""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from srit.kernels import linear_dpo, linear_logp, linear_nll, row_softmax
from srit.kernels.chunks import chunk_limit, group_chunks, row_chunks

N, D, VOCAB = 60, 23, 512
# Reads and writes of a chunk of logits by the row softmax.
ROW_SOFTMAX = {"logp": 1, "grad": 2, "logp_grad": 3}
# GEMMs over N x D x V; accesses of a logit (write, logp, [write again,] read and write for G, dX, dW);
# reads of W per chunk.
WAYS = {"score": (1, 2, 1), "one_pass": (3, 6, 2), "recompute": (4, 7, 3), "frozen": (2, 5, 2)}


class Cost(NamedTuple):
    flops: int
    logits_bytes: int  # traffic of (rows, V) buffers
    weight_bytes: int  # traffic of W and dW


def head_cost(chunks, way):
    """Forward and backward in float32 on `chunks` rows each."""
    gemms, accesses, reads = WAYS[way]
    weight_accesses = reads * len(chunks)
    if way in ("one_pass", "recompute"):  # the first chunk writes dW, the others read and write it
        weight_accesses += 2 * len(chunks) - 1
    return Cost(2 * gemms * sum(chunks) * D * VOCAB, 4 * accesses * sum(chunks) * VOCAB,
                4 * weight_accesses * D * VOCAB)


class Meter(TorchDispatchMode):
    """Adds up the FLOPs of GEMMs and the bytes of large operands, read and written."""

    def __init__(self):
        super().__init__()
        self.flops = self.logits_bytes = self.weight_bytes = 0

    def move(self, tensor):
        if tensor.dim() == 2 and set(tensor.shape) == {VOCAB, D}:
            self.weight_bytes += tensor.nbytes
        elif tensor.dim() == 2 and VOCAB in tensor.shape:
            self.logits_bytes += tensor.numel() * tensor.element_size()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or "empty" in name or name in ("detach", "alias"):
            return result
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        for value in args:
            if isinstance(value, torch.Tensor):
                self.move(value)
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.move(value)
        return result


@pytest.fixture
def meter(monkeypatch):
    """Counts ROW_SOFTMAX for the row softmax; test_row_softmax_bytes holds the kernels to it."""
    monkeypatch.setenv("SRIT_KERNELS", "torch")
    meter = Meter()

    def counted(name, passes):
        function = getattr(row_softmax, name)

        def call(raw, *args):
            with _disable_current_modes():
                function(raw, *args)
            meter.logits_bytes += passes * raw.numel() * raw.element_size()

        return call

    for name, passes in ROW_SOFTMAX.items():
        monkeypatch.setattr(row_softmax, name, counted(name, passes))
    return meter


def problem():
    x = torch.randn(N, D, requires_grad=True)
    w = torch.nn.Parameter(torch.randn(VOCAB, D))
    return x, w, torch.randint(0, VOCAB, (N,))


LENGTHS = [7, 5, 9, 3, 10, 6, 8, 12]
CU = [0, *itertools.accumulate(LENGTHS)]


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 25 * VOCAB * 4])
@pytest.mark.parametrize("mode", ["score", "recompute", "frozen", "nll", "nll_frozen", "dpo",
                                  "dpo_frozen"])
def test_flops_and_bytes_of_every_way(meter, mode, chunk_bytes):
    x, w, targets = problem()
    limit = chunk_limit(x, VOCAB, chunk_bytes)
    chunks = [part.stop - part.start for part in row_chunks(N, limit)]
    if mode.startswith("dpo"):
        groups = group_chunks(CU[2::2], limit)
        chunks = [CU[2 * last] - CU[2 * first] for first, last in groups]
    assert len(chunks) == (1 if chunk_bytes == 1 << 20 else 3)
    weight = w.detach() if mode.endswith("frozen") else w
    with meter:
        if mode == "score":
            with torch.no_grad():
                linear_logp(x, w, targets, chunk_bytes=chunk_bytes)
        elif mode.startswith("nll"):
            linear_nll(x, weight, targets, chunk_bytes=chunk_bytes).backward()
        elif mode.startswith("dpo"):
            cu, ref = torch.tensor(CU), torch.zeros(len(LENGTHS))
            linear_dpo(x, weight, targets, cu, ref, chunk_bytes=chunk_bytes)[0].backward()
        else:
            linear_logp(x, weight, targets, chunk_bytes=chunk_bytes).backward(torch.rand(N))
    way = "frozen" if mode.endswith("frozen") else mode if mode in WAYS else "one_pass"
    assert Cost(meter.flops, meter.logits_bytes, meter.weight_bytes) == head_cost(chunks, way)


@pytest.fixture
def interpreter_bytes(monkeypatch):
    """Bytes that interpreted kernels load and store: counts the lanes that are not masked."""
    if torch.cuda.is_available():
        pytest.skip("counts in Triton's interpreter")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    monkeypatch.setenv("SRIT_KERNELS", "triton")
    moved = {"load": 0, "store": 0}
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self, ptrs, mask, *args, **kwargs):
        result = load(self, ptrs, mask, *args, **kwargs)
        moved["load"] += int(np.sum(mask.data)) * ptrs.get_element_ty().primitive_bitwidth // 8
        return result

    def counted_store(self, ptrs, value, mask, *args, **kwargs):
        moved["store"] += int(np.sum(mask.data)) * ptrs.get_element_ty().primitive_bitwidth // 8
        return store(self, ptrs, value, mask, *args, **kwargs)

    monkeypatch.setattr(builder, "create_masked_load", counted_load)
    monkeypatch.setattr(builder, "create_masked_store", counted_store)
    return moved


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("name", ROW_SOFTMAX)
def test_row_softmax_bytes(interpreter_bytes, name, extra):
    from srit.kernels import row_softmax_triton

    n, vocab = 5, 9984  # a multiple of the 32 elements that rows are padded to
    z = torch.randn(n, vocab).bfloat16()
    stats = torch.rand(5 if extra else 3, n)
    coef = () if name == "logp" else (torch.rand(n),)
    getattr(row_softmax_triton, name)(z, torch.zeros(n).long(), stats, *coef)
    row = n * vocab * 2
    reads, writes = {"logp": (1, 0), "grad": (1, 1), "logp_grad": (2, 1)}[name]
    assert reads + writes == ROW_SOFTMAX[name]
    few = 80 * n  # targets, statistics, coefficients
    assert reads * row <= interpreter_bytes["load"] <= reads * row + few
    assert writes * row <= interpreter_bytes["store"] <= writes * row + few


def test_scoring_writes_no_logits(interpreter_bytes):
    from srit.kernels.scoring_triton import SLICES

    n, vocab = 70, 4000
    x, w = torch.randn(n, 32).bfloat16(), torch.randn(vocab, 32).bfloat16()
    with torch.no_grad():
        linear_logp(x, w, torch.zeros(n).long(), path="fused")
    assert interpreter_bytes["store"] == 2 * SLICES * n * 4 + n * 4
