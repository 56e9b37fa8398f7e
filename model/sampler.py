"""The sampler: ragged prompts, a paged KV cache, rows that are replaced as they end (continuous batching).

A row's tokens depend on its own prompt, the seed and its id, never on its neighbours. Three things make that so: a
stream of random numbers per row; operations whose result for one row does not change with the others (`GROUP`, and
attention block by block); and a nucleus that is cut by value, so that ties don't depend on the order of a sort.

Cache, prefix tree and CUDA graphs live as long as one call of `generate`: nothing of one set of weights is left when
the next call finds others (an adapter trained further, put on or taken off).
"""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from base.errors import UserError
from model.attention import Decode, Prefill
from model.cache import BLOCK, NODE, KVCache, PrefixTree, cache_slots
from model.decoder import Decoder, transpose_weights

# Matrix products get a multiple of this many rows. Below 12 rows, MKL (which the CPU's bfloat16 products, and training,
# still go to) picks another kernel for other numbers of rows and sums in another order; for multiples of 4 a row is the
# same to the bit in any batch (LOG.md, 2026-11-24).
GROUP = 4
PREFILL_TOKENS = 1024  # prompt tokens in one forward pass, to bound its activations
# Steps that a GPU takes before the host looks at their tokens. A row that ends among them is computed to the last of
# them in vain: 4 tokens on average, for one wait in 8 steps
STEPS = 8
WORTH_TRANSPOSING = 16  # new tokens: `transpose_weights` takes as long as two steps, and makes each some 8 % faster
CHOICE_ROWS = 16  # in one go on the CPU: a few MB, which the allocator keeps, where all rows' come from the system anew
GIB = 2**30


@dataclass
class Response:
    """What was sampled for one row."""

    id: str
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)  # as sampled, the stop token included
    logprobs: list[float] = field(default_factory=list)  # natural log, of the model itself: temperature 1, no cut
    finish_reason: str | None = None  # "stop" | "length"


@dataclass(eq=False)
class _Row:
    """A row on its way."""

    prompt: Sequence[int]
    response: Response
    limit: int  # most tokens to sample
    uniforms: np.ndarray | None = None  # (limit + STEPS,) float64, drawn when the row is begun
    path: list[int] = field(default_factory=list)  # its nodes in the prefix tree
    blocks: list[int] = field(default_factory=list)  # of the cache
    # tokens of the prompt that another row has computed, or computes in the same pass: whole blocks, which are shared
    # for the pass, and a rest, which is copied
    cached: int = 0
    sources: list[int] = field(default_factory=list)  # blocks to copy the rest of these from, one for each NODE

    @property
    def length(self) -> int:
        """Tokens so far; the last sampled one is not in the cache yet, the next step feeds it in."""
        return len(self.prompt) + len(self.response.tokens)

    @property
    def longest(self) -> int:
        """Most blocks it can need."""
        return _blocks(len(self.prompt) + self.limit)


class Sampler:
    """Samples responses from a decoder (with or without an adapter attached)."""

    def __init__(self, model: Decoder, stop_ids: frozenset[int], *, max_new_tokens: int, temperature: float = 0.0,
                 top_p: float = 1.0, top_k: int = 0, seed: int = 0, slots: int | None = None,
                 kv_memory: float | None = None, share_prefixes: bool = True) -> None:
        """Temperature 0 is greedy; top_p 1 and top_k 0 cut nothing.

        At most `slots` rows are sampled at a time (128, on a GPU 256), in a cache of at most `kv_memory` GiB (what is
        free). Neither changes a row, nor does `share_prefixes`, which computes what prompts begin with once.
        """
        self.model, self.stop_ids = model, stop_ids
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.slots = slots or (256 if model.device.type == "cuda" else 128)
        self.kv_memory, self.share_prefixes = kv_memory, share_prefixes
        self.peak_cache_bytes = 0  # of the last call of `generate`: the blocks in use when they were most
        self._logits: Tensor | None = None  # (most rows at a time, V), on the CPU: see `Decoder.logits`

    def generate(self, prompts: Sequence[tuple[str, Sequence[int]]]) -> Iterator[Response]:
        """Sample one response to each (id, token ids), yielding each as it finishes.

        A UserError says what a prompt or the cache's memory lacks, before anything is sampled.
        """
        waiting = [self._row(id, prompt) for id, prompt in reversed(prompts)]
        if not waiting:
            return
        if self.max_new_tokens > WORTH_TRANSPOSING:
            transpose_weights(self.model)
        slots = min(self.slots, len(waiting))
        if self.model.device.type == "cpu":
            self._logits = torch.empty(slots + GROUP, self.model.config.vocab_size)
        cache, tree = self._open(waiting)
        steps = _Steps(self, cache, slots, width=max(row.longest for row in waiting) + 1)
        live: list[_Row] = []
        while waiting or live:
            new = self._admit(waiting, live, cache, tree)
            if new:
                self._accept(new, *self._prefill(cache, new))
                self._part(cache, new)
                live += new
            else:
                self._grow(waiting, live, cache, tree, steps.count)
                self._accept(live, *steps(live))
            ended = [row for row in live if row.response.finish_reason]
            live = [row for row in live if not row.response.finish_reason]
            self.peak_cache_bytes = cache.peak * KVCache.block_bytes(self.model.config, self.model.dtype)
            for row in ended:
                cache.release(row.blocks)
                yield row.response

    @torch.inference_mode()
    def score(self, prompts: Sequence[tuple[str, Sequence[int]]], choices: Sequence[int]
              ) -> Iterator[tuple[list[str], Tensor]]:
        """Log-probabilities of `choices` as the first token after each (id, token ids); nothing is sampled.

        Yields the ids of a pass over some of the prompts, and (their number, len(choices)) float32 on the CPU.
        """
        waiting = [replace(self._row(id, prompt), limit=1) for id, prompt in reversed(prompts)]
        if not waiting:
            return
        cache, tree = self._open(waiting)
        while waiting:
            new = self._admit(waiting, [], cache, tree)
            hidden = self._last_states(cache, new)  # (N, E)
            # The choices again in float32: bfloat16 logits are so coarse that the best two of four often tie
            scores = hidden.float() @ self.model.lm_head.weight[list(choices)].float().T  # (N, choices)
            scores -= self.model.logits(hidden).logsumexp(-1, keepdim=True)
            for row in new:
                cache.release(row.sources + row.blocks)
            yield [row.response.id for row in new], scores[: len(new)].cpu()

    def _open(self, waiting: Sequence[_Row]) -> tuple[KVCache, PrefixTree]:
        """An empty cache, and the tree of what the rows' prompts have in common."""
        cache = KVCache(self.model.config, self._cache_blocks(waiting), self.model.device, self.model.dtype)
        tree = PrefixTree(cache)
        if self.share_prefixes:
            for row in waiting:
                row.path = tree.enter(row.prompt)
        return cache, tree

    def cache_bytes(self, prompts: Sequence[tuple[str, Sequence[int]]]) -> int:
        """Memory of the KV cache that `generate` will allocate for these prompts."""
        blocks = self._cache_blocks([self._row(id, prompt) for id, prompt in prompts])
        return (blocks + 1) * KVCache.block_bytes(self.model.config, self.model.dtype)

    def limit(self, id: str, prompt: Sequence[int]) -> int:
        """Most tokens that can be sampled for this prompt; a UserError if it is empty, holds an id that the model
        lacks, or leaves no room in the context."""
        vocab, context = self.model.config.vocab_size, self.model.config.max_positions
        if not prompt:
            raise UserError(f"the prompt of {id} is empty: not one token to answer to")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            wrong = next(token for token in prompt if not 0 <= token < vocab)
            raise UserError(f"the prompt of {id} has the token id {wrong}, and the model knows 0 to {vocab - 1}: its "
                            "tokenizer belongs to another model")
        if len(prompt) >= context:
            raise UserError(f"the prompt of {id} has {len(prompt)} tokens, and the model's context holds {context} "
                            "with the response; leave it out")
        return min(self.max_new_tokens, context - len(prompt))

    def _row(self, id: str, prompt: Sequence[int]) -> _Row:
        return _Row(prompt, Response(id, len(prompt)), self.limit(id, prompt))

    def _cache_blocks(self, rows: Sequence[_Row]) -> int:
        """Blocks within the budget, and no more than `slots` rows like the longest could fill."""
        size = KVCache.block_bytes(self.model.config, self.model.dtype)
        budget = free_memory(self.model.device) if self.kv_memory is None else int(self.kv_memory * GIB)
        # its prompt twice: while the prefix tree holds a prompt's blocks, the row may have its own beside them
        needs = {row.response.id: row.longest + _blocks(len(row.prompt)) + 1 for row in rows}
        id = max(needs, key=needs.get)
        if budget < (needs[id] + 1) * size:  # with the scratch block
            raise UserError(f"the KV cache may take {budget / GIB:.3f} GiB, and {id} alone needs "
                            f"{(needs[id] + 1) * size / GIB + 0.0005:.3f}: raise --kv-memory or lower --max-new-tokens")
        return min(budget // size - 1, needs[id] * min(self.slots, len(rows)))

    def _admit(self, waiting: list[_Row], live: list[_Row], cache: KVCache, tree: PrefixTree) -> list[_Row]:
        """Rows to begin with, taken from `waiting` and given blocks for their prompts: as many as there is room for."""
        new, tokens = [], 0
        while waiting and len(live) + len(new) < self.slots:
            row = waiting[-1]
            found, nodes = tree.find(row.path), BLOCK // NODE
            shared = found[nodes - 1 :: nodes]  # whole blocks
            sources = found[len(shared) * nodes :]  # of what is copied
            count = _blocks(len(row.prompt)) - len(shared)
            own = len(row.prompt) - len(found) * NODE  # tokens to compute
            # as many blocks again as its path has for `_part`, and one for each row to grow into
            room = len(cache.free) - sum(_blocks(len(other.path) * NODE) + 1 for other in new) - len(live)
            full = room < count + _blocks(len(row.path) * NODE) + 1
            if full and not new and (not live or 2 * tree.held() > len(cache.users)):
                # what is kept for later must not leave the rows of now without room
                assert tree.blocks, "an empty cache holds any row: _cache_blocks saw to it"
                tree.clear()
                continue
            if full or (new and tokens + own > PREFILL_TOKENS):
                break
            for block in shared + sources:
                cache.share(block)
            row.blocks, row.cached, row.sources = shared + cache.take(count), len(found) * NODE, sources
            tree.leave(row.path, row.blocks)
            # those behind the limit choose tokens that a GPU samples before the host has looked
            row.uniforms = np.zeros(row.limit + STEPS)
            if self.temperature > 0:
                row.uniforms[: row.limit] = row_uniforms(self.seed, row.response.id, row.limit)
            new.append(waiting.pop())
            tokens += own
        return new

    @torch.inference_mode()
    def _prefill(self, cache: KVCache, new: list[_Row]) -> tuple[Tensor, Tensor]:
        """First token of each row and its log-probability, both (len(new), 1); fills the rows' blocks."""
        hidden = self._last_states(cache, new)
        uniforms = torch.zeros(len(hidden), dtype=torch.float64)
        uniforms[: len(new)] = torch.tensor([row.uniforms[0] for row in new])
        chosen, logprobs = self._choose(hidden, uniforms.to(hidden.device))
        return chosen[: len(new), None], logprobs[: len(new), None]

    def _last_states(self, cache: KVCache, new: list[_Row]) -> Tensor:
        """Hidden states (N, E) of the prompts' last tokens, N being len(new) padded; fills the rows' blocks."""
        device = self.model.device
        # a row more for the padding, which goes to the scratch block
        table = _table([*(row.blocks for row in new), []], max(len(row.blocks) for row in new))
        offsets = [row.cached for row in new]
        tokens, positions, lengths, last = _pack([row.prompt[row.cached :] for row in new])
        which = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        positions += torch.tensor([*offsets, 0])[which]
        slots = cache_slots(table, which, positions)
        attend = Prefill(cache, slots.to(device), table[:-1].to(device), lengths[: len(new)], offsets,
                         _copies(new, device))
        hidden = self.model(tokens.to(device), positions.to(device), attend)  # (T, E)
        return hidden.index_select(0, last.to(device))

    def _part(self, cache: KVCache, new: list[_Row]) -> None:
        """Give rows blocks of their own in the place of those that they share, on the CPU, where `attend_pages` wants a
        block to have one owner; a GPU's kernel reads shared ones. What was copied from is let go."""
        for row in new:
            cache.release(row.sources)
            row.sources = []
        if not cache.keys.is_cpu:
            return
        sources, targets = [], []
        for row in new:
            for i, block in enumerate(row.blocks):
                if cache.users[block] > 1:
                    cache.release([block])
                    row.blocks[i] = cache.take(1)[0]
                    sources.append(block)
                    targets.append(row.blocks[i])
        cache.copy(sources, targets)

    def _grow(self, waiting: list[_Row], live: list[_Row], cache: KVCache, tree: PrefixTree, count: int) -> None:
        """Give each live row the blocks that its next `count` tokens need. Where there are none left, the row that came
        last goes back to the waiting ones, to be begun anew: its tokens will be the same."""
        for row in list(live):
            if row not in live:
                continue
            need = _blocks(min(row.length + count - 1, len(row.prompt) + row.limit)) - len(row.blocks)
            if need > len(cache.free):
                tree.clear()
            while row in live and need > len(cache.free):
                last = live.pop()
                cache.release(last.blocks)
                last.response = Response(last.response.id, len(last.prompt))
                last.path = tree.enter(last.prompt) if self.share_prefixes else []
                waiting.append(last)
            if row in live:
                row.blocks += cache.take(max(need, 0))
        if cache.keys.is_cpu:
            self._move_down(live, cache)

    def _move_down(self, live: list[_Row], cache: KVCache) -> None:
        """Where rows have left many free blocks between those in use, fill these with the highest: `attend_pages`
        computes all up to the highest. (Without it the last rows of many took as long as all of them.)"""
        used = len(cache.users) - 1 - len(cache.free)
        if max(max(row.blocks) for row in live) <= 1.25 * used + 8:
            return
        sources, targets = [], []
        for row in live:
            for i, block in enumerate(row.blocks):
                if block > used:
                    row.blocks[i] = cache.take(1)[0]
                    sources.append(block)
                    targets.append(row.blocks[i])
        cache.copy(sources, targets)
        cache.release(sources)

    def _accept(self, rows: list[_Row], tokens: Tensor, logprobs: Tensor) -> None:
        """Add sampled tokens (B, steps) to the rows, each up to its end: the one place where the host waits."""
        for row, sampled, natural in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            response = row.response
            for token, logprob in zip(sampled, natural, strict=True):
                if not math.isfinite(logprob):
                    raise UserError(f"the model's output for {response.id} is not finite: its weights or its adapter "
                                    "are damaged, or --dtype float16 is too narrow for it")
                response.tokens.append(token)
                response.logprobs.append(logprob)
                if token in self.stop_ids:
                    response.finish_reason = "stop"
                elif len(response.tokens) == row.limit:
                    response.finish_reason = "length"
                if response.finish_reason:
                    break

    def _choose(self, hidden: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's next token (B,) and its log-probability (B,), from hidden states (B, E) and uniform numbers (B,).

        On the CPU a few rows at a time, in memory that is used again (see `Decoder.logits`).
        """
        if not hidden.is_cpu:
            return self._choose_rows(self.model.logits(hidden), uniforms)
        logits = self.model.logits(hidden, out=self._logits[: len(hidden)])
        parts = zip(logits.split(CHOICE_ROWS), uniforms.split(CHOICE_ROWS), strict=True)
        parts = [self._choose_rows(*part) for part in parts]
        chosen, logprobs = (torch.cat(each) for each in zip(*parts, strict=True))
        return chosen, logprobs

    def _choose_rows(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """`_choose` from the logits (B, V), which are overwritten."""
        chosen = choose(logits, uniforms, self.temperature, self.top_p, self.top_k)
        # log_softmax goes row by row; logsumexp would share one long row out among the threads, and round otherwise
        return chosen, torch.log_softmax(logits, -1, out=logits).gather(1, chosen[:, None])[:, 0]


class _Steps:
    """Decode steps in which the device goes on with the tokens that it chose: `count` of them between two looks of the
    host. On a GPU a step is a CUDA graph, one for each number of rows that `_padded` gives."""

    def __init__(self, sampler: Sampler, cache: KVCache, slots: int, width: int) -> None:
        """`slots`: most rows of a step; `width`: blocks in a row's table, the positions that `count` steps may go
        beyond a row's end included."""
        self.sampler, self.cache = sampler, cache
        self.device = sampler.model.device
        slots = self._padded(slots)
        self.count = steps_at_once(self.device)
        place = {"device": self.device}
        self.tokens = torch.zeros(slots, dtype=torch.long, **place)
        self.positions = torch.zeros(slots, dtype=torch.long, **place)
        self.table = torch.zeros(slots, width, dtype=torch.int32, **place)
        self.uniforms = torch.zeros(slots, self.count, dtype=torch.float64, **place)
        self.chosen = torch.zeros(slots, self.count, dtype=torch.long, **place)
        self.logprobs = torch.zeros(slots, self.count, **place)
        self.index = torch.zeros(1, dtype=torch.long, **place)  # of the step among the `count`
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    @torch.inference_mode()
    def __call__(self, rows: list[_Row]) -> tuple[Tensor, Tensor]:
        """The rows' next tokens and their log-probabilities, both (len(rows), count)."""
        idle = self._padded(len(rows)) - len(rows)  # rows of padding, whose blocks are scratch
        count = len(rows) + idle
        done = [len(row.response.tokens) for row in rows]
        self.tokens[:count] = torch.tensor([row.response.tokens[-1] for row in rows] + [0] * idle)
        self.positions[:count] = torch.tensor([row.length - 1 for row in rows] + [0] * idle)
        self.table[:count] = _table([row.blocks for row in rows] + [[]] * idle, self.table.shape[1])
        uniforms = np.stack([row.uniforms[i : i + self.count] for row, i in zip(rows, done, strict=True)])
        self.uniforms[: len(rows)] = torch.from_numpy(uniforms)
        self.index.zero_()
        for _ in range(self.count):
            if self.device.type != "cpu":
                self._graph(count).replay()
            else:
                self._step(count)
        return self.chosen[: len(rows)], self.logprobs[: len(rows)]

    def _padded(self, rows: int) -> int:
        """Rows that a step computes for so many: a multiple of GROUP; on a GPU few numbers, each a graph: 4, 8, 16, 32,
        64, and then multiples of 64."""
        if self.device.type == "cpu" or rows > 64:
            group = GROUP if self.device.type == "cpu" else 64
            return -(-rows // group) * group
        return max(GROUP, 1 << (rows - 1).bit_length())

    def _step(self, count: int) -> None:
        """One step of the first `count` rows, from buffers to buffers."""
        model, tokens, positions = self.sampler.model, self.tokens[:count], self.positions[:count]
        hidden = model(tokens, positions, Decode(self.cache, self.table[:count], positions))  # (B, E)
        uniforms = self.uniforms[:count].index_select(1, self.index)[:, 0]
        chosen, logprobs = self.sampler._choose(hidden, uniforms)
        self.chosen[:count].index_copy_(1, self.index, chosen[:, None])
        self.logprobs[:count].index_copy_(1, self.index, logprobs[:, None])
        tokens.copy_(chosen)
        positions += 1
        self.index += 1

    def _graph(self, count: int) -> "torch.cuda.CUDAGraph":
        """The captured step for `count` rows. What warming up writes to the buffers is put right again."""
        if count not in self.graphs:
            buffers = (self.tokens, self.positions, self.index)
            before = [buffer.clone() for buffer in buffers]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step(count)  # compiles the kernels and sets cuBLAS up, which capturing forbids
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self._step(count)
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            self.graphs[count] = graph
        return self.graphs[count]


def steps_at_once(device: torch.device) -> int:
    """Steps between two looks of the host: on the CPU it has nothing to wait for."""
    return 1 if device.type == "cpu" else STEPS


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that a KV cache may take: what is free, but for a reserve for the activations and for others. On Linux that
    is what can be had without swapping, within the limit of a container (cgroup v2); `root` is for tests."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # else what an earlier cache has left with torch's allocator counts as used
        return int(0.85 * torch.cuda.mem_get_info(device)[0])
    if not (root / "proc/meminfo").exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    free = 1024 * _field(root / "proc/meminfo", "MemAvailable:")
    group = root / "sys/fs/cgroup"
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
        # files that were read count as the container's memory too, until somebody needs it
        held = int((group / "memory.current").read_text()) - _field(group / "memory.stat", "inactive_file ")
        free = min(free, max(0, int(limit) - held))
    return free * 3 // 4


def _field(path: Path, name: str) -> int:
    """The number behind `name` in a file of the kernel's."""
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(name))


def _blocks(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK)


def _copies(rows: Sequence[_Row], device: torch.device) -> Tensor | None:
    """(2, C) slots and those that they are copied to, or None: what the rows' `sources` hold, to the block behind the
    whole ones that they share."""
    pairs = [(source * BLOCK + i, row.blocks[row.cached // BLOCK] * BLOCK + i)
             for row in rows for part, source in enumerate(row.sources) for i in range(part * NODE, (part + 1) * NODE)]
    return torch.tensor(pairs).T.contiguous().to(device) if pairs else None


def _table(blocks: Sequence[Sequence[int]], width: int) -> Tensor:
    """Rows' blocks as (len(blocks), width) int32; behind a row's last block the scratch block."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in blocks], dtype=torch.int32)


def _pack(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, list[int], Tensor]:
    """Prompts one behind the other: tokens (T,), positions (T,), lengths, and the place of each prompt's last token.

    Padded to multiples of GROUP: the stream with a prompt more, of token 0, the places with place 0.
    """
    lengths = [len(prompt) for prompt in prompts]
    last = torch.tensor(lengths).cumsum(0) - 1
    last = torch.cat((last, last.new_zeros(-len(prompts) % GROUP)))
    padding = -sum(lengths) % GROUP
    tokens = torch.tensor([token for prompt in prompts for token in prompt] + [0] * padding)
    lengths += [padding] * (padding > 0)
    return tokens, torch.cat([torch.arange(length) for length in lengths]), lengths, last


def row_uniforms(seed: int, id: str, count: int) -> np.ndarray:
    """`count` numbers in [0, 1), float64, a function of the run's seed and the row's id alone."""
    key = hashlib.blake2b(f"{seed}:{id}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(count)


def choose(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Token ids (B,) from logits (B, V) float32 and one uniform number (B,) float64 each.

    Greedy at temperature 0; otherwise the inverse of the cumulative distribution over the tokens that remain: the
    top_k likeliest, of those the fewest likeliest that hold top_p of the mass (nucleus, arXiv 1904.09751). Tokens as
    likely as the last one kept are kept too.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    if 0 < top_k < logits.shape[-1]:
        kth = probabilities.topk(top_k).values[:, -1:]
        probabilities = probabilities.where(probabilities >= kth, 0)
    if top_p < 1:
        probabilities = probabilities.where(probabilities >= _nucleus_cut(probabilities, top_p), 0)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    # right=True passes over tokens of probability 0; u < 1 keeps the index inside, unless there are NaNs
    chosen = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return chosen.clamp(max=logits.shape[-1] - 1)


def _nucleus_cut(probabilities: Tensor, top_p: float) -> Tensor:
    """(B, 1) probability of the least likely token of each row's nucleus; rows need not add up to 1."""
    top_p = top_p * probabilities.cumsum(-1, dtype=torch.float64)[:, -1:]
    # Sorting all of a 150k vocabulary costs as much as a decode step, and the nucleus is nearly always in the top 1024;
    # but to ask whether it is, the host would have to wait for a GPU, which sorts quickly
    for width in (probabilities.shape[-1],) if not probabilities.is_cpu else (1024, probabilities.shape[-1]):
        likeliest = probabilities.topk(min(width, probabilities.shape[-1])).values
        mass = likeliest.cumsum(-1, dtype=torch.float64)
        if width >= probabilities.shape[-1] or bool((mass[:, -1] >= top_p).all()):
            break
    inside = (mass - likeliest < top_p).sum(-1, keepdim=True)  # tokens before which top_p is not yet reached
    return likeliest.gather(1, inside - 1)
