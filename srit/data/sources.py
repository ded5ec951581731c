"""Where rows come from: files of several formats, directories of `save_to_disk`, data sets on the Hub.

    rows.jsonl  rows.json  rows.csv  rows.parquet      .gz behind the first three
    a directory that save_to_disk of the datasets library wrote
    OWNER/NAME[/CONFIG][@REVISION]:SPLIT               a data set on the Hub
    hf://datasets/OWNER/NAME[@REVISION]/FILE           one file of it

Every row of every format is read as a line of JSON, and so under the limits of JSON Lines.
"""

import codecs
import csv
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, BinaryIO

import yaml

from srit.runtime.files import InputError
from srit.runtime.jsonl import Counts, Line, parse_rows, split_lines
from srit.runtime.limits import JSON_BYTES, ROW_BYTES, parse_json, read_object

REVISION = r"(?:@(?P<revision>(?:refs/(?:convert|pr)/)?[^/:@]+))?"
NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
HUB_SET = re.compile(rf"{NAME}(?:/(?P<config>[\w.-]+))?{REVISION}:(?P<split>[\w.-]+)")
HUB_FILE = re.compile(rf"hf://datasets/{NAME}{REVISION}/(?P<file>[^@]+)")
SHARD = re.compile(r"-\d{5}-of-(\d{5})")
BATCH = 64  # rows of a table that become Python objects at a time


def read_rows(source: str | Path, counts: Counts | None = None) -> list[tuple[str, dict]]:
    """(place, row) of every row, where place is "file:line" or "file: row N".

    A row that is too long is dropped if there are `counts`. Raises InputError naming the place.
    """
    return parse_rows(source, itertools.chain.from_iterable(map(_lines, source_files(source))), counts)


def source_files(source: str | Path) -> list[Path]:
    """The files that reading this source reads; those of the Hub are downloaded."""
    path, name = Path(source), str(source)
    if path.is_dir():
        return _saved_files(path)
    if not path.exists() and (found := HUB_FILE.fullmatch(name)):
        return [_hub_file(name, *found.group("name", "revision", "file"))]
    if not path.exists() and (found := HUB_SET.fullmatch(name)):
        return _hub_files(name, *found.group("name", "config", "revision", "split"))
    return [path]


def _format(path: Path) -> str:
    return PurePosixPath(path.name.lower().removesuffix(".gz")).suffix


def _lines(path: Path) -> Iterator[Line]:
    if not path.is_file():
        raise InputError(f"{path}: no such file, and no data set on the Hub, which is written as "
                         "OWNER/NAME[/CONFIG][@REVISION]:SPLIT")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as handle:
            yield from FORMATS.get(_format(path), json_lines)(path, handle)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not gzip, or cut off ({error})") from None


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


def _saved_files(directory: Path) -> list[Path]:
    """The data files of a directory that save_to_disk wrote."""
    if (directory / "dataset_dict.json").is_file():
        splits = read_object(directory / "dataset_dict.json").get("splits")
        raise InputError(f"{directory}: holds the splits {splits}; name the directory of one of them")
    state = directory / "state.json"
    if not state.is_file():
        raise InputError(f"{directory}: a directory without state.json, so save_to_disk did not write "
                         "it; name a file in it")
    try:
        names = [entry["filename"] for entry in read_object(state)["_data_files"]]
        if all(name == PurePosixPath(name).name for name in names):
            return [directory / name for name in names]
    except (KeyError, TypeError):
        pass
    raise InputError(f"{state}: not one of save_to_disk (_data_files)")


@cache
def _hub_file(source: str, name: str, revision: str | None, file: str) -> Path:
    return Path(_ask_hub(source, "hf_hub_download", name, file, revision=revision))


@cache  # a name is one commit for a whole process
def _hub_files(source: str, name: str, config: str | None, revision: str | None,
               split: str) -> list[Path]:
    """The files of a split: those that `configs` of the README names, else those that are called like
    it, in a folder CONFIG if there is one. Without network, those of the last download."""
    def download(revision: str | None, patterns: list[str]) -> Path:
        # These patterns are fnmatch's, to which ** is * and needs the slash.
        return Path(_ask_hub(source, "snapshot_download", name, revision=revision,
                             allow_patterns=[*patterns, *(p.replace("**/", "") for p in patterns)]))

    readme = download(revision, ["README.md"]) / "README.md"
    patterns = _card_patterns(source, readme, config, split)
    if patterns is None:
        folder = download(readme.parent.name, [f"*{split}*"]) / (config or "")
        called = re.compile(rf"(.*[-._ 0-9/])?{re.escape(split)}([-._ 0-9/].*)?")
        files = [file for file in folder.rglob("*")
                 if called.fullmatch(file.relative_to(folder).as_posix())]
    else:
        folder = download(readme.parent.name, patterns)
        files = [file for pattern in patterns for file in folder.glob(pattern)]
    files = sorted({file for file in files if file.is_file() and _format(file) in FORMATS})
    if not files:
        raise InputError(f"{source}: no file of that split in a format that is read "
                         f"({' '.join(FORMATS)}); name one with hf://datasets/{name}/FILE")
    for file in files:
        if (shard := SHARD.search(file.name)) and int(shard[1]) > len(files):
            raise InputError(f"{source}: {len(files)} of {int(shard[1])} files are there; without "
                             "network only those of the last download are")
    return files


def _card_patterns(source: str, readme: Path, config: str | None, split: str) -> list[str] | None:
    """The patterns of the split's files that the README names; None if it names none at all."""
    if not readme.is_file():
        return None
    from huggingface_hub import metadata_load

    try:
        card = metadata_load(readme) or {}
        configs = {str(entry["config_name"]): entry for entry in card.get("configs") or ()
                   if entry.get("data_files")}
        if not configs:
            return None
        chosen = config or next((n for n, entry in configs.items() if entry.get("default")), "default")
        if chosen not in configs and (config or len(configs) > 1):
            raise InputError(f"{source}: its configs are {sorted(configs)}; write one behind the name, "
                             "OWNER/NAME/CONFIG")
        found = configs.get(chosen) or next(iter(configs.values()))
        listed = [found["data_files"]] if isinstance(found["data_files"], str) else found["data_files"]
        entries = [e if isinstance(e, dict) else {"split": "train", "path": e} for e in listed]
        paths = {str(e["split"]): [e["path"]] if isinstance(e["path"], str) else e["path"]
                 for e in entries}
        outside = any(PurePosixPath(p).is_absolute() or ".." in PurePosixPath(p).parts
                      for patterns in paths.values() for p in patterns)
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        outside = True
    if outside:
        raise InputError(f"{source}: {readme} does not name its files as the Hub's documentation says")
    if split not in paths:
        raise InputError(f"{source}: has the splits {sorted(paths)}")
    return paths[split]


def _ask_hub(source: str, function: str, *arguments: Any, **keywords: Any) -> str:
    import huggingface_hub

    try:
        return getattr(huggingface_hub, function)(*arguments, repo_type="dataset", **keywords)
    except Exception as error:  # no network, no such repository, no such file, no permission
        raise InputError(f"{source}: {type(error).__name__}: "
                         f"{' '.join(str(error).split())[:300]}") from None
