"""`srit report`: one self-contained HTML page, and Markdown, of what a run found.

Everything is read from the run's own files; a stage that has not run is shown as missing.
"""

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
from srit.grading.statistics import compare, wilson_interval
from srit.runtime.files import InputError, atomic_write
from srit.runtime.jsonl import read_jsonl
from srit.runtime.run_dir import read_run

LABELS = {"eval-base": "Baseline", "eval-sft": "Instructed", "eval-dpo": "Self-refined"}
CHARTS = (
    ("sft", "Instruct: loss", ("loss", "eval_loss")),
    ("dpo", "Self-refine: loss", ("loss", "eval_loss")),
    ("dpo", "Self-refine: rewards", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
    ("dpo", "Self-refine: reward accuracy", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("dpo", "Self-refine: log π(chosen), log π(rejected)", ("logps/chosen", "logps/rejected")),
)
EXAMPLES = 3  # of each kind


@dataclass
class ReportConfig:
    """Write report.html and report.md into a run directory."""

    run_dir: list[str]
    """Directory of `srit run`; several (other seeds of the same recipe) add a combined table."""
    show_questions: bool = True
    """False: name questions by id, for a page that must not pass on a data set's texts."""


def main(cfg: ReportConfig) -> None:
    print(write_report([Path(d) for d in cfg.run_dir], cfg.show_questions))


def write_report(roots: list[Path], show_questions: bool = True) -> Path:
    """report.html and report.md in the first of the run directories; the path of the page."""
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


def describe(root: Path) -> dict[str, Any]:
    """Everything the page shows, as plain data."""
    recipe_file = root / "recipe.yaml"
    if not root.is_dir() or not any(root.glob("*/run.json")):
        raise InputError(f"{root}: no stage has run there; give the output_dir of `srit run`")
    recipe = yaml.safe_load(recipe_file.read_text()) if recipe_file.is_file() else {}
    runs = {p.parent.name: read_run(p.parent) for p in root.glob("*/run.json")}
    models = [(name, label) for name, label in LABELS.items() if name in runs]
    models += [(name, f"Self-refined, round {name[9:]}")
               for name in sorted(runs) if name.startswith("eval-dpo-")]
    models = [(name, label) for name, label in models if _rows(root / name / "generations.jsonl")]
    generations = {name: _rows(root / name / "generations.jsonl") for name, _ in models}
    first = max(runs.values(), key=lambda run: run["finished"])
    pairs = _rows(root / "pair" / "pairs.jsonl")
    return {
        "title": recipe.get("output_dir") and Path(recipe["output_dir"]).name or root.name,
        "model": Path(str(recipe.get("model_name_or_path", first.get("parent")))).name,
        "date": time.strftime("%Y-%m-%d"),
        "machine": first["machine"], "versions": first["versions"], "commit": first["commit"],
        "stages": [{"name": name, "minutes": run.get("seconds", 0) / 60,
                    "finished": run["finished"]} for name, run in _in_order(runs)],
        "settings": _settings(recipe),
        "models": models,
        "accuracy": accuracy_rows(generations, recipe),
        "verdicts": verdicts(generations, recipe),
        "behaviour": behaviour(generations),
        "charts": [Markup(chart) for chart in _charts(root)],
        "warnings": warnings(root, pairs),
        "counts": _counts(runs),
        "pairs": pair_statistics(pairs),
        "examples": examples(generations),
        "markdown_curves": _curve_rows(root),
    }


def _rows(path: Path) -> list[dict]:
    return read_jsonl(path) if path.is_file() and path.stat().st_size else []


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


def _in_domain(recipe: dict, dataset: str) -> bool | None:
    names = (recipe.get("data") or {}).get("in_domain")
    return dataset in names if names else None


def _groups(generations: dict, recipe: dict) -> list[tuple[str, bool | None, list[str]]]:
    """(name, in domain?, data sets): every data set, then the pooled domains."""
    names = list(dict.fromkeys(r["dataset"] for rows in generations.values() for r in rows))
    names.sort(key=lambda n: _in_domain(recipe, n) is False)
    groups = [(name, _in_domain(recipe, name), [name]) for name in names]
    for inside, title in ((True, "all in domain"), (False, "all out of domain")):
        members = [n for n in names if _in_domain(recipe, n) is inside]
        if members:
            groups.append((title, inside, members))
    return groups


def accuracy_rows(generations: dict[str, list[dict]], recipe: dict) -> list[dict]:
    """One row a data set and pooled domain: n, every model's accuracy, and the paired change."""
    table = []
    for name, inside, members in _groups(generations, recipe):
        cells, n = [], 0
        for rows in generations.values():
            own = [r for r in rows if r["dataset"] in members]
            if not own:
                cells.append(None)
                continue
            n = len({(r["dataset"], r["id"]) for r in own})
            accuracy = mean(r["correct"] for r in own)
            cells.append({"accuracy": accuracy, "strict": mean(r["correct_strict"] for r in own),
                          "interval": wilson_interval(accuracy * n, n)})
        table.append({"name": name, "in_domain": inside, "pooled": len(members) > 1 or
                      name.startswith("all "), "n": n, "cells": cells,
                      "change": change(generations, members)})
    return table


def change(generations: dict[str, list[dict]], members: list[str]) -> dict | None:
    """Self-refined against instructed on the same questions: points and McNemar's p."""
    refined = [name for name in generations if name.startswith("eval-dpo")]
    if "eval-sft" not in generations or not refined:
        return None
    sides = []
    for name in ("eval-sft", refined[-1]):
        sides.append({(r["dataset"], r["id"]): r["correct"] for r in generations[name]
                      if r["dataset"] in members and r["sample"] == 0})
    if not sides[0] or sides[0].keys() != sides[1].keys():
        return None
    found = compare(*sides)
    return {"points": 100 * found.difference, "p": found.p_value, "fixed": found.only_b,
            "broken": found.only_a, "n": found.n}


def verdicts(generations: dict[str, list[dict]], recipe: dict) -> list[str]:
    """What the paired test says, in words, and no more than it says."""
    sentences = []
    for name, inside, members in _groups(generations, recipe):
        if not name.startswith("all ") and inside is not None:
            continue
        found = change(generations, members)
        if found is None:
            continue
        where = {True: "In domain", False: "Out of domain", None: name}[inside]
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


def behaviour(generations: dict[str, list[dict]]) -> list[dict]:
    return [{"finished": mean(r["finished"] for r in rows),
             "tokens": mean(r["n_tokens"] for r in rows),
             "unparsed": sum(r["extracted"] is None for r in rows), "n": len(rows)}
            for rows in generations.values()]


def _metrics(root: Path, stage: str) -> list[dict]:
    """Without nulls, the means of a window in which every step was skipped."""
    return [{name: value for name, value in row.items() if value is not None}
            for row in _rows(root / stage / "metrics.jsonl")]


def _charts(root: Path) -> list[str]:
    charts = []
    for stage, title, names in CHARTS:
        rows = _metrics(root, stage)
        series = [(n, [(r["step"], r[n]) for r in rows if n in r]) for n in names]
        charts.append(line_chart(title, series))
    return [chart for chart in charts if chart]


def _curve_rows(root: Path) -> list[tuple[str, str, float, float]]:
    """(stage, metric, first value, last value) for the Markdown page."""
    found = []
    for stage, _, names in CHARTS:
        for name in names:
            values = [r[name] for r in _metrics(root, stage) if name in r]
            if values:
                found.append((stage, name, values[0], values[-1]))
    return found


def warnings(root: Path, pairs: list[dict]) -> list[str]:
    """What a careful reader would point at."""
    found = []
    logps = [r["logps/chosen"] for r in _metrics(root, "dpo") if "logps/chosen" in r]
    if len(logps) >= 4:
        quarter = max(1, len(logps) // 4)
        fall = mean(logps[:quarter]) - mean(logps[-quarter:])
        if fall > 2:
            found.append(f"log π(chosen) fell by {fall:.1f} nats from the first to the last quarter "
                         "of self-refinement: consider rpo_alpha or a lower learning rate.")
    if pairs:
        statistics = pair_statistics(pairs)
        ratio = statistics["chosen_length"] / max(1.0, statistics["rejected_length"])
        if ratio > 1.5:
            found.append(f"Chosen answers are {ratio:.1f} times as long as rejected ones: length "
                         "may be what is learnt.")
        style = statistics["rejected_correct"] / len(pairs)
        if style > 0.1:
            found.append(f"In {100 * style:.0f} % of the pairs the rejected answer is right: they "
                         "teach style, not truth.")
    return found


def pair_statistics(pairs: list[dict]) -> dict | None:
    if not pairs:
        return None

    def length(side: str) -> float:
        return mean(len(p[side][0]["content"]) for p in pairs)

    return {"n": len(pairs), "from_self": sum(p["chosen_source"] == "self" for p in pairs),
            "from_teacher": sum(p["chosen_source"] == "teacher" for p in pairs),
            "rejected_correct": sum(p["rejected_correct"] for p in pairs),
            "rejected_direct": sum(p["rejected_style"] == "direct" for p in pairs),
            "chosen_length": length("chosen"), "rejected_length": length("rejected")}


def _counts(runs: dict) -> list[dict]:
    return [{"stage": name, "what": Path(what).parent.name if "/" in what else what, **count}
            for name, run in _in_order(runs) if not name.startswith("eval")
            for what, count in run.get("counts", {}).items()]


def examples(generations: dict[str, list[dict]]) -> list[dict]:
    """The first questions, in file order, of every kind: fixed, broken, both right, both wrong."""
    refined = [name for name in generations if name.startswith("eval-dpo")]
    if "eval-sft" not in generations or not refined:
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
        before, after = answers["eval-sft"], answers[refined[-1]]
        group = found[kinds[before["correct"], after["correct"]]]
        if len(group) < EXAMPLES:
            keys = ("id", "question", "answer", "dataset")
            group.append({**{key: before[key] for key in keys}, "choices": before.get("choices"),
                          "answers": [answers[name] for name in generations]})
    return [{"title": title, "rows": rows} for title, rows in found.items() if rows]


def combine(roots: list[Path]) -> dict:
    """Several seeds: mean, lowest and highest accuracy of every cell."""
    described = [describe(root) for root in roots]
    labels = [label for _, label in described[0]["models"]]
    rows = []
    for number, row in enumerate(described[0]["accuracy"]):
        cells = []
        for column in range(len(labels)):
            values = [d["accuracy"][number]["cells"][column]["accuracy"] for d in described
                      if d["accuracy"][number]["cells"][column]]
            cells.append({"mean": mean(values), "low": min(values), "high": max(values)})
        rows.append({"name": row["name"], "n": row["n"], "cells": cells, "pooled": row["pooled"]})
    return {"runs": len(roots), "labels": labels, "rows": rows}
