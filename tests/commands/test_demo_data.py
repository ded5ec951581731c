"""The demo's word problems: explanations add up, and the domains stay apart."""

import random
import re

import pytest

from srit.commands.demo_data import EQUATION, PEOPLE, PROBLEMS, THINGS, generate, problem, solve
from srit.grading.judge import grade
from srit.text.arithmetic import result

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


@pytest.mark.parametrize("domain", PROBLEMS)
def test_the_calculator_can_do_every_step(domain):
    rng = random.Random(0)
    for _ in range(300):
        text = problem(rng, domain)["completion"]
        for step in EQUATIONS.finditer(text):
            assert result(text[:step.start(4) - 1]) == f" {step[4]}", text


def test_one_demonstration_in_ten_is_wrong_and_four_in_ten_skip_the_steps():
    rows = generate(2000, 0, "in")
    wrong = [r for r in rows if not grade(r["completion"], r).correct]
    hasty = [r for r in rows if "=" not in r["completion"]]
    assert 0.08 < len(wrong) / len(rows) < 0.12
    assert 0.36 < len(hasty) / len(rows) < 0.44
    shown = [r for r in wrong if r not in hasty]
    assert shown and not any(adds_up(r) for r in shown)


def test_the_seed_determines_the_world_and_no_question_repeats():
    rows = generate(500, 3, "in")
    assert rows == generate(500, 3, "in")
    assert rows != generate(500, 4, "in")
    assert len({r["question"] for r in rows}) == len({r["id"] for r in rows}) == 500


def test_domains_share_no_story_people_or_things():
    assert not set(PEOPLE["in"]) & set(PEOPLE["out"]) and not set(THINGS["in"]) & set(THINGS["out"])
    stories = {domain: {q for q, _ in problems} for domain, problems in PROBLEMS.items()}
    assert not stories["in"] & stories["out"]
    steps = {d: {len(EQUATION.findall(e)) for _, e in problems} for d, problems in PROBLEMS.items()}
    assert steps["base"] == {1} and steps["in"] == {2, 3} and steps["out"] == {2, 3}


def test_a_slip_propagates_to_later_steps():
    explanation = "{a} + {b} = {r}. {r} - {c} = {s}."
    given = {"a": 3, "b": 4, "c": 2}
    assert solve(explanation, given) == {**given, "r": 7, "s": 5}
    assert solve(explanation, given, wrong_step=0, slip=2) == {**given, "r": 9, "s": 7}
    assert solve(explanation, given, wrong_step=1, slip=2) == {**given, "r": 7, "s": 7}
