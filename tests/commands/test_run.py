"""A recipe's stages and wiring, and the whole pipeline on a tiny model."""

import json

import pytest
from tiny import demo, metrics, question, tiny_checkpoint, write_rows

from srit.commands.run import RunConfig, main
from srit.config import SFTConfig
from srit.launch import parse
from srit.recipe import read_recipe, stage_values, stages
from srit.runtime.files import InputError

SMALL = """\
model_name_or_path: {model}
output_dir: {out}
seed: 1
dtype: float32
device: cpu
data:
  demos: ["${{ROWS:-{root}}}/demos.jsonl"]
  eval: [{root}/near.jsonl, {root}/far.jsonl]
  in_domain: [near]
sft: {{max_steps: 30, learning_rate: 1e-2, per_device_train_batch_size: 8, max_length: 256}}
sample: {{num_samples: 3, temperature: 1.0, max_new_tokens: 40}}
pair: {{policy: mixed}}
dpo: {{max_steps: 8, learning_rate: 1e-3, logging_steps: 1, max_length: 256, save_steps: 4}}
eval: {{max_new_tokens: 40}}
"""


@pytest.fixture
def recipe(tmp_path):
    tiny_checkpoint(tmp_path / "M")
    cases = [(i, i % 5 + 1, i % 3 + 1) for i in range(12)]
    write_rows(tmp_path / "demos.jsonl", [demo(*c) for c in cases])
    write_rows(tmp_path / "near.jsonl", [question(*c) for c in cases])
    write_rows(tmp_path / "far.jsonl", [question(*c) for c in cases[:5]])
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALL.format(model=tmp_path / "M", out=tmp_path / "out", root=tmp_path))
    return path


def test_stages_and_their_wiring(recipe):
    plan = {stage.name: stage for stage in stages(read_recipe(recipe))}
    assert list(plan) == ["eval-base", "sft", "eval-sft", "sample", "pair", "dpo", "eval-dpo"]
    out = recipe.parent / "out"
    assert plan["dpo"].values["model_name_or_path"] == str(out / "sft")
    assert plan["dpo"].values["train_file"] == [str(out / "pair" / "pairs.jsonl")]
    assert plan["eval-dpo"].values["model_name_or_path"] == str(out / "dpo")
    assert plan["sample"].values["train_file"] == [str(recipe.parent / "demos.jsonl")]
    assert plan["pair"].values["seed"] == 1 and "dtype" not in plan["pair"].values


def test_rounds_sample_from_and_refer_to_the_round_before(recipe):
    recipe.write_text(recipe.read_text() + "rounds: 2\n")
    plan = {stage.name: stage.values for stage in stages(read_recipe(recipe))}
    assert list(plan)[-4:] == ["sample-2", "pair-2", "dpo-2", "eval-dpo-2"]
    for name in ("sample-2", "dpo-2"):
        assert plan[name]["model_name_or_path"] == str(recipe.parent / "out" / "dpo")


def test_a_stage_script_reads_its_part_of_a_recipe(recipe):
    values = stage_values(recipe, "sft")
    cfg = parse(SFTConfig, "sft", ["--config", str(recipe), "--learning_rate", "5e-3"])
    assert cfg.train_file == values["train_file"] and cfg.max_steps == 30
    assert cfg.learning_rate == 5e-3


def test_variables(recipe, monkeypatch):
    monkeypatch.setenv("ROWS", "/elsewhere")
    assert stage_values(recipe, "sft")["train_file"] == ["/elsewhere/demos.jsonl"]
    recipe.write_text(recipe.read_text().replace("${ROWS:-", "${NOT_SET_ANYWHERE}"))
    with pytest.raises(InputError, match="NOT_SET_ANYWHERE is not set"):
        read_recipe(recipe)


@pytest.mark.parametrize("old,new,message", [
    ("sft:", "sfft:", "unknown key 'sfft'; did you mean 'sft'"),
    ("policy:", "polcy:", "pair: unknown key 'polcy'; did you mean 'policy'"),
    ("demos:", "demo:", "data: unknown key 'demo'; did you mean 'demos'"),
    ("seed: 1", "rounds: 0", "rounds: must be a positive integer"),
    ("pair: {policy: mixed}", "pair: [1]", "pair: expected a mapping"),
])
def test_bad_recipes_are_named(recipe, old, new, message):
    recipe.write_text(recipe.read_text().replace(old, new))
    with pytest.raises(InputError, match=message):
        read_recipe(recipe)


def test_whole_pipeline_and_running_it_again(recipe, capfd):
    """From a random checkpoint to a report; the second run finds everything finished."""
    out = recipe.parent / "out"
    main(RunConfig(str(recipe)))
    printed = capfd.readouterr().out
    assert "baseline" in printed and "self-refined" in printed and "report.html" in printed
    names = {p.parent.name for p in out.glob("*/run.json")}
    assert names == {"eval-base", "sft", "eval-sft", "sample", "pair", "dpo", "eval-dpo"}
    assert metrics(out / "sft")[-1]["loss"] < 0.5 * metrics(out / "sft")[0]["loss"]
    margins = [row["rewards/margins"] for row in metrics(out / "dpo")]
    assert margins[0] == 0 and margins[-1] > 0
    counts = json.loads((out / "pair" / "run.json").read_text())["counts"]
    for count in counts.values():
        assert count["in"] == count["used"] + sum(count["dropped"].values())
    assert (out / "report.html").is_file() and (out / "report.md").is_file()
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*") if p.is_file()}

    main(RunConfig(str(recipe)))
    assert capfd.readouterr().out.count("finished before") == 7
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("*/*") if p.is_file()}

    recipe.write_text(recipe.read_text().replace("learning_rate: 1e-3", "learning_rate: 2e-3"))
    with pytest.raises(InputError, match="dpo holds another run: learning_rate was 0.001"):
        main(RunConfig(str(recipe)))


def test_a_failing_stage_ends_the_run_with_its_status(recipe):
    (recipe.parent / "demos.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(SystemExit) as stopped:
        main(RunConfig(str(recipe)))
    assert stopped.value.code == 1
    assert not (recipe.parent / "out" / "sample").exists()
