"""Formats of files, each a function that gives every row as a line of JSON: (place, bytes).

So all are under the limits of JSON Lines, wherever the lines come from.
"""

import codecs
import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, BinaryIO

from srit.runtime.files import InputError
from srit.runtime.jsonl import Line, split_lines
from srit.runtime.limits import JSON_BYTES, ROW_BYTES, parse_json

BATCH = 64  # rows of a table that become Python objects at a time


def file_lines(path: Path) -> Iterator[Line]:
    """Every row of a file as a line of JSON."""
    if not path.is_file():
        raise InputError(f"{path}: no such file, and no data set on the Hub, which is written as "
                         "OWNER/NAME[/CONFIG][@REVISION]:SPLIT")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as handle:
            yield from FORMATS.get(suffix(path), json_lines)(path, handle)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not gzip, or cut off ({error})") from None


def suffix(path: Path) -> str:
    """.csv of rows.CSV and of rows.csv.gz."""
    return PurePosixPath(path.name.lower().removesuffix(".gz")).suffix


def json_lines(path: Path, handle: BinaryIO) -> Iterator[Line]:
    """Lines of JSON; or one list of rows, which is in memory as a whole."""
    lines = split_lines(path, handle)
    first = next(lines, None)
    if first is None:
        return
    if not first[1].lstrip().startswith(b"["):
        yield from itertools.chain([first], lines)
        return
    handle.seek(0)
    data = handle.read(JSON_BYTES + 1)
    if len(data) > JSON_BYTES:
        raise InputError(f"{path}: a list of more than {JSON_BYTES:,} bytes; write it as JSON Lines")
    yield from _numbered(path, parse_json(data.removeprefix(codecs.BOM_UTF8), str(path)))


def csv_lines(path: Path, handle: BinaryIO, header: Sequence[str] | None = None) -> Iterator[Line]:
    """Rows of CSV, all fields strings. The first line names them, unless `header` does."""
    csv.field_size_limit(ROW_BYTES)
    reader = csv.reader(_text_lines(path, handle), strict=True)
    done = 0
    try:
        for fields in reader:
            where, done = f"{path}:{done + 1}", reader.line_num
            if header is None:
                header = fields
                if len(set(header)) < len(header):
                    raise InputError(f"{where}: two columns have one name: {header}")
            elif fields and len(fields) != len(header):
                raise InputError(f"{where}: {len(fields)} fields, but the header has {len(header)}")
            elif fields:
                yield where, _json(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise InputError(f"{path}:{done + 1}: not CSV ({error})") from None


def parquet_lines(path: Path, handle: BinaryIO) -> Iterator[Line]:
    """Rows of a Parquet file."""
    parquet = _pyarrow("pyarrow.parquet", path)
    return _table(path, lambda: parquet.ParquetFile(handle).iter_batches(BATCH))


def arrow_lines(path: Path, handle: BinaryIO) -> Iterator[Line]:
    """Rows of a stream of Arrow batches, as save_to_disk writes."""
    ipc = _pyarrow("pyarrow.ipc", path)
    return _table(path, lambda: ipc.open_stream(handle))


FORMATS = {".jsonl": json_lines, ".json": json_lines, ".csv": csv_lines, ".parquet": parquet_lines,
           ".arrow": arrow_lines}


def _text_lines(path: Path, handle: BinaryIO) -> Iterator[str]:
    for number in itertools.count(1):
        line = handle.readline(ROW_BYTES + 1)
        if not line:
            return
        if len(line) > ROW_BYTES:
            raise InputError(f"{path}:{number}: the line is longer than {ROW_BYTES:,} bytes")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: not UTF-8 ({error.reason})") from None


def _table(path: Path, read: Callable[[], Iterable[Any]]) -> Iterator[Line]:
    from pyarrow import ArrowException

    try:
        parts = (batch.slice(at, BATCH) for batch in read() for at in range(0, len(batch), BATCH))
        yield from _numbered(path, ({key: _without_nulls(value) for key, value in row.items()}
                                    for part in parts for row in part.to_pylist()))
    except (ArrowException, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a table that pyarrow reads ({error})") from None


def _without_nulls(value: Any) -> Any:
    """A column has the fields of all its rows: what one of them does not have is null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _numbered(path: Path, rows: Iterable[Any]) -> Iterator[Line]:
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", _json(row)


def _json(row: Any) -> bytes:
    """The row as a line; dates, decimals and the like as strings."""
    return json.dumps(row, ensure_ascii=False, default=str).encode()


def _pyarrow(module: str, path: Path) -> ModuleType:
    try:
        return import_module(module)
    except ImportError:
        raise InputError(f"{path}: needs pyarrow: pip install 'srit[datasets]'") from None
