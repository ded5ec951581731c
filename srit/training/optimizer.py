"""AdamW over fp32 master weights, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from srit.models.sharded import whole


def lr_factor(step: int, total_steps: int, warmup_steps: int, scheduler: str) -> float:
    """Share of the peak learning rate at optimizer step `step`, counted from 0.

    Linear warm-up from 0, then `constant`, `linear` or `cosine` decay to 0 at `total_steps`: the
    schedule of transformers' Trainer. Nothing to save, nothing to restore.
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


def make_adamw(model: nn.Module, learning_rate: float, weight_decay: float,
               betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """AdamW on the trainable parameters; matrices decay, norms and biases do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """The global gradient norm *before* clipping to `max_norm` (0: no clipping)."""
    trained = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(trained, max_norm if max_norm > 0 else math.inf)
    return whole(norm)
