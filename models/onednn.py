"""A block for decoding on a CPU, its weights reordered once for oneDNN's matrix products.

A matrix product first copies the weight into the order that its kernel reads. In training one copy
serves thousands of tokens; a decode step, with one token per row, would copy every weight each time.
Elementwise operations that follow a product are fused into it. A row's sums do not depend on the other
rows (tested).
"""

import torch
from torch import Tensor, nn

from srit.models.ops import glu, rotate


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and multiplies this dtype: no bfloat16 on CPUs with AVX2 alone."""
    return torch.backends.mkldnn.is_available() and (
        dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear:
    """A linear layer for inference, of weight (out, in) and bias (out,) or None, in their dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        rows = 64  # oneDNN chooses the layout for this many; others run about as fast
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        self.bias = bias

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """x (..., in) -> (..., out), through the activation "none" or "swish"."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], "")

    def binary(self, x: Tensor, operation: str, other: Tensor) -> Tensor:
        """As `__call__`, then "add" or "mul" with `other` (..., out)."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, operation)


class PackedBlock:
    """The two halves of a block around its attention, for inference."""

    linear = PackedLinear

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        def pack(*layers: nn.Linear) -> PackedLinear:
            biased = layers[0].bias is not None
            bias = torch.cat([layer.bias.detach() for layer in layers]).to(dtype) if biased else None
            return self.linear(torch.cat([layer.weight for layer in layers]).to(dtype), bias)

        # Not the block itself, which refers to this object: a reference cycle would be freed late.
        self.attention, mlp = block.self_attn, block.mlp
        qkv = self.attention.q_proj, self.attention.k_proj, self.attention.v_proj
        self.qkv, self.heads = pack(*qkv), [x.out_features // self.attention.head_dim for x in qkv]
        self.o, self.down = pack(self.attention.o_proj), pack(mlp.down_proj)
        self.gate, self.up, self.gelu = pack(mlp.gate_proj), pack(mlp.up_proj), mlp.gelu
        self.input_norm, self.attention_norm = block.input_layernorm, block.post_attention_layernorm
        self.sandwich = block.sandwich
        if self.sandwich:
            self.pre_mlp_norm = block.pre_feedforward_layernorm
            self.post_mlp_norm = block.post_feedforward_layernorm

    def project_qkv(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As Block.project_qkv."""
        qkv = self.qkv(self.input_norm(x)).unflatten(-1, (-1, self.attention.head_dim))
        q, k, v = qkv.split(self.heads, 2)
        if hasattr(self.attention, "q_norm"):
            q, k = self.attention.q_norm(q), self.attention.k_norm(k)
            return rotate(q, *rope), rotate(k, *rope), v
        q, k = rotate(qkv[:, :, : -v.shape[2]], *rope).split(self.heads[:2], 2)
        return q, k, v

    def output_and_mlp(self, x: Tensor, attention: Tensor, checkpoint_mlp: bool) -> Tensor:
        """As Block.output_and_mlp."""
        if self.sandwich:
            x = x + self.attention_norm(self.o(attention))
            return x + self.post_mlp_norm(self.down(self._glu(self.pre_mlp_norm(x))))
        x = self.o.binary(attention, "add", x)
        return self.down.binary(self._glu(self.attention_norm(x)), "add", x)

    def _glu(self, x: Tensor) -> Tensor:
        if self.gelu:
            return glu(self.gate(x), self.up(x), True)
        return self.up.binary(x, "mul", self.gate(x, "swish"))
