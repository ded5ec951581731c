"""Which rows each optimizer step trains."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit-decreasing bins of row indices; every row stands in exactly one bin.

    A tree over the bins' free room finds the first that fits in log n steps. Raises ValueError for a
    row longer than `capacity`: dropping it is the caller's decision.
    """
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [capacity] * (2 * leaves)  # room[i]: the most that a bin below node i has free
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


@dataclass(frozen=True)
class Schedule:
    """Which units (rows, bins or pairs) each optimizer step trains: a pure function of the step.

    The last step of an epoch takes what is left. Nothing is replayed or skipped on resume, since
    there is no iterator whose state could be lost.
    """

    n_units: int
    batch_size: int
    accumulation: int
    world_size: int
    seed: int
    shuffle: bool

    @property
    def step_size(self) -> int:
        """Units of one optimizer step, on all ranks."""
        return self.batch_size * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.n_units // self.step_size)

    def total_steps(self, epochs: float, max_steps: int) -> int:
        return max_steps if max_steps > 0 else max(1, round(epochs * self.steps_per_epoch))

    def order(self, epoch: int) -> list[int]:
        return _order(self.n_units, f"{self.seed} {epoch}" if self.shuffle else None)

    def step(self, step: int, rank: int = 0) -> list[list[int]]:
        """The micro-batches of `rank` at optimizer step `step`; some may be empty."""
        epoch, at = divmod(step, self.steps_per_epoch)
        size = self.step_size
        units = self.order(epoch)[at * size : (at + 1) * size]
        micro = [units[i : i + self.batch_size] for i in range(0, size, self.batch_size)]
        return micro[rank :: self.world_size]

    def rows(self, step: int, rank: int, units: Sequence[Sequence[int]]) -> list[list[int]]:
        """`step` with units opened: the rows of every micro-batch."""
        return [[i for unit in batch for i in units[unit]] for batch in self.step(step, rank)]


@lru_cache(maxsize=2)  # asked for at every step, by every rank
def _order(n_units: int, seed: str | None) -> list[int]:
    units = list(range(n_units))
    if seed is not None:
        random.Random(seed).shuffle(units)
    return units
