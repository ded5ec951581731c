"""Checkpoints: weights, optimizer, random states and position; atomic, checksummed, no pickle.

checkpoint-N/ holds
  state/*.safetensors  trained parameters under their own names, AdamW's moments as
                       optimizer.NAME.exp_avg(_sq), random states as rng.DEVICE.RANK
  trainer_state.json   TrainState
  SHA256SUMS           of all other files (`sha256sum -c` reads it)
  config.json and the tokenizer; with LoRA the adapter in PEFT's layout as well

torch.distributed.checkpoint (DCP) writes and reads the shards: every rank writes its part, and any
number of ranks can read them. DCP's usual storage pickles an index; the one used here keeps the index
in the headers of the safetensors files. A checkpoint appears by renaming a finished directory, so it is
never half written; the checksums detect later damage.
"""

import dataclasses
import itertools
import json
import shutil
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from srit.data.batches import Example, Pair
from srit.models import Decoder
from srit.runtime import distributed
from srit.runtime.files import InputError, atomic_write, fsync_tree, rename_over, sha256
from srit.runtime.outcome import Failed

warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")

FORMAT = 2
SUMS = "SHA256SUMS"


@dataclass
class TrainState:
    """Where training is; everything else is a pure function of the step and the settings."""

    step: int = 0
    num_tokens: int = 0
    skipped_steps: int = 0
    last_step_finite: bool = True
    best_eval_loss: float | None = None
    best_step: int | None = None
    total_steps: int | None = None
    batch_size: int | None = None  # rows, pairs or bins of one optimizer step, on all ranks
    reference: str | None = None  # hash of the frozen reference's weights (DPO)
    inputs: dict[str, str] = field(default_factory=dict)  # SHA-256 of every file that is read
    config: dict[str, Any] = field(default_factory=dict)  # the settings
    log: dict[str, Any] = field(default_factory=dict)  # what MetricsLog has not written yet
    format: int = FORMAT

    def advance(self, items: Sequence[Example | Pair]) -> None:
        """One optimizer step further, which was trained on `items`."""
        self.step += 1
        self.num_tokens += sum(item.num_tokens for item in items)


def _training_tensors(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that training changes, by its name in a checkpoint. The tensors share memory."""
    tensors = {f"rng.cpu.{distributed.rank()}": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[f"rng.cuda.{distributed.rank()}"] = torch.cuda.get_rng_state()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            slots = optimizer.state[parameter]
            tensors[name] = parameter.detach()
            tensors[f"optimizer.{name}.exp_avg"] = slots["exp_avg"]
            tensors[f"optimizer.{name}.exp_avg_sq"] = slots["exp_avg_sq"]
            # Skipped steps do not count, so this may be less than TrainState.step.
            tensors["optimizer.step"] = slots["step"].detach().reshape(1).cpu()
    return tensors


class CheckpointWriter:
    """Writes the checkpoints of a run. All ranks call `save` and `wait`.

    asynchronous: a thread writes a copy in host memory while training goes on.
    """

    def __init__(self, output_dir: Path, limit: int, asynchronous: bool) -> None:
        self.output_dir, self.limit, self.asynchronous = output_dir, limit, asynchronous
        self.group = distributed.cpu_group()  # its own, since training communicates meanwhile
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, model: Decoder, optimizer: torch.optim.Optimizer, state: TrainState,
             write_files: Callable[[Path | None], None]) -> None:
        """Write checkpoint-N, then delete the oldest ones beyond the limit.

        `write_files` adds the other files; it gets the directory on rank 0, None elsewhere. Raises
        Failed when this checkpoint, or the one before, could not be written.
        """
        self.wait()
        temporary = self.output_dir / f".checkpoint-{state.step}.tmp"
        if distributed.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            text = json.dumps(dataclasses.asdict(state), indent=2)
            (temporary / "trainer_state.json").write_text(text + "\n", encoding="utf-8")
        distributed.barrier()  # the other ranks must see the new directory, not the removed one
        write_files(temporary if distributed.rank() == 0 else None)
        tensors = _training_tensors(model, optimizer)
        if self.asynchronous:
            tensors = BlockingAsyncStager().stage(tensors)
            self.thread = threading.Thread(target=self._write, args=(tensors, temporary))
            self.thread.start()
        else:
            self._write(tensors, temporary)
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raises Failed when it could not be."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise Failed(f"{self.output_dir}: the checkpoint could not be written "
                         f"({_reason(error)}); those before it are untouched")

    def _write(self, tensors: dict[str, Tensor], temporary: Path) -> None:
        try:
            writer = HuggingFaceStorageWriter(str(temporary / "state"), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=self.group,
                     no_dist=self.group is None)
            own = sorted(temporary.glob(f"state/shard-{distributed.rank() + 1:05d}-*"))
            if distributed.rank() == 0:
                own += sorted(path for path in temporary.iterdir()
                              if path.is_file() and not path.name.startswith(SUMS))
            write_checksums(temporary, own, f"{SUMS}.{distributed.rank()}")
            distributed.barrier(self.group)
            if distributed.rank() == 0:
                self._publish(temporary)
            distributed.barrier(self.group)
        except BaseException as error:  # raised by `wait`, in the training thread
            self.error = error
            if distributed.rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    def _publish(self, temporary: Path) -> None:
        parts = sorted(temporary.glob(f"{SUMS}.*"))
        with atomic_write(temporary / SUMS) as handle:
            handle.write("".join(part.read_text(encoding="utf-8") for part in parts))
        for part in parts:
            part.unlink()
        fsync_tree(temporary)
        rename_over(temporary, self.output_dir / temporary.name[1:].removesuffix(".tmp"))
        for old in checkpoints(self.output_dir)[: -self.limit]:
            shutil.rmtree(old)


def load_checkpoint(directory: Path, model: Decoder,
                    optimizer: torch.optim.Optimizer) -> TrainState:
    """Load model, optimizer and random states from a checkpoint, in place; its TrainState.

    Raises InputError for a checkpoint of another model or another version.
    """
    state = read_state(directory)
    for parameter in model.parameters():
        if parameter.requires_grad:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    reader = HuggingFaceStorageReader(str(directory / "state"))
    known = reader.read_metadata().state_dict_metadata
    wanted = _training_tensors(model, optimizer)
    for name, tensor in list(wanted.items()):
        if name not in known and name.startswith("rng."):  # this rank did not exist then
            del wanted[name]
        elif name not in known or known[name].size != tensor.shape:
            raise InputError(f"{directory}: no tensor {name} of shape {tuple(tensor.shape)}; the "
                             "checkpoint is another model's")
    if extra := [name for name in known if name not in wanted and not name.startswith("rng.")]:
        raise InputError(f"{directory}: tensor {extra[0]} was not expected: the checkpoint is "
                         "another model's")
    try:
        dcp.load(wanted, storage_reader=reader, no_dist=distributed.world_size() == 1)
    except CheckpointException as error:
        raise InputError(f"{directory}: cannot be read ({_reason(error)})") from None
    if (own := f"rng.cpu.{distributed.rank()}") in wanted:
        torch.set_rng_state(wanted[own])
    if (own := f"rng.cuda.{distributed.rank()}") in wanted:
        torch.cuda.set_rng_state(wanted[own])
    for slots in optimizer.state.values():
        slots["step"].copy_(wanted["optimizer.step"][0])
    return state


def checkpoints(output_dir: Path) -> list[Path]:
    """checkpoint-N directories, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.name[11:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[11:]))


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str) -> Path | None:
    """The checkpoint to resume from, or None to start afresh. Rank 0 decides for all ranks.

    auto: the newest one whose checksums match. Damaged ones are renamed and reported.
    """
    if resume_from_checkpoint != "auto":
        path = Path(resume_from_checkpoint)
        if not (path / "trainer_state.json").is_file():
            raise InputError(f"--resume_from_checkpoint {path}: no checkpoint there")
        if problem := damage(path):
            raise InputError(f"--resume_from_checkpoint {path}: {problem}")
        return path
    step = -1
    if distributed.rank() == 0:
        for path in reversed(checkpoints(output_dir)):
            problem = damage(path)
            if problem is None:
                step = int(path.name[11:])
                break
            set_aside(path, f"{problem}; looking for the one before")
    step = distributed.from_rank_0(step)
    return None if step < 0 else output_dir / f"checkpoint-{step}"


def set_aside(path: Path, reason: str, why: str = "damaged") -> None:
    """Rename a checkpoint or best-N/ so that nothing uses it, and say so. Nothing is deleted."""
    names = (f"{why}-{path.name}" + (f".{n}" if n else "") for n in itertools.count())
    aside = next(new for name in names if not (new := path.with_name(name)).exists())
    if path.is_dir():
        rename_over(path, aside)
        reason = f"set aside as {aside.name}: {reason}"
    print(f"{path}: {reason}", flush=True)


def write_checksums(directory: Path, files: Sequence[Path] | None = None, name: str = SUMS) -> None:
    """Checksums of some files of a directory, by default of all, as sha256sum writes them."""
    if files is None:
        files = sorted(path for path in directory.rglob("*") if path.is_file())
    lines = "".join(f"{sha256(path)}  {path.relative_to(directory)}\n" for path in files)
    (directory / name).write_text(lines, encoding="utf-8")


def damage(directory: Path) -> str | None:
    """What is wrong with a directory; None when it has checksums of all its files, and all match."""
    try:
        lines = (directory / SUMS).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        listed = set()
        for line in lines:
            digest, _, name = line.partition("  ")
            listed.add(directory / name)
            if sha256(directory / name) != digest:
                return f"{name} is damaged (its SHA-256 is another)"
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, a null in a name
        return f"incomplete or unreadable ({error})"
    there = {path for path in directory.rglob("*") if path.is_file() and path.name != SUMS}
    return None if there and there <= listed else f"{SUMS} is cut"


def read_state(directory: Path) -> TrainState:
    try:
        values = json.loads((directory / "trainer_state.json").read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            raise InputError(f"{directory}: a checkpoint of format {values.get('format')!r}, this "
                             f"version reads format {FORMAT}; go on with the version that wrote it")
        return TrainState(**values)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{directory}: not a checkpoint ({error})") from None


def _reason(error: BaseException) -> str:
    """The cause that DCP has wrapped, in one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]  # (exception, its traceback)
    return f"{type(error).__name__}: {error}".splitlines()[0]
