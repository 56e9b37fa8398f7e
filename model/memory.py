"""What a training step holds in memory, on paper: the estimate of `train.py --dry-run`, and a table for big students.

    python -m model.memory
"""

from dataclasses import replace

import torch

from model.config import ModelConfig
from model.decoder import Decoder
from model.lora import LoRAConfig, adapted, attach
from model.loss import CHUNK


def training_memory(model: Decoder, tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each part at the fullest moment of a step, for `tokens` in a forward pass whose products are in `dtype`.

    `model` may be on the meta device; what is trained is what requires a gradient, and float32. Not counted: the
    libraries themselves, what an allocator can't give back, and where all weights are trained their copies in `dtype`.
    """
    config, size = model.config, dtype.itemsize
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in parameters if not parameter.requires_grad)
    hidden = config.hidden_size
    heads, kv_heads = (count * config.head_dim for count in (config.num_heads, config.num_kv_heads))
    # per token: norms and products keep their inputs; attention keeps q, k, v and the values it mixes, these
    # per sequence and again as the input of the product behind it; SwiGLU keeps both factors
    block = size * (4 * hidden + 3 * heads + 2 * kv_heads + 3 * config.intermediate_size)
    if config.qk_norm:
        block += size * (heads + kv_heads)
    if any(adapter.dropout for adapter in adapted(model).values()):
        # each adapter's own input and what it was multiplied by, in the place of those that products share
        block += size * (8 * hidden + heads + config.intermediate_size)
    kept = size * hidden * config.num_layers if model.checkpoint_activations else block * config.num_layers
    return {
        "weights": frozen * size + trained * 4, "gradients": trained * 4, "optimiser": trained * 8,
        "activations": tokens * (kept + block),  # and those of the block whose gradient is being computed
        "logits": CHUNK * config.vocab_size * (4 + (size if size < 4 else 0)),  # of a chunk, and their gradient
    }


def main() -> None:
    """A LoRA of rank 16 on an 8B and a 14B student in bfloat16, on cards of 24, 48 and 80 GB."""
    llama = ModelConfig("LlamaForCausalLM", 128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 131072, 5e5, "default", {},
                        tied=False, qkv_bias=False, qk_norm=False, eos_ids=())
    qwen = replace(llama, architecture="Qwen3ForCausalLM", vocab_size=151936, hidden_size=5120,
                   intermediate_size=17408, num_layers=40, num_heads=40, qk_norm=True)
    print(f"{'':18}{'checkpointed':14}{'weights':>9}{'trained':>9}{'logits':>8}{'KB a token':>12}"
          f"{'most tokens of a forward pass, on 24, 48, 80 GB':>50}")
    for name, config in (("8B (Llama 3.1)", llama), ("14B (Qwen3)", qwen)):
        with torch.device("meta"):
            model = Decoder(config)
        attach(model, LoRAConfig())
        for checkpointed in (False, True):
            model.checkpoint_activations = checkpointed
            parts = training_memory(model, 1, torch.bfloat16)
            fixed = sum(parts.values()) - parts["activations"]
            # a tenth is left to the allocator and to CUDA
            most = [max(0, int((0.9 * card * 1e9 - fixed) / parts["activations"])) for card in (24, 48, 80)]
            trained = parts["gradients"] + parts["optimiser"]
            print(f"{name:18}{'yes' if checkpointed else 'no':14}{parts['weights'] / 1e9:9.1f}"
                  f"{trained / 1e9:9.2f}{parts['logits'] / 1e9:8.2f}{parts['activations'] / 1e3:12,.0f}"
                  + "".join(f"{tokens:>{26 if i == 0 else 12},}" for i, tokens in enumerate(most)))


if __name__ == "__main__":
    main()
