"""No tensor is left on the wrong device: the passes of a GPU on the meta device, where any mixing is an error.

It stands for the GPU: all that is not the CPU takes the GPU's path. Its tensors have no values, so that a step which
asked for one, as waiting for the device would, fails here too.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import attention, decoder, lora
from model.attention import Packed
from model.cache import KVCache
from model.config import read_config
from model.decoder import Decoder
from model.loss import chunked_nll
from model.sampler import Response, Sampler, _Row, _Steps

META = torch.device("meta")


def on_the_gpu(*tensors: Tensor) -> None:
    """Triton would take any pointer for one of the GPU's."""
    assert {tensor.device for tensor in tensors} == {META}


class Kernels:
    """Stand-ins for kernels.py, which can't be launched here: the devices of what they get, the shapes they give."""

    def __init__(self) -> None:
        self.launched: list[str] = []

    def decode_attention(self, q: Tensor, *others: object) -> Tensor:
        self.launched.append("decode")
        on_the_gpu(q, *(x for x in others if isinstance(x, Tensor)))
        return torch.empty_like(q)

    def prefill_attention(self, q: Tensor, *others: object) -> Tensor:
        self.launched.append("prefill")
        on_the_gpu(q, *(x for x in others if isinstance(x, Tensor)))
        return torch.empty_like(q)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> object:
        self.launched.append("norm")
        on_the_gpu(x, weight, *([residual] if residual is not None else []))
        return torch.empty_like(x) if residual is None else (torch.empty_like(x), torch.empty_like(x))

    def rotate_and_store(self, q: Tensor, *others: Tensor) -> Tensor:
        self.launched.append("rotate")
        on_the_gpu(q, *others)
        return torch.empty_like(q)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        self.launched.append("silu")
        on_the_gpu(gate, up)
        return torch.empty_like(gate)

    def num_splits(self, *numbers: int) -> int:
        return 2

    def multiprocessors(self, device: torch.device) -> int:
        return 132


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    kernels = Kernels()
    for module in (attention, decoder):
        monkeypatch.setattr(module, "kernels", kernels, raising=False)
    return kernels


@pytest.fixture
def model(tiny: Path) -> Decoder:
    model = Decoder(read_config(tiny)).to(META, torch.bfloat16)
    lora.attach(model, lora.LoRAConfig(rank=4))
    return model


def rows(count: int) -> list[_Row]:
    import numpy as np

    found = []
    for i in range(count):
        response = Response(str(i), 30 + 3 * i)
        # all but the first copy what they begin with from its block
        shared = {"cached": 8, "sources": [1]} if i else {}
        found.append(_Row([1, 2, 3] * (10 + i), response, 20, np.zeros(28), blocks=[2 * i + 1, 2 * i + 2], **shared))
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generating(model: Decoder, kernels: Kernels, temperature: float) -> None:
    """Prefill and decode step as `Sampler.generate` runs them; the graph's capture needs a GPU."""
    layers = model.config.num_layers
    cache = KVCache(model.config, blocks=8, device=META, dtype=torch.bfloat16)
    ours = Sampler(model, frozenset(), max_new_tokens=20, temperature=temperature, top_p=0.9, top_k=5, slots=4)
    for found in ours._prefill(cache, rows(3)):
        assert found.shape == (3, 1) and found.device == META
    per_layer = ["norm", "rotate", "prefill", "norm", "silu"]
    assert kernels.launched == per_layer * layers + ["norm"]
    kernels.launched.clear()
    steps = _Steps(ours, cache, ours.slots, width=3)
    with torch.inference_mode():
        steps._step(4)
    assert kernels.launched == ["norm", "rotate", "decode", "norm", "silu"] * layers + ["norm"]
    for buffer in (steps.chosen, steps.logprobs, steps.tokens, steps.positions, steps.index):
        assert buffer.device == META


def test_launches_of_a_step() -> None:
    """Norm, q, k, v, rotary and cache, attention in two kernels, o, norm and sum, gate, up, product, down, sum."""
    from roofline import MODELS, launches

    per_layer, rest = launches(MODELS["8B (Llama 3.1)"])
    assert per_layer == 14 and rest < 30
    assert launches(MODELS["4B (Qwen3)"])[0] == 16  # and norms of q and k


def test_scoring(model: Decoder, kernels: Kernels) -> None:
    sampler = Sampler(model, frozenset(), max_new_tokens=8)
    prompts = [(str(i), [*range(20), i]) for i in range(3)]
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):  # the scores, at the very end
        next(sampler.score(prompts, (3, 4)))
    assert kernels.launched == ["norm", "rotate", "prefill", "norm", "silu"] * model.config.num_layers + ["norm"]


def test_training(model: Decoder, kernels: Kernels) -> None:
    tokens, positions = (torch.zeros(12, dtype=torch.long, device=META) for _ in range(2))
    hidden = model(tokens, positions, Packed([5, 7]))
    assert not kernels.launched  # they have no backward
    chunked_nll(hidden[:6], model.lm_head.weight, tokens[:6], torch.ones(6, device=META)).backward()
    for adapter in lora.adapted(model).values():
        for parameter in (adapter.lora_A, adapter.lora_B):
            assert parameter.grad.device == META and parameter.grad.dtype == torch.float32
        assert adapter.base.weight.grad is None


def test_mixing_is_noticed(model: Decoder, kernels: Kernels) -> None:
    tokens = torch.zeros(3, dtype=torch.long, device=META)
    with pytest.raises(RuntimeError, match="meta"):
        model(tokens, torch.zeros(3, dtype=torch.long), Packed([3]))
    with pytest.raises(AssertionError):
        kernels.rms_norm(torch.zeros(3, 4, device=META), torch.zeros(4), 1e-5)
