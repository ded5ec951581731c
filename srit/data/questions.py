"""Read and check question and demonstration rows."""

from pathlib import Path

from srit.data.hub import HUB_SET
from srit.data.sources import read_rows
from srit.grading.judge import Judge, grade
from srit.runtime.files import InputError
from srit.runtime.jsonl import require


def check_question(row: dict, where: str, judge: Judge = grade) -> dict:
    """Return the row, or raise InputError if it is no valid question with a truth for its judge."""
    for key in ("id", "task", "question", "answer"):
        require(row, key, str, where)
    if not row["question"].strip():
        raise InputError(f"{where}: field 'question' is empty")
    judge.check(row, where)
    return row


def read_questions(path: str | Path, judge: Judge = grade, demos: bool = False) -> list[dict]:
    """Question rows: `id`, `task`, `question`, `answer`, and `choices` for multiple choice."""
    lines, seen = read_rows(path), {}
    for where, row in lines:
        check_question(row, where, judge)
        if demos:
            require(row, "completion", str, where)
        if row["id"] in seen:
            raise InputError(f"{where}: duplicate id {row['id']!r}, first seen at {seen[row['id']]}")
        seen[row["id"]] = where
    return [row for _, row in lines]


def read_demos(path: str | Path, judge: Judge = grade) -> list[dict]:
    """Demonstrations: question rows with the teacher's `completion`."""
    return read_questions(path, judge, demos=True)


def dataset_name(path: str | Path) -> str:
    """`svamp` for svamp/dev.jsonl (or train, test), `questions` for questions.jsonl.gz, `set` for
    the data set owner/set:test of the Hub."""
    if found := HUB_SET.fullmatch(str(path)):
        return found["name"].split("/")[1]
    path = Path(str(path).removesuffix(".gz"))
    return path.parent.name if path.stem in ("train", "dev", "test") else path.stem
