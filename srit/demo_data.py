"""The demo's small world: arithmetic word problems, and a programmed teacher that explains them.

A problem is a pair of texts. Lower-case letters in braces are numbers; every equation in the
explanation, such as "{a} + {b} = {r}", is a step and defines the letter on its right, so the text
of the explanation is also the program that computes the answer.
"""

import random
import re

NAMES = {
    "in": "Anna Ben Clara David Emma Felix Grace Hugo Ida Jonas Kate Leo Mona Nils".split(),
    "out": "Olga Peter Rosa Simon Tara Viktor".split(),
}
THINGS = {
    "in": "apples books coins marbles stickers pencils shells cards stamps buttons".split(),
    "out": "tickets bricks candles flowers bottles spoons".split(),
}

# k and g are small factors, other letters are amounts; results must lie in 1..LIMIT.
PROBLEMS = {
    "in": [
        (
            "{N} has {a} {o}. {M} gives {N} {b} more. How many {o} does {N} have now?",
            "{N} has {a} + {b} = {r} {o}.",
        ),
        (
            "{N} had {a} {o} but lost {b} of them. How many {o} are left?",
            "{N} has {a} - {b} = {r} {o} left.",
        ),
        (
            "{N} fills {k} boxes with {g} {o} each. How many {o} are in the boxes?",
            "The boxes hold {k} * {g} = {r} {o}.",
        ),
        (
            "{N} has {a} {o}. {M} has {b} {o} more than {N}. How many {o} do they have together?",
            "{M} has {a} + {b} = {r} {o}. Together they have {a} + {r} = {s} {o}.",
        ),
        (
            "{N} has {a} {o}. {M} has {b} {o} fewer than {N}. How many {o} do they have together?",
            "{M} has {a} - {b} = {r} {o}. Together they have {a} + {r} = {s} {o}.",
        ),
        (
            "{N} had {a} {o}, bought {b} more and gave {c} to {M}. How many {o} does {N} have now?",
            "After buying, {N} has {a} + {b} = {r} {o}. After giving, {N} has {r} - {c} = {s} {o}.",
        ),
        (
            "{N} buys {k} packs of {g} {o} and gives {c} {o} to {M}. How many {o} does {N} keep?",
            "The packs hold {k} * {g} = {r} {o}. {N} keeps {r} - {c} = {s} {o}.",
        ),
        (
            "{N} has {a} {o} and buys {k} packs of {g} {o}. How many {o} does {N} have now?",
            "The packs hold {k} * {g} = {r} {o}. {N} has {a} + {r} = {s} {o}.",
        ),
        (
            "{N} had {a} dollars and bought {k} {o} for {g} dollars each. "
            "How many dollars are left?",
            "The {o} cost {k} * {g} = {r} dollars. {N} has {a} - {r} = {s} dollars left.",
        ),
        (
            "{N} buys {k} packs of {g} {o}, finds {a} more and loses {b}. "
            "How many {o} does {N} have now?",
            "The packs hold {k} * {g} = {r} {o}. After finding, {N} has {r} + {a} = {s} {o}. "
            "After losing, {N} has {s} - {b} = {t} {o}.",
        ),
    ],
    "out": [
        (
            "A bus carries {a} people. {b} people get off and {c} people get on. "
            "How many people are on the bus?",
            "Then {a} - {b} = {r} people stay. Then {r} + {c} = {s} people are on the bus.",
        ),
        (
            "{N} reads {a} pages on Monday, {b} pages on Tuesday and {c} pages on Friday. "
            "How many pages does {N} read?",
            "By Tuesday {N} read {a} + {b} = {r} pages. In all {N} read {r} + {c} = {s} pages.",
        ),
        (
            "{N} plants {k} rows of {g} {o}. {c} of them die. How many {o} are left?",
            "The rows hold {k} * {g} = {r} {o}. {r} - {c} = {s} {o} are left.",
        ),
        (
            "{N} is {a} years old. {M} is {b} years younger. What is the sum of the two ages?",
            "{M} is {a} - {b} = {r} years old. The sum is {a} + {r} = {s} years.",
        ),
        (
            "A shop gets {k} crates of {g} {o} and sells {a}. Then {b} {o} come back. "
            "How many {o} does the shop have now?",
            "The crates hold {k} * {g} = {r} {o}. Then {r} - {a} = {s} {o} are left. "
            "Now {s} + {b} = {t} {o} are in the shop.",
        ),
        (
            "{N} had {a} {o}, bought {b} more, lost {c} and gave {d} to {M}. "
            "How many {o} does {N} have now?",
            "After buying, {N} has {a} + {b} = {r} {o}. After losing, {N} has {r} - {c} = {s} {o}. "
            "After giving, {N} has {s} - {d} = {t} {o}.",
        ),
        (
            "{N} has {a} {o}, buys {k} packs of {g} {o} and gives {c} to {M}. "
            "How many {o} does {N} keep?",
            "The packs hold {k} * {g} = {r} {o}. {N} has {a} + {r} = {s} {o}. "
            "{N} keeps {s} - {c} = {t} {o}.",
        ),
        (
            "{N} sells {k} {o} for {g} dollars each and spends {c} dollars. "
            "How many dollars are left?",
            "The {o} bring {k} * {g} = {r} dollars. {N} has {r} - {c} = {s} dollars left.",
        ),
    ],
}
LIMIT = {"in": 40, "out": 40}
TEACHER = "programmed"
EQUATION = re.compile(r"\{(\w)\} ([+*-]) \{(\w)\} = \{(\w)\}")
APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def solve(solution: str, values: dict[str, int], slip: int = -1, delta: int = 0) -> dict[str, int]:
    """All letters' numbers; `delta` is added to the result of equation number `slip`."""
    values = dict(values)
    for step, (left, sign, right, result) in enumerate(EQUATION.findall(solution)):
        values[result] = APPLY[sign](values[left], values[right]) + delta * (step == slip)
    return values


def problem(rng: random.Random, domain: str, error_rate: float) -> dict:
    """One question row with the teacher's completion, wrong with probability `error_rate`."""
    question, solution = rng.choice(PROBLEMS[domain])
    steps = EQUATION.findall(solution)
    name, other = rng.sample(NAMES[domain], 2)
    words = {"N": name, "M": other, "o": rng.choice(THINGS[domain])}
    fits = False
    while not fits:
        given = {x: rng.randint(2, 6 if x in "kg" else 20) for x in "abcdkg"}
        truth = solve(solution, given)
        fits = all(0 < truth[step[3]] <= LIMIT[domain] for step in steps)
    told = truth
    if rng.random() < error_rate:
        told = solve(solution, given, rng.randrange(len(steps)), rng.choice((1, 2, 10)))
    last = steps[-1][3]
    return {
        "task": "math",
        "question": question.format(**words, **given),
        "answer": str(truth[last]),
        "teacher": TEACHER,
        "completion": f"{solution.format(**words, **told)} The answer is {told[last]}.",
    }


def generate(n: int, seed: int, domain: str, error_rate: float = 0.1) -> list[dict]:
    """`n` demonstrations (question rows with `teacher` and `completion`), no question twice."""
    rng = random.Random(f"{seed} {domain}")
    rows: dict[str, dict] = {}
    while len(rows) < n:
        row = problem(rng, domain, error_rate)
        rows.setdefault(row["question"], {"id": f"demo-{domain}-{seed}-{len(rows)}", **row})
    return list(rows.values())
