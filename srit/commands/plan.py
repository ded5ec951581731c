"""`srit plan`: predict the memory of a training step.

Bytes on each GPU, for P parameters, N tokens per forward, L layers, D hidden size, F intermediate size,
H query and K key/value heads of size hd, V vocabulary, s bytes per element of the compute dtype, and R
ranks:

  weights    4 P; of a base that an adapter keeps frozen s P. Gradients 4 and AdamW's moments 8 for each
             trained parameter. FSDP divides all three by R.
  saved      activations for the backward: s L N (2D + 2F + 2(H + K) hd), and in DPO s L N 2K hd for the
             concatenated keys and values of the branches. With checkpointing s L N D and one block's
             activations; with checkpointing of MLPs s L N (2D + 2(H + K) hd) and one MLP's 2 s N F.
  cast       bf16 copies of the blocks' weights, saved by autograd. With checkpointing one block's; with
             checkpointing of MLPs all but the MLPs'. With FSDP none: it gathers in bf16. With an
             adapter none: its base is in bf16.
  head       its float32 gradient, 4 V D, which the forward computes, and one chunk of logits.
  gathered   by FSDP: embedding and head twice (gather buffer and copy), two blocks, and one block's
             gradients.

The peak is at the end of the forward (saved, cast, head) or of the backward (all gradients, and the
tied head's beside the embedding's), whichever is larger. WASTE is added for the rest.
"""

from dataclasses import replace
from functools import lru_cache

import torch

from srit.commands.config import PlanConfig
from srit.kernels.chunks import CHUNK_BYTES
from srit.models import Decoder, ModelConfig, load_model
from srit.models.load import read_config, resolve
from srit.models.lora import add_lora
from srit.runtime.table import table

GIB = 2**30
CONTEXT = {"cuda": 0.8, "cpu": 0.17}  # GiB of libraries and tokenizer
WASTE = 1 / 8  # temporary tensors and fragmentation; fitted to steps on a CPU
# Published shapes, to plan without a download.
SHAPES = {
    name: dict(model_type="llama", hidden_act="silu", max_position_embeddings=8192, rms_norm_eps=1e-5,
               rope_theta=10000.0, vocab_size=v, hidden_size=d, intermediate_size=f,
               num_hidden_layers=n, num_attention_heads=h, num_key_value_heads=k,
               tie_word_embeddings=tied)
    for name, v, d, f, n, h, k, tied in (
        ("SmolLM2-135M", 49152, 576, 1536, 30, 9, 3, True),
        ("Llama-3.2-1B", 128256, 2048, 8192, 16, 32, 8, True),
        ("Llama-2-7B", 32000, 4096, 11008, 32, 32, 32, False),
        ("Llama-3.1-8B", 128256, 4096, 14336, 32, 32, 8, False),
        ("Llama-2-70B", 32000, 8192, 28672, 80, 64, 8, False),
    )
}


LABELS = {
    "weights": "weights", "moments": "AdamW's moments", "gradients": "gradients",
    "saved": "activations saved for the backward", "cast": "weights cast to bfloat16",
    "head": "head: gradient and a chunk of logits", "gathered": "gathered by FSDP",
    "waste": "temporary tensors and fragmentation", "context": "libraries",
    "peak": "peak (not all at once)",
}


def read_shape(name: str) -> ModelConfig:
    """A model's config. Weights are read only from a .gguf file."""
    if name in SHAPES:
        return ModelConfig.from_dict(SHAPES[name])
    path = resolve(name)
    return load_model(path)[1] if path.suffix == ".gguf" else read_config(path)


@lru_cache
def count_parameters(config: ModelConfig, lora_r: int) -> tuple[int, int, int]:
    """Number of all parameters, of those in blocks and of trained ones; lora_r 0: no adapter."""
    with torch.device("meta"):
        model = Decoder(config)
        if lora_r:
            add_lora(model, r=lora_r)
    return (sum(p.numel() for p in model.parameters()),
            sum(p.numel() for p in model.model.layers.parameters()),
            sum(p.numel() for p in model.parameters() if p.requires_grad))


def plan(config: ModelConfig, cfg: PlanConfig) -> dict[str, float]:
    """Predict one optimizer step: bytes on each GPU, under the names of LABELS."""
    P, blocks, trained = count_parameters(config, cfg.lora_r if cfg.use_peft else 0)
    block, outside = blocks / config.num_hidden_layers, P - blocks
    V, D, L, N = config.vocab_size, config.hidden_size, config.num_hidden_layers, cfg.tokens
    s = 4 if cfg.dtype == "float32" else 2
    sharded = cfg.parallel == "fsdp" and cfg.gpus > 1
    R = cfg.gpus if sharded else 1

    hd, H, K = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    mlp = 2 * s * config.intermediate_size
    layer = mlp + s * (2 * D + 2 * (H + K) * hd + 2 * K * hd * (cfg.stage == "dpo"))
    recomputed = cfg.checkpoint_policy if cfg.gradient_checkpointing else None
    per_token = {None: L * layer, "block": L * s * D + layer, "mlp": L * (layer - mlp) + mlp}
    saved = N * per_token[recomputed]
    cast = 0.0
    if s == 2 and not sharded and not cfg.use_peft:
        mlps = 3 * D * config.intermediate_size
        cast = 2 * {None: blocks, "block": block, "mlp": blocks - (L - 1) * mlps}[recomputed]
    head_gradient = 0 if cfg.use_peft else 4 * V * D
    chunk = min(CHUNK_BYTES[cfg.device], N * V * s)
    base = s if cfg.use_peft else 4
    weights = (base * (P - trained) + 4 * trained) / R
    moments, gradients = 8 * trained / R, 4 * trained / R
    gathered = 0.0
    if sharded:
        gathered = s * (2 * outside + 2 * block) + (0 if cfg.use_peft else s * block)
    before = gradients if cfg.gradient_accumulation_steps > 1 else 0
    end_of_forward = before + saved + cast + head_gradient + chunk
    end_of_backward = gradients + head_gradient
    context = CONTEXT[cfg.device] * GIB
    live = weights + moments + gathered + max(end_of_forward, end_of_backward)
    return {"weights": weights, "moments": moments, "gradients": gradients, "saved": saved,
            "cast": cast, "head": head_gradient + chunk, "gathered": gathered, "waste": WASTE * live,
            "context": context, "peak": (1 + WASTE) * live + context}


def most_tokens(config: ModelConfig, cfg: PlanConfig) -> int:
    """The largest multiple of 64 tokens whose peak fits max_memory; 0 if not even 64 fit."""
    low, high = 0, 2**24 // 64
    while low < high:
        middle = (low + high + 1) // 2
        if plan(config, replace(cfg, tokens=64 * middle))["peak"] <= cfg.max_memory * GIB:
            low = middle
        else:
            high = middle - 1
    return 64 * low


def main(cfg: PlanConfig) -> None:
    config = read_shape(cfg.model_name_or_path)
    memory = plan(config, cfg)
    parameters = count_parameters(config, cfg.lora_r if cfg.use_peft else 0)[0]
    print(f"{cfg.model_name_or_path}: {parameters:,} parameters, {cfg.stage}, {cfg.dtype}, "
          f"{cfg.gpus} x {cfg.parallel}, {cfg.tokens:,} tokens per forward\n")
    print(table(["on each GPU", "GiB"], [[LABELS[name], f"{size / GIB:.2f}"]
                                         for name, size in memory.items() if size]))
    most = most_tokens(config, cfg)
    ways = ["more GPUs with --parallel fsdp",
            *["--gradient_checkpointing True"] * (not cfg.gradient_checkpointing),
            *["--use_peft True"] * (not cfg.use_peft)]
    advice = (f"at most about {most:,} tokens per forward" if most else
              f"not even 64 tokens fit: use {', or '.join(ways)}")
    fits = "fits" if memory["peak"] <= cfg.max_memory * GIB else "does not fit"
    print(f"\n{fits} {cfg.max_memory:g} GiB; {advice}")
