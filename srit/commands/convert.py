"""`srit convert`: write any checkpoint that srit reads as a Hugging Face directory."""

import os
import shutil
from pathlib import Path

import torch

from srit.commands.config import ConvertConfig
from srit.models import load_model, save_model
from srit.models.load import CONFIG, resolve
from srit.models.lora import load_adapter, merge
from srit.runtime.files import InputError
from srit.runtime.lock import lock
from srit.text.tokenizer import load_tokenizer
from srit.training.checkpoint import SUMS, damage


def check_output(directory: Path, inputs: list[Path]) -> None:
    """Raise InputError for a directory that holds anything, dot files aside, or lies in an input."""
    for file in sorted(directory.iterdir()) if directory.exists() else ():
        if not file.name.startswith("."):
            raise InputError(f"--output_dir {directory} holds {file.name}; srit convert writes to a "
                             "new or an empty directory only: choose another")
    for source in inputs:
        if Path(os.path.realpath(directory)).is_relative_to(os.path.realpath(source)):
            raise InputError(f"--output_dir {directory} lies in {source}, which is an input; choose "
                             "another")


def main(cfg: ConvertConfig) -> None:
    output_dir = Path(cfg.output_dir)
    inputs = [resolve(cfg.model_name_or_path), *([] if cfg.adapter is None else [Path(cfg.adapter)])]
    check_output(output_dir, inputs)
    for source in inputs:
        if (source / SUMS).is_file() and (problem := damage(source)):
            raise InputError(f"{source}: {problem}; convert another one")
    tokenizer = load_tokenizer(cfg.model_name_or_path)
    model, config = load_model(cfg.model_name_or_path)
    tokenizer.check_model(config.vocab_size)
    if cfg.adapter is not None:
        load_adapter(model, cfg.adapter)
        merge(model)  # in float32, so the weights are rounded only once
    model.to(getattr(torch, cfg.dtype))
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise InputError(f"{name} is not finite in {cfg.dtype}: the weights of "
                             f"{cfg.adapter or cfg.model_name_or_path} are not, or too large for it "
                             "(float16 ends at 65504); see whether --dtype bfloat16 holds them")
    with lock(output_dir):
        check_output(output_dir, inputs)
        temporary = output_dir / ".convert.tmp"
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        temporary.mkdir()
        try:
            save_model(model, config, temporary)
            tokenizer.save(temporary)
            # config.json last: without it nothing loads the directory.
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == CONFIG):
                os.replace(file, output_dir / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    print(f"{cfg.output_dir}: {sum(p.numel() for p in model.parameters()):,} parameters")
