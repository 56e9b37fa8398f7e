"""What LoRA SFT costs, against TRL's SFTTrainer with PEFT; and how its memory grows with the vocabulary.

    python tests/bench_train.py --data teacher.jsonl         # everything: half an hour on two cores
    python tests/bench_train.py curve --data teacher.jsonl   # a part of it

smollm2     SmolLM2-135M-Instruct, 4,096 tokens a step, rank 16 on all linear layers: supervised tokens per second, peak
            memory
qwen        Qwen2.5-Coder-0.5B-Instruct, the same at 1,024 tokens a step
curve       the loss of 20 steps of TRL and of ours: the same rows, order, initial adapter, hyperparameters
vocabulary  what the loss adds to a process's memory at a vocabulary of 152k, by supervised tokens

Each side runs in a process of its own and waits while the others have their turn: one step of one, one of the next, so
that what else the machine does hits all alike. A step is the same rows on all sides. TRL pads (its default) or packs
(without attention across rows), and keeps all activations, as we do. Of its micro-batch sizes the one with the most
supervised tokens per second in one step is taken. Memory is a process's peak, libraries included.

--data: rows of `generate.py --prompts alpaca --n 256`. Needs the hub cache and requirements-peers.txt. A table and
one line of JSON come last.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import QWEN, SMOLLM2, in_fresh_process, peak_memory, run_sections

from base.hub import model_folder
from data.packing import Example, group, plan_steps
from data.rows import read_rows
from model import lora, weights
from model.chat import Chat
from model.config import read_config
from model.loss import chunked_nll
from train import add_gradients, as_messages, encode_rows

TOKENS = {SMOLLM2: 4096, QWEN: 1024}  # of a step
MICRO = 512  # tokens of one of our forward passes
SETTINGS = {  # rows in a forward pass of TRL's; with packing, tokens
    SMOLLM2: [("padded", 2), ("padded", 4), ("padded", 8), ("packed", 512), ("packed", 1024)],
    QWEN: [("padded", 1), ("padded", 2), ("padded", 4), ("packed", 512), ("packed", 1024)],
}
LR, RANK, CURVE_STEPS = 2e-4, 16, 20


def main() -> None:
    """Run the sections asked for, print their results."""
    sections = {"smollm2": lambda args: rates(args, SMOLLM2), "qwen": lambda args: rates(args, QWEN),
                "curve": curve, "vocabulary": vocabulary}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3, help="steps of each side")
    run_sections(parser, sections)


def load_examples(name: str, data: Path) -> list[Example]:
    """The rows as train.py encodes them."""
    config = read_config(folder := model_folder(name))
    rows = [row | {"messages": as_messages(row, data)} for row in read_rows(data)]
    return encode_rows(Chat(folder, config), rows, config.max_positions, drop_long=True)[0]


# --- the sides: each takes a list of examples, trains one optimiser step on them, and yields its loss


def ours(name: str, adapter: Path, micro: int) -> Iterator[float | None]:
    """A step of train.py's, but for saving its state and metrics."""
    model = weights.load(model_folder(name), torch.device("cpu"), torch.float32, narrow=True)
    lora.load(model, str(adapter))
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.999), weight_decay=0.0)
    loss = None
    while True:
        examples = yield loss
        loss = add_gradients(model, examples, micro)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def theirs(name: str, adapter: Path, kind: str, micro: int) -> Iterator[float | None]:
    """TRL's, driven through `SFTTrainer.training_step` and its own collator, optimiser and clipping."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    packed = kind == "packed"
    if packed:  # the only attention here that keeps packed rows apart on a CPU
        model.config._attn_implementation = "sdpa"
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(output_dir=folder, use_cpu=True, bf16=False, learning_rate=LR, lr_scheduler_type="constant",
                           weight_decay=0.0, max_grad_norm=1.0, report_to=[], gradient_checkpointing=False,
                           dataset_kwargs={"skip_prepare_dataset": True}, padding_free=packed, max_length=None,
                           remove_unused_columns=False)
        from datasets import Dataset

        rows = Dataset.from_list([{"input_ids": [0, 0], "labels": [-100, 0]}])
        trainer = SFTTrainer(model, args=config, train_dataset=rows,
                             processing_class=AutoTokenizer.from_pretrained(name))
        trainer.create_optimizer()
        loss = None
        while True:
            examples = yield loss
            lengths = [len(example.tokens) for example in examples]
            parts = (list(group(range(len(examples)), lengths, micro)) if packed else
                     [range(i, min(i + micro, len(examples))) for i in range(0, len(examples), micro)])
            total = torch.tensor(sum(example.supervised for example in examples))
            trainer.current_gradient_accumulation_steps = len(parts)
            loss = 0.0
            for part in parts:
                batch = trainer.data_collator([as_row(examples[i]) for i in part])
                loss += trainer.training_step(trainer.model, batch, num_items_in_batch=total).item()
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.model.zero_grad()


def as_row(example: Example) -> dict:
    """What TRL's collator takes."""
    labels = [-100] * len(example.tokens)
    for first, last in example.spans:
        labels[first:last] = example.tokens[first:last]
    return {"input_ids": example.tokens, "labels": labels}


def serve(pipe: Connection, side: str, arguments: tuple) -> None:
    """A side in its own process: examples in; loss, seconds and peak memory out."""
    trainer = {"offmodel": ours, "trl": theirs}[side](*arguments)
    next(trainer)
    for examples in iter(pipe.recv, None):
        start = time.perf_counter()
        loss = trainer.send(examples)
        pipe.send((loss, time.perf_counter() - start, peak_memory()))


class Side:
    """A trainer in a process of its own."""

    def __init__(self, side: str, *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=serve, args=(far_end, side, arguments), daemon=True)
        self.process.start()
        far_end.close()

    def step(self, examples: list[Example]) -> tuple[float, float, int]:
        """Loss, seconds and the peak memory so far, in bytes."""
        self.pipe.send(examples)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def new_adapter(name: str, folder: Path) -> Path:
    """A fresh adapter, so that all sides start alike."""
    model = weights.load(model_folder(name), torch.device("cpu"), torch.float32)
    config = lora.LoRAConfig(rank=RANK)
    lora.attach(model, config)
    lora.save(model, config, folder, name)
    return folder


# --- the sections


def rates(args: argparse.Namespace, name: str) -> dict:
    """Supervised tokens per second and peak memory of all sides."""
    examples = load_examples(name, args.data)
    plan = plan_steps([len(example.tokens) for example in examples], TOKENS[name], seed=0, steps=args.rounds + 1)
    steps = [[examples[i] for i in step] for step in plan]
    supervised = [sum(example.supervised for example in step) for step in steps]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        adapter = new_adapter(name, Path(folder) / "adapter")
        best = {}
        for kind, micro in SETTINGS[name]:
            side = Side("trl", name, adapter, kind, micro)
            side.step(steps[0][:2])
            _, seconds, memory = side.step(steps[0])
            side.close()
            print(f"trl, {kind}, {micro}: {supervised[0] / seconds:.1f} supervised tokens/s, {memory / 1e9:.2f} GB")
            best.setdefault(kind, []).append((supervised[0] / seconds, micro))
        sides = {"offmodel": Side("offmodel", name, adapter, MICRO)} | {
            f"trl {kind}": Side("trl", name, adapter, kind, max(tried)[1]) for kind, tried in best.items()}
        taken: dict[str, list[float]] = {label: [] for label in sides}
        memory = {}
        for i, step in enumerate(steps):
            for label, side in sides.items():
                loss, seconds, memory[label] = side.step(step)
                print(f"step {i}, {label}: loss {loss:.4f}, {supervised[i] / seconds:.1f} supervised tokens/s")
                if i:  # the first warms up
                    taken[label].append(supervised[i] / seconds)
        for side in sides.values():
            side.close()
    for label, found in taken.items():
        results[f"{label}, supervised tokens/s"] = round(statistics.median(found), 1)
        results[f"{label}, peak GB"] = round(memory[label] / 1e9, 2)
    for label in list(taken)[1:]:
        results[f"offmodel / {label}, speed"] = round(statistics.median(
            a / b for a, b in zip(taken["offmodel"], taken[label], strict=True)), 2)
        results[f"offmodel / {label}, memory"] = round(memory["offmodel"] / memory[label], 2)
    return results


def curve(args: argparse.Namespace) -> dict:
    """Largest relative difference of the two sides' losses over 20 steps."""
    examples = load_examples(SMOLLM2, args.data)
    plan = plan_steps([len(example.tokens) for example in examples], 512, seed=0, steps=CURVE_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        adapter = new_adapter(SMOLLM2, Path(folder) / "adapter")
        sides = Side("offmodel", SMOLLM2, adapter, MICRO), Side("trl", SMOLLM2, adapter, "padded", 4)
        losses = [[side.step([examples[i] for i in step])[0] for side in sides] for step in plan]
        for side in sides:
            side.close()
    for i, (mine, other) in enumerate(losses):
        print(f"step {i + 1}: loss {mine:.6f}, trl {other:.6f}")
    return {"steps": len(losses), "first loss": round(losses[0][0], 4), "last loss": round(losses[-1][0], 4),
            "largest relative difference": max(abs(a - b) / b for a, b in losses)}


def vocabulary(args: argparse.Namespace) -> dict:
    """Bytes per supervised token that the loss adds to a process's peak, at hidden size 896 and vocabulary 152k."""
    peaks = {count: in_fresh_process(loss_peak, count, 896) for count in (512, 4096)}
    each = (peaks[4096] - peaks[512]) / (4096 - 512)
    return {"peak MB, 512 tokens": peaks[512] // 10**6, "peak MB, 4096 tokens": peaks[4096] // 10**6,
            "bytes a token": round(each), "of hidden and its gradient": 2 * 4 * 896, "of logits": 4 * 151_936}


def loss_peak(count: int, size: int) -> int:
    """This process's peak memory after the loss of `count` tokens of hidden size `size`, and its gradient."""
    hidden, weight = torch.randn(count, size, requires_grad=True), torch.randn(151_936, size)
    chunked_nll(hidden, weight, torch.arange(count), torch.ones(count)).backward()
    return peak_memory()


if __name__ == "__main__":
    main()
