"""Each fast attention path against its reference."""

import pytest
import torch

from model.attention import (
    Decode,
    Pages,
    attend_cached_reference,
    attend_packed,
    attend_packed_reference,
    attend_pages,
    attend_prompts,
    query_tiles,
    rotate,
)
from model.cache import BLOCK, NODE, KVCache, PrefixTree
from model.config import ModelConfig

CONFIG = ModelConfig("LlamaForCausalLM", 10, 64, 64, 1, 4, 2, 16, 1e-5, 64, 1e4, "default", {}, False, False, False, ())


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(("lengths", "shared"), [([1, 17, 64, 5, 130], 0), ([40, 1, 64, 9], 24)])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (7, 1), (8, 2)])
def test_packed_equals_reference(heads: int, kv_heads: int, dim: int, lengths: list[int], shared: int) -> None:
    torch.manual_seed(0)
    qkv = [torch.randn(sum(lengths), h, dim, requires_grad=True) for h in (heads, kv_heads, kv_heads)]
    ours, theirs = (attend(*qkv, lengths, shared) for attend in (attend_packed, attend_packed_reference))
    assert relative(ours, theirs) < 1e-5
    weights = torch.randn_like(ours)
    for mine, other in zip(*(torch.autograd.grad((out * weights).sum(), qkv) for out in (ours, theirs)), strict=True):
        assert relative(mine, other) < 1e-5


def test_packed_documents_do_not_see_each_other_nor_the_future() -> None:
    torch.manual_seed(0)
    lengths = [9, 20]
    q, k, v = torch.randn(29, 4, 16), torch.randn(29, 2, 16), torch.randn(29, 2, 16)
    before = attend_packed(q, k, v, lengths)
    k[:9], v[:9] = 100.0, -100.0  # the first document changes: the second must not notice
    k[20:], v[20:] = 50.0, 50.0  # and what lies ahead changes: what stands before it must not notice
    after = attend_packed(q, k, v, lengths)
    assert torch.equal(before[9:20], after[9:20])
    assert not torch.equal(before[20:], after[20:])


def scattered(lengths: list[int], kv_heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values (blocks, K, BLOCK, D) and the table of rows whose blocks lie scattered among free ones."""
    counts = [-(-length // BLOCK) for length in lengths]
    blocks = (torch.randperm(2 * sum(counts)) + 1)[: sum(counts)].split(counts)
    table = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    for row, held in zip(table, blocks, strict=True):
        row[: len(held)] = held
    shape = (2 * sum(counts) + 1, kv_heads, BLOCK, dim)
    return torch.randn(shape), torch.randn(shape), table


SHAPES = pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (7, 1), (8, 2)])


@pytest.mark.parametrize("dim", [64, 80, 128])
@SHAPES
def test_decoding_equals_reference(heads: int, kv_heads: int, dim: int) -> None:
    torch.manual_seed(0)
    lengths = [1, 33, 64, 50, 32, 200]
    keys, values, table = scattered(lengths, kv_heads, dim)
    q = torch.randn(len(lengths), heads, dim)
    expected = attend_cached_reference(q, keys, values, table, range(len(lengths)), lengths)
    assert relative(attend_pages(q, keys, values, Pages(table, torch.tensor(lengths))), expected) < 1e-5


@pytest.mark.parametrize("dim", [64, 80])
@SHAPES
def test_prompts_equal_reference(heads: int, kv_heads: int, dim: int) -> None:
    """Prompts of all lengths around a block's, some behind a beginning that was computed before."""
    torch.manual_seed(0)
    offsets, lengths = [0, 32, 0, 64, 0, 24, 40], [1, 40, 32, 3, 100, 5, 60]
    ends = [offset + length for offset, length in zip(offsets, lengths, strict=True)]
    keys, values, table = scattered(ends, kv_heads, dim)
    q = torch.randn(sum(lengths) + 4, heads, dim)  # with four tokens of padding
    found = attend_prompts(q, keys, values, query_tiles(table, lengths, offsets))
    rows = [row for row, length in enumerate(lengths) for _ in range(length)]
    seen = [end for first, last in zip(offsets, ends, strict=True) for end in range(first + 1, last + 1)]
    expected = attend_cached_reference(q[:-4], keys, values, table, rows, seen)
    assert relative(found[:-4], expected) < 1e-5
    assert not found[-4:].any()


def test_a_prompt_is_the_same_to_the_bit_in_two_passes() -> None:
    torch.manual_seed(0)
    keys, values, table = scattered([100, 90], 2, 64)
    q = torch.randn(100, 6, 64)
    whole = attend_prompts(q, keys, values, query_tiles(table[:1], [100], [0]))
    for done in (64, 40):
        behind = attend_prompts(q[done:], keys, values, query_tiles(table[:1], [100 - done], [done]))
        assert torch.equal(whole[done:], behind)


def test_decode_reads_what_was_appended() -> None:
    """Appending a sequence position by position gives, at each, the packed attention over what is there."""
    torch.manual_seed(0)
    cache = KVCache(CONFIG, blocks=8, device=torch.device("cpu"), dtype=torch.float32)
    q, k, v = torch.randn(40, 4, 16), torch.randn(40, 2, 16), torch.randn(40, 2, 16)
    angles = torch.randn(40, 1, 8)
    rotation = angles.cos(), angles.sin()
    expected = attend_packed_reference(rotate(q, *rotation), rotate(k, *rotation), v, [40])
    table = torch.tensor([cache.take(2) for _ in range(4)], dtype=torch.int32)
    for i in range(40):
        attend = Decode(cache, table, positions=torch.full((4,), i))
        now = [x[i].expand(4, *x.shape[1:]) for x in (q, k, v, *rotation)]
        mixed = attend(0, *now[:3], tuple(now[3:]))
        assert relative(mixed, expected[i].expand_as(mixed)) < 1e-5


def test_rotary_angles_turn_pairs() -> None:
    x, angle = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]]), torch.full((1, 1, 2), torch.pi / 2)
    assert torch.allclose(rotate(x, angle.cos(), angle.sin()), torch.tensor([[[0.0, -2.0, 1.0, 0.0]]]), atol=1e-6)


def test_prefix_tree_keeps_what_somebody_waits_for() -> None:
    cache = KVCache(CONFIG, blocks=20, device=torch.device("cpu"), dtype=torch.float32)
    tree = PrefixTree(cache)
    common = list(range(2 * NODE))
    prompts = [common + [1], common + [2, 3], common[:NODE] + [4] * NODE, common[: NODE + 1], common[:NODE]]
    paths = [tree.enter(prompt) for prompt in prompts]
    # the last token is in no node; equal beginnings are one node, equal tokens behind another beginning are not
    assert [len(path) for path in paths] == [2, 2, 1, 1, 0]
    assert paths[0] == paths[1] and len({path[0] for path in paths[:4]}) == 1
    held, found = [], []
    for path in paths:
        found.append(tree.find(path))
        held.append(cache.take(1))
        tree.leave(path, held[-1])
    # the third computes what follows the first node, and what it computes nobody else needs
    assert found == [[], held[0] * 2, held[0], held[0], []]
    assert not tree.held()  # nobody waits any more
    for blocks in held:
        cache.release(blocks)
    assert sorted(cache.free) == list(range(1, 21))  # and what all have released is free again
