"""The tasks' truths, the user's own judge, and what counts as the judge's code."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from srit.config import QuestionConfig
from srit.data.questions import check_question
from srit.grading.judge import TASKS, Grade, grade, judge_files, load_judge
from srit.runtime.files import InputError
from srit.text.prompts import DEFAULT, INSTRUCTIONS

ROW = {"id": "a", "task": "math", "question": "How many?", "answer": "7"}


def verifier(folder, code):
    file = folder / "my_judge.py"
    file.write_text(code)
    return f"{file}:judge"


def test_the_judge_is_all_that_grade_imports_of_grading():
    found, todo = set(), ["srit.grading.judge"]
    while todo:
        file = Path(find_spec(todo.pop()).origin)
        if file.name != "__init__.py" and file not in found:
            found.add(file)
            names = [(node.module, alias.name) for node in ast.walk(ast.parse(file.read_text("utf-8")))
                     if isinstance(node, ast.ImportFrom) for alias in node.names]
            todo += [name for module, own in names if module.startswith("srit.grading")
                     for name in (module, f"{module}.{own}") if _is_module(name)]
    assert set(judge_files(DEFAULT)) == found


def _is_module(name):
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # a function of a module
        return False


def test_every_task_has_an_instruction():
    assert TASKS.keys() == INSTRUCTIONS.keys()


@pytest.mark.parametrize("task, answer, message", [
    ("math", "x^2+1", "one number for task math.*task expression.*got 'x"),
    ("math", r"\frac{\sqrt{3}}{2}", "one number"), ("math", "(3, 5)", "one number"),
    ("math", "Paris", "exact"), ("math", "Infinity", "one number"), ("math", "NaN", "one number"),
    ("math", "", "one number"), ("math", "12 apples", "one number"), ("math", "5-6", "one number"),
    ("math", "07:30", "one number"), ("math", "2^10", "one number"), ("math", "3 4", "one number"),
    ("choice", "C", r"one of the choices \['A', 'B'\]"),
    ("exact", " ", "a text of one line"), ("exact", "two\nlines", "a text of one line"),
    ("json", "{'a': 1}", "answer: not JSON"), ("json", "[1]", "a JSON object"),
    ("json", '{"a": [NaN]}', "answer holds NaN"),
    ("expression", "Paris", "LaTeX that math-verify reads"), ("expression", r"\frac{1", "LaTeX"),
    ("expression", "2 +", "LaTeX"), ("expression", "", "LaTeX"),
    ("poem", "x", "must be one of .*'code'.*--verifier of your own"),
    ("code", "assert f(1) == 2", "--allow_code_execution True"),
])
def test_a_truth_that_its_judge_cannot_hold_is_refused(task, answer, message):
    row = {**ROW, "task": task, "answer": answer, "choices": {"A": "x", "B": "y"}}
    with pytest.raises(InputError, match=f"rows.jsonl:3: .*{message}"):
        check_question(row, "rows.jsonl:3")


@pytest.mark.parametrize("answer, completion", [
    ("10^6", "The answer is 1000000."), (r"\boxed{7}", "#### 7"), (".5", "The answer is 1/2"),
    ("$1,234.50", "It is 1234.5"), ("2/3", r"\boxed{\frac{2}{3}}"), ("-3", "The answer is −3."),
    ("0.6666666666666666", "The answer is 2/3."), ("40%", "The answer is 40%")])
def test_a_truth_of_task_math_is_one_number_however_it_is_written(answer, completion):
    row = check_question({**ROW, "answer": answer}, "rows.jsonl:1")
    assert grade(completion, row).correct
    assert not grade("The answer is 5.", row).correct


JUDGE = """from __future__ import annotations
from dataclasses import dataclass
from srit.grading.judge import Grade
@dataclass
class Any:
    name: str
def judge(text, row):
    return {"true": True, "one": 1, "half": 0.5, "grade": Grade("x", True, None, False, 0.25),
            "two": 2, "nan": float("nan"), "text": "yes", "none": None,
            "odd": Grade(7, True, None, False)}[text] if text != "fails" else row["gone"]
"""


@pytest.mark.parametrize("text, expected", [
    ("true", Grade("true", True, "true", True)), ("one", Grade("one", True, "one", True, 1)),
    ("half", Grade("half", False, "half", False, 0.5)), ("grade", Grade("x", True, None, False, 0.25))])
def test_a_verifier_returns_a_bool_a_share_or_a_grade(tmp_path, text, expected):
    judge = load_judge(QuestionConfig(verifier=verifier(tmp_path, JUDGE)))
    assert judge(text, check_question({**ROW, "task": "custom"}, "f:1", judge)) == expected


@pytest.mark.parametrize("text", ["two", "nan", "text", "none", "odd"])
def test_what_else_it_returns_is_refused_with_the_row(tmp_path, text):
    judge = load_judge(QuestionConfig(verifier=verifier(tmp_path, JUDGE)))
    with pytest.raises(InputError, match="judge: row 'a': must return a bool, a number from 0 to 1"):
        judge(text, ROW)


def test_a_float_of_numpy_is_a_number(tmp_path):
    code = "import numpy\ndef judge(text, row): return numpy.float64(text)"
    judge = load_judge(QuestionConfig(verifier=verifier(tmp_path, code)))
    assert judge("0.5", ROW) == Grade("0.5", False, "0.5", False, 0.5)
    assert judge("1", ROW).correct is True


def test_what_it_does_to_its_row_is_its_own(tmp_path):
    code = "def judge(text, row):\n    row['choices'].pop('A'); row['answer'] = 'x'; return True"
    judge = load_judge(QuestionConfig(verifier=verifier(tmp_path, code)))
    row = {**ROW, "choices": {"A": "x"}}
    assert judge("", row).correct and row == {**ROW, "choices": {"A": "x"}}


def test_it_cannot_end_the_run(tmp_path):
    """sys.exit(0) would leave a stage half done, with the status of one that finished."""
    code = "import sys\ndef judge(text, row): sys.exit(0)"
    judge = load_judge(QuestionConfig(verifier=verifier(tmp_path, code)))
    with pytest.raises(InputError, match=r"row 'a': SystemExit: 0 \(.*my_judge.py:2\)"):
        judge("", ROW)


def test_an_error_in_it_names_the_row_and_the_line(tmp_path):
    judge = load_judge(QuestionConfig(verifier=verifier(tmp_path, JUDGE)))
    with pytest.raises(InputError, match=r"row 'a': KeyError: 'gone' \(.*my_judge.py:10\)"):
        judge("fails", ROW)


@pytest.mark.parametrize("code, message", [
    ("1 / 0", r"ZeroDivisionError: division by zero \(.*my_judge.py:1\)"),
    ("def judge(", "SyntaxError: .*my_judge.py"), ("judge = 7", "has no function 'judge'")])
def test_a_file_without_a_judge_is_refused(tmp_path, code, message):
    with pytest.raises(InputError, match=f"--verifier .*my_judge.py:judge: .*{message}"):
        load_judge(QuestionConfig(verifier=verifier(tmp_path, code)))
    for name in ("judge.py", f"{tmp_path}/gone.py:judge", f"{tmp_path}:judge"):
        for reader in (load_judge, judge_files):
            with pytest.raises(InputError, match="must name a Python file and a function"):
                reader(QuestionConfig(verifier=name))


def test_one_line_says_that_the_code_of_a_verifier_runs_and_its_file_is_an_input(tmp_path, capsys):
    cfg = QuestionConfig(verifier=verifier(tmp_path, "def judge(text, row):\n    return True\n"))
    load_judge(cfg), load_judge(cfg)
    assert capsys.readouterr().out == (
        f"--verifier {cfg.verifier}: runs the code of that file, with your rights\n")
    assert judge_files(cfg)[1:] == [tmp_path / "my_judge.py"]
