"""What the two training loops share; the loops themselves stand in train/sft.py and train/dpo.py."""

import ctypes
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from srit.config import TrainConfig
from srit.data.batch_sampler import Schedule, pack
from srit.models import Decoder, ModelConfig, load_model, save_model
from srit.models.load import write_config
from srit.models.lora import add_lora, load_adapter, save_adapter
from srit.runtime import distributed, shutdown
from srit.runtime.files import InputError, atomic_dir, atomic_path
from srit.runtime.run_dir import read_run
from srit.text.tokenizer import Tokenizer
from srit.training import parallel
from srit.training.checkpoint import (
    CheckpointWriter,
    TrainState,
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    read_state,
)
from srit.training.metrics import MetricsLog
from srit.training.optimizer import (
    clip_gradients,
    lr_factor,
    make_adamw,
    set_learning_rate,
    warmup_steps,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_for_training(cfg: TrainConfig, tokenizer: Tokenizer,
                      device: torch.device) -> tuple[Decoder, ModelConfig]:
    """The model with fp32 master weights, computing in cfg.dtype.

    One that will be sharded comes to the CPU, and goes to its GPU block by block.
    """
    torch.manual_seed(cfg.seed)
    first = torch.device("cpu") if _sharded(cfg) else device
    model, config = load_model(cfg.model_name_or_path, dtype=torch.float32, device=first,
                               compute_dtype=DTYPES[cfg.dtype])
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{cfg.model_name_or_path}: the tokenizer has {tokenizer.vocab_size} "
                         f"tokens, the model only {config.vocab_size}; they do not belong together")
    model.gradient_checkpointing = cfg.checkpoint_policy if cfg.gradient_checkpointing else None
    if cfg.torch_compile:
        check_compiler(device)
        model.compile_layers()
    if device.type == "cpu":
        model.model.embed_tokens.register_forward_hook(_free_before_its_gradient)
        # Every block leaves holes in the heap that fit nothing of the next one: docs/step.md.
        for block in model.model.layers:
            block.register_forward_hook(return_free_memory)
    return model.train(), config


def check_compiler(device: torch.device) -> None:
    """Raise InputError where torch.compile would find no C++ compiler, long after the start."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise InputError(f"--torch_compile True: no C++ compiler {compiler}; install it, or name "
                         "another one by the environment variable CXX, or train without the flag")


def longest_row(cfg: TrainConfig, config: ModelConfig) -> int:
    """max_length, or what the model was built for when that is less."""
    if cfg.max_length > config.max_position_embeddings and distributed.rank() == 0:
        print(f"max_length {cfg.max_length} is beyond the model's "
              f"{config.max_position_embeddings} positions, which limit it")
    return min(cfg.max_length, config.max_position_embeddings)


def prepare(model: Decoder, cfg: TrainConfig, device: torch.device) -> None:
    """Attach the adapter, and spread the model over the ranks, if asked to."""
    if cfg.use_peft:
        add_lora(model, r=cfg.lora_r, alpha=cfg.lora_alpha, dropout=cfg.lora_dropout,
                 target_modules=cfg.lora_target_modules or None)
    if _sharded(cfg):
        parallel.shard(model, device)


def _sharded(cfg: TrainConfig) -> bool:
    """A single process has nobody to share with."""
    return cfg.parallel == "fsdp" and distributed.world_size() > 1


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
        self.writer = CheckpointWriter(self.output_dir, cfg.save_total_limit, cfg.async_save)
        self.unchecked: list[tuple[int, list[str], Tensor]] = []  # step, ids, whether it counted

    def resume(self, reference: str | None = None) -> int:
        """Load the checkpoint to go on from, if there is one; the step to start with."""
        found = find_checkpoint(self.output_dir, self.cfg.resume_from_checkpoint)
        done = read_run(self.output_dir) or {}
        if done.get("finished") and done["steps"] >= self.total:
            raise InputError(f"{self.output_dir}: this run is finished; train longer with "
                             "--max_steps or --num_train_epochs, or start it afresh with "
                             "--overwrite_output_dir True")
        if found is not None:
            self.state = load_checkpoint(found, self.model, self.optimizer)
            if self.state.reference != reference:
                raise InputError(f"{found}: was trained against another reference model; "
                                 f"--model_name_or_path must be the one it started from")
            if self.state.batch_size != self.schedule.step_size:
                raise InputError(f"{found}: a step was {self.state.batch_size} rows, pairs or bins, "
                                 f"and would now be {self.schedule.step_size}; adapt "
                                 "--per_device_train_batch_size or --gradient_accumulation_steps to "
                                 f"{distributed.world_size()} processes")
            if distributed.rank() == 0:
                print(f"resuming {found} at step {self.state.step} of {self.total}")
        self.state.reference = reference
        self.state.total_steps, self.state.batch_size = self.total, self.schedule.step_size
        return self.state.step

    def passes(self, micro: Sequence[Sequence[list[int]]]) -> Iterator[tuple[list[int], float]]:
        """The forward passes of this rank: rows and their weight.

        `micro` has the micro-batches of every rank. Where a rank has none left but another one
        does, it passes the other's rows with weight 0: with a sharded model nobody may stay away.
        """
        together = [turn for turn in zip(*micro, strict=True) if any(turn)]
        for at, turn in enumerate(together, 1):
            own = turn[distributed.rank()]
            parallel.reduce_after_this_backward(self.model, at == len(together))
            yield (own, 1.0) if own else (next(filter(None, turn)), 0.0)

    def learning_rate(self, step: int) -> float:
        factor = lr_factor(step, self.total, self.warmup, self.cfg.lr_scheduler_type)
        return self.cfg.learning_rate * factor

    def step(self, step: int, loss: Tensor, ids: list[str]) -> tuple[Tensor, Tensor]:
        """Reduce, clip, update, clear: the gradient norm before clipping, and whether it is finite.

        A step whose loss or norm is not finite changes no weight: the fused optimizer reads that
        from the device. `count_skipped` counts it when the host next looks.
        """
        trained = [p for p in self.model.parameters() if p.requires_grad]
        parallel.all_reduce_gradients(trained)
        if all(p.grad is None for p in trained):
            raise RuntimeError("no trained parameter received a gradient")
        norm = clip_gradients(self.model, self.cfg.max_grad_norm)
        finite = torch.isfinite(loss + norm)
        set_learning_rate(self.optimizer, self.learning_rate(step))
        self.optimizer.found_inf = (~finite).float()
        self.unchecked.append((step + 1, ids, finite))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if norm.device.type == "cpu":
            return_free_memory()
        self.state.step = step + 1
        return norm, finite

    def count_skipped(self) -> None:
        """Count the skipped steps since the last call, and name their rows.

        Raises InputError when the run has skipped more than max_skipped_steps.
        """
        steps, self.unchecked = self.unchecked, []
        finite = torch.stack([ok for _, _, ok in steps]).tolist() if steps else []
        for (step, ids, _), ok in zip(steps, finite, strict=True):
            if ok:
                continue
            self.state.skipped_steps += 1
            text = (f"step {step}: loss or gradient is not finite; rows of this step: "
                    f"{', '.join(ids[:8])}{' ...' if len(ids) > 8 else ''}")
            if self.state.skipped_steps > self.cfg.max_skipped_steps:
                raise InputError(f"{text}. {self.state.skipped_steps} steps were skipped for this, "
                                 f"--max_skipped_steps is {self.cfg.max_skipped_steps}: lower "
                                 "--learning_rate, or look at these rows")
            if distributed.rank() == 0:
                print(f"\nskipped {text}", file=sys.stderr)

    def log_due(self) -> bool:
        return self.state.step % self.cfg.logging_steps == 0 or self.state.step == self.total

    def eval_due(self) -> bool:
        """At every eval_steps, or at the end of every epoch; always after the last step."""
        every = self.cfg.eval_steps or self.schedule.steps_per_epoch
        due = self.state.step % every == 0 or self.state.step == self.total
        return bool(self.cfg.eval_file) and due

    def keep_best(self, eval_loss: float) -> None:
        """Write the weights to best-N/ when the evaluation loss is the lowest so far."""
        best = self.state.best_eval_loss
        if self.cfg.load_best_model_at_end and (best is None or eval_loss < best):
            self.state.best_eval_loss, self.state.best_step = eval_loss, self.state.step
            self._save_weights(self._best())

    def checkpoint(self, log: MetricsLog) -> None:
        """Write checkpoint-N when one is due, or when the run was asked to stop, which then raises."""
        asked = distributed.any_rank(shutdown.requested()) and self.state.step < self.total
        due = self.cfg.save_steps and self.state.step % self.cfg.save_steps == 0
        if due or asked:
            self.count_skipped()
            self.state.log = log.pending()
            self.writer.save(self.model, self.optimizer, self.state, self._write_files)
            self._drop_best({self.state.best_step})
        if asked:
            self.writer.wait()
            log.close()
            raise shutdown.Stopped(f"stopped after step {self.state.step} of {self.total}; the same "
                               "command goes on from there")

    def export(self) -> None:
        """The trained model in Hugging Face layout: the best weights if kept, else the last."""
        self.writer.wait()
        main = distributed.rank() == 0
        if main and self.state.best_step is not None:
            print(f"exporting step {self.state.best_step}, "
                  f"evaluation loss {self.state.best_eval_loss:.4f}")
        if self.cfg.use_peft:
            if self.state.best_step is not None:
                load_adapter(self.model, self._best())
            self._save_weights(self.output_dir / "adapter")
        if self.state.best_step is not None and not self.cfg.use_peft:
            for file in sorted(self._best().iterdir()) if main else ():
                with atomic_path(self.output_dir / file.name) as temporary:
                    shutil.copyfile(file, temporary)
        else:
            save_model(self.model, self.config, self.output_dir if main else None)
        if main:
            self.tokenizer.save(self.output_dir)

    def clean(self) -> None:
        """Remove what a finished run does not need; what a checkpoint goes back to stays."""
        self._drop_best(set())

    def _best(self) -> Path:
        return self.output_dir / f"best-{self.state.best_step}"

    def _save_weights(self, directory: Path) -> None:
        with atomic_dir(directory) if distributed.rank() == 0 else nullcontext() as temporary:
            if self.cfg.use_peft:
                save_adapter(self.model, temporary, self.cfg.model_name_or_path)
            else:
                save_model(self.model, self.config, temporary)
            if temporary is not None:
                self.tokenizer.save(temporary)

    def _write_files(self, directory: Path | None) -> None:
        """What a checkpoint holds besides tensors and state."""
        if self.cfg.use_peft:
            save_adapter(self.model, directory, self.cfg.model_name_or_path)
        if directory is not None:
            write_config(self.config, directory)
            self.tokenizer.save(directory)

    def _drop_best(self, needed: set[int | None]) -> None:
        """Remove the best-N/ that are not needed, and that no checkpoint goes back to."""
        if distributed.rank() == 0:
            needed |= {read_state(path).best_step for path in checkpoints(self.output_dir)}
            for directory in self.output_dir.glob("best-*"):
                number = re.fullmatch(r"best-(\d+)", directory.name)
                if number and int(number[1]) not in needed:
                    shutil.rmtree(directory)
