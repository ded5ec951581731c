"""What `dtype: auto` means on a device."""

from typing import Literal

import torch


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it: GPUs from Ampere on, CPUs with AVX-512 BF16 or AMX.

    Elsewhere it is emulated: with AVX2 alone a product takes six times as long as in float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def auto_dtype(device: torch.device) -> Literal["float32", "bfloat16"]:
    return "bfloat16" if multiplies_bfloat16(device) else "float32"
