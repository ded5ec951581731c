"""Special ids, chat templates and files of the tokenizer; transformers is the reference."""

import json
import os
import time

import pytest
from templates import CHATML, FAMILIES, LLAMA3, family_tokenizer, write_tokenizer

from srit.runtime.files import InputError
from srit.text.tokenizer import DEFAULT_TEMPLATE, load_tokenizer

TALK = [{"role": "user", "content": " Tom has <3 apples> & 4 more? "},
        {"role": "assistant", "content": "He has 7.\n"},
        {"role": "user", "content": "naïve 😀"}]


def token(tokenizer, index: int) -> str:
    return tokenizer.backend.id_to_token(index)


@pytest.fixture(scope="module")
def auto():
    return pytest.importorskip("transformers").AutoTokenizer


@pytest.mark.parametrize("name", FAMILIES)
def test_text_and_ids_are_those_of_transformers(tmp_path, auto, name):
    """For the original checkpoint and for the one that `save` writes."""
    ours = family_tokenizer(tmp_path / "in", name)
    ours.save(tmp_path / "out")
    theirs = [auto.from_pretrained(tmp_path / "out")]
    if FAMILIES[name].template is not None:
        theirs.append(auto.from_pretrained(tmp_path / "in"))
    for messages in (TALK[:1], TALK[:2], TALK):
        for prompt in (False, True):
            text = ours.apply_chat_template(messages, prompt)
            for other in theirs:
                assert other.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt) == text
                assert other.encode(text, add_special_tokens=False) == ours.encode(text)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_template_determines_the_end_of_turn(tmp_path, name):
    tokenizer = family_tokenizer(tmp_path, name)
    assert token(tokenizer, tokenizer.turn_end_id) == FAMILIES[name].turn_end
    assert tokenizer.stop_ids == {tokenizer.eos_id, tokenizer.turn_end_id}


def test_every_eos_of_the_checkpoint_stops_generation(tmp_path, auto):
    write_tokenizer(tmp_path, LLAMA3, "</s>")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 8, "model_type": "llama"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.stop_ids == {2, 5, 8, 9} and token(tokenizer, 5) == "<|eot_id|>"
    tokenizer.save(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": [2, 5, 8, 9], "pad_token_id": 2}
    assert load_tokenizer(tmp_path / "out").stop_ids == tokenizer.stop_ids


@pytest.mark.parametrize("settings, expected", [
    ({}, False), ({"post_bos": True}, True), ({"add_bos_token": True}, False),
    ({"post_bos": True, "add_bos_token": False}, True), ({"bos_token": None}, False)])
def test_bos_is_added_as_in_transformers(tmp_path, auto, settings, expected):
    """The post-processor decides. `add_bos_token` is not read, but written correctly."""
    write_tokenizer(tmp_path / "in", **settings)
    tokenizer = load_tokenizer(tmp_path / "in")
    assert tokenizer.adds_bos is expected
    assert tokenizer.encode("Tom")[:1] != [tokenizer.bos_id]
    tokenizer.save(tmp_path / "out")
    for directory in ("in", "out"):
        theirs = auto.from_pretrained(tmp_path / directory)
        assert (theirs.encode("Tom")[0] == theirs.convert_tokens_to_ids("<s>")) is expected
    assert load_tokenizer(tmp_path / "out").adds_bos is expected
    assert load_tokenizer(tmp_path / "out").settings["add_bos_token"] is expected


def test_the_default_template_starts_with_bos_if_plain_text_does(tmp_path):
    for post_bos in (False, True):
        tokenizer = family_tokenizer(tmp_path / str(post_bos), "none", post_bos=post_bos)
        assert tokenizer.apply_chat_template(TALK[1:2] + TALK[:1], True) == (
            ("<s>" if post_bos else "") + "### Response:\nHe has 7.\n</s>\n\n"
            "### Instruction:\n Tom has <3 apples> & 4 more? \n\n### Response:\n")


def test_special_tokens_in_a_text_are_parsed(tmp_path):
    tokenizer = family_tokenizer(tmp_path, "chatml")
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_id]
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b")) == "ab"
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b"), False) == "a<|im_end|>b"


def test_truncation_and_padding_in_tokenizer_json_are_switched_off(tmp_path):
    write_tokenizer(tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst",
                            "stride": 0}
    stored["padding"] = {"strategy": {"Fixed": 8}, "direction": "Left", "pad_to_multiple_of": None,
                         "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("") == [] and tokenizer.decode(tokenizer.encode("x" * 9)) == "x" * 9


def test_the_chat_template_comes_from_its_file_or_is_the_default_one(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHATML}]
    assert load_tokenizer(write_tokenizer(tmp_path / "a", named)).chat_template == CHATML
    (tmp_path / "a" / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path / "a").chat_template == "file"
    write_tokenizer(tmp_path / "b", named[:1])
    with pytest.raises(InputError, match="tool_use.*'default'"):
        load_tokenizer(tmp_path / "b")


def test_special_tokens_come_from_any_of_three_files(tmp_path):
    as_dict = {"content": "<|im_end|>", "lstrip": False, "__type": "AddedToken"}
    assert load_tokenizer(write_tokenizer(tmp_path / "a", eos_token=as_dict)).eos_id == 4
    write_tokenizer(tmp_path / "b", eos=None)
    (tmp_path / "b" / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert load_tokenizer(tmp_path / "b").eos_id == 2
    write_tokenizer(tmp_path / "c", eos=None)
    (tmp_path / "c" / "config.json").write_text('{"eos_token_id": [2, 4]}')
    assert load_tokenizer(tmp_path / "c").eos_id == 2
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "d", pad_token="[PAD]"))
    assert tokenizer.pad_id is None


def test_bad_checkpoints_say_what_to_do(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no tokenizer.json; convert"):
        load_tokenizer(tmp_path / "none")
    write_tokenizer(tmp_path / "eos", eos=None)
    with pytest.raises(InputError, match="no eos_token; add it"):
        load_tokenizer(tmp_path / "eos")
    write_tokenizer(tmp_path / "word", eos="<nowhere>", pad_token=None)
    with pytest.raises(InputError, match="eos_token '<nowhere>' is not in the vocabulary"):
        load_tokenizer(tmp_path / "word")
    (tmp_path / "eos" / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match="tokenizer_config.json: expected a JSON object"):
        load_tokenizer(tmp_path / "eos")
    (tmp_path / "eos" / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer_config.json: not JSON"):
        load_tokenizer(tmp_path / "eos")
    (tmp_path / "eos" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer.json: damaged"):
        load_tokenizer(tmp_path / "eos")


@pytest.mark.parametrize("settings, message", [
    ({"eos_token": 5}, "eos_token must be a string.*got 5"),
    ({"eos_token": {"x": "<|im_end|>"}}, "eos_token must be a string"),
    ({"bos_token": ["<s>"]}, "bos_token must be a string"),
    ({"pad_token": {"content": 1}}, "pad_token must be a string"),
    ({"unk_token": {"content": None}}, "unk_token must be a string"),
    ({"chat_template": 5}, "chat_template must be a text"),
    ({"chat_template": [5]}, "an entry of chat_template must be"),
    ({"chat_template": [{"name": "default"}]}, None),
    ({"chat_template": [{"name": "default", "template": {}}]}, "chat_template must be a text"),
    ({"chat_template": "x" * 2**21}, "chat_template must be a text, 1,048,576 characters at most"),
])
def test_settings_of_other_types_are_named(tmp_path, settings, message):
    write_tokenizer(tmp_path, **settings)
    if message is None:
        assert load_tokenizer(tmp_path).chat_template.endswith(DEFAULT_TEMPLATE)
    else:
        with pytest.raises(InputError, match=message):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("stop", ['"2"', "-1", "[[2]]", "true", "{}", "1e3", str(2**40)])
@pytest.mark.parametrize("eos", ["<|im_end|>", None])
def test_stop_ids_of_other_types_are_named(tmp_path, stop, eos):
    write_tokenizer(tmp_path, eos=eos)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {stop}}}')
    with pytest.raises(InputError, match="eos_token_id must be ids from 0|no eos_token"):
        load_tokenizer(tmp_path)


def test_files_that_are_no_text_or_no_files_are_named(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff{{ messages }}")
    with pytest.raises(InputError, match="chat_template.jinja: not UTF-8"):
        load_tokenizer(tmp_path)
    for name in ("chat_template.jinja", "special_tokens_map.json", "tokenizer_config.json"):
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
        with pytest.raises(InputError, match=f"{name}: not a regular file"):
            load_tokenizer(tmp_path)
        (tmp_path / name).unlink()


def test_a_regex_that_backtracks_without_end_is_stopped(tmp_path):
    """The library ends a match after 10,000,000 retries, by a panic."""
    write_tokenizer(tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"},
                               "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer, started = load_tokenizer(tmp_path), time.monotonic()
    with pytest.raises(InputError, match=f"{tmp_path}: the tokenizer fails .*retry-limit"):
        tokenizer.encode("x" * 100)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("template, message", [
    ("{{ raise_exception('only one turn, please') }}", "only one turn, please"),
    ("{{ ''.__class__.__mro__ }}", "unsafe|access"),
    ("{{ messages.append(1) }}", "not safely callable|unsafe"),
    ("{{ messages[0]['content'] + 1 }}", "TypeError"),
    ("{% for m in messages %}", "end of template"),
])
def test_template_errors_are_input_errors_and_the_sandbox_holds(tmp_path, template, message):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, template))
    assert tokenizer.turn_end_id == tokenizer.eos_id
    with pytest.raises(InputError, match=message):
        tokenizer.apply_chat_template(TALK[:1], True)


def test_half_a_surrogate_pair_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="not valid Unicode"):
        family_tokenizer(tmp_path, "chatml").encode("a\ud83d")


def test_vocab_size_is_one_more_than_the_highest_id(tmp_path):
    write_tokenizer(tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["added_tokens"].append({**stored["added_tokens"][0], "id": 500, "content": "<far>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == max(tokenizer.backend.get_vocab().values()) + 1
