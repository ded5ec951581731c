"""A judge of the user's own in every stage that grades."""

import json

import pytest
from tiny import tiny_checkpoint, write_rows

from srit.config import EvalConfig, InstructConfig, PairConfig, SampleConfig
from srit.data.examples import read_sft
from srit.runtime.files import InputError
from srit.runtime.jsonl import read_jsonl
from srit.runtime.run_dir import read_run
from srit.text.tokenizer import load_tokenizer
from srit.train import eval as evaluation
from srit.train import pair, sample

JUDGE = """
def judge(text, row):
    return min(1, len(text.strip()) / row["long"])
"""
ROWS = [{"id": f"q{i}", "task": "length", "question": "Write much.", "answer": "", "long": 40}
        for i in range(4)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_checkpoint(folder / "m", scale=2.0)
    write_rows(folder / "q.jsonl", ROWS)
    (folder / "my_judge.py").write_text(JUDGE)
    return folder


def settings(world, output):
    return {"model_name_or_path": str(world / "m"), "output_dir": str(world / output), "device": "cpu",
            "dtype": "float32", "max_new_tokens": 30, "verifier": f"{world}/my_judge.py:judge"}


def test_sample_pair_and_eval_take_its_scores(world, capsys):
    sample.main(SampleConfig(train_file=[str(world / "q.jsonl")], num_samples=4, temperature=1.5,
                             **settings(world, "sample")))
    rows = read_jsonl(world / "sample/samples.jsonl")
    for row in rows:
        assert row["score"] == min(1, len(row["text"].strip()) / 40)
        assert row["correct"] == (row["score"] == 1)
    ended = write_rows(world / "ended.jsonl", [{**row, "finished": True} for row in rows])
    pair.main(PairConfig([str(ended)], str(world / "pair"), policy="scored",
                         min_margin=0.1, verifier=f"{world}/my_judge.py:judge"))
    for row in read_jsonl(world / "pair/pairs.jsonl"):
        scores = [min(1, len(row[side][0]["content"]) / 40) for side in ("chosen", "rejected")]
        assert scores == [row["chosen_score"], row["rejected_score"]] and scores[0] - scores[1] > 0.099
    evaluation.main(EvalConfig(eval_file=[str(world / "q.jsonl")], **settings(world, "eval")))
    (part,) = json.loads((world / "eval/results.json").read_text())["files"].values()
    scores = [row["score"] for row in read_jsonl(world / "eval/generations.jsonl")]
    assert part["score"] == pytest.approx(sum(scores) / 4) and "score" in capsys.readouterr().out
    for stage in ("sample", "pair", "eval"):
        assert f"{world}/my_judge.py" in read_run(world / stage)["inputs"]


def test_the_filter_of_sft_asks_it(world):
    demos = write_rows(world / "demos.jsonl", [{**ROWS[0], "completion": "x" * 9},
                                               {**ROWS[1], "completion": "x" * 41}])
    tokenizer = load_tokenizer(str(world / "m"))
    cfg = InstructConfig(verifier=f"{world}/my_judge.py:judge")
    examples, counts = read_sft([str(demos)], tokenizer, 400, cfg)
    assert [e.id for e in examples] == ["q1"]
    assert counts.dropped == {"answer differs from the ground truth": 1}
    with pytest.raises(InputError, match="demos.jsonl:1: field 'task' must be one of .*'length'"):
        read_sft([str(demos)], tokenizer, 400)
