"""log p(target) of a linear head without the (N, V) logits.

    z = X W^T (N, V)      logp_n = z[n, t_n] - logsumexp_v z[n, v]
    G = -g * (softmax(z) - onehot(t))                 g (N,): upstream gradient, any values
    dX = G W              dW = G^T X

Two ways to the value. Path A ("gemm"): the rows go through in chunks; a chunk's logits live in one
buffer, which the row softmax reads and turns into G in place, g included before G is rounded. Path B
("fused", `scoring_triton.py`): a GEMM that never writes its logits; forward only.

How path A's backward comes by the logits again:

  stash      N V itemsize fits `stash_bytes`: the forward keeps them; 6 N D V FLOPs in all
  recompute  otherwise: another GEMM a chunk; 8 N D V FLOPs, memory of one chunk

A frozen head needs neither: dX is linear in g row by row, so the forward makes U = G W (N, D) with
g = -1 and the backward scales it; 4 N D V FLOPs. A loss whose slope is known when a chunk's
log-probs are needs neither too: `fused_linear_loss.py`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from srit.kernels.chunks import (
    MIB,
    WeightGrad,
    check_logits,
    check_operands,
    chunk_limit,
    logits_buffer,
    new_stats,
    operands,
    row_chunks,
    row_ops,
    wide,
)
from srit.kernels.dispatch import use_triton
from srit.kernels.row_softmax import CORRECT, ENTROPY, LOGP, Logits

STASH_BYTES = {"cpu": 512 * MIB, "cuda": 2048 * MIB}
PATHS = ("auto", "gemm", "fused")
# GPU name -> largest D at which path B was measured faster than A: benchmarks/bench_kernels.py
# prints the line. A GPU that is not here scores through path A.
FUSED_UP_TO: dict[str, int] = {}


class TokenStats(NamedTuple):
    """Per row, (N,) float32, not differentiable."""

    logps: Tensor  # log p(target)
    entropy: Tensor  # -sum_v p_v log p_v, nats
    correct: Tensor  # 1.0 where no logit exceeds the target's, else 0.0


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = None,
    return_stats: bool = False,
    path: str = "auto",
    chunk_bytes: int | None = None,
    stash_bytes: int | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """log softmax(hidden @ weight^T)[target] for every row, (N,) float32.

    Args:
        hidden: (N, D) float32, bfloat16 or float16; the dtype of the GEMMs. float64 is accepted for
            testing and then returned.
        weight: (V, D), any of these dtypes; float32 master weights may go with bfloat16 hidden.
        targets: (N,) int64 in [0, V). Checked on the CPU; on a GPU, where a check would wait for
            the device, the Triton kernel gives NaN and the twin a device-side assertion.
        softcap: logits are softcap * tanh(logits / softcap) (Gemma 2).
        logit_scale: logits are multiplied by it, before the cap (Cohere; 1 / temperature).
        ignore_index: rows with this target take no part: log-probability 0, no gradient, no work.
            Finding them waits for the device; rows dropped beforehand do not.
        return_stats: also return `TokenStats`, made in the same pass; path A only.
        path: "gemm", "fused" (CUDA, no gradient), or "auto": "gemm" where a gradient is asked for,
            else the one measured faster on this GPU. The two round differently: log-probs that are
            to be compared bit for bit, as policy and reference, must name one.
        chunk_bytes: size of one chunk's logits (default 64 MiB on CPU, 2 GiB on GPU).
        stash_bytes: size up to which (N, V) logits are kept for the backward rather than made
            again (default 512 MiB on CPU, 2 GiB on GPU; 0 never keeps them).

    Differentiable once in hidden and in weight; an input that needs no gradient costs no work.
    Logsumexp and result are float32, the gradient of the weight is summed over chunks in float32.
    On path A the value depends neither on which gradients are asked for, nor on `stash_bytes`.
    Raises ValueError for shapes, dtypes, targets or options that do not go together.
    """
    n, kept = len(targets), None
    if ignore_index is not None:
        kept = (targets != ignore_index).nonzero()[:, 0]
        hidden, targets = hidden[kept], targets[kept]
    check_operands("linear_logp", hidden, weight, targets)
    logits = check_logits("linear_logp", softcap, logit_scale)
    trained = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    stats = new_stats(hidden, len(targets), extra=return_stats)
    if _fused(path, hidden, trained or return_stats):
        from srit.kernels.scoring_triton import score

        logps = score(*operands(hidden, weight), targets.contiguous(), logits)
    else:
        limit = chunk_limit(hidden, len(weight), chunk_bytes)
        if stash_bytes is None:
            stash_bytes = STASH_BYTES.get(hidden.device.type, STASH_BYTES["cuda"])
        arguments = targets.contiguous(), stats, limit, stash_bytes, logits
        if trained:
            logps = _LinearLogp.apply(hidden, weight, *arguments)
        else:
            logps = _score(hidden, weight, *arguments[:3], logits)

    def spread(values: Tensor) -> Tensor:
        return values if kept is None else values.new_zeros(n).index_put((kept,), values)

    if not return_stats:
        return spread(logps)
    rows = spread(stats[LOGP]), spread(stats[ENTROPY]), spread(stats[CORRECT])
    return spread(logps), TokenStats(*rows)


def linear_logp_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """The definition, through autograd and with full logits: for tests and benchmarks."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).to(wide(hidden.dtype)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]


def _fused(path: str, hidden: Tensor, forbidden: bool) -> bool:
    """True for path B."""
    if path not in PATHS:
        raise ValueError(f"linear_logp: path={path!r}: allowed values are {', '.join(PATHS)}")
    if path == "fused":
        if forbidden:
            raise ValueError(
                "linear_logp: path='fused' gives log-probs alone, without gradient or statistics:"
                " call it under torch.no_grad(), or use path='gemm'"
            )
        if not use_triton(hidden.device):
            raise ValueError(
                f"linear_logp: path='fused' is a Triton kernel, and {hidden.device} runs the PyTorch"
                " twins (see SRIT_KERNELS): use path='gemm'"
            )
        return True
    if path == "gemm" or forbidden or not hidden.is_cuda or not use_triton(hidden.device):
        return False
    return hidden.shape[1] <= FUSED_UP_TO.get(torch.cuda.get_device_name(hidden.device), 0)


def _score(
    hidden: Tensor, weight: Tensor, targets: Tensor, stats: Tensor, limit: int, logits: Logits
) -> Tensor:
    x, w = operands(hidden, weight)
    parts, ops = row_chunks(len(x), limit), row_ops(x.device)
    buffer = logits_buffer(parts[0].stop if parts else 0, w)
    for part in parts:
        z = torch.mm(x[part], w.t(), out=buffer[: part.stop - part.start])
        ops.logp(z, targets[part], stats[:, part], logits)
    return stats[LOGP].clone()


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, stats, limit, stash_bytes, logits):
        x, w = operands(hidden, weight)
        parts, ops = row_chunks(len(x), limit), row_ops(x.device)
        rows = parts[0].stop if parts else 0
        frozen = not ctx.needs_input_grad[1]
        keep = not frozen and len(x) * len(w) * x.element_size() <= stash_bytes
        buffer = logits_buffer(len(x) if keep else rows, w)
        u = torch.empty_like(x) if frozen else None
        for part in parts:
            z = buffer[part] if keep else buffer[: part.stop - part.start]
            torch.mm(x[part], w.t(), out=z)
            if frozen:
                ops.logp_grad(z, targets[part], stats[:, part], None, logits)
                torch.mm(z, w, out=u[part])
            else:
                ops.logp(z, targets[part], stats[:, part], logits)
        ctx.frozen = frozen
        if frozen:
            ctx.save_for_backward(u)
        else:
            ctx.save_for_backward(x, w, targets, stats)
            ctx.parts, ctx.rows, ctx.logits, ctx.weight_dtype = parts, rows, logits, weight.dtype
            ctx.stash = buffer if keep else None
        return stats[LOGP].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rest = (None,) * 5
        scale = -grad
        if ctx.frozen:
            (u,) = ctx.saved_tensors
            return (scale[:, None] * u).to(u.dtype), None, *rest
        x, w, targets, stats = ctx.saved_tensors
        # The stash becomes G in place: a second backward of a retained graph recomputes.
        stash, ctx.stash = ctx.stash, None
        parts = ctx.parts if stash is None else [slice(0, len(x))]
        buffer = logits_buffer(ctx.rows, w) if stash is None else stash
        ops = row_ops(x.device)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = WeightGrad(w, ctx.weight_dtype)
        for part in parts:
            g = buffer[: part.stop - part.start]
            if stash is None:
                torch.mm(x[part], w.t(), out=g)
            ops.grad(g, targets[part], stats[:, part], scale[part], ctx.logits)
            if dx is not None:
                torch.mm(g, w, out=dx[part])
            dw.add(g, x[part], last=part.stop == len(x))
        return dx, dw.result(), *rest
