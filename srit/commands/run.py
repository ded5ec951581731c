"""`srit run`: run the stages of a recipe, each in its own process. Finished stages are skipped."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from srit.commands.report import label, read_results, write_report
from srit.grading.statistics import accuracy_rows
from srit.launch import parse, to_flags
from srit.models.load import model_files
from srit.recipe import KINDS, Stage, read_recipe, stages
from srit.runtime import shutdown
from srit.runtime.files import InputError, atomic_write
from srit.runtime.lock import lock
from srit.runtime.outcome import STOPPED, Failed, Stopped
from srit.runtime.run_dir import (
    changed_input,
    changed_output,
    config_difference,
    data_files,
    hash_files,
    read_resumable,
)
from srit.runtime.table import table


@dataclass
class RunConfig:
    """Run the whole method from one recipe: evaluate, instruct, evaluate, self-refine, evaluate."""

    config: str
    """Recipe (YAML)."""
    output_dir: str | None = None
    """Overrides the recipe's."""
    seed: int | None = None
    """Overrides the recipe's."""
    device: str | None = None
    """Overrides the recipe's."""
    max_time: float = 0.0
    """Minutes after which the run saves and stops, to be resumed; 0: no limit."""


def check_settings(stage: Stage, cfg: Any) -> dict | None:
    """run.json of the stage's directory, None if it is new. Raises InputError for another run's."""
    run = read_resumable(stage.output_dir)
    if run is None:
        return None
    if run["stage"] != stage.kind:
        raise InputError(f"{stage.output_dir} holds a run of stage '{run['stage']}'; choose another "
                         "output_dir")
    if difference := config_difference(run["config"], dataclasses.asdict(cfg)):
        raise InputError(f"{stage.output_dir} holds another run: {difference}; choose another "
                         "output_dir, or remove that directory")
    return run


def is_finished(stage: Stage) -> bool:
    """Whether the stage's directory holds this stage, finished, for the inputs that are there now.

    A stage of other inputs, or whose outputs were changed, is moved to stale/ beside it. Raises
    InputError for another stage, other settings, or an input that is gone.
    """
    cfg = stage_config(stage)
    run = check_settings(stage, cfg)
    if run is None:
        return False
    files = data_files(cfg)
    if hasattr(cfg, "model_name_or_path"):
        files += model_files(cfg.model_name_or_path)
    if gone := [file for file in files if not file.is_file()]:
        raise InputError(f"{gone[0]}, which {stage.output_dir} was made from, is gone; bring it back, "
                         "or remove that directory")
    if changed := changed_input(run, hash_files(files)) or changed_output(run, stage.output_dir):
        held = lock(stage.output_dir)
        number = itertools.count(1)
        stale = stage.output_dir.parent / "stale"
        aside = next(path for n in number if not (path := stale / f"{stage.name}-{n}").exists())
        stale.mkdir(exist_ok=True)
        stage.output_dir.rename(aside)
        held.close()
        print(f"{stage.output_dir}: {changed}; moved to {aside}, and run again", flush=True)
        return False
    steps = ("max_steps", "num_train_epochs")
    same_length = all(run["config"].get(k) == getattr(cfg, k, None) for k in steps)
    return run["finished"] and same_length


def stage_config(stage: Stage) -> Any:
    """The stage's settings, parsed as its command line would be. Raises InputError."""
    return parse(KINDS[stage.kind], stage.kind, to_flags(stage.values))


def run_stage(stage: Stage) -> None:
    """Run one stage. If it fails, exit with its status; if it was stopped, raise Stopped."""
    # As a file: `python -m` would import modules from the working directory first.
    script = Path(find_spec("srit.train").submodule_search_locations[0]) / f"{stage.kind}.py"
    # In its own session, so that Ctrl-C reaches only this process, which forwards it once.
    child = subprocess.Popen([sys.executable, str(script), *to_flags(stage.values)],
                             start_new_session=True,
                             env={**os.environ, shutdown.PARENT: str(os.getpid())})
    forwarded = False
    try:
        while (status := _wait(child)) is None:
            if shutdown.requested() and not forwarded:
                child.send_signal(signal.SIGTERM)
                forwarded = True
    finally:
        child.terminate()  # if this process is interrupted; does nothing after the child's exit
    # A child that had not installed its handler yet dies of the signal.
    if status == STOPPED or (forwarded and status == -signal.SIGTERM):
        raise Stopped("the run stopped; the same command goes on from there")
    if status < 0:
        raise Failed(f"stage {stage.name} was killed by {signal.Signals(-status).name} (out of "
                     "memory?); the same command goes on from its last checkpoint")
    if status:
        sys.exit(status)


def _wait(child: subprocess.Popen) -> int | None:
    try:
        return child.wait(0.2)
    except subprocess.TimeoutExpired:
        return None


def main(cfg: RunConfig) -> None:
    recipe = read_recipe(cfg.config)
    given = {"output_dir": cfg.output_dir, "seed": cfg.seed, "device": cfg.device}
    recipe |= {key: value for key, value in given.items() if value is not None}
    plan = stages(recipe)
    for stage in plan:
        check_settings(stage, stage_config(stage))
    root = Path(recipe["output_dir"])
    held = lock(root)
    with atomic_write(root / "recipe.yaml") as handle:
        yaml.safe_dump(recipe, handle, sort_keys=False)
    for number, stage in enumerate(plan, 1):
        mark = f"[{number}/{len(plan)}] {stage.name}"
        if is_finished(stage):
            print(f"{mark}: finished before", flush=True)
            continue
        if shutdown.requested():
            raise Stopped("the run stopped between two stages; the same command goes on")
        print(mark, flush=True)
        started = time.time()
        run_stage(stage)
        print(f"{mark}: {(time.time() - started) / 60:.1f} min", flush=True)
    html = write_report([root])
    print(accuracy_table(root))
    print(f"report: {html}")
    held.close()


def accuracy_table(root: Path) -> str:
    """Accuracy of every evaluated model on every data set, as aligned text."""
    results = read_results(root)
    if not results:
        return "no evaluation files: no accuracy"
    lines = []
    for row in accuracy_rows(list(results.values())):
        mark = " (out of domain)" if row["in_domain"] is False and not row["pooled"] else ""
        lines.append([row["name"] + mark, row["n"],
                      *(f"{cell['accuracy']:.1%}" if cell else "–" for cell in row["cells"])])
    return table(["data set", "n", *(label(name).lower() for name in results)], lines)
