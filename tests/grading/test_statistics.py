"""Statistics with numbers worked out by hand, and the evaluation script on a tiny model."""

import json

import pytest
import torch
from tiny import question, tiny_checkpoint, write_rows

from srit.generation.loglikelihood import best, completion_logps
from srit.grading.statistics import (
    compare,
    majority_correct,
    pass_at_k,
    pool,
    summarise,
    wilson_interval,
)
from srit.models import KVCache, load_model


def test_wilson_interval():
    """5 of 10, z² = 3.8415: centre 0.5, half width 1.96·sqrt(.025 + .0960)/1.38415 = 0.26341."""
    assert wilson_interval(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    low, high = wilson_interval(0, 10)  # upper end z²/(n + z²)
    assert low == 0 and high == pytest.approx(3.8414588 / 13.8414588)
    low, high = wilson_interval(10, 10)
    assert low == pytest.approx(10 / 13.8414588) and high == pytest.approx(1)
    assert wilson_interval(0, 0) == (0, 1)


def test_pass_at_k():
    """5 samples, 2 right: k = 1 gives 2/5, k = 2 gives 1 - C(3,2)/C(5,2) = 1 - 3/10."""
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    assert pass_at_k(5, 2, 4) == 1  # only 3 wrong ones: 4 cannot all be wrong
    assert pass_at_k(5, 0, 3) == 0 and pass_at_k(4, 4, 1) == 1
    with pytest.raises(ValueError, match="pass@6"):
        pass_at_k(5, 2, 6)


def test_majority():
    assert majority_correct(["7", "8", "7"], [True, False, True])
    assert not majority_correct(["7", "8", "8"], [True, False, False])
    assert majority_correct(["7", "8"], [True, False])  # a tie: the first
    assert majority_correct([None, None, "7"], [False, False, True])  # silence does not vote
    assert not majority_correct([None, None], [False, False])


def test_compare_is_mcnemars_exact_test():
    """1 against 5 discordant questions: p = 2·(C(6,0) + C(6,1))/2^6 = 14/64."""
    a = dict(zip("abcdefgh", [1, 1, 0, 0, 0, 0, 0, 1], strict=True))
    b = dict(zip("abcdefgh", [1, 0, 1, 1, 1, 1, 1, 1], strict=True))
    paired = compare(a, b)
    assert (paired.n, paired.both, paired.only_a, paired.only_b) == (8, 2, 1, 5)
    assert paired.p_value == pytest.approx(14 / 64) and paired.difference == 0.5
    assert compare(a, a).p_value == 1
    with pytest.raises(ValueError, match="not the same questions"):
        compare(a, {"a": True})


def row(name: str, sample: int, extracted: str | None, correct: bool, tokens: int = 10) -> dict:
    return {"id": name, "sample": sample, "extracted": extracted, "correct": correct,
            "correct_strict": False, "finished": extracted is not None, "n_tokens": tokens}


def test_summarise_greedy():
    rows = [row("a", 0, "1", True), row("b", 0, "2", False), row("c", 0, None, False, 40)]
    result = summarise(rows)
    assert result["n"] == 3 and result["accuracy"] == pytest.approx(1 / 3)
    assert result["interval"] == pytest.approx(list(wilson_interval(1, 3)))
    assert result["accuracy_strict"] == 0 and result["unparsed"] == 1
    assert result["finish_rate"] == pytest.approx(2 / 3) and result["mean_tokens"] == 20
    assert not any("@" in key for key in result)


def test_summarise_samples():
    """a: right 2 of 3, so pass@2 = 1 - C(1,2)/C(3,2) = 1; b: right 1 of 3, pass@2 = 1 - 1/3."""
    rows = [row("a", 0, "1", True), row("a", 1, "1", True), row("a", 2, "3", False),
            row("b", 0, "5", False), row("b", 1, "5", False), row("b", 2, "2", True)]
    result = summarise(rows)
    assert result["n"] == 2 and result["samples"] == 3
    assert result["accuracy"] == result["pass@1"] == pytest.approx(0.5)
    assert result["pass@2"] == pytest.approx((1 + 2 / 3) / 2) and result["pass@3"] == 1
    assert result["maj@3"] == 0.5
    assert result["interval"] == pytest.approx(list(wilson_interval(1, 2)))


def test_pool_weighs_questions_and_files():
    files = [{"n": 10, "accuracy": 0.5, "accuracy_strict": 0.4},
             {"n": 30, "accuracy": 0.1, "accuracy_strict": 0.0}]
    pooled = pool(files)
    assert pooled["n"] == 40 and pooled["accuracy"] == pytest.approx(0.2)
    assert pooled["macro_accuracy"] == pytest.approx(0.3)
    assert pooled["accuracy_strict"] == pytest.approx(0.1)
    assert pooled["interval"] == pytest.approx(list(wilson_interval(8, 40)))
    assert pool([]) is None


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
    from srit.config import EvalConfig
    from srit.train.eval import main

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


def test_option_scores_are_those_of_the_plain_forward(world):
    model, _ = load_model(world / "m")
    prompt, completions = [5, 6, 7, 8, 9], [[10], [11, 12, 13], [14, 15]]
    cache = KVCache(model.config, 4, 16)
    for _ in range(2):  # the cache is used again
        got = completion_logps(model, cache, prompt, completions)
        for value, completion in zip(got, completions, strict=True):
            with torch.no_grad():
                logp = model(torch.tensor([prompt + completion]))[0].log_softmax(-1)
            expected = sum(logp[len(prompt) - 1 + i, t] for i, t in enumerate(completion))
            assert float(value) == pytest.approx(float(expected), abs=1e-4)


def test_best_option():
    logps = {"A": -3.0, "B": -4.0}
    assert best(logps) == "A"
    assert best(logps, {"A": "xy", "B": "wxyz"}) == "B"  # -1.5 and -1 a character


def test_eval_by_options(world):
    results, rows = evaluate(world, "options", "colours/dev.jsonl", scoring="options")
    (part,) = results["files"].values()
    assert part["n"] == 6 and part["accuracy"] == sum(r["correct"] for r in rows) / 6
    assert {"accuracy_text", "accuracy_text_norm"} <= part.keys()
    assert rows[0]["extracted"] == best(rows[0]["logp_letter"])


@pytest.mark.parametrize("files, flags, message", [
    (["sums.jsonl"], {"scoring": "options"}, "needs multiple choice"),
    (["sums.jsonl", "sums.jsonl"], {}, "stands already in"),
])
def test_what_cannot_be_evaluated_is_named(world, files, flags, message):
    from srit.runtime.files import InputError

    with pytest.raises(InputError, match=message):
        evaluate(world, f"bad{message[:3]}", *files, **flags)
