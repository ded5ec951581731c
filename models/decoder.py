"""One decoder for Llama, Mistral, Qwen2, Qwen3, SmolLM2 and Gemma 3.

Parameters have their Hugging Face names, so a checkpoint loads without a translation table.
Parameters may be float32 while activations are bfloat16: a weight is cast where it is used, and its
gradient is accumulated in float32.

Legend: B batch, T tokens, D model, H heads, K key/value heads, hd head dimension, V vocabulary.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from srit.models.attention import AttentionMetadata, attend
from srit.models.cache import KVCache
from srit.models.config import ModelConfig, Rope
from srit.models.int8 import Int8Block, check_int8, smooth
from srit.models.onednn import PackedBlock, PackedLinear, can_pack
from srit.models.ops import glu, recompute_in_backward, rms_norm, rotate
from srit.models.paged_cache import PagedCache


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / rms(x) * w, or * (1 + w) in Gemma; statistics in float32, result in the dtype of x."""

    def __init__(self, size: int, eps: float, gemma: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if gemma else torch.ones(size))
        self.eps, self.gemma = eps, gemma

    def multiplier(self) -> Tensor:
        return 1 + self.weight.float() if self.gemma else self.weight

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.multiplier(), self.eps)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # there, normal_ would import torch's compiler: a second
            super().reset_parameters()


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.window, self.scale = config.windows[layer], config.attention_scale
        D, hd = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(D, H * hd, bias=config.qkv_bias)
        self.k_proj = Linear(D, K * hd, bias=config.qkv_bias)
        self.v_proj = Linear(D, K * hd, bias=config.qkv_bias)
        self.o_proj = Linear(H * hd, D, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(hd, config.rms_norm_eps, config.is_gemma)
            self.k_norm = RMSNorm(hd, config.rms_norm_eps, config.is_gemma)

    def project_qkv(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> rotated queries (B, T, H, hd) and keys, and values (B, T, K, hd)."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, hd)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, hd)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, *rope), rotate(k, *rope), v

    def forward(self, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Of `project_qkv` -> (B, T, H * hd), before the output projection."""
        return attend(q, k, v, metadata, self.layer, self.window, self.scale).flatten(2)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, F_, bias=config.mlp_bias)
        self.up_proj = Linear(D, F_, bias=config.mlp_bias)
        self.down_proj = Linear(F_, D, bias=config.mlp_bias)
        self.gelu = config.activation == "gelu_tanh"

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(glu(self.gate_proj(x), self.up_proj(x), self.gelu))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps, config.is_gemma)

        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.sandwich = config.is_gemma  # norms before and after both halves
        if self.sandwich:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], metadata: AttentionMetadata,
                checkpoint_mlp: bool = False) -> Tensor:
        q, k, v = self.project_qkv(x, rope)
        return self.output_and_mlp(x, self.self_attn(q, k, v, metadata), checkpoint_mlp)

    # Both sides of the attention work on each token alone: `compile_layers` compiles them, and
    # `pack_weights` replaces them.

    def project_qkv(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project_qkv(self.input_layernorm(x), rope)

    def output_and_mlp(self, x: Tensor, attention: Tensor, checkpoint_mlp: bool) -> Tensor:
        """x (B, T, D) and attention (B, T, H * hd) -> the block's output (B, T, D)."""
        attention = self.self_attn.o_proj(attention)
        if self.sandwich:
            attention = self.post_attention_layernorm(attention)
        x = x + attention
        return checkpoint(self.add_mlp, x, use_reentrant=False) if checkpoint_mlp else self.add_mlp(x)

    def add_mlp(self, x: Tensor) -> Tensor:
        if self.sandwich:
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Embeddings, blocks and final norm: what Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.is_gemma)


class Decoder(nn.Module):
    """A causal language model with activations of dtype `compute_dtype`.

    `gradient_checkpointing` is what the backward recomputes, in training mode:
      None     norms, gated products and joined attention parts (see models/ops.py)
      "mlp"    each MLP, and of the rest what None recomputes
      "block"  each block
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.gradient_checkpointing: Literal["block", "mlp"] | None = None
        self.packed_head: PackedLinear | None = None
        self.embedding_scale = config.hidden_size**0.5 if config.is_gemma else None
        self.model = Body(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> nn.Parameter:
        """(V, D), the embedding itself when tied."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def pack_weights(self, quantization: Literal["none", "int8"] = "none") -> None:
        """Lay out the weights for fast inference on a CPU; elsewhere this does nothing, nor in bfloat16
        on a CPU for which oneDNN has no such products.

        See models/onednn.py. The model can be neither trained nor saved afterwards: the layers drop
        their own weights, so that memory holds one copy. Only the head is kept twice, since it is also
        the embedding or scores options.
        int8: the blocks' products as in models/int8.py. Raises InputError for a device that cannot.
        """
        device, int8 = self.head_weight.device, quantization == "int8"
        if int8:
            check_int8(device, self.compute_dtype)
        if device.type != "cpu" or not can_pack(self.compute_dtype):
            return
        self.requires_grad_(False)
        if int8:
            smooth(self)
        self.packed_head = PackedLinear(self.head_weight.to(self.compute_dtype))
        for block in self.model.layers:
            packed = (Int8Block if int8 else PackedBlock)(block, self.compute_dtype)
            block.project_qkv, block.output_and_mlp = packed.project_qkv, packed.output_and_mlp
            for module in block.modules():
                if isinstance(module, Linear):
                    module.weight = module.bias = None

    def compile_layers(self, backend: str = "inductor") -> None:
        """torch.compile each block before and after its attention: two programs for all blocks.

        The attention stays eager: each batch has other segment lengths, which would be other programs.
        So does the head, whose kernels are our own. Results differ in rounding.
        """

        def compiled(function: Callable) -> Callable:
            return torch.compile(function, dynamic=True, fullgraph=True, backend=backend)

        for block in self.model.layers:
            block.project_qkv = compiled(block.project_qkv)
            block.output_and_mlp = compiled(block.output_and_mlp)

    def forward(self, input_ids: Tensor,
                **layout: Tensor | KVCache | PagedCache | None) -> Tensor:
        """(B, T) -> logits (B, T, V) in float32. Keywords as in `hidden`."""
        return self.logits(self.hidden(input_ids, **layout))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits (..., V) in float32."""
        if self.packed_head is not None:
            return self.packed_head(hidden).float()
        return F.linear(hidden, self.head_weight.to(hidden.dtype)).float()

    def hidden(self, input_ids: Tensor, positions: Tensor | None = None,
               cu_seqlens: Tensor | None = None, attention_mask: Tensor | None = None,
               cache: KVCache | PagedCache | None = None, parents: Tensor | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, D) after the final norm, in the compute dtype.

        Three layouts:
          batch    nothing else, or attention_mask (B, T) with 1 for real tokens, padded on either side
          packed   B = 1 and cu_seqlens (S + 1,): S segments one after the other, each attending to
                   itself. parents (S,) names for each the earlier segment that it continues and also
                   attends to, or -1 (chosen and rejected share one prompt); it needs positions.
          cached   cache: the next T tokens of its first B slots, or rows (T = 1) of a paged cache.
                   The call advances their lengths.
        positions (B, T) default to counting real tokens, from a slot's length when cached.
        """
        metadata = AttentionMetadata(input_ids, positions, cu_seqlens, attention_mask, cache, parents)
        rope = {kind: rope_tables(kind, self.config.head_dim, metadata.positions)
                for kind in {self.config.rope, self.config.local_rope}}
        x = self.model.embed_tokens(input_ids).to(self.compute_dtype)
        if self.embedding_scale is not None:  # rounded to the dtype first, as in the reference
            x = x * torch.tensor(self.embedding_scale, dtype=x.dtype, device=x.device)

        recorded = torch.is_grad_enabled()
        policy = self.gradient_checkpointing if self.training and recorded else None
        recompute = recorded and policy != "block"
        with recompute_in_backward() if recompute else nullcontext():
            for block, window in zip(self.model.layers, self.config.windows, strict=True):
                tables = rope[self.config.rope if window is None else self.config.local_rope]
                if policy == "block":
                    x = checkpoint(block, x, tables, metadata, use_reentrant=False)
                else:
                    x = block(x, tables, metadata, checkpoint_mlp=policy == "mlp")
        if cache is not None:
            cache.advance(*input_ids.shape)
        return self.model.norm(x)


def rope_tables(rope: Rope, head_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, (B, T, 1, hd / 2) float32."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.rope_type == "linear":
        frequencies = frequencies / rope.factor
    elif rope.rope_type == "llama3":
        # Low frequencies are stretched, high ones kept, those between blended; as in Llama 3.1.
        original = rope.original_max_position_embeddings
        turns = original * frequencies / (2 * math.pi)  # within the original context
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = blend.clamp(0, 1)
        frequencies = (1 - blend) * frequencies / rope.factor + blend * frequencies
    angles = positions[:, :, None, None].float() * frequencies
    return angles.cos(), angles.sin()
