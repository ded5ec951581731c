"""A run that is killed at any moment and started again ends as if nothing had happened."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
