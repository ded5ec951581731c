"""`srit report`: the results of a run as one self-contained HTML page, and as Markdown.

Everything is read from the run's files. Stages that have not run are left out.
"""

import json
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from srit.commands.chart import line_chart
from srit.grading.pairs import summarize_pairs
from srit.grading.statistics import accuracy_rows, compare, summarize_generations
from srit.runtime.files import InputError, atomic_write
from srit.runtime.jsonl import has_rows, read_jsonl
from srit.runtime.run_dir import read_run

LABELS = {"eval-base": "Baseline", "eval-sft": "Instructed", "eval-dpo": "Self-refined"}
CHARTS = (
    ("sft", "Instruct: loss", ("loss", "eval_loss")),
    ("dpo", "Self-refine: loss", ("loss", "eval_loss")),
    ("dpo", "Self-refine: rewards", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
    ("dpo", "Self-refine: reward accuracy", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("dpo", "Self-refine: log π(chosen), log π(rejected)", ("logps/chosen", "logps/rejected")),
)
EXAMPLES = 3  # per kind


@dataclass
class ReportConfig:
    """Write report.html and report.md into a run directory."""

    run_dir: list[str]
    """Directory of `srit run`. More (other seeds of the same recipe) add a combined table."""
    show_questions: bool = True
    """False: show the ids of questions instead of their texts, which may not be redistributed."""


def main(cfg: ReportConfig) -> None:
    print(write_report([Path(d) for d in cfg.run_dir], cfg.show_questions))


def write_report(roots: list[Path], show_questions: bool = True) -> Path:
    """Write report.html and report.md into the first run directory. Returns the path of the page."""
    context = describe(roots[0])
    if not show_questions:
        for example in (row for group in context["examples"] for row in group["rows"]):
            example["question"], example["choices"] = example["id"], None
    context["seeds"] = combine(roots) if len(roots) > 1 else None
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


def read_results(root: Path) -> dict[str, dict]:
    """{stage name: results.json} of every finished evaluation of a run."""
    names = [*LABELS, *sorted(p.name for p in root.glob("eval-dpo-*"))]
    files = {name: root / name / "results.json" for name in names}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def describe(root: Path) -> dict[str, Any]:
    """Everything the report shows, as plain data."""
    recipe_file = root / "recipe.yaml"
    if not root.is_dir() or not any(root.glob("*/run.json")):
        raise InputError(f"{root}: no stage has run there; give the output_dir of `srit run`")
    recipe = yaml.safe_load(recipe_file.read_text()) if recipe_file.is_file() else {}
    runs = {p.parent.name: read_run(p.parent) for p in root.glob("*/run.json")}
    results = read_results(root)
    generations = {name: read_jsonl(root / name / "generations.jsonl") for name in results}
    accuracy = accuracy_rows(list(results.values()))
    for row in accuracy:
        row["change"] = change(generations, row["datasets"])
    first = max(runs.values(), key=lambda run: run["finished"])
    pairs = _rows(root / "pair" / "pairs.jsonl")
    curves = read_curves(root)
    return {
        "title": recipe.get("output_dir") and Path(recipe["output_dir"]).name or root.name,
        "model": Path(str(recipe.get("model_name_or_path", first.get("parent")))).name,
        "date": time.strftime("%Y-%m-%d"),
        "machine": first["machine"], "versions": first["versions"], "commit": first["commit"],
        "stages": [{"name": name, "minutes": run.get("seconds", 0) / 60,
                    "finished": run["finished"]} for name, run in _in_order(runs)],
        "settings": _settings(recipe),
        "labels": [label(name) for name in results],
        "accuracy": accuracy,
        "verdicts": verdicts(accuracy),
        "behaviour": [{**summarize_generations(rows), "rows": len(rows)}
                      for rows in generations.values()],
        "curves": curves,
        "charts": [Markup(chart) for _, title, series in curves
                   if (chart := line_chart(title, list(series.items())))],
        "warnings": warnings(curves, pairs),
        "counts": _counts(runs),
        "pairs": summarize_pairs(pairs) if pairs else None,
        "examples": examples(generations),
    }


def _rows(path: Path) -> list[dict]:
    return read_jsonl(path) if has_rows(path) else []


def _in_order(runs: dict) -> list[tuple[str, dict]]:
    order = ("eval-base", "sft", "eval-sft", "sample", "pair", "dpo", "eval-dpo")

    def place(name: str) -> tuple[int, int]:
        base, _, number = name.rpartition("-")
        round_ = int(number) if number.isdigit() else 1
        stem = base if number.isdigit() else name
        return round_, order.index(stem) if stem in order else len(order)

    return sorted(runs.items(), key=lambda item: place(item[0]))


def _settings(recipe: dict) -> list[tuple[str, str]]:
    shown = []
    for kind in ("sft", "sample", "pair", "dpo", "eval"):
        values = recipe.get(kind) or {}
        if values:
            shown.append((kind, ", ".join(f"{k} {v}" for k, v in values.items())))
    return shown


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


def verdicts(rows: list[dict]) -> list[str]:
    """The paired test in words: a sentence per domain, or per data set if there are no domains."""
    sentences = []
    for row in rows:
        found, inside = row["change"], row["in_domain"]
        if found is None or not row["pooled"] and inside is not None:
            continue
        where = {True: "In domain", False: "Out of domain", None: row["name"]}[inside]
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


def read_curves(root: Path) -> list[tuple[str, str, dict[str, list[tuple[int, float]]]]]:
    """(stage, title, {metric: (step, value) points}) of every chart.

    A metric is null where every step was skipped; these points are left out.
    """
    curves = []
    for stage, title, names in CHARTS:
        rows = _rows(root / stage / "metrics.jsonl")
        series = {name: [(r["step"], r[name]) for r in rows if r.get(name) is not None]
                  for name in names}
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
            for name, run in _in_order(runs) if not name.startswith("eval")
            for what, count in run.get("counts", {}).items()]


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


def combine(roots: list[Path]) -> dict:
    """Mean, lowest and highest accuracy over several seeds, for every cell of the table."""
    described = [describe(root) for root in roots]
    labels = described[0]["labels"]
    rows = []
    for number, row in enumerate(described[0]["accuracy"]):
        cells = []
        for column in range(len(labels)):
            values = [d["accuracy"][number]["cells"][column]["accuracy"] for d in described
                      if d["accuracy"][number]["cells"][column]]
            cells.append({"mean": mean(values), "low": min(values), "high": max(values)})
        rows.append({"name": row["name"], "n": row["n"], "cells": cells, "pooled": row["pooled"]})
    return {"runs": len(roots), "labels": labels, "rows": rows}
