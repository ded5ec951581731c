"""The calculator inside sampling: the result behind an "=" is computed, and its tokens are forced.

Whenever the text of a row ends in an expression and "=" (srit/text/arithmetic.py), the tokens of the
result come next, whatever would have been drawn; then the model goes on. Its next token may not
continue the number, or 12 would become 120, 12.5 or 12/5: where it would, another is drawn that ends
the number and begins no word. A row depends on its own text alone, and a forced token
leaves the uniform of its position unused, so the draws behind it do not shift.

Legend: n rows, V vocabulary.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from srit.generation.params import SamplingParams
from srit.generation.sampler import sample
from srit.text.arithmetic import CURRENCY, result

CLOSES = re.compile(rf"= ?[{CURRENCY}]?\Z")
CONTINUES = re.compile(r"[.,/]?\d")
TAIL = 32  # characters that are encoded anew to see how the result joins them


@dataclass
class Forced:
    """What the calculator did in one row.

    waiting: tokens of a result that are still to come. spans: (start, end) of each result in the text.
    steps: positions of their tokens. open: the last token belongs to a result, or is the point, comma
    or slash behind one, so a digit would continue it.
    """

    waiting: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    steps: set[int] = field(default_factory=set)
    open: bool = False


class Calculator:
    """Finds completions that end in an expression and "=", and gives the tokens of its result.

    closes: (V,) bool, the tokens with which an expression and its "=" can end: no other step costs
    anything. continues: (V,) bool, the tokens that would continue a number before them. joins: (V,)
    bool, those and the ones that begin with a letter. letters: {letter: token}. points: the tokens
    that are a point, a comma or a slash.
    """

    def __init__(self, encode: Callable[[str], list[int]], decode: Callable[[Sequence[int]], str],
                 vocab_size: int, device: torch.device) -> None:
        self.encode, self.decode = encode, decode
        before = encode("=")  # some decoders drop the space that a text begins with
        start = len(decode(before))
        texts = [decode([*before, i])[start:] for i in range(vocab_size)]
        self.closes = torch.tensor([bool(CLOSES.search(text)) for text in texts], device=device)
        self.continues = torch.tensor([bool(CONTINUES.match(text)) for text in texts], device=device)
        words = torch.tensor([text[:1].isalpha() for text in texts], device=device)
        self.joins = words | self.continues
        self.letters = {text: i for i, text in enumerate(texts) if len(text) == 1}
        self.points = {i for i, text in enumerate(texts) if text in (".", ",", "/")}

    def sample(self, rows: Sequence[Forced], logits: Tensor, uniforms: Tensor, params: SamplingParams,
               seen: Tensor) -> Tensor:
        """One token a row, (n,): the next one of its result, else as drawn by sampler.sample."""
        tokens = sample(logits, uniforms, params, seen)
        opened = [i for i, row in enumerate(rows) if row.open and not row.waiting]
        if opened:
            refused = self.continues[tokens[opened]].tolist()
            if again := [i for i, refuse in zip(opened, refused, strict=True) if refuse]:
                others = logits[again].masked_fill(self.joins, -math.inf)
                tokens[again] = sample(others, uniforms[again], params, seen[again])
        waiting = [i for i, row in enumerate(rows) if row.waiting]
        if waiting:
            tokens[waiting] = tokens.new_tensor([rows[i].waiting[0] for i in waiting])
        both = opened + waiting
        for i, token in zip(both, tokens[both].tolist() if both else (), strict=True):
            self.advance(rows[i], token)
        return tokens

    def advance(self, row: Forced, token: int) -> None:
        """Note that `token` is the next one of a row."""
        if row.waiting:
            row.waiting.pop(0)
        else:
            row.open = row.open and token in self.points

    def start(self, row: Forced, ids: Sequence[int]) -> None:
        """Let a result follow the completion `ids`, if it ends in an expression and "="."""
        text = self.decode(ids)
        if not row.waiting and (found := result(text)) is not None:
            row.waiting = self._join(ids, text, found)
            if row.waiting:
                row.open = True
                row.spans.append((len(text), len(text) + len(found)))
                row.steps.update(range(len(ids), len(ids) + len(row.waiting)))

    def _join(self, ids: Sequence[int], text: str, found: str) -> list[int]:
        """Tokens of `found` behind `ids`, as the tokenizer would write the whole; [] if it cannot.

        Where it would write the "=" before them otherwise, they are letter by letter.
        """
        for end in (text[-TAIL:], "="):
            before, after = self.encode(end), self.encode(end + found)
            tokens = after[len(before):]
            if after[:len(before)] == before and self.decode([*ids, *tokens]) == text + found:
                return tokens
        return [self.letters[letter] for letter in found] if self.letters.keys() >= set(found) else []

    def spans(self, row: Forced, ids: Sequence[int]) -> list[tuple[int, int]]:
        """The forced parts of the text of `ids`, which may end within one."""
        if not row.waiting:
            return row.spans
        end = len(self.decode(ids))
        return [(start, min(stop, end)) for start, stop in row.spans if start < end]
