"""A run knows what it read by content: replaced inputs, another judge and edited outputs are seen."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tiny import demo, question, tiny_checkpoint, write_rows

from srit.config import EvalConfig, PairConfig, SampleConfig
from srit.data import inputs
from srit.data.inputs import stage_inputs
from srit.runtime import distributed, run_dir
from srit.runtime.files import InputError
from srit.runtime.outcome import Finished
from srit.runtime.run_dir import Run
from srit.train import eval, pair, sample

CASES = [(i, i % 5 + 1, i % 3 + 1) for i in range(3)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which sample, pair and eval have ended."""
    folder = tmp_path_factory.mktemp("stages")
    tiny_checkpoint(folder / "M", scale=2.0)
    write_rows(folder / "demos.jsonl", [demo(*case) for case in CASES])
    write_rows(folder / "q.jsonl", [question(*case) for case in CASES])
    write_rows(folder / "graded.jsonl", [
        {**question(*case), "sample": 0, "prompt_style": "direct", "text": "99", "finished": True,
         "correct": False, "extracted": "99"} for case in CASES])
    for stage in ("sample", "pair", "eval"):
        start(stage, folder)
    return folder


@pytest.fixture
def stages(finished, tmp_path, monkeypatch):
    """A copy of that folder as the working directory, in which paths are the same."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def start(stage, folder=None):
    before = Path.cwd()
    os.chdir(folder or before)
    quick = dict(device="cpu", dtype="float32", max_new_tokens=8)
    try:
        if stage == "sample":
            sample.main(SampleConfig("M", "sample", train_file=["q.jsonl"], num_samples=1, **quick))
        elif stage == "pair":
            pair.main(PairConfig(["graded.jsonl"], "pair", ["demos.jsonl"]))
        else:
            eval.main(EvalConfig("M", "eval", eval_file=["q.jsonl"], **quick))
    finally:
        os.chdir(before)


def put(path, data):
    """Replace a file by one of the same size and time, as `mv` of a prepared file does."""
    old = path.stat()
    other = path.with_suffix(".new")
    other.write_bytes(data)
    os.utime(other, ns=(old.st_atime_ns, old.st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize("change, file", [
    (lambda: put(Path("q.jsonl"), Path("q.jsonl").read_bytes().replace(b"Tom", b"Tim")), "q.jsonl"),
    (lambda: Path("q.jsonl").unlink(), "q.jsonl"),
    (lambda: Path("M/config.json").write_text("{}"), "M/config.json"),
    (lambda: Path("M/chat_template.jinja").write_text("{{ messages }}"), "M/chat_template.jinja"),
])
def test_an_input_that_changes_while_it_is_read_is_refused(stages, change, file):
    cfg = EvalConfig("M", "out", eval_file=["q.jsonl"], device="cpu")
    run = Run("eval", cfg, stage_inputs)
    change()
    with pytest.raises(InputError, match=f"^{file} was changed while it was read; give the same"):
        run.claim()
    assert not Path("out").exists()


def test_an_input_that_is_a_link_inside_the_output_directory_is_refused(stages):
    Path("eval", "q.jsonl").symlink_to(Path("q.jsonl").resolve())
    cfg = EvalConfig("M", "eval", eval_file=["eval/q.jsonl"], device="cpu", overwrite_output_dir=True)
    with pytest.raises(InputError, match="eval/q.jsonl is an input and lies in --output_dir eval"):
        Run("eval", cfg, stage_inputs).claim()
    assert Path("eval", "q.jsonl").exists()


def test_overwriting_that_is_killed_can_be_repeated(stages, monkeypatch):
    cfg = EvalConfig("M", "eval", eval_file=["q.jsonl"], device="cpu", overwrite_output_dir=True)
    remove = run_dir.remove

    def remove_and_die(path):
        remove(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_dir, "remove", remove_and_die)
        patch.setattr(Path, "iterdir", lambda folder: sorted(folder.glob("*"), reverse=True))
        for _ in ("results.json", "generations.jsonl", "run.json"):
            with pytest.raises(KeyboardInterrupt):
                Run("eval", cfg, stage_inputs).claim()
    Run("eval", cfg, stage_inputs).claim()


def test_a_setting_that_did_not_exist_when_a_run_was_made_had_its_default(stages):
    run = json.loads(Path("eval/run.json").read_text())
    del run["config"]["stop_strings"], run["config"]["top_p"]
    Path("eval/run.json").write_text(json.dumps(run))
    with pytest.raises(Finished):
        start("eval")
    with pytest.raises(InputError, match="another run: top_p was 1.0, now 0.5;"):
        eval.main(EvalConfig("M", "eval", eval_file=["q.jsonl"], device="cpu", dtype="float32",
                             max_new_tokens=8, top_p=0.5))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"stage": "eval", "finished": true, "config": {}, '
                                  '"inputs": {}, "date": "2026-01-01", "outputs": []}'])
def test_a_run_json_that_srit_did_not_write_is_refused(stages, text):
    Path("eval", "run.json").write_text(text)
    with pytest.raises(InputError, match="run.json"):
        start("eval")


@pytest.mark.parametrize("stage", ["sample", "pair", "eval"])
def test_a_finished_stage_is_finished_until_an_output_changes(stages, stage):
    with pytest.raises(Finished, match=f"{stage}: this run is finished; start it afresh with"):
        start(stage)
    (name, *_) = json.loads(Path(stage, "run.json").read_text())["outputs"]
    before = Path(stage, name).read_bytes()
    Path(stage, name).write_bytes(before.replace(b"1", b"2"))
    with pytest.raises(InputError, match=f"{stage}/{name} is not as it was written; bring it back, ch"):
        start(stage)
    Path(stage, name).unlink()
    with pytest.raises(InputError, match=f"{stage}/{name} is gone; bring it back"):
        start(stage)
    Path(stage, name).write_bytes(before)
    with pytest.raises(Finished):
        start(stage)


@pytest.mark.parametrize("stage", ["sample", "pair", "eval"])
def test_what_another_judge_has_graded_is_refused(stages, stage, monkeypatch):
    recorded = json.loads(Path(stage, "run.json").read_text())["inputs"]
    assert {"srit/grading/answers.py", "srit/grading/numerals.py"} < recorded.keys()
    monkeypatch.setattr(inputs, "judge_files", lambda cfg: [Path(inputs.__file__)])
    with pytest.raises(InputError, match="a run of other inputs: srit/.*py was .*read before"):
        start(stage)


def test_bfloat16_that_is_emulated_is_mentioned(stages, monkeypatch, capsys):
    for products, dtype, said in ((True, "bfloat16", ""), (False, "float32", ""),
                                  (False, "bfloat16", "--dtype float32 is usually faster")):
        monkeypatch.setattr(distributed, "multiplies_bfloat16", lambda device, has=products: has)
        Run("eval", EvalConfig("M", "out", eval_file=["q.jsonl"], device="cpu", dtype=dtype),
            stage_inputs)
        printed = capsys.readouterr().out
        assert printed.endswith(f"{said}\n") if said else not printed
