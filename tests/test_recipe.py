"""Recipes: their stages, the files between them, and what is wrong in them."""

import re
from pathlib import Path

import pytest

from srit.config import SFTConfig
from srit.launch import parse
from srit.recipe import DATA, DOCS, KINDS, SHARED, read_recipe, stage_values, stages
from srit.runtime.files import InputError

RECIPE = """\
model_name_or_path: M
output_dir: out
seed: 1
dtype: float32
data:
  demos: ["${ROWS:-rows}/demos.jsonl"]
  eval: [near.jsonl, far.jsonl]
  in_domain: [near]
sft: {max_steps: 30}
pair: {policy: mixed}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_the_page_lists_every_key():
    page = (Path(__file__).resolve().parent.parent / DOCS).read_text(encoding="utf-8")
    keys = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*) \|$", page, re.M))))
    assert {*SHARED, *DATA, *KINDS, "data", "rounds"} <= keys


def test_stages_and_their_wiring(recipe):
    plan = {stage.name: stage for stage in stages(read_recipe(recipe))}
    assert list(plan) == ["eval-base", "sft", "eval-sft", "sample", "pair", "dpo", "eval-dpo"]
    assert plan["dpo"].values["model_name_or_path"] == "out/sft"
    assert plan["dpo"].values["train_file"] == ["out/pair/pairs.jsonl"]
    assert plan["eval-dpo"].values["model_name_or_path"] == "out/dpo"
    assert plan["sample"].values["train_file"] == ["rows/demos.jsonl"]
    assert plan["pair"].values["seed"] == 1 and "dtype" not in plan["pair"].values


def test_all_stages_that_grade_share_a_verifier(recipe):
    recipe.write_text(RECIPE + "verifier: my_judge.py:judge\n")
    for stage in stages(read_recipe(recipe)):
        assert (stage.values.get("verifier") == "my_judge.py:judge") == (stage.kind != "dpo")


def test_rounds_sample_from_and_refer_to_the_round_before(recipe):
    recipe.write_text(recipe.read_text() + "rounds: 2\n")
    plan = {stage.name: stage.values for stage in stages(read_recipe(recipe))}
    assert list(plan)[-4:] == ["sample-2", "pair-2", "dpo-2", "eval-dpo-2"]
    for name in ("sample-2", "dpo-2"):
        assert plan[name]["model_name_or_path"] == "out/dpo"


def test_a_stage_script_reads_its_part_of_a_recipe(recipe):
    values = stage_values(recipe, "sft")
    cfg = parse(SFTConfig, "sft", ["--config", str(recipe), "--learning_rate", "5e-3"])
    assert cfg.train_file == values["train_file"] and cfg.max_steps == 30
    assert cfg.learning_rate == 5e-3


def test_environment_variables_are_expanded(recipe, monkeypatch):
    monkeypatch.setenv("ROWS", "/elsewhere")
    assert stage_values(recipe, "sft")["train_file"] == ["/elsewhere/demos.jsonl"]
    recipe.write_text(recipe.read_text().replace("${ROWS:-", "${NOT_SET_ANYWHERE}"))
    with pytest.raises(InputError, match="NOT_SET_ANYWHERE is not set"):
        read_recipe(recipe)


@pytest.mark.parametrize("old, new, message", [
    ("sft:", "sfft:", "unknown key 'sfft'; did you mean 'sft'"),
    ("policy:", "polcy:", "pair: unknown key 'polcy'; did you mean 'policy'"),
    ("demos:", "demo:", "data: unknown key 'demo'; did you mean 'demos'"),
    ("seed: 1", "rounds: 0", "rounds: must be a positive integer"),
    ("pair: {policy: mixed}", "pair: [1]", "pair: expected a mapping"),
    ("output_dir: out", "output_dir: ''", "output_dir must be a string, and not empty"),
    ("pair: {policy: mixed}", "eval: {model_name_or_path: N}",
     "eval: model_name_or_path may only stand at the top"),
    ("max_steps: 30", "output_dir: elsewhere", "sft: output_dir may only stand at the top"),
    ("pair: {policy: mixed}", "sft: {beta: 1}", "recipe.yaml:10: not YAML .key 'sft' stands twice"),
    ("max_steps: 30", "max_steps: 30, max_steps: 3", ":9: not YAML .key 'max_steps' stands twice"),
    ("seed: 1", "date: 2026-02-30", "not YAML .day is out of range"),
    ("seed: 1", f"seed: {'1' * 5000}", "not YAML .Exceeds the limit"),
    ("seed: 1", "seed: " + "[" * 5000, "not YAML .maximum recursion"),
    ("near.jsonl", '"near\\0.jsonl"', r"'near\\x00.jsonl' holds a null character"),
    ("seed: 1", "seed: &a [*a]", "more than 65,536 values"),
    ("seed: 1", "a: &a [1, 1, 1, 1]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijklmn", "bcdefghijklmno",
                                                              strict=True)),
     "more than 65,536 values"),
])
def test_a_bad_recipe_is_named_with_its_key(recipe, old, new, message):
    recipe.write_text(recipe.read_text().replace(old, new))
    with pytest.raises(InputError, match=message):
        read_recipe(recipe)
