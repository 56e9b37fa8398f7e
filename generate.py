"""Generate one model's responses to a set of chat prompts.

    python generate.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct --prompts alpaca --n 256 --out teacher.jsonl

Rows are saved as they finish (FILE.partial.jsonl) and get their final name, in the order of the prompts, when all are
there; what made them stands in FILE.config.json. The same command continues a run that was stopped. A row depends on
the options, the seed and its own id, not on the batch it was sampled in (on a GPU: but for rounding).
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from base.errors import UserError, about, run_script
from base.files import alone, same_run, write_record
from base.hub import fingerprint, model_folder
from base.options import (
    Parser,
    device_options,
    natural,
    nonempty,
    number,
    positive_int,
    resolve_device,
    seed,
    temperature,
)
from data.prompts import load_prompts
from data.rows import RESPONSE, GrowingRows

PROMPTS = "alpaca, mini (the miniature's), or a JSONL file with id, prompt and, if any, system"
LESS_MEMORY = "a lower --slots or --kv-memory"
OPENER = "what every response is made to begin with; it is part of the response, and no sampled token"

if TYPE_CHECKING:
    from model.chat import Chat
    from model.decoder import Decoder
    from model.sampler import Sampler


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    model_options(parser)
    parser.add_argument("--prompts", required=True, metavar="P",
                        help=PROMPTS)
    parser.add_argument("--skip", type=natural, default=0, help="pass over the first prompts")
    parser.add_argument("--n", type=positive_int, help="number of prompts (default: all)")
    parser.add_argument("--system", metavar="TEXT", help="system prompt, for prompts that bring none")
    parser.add_argument("--opener", metavar="TEXT", default="", help=OPENER)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="response rows")
    sampling_options(parser)
    device_options(parser)
    args = parser.parse_args(argv)
    check_adapter(parser, args)
    return args


def check_adapter(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse --adapter-scale and --scramble without --adapter, and fill in the default of the first."""
    if args.adapter_scale is not None and args.adapter is None:
        parser.error("--adapter-scale needs an --adapter")
    if vars(args).get("scramble") is not None and args.adapter is None:  # not every script has it
        parser.error("--scramble takes the norms of an --adapter")
    args.adapter_scale = 1.0 if args.adapter_scale is None else args.adapter_scale


def model_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add --model, --adapter and --adapter-scale."""
    parser.add_argument("--model", type=nonempty, required=required, metavar="M",
                        help="hub name, or folder in Hugging Face layout")
    parser.add_argument("--adapter", type=nonempty, metavar="DIR",
                        help="LoRA adapter in PEFT's format, folder or hub name")
    parser.add_argument("--adapter-scale", type=number(float), metavar="S",
                        help="multiplies the adapter's effect (default: 1)")


def sampling_options(parser: argparse.ArgumentParser, default_temperature: float = 0.7,
                     max_new_tokens: int = 512) -> None:
    """Add the options of sampling; the defaults are those of training data unless given."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=temperature, default=default_temperature, help="0 is greedy")
    group.add_argument("--top-p", type=number(float, above=0, high=1), default=1.0,
                       help="keep the likeliest tokens that hold this share of the probability")
    group.add_argument("--top-k", type=natural, default=0, help="keep this many of the likeliest tokens; 0 keeps all")
    group.add_argument("--max-new-tokens", type=positive_int, default=max_new_tokens, help="limit of a response")
    group.add_argument("--seed", type=seed, default=0, help="of the run; each row has its own from it and its id")
    cache_options(group)


def cache_options(parser: argparse._ActionsContainer) -> None:
    """Add --slots and --kv-memory."""
    parser.add_argument("--slots", type=positive_int,
                        help="rows sampled at a time, which changes no row (default: 128, on a GPU 256)")
    parser.add_argument("--kv-memory", type=number(float, above=0), metavar="GIB",
                        help="memory of the KV cache, which changes no row (default: what is free)")


def main(argv: list[str] | None = None) -> None:
    """Prompts in, response rows out."""
    args = parse(argv)
    if args.out.suffix != ".jsonl":
        raise UserError(f"--out {args.out} must end in .jsonl")
    with alone(args.out.with_suffix(".lock")):
        run(args)


def run(args: argparse.Namespace) -> None:
    """The rows that are not there yet."""
    prompts, dataset = load_prompts(args.prompts, args.skip, args.n)
    prompts = [row | {"system": args.system if row["system"] is None else row["system"]} for row in prompts]
    options = {"prompts_sha256": dataset["sha256"], "skip": args.skip, "n": args.n, "system": args.system,
               "opener": args.opener, **model_identity(args), **sampling_identity(args)}
    record = args.out.with_suffix(".config.json")
    if same_run(record, options) and args.out.exists():
        print(f"{args.out}: done already")
        return
    rows = GrowingRows(args.out, RESPONSE)
    for path in (args.out, rows.partial):
        if path.exists() and not record.exists():
            raise UserError(f"{path} is there already and was not written by this command; choose another --out")

    model, chat = load_model(args)
    sampler = make_sampler(model, chat, args)
    encoded = encode_prompts(sampler, chat, prompts, args.opener)
    write_record(record, options, {"prompts": dataset, "adapter": args.adapter})
    start = time.perf_counter()
    with rows:
        respond(sampler, chat, prompts, encoded, rows, title=args.out.name, opener=args.opener)
        rows.finish(rows.rows[prompt["id"]] for prompt in prompts)
    finished = [rows.rows[prompt["id"]] for prompt in prompts]
    cut = sum(row["finish_reason"] == "length" for row in finished)
    print(f"{args.out}: {len(finished)} responses, {cut} of them cut at the limit, "
          f"{sum(row['response_tokens'] for row in finished)} tokens, {time.perf_counter() - start:.0f} s")


def model_identity(args: argparse.Namespace) -> dict:
    """What decides the model's numbers, for the record of a run."""
    return {"model": args.model, "model_revision": fingerprint(model_folder(args.model)),
            "adapter_revision": fingerprint(model_folder(args.adapter)) if args.adapter else None,
            "adapter_scale": args.adapter_scale if args.adapter else None,
            "dtype": str(resolve_device(args.device, args.dtype)[1]).removeprefix("torch."),
            "template_options": args.template_options, "today": args.today}


def sampling_identity(args: argparse.Namespace) -> dict:
    """What decides the sampled tokens, for the record of a run; the number of slots does not."""
    return {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens", "seed")}


def load_model(args: argparse.Namespace) -> tuple["Decoder", "Chat"]:
    """The model that --model, --adapter, --device and --dtype name, and its chat format."""
    from model import lora, weights
    from model.chat import Chat

    folder = model_folder(args.model)
    model = weights.load(folder, *resolve_device(args.device, args.dtype))
    chat = Chat(folder, model.config, args.template_options, args.today)
    if args.adapter:
        lora.load(model, args.adapter, args.adapter_scale)
    return model, chat


def make_sampler(model: "Decoder", chat: "Chat", args: argparse.Namespace) -> "Sampler":
    """The sampler that the options describe."""
    from model.sampler import Sampler

    return Sampler(model, chat.stop_ids, slots=args.slots, kv_memory=args.kv_memory, **sampling_identity(args))


def encode_prompts(sampler: "Sampler", chat: "Chat", prompts: list[dict], opener: str = "") -> dict[str, list[int]]:
    """Token ids of each prompt, with `opener` behind it, by id; a UserError names one that leaves no room in the
    model's context."""
    encoded = {}
    for row in prompts:
        with about(row["id"]):
            encoded[row["id"]] = chat.prompt(row["prompt"], row["system"], opener)
        sampler.limit(row["id"], encoded[row["id"]])
    return encoded


def respond(sampler: "Sampler", chat: "Chat", prompts: list[dict], encoded: dict[str, list[int]], rows: GrowingRows,
            title: str, opener: str = "") -> None:
    """Sample the responses that `rows` lacks, appending each as it finishes, under a progress bar."""
    from tqdm import tqdm

    todo = {row["id"]: row for row in prompts if row["id"] not in rows.rows}
    if todo:
        cache = sampler.cache_bytes([(id, encoded[id]) for id in todo])
        print(f"{title}: {len(todo)} rows, {min(sampler.slots, len(todo))} at a time, in a KV cache of up to "
              f"{cache / 2**30:.2f} GiB")
    opening = chat.encode(opener)  # decoded with the rest: some tokenizers put a blank between tokens
    tokens, start = 0, time.perf_counter()
    with tqdm(total=len(prompts), initial=len(prompts) - len(todo), desc=title, unit="row", disable=None) as progress:
        for response in sampler.generate([(id, encoded[id]) for id in todo]):
            prompt = todo[response.id]
            rows.append({
                "id": prompt["id"], "prompt": prompt["prompt"], "system": prompt["system"],
                "response": chat.decode(opening + response.tokens), "finish_reason": response.finish_reason,
                "prompt_tokens": response.prompt_tokens, "response_tokens": len(response.tokens),
                "logprob": round(sum(response.logprobs), 4),
            })
            tokens += len(response.tokens)
            progress.update()
            progress.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)


if __name__ == "__main__":
    run_script(main, "finished rows", LESS_MEMORY)
