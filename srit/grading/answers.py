"""Extract and grade the answer of a completion; the one grader for filtering, pairs and evaluation.

strict: the last answer that the text states explicitly ("the answer is 7", "#### 7", "\\boxed{7}").
flexible: the same, or else the last number (math) or letter (choice) of the text.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

TOLERANCE = Fraction(1, 10**6)  # relative; 0.6666666666666667 equals 2/3, 0.67 does not

NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>[-+\u2212]\s?)?(?:[$\u20ac\u00a3]\s?)?(?P<inner>[-\u2212])?"
    r"(?:(?P<whole>\d{1,9}) (?P<num>\d{1,9})/(?P<den>\d{1,9})"
    r"|(?P<n>\d{1,9}) ?/ ?(?P<d>\d{1,9})"
    r"|(?P<decimal>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,30}(?:\.\d+)?|\.\d+)(?:[eE](?P<exp>[-+]?\d\d?))?)"
)
LATEX_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d{1,9})\}\{(\d{1,9})\}")
STATED = re.compile(
    r"\banswer\b[^\n.:=]{0,80}?(?:\bis\b|\bare\b|\bwould be\b|\bwill be\b|:|=)|####|\\boxed\s*\{",
    re.IGNORECASE)
CLAUSE_END = re.compile(r"\n|[.!?](?=\s|$)|;")


@dataclass(frozen=True)
class Grade:
    """Flexible and strict answer, and whether each equals the ground truth."""

    extracted: str | None
    correct: bool
    strict_extracted: str | None
    strict_correct: bool


def _value(match: re.Match) -> Fraction | None:
    g = match.groupdict()
    try:
        if g["num"]:
            value = int(g["whole"]) + Fraction(int(g["num"]), int(g["den"]))
        elif g["n"]:
            value = Fraction(int(g["n"]), int(g["d"]))
        else:
            value = Fraction(g["decimal"].replace(",", "")) * Fraction(10) ** int(g["exp"] or 0)
    except ZeroDivisionError:
        return None
    negative = (g["sign"] or "").strip() in ("-", "\u2212") or g["inner"]
    return -value if negative else value


def numbers(text: str) -> list[Fraction]:
    """All numbers of the text: 1,234.5  $3  -2  3/4  1 1/2  2e3  \\frac{3}{4}."""
    text = LATEX_FRACTION.sub(r"\1/\2", text)
    return [value for value in map(_value, NUMBER.finditer(text)) if value is not None]


def _clauses(text: str) -> list[str]:
    """The rest of the clause after each "the answer is", last one first."""
    found = []
    for cue in STATED.finditer(text):
        rest = text[cue.end() : cue.end() + 200].lstrip(" :*\n")
        end = CLAUSE_END.search(rest)
        found.append(rest[: end.start()] if end else rest)
    return found[::-1]


def extract_number(text: str, strict: bool = False) -> Fraction | None:
    """The number a text answers with; in an equation such as "is 5 + 3 = 8", its right-hand side."""
    for clause in _clauses(text):
        found = numbers(clause.rpartition("=")[2]) or numbers(clause)
        if found:
            return found[0]
    if strict:
        return None
    found = numbers(text)
    return found[-1] if found else None


def extract_letter(text: str, choices: Mapping[str, str], strict: bool = False) -> str | None:
    """The letter a text answers with. If it names several ("(A) or (B)"), the flexible answer is the
    first and there is no strict one."""
    for clause in _clauses(text):
        letters = _letters(clause, choices)
        if letters and (len(set(letters)) == 1 or not strict):
            return letters[0]
        named = [key for key, value in choices.items()
                 if re.search(rf"(?<!\w){re.escape(value.lower())}(?!\w)", clause.lower())]
        if not letters and len(named) == 1:
            return named[0]
    if strict:
        return None
    letters = _letters(text, choices)
    return letters[-1] if letters else None


def _letters(text: str, choices: Mapping[str, str]) -> list[str]:
    """Letters used as choices: (B)  B)  B.  option B  B. A bare "A" or "I" may be a word."""
    keys = "".join(re.escape(key) for key in choices if len(key) == 1)
    pattern = re.compile(rf"\(([{keys}])\)"
                         rf"|(?<![\w'])([{keys}])(?=\)|[.,:]?\s*$|[.,:]\s|\s+(?:or|and)\b|\s*\()"
                         rf"|\b(?:option|choice)\s+([{keys}])\b"
                         rf"|(?<![\w'])([{keys}])(?![\w'])(?<![AI])")
    return [next(g for g in match.groups() if g) for match in pattern.finditer(text)]


def equal(a: Fraction, b: Fraction) -> bool:
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b))


def show(value: Fraction | None) -> str | None:
    """A number as text, such as 7 or 0.75."""
    if value is None:
        return None
    return str(value.numerator) if value.denominator == 1 else repr(float(value))


def grade(text: str, row: Mapping) -> Grade:
    """Grade a completion against its question row (`task`, `answer`, `choices`)."""
    if row["task"] == "choice":
        loose, strict = (extract_letter(text, row["choices"], s) for s in (False, True))
        return Grade(loose, loose == row["answer"], strict, strict == row["answer"])
    truth = numbers(row["answer"])
    loose, strict = (extract_number(text, s) for s in (False, True))

    def right(value: Fraction | None) -> bool:
        return value is not None and bool(truth) and equal(value, truth[0])

    return Grade(show(loose), right(loose), show(strict), right(strict))
