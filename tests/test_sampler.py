"""The sampler: cached decoding, continuous batching, and randomness that belongs to the row."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QWEN, SMOLLM2

from base.errors import UserError
from base.hub import model_folder
from data.prompts import load_prompts
from model import lora, weights
from model.attention import Packed
from model.cache import KVCache, PrefixTree
from model.chat import Chat
from model.decoder import Decoder
from model.loss import response_logprobs
from model.sampler import Response, Sampler, _Steps, choose, free_memory, row_uniforms

NOTHING = frozenset()


@pytest.fixture(scope="module")
def model(tiny: Path) -> Decoder:
    return weights.load(tiny, torch.device("cpu"), torch.float32)


def ragged_prompts(vocab: int, count: int = 13) -> list[tuple[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 50, (count,), generator=generator).tolist()
    return [(f"row {i}", torch.randint(vocab, (length,), generator=generator).tolist())
            for i, length in enumerate(lengths)]


def sample(model: Decoder, prompts: list, **settings: object) -> dict[str, Response]:
    sampler = Sampler(model, settings.pop("stop_ids", NOTHING), **{"max_new_tokens": 40} | settings)
    found = list(sampler.generate(prompts))
    assert len(found) == len(prompts)
    return {response.id: response for response in found}


@torch.no_grad()
def greedy_without_cache(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """The obvious way: the whole sequence through the model for each token."""
    tokens = list(prompt)
    for _ in range(count):
        hidden = model(torch.tensor(tokens), torch.arange(len(tokens)), Packed([len(tokens)]))
        tokens.append(model.logits(hidden[-1:]).argmax().item())
    return tokens[len(prompt) :]


def test_cached_decoding_equals_the_full_forward(model: Decoder) -> None:
    prompts = ragged_prompts(model.config.vocab_size)
    found = sample(model, prompts)
    for id, prompt in prompts:
        assert found[id].tokens == greedy_without_cache(model, prompt, 40)
        assert found[id].finish_reason == "length"


def test_free_memory_minds_a_containers_limit(tmp_path: Path) -> None:
    for name, text in (("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:   4000 kB\n"),
                       ("sys/fs/cgroup/memory.max", "max\n"), ("sys/fs/cgroup/memory.current", "1500000\n"),
                       ("sys/fs/cgroup/memory.stat", "anon 7\ninactive_file 500000\n")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    cpu = torch.device("cpu")
    assert free_memory(cpu, tmp_path) == 4_096_000 * 3 // 4
    for limit, free in ((3_000_000, 2_000_000), (900_000, 0), (90_000_000, 4_096_000)):
        (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{limit}\n")
        assert free_memory(cpu, tmp_path) == free * 3 // 4


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_rows_do_not_depend_on_their_batch(model: Decoder, temperature: float) -> None:
    """Any number of slots, any order, alone or together: the same tokens, and log-probabilities to the bit."""
    prompts = ragged_prompts(model.config.vocab_size)
    stop = frozenset(range(0, 300, 25))  # rows end at different times, so that slots move and are refilled
    together = sample(model, prompts, temperature=temperature, stop_ids=stop, slots=64)
    assert len({len(response.tokens) for response in together.values()}) > 3
    for slots in (1, 2, 5):
        assert sample(model, prompts[::-1], temperature=temperature, stop_ids=stop, slots=slots) == together
    for prompt in prompts:
        assert sample(model, [prompt], temperature=temperature, stop_ids=stop) == {prompt[0]: together[prompt[0]]}


def test_shared_prefixes_change_no_row(model: Decoder) -> None:
    """Computed once or by each row: the same tokens and log-probabilities, to the bit, and less work."""
    header = list(range(50, 130))
    prompts = [(f"{id} {copy}", header[: 80 - 7 * i] + prompt)
               for i, (id, prompt) in enumerate(ragged_prompts(model.config.vocab_size, 6)) for copy in range(3)]
    seen = []

    def count(module: torch.nn.Module, arguments: tuple) -> None:
        seen.append(len(arguments[0]))

    hook = model.register_forward_pre_hook(count)
    alone = sample(model, prompts, temperature=1.0, share_prefixes=False, slots=5)
    without, seen = sum(seen), []
    assert sample(model, prompts, temperature=1.0, slots=5) == alone
    hook.remove()
    assert sum(seen) < without - 1250  # all of the header but the last, unfinished node, for 17 of 18 prompts


def test_memory_changes_no_row(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for two or three rows at their full length: rows are put back and begun anew, and come out the same.
    Half of them begin alike, with a block and parts of another, so that the prefix tree is cleared in between too."""
    header, cleared = list(range(50, 94)), []
    prompts = [(id, header[: 44 - 3 * (i % 4)] + prompt if i % 2 else prompt * 2)
               for i, (id, prompt) in enumerate(ragged_prompts(model.config.vocab_size))]
    block = KVCache.block_bytes(model.config, torch.float32)
    free = sample(model, prompts, temperature=1.0, max_new_tokens=90)
    sampler = Sampler(model, NOTHING, max_new_tokens=90, temperature=1.0, kv_memory=15 * block / 2**30)
    begun, admit, clear = [], sampler._admit, PrefixTree.clear

    def counting(*arguments: object) -> list:
        rows = admit(*arguments)
        begun.extend(rows)
        return rows

    def clearing(tree: PrefixTree) -> None:
        cleared.append(tree.held())
        clear(tree)

    monkeypatch.setattr(sampler, "_admit", counting)
    monkeypatch.setattr(PrefixTree, "clear", clearing)
    assert {response.id: response for response in sampler.generate(prompts)} == free
    assert len(begun) > len(prompts)  # some were begun twice
    assert sampler.peak_cache_bytes <= 14 * block
    assert max(cleared) > 0


def test_layout_of_weights_and_parts_of_the_head_change_no_row(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights as loaded and turned, the head at once and in parts: the same tokens and log-probabilities to the bit."""
    found = []
    for turned, part in ((10**9, 8192), (0, 8192), (0, 64)):
        monkeypatch.setattr("model.sampler.WORTH_TRANSPOSING", turned)
        monkeypatch.setattr("model.decoder.VOCABULARY_PART", part)
        model = weights.load(tiny, torch.device("cpu"), torch.float32)
        assert model.config.vocab_size > 64
        found.append(sample(model, ragged_prompts(model.config.vocab_size), temperature=1.0))
        assert model.layers[0].mlp.up_proj.weight.is_contiguous() == (turned > 0)
    assert found[0] == found[1] == found[2]


def test_blocks_move_down_as_rows_end(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few long rows among many short ones end up in the lowest blocks, and are the same as alone."""
    context = model.config.max_positions
    prompts = [(str(i), [5 + i % 7] * (context - (120 if i > 36 else 4))) for i in range(40)]
    highest = []
    step = _Steps.__call__

    def watched(self: _Steps, rows: list) -> tuple:
        highest.append(max(max(row.blocks) for row in rows))
        return step(self, rows)

    monkeypatch.setattr(_Steps, "__call__", watched)
    found = sample(model, prompts, temperature=1.0, max_new_tokens=120)
    assert highest[0] > 200 and highest[-1] < 50
    for prompt in prompts[-3:]:
        assert sample(model, [prompt], temperature=1.0, max_new_tokens=120) == {prompt[0]: found[prompt[0]]}


def test_memory_too_small_for_a_row(model: Decoder) -> None:
    sampler = Sampler(model, NOTHING, max_new_tokens=90, kv_memory=5 * KVCache.block_bytes(model.config,
                                                                                          torch.float32) / 2**30)
    with pytest.raises(UserError, match=r"long alone needs 0\.00\d: raise --kv-memory or lower --max-new-tokens"):
        next(sampler.generate([("short", [5]), ("long", [5] * 60)]))


@pytest.mark.parametrize(("prompt", "message"), [([], "is empty"), ([5, 9999], "token id 9999"), ([-1], "token id -1")])
def test_prompts_that_cannot_be(model: Decoder, prompt: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        next(Sampler(model, NOTHING, max_new_tokens=4).generate([("x", prompt)]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steps_between_two_looks_of_the_host(model: Decoder, temperature: float,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which goes on with tokens of rows that have ended: the same rows."""
    prompts = ragged_prompts(model.config.vocab_size)
    stop = frozenset(range(0, 300, 25))
    expected = sample(model, prompts, temperature=temperature, stop_ids=stop, slots=5)
    monkeypatch.setattr("model.sampler.steps_at_once", lambda device: 8)
    assert sample(model, prompts, temperature=temperature, stop_ids=stop, slots=5) == expected


def test_an_adapter_that_moves_under_the_sampler(tiny: Path) -> None:
    """One sampler, one set of weights: base model, adapter, the adapter trained further, base model again."""
    model = weights.load(tiny, torch.device("cpu"), torch.float32)
    prompts = ragged_prompts(model.config.vocab_size)
    sampler = Sampler(model, NOTHING, max_new_tokens=20)

    def rows() -> dict[str, list[int]]:
        return {response.id: response.tokens for response in sampler.generate(prompts)}

    base = rows()
    lora.attach(model, lora.LoRAConfig(rank=4), seed=2)
    assert rows() == base  # B is zero
    seen = [base]
    for _ in range(2):
        with torch.no_grad():
            for adapter in lora.adapted(model).values():
                adapter.lora_B += 0.1 * torch.randn(adapter.lora_B.shape)
        now = rows()
        assert now not in seen
        for id, prompt in prompts[:4]:
            assert now[id] == greedy_without_cache(model, prompt, 20)
        seen.append(now)
    lora.detach(model)
    assert rows() == base


def test_sampler_and_trainer_agree(model: Decoder) -> None:
    """Log-probabilities of sampled tokens by the cache and by the trainer's packed forward; with an adapter too."""
    prompts = ragged_prompts(model.config.vocab_size)
    for adapted in (False, True):
        if adapted:
            lora.attach(model, lora.LoRAConfig(rank=4), seed=2)
            for adapter in lora.adapted(model).values():
                torch.nn.init.normal_(adapter.lora_B, std=0.1)
        found = sample(model, prompts, temperature=1.0)
        for id, prompt in prompts:
            tokens = found[id].tokens
            expected = response_logprobs(model, prompt + tokens, len(prompt), len(prompt) + len(tokens))
            assert torch.allclose(expected, torch.tensor(found[id].logprobs), atol=1e-4)
    lora.detach(model)


def test_stop_and_length(model: Decoder) -> None:
    prompts = ragged_prompts(model.config.vocab_size)
    free = sample(model, prompts)
    stop = frozenset([free["row 0"].tokens[5], free["row 3"].tokens[0]])
    for id, response in sample(model, prompts, stop_ids=stop).items():
        cut = next((i + 1 for i, token in enumerate(free[id].tokens) if token in stop), None)
        assert response.tokens == free[id].tokens[:cut]
        assert response.finish_reason == ("stop" if cut else "length")


def test_context_limits_the_response(model: Decoder) -> None:
    context = model.config.max_positions
    response = sample(model, [("long", [5] * (context - 3))], max_new_tokens=40)["long"]
    assert (len(response.tokens), response.finish_reason) == (3, "length")
    with pytest.raises(UserError, match=f"{context} tokens"):
        sample(model, [("too long", [5] * context)])


def test_seeds(model: Decoder) -> None:
    prompts = ragged_prompts(model.config.vocab_size)
    first = sample(model, prompts, temperature=1.0, seed=1)
    assert first == sample(model, prompts, temperature=1.0, seed=1)
    assert first != sample(model, prompts, temperature=1.0, seed=2)
    # the same prompt under another id is another sample
    twins = sample(model, [("a", [7, 8, 9]), ("b", [7, 8, 9])], temperature=1.0)
    assert twins["a"].tokens != twins["b"].tokens
    assert not np.array_equal(row_uniforms(1, "a", 4), row_uniforms(11, "a", 4))


def chosen_shares(logits: torch.Tensor, **settings: float) -> torch.Tensor:
    """How often each token is chosen when the uniform numbers are a fine grid."""
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    tokens = choose(logits.expand(len(grid), -1), grid, **settings)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / len(grid)


def test_choice_follows_the_distribution() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, float("-inf"), 1.9])
    assert torch.allclose(chosen_shares(logits, temperature=1.0), logits.softmax(-1), atol=1e-3)
    assert torch.allclose(chosen_shares(logits, temperature=0.5), (logits / 0.5).softmax(-1), atol=1e-3)
    assert choose(logits[None], torch.zeros(1), temperature=0).item() == 0


def test_top_k_and_top_p() -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    logits = probabilities.log()
    expected = torch.tensor([0, 0.4, 0, 0.3, 0]) / 0.7
    assert torch.allclose(chosen_shares(logits, temperature=1.0, top_k=2), expected, atol=1e-3)
    assert torch.allclose(chosen_shares(logits, temperature=1.0, top_p=0.69), expected, atol=1e-3)
    expected = torch.tensor([0, 0.4, 0.15, 0.3, 0]) / 0.85
    assert torch.allclose(chosen_shares(logits, temperature=1.0, top_p=0.71), expected, atol=1e-3)
    # after top_k has cut to 0.4 and 0.3, half of what remains is the first alone
    assert chosen_shares(logits, temperature=1.0, top_k=2, top_p=0.5)[1] == 1
    # a nucleus beyond the likeliest 1,024
    flat = torch.zeros(1, 2000)
    assert len(chosen_shares(flat, temperature=1.0, top_p=0.9).nonzero()) == 2000  # ties are kept together
    slope = torch.linspace(0, 1, 2000)[None]
    mass = slope.softmax(-1)[0].flip(0).cumsum(0)
    assert chosen_shares(slope, temperature=1.0, top_p=0.5).nonzero().min() >= 2000 - (mass < 0.5).sum() - 1


def test_transformers_cuts_the_same_nucleus() -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(8, 400, generator=torch.Generator().manual_seed(0)) * 3
    warped = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(50)(None, logits))
    for row, expected in zip(logits, warped, strict=True):
        kept = chosen_shares(row[None], temperature=1.0, top_k=50, top_p=0.8) > 0
        # the grid of uniform numbers misses tokens of less than 1 in 10,000
        assert torch.equal(kept, torch.isfinite(expected) & (expected.softmax(-1) > 2e-4))


def scores_of(model: Decoder, prompts: list[tuple[str, list[int]]], **options: object) -> dict[str, torch.Tensor]:
    sampler = Sampler(model, frozenset(), max_new_tokens=8, **options)
    return {id: row for ids, scores in sampler.score(prompts, (3, 250, 7)) for id, row in zip(ids, scores, strict=True)}


def test_scores_equal_the_definition(model: Decoder) -> None:
    prompts = ragged_prompts(model.config.vocab_size, 150)  # more than one pass
    scores = scores_of(model, prompts)
    assert list(scores) == [id for id, _ in prompts]
    for id, prompt in prompts:
        with torch.no_grad():
            hidden = model(torch.tensor(prompt), torch.arange(len(prompt)), Packed([len(prompt)]))
            expected = model.logits(hidden[-1:])[0].log_softmax(-1)[[3, 250, 7]]
        assert torch.allclose(scores[id], expected, atol=1e-4)


def test_scores_depend_on_no_neighbour(model: Decoder) -> None:
    """Beginnings that are shared or not, few or many questions, little room: the same to the bit."""
    prefix = list(range(40, 77))
    prompts = [(id, prefix + tokens) for id, tokens in ragged_prompts(model.config.vocab_size, 150)]
    scores = scores_of(model, prompts)
    for other in (scores_of(model, prompts, share_prefixes=False), scores_of(model, prompts[:5]),
                  scores_of(model, prompts[::-1], slots=3), scores_of(model, prompts, kv_memory=0.0005)):
        assert all(torch.equal(row, scores[id]) for id, row in other.items())
    assert not scores_of(model, [])


@pytest.mark.real
@pytest.mark.parametrize("name", [SMOLLM2, QWEN])
def test_greedy_equals_transformers_on_real_checkpoints(name: str) -> None:
    """16 Alpaca prompts, 64 tokens: our ragged batch with refilled slots against transformers, one at a time.

    By `generate` for four of them. For all, by one forward pass over prompt and response: greedy decoding gives these
    tokens exactly if each is the argmax behind those before it. (`generate` for all 16 agrees too, and takes minutes.)
    """
    from transformers import AutoModelForCausalLM

    folder = model_folder(name)
    ours = weights.load(folder, torch.device("cpu"), torch.float32)
    chat = Chat(folder, ours.config)
    prompts = [(row["id"], chat.prompt(row["prompt"])) for row in load_prompts("alpaca", 0, 16)[0]]
    found = sample(ours, prompts, stop_ids=chat.stop_ids, max_new_tokens=64, slots=12)
    theirs = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    for i, (id, prompt) in enumerate(prompts):
        tokens = found[id].tokens
        with torch.inference_mode():
            logits = theirs(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            assert logits.argmax(-1).tolist() == tokens
            assert len(tokens) == 64 or tokens[-1] in chat.stop_ids
            if i % 4 == 0:
                out = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                                      do_sample=False, max_new_tokens=64)
                assert out[0, len(prompt) :].tolist() == tokens
