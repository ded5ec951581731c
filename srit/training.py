"""What the two training loops share; the loops themselves stand in train/sft.py and train/dpo.py."""

import ctypes
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from srit import dist
from srit.checkpoint import (
    TrainState,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
)
from srit.config import TrainConfig
from srit.data import Schedule, pack
from srit.models import Decoder, ModelConfig, load_model, save_model
from srit.models.files import InputError, atomic_dir
from srit.models.lora import add_lora, merge
from srit.optim import clip_gradients, lr_factor, make_adamw, set_learning_rate, warmup_steps
from srit.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_for_training(cfg: TrainConfig, tokenizer: Tokenizer,
                      device: torch.device) -> tuple[Decoder, ModelConfig]:
    """The model with fp32 master weights, computing in cfg.dtype."""
    torch.manual_seed(cfg.seed)
    model, config = load_model(cfg.model_name_or_path, dtype=torch.float32, device=device,
                               compute_dtype=DTYPES[cfg.dtype])
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{cfg.model_name_or_path}: the tokenizer has {tokenizer.vocab_size} "
                         f"tokens, the model only {config.vocab_size}; they do not belong together")
    model.gradient_checkpointing = cfg.gradient_checkpointing
    if device.type == "cpu":
        model.model.embed_tokens.register_forward_hook(_free_before_its_gradient)
        # Every block leaves holes in the heap that fit nothing of the next one: docs/step.md.
        for block in model.model.layers:
            block.register_forward_hook(return_free_memory)
    return model.train(), config


def longest_row(cfg: TrainConfig, config: ModelConfig) -> int:
    """max_length, or what the model was built for when that is less."""
    if cfg.max_length > config.max_position_embeddings and dist.rank() == 0:
        print(f"max_length {cfg.max_length} is beyond the model's "
              f"{config.max_position_embeddings} positions, which limit it")
    return min(cfg.max_length, config.max_position_embeddings)


def attach_lora(model: Decoder, cfg: TrainConfig) -> None:
    add_lora(model, r=cfg.lora_r, alpha=cfg.lora_alpha, dropout=cfg.lora_dropout,
             target_modules=cfg.lora_target_modules or None)


def batches_of(sizes: Sequence[int], cfg: TrainConfig,
               capacity: int = 0) -> tuple[list[list[int]], int]:
    """Which rows go together, and how many such units one forward pass takes.

    Units are single rows, bins of at most `capacity` tokens (packing), or, with
    max_tokens_per_batch, bins that are a forward pass each.
    """
    if cfg.max_tokens_per_batch:
        if max(sizes) > cfg.max_tokens_per_batch:
            raise InputError(f"--max_tokens_per_batch {cfg.max_tokens_per_batch} is less than the "
                             f"longest row's {max(sizes)} tokens: raise it, or lower --max_length")
        return pack(sizes, cfg.max_tokens_per_batch), 1
    units = pack(sizes, capacity) if capacity else [[i] for i in range(len(sizes))]
    return units, cfg.per_device_train_batch_size


def return_free_memory(*_: object) -> None:
    """Give the system what is free: glibc keeps pieces that are too small for what comes next."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in every C library
        if trim is not None:
            trim(0)


def _free_before_its_gradient(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
    """The last of the backward is the embedding's gradient, as large as the embedding. By then the
    activations are free, but in pieces."""
    if output.requires_grad:
        output.register_hook(return_free_memory)


class Optimization:
    """Optimizer, schedule, checkpoints and the best weights of one training run."""

    def __init__(self, cfg: TrainConfig, model: Decoder, config: ModelConfig, tokenizer: Tokenizer,
                 schedule: Schedule) -> None:
        self.cfg, self.model, self.config, self.tokenizer = cfg, model, config, tokenizer
        self.schedule = schedule
        self.output_dir = Path(cfg.output_dir)
        self.total = schedule.total_steps(cfg.num_train_epochs, cfg.max_steps)
        self.warmup = warmup_steps(self.total, cfg.warmup_ratio, cfg.warmup_steps)
        self.optimizer = make_adamw(model, cfg.learning_rate, cfg.weight_decay,
                                    (cfg.adam_beta1, cfg.adam_beta2), cfg.adam_epsilon)
        self.state = TrainState(total_steps=self.total)
        self.unchecked: list[tuple[int, list[str], Tensor]] = []  # step, ids, loss

    def resume(self, reference: str | None = None) -> int:
        """Load the checkpoint to go on from, if there is one; the step to start with."""
        found = find_checkpoint(self.output_dir, self.cfg.resume_from_checkpoint)
        if found is not None:
            self.state = load_checkpoint(found, self.model, self.optimizer)
            if self.state.reference != reference:
                raise InputError(f"{found}: was trained against another reference model; "
                                 f"--model_name_or_path must be the one it started from")
            if dist.rank() == 0:
                print(f"resuming {found} at step {self.state.step} of {self.total}")
        self.state.reference = reference
        self.state.total_steps = self.total
        return self.state.step

    def learning_rate(self, step: int) -> float:
        factor = lr_factor(step, self.total, self.warmup, self.cfg.lr_scheduler_type)
        return self.cfg.learning_rate * factor

    def step(self, step: int, loss: Tensor, ids: list[str]) -> Tensor:
        """Reduce, clip, update, clear: the gradient norm before clipping.

        A step whose norm is not finite changes no weight: the fused optimizer reads that from the
        device. `check_finite` ends the run, with the `ids` of its rows, when the host next looks.
        """
        trained = [p for p in self.model.parameters() if p.requires_grad]
        dist.all_reduce_gradients(trained)
        if all(p.grad is None for p in trained):
            raise RuntimeError("no trained parameter received a gradient")
        norm = clip_gradients(self.model, self.cfg.max_grad_norm)
        set_learning_rate(self.optimizer, self.learning_rate(step))
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()
        self.unchecked.append((step + 1, ids, loss + 0 * norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if norm.device.type == "cpu":
            return_free_memory()
        self.state.step = step + 1
        return norm

    def check_finite(self) -> None:
        """Raise InputError for the first step since the last call whose loss was not finite."""
        steps, self.unchecked = self.unchecked, []
        losses = torch.stack([loss for _, _, loss in steps]).tolist() if steps else []
        for (step, ids, _), loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss):
                raise InputError(f"step {step}: loss or gradient is not finite; rows of this step: "
                                 f"{', '.join(ids[:8])}. Lower --learning_rate, or look at these rows")

    def log_due(self) -> bool:
        return self.state.step % self.cfg.logging_steps == 0 or self.state.step == self.total

    def eval_due(self) -> bool:
        """At every eval_steps, or at the end of every epoch; always after the last step."""
        every = self.cfg.eval_steps or self.schedule.steps_per_epoch
        due = self.state.step % every == 0 or self.state.step == self.total
        return bool(self.cfg.eval_file) and due

    def keep_best(self, eval_loss: float) -> None:
        """Write the weights to best/ when the evaluation loss is the lowest so far."""
        best = self.state.best_eval_loss
        if self.cfg.load_best_model_at_end and (best is None or eval_loss < best):
            self.state.best_eval_loss, self.state.best_step = eval_loss, self.state.step
            if dist.rank() == 0:
                with atomic_dir(self.output_dir / "best") as directory:
                    save_weights(directory, self.model, self.config, self.tokenizer,
                                 self.cfg.model_name_or_path)

    def checkpoint(self) -> None:
        """Write checkpoint-N when one is due."""
        due = self.cfg.save_steps and self.state.step % self.cfg.save_steps == 0
        if due:
            self.check_finite()
        if due and dist.rank() == 0:
            save_checkpoint(self.output_dir, self.model, self.config, self.tokenizer,
                            self.optimizer, self.state, self.cfg.model_name_or_path,
                            self.cfg.save_total_limit)

    def export(self) -> None:
        """The trained model in Hugging Face layout: the best weights if kept, else the last."""
        if dist.rank() != 0:
            return
        best = self.output_dir / "best"
        if self.state.best_step is not None:
            load_weights(best, self.model)
            print(f"exporting step {self.state.best_step}, "
                  f"evaluation loss {self.state.best_eval_loss:.4f}")
        if self.cfg.use_peft:
            with atomic_dir(self.output_dir / "adapter") as directory:
                save_weights(directory, self.model, self.config, self.tokenizer,
                             self.cfg.model_name_or_path)
            merge(self.model)
        save_model(self.model, self.config, self.output_dir)
        self.tokenizer.save(self.output_dir)
        shutil.rmtree(best, ignore_errors=True)
