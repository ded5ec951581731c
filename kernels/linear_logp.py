"""log p(target) of a linear head without the (N, V) logits.

    z = X W^T (N, V)      logp_n = z[n, t_n] - logsumexp_v z[n, v]
    G = -g * (softmax(z) - onehot(t))                 g (N,): upstream gradient, any values
    dX = G W              dW = G^T X

Path A ("gemm"): the rows go through in chunks. The logits of a chunk live in one buffer, which the row
softmax reads and turns into G in place, with g applied before G is rounded. Path B ("fused",
`scoring_triton.py`): a GEMM that never writes its logits; forward only.

The backward of path A recomputes the logits chunk by chunk: 8 N D V FLOPs in all, and the memory of one
chunk. A frozen head needs no recomputation: dX is linear in g row by row, so the forward makes
U = (softmax - onehot) W, (N, D), and the backward scales its rows: 4 N D V FLOPs. For losses whose
slope is known in the forward, `fused_linear_loss.py` takes 6 N D V FLOPs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from srit.kernels.chunks import (
    WeightGrad,
    accum_dtype,
    check_operands,
    chunk_limit,
    chunk_logits,
    new_stats,
    operands,
    row_ops,
)
from srit.kernels.dispatch import use_triton
from srit.kernels.row_softmax import CORRECT, ENTROPY, LOGP

PATHS = ("auto", "gemm", "fused")
# GPU name -> largest D for which path B was measured faster than path A; benchmarks/bench_kernels.py
# prints the entry. GPUs that are not listed use path A.
FUSED_UP_TO: dict[str, int] = {"NVIDIA H200": 4096}


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
    return_stats: bool = False,
    path: str = "auto",
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """log softmax(hidden @ weight^T)[target] for every row, (N,) float32.

    Args:
        hidden: (N, D) float32, bfloat16 or float16; the GEMMs use its dtype. float64 is accepted for
            testing; the result is then float64.
        weight: (V, D), any of these dtypes; float32 master weights may go with bfloat16 hidden.
        targets: (N,) int64 in [0, V). Checked on the CPU only, because on a GPU the check would wait
            for the device: there the Triton kernel gives NaN and the twin a device-side assertion.
        return_stats: also return `TokenStats`, made in the same pass; path A only.
        path: "gemm", "fused" (CUDA, no gradient), or "auto": "gemm" if a gradient is needed, otherwise
            the path measured faster on this GPU. The two round differently: log-probs that are
            compared bit for bit, such as those of policy and reference, must name one path.
        chunk_bytes: size of the logits of one chunk (default 64 MiB on CPU, 2 GiB on GPU).

    Differentiable once, in hidden and in weight; an input that needs no gradient costs no work.
    Logsumexp and result are float32, and the gradient of the weight is summed over chunks in float32.
    On path A the value does not depend on which gradients are needed.
    Raises ValueError for wrong shapes, dtypes or targets, an unknown path, and a path that cannot run.
    """
    check_operands("linear_logp", hidden, weight, targets)
    trained = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if _fused(path, hidden, trained or return_stats):
        from srit.kernels.scoring_triton import score

        return score(*operands(hidden, weight), targets.contiguous())
    stats = new_stats(hidden, len(targets), extra=return_stats)
    limit = chunk_limit(hidden, len(weight), chunk_bytes)
    function = _LinearLogp.apply if trained else _score
    logps = function(hidden, weight, targets.contiguous(), stats, limit)
    if not return_stats:
        return logps
    return logps, TokenStats(stats[LOGP], stats[ENTROPY], stats[CORRECT])


def linear_logp_ref(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition, with full logits and autograd: for tests and benchmarks."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).to(accum_dtype(hidden.dtype))
    return F.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]


def _fused(path: str, hidden: Tensor, forbidden: bool) -> bool:
    """True for path B."""
    if path not in PATHS:
        raise ValueError(f"linear_logp: path={path!r}: allowed values are {', '.join(PATHS)}")
    if path == "fused":
        if forbidden:
            raise ValueError(
                "linear_logp: path='fused' returns log-probs without gradient or statistics: call it"
                " under torch.no_grad(), or use path='gemm'"
            )
        if not use_triton(hidden.device):
            raise ValueError(
                f"linear_logp: path='fused' is a Triton kernel, but {hidden.device} uses the PyTorch"
                " twins (see SRIT_KERNELS): use path='gemm'"
            )
        return True
    if path == "gemm" or forbidden or not hidden.is_cuda or not use_triton(hidden.device):
        return False
    return hidden.shape[1] <= FUSED_UP_TO.get(torch.cuda.get_device_name(hidden.device), 0)


def _score(hidden: Tensor, weight: Tensor, targets: Tensor, stats: Tensor, limit: int) -> Tensor:
    """Path A without gradient: fills stats and returns a copy of the log-probs."""
    x, w = operands(hidden, weight)
    for part, z in chunk_logits(x, w, limit):
        row_ops(x.device).logp(z, targets[part], stats[:, part])
    return stats[LOGP].clone()


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, stats, limit):
        x, w = operands(hidden, weight)
        ctx.frozen = not ctx.needs_input_grad[1]
        if not ctx.frozen:
            ctx.save_for_backward(x, w, targets, stats)
            ctx.limit, ctx.weight_dtype = limit, weight.dtype
            return _score(x, w, targets, stats, limit)
        u = torch.empty_like(x)
        for part, z in chunk_logits(x, w, limit):
            row_ops(x.device).logp_grad(z, targets[part], stats[:, part], None)
            torch.mm(z, w, out=u[part])
        ctx.save_for_backward(u)
        return stats[LOGP].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scale = -grad
        if ctx.frozen:
            (u,) = ctx.saved_tensors
            return (scale[:, None] * u).to(u.dtype), None, None, None, None
        x, w, targets, stats = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = WeightGrad(w, ctx.weight_dtype)
        for part, z in chunk_logits(x, w, ctx.limit):
            row_ops(x.device).grad(z, targets[part], stats[:, part], scale[part])
            if dx is not None:
                torch.mm(z, w, out=dx[part])
            dw.add(z, x[part], last=part.stop == len(x))
        return dx, dw.result(), None, None, None
