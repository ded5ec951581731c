"""`srit run`: run the stages of a recipe, each in its own process. Finished stages are skipped."""

import itertools
import os
import signal
import subprocess
import sys
import time
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from srit.commands.config import RunConfig
from srit.commands.progress import read_progress, stage_config
from srit.commands.report import labels, read_ways, write_report
from srit.config import EvalConfig
from srit.data.inputs import stage_inputs
from srit.data.questions import dataset_name, read_demos, read_questions
from srit.data.sources import read_rows
from srit.grading.judge import load_judge
from srit.grading.statistics import accuracy_rows
from srit.launch import to_flags
from srit.models.load import model_files
from srit.recipe import Stage, read_recipe, read_yaml, stages
from srit.runtime import shutdown
from srit.runtime.files import InputError, atomic_write
from srit.runtime.jsonl import Counts
from srit.runtime.lock import lock
from srit.runtime.outcome import BAD_INPUT, STOPPED, Failed, Stopped
from srit.runtime.run_dir import (
    CHANGEABLE,
    LENGTH,
    changed_input,
    changed_output,
    hash_files,
    read_resumable,
    read_same,
)
from srit.runtime.table import table


def check_settings(stage: Stage, cfg: Any) -> dict | None:
    """run.json of the stage's directory, None if it is new. Raises InputError for another run's."""
    return read_same(stage.output_dir, stage.kind, cfg, CHANGEABLE,
                     "choose another output_dir, or remove that directory")


def check_inputs(plan: list[tuple[Stage, Any]]) -> None:
    """Read the rows, and look for the models, that come from outside the run. Raises InputError, also
    for a data set in in_domain that is not evaluated."""
    made = {stage.output_dir for stage, _ in plan}
    reads = {}  # in the order of the plan
    for stage, cfg in plan:
        if isinstance(cfg, EvalConfig):
            names = sorted(map(dataset_name, cfg.eval_file))
            if unknown := sorted({*cfg.in_domain} - {*names}):
                raise InputError(f"in_domain names {unknown[0]!r}, which no eval file is called; they "
                                 f"are called {names}")
        if hasattr(cfg, "model_name_or_path"):
            reads[model_files, cfg.model_name_or_path] = None
        reader = READERS[stage.kind]
        judge = [load_judge(cfg)] if reader in (read_questions, read_demos) else []
        reads |= {(reader, file, *judge): None for name, files in vars(cfg).items()
                  if name.endswith("_file") for file in files}
    for read, name, *judge in reads:
        if not made & {Path(name), Path(name).parent}:
            read(name, *judge)


def _read_rows(file: str) -> None:
    read_rows(file, Counts(file))


READERS = {"eval": read_questions, "sample": read_questions, "pair": read_demos, "sft": _read_rows,
           "dpo": _read_rows}


def is_finished(stage: Stage) -> bool:
    """Whether the stage's directory holds this stage, finished, for the inputs that are there now.

    A stage of other inputs, or whose outputs were changed, is moved to stale/ beside it. Raises
    InputError for another stage, other settings, or an input that is gone.
    """
    cfg = stage_config(stage, stage.name)
    run = check_settings(stage, cfg)
    if run is None:
        return False
    files = stage_inputs(cfg)
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
    same_length = all(run["config"].get(key) == getattr(cfg, key, None) for key in LENGTH)
    return run["finished"] and same_length


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
    given = {"output_dir": cfg.output_dir, "seed": cfg.seed, "dtype": cfg.dtype, "device": cfg.device}
    recipe |= {key: value for key, value in given.items() if value is not None}
    root = Path(recipe["output_dir"])
    file = root / "recipe.yaml"
    earlier = file.read_bytes() if file.is_file() else None
    begun = [read_yaml(file).get("date")] if earlier else []
    begun += sorted(run["date"] for stage in stages(recipe)
                    if (run := read_resumable(stage.output_dir)) is not None)
    # One for all stages: the recipe's, or the one on which they began.
    recipe["date"] = str(next(filter(None, [recipe.get("date"), *begun]), date.today()))
    plan = [(stage, stage_config(stage, cfg.config)) for stage in stages(recipe)]
    for stage, settings in plan:
        check_settings(stage, settings)
    check_inputs(plan)
    held = lock(root)
    with atomic_write(file) as handle:
        yaml.safe_dump(recipe, handle, sort_keys=False)
    for number, (stage, _) in enumerate(plan, 1):
        mark = f"[{number}/{len(plan)}] {stage.name}"
        if is_finished(stage):
            print(f"{mark}: finished before", flush=True)
            continue
        if shutdown.requested():
            raise Stopped("the run stopped between two stages; the same command goes on")
        print(mark, flush=True)
        started = time.time()
        try:
            run_stage(stage)
        except SystemExit as end:
            if end.code == BAD_INPUT and earlier:  # this recipe has made nothing yet
                with atomic_write(file, "wb") as handle:
                    handle.write(earlier)
            raise
        earlier = None
        print(f"{mark}: {(time.time() - started) / 60:.1f} min", flush=True)
    html = write_report([root])
    print(accuracy_table(root))
    print(f"report: {html}")
    held.close()


def accuracy_table(root: Path) -> str:
    """Accuracy of every evaluated model on every data set, as aligned text; and what is left out."""
    progress = read_progress(root)
    tables = []
    for way in read_ways(progress):
        lines = []
        for row in accuracy_rows(list(way.results.values())):
            mark = " (out of domain)" if row["in_domain"] is False and not row["pooled"] else ""
            lines.append([row["name"] + mark, row["n"],
                          *(f"{cell['accuracy']:.1%}" if cell else "–" for cell in row["cells"])])
        names = (name.lower() for name in labels(progress, way.results))
        tables.append(table([f"data set{way.mark}", "n", *names], lines))
    shown = "\n\n".join(tables) or "no evaluation files: no accuracy"
    return "\n".join([shown, *progress.notes])
