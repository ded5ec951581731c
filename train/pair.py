"""Phase 2, pair: graded answers to preference pairs. No model, no GPU.

In:   samples.jsonl of train/sample.py, and the teacher's demonstrations
Out:  pairs.jsonl (prompt, chosen, rejected as message lists: TRL reads them too), run.json

    python train/pair.py --samples_file out/sample/samples.jsonl --demos_file demos.jsonl \\
        --output_dir out/pair --policy paper
"""

import time
from pathlib import Path

from srit.config import PairConfig
from srit.data.questions import read_demos
from srit.grading.pairs import build_pairs, summarize_pairs
from srit.launch import run
from srit.runtime.files import InputError
from srit.runtime.jsonl import read_lines, require, write_jsonl
from srit.runtime.run_dir import claim_output_dir, write_run

FIELDS = {"id": str, "task": str, "question": str, "answer": str, "sample": int,
          "prompt_style": str, "text": str, "finished": bool, "correct": bool}


def main(cfg: PairConfig) -> None:
    started = time.time()
    claim_output_dir(cfg.output_dir, "pair", cfg)
    samples = []
    for file in cfg.samples_file:
        for where, row in read_lines(file):
            for key, kind in FIELDS.items():
                require(row, key, kind, where)
            samples.append(row)
    demos = [row for file in cfg.demos_file for row in read_demos(file)]
    pairs, counts = build_pairs(samples, demos, cfg.policy, cfg.pair_prompt, cfg.selection,
                                cfg.max_pairs_per_question, cfg.seed)
    print(*counts, sep="\n")
    if not pairs:
        raise InputError(f"no question gave a pair ({counts[1]}): sample more (--num_samples), "
                         "raise --temperature, or use harder questions")
    summary = summarize_pairs(pairs)
    print(", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in summary.items()))
    write_jsonl(Path(cfg.output_dir) / "pairs.jsonl", pairs)
    write_run(cfg.output_dir, "pair", cfg, counts, started, pairs=summary)


if __name__ == "__main__":
    run(PairConfig, "pair", main)
