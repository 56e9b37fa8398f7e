"""Attention over packed sequences and over the KV cache, each with a slow reference that says what it computes.

An `Attend` is handed to the decoder for one forward pass. There are four: `Packed` for training and scoring, `Shared`
(packed, behind a beginning that all have in common), `Prefill` (packed, and it fills the cache), `Decode` (one new
token per sequence against the cache).

Shapes: T tokens, B sequences, L cached positions, H query heads, K key/value heads, D head_dim.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cache import BLOCK, KVCache


class Attend(Protocol):
    """What the decoder calls in each layer."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, D), k and v (T, K, D), rotated, to the mixed values (T, H, D)."""


class Packed:
    """Causal attention within each of the sequences that lie one behind the other in the stream."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, H, D) mixed values; see `Attend`."""
        return attend_packed(q, k, v, self.lengths)


class Shared:
    """`Packed` behind a prefix of all sequences, which comes first in the stream, and once."""

    def __init__(self, prefix: int, lengths: Sequence[int]) -> None:
        """`prefix` tokens, then sequences of `lengths` tokens, whose positions go on from the prefix's."""
        self.prefix, self.lengths = prefix, list(lengths)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, H, D) mixed values; see `Attend`."""
        return attend_shared(q, k, v, self.prefix, self.lengths)


class Prefill:
    """`Packed`, which also writes sequence i's keys and values to cache slot slots[i], from position 0 on."""

    def __init__(self, cache: KVCache, slots: Sequence[int], lengths: Sequence[int]) -> None:
        self.cache, self.slots, self.lengths = cache, slots, list(lengths)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, H, D) mixed values; see `Attend`."""
        self.cache.fill(layer, self.slots, self.lengths, k, v)
        return attend_packed(q, k, v, self.lengths)


class Decode:
    """One new token for each of the first B cache slots; token b stands at positions[b]."""

    def __init__(self, cache: KVCache, positions: Tensor, longest: int) -> None:
        """`positions` (B,) int64 on the cache's device; `longest`, their maximum + 1, comes from the host so that
        nothing waits for the device."""
        self.cache, self.positions = cache, positions
        self.length = -(-longest // BLOCK) * BLOCK
        ahead = torch.arange(self.length, device=positions.device) > positions[:, None]
        self.mask = torch.zeros(ahead.shape, dtype=cache.keys.dtype, device=positions.device)
        self.mask.masked_fill_(ahead, float("-inf"))  # (B, L)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, D) mixed values; see `Attend`."""
        keys, values = self.cache.append(layer, self.positions, k, v)
        return attend_cached(q, keys[:, :, : self.length], values[:, :, : self.length], self.mask)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Causal attention within each sequence: q (T, H, D), k and v (T, K, D), sum(lengths) = T, to (T, H, D).

    One fused call per sequence. A single call with a block-diagonal mask would compute, and hold, T × T scores.
    """
    groups = q.shape[1] // k.shape[1]
    mixed = []
    for q1, k1, v1 in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        k1, v1 = (x.repeat_interleave(groups, dim=1).transpose(0, 1)[None] for x in (k1, v1))  # (1, H, L, D)
        one = F.scaled_dot_product_attention(q1.transpose(0, 1)[None], k1, v1, is_causal=True)
        mixed.append(one[0].transpose(0, 1))
    return torch.cat(mixed)


def attend_shared(q: Tensor, k: Tensor, v: Tensor, prefix: int, lengths: Sequence[int]) -> Tensor:
    """Causal attention within a prefix, and of each sequence to the prefix and itself: q (T, H, D), k and v (T, K, D),
    prefix + sum(lengths) = T, to (T, H, D). A sequence computes what it would if the prefix stood before it alone."""
    if not prefix:
        return attend_packed(q, k, v, lengths)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    parts = [prefix, *lengths]
    mixed = [attend_packed(q[:prefix], k[:prefix], v[:prefix], [prefix])]
    for q1, k1, v1 in list(zip(q.split(parts), k.split(parts), v.split(parts), strict=True))[1:]:
        k1, v1 = torch.cat((k[:prefix], k1)), torch.cat((v[:prefix], v1))  # (P + L, H, D)
        mask = torch.ones(len(q1), len(k1), dtype=torch.bool, device=q.device).tril(prefix)
        one = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q1, k1, v1)), attn_mask=mask)
        mixed.append(one[0].transpose(0, 1))
    return torch.cat(mixed)


def attend_shared_reference(q: Tensor, k: Tensor, v: Tensor, prefix: int, lengths: Sequence[int]) -> Tensor:
    """What `attend_shared` computes, sequence by sequence, each with the prefix before it."""
    mixed = [attend_packed_reference(q[:prefix], k[:prefix], v[:prefix], [prefix])]
    start = prefix
    for length in lengths:
        whole = [torch.cat((x[:prefix], x[start : start + length])) for x in (q, k, v)]
        mixed.append(attend_packed_reference(*whole, [prefix + length])[prefix:])
        start += length
    return torch.cat(mixed)


def attend_packed_reference(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """What `attend_packed` computes, from the definition: the whole T × T matrix under a block-diagonal causal mask."""
    groups, dim = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (document[:, None] == document) & torch.ones(len(document), len(document)).tril().bool()
    scores = torch.einsum("qhd,khd->hqk", q, k) / dim**0.5  # (H, T, T)
    weights = scores.masked_fill(~allowed.to(q.device), float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def attend_cached(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """One query per sequence against its cache: q (B, H, D), keys and values (B, K, L, D), additive mask (B, L).

    The query heads that share a key head form one matrix, so that the cache is read once for all of them. Two plain
    products, not `scaled_dot_product_attention`: below 300 positions they are faster on the CPU, and a row's result
    does not change with the number of rows beside it (the fused call's does: LOG.md, 2026-11-24).
    """
    grouped = q.unflatten(1, (keys.shape[1], -1))  # (B, K, H/K, D)
    scores = (grouped * q.shape[-1] ** -0.5) @ keys.mT  # (B, K, H/K, L)
    weights = (scores + mask[:, None, None]).float().softmax(-1).to(values.dtype)
    return (weights @ values).flatten(1, 2)  # (B, H, D)


def attend_cached_reference(q: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int]) -> Tensor:
    """What `attend_cached` computes, row by row and head by head; row b sees its first lengths[b] positions."""
    groups = q.shape[1] // keys.shape[1]
    mixed = torch.empty_like(q)
    for b, length in enumerate(lengths):
        for h in range(q.shape[1]):
            k, v = keys[b, h // groups, :length], values[b, h // groups, :length]  # (L, D)
            mixed[b, h] = (k @ q[b, h] / q.shape[-1] ** 0.5).softmax(0) @ v
    return mixed
