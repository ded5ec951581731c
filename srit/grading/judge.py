"""The judge of completions: the module of the row's task, or the user's own function (`--verifier`)."""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any

from srit.config import QuestionConfig
from srit.grading import answers, final_answer, numerals
from srit.grading.tasks import choice, code, exact, expression, json, math
from srit.runtime import distributed
from srit.runtime.files import InputError

TASKS = {"math": math, "choice": choice, "expression": expression, "exact": exact, "json": json,
         "code": code}


@dataclass(frozen=True)
class Grade:
    """Flexible and strict answer, whether each is right, and of some verifiers a score from 0 to 1."""

    extracted: str | None
    correct: bool
    strict_extracted: str | None
    strict_correct: bool
    score: float | None = None


@dataclass(frozen=True)
class Judge:
    """What checks the ground truth of rows, and grades completions.

    verifier: the user's function, which judges instead of the tasks' modules; name: as in --verifier.
    """

    verifier: Callable[[str, Mapping], bool | float | Grade] | None = None
    name: str = ""
    allow_code_execution: bool = False

    def check(self, row: Mapping, where: str) -> None:
        """Raise InputError for a task that nobody judges, or a truth that its judge cannot hold."""
        if self.verifier is None or row["task"] == "choice":  # a prompt shows the choices
            self._task(row, where).check(row, where)

    def __call__(self, text: str, row: Mapping) -> Grade:
        """The grade of a completion of this question row."""
        where = f"row {row.get('id')!r}"
        if self.verifier is not None:
            return self._verify(text, row, f"--verifier {self.name}: {where}")
        task = self._task(row, where)
        flexible, strict = found = task.extract(text, row)
        right = flexible is not None and task.equal(flexible, row)
        strict_right = right if strict == flexible else strict is not None and task.equal(strict, row)
        shown, strict_shown = (answer if answer is None else task.show(answer) for answer in found)
        return Grade(shown, right, strict_shown, strict_right)

    def _task(self, row: Mapping, where: str) -> ModuleType:
        task = row["task"]
        if task not in TASKS:
            raise InputError(f"{where}: field 'task' must be one of {tuple(TASKS)}, got {task!r}; any "
                             "other needs a --verifier of your own (docs/judges.md)")
        if task == "code" and not self.allow_code_execution:
            raise InputError(f"{where}: task 'code' runs programs that a model wrote; if they may run "
                             "here, give --allow_code_execution True")
        return TASKS[task]

    def _verify(self, text: str, row: Mapping, where: str) -> Grade:
        try:
            found = self.verifier(text, deepcopy(row))  # it may keep or change what it gets
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            raise InputError(f"{where}: {_told(error)}") from error
        result = found
        if isinstance(found, int | float):
            said = text.strip() or None
            score = None if isinstance(found, bool) else found
            right = bool(found == 1)  # of a float of numpy, too
            result = Grade(said, right, said, right, score)
        if not _is_valid(result):
            raise InputError(f"{where}: must return a bool, a number from 0 to 1, or a Grade of such, "
                             f"got {found!r:.200}")
        return result


grade = Judge()  # without a verifier, and without permission to run code


def load_judge(cfg: QuestionConfig) -> Judge:
    """The judge that the settings ask for. A verifier is loaded once, which one line says."""
    if cfg.verifier is None:
        return Judge(allow_code_execution=cfg.allow_code_execution)
    return Judge(_load_verifier(cfg.verifier), cfg.verifier)


def judge_files(cfg: QuestionConfig) -> list[Path]:
    """The files behind the judge, which every stage that grades has among its inputs: gradings made by
    another judge are not this one's."""
    if cfg.verifier is not None:
        return [Path(__file__), _verifier_file(cfg.verifier)]
    modules = (answers, final_answer, numerals, *TASKS.values())
    return [Path(__file__), *(Path(module.__file__) for module in modules)]


def _verifier_file(name: str) -> Path:
    file = Path(name.rpartition(":")[0])
    if not file.is_file() or file.suffix != ".py":
        raise InputError(f"--verifier {name}: must name a Python file and a function, as in "
                         "my_judge.py:judge")
    return file


@cache
def _load_verifier(name: str) -> Callable:
    file, function = _verifier_file(name), name.rpartition(":")[2]
    if distributed.rank() == 0:
        print(f"--verifier {name}: runs the code of that file, with your rights", flush=True)
    spec = importlib.util.spec_from_file_location("srit_verifier", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"--verifier {name}: {_told(error)}") from error
    verifier = getattr(module, function, None)
    if not callable(verifier):
        raise InputError(f"--verifier {name}: the file has no function {function!r}")
    return verifier


def _told(error: BaseException) -> str:
    frame = extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"


def _is_valid(result: Any) -> bool:
    return (isinstance(result, Grade)
            and isinstance(result.correct, bool) and isinstance(result.strict_correct, bool)
            and isinstance(result.extracted, str | None)
            and isinstance(result.strict_extracted, str | None)
            and isinstance(result.score, int | float | None)
            and (result.score is None or 0 <= result.score <= 1))
