"""The error that is the user's to mend, and writing that never leaves half a file."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class InputError(Exception):
    """Bad input from outside (flag, file, checkpoint): one line, shown without a traceback."""


def _fsync(path: Path) -> None:
    """A file's bytes, or a directory's names."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write a file at, which takes its place when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(fd)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)  # mkstemp makes files only their owner can read
        _fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a file beside `path`, and rename it to `path` only when the block ends without an error."""
    with atomic_path(path) as temporary:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as handle:
            yield handle


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Fill a directory beside `path`, and put it in the place of `path` when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        os.chmod(temporary, 0o755)
        yield temporary
        fsync_tree(temporary)
        rename_over(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def fsync_tree(directory: Path) -> None:
    for file in directory.rglob("*"):
        if file.is_file():
            _fsync(file)


def rename_over(directory: Path, path: Path) -> None:
    """Put `directory` in the place of `path`."""
    if path.exists():  # a directory cannot be renamed over a non-empty one
        old = directory.with_suffix(".old")
        os.rename(path, old)
        os.rename(directory, path)
        shutil.rmtree(old)
    else:
        os.rename(directory, path)
    _fsync(path.parent)


def remove(path: Path) -> None:
    """A file, or a directory with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
