"""Read and write JSON Lines with every row checked, and count what each stage used and dropped."""

import codecs
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import BinaryIO

from srit.runtime.files import InputError, atomic_write
from srit.runtime.limits import ROW_BYTES, check, is_integer, parse_json

Line = tuple[str, bytes]  # place (for messages), text of a row


def read_lines(path: str | Path, counts: "Counts | None" = None) -> list[tuple[str, dict]]:
    """(place, row) of every row, where place is "file:line". Raises InputError naming the place.

    A row of more than ROW_BYTES, of which no more is held in memory, is dropped if there are `counts`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as handle:
        return parse_rows(path, split_lines(path, handle), counts)


def split_lines(path: str | Path, handle: BinaryIO) -> Iterator[Line]:
    """Every line that is not blank, without a byte order mark; of a long one ROW_BYTES + 1 bytes."""
    for number in itertools.count(1):
        line = handle.readline(ROW_BYTES + 1)
        if not line:
            return
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        too_long = len(line) > ROW_BYTES
        rest = line if too_long else b""
        while rest and not rest.endswith(b"\n"):
            rest = handle.readline(ROW_BYTES)
        if too_long or line.strip():
            yield f"{path}:{number}", line


def parse_rows(path: str | Path, lines: Iterable[Line],
               counts: "Counts | None" = None) -> list[tuple[str, dict]]:
    """(place, row) of lines that each hold a JSON object, as `read_lines`."""
    rows, too_long = [], f"longer than {ROW_BYTES:,} bytes"
    for where, line in lines:
        if len(line) > ROW_BYTES:
            if counts is None:
                raise InputError(f"{where}: the row is {too_long}")
            counts.drop(too_long)
            continue
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object, got {type(row).__name__}")
        rows.append((where, row))
    if not rows and not (counts and counts.dropped):
        raise InputError(f"{path}: no rows")
    return rows


def read_jsonl(path: str | Path) -> list[dict]:
    """All rows of a JSON Lines file."""
    return [row for _, row in read_lines(path)]


def has_rows(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def cut_torn_line(path: Path) -> None:
    """Drop an incomplete last line, which a killed run leaves behind."""
    if path.is_file():
        with open(path, "r+b") as handle:
            start, newline = handle.seek(0, os.SEEK_END), -1
            while start > 0 and newline < 0:  # block by block from the end
                end, start = start, max(0, start - 2**16)
                handle.seek(start)
                newline = handle.read(end - start).rfind(b"\n")
            handle.truncate(start + newline + 1)


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write rows atomically: one JSON object per line, UTF-8."""
    with atomic_write(path) as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def require(row: dict, key: str, kind: type | UnionType, where: str) -> None:
    """Raise InputError unless the row has this field with this type; a bool is no int."""
    if key not in row:
        raise InputError(f"{where}: the row has no field '{key}' (it has {sorted(row)})")
    if not isinstance(row[key], kind) or (kind is int and isinstance(row[key], bool)):
        wanted = kind.__name__ if isinstance(kind, type) else kind
        raise InputError(f"{where}: field '{key}' must be {wanted}, got {type(row[key]).__name__}")


def check_spans(spans: object, text: str, where: str, name: str) -> None:
    """Raise InputError unless these are spans [start, end) of the text, in order, apart, none empty."""
    check(isinstance(spans, list), where, name, spans, "a list of [start, end]")
    done = 0
    for span in spans:
        ok = (isinstance(span, list) and len(span) == 2 and is_integer(span[0], done, len(text))
              and is_integer(span[1], span[0] + 1, len(text)))
        check(ok, where, f"a span of {name}", span,
              f"[start, end] from {done} to {len(text)}, the end of the text, and not empty")
        done = span[1]


class Counts:
    """Rows in = used + dropped by reason, each counted once; and what the used ones hold."""

    def __init__(self, name: str) -> None:
        self.name, self.used, self.dropped, self.held = name, 0, Counter(), Counter()

    def use(self, n: int = 1) -> None:
        self.used += n

    def drop(self, reason: str, n: int = 1) -> None:
        self.dropped[reason] += n

    def as_dict(self) -> dict:
        return {
            "in": self.used + sum(self.dropped.values()),
            "used": self.used,
            "dropped": dict(self.dropped),
            **self.held,
        }

    def __str__(self) -> str:
        total = self.used + sum(self.dropped.values())
        reasons = "".join(f", {n:,} {reason}" for reason, n in self.dropped.most_common())
        held = "".join(f"; {n:,} {what.replace('_', ' ')}" for what, n in self.held.items())
        return f"{self.name}: {total:,} rows in = {self.used:,} used{reasons}{held}"
