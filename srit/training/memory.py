"""Heap memory on a CPU: glibc keeps freed fragments, which later tensors do not fit (docs/step.md)."""

import ctypes
import sys

from torch import Tensor, nn

from srit.models import Decoder


def return_free_memory(*_: object) -> None:
    """Return freed heap to the OS. Does nothing where the C library has no malloc_trim."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def trim_heap_between_layers(model: Decoder) -> None:
    """Return freed heap after every block's forward, and before the embedding's gradient.

    The embedding's gradient is the last and largest tensor of the backward; the activations are
    freed by then, but in fragments.
    """
    model.model.embed_tokens.register_forward_hook(_trim_before_gradient)
    for block in model.model.layers:
        block.register_forward_hook(return_free_memory)


def _trim_before_gradient(module: nn.Module, inputs: tuple, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(return_free_memory)
