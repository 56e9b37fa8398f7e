"""From conversations to the packed streams that the trainer sees: order, steps, micro-batches, targets."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WORTH_SHARING = 8  # tokens: to hand fewer to every conversation's attention costs about what computing them would


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
    """Conversations one behind the other, for one forward pass; what all begin with stands in the first one alone."""

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, of each token in its conversation
    lengths: list[int]  # of the conversations in the stream, in tokens
    shared: int  # tokens of the first conversation that all the others begin with too
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


def micro_batches(examples: Sequence[Example], budget: int) -> list[list[Example]]:
    """An optimiser step's examples in few forward passes of at most `budget` tokens each (or of one longer example).

    Longest first, each into the first pass that has room for it (first-fit decreasing): fewer and fuller passes than in
    the order of the step, which its sum of losses does not depend on. And what the first pass, about the largest, got
    from the allocator serves those behind it. Within a pass the order is the step's.
    """
    passes: list[list[int]] = []
    taken: list[int] = []  # tokens of each
    for i in sorted(range(len(examples)), key=lambda i: -len(examples[i].tokens)):
        length = len(examples[i].tokens)
        place = next((place for place, tokens in enumerate(taken) if tokens + length <= budget), len(passes))
        if place == len(passes):
            passes.append([])
            taken.append(0)
        passes[place].append(i)
        taken[place] += length
    return [[examples[i] for i in sorted(part)] for part in passes]


def pack(examples: Sequence[Example], device: torch.device, prompt_weight: float = 0.0) -> Batch:
    """Lay examples one behind the other; supervised tokens weigh 1, all others `prompt_weight`.

    The tokens that all examples begin with (a chat template's system prompt, 24 of some 170 tokens with SmolLM2 and
    Alpaca) are computed once: causal attention gives them the same states in each, and their gradients add up.
    """
    shared = common_beginning([example.tokens for example in examples])
    tokens, positions, lengths, sources, targets, weights = [], [], [], [], [], []
    for example in examples:
        first = shared if tokens else 0  # of its tokens that are in the stream for it alone
        offset = len(tokens) - first
        tokens += example.tokens[first:]
        positions += range(first, len(example.tokens))
        lengths.append(len(example.tokens) - first)
        weight = [prompt_weight] * len(example.tokens)
        for begin, end in example.spans:
            weight[begin:end] = [1.0] * (end - begin)
        places = [place for place in range(1, len(weight)) if weight[place]]  # nothing stands before the first token
        sources += [place - 1 if place <= first else offset + place - 1 for place in places]
        targets += [example.tokens[place] for place in places]
        weights += [weight[place] for place in places]
    tokens, positions, sources, targets = (torch.tensor(x, dtype=torch.long, device=device)
                                           for x in (tokens, positions, sources, targets))
    return Batch(tokens, positions, lengths, shared, sources, targets, torch.tensor(weights, device=device))


def common_beginning(sequences: Sequence[list[int]]) -> int:
    """How many tokens all sequences begin with; each keeps at least its last for itself. 0 if too few to gain by it."""
    first, last = min(sequences), max(sequences)  # in lexical order what these two share, all do
    most = min(map(len, sequences)) - 1
    shared = next((i for i in range(most) if first[i] != last[i]), most)
    return shared if shared >= WORTH_SHARING and len(sequences) > 1 else 0
