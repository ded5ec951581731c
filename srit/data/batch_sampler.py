"""Which examples each optimizer step trains on: a pure function of the step."""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Generic, TypeVar

import torch

from srit.config import TrainConfig
from srit.data.batches import Batch, Example, Pair
from srit.runtime import distributed
from srit.runtime.files import InputError

Item = TypeVar("Item", Example, Pair)
Collate = Callable[[Sequence[Item]], Batch]


class BatchSampler(Generic[Item]):
    """Deals examples or pairs to optimizer steps, micro-batches and ranks.

    A step takes `step_size` units: per_device_train_batch_size for each micro-batch, and
    gradient_accumulation_steps micro-batches for each rank. A unit is one item, or a bin of items
    packed up to `bin_tokens` tokens; with max_tokens_per_batch a bin is a micro-batch of its own.
    The last step of an epoch takes what is left. There is no iterator state, so resuming at a step
    neither repeats nor skips an example.
    """

    def __init__(self, items: Sequence[Item], collate: Collate, cfg: TrainConfig,
                 bin_tokens: int = 0) -> None:
        self.items, self.collate = items, collate
        self.seed = cfg.seed if cfg.shuffle_dataset else None
        self.batch_size = 1 if cfg.max_tokens_per_batch else cfg.per_device_train_batch_size
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.step_size = self.batch_size * cfg.gradient_accumulation_steps * self.world_size
        bin_tokens = cfg.max_tokens_per_batch or bin_tokens
        self.units = [[i] for i in range(len(items))]
        if bin_tokens:
            lengths = [item.stream_length for item in items]
            if max(lengths) > bin_tokens:
                raise InputError(f"--max_tokens_per_batch {bin_tokens} is less than the longest row's "
                                 f"{max(lengths)} tokens: raise it, or lower --max_length")
            self.units = pack_examples(lengths, bin_tokens)
        self.steps_per_epoch = -(-len(self.units) // self.step_size)
        epochs = round(cfg.num_train_epochs * self.steps_per_epoch)
        self.total_steps = cfg.max_steps if cfg.max_steps > 0 else max(1, epochs)

    def step_items(self, step: int) -> list[Item]:
        """Everything that optimizer step `step` trains on, on all ranks."""
        return [self.items[i] for rank in range(self.world_size)
                for batch in self._indices(step, rank) for i in batch]

    def micro_batches(self, step: int, device: torch.device) -> Iterator[tuple[Batch, float]]:
        """This rank's micro-batches, with weight 1, padded with fillers of weight 0.

        In a sharded model every rank must join every forward: a rank that has none left while another
        has one gets that one as filler.
        """
        ranks = [self._indices(step, rank) for rank in range(self.world_size)]
        for turn in zip(*ranks, strict=True):
            own = turn[self.rank]
            indices = own or next(filter(None, turn), None)
            if indices is not None:
                batch = self.collate([self.items[i] for i in indices])
                yield batch.to(device), 1.0 if own else 0.0

    def first_epoch(self) -> list[list[int]]:
        """Item indices of this rank's micro-batches in the first epoch, as far as training goes."""
        steps = range(min(self.total_steps, self.steps_per_epoch))
        return [batch for step in steps for batch in self._indices(step, self.rank) if batch]

    def _indices(self, step: int, rank: int) -> list[list[int]]:
        """Item indices of every micro-batch of `rank`; some may be empty."""
        epoch, at = divmod(step, self.steps_per_epoch)
        order = _order(len(self.units), None if self.seed is None else f"{self.seed} {epoch}")
        units = order[at * self.step_size : (at + 1) * self.step_size]
        starts = range(0, self.step_size, self.batch_size)
        batches = [units[start : start + self.batch_size] for start in starts]
        return [[i for unit in batch for i in self.units[unit]]
                for batch in batches[rank :: self.world_size]]


@lru_cache(maxsize=2)  # asked for at every step, for every rank
def _order(n_units: int, seed: str | None) -> list[int]:
    units = list(range(n_units))
    if seed is not None:
        random.Random(seed).shuffle(units)
    return units


def rank_batches(items: Sequence[Item], batch_size: int) -> list[tuple[list[int], float]]:
    """Indices of this rank's batches of `items`, in order, and their weight: 0 for a filler."""
    batches = [list(range(i, min(i + batch_size, len(items))))
               for i in range(0, len(items), batch_size)]
    own = batches[distributed.rank() :: distributed.world_size()]
    return distributed.pad_to_longest_rank(own, batches[0])


def eval_batches(items: Sequence[Item], collate: Collate, batch_size: int,
                 device: torch.device) -> Iterator[tuple[Batch, float]]:
    """All items in order, dealt to the ranks batch by batch, with weights as in `micro_batches`."""
    for indices, weight in rank_batches(items, batch_size):
        yield collate([items[i] for i in indices]).to(device), weight


def pack_examples(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit-decreasing bins of example indices; every example is in exactly one bin.

    A segment tree over the bins' free room finds the first fit in O(log n). Raises ValueError for an
    example longer than `capacity`: dropping it is the caller's decision.
    """
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [capacity] * (2 * leaves)  # room[i]: the most free room of any bin below node i
    bins: list[list[int]] = [[] for _ in lengths]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > capacity:
            raise ValueError(f"row {index} has {lengths[index]} tokens, a bin holds {capacity}")
        node = 1
        while node < leaves:
            node = 2 * node + (room[2 * node] < lengths[index])
        bins[node - leaves].append(index)
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [b for b in bins if b]
