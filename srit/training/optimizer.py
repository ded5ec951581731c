"""AdamW over float32 master weights, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from srit.config import TrainConfig
from srit.models.sharded import full_tensor

BUCKET = 2**26  # bytes of gradients in one collective
Item = TypeVar("Item")


def learning_rate(step: int, total_steps: int, cfg: TrainConfig) -> float:
    """The rate of optimizer step `step`, counted from 0: nothing to save, nothing to restore."""
    warmup = warmup_steps(total_steps, cfg.warmup_ratio, cfg.warmup_steps)
    return cfg.learning_rate * lr_factor(step, total_steps, warmup, cfg.lr_scheduler_type)


def lr_factor(step: int, total_steps: int, warmup_steps: int, scheduler: str) -> float:
    """Linear warm-up from 0 to 1, then constant, linear or cosine decay to 0 at `total_steps`.

    These are the schedules of transformers' Trainer.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if scheduler == "constant":
        return 1.0
    if scheduler == "linear":
        return max(0.0, 1.0 - progress)
    if scheduler == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    raise ValueError(f"unknown scheduler {scheduler!r}")


def warmup_steps(total_steps: int, ratio: float, steps: int) -> int:
    """`steps` when given, else the share `ratio` of all steps, rounded up."""
    return steps if steps > 0 else math.ceil(total_steps * ratio)


def make_adamw(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW on the trainable parameters; matrices decay, norms and biases do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.adam_beta1, cfg.adam_beta2),
                             eps=cfg.adam_epsilon, fused=True)


def sync_on_last(model: nn.Module, micro_batches: Iterable[Item]) -> Iterator[Item]:
    """The micro-batches of a step; a sharded model reduces gradients in the last backward only."""
    remaining = iter(micro_batches)
    current = next(remaining, None)
    while current is not None:
        following = next(remaining, None)
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(following is None)
        yield current
        current = following


def optimizer_step(model: nn.Module, optimizer: torch.optim.AdamW, learning_rate: float,
                   max_grad_norm: float, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce gradients over ranks, clip, update, clear: (norm before clipping, whether all is finite).

    A step whose loss or norm is not finite changes no weight. The fused optimizer reads that on the
    device, so the host does not wait.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    all_reduce_gradients(trained)
    if all(p.grad is None for p in trained):
        raise RuntimeError("no trained parameter received a gradient")
    norm = gradient_norm(trained)
    finite = torch.isfinite(loss + norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    # Clips: the fused kernel divides every gradient by grad_scale, which saves a pass over them.
    optimizer.grad_scale = (norm / max_grad_norm).clamp(min=1) if max_grad_norm > 0 else None
    optimizer.found_inf = (~finite).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """The norm of all gradients together, on every rank that of the whole model."""
    return full_tensor(nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None))


def all_reduce_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients over the ranks, once a step; those of a sharded model are summed already.

    Losses are divided by the *global* number of tokens or pairs before backward, so the sum is right
    and a mean would be wrong. A parameter without a gradient on some rank counts as zero there:
    every rank joins every collective.
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
