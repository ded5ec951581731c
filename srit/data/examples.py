"""Training files to tokenized examples and pairs: read, checked, filtered and counted."""

from collections.abc import Callable, Sequence
from typing import Any

from srit.data.batches import Example, Pair
from srit.data.questions import check_question
from srit.grading.answers import grade
from srit.runtime.files import InputError
from srit.runtime.jsonl import Counts, read_lines, require
from srit.text.arithmetic import equations
from srit.text.prompts import (
    EmptyCompletion,
    Rendered,
    question_messages,
    render,
    render_conversation,
)
from srit.text.tokenizer import Tokenizer


def read_sft(files: Sequence[str], tokenizer: Tokenizer, max_length: int,
             prompt_style: Sequence[str], filter_demos: bool,
             parse_special_tokens: bool = True,
             drop_false_equations: bool = False) -> tuple[list[Example], Counts]:
    """SFT examples from demonstrations, or from TRL rows (`prompt`/`completion`, or `messages`).

    Demonstrations with a wrong final answer (`filter_demos`), rows with an empty answer or one of which
    every token was forced (`completion_forced`, see `render`), rows longer than `max_length` and those
    with a false equation (`drop_false_equations`) are dropped and counted; so are the equations of the
    rest. Raises InputError for a malformed row, naming file and line, and when nothing is left.
    parse_special_tokens: see `render`.
    """
    examples, counts = [], Counts("demonstrations")
    for file in files:
        for where, row in read_lines(file, counts):
            if "messages" in row:
                if row.get("completion_forced") is not None:
                    raise InputError(f"{where}: completion_forced says nothing of messages; write "
                                     "the row as prompt and completion")
                rendered = [_at(where, render_conversation, tokenizer, row["messages"])]
            elif "question" in row:
                check_question(row, where)
                require(row, "completion", str, where)
                if _is_empty(row["completion"]):
                    counts.drop("empty completion")
                    continue
                if filter_demos and not grade(row["completion"], row).correct:
                    counts.drop("answer differs from the ground truth")
                    continue
                rendered = [
                    _at(where, render, tokenizer, question_messages(row, style), row["completion"],
                        parse_special_tokens, row.get("completion_forced"))
                    for style in prompt_style
                ]
            else:
                for key in ("prompt", "completion"):
                    if key not in row:
                        raise InputError(f"{where}: the row has no field '{key}' (expected a "
                                         "demonstration, prompt/completion, or messages)")
                if _is_empty(row["completion"]):
                    counts.drop("empty completion")
                    continue
                rendered = [_at(where, render, tokenizer, row["prompt"], row["completion"],
                                parse_special_tokens, row.get("completion_forced"))]
            if not all(rendered):
                counts.drop("empty completion")
                continue
            if any(len(r.ids) > max_length for r in rendered):
                counts.drop(f"longer than max_length {max_length}")
                continue
            if any(map(_only_end_is_trained, rendered)):
                counts.drop("no token of its own to train")
                continue
            found = equations(_answer_text(row))
            false = sum(not equation.holds for equation in found)
            if drop_false_equations and false:
                counts.drop("false equation")
                continue
            counts.use()
            counts.held.update(equations=len(found), false_equations=false)
            examples += [Example(str(row.get("id", where)), r) for r in rendered]
    if not examples:
        raise InputError(f"nothing to train on: {counts}")
    return examples, counts


def read_pairs(files: Sequence[str], tokenizer: Tokenizer,
               max_length: int, parse_special_tokens: bool = True) -> tuple[list[Pair], Counts]:
    """Preference pairs: `prompt`, `chosen`, `rejected`, each a string or a message list.

    Without `prompt`, chosen and rejected are conversations that share their first messages. A pair is
    dropped and counted when a side is empty, both are the same, or one is longer than `max_length`:
    a truncated answer would be trained as if it were complete. So is one with a side of which every
    token was forced (`chosen_forced`, `rejected_forced`, see `render`). parse_special_tokens: as there.
    """
    pairs, counts = [], Counts("pairs")
    for file in files:
        for where, row in read_lines(file, counts):
            for key in ("chosen", "rejected"):
                if key not in row:
                    raise InputError(f"{where}: the row has no field '{key}'")
            prompt, chosen, rejected = _split_prompt(row, where)
            if _is_empty(chosen) or _is_empty(rejected):
                counts.drop("empty completion")
                continue
            a, b = (_at(where, render, tokenizer, prompt, side, parse_special_tokens, row.get(forced))
                    for side, forced in ((chosen, "chosen_forced"), (rejected, "rejected_forced")))
            if a is None or b is None:
                counts.drop("empty completion")
            elif a.mask.index(True) >= max_length:
                counts.drop(f"prompt longer than max_length {max_length}")
            elif max(len(a.ids), len(b.ids)) > max_length:
                counts.drop(f"completion beyond max_length {max_length}")
            elif a.ids == b.ids:
                counts.drop("chosen and rejected are the same")
            elif _only_end_is_trained(a) or _only_end_is_trained(b):
                counts.drop("no token of its own to train")
            else:
                counts.use()
                pairs.append(Pair(str(row.get("id", where)), a, b))
    if not pairs:
        raise InputError(f"nothing to train on: {counts}")
    return pairs, counts


def _split_prompt(row: dict, where: str) -> tuple:
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        return row["prompt"], chosen, rejected
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise InputError(f"{where}: the row has no field 'prompt'")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _is_empty(completion: object) -> bool:
    """Whether it holds no text: a blank string, no message, or one blank message."""
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        completion = completion[0].get("content")
    return not (completion.strip() if isinstance(completion, str) else completion)


def _answer_text(row: dict) -> str:
    """Everything that the assistant says in a valid row."""
    turns = row.get("messages") or row["completion"]
    if isinstance(turns, str):
        return turns
    return "\n".join(turn["content"] for turn in turns if turn["role"] == "assistant")


def _only_end_is_trained(answer: Rendered) -> bool:
    """Whether nothing of the answer's text is the student's: its end alone says nothing of the task."""
    return sum(answer.mask) == 1


def _at(where: str, function: Callable[..., Rendered], *arguments: Any) -> Rendered | None:
    """function(*arguments), None for an empty answer. An InputError gets the row's place in front."""
    try:
        return function(*arguments)
    except EmptyCompletion:
        return None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
