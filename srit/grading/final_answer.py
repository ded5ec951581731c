"""The words that a completion gives as its answer, for tasks that compare more than a number."""

import re

from srit.grading.answers import NEXT_QUESTION, THOUGHT, THOUGHT_END

BOX = re.compile(r"\\(?:boxed|fbox) ?\{")
CUE = re.compile(r"####|\banswers?(?: \w+){0,3}? (?:is|are)\b:?|\banswer\W{0,3}:", re.I)
# The end of a sentence, unless it is that of an abbreviation or an initial: St. Louis, J. Smith.
SENTENCE_END = re.compile(r"(?<!\b[A-Z])(?<!\b[A-Z][a-z])[.!?](?=\s+[A-Z])")


def completed(text: str) -> str:
    """The completion without a thought, and without a question that it asks itself; "" for one that is
    cut within its thought."""
    shown = THOUGHT.split(THOUGHT_END.split(text)[-1])[0]
    return next((part for part in NEXT_QUESTION.split(shown) if part.strip()), "")


def final_answer(text: str) -> tuple[str | None, str | None]:
    """Flexible and strict: the last \\boxed{...}, else what is behind the last "answer is", "Answer:"
    or ####, to the end of its sentence; flexible, without any of these, the last line."""
    text = completed(text)
    if boxes := [match.end() for match in BOX.finditer(text)]:
        inside = _closed(text[boxes[-1]:])
        return inside, inside
    strict = None
    if cues := list(CUE.finditer(text)):
        lines = text[cues[-1].end():].strip("*_ \n").splitlines()
        strict = SENTENCE_END.split(lines[0])[0].strip() if lines else None
    lines = text.strip().splitlines()
    return strict or (lines[-1].strip() if lines else None), strict or None


def _closed(text: str) -> str | None:
    """What stands before the brace that closes; None if none does."""
    depth = 1
    for brace in re.finditer(r"(?<!\\)[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[:brace.start()].strip() or None
    return None
