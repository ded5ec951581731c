"""One process or many: started by torchrun these calls talk, started by python they do nothing."""

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from srit.models import Decoder
from srit.models.files import InputError

BUCKET = 2**26  # bytes of gradients in one collective
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


def in_step(own: Sequence[Item], filler: Item) -> list[tuple[Item, float]]:
    """This rank's items, each with weight 1, and fillers of weight 0 up to the longest rank's number.

    A forward pass of a sharded model is a collective: every rank must make as many.
    """
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = len(own)
    longest = int(all_reduce_sum(counts).max())
    return [(item, 1.0) for item in own] + [(filler, 0.0)] * (longest - len(own))


def all_reduce_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients over the ranks, once a step; those of a sharded model are summed already.

    Losses are divided by the *global* number of tokens or pairs before backward, so a sum is right
    and a mean would be wrong. A parameter that a rank did not touch counts as zero there: every
    rank enters every collective.
    """
    if not dist.is_initialized():
        return
    bucket: list[Tensor] = []
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(grad.nbytes for grad in bucket) >= BUCKET:
            _reduce(bucket)
            bucket = []
    if bucket:
        _reduce(bucket)


def _reduce(grads: list[Tensor]) -> None:
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def shard(model: Decoder, device: torch.device) -> None:
    """FSDP2, in place: every rank keeps its part of each parameter, gradient and moment.

    A block's weights are gathered for its forward and for its backward pass; embedding, final norm
    and head stay gathered in between, because the fused head reads its weight outside of any
    forward. Gradients are summed in float32, not averaged (see all_reduce_gradients).
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    narrow = None if model.compute_dtype == torch.float32 else model.compute_dtype
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "hidden")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def reduce_after_this_backward(model: Decoder, last: bool) -> None:
    """With gradient accumulation a sharded model sums over the ranks after the `last` backward only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def end_scoring(model: Decoder) -> None:
    """To be called after forward passes without a backward, which leave a sharded head gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()
