"""`srit show`: every token of a row, and what of it is trained."""

import re
import sys

import pytest
from templates import family_tokenizer
from tiny import demo, pair, question, tiny_tokenizer, write_rows

from srit.commands import show
from srit.commands.cli import main
from srit.commands.config import ShowConfig
from srit.data.batches import collate_examples, collate_pairs
from srit.data.examples import read_pairs, read_sft
from srit.launch import parse
from srit.runtime.files import InputError
from srit.text.prompts import render_conversation
from srit.text.tokenizer import load_tokenizer

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"},
        {"role": "user", "content": "x"}, {"role": "assistant", "content": "<b>\x1b[31m"}]


@pytest.fixture
def files(tmp_path):
    """Demonstrations (right, wrong, partly forced), a conversation, a pair, a question."""
    tiny_tokenizer(tmp_path)
    forced = {**demo(2, 1, 1), "completion_forced": [[13, 15]]}  # "= " of "He has 1 + 1 = 2 apples"
    write_rows(tmp_path / "demos.jsonl", [demo(0, 3, 4), {**demo(1, 2, 2), "answer": "9"}, forced])
    write_rows(tmp_path / "talk.jsonl", [{"messages": TALK}])
    write_rows(tmp_path / "pairs.jsonl", [pair(0, 1, 2)])
    write_rows(tmp_path / "questions.jsonl", [question(0, 1, 2)])
    return tmp_path


def run(monkeypatch, capsys, *words) -> str:
    monkeypatch.setattr("sys.argv", ["srit", "show", *map(str, words)])
    main()
    return capsys.readouterr().out


def lines(out: str) -> list[tuple[int, str]]:
    """(id, state) of every token."""
    found = re.findall(r"^ +\d+ +(\d+) (prompt|trained|not trained|forced|turn end) +['\"]", out, re.M)
    return [(int(index), state) for index, state in found]


def test_a_line_per_token_says_what_is_trained(files, monkeypatch, capsys):
    out = run(monkeypatch, capsys, files / "demos.jsonl", "--model_name_or_path", files)
    tokenizer = load_tokenizer(files)
    examples, counts = read_sft([str(files / "demos.jsonl")], tokenizer, 1024)
    tokens = lines(out)
    assert [i for i, _ in tokens] == [i for e in examples for i in e.tokens.ids]
    trained = [i for i, state in tokens if state in ("trained", "turn end")]
    assert trained == collate_examples(examples).targets.tolist()
    assert tokenizer.decode([i for i, state in tokens if state == "forced"]) == "= "
    assert [i for i, state in tokens if state == "turn end"] == [tokenizer.turn_end_id] * 2
    assert "demos.jsonl:2 q1: dropped, answer differs from the ground truth" in out
    assert "cot: 104 tokens, 20 trained, 0 forced; ends with '<|im_end|>'" in out
    assert f"{str(counts).split(':')[1].split(';')[0]}\n" in out


def test_pairs_show_both_sides_and_questions_their_prompt(files, monkeypatch, capsys):
    out = run(monkeypatch, capsys, files / "pairs.jsonl", files / "questions.jsonl",
              "--model_name_or_path", files, "--prompt_style", "direct", "cot")
    pairs, _ = read_pairs([str(files / "pairs.jsonl")], load_tokenizer(files), 1024)
    sides, prompts = out.split("questions.jsonl:1")
    trained = [i for i, state in lines(sides) if state in ("trained", "turn end")]
    assert trained == collate_pairs(pairs).targets.tolist()
    assert "chosen: " in sides and "rejected: " in sides
    assert {state for _, state in lines(prompts)} == {"prompt"}
    assert "direct: 7" in prompts and "cot: 8" in prompts


def test_what_stands_between_turns_is_not_trained(files, monkeypatch, capsys):
    states = [state for _, state in lines(run(
        monkeypatch, capsys, files / "talk.jsonl", "--model_name_or_path", files))]
    runs = [state for at, state in enumerate(states) if at == 0 or states[at - 1] != state]
    assert runs == ["prompt", "trained", "turn end", "not trained", "trained", "turn end"]


def test_it_says_when_eos_is_not_trained(tmp_path):
    for name, said in (("chatml-other-eos", True), ("chatml", False)):
        tokenizer = family_tokenizer(tmp_path / name, name)
        (row,) = render_conversation(tokenizer, TALK)
        _, notes = show.label_tokens(tokenizer, row, row)
        assert ("EOS '</s>' is not trained" in notes) == said and "ends with '<|im_end|>'" in notes


def test_a_terminal_gets_colours_and_nothing_else_that_steers_it(files, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    out = run(monkeypatch, capsys, files / "talk.jsonl", "--model_name_or_path", files)
    assert "\033[7;32m<|im_end|>\033[0m" in out and not lines(out)
    plain = re.sub(r"\033\[(0|2|32|2;3|33|7;32)m", "", out)
    assert "\033" not in plain and "<b>\\x1b[31m<|im_end|>" in plain


def test_the_page_escapes_what_rows_say(files, monkeypatch, capsys):
    page = files / "page.html"
    run(monkeypatch, capsys, files / "talk.jsonl", "--model_name_or_path", files, "--output", page)
    text = page.read_text()
    assert "<b>" not in text and text.count('class="turn-end"') == 3  # with the legend's
    assert f'title="{load_tokenizer(files).turn_end_id}, turn end">&lt;|im_end|&gt;' in text


def test_settings_come_from_a_recipe(files, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: M\noutput_dir: o\ndata: {demos: d}\nsystem_prompt: S\n"
                      "sft: {max_length: 77, prompt_style: [direct]}\n")
    cfg = parse(ShowConfig, "show", ["a.jsonl", "--config", str(recipe), "--limit", "0"])
    assert (cfg.file, cfg.model_name_or_path, cfg.system_prompt) == (["a.jsonl"], "M", "S")
    assert (cfg.max_length, cfg.prompt_style, cfg.limit) == (77, ["direct"], 0)


def test_a_malformed_row_is_named(files, monkeypatch):
    write_rows(files / "bad.jsonl", [{"prompt": "a"}])
    with pytest.raises(InputError, match=r"bad\.jsonl:1: the row has no field 'completion'"):
        show.main(ShowConfig([str(files / "bad.jsonl")], str(files)))
