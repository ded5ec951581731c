"""The one place that turns a question or a conversation into ids, and says which are trained.

SFT, sampling, DPO and evaluation all render here, so a template cannot drift between stages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from srit.models.files import InputError
from srit.tokenizer import Tokenizer

Message = dict[str, str]

INSTRUCTIONS = {
    "math": "Answer the following mathematical question with numerical solution.",
    "choice": "Choose the answer to the question only from options {letters}.",
}
COT = " Let's think step by step"


@dataclass(frozen=True)
class Rendered:
    """Token ids, and for each whether it is trained; `text` is the prompt exactly as tokenised."""

    ids: list[int]
    mask: list[bool]
    text: str


def question_messages(row: dict, prompt_style: str) -> list[Message]:
    """The user's message for a question row: instruction, question, choices, and the CoT sentence.

    `direct` ends in "Answer:", `cot` in "Answer: Let's think step by step" (Kojima et al. 2022).
    """
    if prompt_style not in ("direct", "cot"):
        raise InputError(f"prompt_style {prompt_style!r}: must be direct or cot")
    lines = [INSTRUCTIONS[row["task"]], f"Question: {row['question'].strip()}"]
    if row["task"] == "choice":
        lines[0] = lines[0].format(letters=", ".join(row["choices"]))
        options = " ".join(f"{letter}) {text}" for letter, text in row["choices"].items())
        lines.append(f"Choices: {options}")
    lines.append("Answer:" + (COT if prompt_style == "cot" else ""))
    return [{"role": "user", "content": "\n".join(lines)}]


def prompt_text(tokenizer: Tokenizer, prompt: str | Sequence[Message]) -> str:
    """The prompt as text, exactly as it is tokenised: BOS stands in it once if the model wants it."""
    if isinstance(prompt, str):
        if tokenizer.adds_bos and not prompt.startswith(tokenizer.bos_token):
            return tokenizer.bos_token + prompt
        return prompt
    return tokenizer.apply_chat_template(_messages(prompt), add_generation_prompt=True)


def render(tokenizer: Tokenizer, prompt: str | Sequence[Message],
           completion: str | Sequence[Message] | None = None) -> Rendered:
    """Prompt and completion as ids with the mask of trained tokens.

    Both are tokenised on their own and joined: that is what generation sees, and no token merges
    across the border. The completion is trained, and behind it exactly one turn end (EOS for plain
    text). In a conversation the space around the completion is cut, since templates set their own;
    in plain text it belongs to the completion.
    """
    text = prompt_text(tokenizer, prompt)
    ids = tokenizer.encode(text)
    if completion is None:
        return Rendered(ids, [False] * len(ids), text)
    plain = isinstance(prompt, str)
    if not isinstance(completion, str):
        completion = _one_turn(completion)
    end = tokenizer.eos_id if plain else tokenizer.turn_end_id
    if end is None:
        raise InputError(f"{tokenizer.source}: no eos_token to end plain text with")
    answer = tokenizer.encode(completion if plain else completion.strip())
    while answer and answer[-1] in (end, tokenizer.eos_id):
        answer.pop()
    if not answer:
        raise InputError("the completion is empty")
    answer.append(end)
    return Rendered(ids + answer, [False] * len(ids) + [True] * len(answer), text)


def render_conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> Rendered:
    """A whole conversation; every assistant turn is trained, with its turn end.

    The mask comes from the structure: the text up to a turn, with the generation prompt, has to be
    a prefix of the text with that turn. A template for which it is not raises InputError.
    """
    messages = _messages(messages)
    ids: list[int] = []
    mask: list[bool] = []
    done = ""
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:at], add_generation_prompt=True)
        if not before.startswith(done):
            raise InputError("the chat template rewrites earlier turns; train on prompt/completion "
                             "rows instead")
        prompt = tokenizer.encode(before[len(done) :])
        answer = [*tokenizer.encode(message["content"].strip()), tokenizer.turn_end_id]
        ids += prompt + answer
        mask += [False] * len(prompt) + [True] * len(answer)
        end = tokenizer.decode([tokenizer.turn_end_id], skip_special_tokens=False)
        done = before + message["content"].strip() + end
    if not ids:
        raise InputError("the conversation has no assistant turn")
    return Rendered(ids, mask, done)


def _messages(messages: Sequence[Message]) -> list[Message]:
    messages = list(messages)
    if not messages:
        raise InputError("the prompt has no message")
    for message in messages:
        ok = isinstance(message, dict) and all(
            isinstance(message.get(key), str) for key in ("role", "content"))
        if not ok:
            raise InputError(f"a message needs the strings 'role' and 'content', got {message!r}")
    return messages


def _one_turn(completion: Sequence[Message]) -> str:
    messages = _messages(completion)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise InputError("a completion is one assistant message, got roles "
                         f"{[m['role'] for m in messages]}")
    return messages[0]["content"]
