"""One decoder for Llama, Mistral, Qwen2, Qwen3, SmolLM2 and Gemma 3.

Parameters carry their Hugging Face names, so a checkpoint loads without a translation table.
Parameters may be float32 while activations are bfloat16: a weight is cast where it is used, and its
gradient comes back, and is summed, in float32.

Legend: B batch, T tokens, N packed tokens, S keys, D model, H heads, K key/value heads, hd head
dimension, V vocabulary.
"""

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from srit.models.attention import Layout, attend
from srit.models.cache import KVCache
from srit.models.config import ModelConfig, Rope
from srit.models.onednn import PackedBlock, PackedLinear
from srit.models.ops import gated, remade, rms_norm, rotate
from srit.models.paged_cache import PagedCache

# What a block keeps for its backward: all that autograd asks for (or, without gradients, nothing); not
# what is cheap to make again from what is kept; nor anything of its MLP, which then runs twice.
Keep = Literal["all", "costly", "attention"]


class Linear(nn.Linear):
    """A linear layer in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / rms(x) * w, or * (1 + w) in Gemma; statistics in float32, result in the dtype of x."""

    def __init__(self, size: int, eps: float, gemma: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if gemma else torch.ones(size))
        self.eps, self.gemma = eps, gemma

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, 1 + self.weight.float() if self.gemma else self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.window, self.scale = config.windows[layer], config.attention_scale
        D, hd = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.heads = heads, kv_heads, kv_heads  # of queries, keys and values
        self.q_proj = Linear(D, heads * hd, bias=config.qkv_bias)
        self.k_proj = Linear(D, kv_heads * hd, bias=config.qkv_bias)
        self.v_proj = Linear(D, kv_heads * hd, bias=config.qkv_bias)
        self.o_proj = Linear(heads * hd, D, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(hd, config.rms_norm_eps, config.is_gemma)
            self.k_norm = RMSNorm(hd, config.rms_norm_eps, config.is_gemma)

    def project(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> rotated queries (B, T, H, hd) and keys, and values (B, T, K, hd)."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, hd)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, hd)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, *tables), rotate(k, *tables), v


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, F_, bias=config.mlp_bias)
        self.up_proj = Linear(D, F_, bias=config.mlp_bias)
        self.down_proj = Linear(F_, D, bias=config.mlp_bias)
        self.gelu = config.activation == "gelu_tanh"

    def forward(self, x: Tensor, keep: Keep) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = gated(gate, up, self.gelu)
        with remade(product, partial(gated, gate.detach(), up.detach(), self.gelu), keep != "all"):
            return self.down_proj(product)


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

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], layout: Layout, keep: Keep) -> Tensor:
        attention = self.self_attn
        q, k, v = self.before(x, tables, keep)
        parts = attend(q, k, v, layout, attention.layer, attention.window, attention.scale)
        if len(parts) == 1:
            return self.after(x, parts[0].flatten(2), keep)
        joined = torch.cat(parts, 1)
        # The backward of the attention keeps the parts: nobody needs to keep the whole.
        join = partial(torch.cat, [part.detach() for part in parts], 1)
        with remade(joined, join, keep != "all"):
            return self.after(x, joined.flatten(2), keep)

    def before(self, x: Tensor, tables: tuple[Tensor, Tensor],
               keep: Keep) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before the attention, a function of each token alone."""
        normed = self.input_layernorm(x)
        with remade(normed, partial(self.input_layernorm, x.detach()), keep != "all"):
            return self.self_attn.project(normed, tables)

    def after(self, x: Tensor, attention: Tensor, keep: Keep) -> Tensor:
        """What comes after it, likewise: attention (B, T, H * hd) -> the block's output (B, T, D)."""
        attention = self.self_attn.o_proj(attention)
        if self.sandwich:
            attention = self.post_attention_layernorm(attention)
        x = x + attention
        if keep == "attention":
            return checkpoint(self.feed_forward, x, "all", use_reentrant=False)
        return self.feed_forward(x, keep)

    def feed_forward(self, x: Tensor, keep: Keep) -> Tensor:
        norm = self.pre_feedforward_layernorm if self.sandwich else self.post_attention_layernorm
        normed = norm(x)
        with remade(normed, partial(norm, x.detach()), keep != "all"):
            mlp = self.mlp(normed, keep)
        return x + (self.post_feedforward_layernorm(mlp) if self.sandwich else mlp)


class Body(nn.Module):
    """Embeddings, blocks and final norm: what Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.is_gemma)


class Decoder(nn.Module):
    """A causal language model.

    `compute_dtype` is the dtype of the activations. `gradient_checkpointing` recomputes each "block"
    or each "mlp" in the backward pass (training mode only).
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.gradient_checkpointing: Literal["block", "mlp"] | None = None
        self.packed_head: PackedLinear | None = None
        self.model = Body(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> nn.Parameter:
        """(V, D), the embedding itself when tied."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def pack_weights(self) -> None:
        """Lay out the weights on a CPU for inference, for good: no training, no saving after this.

        See models/packed.py. The layers' own weights go, so that memory holds one copy (of the head,
        which is also the embedding or scores options, it holds two). Elsewhere this does nothing.
        """
        if self.head_weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return
        self.requires_grad_(False)
        self.packed_head = PackedLinear(self.head_weight.to(self.compute_dtype))
        for block in self.model.layers:
            packed = PackedBlock(block, self.compute_dtype)
            block.before, block.after = packed.before, packed.after
            for module in block.modules():
                if isinstance(module, Linear):
                    module.weight = module.bias = None

    def compile_layers(self, backend: str = "inductor") -> None:
        """torch.compile what every block computes of each token alone, once for all blocks and lengths.

        The attention between stays as it is: segments of other lengths in every batch would be other
        programs. So does the head, whose kernels are our own. What comes out is not the same bits.
        """
        whole = partial(torch.compile, dynamic=True, fullgraph=True, backend=backend)
        for block in self.model.layers:
            block.before, block.after = whole(block.before), whole(block.after)

    def forward(self, input_ids: Tensor, **layout: Tensor | KVCache | None) -> Tensor:
        """(B, T) -> logits (B, T, V) in float32. Keywords as in `hidden`."""
        return self.logits(self.hidden(input_ids, **layout))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits (..., V) in float32."""
        if self.packed_head is not None:
            return self.packed_head(hidden).float()
        return F.linear(hidden, self.head_weight.to(hidden.dtype)).float()

    def hidden(self, input_ids: Tensor, positions: Tensor | None = None,
               cu_seqlens: Tensor | None = None, attention_mask: Tensor | None = None,
               cache: KVCache | PagedCache | None = None, rows: Tensor | slice | None = None,
               parents: Tensor | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, D) after the final norm, in the compute dtype.

        Three layouts:
          batch    nothing else, or attention_mask (B, T) with 1 for real tokens (either side padded)
          packed   cu_seqlens (S + 1,), B = 1: segments one after the other, attending to themselves;
                   parents (S,) names for each the earlier segment that it continues and attends to
                   as well, or -1: chosen and rejected share one prompt. Needs positions.
          cached   cache, the new tokens of `rows` of its slots: a slice (read in place), an index
                   tensor (b,), or None for the first B slots; or one token of each of the first
                   B rows of a paged cache
        positions (B, T) default to counting real tokens, from the slot's length when cached. A
        cached call adds T to the lengths of its slots.
        """
        B, T = input_ids.shape
        device = input_ids.device
        if cache is not None and rows is None:
            rows = slice(B)
        if isinstance(cache, PagedCache):
            positions = cache.positions(B)
        elif cache is not None and positions is None:
            positions = cache.lengths[rows, None] + torch.arange(T, device=device)
        elif cu_seqlens is not None and positions is None:
            starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
            positions = (torch.arange(T, device=device) - starts.to(device))[None]
        elif attention_mask is not None and positions is None:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        elif positions is None:
            positions = torch.arange(T, device=device)[None]
        layout = Layout(positions, cu_seqlens, attention_mask, cache, rows, parents)

        x = self.model.embed_tokens(input_ids).to(self.compute_dtype)
        if self.config.is_gemma:  # the factor is rounded to the dtype, as in the reference
            x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype, device=device)
        tables = {rope: rope_tables(rope, self.config.head_dim, positions)
                  for rope in {self.config.rope, self.config.local_rope}}
        recorded = torch.is_grad_enabled()
        recompute = self.gradient_checkpointing if self.training and recorded else None
        keep: Keep = "costly" if recorded else "all"
        keep = {None: keep, "block": "all", "mlp": "attention"}[recompute]
        for block, window in zip(self.model.layers, self.config.windows, strict=True):
            rope = tables[self.config.rope if window is None else self.config.local_rope]
            if recompute == "block":
                x = checkpoint(block, x, rope, layout, keep, use_reentrant=False)
            else:
                x = block(x, rope, layout, keep)
        if isinstance(cache, PagedCache):
            cache.advance()
        elif cache is not None:
            cache.lengths[rows] += T
        return self.model.norm(x)


def rope_tables(rope: Rope, head_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, (B, T, 1, hd / 2) float32."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.rope_type == "linear":
        frequencies = frequencies / rope.factor
    elif rope.rope_type == "llama3":
        # Slow waves are stretched, fast ones kept, those between blended (Llama 3.1, App. "rope").
        original = rope.original_max_position_embeddings
        turns = original * frequencies / (2 * math.pi)  # over the original context
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = blend.clamp(0, 1)
        frequencies = (1 - blend) * frequencies / rope.factor + blend * frequencies
    angles = positions[:, :, None, None].float() * frequencies
    return angles.cos(), angles.sin()
