"""Continuous batching: many prompts, few rows, and every text independent of its neighbours.

A number of rows decode together. One that ends makes room for the next request at once, so the batch
stays full until the queue is empty; the last row takes the gap's number, so the active rows are always
0 to n - 1. Their keys and values lie in pages (models/paged.py), which a row takes as it grows.

- A prompt is prefilled once, into a staging slot, and copied to pages that all its samples read. What
  all prompts begin with stays in the staging slot for good, and on a CPU so does what the next prompt
  has in common with this one (`Request.shared`: the two prompt styles of a question).
- A request is admitted when there are pages for it and one more for each row. When they run out
  nevertheless, the last to be admitted gives way and starts again later.
- Prompts run longest first: rows that decode together have similar lengths, and too little memory
  shows at the start.
- The last prompt token is not part of the prefill: it is the first token that the row decodes. So
  one place turns hidden states into tokens, and only last positions ever reach the head.
- Randomness is one uniform for each (request, position), drawn from the request's own seed when it
  is admitted. On CPU prompts are prefilled one by one and the decoded batch is rounded up to a
  multiple of 8 rows: then the kernels sum in the same order whoever the neighbours are, and a
  resumed or re-ordered run writes the same texts (in bfloat16 with packed weights, as sample and eval
  have them).

Legend: n active rows, m rows computed (n rounded up), T prompt tokens, D model, V vocabulary.
"""

import hashlib
import itertools
import json
import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from srit.models import Decoder
from srit.models.cache import KVCache
from srit.models.paged_cache import SPARE_PAGES, PagedCache, Prompt, page_bytes, pages_for
from srit.runtime.files import InputError

ROW_MULTIPLE = 8
CDF_BLOCK = 256
NUCLEUS = 256  # likeliest tokens looked at before a row's whole vocabulary is sorted for top_p
SEATS = 8  # rows that read one copy of a prompt at most
PREFILL_TOKENS = {"cuda": 16384, "cpu": 2048}  # of one forward pass of a prefill
# Rows of one draw: what a CPU gives back after large tensors, it must fault in again.
DRAW_ROWS = {"cuda": 4096, "cpu": 16}


@dataclass(frozen=True)
class Request:
    """One completion to write; with the model, `seed` (see `request_seed`) determines it."""

    key: Hashable
    prompt_ids: Sequence[int]
    seed: int = 0
    shared: int = 0  # leading tokens that other prompts have too, computed once while at hand


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
    logits = (logits - logits.amax(-1, keepdim=True)).div_(temperature)
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


class _Rows:
    """The requests in flight, a row each: their pages, and everything a decoding step needs."""

    def __init__(self, model: Decoder, size: int, pages: int, seats: int, staging: KVCache,
                 max_new_tokens: int, prefix: Sequence[int], repetition_penalty: float,
                 return_logps: bool) -> None:
        device = model.head_weight.device
        self.model, self.size, self.staging, self.prefix = model, size, staging, len(prefix)
        self.penalty, self.return_logps = repetition_penalty, return_logps
        self.requests: list[Request] = []
        self.turns: list[int] = []  # the order in which they were admitted
        self.clock = itertools.count()
        self.prompts: dict[tuple[int, ...], Prompt] = {}  # in the cache
        self.staged: tuple[int, ...] = ()  # `Request.shared` tokens that staging slot 0 holds
        size = -(-size // ROW_MULTIPLE) * ROW_MULTIPLE
        self.cache = PagedCache(model.config, pages, size, seats, model.compute_dtype, device)
        self.tokens = torch.zeros(size, dtype=torch.int64, device=device)  # fed next
        self.steps = torch.zeros(size, dtype=torch.int64, device=device)  # generated
        self.output = torch.zeros(size, max_new_tokens, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(size, max_new_tokens, dtype=torch.float64, device=device)
        self.logps = torch.zeros(size, max_new_tokens if return_logps else 0, device=device)
        vocabulary = model.config.vocab_size if repetition_penalty != 1 else 0
        self.seen = torch.zeros(size, vocabulary, dtype=torch.bool, device=device)
        self.index = torch.arange(size, device=device)
        self._read([prefix], 0)
        for slot in range(1, len(staging.lengths)):
            staging.copy(0, slot, 0, len(prefix))

    def admit(self, queue: deque[Request]) -> None:
        """Start the first requests of the queue, as many as there are rows and pages for.

        A page is left for each row: the next one that it will ask for.
        """
        free, seats = self.cache.free - len(self.requests), Counter()
        admitted: list[tuple[Request, bool]] = []  # and whether its prompt is to be read
        while queue and len(self.requests) + len(admitted) < self.size:
            ids = tuple(queue[0].prompt_ids)
            if ids in self.prompts and ids not in seats:
                seats[ids] = self.prompts[ids].free_seats
            new = seats[ids] == 0
            free -= 1 + (pages_for(len(ids) - 1) if new else 0)
            if free < 0:
                break
            seats[ids] += (self.cache.seats if new else 0) - 1
            admitted.append((queue.popleft(), new))
        unread, staged = deque(request for request, new in admitted if new), deque()
        for request, new in admitted:
            ids = tuple(request.prompt_ids)
            if new and not staged:
                group = min(len(unread), len(self.staging.lengths))
                self._prefill([unread.popleft() for _ in range(group)])
                staged.extend(range(group))
            if new:
                self.prompts[ids] = self.cache.add_prompt(self.staging, staged.popleft(), len(ids) - 1)
            self._start(request)

    def _prefill(self, requests: list[Request]) -> None:
        """Write all but the last token of each prompt to the staging slots, one a slot."""
        prompts = [tuple(r.prompt_ids[:-1]) for r in requests]
        start, head = self.prefix, ()
        if len(self.staging.lengths) == 1 and requests[0].shared > start:
            head = prompts[0][: requests[0].shared]
            if self.staged != head:
                self._read([head], start)
            start = len(head)
        self.staged = head
        self._read(prompts, start)

    def _read(self, sequences: list[Sequence[int]], start: int) -> None:
        """Write tokens `start` and later of every sequence to the staging slots, from the first on.

        A long prompt is read in parts, so that its activations stay small.
        """
        device = self.tokens.device
        width = max(map(len, sequences)) - start
        ids = [[*s[start:], *[0] * (width + start - len(s))] for s in sequences]
        self.staging.lengths.fill_(start)
        parts = torch.tensor(ids, device=device).split(_for_device(PREFILL_TOKENS, device), 1)
        for tokens in parts if width else ():
            self.model.hidden(tokens, cache=self.staging)

    def _start(self, request: Request) -> None:
        """Put a request behind the active rows; its prompt is in the cache."""
        row, ids = len(self.requests), tuple(request.prompt_ids)
        self.cache.add_row(self.prompts[ids])
        self.tokens[row] = ids[-1]
        self.steps[row] = 0
        # Raw Philox words: unlike numpy's distributions, their stream never changes.
        words = np.random.Philox(key=request.seed).random_raw(self.uniforms.shape[1])
        self.uniforms[row] = torch.from_numpy((words >> 32) / 2.0**32)
        if self.penalty != 1:
            self.seen[row] = False
            self.seen[row, list(ids)] = True
        self.requests.append(request)
        self.turns.append(next(self.clock))

    def make_room(self, queue: deque[Request]) -> None:
        """Give every row the page it needs; if they run out, the last to be admitted give way.

        They go back to the front of the queue and start again: with their seeds they write the same.
        """
        while self.cache.need() > self.cache.free:
            row = self.turns.index(max(self.turns))
            queue.appendleft(self.requests[row])
            self._leave(row)
        self.cache.grow()

    def step(self, stop: Tensor, strings: StopStrings | None,
             **sampling: float) -> list[tuple[Request, Result]]:
        """Decode one token in every active row; the rows that ended leave. `stop` is (V,) bool."""
        n = len(self.requests)
        m = -(-n // ROW_MULTIPLE) * ROW_MULTIPLE
        hidden = self.model.hidden(self.tokens[:m, None], cache=self.cache)[:, 0]  # (m, D)
        if not hidden.isfinite().all():
            raise InputError("the model's activations are not finite: the checkpoint is broken, or "
                             "overflows in this dtype")
        logits = self.model.logits(hidden)[:n]  # (n, V)
        index, steps = self.index[:n], self.steps[:n]
        wanted = penalise(logits, self.seen[:n], self.penalty) if self.penalty != 1 else logits
        parts = _for_device(DRAW_ROWS, hidden.device)
        draws = zip(wanted.split(parts), self.uniforms[index, steps].split(parts), strict=True)
        token = torch.cat([pick(*draw, **sampling) for draw in draws])
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
        last, prompt = len(self.requests) - 1, self.cache.rows[row].prompt
        ids = tuple(self.requests[row].prompt_ids)
        self.cache.remove_row(row)
        if self.prompts.get(ids) is prompt and prompt.free_seats == self.cache.seats:
            del self.prompts[ids]
        if row != last:
            for state in (self.tokens, self.steps, self.output, self.uniforms, self.logps, self.seen):
                state[row] = state[last]
            self.requests[row], self.turns[row] = self.requests[last], self.turns[last]
        self.requests.pop()
        self.turns.pop()


def pages_that_fit(model: Decoder, staging: KVCache, longest: int, max_new_tokens: int,
                   cache_bytes: int) -> int:
    """Pages that `cache_bytes` has beside the staging slots; InputError if a row would not fit."""
    one = page_bytes(model.config, model.compute_dtype)
    beside = sum(tensor.nbytes for tensor in (*staging.keys, *staging.values))
    least = SPARE_PAGES + pages_for(longest - 1) + pages_for(max_new_tokens)
    pages = (cache_bytes - beside) // one
    if pages < least:
        raise InputError(f"a cache of {cache_bytes / 2**30:.2f} GiB has no room for a sequence of "
                         f"{longest + max_new_tokens} tokens, which takes "
                         f"{(least * one + beside) / 2**30:.2f} GiB; raise --max_cache_memory or lower "
                         "--max_new_tokens")
    return pages


def _order(request: Request) -> tuple:
    """Longest prompts first, those that begin alike together."""
    ids = tuple(request.prompt_ids)
    head = ids[: request.shared] if request.shared else ids
    return -len(head), head, -len(ids), ids


def _for_device(sizes: dict[str, int], device: torch.device) -> int:
    return sizes.get(device.type, sizes["cuda"])


@torch.inference_mode()
def generate(model: Decoder, requests: Sequence[Request], *, stop_ids: Collection[int],
             max_new_tokens: int, slots: int = 32, cache_bytes: int | None = None,
             temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0,
             repetition_penalty: float = 1.0, stop_strings: Sequence[str] = (),
             decode: Callable[[Sequence[int]], str] | None = None,
             return_logps: bool = False, prefix: int | None = None, samples: int | None = None,
             on_finish: Callable[[Request, Result], None] | None = None,
             should_stop: Callable[[], bool] = lambda: False) -> dict[Hashable, Result]:
    """Complete every request; `on_finish` is called as each one ends.

    When `should_stop` is true, asked at every step, those that have ended until then are all.

    `stop_strings` end a text as soon as `decode` (token ids -> text) shows one in the completion.
    `cache_bytes` bounds the cache. Rows take pages as they grow; when none is left, the last to be
    admitted gives way and starts again later. `prefix`: how many tokens all prompts begin with
    (`shared_prefix`, which is the default); `samples`: how many requests read one copy of a
    prompt (by default all that have it, SEATS at most). Whoever runs part of a larger set passes
    the larger set's numbers, so that the sums keep their order.
    Raises InputError for bad sampling settings, an empty prompt, a request that would outgrow the
    model's context, and a cache without room for the longest one.
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
    queue = deque(sorted(requests, key=_order))
    slots = min(slots, len(requests))
    device = model.head_weight.device
    # On a GPU a prefill costs its kernel launches, so several are done at once.
    refill = max(1, slots // 8) if device.type == "cuda" else 1
    longest = max(len(r.prompt_ids) for r in requests)
    group = min(refill, max(1, _for_device(PREFILL_TOKENS, device) // longest))
    staging = KVCache(model.config, group, longest, model.compute_dtype, device)
    if samples is None:
        samples = max(Counter(tuple(r.prompt_ids) for r in requests).values())
    pages = SPARE_PAGES + slots * (pages_for(longest - 1) + pages_for(max_new_tokens))
    if cache_bytes is not None:
        pages = min(pages, pages_that_fit(model, staging, longest, max_new_tokens, cache_bytes))
    stop = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
    stop[[i for i in stop_ids if i < len(stop)]] = True
    strings = None
    if stop_strings:
        if decode is None:
            raise ValueError("stop_strings need `decode`, which turns token ids into text")
        strings = StopStrings(stop_strings, decode, len(stop), stop.device)
    training = model.training
    model.eval()
    rows = _Rows(model, slots, pages, min(samples, SEATS), staging, max_new_tokens,
                 queue[0].prompt_ids[:prefix], repetition_penalty, return_logps)
    while (queue or rows.requests) and not should_stop():
        free = slots - len(rows.requests)
        if queue and (free >= refill or free == slots):
            rows.admit(queue)
        rows.make_room(queue)
        for request, result in rows.step(stop, strings, temperature=temperature, top_k=top_k,
                                         top_p=top_p, min_p=min_p):
            results[request.key] = result
            if on_finish is not None:
                on_finish(request, result)
    model.train(training)
    return results
