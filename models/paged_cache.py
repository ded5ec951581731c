"""Keys and values in pages: a prompt is stored once for all its samples, and no row reserves memory.

A decoding row reads a prompt, in pages that up to `readers_per_prompt` rows share, and its own tokens,
in pages of its own. Both lie in one pool, prompts from its front, own pages from its back, so a step
reads each kind in place, as one block. The attention over them is in kernels/paged_attention.py.

The allocator works in numpy on the host; each step copies its page table to the device once.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from srit.kernels.paged_attention import PageTable, paged_attention
from srit.models.cache import KVCache
from srit.models.config import ModelConfig
from srit.models.ops import to_device

PAGE = 32  # positions of a page
RESERVED_PAGES = 2  # the first page of each region
TABLE_STEP = 16  # page tables grow by so many columns; a fixed step keeps the order of a row's sums


def pages_for(tokens: int | np.ndarray) -> int | np.ndarray:
    return -(-tokens // PAGE)


def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Memory of one page: keys and values of all layers."""
    heads = config.num_hidden_layers * config.num_key_value_heads
    return 2 * heads * config.head_dim * PAGE * dtype.itemsize


@dataclass(eq=False)
class CachedPrompt:
    """A prompt in the cache. `readers` are the rows that read it, -1 where there is none."""

    length: int
    readers: list[int]
    pages: list[int] = field(default_factory=list)

    @property
    def free_readers(self) -> int:
        return self.readers.count(-1)


@dataclass(eq=False)
class _Row:
    prompt: CachedPrompt
    reader: int  # index into prompt.readers
    pages: list[int] = field(default_factory=list)


class _Region:
    """One end of the pool; its pages are counted from that end.

    The first page is reserved: fillers write to it, and a batch of a single matrix product would be
    summed in another order.
    """

    def __init__(self) -> None:
        self.size = 1
        self.free: list[int] = []  # freed pages below `size`
        self.holders: dict[int, CachedPrompt | _Row] = {}

    @property
    def used(self) -> int:
        return self.size - len(self.free)

    def release(self, pages: list[int]) -> None:
        self.free += pages
        for page in pages:
            del self.holders[page]


@dataclass
class Step:
    """What all layers of a decode step share."""

    page: Tensor  # (m,) the page that each row's new token goes to, at
    offset: Tensor  # (m,)
    table: PageTable


class PagedCache:
    """A pool of pages for up to `rows` decoding rows.

    Args:
        pages: of the pool, `RESERVED_PAGES` included. readers_per_prompt: rows that may share a prompt.
    Memory: `page_bytes` per page. `lengths` (rows,) numpy int64 counts the tokens of every row. Rows
    0 to n - 1 are active; the others of a step are fillers that use the reserved page.
    """

    def __init__(self, config: ModelConfig, pages: int, rows: int, readers_per_prompt: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.pages, self.readers_per_prompt = pages, readers_per_prompt
        self.device = torch.device(device)
        K, hd, layers = config.num_key_value_heads, config.head_dim, range(config.num_hidden_layers)
        # In these layouts both matrix products of a page sum over adjacent memory.
        self.keys = [torch.zeros(pages, K, PAGE, hd, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(pages, K, hd, PAGE, dtype=dtype, device=device) for _ in layers]
        self.prompts, self.own = _Region(), _Region()
        self.rows: list[_Row] = []
        self.lengths = np.zeros(rows, dtype=np.int64)
        self.starts = np.zeros(rows, dtype=np.int64)  # tokens of the row's prompt
        self.readers = np.zeros(rows, dtype=np.int64)
        self.table = np.full((rows, TABLE_STEP), pages - 1, dtype=np.int64)  # a row's pages in order

    @property
    def free_pages(self) -> int:
        return self.pages - self.prompts.used - self.own.used

    def add_prompt(self, source: KVCache, slot: int, length: int) -> CachedPrompt:
        """Copy the first `length` tokens of a slot into pages; `pages_for(length)` must be free."""
        count = pages_for(length)
        prompt = CachedPrompt(length, [-1] * self.readers_per_prompt)
        for _ in range(count):
            self._take_page(self.prompts, prompt)
        if not count:
            return prompt
        pages = torch.tensor(prompt.pages, device=self.device)
        for layer in range(len(self.keys)):
            for pool, tensor, order in ((self.keys, source.keys, (1, 0, 2, 3)),
                                        (self.values, source.values, (1, 0, 3, 2))):
                tokens = F.pad(tensor[layer][slot, :, :length], (0, 0, 0, count * PAGE - length))
                pool[layer][pages] = tokens.unflatten(1, (count, PAGE)).permute(order)
        return prompt

    def add_row(self, prompt: CachedPrompt) -> None:
        """Add an active row behind the others that continues `prompt`, which has a free reader."""
        row, reader = len(self.rows), prompt.readers.index(-1)
        self.rows.append(_Row(prompt, reader))
        prompt.readers[reader] = row
        self.lengths[row] = prompt.length
        self._update_table(row)

    def pages_needed(self) -> int:
        """Pages that the active rows need before they can write their next tokens."""
        return int(self._full().sum())

    def allocate(self) -> None:
        """Give a page to every active row that needs one; `pages_needed()` must be free."""
        for row in np.flatnonzero(self._full()).tolist():
            self._take_page(self.own, self.rows[row])
            self._update_table(row)

    def remove_row(self, row: int) -> None:
        """Free a row's pages, and its prompt's with the last reader. The last row takes its number."""
        leaving, last = self.rows[row], self.rows.pop()
        self.own.release(leaving.pages)
        leaving.prompt.readers[leaving.reader] = -1
        if leaving.prompt.free_readers == self.readers_per_prompt:
            self.prompts.release(leaving.prompt.pages)
        end = len(self.rows)
        if row != end:
            self.rows[row] = last
            last.prompt.readers[last.reader] = row
            self.lengths[row] = self.lengths[end]
            self._update_table(row)
        self.lengths[end] = self.starts[end] = self.readers[end] = 0
        self.table[end] = self.pages - 1  # a filler now, on the reserved page
        for region in (self.prompts, self.own):
            if len(region.free) > region.used:
                self._defragment(region)

    def begin(self, m: int) -> Step:
        """The step that writes one token in each of the first m rows."""
        starts, lengths = self.starts[:m], self.lengths[:m] + 1
        counts = pages_for(starts) + pages_for(lengths - starts)
        page = self.table[np.arange(m), counts - 1]
        pages = self.table[:m, : -(-int(counts.max()) // TABLE_STEP) * TABLE_STEP]
        arrays = (x.astype(np.int32) for x in (pages, starts, lengths, self.readers[:m]))
        table = PageTable(*map(self._tensor, arrays), self.readers_per_prompt, self.prompts.size,
                          self.own.size)
        return Step(self._tensor(page), self._tensor((lengths - 1 - starts) % PAGE), table)

    def positions(self, B: int, T: int) -> Tensor:
        """(B, T) positions of the next token of the first B rows; T is 1."""
        return self._tensor(self.lengths[:B, None].copy())

    def advance(self, B: int, T: int) -> None:
        """The active ones of the first B rows have T more tokens; fillers stay empty."""
        self.lengths[: len(self.rows)] += T

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step, layer: int, window: int | None,
               scale: float) -> Tensor:
        """Write k, v (m, K, hd) of the new tokens, then attend: q (m, H, hd) -> (m, H, hd)."""
        keys, values = self.keys[layer], self.values[layer]
        keys[step.page, :, step.offset] = k
        values[step.page, :, :, step.offset] = v
        return paged_attention(q, keys, values, step.table, window, scale)

    def _full(self) -> np.ndarray:
        """For each active row: True if it needs a new page, or it has none yet."""
        return (self.lengths - self.starts)[: len(self.rows)] % PAGE == 0

    def _take_page(self, region: _Region, holder: CachedPrompt | _Row) -> None:
        if not region.free and self.prompts.size + self.own.size == self.pages:
            self._defragment(self.prompts if region is self.own else self.own)
        if region.free:
            page = region.free.pop()
        else:
            page = region.size
            region.size += 1
        region.holders[page] = holder
        holder.pages.append(page)

    def _defragment(self, region: _Region) -> None:
        """Move the pages farthest from the region's end of the pool to its free ones."""
        used, free = region.used, set(region.free)
        targets = sorted(page for page in free if page < used)
        sources = [page for page in range(used, region.size) if page not in free]
        region.size, region.free = used, []
        if not sources:
            return
        source, target = (torch.tensor(self._in_pool(region, part), device=self.device)
                          for part in (sources, targets))
        for tensor in self.keys + self.values:
            tensor[target] = tensor[source]
        for old, new in zip(sources, targets, strict=True):
            holder = region.holders[new] = region.holders.pop(old)
            holder.pages[holder.pages.index(old)] = new
        moved = {id(region.holders[page]) for page in targets}
        for at, row in enumerate(self.rows):
            if id(row) in moved or id(row.prompt) in moved:
                self._update_table(at)

    def _update_table(self, at: int) -> None:
        """Bring the arrays in line with row `at`."""
        row = self.rows[at]
        pages = self._in_pool(self.prompts, row.prompt.pages) + self._in_pool(self.own, row.pages)
        while len(pages) > self.table.shape[1]:
            self.table = np.pad(self.table, ((0, 0), (0, TABLE_STEP)), constant_values=self.pages - 1)
        self.table[at, : len(pages)] = pages
        self.starts[at], self.readers[at] = row.prompt.length, row.reader

    def _in_pool(self, region: _Region, pages: list[int]) -> list[int]:
        return [self.pages - 1 - page for page in pages] if region is self.own else pages

    def _tensor(self, array: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(np.ascontiguousarray(array)), self.device)
