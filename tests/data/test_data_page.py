"""docs/data.md: every example is read as it says, and the published sets are those of the code."""

import json
import re
from pathlib import Path

import pytest
from templates import family_tokenizer
from tiny import write_rows

from srit.commands.data import GYM
from srit.commands.published import PUBLISHED
from srit.data.examples import read_pairs, read_sft
from srit.data.hub import HUB_FILE, HUB_SET
from srit.data.questions import read_demos, read_questions

TEXT = (Path(__file__).resolve().parents[2] / "docs/data.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|]+) \| `(\{.*\})` \| (.+) \|$", TEXT, re.M)


@pytest.mark.parametrize("name, row, stages", ROWS)
def test_every_example_is_read_by_its_stages(tmp_path, name, row, stages):
    file, stages = str(write_rows(tmp_path / "rows.jsonl", [json.loads(row)])), stages.split(", ")
    tokenizer = family_tokenizer(tmp_path / "m", "chatml")
    readers = {
        "sft": lambda: read_sft([file], tokenizer, 400)[0],
        "dpo": lambda: read_pairs([file], tokenizer, 400)[0],
        "pair": lambda: read_demos(file),
        **dict.fromkeys(("sample", "eval", "demos"), lambda: read_questions(file))}
    for stage in stages:
        assert len(readers[stage]()) == 1


def test_all_formats_stand_there():
    assert len(ROWS) == 12
    for source in re.findall(r"`([\w.-]+/[\w./@-]+:[\w.-]+|hf://\S+)`", TEXT):
        assert HUB_SET.fullmatch(source) or HUB_FILE.fullmatch(source), source


def test_the_published_sets_are_those_of_the_code():
    for name, found in PUBLISHED.items():
        (cells,) = re.findall(rf"^\| `{name}` \|(.*)\|$", TEXT, re.M)
        place, commit, splits, licence, checked = (cell.strip() for cell in cells.split("|"))
        assert place.startswith(found.name) and licence == found.licence
        assert commit == f"`{found.revision[:7]}`"
        assert set(found.sha256) <= set(splits.split()) and bool(checked) == bool(found.sha256)
    assert all(f"`{task}`" in TEXT for task in GYM)
