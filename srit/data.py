"""Rows to token streams: what is trained, in which order, packed without padding.

Legend: N tokens of a packed stream, S sequences in it, M trained (completion) tokens.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srit.prompts import Rendered


@dataclass
class Batch:
    """A packed stream of S sequences. No padding exists, so none can be counted."""

    input_ids: Tensor  # (1, N)
    positions: Tensor  # (1, N), restart at every sequence
    cu_seqlens: Tensor  # (S + 1,) int32, where the sequences start
    rows: Tensor  # (M,) stream index of the token *before* each trained token
    targets: Tensor  # (M,) the trained tokens
    cu_targets: Tensor  # (S + 1,) int32, where each sequence's trained tokens start; on the CPU

    def to(self, device: torch.device) -> "Batch":
        moved = (self.input_ids, self.positions, self.cu_seqlens, self.rows, self.targets)
        return Batch(*(t.to(device) for t in moved), self.cu_targets)


def collate(sequences: Sequence[Rendered]) -> Batch:
    """Concatenate sequences into one stream.

    The shift by one between a token and the position that predicts it happens here and nowhere
    else. The first token of a sequence has no predecessor and is never trained.
    """
    ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    starts, target_starts = [0], [0]
    for sequence in sequences:
        rows += [len(ids) + i - 1 for i, trained in enumerate(sequence.mask) if trained and i > 0]
        ids += sequence.ids
        positions += range(len(sequence.ids))
        starts.append(len(ids))
        target_starts.append(len(rows))
    stream, before = torch.tensor(ids), torch.tensor(rows, dtype=torch.int64)
    return Batch(
        input_ids=stream[None],
        positions=torch.tensor(positions)[None],
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        rows=before,
        targets=stream[before + 1],
        cu_targets=torch.tensor(target_starts, dtype=torch.int32),
    )


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit-decreasing bins of row indices; every row stands in exactly one bin.

    Raises ValueError for a row longer than `capacity`: dropping it is the caller's decision.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > capacity:
            raise ValueError(f"row {index} has {lengths[index]} tokens, a bin holds {capacity}")
        for at, free in enumerate(room):
            if lengths[index] <= free:
                bins[at].append(index)
                room[at] -= lengths[index]
                break
        else:
            bins.append([index])
            room.append(capacity - lengths[index])
    return bins


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
    def steps_per_epoch(self) -> int:
        return -(-self.n_units // (self.batch_size * self.accumulation * self.world_size))

    def total_steps(self, epochs: float, max_steps: int) -> int:
        return max_steps if max_steps > 0 else max(1, round(epochs * self.steps_per_epoch))

    def order(self, epoch: int) -> list[int]:
        units = list(range(self.n_units))
        if self.shuffle:
            random.Random(f"{self.seed} {epoch}").shuffle(units)
        return units

    def step(self, step: int, rank: int = 0) -> list[list[int]]:
        """The micro-batches of `rank` at optimizer step `step`; some may be empty."""
        epoch, at = divmod(step, self.steps_per_epoch)
        size = self.batch_size * self.accumulation * self.world_size
        units = self.order(epoch)[at * size : (at + 1) * size]
        micro = [units[i : i + self.batch_size] for i in range(0, size, self.batch_size)]
        return micro[rank :: self.world_size]
