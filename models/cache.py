"""Keys and values of what was read and written so far, in preallocated slots."""

import torch
from torch import Tensor

from srit.models.config import ModelConfig

# Attention reads whole strides of keys: then a row's sums keep their order, to the last bit, however
# long the rows beside it are.
STRIDE = 32


class KVCache:
    """One slot a row: the token at position p of row b lies at [b, :, p]. No left padding exists.

    Args:
        batch: slots. max_length: positions a slot holds, rounded up to a multiple of `STRIDE`.
    Memory: 2 L B K S hd elements.
    `lengths` (B,) int64 counts the tokens of every slot; a slot is freed by setting it to 0.
    What lies beyond a row's length is never seen, so a new row needs no clearing.
    """

    def __init__(self, config: ModelConfig, batch: int, max_length: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        max_length = -(-max_length // STRIDE) * STRIDE
        shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.max_length = max_length

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Copy positions start..end-1 of one slot to another."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, start:end] = tensor[source, :, start:end]

    def update(self, layer: int, k: Tensor, v: Tensor, rows: Tensor | slice, positions: Tensor,
               end: int) -> tuple[Tensor, Tensor]:
        """Write k, v (b, K, T, hd) at `positions` (b, T) of `rows`; keys and values up to `end`.

        Rows given as a slice are read in place; an index tensor makes a copy.
        """
        keys, values = self.keys[layer], self.values[layer]
        if isinstance(rows, slice):
            keys, values = keys[rows], values[rows]
            rows = slice(None)
            index = torch.arange(len(k), device=k.device)
        else:
            index = rows
        # An index, a slice, an index: the indexed dimensions come first, (b, T, K, hd).
        keys[index[:, None], :, positions] = k.transpose(1, 2)
        values[index[:, None], :, positions] = v.transpose(1, 2)
        return keys[rows, :, :end], values[rows, :, :end]
