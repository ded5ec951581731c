"""One recipe's prompts are the same ids in SFT, sampling, pairs, DPO and evaluation."""

import json
import re
from pathlib import Path

import pytest
from templates import QWEN3, write_tokenizer
from tiny import demo, write_rows

from srit.data.examples import read_pairs, read_sft
from srit.generation.rollouts import read_prompts
from srit.grading.pairs import build_pairs
from srit.launch import parse
from srit.recipe import KINDS
from srit.runtime.files import InputError
from srit.text.prompts import question_messages
from srit.text.tokenizer import load_tokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "prompts.md"

RECIPE = """\
model_name_or_path: M
output_dir: out
data: {demos: demos.jsonl, eval: demos.jsonl}
instruction: {math: "Solve it. Put the answer in \\\\boxed{}."}
prompt_template: {math: "{question}\\n{instruction}{cot_suffix}", choice: "{question} {choices}"}
cot_suffix: " Think first: -> 1."
system_prompt: You are brief.
chat_template_kwargs: {enable_thinking: false}
"""
PROMPT = ("<|im_start|>system\nYou are brief.<|im_end|>\n<|im_start|>user\n{}\nSolve it. Put the "
          "answer in \\boxed{{}}. Think first: -> 1.<|im_end|>\n"
          "<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.fixture
def cfgs(tmp_path):
    """The settings of every stage, as its command line gets them."""
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return {kind: parse(cls, kind, ["--config", str(file)]) for kind, cls in KINDS.items()}


def test_all_stages_see_one_prompt(cfgs, tmp_path):
    row = demo(0, 3, 4)
    file = str(write_rows(tmp_path / "demos.jsonl", [row]))
    write_tokenizer(tmp_path, QWEN3)
    tokenizers = {kind: load_tokenizer(tmp_path, template_kwargs=cfg.chat_template_kwargs)
                  for kind, cfg in cfgs.items() if kind != "pair"}
    (example,), _ = read_sft([file], tokenizers["sft"], 400, cfgs["sft"])
    sampled, asked = (read_prompts([file], ["cot"], tokenizers[kind], None, cfg=cfgs[kind])[0]
                      for kind in ("sample", "eval"))
    answers = [{**row, "sample": i, "prompt_style": "cot", "text": text, "finished": True,
                "correct": text == "7", "extracted": text} for i, text in enumerate("78")]
    rows, _ = build_pairs(answers, [], "correctness", cfg=cfgs["pair"])
    (pair,), _ = read_pairs([str(write_rows(tmp_path / "pairs.jsonl", rows))], tokenizers["dpo"], 400)
    prompts = [r.ids[: r.mask.index(True)] for r in (example.tokens, pair.chosen, pair.rejected)]
    assert [*prompts, list(sampled.ids), list(asked.ids)] == 5 * [prompts[0]]
    assert sampled.text == PROMPT.format(row["question"])


def test_the_pages_settings_make_its_prompt(tmp_path):
    blocks = re.search(r"```yaml\n(.*?)```\n\n```text\n(.*?)```", PAGE.read_text(), re.S)
    settings, prompt = blocks.groups()
    file = tmp_path / "recipe.yaml"
    file.write_text(settings + "model_name_or_path: M\noutput_dir: out\ndata: {demos: d, eval: d}\n")
    for kind in ("sft", "sample", "pair", "eval"):
        cfg = parse(KINDS[kind], kind, ["--config", str(file)])
        row = {"id": "1", "task": "math", "question": "What is 3 + 4?", "answer": "7"}
        system, user = question_messages(row, "cot", cfg)
        said = f"system: {system['content']}\nuser:   {user['content']}\n"
        assert said == prompt.replace("\n        ", "\n")


def test_flags_say_the_same_as_the_recipe(cfgs):
    for kind, cfg in cfgs.items():
        words = ["--train_file", "f"] if kind in ("sft", "sample", "dpo") else ["--eval_file", "f"]
        words = ["--samples_file", "f", "--output_dir", "o"] if kind == "pair" else [
            "--model_name_or_path", "M", "--output_dir", "o", *words,
            "--chat_template_kwargs", "enable_thinking", "False"]
        if kind != "dpo":  # its rows hold their prompts
            templates = [word for pair in cfg.prompt_template.items() for word in pair]
            words += ["--instruction", "math", "Solve it. Put the answer in \\boxed{}.",
                      "--prompt_template", *templates,
                      "--cot_suffix", " Think first: -> 1.", "--system_prompt", "You are brief."]
        given = parse(KINDS[kind], kind, words)
        for name in ("instruction", "prompt_template", "cot_suffix", "system_prompt",
                     "chat_template_kwargs"):
            assert vars(given).get(name) == vars(cfg).get(name)
    assert json.dumps(cfgs["sft"].chat_template_kwargs) == '{"enable_thinking": false}'


def test_what_is_no_mapping_of_names_to_plain_values_is_refused(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(RECIPE.replace("false}", "[false]}"))
    with pytest.raises(InputError, match="chat_template_kwargs: expected a mapping of names to plain"):
        parse(KINDS["sft"], "sft", ["--config", str(file)])
    file.write_text(re.sub("instruction: {.*}", "instruction: Solve it.", RECIPE))
    with pytest.raises(InputError, match="instruction: expected a mapping of names"):
        parse(KINDS["sft"], "sft", ["--config", str(file)])
