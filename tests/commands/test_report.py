"""The report of an invented run: complete, self-contained, and safe against model output."""

import json
import re

import pytest
from fake_run import NAMES, RECIPE, fake_run
from tiny import write_rows

from srit.commands.chart import line_chart, ticks
from srit.commands.report import ReportConfig, change, describe, main, verdicts, write_report
from srit.commands.run import accuracy_table
from srit.runtime.files import InputError
from srit.runtime.jsonl import read_jsonl


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
    found = describe(root)["ways"][0]["accuracy"][0]
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
    page = write_report([fake_run(tmp_path / "half", names=("eval-base", "sft"))]).read_text()
    assert "Baseline" in page and "No generations of" in page


def test_only_runs_that_differ_by_their_seed_are_combined(tmp_path, monkeypatch):
    roots = [fake_run(tmp_path / str(seed), seed) for seed in range(2)]
    with pytest.raises(InputError, match="names one directory twice"):
        write_report([roots[0], roots[1] / ".." / "0"])
    monkeypatch.setattr("fake_run.RECIPE", RECIPE.replace("2e-4", "3e-4"))
    other = fake_run(tmp_path / "other")
    with pytest.raises(InputError, match=f"{other} has other settings than {roots[0]}"):
        write_report([*roots, other])
    monkeypatch.setattr("fake_run.RECIPE", RECIPE + "dtype: float32\n")
    other = fake_run(tmp_path / "float32")
    with pytest.raises(InputError, match=f"{other} has other settings than {roots[0]}"):
        write_report([*roots, other])


def test_several_runs_add_a_combined_table(tmp_path):
    roots = [fake_run(tmp_path / str(s), seed=s) for s in range(3)]
    page = write_report(roots).read_text()
    assert "3 runs" in page
    markdown = (roots[0] / "report.md").read_text()
    values = [describe(root)["ways"][0]["accuracy"][0]["cells"][1]["accuracy"] for root in roots]
    each = ", ".join(f"{100 * value:.1f}" for value in values)
    assert f"| {100 * sum(values) / 3:.1f} % ({each}) |" in markdown.split("### 3 runs")[1]
    assert f"<small>{each}</small>" in page


def parts(markdown):
    """{heading: what stands below it}"""
    found = [part.partition("\n") for part in markdown.split("\n## ")[1:]]
    return {heading: text for heading, _, text in found}


def test_without_and_with_the_calculator_are_two_tables(tmp_path):
    root = fake_run(tmp_path / "both", calculator="both")
    page = write_report([root]).read_text()
    below = parts((root / "report.md").read_text())
    marks = {", without the calculator": "", ", with the calculator": "_calculator"}
    for mark, end in marks.items():
        results = json.loads((root / f"eval-dpo/results{end}.json").read_text())
        accuracy = results["files"]["sums.jsonl"]["accuracy"]
        rows = [read_jsonl(root / f"eval-{name}/generations{end}.jsonl") for name in ("sft", "dpo")]
        before, after = ([r["correct"] for r in own if r["dataset"] == "sums"] for own in rows)
        row = next(line for line in below[f"Accuracy{mark}"].splitlines() if line.startswith("| sums"))
        assert f"| {100 * accuracy:.1f} % (" in row
        assert f"| {changed(before, after)['points']:+.1f} (p = " in row
        assert f"In domain{mark}: " in page and f"How they answer{mark}</h3>" in page
        assert ("With it is" in below[f"Generations{mark}"]) == bool(end)
    table = accuracy_table(root)
    assert all(f"data set{mark} " in table for mark in marks)


def test_what_was_answered_with_the_calculator_alone_says_so(tmp_path):
    root = fake_run(tmp_path / "with", calculator=True)
    write_report([root])
    below = parts((root / "report.md").read_text())
    assert [heading for heading in below if heading.startswith("Accuracy")] == [
        "Accuracy, with the calculator"]
    assert accuracy_table(root).startswith("data set, with the calculator ")
    with pytest.raises(InputError, match="other settings.*report each alone"):
        write_report([fake_run(tmp_path / "without"), root])


def test_the_report_says_how_samples_were_drawn(tmp_path):
    root = fake_run(tmp_path / "with", calculator=True)
    for text in (write_report([root]).read_text(), (root / "report.md").read_text()):
        assert ("The 2 answers of sample were drawn with the calculator; 1 of them hold results that "
                "it wrote." in text)
        assert "In 1 pairs a side holds results of the calculator" in text
    plain = write_report([fake_run(tmp_path / "without")]).read_text()
    assert "The 2 answers of sample were drawn without the calculator." in plain


def test_question_texts_can_be_left_out(tmp_path):
    root = fake_run(tmp_path / "fake")
    write_report([root], show_questions=False)
    for name in ("report.html", "report.md"):
        text = (root / name).read_text()
        assert "How many are" not in text and "sums-" in text


def test_a_directory_without_a_run_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no stage has run there"):
        main(ReportConfig([str(tmp_path)]))


def test_several_runs_must_have_the_same_evaluations(tmp_path):
    roots = [fake_run(tmp_path / "whole"), fake_run(tmp_path / "half", names=NAMES[:3])]
    with pytest.raises(InputError, match="half has evaluations .*whole has .*report each alone"):
        write_report(roots)


def test_a_log_that_srit_did_not_write_is_named(tmp_path):
    root = fake_run(tmp_path / "fake")
    for row, fault in (({"loss": 1.0}, "no field 'step'"), ({"step": 1, "loss": "x"}, "field 'loss'")):
        write_rows(root / "sft" / "metrics.jsonl", [row])
        with pytest.raises(InputError, match=f"metrics.jsonl:1: .*{fault}"):
            write_report([root])


def test_ticks_are_round():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-3, 17) == pytest.approx([0, 5, 10, 15])
    assert ticks(2, 2) == [2]


def test_charts_handle_flat_single_and_missing_values():
    assert line_chart("t", []) == ""
    assert "<svg" in line_chart("t", [("a", [(1, 2.0)])])
    assert "nan" not in line_chart("t", [("a", [(1, 2.0), (2, float("nan")), (3, 2.0)])])


def test_equations_of_the_training_rows_are_counted(tmp_path):
    root = fake_run(tmp_path / "fake")
    assert "equations" not in write_report([root]).read_text()
    record = root / "sft" / "run.json"
    run = json.loads(record.read_text())
    next(iter(run["counts"].values())).update(equations=1234, false_equations=5)
    record.write_text(json.dumps(run))
    assert "hold 1,234 equations, 5 of them false." in write_report([root]).read_text()
    assert "of sft hold 1234 equations, 5 of them false." in (root / "report.md").read_text()
