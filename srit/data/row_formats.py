"""Rows of other tools as rows of TRL, one function a format, which is known by its fields."""

from collections.abc import Callable

from srit.runtime.files import InputError
from srit.runtime.jsonl import require
from srit.runtime.limits import check

ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for them


def from_sharegpt(row: dict, where: str) -> dict:
    """Turns of `from` and `value`, or of `role` and `content`; `system`, if any, goes first."""
    require(row, "conversations", list, where)
    return {"messages": [*_system(row, where),
                         *(_turn(turn, where) for turn in row["conversations"])]}


def from_alpaca(row: dict, where: str) -> dict:
    """`instruction`, and behind a blank line `input` unless it is empty; `output` is the answer."""
    for key in ("instruction", "output"):
        require(row, key, str, where)
    given = row.get("input") or ""
    check(isinstance(given, str), where, "field 'input'", given, "a string")
    check(not row.get("history"), where, "field 'history'", row.get("history"),
          "empty; write earlier turns as `messages`")
    question = f"{row['instruction']}\n\n{given}" if given else row["instruction"]
    return {"prompt": [*_system(row, where), {"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": row["output"]}]}


def from_text(row: dict, where: str) -> dict:
    """All of a plain text is trained."""
    require(row, "text", str, where)
    return {"prompt": "", "completion": row["text"]}


FORMATS: dict[tuple[str, ...], Callable[[dict, str], dict]] = {
    ("conversations",): from_sharegpt, ("instruction", "output"): from_alpaca, ("text",): from_text}
OWN = {"messages", "question", "prompt", "completion"}


def to_trl(row: dict, where: str) -> dict:
    """A row to instruct with, as one of TRL; those of TRL and demonstrations are so already."""
    if row.keys() & OWN:
        return row
    found = next((convert for fields, convert in FORMATS.items() if row.keys() >= {*fields}), None)
    return row if found is None else {**row, **found(row, where)}


def split_prompt(row: dict, where: str) -> tuple:
    """Prompt, chosen and rejected of a pair.

    As in TRL, chosen and rejected hold the prompt themselves, as what both begin with, if the row has
    none, or a string where they are conversations.
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    texts = isinstance(chosen, str) and isinstance(rejected, str)
    conversations = isinstance(chosen, list) and isinstance(rejected, list)
    whole = conversations and isinstance(prompt, str) and len(chosen) > 1
    if prompt is not None and not whole:
        return prompt, chosen, rejected
    if not (texts or conversations):
        raise InputError(f"{where}: the row has no field 'prompt'")
    longest = max(0, min(len(chosen), len(rejected)) - 1)  # each keeps something of its own
    at = next((at for at in range(longest) if chosen[at] != rejected[at]), longest)
    if texts and chosen[:at].endswith(" "):
        at -= 1  # the space belongs to the word behind it
    return chosen[:at], chosen[at:], rejected[at:]


def _system(row: dict, where: str) -> list[dict]:
    text = row.get("system") or ""
    check(isinstance(text, str), where, "field 'system'", text, "a string")
    return [{"role": "system", "content": text}] if text else []


def _turn(turn: object, where: str) -> dict:
    check(isinstance(turn, dict), where, "a turn of 'conversations'", turn, "an object")
    keys = ("from", "value") if "from" in turn else ("role", "content")
    for key in keys:
        require(turn, key, str, f"{where}: conversations")
    role, content = (turn[key] for key in keys)
    return {"role": ROLES.get(role, role), "content": content}
