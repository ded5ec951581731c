"""What `srit plan` predicts for the memory and the traffic of a step, against what steps take.

    python benchmarks/check_plan.py

Every case runs three steps in processes of their own, on the CPU, on rows with real lengths (as in
bench_step.py). It notes the growth of the resident set from before the model is loaded to the peak, and
the bytes that a step gives to collectives of over 64 KiB, counted as a ring sends them. Writes
benchmarks/results/check_plan_cpu.csv. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bench_step import make_checkpoint, make_rows, resident
from tables import write_csv

from srit.commands.plan import GIB, PlanConfig, plan, read_shape
from srit.config import DPOConfig, SFTConfig
from srit.runtime import distributed
from srit.runtime.run_dir import describe
from srit.train import dpo, sft
from srit.training.setup import Optimization

HERE = Path(__file__).parent
SHAPE = "SmolLM2-135M"
CASES = [  # stage, settings, ranks
    ("sft", {"dtype": "float32"}, 1),
    ("sft", {"dtype": "float32", "gradient_checkpointing": True}, 1),
    ("sft", {"dtype": "bfloat16"}, 1),
    ("dpo", {"dtype": "float32"}, 1),
    ("dpo", {"dtype": "float32", "gradient_checkpointing": True}, 1),
    ("dpo", {"dtype": "float32", "use_peft": True}, 1),
    ("dpo", {"dtype": "bfloat16"}, 1),
    ("dpo", {"dtype": "float32"}, 2),
    ("dpo", {"dtype": "float32", "parallel": "fsdp"}, 2),
    ("sft", {"dtype": "float32", "gradient_accumulation_steps": 2}, 2),
    ("sft", {"dtype": "float32", "gradient_accumulation_steps": 2, "parallel": "fsdp"}, 2),
    ("sft", {"dtype": "bfloat16", "parallel": "fsdp", "use_peft": True}, 2),
]
STEPS = 3


def count_sent() -> list[float]:
    """From now on, bytes that this rank sends; one number that grows."""
    sent, ring = [0.0], (distributed.world_size() - 1) / distributed.world_size()

    def counting(function, times, whole):
        def counted(*arguments, **named):
            tensors = [a for a in (*arguments, *named.values()) if isinstance(a, torch.Tensor)]
            size = whole((t.nbytes for t in tensors), default=0)
            if size > 2**16:
                sent[0] += times * ring * size
            return function(*arguments, **named)
        return counted
    for name in ("all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor",
                 "reduce_scatter_single"):
        if hasattr(torch.distributed, name):  # the whole is the larger of input and output
            setattr(torch.distributed, name, counting(getattr(torch.distributed, name), 1, max))
    torch.distributed.all_reduce = counting(torch.distributed.all_reduce, 2, max)
    return sent


def run(case: int, folder: Path, rows: int) -> None:
    """In a process of its own: train, and print the growth, what was sent, the longest stream."""
    stage, settings, _ = CASES[case]
    longest, module = [0], {"sft": sft, "dpo": dpo}[stage]
    score = module.score

    def noted(model, batch, *arguments, **named):
        longest[0] = max(longest[0], batch.input_ids.shape[1])
        return score(model, batch, *arguments, **named)
    module.score = noted
    cls = {"sft": SFTConfig, "dpo": DPOConfig}[stage]
    distributed.setup("cpu")
    sent = count_sent()
    at_step, step = [], Optimization.step

    def noted_step(self, *arguments):
        result = step(self, *arguments)
        at_step.append(sent[0])
        return result
    Optimization.step = noted_step
    before = resident("VmRSS")
    module.main(cls(str(folder / "model"), [str(folder / f"{stage}.jsonl")], str(folder / f"out{case}"),
                    device="cpu", max_length=2048, max_steps=STEPS, per_device_train_batch_size=rows,
                    shuffle_dataset=False, **settings))
    print(json.dumps({"peak": resident("VmHWM") - before, "tokens": longest[0],
                      "sent": (at_step[-1] - at_step[0]) / (STEPS - 1)}), flush=True)


def measure(case: int, folder: Path, rows: int) -> dict[str, float]:
    """The largest number of each kind that a rank had."""
    ranks = CASES[case][2]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *(launch if ranks > 1 else ()), __file__, "--case", str(case), "--folder",
         folder, "--rows", str(rows)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))})
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"peak"')]
    if done.returncode or len(lines) != ranks:
        sys.exit(done.stderr)
    return {name: max(line[name] for line in lines) for name in lines[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4, help="rows or pairs in a forward pass")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", default=str(HERE / "results/check_plan_cpu.csv"))
    args = parser.parse_args()
    if args.case is not None:
        return run(args.case, args.folder, args.rows)
    table, machine = [], describe()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        make_checkpoint(folder / "model", SHAPE)
        config = read_shape(str(folder / "model"))
        for stage in ("sft", "dpo"):
            rows = make_rows(stage, 12 * args.rows, config.vocab_size)
            (folder / f"{stage}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for case, (stage, settings, ranks) in enumerate(CASES):
            found = measure(case, folder, args.rows)
            peak, tokens = found["peak"], found["tokens"]
            predicted = plan(config, PlanConfig(SHAPE, stage, gpus=ranks, tokens=tokens,
                                                device="cpu", **settings))
            table.append({
                "shape": SHAPE, "stage": stage, "ranks": ranks,
                "settings": " ".join(f"{k}={v}" for k, v in settings.items()), "tokens": tokens,
                "predicted_gib": round(predicted.peak / GIB, 2), "measured_gib": round(peak / GIB, 2),
                "ratio": round(predicted.peak / peak, 2),
                "predicted_sent_gb": round(predicted.sent / 1e9, 3),
                "measured_sent_gb": round(found["sent"] / 1e9, 3), "commit": machine["commit"],
                "torch": torch.__version__, "machine": machine["machine"]})
            print("{stage} {settings:44} {ranks} rank(s) {tokens:5} tokens: predicted "
                  "{predicted_gib:.2f} GiB, measured {measured_gib:.2f} GiB, {ratio:.2f}; "
                  "sent {predicted_sent_gb:.3f} and {measured_sent_gb:.3f} GB".format(
                      **table[-1]), flush=True)
    write_csv(table, Path(args.output))
    print(args.output)


if __name__ == "__main__":
    main()
