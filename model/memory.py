"""What a training step holds in memory, on paper: the estimate of `train.py --dry-run`."""

import torch

from model.decoder import Decoder
from model.lora import adapted
from model.loss import CHUNK


def training_memory(model: Decoder, tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each part at the fullest moment of a step, for `tokens` in a forward pass whose products are in `dtype`.

    `model` may be on the meta device; what is trained is what requires a gradient, and float32. Not counted: the
    libraries themselves, what an allocator can't give back, and where all weights are trained their copies in `dtype`.
    """
    config, size = model.config, dtype.itemsize
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    frozen = sum(parameter.nbytes for parameter in parameters if not parameter.requires_grad)
    hidden = config.hidden_size
    heads, kv_heads = (count * config.head_dim for count in (config.num_heads, config.num_kv_heads))
    # per token: norms keep their inputs, adapters x Aᵀ and what their inputs are made from, which is kept already;
    # attention keeps q, k, v and the values it mixes, these per sequence and again as the input of the product behind
    # it; SwiGLU keeps both factors
    block = size * (2 * hidden + 3 * heads + 2 * kv_heads + 2 * config.intermediate_size)
    adapters = adapted(model).values()
    block += size * sum(len(adapter.lora_A) for adapter in adapters) // config.num_layers
    if not adapters or any(adapter.dropout for adapter in adapters):
        block += size * (2 * hidden + config.intermediate_size)  # the products' inputs
    if config.qk_norm:
        block += size * (heads + kv_heads)
    if any(adapter.dropout for adapter in adapters):
        # each adapter's own input and what it was multiplied by, in the place of those that products share
        block += size * (8 * hidden + heads + config.intermediate_size)
    kept = size * hidden * model.checkpointed + block * (config.num_layers - model.checkpointed)
    return {
        "weights": frozen + trained * 4, "gradients": trained * 4, "optimiser": trained * 8,
        "activations": tokens * (kept + block),  # and those of the block whose gradient is being computed
        "logits": CHUNK * config.vocab_size * (4 + (size if size < 4 else 0)),  # of a chunk, and their gradient
    }
