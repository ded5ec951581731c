"""One model on many ranks: gradients summed over copies, or (FSDP2) a part of everything on each."""

from collections.abc import Iterable

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
from srit.runtime import distributed

BUCKET = 2**26  # bytes of gradients in one collective


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
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
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


def reshard(model: Decoder) -> None:
    """To be called after forward passes without a backward, which leave a sharded head gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()
