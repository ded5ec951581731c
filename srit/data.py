"""Rows to token streams: what is trained, in which order, packed without padding.

Legend: N tokens of a packed stream, S sequences in it, M trained (completion) tokens.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from srit.models.ops import to_device
from srit.prompts import Rendered


@dataclass
class Batch:
    """A packed stream of sequences. No padding exists, so none can be counted.

    Sequences that begin alike may share that beginning: it stands in the stream once, as a segment
    that the others continue.
    """

    input_ids: Tensor  # (1, N)
    positions: Tensor  # (1, N), restart at every sequence
    cu_seqlens: Tensor  # (segments + 1,) int32, where the segments start; on the CPU
    prefixes: Tensor  # (segments,) int32, the segment that each one continues, or -1; on the CPU
    rows: Tensor  # (M,) stream index of the token *before* each trained token
    targets: Tensor  # (M,) the trained tokens
    cu_targets: Tensor  # (S + 1,) int32, where each sequence's trained tokens start; on the CPU
    num_tokens: int  # of all sequences, shared or not

    def to(self, device: torch.device) -> "Batch":
        """With what the GPU computes on there. Boundaries stay, for the host reads them."""
        moved = {name: to_device(getattr(self, name), device)
                 for name in ("input_ids", "positions", "rows", "targets")}
        if device.type == "cuda":
            moved["cu_targets"] = self.cu_targets.pin_memory()
        return replace(self, **moved)


def shared_length(sequences: Sequence[Rendered]) -> int:
    """Tokens that all sequences begin with; at least one of each is left, none of a single one."""
    if len(sequences) < 2:
        return 0
    limit = min(len(s.ids) for s in sequences) - 1
    first = sequences[0].ids
    for i in range(limit):
        if any(s.ids[i] != first[i] for s in sequences):
            return i
    return limit


def collate(groups: Sequence[Sequence[Rendered]]) -> Batch:
    """Concatenate groups of sequences into one stream; a group shares its common beginning.

    The shift by one between a token and the position that predicts it happens here and nowhere
    else. The first token of a sequence has no predecessor and is never trained.
    """
    ids, positions, rows, targets = [], [], [], []  # arrays to be joined
    starts, prefixes, target_starts, num_tokens = [0], [], [0], 0

    def add(segment: np.ndarray, position: int, parent: int) -> None:
        ids.append(segment)
        positions.append(np.arange(position, position + len(segment)))
        starts.append(starts[-1] + len(segment))
        prefixes.append(parent)

    for group in groups:
        shared, parent, beginning = shared_length(group), -1, starts[-1]
        if shared:
            parent = len(prefixes)
            add(np.array(group[0].ids[:shared], np.int64), 0, -1)
        for sequence in group:
            tokens = np.array(sequence.ids, np.int64)
            trained = np.flatnonzero(sequence.mask[1:])  # counted from the token before
            # Where a token of the sequence stands: in the beginning, or at the end of the stream.
            rows.append(trained + np.where(trained < shared, beginning, starts[-1] - shared))
            targets.append(tokens[trained + 1])
            target_starts.append(target_starts[-1] + len(trained))
            add(tokens[shared:], shared, parent)
            num_tokens += len(tokens)
    return Batch(
        input_ids=_joined(ids)[None],
        positions=_joined(positions)[None],
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        prefixes=torch.tensor(prefixes, dtype=torch.int32),
        rows=_joined(rows),
        targets=_joined(targets),
        cu_targets=torch.tensor(target_starts, dtype=torch.int32),
        num_tokens=num_tokens,
    )


def _joined(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *arrays]))


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
