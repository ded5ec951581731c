"""A run's output directory: locked, claimed, and described by run.json with the hashes of its inputs.

A run is resumed, and a finished one counts as finished, only for the same settings and the same
inputs: SHA-256 of every file that it reads. Its outputs' hashes are recorded too.
"""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING
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
from srit.runtime.outcome import Failed, Finished

# Settings that may change when a run resumes: what it has computed so far stays valid.
CHANGEABLE = {
    "output_dir", "device", "overwrite_output_dir", "resume_from_checkpoint", "max_steps",
    "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "save_total_limit",
    "per_device_eval_batch_size", "per_device_batch_size", "max_time", "max_skipped_steps",
    "async_save", "parallel", "ddp_timeout", "max_cache_memory", "concurrency", "timeout",
    "max_retries",
}
# Of these, those that say how long a run is: a finished one that is to be longer is not finished.
LENGTH = {"max_steps", "num_train_epochs"}
# These may change too, if their product with the number of ranks stays; training/saving.py checks that.
BATCH = {"per_device_train_batch_size", "gradient_accumulation_steps"}
ARTEFACTS = ("metrics.jsonl", "model.safetensors", "model.safetensors.index.json", "samples.jsonl",
             "generations.jsonl", "pairs.jsonl", "results.json", "demos.jsonl",
             "answers.jsonl")
OTHER = "choose another --output_dir or use --overwrite_output_dir True"


class Run:
    """One run of a stage. Every rank makes one; only rank 0 writes.

    Making it refuses another run's directory and hashes the inputs, before anything is loaded. `claim`
    comes after the inputs were read and checked: from then on the directory is this run's, and nobody
    else's.

    inputs: gives, from cfg, the files that this stage reads (`stage_inputs`).
    """

    def __init__(self, stage: str, cfg: Any, inputs: Callable[[Any], list[Path]]) -> None:
        self.stage, self.cfg, self.started = stage, cfg, time.time()
        self.output_dir = Path(cfg.output_dir)
        self.device = torch.device("cpu")
        if hasattr(cfg, "device"):
            given = {"timeout": cfg.ddp_timeout} if hasattr(cfg, "ddp_timeout") else {}
            self.device = distributed.setup(cfg.device, **given)
        today = distributed.from_rank_0(date.today().toordinal())
        self.date = date.fromordinal(today).isoformat()
        if hasattr(cfg, "date") and cfg.date:
            self.date = cfg.date
        self.counts: list[Counts] = []
        self.cleanup: Callable[[], None] = lambda: None  # what is to be done once the run is finished
        if (self.check() is None and getattr(cfg, "dtype", "") == "bfloat16"
                and not distributed.multiplies_bfloat16(self.device)):
            name = {"cuda": "GPU", "cpu": "CPU"}[self.device.type]
            self.say(f"dtype bfloat16: this {name} emulates it; --dtype float32 is usually faster")
        self.list_inputs = inputs
        self.stamps = {file: stamp(file) for file in inputs(cfg)}
        self.inputs = hash_files(self.stamps)

    def check(self) -> dict | None:
        """run.json of the same run, if there is one. Raises InputError if there is another run's."""
        if self.cfg.overwrite_output_dir and read_run(self.output_dir) is not None:
            return None
        run = read_same(self.output_dir, self.stage, self.cfg, CHANGEABLE | BATCH, OTHER)
        if run is None:
            for name in ARTEFACTS:
                if (self.output_dir / name).exists():
                    raise InputError(f"{self.output_dir} holds {name} but no run.json, so srit did not "
                                     "finish writing it or did not write it at all; choose another "
                                     "--output_dir, or move that file away")
            return None
        self.date = run["date"]
        return run

    def same_inputs(self) -> dict | None:
        """As `check`; InputError also if the inputs are not those that the run began with."""
        run = self.check()
        if run is not None and (changed := changed_input(run, self.inputs)):
            raise InputError(f"{self.output_dir} already holds a run of other inputs: {changed}; "
                             f"{OTHER}")
        return run

    def end_if_finished(self, steps: int = 0) -> None:
        """Raise Finished if this run is, after so many steps.

        Raises InputError if it was finished after more steps, or if an output has changed.
        """
        run = self.same_inputs()
        if run is None or not run["finished"] or run.get("steps", 0) < steps:
            return
        if run.get("steps", 0) > steps > 0:
            raise InputError(f"{self.output_dir}: this run is finished, after {run['steps']} steps; "
                             f"--max_steps or --num_train_epochs ask for {steps}; {OTHER}")
        if changed := changed_output(run, self.output_dir):
            raise InputError(f"{self.output_dir}: this run is finished, but {changed}; bring it back, "
                             f"{OTHER}")
        if steps and distributed.rank() == 0:  # other settings may come to as many steps
            now = dataclasses.asdict(self.cfg)
            self._put({**run, "config": run["config"] | {key: now[key] for key in LENGTH}})
        longer = "train longer with --max_steps or --num_train_epochs, or " if steps else ""
        raise Finished(f"{self.output_dir}: this run is finished; {longer}start it afresh with "
                       "--overwrite_output_dir True")

    def claim(self) -> None:
        """Lock the directory and mark it as this run's, for exactly these inputs.

        Raises InputError if another process holds the lock, if the inputs are not those that the run
        began with, have changed since this object was made, or differ between ranks; also for an
        input inside the directory.
        """
        now = {file: stamp(file) for file in self.list_inputs(self.cfg)}
        for file in now | self.stamps:
            if now.get(file) != self.stamps.get(file):
                raise InputError(f"{file} was changed while it was read; give the same command again "
                                 "when nothing writes there")
        distributed.require_same(f"{self.inputs} {list(map(str, self.counts))}", "input files or rows")
        distributed.require_same(f"{self.cfg}", "flags")
        if distributed.rank() == 0:
            for file in now:
                if any(place.resolve().is_relative_to(self.output_dir.resolve())
                       for place in (file, file.parent)):  # where a link leads to, and where it lies
                    raise InputError(f"{file} is an input and lies in --output_dir {self.output_dir}, "
                                     "which this run would write to; choose another --output_dir")
            self.lock = lock(self.output_dir)
            self._claim()
        distributed.barrier()

    def _claim(self) -> None:
        run = self.same_inputs()
        if run is None and (self.output_dir / "run.json").is_file():  # overwrite_output_dir
            # run.json last: until then the same command can be given again.
            for path in sorted(self.output_dir.iterdir(), key=lambda path: path.name == "run.json"):
                if path.name != LOCK:
                    remove(path)
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

    def require_directory(self) -> None:
        """Raise Failed if the directory was deleted after `claim`: another run may have it now."""
        if distributed.rank() == 0 and os.fstat(self.lock.fileno()).st_nlink == 0:
            raise Failed(f"{self.output_dir} was deleted while this run wrote to it; the same "
                         "command starts afresh")

    def say(self, *lines: object) -> None:
        """Print on rank 0."""
        if distributed.rank() == 0:
            print(*lines, sep="\n", flush=True)

    def finish(self, outputs: Sequence[str], **results: Any) -> None:
        """Mark the run as finished, with the hashes of its outputs, and leave the process group."""
        self.require_directory()
        if distributed.rank() == 0:
            written = hash_files(self.output_dir / name for name in outputs)
            self._write({"finished": True,
                         "outputs": {Path(name).name: digest for name, digest in written.items()},
                         "counts": {count.name: count.as_dict() for count in self.counts},
                         "seconds": round(time.time() - self.started, 1), **results})
            self.cleanup()
            self.lock.close()
        self.say(f"{self.output_dir}: {', '.join(outputs)}, run.json")
        distributed.leave_process_group()

    def _write(self, state: dict) -> None:
        run = {"stage": self.stage, **state, "config": dataclasses.asdict(self.cfg), **describe(),
               "parent": getattr(self.cfg, "model_name_or_path", None), "date": self.date,
               "inputs": self.inputs}
        self._put(run)

    def _put(self, run: dict) -> None:
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
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); delete the directory and run again") from None
    if not isinstance(run, dict) or not {"stage", "finished"} <= run.keys():
        raise InputError(f"{path}: not a run.json of srit; choose another directory")
    return run


def read_resumable(output_dir: str | Path) -> dict | None:
    """As `read_run`; InputError for one that does not say which inputs it was made from."""
    run = read_run(output_dir)
    kinds = {"stage": str, "finished": bool, "config": dict, "inputs": dict, "date": str}
    if run is not None and (any(not isinstance(run.get(key), kind) for key, kind in kinds.items())
                            or not isinstance(run.get("steps", 0), int)
                            or not isinstance(run.get("outputs", {}), dict)):
        raise InputError(f"{output_dir}: its run.json is another version's, which did not record the "
                         "inputs; choose another directory")
    return run


def read_same(output_dir: Path, stage: str, cfg: Any, changeable: set[str], advice: str) -> dict | None:
    """As `read_resumable`; InputError, ending with `advice`, for another stage or other settings."""
    run = read_resumable(output_dir)
    if run is not None:
        if run["stage"] != stage:
            raise InputError(f"{output_dir} already holds a run of stage '{run['stage']}'; {advice}")
        if difference := settings_difference(run, cfg, changeable):
            raise InputError(f"{output_dir} already holds another run: {difference}; {advice}")
    return run


def settings_difference(run: dict, cfg: Any, changeable: set[str]) -> str | None:
    """As `config_difference`, of a recorded run and cfg; no date in cfg means the run's."""
    if getattr(cfg, "date", None) is None:
        return config_difference(run["config"], cfg, {*changeable, "date"})
    return config_difference(run["config"] | {"date": run["date"]}, cfg, changeable)


def config_difference(old: dict, cfg: Any, changeable: set[str]) -> str | None:
    """The first setting that differs and may not, as text; None if there is none.

    One that did not exist yet had what is now its default.
    """
    new = dataclasses.asdict(cfg)
    for field in dataclasses.fields(cfg):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        before, now = old.get(field.name, default), new[field.name]
        if field.name not in changeable and before != now:
            return f"{field.name} was {before!r}, now {now!r}"
    return None


def stamp(file: Path) -> tuple[int, int, int] | None:
    """Size, time of change and inode, one of which a change of the file alters; None without a file."""
    if not file.is_file():
        return None
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def hash_files(files: Iterable[Path]) -> dict[str, str]:
    """{path: SHA-256 of its content}, in order; srit's own files by their path within the package."""
    own = Path(srit.__file__).parent
    return {f"srit/{file.relative_to(own)}" if file.is_relative_to(own) else str(file):
            _digest(file) for file in files}


def _digest(file: Path) -> str:
    if (found := stamp(file)) is None:
        raise InputError(f"{file}: no such file")
    return _sha256(file, found)


@cache  # `srit run` asks for the same model again at every stage
def _sha256(file: Path, found: tuple[int, int, int]) -> str:
    return sha256(file)


def changed_output(run: dict, output_dir: Path) -> str | None:
    """The first output of a finished run that is not as it was written, as text; None if none."""
    for name, digest in run.get("outputs", {}).items():
        file = output_dir / name
        if not file.is_file():
            return f"{file} is gone"
        if _digest(file) != digest:
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
    package = Path(srit.__file__).resolve().parent
    tree = package.parent
    # An installed package, which may lie in somebody's repository, holds train/ itself.
    if (package / "train").exists() or not (tree / ".git").exists() or shutil.which("git") is None:
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
