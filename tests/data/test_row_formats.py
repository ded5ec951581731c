"""Rows of other tools are trained as the rows of TRL that say the same."""

import pytest
from templates import family_tokenizer
from tiny import demo, write_rows

from srit.data.examples import read_pairs, read_sft
from srit.runtime.files import InputError

USER, MORE = ({"role": "user", "content": text} for text in ("2 + 2?", "And 3 + 3?"))
YES, NO, SIX = ({"role": "assistant", "content": text} for text in ("It is 4.", "It is 5.", "6."))
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return family_tokenizer(tmp_path_factory.mktemp("m"), "chatml")


def sft(tokenizer, folder, *rows):
    file = write_rows(folder / "rows.jsonl", [{"id": str(n), **row} for n, row in enumerate(rows)])
    examples, counts = read_sft([str(file)], tokenizer, 400)
    return [(e.tokens.ids, e.tokens.mask) for e in examples], counts


def pairs(tokenizer, folder, *rows):
    found, _ = read_pairs([str(write_rows(folder / "rows.jsonl", rows))], tokenizer, 400)
    return [(pair.chosen, pair.rejected) for pair in found]


@pytest.mark.parametrize("row, same", [
    ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "It is 4."}]},
     {"messages": [USER, YES]}),
    ({"conversations": [{"from": "system", "value": "Be brief."}, USER, YES, MORE, SIX]},
     {"messages": [SYSTEM, USER, YES, MORE, SIX]}),
    ({"system": "Be brief.", "conversations": [{"from": "user", "value": "2 + 2?"},
                                               {"from": "assistant", "value": "It is 4."}]},
     {"messages": [SYSTEM, USER, YES]}),
    ({"instruction": "2 + 2?", "input": "", "output": "It is 4.", "text": "2 + 2? It is 4."},
     {"prompt": [USER], "completion": [YES]}),
    ({"instruction": "Add.", "input": "2, 2", "output": "It is 4.", "system": "Be brief.",
      "history": []},
     {"prompt": [SYSTEM, {"role": "user", "content": "Add.\n\n2, 2"}], "completion": [YES]}),
    ({"text": "2 + 2 = 4"}, {"prompt": "", "completion": "2 + 2 = 4"}),
    ({"prompt": [USER], "completion": [YES], "label": True}, {"prompt": [USER], "completion": [YES]}),
])
def test_rows_of_other_tools_are_trained_as_rows_of_trl(tokenizer, tmp_path, row, same):
    assert sft(tokenizer, tmp_path, row)[0] == sft(tokenizer, tmp_path, same)[0]


def test_all_of_a_plain_text_is_trained_but_its_first_token(tokenizer, tmp_path):
    [(ids, mask)], counts = sft(tokenizer, tmp_path, {"text": "2 + 2 = 5"})
    assert all(mask) and ids == [*tokenizer.encode("2 + 2 = 5"), tokenizer.eos_id]
    assert counts.held["false_equations"] == 1


def test_bad_answers_of_kto_are_dropped_and_counted(tokenizer, tmp_path):
    rows = [{"prompt": "a", "completion": "b", "label": False},
            {"prompt": "a", "completion": "c", "label": True}]
    found, counts = sft(tokenizer, tmp_path, *rows)
    assert len(found) == 1 and counts.dropped == {"label is false": 1}
    with pytest.raises(InputError, match="rows.jsonl:1: field 'label' must be bool, got int"):
        sft(tokenizer, tmp_path, {**rows[0], "label": 0})
    with pytest.raises(InputError, match="rows.jsonl:1: a row of KTO .* sft takes such rows"):
        pairs(tokenizer, tmp_path, *rows)
    assert len(sft(tokenizer, tmp_path, {**demo(0, 3, 4), "label": 3})[0]) == 1  # no row of KTO


@pytest.mark.parametrize("row, message", [
    ({"conversations": "a"}, "field 'conversations' must be list"),
    ({"conversations": ["a"]}, "a turn of 'conversations' must be an object"),
    ({"conversations": [{"from": "human"}]}, "conversations: the row has no field 'value'"),
    ({"conversations": [{"from": "human", "value": "a"}]}, "no assistant turn"),
    ({"instruction": "a", "output": 4}, "field 'output' must be str"),
    ({"instruction": "a", "input": ["b"], "output": "c"}, "field 'input' must be a string"),
    ({"instruction": "a", "output": "c", "history": [["a", "b"]]}, "field 'history' must be empty"),
    ({"text": None}, "field 'text' must be str"),
    ({"input": "a", "output": "b"}, r"no field 'prompt' .*docs/data.md; it has \['id', 'input'"),
    ({"prompt;completion": "a;b"}, r"it has \['id', 'prompt;completion'\]"),
])
def test_a_row_that_is_none_of_these_is_named(tokenizer, tmp_path, row, message):
    with pytest.raises(InputError, match=f"rows.jsonl:1: .*{message}"):
        sft(tokenizer, tmp_path, row)


@pytest.mark.parametrize("row, same", [
    # UltraFeedback: the prompt once more, as a text
    ({"prompt": "2 + 2?", "chosen": [USER, YES], "rejected": [USER, NO]},
     {"prompt": [USER], "chosen": [YES], "rejected": [NO]}),
    ({"prompt": None, "chosen": [USER, YES, MORE, SIX], "rejected": [USER, YES, MORE, NO]},
     {"prompt": [USER, YES, MORE], "chosen": [SIX], "rejected": [NO]}),
    # HH-RLHF; the space before the first word that differs is that word's, as in TRL
    ({"chosen": "Q: 2 + 2? A: It is 4.", "rejected": "Q: 2 + 2? A: It is 5."},
     {"prompt": "Q: 2 + 2? A: It is", "chosen": " 4.", "rejected": " 5."}),
    ({"chosen": "yes", "rejected": "no"}, {"prompt": "", "chosen": "yes", "rejected": "no"}),
    ({"chosen": "Yes, 4", "rejected": "Yes"}, {"prompt": "Ye", "chosen": "s, 4", "rejected": "s"}),
    ({"prompt": "2 + 2?", "chosen": [YES], "rejected": [NO]},
     {"prompt": "2 + 2?", "chosen": "It is 4.", "rejected": "It is 5."}),
])
def test_a_prompt_that_both_answers_begin_with_is_found_as_in_trl(tokenizer, tmp_path, row, same):
    assert pairs(tokenizer, tmp_path, row) == pairs(tokenizer, tmp_path, same)


def test_a_pair_without_a_difference_is_dropped(tokenizer, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"chosen": [USER, YES], "rejected": [USER, YES]},
        {"chosen": "a b", "rejected": "a b"}, {"chosen": [], "rejected": []}])
    found, counts = read_pairs([str(file)], tokenizer, 400)
    assert len(found) == 1
    assert counts.dropped == {"chosen and rejected are the same": 2, "empty completion": 1}
    with pytest.raises(InputError, match="rows.jsonl:1: the row has no field 'prompt'"):
        pairs(tokenizer, tmp_path, {"chosen": [USER, YES], "rejected": "no"})
