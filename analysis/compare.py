"""Compare two evaluations problem by problem: is the difference more than chance, and what became of what was lost?

    python -m analysis.compare runs/smoke/evals/base runs/smoke/evals/off_model

Folders that can't be compared are refused, with the first thing that differs: the problems, the wording they were asked
in, the chat template, the system prompt, how and how far was sampled. --although NAME takes what is meant to differ.
"""

import json
from pathlib import Path

from analysis.statistics import compare_rows
from base.errors import UserError, run_script
from base.files import inside, read_json
from base.options import Parser
from data.rows import COMPARED, read_rows

# Of an evaluation's config.json: what has to be the same for its rows to be comparable. The models may differ.
CONDITIONS = ("template_sha256", "template_options", "today", "system", "opener", "temperature", "top_p", "top_k",
              "max_new_tokens", "seed")
ITEM = ("id", "prompt", "gold")


def compare(before: Path, after: Path, although: tuple[str, ...] = ()) -> dict[str, dict]:
    """`compare_rows` for each benchmark of two evaluation folders, which must have the same ones.

    A UserError where they were made under other CONDITIONS (but for those in `although`) or on other problems.
    """
    conditions = [_conditions(folder) for folder in (before, after)]
    for name in CONDITIONS:
        one, other = (found.get(name) for found in conditions)
        if one != other and name not in although:
            raise UserError(f"{before} and {after} can't be compared: {name} is {_short(one)} in the first and "
                            f"{_short(other)} in the second; if that is meant, --although {name}")
    names = [list(read_json(folder / "summary.json")) for folder in (before, after)]
    if set(names[0]) != set(names[1]):
        raise UserError(f"{before} has the benchmarks {', '.join(names[0])}, and {after} has {', '.join(names[1])}")
    found = {}
    for name in names[0]:
        rows, others = (read_rows(inside(folder, f"{name}.jsonl"), COMPARED) for folder in (before, after))
        check_same_problems(name, before, rows, after, others)
        found[name] = compare_rows(rows, others)
    return found


def check_same_problems(benchmark: str, first: Path, rows: list[dict], second: Path, others: list[dict]) -> None:
    """A UserError, which names the first difference, unless both folders' rows are on the same problems in order."""
    for one, other in zip(rows, others, strict=False):
        differing = next((field for field in ITEM if one.get(field) != other.get(field)), None)
        if differing:
            raise UserError(f"{first} and {second} are not on the same {benchmark} problems: the {differing} of "
                            f"{one['id']} differs")
    if len(rows) != len(others):
        raise UserError(f"{first} has {len(rows)} {benchmark} problems, and {second} has {len(others)}")


def _conditions(folder: Path) -> dict:
    if not (folder / "summary.json").exists():
        raise UserError(f"{folder} has no summary.json: it is no finished evaluation")
    record = read_json(folder / "config.json", {"options": dict})
    found = record["options"] | {"template_sha256": record.get("template_sha256")}
    greedy = not found.get("temperature")
    return found | dict.fromkeys(("seed", "top_p", "top_k")) if greedy else found  # greedily, they decide nothing


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else text[:57] + "…"


def main(argv: list[str] | None = None) -> None:
    """Print a line or two for each benchmark."""
    parser = Parser(__doc__)
    parser.add_argument("before", type=Path, help="folder of an evaluation (evaluate.py --out)")
    parser.add_argument("after", type=Path, help="another, on the same problems")
    parser.add_argument("--although", action="append", default=[], choices=CONDITIONS, metavar="NAME",
                        help=f"what may differ (may be given again): {', '.join(CONDITIONS)}")
    args = parser.parse_args(argv)
    for name, found in compare(args.before, args.after, tuple(args.although)).items():
        gain, high, low = (0 - points for points in (found["points"], *found["ci95"]))
        lost = ", ".join(f"{count} {fate}" for fate, count in found["lost"].items())
        print(f"{name}: {gain:+.1f} points (95 % {low:+.1f} to {high:+.1f}, p = {found['p']:.3g})\n"
              f"    {sum(found['lost'].values())} lost ({lost}), {found['gained']} gained")


if __name__ == "__main__":
    run_script(main)
