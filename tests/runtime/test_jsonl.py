"""JSON Lines: errors name file and line, and every row is counted."""

import json
import tracemalloc

import pytest
from tiny import write_rows

from srit.runtime.files import InputError
from srit.runtime.jsonl import Counts, cut_torn_line, read_jsonl, read_lines, write_jsonl
from srit.runtime.limits import ROW_BYTES


@pytest.mark.parametrize("data, message", [
    (b'{"a": 1}\n{not json\n', ":2: not JSON"),
    (b"[1]\n", ":1: expected an object, got list"),
    (b'{"id": "\xff"}\n', ":1: not UTF-8"),
    (b'{"a": 1}\n{"a": {"b": 1, "c": 2, "b": 1}}\n', ":2: the key 'b' stands twice in one object"),
    (b"\n", "no rows"),
    (b"[" * 100_000, ":1: not JSON"),
    (b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}\n", ":1: not JSON .nested more than 100 deep"),
    (b'{"a": 1' + b"0" * 5000 + b"}\n", ":1: an integer has more than 4,300 digits"),
    (b'{"a": ["\\ud83d"]}\n', ":1: not valid Unicode"),
    (b'{"\\uDE00": 1}\n', ":1: not valid Unicode"),
    (b'{"a": "' + b"x" * ROW_BYTES + b'"}\n', ":1: the row is longer than 4,194,304 bytes"),
])
def test_what_is_not_json_lines_is_named_with_its_line(tmp_path, data, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_jsonl(path)


def test_a_row_that_is_too_long_is_dropped_and_counted_in_bounded_memory(tmp_path):
    """One line of 200 MB, and a file that ends in one."""
    path, counts = tmp_path / "rows.jsonl", Counts("rows")
    with open(path, "wb") as handle:
        for end in (b"\n", b""):
            handle.write(b'{"id": "a"}\n')
            handle.seek(200_000_000, 1)
            handle.write(end)
        handle.truncate()
    tracemalloc.start()
    assert [place.rpartition(":")[2] for place, _ in read_lines(path, counts)] == ["1", "3"]
    assert tracemalloc.get_traced_memory()[1] < 5 * ROW_BYTES
    tracemalloc.stop()
    assert counts.dropped == {"longer than 4,194,304 bytes": 2}
    write_jsonl(path, [{"a": "x" * ROW_BYTES}])
    assert read_lines(path, counts) == [] and counts.dropped.total() == 3


def test_emoji_written_as_two_escapes_are_valid(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"id": "😀", "deep": [[[1]]] * 60}])
    assert b"\\ud83d" in path.read_bytes() and read_jsonl(path)[0]["id"] == "😀"


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


@pytest.mark.parametrize("rows, torn", [(0, 10), (0, 200_000), (1, 0), (1, 2**16), (1, 200_000),
                                        (9, 2**16 - 1), (2**18, 5)])
def test_only_the_tail_is_read_for_a_torn_line(tmp_path, rows, torn):
    path, whole = tmp_path / "rows.jsonl", b'{"id": "0123456789"}\n' * rows
    path.write_bytes(whole + b"x" * torn)
    tracemalloc.start()
    cut_torn_line(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20  # the last file has 5 MiB
    tracemalloc.stop()
    assert path.read_bytes() == whole


def test_counts_add_up():
    counts = Counts("pairs")
    counts.use(3)
    counts.drop("too long", 2)
    assert str(counts) == "pairs: 5 rows in = 3 used, 2 too long"
    assert counts.as_dict() == {"in": 5, "used": 3, "dropped": {"too long": 2}}
