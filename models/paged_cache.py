"""Keys and values in pages: a prompt is held once for all its samples, and no row reserves anything.

A decoding row is a prompt, in pages that up to `seats` rows read, and what it wrote itself, in pages
of its own. Both kinds lie in one pool, prompts from its front, own pages from its back, so that a
step reads each as one block, in place: every page is one small matrix product with the queries of its
readers, and a row then joins the partial sums of its pages. A Triton kernel (where kernels/dispatch.py
says so) walks each row's pages instead. Either way the sums of a page and their order in a row depend
on that row alone, wherever its pages lie and whoever else decodes.

Who holds which page is kept in numpy on the host; a step takes it to the device once.

Legend: P pages, F seats, m rows of a step, W pages of a row, H heads, K key/value heads, g = H / K,
hd head dimension.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from srit.kernels.dispatch import use_triton
from srit.models.cache import KVCache
from srit.models.config import ModelConfig
from srit.models.ops import to_device

PAGE = 32  # positions of a page
SPARE_PAGES = 2  # of a pool, set aside
HIDDEN = -1e30  # score of a position that is not seen; finite, or a page without any would be NaN


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of one page in all layers, keys and values."""
    heads = config.num_hidden_layers * config.num_key_value_heads
    return 2 * heads * config.head_dim * PAGE * dtype.itemsize


@dataclass(eq=False)
class Prompt:
    """A prompt in the cache and the rows that read it, a seat each; -1 is an empty seat."""

    length: int
    seats: list[int]
    pages: list[int]

    @property
    def free_seats(self) -> int:
        return self.seats.count(-1)


@dataclass(eq=False)
class _Row:
    prompt: Prompt
    seat: int
    pages: list[int] = field(default_factory=list)


class _Region:
    """One end of the pool: pages 0 to size - 1 counted from there; freed ones are holes."""

    def __init__(self) -> None:
        self.size = 0
        self.holes: list[int] = []
        self.holders: dict[int, Prompt | _Row] = {}

    @property
    def used(self) -> int:
        return self.size - len(self.holes)

    def free(self, pages: list[int]) -> None:
        self.holes += pages
        for page in pages:
            del self.holders[page]


@dataclass
class Walk:
    """The pages of every row, for the kernel that walks them; (m,) int32 each."""

    pages: Tensor  # (m, W) of the pool
    prompt_pages: Tensor  # how many of them are the prompt's
    starts: Tensor  # tokens in those
    lengths: Tensor  # all tokens, the new one too


@dataclass
class Products:
    """Every page with its readers, for one batched product over each kind of page."""

    prompt_readers: Tensor  # (prompt pages * F,) rows
    own_readers: Tensor  # (own pages,) rows
    lines: Tensor  # (m, H, W) a row's pages, in order, among the partial sums of all
    missing: Tensor  # (m, 1, W): 0, or -inf where a row has fewer pages
    prompt_seen: dict[int | None, Tensor]  # window -> (prompt pages * K, F * g, PAGE), 0 or HIDDEN
    own_seen: dict[int | None, Tensor]  # window -> (own pages * K, g, PAGE)


@dataclass
class Step:
    """What a step's layers share."""

    page: Tensor  # (m,) of the pool that the new keys and values go to, at
    offset: Tensor  # (m,)
    reading: Walk | Products


class PagedCache:
    """A pool of pages for up to `rows` decoding rows.

    Args:
        pages: of the pool; `SPARE_PAGES` are set aside, one for the filler rows of a step. seats: rows
        that may share a prompt's pages.
    Memory: `page_bytes` a page. `lengths` (rows,) numpy int64 counts every row's tokens. Rows
    0 to n - 1 are active; the others of a step are fillers that read and write the page set aside.
    """

    def __init__(self, config: ModelConfig, pages: int, rows: int, seats: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.config, self.pages, self.seats, self.device = config, pages, seats, torch.device(device)
        K, hd, layers = config.num_key_value_heads, config.head_dim, range(config.num_hidden_layers)
        # Both products of a page then sum over neighbours in memory.
        self.keys = [torch.zeros(pages, K, PAGE, hd, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(pages, K, hd, PAGE, dtype=dtype, device=device) for _ in layers]
        self.prompts, self.own = _Region(), _Region()
        # A region always has a page: the fillers' one, and a batch of one product would sum otherwise.
        self.prompts.size = self.own.size = 1
        self.rows: list[_Row] = []
        self.lengths = np.zeros(rows, dtype=np.int64)
        self.starts = np.zeros(rows, dtype=np.int64)  # where a row's own tokens begin
        self.last_page = np.zeros(rows, dtype=np.int64)  # the own page that is written next
        # Of every row its pages in order: page * F + seat of a prompt's, -1 - page of its own.
        self.table = np.full((rows, 16), -1, dtype=np.int64)
        self.counts = np.ones(rows, dtype=np.int64)
        # Of every page: its readers, the position of its first token, and where its tokens end.
        self.prompt_readers = np.zeros((pages, seats), dtype=np.int64)
        self.prompt_first = np.zeros(pages, dtype=np.int64)
        self.prompt_end = np.zeros(pages, dtype=np.int64)
        self.own_reader = np.zeros(pages, dtype=np.int64)
        self.own_first = np.zeros(pages, dtype=np.int64)

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return self.pages - self.prompts.used - self.own.used

    def add_prompt(self, source: KVCache, slot: int, length: int) -> Prompt:
        """Copy the first `length` tokens of a slot into pages; `pages_for(length)` must be free."""
        count = pages_for(length)
        prompt = Prompt(length, [-1] * self.seats, [])
        for at in range(count):
            self._take(self.prompts, prompt)
            self.prompt_first[prompt.pages[at]], self.prompt_end[prompt.pages[at]] = at * PAGE, length
        if not count:
            return prompt
        pages = torch.tensor(prompt.pages, device=self.device)
        for layer in range(len(self.keys)):
            for pool, tensor, order in ((self.keys, source.keys, (1, 0, 2, 3)),
                                        (self.values, source.values, (1, 0, 3, 2))):
                tokens = F.pad(tensor[layer][slot, :, :length], (0, 0, 0, count * PAGE - length))
                pool[layer][pages] = tokens.unflatten(1, (count, PAGE)).permute(order)
        return prompt

    def add_row(self, prompt: Prompt) -> None:
        """One more active row, behind the others, that continues `prompt`, which has a free seat."""
        seat = prompt.seats.index(-1)
        self.rows.append(_Row(prompt, seat))
        prompt.seats[seat] = len(self.rows) - 1
        self.lengths[len(self.rows) - 1] = prompt.length
        self._describe(len(self.rows) - 1)

    def need(self) -> int:
        """Pages that the active rows must get before they can write their next tokens."""
        written = (self.lengths - self.starts)[: len(self.rows)]
        return int((written % PAGE == 0).sum())

    def grow(self) -> None:
        """Give every row that needs one a page for its next tokens; `need()` must be free."""
        written = (self.lengths - self.starts)[: len(self.rows)]
        for row in np.flatnonzero(written % PAGE == 0).tolist():
            self._take(self.own, self.rows[row])
            self._describe(row)

    def remove_row(self, row: int) -> None:
        """Free an active row's pages, and its prompt's with its last reader; the last row moves in."""
        leaving, last = self.rows[row], self.rows.pop()
        self.own.free(leaving.pages)
        leaving.prompt.seats[leaving.seat] = -1
        if leaving.prompt.free_seats == self.seats:
            self.prompts.free(leaving.prompt.pages)
        end = len(self.rows)
        if row != end:
            self.rows[row] = last
            last.prompt.seats[last.seat] = row
            self.lengths[row] = self.lengths[end]
            self._describe(row)
        self.lengths[end] = self.starts[end] = self.last_page[end] = 0
        self.table[end], self.counts[end] = -1, 1  # a filler, on page 0 from the back
        for region in (self.prompts, self.own):
            if len(region.holes) > region.used:
                self._compact(region)

    def begin(self, m: int) -> Step:
        """The step that writes one token in each of the first m rows."""
        page = self.pages - 1 - self.last_page[:m]
        offset = (self.lengths[:m] - self.starts[:m]) % PAGE
        reading = self._walk(m) if use_triton(self.device) else self._products(m)
        return Step(self._tensor(page), self._tensor(offset), reading)

    def _walk(self, m: int) -> Walk:
        table = self.table[:m, : int(self.counts[:m].max())]
        pages = np.where(table < 0, self.pages + table, table // self.seats)
        arrays = pages, (table >= 0).sum(1), self.starts[:m], self.lengths[:m] + 1
        return Walk(*(self._tensor(array.astype(np.int32)) for array in arrays))

    def _products(self, m: int) -> Products:
        cfg = self.config
        H = cfg.num_attention_heads
        front, back = self.prompts.size, self.own.size
        # Own pages lie in the pool from its end: page p of the last `back` ones is at back - 1 - p.
        table = self.table[:m, : -(-int(self.counts[:m].max()) // 16) * 16]
        lines = np.where(table < 0, front * self.seats + back + table, table)
        missing = np.arange(table.shape[1]) >= self.counts[:m, None]
        lines = np.where(missing, 0, lines)[:, None] * H + np.arange(H)[:, None]
        missing = np.where(missing, np.float32(-np.inf), np.float32(0))[:, None]
        # An empty seat or a hole may name a row that this step does not have: nobody reads its line.
        readers = np.minimum(self.prompt_readers[:front], m - 1)
        own = np.minimum(self.own_reader[:back][::-1], m - 1)
        prompt_seen, own_seen = {}, {}
        inside = np.arange(PAGE)
        for window in set(cfg.windows):
            at = self.prompt_first[:front, None, None] + inside  # (pages, 1, PAGE)
            seen = at < self.prompt_end[:front, None, None]
            if window is not None:
                seen = seen & (at > self.lengths[readers][:, :, None] - window)
            prompt_seen[window] = self._scores(seen, self.seats)
            at = self.own_first[:back][::-1][:, None] + inside  # (pages, PAGE)
            seen = at <= self.lengths[own][:, None]
            if window is not None:
                seen &= at > self.lengths[own][:, None] - window
            own_seen[window] = self._scores(seen[:, None], 1)
        arrays = readers.ravel(), own, lines, missing
        return Products(*map(self._tensor, arrays), prompt_seen, own_seen)

    def positions(self, m: int) -> Tensor:
        """Of the next tokens, (m, 1)."""
        return self._tensor(self.lengths[:m, None].copy())

    def advance(self) -> None:
        """The active rows have one token more."""
        self.lengths[: len(self.rows)] += 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step, layer: int, window: int | None,
               scale: float) -> Tensor:
        """Write k, v (m, K, hd), then attend: q (m, H, hd) -> (m, H, hd)."""
        keys, values = self.keys[layer], self.values[layer]
        keys[step.page, :, step.offset] = k
        values[step.page, :, :, step.offset] = v
        if isinstance(step.reading, Products):
            return self._by_products(q, keys, values, step.reading, window, scale)
        from srit.kernels.paged_attention_triton import paged_attention

        walk = step.reading
        return paged_attention(q, keys, values, walk.pages, walk.prompt_pages, walk.starts,
                               walk.lengths, window, scale)

    def _by_products(self, q: Tensor, keys: Tensor, values: Tensor, step: Products, window: int | None,
                     scale: float) -> Tensor:
        m, H, hd = q.shape
        front, back, seats = self.prompts.size, self.own.size, self.seats
        K, g = keys.shape[1], H // keys.shape[1]
        sums = torch.empty(front * seats + back, K, g, hd, device=q.device)  # a line for every reader
        tops, shares = [], []  # the largest score and the largest probability of every line
        flat = q.reshape(m, H * hd)
        for part, fan, readers, seen, out in (
                (slice(front), seats, step.prompt_readers, step.prompt_seen[window],
                 sums[: front * seats]),
                (slice(self.pages - back, None), 1, step.own_readers, step.own_seen[window],
                 sums[front * seats :])):
            asked = flat.index_select(0, readers).view(-1, fan, K, g, hd).transpose(1, 2)
            asked = asked.reshape(-1, fan * g, hd)  # (pages * K, F * g, hd)
            scores = torch.baddbmm(seen, asked, keys[part].flatten(0, 1).transpose(1, 2), alpha=scale)
            scores = scores.float().view(-1, K, fan, g, PAGE)
            # softmax, since exp alone takes a row's last values another way than the rest of them.
            probs = scores.softmax(-1)
            tops.append(scores.amax(-1).transpose(1, 2).reshape(-1))
            shares.append(probs.amax(-1).transpose(1, 2).reshape(-1))
            weighed = torch.bmm(probs.view(-1, fan * g, PAGE).to(q.dtype),
                                values[part].flatten(0, 1).transpose(1, 2))
            out.view(-1, fan, K, g, hd).copy_(weighed.view(-1, K, fan, g, hd).transpose(1, 2))
        # A page's exponentials sum to exp(top) / share: by that its part in the row is weighed.
        tops, shares = (torch.cat(parts).index_select(0, step.lines.view(-1)).view(step.lines.shape)
                        for parts in (tops, shares))
        weights = (tops + step.missing).softmax(-1).div_(shares)  # (m, H, W)
        joined = F.embedding_bag(step.lines.flatten(0, 1), sums.view(-1, hd), mode="sum",
                                 per_sample_weights=weights.flatten(0, 1))
        return (joined.view(m, H, hd) / weights.cumsum(-1)[..., -1:]).to(q.dtype)

    def _take(self, region: _Region, holder: Prompt | _Row) -> None:
        """One more page for `holder`."""
        if not region.holes and self.prompts.size + self.own.size == self.pages:
            self._compact(self.prompts if region is self.own else self.own)
        if region.holes:
            page = region.holes.pop()
        else:
            page = region.size
            region.size += 1
        region.holders[page] = holder
        holder.pages.append(page)

    def _compact(self, region: _Region) -> None:
        """Move the pages farthest from the region's end into its holes."""
        used, holes = region.used, set(region.holes)
        targets = sorted(page for page in holes if page < used)
        sources = [page for page in range(used, region.size) if page not in holes]
        region.size, region.holes = used, []
        if not sources:
            return
        end = self.pages - 1
        place = [[end - p for p in part] if region is self.own else part for part in (sources, targets)]
        source, target = (torch.tensor(part, device=self.device) for part in place)
        for tensor in self.keys + self.values:
            tensor[target] = tensor[source]
        for old, new in zip(sources, targets, strict=True):
            holder = region.holders[new] = region.holders.pop(old)
            holder.pages[holder.pages.index(old)] = new
            if region is self.prompts:
                self.prompt_first[new] = self.prompt_first[old]
                self.prompt_end[new] = self.prompt_end[old]
        moved = {id(region.holders[page]) for page in targets}
        for at, row in enumerate(self.rows):
            if id(row) in moved or id(row.prompt) in moved:
                self._describe(at)

    def _describe(self, at: int) -> None:
        """Bring the arrays in line with row `at`."""
        row = self.rows[at]
        pages = [page * self.seats + row.seat for page in row.prompt.pages]
        pages += [-1 - page for page in row.pages]
        if (width := -(-len(pages) // 16) * 16) > self.table.shape[1]:
            self.table = np.pad(self.table, ((0, 0), (0, width - self.table.shape[1])),
                                constant_values=-1)
        self.table[at, : len(pages)] = pages
        self.counts[at] = len(pages)
        self.starts[at] = row.prompt.length
        self.prompt_readers[row.prompt.pages, row.seat] = at
        self.own_reader[row.pages] = at
        self.own_first[row.pages] = row.prompt.length + np.arange(len(row.pages)) * PAGE
        self.last_page[at] = row.pages[-1] if row.pages else 0

    def _scores(self, seen: np.ndarray, fan: int) -> Tensor:
        """(pages, 1 or fan, PAGE) bool -> what is added to the scores, (pages * K, fan * g, PAGE)."""
        K = self.config.num_key_value_heads
        scores = self._tensor(np.where(seen, np.float32(0), np.float32(HIDDEN)))
        scores = scores.to(self.keys[0].dtype)[:, None, :, None]
        g = self.config.num_attention_heads // K
        return scores.expand(-1, K, fan, g, -1).reshape(-1, fan * g, PAGE)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(np.ascontiguousarray(array)), self.device)
