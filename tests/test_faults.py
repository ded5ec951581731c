"""Bad days: what goes wrong from outside, and what a run makes of it."""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import termios
import time

import pytest
import torch
from forks import Fork, limit_files, start_ranks, without_override
from safetensors.torch import load_file
from tiny import demo, metrics, pair, question, tiny_checkpoint, tiny_gguf, write_rows
from tokenizers import pre_tokenizers

from srit.config import DPOConfig, SampleConfig, SFTConfig
from srit.runtime import shutdown
from srit.runtime.files import InputError
from srit.runtime.lock import lock
from srit.runtime.outcome import BAD_INPUT, STOPPED, Diverged, Finished, Stopped
from srit.train import dpo, sample, sft
from srit.training import saving
from srit.training.checkpoint import damage

LOOP = dict(dtype="float32", device="cpu", max_length=256, learning_rate=1e-3, logging_steps=1,
            lr_scheduler_type="constant", per_device_train_batch_size=2, max_steps=6, save_steps=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), scale=2.0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name, make in (("sft", demo), ("dpo", pair), ("sample", question)):
        write_rows(folder / f"{name}.jsonl", [make(i, i % 7 + 1, (i * 3) % 11) for i in range(5)])
    return folder


def start(stage, tiny, rows, out, **settings):
    """Run a stage in this process."""
    file = [str(rows / f"{stage}.jsonl")]
    if stage == "sample":
        sample.main(SampleConfig(str(tiny), str(out), train_file=file, dtype="float32", device="cpu",
                                 num_samples=3, temperature=1.0, max_new_tokens=8,
                                 per_device_batch_size=2, **settings))
    else:
        cls, main = (SFTConfig, sft.main) if stage == "sft" else (DPOConfig, dpo.main)
        main(cls(str(tiny), file, str(out), **{**LOOP, **settings}))


def flags(stage, tiny, rows, out, **settings):
    return [f"--model_name_or_path={tiny}", f"--train_file={rows}/{stage}.jsonl", f"--output_dir={out}",
            *(f"--{k}={v}" for k, v in settings.items())]


def command(stage, tiny, rows, out, **settings):
    return [sys.executable, "-m", f"srit.train.{stage}",
            *flags(stage, tiny, rows, out, **LOOP | settings)]


ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def outcome(out):
    """Weights and rows without times, or the samples."""
    if (out / "samples.jsonl").is_file():
        return (out / "samples.jsonl").read_bytes()
    timed = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in metrics(out)]
    return (out / "model.safetensors").read_bytes(), timed


@pytest.fixture(scope="module")
def straight(tiny, rows, tmp_path_factory):
    """Undisturbed runs, by stage."""
    folder, known = tmp_path_factory.mktemp("straight"), {}

    def get(stage):
        if stage not in known:
            start(stage, tiny, rows, folder / stage)
            known[stage] = outcome(folder / stage)
        return known[stage]
    return get


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a bit of the weights": lambda c: flip(next(c.glob("state/*"))),
    "a truncated shard": lambda c: os.truncate(next(c.glob("state/*")), 5000),
    "an empty shard": lambda c: os.truncate(next(c.glob("state/*")), 0),
    "a missing shard": lambda c: next(c.glob("state/*")).unlink(),
    "a bit of the state": lambda c: flip(c / "trainer_state.json"),
    "no checksums": lambda c: (c / "SHA256SUMS").unlink(),
    "checksums cut short": lambda c: os.truncate(c / "SHA256SUMS", 70),
    "checksums not text": lambda c: (c / "SHA256SUMS").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tiny, rows, tmp_path, straight, capsys,
                                                             damage):
    start("sft", tiny, rows, tmp_path, max_steps=5)
    DAMAGE[damage](tmp_path / "checkpoint-4")
    capsys.readouterr()
    start("sft", tiny, rows, tmp_path)
    said = capsys.readouterr().out
    assert "set aside as damaged-checkpoint-4" in said and "resuming" in said
    assert "checkpoint-2 at step 2 of 6" in said
    assert outcome(tmp_path) == straight("sft")


def test_when_every_checkpoint_is_damaged_the_run_starts_afresh(tiny, rows, tmp_path, straight):
    start("sft", tiny, rows, tmp_path, max_steps=5)
    for checkpoint in tmp_path.glob("checkpoint-*"):
        DAMAGE["a truncated shard"](checkpoint)
    start("sft", tiny, rows, tmp_path)
    assert outcome(tmp_path) == straight("sft")
    assert len(list(tmp_path.glob("damaged-*"))) == 2


def test_a_checkpoint_named_by_hand_must_be_whole(tiny, rows, tmp_path):
    start("sft", tiny, rows, tmp_path, max_steps=4)
    named = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    with pytest.raises(InputError, match="no checkpoint there"):
        start("sft", tiny, rows, tmp_path, resume_from_checkpoint=str(tmp_path))
    DAMAGE["a bit of the weights"](tmp_path / "checkpoint-2")
    with pytest.raises(InputError, match="checkpoint-2: state/shard-.* is damaged"):
        start("sft", tiny, rows, tmp_path, **named)
    assert (tmp_path / "checkpoint-2").is_dir()


def resum(checkpoint):
    """Checksums for what the files hold now."""
    lines = (checkpoint / "SHA256SUMS").read_text().splitlines()
    names = [line.partition("  ")[2] for line in lines]
    done = subprocess.run(["sha256sum", *names], cwd=checkpoint, capture_output=True, text=True)
    (checkpoint / "SHA256SUMS").write_text(done.stdout)


def test_checksums_are_those_of_sha256sum(tiny, rows, tmp_path):
    start("sft", tiny, rows, tmp_path, max_steps=2)
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"],
                          cwd=tmp_path / "checkpoint-2")
    assert done.returncode == 0


@pytest.mark.parametrize("change,message", [
    ({"format": 99}, "a checkpoint of format 99, this version reads format 2; go on with"),
    ({"batch_size": 16}, "a step was 16 rows, pairs or bins, and would now be 2; adapt"),
    ({"extra": 1}, "not a checkpoint"),
])
def test_a_checkpoint_of_another_kind_is_named(tiny, rows, tmp_path, change, message):
    start("sft", tiny, rows, tmp_path, max_steps=2)
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    resum(tmp_path / "checkpoint-2")
    with pytest.raises(InputError, match=message):
        start("sft", tiny, rows, tmp_path)


def test_a_checkpoint_of_another_model_is_named(tiny, rows, tmp_path):
    start("sft", tiny, rows, tmp_path / "a", max_steps=2)
    wide = tiny_checkpoint(tmp_path / "wide", intermediate_size=96)
    with pytest.raises(InputError, match="of shape .*the checkpoint is another model's"):
        start("sft", wide, rows, tmp_path / "b",
              resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    with pytest.raises(InputError, match="the checkpoint is another model's"):
        start("sft", tiny, rows, tmp_path / "c", use_peft=True,
              resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


@pytest.mark.parametrize("stage", ["sft", "dpo", "sample"])
def test_time_is_up_again_and_again(tiny, rows, tmp_path, straight, stage):
    """Every start does one step, or a few tokens, and ends in order; together they are one run."""
    for attempt in range(60):
        with shutdown.listening(max_time=1e-9 if stage != "sample" else 2e-4 * (attempt + 1)):
            try:
                start(stage, tiny, rows, tmp_path)
                break
            except Stopped as reason:
                assert "the same command goes on from there" in str(reason)
    assert attempt >= (5 if stage != "sample" else 1)
    assert outcome(tmp_path) == straight(stage)
    # The checkpoint of step 5 was one of an interruption.
    left = [path.name for path in tmp_path.glob("checkpoint-*")]
    assert left == ([] if stage == "sample" else ["checkpoint-6"])


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_checkpoints_of_interruptions_go_with_their_best_weights_when_a_run_is_finished(
        tiny, rows, tmp_path):
    """But not before run.json says so: a kill would lose the run."""
    more = {"save_steps": 0, "eval_steps": 1, "eval_file": [str(rows / "sft.jsonl")]}
    with shutdown.listening(max_time=1e-9), pytest.raises(Stopped):
        start("sft", tiny, rows, tmp_path, **more)
    assert {path.name for path in tmp_path.glob("*-1")} == {"checkpoint-1", "best-1"}
    start("sft", tiny, rows, tmp_path, **more)
    assert json.loads((tmp_path / "run.json").read_text())["finished"]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_ends_with_status_75(tiny, rows, tmp_path, number):
    out = tmp_path / "out"
    words = flags("sft", tiny, rows, out, **LOOP | {"save_steps": 0, "max_steps": 100_000})
    run = Fork("sft", words, tmp_path / "log")
    wait_for(lambda: (out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").read_text())
    run.send_signal(number)
    said, complained = run.communicate()
    assert run.exitcode == STOPPED, complained
    step = int(re.search(r"stopped after step (\d+) of 100000; the same command goes on", said)[1])
    assert f"{number.name}: ending after this step" in complained
    assert (out / f"checkpoint-{step}").is_dir() and len(metrics(out)) == step
    assert json.loads((out / "run.json").read_text())["finished"] is False


def test_a_signal_to_torchrun_stops_all_ranks_at_one_step(tiny, rows, tmp_path):
    out = tmp_path / "out"
    words = command("sft", tiny, rows, out, save_steps=0, max_steps=100_000)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.Popen([words[0], *launch, *words[1:]], env=ENV, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: (out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").read_text())
    run.send_signal(signal.SIGTERM)
    said, complained = run.communicate(timeout=60)
    step = int(re.search(r"stopped after step (\d+) of 100000", said + complained)[1])
    assert (out / f"checkpoint-{step}").is_dir() and len(metrics(out)) == step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_second_signal_ends_at_once(number):
    """The status is the shell's of a process that died of it: 143, 130, 129."""
    script = ("import os, time\nfrom srit.runtime import shutdown\nwith shutdown.listening():\n"
              "    for _ in range(3):\n"
              f"        os.kill(os.getpid(), {int(number)})\n        time.sleep(0.1)\n"
              "    assert shutdown.requested()\n    os.write(2, b'asked')\n    time.sleep(1.1)\n"
              f"    os.kill(os.getpid(), {int(number)})\n    os.write(2, b'not reached')\n")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.endswith("asked") and done.returncode == 128 + number


def test_a_terminal_that_is_gone_stops_the_run_in_order(tiny, rows, tmp_path):
    """The kernel sends SIGHUP, and refuses every later output: the run saves, and goes on later."""
    out, (terminal, own) = tmp_path / "out", os.openpty()

    def take():
        fcntl.ioctl(own, termios.TIOCSCTTY)
    settings = {"save_steps": 0, "warmup_ratio": 0.0}
    words = command("sft", tiny, rows, out, **settings | {"max_steps": 100_000})
    run = subprocess.Popen(words, env=ENV, stdin=own, stdout=own, stderr=own, start_new_session=True,
                           preexec_fn=take)
    os.close(own)
    wait_for(lambda: (out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").read_text())
    os.close(terminal)
    assert run.wait(timeout=60) == STOPPED
    (checkpoint,) = out.glob("checkpoint-*")
    steps = int(checkpoint.name.partition("-")[2]) + 2
    start("sft", tiny, rows, out, max_steps=steps, **settings)
    start("sft", tiny, rows, tmp_path / "straight", max_steps=steps, **settings)
    assert outcome(out) == outcome(tmp_path / "straight")


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_signal_during_the_export_lets_it_end(tiny, rows, tmp_path, straight, monkeypatch, stage):
    undisturbed, save = straight(stage), saving.save_model

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments)
    monkeypatch.setattr(saving, "save_model", interrupted)
    with shutdown.listening():
        start(stage, tiny, rows, tmp_path)
        assert shutdown.requested()
    assert outcome(tmp_path) == undisturbed
    assert json.loads((tmp_path / "run.json").read_text())["finished"] is True


def test_damaged_best_weights_of_an_adapter_are_set_aside(tiny, rows, tmp_path, capsys):
    settings = dict(use_peft=True, eval_file=[str(rows / "sft.jsonl")], eval_steps=1, save_steps=6,
                    learning_rate=0.3)
    start("sft", tiny, rows, tmp_path / "best", **settings)
    start("sft", tiny, rows, tmp_path / "last", load_best_model_at_end=False, **settings)
    (best,) = (tmp_path / "best").glob("best-*")
    flip(best / "adapter_model.safetensors")
    run = tmp_path / "best" / "run.json"
    run.write_text(run.read_text().replace('"finished": true', '"finished": false'))
    start("sft", tiny, rows, tmp_path / "best", **settings)
    assert "adapter_model.safetensors is damaged" in capsys.readouterr().out
    assert (tmp_path / "best" / f"damaged-{best.name}").is_dir()
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "best" / file).read_bytes() == (tmp_path / "last" / file).read_bytes()


def test_a_hub_snapshot_or_gguf_replaced_before_the_resume_is_refused(rows, tmp_path):
    """The snapshot keeps its names: only the blob that one of them links to is another."""
    def blob(seed):
        return tiny_checkpoint(tmp_path / "blobs" / str(seed), seed) / "model.safetensors"

    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in blob(0).parent.iterdir():
        (snapshot / file.name).symlink_to(file)

    def other_weights():
        (snapshot / "model.safetensors").unlink()
        (snapshot / "model.safetensors").symlink_to(blob(1))
    alphabet = "".join(pre_tokenizers.ByteLevel.alphabet())
    file = tiny_gguf(tmp_path / "m.gguf", alphabet)
    for model, replace in ((snapshot, other_weights), (file, lambda: tiny_gguf(file, alphabet, 2.0))):
        out = tmp_path / f"out-{model.name}"
        with shutdown.listening(max_time=1e-9), pytest.raises(Stopped):
            start("sample", model, rows, out)
        replace()
        with pytest.raises(InputError, match=f"a run of other inputs: {model}.* has changed"):
            start("sample", model, rows, out)


def test_a_recipe_stops_with_its_stage_and_goes_on(tiny, rows, tmp_path):
    recipe = {"model_name_or_path": str(tiny), "output_dir": str(tmp_path / "run"), "device": "cpu",
              "data": {"demos": str(rows / "sft.jsonl"), "questions": str(rows / "sample.jsonl")},
              "sft": {**LOOP, "max_steps": 100_000, "save_steps": 0}}
    recipe["sft"].pop("device")
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    run = subprocess.Popen([sys.executable, "-m", "srit.commands.cli", "run", "--config",
                            tmp_path / "r.yaml"],
                           env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = tmp_path / "run" / "sft" / "metrics.jsonl"
    wait_for(lambda: run.poll() is not None or (log.is_file() and log.read_text()))
    run.send_signal(signal.SIGINT)
    said, complained = run.communicate(timeout=60)
    assert run.returncode == STOPPED, complained
    assert "the run stopped; the same command goes on from there" in said
    assert list((tmp_path / "run" / "sft").glob("checkpoint-*"))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_full_disk_leaves_the_last_checkpoint_good(tiny, rows, tmp_path, straight, stage):
    """No file may grow beyond a limit, which the kernel enforces as it does a full disk."""
    out = tmp_path / "out"
    start(stage, tiny, rows, out, max_steps=2)
    (out / "run.json").write_text((out / "run.json").read_text().replace('"finished": true',
                                                                         '"finished": false'))
    run = Fork(stage, flags(stage, tiny, rows, out, **LOOP), tmp_path / "log", prepare=limit_files)
    _, complained = run.communicate()
    assert run.exitcode == 1
    assert "error:" in complained and "the checkpoint could not be written" in complained
    assert "Traceback" not in complained and "File too large" in complained
    assert [p.name for p in out.glob(".*")] == [".lock"] and (out / "checkpoint-2").is_dir()
    start(stage, tiny, rows, out)
    assert outcome(out) == straight(stage)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_place_that_cannot_be_written(tiny, rows, tmp_path, stage):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "out", "/proc/out"):
        run = Fork(stage, flags(stage, tiny, rows, place, **LOOP), tmp_path / "log")
        _, complained = run.communicate()
        assert run.exitcode == 1 and str(place) in complained
        assert complained.startswith("error: ") and "Traceback" not in complained


@pytest.mark.parametrize("stage", ["sft", "dpo", "sample"])
def test_a_read_only_directory(tiny, rows, tmp_path, stage):
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    words = flags(stage, tiny, rows, out, device="cpu")
    run = Fork(stage, words, tmp_path / "log", prepare=without_override)
    _, complained = run.communicate()
    assert run.exitcode == 1 and "Permission denied" in complained and str(out) in complained
    assert "Traceback" not in complained and not list(out.iterdir())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_when_a_rank_dies_the_others_end_and_say_why(tiny, rows, tmp_path, parallel):
    out = tmp_path / "out"
    words = flags("sft", tiny, rows, out, **LOOP | {"max_steps": 100_000, "parallel": parallel,
                                                    "ddp_timeout": 20})
    ranks = start_ranks("sft", words, ["/", "/"], tmp_path / "log")
    log = out / "metrics.jsonl"
    wait_for(lambda: log.is_file() and len(log.read_text().splitlines()) > 2)
    ranks[1].kill()
    _, complained = ranks[0].communicate(timeout=40)
    ranks[1].communicate()
    assert ranks[0].exitcode == 1
    assert "error: rank 0: another rank has died or does not answer" in complained
    assert "Traceback" not in complained


def test_a_step_that_is_not_finite_is_skipped_counted_and_named(tiny, rows, tmp_path, monkeypatch,
                                                               capsys):
    calls, compute_loss = [], sft.compute_loss

    def poisoned(*arguments, **named):
        calls.append(1)
        loss, sums = compute_loss(*arguments, **named)
        return (loss * float("nan"), sums * float("nan")) if len(calls) == 3 else (loss, sums)
    monkeypatch.setattr(sft, "compute_loss", poisoned)
    start("sft", tiny, rows, tmp_path, logging_steps=3)
    rows_ = metrics(tmp_path)
    assert [row["skipped_steps"] for row in rows_] == [1, 1]
    assert all(isinstance(row["loss"], float) for row in rows_)
    assert all(w.isfinite().all() for w in load_file(tmp_path / "model.safetensors").values())
    assert re.search(r"skipped step 3: loss or gradient is not finite; rows of this step: q\d",
                     capsys.readouterr().err)


def test_a_run_without_a_finite_step_exports_nothing(tiny, rows, tmp_path, monkeypatch):
    compute_loss = sft.compute_loss
    monkeypatch.setattr(sft, "compute_loss", lambda *a, **named: tuple(
        x * float("inf") for x in compute_loss(*a, **named)))
    with pytest.raises(Diverged, match="2 of 2 steps skipped.*nothing was exported"):
        start("sft", tiny, rows, tmp_path, max_steps=2, save_steps=0)
    assert [row["loss"] for row in metrics(tmp_path)] == [None, None]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert not (tmp_path / "model.safetensors").exists()


def test_a_run_that_diverged_stays_so_when_it_is_asked_again(tiny, rows, tmp_path):
    settings = dict(max_steps=4, save_steps=4, learning_rate=1e30, max_grad_norm=0.0)
    for _ in range(2):
        with pytest.raises(Diverged, match="nothing was exported"):
            start("sft", tiny, rows, tmp_path, **settings)
    assert not (tmp_path / "model.safetensors").exists()
    assert json.loads((tmp_path / "run.json").read_text())["finished"] is False


def test_a_finished_run_that_trains_longer_is_not_finished(tiny, rows, tmp_path):
    start("sft", tiny, rows, tmp_path, max_steps=2)
    with shutdown.listening(max_time=1e-9), pytest.raises(Stopped):
        start("sft", tiny, rows, tmp_path, max_steps=4)
    assert json.loads((tmp_path / "run.json").read_text())["finished"] is False


def test_a_log_line_torn_by_a_kill_is_cut(tiny, rows, tmp_path, straight):
    start("sft", tiny, rows, tmp_path, max_steps=5)
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write('{"step": 6, "lo')
    start("sft", tiny, rows, tmp_path)
    assert outcome(tmp_path) == straight("sft")


def test_a_line_of_ten_megabytes_is_dropped_and_counted_or_named(tiny, rows, tmp_path):
    """Training drops it; sampling, where it would be missed, says which row it is."""
    huge = {**demo(9, 1, 2), "question": "Tom has 3 apples. " * 600_000}
    for stage in ("sft", "sample"):
        write_rows(tmp_path / f"{stage}.jsonl", [huge, demo(0, 1, 2)])
    start("sft", tiny, tmp_path, tmp_path / "out")
    (only,) = json.loads((tmp_path / "out" / "run.json").read_text())["counts"].values()
    assert only["in"] == 2 and only["used"] == sum(only["dropped"].values()) == 1
    with pytest.raises(InputError, match="sample.jsonl:1: the row is longer than"):
        start("sample", tiny, tmp_path, tmp_path / "samples")


def test_a_tokenizer_of_another_model_is_refused(tiny, rows, tmp_path):
    small = tiny_checkpoint(tmp_path / "small", vocab_size=64)
    for stage in ("sft", "dpo", "sample"):
        with pytest.raises(InputError, match="tokens, the model only 64; they do not belong"):
            start(stage, small, rows, tmp_path / stage)


def test_torch_reads_nothing_from_pickles(tiny, rows, tmp_path, monkeypatch):
    """Neither pickle nor torch.load is entered while a checkpoint is written and read."""
    import pickle

    def refuse(*_, **__):
        raise AssertionError("a pickle")
    start("sft", tiny, rows, tmp_path, max_steps=4)
    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "dump"), (torch, "load"),
                        (torch, "save"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, refuse)
    start("sft", tiny, rows, tmp_path)


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_found(tiny, rows, tmp_path):
    start("sft", tiny, rows, tmp_path, max_steps=2)
    files = [path for path in (tmp_path / "checkpoint-2").rglob("*") if path.is_file()]
    assert len(files) > 5 and damage(tmp_path / "checkpoint-2") is None
    for file in files:
        flip(file)
        assert damage(tmp_path / "checkpoint-2") is not None, file
        flip(file)
    (tmp_path / "checkpoint-2" / "stranger").write_text("")
    assert "SHA256SUMS is cut" in damage(tmp_path / "checkpoint-2")


def test_a_directory_has_one_writer(tmp_path):
    """The second process says who has it; the lock goes with its holder, however that ends."""
    code = ("import sys, time; from pathlib import Path; from srit.runtime.lock import lock; "
            f"held = lock(Path({str(tmp_path)!r})); print('held', flush=True); time.sleep(60)")
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"in use by process {first.pid} on {socket.gethostname()}"):
        lock(tmp_path)
    first.kill()
    first.communicate()
    lock(tmp_path).close()


def test_ranks_with_different_inputs_are_refused(tiny, rows, tmp_path):
    """Rank 1 sees a file of the same name in which two rows have changed places."""
    folders = [tmp_path / "0", tmp_path / "1"]
    lines = (rows / "sft.jsonl").read_text().splitlines(keepends=True)
    for folder, some in zip(folders, (lines, lines[::-1]), strict=True):
        folder.mkdir()
        (folder / "sft.jsonl").write_text("".join(some))
    ranks = start_ranks("sft", flags("sft", tiny, ".", tmp_path / "out", **LOOP), folders,
                        tmp_path / "log")
    for i, run in enumerate(ranks):
        _, complained = run.communicate()
        assert run.exitcode == BAD_INPUT
        assert f"rank {i} has other input files or rows than ranks [{1 - i}]" in complained
    assert not (tmp_path / "out").exists()


def test_templates_show_the_date_of_the_run(rows, tmp_path):
    """Also when the run goes on on another day: the date stands in run.json."""
    tiny = tiny_checkpoint(tmp_path / "tiny", scale=2.0)
    settings = json.loads((tiny / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ strftime_now('%Y-%m-%d') }}" + settings["chat_template"]
    (tiny / "tokenizer_config.json").write_text(json.dumps(settings))
    with shutdown.listening(max_time=1e-9), pytest.raises(Stopped):
        start("sample", tiny, rows, tmp_path / "out")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", run["date"])
    (tmp_path / "out" / "run.json").write_text(json.dumps({**run, "date": "1999-12-31"}))
    start("sample", tiny, rows, tmp_path / "out")
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert lines and all(json.loads(line)["prompt"].startswith("1999-12-31") for line in lines)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["date"] == "1999-12-31"
    start("sample", tiny, rows, tmp_path / "given", date="2000-02-29")  # as `srit run` gives it
    assert '"prompt": "2000-02-29' in (tmp_path / "given" / "samples.jsonl").read_text()
    with pytest.raises(InputError, match="date was '2000-02-29', now '2000-03-01'"):
        start("sample", tiny, rows, tmp_path / "given", date="2000-03-01")
    with pytest.raises(Finished):
        start("sample", tiny, rows, tmp_path / "given")


def test_no_git_is_needed(tiny, rows, tmp_path):
    done = subprocess.run(command("sft", tiny, rows, tmp_path / "out", max_steps=1), text=True,
                          env={**ENV, "PATH": str(tmp_path)}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["commit"] is None
