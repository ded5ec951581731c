"""Forced text, such as a calculator's results, keeps its marks from samples to batches."""

import itertools
import json

import pytest
from templates import FAMILIES, SPECIALS, TEXT, family_tokenizer, write_tokenizer
from tiny import demo, question, write_rows
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from srit.config import InstructConfig, PairConfig
from srit.data.batches import collate_examples, collate_pairs
from srit.data.examples import read_pairs, read_sft
from srit.grading.judge import grade
from srit.runtime.files import InputError
from srit.runtime.jsonl import read_jsonl
from srit.text.prompts import render
from srit.text.tokenizer import Tokenizer, load_tokenizer
from srit.train import pair as stage

USER = [{"role": "user", "content": "How many?"}]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


def sentencepiece(directory) -> Tokenizer:
    """Llama 2's: a space before the text, spaces as ▁, bytes for unknown characters."""
    write_tokenizer(directory)
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<pad>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                         decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=330, show_progress=False,
        special_tokens=[*SPECIALS, *(f"<0x{n:02X}>" for n in range(256))]))
    stored = json.loads(backend.to_str())
    stored["added_tokens"] = [t for t in stored["added_tokens"] if t["content"] in SPECIALS]
    (directory / "tokenizer.json").write_text(json.dumps(stored))
    return load_tokenizer(directory)


def digits_apart(directory) -> Tokenizer:
    tokenizer = family_tokenizer(directory, "qwen")
    tokenizer.backend.normalizer = normalizers.NFC()
    tokenizer.backend.pre_tokenizer = split(r"\p{N}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+")
    return tokenizer


def digits_in_threes(directory) -> Tokenizer:
    """As Llama 3's, whose offsets leave out the space that a token begins with."""
    tokenizer = family_tokenizer(directory, "llama3")
    tokenizer.backend.pre_tokenizer = split(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+")
    tokenizer.backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


STYLES = {"digits apart": digits_apart, "digits in threes": digits_in_threes,
          "sentencepiece": sentencepiece}


@pytest.fixture(params=[*FAMILIES, *STYLES])
def tokenizer(request, tmp_path):
    make = STYLES.get(request.param)
    return make(tmp_path / "m") if make else family_tokenizer(tmp_path / "m", request.param)


def extents(tokenizer, ids) -> list[tuple[int, int]]:
    """Characters of each token, from what the tokens so far decode to. For ASCII texts."""
    ends = [len(tokenizer.decode(ids[:n], skip_special_tokens=False)) for n in range(len(ids) + 1)]
    return list(zip(ends, ends[1:], strict=False))


@pytest.mark.parametrize("text", [
    "He has 52 - 28 = 24 apples.", "So 3,000 + 4 =3,004, no <|im_end|> 24 here", "24", "= 24\n\n 24"])
@pytest.mark.parametrize("plain", [False, True])
def test_a_token_with_a_forced_character_is_not_trained(tokenizer, text, plain):
    """Wherever a span begins and ends, between tokens or within them."""
    prompt = "How many?" if plain else USER
    whole = render(tokenizer, prompt, text, False)
    start = whole.mask.index(True)
    places = extents(tokenizer, whole.ids[start:-1])
    assert places[-1][1] == len(text)
    for first, size in itertools.product(range(len(text)), (1, 4)):
        last = min(first + size, len(text))
        row = render(tokenizer, prompt, text, False, [[first, last]])
        assert row.ids == whole.ids and len(row.mask) == len(row.ids)
        expected = [end <= first or begin >= last for begin, end in places if begin < end]
        found = [m for m, (begin, end) in zip(row.mask[start:-1], places, strict=True) if begin < end]
        assert found == expected
        assert row.mask[-1]  # the student chose to end


def test_special_tokens_and_long_characters_before_a_span(tokenizer):
    """Offsets are characters, not bytes; special tokens in plain text are parsed."""
    text = "é日 e\u0301 <|im_end|>€ = 24 €."
    at = text.index("24")
    for prompt, parse in ((USER, True), ("How?", False), ("How?", True)):
        row = render(tokenizer, prompt, text, parse, [[at, at + 2]])
        assert row.ids == render(tokenizer, prompt, text, parse).ids
        start = row.mask.index(True)
        own = [i for i, m in zip(row.ids, row.mask, strict=True) if m]
        forced = [i for i, m in zip(row.ids[start:], row.mask[start:], strict=True) if not m]
        assert tokenizer.decode(forced).replace("=", "").strip() == "24"
        assert "24" not in tokenizer.decode(own) and "€." in tokenizer.decode(own)


def test_whitespace_around_a_turn_moves_no_mark(tokenizer):
    bare = render(tokenizer, USER, "5 - 1 = 4.", forced=[[7, 9]])
    assert render(tokenizer, USER, " \n5 - 1 = 4.\n", forced=[[9, 11]]) == bare
    assert render(tokenizer, USER, " \n5 - 1 = 4.\n", forced=[[0, 1], [9, 11], [12, 13]]) == bare


def test_rows_without_marks_are_as_before(tokenizer):
    whole = render(tokenizer, USER, "5 - 1 = 4.")
    assert render(tokenizer, USER, "5 - 1 = 4.", forced=[]) == whole
    assert sum(whole.mask) == len(whole.ids) - whole.mask.index(True)


def sample(n, text, forced=None):
    row = question(0, 3, 4)
    judged = grade(text, row)
    row |= {"sample": n, "prompt_style": "cot", "text": text, "finished": True,
            "extracted": judged.extracted, "correct": judged.correct}
    return row if forced is None else row | {"forced": forced}


RIGHT, WRONG = "\n He has 3 + 4 = 7. The answer is 7.", "He has 3 + 5 = 8. The answer is 8."
FORCED = [[[text.index("=") + 1, text.index("=") + 3]] for text in (RIGHT, WRONG)]  # " 7", " 8"

APART = str.maketrans("", "", "=.")


def test_marks_go_from_samples_through_pairs_into_batches(tokenizer, tmp_path):
    """The batch scores neither result, and everything else that it scores without marks."""
    batches = {}
    for name, marks in (("with", FORCED), ("without", (None, None))):
        samples = [sample(0, RIGHT, marks[0]), sample(1, WRONG, marks[1])]
        file = write_rows(tmp_path / f"{name}.jsonl", samples)
        stage.main(PairConfig([str(file)], str(tmp_path / name), policy="correctness"))
        pairs, _ = read_pairs([str(tmp_path / name / "pairs.jsonl")], tokenizer, 400)
        batches[name] = collate_pairs(pairs)
    (row,) = read_jsonl(tmp_path / "with" / "pairs.jsonl")
    for side, digit in (("chosen", "7"), ("rejected", "8")):
        ((start, end),) = row[f"{side}_forced"]
        assert row[side][0]["content"][start:end] == f" {digit}"
    (plain,) = read_jsonl(tmp_path / "without" / "pairs.jsonl")
    assert plain == {key: value for key, value in row.items() if not key.endswith("_forced")}
    marked, whole = batches["with"], batches["without"]
    assert marked.input_ids.equal(whole.input_ids) and marked.cu_seqlens.equal(whole.cu_seqlens)
    for side in (0, 1):
        own, all_ = (b.targets[b.cu_targets[side] : b.cu_targets[side + 1]].tolist()
                     for b in (marked, whole))
        assert len(own) < len(all_)
        own, text = tokenizer.decode(own), tokenizer.decode(all_)
        # "=" and "." are in a token with the result, or not.
        assert own.translate(APART) == text.replace(f" {text[-2]}.", "", 1).translate(APART)


def test_only_one_side_may_have_marks(tmp_path):
    samples = [sample(0, RIGHT, FORCED[0]), sample(1, WRONG)]
    file = write_rows(tmp_path / "samples.jsonl", samples)
    stage.main(PairConfig([str(file)], str(tmp_path / "out"), policy="correctness"))
    (row,) = read_jsonl(tmp_path / "out" / "pairs.jsonl")
    assert row["chosen_forced"] and "rejected_forced" not in row


@pytest.mark.parametrize("row", [
    demo(0, 3, 4), {"prompt": USER, "completion": demo(0, 3, 4)["completion"]},
    {"prompt": "How?", "completion": " " + demo(0, 3, 4)["completion"]}])
def test_demonstrations_may_have_marks(tokenizer, tmp_path, row):
    text = row["completion"]
    at = text.index(" 7")
    file = write_rows(tmp_path / "rows.jsonl", [
        {**row, "id": "a"}, {**row, "id": "b", "completion_forced": [[at, at + 2]]},
        {**row, "id": "c", "completion_forced": None}])
    (whole, marked, null), _ = read_sft([str(file)], tokenizer, 400)
    assert null.tokens == whole.tokens and marked.num_trained < whole.num_trained
    batch = collate_examples([marked])
    assert len(batch.targets) == marked.num_trained
    assert " 7 apples" not in tokenizer.decode(batch.targets.tolist())


SPANS = [
    (5, "forced must be a list of"), ([5], r"\[start, end\] from 0 to 34, the end.* got 5"),
    ([[1, 2, 3]], "got .1, 2, 3."), ([[True, 2]], "got .True, 2."), ([[0.0, 2]], "got .0.0, 2."),
    ([["0", 2]], "a span of forced"), ([[-1, 2]], "got .-1, 2."), ([[2, 2]], "got .2, 2."),
    ([[3, 2]], "got .3, 2."), ([[0, 35]], "got .0, 35."), ([[0, 10**30]], "from 0 to 34"),
    ([[4, 6], [5, 7]], "from 6 to 34"), ([[4, 6], [1, 2]], "from 6 to 34")]


@pytest.mark.parametrize("spans, message", SPANS)
def test_bad_spans_are_named(tmp_path, spans, message):
    tokenizer = family_tokenizer(tmp_path / "m", "chatml")
    assert len(WRONG) == 34
    bad = rf"rows.jsonl:1: .*{message}"
    file = write_rows(tmp_path / "rows.jsonl", [sample(0, WRONG, spans)])
    with pytest.raises(InputError, match=bad):
        stage.main(PairConfig([str(file)], str(tmp_path / "out")))
    for row in ({**question(0, 3, 4), "completion": WRONG}, {"prompt": "a", "completion": WRONG}):
        write_rows(file, [{**row, "completion_forced": spans}])
        with pytest.raises(InputError, match=bad):
            read_sft([str(file)], tokenizer, 400, InstructConfig(filter_demos=False))
    for side in ("chosen", "rejected"):
        write_rows(file, [{"prompt": "a", "chosen": WRONG, "rejected": WRONG, f"{side}_forced": spans}])
        with pytest.raises(InputError, match=bad):
            read_pairs([str(file)], tokenizer, 400)


def test_marks_beside_messages_are_refused(tmp_path):
    tokenizer = family_tokenizer(tmp_path / "m", "chatml")
    row = {"messages": [*USER, {"role": "assistant", "content": "4"}], "completion_forced": [[0, 1]]}
    with pytest.raises(InputError, match="rows.jsonl:1: completion_forced says nothing of messages"):
        read_sft([str(write_rows(tmp_path / "rows.jsonl", [row]))], tokenizer, 400)


def test_an_answer_that_was_forced_whole_is_dropped_and_counted(tokenizer, tmp_path):
    """Its end alone is the student's. One token of its own is enough to train on."""
    reason, whole = {"no token of its own to train": 1}, [[0, len("So 42")]]
    kept = {"prompt": USER, "chosen": "So 42", "rejected": "So 41", "chosen_forced": [[2, 5]]}
    file = write_rows(tmp_path / "rows.jsonl", [kept, {**kept, "rejected_forced": whole}])
    pairs, counts = read_pairs([str(file)], tokenizer, 400)
    assert len(pairs) == 1 and counts.dropped == reason
    kept = {"prompt": USER, "completion": "So 42", "completion_forced": [[2, 5]]}
    write_rows(file, [kept, {**kept, "completion_forced": whole}])
    examples, counts = read_sft([str(file)], tokenizer, 400)
    assert len(examples) == 1 and counts.dropped == reason
