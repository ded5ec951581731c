"""Which ids a row becomes and which of them are trained, one test a row of the peers' bugs."""

import pytest
from templates import CHATML, FAMILIES, MISTRAL, family_tokenizer, write_tokenizer

from srit.runtime.files import InputError
from srit.text.prompts import prompt_text, question_messages, render, render_conversation
from srit.text.tokenizer import Tokenizer, load_tokenizer

USER = [{"role": "user", "content": "How many apples?"}]
ANSWER = [{"role": "assistant", "content": "He has 7."}]
TALK = [*USER, *ANSWER, {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Now 4."}]


def trained(tokenizer: Tokenizer, rendered) -> str:
    ids = [i for i, m in zip(rendered.ids, rendered.mask, strict=True) if m]
    return tokenizer.decode(ids, skip_special_tokens=False)


def whole(tokenizer: Tokenizer, rendered) -> str:
    return tokenizer.decode(rendered.ids, skip_special_tokens=False)


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path) -> tuple[str, Tokenizer]:
    return request.param, family_tokenizer(tmp_path, request.param)


@pytest.fixture
def chatml(tmp_path) -> Tokenizer:
    return family_tokenizer(tmp_path, "chatml-other-eos")


def test_question_messages_math():
    row = {"id": "1", "task": "math", "question": " How many?\n", "answer": "7"}
    text = "Answer the following mathematical question with numerical solution.\n" \
           "Question: How many?\nAnswer:"
    assert question_messages(row, "direct") == [{"role": "user", "content": text}]
    assert question_messages(row, "cot") == [
        {"role": "user", "content": text + " Let's think step by step"}]


def test_question_messages_choice_names_the_rows_own_letters():
    row = {"id": "1", "task": "choice", "question": "Where {is} it?", "answer": "B",
           "choices": {"A": "here", "B": "there", "C": "{}"}}
    assert question_messages(row, "cot")[0]["content"] == (
        "Choose the answer to the question only from options A, B, C.\nQuestion: Where {is} it?\n"
        "Choices: A) here B) there C) {}\nAnswer: Let's think step by step")
    with pytest.raises(InputError, match="prompt_style 'CoT'"):
        question_messages(row, "CoT")


def test_b1_pad_equals_eos_still_trains_eos(tmp_path):
    """The mask goes by position. The ids of pad and EOS are one here."""
    tokenizer = family_tokenizer(tmp_path, "chatml")
    assert tokenizer.pad_id == tokenizer.eos_id
    for rendered in (render(tokenizer, USER, "He has 7."), render(tokenizer, "How?", " He has 7."),
                     render_conversation(tokenizer, TALK)):
        assert rendered.ids[-1] == tokenizer.eos_id and rendered.mask[-1]
    assert trained(tokenizer, render_conversation(tokenizer, TALK)).count("<|im_end|>") == 2


def test_b2_a_turn_ends_as_the_template_ends_it(family):
    """Not with the tokenizer's EOS, which may be another token; plain text ends with EOS."""
    name, tokenizer = family
    assert trained(tokenizer, render(tokenizer, USER, ANSWER)) == (
        "He has 7." + FAMILIES[name].turn_end)
    assert trained(tokenizer, render(tokenizer, "How?", " He has 7.")) == (
        " He has 7." + FAMILIES[name].eos)


def test_b3_the_end_is_there_once(family):
    name, tokenizer = family
    for end in (FAMILIES[name].turn_end, FAMILIES[name].eos):
        for text in ("He has 7.", f"He has 7.{end}", f"He has 7.{end}{end}\n", f"He has 7. {end}"):
            assert render(tokenizer, USER, text) == render(tokenizer, USER, "He has 7.")
    twice = render(tokenizer, "How?", f" He has 7.{FAMILIES[name].eos}")
    assert twice == render(tokenizer, "How?", " He has 7.")


def test_b4_the_mask_is_as_long_as_the_ids(family):
    _, tokenizer = family
    for rendered in (render(tokenizer, USER), render(tokenizer, USER, ANSWER),
                     render_conversation(tokenizer, TALK)):
        assert len(rendered.mask) == len(rendered.ids)


@pytest.mark.parametrize("post_bos", [False, True])
@pytest.mark.parametrize("name", ["llama3", "gemma", "mistral", "none"])
def test_b5_bos_stands_once(tmp_path, name, post_bos):
    """From the template, or from the tokenizer for plain text, whatever both would like."""
    tokenizer = family_tokenizer(tmp_path, name, post_bos=post_bos)
    rows = [render(tokenizer, USER, ANSWER), render_conversation(tokenizer, TALK)]
    assert [row.ids.count(tokenizer.bos_id) for row in rows] == 2 * [
        1 if FAMILIES[name].renders_bos or post_bos else 0]
    for prompt in ("How?", "<s>How?"):
        ids = render(tokenizer, prompt, " 7").ids
        assert ids.count(tokenizer.bos_id) == (1 if post_bos or "<s>" in prompt else 0)
        assert prompt_text(tokenizer, prompt) == ("<s>How?" if post_bos else prompt)


def test_b6_prompt_and_completion_do_not_merge(chatml):
    """`Tom h` + `as` is not `Tom has`: the prompt's ids are those that generation continues."""
    joint = chatml.encode("Tom has")
    row = render(chatml, "Tom h", "as")
    assert row.ids[:-1] != joint
    assert row.ids[: row.mask.index(True)] == render(chatml, "Tom h").ids == chatml.encode("Tom h")
    assert trained(chatml, row) == "as</s>"


def test_b7_chosen_and_rejected_share_their_prompt(family):
    _, tokenizer = family
    chosen, rejected = (render(tokenizer, USER, text) for text in ("7.", "He has 3, no, 4"))
    start = chosen.mask.index(True)
    assert rejected.mask.index(True) == start and chosen.ids[:start] == rejected.ids[:start]


@pytest.mark.parametrize("completion", ["", " \n", "<|im_end|>", "</s>\n", " <|im_end|> </s>"])
def test_b8_an_empty_completion_is_an_error(chatml, completion):
    with pytest.raises(InputError, match="completion is empty"):
        render(chatml, USER, completion)
    with pytest.raises(InputError, match="completion is empty"):
        render_conversation(chatml, [*USER, {"role": "assistant", "content": completion}])


@pytest.mark.parametrize("completion", ["", "  ", "</s>"])
def test_b8_an_empty_plain_completion_is_an_error(chatml, completion):
    with pytest.raises(InputError, match="completion is empty"):
        render(chatml, "How?", completion)


def test_b9_prompt_tokens_are_not_trained(family):
    _, tokenizer = family
    row = render(tokenizer, USER, ANSWER)
    prompt = tokenizer.encode(prompt_text(tokenizer, USER))
    assert row.mask == [False] * len(prompt) + [True] * (len(row.ids) - len(prompt))
    assert render(tokenizer, USER).mask == [False] * len(prompt)
    assert row.text == render(tokenizer, USER).text == prompt_text(tokenizer, USER)


def test_b10_every_assistant_turn_is_trained_and_nothing_else(family):
    name, tokenizer = family
    row = render_conversation(tokenizer, TALK)
    end = FAMILIES[name].turn_end
    gap = " " if name == "mistral" else ""  # its template sets spaces around the words
    assert trained(tokenizer, row) == "".join(
        gap + words + gap + end for words in ("He has 7.", "Now 4."))
    assert tokenizer.apply_chat_template(TALK, False).startswith(whole(tokenizer, row))
    assert whole(tokenizer, row) == row.text


def test_b10_words_that_look_like_markers_do_not_move_the_mask(chatml):
    """No search for a response marker: here both questions and an answer contain it."""
    marker = "<|im_start|>assistant\n"
    talk = [{"role": "user", "content": f"Say {marker}"},
            {"role": "assistant", "content": f"{marker}x<|im_end|>y"}]
    assert trained(chatml, render_conversation(chatml, talk)) == f"{marker}x<|im_end|>y<|im_end|>"
    assert trained(chatml, render(chatml, talk[:1], "7")) == "7<|im_end|>"


def test_b11_the_mask_needs_no_generation_tag(tmp_path):
    """With `{% generation %}` (Qwen's here) and without, the same tokens are trained."""
    rows = []
    for name in ("qwen", "chatml-other-eos"):
        tokenizer = family_tokenizer(tmp_path / name, name)
        rows.append(trained(tokenizer, render_conversation(tokenizer, TALK)))
    assert rows[0] == rows[1] == "He has 7.<|im_end|>Now 4.<|im_end|>"


@pytest.mark.parametrize("template, message", [
    (CHATML.replace("messages %}", "messages[-2:] %}"), "rewrites earlier turns"),
    (CHATML.replace(" + '<|im_end|>'", ""), "does not end an assistant turn"),
    (MISTRAL, "must alternate"),
])
def test_b11_a_template_that_hides_the_turns_is_an_error(tmp_path, template, message):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, template, "</s>"))
    talk = [*TALK[:3], TALK[2], TALK[3]] if template == MISTRAL else TALK
    with pytest.raises(InputError, match=message):
        render_conversation(tokenizer, talk)


def test_b15_the_prompts_length_is_known_before_the_completions(chatml):
    """What the filter for over-long prompts counts: ids that are not trained."""
    row = render(chatml, USER, "7")
    assert len(row.ids) - sum(row.mask) == len(render(chatml, USER).ids)


def test_conversation_and_prompt_completion_agree(family):
    name, tokenizer = family
    one, other = render(tokenizer, USER, ANSWER), render_conversation(tokenizer, TALK[:2])
    if name != "mistral":
        assert (one.ids, one.mask) == (other.ids, other.mask)


def test_whitespace_belongs_to_plain_completions_and_not_to_turns(chatml):
    assert trained(chatml, render(chatml, "How?", "\n He has 7. ")) == "\n He has 7. </s>"
    assert trained(chatml, render(chatml, USER, "\n He has 7. ")) == "He has 7.<|im_end|>"


def test_tokens_behind_a_turn_are_those_of_the_whole_text(tmp_path):
    """Metaspace puts a space before a text's first word: a later turn is not the start of one."""
    from tokenizers import decoders, pre_tokenizers

    write_tokenizer(tmp_path, MISTRAL.replace("[INST]", "Tom "), "</s>", post_bos=True)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.backend.decoder = decoders.ByteLevel()
    row = render_conversation(tokenizer, TALK)
    start = row.ids.index(tokenizer.turn_end_id) + 1
    after = row.text.split("</s>")[1]
    text = after[: after.index("Now 4.") - 1]
    prompt = row.ids[start : start + row.mask[start:].index(True)]
    assert prompt == tokenizer.encode("</s>" + text)[1:] != tokenizer.encode(text)
    assert render(tokenizer, "Tom has").ids == tokenizer.backend.encode("Tom has").ids


@pytest.mark.parametrize("messages, message", [
    ([], "no message"), ([{"role": "user"}], "needs the strings"), (["hello"], "needs the strings"),
    ([{"role": "user", "content": None}], "needs the strings")])
def test_malformed_messages_are_errors(chatml, messages, message):
    for function in (prompt_text, render, render_conversation):
        with pytest.raises(InputError, match=message):
            function(chatml, messages)


def test_malformed_completions_are_errors(chatml):
    with pytest.raises(InputError, match="no assistant turn"):
        render_conversation(chatml, USER)
    for completion in (USER, ANSWER + ANSWER):
        with pytest.raises(InputError, match="one assistant message"):
            render(chatml, USER, completion)
