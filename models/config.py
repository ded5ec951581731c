"""Hyper-parameters of the decoder, read from a Hugging Face config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from srit.runtime.files import InputError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
MAX_LAYERS = 4096
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer type: base frequency and scaling."""

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """The decoder's hyper-parameters; `raw` keeps every key of the config.json they came from."""

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
    local_rope: Rope  # of layers with a sliding window; differs from `rope` in Gemma 3 only
    windows: tuple[int | None, ...]  # each layer's sliding window in tokens; None: full attention
    raw: dict = field(repr=False, compare=False, default_factory=dict)

    @property
    def is_gemma(self) -> bool:
        """(1 + w) norms in float32, four norms per layer, embeddings scaled by sqrt(D)."""
        return self.model_type == "gemma3_text"

    @property
    def qk_norm(self) -> bool:
        return self.model_type in ("qwen3", "gemma3_text")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> "ModelConfig":
        """Read a Hugging Face config. Raises InputError for bad values and unsupported features."""
        if raw.get("model_type") == "gemma3" and isinstance(raw.get("text_config"), dict):
            raw = {**raw["text_config"], "model_type": "gemma3_text"}
        kind = raw.get("model_type")
        if not isinstance(kind, str) or kind not in ARCHITECTURES:
            raise InputError(f"{source}: model_type {kind!r} is not supported; "
                             f"supported are {', '.join(ARCHITECTURES)}")
        keys = _Keys(raw, source)
        gemma = kind == "gemma3_text"
        hidden, heads = keys("hidden_size"), keys("num_attention_heads")
        kv_heads = keys("num_key_value_heads", heads)
        head_dim = keys("head_dim", 256 if gemma else hidden // heads)
        if head_dim % 2:
            raise InputError(f"{source}: head_dim {head_dim} must be even, for rotary embeddings")
        if heads % kv_heads:
            raise InputError(f"{source}: num_attention_heads {heads} is not a multiple of "
                             f"num_key_value_heads {kv_heads}")
        activation = raw.get("hidden_activation") or raw.get("hidden_act", "silu")
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise InputError(f"{source}: activation {activation!r} is not supported")
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if raw.get(key):
                raise InputError(f"{source}: {key} is not supported")
        bias = bool(raw.get("attention_bias", False))
        rope, local_rope = _ropes(keys, gemma)
        query_scale = keys.number("query_pre_attn_scalar", 256) if gemma else head_dim
        return cls(
            model_type=kind,
            vocab_size=keys("vocab_size"),
            hidden_size=hidden,
            intermediate_size=keys("intermediate_size"),
            num_hidden_layers=keys("num_hidden_layers", limit=MAX_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=keys("max_position_embeddings", 131072 if gemma else 2048),
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", gemma)),
            activation=ACTIVATIONS[activation],
            qkv_bias=bias or kind == "qwen2",
            o_bias=bias and kind != "qwen2",
            mlp_bias=bool(raw.get("mlp_bias", False)),
            attention_scale=query_scale**-0.5,
            rope=rope,
            local_rope=local_rope,
            windows=_windows(keys, kind),
            raw=dict(raw),
        )

    def to_dict(self) -> dict[str, Any]:
        """The Hugging Face config.json: every key of `raw`, and the architecture's name."""
        return {**self.raw, "model_type": self.model_type,
                "architectures": [ARCHITECTURES[self.model_type]]}


class _Keys:
    """Checks the values of a config as they are read; a missing key or null gives the default."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw, self.source = raw, source

    def __call__(self, key: str, default: int | None = None, limit: int = 2**31 - 1) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise InputError(f"{self.source}: {key} must be an integer from 1 to {limit}, "
                             f"got {value!r:.80}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 2**63:
            raise InputError(f"{self.source}: {key} must be a positive number, got {value!r:.80}")
        return value

    def section(self, key: str) -> "_Keys":
        value = self.raw.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise InputError(f"{self.source}: {key} must be an object, got {value!r:.80}")
        return _Keys(value or {}, f"{self.source}: {key}")


def _ropes(keys: _Keys, gemma: bool) -> tuple[Rope, Rope]:
    """Old layout: rope_theta and rope_scaling. New: rope_parameters, in Gemma 3 per layer type."""
    parameters = keys.section("rope_parameters")
    if "full_attention" in parameters.raw or "sliding_attention" in parameters.raw:
        return (_rope(parameters.section("full_attention"), 1e6),
                _rope(parameters.section("sliding_attention"), 1e4))
    scaling = {**keys.section("rope_scaling").raw, **parameters.raw}
    rope = _rope(_Keys(scaling, keys.source), keys.number("rope_theta", 1e6 if gemma else 1e4))
    return rope, Rope(keys.number("rope_local_base_freq", 1e4)) if gemma else rope


def _rope(keys: _Keys, theta: float) -> Rope:
    kind = keys.raw.get("rope_type") or keys.raw.get("type") or "default"
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise InputError(f"{keys.source}: rope type {kind!r} is not supported; "
                         f"supported are {', '.join(ROPE_TYPES)}")
    known = {k: keys.number(k, 1.0) for k in Rope.__dataclass_fields__
             if keys.raw.get(k) is not None and k not in ("theta", "rope_type")}
    return Rope(**{**known, "theta": keys.number("rope_theta", theta), "rope_type": kind})


def _windows(keys: _Keys, kind: str) -> tuple[int | None, ...]:
    raw, layers = keys.raw, keys("num_hidden_layers")
    unused = kind == "llama" or (kind in ("qwen2", "qwen3") and not raw.get("use_sliding_window"))
    if unused or raw.get("sliding_window") is None:
        return (None,) * layers
    window = keys("sliding_window")
    types = raw.get("layer_types")
    if types is None and kind == "gemma3_text":
        every = keys("sliding_window_pattern", raw.get("_sliding_window_pattern") or 6)
        types = ["full_attention" if (i + 1) % every == 0 else "sliding_attention"
                 for i in range(layers)]
    elif types is None and kind in ("qwen2", "qwen3"):
        # 0 is valid: no layer has full attention.
        full = layers if raw.get("max_window_layers") is None else raw["max_window_layers"]
        if not isinstance(full, int):
            raise InputError(f"{keys.source}: max_window_layers must be an integer, got {full!r:.80}")
        types = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    if types is None:  # Mistral: every layer
        return (window,) * layers
    if not isinstance(types, list) or len(types) != layers:
        raise InputError(f"{keys.source}: layer_types must name each of the {layers} layers")
    return tuple(window if t == "sliding_attention" else None for t in types)
