"""SIGKILL at random moments, restart, compare: `python tests/kills.py STAGE FOLDER SEED RUNS`.

A run is forked from this process, which has imported everything. The moment is a number of calls
(Python functions and C functions: writes, renames, fsyncs); half of the moments lie in the writing of
a checkpoint or of a row. A killed run is started again with the same settings, and may be killed
again; what it ends with must be what an undisturbed run ends with, bit by bit.
Prints a line a run, and fails with the first difference.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path

import torch
import torch._dynamo  # here, because its import in every child would be most of the calls
from tiny import demo, metrics, pair, question, tiny_checkpoint, write_rows

from srit.config import DPOConfig, SampleConfig, SFTConfig
from srit.runtime import files
from srit.runtime.outcome import Finished
from srit.train import dpo, sample, sft
from srit.training.checkpoint import CheckpointWriter
from srit.training.saving import BestWeights

LOOP = dict(dtype="float32", device="cpu", max_length=256, learning_rate=1e-3, logging_steps=2,
            per_device_train_batch_size=2, max_steps=7, save_steps=3, eval_steps=2, save_total_limit=1)


def start(stage: str, folder: Path, out: Path) -> None:
    model, rows = str(folder / "tiny"), str(folder / f"{stage}.jsonl")
    if stage == "sample":
        sample.main(SampleConfig(model, str(out), train_file=[rows], dtype="float32", device="cpu",
                                 num_samples=2, temperature=1.0, max_new_tokens=6,
                                 per_device_batch_size=3))
    elif stage == "dpo":
        dpo.main(DPOConfig(model, [rows], str(out), eval_file=[rows], **LOOP))
    else:
        sft.main(SFTConfig(model, [rows], str(out), eval_file=[rows], async_save=stage == "async",
                           **LOOP))


class Calls:
    """Counts calls in all threads; at number `at` the process is gone. Notes those within saving."""

    def __init__(self, at: int | None = None) -> None:
        self.count, self.at, self.saving = itertools.count(1), at, []
        self.inside = 0

    def __call__(self, frame, event, argument) -> None:
        if event in ("call", "c_call"):
            n = next(self.count)
            if n == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.inside and self.at is None:
                self.saving.append(n)

    def watch(self, owner, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments, **named):
            self.inside += 1
            try:
                return original(*arguments, **named)
            finally:
                self.inside -= 1
        setattr(owner, name, wrapped)


def in_child(calls: Calls, stage: str, folder: Path, out: Path, report: Path | None = None) -> int:
    """Run a stage in a forked process; its signal, or 0."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        failed = os.WIFEXITED(status) and os.WEXITSTATUS(status)
        assert not failed, out.with_suffix(".log").read_text()[-4000:]
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    status = 1
    try:
        out.parent.mkdir(exist_ok=True)
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        calls.watch(CheckpointWriter, "_write")  # rotation of old checkpoints included
        calls.watch(BestWeights, "export")
        calls.watch(BestWeights, "prune")
        calls.watch(files, "rename_over")
        calls.watch(json, "dumps")
        threading.setprofile(calls)
        sys.setprofile(calls)
        with suppress(Finished):  # it was killed between its last write and its end
            start(stage, folder, out)
        sys.setprofile(None)
        if report:
            report.write_text(json.dumps([next(calls.count), calls.saving]))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def outcome(stage: str, out: Path) -> dict:
    """What must not depend on kills. Times do."""
    names = ["samples.jsonl"] if stage == "sample" else ["model.safetensors", "config.json"]
    found = {name: (out / name).read_bytes() for name in names}
    if stage != "sample":
        found["metrics"] = [{k: v for k, v in row.items() if k != "tokens_per_second"}
                            for row in metrics(out)]
    found["files"] = sorted(p.name for p in out.iterdir() if not p.name.startswith("ref_logps"))
    run = json.loads((out / "run.json").read_text())
    return found | {"run": {k: run[k] for k in ("finished", "counts")}}


def main(stage: str, folder: Path, seed: int, runs: int) -> None:
    torch.set_num_threads(1)
    tiny_checkpoint(folder / "tiny", scale=2.0)
    make = {"dpo": lambda i: pair(i, i % 7 + 1, (i * 3) % 11),
            "sample": lambda i: question(i, i % 7 + 1, (i * 3) % 11)}
    write_rows(folder / f"{stage}.jsonl",
               [make.get(stage, lambda i: demo(i, i % 7 + 1, (i * 3) % 11))(i) for i in range(5)])
    in_child(Calls(), stage, folder, folder / "straight", folder / "calls.json")
    expected = outcome(stage, folder / "straight")
    total, saving = json.loads((folder / "calls.json").read_text())
    print(f"{stage}: {total} calls, {len(saving)} of them while saving", flush=True)
    chance = random.Random(seed)
    for run in range(runs):
        out, moments = folder / "killed", []
        shutil.rmtree(out, ignore_errors=True)
        out.with_suffix(".log").unlink(missing_ok=True)
        while True:
            at = chance.choice([chance.choice(saving), chance.randrange(1, total)])
            if len(moments) == 3:
                at = None  # often enough
            if in_child(Calls(at), stage, folder, out) == 0:
                break
            moments.append(at)
        found = outcome(stage, out)
        print(f"run {run}: killed at {moments}", flush=True)
        for name, value in expected.items():
            if found[name] != value:
                sys.exit(f"seed {seed}, run {run}, killed at {moments}: {name} differs: "
                         f"{str(value)[:2000]} != {str(found[name])[:2000]}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
