"""Hyper-parameters of the decoder, read from a Hugging Face config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from srit.models.files import InputError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer type: base frequency and how it is stretched."""

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """What the decoder needs to know; `raw` keeps every key of the config.json it came from."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    activation: str  # silu or gelu_tanh
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    attention_scale: float
    rope: Rope
    local_rope: Rope  # of layers with a sliding window; the same as `rope` but in Gemma 3
    windows: tuple[int | None, ...]  # a layer's sliding window in tokens, None: all tokens
    raw: dict = field(repr=False, compare=False, default_factory=dict)

    @property
    def is_gemma(self) -> bool:
        """(1 + w) norms in fp32, four norms a layer, embeddings scaled by sqrt(D)."""
        return self.model_type == "gemma3_text"

    @property
    def qk_norm(self) -> bool:
        return self.model_type in ("qwen3", "gemma3_text")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> "ModelConfig":
        """Read the keys of a Hugging Face config. Raises InputError for what is not supported."""
        if raw.get("model_type") == "gemma3" and "text_config" in raw:
            raw = {**raw["text_config"], "model_type": "gemma3_text"}
        kind = raw.get("model_type")
        if kind not in ARCHITECTURES:
            raise InputError(f"{source}: model_type {kind!r} is not supported; "
                             f"supported are {', '.join(ARCHITECTURES)}")
        keys = _Keys(raw, source)
        gemma = kind == "gemma3_text"
        hidden, heads = keys("hidden_size"), keys("num_attention_heads")
        kv_heads = raw.get("num_key_value_heads") or heads
        head_dim = raw.get("head_dim") or (256 if gemma else hidden // heads)
        if heads % kv_heads:
            raise InputError(f"{source}: num_attention_heads {heads} is no multiple of "
                             f"num_key_value_heads {kv_heads}")
        activation = raw.get("hidden_activation") or raw.get("hidden_act", "silu")
        if activation not in ACTIVATIONS:
            raise InputError(f"{source}: activation {activation!r} is not supported")
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if raw.get(key):
                raise InputError(f"{source}: {key} is not supported")
        bias = bool(raw.get("attention_bias", False))
        rope, local_rope = _ropes(raw, gemma, source)
        return cls(
            model_type=kind,
            vocab_size=keys("vocab_size"),
            hidden_size=hidden,
            intermediate_size=keys("intermediate_size"),
            num_hidden_layers=keys("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=raw.get("max_position_embeddings", 131072 if gemma else 2048),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", gemma)),
            activation=ACTIVATIONS[activation],
            qkv_bias=bias or kind == "qwen2",
            o_bias=bias and kind != "qwen2",
            mlp_bias=bool(raw.get("mlp_bias", False)),
            attention_scale=(raw.get("query_pre_attn_scalar", 256) if gemma else head_dim) ** -0.5,
            rope=rope,
            local_rope=local_rope,
            windows=_windows(raw, kind),
            raw=dict(raw),
        )

    def to_dict(self) -> dict[str, Any]:
        """The Hugging Face config.json: every key that was read, and the architecture's name."""
        return {**self.raw, "model_type": self.model_type,
                "architectures": [ARCHITECTURES[self.model_type]]}


class _Keys:
    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw, self.source = raw, source

    def __call__(self, key: str) -> int:
        value = self.raw.get(key)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{self.source}: {key} must be a positive integer, got {value!r}")
        return value


def _ropes(raw: Mapping[str, Any], gemma: bool, source: str) -> tuple[Rope, Rope]:
    """Old layout: rope_theta and rope_scaling; new: rope_parameters, in Gemma 3 one per layer type."""
    parameters = raw.get("rope_parameters") or {}
    if "full_attention" in parameters or "sliding_attention" in parameters:
        full = _rope(parameters.get("full_attention") or {}, 1e6, source)
        return full, _rope(parameters.get("sliding_attention") or {}, 1e4, source)
    scaling = {**(raw.get("rope_scaling") or {}), **parameters}
    theta = raw.get("rope_theta", 1e6 if gemma else 1e4)
    rope = _rope(scaling, theta, source)
    return rope, Rope(raw.get("rope_local_base_freq", 1e4)) if gemma else rope


def _rope(values: Mapping[str, Any], theta: float, source: str) -> Rope:
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise InputError(f"{source}: rope type {kind!r} is not supported; "
                         f"supported are {', '.join(ROPE_TYPES)}")
    known = {k: values[k] for k in Rope.__dataclass_fields__ if values.get(k) is not None}
    return Rope(**{**known, "theta": values.get("rope_theta", theta), "rope_type": kind})


def _windows(raw: Mapping[str, Any], kind: str) -> tuple[int | None, ...]:
    layers, window = raw["num_hidden_layers"], raw.get("sliding_window")
    if kind in ("qwen2", "qwen3") and not raw.get("use_sliding_window", False):
        window = None
    if kind == "llama" or window is None:
        return (None,) * layers
    types = raw.get("layer_types")
    if types is None and kind == "gemma3_text":
        every = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern", 6))
        types = ["full_attention" if (i + 1) % every == 0 else "sliding_attention"
                 for i in range(layers)]
    elif types is None and kind in ("qwen2", "qwen3"):
        full = raw.get("max_window_layers", layers)
        types = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    if types is None:  # Mistral: every layer
        return (window,) * layers
    return tuple(window if t == "sliding_attention" else None for t in types)
