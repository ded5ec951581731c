"""Rows that cannot be trained are dropped and counted; the others are not affected."""

import pytest
from templates import family_tokenizer
from tiny import demo, pair, write_rows

from srit.config import InstructConfig
from srit.data.examples import read_pairs, read_sft
from srit.runtime.files import InputError
from srit.runtime.limits import ROW_BYTES

USER = {"role": "user", "content": "a"}


@pytest.fixture
def tokenizer(tmp_path):
    return family_tokenizer(tmp_path / "m", "chatml")


@pytest.mark.parametrize("row, reason", [
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, "empty completion"),
    ({"messages": [USER, {"role": "assistant", "content": ""}, USER,
                   {"role": "assistant", "content": "b"}]}, "empty completion"),
    ({"prompt": [USER], "completion": "<|im_end|>"}, "empty completion"),
    ({"prompt": "a", "completion": None}, "empty completion"),
    ({**demo(1, 1, 2), "question": "x" * ROW_BYTES}, f"longer than {ROW_BYTES:,} bytes"),
    ({**demo(1, 1, 2), "question": "x" * 5000}, "longer than max_length 400"),
])
def test_a_demonstration_that_cannot_be_trained_is_counted(tokenizer, tmp_path, row, reason):
    file = write_rows(tmp_path / "rows.jsonl", [demo(0, 3, 4), row])
    examples, counts = read_sft([str(file)], tokenizer, 400)
    assert len(examples) == 1 and counts.dropped == {reason: 1}


@pytest.mark.parametrize("change, reason", [
    ({"chosen": [{"role": "assistant", "content": "<|im_end|>\n"}]}, "empty completion"),
    ({"rejected": "x" * ROW_BYTES}, f"longer than {ROW_BYTES:,} bytes"),
])
def test_a_pair_that_cannot_be_trained_is_counted(tokenizer, tmp_path, change, reason):
    file = write_rows(tmp_path / "rows.jsonl", [pair(0, 3, 4), {**pair(1, 1, 2), **change}])
    pairs, counts = read_pairs([str(file)], tokenizer, 400)
    assert len(pairs) == 1 and counts.dropped == {reason: 1}


@pytest.mark.parametrize("row", [
    {"messages": [USER, {"role": "assistant", "content": 5}]}, {"messages": [USER]},
    {"prompt": 5, "completion": "a"}, {"prompt": [USER], "completion": 5},
    {**demo(1, 1, 2), "completion": 5}, {**demo(1, 1, 2), "task": "poem"},
    {**demo(1, 1, 2), "task": "choice", "choices": {"A": None}, "answer": "A"}])
def test_a_row_of_other_types_is_named(tokenizer, tmp_path, row):
    file = write_rows(tmp_path / "rows.jsonl", [demo(0, 3, 4), row])
    with pytest.raises(InputError, match=r"rows.jsonl:2: "):
        read_sft([str(file)], tokenizer, 400)


LINE = "He has 3 + 4 = 7 apples. The answer is 7."
FALSE = "He has 3 + 4 = 8, no, 3 + 4 = 7 apples. The answer is 7."
NONE = "He has seven. The answer is 7."


def answered(text):
    """The same answer as a demonstration and as rows of TRL."""
    turn = {"role": "assistant", "content": text}
    return [{**demo(0, 3, 4), "completion": text}, {"prompt": [USER], "completion": [turn]},
            {"prompt": "a = 1 + 1 = 3", "completion": text},
            {"messages": [{**USER, "content": "1 + 1 = 3"}, turn, USER, {**turn, "content": "Yes."}]}]


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("kind", range(4))
def test_rows_with_a_false_equation_are_counted_and_dropped_on_request(tokenizer, tmp_path, kind, drop):
    """Equations of prompts are none of the student's. One false equation is enough."""
    file = write_rows(tmp_path / "rows.jsonl", [answered(t)[kind] for t in (LINE, FALSE, NONE)])
    examples, counts = read_sft([str(file)], tokenizer, 400,
                                InstructConfig(drop_false_equations=drop))
    if drop:
        assert len(examples) == 2 and counts.dropped == {"false equation": 1}
        assert counts.as_dict() | {"equations": 1, "false_equations": 0} == counts.as_dict()
        assert "2 used, 1 false equation; 1 equations; 0 false equations" in str(counts)
    else:
        assert len(examples) == 3 and not counts.dropped
        assert counts.as_dict() | {"equations": 3, "false_equations": 1} == counts.as_dict()
