"""A run that is killed at any moment and started again ends as if nothing had happened."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import fork_run
from tiny import demo, tiny_checkpoint, write_rows

STAGES = ["sft", "async", "dpo", "sample"]  # async: sft whose checkpoints a thread writes


def kill(stage: str, folder: Path, seed: int, runs: int) -> None:
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, here / "kills.py", stage, folder, str(seed), str(runs)],
                          capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here)})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_runs_end_the_same(tmp_path, stage):
    kill(stage, tmp_path, seed=0, runs=3)


@pytest.mark.fuzz
@pytest.mark.parametrize("stage", STAGES)
def test_killed_runs_end_the_same_often(tmp_path, stage):
    kill(stage, tmp_path, seed=1, runs=100)


def test_a_run_killed_between_two_stages_goes_on(tmp_path):
    """SIGKILL to `srit run` when it has just finished a stage; the same command ends the same."""
    tiny_checkpoint(tmp_path / "M", scale=2.0)
    write_rows(tmp_path / "demos.jsonl", [demo(i, i % 5 + 1, i % 3 + 1) for i in range(8)])

    def start(name):
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(json.dumps({
            "model_name_or_path": str(tmp_path / "M"), "output_dir": str(tmp_path / name),
            "dtype": "float32", "device": "cpu", "data": {"demos": str(tmp_path / "demos.jsonl")},
            "sft": {"max_steps": 2, "max_length": 256}, "pair": {"policy": "paper"},
            "sample": {"num_samples": 2, "temperature": 1.5, "max_new_tokens": 24},
            "dpo": {"max_steps": 2, "max_length": 256}}))
        return fork_run(recipe, tmp_path / "said")

    straight = start("straight")
    _, complained = straight.communicate()
    assert straight.exitcode == 0, complained
    for stage in ("sft", "sample", "pair"):
        run, end = start("killed"), time.monotonic() + 60
        while not re.search(rf"\] {stage}: .* min", run.said()[0]):
            assert run.exitcode is None and time.monotonic() < end, run.said()
            time.sleep(0.01)
        run.kill()
        run.communicate()
        time.sleep(1)  # the next stage may have started; it ends with its parent
    last = start("killed")
    said, complained = last.communicate()
    assert last.exitcode == 0 and said.count("finished before") >= 3, complained
    for file in ("sft/model.safetensors", "pair/pairs.jsonl", "dpo/model.safetensors"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()
