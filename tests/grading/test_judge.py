"""The judge is all that `grade` uses of srit."""

import ast
from importlib.util import find_spec
from pathlib import Path

from srit.grading.judge import judge_files


def test_the_judge_is_all_that_grade_imports():
    found, todo = set(), ["srit.grading.answers"]
    while todo:
        file = Path(find_spec(todo.pop()).origin)
        if file not in found:
            found.add(file)
            todo += [node.module for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
                     if isinstance(node, ast.ImportFrom) and node.module.startswith("srit.")]
    assert set(judge_files()) == found
