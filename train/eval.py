"""Accuracy on questions with ground truth: the number that the method is judged by.

scoring generate  the model writes its answer (greedy by default) and the last answer it gives is
                  compared with the truth; with num_samples > 1 also pass@k and maj@k.
scoring options   the likeliest option, multiple choice only: by its letter (`accuracy`), and by its
                  text (`accuracy_text`; `accuracy_text_norm` divides by the characters).
Every accuracy comes with the number of questions and a 95 % Wilson interval.

In:   question files; those of the data sets named by in_domain are pooled apart from the others
Out:  results.json, generations.jsonl (one graded row for each question and sample), run.json

    python train/eval.py --model_name_or_path M --eval_file a.jsonl b.jsonl --output_dir out/eval
    torchrun --nproc_per_node 8 train/eval.py --config runs/x.yaml
"""

import json
import time
from pathlib import Path

import torch

from srit.config import EvalConfig
from srit.data.questions import dataset_name
from srit.generation.engine import Result
from srit.generation.loglikelihood import best, score_options
from srit.generation.rollouts import (
    Prompt,
    answer_all,
    fits,
    load_for_generation,
    make_row,
    read_prompts,
)
from srit.grading.statistics import pool, summarise
from srit.launch import run
from srit.models import Decoder, KVCache
from srit.runtime import distributed
from srit.runtime.files import InputError, atomic_write
from srit.runtime.jsonl import Counts, write_jsonl
from srit.runtime.run_dir import claim_output_dir, write_run
from srit.runtime.table import table
from srit.text.tokenizer import Tokenizer


def choose_all(model: Decoder, tokenizer: Tokenizer, prompts: list[Prompt], path: Path,
               cfg: EvalConfig) -> list[dict]:
    """The likeliest option of every question as graded rows, written to `path`."""
    for prompt in prompts:
        if prompt.row["task"] != "choice":
            raise InputError(f"{prompt.file}: {prompt.row['id']!r} is a {prompt.row['task']} "
                             "question; --scoring options needs multiple choice")
    options = max(len(p.row["choices"]) for p in prompts)
    longest = max(len(p.ids) for p in prompts) + cfg.max_new_tokens
    cache = KVCache(model.config, 2 * options, longest, model.compute_dtype,
                    model.head_weight.device)
    # Summing over ranks puts the table together: each fills its own questions.
    logps = torch.zeros(len(prompts), 2, options, dtype=torch.float64, device=cache.lengths.device)
    for at in range(distributed.rank(), len(prompts), distributed.world_size()):
        choices = prompts[at].row["choices"]
        scores = score_options(model, tokenizer, cache, prompts[at].ids, choices)
        for form, key in enumerate(("letter", "text")):
            logps[at, form, : len(choices)] = torch.tensor(list(scores[key].values()))
    rows = []
    for prompt, (letter, text) in zip(prompts, distributed.all_reduce_sum(logps).tolist(), strict=True):
        choices, answer = prompt.row["choices"], prompt.row["answer"]
        by_letter, by_text = (dict(zip(choices, part, strict=False)) for part in (letter, text))
        picked = best(by_letter)
        rows.append(make_row(prompt, 0, Result([], True), tokenizer, cfg) | {
            "text": picked, "extracted": picked, "correct": picked == answer,
            "correct_strict": picked == answer, "logp_letter": by_letter, "logp_text": by_text,
            "correct_text": best(by_text) == answer,
            "correct_text_norm": best(by_text, choices) == answer,
        })
    if distributed.rank() == 0:
        write_jsonl(path, rows)
    return rows


def main(cfg: EvalConfig) -> None:
    started = time.time()
    device = distributed.setup(cfg.device)
    output_dir = Path(cfg.output_dir)
    if distributed.rank() == 0:
        claim_output_dir(output_dir, "eval", cfg)
    distributed.barrier()

    model, tokenizer = load_for_generation(cfg, device)
    prompts = read_prompts(cfg.eval_file, [cfg.prompt_style], tokenizer, cfg.limit)
    for prompt in prompts:  # left out, it would change what the accuracy is about
        if not fits(prompt, model, cfg.max_new_tokens):
            raise InputError(
                f"{prompt.file}: {prompt.row['id']!r} has {len(prompt.ids)} prompt tokens, with "
                f"--max_new_tokens {cfg.max_new_tokens} more than the "
                f"{model.config.max_position_embeddings} positions of the model; lower it")
    answer = choose_all if cfg.scoring == "options" else answer_all
    rows = answer(model, tokenizer, prompts, output_dir / "generations.jsonl", cfg)

    files, counts = {}, []
    for file in cfg.eval_file:
        ids = {p.key(s) for p in prompts if p.file == file for s in range(cfg.num_samples)}
        own = [row for row in rows
               if (row["dataset"], row["id"], row["prompt_style"], row["sample"]) in ids]
        name = dataset_name(file)
        files[file] = {"dataset": name, **summarise(own),
                       "in_domain": name in cfg.in_domain if cfg.in_domain else None}
        for key in ("text", "text_norm") if cfg.scoring == "options" else ():
            files[file][f"accuracy_{key}"] = sum(r[f"correct_{key}"] for r in own) / len(own)
        counts.append(Counts(file))
        counts[-1].use(files[file]["n"])
    results = {
        "model": cfg.model_name_or_path, "prompt_style": cfg.prompt_style,
        "scoring": cfg.scoring, "temperature": cfg.temperature, "files": files,
        "in_domain": pool([f for f in files.values() if f["in_domain"]]),
        "out_of_domain": pool([f for f in files.values() if f["in_domain"] is False]),
    }
    if distributed.rank() == 0:
        with atomic_write(output_dir / "results.json") as handle:
            json.dump(results, handle, indent=2)
            handle.write("\n")
        print(show(results))
        write_run(output_dir, "eval", cfg, counts, started)
        print(f"{output_dir}: results.json, generations.jsonl, run.json")
    distributed.shutdown()


def show(results: dict) -> str:
    """results.json as a table."""
    extra = sorted({key for file in results["files"].values() for key in file
                    if "@" in key or key.startswith("accuracy_text")})
    header = ["data", "n", "accuracy", "95 % interval", "strict", "unparsed", "finished", "tokens"]
    lines = []
    for file in results["files"].values():
        domain = {True: " (in)", False: " (out)", None: ""}[file["in_domain"]]
        lines.append([f"{file['dataset']}{domain}", *_numbers(file), file["unparsed"],
                      f"{file['finish_rate']:.1%}", f"{file['mean_tokens']:.1f}",
                      *(f"{file[key]:.1%}" if key in file else "" for key in extra)])
    for key in ("in_domain", "out_of_domain"):
        if results[key]:
            blank = [""] * (3 + len(extra))
            lines.append([key.replace("_", " "), *_numbers(results[key]), *blank])
    return table([*header, *extra], lines)


def _numbers(part: dict) -> list[str]:
    low, high = part["interval"]
    return [f"{part['n']:,}", f"{part['accuracy']:.1%}", f"{low:.1%} - {high:.1%}",
            f"{part['accuracy_strict']:.1%}"]


if __name__ == "__main__":
    run(EvalConfig, "eval", main)
