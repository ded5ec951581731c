"""The examples of docs/judges.md do what the page says."""

import json
import re
from pathlib import Path

import pytest

from srit.config import QuestionConfig
from srit.data.questions import check_question
from srit.grading.judge import TASKS, Judge, load_judge
from srit.grading.tasks import code

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "judges.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n# (\w+\.py)\n(.*?)^```\n\n```json\n(.*?)^```", PAGE, re.M | re.S)


@pytest.mark.parametrize("name, source, rows", EXAMPLES)
def test_an_example_judges_its_rows_as_shown(tmp_path, name, source, rows):
    (tmp_path / name).write_text(source)
    judge = load_judge(QuestionConfig(verifier=f"{tmp_path}/{name}:judge"))
    for row in map(json.loads, rows.splitlines()):
        check_question(row, "row", judge)
        found = judge(row["text"], row)
        assert (found.correct if found.score is None else found.score) == row["gives"], row


def test_the_page_has_its_examples_and_a_row_of_every_task(monkeypatch):
    monkeypatch.setattr(code, "check_sandbox", lambda: None)
    assert [name for name, _, _ in EXAMPLES] == ["units.py", "sql.py", "form.py"]
    rows = [json.loads(row) for row in re.findall(r'`(\{"task".*?\})` \|$', PAGE, re.M)]
    assert {row["task"] for row in rows} == TASKS.keys()
    pytest.importorskip("math_verify")
    for row in rows:
        check_question({"id": "a", "question": "?", **row}, "row", Judge(allow_code_execution=True))
