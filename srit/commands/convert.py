"""`srit convert`: write any checkpoint that srit reads as a Hugging Face directory."""

from dataclasses import dataclass
from typing import Literal

import torch

from srit.models import load_model, save_model
from srit.models.lora import load_adapter, merge
from srit.text.tokenizer import load_tokenizer


@dataclass
class ConvertConfig:
    """Read a directory, hub id or .gguf file; write config, safetensors and tokenizer."""

    model_name_or_path: str
    """Directory in Hugging Face layout, hub id, or .gguf file."""
    output_dir: str
    """Where the Hugging Face directory goes."""
    adapter: str | None = None
    """PEFT adapter directory to merge into the weights."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the written weights."""


def main(cfg: ConvertConfig) -> None:
    tokenizer = load_tokenizer(cfg.model_name_or_path)
    model, config = load_model(cfg.model_name_or_path)
    if cfg.adapter:
        load_adapter(model, cfg.adapter)
        merge(model)  # in float32, so the weights are rounded only once
    model.to(getattr(torch, cfg.dtype))
    save_model(model, config, cfg.output_dir)
    tokenizer.save(cfg.output_dir)
    print(f"{cfg.output_dir}: {sum(p.numel() for p in model.parameters()):,} parameters")
