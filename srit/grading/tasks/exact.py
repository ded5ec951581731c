"""exact: a text of one line, the same after normalisation.

Unicode in its compatible form (NFKC) and without case; one space between words; without an article in
front (the, a, an), and without quotes, markup (* _ ` $) and punctuation around it.
"""

import unicodedata
from collections.abc import Mapping

from srit.grading.final_answer import final_answer
from srit.runtime import limits

show = str
AROUND = " .,;:!\"'*_`$“”‘’"


def normalize(text: str) -> str:
    words = unicodedata.normalize("NFKC", text).casefold().strip(AROUND).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("the", "a", "an") else words)


def check(row: Mapping, where: str) -> None:
    lines = row["answer"].strip().splitlines()
    limits.check(len(lines) == 1 and normalize(row["answer"]) != "", where, "answer", row["answer"],
                 "a text of one line for task exact")


def extract(text: str, row: Mapping) -> tuple[str | None, str | None]:
    return final_answer(text)


def equal(answer: str, row: Mapping) -> bool:
    return normalize(answer) == normalize(row["answer"])
