"""Evaluate a model on benchmarks: a graded row per problem and a summary.

    python evaluate.py --model HuggingFaceTB/SmolLM2-135M-Instruct --benchmarks mmlu ifeval math500 olympiads --n 200 \\
        --out evals/base
    python evaluate.py --rescore evals/base

Benchmarks are mmlu, ifeval, math500, olympiads, the miniature's reasoning, recall and format, or JSONL files of
problems (id, problem, answer and, if any, level), graded as math500 is. Responses are saved as they finish, and
the same command continues a run that was stopped. --rescore grades the saved responses again, with no model.
`python -m analysis.compare` compares two evaluations problem by problem.
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from base.errors import UserError, run_script
from base.files import alone, inside, read_json, same_run_folder, write_json, write_record
from base.options import Parser, device_options, positive_int, seed
from data.benchmarks import load_benchmarks, load_grader
from data.benchmarks.problem import Benchmark
from data.rows import GRADED, RESCORED, SAMPLED, GrowingRows, read_rows, write_rows
from generate import (
    LESS_MEMORY,
    OPENER,
    check_adapter,
    encode_prompts,
    load_model,
    make_sampler,
    model_identity,
    model_options,
    respond,
    sampling_identity,
    sampling_options,
)

LEVELS = "draw problems of these levels alone, where a benchmark has levels (default: all)"
BENCHMARKS = "mmlu, ifeval, math500, olympiads, reasoning, recall, format, or JSONL files of problems"

if TYPE_CHECKING:
    from model.chat import Chat
    from model.sampler import Sampler


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    model_options(parser, required=False)  # --rescore stands alone
    parser.add_argument("--benchmarks", nargs="+", metavar="NAME", help=BENCHMARKS)
    parser.add_argument("--n", type=positive_int, help="problems of each, a seeded sample stratified by level or "
                        "subject, the same for every model (default: all)")
    parser.add_argument("--sample-seed", type=seed, default=0, help="of that sample")
    parser.add_argument("--levels", nargs="+", default=[], metavar="LEVEL", help=LEVELS)
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--opener", metavar="TEXT", default="",
                        help=f"{OPENER}; not for benchmarks that are answered with a choice")
    parser.add_argument("--scramble", type=seed, metavar="SEED", help="replace --adapter by Gaussian noise on the "
                        "weights, of the same norm matrix by matrix (a control)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="graded rows and summary.json")
    parser.add_argument("--rescore", type=Path, metavar="DIR", help="grade the rows in DIR again, and nothing else")
    sampling_options(parser, default_temperature=0.0, max_new_tokens=1024)
    device_options(parser)
    args = parser.parse_args(argv)
    missing = [f"--{name}" for name in ("model", "benchmarks", "out") if getattr(args, name) is None]
    if args.rescore is not None and len(missing) < 3:
        parser.error("--rescore takes nothing but the folder: the rows are graded again as they are")
    if args.rescore is None and missing:
        parser.error(f"the following arguments are required: {', '.join(missing)} (or --rescore DIR alone)")
    check_adapter(parser, args)
    return args


def main(argv: list[str] | None = None) -> None:
    """A model and benchmarks in, graded rows and a summary out."""
    args = parse(argv)
    if args.rescore is not None and not args.rescore.is_dir():
        raise UserError(f"there is no folder {args.rescore}")
    with alone((args.rescore or args.out) / ".lock"):
        if args.rescore is not None:
            rescore(args.rescore)
        else:
            run(args)


def run(args: argparse.Namespace) -> None:
    """Answer, grade and sum up."""
    from analysis.statistics import summarise

    benchmarks = load_benchmarks(args.benchmarks, args.n, args.sample_seed, args.levels)
    options = {"benchmarks": {b.name: b.dataset["sha256"] for b in benchmarks}, "n": args.n,
               "sample_seed": args.sample_seed, "levels": args.levels, "system": args.system, "scramble": args.scramble,
               "opener": args.opener, **model_identity(args), **sampling_identity(args)}
    record = args.out / "config.json"
    if same_run_folder(record, options) and (args.out / "summary.json").exists():
        print(f"{args.out}: done already")
        return

    from model import lora

    model, chat = load_model(args)
    if args.scramble is not None:
        lora.scramble(model, args.scramble)
    sampler = make_sampler(model, chat, args)
    prompts = {benchmark.name: [{"id": problem.id, "prompt": problem.prompt, "system": args.system}
                                for problem in benchmark.problems] for benchmark in benchmarks}
    openers = {benchmark.name: "" if benchmark.choices else args.opener for benchmark in benchmarks}
    encoded = {name: encode_prompts(sampler, chat, rows, openers[name]) for name, rows in prompts.items()}
    write_record(record, options, {"adapter": args.adapter, "template_sha256": chat.template_sha256})
    summary = {}
    for benchmark in benchmarks:
        start = time.perf_counter()
        path = args.out / f"{benchmark.name}.jsonl"
        if path.exists():
            rows = read_rows(path, GRADED)
        else:
            rows = answer(benchmark, sampler, chat, prompts[benchmark.name], encoded[benchmark.name], path,
                          openers[benchmark.name])
        summary[benchmark.name] = summarise(rows) | {"grader": benchmark.grader, "dataset": benchmark.dataset}
        print(f"{args.out}: {one_line(benchmark.name, summary[benchmark.name])}, {time.perf_counter() - start:.0f} s")
    write_json(args.out / "summary.json", summary)  # last: it says that all is there


def answer(benchmark: Benchmark, sampler: "Sampler", chat: "Chat", prompts: list[dict],
           encoded: dict[str, list[int]], path: Path, opener: str) -> list[dict]:
    """The model's graded responses (C3), also written to `path`; what an earlier run left of them is kept."""
    with GrowingRows(path, SAMPLED) as rows:
        if benchmark.choices:
            pick(benchmark, sampler, chat, prompts, encoded, rows)
        else:
            respond(sampler, chat, prompts, encoded, rows, f"{path.parent.name}/{benchmark.name}", opener)
        answered = []
        for problem, asked in zip(benchmark.problems, prompts, strict=True):
            row = rows.rows[problem.id]
            answered.append({"id": problem.id, "correct": None, "response": row["response"], "extracted": None,
                             "gold": problem.gold, "finish_reason": row["finish_reason"], "level": problem.level,
                             **problem.fields, "prompt": problem.prompt, "system": asked["system"]})
        graded = grade(answered, benchmark.grader)
        rows.finish(graded)
    return graded


def pick(benchmark: Benchmark, sampler: "Sampler", chat: "Chat", prompts: list[dict],
         encoded: dict[str, list[int]], rows: GrowingRows) -> None:
    """The likeliest of the benchmark's choices as first token of the response: one prefill, nothing sampled."""
    from tqdm import tqdm

    # the token that a choice begins with, behind a prompt: by the template, not by what it looks like
    turns = [chat.turn(prompts[0]["prompt"], choice, prompts[0]["system"]) for choice in benchmark.choices]
    tokens = [turn.tokens[turn.first] for turn in turns]
    if len(set(tokens)) < len(tokens):
        raise UserError(f"{benchmark.name}: this model's tokenizer does not tell {benchmark.choices} apart by their "
                        "first token")
    todo = [(id, prompt) for id, prompt in encoded.items() if id not in rows.rows]
    bar = tqdm(total=len(prompts), initial=len(rows.rows), desc=benchmark.name, unit="row", disable=None)
    with bar as progress:
        for ids, scores in sampler.score(todo, tokens):
            if not scores.isfinite().all():
                raise UserError(f"the model's output for {benchmark.name} is not finite: its weights or its adapter "
                                "are damaged")
            for id, logprobs in zip(ids, scores.tolist(), strict=True):
                best = max(range(len(tokens)), key=logprobs.__getitem__)
                rows.append({"id": id, "response": benchmark.choices[best], "finish_reason": "stop"})
                progress.update()


def grade(rows: list[dict], grader: str) -> list[dict]:
    """The rows with the verdicts that `grader` gives them now."""
    verdicts = load_grader(grader)(rows)
    return [row | {"correct": verdict.correct, "extracted": verdict.extracted, "note": verdict.note, **verdict.fields}
            for row, verdict in zip(rows, verdicts, strict=True)]


def rescore(folder: Path) -> None:
    """Grade a folder's saved responses again and rewrite rows and summary."""
    from analysis.statistics import summarise

    if not (folder / "summary.json").exists():
        raise UserError(f"{folder} has no summary.json: it is no finished evaluation")
    summary = read_json(folder / "summary.json", {str: {"grader": str, "correct": int}})
    for name, entry in summary.items():
        path = inside(folder, f"{name}.jsonl")
        rows = grade(read_rows(path, RESCORED), entry["grader"])
        write_rows(path, rows)
        summary[name] = entry | summarise(rows)
        changed = "" if summary[name]["correct"] == entry["correct"] else f" (was {entry['correct']} correct)"
        print(f"{folder}: {one_line(name, summary[name])}{changed}")
    write_json(folder / "summary.json", summary)


def one_line(name: str, entry: dict) -> str:
    """A benchmark's result for the terminal."""
    low, high = entry["ci95"]
    by_instruction = ", ".join(f"{kind.replace('_', ' ')} {100 * share:.1f} %"
                               for kind, share in entry.get("instructions", {}).items() if kind != "prompt_strict")
    return (f"{name} {100 * entry['accuracy']:.1f} % ({entry['correct']} of {entry['n']}; 95 % {100 * low:.1f} to "
            f"{100 * high:.1f}), {entry['unparsed']} without an answer, {entry['truncated']} cut at the limit"
            + (f", {entry['grader_timeouts']} that the grader gave up on" if entry["grader_timeouts"] else "")
            + (f"; {by_instruction}" if by_instruction else ""))


if __name__ == "__main__":
    run_script(main, "finished rows", LESS_MEMORY)
