"""FSDP2: every rank keeps a part of every weight, gradient and moment."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from srit.models import Decoder
from srit.runtime import distributed


def shard(model: Decoder, device: torch.device) -> None:
    """Shard the model over all ranks, in place.

    A block's weights are gathered for its forward and again for its backward. Embedding, final norm
    and head stay gathered in between, because the fused head reads its weight outside any forward.
    Gradients are summed in float32, not averaged (see optimizer.all_reduce_gradients).
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


@contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """Forward passes without gradients: evaluation mode, then training mode again.

    Without a backward FSDP would leave the head gathered, so it is resharded at the end.
    """
    model.eval()
    with torch.no_grad():
        yield
    model.train()
    if isinstance(model, FSDPModule):
        model.reshard()
