"""Question and demonstration rows: errors name file and line."""

import json

import pytest

from srit.data.questions import dataset_name, read_demos, read_questions
from srit.runtime.files import InputError

GOOD = {"id": "a", "task": "math", "question": "1 + 1?", "answer": "2"}


def put(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(line if isinstance(line, bytes) else
                              (json.dumps(line) + "\n").encode() for line in lines))
    return path


def test_blank_lines_are_skipped_but_counted_in_line_numbers(tmp_path):
    good = put(tmp_path, b"\n", GOOD, b"\n", {**GOOD, "id": "ü"})
    assert [r["id"] for r in read_questions(good)] == ["a", "ü"]
    bad = put(tmp_path, b"\n", GOOD, b"\n", {**GOOD, "id": "b", "answer": 2})
    with pytest.raises(InputError, match=r"rows\.jsonl:4: field 'answer' must be str, got int"):
        read_questions(bad)


@pytest.mark.parametrize("lines, message", [
    ([GOOD, b"{not json\n"], ":2: not JSON"),
    ([{k: v for k, v in GOOD.items() if k != "answer"}], ":1: the row has no field 'answer'"),
    ([{**GOOD, "task": "poem"}], "'task' must be one of"),
    ([{**GOOD, "question": " "}], "'question' is empty"),
    ([{**GOOD, "task": "choice"}], "no field 'choices'"),
    ([{**GOOD, "task": "choice", "choices": {"A": "x"}, "answer": "B"}], "must be one of the choices"),
    ([{**GOOD, "task": "choice", "choices": {"A": 5}, "answer": "A"}],
     "choice 'A' must be a string, got 5"),
    ([{**GOOD, "task": "choice", "choices": {str(n): "x" for n in range(27)}, "answer": "1"}],
     "choices must be 26 at most, got 27"),
    ([GOOD, GOOD], r":2: duplicate id 'a', first seen at .*rows\.jsonl:1"),
])
def test_a_malformed_question_is_named_with_its_line(tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        read_questions(put(tmp_path, *lines))


def test_a_demonstration_needs_a_completion(tmp_path):
    with pytest.raises(InputError, match="no field 'completion'"):
        read_demos(put(tmp_path, GOOD))


def test_the_data_set_is_named_after_its_file_or_folder():
    assert dataset_name("data/svamp/dev.jsonl") == "svamp"
    assert dataset_name("data/demos/svamp.jsonl") == "svamp"
