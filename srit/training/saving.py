"""What a run saves on its way and leaves at its end: checkpoints, the best weights, the model."""

import dataclasses
import math
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch

from srit.config import TrainConfig
from srit.models import Decoder, save_model
from srit.models.load import write_config
from srit.models.lora import load_adapter, save_adapter
from srit.runtime import distributed, shutdown
from srit.runtime.files import InputError, atomic_dir, atomic_path
from srit.runtime.outcome import Diverged, Stopped
from srit.runtime.run_dir import BATCH, CHANGEABLE, Run, config_difference
from srit.text.tokenizer import Tokenizer
from srit.training.checkpoint import (
    SUMS,
    CheckpointWriter,
    TrainState,
    checkpoints,
    damage,
    find_checkpoint,
    load_checkpoint,
    read_state,
    set_aside,
    write_checksums,
)
from srit.training.metrics import MetricsLog


class BestWeights:
    """best-N/: the weights, or the adapter, with the lowest evaluation loss so far, with checksums."""

    def __init__(self, cfg: TrainConfig, model: Decoder, tokenizer: Tokenizer) -> None:
        self.cfg, self.model, self.tokenizer = cfg, model, tokenizer
        self.output_dir = Path(cfg.output_dir)

    def keep(self, eval_loss: float, state: TrainState) -> None:
        """Write best-N/ when this evaluation is the best one; NaN never is."""
        best = math.inf if state.best_eval_loss is None else state.best_eval_loss
        if self.cfg.load_best_model_at_end and eval_loss < best:
            state.best_eval_loss, state.best_step = eval_loss, state.step
            self._write(self.output_dir / f"best-{state.step}")

    def fetch(self, state: TrainState, origin: Path) -> None:
        """Copy the best-N/ that a checkpoint in `origin` refers to, if that is another directory.

        Where it is missing or damaged, the best weights are sought from the checkpoint on.
        """
        if state.best_step is None or origin.resolve() == self.output_dir.resolve():
            return
        best, main = origin / f"best-{state.best_step}", distributed.rank() == 0
        problem = damage(best) if main else None
        if main and problem is None:
            with atomic_dir(self.output_dir / best.name) as temporary:
                shutil.copytree(best, temporary, dirs_exist_ok=True)
        elif main:
            print(f"{best}: {problem}; the best weights are sought from step {state.step} on",
                  flush=True)
        if distributed.any_rank(problem is not None):
            state.best_step = state.best_eval_loss = None

    def prune(self, needed: int | None) -> None:
        """Remove every best-N/ but the one of step `needed` and those that a checkpoint refers to."""
        if distributed.rank() == 0:
            keep = {needed}
            for path in checkpoints(self.output_dir):
                try:
                    keep.add(read_state(path).best_step)
                except InputError as error:
                    set_aside(path, str(error))
            for directory in self.output_dir.glob("best-*"):
                number = re.fullmatch(r"best-(\d+)", directory.name)
                if number and int(number[1]) not in keep:
                    shutil.rmtree(directory)

    def export(self, state: TrainState) -> list[str]:
        """Write the model in Hugging Face layout: the best weights if kept, else the last; file names.

        A best-N/ that is missing or damaged is set aside, and the last weights are exported.
        """
        cfg, main, best = self.cfg, distributed.rank() == 0, None
        if state.best_step is not None:
            best = self._intact(self.output_dir / f"best-{state.best_step}")
            if best is None:
                state.best_step = state.best_eval_loss = None
            elif main:
                print(f"exporting step {state.best_step}, evaluation loss {state.best_eval_loss:.4f}")
        if cfg.use_peft:
            if best is not None:
                load_adapter(self.model, best)
            self._write(self.output_dir / "adapter")
        if best is not None and not cfg.use_peft:
            for file in sorted(best.iterdir()) if main else ():
                if file.name != SUMS:
                    with atomic_path(self.output_dir / file.name) as temporary:
                        shutil.copyfile(file, temporary)
        else:
            save_model(self.model, self.model.config, self.output_dir if main else None)
        if main:
            self.tokenizer.save(self.output_dir)
        return sorted(file.name for file in self.output_dir.glob("model*.safetensors"))

    def _intact(self, directory: Path) -> Path | None:
        """The directory if its checksums match; rank 0 looks and decides for all ranks."""
        problem = damage(directory) if distributed.rank() == 0 else None
        if problem is not None:
            set_aside(directory, f"{problem}: exporting the last weights instead")
        return directory if distributed.from_rank_0(int(problem is None)) else None

    def _write(self, directory: Path) -> None:
        with atomic_dir(directory) if distributed.rank() == 0 else nullcontext() as temporary:
            if self.cfg.use_peft:
                save_adapter(self.model, temporary, self.cfg.model_name_or_path)
            else:
                save_model(self.model, self.model.config, temporary)
            if temporary is not None:
                self.tokenizer.save(temporary)
                write_checksums(temporary)


class Checkpoints:
    """The checkpoints of one run: the one to start from, and new ones as they are due."""

    def __init__(self, cfg: TrainConfig, model: Decoder, optimizer: torch.optim.Optimizer,
                 tokenizer: Tokenizer) -> None:
        self.cfg, self.model, self.optimizer = cfg, model, optimizer
        self.best = BestWeights(cfg, model, tokenizer)
        self.output_dir = Path(cfg.output_dir)
        self.writer = CheckpointWriter(self.output_dir, cfg.save_total_limit, cfg.async_save)

    def resume(self, run: Run, total_steps: int, step_size: int,
               reference: str | None = None) -> TrainState:
        """The state of the checkpoint to go on from, loaded into model and optimizer; or a fresh one.

        Raises Finished for a run that is finished, and InputError for one that has trained more steps
        already, and for a checkpoint of other inputs or settings, of another reference model, or with
        another number of rows, pairs or bins to a step.
        """
        self.run, state = run, TrainState()
        found = find_checkpoint(self.output_dir, self.cfg.resume_from_checkpoint)
        run.end_if_finished(total_steps)
        if found is not None:
            state = load_checkpoint(found, self.model, self.optimizer)
            if state.reference != reference:
                raise InputError(f"{found}: was trained against another reference model; "
                                 f"--model_name_or_path must be the one it started from")
            if state.inputs != run.inputs:
                raise InputError(f"{found}: was trained on other files, or from another model: "
                                 "resume with those, or start afresh in another --output_dir")
            before = state.config | {"date": state.config.get("date") or run.date}
            settings = dataclasses.replace(self.cfg, date=run.date)
            if changed := config_difference(before, settings, CHANGEABLE | BATCH):
                raise InputError(f"{found}: was trained with other settings: {changed}; resume with "
                                 "those, or start afresh in another --output_dir")
            if state.batch_size != step_size:
                raise InputError(f"{found}: a step was {state.batch_size} rows, pairs or bins, "
                                 f"and would now be {step_size}; adapt "
                                 "--per_device_train_batch_size or --gradient_accumulation_steps to "
                                 f"{distributed.world_size()} processes")
            if state.step > total_steps:
                raise InputError(f"{found}: is further than the {total_steps} steps that --max_steps "
                                 "or --num_train_epochs ask for; ask for more, or start afresh in "
                                 "another --output_dir")
            run.say(f"resuming {found} at step {state.step} of {total_steps}")
            self.best.fetch(state, found.parent)
            if distributed.rank() == 0:
                for path in checkpoints(self.output_dir):
                    if int(path.name[11:]) > state.step:
                        set_aside(path, f"later than step {state.step}, where this run goes on",
                                  "superseded")
        run.reopen()
        run.cleanup = self._remove_interruptions
        state.total_steps, state.batch_size, state.reference = total_steps, step_size, reference
        state.inputs, state.config = run.inputs, dataclasses.asdict(self.cfg)
        return state

    def save_if_due(self, state: TrainState, log: MetricsLog) -> None:
        """Write checkpoint-N when one is due or the run was asked to stop; then raise Stopped.

        Raises Failed when the directory was deleted meanwhile.
        """
        self.run.require_directory()
        asked = distributed.any_rank(shutdown.requested()) and state.step < state.total_steps
        if not asked and not (self.cfg.save_steps and state.step % self.cfg.save_steps == 0):
            return
        state.log = log.pending()
        self.writer.save(self.model, self.optimizer, state, self._write_files)
        self.best.prune(state.best_step)
        if asked:
            self.writer.wait()
            log.close()
            left_out = "" if self.cfg.resume_from_checkpoint == "auto" else \
                "without --resume_from_checkpoint "
            raise Stopped(f"stopped after step {state.step} of {state.total_steps}; the same command "
                          f"{left_out}goes on from there")

    def finish(self, state: TrainState, log: MetricsLog) -> list[str]:
        """Export the trained model and remove what no checkpoint refers to; the names of its files.

        Raises Diverged, and exports nothing, when the last step was not finite or the weights are not.
        """
        self.writer.wait()
        log.close()
        finite = all(bool(p.detach().isfinite().all()) for p in self.model.parameters())
        if distributed.any_rank(not finite):
            raise Diverged(f"{self.output_dir}: the trained weights are not finite, so nothing was "
                           "exported; lower --learning_rate, or look at the rows of metrics.jsonl")
        if not log.last_step_was_finite():
            raise Diverged(f"{self.output_dir}: loss or gradient of the last step were not finite "
                           f"({state.skipped_steps} of {state.step} steps skipped), so nothing was "
                           "exported; lower --learning_rate, or look at the rows of that step")
        files = self.best.export(state)
        self.best.prune(None)
        return files

    def _remove_interruptions(self) -> None:
        """Remove the checkpoints that no save_steps asked for, and the best weights of them alone."""
        for path in checkpoints(self.output_dir):
            if not self.cfg.save_steps or int(path.name[11:]) % self.cfg.save_steps:
                shutil.rmtree(path)
        self.best.prune(None)

    def _write_files(self, directory: Path | None) -> None:
        """What a checkpoint holds besides tensors and state; rank 0 alone has a directory."""
        if self.cfg.use_peft:
            save_adapter(self.model, directory, self.cfg.model_name_or_path)
        if directory is not None:
            write_config(self.model.config, directory)
            self.best.tokenizer.save(directory)
