"""`srit plan`: memory and traffic of a training step, before the GPUs are rented.

Bytes on each GPU, for P parameters (in blocks and outside), N tokens in a forward pass, L layers, D
hidden, F intermediate, H query and K key/value heads of size hd, V vocabulary, s bytes of the compute
dtype, R ranks:

  weights, moments   4 P and 8 P, with FSDP over R; gradients 4 P, over R
  kept               s L N (2D + 2F + 2(H + K) hd), and the joined keys of DPO's branches, s L N 2K hd;
                     with activation checkpointing s L N D and one block's part; of MLPs alone, s L N
                     (2D + 2(H + K) hd) and one MLP's 2 s N F
  cast               in bf16 the blocks' cast weights, which autograd keeps (not with FSDP, which
                     gathers them cast; with checkpointing one block's; of MLPs, not theirs)
  head               its float32 gradient, made in the forward, 4 V D, and a chunk of logits
  gathered           with FSDP embedding and head, in the gather's buffer and copied out of it, two
                     blocks, and a block's gradients

The peak is at the end of the forward (kept + head) or at the end of the backward (all gradients, and
the tied head's beside the embedding's), whichever is more; an eighth is added for what has no formula.
docs/scaling.md compares it with measured steps.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

from srit.kernels.chunks import CHUNK_BYTES
from srit.models import Decoder, ModelConfig, load_model
from srit.models.load import read_config, resolve
from srit.models.lora import add_lora
from srit.runtime.files import InputError
from srit.runtime.table import table

GIB = 2**30
CONTEXT = {"cuda": 0.8, "cpu": 0.17}  # GiB that the libraries take, and the tokenizer
WASTE = 1 / 8  # temporary tensors and holes in the heap: of the rest, as measured on a CPU
# Published shapes, for planning without a download.
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


@dataclass
class PlanConfig:
    """Memory and traffic of a training step on each GPU, and the most tokens that fit."""

    model_name_or_path: str
    """Directory, hub id or .gguf file; or a published shape, such as Llama-2-7B."""
    stage: Literal["sft", "dpo"] = "dpo"
    """DPO also keeps the joined keys of its branches, and scores every pair once more before."""
    gpus: int = 1
    """Number of GPUs."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """A whole model on each, or a part of everything on each."""
    tokens: int = 16384
    """Tokens of one forward pass of one GPU (max_tokens_per_batch)."""
    gradient_accumulation_steps: int = 1
    """Forward passes to one optimizer step."""
    gradient_checkpointing: bool = False
    """Recompute activations layer by layer in the backward pass."""
    checkpoint_policy: Literal["block", "mlp"] = "block"
    """What gradient_checkpointing recomputes: all of a layer, or what is behind its attention."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype."""
    use_peft: bool = False
    """Train a LoRA adapter."""
    lora_r: int = 16
    """Its rank."""
    max_memory: float = 80.0
    """GiB of one GPU."""
    bandwidth: float = 200.0
    """GB/s that one GPU sends, to all others together."""
    tflops: float = 400.0
    """TFLOP/s that one GPU reaches in matrix products."""
    device: Literal["cuda", "cpu"] = "cuda"
    """On a CPU the libraries take less, and the chunk of logits is smaller."""

    def __post_init__(self) -> None:
        for name in ("gpus", "tokens", "gradient_accumulation_steps", "lora_r"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("max_memory", "bandwidth", "tflops"):
            if getattr(self, name) <= 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be positive")


@dataclass
class Plan:
    """All in bytes on one GPU, but for the parameters of the model and the seconds of a step."""

    parameters: int
    weights: float
    moments: float
    gradients: float
    kept: float
    cast: float
    head: float
    gathered: float
    waste: float
    context: float
    peak: float
    sent: float
    compute_seconds: float


TEXTS = {  # the rows that are printed
    "weights": "weights, float32", "moments": "AdamW's moments", "gradients": "gradients",
    "kept": "kept for the backward", "cast": "cast weights",
    "head": "head: gradient and a chunk of logits", "gathered": "gathered by FSDP",
    "waste": "temporary tensors and holes, an eighth", "context": "libraries", "peak": "peak",
}


def read_shape(name: str) -> ModelConfig:
    """The config of a model, without its weights where it has a config.json."""
    if name in SHAPES:
        return ModelConfig.from_dict(SHAPES[name])
    path = resolve(name)
    return load_model(path)[1] if path.suffix == ".gguf" else read_config(path)


@lru_cache
def _parameters(config: ModelConfig, lora_r: int) -> tuple[int, int, int]:
    """How many there are, how many in blocks, how many are trained."""
    with torch.device("meta"):
        model = Decoder(config)
        if lora_r:
            add_lora(model, r=lora_r)
    return (sum(p.numel() for p in model.parameters()),
            sum(p.numel() for p in model.model.layers.parameters()),
            sum(p.numel() for p in model.parameters() if p.requires_grad))


def plan(config: ModelConfig, cfg: PlanConfig) -> Plan:
    """Predict one optimizer step."""
    P, blocks, trained = _parameters(config, cfg.lora_r if cfg.use_peft else 0)
    block, outside = blocks / config.num_hidden_layers, P - blocks
    V, D, L, N = config.vocab_size, config.hidden_size, config.num_hidden_layers, cfg.tokens
    s = 4 if cfg.dtype == "float32" else 2
    sharded = cfg.parallel == "fsdp" and cfg.gpus > 1
    R = cfg.gpus if sharded else 1

    hd, H, K = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    mlp = 2 * s * config.intermediate_size
    layer = mlp + s * (2 * D + 2 * (H + K) * hd + 2 * K * hd * (cfg.stage == "dpo"))
    recomputed = cfg.checkpoint_policy if cfg.gradient_checkpointing else None
    kept = N * {None: L * layer, "block": L * s * D + layer, "mlp": L * (layer - mlp) + mlp}[recomputed]
    cast = 0.0
    if s == 2 and not sharded:
        mlps = 3 * D * config.intermediate_size
        cast = 2 * {None: blocks, "block": block, "mlp": blocks - (L - 1) * mlps}[recomputed]
    head_gradient = 0 if cfg.use_peft else 4 * V * D
    chunk = min(CHUNK_BYTES[cfg.device], N * V * s)
    weights, moments, gradients = 4 * P / R, 8 * trained / R, 4 * trained / R
    gathered = 0.0
    if sharded:
        gathered = s * (2 * outside + 2 * block) + (0 if cfg.use_peft else s * block)
    before = gradients if cfg.gradient_accumulation_steps > 1 else 0
    end_of_forward = before + kept + cast + head_gradient + chunk
    end_of_backward = gradients + head_gradient
    context = CONTEXT[cfg.device] * GIB
    live = weights + moments + gathered + max(end_of_forward, end_of_backward)
    peak = (1 + WASTE) * live + context

    passes = cfg.gradient_accumulation_steps
    ring = (cfg.gpus - 1) / cfg.gpus
    if sharded:  # gather for the forward and, blocks alone, for the backward; reduce once a step
        sent = ring * (passes * s * (outside + 2 * blocks) + 4 * trained)
    else:
        sent = 2 * ring * 4 * trained
    # A frozen weight saves its own gradient's product; checkpointing makes the forward again, of MLPs
    # but for their last product, whose result nobody asks for.
    again = {None: 0, "block": blocks, "mlp": 2 * D * config.intermediate_size * L}[recomputed]
    products = (4 if cfg.use_peft else 6) * (blocks + V * D) + 2 * again
    compute = products * N * passes / (cfg.tflops * 1e12)
    return Plan(P, weights, moments, gradients, kept, cast, head_gradient + chunk, gathered,
                WASTE * live, context, peak, sent, compute)


def most_tokens(config: ModelConfig, cfg: PlanConfig) -> int:
    """The largest `tokens` whose peak fits max_memory, in steps of 64; 0: not even one step."""
    low, high = 0, 2**24 // 64
    while low < high:
        middle = (low + high + 1) // 2
        if plan(config, replace(cfg, tokens=64 * middle)).peak <= cfg.max_memory * GIB:
            low = middle
        else:
            high = middle - 1
    return 64 * low


def main(cfg: PlanConfig) -> None:
    config = read_shape(cfg.model_name_or_path)
    result = plan(config, cfg)
    print(f"{cfg.model_name_or_path}: {result.parameters:,} parameters, {cfg.stage}, {cfg.dtype}, "
          f"{cfg.gpus} x {cfg.parallel}, {cfg.tokens:,} tokens in a forward pass\n")
    print(table(["on each GPU", "GiB"],
                [[text, f"{value / GIB:.2f}"] for name, text in TEXTS.items()
                 if (value := getattr(result, name))]))
    most = most_tokens(config, cfg)
    if most:
        advice = f"at most about {most:,} tokens in a forward pass"
    else:
        advice = ("not even 64 tokens fit: use more GPUs with --parallel fsdp, "
                  "--gradient_checkpointing True or --use_peft True")
    fits = "fits" if result.peak <= cfg.max_memory * GIB else "does not fit"
    print(f"\n{fits} {cfg.max_memory:g} GiB; {advice}")
    if cfg.gpus > 1:
        seconds = result.sent / (cfg.bandwidth * 1e9)
        print(f"a step sends {result.sent / 1e9:.2f} GB from each GPU, {seconds:.3f} s at "
              f"{cfg.bandwidth:g} GB/s, beside {result.compute_seconds:.3f} s of matrix products at "
              f"{cfg.tflops:g} TFLOP/s")
