"""JSON Lines, counts, atomic writes: what is wrong is named, and nothing is half written."""

import json

import pytest

from srit.data.questions import dataset_name, read_demos, read_questions
from srit.runtime.files import InputError, atomic_dir, atomic_write
from srit.runtime.jsonl import Counts, read_jsonl, write_jsonl

GOOD = {"id": "a", "task": "math", "question": "1 + 1?", "answer": "2"}


def put(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(line if isinstance(line, bytes) else
                              (json.dumps(line) + "\n").encode() for line in lines))
    return path


def test_round_trip_keeps_unicode_and_blank_lines_do_not_count(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "id": "ü"}])
    assert [r["id"] for r in read_questions(tmp_path / "rows.jsonl")] == ["a", "ü"]
    path = put(tmp_path, b"\n", GOOD, b"\n", {**GOOD, "id": "b", "answer": 2})
    with pytest.raises(InputError, match=r"rows\.jsonl:4: field 'answer' must be str, got int"):
        read_questions(path)


@pytest.mark.parametrize("lines,message", [
    ([GOOD, b"{not json\n"], r":2: not JSON"),
    ([b"[1]\n"], ":1: expected an object, got list"),
    ([b'{"id": "\xff"}\n'], ":1: not UTF-8"),
    ([b"\n"], "no rows"),
    ([b"[" * 100_000], ":1: not JSON"),
    ([{k: v for k, v in GOOD.items() if k != "answer"}], ":1: the row has no field 'answer'"),
    ([{**GOOD, "task": "poem"}], "'task' must be one of"),
    ([{**GOOD, "question": " "}], "'question' is empty"),
    ([{**GOOD, "task": "choice"}], "no field 'choices'"),
    ([{**GOOD, "task": "choice", "choices": {"A": "x"}, "answer": "B"}], "not one of the choices"),
    ([GOOD, GOOD], r":2: id 'a' stands already at .*:1"),
])
def test_malformed_rows_are_named(tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        read_questions(put(tmp_path, *lines))


def test_missing_file_and_missing_completion(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="no field 'completion'"):
        read_demos(put(tmp_path, GOOD))


def test_dataset_name():
    assert dataset_name("data/svamp/dev.jsonl") == "svamp"
    assert dataset_name("data/demos/svamp.jsonl") == "svamp"


def test_counts_add_up():
    counts = Counts("pairs")
    counts.use(3)
    counts.drop("too long", 2)
    assert str(counts) == "pairs: 5 rows in = 3 used, 2 too long"
    assert counts.as_dict() == {"in": 5, "used": 3, "dropped": {"too long": 2}}


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "f.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as handle:
        handle.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as handle:
        handle.write("new")
    assert path.read_text() == "new"


def test_atomic_dir_replaces_whole_directories(tmp_path):
    path = tmp_path / "d"
    for text in ("one", "two"):
        with atomic_dir(path) as inside:
            (inside / text).write_text(text)
    assert [p.name for p in path.iterdir()] == ["two"]
    with pytest.raises(RuntimeError), atomic_dir(path) as inside:
        (inside / "three").write_text("half")
        raise RuntimeError
    assert [p.name for p in path.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
