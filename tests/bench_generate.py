"""What generation costs: against other samplers, and against the floors that the weights and the disk set.

    python tests/bench_generate.py                           # everything: half an hour on two cores
    python tests/bench_generate.py job --against llama.cpp   # a part of it

job     128 Alpaca prompts, greedy, up to 256 new tokens: useful tokens per second, to the end of turn and with it, of
        the sampler, of transformers' `generate` and `generate_batch`, and of llama.cpp. All get the same token ids,
        `generate` in batches sorted by length. A peer's settings are those of the trial with the most tokens per
        second: one batch of the size tried, prompts repeated to 100 tokens, 32 new ones. Then the sides take turns
        within the job: 16 rows of one, 16 of the other, each pausing in between (`generate` between batches;
        `generate_batch` cannot, and has one turn), so that what else the machine does hits all alike.
step    a decode step of the sampler at 130 to 170 positions, bookkeeping included, against its matrix products alone:
        the same shapes and weights, back to back, after every step.
memory  the job's peak, less what a process with the same imports takes, against the weights and the cache in use.
prefix  four samples to each of 32 prompts with 500 tokens in common, with and without sharing them.
load    from the file to the first token in a fresh process, against reading the file.

Needs the hub cache and, for the job, requirements-peers.txt. Its results follow each section, and all
of them as a line of JSON come last.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import QWEN, SMOLLM2, in_fresh_process, peak_memory, run_sections

from base.hub import model_folder
from data.prompts import load_prompts
from model import weights
from model.attention import Decode
from model.chat import Chat
from model.config import read_config
from model.decoder import Decoder
from model.sampler import Sampler

NEW_TOKENS, SLOTS, TURN = 256, 128, 16
TRIAL_PROMPT, TRIAL_TOKENS = 100, 32  # so that a trial's positions are those in the middle of the job
NOTHING = frozenset()
Prompts = Sequence[tuple[str, list[int]]]
Side = Callable[..., Iterator[tuple[str, list[int]]]]  # (prompts, limit, stop_ids, **settings): rows as they finish


def main() -> None:
    """Run the sections asked for, print their results."""
    sections = {"job": job, "step": step, "memory": memory, "prefix": prefix, "load": load}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", nargs="+", choices=PEERS, default=list(PEERS), help="peers in the job")
    parser.add_argument("--prompts", type=int, default=128, help="of the job and of memory; at least 64")
    parser.add_argument("--rounds", type=int, default=1, help="how often to do job and prefix")
    run_sections(parser, sections)


def load_model(name: str) -> tuple[Decoder, Chat]:
    """A checkpoint from the hub cache in float32."""
    model = weights.load(model_folder(name), torch.device("cpu"), torch.float32)
    return model, Chat(model_folder(name), model.config)


def alpaca(chat: Chat, count: int) -> list[tuple[str, list[int]]]:
    """The first prompts of Alpaca as (id, token ids)."""
    return [(row["id"], chat.prompt(row["prompt"])) for row in load_prompts("alpaca", 0, count)[0]]


# --- the job


def ours(model: Decoder, prompts: Prompts, limit: int, stop_ids: frozenset[int]) -> Iterator[tuple[str, list[int]]]:
    """The sampler, as generate.py uses it."""
    sampler = Sampler(model, stop_ids, max_new_tokens=limit, slots=SLOTS)
    return ((response.id, response.tokens) for response in sampler.generate(prompts))


def generation_config(limit: int, stop_ids: frozenset[int], **more: object) -> object:
    """Greedy, for transformers; nothing of the checkpoint's own settings."""
    from transformers import GenerationConfig

    return GenerationConfig(do_sample=False, max_new_tokens=limit, eos_token_id=sorted(stop_ids) or None,
                            pad_token_id=0, **more)


def until_stop(tokens: list[int], stop_ids: frozenset[int]) -> list[int]:
    """Without what follows the first stop token."""
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), None)]


def generate(model: nn.Module, prompts: Prompts, limit: int, stop_ids: frozenset[int], size: int,
             cache: str) -> Iterator[tuple[str, list[int]]]:
    """transformers' `generate`, left-padded batches of prompts of like length."""
    config = generation_config(limit, stop_ids, cache_implementation=cache)
    ordered = sorted(prompts, key=lambda pair: len(pair[1]))
    for start in range(0, len(ordered), size):
        batch = ordered[start : start + size]
        width = len(batch[-1][1])
        ids = torch.tensor([[0] * (width - len(tokens)) + tokens for _, tokens in batch])
        mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for _, tokens in batch])
        out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config)
        out = out[:, width:].tolist()
        for (id, _), tokens in zip(batch, out, strict=True):
            yield id, until_stop(tokens, stop_ids)


def generate_batch(model: nn.Module, prompts: Prompts, limit: int, stop_ids: frozenset[int],
                   size: int) -> Iterator[tuple[str, list[int]]]:
    """transformers' continuous batching; it can't be paused, so all rows come at its end.

    By default it takes 60% of the memory for its cache: here it gets the blocks that `size` rows can need.
    """
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    page = 32
    blocks = size * (2 + (max(len(tokens) for _, tokens in prompts) + limit) // page)
    batching = ContinuousBatchingConfig(page_size=page, num_blocks=blocks, max_batch_tokens=1024,
                                        max_requests_per_batch=size)
    config = generation_config(limit, stop_ids or frozenset([-1]))  # without any it would warn
    out = model.generate_batch([tokens for _, tokens in prompts], generation_config=config,
                               continuous_batching_config=batching)
    for (id, _), row in zip(prompts, out.values(), strict=True):
        yield id, until_stop(row.generated_tokens, stop_ids)


def llama_cpp(models: dict[str, object], prompts: Prompts, limit: int, stop_ids: frozenset[int], size: int, dtype: str,
              unified: bool) -> Iterator[tuple[str, list[int]]]:
    """llama.cpp, `size` sequences at a time."""
    from peers_llama_cpp import Context

    capacity = max(len(tokens) for _, tokens in prompts) + limit
    context = Context(models[dtype], size, capacity, unified, torch.get_num_threads())
    yield from context.generate(prompts, limit, stop_ids)
    context.close()


PEERS = {  # the settings to try of each
    "generate": [{"size": 32, "cache": "dynamic"}, {"size": 64, "cache": "dynamic"}, {"size": 128, "cache": "dynamic"},
                 {"size": 64, "cache": "static"}],
    "generate_batch": [{"size": 16}, {"size": 32}, {"size": 64}],
    "llama.cpp": [{"dtype": "float32", "size": 64, "unified": True}, {"dtype": "float16", "size": 64, "unified": True},
                  {"dtype": "float16", "size": 32, "unified": True}, {"dtype": "float16", "size": 64, "unified": False}]
}


def job(args: argparse.Namespace) -> dict:
    """Useful tokens per second of all sides."""
    model, chat = load_model(SMOLLM2)
    prompts = alpaca(chat, args.prompts)
    print(f"job: {SMOLLM2}, {len(prompts)} prompts, {sum(len(tokens) for _, tokens in prompts)} prompt tokens")
    theirs = None
    if {"generate", "generate_batch"} & set(args.against):
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        models = llama_cpp_models(Path(folder)) if "llama.cpp" in args.against else {}
        runs = {"generate": partial(generate, theirs), "generate_batch": partial(generate_batch, theirs),
                "llama.cpp": partial(llama_cpp, models)}
        sides: dict[str, Side] = {"offmodel": partial(ours, model)}
        list(sides["offmodel"](prompts[:16], 8, NOTHING))
        print(f"offmodel: slots {SLOTS}")
        for name in args.against:
            sides[name] = partial(runs[name], **best_settings(name, runs[name], prompts))
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            found, seconds = take_turns({name: run(prompts, NEW_TOKENS, chat.stop_ids) for name, run in sides.items()},
                                        len(prompts))
            for name, rows in found.items():
                tokens = sum(map(len, rows.values()))
                rates[name].append(tokens / seconds[name])
                print(f"{name}: {tokens} tokens in {seconds[name]:.0f} s, {rates[name][-1]:.0f} per second, ratio "
                      f"{rates['offmodel'][-1] / rates[name][-1]:.2f}")
    results = {}
    for name, each in rates.items():
        results[f"{name}, tokens/s"] = round(statistics.median(each), 1)
    for name in args.against:
        results[f"offmodel / {name}"] = round(statistics.median(
            a / b for a, b in zip(rates["offmodel"], rates[name], strict=True)), 2)
        results[f"rows as {name}'s"] = compare(name, dict(prompts), found["offmodel"], found[name], theirs)
    return results


def llama_cpp_models(folder: Path) -> dict[str, object]:
    """The checkpoint in llama.cpp, by type, through files in `folder`."""
    import numpy as np
    from peers_llama_cpp import load_gguf, write_gguf

    models = {}
    for dtype in ("float32", "float16"):
        write_gguf(model_folder(SMOLLM2), folder / f"{dtype}.gguf", getattr(np, dtype))
        models[dtype] = load_gguf(folder / f"{dtype}.gguf")
    return models


def best_settings(name: str, run: Side, prompts: Prompts) -> dict:
    """Of the settings to try the one with the most tokens per second."""
    rates = []
    for settings in PEERS[name]:
        if settings["size"] <= len(prompts):
            some = [(id, (tokens * TRIAL_PROMPT)[:TRIAL_PROMPT]) for id, tokens in prompts[: settings["size"]]]
            list(run(some[:8], 4, NOTHING, **settings))
            start = time.perf_counter()
            tokens = sum(len(tokens) for _, tokens in run(some, TRIAL_TOKENS, NOTHING, **settings))
            rates.append((tokens / (time.perf_counter() - start), settings))
            print(f"{name}: {rates[-1][0]:.0f} tokens/s with {settings}")
    return max(rates, key=lambda pair: pair[0])[1]


def take_turns(sides: dict[str, Iterator], count: int) -> tuple[dict[str, dict[str, list[int]]], dict[str, float]]:
    """All rows of all sides by id, TURN of one side after TURN of the other, and the seconds that each took."""
    found: dict[str, dict] = {name: {} for name in sides}
    seconds = dict.fromkeys(sides, 0.0)
    while any(len(rows) < count for rows in found.values()):
        for name, rows in sides.items():
            start = time.perf_counter()
            found[name].update(islice(rows, TURN))
            seconds[name] += time.perf_counter() - start
    return found, seconds


def compare(name: str, prompts: dict[str, list[int]], mine: dict, other: dict, judge: nn.Module | None) -> int:
    """How many rows are the same; of the others prints where they part and, by one forward pass without padding,
    how far our token there is below the likeliest."""
    parted = {}
    for id, tokens in mine.items():
        if tokens != other[id]:
            parted[id] = next(i for i, pair in enumerate(zip(tokens, other[id], strict=False)) if pair[0] != pair[1])
    print(f"{name}: {len(mine) - len(parted)} of {len(mine)} rows the same; the others part after",
          sorted(parted.values()))
    if judge is not None and parted:
        gaps = []
        for id in parted:
            with torch.inference_mode():
                logits = judge(torch.tensor([prompts[id] + mine[id]])).logits[0, len(prompts[id]) - 1 : -1]
            gaps.append((logits.amax(-1) - logits.gather(1, torch.tensor(mine[id])[:, None])[:, 0]).max().item())
        print(f"  in these, our tokens are at most so far below transformers' maximum: {max(gaps):.1e}, "
              f"and {sum(gap == 0 for gap in gaps)} of {len(gaps)} rows are its argmaxes throughout")
    return len(mine) - len(parted)


# --- the floors


def step(args: argparse.Namespace) -> dict:
    """A decode step's time and its matrix products'."""
    results = {}
    for name, rows in ((SMOLLM2, 16), (SMOLLM2, 64), (QWEN, 16)):
        model, _ = load_model(name)
        taken, floor = (1000 * statistics.median(times) for times in step_times(model, rows))
        print(f"step: {name}, {rows} rows: {taken:.1f} ms, products {floor:.1f} ms")
        label = f"{name.split('/')[1]}, {rows} rows"
        results |= {f"{label}, ms": round(taken, 1), f"{label}, products, ms": round(floor, 1),
                    f"{label}, products' share": round(floor / taken, 3)}
    return results


@torch.inference_mode()
def step_times(model: Decoder, rows: int) -> tuple[list[float], list[float]]:
    """Seconds of 40 decode steps of `rows` rows, from forward pass to forward pass, and of the products after each."""
    matrices = [module.weight for module in model.layers.modules() if isinstance(module, nn.Linear)]
    matrices.append(model.lm_head.weight)
    inputs = {width: torch.randn(rows, width) for width in {matrix.shape[1] for matrix in matrices}}
    steps, floors, began = [], [], None

    def before(_: nn.Module, arguments: tuple) -> None:
        nonlocal began
        if began is not None:
            steps.append(time.perf_counter() - began)
        decoding = isinstance(arguments[2], Decode)
        if decoding:
            start = time.perf_counter()
            for matrix in matrices:
                F.linear(inputs[matrix.shape[1]], matrix)
            floors.append(time.perf_counter() - start)
        began = time.perf_counter() if decoding else None

    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (rows, 130), generator=generator).tolist()
    hook = model.register_forward_pre_hook(before)
    list(Sampler(model, NOTHING, max_new_tokens=41, slots=rows).generate([(str(i), p) for i, p in enumerate(prompts)]))
    hook.remove()
    return steps, floors


def memory(args: argparse.Namespace) -> dict:
    """The job's peak memory."""
    prompts = alpaca(Chat(model_folder(SMOLLM2), read_config(model_folder(SMOLLM2))), args.prompts)
    idle, peak = in_fresh_process(peak_memory), in_fresh_process(job_memory, prompts)
    needed = peak["weights"] + peak["cache"]
    megabytes = {"idle": idle, "peak": peak["peak"], "peak less idle": peak["peak"] - idle,
                 "weights": peak["weights"], "cache in use": peak["cache"]}
    return {f"{name}, MB": round(value / 1e6, 1) for name, value in megabytes.items()} | {
        "peak less idle / (weights + cache)": round((peak["peak"] - idle) / needed, 3)}


def job_memory(prompts: Prompts) -> dict[str, int]:
    """Peak memory after the job, and what of it are weights and cache."""
    model, chat = load_model(SMOLLM2)
    sampler = Sampler(model, chat.stop_ids, max_new_tokens=NEW_TOKENS, slots=SLOTS)
    list(sampler.generate(prompts))
    return {"peak": peak_memory(), "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
            "cache": sampler.peak_cache_bytes}


def prefix(args: argparse.Namespace) -> dict:
    """Prompts with a long beginning in common."""
    model, chat = load_model(SMOLLM2)
    examples = chat.encode("\n\n".join(row["prompt"] for row in load_prompts("alpaca", 1000, 100)[0]))
    questions = load_prompts("alpaca", 0, 32)[0]
    for cut in range(400, 500):  # of the examples; the template adds a little
        system = chat.decode(examples[:cut])
        prompts = [(row["id"], chat.prompt(row["prompt"], system)) for row in questions]
        shared = len(os.path.commonprefix([tokens for _, tokens in prompts]))
        if shared >= 500:
            break
    samples = [(f"{id} {i}", tokens) for id, tokens in prompts for i in range(4)]
    print(f"prefix: {SMOLLM2}, {len(samples)} rows, {shared} tokens in common, "
          f"{sum(len(tokens) for _, tokens in samples)} prompt tokens in all, 32 new ones each")
    found, seconds = {}, {True: [], False: []}
    list(Sampler(model, NOTHING, max_new_tokens=4, slots=SLOTS).generate(samples[:8]))  # warms up
    for _ in range(args.rounds):
        for share in (True, False):
            sampler = Sampler(model, NOTHING, max_new_tokens=32, temperature=1.0, slots=SLOTS, share_prefixes=share)
            start = time.perf_counter()
            found[share] = {response.id: response.tokens for response in sampler.generate(samples)}
            seconds[share].append(time.perf_counter() - start)
        assert found[True] == found[False]
    together, apart = (statistics.median(seconds[share]) for share in (True, False))
    return {"shared, s": round(together, 2), "not shared, s": round(apart, 2), "ratio": round(apart / together, 2)}


def load(args: argparse.Namespace) -> dict:
    """From the file to the first token."""
    folder = model_folder(SMOLLM2)
    prompt = alpaca(Chat(folder, read_config(folder)), 1)[0][1][-10:]
    times = []
    for i in range(8):
        taken = (in_fresh_process(read_file), *in_fresh_process(load_and_sample, prompt))
        if i:  # the first fills the disk cache
            times.append(taken)
    reading, loading, first = (1000 * statistics.median(each) for each in zip(*times, strict=True))
    return {"read the file, ms": round(reading), "load, ms": round(loading), "load to first token, ms": round(first),
            "first token / read": round(first / reading, 2)}


def read_file() -> float:
    """Seconds to read the weights' file in pieces of 16 MiB."""
    start = time.perf_counter()
    for path in weights.weight_files(model_folder(SMOLLM2)):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    return time.perf_counter() - start


def load_and_sample(prompt: list[int]) -> tuple[float, float]:
    """Seconds to load the model, and to have the first token."""
    folder = model_folder(SMOLLM2)
    start = time.perf_counter()
    model = weights.load(folder, torch.device("cpu"), torch.float32)
    loaded = time.perf_counter()
    next(Sampler(model, NOTHING, max_new_tokens=1).generate([("a", prompt)]))
    return loaded - start, time.perf_counter() - start


if __name__ == "__main__":
    main()
