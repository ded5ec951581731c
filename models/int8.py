"""A block for decoding on a CPU with weights and activations in int8.

    x W^T  ~  (x_q W_q^T) * x_scale * W_scale

A weight has a scale for each output channel, activations have one for each row. Both are symmetric: the
largest magnitude becomes 127, and zero stays zero. Sums of integers are exact in any order, so a row's
result cannot depend on the rows beside it. Scales and all between the products are float32.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from srit.models.onednn import PackedBlock, can_pack
from srit.models.ops import glu
from srit.runtime.files import InputError


class QuantizedRows(NamedTuple):
    """values (..., n) int8 and scales (..., 1) float32: values * scales is about what was quantized."""

    values: Tensor
    scales: Tensor


def quantize_rows(x: Tensor) -> QuantizedRows:
    """x (..., n), with one scale for each row; that of a row that is not finite is inf or NaN."""
    # Both extremes: vector_norm takes five times as long, and abs() one pass more.
    largest = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_()).float()
    largest.clamp_min_(1e-30)  # a row of zeros
    return QuantizedRows((x * (127 / largest)).round_().to(torch.int8), largest.div_(127))


def quantize_normed(norm: nn.Module, x: Tensor) -> QuantizedRows:
    """quantize_rows(norm(x)) for an RMSNorm; dividing a row by its rms changes its scale alone."""
    x = x.float()
    values, scales = quantize_rows(x * norm.multiplier())
    return QuantizedRows(values, scales.mul_(torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)))


class Int8Linear:
    """A linear layer for inference, of weight (out, in) and bias (out,) or None, in their dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        values, scales = quantize_rows(weight.detach())
        self.weight = torch.ops.onednn.qlinear_prepack(values, None)
        self.scales, self.zeros = scales[:, 0], torch.zeros(len(weight), dtype=torch.int64)
        self.bias, self.dtype = bias, weight.dtype

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor:
        """x (..., in) -> (..., out)."""
        return self.product(x).to(self.dtype)

    def binary(self, x: Tensor | QuantizedRows, operation: str, other: Tensor) -> Tensor:
        """As `__call__`, then "add" `other` (..., out)."""
        return self.product(x).add_(other).to(self.dtype)

    def product(self, x: Tensor | QuantizedRows) -> Tensor:
        """As `__call__`, in float32."""
        values, scales = quantize_rows(x) if isinstance(x, Tensor) else x
        # The operator takes one scale for all activations: 1, and each row's own behind it.
        y = torch.ops.onednn.qlinear_pointwise(
            values, 1.0, 0, self.weight, self.scales, self.zeros, None, 1.0, 0, torch.float32,
            "none", [], "").mul_(scales)
        return y if self.bias is None else y.add_(self.bias)


class Int8Block(PackedBlock):
    """A PackedBlock of Int8Linear; what a norm or the gate gives goes into int8 without a detour."""

    linear = Int8Linear

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(block, dtype)
        for name in ("input_norm", "pre_mlp_norm" if self.sandwich else "attention_norm"):
            setattr(self, name, partial(quantize_normed, getattr(self, name)))

    def _glu(self, x: QuantizedRows) -> QuantizedRows:
        return quantize_rows(glu(self.gate.product(x), self.up.product(x), self.gelu))


@torch.no_grad()
def smooth(model: nn.Module) -> None:
    """Even out the channels behind the norms of a Decoder, as SmoothQuant does (arXiv 2211.10438).

    A channel that is far larger than the others takes the scale of its row, and leaves them few of its
    values. So the norm divides it by a factor, and the weights behind multiply by it: powers of two,
    which round nothing. Magnitudes are those of random tokens: a function of the model alone.
    """
    behind: dict[nn.Module, list[nn.Linear]] = {}
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        behind[block.input_layernorm] = [attention.q_proj, attention.k_proj, attention.v_proj]
        norm = block.pre_feedforward_layernorm if block.sandwich else block.post_attention_layernorm
        behind[norm] = [mlp.gate_proj, mlp.up_proj]
    largest: dict[nn.Module, Tensor] = {}

    def record(norm: nn.Module, inputs: tuple, output: Tensor) -> None:
        largest[norm] = output.float().abs().amax((0, 1)).clamp_min(1e-5)

    hooks = [norm.register_forward_hook(record) for norm in behind]
    length = min(128, model.config.max_position_embeddings)
    model.hidden(torch.randint(model.config.vocab_size, (1, length),
                               generator=torch.Generator().manual_seed(0)))
    for hook in hooks:
        hook.remove()
    for norm, layers in behind.items():
        weights = torch.cat([layer.weight for layer in layers]).float().abs().amax(0).clamp_min(1e-5)
        factors = (largest[norm] / weights).sqrt().log2().round().exp2()
        for layer in layers:
            layer.weight.mul_(factors)
        norm.weight = nn.Parameter(norm.multiplier() / factors - int(norm.gemma), requires_grad=False)


def exact_products() -> bool:
    """Whether int8 products are exact on this CPU; with AVX2 alone their sums saturate at 16 bits."""
    if not torch.backends.mkldnn.is_available():
        return False
    most = torch.full((64, 64), 127.0)
    return bool((Int8Linear(most)(most) == 64 * 127**2).all())


def check_int8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError for a GPU, a CPU whose int8 products are not exact, and one without those of
    the head, in `dtype`."""
    if device.type != "cpu":
        raise InputError(f"--quantization int8 on {device.type}: it is for CPUs; leave it out")
    if not exact_products():
        raise InputError("--quantization int8: this CPU has no exact int8 products (AVX-512, "
                         "AVX-VNNI or AMX); leave it out")
    if not can_pack(dtype):
        raise InputError("--quantization int8 --dtype bfloat16: this CPU does not multiply bfloat16, "
                         "as the head does; use --dtype float32")
