"""Turn questions and conversations into token ids and the mask of trained tokens.

SFT, sampling, DPO and evaluation all use these functions, so all stages see the same prompts.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from srit.config import QuestionConfig
from srit.runtime.files import InputError
from srit.runtime.jsonl import check_spans
from srit.text.tokenizer import Tokenizer

Message = dict[str, str]

INSTRUCTIONS = {
    "math": "Answer the following mathematical question with numerical solution.",
    "choice": "Choose the answer to the question only from options {letters}.",
    "expression": "Answer the following mathematical question, with the final answer in \\boxed{}.",
    "exact": "Answer the following question.",
    "json": "Answer the following question with one JSON object.",
    "code": "Write a Python program that does the following, in one block of code.",
}
TEMPLATE = "{instruction}\nQuestion: {question}\nAnswer:{cot_suffix}"
TEMPLATES = {"choice": "{instruction}\nQuestion: {question}\nChoices: {choices}\nAnswer:{cot_suffix}"}
FIELD = re.compile(r"\{(instruction|question|choices|letters|cot_suffix)\}")
DEFAULT = QuestionConfig()


class EmptyCompletion(InputError):
    """An answer to train on has no text."""


@dataclass(frozen=True)
class Rendered:
    """Token ids, the mask of trained ones, and the prompt's `text` as tokenized.

    Only the ids tell a template's special token from the same characters in a message.
    """

    ids: list[int]
    mask: list[bool]
    text: str


def question_messages(row: dict, prompt_style: str, cfg: QuestionConfig = DEFAULT) -> list[Message]:
    """The messages for a question row: a system prompt, if any; instruction, question and choices.

    By default they end in "Answer:" (`direct`) or "Answer: Let's think step by step" (`cot`; Kojima et
    al. 2022). Braces in the texts that are no field of a template, as in \\boxed{}, stay as they are.
    Raises InputError for another style, and for settings of a task that nobody judges.
    """
    if prompt_style not in ("direct", "cot"):
        raise InputError(f"prompt_style {prompt_style!r}: must be direct or cot")
    for name in (*cfg.instruction, *cfg.prompt_template):
        if name not in INSTRUCTIONS and cfg.verifier is None:
            raise InputError(f"instruction or prompt_template of task {name!r}: the tasks are "
                             f"{', '.join(INSTRUCTIONS)}")
    task = row["task"]
    choices = row["choices"] if task == "choice" else {}
    values = {"question": row["question"].strip(), "letters": ", ".join(choices),
              "choices": " ".join(f"{letter}) {text}" for letter, text in choices.items()),
              "cot_suffix": cfg.cot_suffix if prompt_style == "cot" else ""}

    def fill(template: str) -> str:
        return FIELD.sub(lambda found: values.get(found[1], found[0]), template)

    values["instruction"] = fill(cfg.instruction.get(task, INSTRUCTIONS.get(task, "")))
    text = fill(cfg.prompt_template.get(task, TEMPLATES.get(task, TEMPLATE)))
    system = [] if cfg.system_prompt is None else [{"role": "system", "content": cfg.system_prompt}]
    return [*system, {"role": "user", "content": text.lstrip()}]  # without an instruction: a blank line


def prompt_text(tokenizer: Tokenizer, prompt: str | Sequence[Message]) -> str:
    """The prompt as tokenized, including the BOS of the template or tokenizer."""
    if not isinstance(prompt, str):
        return tokenizer.apply_chat_template(_messages(prompt), add_generation_prompt=True)
    if tokenizer.adds_bos and not prompt.startswith(tokenizer.bos_token):
        return tokenizer.bos_token + prompt
    return prompt


def render(tokenizer: Tokenizer, prompt: str | Sequence[Message],
           completion: str | Sequence[Message] | None = None,
           parse_special_tokens: bool = True, forced: list | None = None) -> Rendered:
    """Prompt and completion as ids, with the mask of trained tokens.

    Both are tokenized separately and concatenated, as in generation, so no token spans the boundary.
    The completion is trained, followed by exactly one end of turn (EOS for plain text). In a
    conversation, whitespace around the completion is stripped, because templates add their own; in
    plain text it belongs to the completion. Raises EmptyCompletion, an InputError.

    Special tokens written in a message are ordinary text: only the template makes control tokens. In
    plain text they are control tokens, unless `parse_special_tokens` is off.

    forced: spans [start, end) in characters of the completion that were written for the student, as a
    calculator does. A token with a character in one is read, but not trained. Raises InputError for
    spans that are out of order or beyond the completion.
    """
    plain = isinstance(prompt, str)
    parsed = plain and parse_special_tokens
    if parsed:
        mark = unmark = str
        encode = tokenizer.encode
    else:
        mark, unmark, encode = tokenizer.mark, tokenizer.unmark, tokenizer.encode_marked
    prompt = mark(prompt) if plain else _marked(tokenizer, prompt)
    text = prompt_text(tokenizer, prompt)
    if plain and text != prompt:  # some tokenizers treat the start of a text specially, even after BOS
        ids = [tokenizer.bos_id, *encode(prompt)]
    else:
        ids = encode(text)
    text = unmark(text)
    if completion is None:
        return Rendered(ids, [False] * len(ids), text)
    if not isinstance(completion, str):
        completion = _one_turn(completion)
    answer = _without_end(tokenizer, completion, plain)
    answer_ids = [*encode(mark(answer)), tokenizer.eos_id if plain else tokenizer.turn_end_id]
    mask = [True] * len(answer_ids)
    if forced is not None:
        check_spans(forced, completion, "the completion", "forced")
        own = _own_characters(forced, completion)[completion.index(answer) :]
        mask = [*(all(own[a:b]) for a, b in tokenizer.spans(answer, literal=not parsed)), True]
    return Rendered(ids + answer_ids, [False] * len(ids) + mask, text)


def render_conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[Rendered]:
    """A conversation as ids. Every assistant turn is trained once, with its end of turn.

    One sequence, unless the template rewrites earlier turns, as Qwen3's takes the thoughts out of them:
    then the turns from there on are another sequence, and each stands behind what generation would see.

    The mask relies on prefixes: the text before a turn, with the generation prompt, must be a prefix
    of the text that includes the turn. Raises InputError if the template violates this or does not end
    turns, and for a conversation without an assistant turn; EmptyCompletion if one has no text.
    """
    messages = _marked(tokenizer, [
        {**m, "content": _without_end(tokenizer, m["content"])} if m["role"] == "assistant" else m
        for m in _messages(messages)
    ])
    end = tokenizer.backend.id_to_token(tokenizer.turn_end_id)
    sequences: list[Rendered] = []
    done = ""
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:at], add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: at + 1], add_generation_prompt=False)
        if not after.startswith(before):
            raise InputError("the chat template does not go on with an assistant turn where it asks "
                             "for one; train on prompt/completion rows instead")
        answer, ended, _ = after[len(before) :].rpartition(end)
        if not ended:
            raise InputError(f"the chat template does not end an assistant turn with {end!r}; "
                             "train on prompt/completion rows instead")
        if not (sequences and before.startswith(done)):
            sequences.append(Rendered([], [], ""))
            done = ""
        # Encode after an end of turn: some tokenizers treat the start of a text specially.
        prompt = tokenizer.encode_marked((end if done else "") + before[len(done) :])
        prompt = prompt[1 if done else 0 :]
        trained = [*tokenizer.encode_marked(answer), tokenizer.turn_end_id]
        done = before + answer + end
        last = sequences[-1]
        sequences[-1] = Rendered(
            last.ids + prompt + trained,
            last.mask + [False] * len(prompt) + [True] * len(trained), tokenizer.unmark(done))
    if not sequences:
        raise InputError("the conversation has no assistant turn")
    return sequences


def _own_characters(forced: list, text: str) -> bytearray:
    """1 for each character of the text that is the student's own, 0 for each that was forced."""
    own = bytearray(b"\1") * len(text)
    for start, end in forced:
        own[start:end] = bytes(end - start)
    return own


def _without_end(tokenizer: Tokenizer, text: str, plain: bool = False) -> str:
    """The completion without the end-of-turn tokens that some data sets append. Error if empty."""
    ends = [tokenizer.eos_token]
    if not plain:
        ends.append(tokenizer.backend.id_to_token(tokenizer.turn_end_id))
    before = None
    while text != before:
        before = text
        for end in ends:
            text = text.removesuffix(end)
        text = text if plain else text.strip()
    if not text.strip():
        raise EmptyCompletion("the completion is empty")
    return text


def _messages(messages: Sequence[Message]) -> list[Message]:
    if not isinstance(messages, list | tuple):
        raise InputError(f"expected a string or a list of messages, got {messages!r:.80}")
    messages = list(messages)
    if not messages:
        raise InputError("the prompt has no message")
    for message in messages:
        ok = isinstance(message, dict) and all(
            isinstance(message.get(key), str) for key in ("role", "content"))
        if not ok:
            raise InputError(f"a message needs the strings 'role' and 'content', got {message!r}")
    return messages


def _marked(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[Message]:
    """The messages with every special token in any of their texts, also the roles, marked."""
    def mark(value: Any) -> Any:
        if isinstance(value, str):
            return tokenizer.mark(value)
        if isinstance(value, dict):
            return {mark(key): mark(item) for key, item in value.items()}
        return [mark(item) for item in value] if isinstance(value, list) else value

    return [mark(message) for message in _messages(messages)]


def _one_turn(completion: Sequence[Message]) -> str:
    messages = _messages(completion)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise InputError("a completion is one assistant message, got roles "
                         f"{[m['role'] for m in messages]}")
    return messages[0]["content"]
