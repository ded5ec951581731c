"""Settings without meaning are refused with their rule."""

import math

import pytest

from srit.config import DPOConfig, EvalConfig, PairConfig, SampleConfig, SFTConfig
from srit.runtime.files import InputError

BASE = {"model_name_or_path": "m", "output_dir": "o"}


@pytest.mark.parametrize("name, value", [
    ("adam_beta1", 1.0), ("adam_beta1", -0.1), ("adam_beta2", 1.0), ("adam_epsilon", -1e-8),
    ("adam_epsilon", 0.0), ("num_train_epochs", math.inf), ("num_train_epochs", math.nan),
    ("learning_rate", math.inf), ("learning_rate", math.nan), ("learning_rate", -1.0),
    ("beta", math.inf), ("beta", math.nan), ("beta", 0.0), ("rpo_alpha", math.inf),
    ("rpo_alpha", math.nan), ("rpo_alpha", -1.0), ("weight_decay", math.inf),
    ("weight_decay", math.nan), ("max_grad_norm", math.nan), ("label_smoothing", math.nan),
    ("max_time", math.inf), ("ddp_timeout", math.inf), ("ddp_timeout", 0.0), ("seed", 10**20),
    ("seed", -1), ("max_steps", 10**20), ("lora_r", 10**20), ("max_length", 10**10)])
def test_a_training_setting_without_meaning_is_refused_with_its_rule(name, value):
    with pytest.raises(InputError, match=f"^--{name} .*: must be "):
        DPOConfig(train_file=["f"], **BASE, **{name: value})
    if name in SFTConfig.__dataclass_fields__:
        with pytest.raises(InputError, match=f"^--{name} .*: must be "):
            SFTConfig(train_file=["f"], **BASE, **{name: value})


@pytest.mark.parametrize("name, value", [
    ("seed", 10**20), ("temperature", math.inf), ("top_p", math.nan), ("top_k", 10**20),
    ("max_cache_memory", math.inf), ("max_new_tokens", 10**20), ("min_p", math.nan)])
def test_a_generation_setting_without_meaning_is_refused_with_its_rule(name, value):
    for cls, files in ((SampleConfig, "train_file"), (EvalConfig, "eval_file")):
        with pytest.raises(InputError, match=f"^--{name} .*: must be "):
            cls(**BASE, **{files: ["f"], name: value})


@pytest.mark.parametrize("day", ["2026-02-30", "20260228", "today", ""])
def test_a_date_is_a_day_of_the_calendar(day):
    for cls, files in ((SFTConfig, "train_file"), (EvalConfig, "eval_file")):
        with pytest.raises(InputError, match="^--date .*: must be a day as YYYY-MM-DD"):
            cls(**BASE, **{files: ["f"], "date": day})


def test_the_bounds_themselves_are_allowed():
    from torch import Generator

    seed = DPOConfig(train_file=["f"], **BASE, seed=2**63 - 1, adam_beta1=0.0, rpo_alpha=0.0).seed
    Generator().manual_seed(seed + 1)
    with pytest.raises(InputError, match="--seed 100000000000000000000: must be from 0 to"):
        PairConfig(["f"], "o", seed=10**20)
