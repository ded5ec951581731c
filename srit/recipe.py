"""A recipe: one YAML file for the whole method, expanded into stages and the files between them.

Top level: settings that stages share (SHARED), `data` (demos, questions, eval, in_domain), `rounds`,
and one section per kind of stage (sft, sample, pair, dpo, eval) with keys of that stage's config.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from srit import config
from srit.runtime.files import InputError
from srit.runtime.limits import YAML_VALUES, check

KINDS = {"sft": config.SFTConfig, "sample": config.SampleConfig, "pair": config.PairConfig,
         "dpo": config.DPOConfig, "eval": config.EvalConfig}
SHARED = ("model_name_or_path", "output_dir", "seed", "dtype", "device",
          *vars(config.TemplateConfig()), *vars(config.QuestionConfig()))
DATA = ("demos", "questions", "eval", "in_domain")
DOCS = "docs/recipes.md"
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


@dataclass(frozen=True)
class Stage:
    """One step of a recipe: `kind` names the script train/KIND.py, `values` are its settings."""

    name: str
    kind: str
    values: dict[str, Any]

    @property
    def output_dir(self) -> Path:
        return Path(self.values["output_dir"])


def read_yaml(path: str | Path) -> dict:
    """Read a YAML mapping. Raises InputError naming file and line."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise InputError(f"{place}: not YAML ({getattr(error, 'problem', error)})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason})") from None
    except (ValueError, RecursionError) as error:  # February 30, an endless number; nested too deep
        raise InputError(f"{path}: not YAML ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of keys to values")
    _check_values(values, path)
    return values


class _Loader(yaml.SafeLoader):
    """The safe loader, which however takes the last of two equal keys."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key.value}' stands twice",
                                           problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def _check_values(values: dict, path: Path) -> None:
    """Raise InputError for a null character, which no file name may have, and for aliases of aliases
    that stand for more values than memory holds."""
    stack, count = [values], 0
    while stack:
        value, count = stack.pop(), count + 1
        if count > YAML_VALUES:
            raise InputError(f"{path}: more than {YAML_VALUES:,} values")
        if isinstance(value, dict | list):
            stack += [*value, *value.values()] if isinstance(value, dict) else value
        elif isinstance(value, str) and "\0" in value:
            raise InputError(f"{path}: {value!r:.80} holds a null character")


def check_keys(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise InputError for an unknown key; it names the nearest known one, if one is near."""
    known = list(known)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            advice = f"did you mean '{near[0]}'?" if near else f"{DOCS} lists all"
            raise InputError(f"{where}: unknown key '{key}'; {advice}")


def keys_of(cls: type) -> list[str]:
    """Names of the settings of a config class."""
    return [field.name for field in dataclasses.fields(cls)]


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read and check a recipe, with ${VARIABLE:-default} expanded. Raises InputError."""
    recipe = _expand(read_yaml(path), str(path))
    known = [*SHARED, "data", "rounds", *KINDS]
    check_keys(recipe, known, str(path))
    for key in ("model_name_or_path", "output_dir", "data"):
        if key not in recipe:
            raise InputError(f"{path}: no key '{key}'")
    for key in ("model_name_or_path", "output_dir"):
        check(isinstance(recipe[key], str) and recipe[key] != "", str(path), key, recipe[key],
              "a string, and not empty")
    if not isinstance(recipe["data"], dict):
        raise InputError(f"{path}: data: expected a mapping with {', '.join(DATA)}")
    check_keys(recipe["data"], DATA, f"{path}: data")
    for key in DATA:
        value = recipe["data"].get(key, [])
        names = recipe["data"][key] = [value] if isinstance(value, str) else value
        check(isinstance(names, list) and all(isinstance(name, str) for name in names),
              f"{path}: data", key, value, "a string or a list of strings")
    if not recipe["data"]["demos"]:
        raise InputError(f"{path}: data: demos names no file")
    for kind, cls in KINDS.items():
        section = recipe.setdefault(kind, None) or {}
        if not isinstance(section, dict):
            raise InputError(f"{path}: {kind}: expected a mapping")
        check_keys(section, keys_of(cls), f"{path}: {kind}")
        for key in ("model_name_or_path", "output_dir"):
            if key in section:
                raise InputError(f"{path}: {kind}: {key} may only stand at the top: each stage is "
                                 "given the model and the directory that the recipe makes for it")
        recipe[kind] = section
    rounds = recipe.setdefault("rounds", 1)
    if not isinstance(rounds, int) or rounds < 1:
        raise InputError(f"{path}: rounds: must be a positive integer, got {rounds!r}")
    return recipe


def stages(recipe: dict[str, Any]) -> list[Stage]:
    """Evaluate, SFT, evaluate, then `rounds` times: sample, pair, DPO, evaluate.

    Round n samples from the model of round n - 1, which is also its reference (arXiv 2407.18248).
    """
    root, data = Path(recipe["output_dir"]), recipe["data"]

    def stage(name: str, kind: str, **wiring: Any) -> Stage:
        known = keys_of(KINDS[kind])
        shared = {k: recipe[k] for k in SHARED if k in recipe and k in known}
        values = {**shared, **wiring, "output_dir": str(root / name), **recipe[kind]}
        return Stage(name, kind, values)

    def evaluation(name: str, model: str) -> list[Stage]:
        if not data["eval"]:
            return []
        return [stage(name, "eval", model_name_or_path=model, eval_file=data["eval"],
                      in_domain=data["in_domain"])]

    plan = evaluation("eval-base", recipe["model_name_or_path"])
    plan.append(stage("sft", "sft", train_file=data["demos"]))
    student = str(root / "sft")
    plan += evaluation("eval-sft", student)
    for number in range(1, recipe["rounds"] + 1):
        end = "" if number == 1 else f"-{number}"
        plan.append(stage(f"sample{end}", "sample", model_name_or_path=student,
                          train_file=data["questions"] or data["demos"]))
        plan.append(stage(f"pair{end}", "pair",
                          samples_file=[str(root / f"sample{end}" / "samples.jsonl")],
                          demos_file=data["demos"]))
        plan.append(stage(f"dpo{end}", "dpo", model_name_or_path=student,
                          train_file=[str(root / f"pair{end}" / "pairs.jsonl")]))
        student = str(root / f"dpo{end}")
        plan += evaluation(f"eval-dpo{end}", student)
    return plan


def stage_values(path: str | Path, kind: str) -> dict[str, Any]:
    """Settings of the first stage of this kind, which `train/KIND.py --config recipe.yaml` runs."""
    return next(stage.values for stage in stages(read_recipe(path)) if stage.kind == kind)


def _expand(value: Any, where: str) -> Any:
    """Replace ${NAME} and ${NAME:-default} in every string by environment variables."""
    if isinstance(value, dict):
        return {k: _expand(v, where) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, where) for v in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match) -> str:
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise InputError(f"{where}: the environment variable {match[1]} is not set")
        return found

    return VARIABLE.sub(fill, value)
