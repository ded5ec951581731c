"""Statistics of evaluation, against numbers worked out by hand."""

import pytest

from srit.grading.statistics import (
    accuracy_rows,
    compare,
    majority_correct,
    pass_at_k,
    pool,
    summarize_generations,
    wilson_interval,
)


def test_wilson_interval_by_hand():
    """5 of 10, z² = 3.8415: centre 0.5, half width 1.96·sqrt(.025 + .0960)/1.38415 = 0.26341."""
    assert wilson_interval(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    low, high = wilson_interval(0, 10)  # upper end z²/(n + z²)
    assert low == 0 and high == pytest.approx(3.8414588 / 13.8414588)
    low, high = wilson_interval(10, 10)
    assert low == pytest.approx(10 / 13.8414588) and high == pytest.approx(1)
    assert wilson_interval(0, 0) == (0, 1)


def test_pass_at_k_by_hand():
    """5 samples, 2 right: k = 1 gives 2/5, k = 2 gives 1 - C(3,2)/C(5,2) = 1 - 3/10."""
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    assert pass_at_k(5, 2, 4) == 1  # only 3 wrong ones: 4 cannot all be wrong
    assert pass_at_k(5, 0, 3) == 0 and pass_at_k(4, 4, 1) == 1
    with pytest.raises(ValueError, match="pass@6"):
        pass_at_k(5, 2, 6)


def test_the_majority_decides_ties_go_to_the_first_and_silence_does_not_vote():
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


def test_summary_of_one_generation_per_question():
    rows = [row("a", 0, "1", True), row("b", 0, "2", False), row("c", 0, None, False, 40)]
    result = summarize_generations(rows)
    assert result["n"] == 3 and result["accuracy"] == pytest.approx(1 / 3)
    assert result["interval"] == pytest.approx(list(wilson_interval(1, 3)))
    assert result["accuracy_strict"] == 0 and result["unparsed"] == 1
    assert result["finish_rate"] == pytest.approx(2 / 3) and result["mean_tokens"] == 20
    assert not any("@" in key for key in result)


def test_summary_of_several_samples_per_question():
    """a: right 2 of 3, so pass@2 = 1 - C(1,2)/C(3,2) = 1; b: right 1 of 3, pass@2 = 1 - 1/3."""
    rows = [row("a", 0, "1", True), row("a", 1, "1", True), row("a", 2, "3", False),
            row("b", 0, "5", False), row("b", 1, "5", False), row("b", 2, "2", True)]
    result = summarize_generations(rows)
    assert result["n"] == 2 and result["samples"] == 3
    assert result["accuracy"] == result["pass@1"] == pytest.approx(0.5)
    assert result["pass@2"] == pytest.approx((1 + 2 / 3) / 2) and result["pass@3"] == 1
    assert result["maj@3"] == 0.5
    assert result["interval"] == pytest.approx(list(wilson_interval(1, 2)))


def test_pooled_accuracy_weights_questions_and_macro_accuracy_weights_files():
    files = [{"n": 10, "accuracy": 0.5, "accuracy_strict": 0.4},
             {"n": 30, "accuracy": 0.1, "accuracy_strict": 0.0}]
    pooled = pool(files)
    assert pooled["n"] == 40 and pooled["accuracy"] == pytest.approx(0.2)
    assert pooled["macro_accuracy"] == pytest.approx(0.3)
    assert pooled["accuracy_strict"] == pytest.approx(0.1)
    assert pooled["interval"] == pytest.approx(list(wilson_interval(8, 40)))
    assert pool([]) is None


def test_the_accuracy_table_lists_data_sets_then_domains():
    def file(dataset, n, accuracy, inside):
        return {"dataset": dataset, "n": n, "accuracy": accuracy, "accuracy_strict": 0.0,
                "in_domain": inside}

    far = {"far.jsonl": file("far", 5, 0.2, False)}
    near = {"near/dev.jsonl": file("near", 10, 0.5, True),
            "near/test.jsonl": file("near", 30, 0.1, True)}
    rows = accuracy_rows([{"files": far | near}, {"files": far}])
    assert [row["name"] for row in rows] == ["near", "far", "all in domain", "all out of domain"]
    assert [row["n"] for row in rows] == [40, 5, 40, 5]
    assert rows[0]["cells"][0]["accuracy"] == pytest.approx(0.2) and rows[0]["cells"][1] is None
    assert rows[1]["cells"] == rows[3]["cells"] and rows[0]["cells"] == rows[2]["cells"]
    (unnamed,) = accuracy_rows([{"files": {"far": file("far", 5, 0.2, None)}}])
    assert unnamed["name"] == "far" and unnamed["in_domain"] is None
