"""Flags and YAML go through one parser; what is wrong is named."""

import pytest

from srit.commands.cli import COMMANDS, main
from srit.config import DPOConfig, SFTConfig
from srit.launch import parse, run
from srit.runtime.files import InputError

BASE = ["--model_name_or_path", "m", "--train_file", "a.jsonl", "--output_dir", "o"]


def test_flags():
    cfg = parse(SFTConfig, "sft", [*BASE, "--learning_rate=1e-4", "--packing",
                                   "--shuffle_dataset", "False"])
    assert cfg.learning_rate == 1e-4 and cfg.packing and not cfg.shuffle_dataset


def test_yaml_is_flags_written_down_and_flags_win(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model_name_or_path: m\ntrain_file: [x, y]\noutput_dir: o\n"
                    "learning_rate: 1e-3\npacking: true\nmax_steps: 7\n")
    cfg = parse(SFTConfig, "sft", ["--config", str(path), "--max_steps", "9"])
    assert cfg.train_file == ["x", "y"] and cfg.learning_rate == 1e-3
    assert cfg.packing and cfg.max_steps == 9


def test_d15_unknown_keys_name_the_nearest(tmp_path):
    with pytest.raises(InputError, match="'lerning_rate'; did you mean 'learning_rate'"):
        parse(SFTConfig, "sft", [*BASE, "--lerning_rate", "1"])
    path = tmp_path / "c.yaml"
    path.write_text("betta: 0.1\n")
    with pytest.raises(InputError, match=r"c\.yaml: unknown key 'betta'; did you mean 'beta'"):
        parse(DPOConfig, "dpo", ["--config", str(path)])


@pytest.mark.parametrize("text,message", [("a: [1", "c.yaml:"), ("- 1\n", "mapping")])
def test_malformed_yaml(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        parse(SFTConfig, "sft", ["--config", str(path)])


@pytest.mark.parametrize("flags,message", [
    (["--beta", "0"], "--beta 0.0: must be positive"),
    (["--label_smoothing", "0.6"], "label_smoothing"),
    (["--label_smoothing", "0.1", "--loss_type", "ipo"], "label_smoothing"),
    (["--lora_dropout", "0.1"], "dropout"),
    (["--precompute_ref_log_probs", "False"], "use_peft"),
    (["--gradient_accumulation_steps", "0"], "at least 1"),
    (["--warmup_ratio", "1.5"], "from 0 to 1"),
])
def test_a14_settings_that_cannot_work_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        parse(DPOConfig, "dpo", [*BASE, *flags])


def test_bad_input_is_one_line_and_exit_status_1(capsys):
    def fail(cfg):
        raise InputError("rows.jsonl:3: no such thing")

    with pytest.raises(SystemExit) as stopped:
        run(SFTConfig, "sft", fail, BASE)
    assert stopped.value.code == "error: rows.jsonl:3: no such thing"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["srit", command, "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code in (0, None)
    assert f"usage: srit {command}" in capsys.readouterr().out


def test_unknown_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["srit", "trian"])
    with pytest.raises(SystemExit, match="unknown command 'trian'"):
        main()


def test_full_disk_is_one_line():
    def fail(cfg):
        raise OSError(28, "No space left on device", "out/model.safetensors")

    with pytest.raises(SystemExit, match="error: .*No space left on device"):
        run(SFTConfig, "sft", fail, BASE)


@pytest.mark.parametrize("text", ["CUDA out of memory. Tried to allocate 2 GiB",
                                  "DefaultCPUAllocator: can't allocate memory: you tried to"])
def test_out_of_memory_is_advice_not_a_trace(text):
    def fail(cfg):
        raise RuntimeError(text)

    with pytest.raises(SystemExit, match=r"error: out of memory \(.*--max_tokens_per_batch"):
        run(DPOConfig, "dpo", fail, BASE)


def test_other_errors_keep_their_trace():
    def fail(cfg):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(DPOConfig, "dpo", fail, BASE)
