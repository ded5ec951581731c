"""One process or many: started by torchrun these calls talk, started by python they do nothing."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from srit.runtime.files import InputError

Item = TypeVar("Item")


def setup(device: str, timeout: float = 86400) -> torch.device:
    """The device of this rank; joins the process group when torchrun started us.

    A collective fails when a rank has died, or has not come after `timeout` seconds.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device {device!r}: must be auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU; use --device cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
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


def barrier(group: dist.ProcessGroup | None = None) -> None:
    if dist.is_initialized():
        dist.barrier(group)


def cpu_group() -> dist.ProcessGroup | None:
    """A group of all ranks with its own channels, for a thread beside the training."""
    return dist.new_group(backend="gloo") if dist.is_initialized() else None


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over all ranks, in place; the tensor itself in a single process."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def any_rank(flag: bool) -> bool:
    """Whether it is true on some rank; through the CPU, so that no GPU is waited for."""
    return bool(all_reduce_sum(torch.tensor(float(flag))))


def from_rank_0(value: int) -> int:
    """Rank 0's value, on every rank."""
    return int(all_reduce_sum(torch.tensor(value if rank() == 0 else 0)))


def pad_to_longest_rank(own: Sequence[Item], filler: Item) -> list[tuple[Item, float]]:
    """This rank's items, each with weight 1, and fillers of weight 0 up to the longest rank's number.

    A forward pass of a sharded model is a collective: every rank must make as many.
    """
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = len(own)
    longest = int(all_reduce_sum(counts).max())
    return [(item, 1.0) for item in own] + [(filler, 0.0)] * (longest - len(own))
