"""The demo: its data files, and its table of seeds."""

import json

import pytest

from srit.commands import demo
from srit.commands.config import DEMO_RECIPE, DemoConfig
from srit.commands.progress import Progress
from srit.runtime.files import InputError
from srit.runtime.jsonl import read_jsonl


def test_the_default_recipe_exists():
    assert DEMO_RECIPE.is_file()


def test_no_seed_is_refused():
    with pytest.raises(InputError, match="--seeds: name at least one"):
        DemoConfig(seeds=())


def test_test_questions_are_in_no_other_file(tmp_path):
    demo.make_world(tmp_path, seed=0)
    questions = {}
    for name in ("demos", "questions", "stories/test", "other-stories/test"):
        rows = read_jsonl(tmp_path / f"{name}.jsonl")
        questions[name] = {row["question"] for row in rows}
        assert len(questions[name]) == len(rows)
    assert questions["demos"] <= questions["questions"]
    assert len(questions["stories/test"]) >= 300 and len(questions["other-stories/test"]) >= 300
    assert not questions["stories/test"] & questions["questions"]
    assert not questions["other-stories/test"] & questions["questions"]


def test_the_table_of_seeds_has_every_model_and_domain(tmp_path, monkeypatch):
    runs = {}
    for seed in (0, 1):
        for name, accuracy in (("eval-base", 0.05), ("eval-sft", 0.3), ("eval-dpo", 0.4 + seed / 10)):
            folder = tmp_path / f"seed-{seed}" / name
            folder.mkdir(parents=True)
            found = {"n": 400, "accuracy": accuracy}
            results = {"calculator": True, "in_domain": found,
                       "out_of_domain": {"n": 300, "accuracy": 0.01}}
            (folder / "results.json").write_text(json.dumps(results))
            run = {"stage": "eval", "finished": True, "commit": "abc",
                   "versions": {"torch": "2"}, "machine": "M",
                   "outputs": {"results.json": "0"}}
            (folder / "run.json").write_text(json.dumps(run))
            (folder / "generations.jsonl").touch()
            runs[name] = run
    monkeypatch.setattr(demo, "read_progress", lambda root: Progress(root, {}, runs))
    roots = {seed: tmp_path / f"seed-{seed}" for seed in (0, 1)}
    text = demo.seeds_table(roots, tmp_path / "seeds.csv").splitlines()
    assert text[2].split() == ["seed", "1", "5.0%", "30.0%", "50.0%", "1.0%", "1.0%", "1.0%"]
    rows = (tmp_path / "seeds.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 6 and rows[3] == "0,self-refined,True,in_domain,400,0.4,abc,2,M"
    assert text[0].startswith("accuracy, with the calculator ")
