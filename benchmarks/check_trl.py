"""Compare every metric of our DPO steps with trl.DPOTrainer's, on the same pairs in the same order.

    python benchmarks/check_trl.py --model_name_or_path M
    python benchmarks/check_trl.py --model_name_or_path M --loss_type hinge \\
        --output benchmarks/results/check_trl_hinge.csv      (and ipo, sigmoid_norm)

float32 on the CPU, plain-text rows, AdamW, constant learning rate. Exits with status 1 if a loss,
reward, log-prob or gradient norm differs by more than TOLERANCE. Needs the [bench] extra.
"""

import argparse
import json
import random
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from tables import write_csv

from srit.config import DPOConfig
from srit.runtime.run_dir import describe
from srit.train import dpo

NAMES = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins",
         "rewards/accuracies", "logps/chosen", "logps/rejected")
TOLERANCE = 1e-3  # relative


def make_pairs(n: int) -> list[dict]:
    """Plain-text pairs of different lengths. No token spans prompt and completion."""
    rng, rows = random.Random(0), []
    for _ in range(n):
        a, b, c = rng.randint(2, 60), rng.randint(2, 60), rng.randint(2, 9)
        rows.append({
            "prompt": f"Question: A shelf holds {a} books and gets {b} more. Then {c} shelves like "
                      "it are filled. How many books are there?\nAnswer:",
            "chosen": f" One shelf holds {a} + {b} = {a + b} books. {c} shelves hold {c} * {a + b} "
                      f"= {c * (a + b)} books. The answer is {c * (a + b)}.",
            "rejected": f" {a + b + c}." if rng.random() < 0.5 else
                        f" There are {a} books, so the answer is {a}, I think.",
        })
    return rows


def ours(model: str, file: Path, args: argparse.Namespace, out: Path) -> list[dict]:
    dpo.main(DPOConfig(
        model, [str(file)], str(out), dtype="float32", device="cpu", max_length=1024,
        max_steps=args.steps, learning_rate=args.learning_rate, lr_scheduler_type="constant",
        warmup_ratio=0.0, per_device_train_batch_size=args.batch_size, logging_steps=1,
        shuffle_dataset=False, loss_type=args.loss_type))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def theirs(model: str, rows: list[dict], args: argparse.Namespace, out: Path) -> list[dict]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer

    class FileOrder(DPOTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    logged = []

    class Keep(TrainerCallback):
        def on_log(self, *_, logs=None, **__):
            if "loss" in logs:
                logged.append(dict(logs))

    trainer = FileOrder(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=TRLConfig(
            output_dir=str(out), max_steps=args.steps, learning_rate=args.learning_rate,
            lr_scheduler_type="constant", warmup_steps=0, optim="adamw_torch", weight_decay=0.0,
            per_device_train_batch_size=args.batch_size, gradient_accumulation_steps=1,
            gradient_checkpointing=False, logging_steps=1, bf16=False, use_cpu=True,
            max_length=1024, beta=0.1, loss_type=[args.loss_type], report_to=[],
            save_strategy="no", disable_tqdm=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model), callbacks=[Keep()])
    trainer.train()
    return logged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--train_file", help="plain-text preference rows; default: generated ones")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--loss_type", default="sigmoid",
                        choices=["sigmoid", "hinge", "ipo", "sigmoid_norm"])
    parser.add_argument("--output", default="benchmarks/results/check_trl.csv")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        file = Path(args.train_file or Path(folder, "pairs.jsonl"))
        if not args.train_file:
            rows = make_pairs(args.steps * args.batch_size)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        a = ours(args.model_name_or_path, file, args, Path(folder, "ours"))
        b = theirs(args.model_name_or_path, rows, args, Path(folder, "trl"))

    machine = describe()
    stamp = {"loss_type": args.loss_type, "model": Path(args.model_name_or_path).name,
             "commit": machine["commit"], "torch": torch.__version__, "trl_version": version("trl"),
             "transformers": version("transformers"), "machine": machine["machine"]}
    table, worst = [], 0.0
    for step, (x, y) in enumerate(zip(a, b, strict=True), 1):
        for name in NAMES:
            # A reward of exactly 0, as in step 1, has no scale, so it is compared absolutely.
            scale = max(abs(float(y[name])), 1e-2 if "reward" in name else 1e-6)
            difference = abs(x[name] - float(y[name])) / scale
            worst = max(worst, difference)
            table.append({"step": step, "metric": name, "srit": x[name], "trl": float(y[name]),
                          "relative": difference, **stamp})
            print(f"{step}  {name:20} {x[name]:14.6f} {float(y[name]):14.6f}  {difference:.1e}")
    output = Path(args.output)
    write_csv(table, output)
    print(f"largest relative difference {worst:.1e} (allowed {TOLERANCE:.0e}); {output}")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
