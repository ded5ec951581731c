"""What the judge consists of: gradings made by another judge are not this one's."""

from pathlib import Path

from srit.grading import answers, numerals


def judge_files() -> list[Path]:
    """The source files behind `grade`, which every stage that grades has among its inputs."""
    return [Path(module.__file__) for module in (answers, numerals)]
