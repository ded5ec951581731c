"""One process or many: started by torchrun these calls talk, started by python they do nothing."""

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from srit.models.files import InputError


def setup(device: str) -> torch.device:
    """The device of this rank; joins the process group when torchrun started us."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device {device!r}: must be auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU; use --device cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def shutdown() -> None:
    """Leave the process group, all ranks together.

    A gloo thread lets go of the last tensor it reduced a moment after the caller has the result. A
    rank that ends in that moment is aborted; a barrier, which holds no tensor of Python's, waits
    for it, and for rank 0 to have written its files.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over all ranks, in place; the tensor itself in a single process."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def all_reduce_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients over the ranks, once a step.

    Losses are divided by the *global* number of tokens or pairs before backward, so a sum is right
    and a mean would be wrong. A parameter that a rank did not touch counts as zero there: every
    rank enters every collective.
    """
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
