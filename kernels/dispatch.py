"""Chooses between PyTorch and Triton, for all operations.

`SRIT_KERNELS` is `auto` (default), `torch` or `triton`:

  auto    Triton for CUDA tensors, the PyTorch twin for everything else
  torch   the PyTorch twin everywhere
  triton  Triton everywhere; needs a CUDA tensor, or `TRITON_INTERPRET=1` for CPU tensors

Triton is not imported here: an operation imports its kernels at first use.
"""

import importlib.util
import os

import torch

CHOICES = ("auto", "torch", "triton")


def use_triton(device: torch.device) -> bool:
    """Whether operations on `device` run as Triton kernels.

    Raises ValueError for an unknown SRIT_KERNELS, and RuntimeError if Triton is chosen but cannot run:
    there is no silent fallback.
    """
    choice = os.environ.get("SRIT_KERNELS", "auto")
    if choice not in CHOICES:
        raise ValueError(f"SRIT_KERNELS={choice!r}: allowed values are {', '.join(CHOICES)}")
    if choice == "torch" or (choice == "auto" and device.type != "cuda"):
        return False
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            f"Triton kernels were chosen (SRIT_KERNELS={choice}, device {device}) but triton is not"
            " installed: pip install triton, or set SRIT_KERNELS=torch"
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"SRIT_KERNELS=triton needs a CUDA tensor, got device {device}: move the model to a"
            " GPU, set SRIT_KERNELS=auto, or set TRITON_INTERPRET=1 to interpret on the CPU"
        )
    return True
