"""Where rows come from: files of several formats, directories of `save_to_disk`, data sets on the Hub.

    rows.jsonl  rows.json  rows.csv  rows.parquet      .gz behind the first three
    a directory that save_to_disk of the datasets library wrote
    OWNER/NAME[/CONFIG][@REVISION]:SPLIT               a data set on the Hub
    hf://datasets/OWNER/NAME[@REVISION]/FILE           one file of it
"""

import itertools
from pathlib import Path, PurePosixPath

from srit.data.file_formats import file_lines
from srit.data.hub import HUB_FILE, HUB_SET, hub_file, hub_files
from srit.runtime.files import InputError
from srit.runtime.jsonl import Counts, parse_rows
from srit.runtime.limits import read_object


def read_rows(source: str | Path, counts: Counts | None = None) -> list[tuple[str, dict]]:
    """(place, row) of every row, where place is "file:line" or "file: row N".

    A row that is too long is dropped if there are `counts`. Raises InputError naming the place.
    """
    lines = itertools.chain.from_iterable(map(file_lines, source_files(source)))
    return parse_rows(source, lines, counts)


def source_files(source: str | Path) -> list[Path]:
    """The files that reading this source reads; those of the Hub are downloaded."""
    path, name = Path(source), str(source)
    if path.is_dir():
        return _saved_files(path)
    if not path.exists() and (found := HUB_FILE.fullmatch(name)):
        return [hub_file(name, *found.group("name", "revision", "file"))]
    if not path.exists() and (found := HUB_SET.fullmatch(name)):
        return hub_files(name, *found.group("name", "config", "revision", "split"))
    return [path]


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
