"""Continuous batching: many prompts, few cache slots, and every text independent of its neighbours.

A fixed number of cache slots decode together. A row that ends makes room for the next prompt at
once, so the batch stays full until the queue is empty; the last row moves into the gap, so the
active rows are always the first `n` slots, which attention reads in place.

- Prompts run longest first: rows that decode together have similar lengths, and too little memory
  shows at the start.
- The tokens that all prompts begin with are computed once, in all slots; a prompt that another slot
  still holds (the other samples of a question) is copied from it.
- The last prompt token is not part of the prefill: it is the first token that the row decodes. So
  one place turns hidden states into tokens, and only last positions ever reach the head.
- Randomness is one uniform for each (request, position), drawn from the request's own seed when it
  is admitted. On CPU prompts are prefilled one by one and the decoded batch is rounded up to a
  multiple of 8 rows: then the kernels sum in the same order whoever the neighbours are, and a
  resumed or re-ordered run writes the same texts.

Legend: n active rows, m rows computed (n rounded up), T prompt tokens, D model, V vocabulary.
"""

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from srit.models import Decoder
from srit.models.cache import STRIDE, KVCache
from srit.models.files import InputError

ROW_MULTIPLE = 8
CDF_BLOCK = 256
NUCLEUS = 256  # likeliest tokens looked at before a row's whole vocabulary is sorted for top_p
PREFILL_TOKENS = {"cuda": 16384, "cpu": 2048}  # of one forward pass of a prefill


@dataclass(frozen=True)
class Request:
    """One completion to write; with the model, `seed` (see `request_seed`) determines it."""

    key: Hashable
    prompt_ids: Sequence[int]
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Generated tokens without the stop token; `finished`: a stop token or string ended them.

    A stop string's own tokens are part of `ids`. `logps`, on request: log π of every token of `ids`,
    and of the stop token after them, by the model itself (temperature 1, no filter, no penalty).
    """

    ids: list[int]
    finished: bool
    logps: list[float] | None = None


def request_seed(*parts: Any) -> int:
    """A 64-bit seed from (seed, question id, sample index, ...), the same on every machine."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, leaving each at least one token of its own."""
    first, last = min(prompts), max(prompts)  # in lexicographic order: others share what they do
    own = min(map(len, prompts)) - 1
    return next((at for at in range(own) if first[at] != last[at]), own)


def check_sampling(temperature: float, top_k: int, top_p: float, min_p: float,
                   repetition_penalty: float, max_new_tokens: int) -> None:
    """Raise InputError for a setting without meaning."""
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature {temperature}: must be 0 (greedy) or a positive number")
    if top_k < 0:
        raise InputError(f"top_k {top_k}: must be 0 (off) or the number of tokens to keep")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p {top_p}: must be above 0 and at most 1 (off)")
    if not 0 <= min_p <= 1:
        raise InputError(f"min_p {min_p}: must be 0 (off) to 1 (only the likeliest token)")
    if not 0 < repetition_penalty < math.inf:
        raise InputError(f"repetition_penalty {repetition_penalty}: must be a positive number; "
                         "1 is off")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens {max_new_tokens}: must be at least 1")


def _draw(probs: Tensor, uniforms: Tensor, top_p: float, min_p: float) -> Tensor:
    """Inverse CDF: the first index whose cumulated mass exceeds uniform x total mass, (n,).

    With top_p < 1 the rows of `probs` are sorted, and the total is the mass of the nucleus: the
    fewest likeliest tokens that together reach top_p. min_p leaves out the tokens that are less
    likely than min_p times the likeliest; of sorted ones those are the last, so that both filters
    together are the stricter one.
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
    """The same, first among blocks, then in one: a sum of a vocabulary is faster than its CDF."""
    short = -probs.shape[-1] % CDF_BLOCK
    blocks = (F.pad(probs, (0, short)) if short else probs).unflatten(-1, (-1, CDF_BLOCK))
    outer = blocks.sum(-1).cumsum(-1, dtype=torch.float64)  # (n, blocks)
    wanted = uniforms[:, None] * outer[:, -1:]
    block = torch.searchsorted(outer, wanted, right=True)
    wanted = wanted - F.pad(outer, (1, 0)).gather(-1, block)
    own = blocks[torch.arange(len(blocks), device=probs.device), block[:, 0]]  # (n, CDF_BLOCK)
    inner = own.cumsum(-1, dtype=torch.float64)
    # Summed in another order, the block may end a bit lower: the last token with any mass, then.
    below = torch.nextafter(inner[:, -1:], torch.zeros_like(wanted))
    at = torch.searchsorted(inner, torch.minimum(wanted, below), right=True)
    return (block * CDF_BLOCK + at)[:, 0]


def pick(logits: Tensor, uniforms: Tensor, temperature: float = 0.0, top_k: int = 0,
         top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """One token of every row: argmax at temperature 0, else the inverse CDF at the row's uniform.

    Args: logits (n, V) float32; uniforms (n,) float64, k / 2^32. The filters are those of
    transformers, in its order: temperature, top_k, top_p, min_p.
    Returns (n,) int64. A row's token depends on that row alone.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # The maximum goes first: a tiny temperature must not make inf - inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k)
        return ids.gather(-1, _draw(logits.softmax(-1), uniforms, top_p, min_p)[:, None])[:, 0]
    probs = logits.softmax(-1)
    if top_p == 1:
        return _draw(probs, uniforms, 1.0, min_p)
    head, ids = probs.topk(min(NUCLEUS, probs.shape[-1]))
    token = ids.gather(-1, _draw(head, uniforms, top_p, min_p)[:, None])[:, 0]
    for row in (head.sum(-1, dtype=torch.float64) < top_p).nonzero()[:, 0].tolist():
        full, ids = probs[row].sort(descending=True, stable=True)  # a flat row: rare
        token[row] = ids[_draw(full[None], uniforms[row : row + 1], top_p, min_p)[0]]
    return token


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """The repetition penalty of CTRL (arXiv 1909.05858, §4.1) as transformers has it.

    Args: logits (n, V); seen (n, V) bool, the tokens of the prompt and of the completion so far.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


class StopStrings:
    """Which texts hold one of `strings`; most tokens are ruled out by a table.

    A token can only complete a stop string when it holds the last character of one. Tokens that
    are parts of a character decode to U+FFFD alone, and are never ruled out.
    """

    def __init__(self, strings: Sequence[str], decode: Callable[[Sequence[int]], str],
                 vocab_size: int, device: torch.device) -> None:
        if "" in strings:
            raise InputError("stop_strings: an empty string stands in every text")
        self.strings, self.decode = strings, decode
        last = {string[-1] for string in strings}
        # Some decoders drop the space that a text begins with, hence the one in front.
        self.suspect = torch.tensor([bool(last & set(" " + text)) or "\ufffd" in text
                                     for text in (decode([i]) for i in range(vocab_size))],
                                    device=device)  # (V,)

    def end(self, ids: Sequence[int]) -> bool:
        text = self.decode(ids)
        return any(string in text for string in self.strings)


class _Slots:
    """The rows in flight: their cache slots, and everything a decoding step needs, a row each."""

    def __init__(self, model: Decoder, size: int, max_length: int, max_new_tokens: int,
                 prefix: Sequence[int], repetition_penalty: float, return_logps: bool) -> None:
        device = model.head_weight.device
        self.model, self.size, self.prefix = model, size, len(prefix)
        self.penalty, self.return_logps = repetition_penalty, return_logps
        self.requests: list[Request] = []
        size = -(-size // ROW_MULTIPLE) * ROW_MULTIPLE
        self.cache = KVCache(model.config, size, max_length, model.compute_dtype, device)
        self.tokens = torch.zeros(size, dtype=torch.int64, device=device)  # fed next
        self.steps = torch.zeros(size, dtype=torch.int64, device=device)  # generated
        self.output = torch.zeros(size, max_new_tokens, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(size, max_new_tokens, dtype=torch.float64, device=device)
        self.logps = torch.zeros(size, max_new_tokens if return_logps else 0, device=device)
        vocabulary = model.config.vocab_size if repetition_penalty != 1 else 0
        self.seen = torch.zeros(size, vocabulary, dtype=torch.bool, device=device)
        self.index = torch.arange(size, device=device)
        if prefix:
            self._prefill([prefix], 0, 0)
            for row in range(1, size):
                self.cache.copy(0, row, 0, len(prefix))
            self.cache.lengths.fill_(len(prefix))

    def _prefill(self, sequences: list[Sequence[int]], row: int, start: int) -> None:
        """Write tokens `start` and later of every sequence to the cache slots from `row` on.

        A long prompt is read in parts, so that its activations stay small.
        """
        device = self.tokens.device
        budget = PREFILL_TOKENS.get(device.type, PREFILL_TOKENS["cuda"])
        group = 1
        if device.type == "cuda" and sequences:
            group = max(1, budget // (max(map(len, sequences)) + 1))
        for at in range(0, len(sequences), group):
            part = sequences[at : at + group]
            width = max(map(len, part)) - start
            ids = [[*s[start:], *[0] * (width + start - len(s))] for s in part]
            for tokens in torch.tensor(ids, device=device).split(budget, 1) if width else ():
                self.model.hidden(tokens, cache=self.cache,
                                  rows=slice(row + at, row + at + len(part)))

    def admit(self, requests: Sequence[Request]) -> None:
        """Put each request behind the active rows, with all but its last prompt token cached."""
        n = len(self.requests)
        holders = {tuple(r.prompt_ids): row for row, r in enumerate(self.requests)}
        fresh, copies = [], []
        for request in requests:
            if tuple(request.prompt_ids) in holders:
                copies.append(request)
            else:
                holders[tuple(request.prompt_ids)] = n + len(fresh)
                fresh.append(request)
        self._prefill([r.prompt_ids[:-1] for r in fresh], n, self.prefix)
        for row, request in enumerate(fresh + copies, n):
            length = len(request.prompt_ids) - 1
            if (source := holders[tuple(request.prompt_ids)]) != row:
                self.cache.copy(source, row, self.prefix, length)
            self.tokens[row] = request.prompt_ids[-1]
            self.cache.lengths[row] = length
            self.steps[row] = 0
            # Raw Philox words: unlike numpy's distributions, their stream never changes.
            words = np.random.Philox(key=request.seed).random_raw(self.uniforms.shape[1])
            self.uniforms[row] = torch.from_numpy((words >> 32) / 2.0**32)
            if self.penalty != 1:
                self.seen[row] = False
                self.seen[row, list(request.prompt_ids)] = True
            self.requests.append(request)

    def step(self, stop: Tensor, strings: StopStrings | None,
             **sampling: float) -> list[tuple[Request, Result]]:
        """Decode one token in every active row; the rows that ended leave. `stop` is (V,) bool."""
        n = len(self.requests)
        m = -(-n // ROW_MULTIPLE) * ROW_MULTIPLE
        hidden = self.model.hidden(self.tokens[:m, None], cache=self.cache)[:, 0]  # (m, D)
        self.cache.lengths[n:] = self.prefix  # the filler rows write one free position, always
        if not hidden.isfinite().all():
            raise InputError("the model's activations are not finite: the checkpoint is broken, or "
                             "overflows in this dtype")
        logits = self.model.logits(hidden)[:n]  # (n, V)
        index, steps = self.index[:n], self.steps[:n]
        wanted = penalise(logits, self.seen[:n], self.penalty) if self.penalty != 1 else logits
        token = pick(wanted, self.uniforms[index, steps], **sampling)
        if self.penalty != 1:
            self.seen[index, token] = True
        if self.return_logps:
            self.logps[index, steps] = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        self.output[index, steps] = token
        self.tokens[:n] = token
        self.steps[:n] += 1
        stopped, full = stop[token], self.steps[:n] == self.output.shape[1]
        looked_at = stopped | full
        if strings is not None:
            looked_at = looked_at | strings.suspect[token]
        done = []
        for row in reversed(looked_at.nonzero()[:, 0].tolist()):
            finished, length = bool(stopped[row]), int(self.steps[row])
            ids = self.output[row, : length - finished].tolist()
            if strings is not None and not finished:
                finished = strings.end(ids)
            if finished or full[row]:
                logps = self.logps[row, :length].tolist() if self.return_logps else None
                done.append((self.requests[row], Result(ids, finished, logps)))
                self._leave(row)
        return done

    def _leave(self, row: int) -> None:
        """Free a row; the last active row moves into the gap."""
        last = len(self.requests) - 1
        if row != last:
            self.cache.copy(last, row, self.prefix, int(self.cache.lengths[last]))
            for state in (self.cache.lengths, self.tokens, self.steps, self.output, self.uniforms,
                          self.logps, self.seen):
                state[row] = state[last]
            self.requests[row] = self.requests[last]
        self.cache.lengths[last] = self.prefix
        self.steps[last] = 0
        self.requests.pop()


def slots_that_fit(model: Decoder, length: int, cache_bytes: int) -> int:
    """Cache slots of `length` tokens in `cache_bytes`; a multiple of ROW_MULTIPLE is allocated."""
    config, width = model.config, model.compute_dtype.itemsize
    positions = -(-length // STRIDE) * STRIDE
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * width
    slot = token * positions
    slots = cache_bytes // (slot * ROW_MULTIPLE) * ROW_MULTIPLE
    if slots < 1:
        raise InputError(f"a cache of {cache_bytes / 2**30:.2f} GiB has no room for {ROW_MULTIPLE} "
                         f"sequences of {length} tokens, which take {slot * ROW_MULTIPLE / 2**30:.2f} "
                         "GiB; raise --max_cache_memory or lower --max_new_tokens")
    return slots


@torch.inference_mode()
def generate(model: Decoder, requests: Sequence[Request], *, stop_ids: Collection[int],
             max_new_tokens: int, slots: int = 32, cache_bytes: int | None = None,
             temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0,
             repetition_penalty: float = 1.0, stop_strings: Sequence[str] = (),
             decode: Callable[[Sequence[int]], str] | None = None,
             return_logps: bool = False, prefix: int | None = None,
             on_finish: Callable[[Request, Result], None] | None = None,
             should_stop: Callable[[], bool] = lambda: False) -> dict[Hashable, Result]:
    """Complete every request; `on_finish` is called as each one ends.

    When `should_stop` is true, asked at every step, those that have ended until then are all.

    `stop_strings` end a text as soon as `decode` (token ids -> text) shows one in the completion.
    `cache_bytes` bounds the cache: as many slots as fit, each as long as the longest request, so that
    no row ever has to give way. `prefix`: how many tokens all prompts share (`shared_prefix`, which is
    the default). Whoever runs part of a larger set passes the larger set's number, so that the sums
    keep their order.
    Raises InputError for bad sampling settings, an empty prompt, a request that would outgrow the
    model's context, and a cache without room for one slot.
    """
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens)
    context = model.config.max_position_embeddings
    for request in requests:
        if not request.prompt_ids:
            raise InputError(f"{request.key}: the prompt has no tokens")
        if len(request.prompt_ids) + max_new_tokens > context:
            raise InputError(f"{request.key}: {len(request.prompt_ids)} prompt tokens and "
                             f"max_new_tokens {max_new_tokens} exceed the model's {context} "
                             "positions; lower max_new_tokens or drop the question")
    results: dict[Hashable, Result] = {}
    if not requests:
        return results
    if prefix is None:
        prefix = shared_prefix([r.prompt_ids for r in requests])
    queue = deque(sorted(requests, key=lambda r: (-len(r.prompt_ids), tuple(r.prompt_ids))))
    length = len(queue[0].prompt_ids) + max_new_tokens
    slots = min(slots, len(requests))
    if cache_bytes is not None:
        slots = min(slots, slots_that_fit(model, length, cache_bytes))
    stop = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=model.head_weight.device)
    stop[[i for i in stop_ids if i < len(stop)]] = True
    strings = None
    if stop_strings:
        if decode is None:
            raise ValueError("stop_strings need `decode`, which turns token ids into text")
        strings = StopStrings(stop_strings, decode, len(stop), stop.device)
    # On a GPU a prefill costs its kernel launches, so several are done at once.
    refill = max(1, slots // 8) if stop.device.type == "cuda" else 1
    training = model.training
    model.eval()
    rows = _Slots(model, slots, length, max_new_tokens,
                  queue[0].prompt_ids[:prefix], repetition_penalty, return_logps)
    while (queue or rows.requests) and not should_stop():
        free = slots - len(rows.requests)
        if queue and (free >= refill or free == slots):
            rows.admit([queue.popleft() for _ in range(min(free, len(queue)))])
        for request, result in rows.step(stop, strings, temperature=temperature, top_k=top_k,
                                         top_p=top_p, min_p=min_p):
            results[request.key] = result
            if on_finish is not None:
                on_finish(request, result)
    model.train(training)
    return results
