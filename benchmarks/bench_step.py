"""One training step (SFT or DPO) against TRL's trainers: same rows, same model, same optimizer.

Every contender runs in its own process. They take turns, so that noise of the machine affects all of
them. Losses are compared before any time is printed. The model is random, of the named shape; the
tokenizer has one token per word, so rows have exactly the lengths in lengths.json, which are those of
real pairs and demonstrations. Step time is the median over all steps but the first. Peak memory is that
of the process, minus what it held before the model was loaded. Writes a CSV and its figure to
benchmarks/results/. Needs the [bench] extra.

The table in README.md:
    python benchmarks/bench_step.py
The tables in docs/step.md:
    python benchmarks/bench_step.py --stage dpo --rounds 1 --contenders srit "srit, compiled" \\
        "srit, checkpointing" "srit, checkpointing of MLPs" trl "trl, checkpointing" \\
        --output benchmarks/results/bench_step_SmolLM2-135M_float32_cpu_dpo_policies.csv
    python benchmarks/bench_step.py --stage dpo --layers 4 --batch_size 2 --steps 3 --rounds 1 \\
        --contenders srit trl --model Llama-3.2-1B    (and Qwen2.5-1.5B)
The figure of a CSV:
    python benchmarks/bench_step.py --plot FILE.csv
"""

import argparse
import csv
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from tables import pyplot, write_csv

HERE = Path(__file__).parent
SHAPES = {  # layers, hidden, intermediate, heads, key/value heads, vocabulary, tied
    "SmolLM2-135M": (30, 576, 1536, 9, 3, 49152, True),
    "Llama-3.2-1B": (16, 2048, 8192, 32, 8, 128256, True),
    "Qwen2.5-1.5B": (28, 1536, 8960, 12, 2, 151936, True),
}
CONTENDERS = {  # name: settings
    "srit": {},
    "srit, compiled": {"torch_compile": True},
    "srit, checkpointing": {"gradient_checkpointing": True},
    "srit, checkpointing of MLPs": {"gradient_checkpointing": True, "checkpoint_policy": "mlp"},
    "trl": {},
    "trl, compiled": {"torch_compile": True},
    "trl, checkpointing": {"gradient_checkpointing": True},
    "trl, liger": {"use_liger_kernel": True},
}


def make_checkpoint(directory: Path, shape: str, layers: int | None) -> None:
    """Write a random Llama of this shape, and a tokenizer whose token i is the word `w<i>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from srit.models import Decoder, ModelConfig, save_model

    depth, hidden, intermediate, heads, kv_heads, vocab, tied = SHAPES[shape]
    torch.manual_seed(0)
    config = ModelConfig.from_dict({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab,
        "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers or depth,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": hidden // heads,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1e5,
        "hidden_act": "silu", "tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": 0})
    model = Decoder(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    save_model(model, config, directory)
    words = {"</s>": 0} | {f"w{i}": i for i in range(1, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "</s>"}))


def make_rows(stage: str, n: int, vocab: int) -> list[dict]:
    """Rows of random words in the recorded lengths. Completions leave room for the EOS token."""
    rng, lengths = random.Random(0), json.loads((HERE / "lengths.json").read_text())
    sizes = lengths["pairs" if stage == "dpo" else "demonstrations"]
    names = ("prompt", "chosen", "rejected") if stage == "dpo" else ("prompt", "completion")

    def text(words: int, first: bool) -> str:
        joined = " ".join(f"w{rng.randrange(1, vocab)}" for _ in range(words))
        return joined if first else f" {joined}"

    return [{name: text(size - (name != "prompt"), name == "prompt")
             for name, size in zip(names, sizes[i % len(sizes)], strict=True)} for i in range(n)]


def resident(name: str) -> int:
    """VmRSS (current) or VmHWM (peak) in bytes: of this process, or of torch on a GPU."""
    if torch.cuda.is_available():
        counters = {"VmRSS": torch.cuda.memory_allocated, "VmHWM": torch.cuda.max_memory_allocated}
        return counters[name]()
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(name))


def run_srit(args: argparse.Namespace, rows: Path, settings: dict) -> tuple[list, list]:
    from srit.config import DPOConfig, SFTConfig
    from srit.train import dpo, sft

    stage, config = (dpo, DPOConfig) if args.stage[0] == "dpo" else (sft, SFTConfig)
    times, step = [], stage.optimizer_step

    def timed(*arguments, **named):
        norm, finite = step(*arguments, **named)
        times.append((norm.item(), time.perf_counter())[1])  # waits for the device
        return norm, finite

    stage.optimizer_step = timed
    out = rows.parent / "srit"
    stage.main(config(
        args.checkpoint, [str(rows)], str(out), dtype=args.dtype, max_length=2048,
        device="cuda" if torch.cuda.is_available() else "cpu", max_steps=args.steps, learning_rate=1e-5,
        lr_scheduler_type="constant", warmup_ratio=0.0, per_device_train_batch_size=args.batch_size,
        logging_steps=1, shuffle_dataset=False, **settings))
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return times, [json.loads(line)["loss"] for line in lines]


def run_trl(args: argparse.Namespace, rows: Path, settings: dict) -> tuple[list, list]:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    sft, times, losses = args.stage[0] == "sft", [], []

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())

        def on_log(self, *_, logs=None, **__):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    base = trl.SFTTrainer if sft else trl.DPOTrainer

    class FileOrder(base):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    on_gpu = torch.cuda.is_available()
    bf16 = args.dtype == "bfloat16"
    special = {"completion_only_loss": True} if sft else {
        "beta": 0.1, "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": args.batch_size}
    flash = on_gpu and bf16 and importlib.util.find_spec("flash_attn") is not None
    if flash:
        special["padding_free"] = True  # TRL packs a batch only for FlashAttention
    trainer = FileOrder(
        model=AutoModelForCausalLM.from_pretrained(
            args.checkpoint, dtype=torch.float32,
            attn_implementation="flash_attention_2" if flash else "sdpa"),
        args=(trl.SFTConfig if sft else trl.DPOConfig)(
            output_dir=str(rows.parent / "trl"), max_steps=args.steps, learning_rate=1e-5,
            lr_scheduler_type="constant", warmup_steps=0, optim="adamw_torch_fused",
            weight_decay=0.0, per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=1, logging_steps=1, bf16=bf16, use_cpu=not on_gpu,
            max_length=2048, report_to=[], save_strategy="no", disable_tqdm=True,
            **{"gradient_checkpointing": False, **settings}, **special),
        train_dataset=Dataset.from_list([json.loads(x) for x in rows.read_text().splitlines()]),
        processing_class=AutoTokenizer.from_pretrained(args.checkpoint), callbacks=[Watch()])
    trainer.train()
    return times, losses


def contend(args: argparse.Namespace) -> None:
    """In the child process: run one contender and print its results as JSON."""
    vocab = SHAPES[args.model][5]
    # Import first: the memory of libraries is not counted.
    importlib.import_module("trl" if args.contender.startswith("trl") else "srit.train.dpo")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        made = make_rows(args.stage[0], args.steps * args.batch_size, vocab)
        rows.write_text("".join(json.dumps(row) + "\n" for row in made))
        before = resident("VmRSS")
        contend_as = run_srit if args.contender.startswith("srit") else run_trl
        times, losses = contend_as(args, rows, CONTENDERS[args.contender])
        peak = resident("VmHWM") - before
    seconds = [b - a for a, b in zip(times, times[1:], strict=False)]
    print(json.dumps({"seconds": seconds, "losses": losses, "peak": peak}))


def tokens_a_step(stage: str, steps: int, batch_size: int, vocab: int) -> list[int]:
    """Tokens of every step. A prompt counts once for each of its completions."""
    rows = make_rows(stage, steps * batch_size, vocab)
    sizes = [{name: len(text.split()) + (name != "prompt") for name, text in row.items()}
             for row in rows]
    counts = [(len(s) - 1) * s["prompt"] + sum(s.values()) - s["prompt"] for s in sizes]
    return [sum(counts[i : i + batch_size]) for i in range(0, len(counts), batch_size)]


def measure(args: argparse.Namespace, stage: str) -> list[dict]:
    """Run the contenders in turns, `rounds` times. Returns one CSV row for each."""
    results: dict[str, list[dict]] = {}
    for turn in range(args.rounds):
        for name in args.contenders:
            command = [sys.executable, __file__, "--contender", name, "--stage", stage, "--model",
                       args.model, "--dtype", args.dtype, "--steps", str(args.steps),
                       "--batch_size", str(args.batch_size), "--checkpoint", args.checkpoint]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{stage}: {name} failed: {done.stderr.strip().splitlines()[-1][:160]}")
                continue
            results.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{stage}: round {turn + 1}, {name}: "
                  f"{statistics.median(results[name][-1]['seconds']):.2f} s a step", flush=True)

    ours = results["srit"][0]["losses"]
    for name, runs in results.items():
        # bf16 forwards differ in rounding; float32 ones hardly
        bound = 1e-3 if args.dtype == "float32" else 2e-2
        worst = max(abs(a - b) / abs(b) for a, b in zip(runs[0]["losses"], ours, strict=True))
        if worst > bound:
            sys.exit(f"{stage}: losses of {name} differ from ours by {worst:.1e} relative, "
                     f"allowed {bound}: {runs[0]['losses']} against {ours}")
        print(f"{stage}: losses of {name} agree to {worst:.1e}")

    from srit.runtime.run_dir import describe

    tokens = tokens_a_step(stage, args.steps, args.batch_size, SHAPES[args.model][5])[1:]
    machine, rows = describe(), []
    for name, runs in results.items():
        speeds = [t / s for run in runs for t, s in zip(tokens, run["seconds"], strict=True)]
        rows.append({
            "stage": stage, "contender": name, "model": args.model,
            "layers": args.layers or SHAPES[args.model][0], "dtype": args.dtype,
            "batch_size": args.batch_size, "tokens_per_second": round(statistics.median(speeds), 1),
            "seconds_p50": round(statistics.median(s for r in runs for s in r["seconds"]), 3),
            "peak_mib": round(max(run["peak"] for run in runs) / 2**20), "commit": machine["commit"],
            "torch": torch.__version__, "trl": version("trl"), "machine": machine["machine"]})
    base = {row["contender"]: row for row in rows}
    for row in rows:
        other = base.get("trl, checkpointing" if "checkpointing" in row["contender"] else "trl", row)
        row["speed_to_trl"] = round(row["tokens_per_second"] / other["tokens_per_second"], 2)
        row["memory_to_trl"] = round(row["peak_mib"] / other["peak_mib"], 2)
    return rows


def plot(path: Path) -> None:
    """Draw the speed and memory of every contender."""
    plt = pyplot()
    with open(path, newline="") as handle:
        rows = list(csv.DictReader(handle))
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.36 * len(rows) + 1.4), sharey=True)
    panels = ("tokens_per_second", "tokens/s", "speed_to_trl"), ("peak_mib", "peak memory, MiB",
                                                                 "memory_to_trl")
    for axis, (column, label, ratio) in zip(axes, panels, strict=True):
        for y, row in enumerate(rows):
            ours = row["contender"].startswith("srit")
            axis.barh(-y, float(row[column]), color="#0072B2" if ours else "#E69F00")
            text = f"{float(row[column]):.0f}" + (f"  {float(row[ratio]):.2f}x TRL" if ours else "")
            axis.annotate(text, (float(row[column]), -y), (3, 0), textcoords="offset points",
                          va="center", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.2)
        axis.set_xlabel(label)
    axes[0].set_yticks([-y for y in range(len(rows))],
                       [f"{row['stage'].upper()}  {row['contender']}" for row in rows])
    first = rows[0]
    figure.suptitle(f"{first['model']}, {first['dtype']}, {first['machine']}, torch {first['torch']}, "
                    f"trl {first['trl']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".svg"))
    plt.close(figure)
    print(path.with_suffix(".svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=["dpo", "sft"], default=["dpo", "sft"])
    parser.add_argument("--model", choices=list(SHAPES), default="SmolLM2-135M")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to save memory")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch_size", type=int, default=4, help="pairs (dpo) or rows (sft) per step")
    parser.add_argument("--steps", type=int, default=4, help="the first one is not timed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), metavar="NAME",
                        default=["srit", "trl", "srit, checkpointing", "trl, checkpointing"],
                        help="; ".join(CONTENDERS))
    parser.add_argument("--output")
    parser.add_argument("--plot", metavar="CSV", type=Path, help="only draw the figure of this CSV")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contend(args)
        return
    if args.plot:
        plot(args.plot)
        return
    where = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    shape = args.model + (f"-{args.layers}-layers" if args.layers else "")
    output = Path(args.output or HERE / f"results/bench_step_{shape}_{args.dtype}_{where}.csv")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        args.checkpoint = folder
        make_checkpoint(Path(folder), args.model, args.layers)
        for stage in args.stage:
            rows += measure(args, stage)
    for row in rows:
        print("{stage:4} {contender:27} {tokens_per_second:9.1f} tokens/s {speed_to_trl:5.2f}x  "
              "{peak_mib:6d} MiB {memory_to_trl:5.2f}x".format(**row))
    write_csv(rows, output)
    print(output)
    plot(output)


if __name__ == "__main__":
    main()
