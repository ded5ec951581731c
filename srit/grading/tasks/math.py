"""math: one number, compared exactly."""

from collections.abc import Mapping
from fractions import Fraction

from srit.grading import numerals
from srit.grading.answers import read_answers, read_numbers
from srit.runtime import limits

show = numerals.show


def check(row: Mapping, where: str) -> None:
    limits.check(numerals.number(row["answer"]) is not None, where, "answer", row["answer"],
                 "one number for task math, such as 7, -0.5, 3/4 or 1,000; for formulas, intervals and "
                 "tuples there is task expression, for a text exact, for an object json")


def extract(text: str, row: Mapping) -> tuple[Fraction | None, Fraction | None]:
    return read_answers(text, read_numbers, str)


def equal(answer: Fraction, row: Mapping) -> bool:
    truth = numerals.number(row["answer"])
    return truth is not None and numerals.equal(answer, truth)
