"""Attention over packed sequences and over the KV cache, each with a slow reference that says what it computes.

An `Attend` is handed to the decoder for one forward pass. There are three: `Packed` for training, `Prefill`
(new prompts, packed; it fills the cache), `Decode` (one new token per row against the cache). On a GPU the last two run
the kernels of kernels.py.

Shapes: T tokens, B rows, L positions, H query heads, K key/value heads, D head_dim, M blocks of the longest row.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cache import BLOCK, KVCache, cache_slots

if torch.cuda.is_available():  # Triton comes with torch's builds for GPUs alone
    from model import kernels

Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (T, 1, D/2)


class Attend(Protocol):
    """What the decoder calls in each layer."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        """q (T, H, D), k and v (T, K, D), not yet rotated, to the mixed values (T, H, D)."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (RoFormer, arXiv 2104.09864) of x (T, heads, D), pairing dimension i with i + D/2 as HF does."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Packed:
    """Causal attention within each of the sequences that lie one behind the other in the stream; the first one's first
    `shared` tokens are the beginning of all."""

    def __init__(self, lengths: Sequence[int], shared: int = 0) -> None:
        self.lengths, self.shared = list(lengths), shared

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        """(T, H, D) mixed values; see `Attend`."""
        return attend_packed(rotate(q, *rotation), rotate(k, *rotation), v, self.lengths, self.shared)


class _Cached:
    """What `Prefill` and `Decode` have in common: new keys and values go to the cache first."""

    def __init__(self, cache: KVCache, slots: Tensor) -> None:
        """`slots` (T,) int64: where each token's keys and values go."""
        self.cache, self.slots = cache, slots
        self.places = cache.places(slots) if slots.is_cpu else None

    def store(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """The rotated q (T, H, D), and the layer's keys and values (blocks, K, BLOCK, D) with the new ones in them."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if not q.is_cpu:
            return kernels.rotate_and_store(q, k, v, *rotation, keys, values, self.slots), keys, values
        self.cache.write(layer, self.places, rotate(k, *rotation), v)
        return rotate(q, *rotation), keys, values


class Prefill(_Cached):
    """Prompts, or what is left of them behind a beginning that is in the cache already, one behind the other.

    A row reads all it attends to from the cache, so that it may lean on what another row of the same pass computes.
    """

    def __init__(self, cache: KVCache, slots: Tensor, table: Tensor, lengths: Sequence[int],
                 offsets: Sequence[int], copies: Tensor | None = None) -> None:
        """`table` (B, M) int32, the rows' blocks; row b brings lengths[b] tokens, the first at position offsets[b].

        `slots` (T,) int64 may go on behind sum(lengths), with scratch slots for padding. `copies` (2, C): slots,
        and those that they are copied to once the tokens are in the cache.
        """
        super().__init__(cache, slots)
        self.copies = copies
        if not table.is_cpu:
            starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(table.device)
            self.arguments = table, starts, torch.tensor(offsets, dtype=torch.int32).to(table.device), max(lengths)
        else:
            self.tiles = query_tiles(table, lengths, offsets)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        """(T, H, D) mixed values; see `Attend`."""
        q, keys, values = self.store(layer, q, k, v, rotation)
        if self.copies is not None:
            self.cache.copy_slots(layer, *self.copies)
        if not q.is_cpu:
            return kernels.prefill_attention(q, keys, values, *self.arguments)
        return attend_prompts(q, keys, values, self.tiles)


class Decode(_Cached):
    """One new token for each of B rows; token b stands at positions[b] of its row."""

    def __init__(self, cache: KVCache, table: Tensor, positions: Tensor) -> None:
        """`table` (B, M) int32, the rows' blocks, and `positions` (B,) int64, both on the cache's device.

        A row of zeros is padding.
        """
        super().__init__(cache, cache_slots(table, torch.arange(len(table), device=table.device), positions))
        self.table, self.lengths = table, (positions + 1).int()
        if table.is_cpu:
            self.pages = Pages(table, self.lengths)
        else:  # over how many programs a row's length is spread, by the longest that the table can hold
            self.splits = kernels.num_splits(len(table), cache.keys.shape[2], table.shape[1] * BLOCK,
                                             kernels.multiprocessors(table.device))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        """(B, H, D) mixed values; see `Attend`."""
        q, keys, values = self.store(layer, q, k, v, rotation)
        if not q.is_cpu:
            return kernels.decode_attention(q, keys, values, self.table, self.lengths, self.splits)
        return attend_pages(q, keys, values, self.pages)


class Pages:
    """For `attend_pages`: which block is whose, from the rows' tables (B, M) and lengths (B,); once for all layers."""

    def __init__(self, table: Tensor, lengths: Tensor) -> None:
        starts = torch.arange(table.shape[1], device=table.device) * BLOCK
        held = starts < lengths[:, None]  # (B, M)
        rows, columns = held.nonzero(as_tuple=True)
        self.blocks = table[rows, columns].long()  # (P,) row by row
        self.bags = held.sum(1).cumsum(0) - held.sum(1)  # (B,) where each row begins in them
        self.table = table.where(held, table[:, :1]).long()  # (B, M), behind a row's end its first block again
        self.count = int(self.blocks.max()) + 1
        # Free blocks in between are computed with the rest, as row 0's, and not read
        self.owner = self.blocks.new_zeros(self.count).index_copy(0, self.blocks, rows)
        self.last = self.table.gather(1, (lengths[:, None].long() - 1) // BLOCK)[:, 0]  # (B,) each row's last block
        self.unseen = torch.arange(BLOCK, device=table.device) > (lengths[:, None] - 1) % BLOCK  # (B, BLOCK), in that


def attend_packed(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], shared: int = 0) -> Tensor:
    """Causal attention within each sequence: q (T, H, D), k and v (T, K, D), sum(lengths) = T, to (T, H, D). Sequences
    behind the first see its first `shared` tokens too.

    One fused call per sequence. A single call with a block-diagonal mask would compute, and hold, T × T scores. The
    shared tokens are queries in each call again, whose result is dropped: so the call needs no mask of its own.
    """
    mixed = []
    for q1, k1, v1 in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        again = shared if mixed else 0
        if shared:  # the first one's are copied too: autograd would keep all of q, k and v for a part of each
            q1, k1, v1 = (torch.cat((x[:again], x1)) for x, x1 in ((q, q1), (k, k1), (v, v1)))
        q1, k1, v1 = (x.transpose(0, 1)[None] for x in (q1, k1, v1))  # (1, H or K, L, D)
        one = F.scaled_dot_product_attention(q1, k1, v1, is_causal=True, enable_gqa=True)
        mixed.append(one[0].transpose(0, 1)[again:])
    return torch.cat(mixed) if len(mixed) > 1 else mixed[0]  # a copy of it would be kept for the gradient beside it


def attend_packed_reference(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], shared: int = 0) -> Tensor:
    """What `attend_packed` computes, from the definition: the whole T × T matrix under a block-diagonal causal mask,
    with the shared columns open to all that come behind them."""
    groups, dim = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (document[:, None] == document) | (torch.arange(len(document)) < shared)
    allowed &= torch.ones(len(document), len(document)).tril().bool()
    scores = torch.einsum("qhd,khd->hqk", q, k) / dim**0.5  # (H, T, T)
    weights = scores.masked_fill(~allowed.to(q.device), float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def query_tiles(table: Tensor, lengths: Sequence[int], offsets: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For `attend_prompts`: BLOCK queries a row at a time, those at positions i · BLOCK to (i + 1) · BLOCK - 1.

    For each i (the rows that have queries there being N): the blocks they see (N, i + 1), the queries' places in the
    stream (N, BLOCK), and which of these are real (N, BLOCK).
    """
    lengths, offsets = torch.tensor(lengths), torch.tensor(offsets)
    starts = lengths.cumsum(0) - lengths
    tiles = []
    for first in range(int(offsets.min()) // BLOCK * BLOCK, int((offsets + lengths).max()), BLOCK):
        rows = ((offsets < first + BLOCK) & (first < offsets + lengths)).nonzero()[:, 0]
        within = first - offsets[rows, None] + torch.arange(BLOCK)  # (N, BLOCK), of the row's own tokens
        real = (within >= 0) & (within < lengths[rows, None])
        places = (starts[rows, None] + within).where(real, 0)
        tiles.append((table[rows, : first // BLOCK + 1].long(), places, real))
    return tiles


def attend_prompts(q: Tensor, keys: Tensor, values: Tensor, tiles: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Causal attention of packed prompts to the cache: q (T, H, D), keys and values (blocks, K, BLOCK, D), to the mixed
    values (T, H, D), of which padding's are zero.

    Tiles begin at multiples of BLOCK, and each is a product of its own. So a token's result is the same to the bit
    whether what stands before it was computed in this pass or in an earlier one.
    """
    mixed = torch.zeros_like(q)
    kv_heads, dim = keys.shape[1], q.shape[2]
    ahead = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu(1)
    for blocks, places, real in tiles:
        k, v = (x[blocks].transpose(1, 2).flatten(2, 3) for x in (keys, values))  # (N, K, L, D)
        grouped = q[places].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # (N, K, H/K, BLOCK, D)
        scores = (grouped.flatten(2, 3) * dim**-0.5) @ k.mT  # (N, K, H/K · BLOCK, L)
        scores.unflatten(2, (-1, BLOCK))[..., -BLOCK:].masked_fill_(ahead, float("-inf"))
        mixed1 = scores.float().softmax(-1).to(v.dtype) @ v  # (N, K, H/K · BLOCK, D)
        mixed1 = mixed1.unflatten(2, (-1, BLOCK)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # (N, BLOCK, H, D)
        mixed[places[real]] = mixed1[real]
    return mixed


def attend_pages(q: Tensor, keys: Tensor, values: Tensor, pages: Pages) -> Tensor:
    """One query per row against its cache: q (B, H, D), keys and values (blocks, K, BLOCK, D), to (B, H, D).

    No two rows may hold the same block. The products run over the blocks as they lie, each with the queries of its
    owner, and a row's blocks are added up afterwards: to gather the rows' keys and values would cost as much as the
    attention. The query heads that share a key head form one matrix, so that the cache is read once for all of them.
    """
    keys, values = keys[: pages.count], values[: pages.count]
    grouped = (q * q.shape[-1] ** -0.5).unflatten(1, (keys.shape[1], -1))  # (B, K, H/K, D)
    scores = (grouped[pages.owner] @ keys.mT).float()  # (blocks, K, H/K, BLOCK)
    scores[pages.last] = scores[pages.last].masked_fill(pages.unseen[:, None, None], float("-inf"))
    highest = scores.amax(-1)[pages.table].amax(1)  # (B, K, H/K)
    weights = scores.sub_(highest[pages.owner][..., None]).exp_()
    mixed = (weights.to(values.dtype) @ values).float()  # (blocks, K, H/K, D)
    # A bag adds up one block after the other, in the row's order: the same sum whatever the other rows are
    total, mixed = (F.embedding_bag(pages.blocks, x.flatten(1), pages.bags, mode="sum").unflatten(1, x.shape[1:])
                    for x in (weights.sum(-1), mixed))
    return (mixed / total[..., None]).flatten(1, 2).to(q.dtype)


def attend_cached_reference(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, rows: Sequence[int],
                            lengths: Sequence[int]) -> Tensor:
    """What `attend_prompts`, `attend_pages` and the kernels compute, query by query and head by head: query t, of row
    rows[t] of the table, sees that row's first lengths[t] positions."""
    groups = q.shape[1] // keys.shape[1]
    mixed = torch.zeros_like(q)
    for t, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        for h in range(q.shape[1]):
            k, v = (x[table[row].long(), h // groups].flatten(0, 1)[:length] for x in (keys, values))  # (L, D)
            mixed[t, h] = (k @ q[t, h] / q.shape[-1] ** 0.5).softmax(0) @ v
    return mixed
