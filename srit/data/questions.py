"""Read and check question and demonstration rows."""

from pathlib import Path

from srit.runtime.files import InputError
from srit.runtime.jsonl import read_lines, require
from srit.runtime.limits import CHOICES, check

TASKS = ("math", "choice")


def check_question(row: dict, where: str) -> dict:
    """Return the row, or raise InputError if it is not a valid question."""
    for key in ("id", "task", "question", "answer"):
        require(row, key, str, where)
    if row["task"] not in TASKS:
        raise InputError(f"{where}: field 'task' must be one of {TASKS}, got {row['task']!r}")
    if not row["question"].strip():
        raise InputError(f"{where}: field 'question' is empty")
    if row["task"] == "choice":
        require(row, "choices", dict, where)
        for label, text in row["choices"].items():
            check(isinstance(text, str), where, f"choice {label!r:.20}", text, "a string")
        check(len(row["choices"]) <= CHOICES, where, "choices", len(row["choices"]),
              f"{CHOICES} at most")
        if row["answer"] not in row["choices"]:
            raise InputError(
                f"{where}: answer {row['answer']!r} is not one of the choices {list(row['choices'])}"
            )
    return row


def _read(path: str | Path, extra: tuple[str, ...]) -> list[dict]:
    lines, seen = read_lines(path), {}
    for where, row in lines:
        check_question(row, where)
        for key in extra:
            require(row, key, str, where)
        if row["id"] in seen:
            raise InputError(f"{where}: duplicate id {row['id']!r}, first seen at {seen[row['id']]}")
        seen[row["id"]] = where
    return [row for _, row in lines]


def read_questions(path: str | Path) -> list[dict]:
    """Question rows: `id`, `task`, `question`, `answer`, and `choices` for multiple choice."""
    return _read(path, ())


def read_demos(path: str | Path) -> list[dict]:
    """Demonstrations: question rows with the teacher's `completion`."""
    return _read(path, ("completion",))


def dataset_name(path: str | Path) -> str:
    """`svamp` for svamp/dev.jsonl (or train, test), `questions` for questions.jsonl."""
    path = Path(path)
    return path.parent.name if path.stem in ("train", "dev", "test") else path.stem
