"""`srit run` on a tiny model."""

import json

import pytest
from tiny import demo, metrics, question, tiny_checkpoint, write_rows

from srit.commands.run import RunConfig, main
from srit.runtime.files import InputError

SMALL = """\
model_name_or_path: {model}
output_dir: {out}
seed: 1
dtype: float32
device: cpu
data:
  demos: {root}/demos.jsonl
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


def test_a_run_gives_a_report_and_a_second_run_skips_finished_stages(recipe, capfd):
    out = recipe.parent / "out"
    main(RunConfig(str(recipe)))
    printed = capfd.readouterr().out
    assert "baseline" in printed and "self-refined" in printed and "report.html" in printed
    assert "far (out of domain)" in printed and "all in domain" in printed
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


def test_a_failing_stage_ends_the_run_with_its_exit_status(recipe):
    (recipe.parent / "demos.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(SystemExit) as stopped:
        main(RunConfig(str(recipe)))
    assert stopped.value.code == 1
    assert not (recipe.parent / "out" / "sample").exists()
