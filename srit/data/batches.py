"""Rows to token streams: what is trained, in which order, packed without padding.

Legend: N tokens of a packed stream, S sequences in it, M trained (completion) tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from srit.models.ops import to_device
from srit.text.prompts import Rendered


@dataclass
class Batch:
    """A packed stream of sequences. No padding exists, so none can be counted.

    Sequences that begin alike may share that beginning: it stands in the stream once, as a segment
    that the others continue.
    """

    input_ids: Tensor  # (1, N)
    positions: Tensor  # (1, N), restart at every sequence
    cu_seqlens: Tensor  # (segments + 1,) int32, where the segments start; on the CPU
    parents: Tensor  # (segments,) int32, the segment that each one continues, or -1; on the CPU
    predict_positions: Tensor  # (M,) stream index of the token *before* each trained token
    targets: Tensor  # (M,) the trained tokens
    cu_targets: Tensor  # (S + 1,) int32, where each sequence's trained tokens start; on the CPU
    num_tokens: int  # of all sequences, shared or not

    def to(self, device: torch.device) -> "Batch":
        """With what the GPU computes on there. Boundaries stay, for the host reads them."""
        moved = {name: to_device(getattr(self, name), device)
                 for name in ("input_ids", "positions", "predict_positions", "targets")}
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
    ids, positions, predict_positions, targets = [], [], [], []  # arrays to be joined
    starts, parents, target_starts, num_tokens = [0], [], [0], 0

    def add(segment: np.ndarray, position: int, parent: int) -> None:
        ids.append(segment)
        positions.append(np.arange(position, position + len(segment)))
        starts.append(starts[-1] + len(segment))
        parents.append(parent)

    for group in groups:
        shared, parent, beginning = shared_length(group), -1, starts[-1]
        if shared:
            parent = len(parents)
            add(np.array(group[0].ids[:shared], np.int64), 0, -1)
        for sequence in group:
            tokens = np.array(sequence.ids, np.int64)
            trained = np.flatnonzero(sequence.mask[1:])  # counted from the token before
            # Where a token of the sequence stands: in the beginning, or at the end of the stream.
            predict_positions.append(trained + np.where(trained < shared, beginning, starts[-1] - shared))
            targets.append(tokens[trained + 1])
            target_starts.append(target_starts[-1] + len(trained))
            add(tokens[shared:], shared, parent)
            num_tokens += len(tokens)
    return Batch(
        input_ids=_joined(ids)[None],
        positions=_joined(positions)[None],
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        parents=torch.tensor(parents, dtype=torch.int32),
        predict_positions=_joined(predict_positions),
        targets=_joined(targets),
        cu_targets=torch.tensor(target_starts, dtype=torch.int32),
        num_tokens=num_tokens,
    )


def _joined(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *arrays]))
