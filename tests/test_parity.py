"""The decoder against transformers, on random tiny models of every architecture and rope type."""

import json
from pathlib import Path

import pytest
import torch
from conftest import build_model

from base.errors import UserError
from data.packing import Example, pack
from model import lora, weights
from model.attention import Packed
from model.config import read_config
from model.loss import chunked_nll

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 500.0}
CASES = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama without grouped queries": ("Llama", {"num_key_value_heads": 4}),
    "llama one key head": ("Llama", {"num_key_value_heads": 1}),
    "llama wide heads": ("Llama", {"head_dim": 24}),
    "llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10_000.0}}),
    "large theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "llama sharded": ("Llama", {"shard": True}),
    "llama sharded tied": ("Llama", {"shard": True, "tie_word_embeddings": True}),
    "llama bf16": ("Llama", {"dtype": torch.bfloat16}),
    "llama fp16": ("Llama", {"dtype": torch.float16}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window as wide as the context": ("Mistral", {"sliding_window": 256}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Frobenius norm of the difference, relative."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def sequences(vocab: int, lengths: tuple[int, ...] = (7, 1, 60, 23)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


def packed_logits(model: torch.nn.Module, documents: list[list[int]]) -> list[torch.Tensor]:
    lengths = [len(one) for one in documents]
    positions = torch.cat([torch.arange(length) for length in lengths])
    hidden = model(torch.tensor(sum(documents, [])), positions, Packed(lengths))
    return list(model.logits(hidden).split(lengths))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    architecture, settings = CASES[case]
    theirs = build_model(tmp_path, architecture, **settings)
    assert (tmp_path / "model.safetensors.index.json").exists() == settings.get("shard", False)
    ours = weights.load(tmp_path, torch.device("cpu"), torch.float32)
    documents = sequences(theirs.config.vocab_size)
    with torch.no_grad():
        for document, logits in zip(documents, packed_logits(ours, documents), strict=True):
            assert relative(logits, theirs(torch.tensor([document])).logits[0]) < 1e-4


def test_rope_differs_between_types(tmp_path: Path) -> None:
    """The parity cases above would prove nothing if the rope types gave the same logits."""
    found = []
    for i, case in enumerate(("llama", "llama3 rope", "linear rope", "large theta")):
        architecture, settings = CASES[case]
        build_model(tmp_path / str(i), architecture, **settings)
        model = weights.load(tmp_path / str(i), torch.device("cpu"), torch.float32)
        with torch.no_grad():
            found.append(packed_logits(model, sequences(model.config.vocab_size))[2])
    assert all(relative(a, b) > 1e-2 for i, a in enumerate(found) for b in found[:i])


def test_old_and_new_rope_settings(tmp_path: Path) -> None:
    """`rope_theta` beside `rope_scaling` (transformers 4) and `rope_parameters` (5) say the same."""
    build_model(tmp_path, "Llama", rope_parameters=LLAMA3)
    new = read_config(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    settings = raw.pop("rope_parameters")
    raw["rope_theta"] = settings.pop("rope_theta")
    raw["rope_scaling"] = settings
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_config(tmp_path) == new
    settings["type"] = settings.pop("rope_type")  # the name before 4.43
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_config(tmp_path) == new


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_loss_and_lora_gradients_equal_peft(architecture: str, tmp_path: Path) -> None:
    import peft

    theirs = build_model(tmp_path, architecture, **({"head_dim": 16} if architecture == "Qwen3" else {}))
    ours = weights.load(tmp_path, torch.device("cpu"), torch.float32)
    config = lora.LoRAConfig(rank=4, alpha=12)
    lora.attach(ours, config, seed=5)
    with torch.no_grad():
        for adapter in lora.adapted(ours).values():
            adapter.lora_B.normal_(0, 0.1)
    lora.save(ours, config, tmp_path / "adapter", str(tmp_path))
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)

    documents = sequences(theirs.config.vocab_size, (9, 40, 17))
    examples = [Example(str(i), tokens, ((4, len(tokens)),)) for i, tokens in enumerate(documents)]
    supervised = sum(example.supervised for example in examples)
    batch = pack(examples, torch.device("cpu"))
    hidden = ours(batch.tokens, batch.positions, Packed(batch.lengths))
    loss = chunked_nll(hidden[batch.sources], ours.lm_head.weight, batch.targets, batch.token_weights) / supervised
    loss.backward()

    expected = 0.0
    for tokens in documents:
        labels = torch.tensor([[-100] * 4 + tokens[4:]])
        out = theirs(torch.tensor([tokens]), labels=labels)
        expected = expected + out.loss * (len(tokens) - 4) / supervised
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    for name, adapter in lora.adapted(ours).items():
        for part in ("lora_A", "lora_B"):
            theirs_grad = gradients.pop(f"base_model.model.model.{name}.{part}.default.weight")
            assert relative(getattr(adapter, part).grad, theirs_grad) < 1e-4
    assert not gradients  # every adapted layer of theirs is one of ours


def test_eos_ids(tmp_path: Path) -> None:
    """generation_config.json's list wins over config.json's single id."""
    build_model(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0, 7]}')
    assert read_config(tmp_path).eos_ids == (2, 0, 7)
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_config(tmp_path).eos_ids == (2,)


WRONG_CONFIGS = {
    "architecture": ({"architectures": ["GemmaForCausalLM"]}, "architectures"),
    "no architecture": ({"architectures": None}, "architectures"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "yarn"),
    "dynamic": ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    "rope without factor": ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
    "partial rotation": ({"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    "sliding layers": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "attention bias": ({"attention_bias": True}, "attention_bias"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias"),
    "missing": ({"hidden_size": None}, "hidden_size"),
    "text for a number": ({"num_hidden_layers": "2"}, "num_hidden_layers"),
    "zero": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "heads": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "eos": ({"eos_token_id": "two"}, "eos_token_id"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_config_that_would_be_computed_wrongly_is_refused(case: str, tmp_path: Path) -> None:
    changes, named = WRONG_CONFIGS[case]
    build_model(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    raw = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=named):
        read_config(tmp_path)


@pytest.mark.parametrize(("architecture", "settings"), [
    ("Mistral", {"sliding_window": 64}),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
    ("Qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0, "head_dim": 8}),
])
def test_sliding_window_in_force_is_refused(architecture: str, settings: dict, tmp_path: Path) -> None:
    build_model(tmp_path, architecture, **settings)
    with pytest.raises(UserError, match="sliding_"):
        read_config(tmp_path)


def edit_tensors(folder: Path, change: object) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


WRONG_TENSORS = {
    "missing": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"missing: layers\.1\.mlp\.up_proj"),
    "unused": (lambda t: t.update(extra=torch.zeros(2)), "not used: extra"),
    "shape": (lambda t: t.update({"model.norm.weight": torch.zeros(31)}), r"model\.norm\.weight has shape \[31\]"),
    "integers": (lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}), "int8"),
    "other head": (lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}), "lm_head.weight differ"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_weights_that_do_not_fit_are_refused(case: str, tmp_path: Path) -> None:
    change, message = WRONG_TENSORS[case]
    build_model(tmp_path, tie_word_embeddings=True)
    edit_tensors(tmp_path, change)
    with pytest.raises(UserError, match=message):
        weights.load(tmp_path, torch.device("cpu"), torch.float32)


def test_tied_head_stored_twice_and_old_buffers_are_accepted(tmp_path: Path) -> None:
    build_model(tmp_path, tie_word_embeddings=True)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone(),
                                               "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    model = weights.load(tmp_path, torch.device("cpu"), torch.float32)
    assert model.lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize("keep", [0, 4, 100, -1000])
def test_truncated_weights_are_refused(keep: int, tmp_path: Path) -> None:
    build_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="truncated"):
        weights.load(tmp_path, torch.device("cpu"), torch.float32)


def test_index_that_leaves_its_folder_and_pickles_are_refused(tmp_path: Path) -> None:
    build_model(tmp_path / "model", shard=True)
    index = tmp_path / "model" / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="own folder"):
        weights.load(tmp_path / "model", torch.device("cpu"), torch.float32)
    index.unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        weights.load(tmp_path / "model", torch.device("cpu"), torch.float32)
