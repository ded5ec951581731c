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
from torch import Tensor

from srit.models import Decoder
from srit.models.cache import KVCache
from srit.models.files import InputError

ROW_MULTIPLE = 8
NUCLEUS = 256  # likeliest tokens looked at before a row's whole vocabulary is sorted for top_p
PREFILL_TOKENS = 16384  # of one prefill on a GPU


@dataclass(frozen=True)
class Request:
    """One completion to write; with the model, `seed` (see `request_seed`) determines it."""

    key: Hashable
    prompt_ids: Sequence[int]
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Generated tokens without the stop token; `finished`: a stop token ended them."""

    ids: list[int]
    finished: bool


def request_seed(*parts: Any) -> int:
    """A 64-bit seed from (seed, question id, sample index, ...), the same on every machine."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, leaving each at least one token of its own."""
    first, last = min(prompts), max(prompts)  # in lexicographic order: others share what they do
    own = min(map(len, prompts)) - 1
    return next((at for at in range(own) if first[at] != last[at]), own)


def check_sampling(temperature: float, top_k: int, top_p: float, max_new_tokens: int) -> None:
    """Raise InputError for a setting without meaning."""
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature {temperature}: must be 0 (greedy) or a positive number")
    if top_k < 0:
        raise InputError(f"top_k {top_k}: must be 0 (off) or the number of tokens to keep")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p {top_p}: must be above 0 and at most 1 (off)")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens {max_new_tokens}: must be at least 1")


def _draw(probs: Tensor, uniforms: Tensor, top_p: float) -> Tensor:
    """Inverse CDF: the first index whose cumulated mass exceeds uniform x total mass, (n,).

    With top_p < 1 the rows of `probs` are sorted, and the total is the mass of the nucleus: the
    fewest likeliest tokens that together reach top_p.
    """
    cdf = probs.cumsum(-1, dtype=torch.float64)
    mass = cdf[:, -1:]
    if top_p < 1:
        mass = cdf.gather(-1, (cdf[:, :-1] < top_p).sum(-1, keepdim=True))
    return torch.searchsorted(cdf, uniforms[:, None] * mass, right=True)[:, 0]


def pick(logits: Tensor, uniforms: Tensor, temperature: float = 0.0, top_k: int = 0,
         top_p: float = 1.0) -> Tensor:
    """One token of every row: argmax at temperature 0, else the inverse CDF at the row's uniform.

    Args: logits (n, V) float32; uniforms (n,) float64, k / 2^32. top_k is applied before top_p.
    Returns (n,) int64. A row's token depends on that row alone.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # The maximum goes first: a tiny temperature must not make inf - inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k)
        return ids.gather(-1, _draw(logits.softmax(-1), uniforms, top_p)[:, None])[:, 0]
    probs = logits.softmax(-1)
    if top_p == 1:
        return _draw(probs, uniforms, 1.0)
    head, ids = probs.topk(min(NUCLEUS, probs.shape[-1]))
    token = ids.gather(-1, _draw(head, uniforms, top_p)[:, None])[:, 0]
    for row in (head.sum(-1, dtype=torch.float64) < top_p).nonzero()[:, 0].tolist():
        full, ids = probs[row].sort(descending=True, stable=True)  # a flat row: rare
        token[row] = ids[_draw(full[None], uniforms[row : row + 1], top_p)[0]]
    return token


class _Slots:
    """The rows in flight: their cache slots, and everything a decoding step needs, a row each."""

    def __init__(self, model: Decoder, size: int, max_length: int, max_new_tokens: int,
                 prefix: Sequence[int]) -> None:
        device = model.head_weight.device
        self.model, self.size, self.prefix = model, size, len(prefix)
        self.requests: list[Request] = []
        size = -(-size // ROW_MULTIPLE) * ROW_MULTIPLE
        self.cache = KVCache(model.config, size, max_length, model.compute_dtype, device)
        self.tokens = torch.zeros(size, dtype=torch.int64, device=device)  # fed next
        self.steps = torch.zeros(size, dtype=torch.int64, device=device)  # generated
        self.output = torch.zeros(size, max_new_tokens, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(size, max_new_tokens, dtype=torch.float64, device=device)
        self.index = torch.arange(size, device=device)
        if prefix:
            self._prefill([prefix], 0, 0)
            for row in range(1, size):
                self.cache.copy(0, row, 0, len(prefix))
            self.cache.lengths.fill_(len(prefix))

    def _prefill(self, sequences: list[Sequence[int]], row: int, start: int) -> None:
        """Write tokens `start` and later of every sequence to the cache slots from `row` on."""
        device = self.tokens.device
        group = 1
        if device.type == "cuda" and sequences:
            group = max(1, PREFILL_TOKENS // (max(map(len, sequences)) + 1))
        for at in range(0, len(sequences), group):
            part = sequences[at : at + group]
            width = max(map(len, part)) - start
            if width == 0:
                continue
            ids = [[*s[start:], *[0] * (width + start - len(s))] for s in part]
            self.model.hidden(torch.tensor(ids, device=device), cache=self.cache,
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
            self.requests.append(request)

    def step(self, stop: Tensor, **sampling: float) -> list[tuple[Request, Result]]:
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
        token = pick(logits, self.uniforms[index, steps], **sampling)
        self.output[index, steps] = token
        self.tokens[:n] = token
        self.steps[:n] += 1
        stopped = stop[token]
        ended = (stopped | (self.steps[:n] == self.output.shape[1])).nonzero()[:, 0].tolist()
        done = []
        for row in reversed(ended):
            finished = bool(stopped[row])
            ids = self.output[row, : int(self.steps[row]) - finished].tolist()
            done.append((self.requests[row], Result(ids, finished)))
            self._leave(row)
        return done

    def _leave(self, row: int) -> None:
        """Free a row; the last active row moves into the gap."""
        last = len(self.requests) - 1
        if row != last:
            self.cache.copy(last, row, self.prefix, int(self.cache.lengths[last]))
            for state in (self.cache.lengths, self.tokens, self.steps, self.output, self.uniforms):
                state[row] = state[last]
            self.requests[row] = self.requests[last]
        self.cache.lengths[last] = self.prefix
        self.steps[last] = 0
        self.requests.pop()


@torch.inference_mode()
def generate(model: Decoder, requests: Sequence[Request], *, stop_ids: Collection[int],
             max_new_tokens: int, slots: int = 32, temperature: float = 0.0, top_p: float = 1.0,
             top_k: int = 0, prefix: int | None = None,
             on_finish: Callable[[Request, Result], None] | None = None,
             ) -> dict[Hashable, Result]:
    """Complete every request; `on_finish` is called as each one ends.

    `prefix`: how many tokens all prompts share (`shared_prefix`, which is the default). Whoever
    runs part of a larger set passes the larger set's number, so that the sums keep their order.
    Raises InputError for bad sampling settings, an empty prompt, and a request that would outgrow
    the model's context.
    """
    check_sampling(temperature, top_k, top_p, max_new_tokens)
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
    slots = min(slots, len(requests))
    stop = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=model.head_weight.device)
    stop[[i for i in stop_ids if i < len(stop)]] = True
    # On a GPU a prefill costs its kernel launches, so several are done at once.
    refill = max(1, slots // 8) if stop.device.type == "cuda" else 1
    training = model.training
    model.eval()
    rows = _Slots(model, slots, len(queue[0].prompt_ids) + max_new_tokens, max_new_tokens,
                  queue[0].prompt_ids[:prefix])
    while queue or rows.requests:
        free = slots - len(rows.requests)
        if queue and (free >= refill or free == slots):
            rows.admit([queue.popleft() for _ in range(min(free, len(queue)))])
        for request, result in rows.step(stop, temperature=temperature, top_k=top_k, top_p=top_p):
            results[request.key] = result
            if on_finish is not None:
                on_finish(request, result)
    model.train(training)
    return results
