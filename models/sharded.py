"""Whole values in and out of parameters that FSDP may have sharded over the ranks.

A DTensor is told by its attributes: to import the class takes half a second, for every command.
"""

import torch
from torch import Tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, detached; a collective when sharded, which every rank must enter in order."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def copy_full_tensor(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, the same on every rank, into a parameter or this rank's shard of it."""
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh,
                                  parameter.placements, src_data_rank=None)
    parameter.copy_(value)
