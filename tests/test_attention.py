"""Each fast attention path against its reference."""

import pytest
import torch

from model.attention import (
    Decode,
    attend_cached,
    attend_cached_reference,
    attend_packed,
    attend_packed_reference,
    attend_shared,
    attend_shared_reference,
)
from model.cache import KVCache
from model.config import ModelConfig


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (7, 1), (8, 2)])
def test_packed_equals_reference(heads: int, kv_heads: int, dim: int) -> None:
    torch.manual_seed(0)
    lengths = [1, 17, 64, 5, 130]
    q, k, v = (torch.randn(sum(lengths), h, dim) for h in (heads, kv_heads, kv_heads))
    assert relative(attend_packed(q, k, v, lengths), attend_packed_reference(q, k, v, lengths)) < 1e-5


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


@pytest.mark.parametrize("prefix", [0, 1, 40])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (7, 1)])
def test_shared_equals_reference(heads: int, kv_heads: int, prefix: int) -> None:
    torch.manual_seed(0)
    lengths = [1, 17, 64, 5]
    q, k, v = (torch.randn(prefix + sum(lengths), h, 64) for h in (heads, kv_heads, kv_heads))
    expected = attend_shared_reference(q, k, v, prefix, lengths)
    assert relative(attend_shared(q, k, v, prefix, lengths), expected) < 1e-5
    if prefix:  # which is what each sequence computes behind a prefix of its own
        alone = attend_packed_reference(*(torch.cat((x[:prefix], x[prefix + 1 : prefix + 18])) for x in (q, k, v)),
                                        [prefix + 17])
        assert relative(attend_shared(q, k, v, prefix, lengths)[prefix + 1 : prefix + 18], alone[prefix:]) < 1e-5


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (7, 1), (8, 2)])
def test_cached_equals_reference(heads: int, kv_heads: int, dim: int) -> None:
    torch.manual_seed(0)
    lengths = [1, 33, 64, 50]
    q = torch.randn(4, heads, dim)
    keys, values = torch.randn(4, kv_heads, 64, dim), torch.randn(4, kv_heads, 64, dim)
    mask = torch.zeros(4, 64).masked_fill(torch.arange(64) >= torch.tensor(lengths)[:, None], float("-inf"))
    expected = attend_cached_reference(q, keys, values, lengths)
    assert relative(attend_cached(q, keys, values, mask), expected) < 1e-5


def test_decode_reads_what_was_appended() -> None:
    """Appending a sequence position by position gives, at each, the packed attention over what is there."""
    torch.manual_seed(0)
    config = ModelConfig("LlamaForCausalLM", 10, 64, 64, 1, 4, 2, 16, 1e-5, 64, 1e4, "default", {}, False, False,
                         False, ())
    cache = KVCache(config, slots=4, capacity=32, device=torch.device("cpu"), dtype=torch.float32)
    q, k, v = torch.randn(20, 4, 16), torch.randn(20, 2, 16), torch.randn(20, 2, 16)
    expected = attend_packed_reference(q, k, v, [20])
    for i in range(20):
        positions = torch.full((4,), i)
        attend = Decode(cache, positions, longest=i + 1)
        mixed = attend(0, *(x[i].expand(4, *x.shape[1:]) for x in (q, k, v)))
        assert relative(mixed, expected[i].expand_as(mixed)) < 1e-5
