"""Examples and pairs to batches: token streams packed without padding.

Legend: N tokens of a packed stream, S sequences in it, M trained (completion) tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from srit.models import Decoder
from srit.models.ops import to_device
from srit.text.prompts import Rendered


@dataclass
class Example:
    """One SFT example."""

    id: str
    tokens: Rendered

    @property
    def num_tokens(self) -> int:
        return len(self.tokens.ids)

    @property
    def stream_length(self) -> int:
        """Tokens that a forward pass reads."""
        return self.num_tokens

    @cached_property  # asked for at every step
    def num_trained(self) -> int:
        """Tokens that the loss is averaged over; the first token has no predecessor to predict it."""
        return sum(self.tokens.mask[1:])


@dataclass
class Pair:
    """One preference pair: the same prompt tokens, then the chosen or the rejected completion."""

    id: str
    chosen: Rendered
    rejected: Rendered
    ref_logps: tuple[float, float] | None = None  # of chosen and rejected, once they are known

    @property
    def num_tokens(self) -> int:
        return len(self.chosen.ids) + len(self.rejected.ids)

    @property
    def stream_length(self) -> int:
        """Tokens that a forward pass reads: the common prefix is in the stream once."""
        return self.num_tokens - common_prefix([self.chosen, self.rejected])


def shared_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all sequences begin with, leaving each at least one of its own."""
    first, last = min(sequences), max(sequences)  # in lexicographic order; those between share as much
    longest = min(map(len, sequences)) - 1
    return next((at for at in range(longest) if first[at] != last[at]), longest)


def common_prefix(sequences: Sequence[Rendered]) -> int:
    """`shared_prefix` of sequences to be trained; a single one shares nothing."""
    return shared_prefix([s.ids for s in sequences]) if len(sequences) > 1 else 0


@dataclass
class Batch:
    """A packed stream of sequences, without padding.

    Sequences with a common prefix may share it: the prefix is in the stream once, as a segment that
    the others continue.
    """

    input_ids: Tensor  # (1, N)
    positions: Tensor  # (1, N), restart at every sequence
    cu_seqlens: Tensor  # (segments + 1,) int32, where the segments start; on the CPU
    parents: Tensor  # (segments,) int32, the segment that each one continues, or -1; on the CPU
    predict_positions: Tensor  # (M,) stream index of the token *before* each trained token
    targets: Tensor  # (M,) the trained tokens
    cu_targets: Tensor  # (S + 1,) int32, where each sequence's trained tokens start; on the CPU
    num_tokens: int  # of all sequences, shared or not
    ref_logps: Tensor | None = None  # (S,) float32, the reference's log-prob of each sequence

    def to(self, device: torch.device) -> "Batch":
        """Move what the GPU computes on. Segment boundaries stay: the host reads them."""
        names = ["input_ids", "positions", "predict_positions", "targets"]
        names += ["ref_logps"] if self.ref_logps is not None else []
        moved = {name: to_device(getattr(self, name), device) for name in names}
        if device.type == "cuda":
            moved["cu_targets"] = self.cu_targets.pin_memory()
        return replace(self, **moved)

    def trained_hidden(self, model: Decoder) -> Tensor:
        """(M, D) hidden states of the positions that predict a trained token: all the head sees."""
        hidden = model.hidden(self.input_ids, positions=self.positions, cu_seqlens=self.cu_seqlens,
                              parents=self.parents)
        return hidden[0, self.predict_positions]


def collate(groups: Sequence[Sequence[Rendered]]) -> Batch:
    """Concatenate groups of sequences into one stream; the sequences of a group share their prefix.

    The shift by one between a token and the position that predicts it happens here and nowhere
    else. The first token of a sequence has no predecessor and is never trained.
    """
    ids, positions, predict_positions, targets = [], [], [], []  # arrays to be concatenated
    starts, parents, target_starts, num_tokens = [0], [], [0], 0

    def add(segment: np.ndarray, position: int, parent: int) -> None:
        ids.append(segment)
        positions.append(np.arange(position, position + len(segment)))
        starts.append(starts[-1] + len(segment))
        parents.append(parent)

    for group in groups:
        shared, parent, prefix_start = common_prefix(group), -1, starts[-1]
        if shared:
            parent = len(parents)
            add(np.array(group[0].ids[:shared], np.int64), 0, -1)
        for sequence in group:
            tokens = np.array(sequence.ids, np.int64)
            predict = np.flatnonzero(sequence.mask[1:])  # positions within the sequence
            # In the stream these are in the shared prefix, or in the segment that is added below.
            offset = np.where(predict < shared, prefix_start, starts[-1] - shared)
            predict_positions.append(predict + offset)
            targets.append(tokens[predict + 1])
            target_starts.append(target_starts[-1] + len(predict))
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


def collate_examples(examples: Sequence[Example]) -> Batch:
    """One sequence an example."""
    return collate([[example.tokens] for example in examples])


def collate_pairs(pairs: Sequence[Pair]) -> Batch:
    """Sequence 2i is chosen i, 2i + 1 is rejected i; the two share their prompt.

    The batch carries the reference's log-probs when all pairs have them.
    """
    batch = collate([(pair.chosen, pair.rejected) for pair in pairs])
    if all(pair.ref_logps is not None for pair in pairs):
        batch.ref_logps = torch.tensor([logp for pair in pairs for logp in pair.ref_logps])
    return batch
