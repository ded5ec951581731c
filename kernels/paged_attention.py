"""Attention of a decoding step over pages of keys and values: one query token a row.

A row reads its prompt, in pages that several rows may share, then its own tokens, in pages of its own
(models/paged_cache.py lays them out). The PyTorch twin inverts the page table: every page is one small
matrix product with the queries of all its readers, and a row then joins the partial results of its
pages. The Triton kernel walks the pages of each row instead. Either way the sums of a page and their
order in a row depend on that row alone, wherever its pages lie and whatever else decodes.

Legend: P pages of the pool, m rows, W pages of the longest row, H heads, K key/value heads, g = H / K,
hd head dimension, L partial results.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from srit.kernels.dispatch import use_triton

MASKED = -1e30  # score of a masked position; finite, or a page that is masked throughout gives NaN


@dataclass
class PageTable:
    """The pages that each row of a step reads; tensors are int32.

    pages: (m, W), a row's pages in order: ceil(starts / PAGE) of its prompt, then its own.
    starts: (m,), tokens of the prompt. lengths: (m,), all tokens, the query's own included.
    For the PyTorch twin alone: readers (m,), which of its prompt's readers a row is; prompts lie in the
    first `prompt_pages` pages of the pool, own tokens in the last `own_pages`.
    """

    pages: Tensor
    starts: Tensor
    lengths: Tensor
    readers: Tensor
    readers_per_prompt: int
    prompt_pages: int
    own_pages: int
    inverse: "_InverseTable | None" = None  # made at the first layer, for all of them


def paged_attention(q: Tensor, keys: Tensor, values: Tensor, table: PageTable, window: int | None,
                    scale: float) -> Tensor:
    """Softmax attention of each row's query over the row's pages: q (m, H, hd) -> (m, H, hd).

    Args:
        keys, values: (P, K, PAGE, hd) and (P, K, hd, PAGE), contiguous. window: the last so many
        tokens are seen, None for all.
    """
    if not use_triton(q.device):
        return paged_attention_torch(q, keys, values, table, window, scale)
    from srit.kernels import paged_attention_triton

    return paged_attention_triton.paged_attention(
        q, keys, values, table.pages, table.starts, table.lengths, window, scale)


def paged_attention_torch(q: Tensor, keys: Tensor, values: Tensor, table: PageTable,
                          window: int | None, scale: float) -> Tensor:
    """The PyTorch twin of `paged_attention`."""
    (m, H, hd), (P, K, PAGE, _) = q.shape, keys.shape
    g = H // K
    if table.inverse is None:
        table.inverse = _invert(table, H, P, PAGE)
    inverse, shared = table.inverse, table.prompt_pages * table.readers_per_prompt
    # Prompt pages, then own pages: the pages, their partial results, and readers per page.
    parts = ((slice(table.prompt_pages), slice(shared), table.readers_per_prompt),
             (slice(P - table.own_pages, None), slice(shared, None), 1))
    if window not in inverse.masks:
        mask = inverse.mask(window, PAGE).to(q.dtype)
        inverse.masks[window] = [mask[part].view(-1, 1, readers, 1, PAGE).expand(-1, K, -1, g, -1)
                                 .reshape(-1, readers * g, PAGE) for _, part, readers in parts]
    sums = torch.empty(len(inverse.rows), K, g, hd, device=q.device)
    tops, shares = [], []  # the largest score and the largest probability of every partial result
    flat = q.reshape(m, H * hd)
    for (pages, part, readers), mask in zip(parts, inverse.masks[window], strict=True):
        queries = flat.index_select(0, inverse.rows[part]).view(-1, readers, K, g, hd).transpose(1, 2)
        queries = queries.reshape(-1, readers * g, hd)  # (pages * K, readers * g, hd)
        scores = torch.baddbmm(mask, queries, keys[pages].flatten(0, 1).transpose(1, 2), alpha=scale)
        scores = scores.float().view(-1, K, readers, g, PAGE)
        # softmax, not exp: exp computes the last values of a row in another way than the others.
        probs = scores.softmax(-1)
        tops.append(scores.amax(-1).transpose(1, 2).reshape(-1))
        shares.append(probs.amax(-1).transpose(1, 2).reshape(-1))
        weighted = torch.bmm(probs.view(-1, readers * g, PAGE).to(q.dtype),
                             values[pages].flatten(0, 1).transpose(1, 2))
        sums[part].view(-1, readers, K, g, hd).copy_(
            weighted.view(-1, K, readers, g, hd).transpose(1, 2))
    # The exponentials of a page sum to exp(top) / share: that is its weight in the row.
    tops, shares = (torch.cat(x).index_select(0, inverse.partials.view(-1)).view(inverse.partials.shape)
                    for x in (tops, shares))
    weights = (tops + inverse.absent).softmax(-1).div_(shares)  # (m, H, W)
    joined = F.embedding_bag(inverse.partials.flatten(0, 1), sums.view(-1, hd), mode="sum",
                             per_sample_weights=weights.flatten(0, 1))
    return (joined.view(m, H, hd) / weights.cumsum(-1)[..., -1:]).to(q.dtype)


@dataclass
class _InverseTable:
    """The readers of every page.

    A page has one partial result per reader: as many as a prompt may have for a prompt page, one for an
    own page, those of prompts first. Where there is no reader, it repeats the first page of row 0.
    """

    rows: Tensor  # (L,) the reader
    firsts: Tensor  # (L,) position of the page's first token
    ends: Tensor  # (L,) where the tokens of the prompt or of the row end
    lengths: Tensor  # (L,) all tokens of the reader
    partials: Tensor  # (m, H, W) the partial results of a row and head, in order: index * H + head
    absent: Tensor  # (m, 1, W) 0, or -inf where a row has fewer pages
    masks: dict[int | None, list[Tensor]] = field(default_factory=dict)  # of both parts, by window

    def mask(self, window: int | None, page: int) -> Tensor:
        """(L, PAGE), added to the scores: 0, or MASKED where the reader sees no token."""
        positions = self.firsts[:, None] + torch.arange(page, device=self.firsts.device)
        seen = positions < self.ends[:, None]
        if window is not None:
            seen &= positions >= self.lengths[:, None] - window
        return torch.where(seen, 0.0, MASKED)


def _invert(table: PageTable, H: int, P: int, page: int) -> _InverseTable:
    pages, starts, lengths, readers = (x.long() for x in (table.pages, table.starts, table.lengths,
                                                          table.readers))
    starts, lengths, W, device = starts[:, None], lengths[:, None], pages.shape[1], pages.device
    shared = table.prompt_pages * table.readers_per_prompt
    order = torch.arange(W, device=device)
    prompt_pages = -(-starts // page)
    of_prompt = order < prompt_pages  # (m, W)
    real = order < prompt_pages - (starts - lengths) // page
    partials = torch.where(of_prompt, pages * table.readers_per_prompt + readers[:, None],
                           shared + pages - (P - table.own_pages))
    firsts = torch.where(of_prompt, order * page, starts + (order - prompt_pages) * page)
    ends = torch.where(of_prompt, starts, lengths)
    source = torch.zeros(shared + table.own_pages, dtype=torch.int64, device=device)
    source[partials[real]] = real.flatten().nonzero()[:, 0]  # the entry of the table, row * W + place
    rows = source // W
    partials = torch.where(real, partials, 0)[:, None] * H + torch.arange(H, device=device)[:, None]
    absent = torch.where(real, 0.0, -torch.inf)[:, None]
    return _InverseTable(rows, firsts.flatten()[source], ends.flatten()[source], lengths[rows, 0],
                         partials, absent)
