"""Flags and YAML give the same config, and errors are one line."""

import pytest
from safetensors import SafetensorError

from srit.config import DPOConfig, SFTConfig
from srit.launch import parse, run
from srit.runtime.files import InputError
from srit.runtime.outcome import (
    BAD_INPUT,
    DIVERGED,
    FAILED,
    FINISHED,
    STOPPED,
    Diverged,
    Failed,
    Finished,
    Stopped,
)

BASE = ["--model_name_or_path", "m", "--train_file", "a.jsonl", "--output_dir", "o"]


def test_flags_take_an_equals_sign_lists_and_bare_booleans():
    cfg = parse(SFTConfig, "sft", [*BASE, "--learning_rate=1e-4", "--packing",
                                   "--shuffle_dataset", "False", "--eval_file", "b", "c"])
    assert cfg.learning_rate == 1e-4 and cfg.packing and not cfg.shuffle_dataset
    assert cfg.train_file == ["a.jsonl"] and cfg.eval_file == ["b", "c"] and cfg.max_steps == -1


@pytest.mark.parametrize("flags, message", [
    (["sft.yaml"], "expected a flag such as --output_dir, got 'sft.yaml'"),
    ([*BASE, "--config"], "--config: name a YAML file"),
    ([*BASE, "--train_file", "b.jsonl"], "--train_file stands twice; give it all its values at once"),
    ([*BASE[:-1], "~/o"], "--output_dir ~/o: only a shell knows ~"),
    ([*BASE[:-1], ""], "--output_dir: is empty"),
    ([*BASE, "--config", "no.yaml"], "no.yaml: no such file"),
])
def test_words_that_are_no_flags_are_errors(flags, message):
    with pytest.raises(InputError, match=message):
        parse(SFTConfig, "sft", flags)


def test_flags_override_yaml(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model_name_or_path: m\ntrain_file: [x, y]\noutput_dir: o\n"
                    "learning_rate: 1e-3\npacking: true\nmax_steps: 7\n")
    cfg = parse(SFTConfig, "sft", ["--config", str(path), "--max_steps", "9"])
    assert cfg.train_file == ["x", "y"] and cfg.learning_rate == 1e-3
    assert cfg.packing and cfg.max_steps == 9


def test_an_unknown_key_names_the_nearest_one(tmp_path):
    with pytest.raises(InputError, match="'lerning_rate'; did you mean 'learning_rate'"):
        parse(SFTConfig, "sft", [*BASE, "--lerning_rate", "1"])
    with pytest.raises(InputError, match="unknown key 'load_in_4bit'; docs/recipes.md lists all$"):
        parse(SFTConfig, "sft", [*BASE, "--load_in_4bit", "True"])
    path = tmp_path / "c.yaml"
    path.write_text("betta: 0.1\n")
    with pytest.raises(InputError, match=r"c\.yaml: unknown key 'betta'; did you mean 'beta'"):
        parse(DPOConfig, "dpo", ["--config", str(path)])


@pytest.mark.parametrize("text,message", [("a: [1", "c.yaml:"), ("- 1\n", "mapping")])
def test_malformed_yaml_is_named(tmp_path, text, message):
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
    (["--gradient_accumulation_steps", "0"], "must be 1 or more"),
    (["--warmup_ratio", "1.5"], "from 0 to 1"),
])
def test_settings_that_cannot_work_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        parse(DPOConfig, "dpo", [*BASE, *flags])


@pytest.mark.parametrize("ends, status, said", [
    (None, None, ""),
    (Finished("finished before"), FINISHED, "finished before"),
    (Stopped("stopped after step 3"), STOPPED, "stopped after step 3"),
    (InputError("rows.jsonl:3: no such thing"), BAD_INPUT, "error: rows.jsonl:3: no such thing"),
    (Diverged("weights are not finite"), DIVERGED, "error: weights are not finite"),
    (Failed("not written"), FAILED, "error: not written"),
    (OSError(28, "No space left on device", "out/m"), FAILED, "error: [Errno 28] No space left"),
    (SafetensorError("Error while serializing: I/O error: No space left on device"), FAILED,
     "error: Error while serializing: I/O error: No space left"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), FAILED,
     "error: out of memory (CUDA out of memory. Tried to allocate 2 GiB). Training: lower "
     "--max_tokens_per_batch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), FAILED,
     "error: out of memory"),
    (RuntimeError("Connection closed by peer"), FAILED, "error: rank 0: another rank has died"),
    (KeyboardInterrupt(), STOPPED, "interrupted; give the same command again"),
], ids=repr)
def test_every_end_is_one_line_and_a_status(capsys, ends, status, said):
    """The statuses are those of docs/faults.md."""
    def main(cfg):
        if ends is not None:
            raise ends

    if ends is None:
        run(SFTConfig, "sft", main, BASE)
    else:
        with pytest.raises(SystemExit) as stopped:
            run(SFTConfig, "sft", main, BASE)
        assert stopped.value.code == status
    out, err = capsys.readouterr()
    assert (out + err).startswith(said) and (out + err).count("\n") == bool(said)


@pytest.mark.parametrize("words", [["--lora_r", "16"], ["--lora_alpha", "8", "--use_peft", "False"]])
def test_settings_of_an_adapter_that_nobody_asked_for_are_refused(words):
    """Also their defaults: who names them wants an adapter."""
    with pytest.raises(InputError, match=f"^{words[0]}: add --use_peft True"):
        parse(SFTConfig, "sft", [*BASE, *words])
    assert parse(SFTConfig, "sft", [*BASE, "--lora_r", "4", "--use_peft"]).lora_r == 4


@pytest.mark.parametrize("given, names", [
    (["q_proj,v_proj"], ["q_proj", "v_proj"]), (["q_proj,", "v_proj"], ["q_proj", "v_proj"]),
    (["all-linear"], []), (["q_proj"], ["q_proj"])])
def test_target_modules_as_peft_and_trl_take_them(given, names):
    cfg = parse(SFTConfig, "sft", [*BASE, "--use_peft", "--lora_target_modules", *given])
    assert cfg.lora_target_modules == names
    with pytest.raises(InputError, match="--lora_target_modules .*: must be all-linear alone"):
        parse(SFTConfig, "sft", [*BASE, "--use_peft", "--lora_target_modules", "all-linear", "q_proj"])


def test_other_errors_keep_their_traceback():
    def fail(cfg):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(DPOConfig, "dpo", fail, BASE)
