"""The evaluation script on a tiny model."""

import json

import pytest
from tiny import question, tiny_checkpoint, write_rows

from srit.config import EvalConfig
from srit.generation.loglikelihood import best_option
from srit.grading.statistics import wilson_interval
from srit.runtime.files import InputError
from srit.train.eval import main


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_checkpoint(folder / "m", scale=2.0)
    write_rows(folder / "sums.jsonl", [question(i, i, 2 * i) for i in range(6)])
    (folder / "colours").mkdir()
    write_rows(folder / "colours" / "dev.jsonl", [
        {"id": f"c{i}", "task": "choice", "question": f"Which thing is red, number {i}?",
         "choices": {"A": "blood", "B": "the sky", "C": "grass"}, "answer": "ABC"[i % 3]}
        for i in range(6)])
    return folder


def evaluate(world, output, *files, **flags):
    main(EvalConfig(model_name_or_path=str(world / "m"), output_dir=str(world / output),
                    eval_file=[str(world / f) for f in files], device="cpu", dtype="float32",
                    max_new_tokens=12, **flags))
    results = json.loads((world / output / "results.json").read_text())
    lines = (world / output / "generations.jsonl").read_text().splitlines()
    return results, [json.loads(line) for line in lines]


def test_eval_writes_accuracy_with_its_interval(world, capsys):
    results, rows = evaluate(world, "greedy", "sums.jsonl", "colours/dev.jsonl", in_domain=["sums"])
    names = {path.rpartition("/")[2]: part for path, part in results["files"].items()}
    sums, colours = names["sums.jsonl"], names["dev.jsonl"]
    assert (sums["n"], sums["dataset"], sums["in_domain"]) == (6, "sums", True)
    assert (colours["n"], colours["dataset"], colours["in_domain"]) == (6, "colours", False)
    right = sum(r["correct"] for r in rows if r["dataset"] == "colours")
    assert colours["accuracy"] == pytest.approx(right / 6)
    assert colours["interval"] == pytest.approx(list(wilson_interval(right, 6)))
    assert results["out_of_domain"]["n"] == 6 and results["in_domain"]["n"] == 6
    assert len(rows) == 12 and rows[0]["prompt"].endswith("assistant\n")
    printed = capsys.readouterr().out
    assert "colours (out)" in printed and "95 % interval" in printed
    run = json.loads((world / "greedy" / "run.json").read_text())
    assert run["finished"] and run["stage"] == "eval"


def test_eval_with_samples(world):
    results, rows = evaluate(world, "sampled", "sums.jsonl", num_samples=3, temperature=1.0)
    (part,) = results["files"].values()
    assert part["n"] == 6 and len(rows) == 18
    assert {"pass@1", "pass@2", "pass@3", "maj@3"} <= part.keys()
    assert part["in_domain"] is None and results["in_domain"] is None


def test_eval_by_options(world):
    results, rows = evaluate(world, "options", "colours/dev.jsonl", scoring="options")
    (part,) = results["files"].values()
    assert part["n"] == 6 and part["accuracy"] == sum(r["correct"] for r in rows) / 6
    assert {"accuracy_text", "accuracy_text_norm"} <= part.keys()
    assert rows[0]["extracted"] == best_option(rows[0]["logp_letter"])


@pytest.mark.parametrize("files, flags, message", [
    (["sums.jsonl"], {"scoring": "options"}, "needs multiple choice"),
    (["sums.jsonl", "sums.jsonl"], {}, "duplicate id"),
])
def test_what_cannot_be_evaluated_is_named(world, files, flags, message):
    with pytest.raises(InputError, match=message):
        evaluate(world, f"bad{message[:3]}", *files, **flags)
