"""Key/value cache in preallocated slots, one sequence per slot."""

import torch
from torch import Tensor

from srit.models.config import ModelConfig

# Attention reads keys up to a multiple of this. A row's sums then keep their order, to the last bit,
# whatever the lengths of the other rows.
STRIDE = 32


class KVCache:
    """The token at position p of slot b is stored at [b, :, p]; there is no left padding.

    Args:
        slots: sequences it holds. max_length: positions per slot, rounded up to a multiple of `STRIDE`.
    Memory: 2 L B S K hd elements.
    `lengths` (slots,) int64 counts the tokens of every slot. What lies beyond is never seen, so a
    slot is reused without clearing it.
    """

    def __init__(self, config: ModelConfig, slots: int, max_length: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        max_length = -(-max_length // STRIDE) * STRIDE
        shape = (slots, config.num_key_value_heads, max_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)

    def positions(self, B: int, T: int) -> Tensor:
        """(B, T) positions of the next T tokens of the first B slots."""
        return self.lengths[:B, None] + torch.arange(T, device=self.lengths.device)

    def advance(self, B: int, T: int) -> None:
        """The first B slots have T more tokens."""
        self.lengths[:B] += T

    def set_length(self, length: int) -> None:
        """Every slot has `length` tokens, those already stored there."""
        self.lengths.fill_(length)

    def fork(self, slots: int, length: int) -> None:
        """Copy the first `length` tokens of slot 0 to slots 1..slots-1; all of these have `length`."""
        for tensor in (*self.keys, *self.values):
            tensor[1:slots, :, :length] = tensor[:1, :, :length]
        self.lengths[:slots] = length

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor,
               end: int) -> tuple[Tensor, Tensor]:
        """Write k and v (B, K, T, hd) at `positions` (B, T) of the first B slots.

        Returns views of their keys and values up to `end`, (B, K, end, hd).
        """
        B = len(k)
        keys, values = self.keys[layer][:B], self.values[layer][:B]
        slots = torch.arange(B, device=k.device)[:, None]
        # Index, slice, index: the indexed dimensions come first, (B, T, K, hd).
        keys[slots, :, positions] = k.transpose(1, 2)
        values[slots, :, positions] = v.transpose(1, 2)
        return keys[:, :, :end], values[:, :, :end]
