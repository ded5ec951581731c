"""What `srit plan` predicts for the memory of a step, against what steps take.

    python benchmarks/check_plan.py [--shape SmolLM2-135M]

Every case runs three steps in processes of their own, on the CPU, on rows with real lengths (as in
bench_step.py), and notes the growth of the resident set from before the model is loaded to the peak.
Writes benchmarks/results/check_plan_cpu.csv. Linux only.
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

from srit import dist
from srit.config import DPOConfig, SFTConfig
from srit.plan import GIB, SHAPES, PlanConfig, plan, read_shape
from srit.runs import describe
from srit.train import dpo, sft

HERE = Path(__file__).parent
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
]


def run(case: int, folder: Path, rows: int) -> None:
    """In a process of its own: train, and print the growth and the longest stream."""
    stage, settings, _ = CASES[case]
    longest, module = [0], {"sft": sft, "dpo": dpo}[stage]
    score = module.score

    def noted(model, batch, *arguments, **named):
        longest[0] = max(longest[0], batch.input_ids.shape[1])
        return score(model, batch, *arguments, **named)
    module.score = noted
    cls = {"sft": SFTConfig, "dpo": DPOConfig}[stage]
    dist.setup("cpu")
    before = resident("VmRSS")
    module.main(cls(str(folder / "model"), [str(folder / f"{stage}.jsonl")], str(folder / f"out{case}"),
                    device="cpu", max_length=2048, max_steps=3, per_device_train_batch_size=rows,
                    shuffle_dataset=False, **settings))
    print(json.dumps({"peak": resident("VmHWM") - before, "tokens": longest[0]}), flush=True)


def measure(case: int, folder: Path, rows: int) -> tuple[int, int]:
    """(bytes, tokens) of the rank that took most."""
    ranks = CASES[case][2]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *(launch if ranks > 1 else ()), __file__, "--case", str(case), "--folder",
         folder, "--rows", str(rows)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))})
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"peak"')]
    if done.returncode or len(lines) != ranks:
        sys.exit(done.stderr)
    return max(line["peak"] for line in lines), max(line["tokens"] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[name for name in SHAPES if name == "SmolLM2-135M"],
                        default="SmolLM2-135M")
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
        make_checkpoint(folder / "model", args.shape)
        config = read_shape(str(folder / "model"))
        for stage in ("sft", "dpo"):
            rows = make_rows(stage, 6 * args.rows, config.vocab_size)
            (folder / f"{stage}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for case, (stage, settings, ranks) in enumerate(CASES):
            peak, tokens = measure(case, folder, args.rows)
            cfg = PlanConfig(args.shape, stage, gpus=ranks, tokens=tokens, device="cpu",
                             **{"parallel": "ddp", **settings})
            predicted = plan(config, cfg).peak
            table.append({
                "shape": args.shape, "stage": stage, "ranks": ranks,
                "settings": " ".join(f"{k}={v}" for k, v in settings.items()), "tokens": tokens,
                "predicted_gib": round(predicted / GIB, 2), "measured_gib": round(peak / GIB, 2),
                "ratio": round(predicted / peak, 2), "commit": machine["commit"],
                "torch": torch.__version__, "machine": machine["machine"]})
            print("{stage} {settings:44} {ranks} rank(s) {tokens:5} tokens: predicted "
                  "{predicted_gib:.2f} GiB, measured {measured_gib:.2f} GiB, {ratio:.2f}".format(
                      **table[-1]), flush=True)
    write_csv(table, Path(args.output))
    print(args.output)


if __name__ == "__main__":
    main()
