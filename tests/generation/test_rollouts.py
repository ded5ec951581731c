"""train/sample.py as a command: its rows, its report, resuming, and several processes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import question, tiny_checkpoint, write_rows

from srit.generation.rollouts import read_prompts
from srit.runtime.files import InputError
from srit.runtime.outcome import BAD_INPUT
from srit.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint, and enough questions to interrupt a run half-way."""
    folder = tmp_path_factory.mktemp("world")
    tiny_checkpoint(folder / "m", scale=2.0)
    write_rows(folder / "q.jsonl", [question(i, i % 13 + 2, 7 * i % 11 + 1) for i in range(30)])
    return folder


def command(world, output, *flags, launcher=(), **settings):
    settings = {"model_name_or_path": world / "m", "train_file": world / "q.jsonl",
                "output_dir": output, "num_samples": 2, "temperature": 1, "max_new_tokens": 80,
                "per_device_batch_size": 8, "device": "cpu", "seed": 0} | settings
    return [sys.executable, *launcher, str(ROOT / "train" / "sample.py"), *flags,
            *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


def sample(*arguments, **options):
    done = subprocess.run(command(*arguments, **options), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def whole(world):
    output = world / "whole"
    return sample(world, output), (output / "samples.jsonl").read_bytes()


def test_rows_and_report(world, whole):
    printed, data = whole
    rows = [json.loads(line) for line in data.splitlines()]
    assert [(r["id"], r["prompt_style"], r["sample"]) for r in rows] == [
        (f"q{i}", style, s) for i in range(30) for style in ("direct", "cot") for s in (0, 1)]
    assert {"id", "task", "dataset", "question", "answer", "sample", "prompt_style", "prompt",
            "text", "seed", "n_tokens", "finished", "extracted", "correct"} <= rows[0].keys()
    assert rows[0]["prompt"].startswith("<|im_start|>user\n") and "<|im_end|>" in rows[0]["prompt"]
    assert not any("<|im_end|>" in row["text"] for row in rows)
    assert "60 rows in = 60 used" in printed and "cot" in printed
    run = json.loads((world / "whole" / "run.json").read_text())
    assert run["finished"] and run["counts"]["prompts"]["used"] == 60
    assert list((world / "whole").glob("*.rank*")) == []


def test_stop_strings_and_logps_in_the_rows(world, tmp_path, whole):
    common = max("abcdefghij", key=whole[1].decode().count)
    sample(world, tmp_path / "o", "--stop_strings", common, "zzz", "--return_logps", "True")
    texts = {}
    for row in map(json.loads, whole[1].splitlines()):
        texts[row["id"], row["prompt_style"], row["sample"]] = row["text"].partition(common)[0]
    for row in map(json.loads, (tmp_path / "o" / "samples.jsonl").read_bytes().splitlines()):
        assert row["text"] == texts[row["id"], row["prompt_style"], row["sample"]]
        assert row["n_tokens"] <= len(row["logps"]) <= row["n_tokens"] + 1
        assert all(logp <= 0 for logp in row["logps"])


def test_a_killed_run_ends_with_the_same_bytes(world, whole):
    output = world / "killed"
    file = output / "samples.jsonl"
    process = subprocess.Popen(command(world, output), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if file.exists() and file.read_bytes().count(b"\n") >= 10:
            process.kill()
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    before = file.read_bytes()
    assert 10 <= before.count(b"\n") < 120
    file.write_bytes(before + b'{"id": "q1", "torn')
    refused = subprocess.run(command(world, output, "--temperature", "0.5"), capture_output=True,
                             text=True)
    assert refused.returncode == BAD_INPUT and refused.stderr.startswith("error: ")
    assert "temperature" in refused.stderr and "Traceback" not in refused.stderr
    sample(world, output, per_device_batch_size=5)
    assert file.read_bytes() == whole[1]


@pytest.mark.slow
def test_two_processes_write_what_one_writes(world, whole):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    sample(world, world / "two", launcher=launcher)
    assert (world / "two" / "samples.jsonl").read_bytes() == whole[1]


def test_overlong_prompts_are_dropped_and_counted(world, tmp_path):
    long = {**question(99, 1, 2), "question": "many words " * 300}
    write_rows(tmp_path / "q.jsonl", [question(0, 1, 2), long])
    printed = sample(world, tmp_path / "o", train_file=tmp_path / "q.jsonl")
    assert "4 rows in = 2 used, 2 too long" in printed


def test_one_id_in_two_data_sets_is_refused_for_sampling(tmp_path):
    """Pairs are found by id. An evaluation keeps data sets apart."""
    tokenizer = load_tokenizer(tiny_checkpoint(tmp_path / "m"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    files = [str(write_rows(tmp_path / name / "train.jsonl", [question(0, 1, n)]))
             for n, name in enumerate("ab")]
    assert len(read_prompts(files, ["cot"], tokenizer, None)) == 2
    with pytest.raises(InputError, match=r"b/train.jsonl: duplicate id 'q0' .*a/train.jsonl"):
        read_prompts(files, ["cot"], tokenizer, None, one_id_space=True)
