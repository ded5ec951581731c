"""`srit show FILE`: rows as the model sees them, token by token, and what of them is trained.

Rows go through the readers of training, and their masks through its batches. On a terminal a row is a
text in colours, elsewhere a line per token; --output writes a page.
"""

import sys
from typing import NamedTuple

import jinja2

from srit.commands.config import ShowConfig
from srit.data.batches import collate
from srit.data.examples import pair_row, sft_row
from srit.data.questions import check_question
from srit.data.sources import read_rows
from srit.grading.judge import load_judge
from srit.runtime.files import atomic_write
from srit.runtime.jsonl import Counts
from srit.text.prompts import Rendered, question_messages, render
from srit.text.tokenizer import Tokenizer, load_tokenizer

COLOURS = {"prompt": "2", "trained": "32", "not trained": "2;3", "forced": "33", "turn end": "7;32"}
WINDOW = 8  # tokens before one that can decide how it is written


class Token(NamedTuple):
    """A token of a row: its text, and a state, one of COLOURS."""

    id: int
    text: str
    state: str


class Sequence(NamedTuple):
    """What one row is read as, or one side or prompt style of it."""

    title: str
    tokens: list[Token]
    notes: list[str]


def main(cfg: ShowConfig) -> None:
    tokenizer = load_tokenizer(cfg.model_name_or_path, cfg.date, cfg.chat_template_kwargs)
    rows, counts = [], Counts("rows shown")
    for file in cfg.file:
        for where, row in read_rows(file, counts)[: cfg.limit or None]:
            sequences, dropped = show_row(where, row, tokenizer, cfg)
            rows.append((f"{where} {row.get('id', '')}".strip(), sequences, dropped))
            if dropped:
                counts.drop(dropped)
            else:
                counts.use()
    if cfg.output is not None:
        environment = jinja2.Environment(loader=jinja2.PackageLoader("srit"), autoescape=True,
                                         undefined=jinja2.StrictUndefined)
        page = environment.get_template("show.html.jinja").render(
            rows=rows, counts=counts, states=COLOURS, model=cfg.model_name_or_path)
        with atomic_write(cfg.output) as handle:
            handle.write(page)
        print(f"{cfg.output}: {counts}")
        return
    colours = sys.stdout.isatty()
    if colours:
        print(" ".join(_coloured(state, state) for state in COLOURS))
    for place, sequences, dropped in rows:
        print(f"\n{_visible(place)}" + (f": dropped, {dropped}" if dropped else ""))
        for title, tokens, notes in sequences:
            print(f"{title}: {'; '.join(notes)}")
            if colours:
                print("".join(_coloured(_visible(token.text), token.state) for token in tokens))
            else:
                print("\n".join(f"{at:5} {token.id:7} {token.state:11} {token.text!r}"
                                for at, token in enumerate(tokens)))
    print(f"\n{counts}")


def show_row(where: str, row: dict, tokenizer: Tokenizer,
             cfg: ShowConfig) -> tuple[list[Sequence], str | None]:
    """What a pair, a row to instruct with or a question is read as; and why it is dropped, if it is."""
    def read(row: dict) -> tuple[list[Rendered], str | None]:
        if "chosen" in row or "rejected" in row:
            return pair_row(where, row, tokenizer, cfg.max_length, cfg.parse_special_tokens)
        if "completion" in row or "messages" in row or "question" not in row:
            return sft_row(where, row, tokenizer, cfg.max_length, cfg)
        check_question(row, where, load_judge(cfg))
        prompts = [question_messages(row, style, cfg) for style in cfg.prompt_style]
        return [render(tokenizer, prompt) for prompt in prompts], None

    rendered, dropped = read(row)
    # Without its marks all of an answer is trained: what differs was forced.
    unmarked, _ = read({key: value for key, value in row.items() if not key.endswith("_forced")})
    titles = (["chosen", "rejected"] if "chosen" in row else cfg.prompt_style if "question" in row
              else [f"sequence {number}" for number, _ in enumerate(rendered, 1)])
    return [Sequence(title, *label_tokens(tokenizer, one, whole))
            for title, one, whole in zip(titles, rendered, unmarked, strict=False)], dropped


def label_tokens(tokenizer: Tokenizer, rendered: Rendered,
                 unmarked: Rendered) -> tuple[list[Token], list[str]]:
    """The tokens of a sequence with their states, and what is to be said of it."""
    ids, trained, answer = rendered.ids, trained_positions(rendered), trained_positions(unmarked)
    start = min(answer, default=len(ids))
    ends = {tokenizer.eos_id, tokenizer.turn_end_id}
    tokens = []
    for at, index in enumerate(ids):
        if at in trained:
            last = at + 1 not in answer and index in ends
            state = "turn end" if last else "trained"
        else:
            state = "forced" if at in answer else "prompt" if at < start else "not trained"
        window = ids[max(0, at - WINDOW) : at + 1]
        before, text = (tokenizer.decode(part, False) for part in (window[:-1], window))
        # A part of a character adds no text.
        tokens.append(Token(index, text[len(before) :] or tokenizer.backend.id_to_token(index), state))
    notes = [f"{len(ids)} tokens, {len(trained)} trained, {len(answer) - len(trained)} forced"]
    if trained:
        notes.append(f"ends with {tokens[-1].text!r}")
        if not any(ids[at] == tokenizer.eos_id for at in trained):
            notes.append(f"EOS {tokenizer.eos_token!r} is not trained")
    return tokens, notes


def trained_positions(rendered: Rendered) -> set[int]:
    """Positions of the tokens that a batch of this sequence alone trains."""
    return set((collate([[rendered]]).predict_positions + 1).tolist())


def _visible(text: str) -> str:
    """The text without what would steer a terminal."""
    return "".join(c if c.isprintable() else "⏎\n" if c == "\n" else repr(c)[1:-1] for c in text)


def _coloured(text: str, state: str) -> str:
    return f"\033[{COLOURS[state]}m{text}\033[0m"
