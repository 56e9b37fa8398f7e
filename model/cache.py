"""The KV cache: keys and values of every layer for a fixed number of slots, one sequence to a slot."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import ModelConfig

# Attention reads a multiple of this many positions: with it the CPU's sums over them come out the same to the bit
# however long the longest neighbour is (16 were too few for heads below 64: LOG.md, 2026-11-24)
BLOCK = 32


class KVCache:
    """Two tensors, (layers, slots, K, capacity, D), allocated once.

    A slot's positions are contiguous, so that attention reads plain slices of it and no gather is needed. On the CPU
    untouched pages take no memory; on a GPU the whole of it is taken at once.
    """

    def __init__(self, config: ModelConfig, slots: int, capacity: int, device: torch.device,
                 dtype: torch.dtype) -> None:
        """`capacity` is the longest sequence a slot has to hold, prompt and response, in tokens."""
        capacity = -(-capacity // BLOCK) * BLOCK
        shape = (config.num_layers, slots, config.num_kv_heads, capacity, config.head_dim)
        # zeros, not empty: what lies behind a sequence's end is multiplied by a weight of 0, and 0 × NaN is NaN
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.slots, self.capacity = slots, capacity

    def fill(self, layer: int, slots: Sequence[int], lengths: Sequence[int], k: Tensor, v: Tensor) -> None:
        """Write packed k and v (T, K, D) of whole prompts, prompt i to slot slots[i] from position 0 on.

        Tokens beyond sum(lengths of the slots given) are padding and are not stored.
        """
        start = 0
        for slot, length in zip(slots, lengths, strict=False):
            self.keys[layer, slot, :, :length] = k[start : start + length].transpose(0, 1)
            self.values[layer, slot, :, :length] = v[start : start + length].transpose(0, 1)
            start += length

    def append(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one position of each of the first B slots, k and v (B, K, D); returns theirs (B, K, capacity, D)."""
        rows = torch.arange(len(positions), device=positions.device)
        keys, values = self.keys[layer, : len(positions)], self.values[layer, : len(positions)]
        keys[rows, :, positions] = k
        values[rows, :, positions] = v
        return keys, values

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]
