"""Triton kernel of kernels/paged_attention.py.

A program takes one row and one key/value head, walks the row's pages in order and keeps the running
maximum, sum and weighted values of the head's queries. Rows never mix and no row is split, so the bits
of a row depend neither on its batch nor on where its pages lie.

Bytes: every page once per row; a prompt that several rows read comes from memory once and then from the
L2 cache. There are rows * key/value heads programs, enough to fill a GPU from about 128 rows on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from srit.kernels.row_softmax_triton import LOG2E

MIN_QUERIES = 16  # rows of the smallest product on tensor cores
MASKED = tl.constexpr(-1e30)  # finite: a page that is masked throughout must not give inf - inf


@triton.jit
def paged_attention_kernel(
    q_ptr,  # (m, H, hd)
    keys_ptr,  # (P, K, PAGE, hd)
    values_ptr,  # (P, K, hd, PAGE)
    out_ptr,  # (m, H, hd)
    pages_ptr,  # (m, W)
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
    prompt_pages = tl.cdiv(start, PAGE)
    count = prompt_pages + tl.cdiv(length - start, PAGE)
    first = 0
    if WINDOW > 0:  # skip the prompt's pages before the window
        first = tl.minimum(tl.maximum(length - WINDOW, 0) // PAGE, prompt_pages)
    top = tl.full([BLOCK_G], MASKED, tl.float32)
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
        scores = tl.where(seen[None, :], scores, MASKED)
        new_top = tl.maximum(top, tl.max(scores, 1))
        probs = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(probs, 1)
        sums = sums * shrink[:, None] + tl.dot(probs.to(v.dtype), v, input_precision="ieee")
        top = new_top
    tl.store(out_ptr + queries, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=real)


def paged_attention(q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, starts: Tensor,
                    lengths: Tensor, window: int | None, scale: float) -> Tensor:
    """As kernels/paged_attention.py, with the fields of its PageTable."""
    m, H, hd = q.shape
    K, page = keys.shape[1], keys.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    paged_attention_kernel[m, K](
        q.contiguous(), keys, values, out, pages, starts, lengths, pages.shape[1],
        scale * LOG2E.value, WINDOW=window or 0, PAGE=page, **shape_constants(K, H // K, hd),
        WIDEN=q.device.type == "cpu" and q.dtype == torch.bfloat16, num_warps=4)
    return out


def shape_constants(kv_heads: int, group: int, head_dim: int) -> dict[str, int]:
    """Constants of the kernel, for `group` query heads per key/value head."""
    return {"K": kv_heads, "G": group, "HD": head_dim,
            "BLOCK_G": max(MIN_QUERIES, triton.next_power_of_2(group)),
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim))}
