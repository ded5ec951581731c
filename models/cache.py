"""Keys and values of what was read and written so far, in preallocated slots."""

import torch
from torch import Tensor

from srit.models.config import ModelConfig


class KVCache:
    """One slot a row: the token at position p of row b lies at [b, :, p]. No left padding exists.

    Args:
        batch: slots. max_length: positions a slot holds. Memory: 2 L B K S hd elements.
    `lengths` (B,) int64 counts the tokens of every slot; a slot is freed by setting it to 0.
    What lies beyond a row's length is never seen, so a new row needs no clearing.
    """

    def __init__(self, config: ModelConfig, batch: int, max_length: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.max_length = max_length

    def update(self, layer: int, k: Tensor, v: Tensor, rows: Tensor | None, positions: Tensor,
               end: int) -> tuple[Tensor, Tensor]:
        """Write k, v (b, K, T, hd) at `positions` (b, T) of `rows`; keys and values up to `end`.

        `rows` None: the first b slots, for which no copy is made.
        """
        keys, values = self.keys[layer], self.values[layer]
        index = torch.arange(len(k), device=k.device) if rows is None else rows
        # An index, a slice, an index: the indexed dimensions come first, (b, T, K, hd).
        keys[index[:, None], :, positions] = k.transpose(1, 2)
        values[index[:, None], :, positions] = v.transpose(1, 2)
        if rows is None:
            return keys[: len(k), :, :end], values[: len(k), :, :end]
        return keys[rows, :, :end], values[rows, :, :end]
