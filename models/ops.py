"""RMSNorm, gated activation and rotary embedding, keeping for the backward only what is there anyway.

Autograd would keep every intermediate of these elementwise chains, in bfloat16 also the float32 copies.
Here the backward makes them again from the inputs. In a compiled layer the compiler decides that: these
are plain operations there.

The forward is the same operations in the same order whether gradients are recorded or not, which a
first DPO loss of exactly ln 2 rests on; F.rms_norm takes two paths.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; float32 inside, result in the dtype of x."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        # The same without autograd's bookkeeping, which decoding feels.
        return _normalise(x, weight, eps)[0]
    return _RMSNorm.apply(x, weight, eps)


def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """silu(gate) * up (SwiGLU), or gelu(gate) * up with the tanh approximation (GeGLU)."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _activate(gate, gelu).mul_(up)
    return _Gated.apply(gate, up, gelu)


def remade(value: Tensor, make: Callable[[], Tensor], when: bool) -> AbstractContextManager:
    """Within, autograd keeps nothing where it would keep `value`; the backward calls `make` for it.

    For a cheap function of tensors that are kept anyway, in front of linear layers, whose inputs are
    the largest part of what a block keeps. `make` must give the same bits, and hold detached tensors,
    or the graph would hold itself. `when` False: nothing special (activation checkpointing has
    hooks of its own, which these would hide).
    """
    if torch.compiler.is_compiling() or not when:
        return nullcontext()
    address, size = value.data_ptr(), value.numel()

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        same = tensor.data_ptr() == address and tensor.numel() == size
        return tensor.shape if same else tensor

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return make().view(kept) if isinstance(kept, torch.Size) else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting: one from unpinned memory would wait for all that the GPU has queued."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, T, H, hd), halves paired as in Hugging Face; float32 inside."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)),
                     -1).to(x.dtype)


def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        normed, scale = _normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed, grad = x.float() * scale, grad.float()
        dx = dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            grad = grad * weight.float()
            # normed has mean square 1: the component of grad along it is a mean.
            dx = (grad - normed * (grad * normed).mean(-1, keepdim=True)).mul_(scale).to(x.dtype)
        return dx, dweight, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, gelu):
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return _activate(gate, gelu).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        if ctx.gelu:
            dgate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
        else:
            dgate = torch.ops.aten.silu_backward(grad * up, gate)
        return dgate, _activate(gate, ctx.gelu).mul_(grad), None


def _activate(gate: Tensor, gelu: bool) -> Tensor:
    return F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)
