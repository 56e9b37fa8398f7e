"""On paper: what a training step holds in memory, for big students on cards of 24, 48 and 80 GB.

    python tests/memory.py
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.config import ModelConfig
from model.decoder import Decoder
from model.lora import LoRAConfig, attach
from model.memory import training_memory


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
            model = Decoder(config).to(torch.bfloat16)
        attach(model, LoRAConfig())
        for checkpointed in (False, True):
            model.checkpointed = config.num_layers if checkpointed else 0
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
