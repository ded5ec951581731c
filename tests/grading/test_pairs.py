"""The pairing policies, and why questions give no pair."""

import random

import pytest
from tiny import demo, question, write_rows

from srit.config import PairConfig
from srit.grading.pairs import build_pairs, summarize_pairs
from srit.runtime.files import InputError
from srit.runtime.jsonl import read_jsonl
from srit.runtime.run_dir import read_run
from srit.train import pair as stage

RIGHT, WRONG = "So 3 + 4 = 7. The answer is 7.", "So 3 + 5 = 8. The answer is 8."


def sample(i, style, n, text, correct, **changes):
    row = {"id": f"q{i}", "task": "math", "dataset": "d", "question": question(i, 3, 4)["question"],
           "answer": "7", "sample": n, "prompt_style": style, "prompt": "p", "text": text,
           "seed": 0, "n_tokens": 9, "finished": True, "extracted": "7" if correct else "8",
           "correct": correct}
    return {**row, **changes}


def teacher(i, right=True):
    row = demo(i, 3, 4)
    return row if right else {**row, "completion": "The answer is 9."}


def texts(pairs):
    return [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in pairs]


SAMPLES = [
    sample(0, "cot", 0, RIGHT, True), sample(0, "cot", 1, WRONG, False),
    sample(0, "direct", 0, "7", True), sample(0, "direct", 1, "9", False),
]


def test_paper_prefers_own_right_cot_over_the_direct_answer():
    pairs, _ = build_pairs(SAMPLES, [], "paper", max_pairs_per_question=9)
    assert {c for c, _ in texts(pairs)} == {RIGHT}
    # a text is used once per side, so one right CoT answer gives one pair, whatever the cap
    assert len(pairs) == 1 and pairs[0]["rejected_style"] == "direct"
    assert pairs[0]["chosen_source"] == "self"


def test_paper_falls_back_to_the_teacher():
    own = [sample(0, "cot", 0, WRONG, False), sample(0, "direct", 0, "7", True)]
    (pair,), _ = build_pairs(own, [teacher(0)], "paper")
    assert pair["chosen"][0]["content"] == teacher(0)["completion"]
    assert pair["chosen_source"] == "teacher" and pair["rejected_correct"]
    assert summarize_pairs([pair])["rejected_correct"] == 1
    nothing, counts = build_pairs(own, [teacher(0, right=False)], "paper")
    assert not nothing and counts[1].dropped == {"no right answer to prefer": 1}


def test_correctness_pairs_right_with_wrong_cot_only():
    pairs, _ = build_pairs(SAMPLES, [teacher(0)], "correctness")
    assert texts(pairs) == [(RIGHT, WRONG)]
    nothing, counts = build_pairs([SAMPLES[0], SAMPLES[3]], [teacher(0)], "correctness")
    assert not nothing and counts[1].dropped == {"every CoT answer right": 1}


def test_mixed_rejects_any_wrong_answer():
    pairs, _ = build_pairs(SAMPLES, [], "mixed", max_pairs_per_question=9)
    assert all(not p["rejected_correct"] for p in pairs)
    two = SAMPLES + [sample(0, "cot", 2, "It is 7. The answer is 7.", True)]
    pairs, _ = build_pairs(two, [], "mixed", max_pairs_per_question=9)
    assert {r for _, r in texts(pairs)} == {WRONG, "9"}
    nothing, counts = build_pairs([SAMPLES[0], SAMPLES[2]], [], "mixed")
    assert not nothing and counts[1].dropped == {"every answer right": 1}


def test_a_pair_is_a_trl_row_with_its_origin():
    (pair,), _ = build_pairs(SAMPLES, [], "correctness", pair_prompt="direct")
    assert pair["prompt"][0]["role"] == "user"
    assert pair["prompt"][0]["content"].endswith("Answer:")
    assert [m["role"] for m in pair["chosen"] + pair["rejected"]] == ["assistant", "assistant"]
    assert (pair["chosen_extracted"], pair["rejected_extracted"]) == ("7", "8")
    (cot,), _ = build_pairs(SAMPLES, [], "correctness")
    assert cot["prompt"][0]["content"].endswith("Let's think step by step")


def test_duplicates_and_unusable_samples_are_dropped_and_pairs_capped():
    rows = SAMPLES + [
        sample(0, "cot", 2, "  " + RIGHT.replace(" 3", "\n3"), True),  # differs only in whitespace
        sample(0, "cot", 3, "The answer is 8 and so", False, finished=False),
        sample(0, "cot", 4, "  ", False)]
    pairs, counts = build_pairs(rows, [], "mixed", max_pairs_per_question=9)
    assert counts[0].dropped == {"duplicate text": 1, "cut off at max_new_tokens": 1, "empty": 1}
    assert len(pairs) == 1
    many = [sample(0, "cot", n, f"{n}. The answer is {7 + n % 2}.", n % 2 == 0) for n in range(12)]
    capped, _ = build_pairs(many, [], "correctness", max_pairs_per_question=4)
    assert len(capped) == len({pair["id"] for pair in capped}) == 4


def test_identical_texts_make_no_pair():
    """Even if the same text was graded right once and wrong once."""
    own = [sample(0, "direct", 0, teacher(0)["completion"], False)]
    pairs, counts = build_pairs(own, [teacher(0)], "paper")
    assert not pairs and counts[1].dropped == {"chosen and rejected are the same text": 1}


def test_pairs_depend_on_the_seed_and_not_on_the_order_of_rows():
    rows = [sample(i, "cot", n, f"{i} {n}. The answer is {7 + n % 2}.", n % 2 == 0)
            for i in range(8) for n in range(6)]
    first = build_pairs(rows, [], "correctness", seed=1)[0]
    random.Random(0).shuffle(rows)
    assert build_pairs(rows, [], "correctness", seed=1)[0] == first
    assert build_pairs(rows, [], "correctness", seed=2)[0] != first


def test_closest_length_prefers_sides_of_similar_length():
    rows = [sample(0, "cot", 0, RIGHT, True), sample(0, "cot", 1, WRONG + " And so on." * 9, False),
            sample(0, "cot", 2, WRONG, False)]
    assert texts(build_pairs(rows, [], "correctness", selection="closest_length")[0]) == [
        (RIGHT, WRONG)]


def test_scores_make_pairs_by_their_margin():
    rows = [sample(0, "cot", n, f"{n}. The answer is {n}.", False, score=score)
            for n, score in enumerate((0.4, 0.6, 0.7, 0.7))]
    pairs, _ = build_pairs(rows, [], "scored", max_pairs_per_question=9, min_margin=0.3)
    assert {(p["chosen_score"], p["rejected_score"]) for p in pairs} == {(0.7, 0.4)}
    nothing, counts = build_pairs(rows, [], "scored", min_margin=0.8)
    assert not nothing and counts[1].dropped == {"no two scores 0.8 apart": 1}
    nothing, counts = build_pairs([sample(0, "direct", 0, "7", True)], [], "scored", min_margin=0.8)
    assert not nothing and counts[1].dropped == {"no CoT answer": 1}


def test_a_chosen_answer_never_scores_less_and_answers_without_scores_have_1_and_0():
    rows = [sample(0, "cot", 0, RIGHT, True, score=0.6), sample(0, "direct", 0, "7", True, score=0.8),
            sample(0, "direct", 1, "8", False)]
    pairs, _ = build_pairs(rows, [], "paper", max_pairs_per_question=9)
    assert [(p["chosen_score"], p["rejected_score"]) for p in pairs] == [(0.6, 0)]
    pairs, _ = build_pairs(SAMPLES, [], "correctness", min_margin=1)
    assert [(p["chosen_score"], p["rejected_score"]) for p in pairs] == [(1, 0)]


def test_counts_cover_every_row():
    rows = SAMPLES + [sample(1, "cot", 0, RIGHT, True), sample(2, "direct", 0, "8", False)]
    for policy in ("paper", "correctness", "mixed"):
        pairs, (samples, questions) = build_pairs(rows, [teacher(2)], policy)
        assert samples.as_dict()["in"] == len(rows)
        assert questions.as_dict()["in"] == 3 and questions.used == len(pairs)


def test_two_texts_for_one_sample_are_refused():
    with pytest.raises(InputError, match="'q0', style cot, sample 0: do the files come from"):
        build_pairs([SAMPLES[0], {**SAMPLES[0], "text": "other"}], [])


def test_one_id_for_two_questions_is_refused():
    other = {"question": "How many are 1 and 6?"}
    with pytest.raises(InputError, match="id 'q0' stands for two questions.*different data sets"):
        build_pairs([*SAMPLES, sample(0, "cot", 2, RIGHT, True, **other)], [])
    with pytest.raises(InputError, match="id 'q0' stands for two questions"):
        build_pairs(SAMPLES, [{**teacher(0), **other}])


def test_the_stage_writes_pairs_and_counts(tmp_path, capsys):
    file = write_rows(tmp_path / "samples.jsonl", SAMPLES)
    cfg = PairConfig([str(file)], str(tmp_path / "out"), policy="correctness")
    stage.main(cfg)
    assert "questions: 1 rows in = 1 used" in capsys.readouterr().out
    assert texts(read_jsonl(tmp_path / "out/pairs.jsonl")) == [(RIGHT, WRONG)]
    run = read_run(tmp_path / "out")
    assert run["finished"] and run["counts"]["samples"]["in"] == 4 and run["pairs"]["pairs"] == 1


@pytest.mark.parametrize("rows,message", [
    ([SAMPLES[0]], r"no question gave a pair .*raise --temperature"),
    ([{k: v for k, v in SAMPLES[0].items() if k != "text"}], r":1: the row has no field 'text'"),
    ([{**SAMPLES[0], "correct": "yes"}], "field 'correct' must be bool"),
    ([{**SAMPLES[0], "sample": True}], "field 'sample' must be int, got bool"),
    ([{k: v for k, v in SAMPLES[0].items() if k != "extracted"}], ":1: the row has no field 'extr"),
    ([{**SAMPLES[0], "extracted": 7}], "field 'extracted' must be str . None, got int"),
    ([{**SAMPLES[0], "task": "poem"}], ":1: field 'task' must be one of"),
    ([{**SAMPLES[0], "answer": "x^2"}], ":1: answer must be one number"),
    ([{**SAMPLES[0], "score": 2}], ":1: score must be a number from 0 to 1, got 2"),
])
def test_bad_samples_are_named(tmp_path, rows, message):
    file = write_rows(tmp_path / "samples.jsonl", rows)
    with pytest.raises(InputError, match=message):
        stage.main(PairConfig([str(file)], str(tmp_path / "out")))
    assert not (tmp_path / "out/pairs.jsonl").exists()
