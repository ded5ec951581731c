"""A finished run directory in milliseconds: invented numbers, real hashes of invented inputs."""

import dataclasses
import json
import random

from tiny import write_rows

from srit.commands.progress import stage_config
from srit.data.inputs import stage_inputs
from srit.grading.statistics import summarize_generations
from srit.recipe import read_recipe, stages
from srit.runtime.files import sha256
from srit.runtime.run_dir import hash_files

NASTY = "<script>alert(1)</script> | pipe\nThe answer is 7."


NAMES = ("eval-base", "sft", "eval-sft", "sample", "pair", "dpo", "eval-dpo")
RECIPE = """\
model_name_or_path: {root}/M
output_dir: {root}
data: {{demos: {root}/demos.jsonl, eval: [{root}/sums.jsonl, {root}/other.jsonl], in_domain: [sums]}}
sft: {{learning_rate: 2e-4}}
sample: {{calculator: {sampled}}}
eval: {{calculator: {calculator}}}
rounds: {rounds}
"""


def fake_run(root, seed=0, names=NAMES, rounds=1, calculator=False):
    """A run directory with invented numbers, made from invented inputs.

    calculator: as in eval; unless False, samples are drawn with it.
    """
    rng = random.Random(seed)
    (root / "M").mkdir(parents=True)
    for name in ("M/model.safetensors", "demos.jsonl", "sums.jsonl", "other.jsonl"):
        (root / name).write_text(name)
    (root / "recipe.yaml").write_text(RECIPE.format(
        root=root, rounds=rounds, calculator=calculator, sampled=bool(calculator)))
    plan = [stage for stage in stages(read_recipe(root / "recipe.yaml")) if stage.name in names]
    for at, stage in enumerate(plan):
        folder = root / stage.name
        folder.mkdir()
        if stage.kind == "eval":
            for way in (False, True) if calculator == "both" else (calculator,):
                end = "_calculator" if way and calculator == "both" else ""
                rows = _generations(rng, 0.2 + 0.1 * at + 0.1 * way, "With it" if way else "It")
                write_rows(folder / f"generations{end}.jsonl", rows)
                files = {f"{name}.jsonl": {
                    **summarize_generations(r for r in rows if r["dataset"] == name),
                    "dataset": name, "in_domain": name == "sums"} for name in ("sums", "other")}
                (folder / f"results{end}.json").write_text(
                    json.dumps({"calculator": way, "files": files}))
        elif stage.kind in ("sft", "dpo"):
            rows = [{"step": s, "loss": 1 / s, "rewards/margins": s / 10, "rewards/chosen": s / 20,
                     "rewards/rejected": -s / 20, "rewards/accuracies": 0.5 + s / 50,
                     "logps/chosen": -60.0 - s, "logps/rejected": -70.0 - 3 * s}
                    for s in range(1, 21)]
            write_rows(folder / "metrics.jsonl", rows)
            (folder / "model.safetensors").write_text(stage.name)
        elif stage.kind == "sample":
            forced = {"forced": [[4, 5]]} if calculator else {}
            write_rows(folder / "samples.jsonl", [{"text": "7"}, {"text": "3+4=7", **forced}])
        else:
            pair = {"chosen": [{"content": "long " * 20}], "rejected": [{"content": "7"}],
                    "chosen_source": "self", "rejected_correct": True, "rejected_style": "direct"}
            forced = {"rejected_forced": [[0, 1]]} if calculator else {}
            write_rows(folder / "pairs.jsonl", [pair | forced, pair])
        cfg = stage_config(stage, "recipe")
        outputs = {p.name: sha256(p) for p in folder.iterdir() if p.name != "metrics.jsonl"}
        run = {"stage": stage.kind, "finished": True, "machine": "a machine",
               "versions": {"python": "3.11", "torch": "2.13"}, "commit": "abc", "seconds": 90,
               "config": dataclasses.asdict(cfg), "date": "2000-02-29",
               "inputs": hash_files(stage_inputs(cfg)),
               "outputs": outputs,
               "counts": {"rows": {"in": 10, "used": 8, "dropped": {"too long": 2}}}}
        (folder / "run.json").write_text(json.dumps(run))
    return root


def _generations(rng, accuracy, begins):
    rows = []
    for dataset in ("sums", "other"):
        for i in range(60):
            right = rng.random() < accuracy
            rows.append({
                "id": f"{dataset}-{i}", "dataset": dataset, "task": "math", "sample": 0,
                "question": f"How many are {i} and {7 - i}?", "answer": "7",
                "text": NASTY if i == 0 else f"{begins} is {'7' if right else '8'}.",
                "extracted": "7" if right else "8", "correct": right,
                "correct_strict": right, "finished": True, "n_tokens": 12})
    return rows


def edit_run(folder, **changes):
    """Change fields of a stage's run.json."""
    file = folder / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
