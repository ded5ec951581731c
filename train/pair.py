"""Phase 2, pair: graded answers to preference pairs. No model, no GPU.

In:   samples.jsonl of train/sample.py, and the teacher's demonstrations
Out:  pairs.jsonl (prompt, chosen, rejected as message lists: TRL reads them too), run.json

    python train/pair.py --samples_file out/sample/samples.jsonl --demos_file demos.jsonl \\
        --output_dir out/pair --policy paper
"""

from srit import launch
from srit.config import PairConfig
from srit.data.inputs import stage_inputs
from srit.data.questions import check_question, read_demos
from srit.grading.judge import load_judge
from srit.grading.pairs import build_pairs, summarize_pairs
from srit.runtime.files import InputError
from srit.runtime.jsonl import check_spans, read_lines, require, write_jsonl
from srit.runtime.limits import check
from srit.runtime.run_dir import Run

FIELDS = {"sample": int, "prompt_style": str, "text": str, "finished": bool, "correct": bool,
          "extracted": str | None}  # beside those of a question


def main(cfg: PairConfig) -> None:
    run = Run("pair", cfg, stage_inputs)
    run.end_if_finished()
    samples, judge = [], load_judge(cfg)
    for file in cfg.samples_file:
        for where, row in read_lines(file):
            check_question(row, where, judge)
            for key, kind in FIELDS.items():
                require(row, key, kind, where)
            if row.get("forced") is not None:
                check_spans(row["forced"], row["text"], where, "forced")
            score = row.get("score", 0)
            check(isinstance(score, int | float) and 0 <= score <= 1, where, "score", score,
                  "a number from 0 to 1")
            samples.append(row)
    demos = [row for file in cfg.demos_file for row in read_demos(file, judge)]
    pairs, run.counts = build_pairs(samples, demos, cfg.policy, cfg.pair_prompt, cfg.selection,
                                    cfg.max_pairs_per_question, cfg.seed, cfg, cfg.min_margin)
    run.say(*run.counts)
    if not pairs:
        raise InputError(f"no question gave a pair ({run.counts[1]}): sample more (--num_samples), "
                         "raise --temperature, or use harder questions")
    summary = summarize_pairs(pairs)
    run.say(", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in summary.items()))
    run.claim()
    write_jsonl(run.output_dir / "pairs.jsonl", pairs)
    run.finish(["pairs.jsonl"], pairs=summary)


if __name__ == "__main__":
    launch.run(PairConfig, "pair", main)
