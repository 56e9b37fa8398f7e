"""The whole experiment for one pair: what off-model SFT costs a student, and what brings it back.

    python recover.py --student HuggingFaceTB/SmolLM2-135M-Instruct --teacher Qwen/Qwen2.5-Coder-0.5B-Instruct \\
        --prompts alpaca --n-train 64 --benchmarks mmlu math500 --n 20 --max-new-tokens 128 --recover-with 8 32 \\
        --out runs/smoke
    python recover.py --preset mini

The second is the miniature (data/miniature.py): nothing to download, and minutes on a CPU. Each stage is a command of
generate.py, train.py or evaluate.py, printed as it starts, that can be run by hand as well:

    teacher.jsonl    the teacher's responses to the first --n-train prompts
    native.jsonl     the student's own responses to the prompts behind them
    off_model/       the student fine-tuned on teacher.jsonl
    recovered/N/     off_model fine-tuned further on the first N rows of native.jsonl
    recovered_in_S_steps/N/   with --recover-steps S: the same in S steps, whatever N
    controls/        with --controls: responses and adapters of the controls
    evals/…          base, teacher, off_model, recovered_…, control_… and, with --openers, …_in_…_style
    report.md        with report.json and figures/

A stage that is done is not run again; the same command continues an experiment that was stopped.
"""

import argparse
import gc
import json
import os
import shlex
import time
from itertools import permutations
from pathlib import Path
from types import ModuleType

import evaluate
import generate
import train
from base.errors import run_script
from base.options import Parser, device_options, number, positive_int, temperature

# Passed on as they are; number of epochs and batch differ between SFT and recovery
TRAINING = ("optimizer", "schedule", "warmup", "clip", "weight_decay", "prompt_loss_weight", "seed",
            "micro_batch_tokens", "checkpoint_activations", "save_every")
MODEL = ("device", "dtype", "template_options", "today")
MINIATURE = Path(os.path.relpath(Path(__file__).resolve().parent / "miniature"))
PRESETS = {
    "mini": {
        "student": str(MINIATURE / "student"), "teacher": str(MINIATURE / "teacher"), "prompts": "mini",
        "n_train": 384, "benchmarks": ["reasoning", "recall", "format"], "n": 500, "max_new_tokens": 128,
        "recover_with": [4, 8, 16, 32, 64], "recover_steps": 24, "controls": True, "openers": ["Okay", "Consider"],
        "rank": 8, "lr": 2e-3, "schedule": "linear", "warmup": 0.0, "epochs": 4, "batch_tokens": 448,
        "recover_lr": 1e-3, "recover_batch_tokens": 160, "out": Path("runs/mini"),
        "device": "cpu", "dtype": "float32",  # too small to gain from a GPU
    },
}
ORGANISM = ("A model organism: two models of half a million weights whose difference in style was built in "
            "(data/miniature.py). It shows a mechanism and tests the instruments, and is no evidence about large "
            "models.")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, help="mini: defaults for all options, for the miniature")
    parser.add_argument("--student", metavar="M", help="hub name or folder of the model to fine-tune")
    parser.add_argument("--teacher", metavar="M", help="hub name or folder of the model to learn from")
    parser.add_argument("--prompts", default="alpaca", metavar="P", help=generate.PROMPTS)
    parser.add_argument("--n-train", type=positive_int, default=1000, metavar="N", help="teacher responses")
    parser.add_argument("--benchmarks", nargs="+", default=["mmlu", "ifeval", "math500", "olympiads"],
                        metavar="NAME", help=evaluate.BENCHMARKS)
    parser.add_argument("--n", type=positive_int, default=200, help="problems of each benchmark")
    parser.add_argument("--recover-with", type=positive_int, nargs="+", default=[8, 32, 128], metavar="N",
                        help="numbers of native examples, a recovered checkpoint each")
    parser.add_argument("--controls", action=argparse.BooleanOptionalAction, default=False,
                        help="also SFT on native data, noise, more teacher data; with --openers the 2 × 2 of source "
                        "and style")
    parser.add_argument("--openers", nargs=2, metavar=("STUDENT", "TEACHER"),
                        help="what responses in the student's and in the teacher's style begin with: the student is "
                        "also evaluated with the teacher's forced, and off-model with its own")
    parser.add_argument("--max-new-tokens", type=positive_int, default=512, help="limit of a response, everywhere")
    parser.add_argument("--temperature", type=temperature, default=0.7,
                        help="of training data; benchmarks are answered greedily")
    parser.add_argument("--recover-epochs", type=positive_int, default=2, help="passes over the native examples")
    parser.add_argument("--recover-steps", type=positive_int, metavar="S",
                        help="besides, every N in the same number of steps: by epochs, more examples are more steps")
    parser.add_argument("--recover-lr", type=number(float, above=0, high=1e30),
                        help="peak learning rate of recovery (default: --lr)")
    parser.add_argument("--recover-batch-tokens", type=positive_int, default=1024,
                        help="tokens of an optimiser step in recovery, at most")
    generate.cache_options(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="the experiment's folder")
    train.training_options(parser)
    device_options(parser)
    args = parser.parse_args(argv)
    if args.preset:
        parser.set_defaults(**PRESETS[args.preset])
        args = parser.parse_args(argv)  # again, so that what is given comes before the preset
    missing = [f"--{name}" for name in ("student", "teacher", "out") if getattr(args, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)} (or --preset mini)")
    if args.openers and (not all(args.openers) or any(a.startswith(b) for a, b in permutations(args.openers))):
        parser.error(f"--openers {args.openers} can't be told apart: neither may be empty or begin with the other")
    args.recover_lr = args.recover_lr or args.lr
    args.recover_with = sorted(set(args.recover_with))
    train.resolve_adapter(args)
    train.check_dtype(parser, args)
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the stages, in order."""
    args = parse(argv)
    from base.files import read_json, same_run_folder, write_json, write_record
    from base.hub import fingerprint, model_folder
    from base.options import resolve_device
    from data.benchmarks import load_benchmarks
    from data.prompts import load_prompts

    # Whatever can be wrong with the input is found before the first hour is spent
    out, most = args.out, args.recover_with[-1]
    # what changes no result, or is better told by a checksum
    aside = ("preset", "out", "slots", "kv_memory", "micro_batch_tokens", "checkpoint_activations", "save_every",
             "device", "prompts", "benchmarks")
    options = {name: value for name, value in vars(args).items() if name not in aside}
    options["dtype"] = str(resolve_device(args.device, args.dtype)[1]).removeprefix("torch.")
    for role in ("student", "teacher"):
        options[f"{role}_revision"] = fingerprint(model_folder(getattr(args, role)))
    _, prompts = load_prompts(args.prompts, 0, args.n_train + most)
    benchmarks = load_benchmarks(args.benchmarks, args.n, 0)
    options["prompts_sha256"] = prompts["sha256"]
    options["benchmarks"] = {benchmark.name: benchmark.dataset["sha256"] for benchmark in benchmarks}
    if same_run_folder(out / "config.json", options) and (out / "report.json").exists():
        print(f"{out}: done already; see {out / 'report.md'}")
        return
    check_sampler(args)
    write_record(out / "config.json", options,
                 {"prompts": prompts, "benchmark_data": [benchmark.dataset for benchmark in benchmarks]})
    seconds = read_json(out / "seconds.json") if (out / "seconds.json").exists() else {}

    def run(script: ModuleType, place: str, *arguments: object) -> Path:
        """Run one stage, a script's command that writes `place`, and note its time; returns the place's path."""
        words = [*map(str, arguments), *as_arguments(args, MODEL), "--out", str(out / place)]
        print(f"\n$ python {script.__name__}.py {shlex.join(words)}", flush=True)
        start = time.perf_counter()
        try:
            script.main(words)
        finally:
            seconds[place] = round(seconds.get(place, 0) + time.perf_counter() - start, 3)
            write_json(out / "seconds.json", seconds)
            gc.collect()  # the stage's model, before the next one loads its own
        return out / place

    sampling = as_arguments(args, ("max_new_tokens", "slots", "kv_memory", "seed"))
    prompting = ("--prompts", args.prompts, "--temperature", args.temperature, *sampling)
    benchmarking = ("--benchmarks", *args.benchmarks, "--n", args.n, *sampling)
    first = ("--skip", 0, "--n", args.n_train)  # the prompts of SFT …
    behind = ("--skip", args.n_train, "--n", most)  # … and of recovery, which are others
    # a response that the student's context can't hold is left out, and listed
    learning = ("--model", args.student, "--drop-long", *as_arguments(args, TRAINING))
    sft = (*learning, *as_arguments(args, (*train.NEW_ADAPTER, "lr", "epochs", "steps", "batch_tokens")))
    recovery = (*learning, "--lr", args.recover_lr, "--batch-tokens", args.recover_batch_tokens)
    by_epochs = ("--epochs", args.recover_epochs)
    own, foreign = args.openers or ("", "")

    teacher_rows = run(generate, "teacher.jsonl", "--model", args.teacher, *first, *prompting)
    run(evaluate, "evals/teacher", "--model", args.teacher, *benchmarking)
    native_rows = run(generate, "native.jsonl", "--model", args.student, *behind, *prompting)
    run(evaluate, "evals/base", "--model", args.student, *benchmarking)
    off_model = run(train, "off_model", "--data", teacher_rows, *sft)

    checkpoints = ["base", "teacher"]

    def evaluate_adapter(checkpoint: str, adapter: Path, *more: object) -> None:
        checkpoints.append(checkpoint)
        run(evaluate, f"evals/{checkpoint}", "--model", args.student, "--adapter", adapter, *more, *benchmarking)

    evaluate_adapter("off_model", off_model)
    schedules = {"recovered": by_epochs}
    if args.recover_steps:
        schedules[f"recovered_in_{args.recover_steps}_steps"] = ("--steps", args.recover_steps)
    for name, schedule in schedules.items():
        for n in args.recover_with:
            adapter = run(train, f"{name}/{n}", "--adapter", off_model, "--data", native_rows, "--n", n, *recovery,
                          *schedule)
            evaluate_adapter(f"{name}_{n}", adapter)
    if args.openers:
        checkpoints.append("base_in_teacher_style")
        run(evaluate, "evals/base_in_teacher_style", "--model", args.student, "--opener", foreign, *benchmarking)
        evaluate_adapter("off_model_in_student_style", off_model, "--opener", own)

    def control(name: str, model: str, *more: object) -> None:
        """SFT as for off_model, on other responses to the same prompts."""
        rows = run(generate, f"controls/{name}.jsonl", "--model", model, *more, *first, *prompting)
        evaluate_adapter(f"control_{name}", run(train, f"controls/{name}", "--data", rows, *sft))

    if args.controls:
        control("native", args.student)
        if args.openers:
            control("native_in_teacher_style", args.student, "--opener", foreign)
            control("teacher_in_student_style", args.teacher, "--opener", own)
        evaluate_adapter("control_noise", off_model, "--scramble", args.seed)
        more_rows = run(generate, "controls/more_teacher.jsonl", "--model", args.teacher, *behind, *prompting)
        adapter = run(train, "controls/more_teacher", "--adapter", off_model, "--data", more_rows, *recovery,
                      *by_epochs)
        evaluate_adapter("control_more_teacher", adapter)

    from analysis.report import summary_table, write_report

    note = ORGANISM if {MINIATURE} == {Path(args.student).parent, Path(args.teacher).parent} else ""
    report = write_report(out, args.student, args.teacher, checkpoints, seconds, args.openers, note)
    print(f"\n{summary_table(report)}\n{out / 'report.md'}")


def as_arguments(args: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    """Options as they would be typed; one that is not set is left out."""
    words = []
    for name in names:
        value = getattr(args, name)
        if value is None or value is False or value == {}:
            continue
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
            continue
        values = value if isinstance(value, list | tuple) else [json.dumps(value) if isinstance(value, dict) else value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def check_sampler(args: argparse.Namespace) -> None:
    """Assert that sampler and trainer give the same log-probabilities for the same tokens.

    Whatever breaks this (a mask, a cache, a position) makes "native" data foreign, and the experiment measure a bug.
    With a new adapter on the student, so that one that doesn't fit it is found now.
    """
    import torch

    from model import lora
    from model.loss import response_logprobs
    from model.sampler import Sampler

    model, chat = generate.load_model(argparse.Namespace(**vars(args), model=args.student, adapter=None))
    lora.attach(model, lora.LoRAConfig(args.rank, args.alpha, args.dropout, tuple(args.targets)), args.seed)
    sampler = Sampler(model.eval(), chat.stop_ids, max_new_tokens=24, temperature=1.0, seed=args.seed)
    questions = ("Name three primary colours.", "Why is the sky blue? Answer in one sentence.", "Count to five.")
    prompts = {question: chat.prompt(question) for question in questions}
    differences = []
    for response in sampler.generate(list(prompts.items())):
        prompt = prompts[response.id]
        expected = response_logprobs(model, prompt + response.tokens, len(prompt), len(prompt) + len(response.tokens))
        differences.append((expected.cpu() - torch.tensor(response.logprobs)).abs())
    worst = torch.cat(differences).max().item()  # torch's maximum, which a NaN does not slip past
    # 8 bits of mantissa through 30 layers: in bfloat16 a log-probability moves by some hundredths
    bound = 1e-3 if model.embed_tokens.weight.dtype == torch.float32 else 0.5
    assert worst < bound, f"sampler and trainer disagree: a log-probability differs by {worst}"
    print(f"sampler and trainer agree: log-probabilities within {worst:.1e}")


if __name__ == "__main__":
    run_script(main)
