"""From logits to tokens: repetition penalty, filters, draws and stop strings.

The token of a row depends on that row alone, whatever else is in the batch.

Legend: n rows, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from srit.generation.params import SamplingParams

CDF_BLOCK = 256
NUCLEUS = 256  # likeliest tokens tried for top_p before the whole vocabulary of a row is sorted
# Rows sampled together. A CPU returns large tensors to the OS and faults their pages in again.
CHUNK_ROWS = {"cuda": 4096, "cpu": 16}


def sample(logits: Tensor, uniforms: Tensor, params: SamplingParams,
           seen: Tensor | None = None) -> Tensor:
    """One token a row: argmax at temperature 0, else the inverse CDF at the row's uniform.

    Args: logits (n, V) float32; uniforms (n,) float64, k / 2^32; seen (n, V) bool, needed for the
    repetition penalty: the tokens of the prompt and of the completion so far. The filters are those
    of transformers, in its order: penalty, temperature, top_k, top_p, min_p.
    Returns (n,) int64.
    """
    if params.repetition_penalty != 1:
        logits = apply_repetition_penalty(logits, seen, params.repetition_penalty)
    size = CHUNK_ROWS.get(logits.device.type, CHUNK_ROWS["cuda"])
    chunks = zip(logits.split(size), uniforms.split(size), strict=True)
    return torch.cat([_sample(*chunk, params) for chunk in chunks])


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """The repetition penalty of CTRL (arXiv 1909.05858, §4.1) as transformers implements it."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _sample(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> Tensor:
    if params.temperature == 0:
        return logits.argmax(-1)
    top_k, top_p, min_p = params.top_k, params.top_p, params.min_p
    # Subtract the maximum first: dividing by a tiny temperature must not give inf - inf.
    logits = (logits - logits.amax(-1, keepdim=True)).div_(params.temperature)
    if 0 < top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k)
        return ids.gather(-1, _draw(logits.softmax(-1), uniforms, top_p, min_p)[:, None])[:, 0]
    probs = logits.softmax(-1)
    if top_p == 1:
        return _draw(probs, uniforms, 1.0, min_p)
    head, ids = probs.topk(min(NUCLEUS, probs.shape[-1]))
    token = ids.gather(-1, _draw(head, uniforms, top_p, min_p)[:, None])[:, 0]
    for row in (head.sum(-1, dtype=torch.float64) < top_p).nonzero()[:, 0].tolist():
        full, ids = probs[row].sort(descending=True, stable=True)  # a flat distribution: rare
        token[row] = ids[_draw(full[None], uniforms[row : row + 1], top_p, min_p)[0]]
    return token


def _draw(probs: Tensor, uniforms: Tensor, top_p: float, min_p: float) -> Tensor:
    """Inverse CDF: the first index whose cumulative mass exceeds uniform x total mass, (n,).

    With top_p < 1, `probs` must be sorted, and the total is the mass of the nucleus: the fewest
    likeliest tokens that together reach top_p. min_p removes tokens less likely than min_p times the
    likeliest one; when sorted, those are the last, so the stricter of the two filters decides.
    """
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
    if top_p == 1 and probs.shape[-1] > CDF_BLOCK:
        return _draw_in_blocks(probs, uniforms)
    cdf = probs.cumsum(-1, dtype=torch.float64)
    mass = cdf[:, -1:]
    if top_p < 1:
        mass = cdf.gather(-1, (cdf[:, :-1] < top_p).sum(-1, keepdim=True))
    return torch.searchsorted(cdf, uniforms[:, None] * mass, right=True)[:, 0]


def _draw_in_blocks(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The same, first among blocks, then within one: summing a vocabulary is faster than its CDF."""
    short = -probs.shape[-1] % CDF_BLOCK
    blocks = (F.pad(probs, (0, short)) if short else probs).unflatten(-1, (-1, CDF_BLOCK))
    outer = blocks.sum(-1).cumsum(-1, dtype=torch.float64)  # (n, blocks)
    wanted = uniforms[:, None] * outer[:, -1:]
    block = torch.searchsorted(outer, wanted, right=True)
    wanted = wanted - F.pad(outer, (1, 0)).gather(-1, block)
    own = blocks[torch.arange(len(blocks), device=probs.device), block[:, 0]]  # (n, CDF_BLOCK)
    inner = own.cumsum(-1, dtype=torch.float64)
    # This sum has another order and may end slightly lower: then take the last token with any mass.
    below = torch.nextafter(inner[:, -1:], torch.zeros_like(wanted))
    at = torch.searchsorted(inner, torch.minimum(wanted, below), right=True)
    return (block * CDF_BLOCK + at)[:, 0]


class StopStrings:
    """Finds texts that contain one of `strings`, decoding only where a table of tokens allows one.

    may_end: (V,) bool, the tokens that may complete a stop string because they hold the last
    character of one. Tokens that are part of a character decode to U+FFFD and always may.
    """

    def __init__(self, strings: Sequence[str], decode: Callable[[Sequence[int]], str],
                 vocab_size: int, device: torch.device) -> None:
        self.strings, self.decode = strings, decode
        last = {string[-1] for string in strings}
        # Some decoders drop the space that a text begins with, hence the space in front.
        self.may_end = torch.tensor([bool(last & set(" " + text)) or "\ufffd" in text
                                     for text in (decode([i]) for i in range(vocab_size))],
                                    device=device)

    def found_in(self, ids: Sequence[int]) -> bool:
        text = self.decode(ids)
        return any(string in text for string in self.strings)
