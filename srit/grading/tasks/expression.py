"""expression: formulas, sets, tuples and intervals, compared as mathematics by math-verify.

Needs the extra `math`. A comparison that takes more than five seconds counts as unequal.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any

from srit.grading.final_answer import final_answer
from srit.runtime import limits
from srit.runtime.files import InputError

show = str
MAX_LENGTH = 500  # characters of an expression; a longer one is not read
MATH = re.compile(r"(?<!\\)\$\$?|\\[()\[\]]")
UNIT = re.compile(r"(?!.*\b(?:not|or|and|but)\b)(?:[a-zA-Z ,.]|\\[ ,]|\\text\{[^{}]*\})*")
WORD = re.compile(r"\\[a-zA-Z]+(?:\{[a-z]*matrix\})?|\\text\w*\{[^{}]*\}|[a-zA-Z]{3,}")


@lru_cache(1024)
def parse(expression: str) -> tuple[Any, ...]:
    """What math-verify reads of LaTeX or plain notation, as sympy objects; () for nothing."""
    library = _math_verify()
    # Its reader of plain text stays out, because it hands what it finds to Python's eval.
    return tuple(library.parse(f"${expression}$", [library.LatexExtractionConfig()],
                               fallback_mode="no_fallback"))


def check(row: Mapping, where: str) -> None:
    words = [word for word in WORD.findall(row["answer"]) if not word.startswith("\\")]
    truth = None if words else bare(row["answer"])
    limits.check(truth is not None and equal(truth, row), where, "answer", row["answer"],
                 r"LaTeX that math-verify reads for task expression, such as x^2+1, (3, 5) or "
                 r"\frac{\sqrt{3}}{2}; for a text there is task exact")


def bare(text: str) -> str | None:
    """The expression of a span: all of it, or what its math delimiters hold, if a unit is all else."""
    parts = MATH.split(text.strip(" .*_"))
    if len(parts) == 3 and not parts[0].strip() and UNIT.fullmatch(parts[2]):
        parts = parts[1:2]
    expression = parts[0].strip(" .")
    return expression if len(parts) == 1 and 0 < len(expression) <= MAX_LENGTH else None


def extract(text: str, row: Mapping) -> tuple[str | None, str | None]:
    flexible, strict = (span and bare(span) for span in final_answer(text))
    return flexible, strict


def equal(answer: str, row: Mapping) -> bool:
    truth, found = parse(bare(row["answer"]) or ""), parse(answer)
    return bool(truth and found and _math_verify().verify(list(truth), list(found)))


def _math_verify() -> ModuleType:
    try:
        import math_verify
    except ImportError:
        raise InputError("task expression needs math-verify: pip install 'srit[math]'") from None
    return math_verify
