"""`srit run` on a tiny model."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_run import fake_run
from forks import fork_run
from tiny import demo, metrics, question, tiny_checkpoint, write_rows

from srit.commands import run
from srit.commands.config import RunConfig
from srit.commands.progress import stage_config
from srit.commands.run import main
from srit.data import questions
from srit.recipe import read_recipe, stages
from srit.runtime.files import InputError
from srit.runtime.outcome import BAD_INPUT, STOPPED, Stopped

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


def test_a_run_gives_a_report_and_a_second_run_skips_finished_stages(recipe):
    out = recipe.parent / "out"

    def again(status=0):
        process = fork_run(recipe, recipe.parent / "said")
        said = "".join(process.communicate())
        assert process.exitcode == status, said
        return said

    printed = again()
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

    assert again().count("finished before") == 7
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("*/*") if p.is_file()}

    results = out / "eval-base" / "results.json"
    good = results.read_text()
    results.write_text(good.replace("0.", "0.9"))
    assert f"{results} is not as it was written; moved to" in again()
    assert results.read_text() == good

    demos = recipe.parent / "demos.jsonl"
    demos.write_text("".join(demos.read_text().splitlines(keepends=True)[1:]))
    old = json.loads((out / "eval-dpo" / "run.json").read_text())["inputs"]
    printed = again()
    assert printed.count("finished before") == 1 and "eval-base: finished before" in printed
    assert f"{demos} has changed; moved to {out}/stale/sft-1, and run again" in printed
    assert {p.name for p in (out / "stale").iterdir()} == {
        "eval-base-1", "sft-1", "eval-sft-1", "sample-1", "pair-1", "dpo-1", "eval-dpo-1"}
    new = json.loads((out / "eval-dpo" / "run.json").read_text())["inputs"]
    changed = {Path(file).name for file in new if new[file] != old[file]}
    assert changed == {"model.safetensors"}

    recipe.write_text(recipe.read_text().replace("learning_rate: 1e-3", "learning_rate: 2e-3"))
    assert "dpo already holds another run: learning_rate was 0.001" in again(BAD_INPUT)


def test_flags_override_the_recipe(recipe, monkeypatch):
    def stop(stage):
        assert stage.output_dir.parent == recipe.parent / "other"
        assert (stage.values["seed"], stage.values["dtype"]) == (5, "bfloat16")
        raise Stopped

    monkeypatch.setattr(run, "run_stage", stop)
    with pytest.raises(Stopped):
        main(RunConfig(str(recipe), str(recipe.parent / "other"), seed=5, dtype="bfloat16"))


def test_a_failing_stage_ends_the_run_with_its_exit_status(recipe):
    recipe.write_text(recipe.read_text().replace("max_length: 256}", "max_length: 2}", 1))
    run = fork_run(recipe, recipe.parent / "said")
    run.communicate()
    assert run.exitcode == BAD_INPUT
    assert not (recipe.parent / "out" / "sample").exists()


def begin_with_sft(recipe, old, new):
    """Change a setting of the recipe, and evaluate nothing; SFT's log."""
    recipe.write_text("".join(line for line in recipe.read_text().replace(old, new, 1).splitlines(True)
                              if not line.startswith(("  eval:", "  in_domain:", "eval:"))))
    return recipe.parent / "out" / "sft" / "metrics.jsonl"


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def stat(pid):
    """State and parent of a process; ("", 0) when it is gone."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "", 0
    return state, int(parent)


def children(pid):
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and stat(p.name)[1] == pid]


def alive(pid):
    return stat(pid)[0] not in ("", "Z")


def test_a_stage_ends_with_its_run_and_a_second_run_is_told_who_has_it(recipe):
    """SIGKILL to `srit run`: the stage saves and ends, and the same command goes on."""
    log = begin_with_sft(recipe, "max_steps: 30", "max_steps: 100000")
    run = subprocess.Popen([sys.executable, "-m", "srit.commands.cli", "run", "--config", str(recipe)],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: run.poll() is not None or (log.is_file() and log.read_text()))
    (stage,) = children(run.pid)
    second = fork_run(recipe, recipe.parent / "second")
    _, complained = second.communicate()
    assert second.exitcode == BAD_INPUT and f"is in use by process {run.pid} on " in complained
    run.kill()
    run.communicate()
    wait_for(lambda: not alive(stage))
    assert list((recipe.parent / "out" / "sft").glob("checkpoint-*"))


def test_modules_in_the_working_directory_are_not_run(recipe, tmp_path):
    for name in ("tqdm", "yaml", "json", "sft", "numpy"):
        (tmp_path / f"{name}.py").write_text("import os\nos._exit(99)\n")
    begin_with_sft(recipe, "max_length: 256}", "max_length: 2}")
    code = ("import sys; sys.path.pop(0); from srit.commands import run; "
            f"run.main(run.RunConfig({str(recipe)!r}))")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == BAD_INPUT, done.stderr  # of max_length, not 99


def test_a_recipe_that_is_refused_writes_nothing(recipe):
    recipe.write_text(recipe.read_text().replace("max_steps: 8", "max_steps: 8, beta: -1"))
    with pytest.raises(InputError, match="--beta -1"):
        main(RunConfig(str(recipe)))
    assert not (recipe.parent / "out").exists()


@pytest.mark.parametrize("name, fault", [
    ("near", "near.jsonl:13: field 'task' must be one of"),
    ("demos", "demos.jsonl:13: the row has no field 'completion'"),
])
def test_rows_are_checked_before_anything_is_written(recipe, name, fault):
    row = question(99, 1, 2) | ({"task": "riddle"} if name == "near" else {})
    with open(recipe.parent / f"{name}.jsonl", "a") as handle:
        handle.write(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=fault):
        main(RunConfig(str(recipe)))
    assert not (recipe.parent / "out").exists()


def test_a_file_that_several_stages_read_is_checked_once(recipe, monkeypatch):
    asked, read_rows = [], questions.read_rows
    monkeypatch.setattr(questions, "read_rows", lambda file: asked.append(file) or read_rows(file))
    run.check_inputs([(stage, stage_config(stage, "")) for stage in stages(read_recipe(recipe))])
    # Demonstrations twice: as questions to sample, and with their completions.
    assert sorted(Path(file).stem for file in asked) == ["demos", "demos", "far", "near"]


def test_a_model_that_is_not_there_is_named_before_anything_is_written(recipe):
    (recipe.parent / "M").rename(recipe.parent / "N")
    with pytest.raises(InputError, match="M: neither a model directory nor"):
        main(RunConfig(str(recipe)))
    assert not (recipe.parent / "out").exists()


def ends_with(monkeypatch, *ends):
    """Let stages make nothing and end in these ways, one after another; a list of those started."""
    started, left = [], iter(ends)

    def run_stage(stage):
        started.append(stage)
        if (end := next(left)) is not None:
            raise end

    monkeypatch.setattr(run, "run_stage", run_stage)
    return started


def test_a_recipe_that_its_first_stage_refuses_leaves_the_earlier_one(recipe, monkeypatch):
    """Once a stage of it has ended well, recipe.yaml says what that was made with."""
    kept = recipe.parent / "out" / "recipe.yaml"
    ends_with(monkeypatch, Stopped(""), SystemExit(BAD_INPUT), None, SystemExit(BAD_INPUT))
    with pytest.raises(Stopped):
        main(RunConfig(str(recipe)))
    earlier = kept.read_text()
    recipe.write_text(recipe.read_text().replace("num_samples: 3", "num_samples: 5"))
    with pytest.raises(SystemExit):
        main(RunConfig(str(recipe)))
    assert "num_samples: 3" in earlier and kept.read_text() == earlier
    with pytest.raises(SystemExit):
        main(RunConfig(str(recipe)))
    assert "num_samples: 5" in kept.read_text()


def test_templates_show_one_date_in_all_stages_of_a_run(recipe, monkeypatch):
    """Also when it goes on on another day; the date is kept in recipe.yaml."""
    kept = recipe.parent / "out" / "recipe.yaml"
    started = ends_with(monkeypatch, Stopped(""), *[None] * 6, Stopped(""))
    with pytest.raises(Stopped):
        main(RunConfig(str(recipe)))
    (first,) = started
    assert f"date: '{first.values['date']}'" in kept.read_text()
    kept.write_text(kept.read_text().replace(first.values["date"], "1999-12-31"))
    with pytest.raises(Stopped):
        main(RunConfig(str(recipe)))
    assert {stage.kind: stage.values.get("date") for stage in started[1:]} == {
        "eval": "1999-12-31", "sft": "1999-12-31", "sample": "1999-12-31", "pair": None,
        "dpo": "1999-12-31"}


def test_a_directory_without_a_date_goes_on_with_that_of_its_stages(recipe, monkeypatch):
    (recipe.parent / "fake").mkdir()
    out = fake_run(recipe.parent / "out", names=("eval-base", "sft"))
    recipe.write_text((out / "recipe.yaml").read_text())
    started = ends_with(monkeypatch, Stopped(""))
    monkeypatch.setattr(run, "check_inputs", lambda plan: None)
    with pytest.raises(Stopped):
        main(RunConfig(str(recipe)))
    assert started[0].name == "eval-sft" and started[0].values["date"] == "2000-02-29"


def test_a_data_set_in_domain_that_is_not_evaluated_is_named(recipe):
    recipe.write_text(recipe.read_text().replace("in_domain: [near]", "in_domain: [naer]"))
    with pytest.raises(InputError, match="in_domain names 'naer', which no eval file is called; they"
                                         " are called .'far', 'near'."):
        main(RunConfig(str(recipe)))
    assert not (recipe.parent / "out").exists()


def test_a_lost_terminal_stops_the_run(recipe):
    log = begin_with_sft(recipe, "max_steps: 30", "max_steps: 100000")
    run = fork_run(recipe, recipe.parent / "said")
    wait_for(lambda: run.exitcode is not None or (log.is_file() and log.read_text()))
    run.send_signal(signal.SIGHUP)
    said, complained = run.communicate()
    assert run.exitcode == STOPPED, complained
    assert "the run stopped; the same command goes on from there" in said
