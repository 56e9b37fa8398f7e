"""On paper: how fast a GPU can decode, from bytes and operations, beside what our step launches.

    python tests/roofline.py

A step reads all weights once (but for the embedding, of which it takes a few rows) and each row's keys and values,
and multiplies every weight with every row. It can take no less than the larger of bytes / bandwidth and operations /
peak for the products, and the cache's bytes / bandwidth on top. Launches are counted in a step that is traced on the
meta device; inside a CUDA graph each costs the GPU a microsecond or two (GAP), whatever it computes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_devices import META, Kernels

from model import attention, decoder
from model.cache import KVCache
from model.config import ModelConfig
from model.decoder import Decoder
from model.sampler import Sampler, _Steps

ROWS, CONTEXT, GAP = (1, 16, 64, 256), 1024, 1.5e-6


def shape(architecture: str, vocab: int, hidden: int, intermediate: int, layers: int, heads: int,
          kv_heads: int) -> ModelConfig:
    """A model of which only the sizes matter here, and what it computes; heads of 128."""
    return ModelConfig(architecture, vocab, hidden, intermediate, layers, heads, kv_heads, 128, 1e-6, 32768, 1e6,
                       "default", {}, tied=not architecture.startswith("Llama"),
                       qkv_bias=architecture.startswith("Qwen2"), qk_norm=architecture.startswith("Qwen3"), eos_ids=())


MODELS = {"1.5B (Qwen2.5)": shape("Qwen2ForCausalLM", 151936, 1536, 8960, 28, 12, 2),
          "4B (Qwen3)": shape("Qwen3ForCausalLM", 151936, 2560, 9728, 36, 32, 8),
          "8B (Llama 3.1)": shape("LlamaForCausalLM", 128256, 4096, 14336, 32, 32, 8)}
# Bandwidth in bytes/s, dense bfloat16 operations/s with float32 sums, memory in bytes (the vendor's data sheets)
GPUS = {"H100 SXM": (3.35e12, 989e12, 80e9), "RTX 4090": (1.008e12, 165e12, 24e9)}


@dataclass
class Step:
    """Least seconds of a decode step, and what it needs."""

    products: float
    cache: float
    memory: float  # bytes of weights and cache

    @property
    def seconds(self) -> float:
        return self.products + self.cache


def least(config: ModelConfig, rows: int, bandwidth: float, operations: float) -> Step:
    """The step of `rows` rows at CONTEXT positions, in bfloat16."""
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = config.hidden_size * (qkv + config.num_heads * config.head_dim + 3 * config.intermediate_size)
    head = config.vocab_size * config.hidden_size
    weights = config.num_layers * layer + head
    cache = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * CONTEXT * rows
    return Step(max(2 * weights / bandwidth, 2 * weights * rows / operations), cache / bandwidth,
                2 * (weights + head * (not config.tied)) + cache)


class Launches(TorchDispatchMode):
    """Counts operations that would launch a kernel: not views, not allocations."""

    count = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        views = any(found.alias_info is not None and not found.alias_info.is_write for found in func._schema.returns)
        self.count += not views and not func.name().startswith(("aten::_unsafe_view", "aten::empty", "aten::detach"))
        return func(*args, **(kwargs or {}))


def launches(config: ModelConfig) -> tuple[int, int]:
    """Kernels of a greedy decode step: per layer, and the rest (embedding, last norm, head, choice, bookkeeping)."""
    totals = []
    for layers in (1, 2):
        small = ModelConfig(**{**vars(config), "num_layers": layers})
        with pytest.MonkeyPatch.context() as patch:
            kernels = Kernels()
            for module in (attention, decoder):
                patch.setattr(module, "kernels", kernels, raising=False)
            with torch.device(META):
                model = Decoder(small)
            model = model.to(META, torch.bfloat16)  # the rotary frequencies come from the CPU
            cache = KVCache(small, blocks=8, device=META, dtype=torch.bfloat16)
            steps = _Steps(Sampler(model, frozenset(), max_new_tokens=8, slots=4), cache, 4, width=3)
            with torch.inference_mode(), Launches() as counted:
                steps._step(4)
            # the attention's second kernel adds up the parts of a row
            totals.append(counted.count + len(kernels.launched) + kernels.launched.count("decode"))
    return totals[1] - totals[0], 2 * totals[0] - totals[1]


# What README's experiment at full size asks of a pair. Responses of 400 tokens to 1,000 prompts for three kinds of SFT
# data (those at the temperature that matches a likelihood, which may run to the limit, for 5 more), 256 for recovery;
# SFT on the three, two epochs each, recovery a tenth of that ten times; evaluations of 200 problems a benchmark with so
# many tokens a response. The lengths are guesses
DATA_TOKENS = (3 + 5) * 1000 * 400 + 2 * 256 * 400
SFT_TOKENS = (3 + 10 * 0.1) * 2 * 1000 * 400
EVALUATIONS = 4 + 1 + 4 * 3 + 4 + 3 + 3  # steps of SFT, off-model, arms of the recovery, scaled, noise, other controls
SHARED = 1 + 1  # base and teacher, which other pairs have too
RESPONSES = {"math500": 700, "olympiads": 1300, "ifeval": 400}
ATTAINED = 0.4  # of the roofline
LOADING = 30  # seconds of a stage that go by before the first token


def pair_hours(config: ModelConfig, gpu: str) -> float:
    """Hours of one pair with all controls on a GPU, at ATTAINED of what bytes and operations allow."""
    bandwidth, operations, _ = GPUS[gpu]
    decoding = least(config, 128, bandwidth, operations).seconds / 128  # a token's share of a step that is half full
    sampled = DATA_TOKENS + (EVALUATIONS + SHARED) * 200 * sum(RESPONSES.values())
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in Decoder(config).parameters())
    # forward, and the gradient of the inputs alone: 2 operations a weight and token each; MMLU, 200 questions of 150
    # tokens, and 64 responses a kind twice for the KL are forward passes
    read = (EVALUATIONS + SHARED) * (200 * 150 + 2 * 64 * (400 + sum(RESPONSES.values())))
    computed = (4 * SFT_TOKENS + 2 * read) * weights / operations
    stages = 2 * (EVALUATIONS + SHARED) + 20
    return ((sampled * decoding + computed) / ATTAINED + stages * LOADING) / 3600


def main() -> None:
    """Print the tables."""
    print(f"Least time of a step at {CONTEXT} positions, bfloat16; tokens/s so, and with {GAP * 1e6} µs a launch")
    for name, config in MODELS.items():
        per_layer, rest = launches(config)
        count = per_layer * config.num_layers + rest
        print(f"\n{name}: {per_layer} launches a layer and {rest} more, {count} in a step, {count * GAP * 1e3:.2f} ms")
        for gpu, (bandwidth, operations, memory) in GPUS.items():
            cells = []
            for rows in ROWS:
                step = least(config, rows, bandwidth, operations)
                cells.append(f"{rows} rows {step.seconds * 1e3:.2f} ms, {rows / step.seconds:,.0f} tokens/s "
                             f"({rows / (step.seconds + count * GAP):,.0f})" if step.memory < memory else
                             f"{rows} rows: {step.memory / 1e9:.0f} GB do not fit")
            print(f"  {gpu:9}", *cells, sep=" | ")
    print(f"\nOne pair of README's experiment at full size, at {ATTAINED:.0%} of that, hours on an H100: "
          + ", ".join(f"{name} {pair_hours(config, 'H100 SXM'):.1f}" for name, config in MODELS.items()))


if __name__ == "__main__":
    main()
