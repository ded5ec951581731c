"""choice: one of the row's `choices`, named by its letter or its text."""

from collections.abc import Mapping

from srit.grading.answers import option_marker, read_answers, read_options
from srit.runtime import limits
from srit.runtime.jsonl import require

show = str


def check(row: Mapping, where: str) -> None:
    require(row, "choices", dict, where)
    for label, text in row["choices"].items():
        limits.check(isinstance(text, str), where, f"choice {label!r:.20}", text, "a string")
    limits.check(len(row["choices"]) <= limits.CHOICES, where, "choices", len(row["choices"]),
                 f"{limits.CHOICES} at most")
    limits.check(row["answer"] in row["choices"], where, "answer", row["answer"],
                 f"one of the choices {list(row['choices'])}")


def extract(text: str, row: Mapping) -> tuple[str | None, str | None]:
    keys = list(row["choices"])
    flexible, strict = (None if index is None else keys[index] for index in read_answers(
        text, read_options, option_marker(tuple(row["choices"].items()))))
    return flexible, strict


def equal(answer: str, row: Mapping) -> bool:
    return answer == row["answer"]
