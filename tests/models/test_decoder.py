"""Every family against transformers: full, padded, packed, and token by token through the cache."""

import pytest
import torch

from srit.models import KVCache, load_model


def close(a, b):
    assert (a - b).abs().max() <= 1e-4, (a - b).abs().max()


@torch.no_grad()
def test_logits_are_those_of_transformers(family, ids):
    _, theirs, ours = family
    close(ours(ids), theirs(ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_no_logit(family, ids, side):
    _, theirs, ours = family
    T = ids.shape[1]
    mask = torch.ones_like(ids)
    for row, length in enumerate((T, 11, 4)):
        mask[row, : T - length] = 0
    if side == "right":
        mask = mask.flip(1)
    logits = ours(ids, attention_mask=mask)
    assert torch.isfinite(logits).all()
    for row in range(3):
        real = mask[row].bool()
        close(logits[row][real], theirs(ids[row][real][None]).logits[0])


@torch.no_grad()
def test_packed_segments_do_not_see_each_other(family, ids):
    _, theirs, ours = family
    lengths = (ids.shape[1], 1, 12)
    rows = [ids[i, :n] for i, n in enumerate(lengths)]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = ours(torch.cat(rows)[None], cu_seqlens=bounds)[0].split(lengths)
    for row, logits in zip(rows, packed, strict=True):
        close(logits, theirs(row[None]).logits[0])


@torch.no_grad()
def test_segments_that_continue_another_one_see_it(family, ids):
    """In and out of the sliding window, beside a segment of another sequence."""
    _, theirs, ours = family
    prefix, ends = ids[0, :9], [ids[1, :7], ids[2, :1], ids[0, 9:]]
    alone = ids[1, :5]
    segments = [alone, prefix, *ends]
    lengths = [len(x) for x in segments]
    positions = [torch.arange(5), torch.arange(9), *(9 + torch.arange(n) for n in lengths[2:])]
    packed = ours(torch.cat(segments)[None], positions=torch.cat(positions)[None],
                  cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
                  parents=torch.tensor([-1, -1, 1, 1, 1]))[0].split(lengths)
    close(packed[0], theirs(alone[None]).logits[0])
    for end, logits in zip(ends, packed[2:], strict=True):
        truth = theirs(torch.cat([prefix, end])[None]).logits[0]
        close(packed[1], truth[:9])
        close(logits, truth[9:])


@torch.no_grad()
def test_cached_logits_are_those_of_a_full_forward(family, ids):
    """Token by token, and a prefill that two tokens at a time follow."""
    _, theirs, ours = family
    T = ids.shape[1]
    truth = theirs(ids).logits
    cache = KVCache(ours.config, 3, T)
    close(torch.cat([ours(ids[:, t : t + 1], cache=cache) for t in range(T)], 1), truth)
    cache = KVCache(ours.config, 5, T + 3)
    parts = [ours(ids[:, :9], cache=cache)]
    parts += [ours(ids[:, t : t + 2], cache=cache) for t in range(9, T, 2)]
    close(torch.cat(parts, 1), truth)
    assert cache.lengths.tolist() == [T, T, T, 0, 0]


@torch.no_grad()
def test_nothing_beyond_the_length_of_a_slot_is_seen(family, ids):
    """Prompts of different lengths, padded on the right."""
    _, theirs, ours = family
    cache = KVCache(ours.config, 3, 19)
    ours(ids[:, :10], cache=cache)
    cache.lengths.copy_(torch.tensor([10, 6, 3]))
    logits = ours(ids[:, 10:11], cache=cache)
    for row, length in enumerate((10, 6, 3)):
        whole = torch.cat([ids[row, :length], ids[row, 10:11]])
        close(logits[row, 0], theirs(whole[None]).logits[0, -1])


@torch.no_grad()
def test_recording_gradients_changes_no_logit(family, ids):
    _, _, ours = family
    with torch.enable_grad():
        recorded = ours(ids)
    assert recorded.requires_grad and torch.equal(recorded, ours(ids))


def test_gradient_checkpointing_changes_no_gradient(family, ids):
    _, _, ours = family
    grads = []
    for recompute in (None, "mlp", "block"):
        ours.train()
        ours.gradient_checkpointing = recompute
        ours.zero_grad()
        ours(ids).square().mean().backward()
        grads.append([p.grad.clone() for p in ours.parameters()])
    ours.gradient_checkpointing = None
    ours.eval()
    for same in zip(*grads, strict=True):
        assert all(torch.equal(same[0], other) for other in same[1:])


def test_gradients_of_bfloat16_activations_are_float32(family, ids):
    """Activations bfloat16; weights, their gradients and logits float32."""
    directory, theirs, _ = family
    ours, _ = load_model(str(directory), compute_dtype=torch.bfloat16)
    assert ours.hidden(ids).dtype == torch.bfloat16
    logits = ours(ids)
    assert logits.dtype == torch.float32
    logits.mean().backward()
    assert {p.grad.dtype for p in ours.parameters()} == {torch.float32}
    truth = theirs(ids).logits
    assert (logits - truth).norm() / truth.norm() < 0.05
