"""log p(target) of a linear head without the (N, V) logits.

    z = X W^T (N, V)      logp_n = z[n, t_n] - logsumexp_v z[n, v]
    G = -g * (softmax(z) - onehot(t))                 g (N,): upstream gradient, any values
    dX = G W              dW = G^T X

The rows go through in chunks; a chunk's logits live in one buffer that is turned into G in place,
g included before G is rounded. How the backward comes by the logits again:

  stash      N V itemsize fits `stash_bytes`: the forward keeps them; 6 N D V FLOPs in all
  recompute  otherwise: another GEMM a chunk; 8 N D V FLOPs, memory of one chunk

A frozen head needs neither: dX is linear in g row by row, so the forward makes U = G W (N, D) with
g = -1 and the backward scales it; 4 N D V FLOPs.

Bytes moved per logit beyond the GEMMs' own, in bf16: one read for logp (2), one read and one write
for G (4); eager float32 cross-entropy moves about 38.
"""

import math
from collections.abc import Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from srit.kernels import row_pass
from srit.kernels.dispatch import use_triton

MIB = 1 << 20
CHUNK_BYTES = {"cpu": 256 * MIB, "cuda": 2048 * MIB}
STASH_BYTES = {"cpu": 512 * MIB, "cuda": 4096 * MIB}
ROW_ALIGNMENT = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_bytes: int | None = None,
    stash_bytes: int | None = None,
) -> Tensor:
    """log softmax(hidden @ weight^T)[target] for every row, (N,) float32.

    Args:
        hidden: (N, D) float32, bfloat16 or float16; the dtype of the GEMMs. float64 is accepted for
            testing and then returned.
        weight: (V, D), any of these dtypes; float32 master weights may go with bfloat16 hidden.
        targets: (N,) int64 in [0, V). Checked on the CPU; on a GPU, where a check would wait for
            the device, the Triton kernel gives NaN and the twin a device-side assertion.
        chunk_bytes: size of one chunk's logits (default 256 MiB on CPU, 2 GiB on GPU).
        stash_bytes: size up to which (N, V) logits are kept for the backward rather than made
            again (default 512 MiB on CPU, 4 GiB on GPU; 0 never keeps them).

    Differentiable once in hidden and in weight; an input that needs no gradient costs no work.
    Logsumexp and result are float32, the gradient of the weight is summed over chunks in float32.
    The value does not depend on which gradients are asked for, nor on `stash_bytes`.
    """
    _check(hidden, weight, targets)
    targets = targets.contiguous()
    device = hidden.device.type
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"])
    if stash_bytes is None:
        stash_bytes = STASH_BYTES.get(device, STASH_BYTES["cuda"])
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearLogp.apply(hidden, weight, targets, chunk_bytes, stash_bytes)
    x, w = _operands(hidden, weight)
    rows = _chunk_rows(len(x), len(w), x.element_size(), chunk_bytes)
    buffer, stats, ops = _logits_buffer(rows, w), _new_stats(x), _row_ops(x.device)
    for part in _chunks(len(x), rows):
        z = torch.mm(x[part], w.t(), out=buffer[: part.stop - part.start])
        ops.logp(z, targets[part], stats[:, part])
    return stats[0]


def linear_logp_ref(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition, through autograd and with full logits: for tests and benchmarks."""
    logits = F.linear(hidden, weight.to(hidden.dtype))
    logp = F.log_softmax(logits, dim=-1, dtype=_wide(hidden.dtype))
    return logp.gather(1, targets[:, None])[:, 0]


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_bytes, stash_bytes):
        x, w = _operands(hidden, weight)
        rows = _chunk_rows(len(x), len(w), x.element_size(), chunk_bytes)
        frozen = not ctx.needs_input_grad[1]
        keep = not frozen and len(x) * len(w) * x.element_size() <= stash_bytes
        buffer = _logits_buffer(len(x) if keep else rows, w)
        stats, ops = _new_stats(x), _row_ops(x.device)
        u = torch.empty_like(x) if frozen else None
        for part in _chunks(len(x), rows):
            z = buffer[part] if keep else buffer[: part.stop - part.start]
            torch.mm(x[part], w.t(), out=z)
            ops.logp(z, targets[part], stats[:, part])
            if frozen:
                ops.grad(z, targets[part], stats[:, part], None)
                torch.mm(z, w, out=u[part])
        logp = stats[0].clone()
        if frozen:
            ctx.save_for_backward(u)
            return logp
        ctx.save_for_backward(x, w, targets, stats)
        ctx.rows, ctx.weight_dtype = rows, weight.dtype
        ctx.stash = buffer if keep else None
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        need_x, need_w = ctx.needs_input_grad[:2]
        scale = -grad
        if not need_w:
            (u,) = ctx.saved_tensors
            return (scale[:, None] * u).to(u.dtype), None, None, None, None
        x, w, targets, stats = ctx.saved_tensors
        # The stash becomes G in place: a second backward of a retained graph recomputes.
        stash, ctx.stash = ctx.stash, None
        rows = ctx.rows if stash is None else max(1, len(x))
        buffer = _logits_buffer(rows, w) if stash is None else stash
        ops = _row_ops(x.device)
        dx = torch.empty_like(x) if need_x else None
        dw = None
        for part in _chunks(len(x), rows):
            g = buffer[: part.stop - part.start]
            if stash is None:
                torch.mm(x[part], w.t(), out=g)
            ops.grad(g, targets[part], stats[:, part], scale[part])
            if need_x:
                torch.mm(g, w, out=dx[part])
            dw = _add_weight_grad(dw, g, x[part], ctx.weight_dtype, last=part.stop == len(x))
        if dw is None:
            dw = torch.zeros_like(w)
        return dx, dw.to(ctx.weight_dtype), None, None, None


def _row_ops(device: torch.device) -> ModuleType:
    if use_triton(device):
        from srit.kernels import row_pass_triton

        return row_pass_triton
    return row_pass


def _operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.contiguous(), weight.to(hidden.dtype).contiguous()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunk_rows(n: int, vocab: int, itemsize: int, chunk_bytes: int) -> int:
    """Rows a chunk: as many as the budget holds, then equalised so that no chunk is a rest."""
    most = max(1, chunk_bytes // (vocab * itemsize))
    return math.ceil(n / math.ceil(n / most)) if n else 1


def _chunks(n: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def _logits_buffer(rows: int, weight: Tensor) -> Tensor:
    """(rows, V) uninitialised; rows start on a 64-byte boundary whatever V is.

    GEMM libraries need that for their fast kernels, and pick another one, with another rounding,
    where it is missing; here it makes the values independent of where a chunk's buffer begins.
    """
    vocab, align = len(weight), ROW_ALIGNMENT // weight.element_size()
    return weight.new_empty(rows, math.ceil(vocab / align) * align)[:, :vocab]


def _new_stats(x: Tensor) -> Tensor:
    """(3, N): what `logp` of the row pass writes and `grad` reads."""
    return x.new_empty(3, len(x), dtype=_wide(x.dtype))


def _add_weight_grad(
    total: Tensor | None, g: Tensor, x: Tensor, dtype: torch.dtype, last: bool
) -> Tensor:
    """total + G^T X, (V, D), float32 while more chunks follow.

    The GEMM writes float32 itself on a GPU; on the CPU a chunk's part is in the dtype of G.
    """
    wide = _wide(x.dtype)
    only = total is None and last
    if g.is_cuda and g.dtype != wide and not (only and dtype == g.dtype):
        part = torch.mm(g.t(), x, out_dtype=wide)
    else:
        part = torch.mm(g.t(), x)
    if only:
        return part
    return part.to(wide) if total is None else total.add_(part)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    sizes = [tuple(t.shape) for t in (hidden, weight, targets)]
    shapes = "hidden {}, weight {}, targets {}".format(*sizes)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"linear_logp needs hidden (N, D) and weight (V, D), got {shapes}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"linear_logp needs targets (N,) int64, got {shapes}, {targets.dtype}")
    if len(weight) == 0:
        raise ValueError(f"linear_logp needs a vocabulary of at least one token, got {shapes}")
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"linear_logp: {name} has dtype {tensor.dtype}, allowed are {DTYPES}")
    if targets.device.type == "cpu" and len(targets):
        low, high = (int(t) for t in targets.aminmax())
        if low < 0 or high >= len(weight):
            raise ValueError(
                f"linear_logp: targets range from {low} to {high}, allowed are 0 to"
                f" {len(weight) - 1}; drop the rows without a target first"
            )
