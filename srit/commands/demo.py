"""`srit demo`: the whole method from scratch on a small world of word problems.

1. The world: questions, demonstrations by a programmed teacher, two test sets. Like a real teacher's,
   one demonstration in ten is wrong, and four in ten give the result without the steps.
2. The base model: a small llama and its tokenizer, trained here on one-step problems, explained in
   plain text and answered without explanation in a chat. It knows the words, sums and one-step stories.
3. runs/demo.yaml as `srit run` runs it: evaluate, instruct, evaluate, sample, pair, refine, evaluate.
   A calculator does the sums of its answers. What is left to learn is to write steps at all, and to put
   the right numbers and signs into them.
"""

import csv
import os
import random
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from srit.commands import run
from srit.commands.config import DemoConfig
from srit.commands.demo_data import PROBLEMS, generate, problem
from srit.commands.progress import read_progress
from srit.commands.report import label, read_ways
from srit.models import Decoder, ModelConfig, save_model
from srit.recipe import Stage
from srit.runtime.files import InputError, atomic_write
from srit.runtime.jsonl import write_jsonl
from srit.runtime.run_dir import read_run
from srit.runtime.table import table
from srit.text.prompts import question_messages
from srit.text.tokenizer import Tokenizer

SPECIALS = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MODEL = {
    "model_type": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True,
    "rope_theta": 500.0,  # for texts of a hundred tokens; 10,000 learns to copy later
    "pad_token_id": 0, "eos_token_id": 3,
}
INIT_STD = 0.06  # with a smaller value so small a model learns to copy and add much later
BASE_TRAINING = {
    "max_length": 256, "num_train_epochs": 1, "learning_rate": 3e-3, "warmup_ratio": 0.05,
    "weight_decay": 0.01, "adam_beta2": 0.95, "per_device_train_batch_size": 16,
    "dtype": "float32", "device": "cpu", "logging_steps": 50,
}
SIZES = {"base": 10000, "demos": 1200, "questions": 1200, "test": 400}


def plain_rows(n: int, seed: int) -> Iterator[dict]:
    """Training rows of the base model: two explained one-step problems, or one answered in a chat.

    The explanations are in any order, so the model learns to look for the numbers of a problem, not
    for those in a place. In a chat it only learns to answer without steps, that is to guess. SFT has
    to teach it to explain there.
    """
    rng = random.Random(f"{seed} plain")
    for _ in range(n):
        pair = [problem(rng, "base"), problem(rng, "base")]
        if rng.random() < 0.25:
            message = question_messages(pair[0], rng.choice(("direct", "cot")))
            yield {"prompt": message, "completion": f"The answer is {pair[0]['answer']}."}
        else:
            yield {
                "prompt": " ".join(row["question"] for row in pair) + " ",
                "completion": " ".join(row["completion"] for row in rng.sample(pair, 2)),
            }


def make_world(directory: Path, seed: int) -> None:
    """Write base.jsonl, demos.jsonl, questions.jsonl and two test sets that share no question."""
    inside = generate(SIZES["questions"] + SIZES["test"], seed, "in")
    outside = generate(SIZES["test"], seed, "out")
    train, test = inside[: SIZES["questions"]], inside[SIZES["questions"] :]
    write_jsonl(directory / "base.jsonl", plain_rows(SIZES["base"], seed))
    write_jsonl(directory / "demos.jsonl", train[: SIZES["demos"]])
    for name, rows in (("questions.jsonl", train), ("stories/test.jsonl", test),
                       ("other-stories/test.jsonl", outside)):
        keys = ("id", "task", "question", "answer")
        write_jsonl(directory / name, [{key: row[key] for key in keys} for row in rows])


def make_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE trained on texts of the world; large enough that every word is one token."""
    rows = [row for domain in PROBLEMS for row in generate(1500, seed, domain)]
    texts = [f"{question_messages(row, 'cot')[0]['content']}\n{row['completion']}" for row in rows]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, {"eos_token": "<|end|>", "pad_token": "<|pad|>"}, TEMPLATE)


def make_untrained(directory: Path, seed: int) -> None:
    """Write a checkpoint with random weights, and its tokenizer."""
    tokenizer = make_tokenizer(seed)
    config = ModelConfig.from_dict({**MODEL, "vocab_size": tokenizer.vocab_size})
    model = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, INIT_STD, generator=generator)
    save_model(model, config, directory)
    tokenizer.save(directory)


def run_seed(cfg: DemoConfig, seed: int) -> Path:
    """Make the world and base model of one seed and run the method. Finished parts are skipped."""
    root = Path(cfg.output_dir) / f"seed-{seed}"
    base = Stage("base", "sft", {
        **BASE_TRAINING, "seed": seed, "model_name_or_path": str(root / "untrained"),
        "train_file": [str(root / "data" / "base.jsonl")], "output_dir": str(root / "base")})
    if not run.is_finished(base):
        make_world(root / "data", seed)
        make_untrained(root / "untrained", seed)
        print(f"[base] {SIZES['base']:,} rows of one-step problems", flush=True)
        run.run_stage(base)
    os.environ["SRIT_DEMO_DIR"] = str(root)
    run.main(run.RunConfig(config=cfg.recipe, output_dir=str(root), seed=seed))
    return root


def main(cfg: DemoConfig) -> None:
    if not Path(cfg.recipe).is_file():
        raise InputError(f"--recipe {cfg.recipe}: no such file")
    roots = {seed: run_seed(cfg, seed) for seed in cfg.seeds}
    print(seeds_table(roots, Path(cfg.output_dir) / "seeds.csv"))


def seeds_table(roots: dict[int, Path], file: Path) -> str:
    """Accuracy by seed as aligned text; written to the CSV `file` with commit and machine."""
    rows, tables = [], {}
    for seed, root in roots.items():
        for way in read_ways(read_progress(root)):
            header, line = [f"accuracy{way.mark}"], [f"seed {seed}"]
            for domain, end in (("in_domain", "in"), ("out_of_domain", "out")):
                for stage, result in way.results.items():
                    origin, found, name = read_run(root / stage), result[domain], label(stage).lower()
                    if found is None:  # a recipe that names no such data set
                        continue
                    header.append(f"{name}, {end}")
                    line.append(f"{found['accuracy']:.1%}")
                    rows.append({"seed": seed, "model": name, "calculator": result["calculator"],
                                 "test": domain, "n": found["n"], "accuracy": found["accuracy"],
                                 "commit": origin["commit"], "torch": origin["versions"]["torch"],
                                 "machine": origin["machine"]})
            tables.setdefault(tuple(header), []).append(line)
    with atomic_write(file) as handle:
        writer = csv.DictWriter(handle, rows[0] if rows else (), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return "\n\n".join(table(header, lines) for header, lines in tables.items())
