"""Checkpoints: weights, optimizer, random state and position; atomic, exact, no pickle.

checkpoint-N/ is the model in Hugging Face layout (or a PEFT adapter) plus `optimizer.safetensors`
(AdamW moments and random states) and `trainer_state.json`. A checkpoint appears by renaming a
finished directory, so one that is there is whole.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from srit.models import Decoder, ModelConfig, load_model, save_model
from srit.models.files import InputError, atomic_dir
from srit.models.lora import load_adapter, lora_parameters, save_adapter
from srit.tokenizer import Tokenizer


@dataclass
class TrainState:
    """Where training stands; everything else is a pure function of the step and the settings."""

    step: int = 0
    num_tokens: int = 0
    best_eval_loss: float | None = None
    best_step: int | None = None
    total_steps: int | None = None
    reference: str | None = None  # hash of the frozen reference's weights (DPO)


def save_weights(directory: Path, model: Decoder, config: ModelConfig, tokenizer: Tokenizer,
                 base: str) -> None:
    """The model in Hugging Face layout with its tokenizer; a LoRA model: the adapter alone."""
    if next(lora_parameters(model), None) is not None:
        save_adapter(model, directory, base)
    else:
        save_model(model, config, directory)
    tokenizer.save(directory)


def load_weights(directory: Path, model: Decoder) -> None:
    """Put the weights that save_weights wrote into `model`, in place."""
    if next(lora_parameters(model), None) is not None:
        load_adapter(model, directory)
        return
    saved, _ = load_model(str(directory))
    model.load_state_dict(saved.state_dict())


def save_checkpoint(output_dir: str | Path, model: Decoder, config: ModelConfig,
                    tokenizer: Tokenizer, optimizer: torch.optim.Optimizer, state: TrainState,
                    base: str, limit: int) -> None:
    """Write checkpoint-N, then delete the oldest ones beyond `limit`."""
    output_dir = Path(output_dir)
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            tensors[f"{names[parameter]}.{slot}"] = value.contiguous()
    with atomic_dir(output_dir / f"checkpoint-{state.step}") as directory:
        save_weights(directory, model, config, tokenizer, base)
        save_file(tensors, directory / "optimizer.safetensors")
        text = json.dumps(dataclasses.asdict(state), indent=2)
        (directory / "trainer_state.json").write_text(text + "\n", encoding="utf-8")
    for old in _checkpoints(output_dir)[:-limit]:
        shutil.rmtree(old)


def load_checkpoint(directory: Path, model: Decoder,
                    optimizer: torch.optim.Optimizer) -> TrainState:
    """Bring model, optimizer and random state to where the checkpoint was written."""
    try:
        text = (directory / "trainer_state.json").read_text(encoding="utf-8")
        state = TrainState(**json.loads(text))
        tensors = load_file(directory / "optimizer.safetensors")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise InputError(f"{directory}: not a complete checkpoint ({error}); delete it to resume "
                         "from the one before") from None
    load_weights(directory, model)
    names = {name: parameter for name, parameter in model.named_parameters()}
    torch.set_rng_state(tensors.pop("rng.cpu"))
    cuda = tensors.pop("rng.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    for name, value in tensors.items():
        name, slot = name.rsplit(".", 1)
        if name not in names:
            raise InputError(f"{directory}: optimizer state for {name}, which this model lacks; "
                             "the checkpoint is another model's")
        parameter = names[name]
        optimizer.state[parameter][slot] = value.to(parameter.device)
    return state


def _checkpoints(output_dir: Path) -> list[Path]:
    found = [p for p in output_dir.glob("checkpoint-*") if p.name[11:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[11:]))


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint to go on from; None: start fresh."""
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint == "auto":
        found = _checkpoints(Path(output_dir))
        return found[-1] if found else None
    path = Path(resume_from_checkpoint)
    if not (path / "trainer_state.json").is_file():
        raise InputError(f"--resume_from_checkpoint {path}: no checkpoint there")
    return path
