"""The training loss: weighted sum of the tokens' negative log-likelihood, without all of their logits at once.

A vocabulary of 152k makes the logits the largest tensor of a training step by far: 4,096 tokens are 2.5 GB, and the
gradient as much again. Here a chunk of positions at a time goes through head, softmax and back, so that what is kept
is the gradient with respect to the hidden states, of hidden_size a token (as Liger-Kernel does, arXiv 2410.10989).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import Packed
from model.decoder import Decoder, linear

CHUNK = 256  # positions whose logits exist at once


class _ChunkedNLL(torch.autograd.Function):
    """Sum of -w log p(target); both gradients are computed on the way forward, while the chunk's logits are there."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor,
                token_weights: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            logits = linear(hidden[part], weight).float()  # (C, V); what follows is done in its place
            logprobs = torch.log_softmax(logits, -1, out=logits)
            rows = torch.arange(len(logits), device=logits.device)
            # multiplied and added, not a product of vectors, which autocast would round to bfloat16
            total -= (token_weights[part] * logprobs[rows, targets[part]]).sum()
            if grad_hidden is not None or grad_weight is not None:
                # d/dlogits of the sum: w (softmax - one-hot)
                grad_logits = logprobs.exp_()
                grad_logits[rows, targets[part]] -= 1
                grad_logits *= token_weights[part, None]
                grad_logits = grad_logits.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = linear(grad_logits, weight.T)
                if grad_weight is not None:
                    grad_weight += grad_logits.T @ hidden[part]
                del grad_logits
            del logits, logprobs  # else the next chunk's would be made beside them
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if saved is None else grad.to(saved.dtype) * saved for saved in ctx.saved_tensors), None, None


def chunked_nll(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    """Sum over positions of -weight · log softmax(hidden @ weight.T)[target], float32, differentiable.

    hidden (N, E) of the positions before the targets, weight (V, E) of the head, targets (N,) int64, token_weights
    (N,) float32: how much each counts.
    """
    if not torch.is_grad_enabled():  # autograd says whether a tensor wants a gradient, not whether there will be one
        hidden, weight = hidden.detach(), weight.detach()
    return _ChunkedNLL.apply(hidden, weight, targets, token_weights)


def nll_reference(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    """What `chunked_nll` computes, with all N × V logits at once."""
    return token_weights @ F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")


@torch.inference_mode()
def divergence(hidden: Tensor, base_hidden: Tensor | None, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """-log p(target) under a model and under its base, and KL(base ‖ model): three of (N,) float32, in nats.

    hidden and base_hidden (N, E) of the positions before the targets, weight (V, E) of the head that both models
    share, targets (N,) int64. Without base_hidden the first alone. A chunk of positions at a time, as in the loss.
    """
    found = []
    for start in range(0, len(targets), CHUNK):
        part = slice(start, start + CHUNK)
        chosen = targets[part, None]
        logprobs = linear(hidden[part], weight).float().log_softmax(-1)  # (C, V)
        measures = [-logprobs.gather(1, chosen)[:, 0]]
        if base_hidden is not None:
            base = linear(base_hidden[part], weight).float().log_softmax(-1)
            measures += [-base.gather(1, chosen)[:, 0], (base.exp() * (base - logprobs)).sum(-1)]
        found.append(measures)
    return tuple(torch.cat(each) for each in zip(*found, strict=True))


@torch.inference_mode()
def response_logprobs(model: Decoder, tokens: list[int], first: int, last: int) -> Tensor:
    """Log-probabilities (last - first,) float32 of tokens[first:last] given all before them, by the trainer's path."""
    stream = torch.tensor(tokens, device=model.device)
    hidden = model(stream, torch.arange(len(tokens), device=model.device), Packed([len(tokens)]))
    logits = model.logits(hidden[first - 1 : last - 1])
    return logits.log_softmax(-1).gather(1, stream[first:last, None])[:, 0]
