"""JSON Lines: errors name file and line, and every row is counted."""

import json

import pytest
from tiny import write_rows

from srit.runtime.files import InputError
from srit.runtime.jsonl import Counts, cut_torn_line, read_jsonl, write_jsonl


@pytest.mark.parametrize("data, message", [
    (b'{"a": 1}\n{not json\n', ":2: not JSON"),
    (b"[1]\n", ":1: expected an object, got list"),
    (b'{"id": "\xff"}\n', ":1: not UTF-8"),
    (b"\n", "no rows"),
    (b"[" * 100_000, ":1: not JSON"),
])
def test_what_is_not_json_lines_is_named_with_its_line(tmp_path, data, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_jsonl(path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl")


def test_unicode_survives_a_round_trip(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"id": "a"}, {"id": "ü"}])
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"id": "a"}, {"id": "ü"}]


def test_an_incomplete_last_line_is_cut(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"id": "a"}])
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps({"id": "b"}).encode())
    cut_torn_line(path)
    assert path.read_bytes() == whole


def test_counts_add_up():
    counts = Counts("pairs")
    counts.use(3)
    counts.drop("too long", 2)
    assert str(counts) == "pairs: 5 rows in = 3 used, 2 too long"
    assert counts.as_dict() == {"in": 5, "used": 3, "dropped": {"too long": 2}}
