"""Continuous batching: requests wait in a queue, and up to `slots` of them decode together.

When a row finishes, the last active row moves into its slot, so the active rows are always 0 to n - 1,
and the next request is admitted at once. Keys and values lie in pages (models/paged_cache.py), which a
row takes as it grows.

- A prompt is prefilled once, in a staging cache, and copied to pages that all its samples read. The
  prefix of all prompts stays in the staging cache for the whole run; on a CPU, so do the tokens that a
  prompt shares with the next one (`Request.shared`: the two prompt styles of a question).
- A request is admitted when there are pages for it and one more for each active row. When pages run
  out nevertheless, the row admitted last is preempted, and its request starts again later.
- Longest prompts run first: rows that decode together have similar lengths, and a cache that is too
  small shows at the start.
- The last prompt token is not prefilled: it is the first token that the row decodes. So there is one
  place where hidden states become tokens, and only last positions ever reach the head.
- Randomness is one uniform per (request, position), drawn from the request's own seed when it is
  admitted. On a CPU, prompts are prefilled one by one and a decode step is padded to a multiple of 8
  rows: the kernels then sum in the same order whatever else is in the batch, and a resumed or reordered
  run writes the same texts (in bfloat16 with packed weights, which sample and eval use). On CPUs with
  AMX the order of a bfloat16 product depends on its number of rows, so there a step always has 128.

Legend: n active rows, m rows computed (see above), T prompt tokens, D model, V vocabulary.
"""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Sequence

import numpy as np
import torch

from srit.data.batches import shared_prefix
from srit.generation.calculator import Calculator, Forced
from srit.generation.params import Request, Result, SamplingParams
from srit.generation.sampler import StopStrings, sample
from srit.models import Decoder
from srit.models.cache import KVCache
from srit.models.paged_cache import RESERVED_PAGES, CachedPrompt, PagedCache, page_bytes, pages_for
from srit.runtime.files import InputError

ROW_MULTIPLE = 8
AMX_ROWS = 128
MAX_READERS = 8  # rows that read one copy of a prompt
PREFILL_TOKENS = {"cuda": 16384, "cpu": 2048}  # in one forward pass


@torch.inference_mode()
def generate(model: Decoder, requests: Sequence[Request], params: SamplingParams, *,
             stop_ids: Collection[int], decode: Callable[[Sequence[int]], str] | None = None,
             encode: Callable[[str], list[int]] | None = None,
             slots: int = 32, cache_bytes: int | None = None, prefix: int | None = None,
             readers_per_prompt: int | None = None,
             on_finish: Callable[[Request, Result], None] = lambda request, result: None,
             should_stop: Callable[[], bool] = lambda: False) -> dict[Hashable, Result]:
    """Complete every request; returns the results by `Request.key`.

    Args:
        stop_ids: tokens that end a completion. decode: token ids -> text, needed for stop strings and
        the calculator. encode: text -> token ids, needed for the calculator.
        slots: rows that decode together (on CPUs with AMX in bfloat16 at most 128). cache_bytes: bound
        of the cache, which may mean fewer rows.
        prefix: tokens that all prompts begin with, `shared_prefix` by default. readers_per_prompt:
        rows that share one copy of a prompt, by default the most requests with the same prompt, and
        MAX_READERS at most. Whoever runs part of a larger set passes the larger set's numbers for these
        two, so that sums keep their order.
        on_finish: called as each completion ends. should_stop: asked before every step; when true, the
        results so far are returned.
    Raises InputError for an empty prompt, a request longer than the model's context, a cache too small
    for the longest one, and activations that are not finite.
    """
    _check_requests(model, requests, params)
    results: dict[Hashable, Result] = {}
    if not requests:
        return results
    if params.stop_strings and decode is None:
        raise ValueError("stop_strings need `decode`, which turns token ids into text")
    if params.calculator and (decode is None or encode is None):
        raise ValueError("the calculator needs `decode` and `encode`, which turn token ids into text "
                         "and back")
    if prefix is None:
        prefix = shared_prefix([r.prompt_ids for r in requests])
    if readers_per_prompt is None:
        readers_per_prompt = max(Counter(tuple(r.prompt_ids) for r in requests).values())
    queue = deque(sorted(requests, key=_longest_first))
    device = model.head_weight.device
    amx = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    rows = AMX_ROWS if amx and model.compute_dtype == torch.bfloat16 else None
    slots = min(slots, len(requests), rows or slots)
    # On a GPU a prefill costs its kernel launches, so several prompts are prefilled together.
    refill = max(1, slots // 8) if device.type == "cuda" else 1
    longest = max(len(r.prompt_ids) for r in requests)
    staging = KVCache(model.config, min(refill, max(1, _prefill_tokens(device) // longest)), longest,
                      model.compute_dtype, device)
    pages = RESERVED_PAGES + slots * (pages_for(longest - 1) + pages_for(params.max_new_tokens))
    if cache_bytes is not None:
        pages = min(pages, _pages_that_fit(model, staging, longest, params.max_new_tokens, cache_bytes))
    training = model.training
    model.eval()
    batch = _DecodeBatch(model, params, slots, rows, pages, min(readers_per_prompt, MAX_READERS),
                         staging, queue[0].prompt_ids[:prefix], stop_ids, decode, encode)
    while (queue or batch.requests) and not should_stop():
        free = slots - len(batch.requests)
        if queue and (free >= refill or free == slots):
            batch.admit(queue)
        batch.allocate(queue)
        for request, result in batch.step():
            results[request.key] = result
            on_finish(request, result)
    model.train(training)
    return results


class _DecodeBatch:
    """The requests in flight, one per slot: their pages and all that a decode step needs."""

    def __init__(self, model: Decoder, params: SamplingParams, slots: int, fixed_rows: int | None,
                 pages: int, readers_per_prompt: int, staging: KVCache, prefix: Sequence[int],
                 stop_ids: Collection[int], decode: Callable[[Sequence[int]], str] | None,
                 encode: Callable[[str], list[int]] | None) -> None:
        device, V = model.head_weight.device, model.config.vocab_size
        self.model, self.params, self.slots, self.fixed_rows = model, params, slots, fixed_rows
        self.staging, self.staging_slots, self.prefix = staging, len(staging.lengths), len(prefix)
        self.requests: list[Request] = []
        self.admitted: list[int] = []  # in which order
        self.clock = itertools.count()
        self.prompts: dict[tuple[int, ...], CachedPrompt] = {}
        self.staged: tuple[int, ...] = ()  # the `Request.shared` tokens in the staging cache
        rows, length = fixed_rows or _round_up(slots), params.max_new_tokens
        self.cache = PagedCache(model.config, pages, rows, readers_per_prompt, model.compute_dtype,
                                device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)  # fed next
        self.steps = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens generated
        self.output = torch.zeros(rows, length, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(rows, length, dtype=torch.float64, device=device)
        self.logps = torch.zeros(rows, length if params.return_logps else 0, device=device)
        self.seen = torch.zeros(rows, V if params.repetition_penalty != 1 else 0, dtype=torch.bool,
                                device=device)
        self.index = torch.arange(rows, device=device)
        self.stop = torch.zeros(V, dtype=torch.bool, device=device)
        self.stop[[i for i in stop_ids if i < V]] = True
        self.stop_strings = None
        if params.stop_strings:
            self.stop_strings = StopStrings(params.stop_strings, decode, V, device)
        self.forced: list[Forced] = []
        self.calculator = Calculator(encode, decode, V, device) if params.calculator else None
        self._stage([prefix], 0)
        staging.fork(self.staging_slots, len(prefix))

    def admit(self, queue: deque[Request]) -> None:
        """Start the first requests of the queue, as many as there are slots and pages for.

        One page is left for each row: the next one that it will need.
        """
        free, readers = self.cache.free_pages - len(self.requests), Counter()
        admitted: list[tuple[Request, bool]] = []  # with whether its prompt is to be prefilled
        while queue and len(self.requests) + len(admitted) < self.slots:
            ids = tuple(queue[0].prompt_ids)
            if ids in self.prompts and ids not in readers:
                readers[ids] = self.prompts[ids].free_readers
            new = readers[ids] == 0
            free -= 1 + (pages_for(len(ids) - 1) if new else 0)
            if free < 0:
                break
            readers[ids] += (self.cache.readers_per_prompt if new else 0) - 1
            admitted.append((queue.popleft(), new))
        waiting, staged = deque(request for request, new in admitted if new), deque()
        for request, new in admitted:
            ids = tuple(request.prompt_ids)
            if new and not staged:
                group = min(len(waiting), self.staging_slots)
                self._prefill([waiting.popleft() for _ in range(group)])
                staged.extend(range(group))
            if new:
                self.prompts[ids] = self.cache.add_prompt(self.staging, staged.popleft(), len(ids) - 1)
            self._start(request)

    def _prefill(self, requests: list[Request]) -> None:
        """Write all but the last token of each prompt to the staging cache, one prompt per slot."""
        prompts = [tuple(r.prompt_ids[:-1]) for r in requests]
        start, head = self.prefix, ()
        if self.staging_slots == 1 and requests[0].shared > start:
            head = prompts[0][: requests[0].shared]
            if self.staged != head:
                self._stage([head], start)
            start = len(head)
        self.staged = head
        self._stage(prompts, start)

    def _stage(self, sequences: list[Sequence[int]], start: int) -> None:
        """Write the tokens from `start` on of each sequence to the first staging slots.

        A long prompt is prefilled in chunks, which bounds the memory of the activations.
        """
        device = self.tokens.device
        width = max(map(len, sequences)) - start
        ids = [[*s[start:], *[0] * (width + start - len(s))] for s in sequences]
        self.staging.set_length(start)
        chunks = torch.tensor(ids, device=device).split(_prefill_tokens(device), 1)
        for tokens in chunks if width else ():
            self.model.hidden(tokens, cache=self.staging)

    def _start(self, request: Request) -> None:
        """Add a request, whose prompt is in the cache, behind the active rows."""
        row, ids = len(self.requests), tuple(request.prompt_ids)
        self.cache.add_row(self.prompts[ids])
        self.tokens[row] = ids[-1]
        self.steps[row] = 0
        # Raw Philox words: unlike those of numpy's distributions, their stream never changes.
        words = np.random.Philox(key=request.seed).random_raw(self.params.max_new_tokens)
        self.uniforms[row] = torch.from_numpy((words >> 32) / 2.0**32)
        if self.params.repetition_penalty != 1:
            self.seen[row] = False
            self.seen[row, list(ids)] = True
        self.requests.append(request)
        self.admitted.append(next(self.clock))
        self.forced.append(Forced())

    def allocate(self, queue: deque[Request]) -> None:
        """Give every row the page it needs; when pages run out, preempt the rows admitted last.

        A preempted request returns to the front of the queue and starts again: its seed gives the
        same text.
        """
        while self.cache.pages_needed() > self.cache.free_pages:
            row = self.admitted.index(max(self.admitted))
            queue.appendleft(self.requests[row])
            self._remove(row)
        self.cache.allocate()

    def step(self) -> list[tuple[Request, Result]]:
        """Decode one token in every active row; remove the rows that ended and return their results."""
        n = len(self.requests)
        m = self.fixed_rows or _round_up(n)
        hidden = self.model.hidden(self.tokens[:m, None], cache=self.cache)[:, 0]  # (m, D)
        if not hidden.isfinite().all():
            raise InputError("the model's activations are not finite: the checkpoint is broken, or "
                             "overflows in this dtype")
        logits = self.model.logits(hidden)[:n]  # (n, V)
        rows, steps = self.index[:n], self.steps[:n]
        drawn = logits, self.uniforms[rows, steps], self.params, self.seen[:n]
        tokens = self.calculator.sample(self.forced, *drawn) if self.calculator else sample(*drawn)
        if self.params.repetition_penalty != 1:
            self.seen[rows, tokens] = True
        if self.params.return_logps:
            self.logps[rows, steps] = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        self.output[rows, steps] = tokens
        self.tokens[:n] = tokens
        self.steps[:n] += 1

        stopped, full = self.stop[tokens], self.steps[:n] == self.params.max_new_tokens
        candidates = stopped | full
        if self.stop_strings is not None:
            candidates = candidates | self.stop_strings.may_end[tokens]
        if self.calculator:
            candidates = candidates | self.calculator.closes[tokens]
        done = []
        for row in reversed(candidates.nonzero()[:, 0].tolist()):
            finished, length = bool(stopped[row]), int(self.steps[row])
            ids = self.output[row, : length - finished].tolist()
            if self.stop_strings is not None and not finished:
                finished = self.stop_strings.found_in(ids)
            if finished or full[row]:
                done.append((self.requests[row], self._result(row, ids, finished)))
                self._remove(row)
            elif self.calculator:
                self.calculator.start(self.forced[row], ids)
        return done

    def _result(self, row: int, ids: list[int], finished: bool) -> Result:
        logps, forced = None, self.forced[row]
        if self.params.return_logps:
            logps = self.logps[row, : int(self.steps[row])].tolist()
            logps = [None if i in forced.steps else logp for i, logp in enumerate(logps)]
        spans = self.calculator.spans(forced, ids) if self.calculator else []
        return Result(ids, finished, logps, spans)

    def _remove(self, row: int) -> None:
        """Free a row's slot and pages; the last active row moves into its slot."""
        last, prompt = len(self.requests) - 1, self.cache.rows[row].prompt
        ids = tuple(self.requests[row].prompt_ids)
        self.cache.remove_row(row)
        if self.prompts.get(ids) is prompt and prompt.free_readers == self.cache.readers_per_prompt:
            del self.prompts[ids]
        if row != last:
            for state in (self.tokens, self.steps, self.output, self.uniforms, self.logps, self.seen):
                state[row] = state[last]
            for kept in (self.requests, self.admitted, self.forced):
                kept[row] = kept[last]
        for kept in (self.requests, self.admitted, self.forced):
            kept.pop()


def _check_requests(model: Decoder, requests: Sequence[Request], params: SamplingParams) -> None:
    context = model.config.max_position_embeddings
    for request in requests:
        if not request.prompt_ids:
            raise InputError(f"{request.key}: the prompt has no tokens")
        if len(request.prompt_ids) + params.max_new_tokens > context:
            raise InputError(f"{request.key}: {len(request.prompt_ids)} prompt tokens and "
                             f"max_new_tokens {params.max_new_tokens} exceed the model's {context} "
                             "positions; lower max_new_tokens or drop the question")


def _pages_that_fit(model: Decoder, staging: KVCache, longest: int, max_new_tokens: int,
                    cache_bytes: int) -> int:
    """Pages that fit in `cache_bytes` beside the staging cache; InputError if one row would not."""
    one = page_bytes(model.config, model.compute_dtype)
    beside = sum(tensor.nbytes for tensor in (*staging.keys, *staging.values))
    least = RESERVED_PAGES + pages_for(longest - 1) + pages_for(max_new_tokens)
    pages = (cache_bytes - beside) // one
    if pages < least:
        raise InputError(f"a cache of {cache_bytes / 2**30:.2f} GiB has no room for a sequence of "
                         f"{longest + max_new_tokens} tokens, which takes "
                         f"{(least * one + beside) / 2**30:.2f} GiB; raise --max_cache_memory or lower "
                         "--max_new_tokens")
    return pages


def _longest_first(request: Request) -> tuple:
    """Sort key: longest prompts first, and those with the same shared tokens side by side."""
    ids = tuple(request.prompt_ids)
    head = ids[: request.shared] if request.shared else ids
    return -len(head), head, -len(ids), ids


def _round_up(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def _prefill_tokens(device: torch.device) -> int:
    return PREFILL_TOKENS.get(device.type, PREFILL_TOKENS["cuda"])
