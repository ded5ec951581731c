"""The demo's world: arithmetic word problems, and a programmed teacher that explains them.

A problem is a question and an explanation. Lower-case letters in braces are numbers. Every equation of
the explanation, such as "{a} + {b} = {r}", is one step and defines the letter on its right, so the
explanation is also the program that computes the answer.

base: one step; training data of the base model, with the bare answer or with the explanation.
in:   two or three steps, told as in base; demonstrations, questions and in-domain test.
out:  two or three steps with other people, things, situations and combinations; out-of-domain test.
"""

import random
import re

PEOPLE = {
    "in": "Anna Ben Clara David Emma Felix Grace Hugo Ida Jonas Kate Leo".split(),
    "out": "Olga Peter Rosa Simon Tara Viktor".split(),
}
THINGS = {
    "in": "apples books coins marbles stickers pencils shells cards".split(),
    "out": "tickets bricks candles flowers bottles spoons".split(),
}
PEOPLE["base"] = PEOPLE["in"] + PEOPLE["out"]
THINGS["base"] = THINGS["in"] + THINGS["out"]

# {N}, {M}: people. {o}, {p}: things. {k}, {g}: small factors. Other letters: amounts.
PROBLEMS = {
    "base": [
        ("{N} has {a} {o}. {M} gives {N} {b} more. How many {o} does {N} have now?",
         "{N} has {a} + {b} = {r} {o}."),
        ("{N} had {a} {o} and bought {b} more. How many {o} does {N} have now?",
         "After buying, {N} has {a} + {b} = {r} {o}."),
        ("{N} had {a} {o} but lost {b} of them. How many {o} are left?",
         "After losing, {N} has {a} - {b} = {r} {o}."),
        ("{N} had {a} {o} and gave {b} to {M}. How many {o} does {N} keep?",
         "After giving, {N} has {a} - {b} = {r} {o}."),
        ("{N} buys {k} packs of {g} {o}. How many {o} are in the packs?",
         "The packs hold {k} * {g} = {r} {o}."),
        ("{N} has {a} {o}. {M} has {b} {o} more than {N}. How many {o} does {M} have?",
         "{M} has {a} + {b} = {r} {o}."),
        ("{N} has {a} {o}. {M} has {b} {o} fewer than {N}. How many {o} does {M} have?",
         "{M} has {a} - {b} = {r} {o}."),
        ("{N} has {a} {o} and {M} has {b} {o}. How many {o} do they have together?",
         "Together they have {a} + {b} = {r} {o}."),
        ("{N} bought {k} {o} for {g} dollars each. How many dollars did {N} pay?",
         "The {o} cost {k} * {g} = {r} dollars."),
        ("{N} had {a} dollars and spent {b} dollars. How many dollars are left?",
         "{N} has {a} - {b} = {r} dollars left."),
        ("A bus carries {a} people. {b} people get on. How many people are on the bus?",
         "Then {a} + {b} = {r} people are on the bus."),
        ("A bus carries {a} people. {b} people get off. How many people are on the bus?",
         "Then {a} - {b} = {r} people are on the bus."),
        ("{N} reads {a} pages on Monday and {b} pages on Tuesday. How many pages does {N} read?",
         "In all {N} reads {a} + {b} = {r} pages."),
        ("{N} plants {k} rows of {g} {o}. How many {o} does {N} plant?",
         "The rows hold {k} * {g} = {r} {o}."),
        ("A shop has {a} {o} and sells {b}. How many {o} are left in the shop?",
         "Then {a} - {b} = {r} {o} are left."),
    ],
    "in": [
        ("{N} has {a} {o}. {M} has {b} {o} more than {N}. How many {o} do they have together?",
         "{M} has {a} + {b} = {r} {o}. Together they have {a} + {r} = {s} {o}."),
        ("{N} has {a} {o}. {M} has {b} {o} fewer than {N}. How many {o} do they have together?",
         "{M} has {a} - {b} = {r} {o}. Together they have {a} + {r} = {s} {o}."),
        ("{N} had {a} {o}, bought {b} more and gave {c} to {M}. How many {o} does {N} keep?",
         "After buying, {N} has {a} + {b} = {r} {o}. After giving, {N} has {r} - {c} = {s} {o}."),
        ("{N} had {a} {o}, lost {b} of them and bought {c} more. How many {o} does {N} have now?",
         "After losing, {N} has {a} - {b} = {r} {o}. After buying, {N} has {r} + {c} = {s} {o}."),
        ("{N} buys {k} packs of {g} {o} and gives {c} to {M}. How many {o} does {N} keep?",
         "The packs hold {k} * {g} = {r} {o}. After giving, {N} has {r} - {c} = {s} {o}."),
        ("{N} had {a} {o} and buys {k} packs of {g} {o}. How many {o} does {N} have now?",
         "The packs hold {k} * {g} = {r} {o}. After buying, {N} has {a} + {r} = {s} {o}."),
        ("{N} had {a} dollars and bought {k} {o} for {g} dollars each. "
         "How many dollars are left?",
         "The {o} cost {k} * {g} = {r} dollars. {N} has {a} - {r} = {s} dollars left."),
        ("{N} buys {k} packs of {g} {o}, loses {b} of them and buys {c} more. "
         "How many {o} does {N} have now?",
         "The packs hold {k} * {g} = {r} {o}. After losing, {N} has {r} - {b} = {s} {o}. "
         "After buying, {N} has {s} + {c} = {t} {o}."),
    ],
    "out": [
        ("A bus carries {a} people. {b} people get off and {c} people get on. "
         "How many people are on the bus?",
         "Then {a} - {b} = {r} people are on the bus. Then {r} + {c} = {s} people are on the bus."),
        ("{N} reads {a} pages on Monday, {b} pages on Tuesday and {c} pages on Friday. "
         "How many pages does {N} read?",
         "By Tuesday {N} reads {a} + {b} = {r} pages. In all {N} reads {r} + {c} = {s} pages."),
        ("{N} plants {k} rows of {g} {o}. {c} of them die. How many {o} are left?",
         "The rows hold {k} * {g} = {r} {o}. Then {r} - {c} = {s} {o} are left."),
        ("{N} has {a} {o}. {M} has {b} {o} more than {N} but loses {c} of them. "
         "How many {o} does {M} have now?",
         "{M} has {a} + {b} = {r} {o}. After losing, {M} has {r} - {c} = {s} {o}."),
        ("A shop has {k} packs of {g} {o} and sells {b}. How many {o} are left in the shop?",
         "The packs hold {k} * {g} = {r} {o}. Then {r} - {b} = {s} {o} are left."),
        ("{N} had {a} {o}, bought {b} more, lost {c} of them and gave {d} to {M}. "
         "How many {o} does {N} keep?",
         "After buying, {N} has {a} + {b} = {r} {o}. After losing, {N} has {r} - {c} = {s} {o}. "
         "After giving, {N} has {s} - {d} = {t} {o}."),
        ("{N} has {a} {o} and buys {k} packs of {g} {o}. {M} has {b} {o}. "
         "How many {o} do they have together?",
         "The packs hold {k} * {g} = {r} {o}. After buying, {N} has {a} + {r} = {s} {o}. "
         "Together they have {s} + {b} = {t} {o}."),
        ("{N} bought {k} {o} for {g} dollars each and spent {c} dollars on {p}. "
         "How many dollars did {N} pay?",
         "The {o} cost {k} * {g} = {r} dollars. Together {N} pays {r} + {c} = {s} dollars."),
    ],
}
LARGEST, AMOUNTS, FACTORS = 30, (1, 20), (2, 6)  # every result is in 1..LARGEST
TEACHER = "programmed"
EQUATION = re.compile(r"\{(\w)\} ([+*-]) \{(\w)\} = \{(\w)\}")
APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def solve(explanation: str, given: dict[str, int], wrong_step: int = -1,
          slip: int = 0) -> dict[str, int]:
    """Values of all letters, where the result of step `wrong_step` is `slip` too large."""
    values = dict(given)
    for step, (left, sign, right, result) in enumerate(EQUATION.findall(explanation)):
        values[result] = APPLY[sign](values[left], values[right]) + slip * (step == wrong_step)
    return values


def problem(rng: random.Random, domain: str, error_rate: float = 0.0, haste: float = 0.0) -> dict:
    """A random question row with the teacher's completion.

    With probability `error_rate` one step is miscalculated. With probability `haste` the completion
    gives the result without the steps, which may be right but teaches less.
    """
    question, explanation = rng.choice(PROBLEMS[domain])
    results = [step[-1] for step in EQUATION.findall(explanation)]
    person, other = rng.sample(PEOPLE[domain], 2)
    thing, gift = rng.sample(THINGS[domain], 2)
    words = {"N": person, "M": other, "o": thing, "p": gift}
    truth: dict[str, int] = {}
    while not truth or not all(1 <= truth[letter] <= LARGEST for letter in results):
        given = {letter: rng.randint(*AMOUNTS) for letter in "abcd"}
        given |= {letter: rng.randint(*FACTORS) for letter in "kg"}
        truth = solve(explanation, given)
    told = truth
    if rng.random() < error_rate:
        told = solve(explanation, given, rng.randrange(len(results)), rng.choice((1, 2, 10)))
    if rng.random() < haste:
        explanation = EQUATION.sub(r"{\4}", explanation.split(". ")[-1])
    return {
        "task": "math",
        "question": question.format(**words, **given),
        "answer": str(truth[results[-1]]),
        "teacher": TEACHER,
        "completion": f"{explanation.format(**words, **told)} The answer is {told[results[-1]]}.",
    }


def generate(n: int, seed: int, domain: str, error_rate: float = 0.1,
             haste: float = 0.4) -> list[dict]:
    """`n` demonstrations with distinct questions: question rows with `teacher` and `completion`."""
    rng = random.Random(f"{seed} {domain}")
    rows: dict[str, dict] = {}
    while len(rows) < n:
        row = problem(rng, domain, error_rate, haste)
        rows.setdefault(row["question"], {"id": f"demo-{domain}-{seed}-{len(rows)}", **row})
    return list(rows.values())
