"""The report of an invented run: complete, self-contained, and safe against model output."""

import json
import random
import re

import pytest
from tiny import write_rows

from srit.commands.chart import line_chart, ticks
from srit.commands.report import ReportConfig, change, describe, main, verdicts, write_report
from srit.grading.statistics import summarize_generations
from srit.runtime.files import InputError
from srit.runtime.jsonl import read_jsonl

NASTY = "<script>alert(1)</script> | pipe\nThe answer is 7."


def fake_run(root, seed=0, stages=("eval-base", "sft", "eval-sft", "sample", "pair", "dpo",
                                   "eval-dpo")):
    """A run directory with invented numbers."""
    rng = random.Random(seed)
    root.mkdir(parents=True, exist_ok=True)
    (root / "recipe.yaml").write_text(
        "model_name_or_path: some/model\noutput_dir: out/fake\n"
        "data: {demos: [d], in_domain: [sums]}\nsft: {learning_rate: 2e-4}\n")
    for at, name in enumerate(stages):
        (root / name).mkdir()
        run = {"stage": name.split("-")[0], "finished": True, "machine": "a machine",
               "versions": {"python": "3.11", "torch": "2.13"}, "commit": "abc", "seconds": 90,
               "parent": "some/model", "config": {},
               "counts": {"rows": {"in": 10, "used": 8, "dropped": {"too long": 2}}}}
        (root / name / "run.json").write_text(json.dumps(run))
        if name.startswith("eval"):
            rows = []
            for dataset in ("sums", "other"):
                for i in range(60):
                    right = rng.random() < 0.2 + 0.1 * at
                    rows.append({
                        "id": f"{dataset}-{i}", "dataset": dataset, "task": "math", "sample": 0,
                        "question": f"How many are {i} and {7 - i}?", "answer": "7",
                        "text": NASTY if i == 0 else f"It is {'7' if right else '8'}.",
                        "extracted": "7" if right else "8", "correct": right,
                        "correct_strict": right, "finished": True, "n_tokens": 12})
            write_rows(root / name / "generations.jsonl", rows)
            files = {f"{dataset}.jsonl": {
                **summarize_generations(r for r in rows if r["dataset"] == dataset),
                "dataset": dataset, "in_domain": dataset == "sums"} for dataset in ("sums", "other")}
            (root / name / "results.json").write_text(json.dumps({"files": files}))
        if name in ("sft", "dpo"):
            rows = [{"step": s, "loss": 1 / s, "rewards/margins": s / 10, "rewards/chosen": s / 20,
                     "rewards/rejected": -s / 20, "rewards/accuracies": 0.5 + s / 50,
                     "logps/chosen": -60.0 - s, "logps/rejected": -70.0 - 3 * s}
                    for s in range(1, 21)]
            write_rows(root / name / "metrics.jsonl", rows)
        if name == "pair":
            pair = {"chosen": [{"content": "long " * 20}], "rejected": [{"content": "7"}],
                    "chosen_source": "self", "rejected_correct": True, "rejected_style": "direct"}
            write_rows(root / name / "pairs.jsonl", [pair])
    return root


def test_the_page_is_complete_and_self_contained(tmp_path):
    root = fake_run(tmp_path / "fake")
    page = write_report([root]).read_text()
    assert page.count("<figure>") == 5
    for text in ("Baseline", "Instructed", "Self-refined", "all in domain", "out of domain",
                 "rewards/margins", "too long", "Self-refinement fixed", "learning_rate 2e-4"):
        assert text in page
    assert not re.search(r"(src|href)\s*=|@import|url\(", page)
    assert "log π(chosen) fell" in page and "teach style, not truth" in page
    markdown = (root / "report.md").read_text()
    assert "| sums | 60 |" in markdown and "| model | finished |" in markdown
    for line in markdown.splitlines():
        if line.startswith("|--"):
            assert line.endswith("|")


def test_model_output_is_escaped(tmp_path):
    root = fake_run(tmp_path / "fake")
    page = write_report([root]).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    table = [line for line in (root / "report.md").read_text().splitlines() if "pipe" in line]
    assert table and all("\\| pipe" in line for line in table)


def test_skipped_steps_are_a_gap_in_the_curve(tmp_path):
    """Where every step was skipped, metrics.jsonl has null."""
    root = fake_run(tmp_path / "fake")
    log = root / "sft" / "metrics.jsonl"
    whole = write_report([root]).read_text().count("<svg")
    log.write_text(log.read_text() + json.dumps({"step": 10**6, "loss": None}) + "\n")
    page = write_report([root]).read_text()
    assert page.count("<svg") == whole > 0


def test_accuracies_are_those_of_the_generations(tmp_path):
    root = fake_run(tmp_path / "fake")
    rows = read_jsonl(root / "eval-sft/generations.jsonl")
    expected = sum(r["correct"] for r in rows if r["dataset"] == "sums") / 60
    found = describe(root)["accuracy"][0]
    assert found["name"] == "sums" and found["in_domain"] and found["n"] == 60
    assert found["cells"][1]["accuracy"] == pytest.approx(expected)
    low, high = found["cells"][1]["interval"]
    assert low < expected < high


def changed(before, after):
    """The change from the instructed to the self-refined model, both given by what they got right."""
    generations = {name: [{"id": i, "dataset": "d", "sample": 0, "correct": c}
                          for i, c in enumerate(correct)]
                   for name, correct in (("eval-sft", before), ("eval-dpo", after))}
    return change(generations, ["d"])


def test_change_is_paired():
    found = changed([i < 4 for i in range(20)], [i < 2 or i >= 10 for i in range(20)])
    assert found["fixed"] == 10 and found["broken"] == 2
    assert found["points"] == pytest.approx(40)
    # two-sided exact McNemar: 2 (C(12,0) + C(12,1) + C(12,2)) / 2^12
    assert found["p"] == pytest.approx(2 * 79 / 4096)


def test_the_verdict_claims_no_more_than_the_test():
    def verdict(before, after):
        (sentence,) = verdicts([{"name": "d", "in_domain": None, "pooled": False,
                                 "change": changed(before, after)}])
        return sentence

    same = verdict([i % 2 == 0 for i in range(30)], [i % 2 == 0 or i == 1 for i in range(30)])
    assert "no measurable change" in same and "+3.3 points" in same
    worse = verdict([True] * 30, [i < 10 for i in range(30)])
    assert "fell behind the instructed one by 66.7 points" in worse


def test_an_unfinished_run_is_reported_as_far_as_it_got(tmp_path):
    page = write_report([fake_run(tmp_path / "half", stages=("eval-base", "sft"))]).read_text()
    assert "Baseline" in page and "No generations of" in page


def test_several_runs_add_a_combined_table(tmp_path):
    roots = [fake_run(tmp_path / str(s), seed=s) for s in range(3)]
    page = write_report(roots).read_text()
    assert "3 runs" in page
    assert "### 3 runs" in (roots[0] / "report.md").read_text()


def test_question_texts_can_be_left_out(tmp_path):
    root = fake_run(tmp_path / "fake")
    write_report([root], show_questions=False)
    for name in ("report.html", "report.md"):
        text = (root / name).read_text()
        assert "How many are" not in text and "sums-" in text


def test_a_directory_without_a_run_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no stage has run there"):
        main(ReportConfig([str(tmp_path)]))


def test_ticks_are_round():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-3, 17) == pytest.approx([0, 5, 10, 15])
    assert ticks(2, 2) == [2]


def test_charts_handle_flat_single_and_missing_values():
    assert line_chart("t", []) == ""
    assert "<svg" in line_chart("t", [("a", [(1, 2.0)])])
    assert "nan" not in line_chart("t", [("a", [(1, 2.0), (2, float("nan")), (3, 2.0)])])
