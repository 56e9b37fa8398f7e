"""No tensor is left on the wrong device: the passes of a GPU on the meta device, where any mixing is an error."""

from pathlib import Path

import pytest
import torch

from model import lora
from model.attention import Decode, Packed, Prefill
from model.cache import KVCache
from model.config import read_config
from model.decoder import Decoder
from model.loss import chunked_nll
from model.sampler import choose

META = torch.device("meta")


@pytest.fixture
def model(tiny: Path) -> Decoder:
    model = Decoder(read_config(tiny)).to(META, torch.bfloat16)
    lora.attach(model, lora.LoRAConfig(rank=4))
    return model


def test_generating(model: Decoder) -> None:
    cache = KVCache(model.config, slots=4, capacity=64, device=META, dtype=torch.bfloat16)
    tokens, positions = torch.zeros(12, dtype=torch.long, device=META), torch.zeros(12, dtype=torch.long, device=META)
    hidden = model(tokens, positions, Prefill(cache, range(3), [3, 4, 5]))
    assert hidden.shape == (12, model.config.hidden_size)
    hidden = model(tokens[:4], positions[:4], Decode(cache, positions[:4], longest=6))
    logits = model.logits(hidden)
    assert logits.shape == (4, model.config.vocab_size) and logits.dtype == torch.float32 and logits.device == META
    uniforms = torch.zeros(4, dtype=torch.float64, device=META)
    assert choose(logits, uniforms, temperature=1.0, top_k=5).device == META


def test_training(model: Decoder) -> None:
    tokens, positions = torch.zeros(12, dtype=torch.long, device=META), torch.zeros(12, dtype=torch.long, device=META)
    hidden = model(tokens, positions, Packed([5, 7]))
    chunked_nll(hidden[tokens[:6]], model.lm_head.weight, tokens[:6], torch.ones(6, device=META)).backward()
    for adapter in lora.adapted(model).values():
        for parameter in (adapter.lora_A, adapter.lora_B):
            assert parameter.grad.device == META and parameter.grad.dtype == torch.float32
        assert adapter.base.weight.grad is None


def test_mixing_is_noticed(model: Decoder) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        model(torch.zeros(3, dtype=torch.long, device=META), torch.zeros(3, dtype=torch.long), Packed([3]))
