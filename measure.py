"""Measure saved responses under a model: how likely they are, and how far an adapter has moved the model on them.

    python measure.py --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter off_model --responses native.jsonl \\
        evals/base/math500.jsonl --n 64 --out measures/off_model

Gets a row per response, in DIR/<name of its file>.jsonl: `tokens` (the response's, its end of turn included), `nll`
(negative log-likelihood, natural log, summed over them) and, with an adapter, `base_nll` and `kl`: the divergence
KL(base ‖ adapted) of the next token's distribution, summed over the same positions. On responses that the base model
itself has sampled, its mean is an estimate of the KL that RL's Razor (arXiv 2509.04259) relates forgetting to.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from base.errors import UserError, run_script
from base.options import Parser, device_options, positive_int
from generate import check_adapter, load_model, model_identity, model_options
from train import as_messages, encode_rows

if TYPE_CHECKING:
    from data.packing import Example
    from model.decoder import Decoder

TOKENS = 1024  # in one forward pass


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    model_options(parser)
    parser.add_argument("--responses", nargs="+", type=Path, required=True, metavar="FILE.jsonl",
                        help="rows with id, prompt and response: of generate.py or of an evaluation")
    parser.add_argument("--n", type=positive_int, help="rows of each file, from its beginning (default: all)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a file of rows for each file")
    device_options(parser)
    args = parser.parse_args(argv)
    check_adapter(parser, args)
    return args


def main(argv: list[str] | None = None) -> None:
    """Responses in, their likelihoods out."""
    args = parse(argv)
    from tqdm import tqdm

    from base.files import same_run_folder, sha256, write_json, write_record
    from data.packing import group
    from data.rows import read_rows, write_rows

    files = {path.stem: path for path in args.responses}
    if len(files) < len(args.responses) or files.keys() & {"config", "summary"}:
        raise UserError("--responses are told apart by their files' names, of which two are the same or one is taken")
    rows = {name: read_rows(path, needed=("prompt", "response"))[: args.n] for name, path in files.items()}
    options = {"responses": {name: sha256(path) for name, path in files.items()}, "n": args.n, **model_identity(args)}
    record = args.out / "config.json"
    if same_run_folder(record, options) and (args.out / "summary.json").exists():
        print(f"{args.out}: done already")
        return

    model, chat = load_model(args)
    write_record(record, options, {"files": {name: str(path) for name, path in files.items()}})
    summary = {}
    for name, given in rows.items():
        messages = [row | {"messages": as_messages(row, files[name])} for row in given]
        examples, dropped = encode_rows(chat, messages, model.config.max_positions, drop_long=True)
        measured = []
        with tqdm(total=len(examples), desc=f"{args.out.name}/{name}", unit="row", disable=None) as progress:
            for part in group(range(len(examples)), [len(example.tokens) for example in examples], TOKENS):
                measured += measure(model, [examples[i] for i in part])
                progress.update(len(part))
        write_rows(args.out / f"{name}.jsonl", measured)
        tokens = sum(row["tokens"] for row in measured)
        summary[name] = {"n": len(measured), "dropped": len(dropped), "tokens": tokens,
                         **{f"{kind}_per_token": sum(row[kind] for row in measured) / tokens
                            for kind in ("nll", "base_nll", "kl") if kind in measured[0]}}
        print(f"{args.out}: {name}, {len(measured)} responses: " + ", ".join(
            f"{kind.replace('_', ' ')} {value:.4f}" for kind, value in summary[name].items() if "per_token" in kind))
    write_json(args.out / "summary.json", summary)  # last: it says that all is there


def measure(model: "Decoder", examples: list["Example"]) -> list[dict]:
    """A row of measures for each example, by one forward pass over all of them; two where there is an adapter."""
    import torch

    from data.packing import pack
    from model import lora
    from model.attention import Packed
    from model.loss import divergence

    batch = pack(examples, model.device)
    with torch.inference_mode():
        def hidden() -> torch.Tensor:
            return model(batch.tokens, batch.positions, Packed(batch.lengths))[batch.sources]  # (N, E)

        now = hidden()
        measures = {}
        if lora.adapted(model):
            with lora.disabled(model):
                before = hidden()
            measures["nll"], measures["base_nll"], measures["kl"] = divergence(
                now, before, model.lm_head.weight, batch.targets)
        else:
            measures["nll"] = divergence(now, None, model.lm_head.weight, batch.targets)[0]
        counts = [example.supervised for example in examples]
        parts = {name: [part.sum().item() for part in values.double().split(counts)]
                 for name, values in measures.items()}
    if not all(abs(value) < float("inf") for values in parts.values() for value in values):
        raise UserError("the model's output is not finite: its weights or its adapter are damaged")
    return [{"id": example.id, "tokens": count, **{name: round(values[i], 5) for name, values in parts.items()}}
            for i, (example, count) in enumerate(zip(examples, counts, strict=True))]


if __name__ == "__main__":
    run_script(main)
