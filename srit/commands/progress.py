"""How far a run directory has come with its recipe, and which of its stages count.

A stage counts if it was made with the recipe's settings, from what lies there now, and is as it was
written. Numbers of other stages do not belong beside its own.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import srit
from srit.data.inputs import stage_inputs
from srit.launch import parse, to_flags
from srit.recipe import KINDS, Stage, read_recipe, stages
from srit.runtime.files import InputError
from srit.runtime.jsonl import require
from srit.runtime.run_dir import (
    CHANGEABLE,
    LENGTH,
    changed_input,
    changed_output,
    hash_files,
    read_run,
    settings_difference,
)

FIELDS = {"finished": bool, "config": dict, "inputs": dict, "date": str, "machine": str,
          "versions": dict, "commit": str | None}
FINISHED_FIELDS = {"outputs": dict, "counts": dict, "seconds": int | float}
COUNTS_FIELDS = {"in": int, "used": int, "dropped": dict}
OUTPUTS = {"eval": ("results.json", "generations.jsonl")}  # those whose content a report shows


@dataclass
class Progress:
    """The stages of a recipe that have begun, by name and in its order."""

    root: Path
    recipe: dict[str, Any]
    runs: dict[str, dict] = field(default_factory=dict)
    """run.json of every one of them, also of those that do not count."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why a stage does not count."""
    unchecked: dict[str, str] = field(default_factory=dict)
    """Why nobody can tell whether a stage counts. It does."""

    @property
    def counting(self) -> dict[str, dict]:
        """run.json of the stages that count, finished or not."""
        return {name: run for name, run in self.runs.items() if name not in self.left_out}

    @property
    def notes(self) -> list[str]:
        """A sentence for every stage that is left out or unchecked."""
        return [*(f"{name} is left out: {reason}." for name, reason in self.left_out.items()),
                *(f"{name} is unchecked: {reason}." for name, reason in self.unchecked.items())]


def stage_config(stage: Stage, where: str) -> Any:
    """The stage's settings, parsed as its command line would be. InputError names `where`."""
    try:
        return parse(KINDS[stage.kind], stage.kind, to_flags(stage.values))
    except InputError as error:
        raise InputError(f"{where}: {stage.kind}: {error}") from None
    except SystemExit:  # tyro has drawn a box around what is wrong, with the setting's help
        raise InputError(f"{where}: {stage.kind}: no value for that setting; see above") from None


def read_progress(root: Path) -> Progress:
    """Compare the stages of root/recipe.yaml with their settings, inputs and outputs as they are now.

    Raises InputError if no stage has run, or for a recipe or run.json that srit did not write.
    """
    file = root / "recipe.yaml"
    if not file.is_file():
        raise InputError(f"{root}: no recipe.yaml there, so no stage has run there; give the "
                         "output_dir of `srit run`")
    progress = Progress(root, read_recipe(file))
    unusable: dict[Path, str] = {}  # output_dir and state of stages that no other may be made from
    for stage in stages(progress.recipe):
        # The run may have been moved or copied; stage.output_dir is where it was made.
        run = _read_record(root / stage.name, stage)
        if run is None:
            unusable[stage.output_dir] = f"{stage.name}, which has not run"
            continue
        progress.runs[stage.name] = run
        cfg = stage_config(stage, str(file))
        bases = [state for folder, state in unusable.items()
                 if any(folder in Path(path).parents for path in run["inputs"])]
        if bases:
            progress.left_out[stage.name] = f"it was made from {bases[0]}"
        else:
            _compare(progress, stage.name, cfg)
        if stage.name in progress.left_out:
            unusable[stage.output_dir] = f"{stage.name}, which is left out"
        elif not run["finished"]:
            unusable[stage.output_dir] = f"{stage.name}, which has not finished"
    if not progress.runs:
        raise InputError(f"{root}: no stage has run there; give the output_dir of `srit run`")
    return progress


def _compare(progress: Progress, name: str, cfg: Any) -> None:
    """Enter the stage in left_out or unchecked if it belongs there."""
    run, folder = progress.runs[name], progress.root / name
    outputs = {file: digest for file, digest in run.get("outputs", {}).items()
               if (folder / file).is_file()}
    package = Path(srit.__file__).parent.parent  # hash_files names srit's own files from there
    gone = [path for path in run["inputs"] if not (Path(path).is_file() or (package / path).is_file())]
    gone += [str(folder / file) for file in run.get("outputs", {}) if file not in outputs]
    changed = (settings_difference(run, cfg, CHANGEABLE - LENGTH)
               or changed_output({"outputs": outputs}, folder)
               or not gone and changed_input(run, hash_files(stage_inputs(cfg))))
    if changed:
        progress.left_out[name] = changed
    elif gone:
        progress.unchecked[name] = f"{gone[0]} is gone"


def _read_record(folder: Path, stage: Stage) -> dict | None:
    """run.json, with every field that a report shows; None if the stage has not begun."""
    run, where = read_run(folder), str(folder / "run.json")
    if run is None:
        return None
    if run["stage"] != stage.kind:
        raise InputError(f"{where}: stage is {run['stage']!r}, the recipe has '{stage.kind}' there")
    for key, kind in FIELDS.items():
        require(run, key, kind, where)
    for key, kind in FINISHED_FIELDS.items():
        if run["finished"] or key in run:
            require(run, key, kind, where)
    for what, count in run.get("counts", {}).items():
        require(run["counts"], what, dict, f"{where}: counts")
        for key, kind in COUNTS_FIELDS.items():
            require(count, key, kind, f"{where}: counts: {what}")
        for key in ("equations", "false_equations") if "equations" in count else ():
            require(count, key, int, f"{where}: counts: {what}")
        for reason in count["dropped"]:
            require(count["dropped"], reason, int, f"{where}: counts: {what}: dropped")
    for name in OUTPUTS.get(stage.kind, ()) if run["finished"] else ():
        require(run["outputs"], name, str, f"{where}: outputs")
    return run
