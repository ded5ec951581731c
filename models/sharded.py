"""Whole values in and out of parameters that FSDP may have sharded over the ranks."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, detached; a collective when sharded, which every rank must enter in order."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_full_tensor(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, the same on every rank, into a parameter or this rank's shard of it."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh,
                                  parameter.placements, src_data_rank=None)
    parameter.copy_(value)
