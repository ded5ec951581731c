"""How a training run starts: model, data, adapter, sharding. The loops are in train/."""

import os
import shutil
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from srit.config import TrainConfig
from srit.models import Decoder, load_model
from srit.models.lora import add_lora
from srit.models.ops import trim_heap_in_backward
from srit.runtime import distributed
from srit.runtime.files import InputError
from srit.runtime.jsonl import Counts
from srit.runtime.run_dir import Run
from srit.text.tokenizer import Tokenizer, load_tokenizer
from srit.training import fsdp

Row = TypeVar("Row")


def read_datasets(run: Run, reader: Callable[..., tuple[list[Row], Counts]],
                  *arguments: Any) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows (none without eval_file), by reader(files, *arguments)."""
    train, counts = reader(run.cfg.train_file, *arguments)
    run.counts.append(counts)
    held_out: list[Row] = []
    if run.cfg.eval_file:
        held_out, counts = reader(run.cfg.eval_file, *arguments)
        counts.name = f"evaluation {counts.name}"
        run.counts.append(counts)
    run.say(*run.counts)
    return train, held_out


def load_student(run: Run) -> tuple[Decoder, Tokenizer, int]:
    """Model, tokenizer, and the longest row that may be trained.

    Master weights are float32, activations are cfg.dtype; so is a base that an adapter keeps frozen. A
    model that will be sharded is loaded on the CPU and goes to its GPU block by block.
    """
    cfg, device = run.cfg, run.device
    torch.manual_seed(cfg.seed)
    tokenizer = load_tokenizer(cfg.model_name_or_path, run.date, cfg.chat_template_kwargs)
    compute_dtype = getattr(torch, cfg.dtype)
    model, config = load_model(
        cfg.model_name_or_path, dtype=compute_dtype if cfg.use_peft else torch.float32,
        compute_dtype=compute_dtype, device=torch.device("cpu") if _sharded(cfg) else device)
    tokenizer.check_model(config.vocab_size)
    model.gradient_checkpointing = cfg.checkpoint_policy if cfg.gradient_checkpointing else None
    if cfg.torch_compile:
        check_compiler(device)
        model.compile_layers()
    if device.type == "cpu":
        trim_heap_in_backward(model.model.layers[0])
    if cfg.max_length > config.max_position_embeddings:
        run.say(f"max_length {cfg.max_length} exceeds the model's context; using "
                f"{config.max_position_embeddings}")
    return model.train(), tokenizer, min(cfg.max_length, config.max_position_embeddings)


def check_compiler(device: torch.device) -> None:
    """Raise InputError at the start where torch.compile would find no C++ compiler later."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise InputError(f"--torch_compile True: no C++ compiler {compiler}; install it, or name "
                         "another one by the environment variable CXX, or train without the flag")


def add_adapter_and_shard(model: Decoder, cfg: TrainConfig, device: torch.device) -> None:
    """LoRA (use_peft) and FSDP (parallel: fsdp), where they are asked for, in place."""
    if cfg.use_peft:
        add_lora(model, r=cfg.lora_r, alpha=cfg.lora_alpha, dropout=cfg.lora_dropout,
                 target_modules=cfg.lora_target_modules or None)
    if _sharded(cfg):
        fsdp.shard(model, device)


def _sharded(cfg: TrainConfig) -> bool:
    return cfg.parallel == "fsdp" and distributed.world_size() > 1
