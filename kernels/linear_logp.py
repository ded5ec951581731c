"""log p(target) of a linear head without the (N, V) logits.

    z = X W^T (N, V)      logp_n = z[n, t_n] - logsumexp_v z[n, v]
    G = softmax(z) - onehot(t)
    dX = -g * (G W)       dW = -G^T (g * X)            g (N,): upstream gradient, any values

The rows go through in chunks; a chunk's logits live in one buffer that is turned into G in place.
Where the gradient of the head is needed there are two ways, with equal forward values:

  stash      N V itemsize fits `stash_bytes`: the forward keeps G, the backward is two GEMMs; 6 N D V
             FLOPs. The scale g touches (N, D) only, so it may be different for every row.
  recompute  otherwise: the backward makes each chunk's G again; 8 N D V FLOPs, memory of one chunk.

A frozen head needs neither: dX is linear in g row by row, so the forward keeps U = G W (N, D) and the
backward scales it; 4 N D V FLOPs.

Bytes moved per logit beyond the GEMMs' own: the row pass reads z once for logp, and once more with one
write for G (2, 4 or 6 bytes in bf16), against about 38 for eager float32 cross-entropy.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from srit.kernels.dispatch import use_triton

MIB = 1 << 20
CHUNK_BYTES = {"cpu": 256 * MIB, "cuda": 2048 * MIB}
STASH_BYTES = {"cpu": 512 * MIB, "cuda": 4096 * MIB}
# fp32 working set of the row pass: within the CPU's caches, a few launches a chunk on a GPU.
BLOCK_BYTES = {"cpu": 2 * MIB, "cuda": 128 * MIB}
ROW_ALIGNMENT = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

RowPass = Callable[[Tensor, Tensor, bool], Tensor]


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
        targets: (N,) int64 in [0, V). Checked on the CPU; on a GPU, where a check would wait for the
            device, a bad target yields NaN.
        chunk_bytes: size of one chunk's logits (default 256 MiB on CPU, 2 GiB on GPU).
        stash_bytes: size up to which (N, V) gradients are kept for the backward rather than made
            again (default 512 MiB on CPU, 4 GiB on GPU; 0 never keeps them).

    Differentiable once in hidden and in weight; work for an input that needs no gradient is not done.
    Logsumexp and result are float32, the gradient of the weight is summed over chunks in float32.
    The value does not depend on which gradients are asked for, nor on `stash_bytes`.
    """
    _check(hidden, weight, targets)
    device = hidden.device.type
    chunk_bytes = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) if chunk_bytes is None else chunk_bytes
    stash_bytes = STASH_BYTES.get(device, STASH_BYTES["cuda"]) if stash_bytes is None else stash_bytes
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearLogp.apply(hidden, weight, targets, chunk_bytes, stash_bytes)
    x, w = _operands(hidden, weight)
    rows = _chunk_rows(len(x), len(w), x.element_size(), chunk_bytes)
    buffer = _logits_buffer(rows, w)
    logp = x.new_empty(len(x), dtype=_wide(x.dtype))
    row_pass = _row_pass(x.device)
    for part in _chunks(len(x), rows):
        z = torch.mm(x[part], w.t(), out=buffer[: part.stop - part.start])
        logp[part] = row_pass(z, targets[part], False)
    return logp


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
        row_pass = _row_pass(x.device)
        need_w = ctx.needs_input_grad[1]
        stash = need_w and len(x) * len(w) * x.element_size() <= stash_bytes
        buffer = _logits_buffer(len(x) if stash else rows, w)
        u = None if need_w else torch.empty_like(x)
        logp = x.new_empty(len(x), dtype=_wide(x.dtype))
        for part in _chunks(len(x), rows):
            z = buffer[part] if stash else buffer[: part.stop - part.start]
            torch.mm(x[part], w.t(), out=z)
            logp[part] = row_pass(z, targets[part], stash or not need_w)
            if not need_w:
                torch.mm(z, w, out=u[part])
        ctx.rows, ctx.weight_dtype = rows, weight.dtype
        if need_w:
            ctx.save_for_backward(x, w, targets, buffer if stash else None)
        else:
            ctx.save_for_backward(u)
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        need_x, need_w = ctx.needs_input_grad[:2]
        scale = -grad[:, None]  # (N, 1); G has the opposite sign of d logp
        if not need_w:
            (u,) = ctx.saved_tensors
            return (scale * u).to(u.dtype), None, None, None, None
        x, w, targets, stash = ctx.saved_tensors
        dx = torch.empty_like(x) if need_x else None
        scaled_x = (scale * x).to(x.dtype)
        if stash is not None:
            dw = _weight_grad(stash, scaled_x, ctx.weight_dtype)
            if need_x:
                torch.mm(stash, w, out=dx).mul_(scale)
            return dx, dw.to(ctx.weight_dtype), None, None, None
        dw = torch.zeros_like(w, dtype=_wide(x.dtype))
        buffer, row_pass = _logits_buffer(ctx.rows, w), _row_pass(x.device)
        for part in _chunks(len(x), ctx.rows):
            g = torch.mm(x[part], w.t(), out=buffer[: part.stop - part.start])
            row_pass(g, targets[part], True)
            dw += _weight_grad(g, scaled_x[part], dw.dtype)
            if need_x:
                torch.mm(g, w, out=dx[part]).mul_(scale[part])
        return dx, dw.to(ctx.weight_dtype), None, None, None


def row_pass_torch(z: Tensor, targets: Tensor, write_grad: bool) -> Tensor:
    """log softmax(z)[target] of every row; with `write_grad` z becomes softmax(z) - onehot(target).

    z: (n, V), rows may be strided, otherwise left as it is. Works on a few rows at a time, in fp32:
    the rows stay in cache over its passes, and low-precision logits never exist whole in fp32.
    """
    n, vocab = z.shape
    wide = _wide(z.dtype)
    logp = z.new_empty(n, dtype=wide)
    block_bytes = BLOCK_BYTES.get(z.device.type, BLOCK_BYTES["cuda"])
    rows = max(1, min(n, block_bytes // (vocab * logp.element_size())))
    in_place = write_grad and z.dtype == wide and z.is_contiguous()
    scratch = None if in_place else z.new_empty(rows, vocab, dtype=wide)
    for part in _chunks(n, rows):
        p = z[part] if in_place else scratch[: part.stop - part.start].copy_(z[part])
        target = targets[part, None]
        top = p.amax(1)
        z_target = p.gather(1, target)[:, 0]
        torch.softmax(p, 1, out=p)
        # The largest probability is exp(0) / sum: both terms are <= 0, so is the log-probability.
        logp[part] = (z_target - top) + p.amax(1).log_()
        if write_grad:
            p.scatter_add_(1, target, p.new_full((), -1.0).expand_as(target))
            if not in_place:
                z[part] = p
    return logp


def _row_pass(device: torch.device) -> RowPass:
    if not use_triton(device):
        return row_pass_torch
    from srit.kernels.linear_logp_triton import row_pass_triton

    return row_pass_triton


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


def _weight_grad(g: Tensor, scaled_x: Tensor, dtype: torch.dtype) -> Tensor:
    """G^T (g * X), (V, D), in `dtype` where the GEMM can write it, else in the dtype of G."""
    if g.is_cuda and g.dtype != dtype == torch.float32:
        return torch.mm(g.t(), scaled_x, out_dtype=torch.float32)
    return torch.mm(g.t(), scaled_x)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
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
