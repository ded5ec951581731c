"""Packing into bins, and the order in which training takes examples."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srit.config import SFTConfig
from srit.data.batch_sampler import BatchSampler, eval_batches, pack_examples
from srit.data.batches import Example, collate_examples
from srit.runtime import distributed
from srit.text.prompts import Rendered

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 120))
def test_packing_loses_and_repeats_nothing(lengths, capacity):
    bins = pack_examples(lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= capacity for b in bins)
    assert bins == pack_examples(lengths, capacity)
    # first fit decreasing never uses more than 11/9 OPT + 1 bins, and OPT >= sum / capacity
    assert len(bins) <= 2 * -(-sum(lengths) // capacity)


def test_packing_refuses_a_row_that_never_fits():
    with pytest.raises(ValueError, match="row 1 has 9 tokens"):
        pack_examples([3, 9], 8)


@pytest.fixture
def ranks(monkeypatch):
    """Pretend to be rank `rank` of `world`."""
    def pretend(rank, world):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world)
    return pretend


def sampler(n, batch, accumulation=1, seed=0, shuffle=True, **settings):
    """Example i is the tokens 0 and i + 1, of which the second is trained."""
    examples = [Example(str(i), Rendered([0, i + 1], [False, True], "")) for i in range(n)]
    cfg = SFTConfig("m", ["f"], "o", seed=seed, shuffle_dataset=shuffle,
                    per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
                    **settings)
    return BatchSampler(examples, collate_examples, cfg)


def trained(sampler, step):
    """(example, weight) of every micro-batch of this rank."""
    return [([t - 1 for t in batch.targets.tolist()], weight)
            for batch, weight in sampler.micro_batches(step, CPU)]


@pytest.mark.parametrize("n,batch,accumulation,world", [(13, 2, 3, 1), (13, 2, 1, 2), (8, 8, 1, 1),
                                                        (5, 4, 2, 2), (1, 1, 1, 4)])
def test_every_example_is_trained_once_an_epoch(ranks, n, batch, accumulation, world):
    """Nothing is lost in a last partial window; every rank runs equally many micro-batches."""
    samplers = []
    for rank in range(world):
        ranks(rank, world)
        samplers.append(sampler(n, batch, accumulation, seed=3))
    steps = samplers[0].steps_per_epoch
    for epoch in range(2):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            turns = [trained(s, step) for s in samplers]
            assert len({len(turn) for turn in turns}) == 1
            own = [i for turn in turns for indices, weight in turn if weight for i in indices]
            assert sorted(own) == sorted(int(e.id) for e in samplers[0].step_items(step))
            seen += own
        assert sorted(seen) == list(range(n))


def test_a_step_does_not_depend_on_how_it_is_split(ranks):
    def items(sampler):
        return [sorted(int(e.id) for e in sampler.step_items(step)) for step in range(3)]

    whole = items(sampler(24, 8))
    assert items(sampler(24, 2, accumulation=4)) == whole
    ranks(1, 2)
    assert items(sampler(24, 2, accumulation=2)) == whole


def test_order_is_the_file_order_without_shuffling_and_new_every_epoch_with_it():
    plain = sampler(6, 2, shuffle=False)
    assert trained(plain, 0) == trained(plain, 3) == [([0, 1], 1.0)]
    state = random.getstate()
    shuffled = [sampler(50, 50) for _ in range(2)]
    assert trained(shuffled[0], 0) != trained(shuffled[0], 1)
    assert trained(shuffled[0], 0) == trained(shuffled[1], 0)
    assert random.getstate() == state  # the global generator is left alone


@pytest.mark.parametrize("epochs,max_steps,total", [(2, -1, 6), (0.5, -1, 2), (2, 4, 4)])
def test_total_steps(epochs, max_steps, total):
    some = sampler(10, 4, num_train_epochs=epochs, max_steps=max_steps)
    assert (some.steps_per_epoch, some.total_steps) == (3, total)


def test_a_token_budget_makes_bins_that_are_micro_batches():
    some = sampler(5, 100, max_tokens_per_batch=4, num_train_epochs=1)
    assert some.step_size == 1 and some.total_steps == 3  # two examples of two tokens to a bin
    assert sorted(i for step in range(3) for batch, _ in trained(some, step) for i in batch) == [
        0, 1, 2, 3, 4]


def test_the_first_epoch_is_what_training_will_take():
    some = sampler(7, 2, accumulation=2, num_train_epochs=1)
    micro = [indices for step in range(2) for indices, _ in trained(some, step)]
    assert some.first_epoch() == micro
    assert sampler(7, 2, max_steps=1).first_epoch() == micro[:1]


def test_evaluation_takes_everything_once(ranks, monkeypatch):
    examples = sampler(5, 1).items
    monkeypatch.setattr(distributed, "pad_to_longest_rank",
                        lambda own, filler: [(x, 1.0) for x in own] + [(filler, 0.0)] * (2 - len(own)))
    seen = []
    for rank in (0, 1):
        ranks(rank, 2)
        batches = list(eval_batches(examples, collate_examples, 2, CPU))
        assert len(batches) == 2
        seen += [t - 1 for batch, weight in batches if weight for t in batch.targets.tolist()]
    assert sorted(seen) == [0, 1, 2, 3, 4]
