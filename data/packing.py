"""From conversations to the packed streams that the trainer sees: order, steps, micro-batches, targets."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One conversation; tokens[first:last] are supervised, each predicted from what stands before it."""

    id: str
    tokens: list[int]
    first: int
    last: int

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return self.last - self.first


@dataclass(frozen=True)
class Batch:
    """Conversations one behind the other, for one forward pass."""

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, from 0 in each conversation
    lengths: list[int]  # of the conversations, in tokens
    sources: Tensor  # (N,) int64: places in the stream whose hidden state predicts …
    targets: Tensor  # (N,) int64: … these token ids


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


def pack(examples: Sequence[Example], device: torch.device) -> Batch:
    """Lay examples one behind the other."""
    lengths = [len(example.tokens) for example in examples]
    tokens = torch.tensor([token for example in examples for token in example.tokens])
    sources, start = [], 0
    for example, length in zip(examples, lengths, strict=True):
        sources.append(torch.arange(start + example.first - 1, start + example.last - 1))
        start += length
    positions = torch.cat([torch.arange(length) for length in lengths])
    places = torch.cat(sources)
    return Batch(tokens.to(device), positions.to(device), lengths, places.to(device), tokens[places + 1].to(device))
