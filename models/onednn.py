"""A block of a model that decodes on a CPU: its weights laid out once for oneDNN's products.

A matrix product first copies the weight into the order that its kernel reads. In training a copy
serves thousands of tokens; a decoding step, with one token a row, would copy every weight each time.
Elementwise operations that follow a product are done in it, while its results are in the registers.
A row's sums do not depend on the other rows (tested).
"""

import torch
from torch import Tensor, nn

from srit.models.ops import gated, rotate


class PackedLinear:
    """weight (out, in) and bias (out,) or None, as a layer for inference in the weight's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        rows = 64  # the layout is chosen for so many; other numbers run about as fast
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        self.bias = bias

    def __call__(self, x: Tensor, then: str = "none") -> Tensor:
        """x (..., in) -> (..., out), through the activation `then`: "none" or "swish"."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, then, [], "")

    def with_other(self, x: Tensor, then: str, other: Tensor) -> Tensor:
        """The product, then "add" or "mul" with `other` (..., out)."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, then)


class PackedBlock:
    """What a decoder's block computes before and after its attention, for inference."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        def joined(*layers: nn.Linear) -> PackedLinear:
            biased = layers[0].bias is not None
            bias = torch.cat([layer.bias.detach() for layer in layers]).to(dtype) if biased else None
            return PackedLinear(torch.cat([layer.weight for layer in layers]).to(dtype), bias)

        # Not the block itself, which holds this object: what holds each other is freed late.
        self.attention, mlp = block.self_attn, block.mlp
        self.qkv = joined(self.attention.q_proj, self.attention.k_proj, self.attention.v_proj)
        self.o, self.down = joined(self.attention.o_proj), joined(mlp.down_proj)
        self.gate, self.up, self.gelu = joined(mlp.gate_proj), joined(mlp.up_proj), mlp.gelu
        self.norm, self.after_attention = block.input_layernorm, block.post_attention_layernorm
        self.sandwich = block.sandwich
        if self.sandwich:
            self.before_mlp = block.pre_feedforward_layernorm
            self.after_mlp = block.post_feedforward_layernorm

    def before(self, x: Tensor, tables: tuple[Tensor, Tensor],
               keep: str) -> tuple[Tensor, Tensor, Tensor]:
        """As Block.before."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (-1, self.attention.head_dim))
        q, k, v = qkv.split(self.attention.heads, 2)
        if hasattr(self.attention, "q_norm"):
            q, k = self.attention.q_norm(q), self.attention.k_norm(k)
            return rotate(q, *tables), rotate(k, *tables), v
        q, k = rotate(qkv[:, :, : -v.shape[2]], *tables).split(self.attention.heads[:2], 2)
        return q, k, v

    def after(self, x: Tensor, attention: Tensor, keep: str) -> Tensor:
        """As Block.after."""
        if self.sandwich:
            x = x + self.after_attention(self.o(attention))
            return x + self.after_mlp(self.down(self._gated(self.before_mlp(x))))
        x = self.o.with_other(attention, "add", x)
        return self.down.with_other(self._gated(self.after_attention(x)), "add", x)

    def _gated(self, x: Tensor) -> Tensor:
        if self.gelu:
            return gated(self.gate(x), self.up(x), True)
        return self.up.with_other(x, "mul", self.gate(x, "swish"))
