"""The KV cache: keys and values of every layer in blocks of 32 positions, which rows take as they grow (paged, as in
PagedAttention, arXiv 2309.06180), and the prompts' common beginnings, which are computed once."""

import heapq
import math
import mmap
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import ModelConfig

# Positions in a block. All sums over positions go block by block, so that on the CPU a row comes out the same to the
# bit whatever stands beside it. 64 was as fast (SmolLM2), and leaves twice as much of a row's last block empty.
BLOCK = 32
# Tokens in a node of the prefix tree. What chat templates put before a user's words is shorter than a block, and may be
# half of a prompt: 24 tokens of 46 on average, with SmolLM2 and Alpaca.
NODE = 8


class KVCache:
    """`keys` and `values`, (layers, blocks, K, BLOCK, D), allocated once; who holds which block is kept on the host.

    Block 0 is scratch: padding and rows that have ended write there, and what they read there is thrown away. On the
    CPU pages that were never written take no memory; on a GPU the whole of it is taken at once.
    """

    def __init__(self, config: ModelConfig, blocks: int, device: torch.device, dtype: torch.dtype) -> None:
        """Room for `blocks` blocks, scratch not counted."""
        shape = (config.num_layers, blocks + 1, config.num_kv_heads, BLOCK, config.head_dim)
        # zeros, not empty: what lies behind a row's end is multiplied by a weight of 0, and 0 × NaN is NaN
        self.keys, self.values = (_zeros(shape, device, dtype) for _ in range(2))
        self.free = list(range(1, blocks + 1))  # a heap: the lowest first, so that those in use lie close together
        self.users = [0] * (blocks + 1)
        self.peak = 0  # most blocks held at a time

    @staticmethod
    def block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        """Memory of one block, all layers."""
        return 2 * config.num_layers * config.num_kv_heads * BLOCK * config.head_dim * dtype.itemsize

    def take(self, count: int) -> list[int]:
        """`count` free blocks, the taker being their only user."""
        assert count <= len(self.free), "the caller makes room first"
        blocks = [heapq.heappop(self.free) for _ in range(count)]
        for block in blocks:
            self.users[block] = 1
        self.peak = max(self.peak, len(self.users) - 1 - len(self.free))
        return blocks

    def share(self, block: int) -> None:
        """One user more for a block that is held."""
        self.users[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One user fewer for each; a block without users is free."""
        for block in blocks:
            self.users[block] -= 1
            if not self.users[block]:
                heapq.heappush(self.free, block)

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """The contents of blocks to others, all layers."""
        self.keys[:, targets] = self.keys[:, sources]
        self.values[:, targets] = self.values[:, sources]

    def copy_slots(self, layer: int, sources: Tensor, targets: Tensor) -> None:
        """One layer's keys and values at slots (C,) to others."""
        for stored in (self.keys[layer], self.values[layer]):
            stored[targets // BLOCK, :, targets % BLOCK] = stored[sources // BLOCK, :, sources % BLOCK]

    def places(self, slots: Tensor) -> Tensor:
        """For `write`: where each token's K heads lie, (T · K,), for slots (T,) int64 (block · BLOCK + place in it)."""
        heads = torch.arange(self.keys.shape[2], device=slots.device)
        return (((slots // BLOCK)[:, None] * len(heads) + heads) * BLOCK + (slots % BLOCK)[:, None]).flatten()

    def write(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v (T, K, D) at their `places`."""
        self.keys[layer].flatten(0, 2).index_copy_(0, places, k.flatten(0, 1))
        self.values[layer].flatten(0, 2).index_copy_(0, places, v.flatten(0, 1))


def cache_slots(table: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """(T,) int64: where tokens at `positions` (T,) of the `rows` (T,) of a block table (B, M) are kept."""
    return table[rows, positions // BLOCK].long() * BLOCK + positions % BLOCK


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros; on the CPU in pages that the system provides when they are first written (torch.zeros writes them all)."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    # numpy's zeros come when they are written too, but in pages of 2 MB: half of one in vain for each layer's keys
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class PrefixTree:
    """Which prompts begin alike, in steps of NODE tokens, and the cache blocks that hold what they begin with.

    A node stands for the first NODE, 2 · NODE, … tokens of a prompt. All prompts are entered before the first is
    computed, so that it is known who still needs what: a block is kept as long as that is somebody.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.nodes: dict[tuple, int] = {}  # (parent, its NODE tokens): node
        self.expected: Counter[int] = Counter()  # prompts through each node that have not been computed
        self.blocks: dict[int, int] = {}  # node: the block of the row that has computed its last NODE tokens

    def enter(self, prompt: Sequence[int]) -> list[int]:
        """The nodes that a prompt goes through; its last token is in none of them, since its output is needed."""
        path, node = [], 0
        for start in range(0, len(prompt) - NODE, NODE):
            node = self.nodes.setdefault((node, tuple(prompt[start : start + NODE])), len(self.nodes) + 1)
            path.append(node)
        self.expected.update(path)
        return path

    def find(self, path: Sequence[int]) -> list[int]:
        """The blocks that hold a prompt's beginning as far as it is there, one for each node."""
        found = []
        for node in path:
            if node not in self.blocks:
                break
            found.append(self.blocks[node])
        return found

    def leave(self, path: Sequence[int], blocks: Sequence[int]) -> None:
        """A prompt has been given blocks: keep those that others wait for, and let go what none does any more."""
        for i, node in enumerate(path):
            block = blocks[i * NODE // BLOCK]
            self.expected[node] -= 1
            if self.expected[node] and node not in self.blocks:
                self.blocks[node] = block
                self.cache.share(block)
            elif not self.expected[node] and node in self.blocks:
                self.cache.release([self.blocks.pop(node)])

    def held(self) -> int:
        """Number of blocks that are kept."""
        return len(set(self.blocks.values()))

    def clear(self) -> None:
        """Keep nothing; what is needed again is computed again."""
        self.cache.release(list(self.blocks.values()))
        self.blocks.clear()
