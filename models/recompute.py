"""Activations that the backward pass recomputes instead of keeping.

Inputs of linear layers are most of what a block saves. Norms, gated products and joined attention
parts are cheap functions of tensors that are saved anyway.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

_active = False


@contextmanager
def recompute_in_backward() -> Iterator[None]:
    """Save no tensor marked `recomputable`; the backward recomputes it at each use.

    Only the innermost saved-tensor hooks apply, so inside a checkpoint this does nothing.
    """
    global _active
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        _active = True
        try:
            yield
        finally:
            _active = False


def recomputable(value: Tensor, function: Callable[..., Tensor], *args: object) -> Tensor:
    """Mark `value`, a new tensor, as function(*args), which must give the same bits again."""
    if _active:
        args = (arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        # On the storage: views share the mark, and it is freed with the memory it describes.
        value.untyped_storage().recompute = partial(function, *args)
    return value


def _pack(tensor: Tensor) -> Tensor | tuple[Callable[[], Tensor], torch.Size]:
    storage = tensor.untyped_storage()
    function = getattr(storage, "recompute", None)
    if function is None or tensor.nbytes != storage.nbytes() or not tensor.is_contiguous():
        # Detached: a node that holds its own output with its history would never be freed.
        return tensor.detach()
    return function, tensor.shape


def _unpack(saved: Tensor | tuple[Callable[[], Tensor], torch.Size]) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    function, shape = saved
    return function().view(shape)
