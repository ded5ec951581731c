"""The same rows from every format and place, under the same limits."""

import gzip
import json
import shutil
import sys
import tracemalloc

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hub import COMMIT, forget, serve, use
from tiny import write_rows

from srit.config import SFTConfig
from srit.data import file_formats
from srit.data.inputs import stage_inputs
from srit.data.questions import dataset_name, read_questions
from srit.data.sources import read_rows, source_files
from srit.runtime.files import InputError
from srit.runtime.jsonl import Counts
from srit.runtime.limits import ROW_BYTES

ROWS = [{"id": "a", "text": 'Grüße, "Welt"\nund so'}, {"id": "b", "text": ""}, {"id": "c", "text": "7"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = b'id,text\r\na,"Gr\xc3\xbc\xc3\x9fe, ""Welt""\nund so"\r\nb,\r\n\r\nc,7\r\n'


def table(rows):
    return pa.Table.from_pylist(rows)


def saved(folder, rows, shards=2):
    """A directory as save_to_disk of datasets 5 writes it; `test_as_the_datasets_library` compares."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05}-of-{shards:05}.arrow" for n in range(shards)]
    size = -(-len(rows) // shards)
    for n, name in enumerate(names):
        part = table(rows[n * size : (n + 1) * size])
        with pa.ipc.new_stream(str(folder / name), part.schema) as writer:
            writer.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
    (folder / "cache-1234.arrow").write_bytes(b"of a map, and no data")
    return folder


@pytest.mark.parametrize("name, data, places", [
    ("rows.jsonl", LINES, [":1", ":2", ":3"]),
    ("rows.txt", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n"), [":1", ":3", ":5"]),
    ("rows.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + LINES, mtime=0), [":1", ":2", ":3"]),
    ("rows.json", LINES, [":1", ":2", ":3"]),
    ("rows.json", b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=1).encode(),
     [": row 1", ": row 2", ": row 3"]),
    ("rows.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0),
     [": row 1", ": row 2", ": row 3"]),
    ("rows.csv", CSV, [":2", ":4", ":6"]),
    ("rows.CSV", b"\xef\xbb\xbf" + CSV, [":2", ":4", ":6"]),
    ("rows.csv.gz", gzip.compress(CSV, mtime=0), [":2", ":4", ":6"]),
])
def test_the_same_rows_from_every_format(tmp_path, name, data, places):
    (tmp_path / name).write_bytes(data)
    found = read_rows(tmp_path / name)
    assert [row for _, row in found] == ROWS
    assert [where.removeprefix(f"{tmp_path / name}") for where, _ in found] == places


def test_the_same_rows_from_parquet_and_a_saved_directory(tmp_path):
    parquet.write_table(table(ROWS * 100), tmp_path / "rows.parquet", row_group_size=70)
    found = read_rows(tmp_path / "rows.parquet")
    assert [row for _, row in found] == ROWS * 100
    assert found[-1][0] == f"{tmp_path}/rows.parquet: row 300"
    folder = saved(tmp_path / "set/train", ROWS * 100)
    assert [row for _, row in read_rows(folder)] == ROWS * 100
    assert source_files(folder) == [folder / "data-00000-of-00002.arrow",
                                    folder / "data-00001-of-00002.arrow"]


def test_a_table_says_nothing_of_fields_that_a_row_does_not_have(tmp_path):
    question = {"id": "a", "task": "choice", "question": "?", "choices": {"A": "x"}, "answer": "A"}
    other = {**question, "id": "b", "choices": {"A": "x", "B": "y"}}
    parquet.write_table(table([question, other]), tmp_path / "rows.parquet")
    assert read_questions(tmp_path / "rows.parquet") == [question, other]


@pytest.mark.parametrize("name, data, message", [
    ("rows.jsonl.gz", LINES, "rows.jsonl.gz: not gzip"),
    ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "rows.jsonl.gz: not gzip, or cut off"),
    ("rows.json", b'[{"a": 1}, 2]', "rows.json: row 2: expected an object, got int"),
    ("rows.json", b'[{"a": 1}', "rows.json: not JSON"),
    ("rows.json", b"[" * 1000, "rows.json: not JSON"),
    ("rows.json", b"[]", "no rows"),
    ("rows.json", b'{\n "a": 1\n}', "rows.json:1: not JSON"),
    ("rows.csv", b"a,b\n1,2\n3\n", "rows.csv:3: 1 fields, but the header has 2"),
    ("rows.csv", b"a,b\n1,2\n3,4,5\n", "rows.csv:3: 3 fields, but the header has 2"),
    ("rows.csv", b"a,a\n1,2\n", "rows.csv:1: two columns have one name"),
    ("rows.csv", b'a,b\n1,"2\n', "rows.csv:2: not CSV"),
    ("rows.csv", b"a,b\n\xff,2\n", "rows.csv:2: not UTF-8"),
    ("rows.csv", b"a,b\n1," + b"x" * ROW_BYTES, "rows.csv:2: the line is longer than 4,194,304 bytes"),
    ("rows.csv", b"a\n", "no rows"),
    ("rows.parquet", b"PAR1 and no more", "rows.parquet: not a table that pyarrow reads"),
    ("rows.arrow", b"no stream", "rows.arrow: not a table that pyarrow reads"),
])
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / name)


def test_a_row_that_is_too_long_is_dropped_in_every_format(tmp_path):
    rows = [{"id": "a", "text": "x"}, {"id": "b", "text": "x" * ROW_BYTES}, {"id": "c", "text": "y"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.csv").write_text("id,text\na,x\n" + f'b,"{"x" * (ROW_BYTES - 9)}\n"\n' + "c,y\n")
    parquet.write_table(table(rows), tmp_path / "rows.parquet")
    files = [tmp_path / f"rows.{kind}" for kind in ("json", "csv", "parquet")]
    for source in (*files, saved(tmp_path / "saved", rows)):
        counts = Counts("rows")
        assert [row["id"] for _, row in read_rows(source, counts)] == ["a", "c"]
        assert counts.dropped == {"longer than 4,194,304 bytes": 1}
        with pytest.raises(InputError, match="longer than 4,194,304 bytes"):
            read_rows(source)


def test_a_line_that_gzip_has_made_short_is_read_in_bounded_memory(tmp_path):
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb", 1) as handle:
        handle.write(b'{"a": 1}\n')
        for _ in range(200):
            handle.write(b" " * 2**20)
    counts = Counts("rows")
    tracemalloc.start()
    assert len(read_rows(tmp_path / "rows.jsonl.gz", counts)) == 1
    assert tracemalloc.get_traced_memory()[1] < 5 * ROW_BYTES
    tracemalloc.stop()
    assert counts.dropped == {"longer than 4,194,304 bytes": 1}


def test_a_list_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(file_formats, "JSON_BYTES", 100)
    write_rows(tmp_path / "lines.json", ROWS * 10)
    assert len(read_rows(tmp_path / "lines.json")) == 30
    (tmp_path / "list.json").write_text(json.dumps(ROWS * 10))
    with pytest.raises(InputError, match="list of more than 100 bytes; write it as JSON Lines"):
        read_rows(tmp_path / "list.json")


def test_directories_that_hold_no_rows_are_told_apart(tmp_path):
    saved(tmp_path / "set/train", ROWS)
    with pytest.raises(InputError, match="without state.json"):
        source_files(tmp_path / "set")
    (tmp_path / "set/dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(InputError, match=r"holds the splits \['train'\]; name the directory"):
        source_files(tmp_path / "set")
    for state in ('{"_data_files": [{"filename": "../../other.arrow"}]}', '{"_data_files": 3}', "{}"):
        (tmp_path / "set/train/state.json").write_text(state)
        with pytest.raises(InputError, match="not one of save_to_disk"):
            source_files(tmp_path / "set/train")
    for name in ("no.jsonl", "no/such/file.parquet", "hub:own/set:file"):
        with pytest.raises(InputError, match=r"no such file.*OWNER/NAME"):
            read_rows(name)


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    parquet.write_table(table(ROWS), tmp_path / "rows.parquet")
    folder = saved(tmp_path / "saved", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow.ipc", None)
    for source in (tmp_path / "rows.parquet", folder):
        with pytest.raises(InputError, match=r"needs pyarrow: pip install 'srit\[datasets\]'"):
            read_rows(source)


CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test*}
- config_name: other
  default: true
  data_files: "other/**/*.csv"
---
# A set
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set own/set with two configs on a stand-in for the Hub, and an empty cache."""
    folder = tmp_path / "repository"
    for name in ("main/train-00000-of-00002.parquet", "main/train-00001-of-00002.parquet",
                 "main/test.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table([{"file": name}]), folder / name)
    (folder / "other/deep").mkdir(parents=True)
    (folder / "other/deep/a.csv").write_text("file\ndeep\n")
    (folder / "other/train.csv").write_text("file\nflat\n")
    (folder / "train.py").write_text("raise SystemExit")
    (folder / "README.md").write_text(CARD)
    with serve(folder, "own/set") as (address, asked):
        use(monkeypatch, address, tmp_path / "cache")
        yield folder, asked
    forget()


def contents(source):
    return [row["file"] for _, row in read_rows(source)]


def test_a_split_on_the_hub_is_the_files_that_its_card_names(hub):
    folder, asked = hub
    both = ["main/train-00000-of-00002.parquet", "main/train-00001-of-00002.parquet"]
    assert contents("own/set/main:train") == both
    assert not any("test" in path or "other" in path for path in asked)
    assert contents(f"own/set/main@{COMMIT}:test") == ["main/test.parquet"]
    assert contents("own/set@main:train") == ["deep", "flat"]  # of the default config
    assert contents("hf://datasets/own/set/main/test.parquet") == ["main/test.parquet"]
    assert contents(f"hf://datasets/own/set@{COMMIT}/other/train.csv") == ["flat"]
    assert dataset_name("own/set/main:train") == "set"


def test_a_run_records_the_commit_and_the_files_of_a_set_on_the_hub(hub, tmp_path, monkeypatch):
    (tmp_path / "M").mkdir()
    monkeypatch.chdir(tmp_path)
    files = stage_inputs(SFTConfig("M", ["own/set/main:train"], "o", filter_demos=False))
    assert [file.parts[-3:] for file in files] == [
        (COMMIT, "main", f"train-0000{n}-of-00002.parquet") for n in (0, 1)]
    assert all(file.is_file() for file in files)


def test_without_a_card_files_are_found_by_their_names(hub):
    folder, _ = hub
    (folder / "README.md").unlink()
    (folder / "trainings.csv").write_text("file\nno\n")
    assert contents("own/set:test") == ["main/test.parquet"]
    assert contents("own/set/other:train") == ["flat"]
    assert contents("own/set/main:train") == ["main/train-00000-of-00002.parquet",
                                              "main/train-00001-of-00002.parquet"]
    with pytest.raises(InputError, match="own/set:dev: no file of that split in a format that is read"):
        read_rows("own/set:dev")


@pytest.mark.parametrize("source, card, message", [
    ("own/set/main:dev", CARD, r"has the splits \['test', 'train'\]"),
    ("own/set/none:train", CARD, r"its configs are \['main', 'other'\]"),
    ("own/set:train", CARD.replace("  default: true\n", ""), "its configs are .*OWNER/NAME/CONFIG"),
    ("own/set/main:train", CARD.replace("main/train-*", "../../../*.csv"), "does not name its files"),
    ("own/set/main:train", CARD.replace("main/train-*", "/etc/*.csv"), "does not name its files"),
    ("own/set/main:train", CARD.replace("main/train-*", "main/**.parquet"), "does not name its files"),
    ("own/set/main:train", CARD.replace("main/train-*", "."), "does not name its files"),
    ("own/set/main:train", "---\nconfigs: [3]\n---\n", "does not name its files"),
    ("own/set/main:train", "---\nconfigs: {\n---\n", "does not name its files"),
    ("own/set/main:train", "---\n- a\n---\n", "does not name its files"),
    ("own/set/main@none:train", CARD, "own/set/main@none:train: .*404"),
    ("own/other:train", CARD, "own/other:train: .*404"),
    ("hf://datasets/own/set/none.csv", CARD, "none.csv: .*EntryNotFound"),
])
def test_what_the_hub_does_not_have_is_said_in_one_line(hub, source, card, message):
    (hub[0] / "README.md").write_text(card)
    with pytest.raises(InputError, match=message) as error:
        read_rows(source)
    assert "\n" not in str(error.value)


def test_without_network_the_last_download_is_read(hub, monkeypatch):
    first = source_files("own/set/main:train")
    forget()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert source_files("own/set/main:train") == first
    forget()
    with pytest.raises(InputError, match="own/set/main:test: "):
        source_files("own/set/main:test")


def test_a_split_of_which_a_file_is_missing_is_refused(hub):
    (hub[0] / "main/train-00001-of-00002.parquet").unlink()
    with pytest.raises(InputError, match="own/set/main:train: 1 of 2 files are there"):
        source_files("own/set/main:train")


def test_a_name_is_one_commit_for_a_whole_process(hub):
    first = source_files("own/set/main:test")
    asked = len(hub[1])
    assert source_files("own/set/main:test") == first and len(hub[1]) == asked


def test_as_the_datasets_library(hub, tmp_path):
    """The same rows as load_dataset gives of that repository, and load_from_disk of a directory."""
    import datasets

    folder, _ = hub
    shutil.rmtree(folder / "other")
    card = CARD[: CARD.index("- config_name: other")] + "---\n"
    for text, config in ((card, "main"), ("", None)):
        (folder / "README.md").write_text(text)
        for split in ("train", "test"):
            theirs = datasets.load_dataset(str(folder), config, split=split,
                                           cache_dir=str(tmp_path / "theirs"))
            assert contents(f"own/set:{split}") == theirs["file"]
            forget()
        shutil.rmtree(tmp_path / "cache")
    rows = [{"messages": [{"role": "user", "content": str(n)}], "score": n / 3} for n in range(200)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved/train", num_shards=3)
    assert [row for _, row in read_rows(tmp_path / "saved/train")] == rows
    datasets.DatasetDict(a=datasets.Dataset.from_list(rows)).save_to_disk(tmp_path / "dict")
    assert [row for _, row in read_rows(tmp_path / "dict/a")] == rows
    with pytest.raises(InputError, match=r"holds the splits \['a'\]"):
        read_rows(tmp_path / "dict")
