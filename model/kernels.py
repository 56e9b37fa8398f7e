"""Triton kernels for inference on a GPU: attention over the paged cache, and the small operations around it, fused.

Each computes what its plain counterpart in decoder.py or attention.py does, with the same roundings; none has a
backward. tests/test_kernels.py compares them. Triton fixes the target when a kernel is first launched, so importing
this file needs no GPU.

The cache of a layer is two tensors, keys and values, (blocks, K, BLOCK, D). Position p of a sequence lies in block
table[p // BLOCK] of its row of the block table, at offset p % BLOCK (PagedAttention, arXiv 2309.06180). Block 0 belongs
to nobody: unused entries of a table point there.

Shapes: T tokens, B sequences, M blocks of a table's row, H query heads, K key/value heads, D head_dim.
"""
# ruff: noqa: ANN001, ANN201 (a kernel's arguments are pointers and numbers of the device, for which there are no hints)

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLITS = 16  # at most so many parts of one sequence
LOG2_E = 1.4426950408889634  # the softmax takes powers of 2, for which GPUs have an instruction
SHORTEST_SPLIT = 256  # positions: below, the second kernel costs more than the parts gain


def num_splits(rows: int, kv_heads: int, longest: int, multiprocessors: int) -> int:
    """In how many parts `decode_attention` should cut each sequence: a power of two, 1 to 16.

    `rows` sequences and `kv_heads` give rows × kv_heads programs; parts multiply them until each multiprocessor has
    two, or a part of the `longest` sequence would fall below SHORTEST_SPLIT positions.
    """
    splits = 1
    while splits < SPLITS and rows * kv_heads * splits < 2 * multiprocessors and longest >= 2 * splits * SHORTEST_SPLIT:
        splits *= 2
    return splits


def multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def shape_of(q: Tensor, keys: Tensor) -> dict[str, int]:
    """What all kernels that touch the cache (blocks, K, BLOCK, D) know when they are compiled."""
    _, kv_heads, block, dim = keys.shape
    return {"KV_HEADS": kv_heads, "GROUP": q.shape[1] // kv_heads, "DIM": dim, "BLOCK": block}


def decode_tile(dim: int, group: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """`decode_kernel`'s tile, warps and pipeline, chosen so that no target spills registers (tests/test_kernels.py).

    Tensor cores work on 16 rows, so a group is padded to 16: the kernel waits for memory, and the empty rows cost
    nothing. A sum of products on the plain cores, the alternative for small groups, holds all products in registers.
    """
    padded = max(16, triton.next_power_of_2(dim))
    tile = (8192 if dtype.itemsize == 2 else 2048) // padded
    ahead = 3 if padded <= 64 else 2  # tiles of keys and values in flight, twice as many stages: block ids come first
    return {"ROWS": max(16, triton.next_power_of_2(group)), "PADDED": padded, "TILE": min(max(tile, 16), 64),
            "num_warps": 4, "num_stages": 1 + 2 * ahead, "enable_fp_fusion": True}


def prefill_tile(dim: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """`prefill_kernel`'s, likewise. In float32 no tensor core helps, and the registers bound the tile."""
    rows = 32 if dtype.itemsize == 4 else 128 if dim <= 128 else 64
    settings = decode_tile(dim, rows, dtype) | {"num_warps": 8}
    return settings if rows == 128 else settings | {"num_stages": 3}  # one tile ahead: two would not fit sm_89


@triton.jit
def scan(q, last, keys, values, table, head, begin, end, scale,
         KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Attention of the rows of q (ROWS, padded D) over positions begin to end, row i up to last[i]: the mixed values
    in float32, not yet divided by the weights' sum; that sum; and the highest score, as an exponent of 2.

    The online softmax of FlashAttention (arXiv 2205.14135). Each row must see position `begin`.
    """
    ROWS: tl.constexpr = q.shape[0]
    PADDED: tl.constexpr = q.shape[1]
    columns = tl.arange(0, PADDED)
    mixed = tl.zeros((ROWS, PADDED), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in range(begin, end, TILE):
        positions = start + tl.arange(0, TILE)
        blocks = tl.load(table + positions // BLOCK, mask=positions < end, other=0).to(tl.int64)
        lines = ((blocks * KV_HEADS + head) * BLOCK + positions % BLOCK)[:, None] * DIM + columns
        # zeros for what lies behind the end, not whatever the block holds: 0 × NaN is NaN
        present = (positions < end)[:, None] & (columns < DIM)
        k = tl.load(keys + lines, mask=present, other=0)  # (TILE, D)
        v = tl.load(values + lines, mask=present, other=0)
        # "ieee": float32 stays float32, where the default would cut it to the 10 bits of TF32
        scores = tl.dot(q, k.T, input_precision="ieee") * scale
        scores = tl.where(positions <= last[:, None], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * fade[:, None], input_precision="ieee")
        peak = higher
    return mixed, total, peak


@triton.jit
def decode_kernel(q, keys, values, table, lengths, out, sums, width, scale,
                  KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
                  ROWS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr):
    """Program (b, k, s): the queries of key head k over part s of sequence b, to out (B, H, splits, D), and the log2
    of the sum of their weights to sums (B, H, splits), unless it is None: then the only part is the result."""
    b, head, split, splits = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    length = tl.load(lengths + b)
    share = tl.cdiv(tl.cdiv(length, TILE), splits) * TILE  # whole tiles, of this row's own length
    begin = split * share
    end = tl.minimum(begin + share, length)
    members, columns = tl.arange(0, ROWS), tl.arange(0, PADDED)
    heads = (b * KV_HEADS + head) * GROUP + members
    real = (members < GROUP)[:, None] & (columns < DIM)
    queries = tl.load(q + heads[:, None] * DIM + columns, mask=real, other=0)
    last = tl.zeros((ROWS,), tl.int32) + (length - 1)
    mixed, total, peak = scan(queries, last, keys, values, table + b * width, head, begin, end, scale,
                              KV_HEADS, DIM, BLOCK, TILE)
    mixed = mixed / tl.maximum(total, 1.0)[:, None]  # the highest score alone weighs 1: less is an empty part's 0
    parts = heads * splits + split
    tl.store(out + parts[:, None] * DIM + columns, mixed.to(out.dtype.element_ty), mask=real)
    if sums is not None:
        tl.store(sums + parts, peak + tl.log2(total), mask=members < GROUP)


@triton.jit
def combine_kernel(parts, sums, out, DIM: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr):
    """Program i: the parts of one query head of one sequence, (splits, D), weighted by their sums, to out (B, H, D)."""
    lines, columns = tl.program_id(0) * SPLITS + tl.arange(0, SPLITS), tl.arange(0, PADDED)
    logs = tl.load(sums + lines)
    peak = tl.max(logs, 0)
    weights = tl.exp2(logs - tl.where(peak == float("-inf"), 0.0, peak))  # an idle row's logs are all -inf
    total = tl.sum(weights, 0)
    mixed = tl.load(parts + lines[:, None] * DIM + columns, mask=(columns < DIM)[None, :], other=0)
    mixed = tl.sum(mixed * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + tl.program_id(0) * DIM + columns, mixed.to(out.dtype.element_ty), mask=columns < DIM)


@triton.jit
def prefill_kernel(q, keys, values, table, starts, offsets, out, width, scale,
                   KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
                   ROWS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr):
    """Program (i, k, n): the i-th tile from the end of sequence n's queries, all heads of key head k, to out (T, H, D).

    A row of the tile is one head of one token, so that each key is read once for the group.
    """
    head, n = tl.program_id(1), tl.program_id(2)
    first = tl.load(starts + n)
    count = tl.load(starts + n + 1) - first
    step: tl.constexpr = ROWS // GROUP  # tokens of a tile; up to GROUP - 1 rows stay empty
    behind = tl.program_id(0) * step  # the last tokens see most and take longest: they come first
    if behind >= count:
        return
    row, columns = tl.arange(0, ROWS), tl.arange(0, PADDED)
    token = tl.cdiv(count - behind, step) * step - step + row // GROUP
    offset = tl.load(offsets + n)
    present = (row < step * GROUP) & (token < count)
    real = present[:, None] & (columns < DIM)
    lines = ((first + token).to(tl.int64) * KV_HEADS + head) * GROUP + row % GROUP
    lines = lines[:, None] * DIM + columns
    queries = tl.load(q + lines, mask=real, other=0)
    last = offset + tl.where(present, token, 0)
    mixed, total, _ = scan(queries, last, keys, values, table + n * width, head, 0, tl.max(last, 0) + 1, scale,
                           KV_HEADS, DIM, BLOCK, TILE)
    tl.store(out + lines, (mixed / total[:, None]).to(out.dtype.element_ty), mask=real)


@triton.jit
def rms_norm_kernel(x, residual, weight, out, summed, count, eps,
                    SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Program i: ROWS of the `count` rows of x (…, E), plus those of `residual` unless it is None, to out (and, the
    sum before the norm, to `summed`)."""
    lines, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    at = lines[:, None].to(tl.int64) * SIZE + columns
    real = (lines < count)[:, None] & (columns < SIZE)
    stream = tl.load(x + at, mask=real, other=0)
    if residual is not None:
        stream = (stream.to(tl.float32) + tl.load(residual + at, mask=real, other=0).to(tl.float32)).to(stream.dtype)
        tl.store(summed + at, stream, mask=real)
    wide = stream.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 1) / SIZE + eps)[:, None]
    factors = tl.load(weight + columns, mask=columns < SIZE, other=0)
    scaled = scaled.to(stream.dtype).to(tl.float32) * factors.to(tl.float32)  # two roundings, as in decoder.RMSNorm
    tl.store(out + at, scaled.to(stream.dtype), mask=real)


@triton.jit
def rotate_kernel(q, k, v, cos, sin, rotated, keys, values, slots, q_stride, k_stride, v_stride,
                  KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
                  ROWS: tl.constexpr, PADDED: tl.constexpr):
    """Program (t, k): token t's key head k and its query heads; see `rotate_and_store`. PADDED covers D/2."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = DIM // 2
    members, columns = tl.arange(0, ROWS), tl.arange(0, PADDED)
    inside = columns < HALF
    c = tl.load(cos + token * HALF + columns, mask=inside, other=0)
    s = tl.load(sin + token * HALF + columns, mask=inside, other=0)

    real = (members < GROUP)[:, None] & inside
    heads = (head * GROUP + members)[:, None] * DIM + columns
    a = tl.load(q + token * q_stride + heads, mask=real, other=0)
    b = tl.load(q + token * q_stride + heads + HALF, mask=real, other=0)
    heads += token * KV_HEADS * GROUP * DIM
    tl.store(rotated + heads, turn(a, c, b, s, -1), mask=real)
    tl.store(rotated + heads + HALF, turn(b, c, a, s, 1), mask=real)

    slot = tl.load(slots + token)
    line = ((slot // BLOCK * KV_HEADS + head) * BLOCK + slot % BLOCK) * DIM + columns
    a = tl.load(k + token * k_stride + head * DIM + columns, mask=inside, other=0)
    b = tl.load(k + token * k_stride + head * DIM + columns + HALF, mask=inside, other=0)
    tl.store(keys + line, turn(a, c, b, s, -1), mask=inside)
    tl.store(keys + line + HALF, turn(b, c, a, s, 1), mask=inside)
    a = tl.load(v + token * v_stride + head * DIM + columns, mask=inside, other=0)
    b = tl.load(v + token * v_stride + head * DIM + columns + HALF, mask=inside, other=0)
    tl.store(values + line, a, mask=inside)
    tl.store(values + line + HALF, b, mask=inside)


@triton.jit
def turn(a, cos, b, sin, sign):
    """a · cos + sign · b · sin, each product rounded to the dtype before the sum is, as PyTorch does."""
    left = (a.to(tl.float32) * cos.to(tl.float32)).to(a.dtype)
    right = (b.to(tl.float32) * sin.to(tl.float32)).to(a.dtype)
    return (left.to(tl.float32) + sign * right.to(tl.float32)).to(a.dtype)


@triton.jit
def silu_mul_kernel(gate, up, out, gate_stride, up_stride, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Program (t, i): the i-th TILE of row t of silu(gate) × up, all (T, F)."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < SIZE
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0)
    wide = g.to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(g.dtype).to(tl.float32)
    tl.store(out + row * SIZE + columns, (silu * u.to(tl.float32)).to(g.dtype), mask=inside)


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, splits: int) -> Tensor:
    """One query per sequence against its cached positions: q (B, H, D), table (B, M) int32, lengths (B,) int32, both
    on the device, to (B, H, D). Row b sees its first lengths[b] positions, its own among them; of length 0, it is 0.

    The launches depend on shapes and `splits` (`num_splits`) alone, so that a CUDA graph of them holds for any
    lengths. Flash-decoding (crfm.stanford.edu/2023/10/12/flashdecoding.html): with few sequences each is cut into
    parts, which a second kernel combines.
    """
    rows, heads, dim = q.shape
    settings = shape_of(q, keys) | decode_tile(dim, heads // keys.shape[1], q.dtype)
    scale = dim**-0.5 * LOG2_E
    out = torch.empty_like(q)
    grid = (rows, keys.shape[1], splits)
    if splits == 1:
        decode_kernel[grid](q, keys, values, table, lengths, out, None, table.stride(0), scale, **settings)
        return out
    parts = torch.empty(rows, heads, splits, dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(rows, heads, splits, dtype=torch.float32, device=q.device)
    decode_kernel[grid](q, keys, values, table, lengths, parts, sums, table.stride(0), scale, **settings)
    combine_kernel[(rows * heads,)](parts, sums, out, dim, settings["PADDED"], splits, num_warps=1,
                                    enable_fp_fusion=True)
    return out


def prefill_attention(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, starts: Tensor, offsets: Tensor,
                      longest: int) -> Tensor:
    """Causal attention of packed new tokens, whose keys and values the cache already holds: q (T, H, D) to (T, H, D).

    Sequence n has the queries q[starts[n] : starts[n + 1]], its i-th sees cached positions 0 … offsets[n] + i.
    `starts` (N + 1,), `offsets` (N,) and `table` (N, M) are int32 on the device; `longest`, the most queries that a
    sequence has, comes from the host. Tokens behind starts[N] are padding and get zeros.
    """
    dim, group = q.shape[2], q.shape[1] // keys.shape[1]
    settings = shape_of(q, keys) | prefill_tile(dim, q.dtype)
    out = torch.zeros_like(q)
    grid = (triton.cdiv(longest, settings["ROWS"] // group), keys.shape[1], len(offsets))
    prefill_kernel[grid](q, keys, values, table, starts, offsets, out, table.stride(0), dim**-0.5 * LOG2_E, **settings)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float,
             residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """`decoder.RMSNorm` of x (…, E); with a residual (…, E), of x + residual, and that sum: (norm, sum)."""
    size = x.shape[-1]
    x = x.contiguous()
    out, summed = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    padded, count = triton.next_power_of_2(size), x.numel() // size
    rows = max(1, 2048 // padded)  # the norms of query and key heads are short: many to a program
    rms_norm_kernel[(triton.cdiv(count, rows),)](
        x, None if residual is None else residual.contiguous(), weight, out, summed, count, eps, size, padded, rows,
        num_warps=4 if padded <= 4096 else 8, enable_fp_fusion=True)
    return out if residual is None else (out, summed)


def rotate_and_store(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
                     slots: Tensor) -> Tensor:
    """Rotated q (`attention.rotate`), (T, H, D); k, rotated, and v (T, K, D) go to the cache at slots (T,) int64.

    Position p's slot is table[p // BLOCK] * BLOCK + p % BLOCK. cos and sin are (T, 1, D/2). q, k and v may be slices
    of one wider tensor: only a token's heads have to be contiguous.
    """
    settings = shape_of(q, keys)
    settings |= {"PADDED": triton.next_power_of_2(q.shape[2] // 2),
                 "ROWS": triton.next_power_of_2(settings["GROUP"])}
    rotated = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # no fusion to multiply-add: it would skip the rounding between, and with it be another result than PyTorch's
    rotate_kernel[(len(q), keys.shape[1])](q, k, v, cos, sin, rotated, keys, values, slots, q.stride(0), k.stride(0),
                                           v.stride(0), **settings, num_warps=1, enable_fp_fusion=False)
    return rotated


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """F.silu(gate) * up of (T, F) tensors, which may be slices of one wider tensor."""
    rows, size = gate.shape
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    silu_mul_kernel[(rows, triton.cdiv(size, 1024))](gate, up, out, gate.stride(0), up.stride(0), size, 1024,
                                                     num_warps=4, enable_fp_fusion=True)
    return out
