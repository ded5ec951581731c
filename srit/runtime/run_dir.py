"""run.json: the stage, settings, versions and state of an output directory."""

import dataclasses
import json
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from srit.runtime.files import InputError, atomic_write, remove
from srit.runtime.jsonl import Counts

# Settings that may change when a run resumes: what it has computed so far stays valid.
CHANGEABLE = {
    "output_dir", "device", "overwrite_output_dir", "resume_from_checkpoint", "max_steps",
    "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "save_total_limit",
    "per_device_eval_batch_size", "per_device_batch_size", "max_time", "max_skipped_steps",
    "async_save", "parallel", "ddp_timeout", "max_cache_memory",
}
# These may change too, if their product with the number of ranks stays; checkpoint.py checks that.
BATCH = {"per_device_train_batch_size", "gradient_accumulation_steps"}
ARTEFACTS = ("metrics.jsonl", "model.safetensors", "model.safetensors.index.json", "samples.jsonl",
             "pairs.jsonl", "results.json")


def read_run(output_dir: str | Path) -> dict | None:
    """run.json of a directory, or None if it has none."""
    path = Path(output_dir) / "run.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); delete the directory and run again") from None


def config_difference(old: dict, new: dict, changeable: set[str] = CHANGEABLE) -> str | None:
    """The first setting that differs and may not, as text; None if there is none."""
    for key in new:
        if key not in changeable and old.get(key) != new[key]:
            return f"{key} was {old.get(key)!r}, now {new[key]!r}"
    return None


def claim_output_dir(output_dir: str | Path, stage: str, cfg: Any) -> None:
    """Mark `output_dir` as this run's. Raises InputError if it holds another run.

    A run with the same stage and settings is resumed. With `cfg.overwrite_output_dir`, a directory
    that holds a run is deleted first.
    """
    output_dir = Path(output_dir)
    run = read_run(output_dir)
    if run is not None and cfg.overwrite_output_dir:
        shutil.rmtree(output_dir)
        run = None
    other = "choose another --output_dir or use --overwrite_output_dir True"
    if run is None:
        for name in ARTEFACTS:
            if (output_dir / name).exists():
                raise InputError(f"{output_dir} holds {name} but no run.json; {other}")
    elif run["stage"] != stage:
        raise InputError(f"{output_dir} already holds a run of stage '{run['stage']}'; {other}")
    elif difference := config_difference(run["config"], dataclasses.asdict(cfg), CHANGEABLE | BATCH):
        raise InputError(f"{output_dir} already holds another run: {difference}; {other}")
    # Delete temporary files of a killed run. Without a run here, only those that are surely ours.
    for pattern in (".*.tmp", ".*.old") if run is not None else (".run.json.*.tmp",):
        for stale in output_dir.glob(pattern):
            remove(stale)
    if run is None:
        _write(output_dir, {"stage": stage, "finished": False, **describe(cfg)})


def describe(cfg: Any = None) -> dict:
    """Settings, versions and machine, as stored with every result."""
    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=here,
                         capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "config": dataclasses.asdict(cfg) if cfg is not None else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": git.stdout.strip() or None,
        "machine": device,
        "parent": getattr(cfg, "model_name_or_path", None),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {torch.get_num_threads()} threads" if names else platform.machine()


def write_run(output_dir: str | Path, stage: str, cfg: Any, counts: list[Counts], started: float,
              **extra: Any) -> None:
    """Mark the run as finished. `started` is its time.time() at the start."""
    run = {"stage": stage, "finished": True, **describe(cfg),
           "counts": {count.name: count.as_dict() for count in counts},
           "seconds": round(time.time() - started, 1), **extra}
    _write(Path(output_dir), run)


def _write(output_dir: Path, run: dict) -> None:
    with atomic_write(output_dir / "run.json") as handle:
        json.dump(run, handle, indent=2)
        handle.write("\n")
