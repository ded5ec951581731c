"""`srit report`: the results of a run as one self-contained HTML page, and as Markdown.

Everything is read from the run's files. Stages that have not run or do not count (progress.py) are
left out, the latter with the reason.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import jinja2
from markupsafe import Markup

from srit.commands.chart import line_chart
from srit.commands.config import ReportConfig
from srit.commands.progress import Progress, read_progress
from srit.grading.pairs import summarize_pairs
from srit.grading.statistics import accuracy_rows, compare, summarize_generations
from srit.recipe import KINDS, SHARED
from srit.runtime.files import InputError, atomic_write
from srit.runtime.jsonl import has_rows, read_jsonl, read_lines, require

LABELS = {"eval-base": "Baseline", "eval-sft": "Instructed", "eval-dpo": "Self-refined"}
CHARTS = (
    ("sft", "Instruct: loss", ("loss", "eval_loss")),
    ("dpo", "Self-refine: loss", ("loss", "eval_loss")),
    ("dpo", "Self-refine: rewards", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
    ("dpo", "Self-refine: reward accuracy", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("dpo", "Self-refine: log π(chosen), log π(rejected)", ("logps/chosen", "logps/rejected")),
)
EXAMPLES = 3  # per kind


def main(cfg: ReportConfig) -> None:
    print(write_report([Path(d) for d in cfg.run_dir], cfg.show_questions))


def write_report(roots: list[Path], show_questions: bool = True) -> Path:
    """Write report.html and report.md into the first run directory. Returns the path of the page."""
    if len({root.resolve() for root in roots}) < len(roots):
        raise InputError("--run_dir names one directory twice, which would count as two seeds")
    described = [describe(root) for root in roots]
    context = described[0]
    if not show_questions:
        for example in (row for way in context["ways"] for group in way["examples"]
                        for row in group["rows"]):
            example["question"], example["choices"] = example["id"], None
    if len(roots) > 1:
        for way, seeds in zip(context["ways"], combine(roots, described), strict=True):
            way["seeds"] = seeds
    for root, other in zip(roots[1:], described[1:], strict=True):
        context["warnings"] += [f"{root}: {note}" for note in other["notes"]]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("srit"), trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=lambda name: name is not None and ".html" in name)
    environment.filters["percent"] = lambda x: "–" if x is None else f"{100 * x:.1f}"
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    for name in ("report.html", "report.md"):
        text = environment.get_template(f"{name}.jinja").render(context)
        with atomic_write(roots[0] / name) as handle:
            handle.write(text)
    return roots[0] / "report.html"


def label(name: str) -> str:
    """Label of the model that an evaluation stage evaluated."""
    return LABELS.get(name) or f"Self-refined, round {name.removeprefix('eval-dpo-')}"


def labels(progress: Progress, names: Iterable[str]) -> list[str]:
    """The labels of evaluation stages, with a mark where a stage could not be checked."""
    return [label(name) + (" (unchecked)" if name in progress.unchecked else "") for name in names]


@dataclass
class Way:
    """The evaluations in which the model had the calculator, or those in which it had not.

    A table, a test or an example is of one way: the calculator's share is no gain of the model.
    """

    mark: str = ""
    """What headings say of it."""
    results: dict[str, dict] = field(default_factory=dict)
    """results.json by stage name."""
    generations: dict[str, Path] = field(default_factory=dict)


def read_ways(progress: Progress) -> list[Way]:
    """The results of every finished evaluation that counts, without and with the calculator."""
    without, calculated = Way(), Way(", with the calculator")
    for name, run in progress.counting.items():
        for end in ("", "_calculator") if run["stage"] == "eval" and run["finished"] else ():
            file = progress.root / name / f"results{end}.json"
            rows = file.with_name(f"generations{end}.jsonl")
            if file.name in run["outputs"] and file.is_file() and rows.is_file():
                results = json.loads(file.read_text(encoding="utf-8"))
                require(results, "calculator", bool, str(file))
                way = calculated if results["calculator"] else without
                way.results[name], way.generations[name] = results, rows
    if calculated.results:
        without.mark = ", without the calculator"
    return [way for way in (without, calculated) if way.results]


def describe(root: Path) -> dict[str, Any]:
    """Everything the report shows, as plain data."""
    progress = read_progress(root)
    recipe, runs = progress.recipe, progress.counting
    first = max(progress.runs.values(), key=lambda run: run["finished"])
    file = root / "pair" / "pairs.jsonl"
    pairs = read_jsonl(file) if "pair" in runs and has_rows(file) else []
    curves = read_curves(root, runs)
    return {
        "title": Path(recipe["output_dir"]).name,
        "model": Path(recipe["model_name_or_path"]).name,
        "date": time.strftime("%Y-%m-%d"),
        "machine": first["machine"], "versions": first["versions"], "commit": first["commit"],
        "stages": [{"name": name, "minutes": _minutes(run) if name in runs else "left out"}
                   for name, run in progress.runs.items()],
        "settings": [(kind, ", ".join(f"{k} {v}" for k, v in values.items()))
                     for kind, values in _settings(recipe) if values],
        "ways": [describe_way(progress, way) for way in read_ways(progress)],
        "curves": curves,
        "charts": [Markup(chart) for _, title, series in curves
                   if (chart := line_chart(title, list(series.items())))],
        "notes": progress.notes,
        "warnings": progress.notes + warnings(curves, pairs),
        "counts": _counts(runs),
        "samples": _samples(root, runs),
        "pairs": summarize_pairs(pairs) if pairs else None,
    }


def describe_way(progress: Progress, way: Way) -> dict[str, Any]:
    """Accuracy, tests, behaviour and examples of the evaluations of one way."""
    generations = {name: read_jsonl(file) for name, file in way.generations.items()}
    accuracy = accuracy_rows(list(way.results.values()))
    for row in accuracy:
        row["change"] = change(generations, row["datasets"])
    return {
        "mark": way.mark,
        "evaluated": list(way.results),
        "labels": labels(progress, way.results),
        "accuracy": accuracy,
        "verdicts": verdicts(accuracy, way.mark),
        "behaviour": [{**summarize_generations(rows), "rows": len(rows)}
                      for rows in generations.values()],
        "examples": examples(generations),
    }


def _minutes(run: dict) -> str:
    return f"{run['seconds'] / 60:.1f}" if run["finished"] else "unfinished"


def _before_and_after(generations: dict[str, list[dict]]) -> tuple[str, str] | None:
    """Names of the instructed and the last self-refined model, if both were evaluated."""
    refined = [name for name in generations if name.startswith("eval-dpo")]
    return ("eval-sft", refined[-1]) if refined and "eval-sft" in generations else None


def change(generations: dict[str, list[dict]], datasets: list[str]) -> dict | None:
    """Self-refined against instructed on the same questions: points and McNemar's p-value."""
    names = _before_and_after(generations)
    if names is None:
        return None
    before, after = ({(r["dataset"], r["id"]): r["correct"] for r in generations[name]
                      if r["dataset"] in datasets and r["sample"] == 0} for name in names)
    if not before or before.keys() != after.keys():
        return None
    found = compare(before, after)
    return {"points": 100 * found.difference, "p": found.p_value, "fixed": found.only_b,
            "broken": found.only_a, "n": found.n}


def verdicts(rows: list[dict], mark: str = "") -> list[str]:
    """The paired test in words: a sentence per domain, or per data set if there are no domains.

    mark: of the way (see Way) to which the rows belong.
    """
    sentences = []
    for row in rows:
        found, inside = row["change"], row["in_domain"]
        if found is None or not row["pooled"] and inside is not None:
            continue
        where = {True: "In domain", False: "Out of domain", None: row["name"]}[inside] + mark
        if found["p"] < 0.05:
            what = "improved on" if found["points"] > 0 else "fell behind"
            sentences.append(f"{where}: the self-refined model {what} the instructed one by "
                             f"{abs(found['points']):.1f} points")
        else:
            sentences.append(f"{where}: no measurable change from the instructed to the "
                             f"self-refined model ({found['points']:+.1f} points)")
        sentences[-1] += (f" (n = {found['n']}, {found['fixed']} fixed, {found['broken']} broken, "
                          f"p = {found['p']:.3g}).")
    return sentences


def read_curves(root: Path, stages: Iterable[str]
                ) -> list[tuple[str, str, dict[str, list[tuple[int, float]]]]]:
    """(stage, title, {metric: (step, value) points}) of every chart of these stages.

    A metric is null where every step was skipped; these points are left out.
    """
    curves = []
    for stage, title, names in CHARTS:
        path = root / stage / "metrics.jsonl"
        series = {name: [] for name in names}
        for where, row in read_lines(path) if stage in stages and has_rows(path) else ():
            require(row, "step", int, where)
            for name in names:
                if row.get(name) is not None:
                    require(row, name, int | float, where)
                    series[name].append((row["step"], row[name]))
        curves.append((stage, title, {name: points for name, points in series.items() if points}))
    return curves


def warnings(curves: list[tuple[str, str, dict]], pairs: list[dict]) -> list[str]:
    """Signs of common faults in preference training."""
    found = []
    logps = [value for _, _, series in curves for _, value in series.get("logps/chosen", [])]
    if len(logps) >= 4:
        quarter = max(1, len(logps) // 4)
        fall = mean(logps[:quarter]) - mean(logps[-quarter:])
        if fall > 2:
            found.append(f"log π(chosen) fell by {fall:.1f} nats from the first to the last quarter "
                         "of self-refinement: consider rpo_alpha or a lower learning rate.")
    if pairs:
        summary = summarize_pairs(pairs)
        ratio = summary["chosen_mean_characters"] / max(1.0, summary["rejected_mean_characters"])
        if ratio > 1.5:
            found.append(f"Chosen answers are {ratio:.1f} times as long as rejected ones: the model "
                         "may learn length.")
        style = summary["rejected_correct"] / len(pairs)
        if style > 0.1:
            found.append(f"In {100 * style:.0f} % of the pairs the rejected answer is right: they "
                         "teach style, not truth.")
    return found


def _counts(runs: dict) -> list[dict]:
    return [{"stage": name, "what": Path(what).parent.name if "/" in what else what, **count}
            for name, run in runs.items() if not name.startswith("eval")
            for what, count in run.get("counts", {}).items()]


def _samples(root: Path, runs: dict) -> list[dict]:
    """How the samples of each round were drawn, and how many hold what the calculator wrote."""
    found = []
    for name, run in runs.items():
        file = root / name / "samples.jsonl"
        if run["stage"] == "sample" and run["finished"] and file.is_file():
            require(run["config"], "calculator", bool, f"{root / name / 'run.json'}: config")
            forced = ["forced" in row for _, row in read_lines(file)]
            found.append({"stage": name, "calculator": run["config"]["calculator"],
                          "rows": len(forced), "forced": sum(forced)})
    return found


def examples(generations: dict[str, list[dict]]) -> list[dict]:
    """The first questions in file order of each kind: fixed, broken, both right, both wrong."""
    names = _before_and_after(generations)
    if names is None:
        return []
    by_key: dict[tuple, dict[str, dict]] = defaultdict(dict)
    for name, rows in generations.items():
        for row in rows:
            if row["sample"] == 0:
                by_key[row["dataset"], row["id"]][name] = row
    kinds = {(False, True): "Self-refinement fixed", (True, False): "Self-refinement broke",
             (True, True): "Right before and after", (False, False): "Wrong before and after"}
    found: dict[str, list[dict]] = {title: [] for title in kinds.values()}
    for answers in by_key.values():
        if len(answers) != len(generations):
            continue
        before, after = (answers[name] for name in names)
        group = found[kinds[before["correct"], after["correct"]]]
        if len(group) < EXAMPLES:
            keys = ("id", "question", "answer", "dataset")
            group.append({**{key: before[key] for key in keys}, "choices": before.get("choices"),
                          "answers": [answers[name] for name in generations]})
    return [{"title": title, "rows": rows} for title, rows in found.items() if rows]


def _settings(recipe: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What the recipe sets for all stages, without what may differ between seeds; then for each."""
    free = "model_name_or_path", "output_dir", "seed", "device", "date"
    shared = {"model": Path(recipe["model_name_or_path"]).name, "dtype": KINDS["eval"].dtype}
    shared |= {key: recipe[key] for key in SHARED if key in recipe and key not in free}
    return [("all stages", shared), *((kind, recipe[kind]) for kind in KINDS)]


def combine(roots: Sequence[Path], described: Sequence[dict]) -> list[dict]:
    """For each way, mean accuracy over several runs and that of each, for every cell of the table.

    Raises InputError unless all runs have the same settings and evaluations of the same data sets.
    """
    for root, other in zip(roots, described, strict=True):
        if other["settings"] != described[0]["settings"]:
            raise InputError(f"{root} has other settings than {roots[0]}, so they are not two seeds of "
                             "one recipe; report each alone")
    shapes = [[f"{', '.join(way['evaluated'])} of {', '.join(row['name'] for row in way['accuracy'])}"
               f"{way['mark']}" for way in d["ways"]] for d in described]
    for root, shape in zip(roots, shapes, strict=True):
        if shape != shapes[0]:
            raise InputError(f"{root} has evaluations {shape}, {roots[0]} has {shapes[0]}; finish both "
                             "with `srit run`, or report each alone")
    return [_combine_way(ways) for ways in zip(*(d["ways"] for d in described), strict=True)]


def _combine_way(ways: Sequence[dict]) -> dict:
    rows = []
    for same in zip(*(way["accuracy"] for way in ways), strict=True):
        cells = []
        for column in zip(*(row["cells"] for row in same), strict=True):
            values = [cell["accuracy"] for cell in column]
            cells.append({"mean": mean(values), "runs": values})
        rows.append({"name": same[0]["name"], "n": same[0]["n"], "cells": cells,
                     "pooled": same[0]["pooled"]})
    marked = [max(column, key=len) for column in zip(*(way["labels"] for way in ways), strict=True)]
    return {"runs": len(ways), "labels": marked, "rows": rows}
