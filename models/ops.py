"""RMSNorm, gated linear unit and rotary embedding, and how little memory their backward keeps.

Autograd would save every intermediate of these elementwise chains, in bfloat16 also the float32 copies.
`rms_norm` and `glu` save only their inputs. Their outputs are most of what a block saves, as inputs of
linear layers, and are cheap functions of tensors that are saved anyway: `recompute_in_backward` drops
them as well. `rotate` saves cos and sin. In a compiled layer these are plain operations, and the
compiler decides what is saved.

The forward runs the same operations in the same order with and without gradients, so that the first
DPO loss is exactly ln 2. F.rms_norm would not: it has two code paths.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_recomputing = False
_trimmed = 0.0  # when the heap was last, by time.monotonic


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; float32 inside, result in the dtype of x."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        # Skips the overhead of an autograd.Function, which a decode step would feel.
        return _normalise(x, weight, eps)[0]
    return recomputable(_RMSNorm.apply(x, weight, eps), rms_norm, x, weight, eps)


def glu(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """silu(gate) * up (SwiGLU), or gelu(gate) * up with the tanh approximation (GeGLU)."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _activate(gate, gelu).mul_(up)
    return recomputable(_GLU.apply(gate, up, gelu), glu, gate, up, gelu)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy asynchronously. From pageable memory a copy would wait for all work queued on the GPU."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, T, H, hd), halves paired as in Hugging Face; float32 inside.

    cos and sin (B, T, 1, hd / 2) float32; the result has the dtype of x.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _turn(x, cos, sin)
    return _Rotate.apply(x, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)),
                     -1).to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None  # by the opposite angle


def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * scale).mul_(weight.float()).to(x.dtype), scale


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
        normed, grad = x.float() * scale, grad.to(torch.float32, copy=True)
        product, dx, dweight = grad * normed, None, None
        if ctx.needs_input_grad[1]:
            dweight = product.flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            # normed has mean square 1, so the component of grad * weight along it is a mean.
            along = product.mul_(weight.float()).mean(-1, keepdim=True)
            dx = grad.mul_(weight.float()).sub_(normed.mul_(along)).mul_(scale).to(x.dtype)
        return dx, dweight, None


class _GLU(torch.autograd.Function):
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


@contextmanager
def recompute_in_backward() -> Iterator[None]:
    """Save no tensor marked `recomputable`; the backward recomputes it.

    Only the innermost saved-tensor hooks apply, so inside a checkpoint this does nothing.
    """
    global _recomputing
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        _recomputing = True
        try:
            yield
        finally:
            _recomputing = False


def recomputable(value: Tensor, function: Callable[..., Tensor], *args: object) -> Tensor:
    """Mark `value`, a new tensor, as function(*args), which must give the same bits again."""
    if _recomputing:
        args = (arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        # On the storage: views share the mark, and it is freed with the memory it describes.
        value.untyped_storage().recompute = _Recomputation(partial(function, *args))
    return value


class _Recomputation:
    """A tensor that several nodes saved: made at its first use in the backward, freed at its last."""

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self.function, self.uses_left, self.value = function, 0, None

    def use(self) -> Tensor:
        value = self.function() if self.value is None else self.value
        self.uses_left -= 1
        self.value = value if self.uses_left > 0 else None
        return value


def _pack(tensor: Tensor) -> Tensor | tuple[_Recomputation, torch.Size]:
    storage = tensor.untyped_storage()
    mark = getattr(storage, "recompute", None)
    if mark is None or tensor.nbytes != storage.nbytes() or not tensor.is_contiguous():
        # Detached: a node that holds its own output with its history would never be freed.
        return tensor.detach()
    mark.uses_left += 1
    return mark, tensor.shape


def _unpack(saved: Tensor | tuple[_Recomputation, torch.Size]) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    mark, shape = saved
    return mark.use().view(shape)


def trim_heap(*_: object) -> None:
    """Return freed heap to the OS: glibc keeps fragments that later tensors do not fit (docs/step.md).

    At most once a second: the short steps of a small model would spend a sixth of their time on pages
    that they need again. Does nothing where the C library has no malloc_trim.
    """
    global _trimmed
    if sys.platform == "linux" and time.monotonic() > _trimmed + 1:
        _trimmed = time.monotonic()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def trim_heap_in_backward(first_block: nn.Module) -> None:
    """Trim the heap in every backward of a second or more, before that of the first block.

    All other activations are freed by then, but in fragments, and the embedding's gradient is still to
    come. Trimming after every block saves little more memory, and costs 15 to 20 % of a step: the OS
    gives a trimmed page back by a fault, zeroed.
    """
    first_block.register_forward_hook(_trim_before_backward)


def _trim_before_backward(block: nn.Module, inputs: tuple, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(trim_heap)
