"""Accuracy on questions with ground truth: the number by which the method is judged.

scoring generate  the model writes its answer (greedy by default), and the last answer in the text is
                  compared with the truth; with num_samples > 1 also pass@k and maj@k.
scoring options   multiple choice only: the likeliest option, by its letter (`accuracy`) and by its text
                  (`accuracy_text`; `accuracy_text_norm` divides by its number of characters).
Every accuracy comes with the number of questions and a 95 % Wilson interval. With --calculator both
the model answers twice, and each way has its own files and table.

In:   question files; the data sets named by in_domain are pooled apart from the others
Out:  results.json, generations.jsonl (one graded row per question and sample), run.json; with
      --calculator both also results_calculator.json and generations_calculator.jsonl

    python train/eval.py --model_name_or_path M --eval_file a.jsonl b.jsonl --output_dir out/eval
    torchrun --nproc_per_node 8 train/eval.py --config runs/smollm2_math.yaml
"""

import json
from dataclasses import replace

from srit import launch
from srit.config import EvalConfig
from srit.data.inputs import stage_inputs
from srit.data.questions import dataset_name
from srit.generation.loglikelihood import choose_options
from srit.generation.rollouts import (
    Prompt,
    check_fit,
    generate_rollouts,
    load_for_generation,
    read_prompts,
)
from srit.grading.statistics import pool, summarize_generations
from srit.runtime import distributed
from srit.runtime.files import atomic_write
from srit.runtime.jsonl import Counts
from srit.runtime.run_dir import Run
from srit.runtime.table import table


def main(cfg: EvalConfig) -> None:
    run = Run("eval", cfg, stage_inputs)
    run.end_if_finished()
    model, tokenizer = load_for_generation(cfg, run.device, run.date)
    prompts = read_prompts(cfg.eval_file, [cfg.prompt_style], tokenizer, cfg.limit, cfg=cfg)
    check_fit(prompts, model, cfg.max_new_tokens)
    run.claim()
    for file in cfg.eval_file:
        run.counts.append(Counts(file))
        run.counts[-1].use(sum(prompt.file == file for prompt in prompts))
    run.say(*run.counts)
    both, written = cfg.calculator == "both", []
    for calculator in (False, True) if both else (cfg.calculator,):
        end = "_calculator" if both and calculator else ""
        written += [f"results{end}.json", f"generations{end}.jsonl"]
        settings = replace(cfg, calculator=calculator)
        answer = choose_options if cfg.scoring == "options" else generate_rollouts
        rows = answer(model, tokenizer, prompts, run.output_dir / written[-1], settings)
        results = summarize(settings, prompts, rows)
        if distributed.rank() == 0:
            with atomic_write(run.output_dir / written[-2]) as handle:
                json.dump(results, handle, indent=2)
                handle.write("\n")
        run.say(*["with the calculator:"] * calculator, results_table(results))
    run.finish(written)


def summarize(cfg: EvalConfig, prompts: list[Prompt], rows: list[dict]) -> dict:
    """What results.json holds: the accuracy of every file, and of those in and out of the domain."""
    files = {}
    for file in cfg.eval_file:
        asked = {(p.dataset, p.row["id"]) for p in prompts if p.file == file}
        own = [row for row in rows if (row["dataset"], row["id"]) in asked]
        name = dataset_name(file)
        files[file] = {"dataset": name, **summarize_generations(own),
                       "in_domain": name in cfg.in_domain if cfg.in_domain else None}
        for key in ("text", "text_norm") if cfg.scoring == "options" else ():
            files[file][f"accuracy_{key}"] = sum(r[f"correct_{key}"] for r in own) / len(own)
    return {
        "model": cfg.model_name_or_path, "prompt_style": cfg.prompt_style, "scoring": cfg.scoring,
        "temperature": cfg.temperature, "quantization": cfg.quantization,
        "calculator": cfg.calculator, "files": files,
        "in_domain": pool([f for f in files.values() if f["in_domain"]]),
        "out_of_domain": pool([f for f in files.values() if f["in_domain"] is False]),
    }


def results_table(results: dict) -> str:
    extra = sorted({key for file in results["files"].values() for key in file
                    if "@" in key or key == "score" or key.startswith("accuracy_text")})
    header = ["data", "n", "accuracy", "95 % interval", "strict", "unparsed", "finished", "tokens"]
    lines = []
    for file in results["files"].values():
        domain = {True: " (in)", False: " (out)", None: ""}[file["in_domain"]]
        lines.append([f"{file['dataset']}{domain}", *_accuracy(file), file["unparsed"],
                      f"{file['finish_rate']:.1%}", f"{file['mean_tokens']:.1f}",
                      *(f"{file[key]:.1%}" if key in file else "" for key in extra)])
    for key in ("in_domain", "out_of_domain"):
        if results[key]:
            lines.append([key.replace("_", " "), *_accuracy(results[key]), *[""] * (3 + len(extra))])
    return table([*header, *extra], lines)


def _accuracy(part: dict) -> list[str]:
    low, high = part["interval"]
    return [f"{part['n']:,}", f"{part['accuracy']:.1%}", f"{low:.1%} - {high:.1%}",
            f"{part['accuracy_strict']:.1%}"]


if __name__ == "__main__":
    launch.run(EvalConfig, "eval", main)
