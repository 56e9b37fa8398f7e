"""Tiny models with a real tokenizer and chat template, and the real checkpoints where they are at hand."""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from base.errors import run_script

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
QWEN = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # for tiny models: a second thread costs more than it brings
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "initializer_range": 0.3}


def write_tokenizer(folder: Path, template: str = CHATML) -> int:
    """A byte-level BPE of 300 or so tokens with ChatML's special ones; returns the vocabulary size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox answers a question with a number: 42\n\n"] * 50, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}))
    (folder / "chat_template.jinja").write_text(template)
    return tokenizer.get_vocab_size()


def build_model(folder: Path, architecture: str = "Llama", seed: int = 0, shard: bool = False,
                dtype: torch.dtype = torch.float32, **settings: object) -> object:
    """Save a random transformers model as `dtype` with its tokenizer in `folder`; returns it, loaded as float32."""
    import transformers

    vocab_size = write_tokenizer(folder)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{architecture}Config")(
        **SHAPE | {"vocab_size": vocab_size, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 0} | settings)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():  # biases and norms start at 0 and 1: give them values that matter
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, **({"max_shard_size": "20KB"} if shard else {}))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with grouped queries and a tied head."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_model(folder, "Llama", tie_word_embeddings=True)
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of other shape and other weights."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    build_model(folder, "Qwen2", seed=1, hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    return folder


@dataclass
class Finished:
    """How a script ended."""

    returncode: int
    stdout: str
    stderr: str


Script = Callable[..., Finished]


@pytest.fixture
def script(capfd: pytest.CaptureFixture) -> Iterator[Script]:
    """Run a script's main as `python NAME …` does, but in this process, which saves importing torch each time."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)

    def run(name: str, *arguments: object) -> Finished:
        main = importlib.import_module(name.removesuffix(".py")).main
        capfd.readouterr()
        try:
            run_script(lambda: main([str(argument) for argument in arguments]))
            code = 0
        except SystemExit as ended:
            code = ended.code
        return Finished(code, *capfd.readouterr())

    yield run
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


def run_process(*command: object, **environment: str) -> subprocess.CompletedProcess:
    """Run `python COMMAND …` as a user does."""
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | ONE_THREAD | environment, timeout=600)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine lacks, saying why."""
    missing = None
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("real"):
            missing = _missing_from_cache() if missing is None else missing
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"needs the real {missing} in the hub cache (HF_HOME)"))


def _missing_from_cache() -> str:
    """The first model or data set of the `real` tests that the hub cache lacks, or ""."""
    from huggingface_hub import try_to_load_from_cache

    for repo in (SMOLLM2, QWEN):
        if not isinstance(try_to_load_from_cache(repo, "model.safetensors"), str):
            return repo
    for repo, filename in (("tatsu-lab/alpaca", "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"),
                           ("HuggingFaceH4/MATH-500", "test.jsonl"),
                           ("google/IFEval", "ifeval_input_data.jsonl"),
                           ("Hothan/OlympiadBench",
                            "OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet"),
                           ("cais/mmlu", "all/test-00000-of-00001.parquet")):
        if not isinstance(try_to_load_from_cache(repo, filename, repo_type="dataset"), str):
            return repo
    return ""
