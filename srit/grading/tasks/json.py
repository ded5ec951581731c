"""json: an object with the keys and values of the ground truth, in any order.

Numbers are compared by value (1 is 1.0, but not true), strings exactly, lists in their order.
"""

import json
from collections.abc import Mapping
from typing import Any

from srit.grading.final_answer import completed
from srit.runtime.files import InputError
from srit.runtime.limits import parse_json

DECODER = json.JSONDecoder()


def show(answer: dict) -> str:
    return json.dumps(answer, ensure_ascii=False)


def check(row: Mapping, where: str) -> None:
    value = parse_json(row["answer"].encode("utf-8", "surrogatepass"), f"{where}: answer")
    if not isinstance(value, dict):
        raise InputError(f"{where}: answer must be a JSON object for task json, got "
                         f"{row['answer']!r:.80}")
    if not equal(value, row):
        raise InputError(f"{where}: answer holds NaN, which no answer is equal to, not even itself")


def extract(text: str, row: Mapping) -> tuple[dict | None, dict | None]:
    """The last object of the text; strictly, the only thing in it, or in a fence (```json)."""
    text = completed(text)
    found, rest, at = None, [], 0
    while (start := text.find("{", at)) >= 0:
        try:
            found, end = DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            start = end = start + 1
        rest.append(text[at:start])
        at = end
    alone = "".join([*rest, text[at:]]).replace("json", "").strip(" \n`") == ""
    return found, found if alone else None


def equal(answer: dict, row: Mapping) -> bool:
    return _same(answer, json.loads(row["answer"]))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b
