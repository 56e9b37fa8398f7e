"""On a GPU: the sampler against transformers, and all timings. `pytest -m gpu -s` prints the table.

Together with the kernels' own tests (test_kernels.py) this is what has to run when there is a GPU. It takes the real
SmolLM2-135M-Instruct where the hub cache has it.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from bench_generate import generate
from conftest import QWEN, SMOLLM2

from base.hub import model_folder
from data.prompts import load_prompts
from model import lora, weights
from model.chat import Chat
from model.decoder import Decoder
from model.sampler import Response, Sampler

pytestmark = [pytest.mark.gpu, pytest.mark.real]
CUDA = torch.device("cuda")


def load(name: str, dtype: torch.dtype, count: int) -> tuple[Decoder, Chat, list[tuple[str, list[int]]]]:
    model = weights.load(model_folder(name), CUDA, dtype)
    chat = Chat(model_folder(name), model.config)
    return model, chat, [(row["id"], chat.prompt(row["prompt"])) for row in load_prompts("alpaca", 0, count)[0]]


def sample(model: Decoder, chat: Chat, prompts: list, **settings: object) -> dict[str, Response]:
    sampler = Sampler(model, chat.stop_ids, **{"max_new_tokens": 64} | settings)
    return {response.id: response for response in sampler.generate(prompts)}


@pytest.mark.parametrize("name", [SMOLLM2, QWEN])
def test_greedy_tokens_are_the_models_own(name: str) -> None:
    """float32, 32 prompts: each token that the sampler chose is transformers' argmax behind those before it."""
    from transformers import AutoModelForCausalLM

    model, chat, prompts = load(name, torch.float32, 32)
    found = sample(model, chat, prompts, slots=12)
    theirs = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(CUDA)
    for id, prompt in prompts:
        tokens = found[id].tokens
        with torch.inference_mode():
            logits = theirs(torch.tensor([prompt + tokens], device=CUDA)).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens, device=CUDA)[:, None])[:, 0]
        assert (logits.amax(-1) - chosen).max() < 1e-3  # but for ties
        assert len(tokens) == 64 or tokens[-1] in chat.stop_ids


def test_prefixes_memory_and_slots_change_little() -> None:
    """In float32, where another order of sums rarely turns a choice: nine rows in ten come out token by token."""
    model, chat, prompts = load(SMOLLM2, torch.float32, 48)
    expected = sample(model, chat, prompts, temperature=0.7)
    for settings in ({"slots": 5}, {"kv_memory": 0.05}, {"share_prefixes": False}):
        found = sample(model, chat, prompts, temperature=0.7, **settings)
        same = sum(found[id].tokens == expected[id].tokens for id, _ in prompts)
        assert same >= 0.9 * len(prompts), settings


def test_an_adapter_trained_between_two_calls_is_served() -> None:
    model, chat, prompts = load(SMOLLM2, torch.float32, 8)
    base = sample(model, chat, prompts)
    lora.attach(model, lora.LoRAConfig(rank=4))
    with torch.no_grad():
        for adapter in lora.adapted(model).values():
            adapter.lora_B.normal_(std=0.02)
    assert [r.tokens for r in sample(model, chat, prompts).values()] != [r.tokens for r in base.values()]
    lora.detach(model)
    again = sample(model, chat, prompts)
    assert all(again[id].tokens == base[id].tokens for id, _ in prompts)


def timed(run: Callable[[], int], repeats: int = 3) -> float:
    """Tokens per second of `run`, which returns how many it made: the median."""
    run()  # compiles, captures
    rates = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        tokens = run()
        torch.cuda.synchronize()
        rates.append(tokens / (time.perf_counter() - start))
    return statistics.median(rates)


def test_timings() -> None:
    """256 Alpaca prompts, up to 256 new tokens, greedy, bfloat16: ours, transformers and, if installed, vLLM."""
    from transformers import AutoModelForCausalLM

    lines = [torch.cuda.get_device_name()]
    for name in (SMOLLM2, QWEN):
        model, chat, prompts = load(name, torch.bfloat16, 256)
        for slots in (1, 16, 64, 256):
            some = prompts[: max(slots, 4)]
            torch.cuda.reset_peak_memory_stats()
            rate = timed(lambda model=model, chat=chat, some=some, slots=slots: sum(
                len(r.tokens) for r in sample(model, chat, some, slots=slots, max_new_tokens=256).values()))
            lines.append(f"{name}, {slots} rows: {rate:,.0f} tokens/s, at most "
                         f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        theirs = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to(CUDA)
        rate = timed(lambda theirs=theirs, chat=chat, some=prompts[:64]: sum(
            len(tokens) for _, tokens in generate(theirs, some, 256, chat.stop_ids, size=64, cache="dynamic")))
        lines.append(f"{name}, transformers generate, 64 rows: {rate:,.0f} tokens/s")
        del theirs
        if importlib.util.find_spec("vllm"):
            from vllm import LLM, SamplingParams

            engine = LLM(name, dtype="bfloat16", gpu_memory_utilization=0.4)
            limits = SamplingParams(temperature=0.0, max_tokens=256)
            asked = [{"prompt_token_ids": tokens} for _, tokens in prompts]
            rate = timed(lambda engine=engine, asked=asked, limits=limits: sum(
                len(out.outputs[0].token_ids) for out in engine.generate(asked, limits, use_tqdm=False)))
            lines.append(f"{name}, vLLM, 256 rows: {rate:,.0f} tokens/s")
            del engine
    print("", *lines, sep="\n")
