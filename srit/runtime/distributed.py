"""Process group and collectives. Without torchrun there is one rank and every call is a no-op."""

import hashlib
import os
import platform
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from srit.runtime.files import InputError

Item = TypeVar("Item")
_timeout: timedelta | None = None  # of every collective, as --ddp_timeout says


def setup(device: str, timeout: float = 86400) -> torch.device:
    """This rank's device. Joins the process group if torchrun started this process.

    A collective fails when another rank dies or does not join within `timeout` seconds.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device {device!r}: must be auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU; use --device cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if "RANK" in os.environ and not dist.is_initialized():
        global _timeout
        _timeout = timedelta(seconds=timeout)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_timeout)
    if device == "cuda":
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether it has instructions for that: GPUs from Ampere on, x86 CPUs with AVX-512 BF16 or AMX.

    Elsewhere it is emulated: with AVX2 alone a product takes six times as long as in float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def leave_process_group() -> None:
    """Wait for all ranks, then destroy the process group.

    gloo's thread releases the tensor of the last collective shortly after the caller has the result,
    and a process that exits in between is aborted. The barrier holds no Python tensor, so it closes
    that window; it also waits until rank 0 has written its files.
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
    """A second group of all ranks, for a thread that communicates while training does."""
    return dist.new_group(backend="gloo", timeout=_timeout) if dist.is_initialized() else None


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum `value` over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank. Uses a CPU tensor, so that no GPU is synchronized."""
    return bool(all_reduce_sum(torch.tensor(float(flag))))


def from_rank_0(value: int) -> int:
    """Rank 0's value, on every rank."""
    return int(all_reduce_sum(torch.tensor(int(value) if rank() == 0 else 0)))


def require_same(text: str, what: str) -> None:
    """Raise InputError on every rank unless `text` is the same on all."""
    if not dist.is_initialized():
        return
    own = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
    everyone = torch.zeros(world_size(), dtype=torch.int64)
    everyone[rank()] = own
    different = (all_reduce_sum(everyone) != everyone[rank()]).nonzero()[:, 0].tolist()
    if different:
        raise InputError(f"rank {rank()} has other {what} than ranks {different}; all ranks must see "
                         "the same files and get the same flags")


def pad_to_longest_rank(own: Sequence[Item], filler: Item) -> list[tuple[Item, float]]:
    """This rank's items (weight 1), padded with fillers (weight 0) so all ranks run equally many.

    Every forward of a sharded model is a collective.
    """
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = len(own)
    longest = int(all_reduce_sum(counts).max())
    return [(item, 1.0) for item in own] + [(filler, 0.0)] * (longest - len(own))
