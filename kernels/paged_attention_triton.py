"""Attention of decoding rows over pages, in one kernel: srit/models/paged.py has the twin.

A program takes a row and a key/value head, walks the row's pages in order and keeps the running
maximum, sum and weighted values of the head's queries. Rows never mix and nothing is split, so a row's
value is the same to the last bit whatever shares its batch, wherever its pages lie.

Bytes: every page once a row; a prompt that several rows read comes from the L2 cache but for the first
time. There are as many programs as rows times key/value heads, which fills a GPU from some 128 rows on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from srit.kernels.row_softmax_triton import LOG2E

MIN_QUERIES = 16  # rows of the smallest product on tensor cores
HIDDEN = tl.constexpr(-1e30)  # finite: a page of which nothing is seen must not make inf - inf


@triton.jit
def paged_attention_kernel(
    q_ptr,  # (m, H, hd)
    keys_ptr,  # (P, K, PAGE, hd)
    values_ptr,  # (P, K, hd, PAGE)
    out_ptr,  # (m, H, hd)
    pages_ptr,  # (m, W)
    prompt_pages_ptr,  # (m,)
    starts_ptr,  # (m,)
    lengths_ptr,  # (m,)
    W,
    scale,  # times log2 e
    WINDOW: tl.constexpr, K: tl.constexpr, G: tl.constexpr, HD: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    g, d, at = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, PAGE)
    inside = d < HD
    queries = (row * K + head) * G * HD + g[:, None] * HD + d[None, :]
    real = (g < G)[:, None] & inside[None, :]
    q = tl.load(q_ptr + queries, mask=real, other=0.0)
    length, start = tl.load(lengths_ptr + row), tl.load(starts_ptr + row)
    prompt_pages = tl.load(prompt_pages_ptr + row)
    count = prompt_pages + tl.cdiv(length - start, PAGE)
    first = 0
    if WINDOW > 0:  # pages of the prompt that lie in front of the window
        first = tl.minimum(tl.maximum(length - WINDOW, 0) // PAGE, prompt_pages)
    top = tl.full([BLOCK_G], HIDDEN, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    sums = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for i in range(first, count):
        page = tl.load(pages_ptr + row * W + i).to(tl.int64)
        of_prompt = i < prompt_pages
        position = tl.where(of_prompt, i * PAGE, start + (i - prompt_pages) * PAGE) + at
        seen = position < tl.where(of_prompt, start, length)
        if WINDOW > 0:
            seen = seen & (position >= length - WINDOW)
        base = (page * K + head) * PAGE * HD
        k = tl.load(keys_ptr + base + at[None, :] * HD + d[:, None], mask=inside[:, None], other=0.0)
        v = tl.load(values_ptr + base + at[:, None] + d[None, :] * PAGE, mask=inside[None, :],
                    other=0.0)
        if WIDEN:  # the interpreter multiplies the bit patterns of bfloat16
            k = k.to(tl.float32)
            v = v.to(tl.float32)
            scores = tl.dot(q.to(tl.float32), k, input_precision="ieee") * scale
        else:
            scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, HIDDEN)
        new_top = tl.maximum(top, tl.max(scores, 1))
        probs = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(probs, 1)
        sums = sums * shrink[:, None] + tl.dot(probs.to(v.dtype), v, input_precision="ieee")
        top = new_top
    tl.store(out_ptr + queries, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=real)


def paged_attention(q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, prompt_pages: Tensor,
                    starts: Tensor, lengths: Tensor, window: int | None, scale: float) -> Tensor:
    """One query token a row over the row's pages: q (m, H, hd) -> (m, H, hd).

    Args:
        keys, values: (P, K, PAGE, hd) and (P, K, hd, PAGE), contiguous. pages: (m, W) of each row in
        order; the first prompt_pages (m,) of them hold `starts` (m,) tokens, the others the rest of
        lengths (m,), the query's own token the last. All four int32. window: the last so many tokens
        are seen, None for all.
    """
    m, H, hd = q.shape
    K, page = keys.shape[1], keys.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    paged_attention_kernel[m, K](
        q.contiguous(), keys, values, out, pages, prompt_pages, starts, lengths, pages.shape[1],
        scale * LOG2E.value, WINDOW=window or 0, PAGE=page, **shape_constants(K, H // K, hd),
        WIDEN=q.device.type == "cpu" and q.dtype == torch.bfloat16, num_warps=4)
    return out


def shape_constants(kv_heads: int, group: int, head_dim: int) -> dict[str, int]:
    """Of the kernel: `group` queries to each key/value head."""
    return {"K": kv_heads, "G": group, "HD": head_dim,
            "BLOCK_G": max(MIN_QUERIES, triton.next_power_of_2(group)),
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim))}
