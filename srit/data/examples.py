"""Training files to tokenized examples and pairs: read, checked, filtered and counted."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from srit.config import InstructConfig
from srit.data.batches import Example, Pair
from srit.data.questions import check_question
from srit.data.row_formats import split_prompt, to_trl
from srit.data.sources import read_rows
from srit.grading.judge import load_judge
from srit.runtime.files import InputError
from srit.runtime.jsonl import Counts, require
from srit.text.arithmetic import equations
from srit.text.prompts import (
    EmptyCompletion,
    Rendered,
    question_messages,
    render,
    render_conversation,
)
from srit.text.tokenizer import Tokenizer

Result = TypeVar("Result", Rendered, list[Rendered])
DEFAULT = InstructConfig()


def read_sft(files: Sequence[str], tokenizer: Tokenizer, max_length: int,
             cfg: InstructConfig = DEFAULT) -> tuple[list[Example], Counts]:
    """SFT examples from demonstrations, from TRL rows (`prompt`/`completion`, or `messages`), or from
    rows that `to_trl` makes such of.

    Rows that `sft_row` drops are counted; so are the equations of the rest. Raises InputError for a
    malformed row, naming file and line, and when nothing is left.
    """
    examples, counts = [], Counts("demonstrations")
    for file in files:
        for where, row in read_rows(file, counts):
            rendered, dropped = sft_row(where, row, tokenizer, max_length, cfg)
            if dropped:
                counts.drop(dropped)
                continue
            found = equations(_answer_text(to_trl(row, where)))
            counts.use()
            counts.held.update(equations=len(found), false_equations=sum(not e.holds for e in found))
            examples += [Example(str(row.get("id", where)), r) for r in rendered]
    if not examples:
        raise InputError(f"nothing to train on: {counts}")
    return examples, counts


def sft_row(where: str, row: dict, tokenizer: Tokenizer, max_length: int,
            cfg: InstructConfig) -> tuple[list[Rendered], str | None]:
    """What one row is trained as, and why it is dropped, if it is.

    Dropped are demonstrations with a wrong final answer (`filter_demos`), rows with an empty answer or
    one of which every token was forced (`completion_forced`, see `render`), rows longer than
    `max_length`, those with a false equation (`drop_false_equations`) and the bad answers of KTO's rows
    (`label` false). Raises InputError for a malformed row.
    """
    row = to_trl(row, where)
    if "messages" in row:
        if row.get("completion_forced") is not None:
            raise InputError(f"{where}: completion_forced says nothing of messages; write the row as "
                             "prompt and completion")
        rendered = _at(where, render_conversation, tokenizer, row["messages"])
    else:
        if "question" in row:
            judge = load_judge(cfg)
            check_question(row, where, judge)
            require(row, "completion", str, where)
            prompts = [question_messages(row, style, cfg) for style in cfg.prompt_style]
        else:
            for key in ("prompt", "completion"):
                if key not in row:
                    raise InputError(f"{where}: the row has no field '{key}' (expected a "
                                     "demonstration, prompt/completion, messages, or another of "
                                     f"docs/data.md; it has {sorted(row)!s:.200})")
            if "label" in row:
                require(row, "label", bool, where)
                if not row["label"]:
                    return [], "label is false"
            prompts = [row["prompt"]]
        if _is_empty(row["completion"]):
            return [], "empty completion"
        if "question" in row and cfg.filter_demos and not judge(row["completion"], row).correct:
            return [], "answer differs from the ground truth"
        rendered = [_at(where, render, tokenizer, prompt, row["completion"], cfg.parse_special_tokens,
                        row.get("completion_forced")) for prompt in prompts]
    if not rendered or not all(rendered):
        return [], "empty completion"
    if any(len(r.ids) > max_length for r in rendered):
        return rendered, f"longer than max_length {max_length}"
    if any(map(_only_end_is_trained, rendered)):
        return rendered, "no token of its own to train"
    if cfg.drop_false_equations and not all(e.holds for e in equations(_answer_text(row))):
        return rendered, "false equation"
    return rendered, None


def read_pairs(files: Sequence[str], tokenizer: Tokenizer,
               max_length: int, parse_special_tokens: bool = True) -> tuple[list[Pair], Counts]:
    """Preference pairs: `prompt`, `chosen`, `rejected`, each a string or a message list.

    Rows that `pair_row` drops are counted. Raises InputError for a malformed row, naming file and line,
    and when nothing is left.
    """
    pairs, counts = [], Counts("pairs")
    for file in files:
        for where, row in read_rows(file, counts):
            sides, dropped = pair_row(where, row, tokenizer, max_length, parse_special_tokens)
            if dropped:
                counts.drop(dropped)
            else:
                counts.use()
                pairs.append(Pair(str(row.get("id", where)), *sides))
    if not pairs:
        raise InputError(f"nothing to train on: {counts}")
    return pairs, counts


def pair_row(where: str, row: dict, tokenizer: Tokenizer, max_length: int,
             parse_special_tokens: bool = True) -> tuple[list[Rendered], str | None]:
    """Chosen and rejected of one row, and why it is dropped, if it is.

    How the prompt is found: `split_prompt`. A pair is dropped when a side is empty, both are the same,
    or one is longer than `max_length`: a truncated answer would be trained as if it were complete. So
    is one with a side of which every token was forced (`chosen_forced`, `rejected_forced`, see
    `render`). parse_special_tokens: as there.
    """
    if row.keys() >= {"completion", "label"}:
        raise InputError(f"{where}: a row of KTO says of one answer whether it is good, not which of "
                         "two is better; sft takes such rows, dpo needs chosen and rejected")
    for key in ("chosen", "rejected"):
        if key not in row:
            raise InputError(f"{where}: the row has no field '{key}' (it has {sorted(row)!s:.200})")
    prompt, chosen, rejected = split_prompt(row, where)
    if _is_empty(chosen) or _is_empty(rejected):
        return [], "empty completion"
    a, b = (_at(where, render, tokenizer, prompt, side, parse_special_tokens, row.get(forced))
            for side, forced in ((chosen, "chosen_forced"), (rejected, "rejected_forced")))
    if a is None or b is None:
        return [], "empty completion"
    sides, dropped = [a, b], None
    if a.mask.index(True) >= max_length:
        dropped = f"prompt longer than max_length {max_length}"
    elif max(len(a.ids), len(b.ids)) > max_length:
        dropped = f"completion beyond max_length {max_length}"
    elif a.ids == b.ids:
        dropped = "chosen and rejected are the same"
    elif _only_end_is_trained(a) or _only_end_is_trained(b):
        dropped = "no token of its own to train"
    return sides, dropped


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


def _at(where: str, function: Callable[..., Result], *arguments: Any) -> Result | None:
    """function(*arguments), None for an empty answer. An InputError gets the row's place in front."""
    try:
        return function(*arguments)
    except EmptyCompletion:
        return None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
