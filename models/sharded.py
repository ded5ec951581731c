"""Parameters that FSDP spreads over the ranks, seen whole."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, detached. Of a sharded one every rank must ask, in the same order."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(parameter: Tensor, value: Tensor) -> None:
    """Copy a full tensor, which every rank has, into a parameter: into this rank's part of it."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh,
                                  parameter.placements, src_data_rank=None)
    parameter.copy_(value)
