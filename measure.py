"""Measure saved responses under a model: how likely they are, and how far an adapter has moved the model on them.

    python measure.py --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter off_model --responses native.jsonl \\
        evals/base/math500.jsonl --n 64 --out measures/off_model

Gets a row per response, in DIR/<name of its file>.jsonl: `tokens` (the response's, its end of turn included), `nll`
(negative log-likelihood, natural log, summed over them) and, with an adapter, `base_nll` and `kl`: the divergence
KL(base ‖ adapted) of the next token's distribution, summed over the same positions. On responses that the base model
itself has sampled, its mean is an estimate of the KL that RL's Razor (arXiv 2509.04259) relates forgetting to.
"""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from base.errors import UserError, run_script
from base.files import alone, same_run_folder, sha256, write_json, write_record
from base.options import Parser, device_options, positive_int, seed
from data.rows import ANSWERED, MEASURED, GrowingRows, read_rows
from generate import check_adapter, load_model, model_identity, model_options
from train import as_messages, encode_rows

if TYPE_CHECKING:
    from torch import Tensor

    from data.packing import Batch, Example
    from model.decoder import Decoder

TOKENS = 1024  # in one forward pass


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    model_options(parser)
    parser.add_argument("--responses", nargs="+", type=Path, required=True, metavar="FILE.jsonl",
                        help="rows with id, prompt and response: of generate.py or of an evaluation")
    parser.add_argument("--n", type=positive_int, help="rows of each file, from its beginning (default: all)")
    parser.add_argument("--scramble", type=seed, metavar="SEED", help="replace --adapter by noise, as evaluate.py does")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a file of rows for each file")
    device_options(parser)
    args = parser.parse_args(argv)
    check_adapter(parser, args)
    return args


def main(argv: list[str] | None = None) -> None:
    """Responses in, their likelihoods out."""
    args = parse(argv)
    with alone(args.out / ".lock"):
        run(args)


def run(args: argparse.Namespace) -> None:
    """Measure the rows of every file."""
    from tqdm import tqdm

    from data.packing import group, pack
    from model import lora

    files = {path.stem: path for path in args.responses}
    if len(files) < len(args.responses) or any(name in ("config", "summary") or name.endswith(".partial")
                                               for name in files):
        raise UserError("--responses are told apart by their files' names, of which two are the same or one is taken")
    rows = {name: read_rows(path, ANSWERED)[: args.n] for name, path in files.items()}
    options = {"responses": {name: sha256(path) for name, path in files.items()}, "n": args.n,
               "scramble": args.scramble, **model_identity(args)}
    record = args.out / "config.json"
    if same_run_folder(record, options) and (args.out / "summary.json").exists():
        print(f"{args.out}: done already")
        return

    model, chat = load_model(args)
    write_record(record, options, {"files": {name: str(path) for name, path in files.items()}})
    parts, dropped = {}, {}
    for name, given in rows.items():
        messages = [row | {"messages": as_messages(row, files[name])} for row in given]
        examples, dropped[name] = encode_rows(chat, messages, model.config.max_positions, drop_long=True)
        groups = group(range(len(examples)), [len(example.tokens) for example in examples], TOKENS)
        chosen = [[examples[i] for i in part] for part in groups]
        parts[name] = [(part, pack(part, model.device)) for part in chosen]
    before = None
    if args.adapter:  # first, since noise overwrites the base model's weights
        with lora.disabled(model):
            before = {name: [states(model, batch) for _, batch in tqdm(some, f"{name} under the base", disable=None)]
                      for name, some in parts.items()}
        if args.scramble is not None:
            lora.scramble(model, args.scramble)
    summary, shape = {}, MEASURED | ({"base_nll": float, "kl": float} if args.adapter else {})
    for name, some in parts.items():
        bar = tqdm(total=sum(len(part) for part, _ in some), desc=f"{args.out.name}/{name}", unit="row", disable=None)
        with GrowingRows(args.out / f"{name}.jsonl", shape) as saved, bar as progress:
            for i, (part, batch) in enumerate(some):
                # all of a part or none: a row is the same in the same company
                if not all(example.id in saved.rows for example in part):
                    for row in measure(model, part, batch, before and before[name][i]):
                        saved.append(row)
                progress.update(len(part))
            measured = [saved.rows[example.id] for part, _ in some for example in part]
            saved.finish(measured)
        tokens = sum(row["tokens"] for row in measured)
        summary[name] = {"n": len(measured), "dropped": len(dropped[name]), "tokens": tokens,
                         **{f"{kind}_per_token": sum(row[kind] for row in measured) / tokens
                            for kind in ("nll", "base_nll", "kl") if kind in measured[0]}}
        print(f"{args.out}: {name}, {len(measured)} responses: " + ", ".join(
            f"{kind.replace('_', ' ')} {value:.4f}" for kind, value in summary[name].items() if "per_token" in kind))
    write_json(args.out / "summary.json", summary)  # last: it says that all is there


def states(model: "Decoder", batch: "Batch") -> "Tensor":
    """Hidden states (N, E), on the CPU, of the positions before all supervised tokens of a batch."""
    import torch

    from model.attention import Packed

    with torch.inference_mode():
        return model(batch.tokens, batch.positions, Packed(batch.lengths, batch.shared))[batch.sources].cpu()


def measure(model: "Decoder", part: list["Example"], batch: "Batch", before: "Tensor | None") -> list[dict]:
    """A row of measures for each example of a batch; `before` are the base model's `states`, where this isn't it."""
    from model.loss import divergence

    now, base = (None if hidden is None else hidden.to(model.device) for hidden in (states(model, batch), before))
    counts = [example.supervised for example in part]
    kinds = ("nll", "base_nll", "kl")  # without a base the first alone
    found = {kind: [one.sum().item() for one in values.double().split(counts)]
             for kind, values in zip(kinds, divergence(now, base, model.lm_head.weight, batch.targets), strict=False)}
    if not all(math.isfinite(value) for values in found.values() for value in values):
        raise UserError("the model's output is not finite: its weights or its adapter are damaged")
    return [{"id": example.id, "tokens": count, **{kind: round(values[i], 5) for kind, values in found.items()}}
            for i, (example, count) in enumerate(zip(part, counts, strict=True))]


if __name__ == "__main__":
    run_script(main, "measured rows", "a lower --n")
