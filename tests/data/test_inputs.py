"""Which stages have the judge among their inputs."""

from pathlib import Path

import pytest

from srit.config import DPOConfig, EvalConfig, PairConfig, SampleConfig, SFTConfig
from srit.data.inputs import stage_inputs
from srit.grading.judge import judge_files
from srit.text import arithmetic
from srit.text.prompts import DEFAULT


@pytest.mark.parametrize("cfg, graded", [
    (EvalConfig("M", "o", eval_file=["f"]), True), (SampleConfig("M", "o", train_file=["f"]), True),
    (PairConfig(["f"], "o"), True), (SFTConfig("M", ["f"], "o"), True),
    (SFTConfig("M", ["f"], "o", filter_demos=False), False), (DPOConfig("M", ["f"], "o"), False)])
def test_a_stage_that_grades_has_the_judge_among_its_inputs(tmp_path, monkeypatch, cfg, graded):
    (tmp_path / "M").mkdir()
    monkeypatch.chdir(tmp_path)
    files = stage_inputs(cfg)
    assert "f" in map(str, files)
    assert (set(judge_files(DEFAULT)) <= set(files)) == graded


@pytest.mark.parametrize("cfg, calculates", [
    (SampleConfig("M", "o", train_file=["f"]), False), (EvalConfig("M", "o", eval_file=["f"]), False),
    (SampleConfig("M", "o", train_file=["f"], calculator=True), True),
    (EvalConfig("M", "o", eval_file=["f"], calculator="both"), True),
    (SFTConfig("M", ["f"], "o"), False), (SFTConfig("M", ["f"], "o", drop_false_equations=True), True)])
def test_a_stage_that_calculates_has_the_calculator_among_its_inputs(
        tmp_path, monkeypatch, cfg, calculates):
    (tmp_path / "M").mkdir()
    monkeypatch.chdir(tmp_path)
    assert (Path(arithmetic.__file__) in stage_inputs(cfg)) == calculates
