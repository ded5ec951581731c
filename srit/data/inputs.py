"""What a stage reads, and its run.json therefore records by content."""

import dataclasses
from pathlib import Path
from typing import Any

from srit.config import EvalConfig, PairConfig, SampleConfig, SFTConfig
from srit.data.sources import source_files
from srit.grading.judge import judge_files
from srit.models.load import model_files
from srit.text import arithmetic


def stage_inputs(cfg: Any) -> list[Path]:
    """The files behind the settings named *_file, the model's, and code that judges or calculates."""
    files = [file for field in dataclasses.fields(cfg) if field.name.endswith("_file")
             for source in getattr(cfg, field.name) for file in source_files(source)]
    if hasattr(cfg, "model_name_or_path"):
        files += model_files(cfg.model_name_or_path)
    if isinstance(cfg, EvalConfig | SampleConfig | PairConfig) or (
            isinstance(cfg, SFTConfig) and cfg.filter_demos):
        files += judge_files(cfg)
    if getattr(cfg, "calculator", False) or getattr(cfg, "drop_false_equations", False):
        files.append(Path(arithmetic.__file__))
    return files
