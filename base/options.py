"""Command-line options that several scripts share, each with its default written once."""

import argparse
from collections.abc import Callable
from datetime import date
from typing import TYPE_CHECKING

from base.errors import UserError
from base.files import parse_object

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """argparse that shows every default, takes the module's docstring as description and knows no abbreviations."""

    def __init__(self, doc: str | None) -> None:
        class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
            def _get_help_string(self, action: argparse.Action) -> str:
                if action.required or action.default is False or action.default in (None, "", [], {}):
                    return action.help or ""
                return super()._get_help_string(action) or ""

        super().__init__(description=doc, formatter_class=Formatter, allow_abbrev=False)

    def error(self, message: str) -> None:
        """One sentence and exit code 2, as for every other mistake; argparse would print the whole usage first."""
        self.exit(2, f"error: {message} (see --help)\n")


def device_options(parser: argparse.ArgumentParser, dtypes: tuple[str, ...] = DTYPES) -> None:
    """Add --device, --dtype (one of `dtypes`), --template-options and --today."""
    group = parser.add_argument_group("model")
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one, else cpu)")
    group.add_argument("--dtype", choices=dtypes, help="of the weights (default: bfloat16 on cuda, float32 on cpu)")
    group.add_argument("--template-options", type=json_object, default={}, metavar="JSON",
                       help='variables for the chat template, such as \'{"enable_thinking": false}\' for Qwen3')
    group.add_argument("--today", type=iso_date, metavar="YYYY-MM-DD", help="the date, for a chat template that asks "
                       "for it (default: none, so that prompts are the same tomorrow)")


def resolve_device(device: str | None, dtype: str | None) -> tuple["torch.device", "torch.dtype"]:
    """The torch device and dtype that --device and --dtype stand for."""
    import torch

    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {device} is not a torch device; cpu, cuda or cuda:1 would do") from error
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device} is not supported; cpu, cuda or cuda:1 would do")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device} needs a CUDA GPU and torch sees none; --device cpu would do")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device} is not there; torch sees {torch.cuda.device_count()} GPUs")
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # Triton and CUDA graphs go to the current device, wherever the tensors are
    return chosen, getattr(torch, dtype or ("bfloat16" if chosen.type == "cuda" else "float32"))


def json_object(text: str) -> dict:
    """argparse type: a JSON object."""
    try:
        return parse_object(text, repr(text[:60]))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def iso_date(text: str) -> str:
    """argparse type: a date as YYYY-MM-DD."""
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date; 2026-01-31 would do") from error


def nonempty(text: str) -> str:
    """argparse type: a name, and not the nothing that an unset variable of a shell leaves."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def temperature(text: str) -> float:
    """argparse type: 0, or a temperature at which logits can be divided by it in float32."""
    value = number(float, low=0, high=1e3)(text)
    if 0 < value < 1e-3:
        raise argparse.ArgumentTypeError(f"{text} is too small: 0 is greedy, and sampling starts at 0.001")
    return value


def number(kind: type, low: float = float("-inf"), high: float = float("inf"),
           above: float = float("-inf")) -> Callable[[str], float]:
    """argparse type: a finite int or float with low ≤ value ≤ high and value > above."""
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError as error:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from error
        if not (low <= value <= high and value > above and abs(value) < float("inf")):
            bounds = [f"{low:g} or more"] * (low > float("-inf")) + [f"above {above:g}"] * (above > float("-inf"))
            bounds += [f"at most {high:g}"] * (high < float("inf"))
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {', '.join(bounds) or 'finite'}")
        return value

    return parse


positive_int = number(int, low=1)
natural = number(int, low=0)
seed = number(int, low=0, high=2**63 - 1)
