"""Train a model on a JSONL of responses: LoRA (the default), all weights, or a new model from random weights.

    python train.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data teacher.jsonl --out off_model

A row has id, prompt, response and, if any, system; or id and messages, a conversation of several turns.

Conversations are packed without padding and don't see each other. The loss is the mean over all supervised tokens of
an optimiser step (the responses and their end-of-turn tokens), however they fall into micro-batches; with
--prompt-loss-weight the other tokens count too, by that weight. The state is saved as training goes, and the same
command continues a run that was stopped, to the same bits.
"""

import argparse
import contextlib
import hashlib
import math
import re
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from base.errors import UserError, about, printable, run_script
from base.files import alone, same_run_folder, sha256, whole, write_record
from base.hub import model_folder
from base.options import DTYPES, Parser, device_options, natural, nonempty, number, positive_int, resolve_device, seed
from data.rows import ANSWERED, GrowingRows, read_rows
from generate import model_identity
from model.config import PROJECTIONS

if TYPE_CHECKING:
    import torch

    from data.packing import Example
    from model.chat import Chat
    from model.decoder import Decoder

LESS_MEMORY = "a lower --micro-batch-tokens, or --checkpoint-activations,"
TRAINED_IN = ("float32", "bfloat16")  # in float16 gradients underflow
EPOCHS, STEPS = number(int, low=1, high=10**4), number(int, low=1, high=10**6)  # the plan of all steps is in memory
STATE = "training_state.safetensors"
MOMENTS = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}
METRICS = {"step": int, "loss": float, "seconds": float}
NEW_ADAPTER = {"rank": 16, "alpha": None, "dropout": 0.0, "targets": PROJECTIONS}  # alpha: twice the rank


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--model", type=nonempty, required=True, metavar="M",
                        help="hub name, or folder in Hugging Face layout")
    parser.add_argument("--adapter", type=nonempty, metavar="DIR", help="continue training this LoRA adapter")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE.jsonl",
                        help="rows to train on")
    parser.add_argument("--skip", type=natural, default=0, help="pass over the first rows")
    parser.add_argument("--n", type=positive_int, help="take so many rows only (default: all)")
    parser.add_argument("--no-system", action="store_true", help="leave the rows' system prompts out: what was "
                        "answered under one is learnt without it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the adapter, or with --full the model")
    parser.add_argument("--full", action="store_true", help="train all weights instead of an adapter")
    parser.add_argument("--from-scratch", action="store_true",
                        help="train all weights from random ones: of M only config and tokenizer are used")
    parser.add_argument("--save-dtype", choices=DTYPES, help="of the saved weights (default: --dtype)")
    parser.add_argument("--max-length", type=positive_int, metavar="TOKENS",
                        help="longest conversation (default: the model's context)")
    parser.add_argument("--drop-long", action="store_true", help="leave out longer ones instead of stopping")
    parser.add_argument("--validate", type=positive_int, metavar="N",
                        help="hold out the last N rows: their loss before the first step and after the last")
    parser.add_argument("--validate-every", type=positive_int, metavar="STEPS", help="... and as training goes")
    parser.add_argument("--keep-every", type=positive_int, metavar="STEPS",
                        help="keep the adapter (or model) of every so many steps, in DIR/steps/STEP")
    parser.add_argument("--resume", action="store_true", help="refuse to begin: only continue a run that was stopped")
    parser.add_argument("--dry-run", action="store_true",
                        help="say what would be trained on, what left out, and about how much memory it takes")
    training_options(parser)
    device_options(parser, TRAINED_IN)
    args = parser.parse_args(argv)
    args.adapter_scale = 1.0  # for `model_identity`: an adapter is taken up as it is
    args.full = args.full or args.from_scratch
    if args.full and args.adapter:
        parser.error("--full and --from-scratch train the model's own weights, --adapter an adapter: give one of them")
    if args.save_dtype and not args.full:
        parser.error("--save-dtype is of a whole model (--full); adapters are saved in float32")
    if args.validate_every and not args.validate:
        parser.error("--validate-every needs the number of rows to hold out, --validate")
    for name in NEW_ADAPTER:
        if (args.full or args.adapter) and getattr(args, name) is not None:
            parser.error(f"--{name} is of a new adapter: not to be given with --full, --from-scratch or --adapter")
    if not (args.full or args.adapter):
        resolve_adapter(args)
    return args


def training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of training."""
    group = parser.add_argument_group("training")
    # None until `resolve_adapter`: an adapter that is there already brings its own
    group.add_argument("--rank", type=positive_int, help="of a new LoRA adapter (default: 16)")
    group.add_argument("--alpha", type=number(float, above=0), help="its scale × rank (default: twice the rank)")
    group.add_argument("--dropout", type=number(float, low=0, high=0.99), help="on its input (default: 0)")
    group.add_argument("--targets", nargs="+", metavar="LAYER", choices=PROJECTIONS,
                       help=f"layers that get one (default: {' '.join(PROJECTIONS)})")
    group.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw",
                       help="muon: for the matrices of the blocks, and AdamW for the rest")
    group.add_argument("--lr", type=number(float, above=0, high=1e30), default=2e-4, help="peak learning rate")
    group.add_argument("--schedule", choices=("cosine", "linear", "constant"), default="cosine", help="after warm-up")
    group.add_argument("--warmup", type=number(float, low=0, high=1), default=0.1, help="share of the steps")
    group.add_argument("--epochs", type=EPOCHS, default=2, help="passes over the data")
    group.add_argument("--steps", type=STEPS, help="optimiser steps, instead of --epochs")
    group.add_argument("--batch-tokens", type=positive_int, default=4096,
                       help="tokens of an optimiser step, at most; a longer conversation is a step of its own")
    group.add_argument("--micro-batch-tokens", type=positive_int,
                       help="tokens in one forward pass: lower it if memory runs out; changes no result but the units "
                       "that dropout hits (default: 512, on a GPU 4096)")
    group.add_argument("--checkpoint-activations", action="store_true",
                       help="keep each block's input alone and compute it again for the gradient: far less memory, a "
                       "third more work, the same result (without it: in some blocks, for a conversation longer than "
                       "--micro-batch-tokens)")
    group.add_argument("--clip", type=number(float, above=0), default=1.0, help="largest norm of the gradient")
    group.add_argument("--weight-decay", type=number(float, low=0), default=0.0, help="decoupled, as AdamW's")
    group.add_argument("--prompt-loss-weight", type=number(float, low=0, high=1), default=0.0,
                       help="of the tokens outside responses, which weigh 1")
    group.add_argument("--seed", type=seed, default=0, help="of order, initialisation and dropout")
    group.add_argument("--save-every", type=positive_int, default=1, metavar="STEPS",
                       help="how often the state is saved, for a run that is stopped")


def resolve_adapter(args: argparse.Namespace) -> None:
    """Fill in the defaults of a new adapter."""
    for name, default in NEW_ADAPTER.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.alpha = args.alpha or 2.0 * args.rank


def main(argv: list[str] | None = None) -> None:
    """Response rows in, adapter or model out."""
    args = parse(argv)
    with contextlib.nullcontext() if args.dry_run else alone(args.out / ".lock"):
        run(args)


def run(args: argparse.Namespace) -> None:
    """Train, step by step."""
    rows = [row | {"messages": as_messages(row, args.data)}
            for row in read_rows(args.data, ANSWERED, instead="messages")]
    end = args.skip + (args.n or 1)
    if end > len(rows):
        raise UserError(f"{args.data} has {len(rows)} rows, and {end} are asked for; lower --n or --skip")
    rows = rows[args.skip : end if args.n else None]
    if args.no_system:
        rows = [row | {"messages": [message for message in row["messages"] if message["role"] != "system"]}
                for row in rows]
    if args.validate and args.validate >= len(rows):
        raise UserError(f"--validate {args.validate} of {len(rows)} rows leaves none to train on")
    deciding = ("skip", "n", "no_system", "full", "from_scratch", "save_dtype", "max_length", "drop_long", "rank",
                "alpha", "dropout", "targets", "optimizer", "lr", "schedule", "warmup", "epochs", "steps",
                "batch_tokens", "clip", "weight_decay", "prompt_loss_weight", "validate", "validate_every",
                "keep_every", "seed")
    options = {"data_sha256": sha256(args.data), **model_identity(args),
               **{name: getattr(args, name) for name in deciding}}
    record = args.out / ("training.json" if args.full else "config.json")  # a whole model has a config.json of its own
    begun = same_run_folder(record, options)
    if begun and not args.dry_run and (args.out / "metrics.jsonl").exists():
        if (args.out / STATE).exists():  # a kill's; and a read-only disk says no even where there is nothing to delete
            (args.out / STATE).unlink()
        print(f"{args.out}: done already")
        return
    if args.resume and not begun:
        raise UserError(f"{args.out} holds no run of this command to continue; leave --resume out to begin one")

    import torch
    from tqdm import tqdm

    from data.packing import micro_batches, plan_steps
    from model import lora, weights
    from model.chat import Chat
    from model.config import read_config
    from model.decoder import Decoder

    # The data, and the examples of every step
    folder = model_folder(args.model)
    device, dtype = resolve_device(args.device, args.dtype)
    args.micro_batch_tokens = args.micro_batch_tokens or (4096 if device.type == "cuda" else 512)
    shape = read_config(folder)
    chat, context = Chat(folder, shape, args.template_options, args.today), shape.max_positions
    if args.max_length and args.max_length > context:
        raise UserError(f"--max-length {args.max_length} is beyond the model's context of {context}")
    examples, dropped = encode_rows(chat, rows, args.max_length or context, args.drop_long)
    held_out = {row["id"] for row in rows[len(rows) - (args.validate or 0) :]}
    validation = [example for example in examples if example.id in held_out]
    examples = [example for example in examples if example.id not in held_out]
    if not examples or (args.validate and not validation):
        raise UserError(f"{len(dropped)} rows are dropped{listed(dropped)}; {len(examples)} are left to train on and "
                        f"{len(validation)} to validate on")
    trained = {example.id for example in examples}
    lengths = [len(example.tokens) for example in examples]
    plan = plan_steps(lengths, args.batch_tokens, args.seed, args.epochs, args.steps)
    facts = {"data": str(args.data), "adapter": args.adapter,
             "rows": len(rows), "dropped": dropped, "conversations": len(examples), "validation": len(validation),
             "cut_responses": sum(row.get("finish_reason") == "length" and row["id"] in trained for row in rows),
             "tokens": sum(lengths),
             "supervised_tokens": sum(example.supervised for example in examples), "steps": len(plan)}
    held = f" - {len(validation)} held out" if validation else ""
    print(f"{args.out}: {facts['rows']} rows - {len(dropped)} dropped{listed(dropped)}{held} = {len(examples)} "
          f"conversations ({facts['cut_responses']} cut at a limit, trained without an end of turn), {facts['tokens']} "
          f"tokens, {facts['supervised_tokens']} supervised, {facts['steps']} steps")
    print(show_example(chat, examples[plan[0][0]]))

    # The model, with what is trained switched on
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # with --full the weights are float32 whatever --dtype is, and the products run in --dtype
    if args.from_scratch and args.dry_run:
        with torch.device("meta"):
            model = Decoder(shape)
    elif args.from_scratch:
        model = weights.initialise(folder, device, args.seed)
    else:
        place = torch.device("meta") if args.dry_run else device  # there tensors are shapes alone
        model = weights.load(folder, place, torch.float32 if args.full else dtype, narrow=not args.full)
    if args.full:
        model.requires_grad_(True)
    elif args.adapter:
        config = lora.load(model, args.adapter)
    else:
        config = lora.LoRAConfig(args.rank, args.alpha, args.dropout, tuple(args.targets))
        lora.attach(model, config, args.seed)
    model.train()
    if args.dry_run:
        dry_run(model, examples, plan, args, dtype)
        return
    autocast = args.full and dtype != torch.float32
    precision = torch.autocast(device.type, dtype) if autocast else contextlib.nullcontext()

    @torch.no_grad()
    def validation_loss() -> float:
        model.eval()
        parts = micro_batches(validation, args.micro_batch_tokens)
        with precision:
            total = sum(summed_nll(model, part, args.prompt_loss_weight).item()
                        for part in tqdm(parts, "validation", leave=False, disable=None))
        model.train()
        if not math.isfinite(total):
            raise UserError(f"the validation loss is {total}: a lower --lr with another --out would do, unless the "
                            "model itself is damaged")
        return total / sum(example.weight(args.prompt_loss_weight) for example in validation)

    def save(out: Path) -> None:
        if args.full:
            weights.save(model, folder, out, getattr(torch, args.save_dtype) if args.save_dtype else dtype)
        else:
            lora.save(model, config, out, args.model)

    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizers = make_optimizers(args, parameters)
    write_record(record, options, facts)
    start = load_state(args.out / STATE, parameters, optimizers)
    before = shown = validation_loss() if validation and start == 0 else None
    with (GrowingRows(args.out / "metrics.jsonl", METRICS, key="step") as metrics,
          tqdm(total=len(plan), initial=start, desc=args.out.name, unit="step", disable=None) as progress):
        if not metrics.rows.keys() >= set(range(1, start + 1)):
            raise UserError(f"{metrics.partial} lacks steps that {STATE} has behind it; delete both to begin again")
        for step in range(start, len(plan)):
            began = time.perf_counter()
            torch.manual_seed(step_seed(args.seed, step))  # dropout: the same when the run is taken up here
            lr = learning_rate(step, len(plan), args.lr, args.schedule, args.warmup)
            for parameter_group in (group for optimizer in optimizers for group in optimizer.param_groups):
                parameter_group["lr"] = lr
            loss = add_gradients(model, [examples[i] for i in plan[step]], args.micro_batch_tokens,
                                 args.checkpoint_activations, args.prompt_loss_weight, precision)
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), args.clip).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                ids = ", ".join(examples[i].id for i in plan[step][:10])
                raise UserError(f"the loss is {loss} and its gradient {norm} at step {step + 1} (rows {ids}); a lower "
                                "--lr with another --out would do, unless a row is to blame")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            seconds = time.perf_counter() - began
            tokens = sum(lengths[i] for i in plan[step])
            supervised = sum(examples[i].supervised for i in plan[step])
            row = {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens,
                   "supervised_tokens": supervised, "seconds": round(seconds, 3),
                   "tokens_per_second": round(tokens / seconds, 1), "peak_memory_mb": peak_memory(device)}
            if validation and step == 0:
                row["validation_loss_before"] = before
            if validation and (step + 1 == len(plan) or (step + 1) % (args.validate_every or len(plan)) == 0):
                row["validation_loss"] = shown = validation_loss()
            metrics.append(row)
            if args.keep_every and (step + 1) % args.keep_every == 0:
                save(args.out / "steps" / str(step + 1))
            if (step + 1) % args.save_every == 0:
                save_state(args.out / STATE, parameters, optimizers, step + 1)
            validated = "" if shown is None else f", validation {shown:.4f}"
            progress.set_postfix_str(
                f"loss {loss:.4f}{validated}, gradient {norm:.3f}, lr {lr:.1e}, {supervised} supervised, "
                f"{tokens / seconds:.0f} tokens/s, {row['peak_memory_mb']} MB", refresh=False)
            progress.update()

        save(args.out)
        metrics.finish(metrics.rows[step] for step in range(1, len(plan) + 1))  # last: it says that all is there
    (args.out / STATE).unlink(missing_ok=True)
    print(f"{args.out}: loss {metrics.rows[1]['loss']:.4f} at the first step, {metrics.rows[len(plan)]['loss']:.4f} at "
          f"the last, {sum(row['seconds'] for row in metrics.rows.values()):.0f} s")


def add_gradients(model: "Decoder", examples: list["Example"], micro_batch_tokens: int,
                  checkpoint_activations: bool = False, prompt_loss_weight: float = 0.0,
                  precision: contextlib.AbstractContextManager | None = None) -> float:
    """The loss of an optimiser step over `examples`, forward passes in `precision`; parameters get their gradients.

    A conversation longer than `micro_batch_tokens` is a pass of its own, in which so many blocks checkpoint their
    activations that the others keep no more than those tokens would take.
    """
    from data.packing import micro_batches

    total = sum(example.weight(prompt_loss_weight) for example in examples)
    loss = 0.0
    for part in micro_batches(examples, micro_batch_tokens):
        tokens = sum(len(example.tokens) for example in part)
        model.checkpointed = checkpointed_blocks(model, tokens, micro_batch_tokens, checkpoint_activations)
        with precision or contextlib.nullcontext():
            nll = summed_nll(model, part, prompt_loss_weight)
        # one denominator for the whole step: tokens weigh the same in whatever micro-batch they are
        (nll / total).backward()
        loss += nll.item() / total
    return loss


def checkpointed_blocks(model: "Decoder", tokens: int, micro_batch_tokens: int, everywhere: bool) -> int:
    """How many blocks keep their input alone in a forward pass over `tokens`: all, or as many as the budget lacks."""
    beyond = max(0.0, 1 - micro_batch_tokens / tokens)
    return math.ceil(model.config.num_layers * (1 if everywhere else beyond))


def summed_nll(model: "Decoder", examples: list["Example"], prompt_loss_weight: float = 0.0) -> "torch.Tensor":
    """The examples' loss by one forward pass over all of them: the sum, to be divided by the step's weights."""
    from data.packing import pack
    from model.attention import Packed
    from model.loss import chunked_nll

    batch = pack(examples, model.device, prompt_loss_weight)
    hidden = model(batch.tokens, batch.positions, Packed(batch.lengths, batch.shared))  # (T, E)
    # the head sees the places that predict a token of the loss, and no others
    return chunked_nll(hidden[batch.sources], model.lm_head.weight, batch.targets, batch.token_weights)


def dry_run(model: "Decoder", examples: list["Example"], plan: list[list[int]], args: argparse.Namespace,
            dtype: "torch.dtype") -> None:
    """Print the longest conversations and an estimate of a step's memory."""
    from data.packing import micro_batches
    from model.memory import training_memory

    longest = sorted(examples, key=lambda example: -len(example.tokens))[:5]
    print("longest: " + ", ".join(f"{example.id} ({len(example.tokens)} tokens)" for example in longest))
    sizes = {sum(len(example.tokens) for example in part) for step in plan
             for part in micro_batches([examples[i] for i in step], args.micro_batch_tokens)}
    estimates = []
    for tokens in sizes:  # of forward passes, each once
        model.checkpointed = checkpointed_blocks(model, tokens, args.micro_batch_tokens, args.checkpoint_activations)
        estimates.append((training_memory(model, tokens, dtype), tokens))
    parts, largest = max(estimates, key=lambda estimate: sum(estimate[0].values()))
    listing = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in parts.items())
    print(f"memory: about {sum(parts.values()) / 1e6:,.1f} MB and the libraries, with {largest} tokens in the fullest "
          f"forward pass ({listing}); nothing was trained")


def encode_rows(chat: "Chat", rows: list[dict], longest: int, drop_long: bool) -> tuple[list["Example"], list[str]]:
    """Conversations as token ids with their supervised spans, and the ids of those left out: empty or too long."""
    from data.packing import Example

    examples, empty, long = [], [], []
    for row in rows:
        if not all(message["content"].strip() for message in row["messages"] if message["role"] == "assistant"):
            empty.append(row["id"])
            continue
        with about(row["id"]):
            conversation = chat.conversation(row["messages"], ended=row.get("finish_reason") != "length")
        if len(conversation.tokens) > longest:
            long.append(row["id"])
        else:
            examples.append(Example(row["id"], conversation.tokens, conversation.spans))
    if long and not drop_long:
        raise UserError(f"{len(long)} of {len(rows)} conversations are longer than {longest} tokens{listed(long)}; "
                        "raise --max-length, or leave them out with --drop-long")
    if not examples:
        raise UserError(f"nothing is left: of {len(rows)} rows {len(empty)} have an empty response, and "
                        f"{len(long)} are longer than {longest} tokens")
    return examples, empty + long


def as_messages(row: dict, path: Path) -> list[dict]:
    """A row of `path` as chat messages: its own `messages`, or those of its system, prompt and response."""
    if row.get("messages") is None:
        system = [] if row.get("system") is None else [{"role": "system", "content": row["system"]}]
        return [*system, {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]}]
    messages = row["messages"]
    fine = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("content"), str) for message in messages)
    roles = [message.get("role") for message in messages] if fine else []
    roles = roles[1:] if roles[:1] == ["system"] else roles
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(f"{path}: the messages of row {row['id']} must be objects with role and content, user and "
                        "assistant by turns, behind a system message if any, and end with the assistant's")
    return messages


def make_optimizers(args: argparse.Namespace, parameters: dict[str, "torch.nn.Parameter"]
                    ) -> list["torch.optim.Optimizer"]:
    """AdamW, or with `--optimizer muon` Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the matrices
    of the blocks and AdamW for embedding, head, norms and biases.

    Muon's update is scaled to the size of AdamW's (Moonlight, arXiv 2502.16982), so that one --lr serves both.
    """
    import torch

    matrices, rest = [], []
    for name, parameter in parameters.items():
        by_muon = args.optimizer == "muon" and parameter.ndim == 2 and name.startswith("layers.")
        (matrices if by_muon else rest).append(parameter)
    optimizers = [torch.optim.AdamW(rest, betas=(0.9, 0.999), weight_decay=args.weight_decay)] if rest else []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def listed(ids: list[str]) -> str:
    """" (a, b, c)" of the first ten, or nothing."""
    return f" ({', '.join(ids[:10])}{', …' if len(ids) > 10 else ''})" if ids else ""


def show_example(chat: "Chat", example: "Example") -> str:
    """A conversation with its supervised part in green (between ⟦ ⟧ where there are no colours), so that a wrong
    mask is seen."""
    before, after = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    shown, done = "", 0
    for first, last in example.spans:
        prompt, response = (printable(chat.tokenizer.decode(part, skip_special_tokens=False))
                            for part in (example.tokens[done:first], example.tokens[first:last]))
        shown += f"{prompt}{before}{response}{after}"
        done = last
    return shown + printable(chat.tokenizer.decode(example.tokens[done:], skip_special_tokens=False))


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup: float) -> float:
    """Of step 0 … steps - 1: up in a straight line over the first steps · warmup, then as `schedule` says."""
    rising = math.ceil(steps * warmup)
    if step < rising:
        return peak * (step + 1) / rising
    progress = (step - rising) / max(1, steps - rising)
    return peak * {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[schedule]


def step_seed(seed: int, step: int) -> int:
    """A seed for one step's dropout."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=7).digest(), "little")


def peak_memory(device: "torch.device") -> int:
    """Most memory held so far, in MB (10⁶ bytes): on a GPU by tensors, on the CPU by the process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 10**6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) // 10**6


def save_state(path: Path, parameters: dict[str, "torch.nn.Parameter"], optimizers: list["torch.optim.Optimizer"],
               step: int) -> None:
    """Save what the next step starts from: parameters and moments; order and dropout follow from the step."""
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"{name}:value"] = parameter.data
        for optimizer in optimizers:
            tensors |= {f"{name}:{key}": moment for key, moment in optimizer.state.get(parameter, {}).items()}
    with whole(path) as part:
        save_file(tensors, part, metadata={"step": str(step)})


def load_state(path: Path, parameters: dict[str, "torch.nn.Parameter"], optimizers: list["torch.optim.Optimizer"]
               ) -> int:
    """Take up a saved state; returns the steps that are done, 0 where there is none."""
    import torch
    from safetensors import safe_open

    from model.weights import read_tensors

    if not path.exists():
        return 0
    tensors = read_tensors(path)
    owner = {parameter: optimizer for optimizer in optimizers
             for group in optimizer.param_groups for parameter in group["params"]}
    with safe_open(path, framework="pt") as file:
        step = (file.metadata() or {}).get("step", "")
    wanted = {f"{name}:{kind}": () if kind == "step" else parameter.shape for name, parameter in parameters.items()
              for kind in ("value", *MOMENTS[type(owner[parameter]).__name__])}
    if not re.fullmatch(r"[1-9]\d{0,8}", step) or {
            key: tensor.shape for key, tensor in tensors.items() if tensor.dtype == torch.float32} != wanted:
        raise UserError(f"{path} is not the state of this training; delete the folder to begin again")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"{name}:value"])
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition(":")
        parameter = parameters[name]
        if moment != "value":  # AdamW's count of steps stays on the CPU, where the optimiser reads it
            place = tensor.device if moment == "step" else parameter.device
            owner[parameter].state[parameter][moment] = tensor.to(place, copy=True)
    return int(step)


if __name__ == "__main__":
    run_script(main, "the steps up to the last saved state", LESS_MEMORY)
