"""The sampler: ragged prompts, a KV cache, slots that are refilled as rows finish (continuous batching).

A row's tokens depend on its own prompt, the seed and its id, never on its neighbours. Three things make that so: a
stream of random numbers per row; operations whose result for one row does not change with the others (`GROUP`); and
a nucleus that is cut by value, so that ties don't depend on the order of a sort.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from base.errors import UserError
from model.attention import Decode, Prefill, Shared
from model.cache import KVCache
from model.decoder import Decoder

# Matrix products get a multiple of this many rows. Below 12 rows, MKL picks another kernel for other numbers of rows
# and sums in another order; for multiples of 4 a row is the same to the bit in any batch (LOG.md, 2026-11-24).
GROUP = 4
PREFILL_TOKENS = 2048  # prompt tokens in one forward pass, to bound its activations


@dataclass
class Response:
    """What was sampled for one row."""

    id: str
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)  # as sampled, the stop token included
    logprobs: list[float] = field(default_factory=list)  # natural log, of the model itself: temperature 1, no cut
    finish_reason: str | None = None  # "stop" | "length"


@dataclass
class _Row:
    """A row on its way: in the cache slot of its index among the rows."""

    prompt: Sequence[int]
    response: Response
    limit: int  # most tokens to sample
    uniforms: np.ndarray  # (limit,) float64

    @property
    def position(self) -> int:
        """Of the last sampled token, which the next step feeds in."""
        return len(self.prompt) + len(self.response.tokens) - 1


class Sampler:
    """Samples responses from a decoder (with or without an adapter attached)."""

    def __init__(self, model: Decoder, stop_ids: frozenset[int], *, max_new_tokens: int, temperature: float = 0.0,
                 top_p: float = 1.0, top_k: int = 0, seed: int = 0, slots: int = 64) -> None:
        """Temperature 0 is greedy; top_p 1 and top_k 0 cut nothing; `slots` rows are sampled at a time."""
        self.model, self.stop_ids = model, stop_ids
        self.max_new_tokens, self.seed, self.slots = max_new_tokens, seed, slots
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k

    def generate(self, prompts: Sequence[tuple[str, Sequence[int]]]) -> Iterator[Response]:
        """Sample one response to each (id, token ids), yielding each as it finishes."""
        waiting = [self._row(id, prompt) for id, prompt in reversed(prompts)]
        if not waiting:
            return
        slots = -(-min(self.slots, len(waiting)) // GROUP) * GROUP
        capacity = max(len(row.prompt) + row.limit for row in waiting)
        cache = KVCache(self.model.config, slots, capacity, self.model.device, self.model.embed_tokens.weight.dtype)
        rows: list[_Row] = []
        while waiting or rows:
            if waiting and len(rows) < min(self.slots, slots):
                new = [waiting.pop()]
                while waiting and len(rows) + len(new) < min(self.slots, slots) and (
                    sum(len(row.prompt) for row in new) + len(waiting[-1].prompt) <= PREFILL_TOKENS
                ):
                    new.append(waiting.pop())
                self._accept(new, self._prefill(cache, new, first_slot=len(rows)))
                rows += new
            else:
                self._accept(rows, self._decode(cache, rows))
            for i in reversed(range(len(rows))):
                if rows[i].response.finish_reason:
                    yield rows[i].response
                    # The last row moves into the hole, so that the live ones stay the first of the cache
                    last = rows.pop()
                    if i < len(rows):
                        cache.move(len(rows), i, last.position)
                        rows[i] = last

    def limit(self, id: str, prompt: Sequence[int]) -> int:
        """Most tokens that can be sampled for this prompt; a UserError if the context has no room for one."""
        vocab, context = self.model.config.vocab_size, self.model.config.max_positions
        assert prompt and min(prompt) >= 0 and max(prompt) < vocab, f"{id}: token ids must be in [0, {vocab})"
        if len(prompt) >= context:
            raise UserError(f"the prompt of {id} has {len(prompt)} tokens, and the model's context holds {context} "
                            "with the response; leave it out")
        return min(self.max_new_tokens, context - len(prompt))

    def _row(self, id: str, prompt: Sequence[int]) -> _Row:
        limit = self.limit(id, prompt)
        uniforms = row_uniforms(self.seed, id, limit) if self.temperature > 0 else np.zeros(limit)
        return _Row(prompt, Response(id, len(prompt)), limit, uniforms)

    @torch.inference_mode()
    def _prefill(self, cache: KVCache, new: list[_Row], first_slot: int) -> Tensor:
        """Logits (len(new), V) of the first token of each response; fills slots from `first_slot` on."""
        tokens, positions, lengths, last = _pack([row.prompt for row in new], self.model.device)
        slots = range(first_slot, first_slot + len(new))
        hidden = self.model(tokens, positions, Prefill(cache, slots, lengths))  # (T, E)
        return self.model.logits(hidden[last])[: len(new)]

    @torch.inference_mode()
    def _decode(self, cache: KVCache, rows: list[_Row]) -> Tensor:
        """Logits (len(rows), V) of the next token of each row."""
        padding = [0] * (-len(rows) % GROUP)  # idle slots: they write to their own position 0, which nobody reads
        tokens = torch.tensor([row.response.tokens[-1] for row in rows] + padding, device=self.model.device)
        positions = [row.position for row in rows]
        longest = max(positions) + 1
        positions = torch.tensor(positions + padding, device=self.model.device)
        hidden = self.model(tokens, positions, Decode(cache, positions, longest))  # (B, E)
        return self.model.logits(hidden)[: len(rows)]

    @torch.inference_mode()
    def _accept(self, rows: list[_Row], logits: Tensor) -> None:
        """Choose each row's next token from its logits (B, V) and see which rows end with it."""
        uniforms = torch.tensor([row.uniforms[len(row.response.tokens)] for row in rows], dtype=torch.float64)
        chosen = choose(logits, uniforms.to(logits.device), self.temperature, self.top_p, self.top_k)
        # log_softmax goes row by row; logsumexp would share one long row out among the threads, and round otherwise
        logprobs = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        for row, token, logprob in zip(rows, chosen.tolist(), logprobs.tolist(), strict=True):
            response = row.response
            if not math.isfinite(logprob):
                raise UserError(f"the model's output for {response.id} is not finite: its weights or its adapter are "
                                "damaged, or --dtype float16 is too narrow for it")
            response.tokens.append(token)
            response.logprobs.append(logprob)
            if token in self.stop_ids:
                response.finish_reason = "stop"
            elif len(response.tokens) == row.limit:
                response.finish_reason = "length"


def _pack(prompts: Sequence[Sequence[int]], device: torch.device,
          prefix: Sequence[int] = ()) -> tuple[Tensor, Tensor, list[int], Tensor]:
    """Prompts one behind the other: tokens (T,), positions (T,), lengths, and the place of each prompt's last token.

    Padded to multiples of GROUP: the stream with a prompt more, of token 0, the places with place 0. A `prefix` comes
    before all of them, and is not among the lengths; the prompts' positions go on from its end.
    """
    lengths = [len(prompt) for prompt in prompts]
    last = len(prefix) + torch.tensor(lengths).cumsum(0) - 1
    last = torch.cat((last, last.new_zeros(-len(prompts) % GROUP)))
    padding = -(len(prefix) + sum(lengths)) % GROUP
    tokens = torch.tensor([*prefix, *(token for prompt in prompts for token in prompt)] + [0] * padding)
    lengths += [padding] * (padding > 0)
    positions = torch.cat([torch.arange(len(prefix)), *(len(prefix) + torch.arange(length) for length in lengths)])
    return tokens.to(device), positions.to(device), lengths, last.to(device)


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
    # Sorting all of a 150k vocabulary costs as much as a decode step, and the nucleus is nearly always in the top 1024
    for width in (1024, probabilities.shape[-1]):
        likeliest = probabilities.topk(min(width, probabilities.shape[-1])).values
        mass = likeliest.cumsum(-1, dtype=torch.float64)
        if width >= probabilities.shape[-1] or bool((mass[:, -1] >= top_p).all()):
            break
    inside = (mass - likeliest < top_p).sum(-1, keepdim=True)  # tokens before which top_p is not yet reached
    return likeliest.gather(1, inside - 1)


@torch.inference_mode()
def score_next(model: Decoder, prompts: Sequence[Sequence[int]], choices: Sequence[int], prefix: int = 0) -> Tensor:
    """Log-probabilities (len(prompts), len(choices)) of `choices` as the first token after each prompt, on the CPU.

    One packed forward pass for as many prompts as PREFILL_TOKENS holds. The first `prefix` tokens, which all prompts
    must share, are computed once in each; the head sees the last position of each prompt alone.
    """
    found, batch = [], []
    for i, prompt in enumerate(prompts):
        assert list(prompt[:prefix]) == list(prompts[0][:prefix]) and len(prompt) > prefix
        batch.append(prompt[prefix:])
        full = i + 1 == len(prompts) or sum(map(len, batch)) + len(prompts[i + 1]) > PREFILL_TOKENS
        if not full:
            continue
        tokens, positions, lengths, last = _pack(batch, model.device, prompts[0][:prefix])
        hidden = model(tokens, positions, Shared(prefix, lengths))[last]  # (N, E)
        # The choices again in float32: bfloat16 logits are so coarse that the best two of four often tie
        scores = hidden.float() @ model.lm_head.weight[list(choices)].float().T  # (N, choices)
        found.append((scores - model.logits(hidden).logsumexp(-1, keepdim=True))[: len(batch)].cpu())
        batch = []
    return torch.cat(found) if found else torch.empty(0, len(choices))


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Number of tokens that all prompts begin with; at least one is left to each."""
    first, last = min(prompts), max(prompts)  # what the lexically first and last share, all between them share
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(shared, min(map(len, prompts)) - 1)
