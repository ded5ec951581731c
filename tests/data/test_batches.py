"""Packing, the shift between tokens and targets, and the order of training."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srit.data.batch_sampler import Schedule, pack
from srit.data.batches import collate, shared_length
from srit.text.prompts import Rendered


def rendered(ids, mask):
    return Rendered(ids=ids, mask=[bool(m) for m in mask], text="")


def test_collate_shifts_once():
    batch = collate([[rendered([5, 6, 7, 8], [0, 0, 1, 1])], [rendered([9, 10, 11], [0, 1, 1])]])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.predict_positions.tolist() == [1, 2, 4, 5]  # the token before each trained one
    assert batch.targets.tolist() == [7, 8, 10, 11]
    assert batch.cu_targets.tolist() == [0, 2, 4]


def test_a_group_shares_its_beginning():
    """Prompt 1 2 3; both completions begin with 4, whose predecessor stands in the stream once."""
    chosen = rendered([1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 1])
    rejected = rendered([1, 2, 3, 4, 7], [0, 0, 0, 1, 1])
    batch = collate([[rendered([9, 8], [0, 1])], [chosen, rejected]])
    assert batch.input_ids.tolist() == [[9, 8, 1, 2, 3, 4, 5, 6, 7]]
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 3, 4, 5, 4]]
    assert batch.cu_seqlens.tolist() == [0, 2, 6, 8, 9]
    assert batch.parents.tolist() == [-1, -1, 1, 1]
    assert batch.predict_positions.tolist() == [0, 4, 5, 6, 4, 5]
    assert batch.targets.tolist() == [8, 4, 5, 6, 4, 7]
    assert batch.cu_targets.tolist() == [0, 1, 4, 6]
    assert batch.num_tokens == 13


@pytest.mark.parametrize(
    ("ids", "shared"),
    [([[1, 2, 3]], 0), ([[1, 2], [1, 3]], 1), ([[5, 2], [1, 2]], 0), ([[1, 2], [1, 2, 3]], 1),
     ([[1], [1, 2]], 0), ([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9, 4]], 2)],
)
def test_shared_length_leaves_every_sequence_a_token(ids, shared):
    assert shared_length([rendered(x, [1] * len(x)) for x in ids]) == shared


def test_a9_trained_positions_are_the_completion():
    """A9: the first answer token and the turn end are trained, the last prompt token is not."""
    prompt, completion = [1, 2, 3], [4, 5, 6]
    batch = collate([[rendered(prompt + completion, [0] * 3 + [1] * 3)]])
    assert batch.targets.tolist() == completion
    assert batch.input_ids[0, batch.predict_positions].tolist() == [3, 4, 5]


def test_first_token_of_a_sequence_has_no_predecessor():
    batch = collate([[rendered([1, 2], [0, 1])], [rendered([3, 4], [1, 1])]])
    assert batch.targets.tolist() == [2, 4]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 120))
def test_pack_loses_and_repeats_nothing(lengths, capacity):
    bins = pack(lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= capacity for b in bins)
    assert bins == pack(lengths, capacity)
    # first fit decreasing never uses more than 11/9 OPT + 1 bins, and OPT >= sum / capacity
    assert len(bins) <= 2 * -(-sum(lengths) // capacity)


def test_pack_refuses_a_row_that_never_fits():
    with pytest.raises(ValueError, match="row 1 has 9 tokens"):
        pack([3, 9], 8)


@pytest.mark.parametrize("n,batch,accumulation,world", [(13, 2, 3, 1), (13, 2, 1, 2), (8, 8, 1, 1),
                                                        (5, 4, 2, 2), (1, 1, 1, 4)])
def test_schedule_covers_every_unit_once_an_epoch(n, batch, accumulation, world):
    """D1, A11: no unit is lost in a last partial window, whatever divides what."""
    schedule = Schedule(n, batch, accumulation, world, seed=3, shuffle=True)
    for epoch in range(2):
        steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
        seen = [u for s in steps for r in range(world) for m in schedule.step(s, r) for u in m]
        assert sorted(seen) == list(range(n))
    for step in range(schedule.steps_per_epoch):  # every rank runs the same number of micro-batches
        assert len({len(schedule.step(step, r)) for r in range(world)}) == 1


def test_global_batch_does_not_depend_on_how_it_is_split():
    whole = Schedule(24, 8, 1, 1, seed=0, shuffle=True)
    accumulated = Schedule(24, 2, 4, 1, seed=0, shuffle=True)
    ranks = Schedule(24, 2, 2, 2, seed=0, shuffle=True)
    for step in range(3):
        one = sorted(whole.step(step)[0])
        assert sorted(u for m in accumulated.step(step) for u in m) == one
        assert sorted(u for r in (0, 1) for m in ranks.step(step, r) for u in m) == one


def test_order_is_the_file_order_without_shuffling_and_new_every_epoch_with_it():
    plain = Schedule(6, 2, 1, 1, seed=0, shuffle=False)
    assert plain.step(0) == [[0, 1]] and plain.step(3) == [[0, 1]]
    shuffled = Schedule(50, 2, 1, 1, seed=0, shuffle=True)
    assert shuffled.order(0) != shuffled.order(1)
    state = random.getstate()
    assert shuffled.order(0) == shuffled.order(0)
    assert random.getstate() == state  # the global generator is left alone


def test_total_steps():
    schedule = Schedule(10, 4, 1, 1, seed=0, shuffle=False)
    assert schedule.steps_per_epoch == 3
    assert schedule.total_steps(2, -1) == 6
    assert schedule.total_steps(0.5, -1) == 2
    assert schedule.total_steps(2, 4) == 4


def test_batch_moves_whole():
    batch = collate([[rendered([1, 2], [0, 1])]]).to(torch.device("cpu"))
    assert batch.targets.tolist() == [2]
