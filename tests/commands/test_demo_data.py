"""The demo's world: what it says adds up, and its three parts stay apart."""

import json
import random
import re

import pytest

from srit.commands import demo
from srit.commands.demo_data import EQUATION, PEOPLE, PROBLEMS, THINGS, generate, problem, solve
from srit.grading.answers import grade
from srit.runtime.jsonl import read_jsonl

EQUATIONS = re.compile(r"(\d+) ([+*-]) (\d+) = (\d+)")
VALUE = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def adds_up(row: dict) -> bool:
    steps = EQUATIONS.findall(row["completion"])
    return all(VALUE[sign](int(a), int(b)) == int(c) for a, sign, b, c in steps)


@pytest.mark.parametrize("domain", PROBLEMS)
def test_explanations_add_up_and_end_in_the_answer(domain):
    rng = random.Random(0)
    for _ in range(300):
        row = problem(rng, domain)
        assert adds_up(row), row
        assert EQUATIONS.findall(row["completion"])[-1][-1] == row["answer"]
        assert grade(row["completion"], row).correct
        assert not re.search(r"[{}]", row["question"] + row["completion"])
        given = set(re.findall(r"\d+", row["question"]))
        results = set(re.findall(r"= (\d+)", row["completion"]))
        assert set(re.findall(r"\d+", row["completion"])) <= given | results


def test_one_teacher_answer_in_ten_is_wrong_and_four_in_ten_hasty():
    rows = generate(2000, 0, "in")
    wrong = [r for r in rows if not grade(r["completion"], r).correct]
    hasty = [r for r in rows if "=" not in r["completion"]]
    assert 0.08 < len(wrong) / len(rows) < 0.12
    assert 0.36 < len(hasty) / len(rows) < 0.44
    shown = [r for r in wrong if r not in hasty]
    assert shown and not any(adds_up(r) for r in shown)


def test_same_seed_same_world_and_no_question_twice():
    rows = generate(500, 3, "in")
    assert rows == generate(500, 3, "in")
    assert rows != generate(500, 4, "in")
    assert len({r["question"] for r in rows}) == len({r["id"] for r in rows}) == 500


def test_domains_share_no_story_and_out_of_domain_no_words():
    assert not set(PEOPLE["in"]) & set(PEOPLE["out"]) and not set(THINGS["in"]) & set(THINGS["out"])
    stories = {domain: {q for q, _ in problems} for domain, problems in PROBLEMS.items()}
    assert not stories["in"] & stories["out"]
    steps = {d: {len(EQUATION.findall(e)) for _, e in problems} for d, problems in PROBLEMS.items()}
    assert steps["base"] == {1} and steps["in"] == {2, 3} and steps["out"] == {2, 3}


def test_a_slip_carries_through_the_steps_after_it():
    explanation = "{a} + {b} = {r}. {r} - {c} = {s}."
    given = {"a": 3, "b": 4, "c": 2}
    assert solve(explanation, given) == {**given, "r": 7, "s": 5}
    assert solve(explanation, given, wrong_step=0, slip=2) == {**given, "r": 9, "s": 7}
    assert solve(explanation, given, wrong_step=1, slip=2) == {**given, "r": 7, "s": 7}


def test_what_is_tested_was_never_demonstrated_or_asked(tmp_path):
    demo.make_world(tmp_path, seed=0)
    questions = {}
    for name in ("demos", "questions", "stories/test", "other-stories/test"):
        rows = read_jsonl(tmp_path / f"{name}.jsonl")
        questions[name] = {row["question"] for row in rows}
        assert len(questions[name]) == len(rows)
    assert questions["demos"] <= questions["questions"]
    assert len(questions["stories/test"]) >= 300 and len(questions["other-stories/test"]) >= 300
    assert not questions["stories/test"] & questions["questions"]
    assert not questions["other-stories/test"] & questions["questions"]


def test_table_of_seeds(tmp_path):
    for seed in (0, 1):
        for name, accuracy in (("eval-base", 0.05), ("eval-sft", 0.3), ("eval-dpo", 0.4 + seed / 10)):
            folder = tmp_path / f"seed-{seed}" / name
            folder.mkdir(parents=True)
            found = {"n": 400, "accuracy": accuracy}
            results = {"in_domain": found, "out_of_domain": {"n": 300, "accuracy": 0.01}}
            (folder / "results.json").write_text(json.dumps(results))
            run = {"commit": "abc", "versions": {"torch": "2"}, "machine": "M"}
            (folder / "run.json").write_text(json.dumps(run))
    roots = {seed: tmp_path / f"seed-{seed}" for seed in (0, 1)}
    text = demo.seeds_table(roots, tmp_path / "seeds.csv").splitlines()
    assert text[2].split() == ["seed", "1", "5.0%", "30.0%", "50.0%", "1.0%", "1.0%", "1.0%"]
    rows = (tmp_path / "seeds.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 6 and rows[3] == "0,self-refined,in_domain,400,0.4,abc,2,M"
