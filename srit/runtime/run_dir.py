"""A run's output directory: locked, claimed, and described by run.json with the hashes of its inputs.

A run is resumed, and a finished one counts as finished, only for the same settings and the same
inputs: SHA-256 of every file that it reads. Its outputs' hashes are recorded too.
"""

import dataclasses
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch

import srit
from srit.runtime import distributed
from srit.runtime.files import InputError, atomic_write, remove, sha256
from srit.runtime.jsonl import Counts
from srit.runtime.lock import LOCK, lock

# Settings that may change when a run resumes: what it has computed so far stays valid.
CHANGEABLE = {
    "output_dir", "device", "overwrite_output_dir", "resume_from_checkpoint", "max_steps",
    "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "save_total_limit",
    "per_device_eval_batch_size", "per_device_batch_size", "max_time", "max_skipped_steps",
    "async_save", "parallel", "ddp_timeout", "max_cache_memory", "concurrency", "timeout",
    "max_retries",
}
# These may change too, if their product with the number of ranks stays; training/saving.py checks that.
BATCH = {"per_device_train_batch_size", "gradient_accumulation_steps"}
ARTEFACTS = ("metrics.jsonl", "model.safetensors", "model.safetensors.index.json", "samples.jsonl",
             "generations.jsonl", "pairs.jsonl", "results.json", "demos.jsonl",
             "answers.jsonl")
OTHER = "choose another --output_dir or use --overwrite_output_dir True"


class Run:
    """One run of a stage. Every rank makes one; only rank 0 writes.

    `check` refuses another run's directory before anything is loaded. `claim` comes after the inputs
    were read and checked: from then on the directory is this run's, and nobody else's.
    """

    def __init__(self, stage: str, cfg: Any) -> None:
        self.stage, self.cfg, self.started = stage, cfg, time.time()
        self.output_dir = Path(cfg.output_dir)
        self.device = torch.device("cpu")
        if hasattr(cfg, "device"):
            given = {"timeout": cfg.ddp_timeout} if hasattr(cfg, "ddp_timeout") else {}
            self.device = distributed.setup(cfg.device, **given)
        today = distributed.from_rank_0(date.today().toordinal())
        self.date = date.fromordinal(today).isoformat()
        self.inputs: dict[str, str] = {}
        self.counts: list[Counts] = []
        self.check()

    def check(self) -> dict | None:
        """run.json of the same run, if there is one. Raises InputError if there is another run's."""
        if self.cfg.overwrite_output_dir and read_run(self.output_dir) is not None:
            return None
        run = read_resumable(self.output_dir)
        if run is None:
            for name in ARTEFACTS:
                if (self.output_dir / name).exists():
                    raise InputError(f"{self.output_dir} holds {name} but no run.json, so srit did not "
                                     "finish writing it or did not write it at all; choose another "
                                     "--output_dir, or move that file away")
            return None
        if run["stage"] != self.stage:
            raise InputError(f"{self.output_dir} already holds a run of stage '{run['stage']}'; "
                             f"{OTHER}")
        settings = dataclasses.asdict(self.cfg)
        if difference := config_difference(run["config"], settings, CHANGEABLE | BATCH):
            raise InputError(f"{self.output_dir} already holds another run: {difference}; {OTHER}")
        self.date = run["date"]
        return run

    def claim(self, model_files: Iterable[Path] = ()) -> None:
        """Lock the directory and mark it as this run's, for exactly these inputs.

        Inputs are `model_files` and every file that a setting named *_file lists. Raises InputError
        if another process holds the lock, if the inputs are not those that the run began with, or
        if ranks see different inputs; also for an input inside the directory.
        """
        files = [*data_files(self.cfg), *model_files]
        self.inputs = hash_files(files)
        distributed.require_same(f"{self.inputs} {list(map(str, self.counts))}", "input files or rows")
        distributed.require_same(f"{self.cfg}", "flags")
        if distributed.rank() == 0:
            for file in files:
                if file.resolve().is_relative_to(self.output_dir.resolve()):
                    raise InputError(f"{file} is an input and lies in --output_dir {self.output_dir}, "
                                     "which this run would write to; choose another --output_dir")
            self.lock = lock(self.output_dir)
            self._claim()
        distributed.barrier()

    def _claim(self) -> None:
        run = self.check()
        if run is None and (self.output_dir / "run.json").is_file():  # overwrite_output_dir
            for path in self.output_dir.iterdir():
                if path.name != LOCK:
                    remove(path)
        if run is not None and (changed := changed_input(run, self.inputs)):
            raise InputError(f"{self.output_dir} already holds a run of other inputs: {changed}; "
                             f"{OTHER}")
        # Delete temporary files of a killed run. Without a run here, only those that are surely ours.
        for pattern in (".*.tmp", ".*.old") if run is not None else (".run.json.*.tmp",):
            for stale in self.output_dir.glob(pattern):
                remove(stale)
        if run is None:
            self._write({"finished": False})

    def reopen(self) -> None:
        """A finished run goes on: it is not finished any more."""
        if distributed.rank() == 0 and (read_run(self.output_dir) or {}).get("finished"):
            self._write({"finished": False})

    def say(self, *lines: object) -> None:
        """Print on rank 0."""
        if distributed.rank() == 0:
            print(*lines, sep="\n", flush=True)

    def finish(self, outputs: Sequence[str], **results: Any) -> None:
        """Mark the run as finished, with the hashes of its outputs, and leave the process group."""
        if distributed.rank() == 0:
            written = hash_files(self.output_dir / name for name in outputs)
            self._write({"finished": True,
                         "outputs": {Path(name).name: digest for name, digest in written.items()},
                         "counts": {count.name: count.as_dict() for count in self.counts},
                         "seconds": round(time.time() - self.started, 1), **results})
            self.lock.close()
        self.say(f"{self.output_dir}: {', '.join(outputs)}, run.json")
        distributed.leave_process_group()

    def _write(self, state: dict) -> None:
        run = {"stage": self.stage, **state, "config": dataclasses.asdict(self.cfg), **describe(),
               "parent": getattr(self.cfg, "model_name_or_path", None), "date": self.date,
               "inputs": self.inputs}
        with atomic_write(self.output_dir / "run.json") as handle:
            json.dump(run, handle, indent=2)
            handle.write("\n")


def read_run(output_dir: str | Path) -> dict | None:
    """run.json of a directory, or None if it has none."""
    path = Path(output_dir) / "run.json"
    if not path.is_file():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); delete the directory and run again") from None
    if not isinstance(run, dict) or not {"stage", "finished"} <= run.keys():
        raise InputError(f"{path}: not a run.json of srit; choose another directory")
    return run


def read_resumable(output_dir: str | Path) -> dict | None:
    """As `read_run`; InputError for one that does not say which inputs it was made from."""
    run = read_run(output_dir)
    kinds = {"stage": str, "finished": bool, "config": dict, "inputs": dict, "date": str}
    if run is not None and (any(not isinstance(run.get(key), kind) for key, kind in kinds.items())
                            or not isinstance(run.get("steps", 0), int)):
        raise InputError(f"{output_dir}: its run.json is another version's, which did not record the "
                         "inputs; choose another directory")
    return run


def config_difference(old: dict, new: dict, changeable: set[str] = CHANGEABLE) -> str | None:
    """The first setting that differs and may not, as text; None if there is none."""
    for key in new:
        if key not in changeable and old.get(key) != new[key]:
            return f"{key} was {old.get(key)!r}, now {new[key]!r}"
    return None


def data_files(cfg: Any) -> list[Path]:
    """The files that the settings named *_file list."""
    return [Path(file) for field in dataclasses.fields(cfg) if field.name.endswith("_file")
            for file in getattr(cfg, field.name)]


def hash_files(files: Iterable[Path]) -> dict[str, str]:
    """{path: SHA-256 of its content}, in order."""
    return {str(file): _sha256(str(file), file.stat().st_mtime_ns, file.stat().st_size)
            for file in files}


@cache  # `srit run` asks for the same model again at every stage
def _sha256(file: str, mtime: int, size: int) -> str:
    return sha256(Path(file))


def changed_output(run: dict, output_dir: Path) -> str | None:
    """The first output of a finished run that is not as it was written, as text; None if none."""
    for name, digest in run.get("outputs", {}).items():
        file = output_dir / name
        if not file.is_file():
            return f"{file} is gone"
        if hash_files([file])[str(file)] != digest:
            return f"{file} is not as it was written"
    return None


def changed_input(run: dict, inputs: dict[str, str]) -> str | None:
    """The first input of a recorded run that is not what it was, as text; None if there is none."""
    for file in [*inputs, *run["inputs"]]:
        if inputs.get(file) != run["inputs"].get(file):
            return f"{file} has changed" if file in inputs and file in run["inputs"] else \
                f"{file} was {'not read' if file in inputs else 'read'} before"
    return None


def describe() -> dict:
    """Versions and machine, as stored with every result."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "versions": {"srit": srit.__version__, "python": platform.python_version(),
                     "torch": torch.__version__},
        "commit": _commit(),
        "machine": device,
    }


def _commit() -> str | None:
    """The commit of srit's own source tree; None for an installed package, or without git."""
    tree = Path(srit.__file__).resolve().parent.parent
    if not (tree / ".git").exists() or shutil.which("git") is None:
        return None
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=tree,
                         capture_output=True, text=True, check=False)
    return git.stdout.strip() or None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {torch.get_num_threads()} threads" if names else platform.machine()
