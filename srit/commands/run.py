"""`srit run`: every stage of a recipe in turn, finished ones skipped, each in a process of its own."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from srit.commands.report import write_report
from srit.launch import parse, to_flags
from srit.recipe import KINDS, Stage, read_recipe, stages
from srit.runtime import shutdown
from srit.runtime.files import InputError, atomic_write
from srit.runtime.run_dir import config_difference, read_run
from srit.runtime.table import table


@dataclass
class RunConfig:
    """The whole method from one recipe: evaluate, instruct, evaluate, self-refine, evaluate."""

    config: str
    """Recipe (YAML)."""
    output_dir: str | None = None
    """Instead of the recipe's."""
    seed: int | None = None
    """Instead of the recipe's."""
    device: str | None = None
    """Instead of the recipe's."""
    max_time: float = 0.0
    """Minutes after which the run saves and ends, to be continued; 0: no limit."""


def is_finished(stage: Stage) -> bool:
    """Whether the stage's directory holds this very stage, finished. Another one: InputError."""
    run = read_run(stage.output_dir)
    if run is None:
        return False
    if run["stage"] != stage.kind:
        raise InputError(f"{stage.output_dir} holds a run of stage '{run['stage']}'; choose another "
                         "output_dir")
    wanted = dataclasses.asdict(parse(KINDS[stage.kind], stage.kind, to_flags(stage.values)))
    if difference := config_difference(run["config"], wanted):
        raise InputError(f"{stage.output_dir} holds another run: {difference}; choose another "
                         "output_dir, or remove that directory")
    steps = ("max_steps", "num_train_epochs")
    same_length = all(run["config"].get(k) == wanted.get(k) for k in steps)
    return run["finished"] and same_length


def run_stage(stage: Stage) -> None:
    """Run one stage; its exit status other than 0 ends this process with the same."""
    command = [sys.executable, "-m", f"srit.train.{stage.kind}", *to_flags(stage.values)]
    # In a session of its own: a Ctrl-C comes to us alone, and is passed on once.
    child = subprocess.Popen(command, start_new_session=True)
    passed_on = False
    try:
        while (status := _wait(child)) is None:
            if shutdown.requested() and not passed_on:
                child.send_signal(signal.SIGTERM)
                passed_on = True
    finally:
        child.terminate()  # when we are interrupted; one that has ended is left alone
    # A stage that has not come to listen yet just ends.
    if status and not (passed_on and status == -signal.SIGTERM):
        sys.exit(status)
    if not is_finished(stage):
        raise shutdown.Stopped("the run stopped; the same command goes on from there")


def _wait(child: subprocess.Popen) -> int | None:
    try:
        return child.wait(0.2)
    except subprocess.TimeoutExpired:
        return None


def main(cfg: RunConfig) -> None:
    recipe = read_recipe(cfg.config)
    for key in ("output_dir", "seed", "device"):
        if getattr(cfg, key) is not None:
            recipe[key] = getattr(cfg, key)
    plan = stages(recipe)
    root = Path(recipe["output_dir"])
    with atomic_write(root / "recipe.yaml") as handle:
        yaml.safe_dump(recipe, handle, sort_keys=False)
    for number, stage in enumerate(plan, 1):
        mark = f"[{number}/{len(plan)}] {stage.name}"
        if is_finished(stage):
            print(f"{mark}: finished before", flush=True)
            continue
        if shutdown.requested():
            raise shutdown.Stopped("the run stopped between two stages; the same command goes on")
        print(mark, flush=True)
        started = time.time()
        run_stage(stage)
        print(f"{mark}: {(time.time() - started) / 60:.1f} min", flush=True)
    html = write_report([root])
    print(accuracy_table(root))
    print(f"report: {html}")


def accuracy_table(root: Path) -> str:
    """Accuracy of every evaluated model on every data set, as aligned text."""
    names = {"eval-base": "baseline", "eval-sft": "instructed", "eval-dpo": "self-refined"}
    found = [*names, *sorted(p.name for p in root.glob("eval-dpo-*"))]
    results = {name: json.loads((root / name / "results.json").read_text()) for name in found
               if (root / name / "results.json").is_file()}
    if not results:
        return "no evaluation files: no accuracy"
    header = ["data set", "n", *(names.get(r, r.replace("eval-dpo-", "round ")) for r in results)]
    lines = []
    for file, first in next(iter(results.values()))["files"].items():
        mark = " (out of domain)" if first["in_domain"] is False else ""
        lines.append([first["dataset"] + mark, first["n"],
                      *(f"{r['files'][file]['accuracy']:.1%}" for r in results.values())])
    for key in ("in_domain", "out_of_domain"):
        if all(r[key] for r in results.values()):
            lines.append([f"all {key.replace('_', ' ')}", next(iter(results.values()))[key]["n"],
                          *(f"{r[key]['accuracy']:.1%}" for r in results.values())])
    return table(header, lines)
