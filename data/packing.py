"""From conversations to the packed streams that the trainer sees: order, steps, micro-batches, targets."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One conversation; the tokens of each span [first, last) are supervised, predicted from what stands before."""

    id: str
    tokens: list[int]
    spans: tuple[tuple[int, int], ...]

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return sum(last - first for first, last in self.spans)

    def weight(self, prompt_weight: float) -> float:
        """Sum of its tokens' weights in the loss: 1 where supervised, else `prompt_weight`, but for the first token,
        which nothing predicts."""
        return self.supervised + prompt_weight * (len(self.tokens) - 1 - self.supervised)


@dataclass(frozen=True)
class Batch:
    """Conversations one behind the other, for one forward pass."""

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, from 0 in each conversation
    lengths: list[int]  # of the conversations, in tokens
    sources: Tensor  # (N,) int64: places in the stream whose hidden state predicts …
    targets: Tensor  # (N,) int64: … these token ids, …
    token_weights: Tensor  # (N,) float32: … which count this much in the loss


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A shuffle of range(count): a function of (seed, epoch) alone, whatever the packing."""
    order = list(range(count))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


def plan_steps(lengths: Sequence[int], batch_tokens: int, seed: int, epochs: int | None = None,
               steps: int | None = None) -> list[list[int]]:
    """The examples (indices) of each optimiser step, in training order; either `epochs` or `steps` is given.

    A step takes examples in the order of the epoch until the next would carry it past `batch_tokens`; an example
    longer than that is a step of its own. No step reaches over the end of an epoch.
    """
    planned: list[list[int]] = []
    epoch = 0
    while (epoch < epochs) if steps is None else (len(planned) < steps):
        planned += group(epoch_order(len(lengths), seed, epoch), lengths, batch_tokens)
        epoch += 1
    return planned[:steps]


def group(order: Iterable[int], lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Consecutive runs of `order` whose lengths add up to at most `budget` (or a single one that is longer)."""
    run: list[int] = []
    total = 0
    for i in order:
        if run and total + lengths[i] > budget:
            yield run
            run, total = [], 0
        run.append(i)
        total += lengths[i]
    if run:
        yield run


def pack(examples: Sequence[Example], device: torch.device, prompt_weight: float = 0.0) -> Batch:
    """Lay examples one behind the other; supervised tokens weigh 1, all others `prompt_weight`."""
    lengths = [len(example.tokens) for example in examples]
    tokens = torch.tensor([token for example in examples for token in example.tokens])
    weights, start = torch.full(tokens.shape, prompt_weight), 0
    for example, length in zip(examples, lengths, strict=True):
        for first, last in example.spans:
            weights[start + first : start + last] = 1
        weights[start] = 0  # nothing stands before it
        start += length
    positions = torch.cat([torch.arange(length) for length in lengths])
    places = weights.nonzero()[:, 0]
    batch = (tokens, positions, places - 1, tokens[places], weights[places])
    tokens, positions, sources, targets, weights = (tensor.to(device) for tensor in batch)
    return Batch(tokens, positions, lengths, sources, targets, weights)
