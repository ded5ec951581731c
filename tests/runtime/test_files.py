"""Atomic writes: after a failure the old file or directory is untouched."""

import pytest

from srit.runtime.files import atomic_dir, atomic_write


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
