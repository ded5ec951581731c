"""Config and dequantised weights of a .gguf file, under their Hugging Face names."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srit.models.config import ModelConfig
from srit.models.gguf_metadata import read_metadata
from srit.runtime.files import InputError
from srit.runtime.limits import INTEGER, check, is_integer

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
GEMMA_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and all tensors, dequantised to float32.

    Raises InputError for a damaged file and for unknown architectures, tensors and types.
    """
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise InputError(f"{path}: reading GGUF needs the package: pip install gguf") from None
    metadata = read_metadata(path)  # first: it has limits, and the package has none
    try:
        stored = GGUFReader(path).tensors
    except Exception as error:  # of many types, for a header that contradicts itself
        raise InputError(f"{path}: damaged or not GGUF ({error})") from None
    raw = _config(metadata, stored, path)
    gemma = raw["model_type"] == "gemma3_text"
    tensors = {}
    for tensor in stored:
        if tensor.name.startswith("rope_freqs"):
            raise InputError(f"{path}: scaled rotary frequencies ({tensor.name}) in GGUF are not "
                             "supported; use the safetensors checkpoint")
        name = _name(tensor.name, gemma, path)
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise InputError(f"{path}: tensor {tensor.name} has type {tensor.tensor_type.name}, "
                             "which cannot be dequantised") from None
        shape = [int(n) for n in reversed(tensor.shape)]
        values = torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)
        if raw["model_type"] == "llama" and re.search(r"\.[qk]_proj\.", name):
            heads = raw["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            check(shape[0] % (2 * heads) == 0, str(path), f"the size of {tensor.name}", shape[0],
                  f"a multiple of 2 x {heads} heads")
            values = _unpermute(values, heads)
        if gemma and name.endswith("norm.weight"):
            values = values - 1  # GGUF stores 1 + w
        tensors[name] = values
    raw["tie_word_embeddings"] = "lm_head.weight" not in tensors
    return ModelConfig.from_dict(raw, str(path)), tensors


def _config(metadata: dict[str, Any], stored: list, path: Path) -> dict[str, Any]:
    kind = metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise InputError(f"{path}: architecture {kind!r} is not supported; "
                         f"supported are {', '.join(MODEL_TYPES)}")

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{kind}.{key}", default)
        if value is None:
            raise InputError(f"{path}: no metadata {kind}.{key}")
        return value

    def count(key: str, default: int | None = None) -> int:
        value = get(key, default)
        check(is_integer(value, 1, INTEGER), str(path), f"{kind}.{key}", value,
              f"an integer from 1 to {INTEGER}")
        return value

    heads, hidden = count("attention.head_count"), count("embedding_length")
    epsilon = get("attention.layer_norm_rms_epsilon")
    check(isinstance(epsilon, float), str(path), "layer_norm_rms_epsilon", epsilon, "a number")
    embedding = next((t for t in stored if t.name == "token_embd.weight"), None)
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(f"{path}: missing tensor token_embd.weight, a matrix")
    raw = {
        "model_type": MODEL_TYPES[kind],
        "vocab_size": int(embedding.shape[1]),
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": count("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", hidden // heads),
        "max_position_embeddings": get("context_length"),
        # Stored as float32: 9.999999747378752e-06 stands for 1e-05.
        "rms_norm_eps": float(f"{epsilon:.6g}"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "hidden_act": "gelu_pytorch_tanh" if kind == "gemma3" else "silu",
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if metadata.get(f"{kind}.rope.scaling.type") not in (None, "none"):
        scaling = get("rope.scaling.type")
        raw["rope_scaling"] = {"rope_type": scaling, "factor": get("rope.scaling.factor")}
    if kind == "gemma3":
        raw["sliding_window"] = get("attention.sliding_window")
        raw["query_pre_attn_scalar"] = raw["head_dim"]
    return raw


def _name(name: str, gemma: bool, path: Path) -> str:
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block:
        layer, part, kind = block.groups()
        names = {**BLOCK_NAMES, **GEMMA_NAMES} if gemma else BLOCK_NAMES
        if part in names:
            return f"model.layers.{layer}.{names[part]}.{kind}"
    else:
        part, _, kind = name.partition(".")
        if part in NAMES:
            return f"{NAMES[part]}.{kind}"
    raise InputError(f"{path}: unexpected tensor {name}")


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo GGUF's interleaving of the two rotary halves in llama's q and k rows."""
    rest = weight.shape[1:]
    return weight.view(heads, -1, 2, *rest).transpose(1, 2).reshape(weight.shape)
