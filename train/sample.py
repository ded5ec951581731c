"""Phase 2, first half: the instructed student answers the training questions, with and without CoT.

    y ~ π_inst(· | i, q)  and  y_cot ~ π_inst(· | i, q, "Let's think step by step")

(arXiv 2405.00402, §2.2). Every answer is graded against the ground truth; train/pair.py builds
preference pairs from them. A completion depends only on the model, the sampling settings and (seed, id,
sample, style), whatever the batch size. Running the command again resumes a killed run.

In:   questions (demonstration files work too)
Out:  samples.jsonl, one graded row per question, style and sample; run.json

    python train/sample.py --model_name_or_path out/sft --train_file q.jsonl --output_dir out/sample
    torchrun --nproc_per_node 8 train/sample.py --config runs/smollm2_math.yaml
"""

from pathlib import Path

from srit import launch
from srit.config import SampleConfig
from srit.data.inputs import stage_inputs
from srit.generation.rollouts import drop_too_long, generate_rollouts, load_for_generation, read_prompts
from srit.grading.statistics import summarize_generations
from srit.runtime.run_dir import Run
from srit.runtime.table import table


def main(cfg: SampleConfig) -> None:
    run = Run("sample", cfg, stage_inputs)
    run.end_if_finished()
    model, tokenizer = load_for_generation(cfg, run.device, run.date)
    prompts = read_prompts(cfg.train_file, cfg.prompt_style, tokenizer, cfg.limit, one_id_space=True,
                           cfg=cfg)
    prompts, counts = drop_too_long(prompts, model, cfg.max_new_tokens)
    run.counts.append(counts)
    run.say(f"{counts}, {cfg.num_samples} samples each")
    run.claim()
    rows = generate_rollouts(model, tokenizer, prompts, Path(cfg.output_dir) / "samples.jsonl", cfg)

    styles = {style: summarize_generations(row for row in rows if row["prompt_style"] == style)
              for style in cfg.prompt_style}
    run.say(table(["style", "questions", "samples", "correct", "finished", "tokens", "unparsed"],
                  [[style, s["n"], s["n"] * cfg.num_samples, f"{s['accuracy']:.1%}",
                    f"{s['finish_rate']:.1%}", f"{s['mean_tokens']:.1f}", s["unparsed"]]
                   for style, s in styles.items()]))
    run.finish(["samples.jsonl"], styles=styles)


if __name__ == "__main__":
    launch.run(SampleConfig, "sample", main)
