"""The whole experiment: what off-model SFT costs a student, why, and what brings it back.

    python recover.py --student HuggingFaceTB/SmolLM2-135M-Instruct --teacher Qwen/Qwen2.5-Coder-0.5B-Instruct \\
        --prompts alpaca --n-train 64 --benchmarks mmlu math500 --n 20 --max-new-tokens 128 --recover-with 8 32 \\
        --out runs/smoke
    python recover.py --preset mini --controls --out runs/mini-controls

The second is the miniature (data/miniature.py): nothing to download, and minutes on a CPU. Each stage is a command of
generate.py, train.py, evaluate.py or measure.py, printed as it starts, that can be run by hand as well:

    teacher.jsonl    the teacher's responses to the first --n-train prompts
    native.jsonl     the student's own responses to the prompts behind them
    off_model/       the student fine-tuned on teacher.jsonl; with --keep-every, steps/K on the way
    recovered/N/     off_model fine-tuned further on the first N rows of native.jsonl
    recovered_in_S_steps/N/   with --recover-steps S: the same in S steps, whatever N
    recovered…_seed_K/N/      with --recover-seeds: the same from other rows of native.jsonl, in another order
    controls/        with --controls: responses and adapters of the controls
    measures/…       with --controls: likelihood of the data, and the KL from the base model
    evals/…          base, teacher, off_model, recovered_…, scaled_…, control_…, …_in_…_style, …_under_system_…
    report.md        with report.json and figures/

Several students or teachers are a matrix: --out gets such a folder for each pair, STUDENT--TEACHER, and matrix.md.
Cells take responses and evaluations that another one made by the same command; several processes can share a matrix,
each with some of the students or teachers. A stage that is done is not run again; the same command continues an
experiment that was stopped.
"""

import argparse
import gc
import json
import os
import shlex
import shutil
import time
from itertools import permutations
from pathlib import Path
from types import ModuleType

import evaluate
import generate
import measure
import train
from base.errors import UserError, run_script
from base.files import alone, inside, read_json, read_text, same_run_folder, sha256, whole, write_json, write_record
from base.hub import fingerprint, model_folder
from base.options import Parser, device_options, nonempty, number, positive_int, resolve_device, temperature
from data.benchmarks import load_benchmarks
from data.prompts import load_prompts
from data.rows import RESPONSE, read_rows

# Passed on as they are; number of epochs and batch differ between SFT and recovery
TRAINING = ("optimizer", "schedule", "warmup", "clip", "weight_decay", "prompt_loss_weight", "seed",
            "micro_batch_tokens", "checkpoint_activations", "save_every")
MODEL = ("device", "dtype", "template_options", "today")
STAGES = {str: {"seconds": float, "done": bool, "command": [str]}}  # stages.json, and config.json as far as cells
RECORD = {"code_sha256": str, "versions": dict, "options": {"prompts_sha256": str, "benchmarks": dict}}  # compare it
CELLS = "*--*/config.json"  # of a matrix: a folder a pair
NOISES = 3  # seeds of the noise
SCALES = (0.25, 0.5, 0.75, 1.25)  # of the off-model adapter; 0 is base, 1 is off_model
HOTTEST, TRIALS = 2.0, 6  # the search for a temperature
MINIATURE = Path(os.path.relpath(Path(__file__).resolve().parent / "miniature"))
PRESETS = {
    "mini": {
        "student": [str(MINIATURE / "student")], "teacher": [str(MINIATURE / "teacher")], "prompts": "mini",
        "n_train": 384, "benchmarks": ["reasoning", "recall", "format"], "n": 500, "max_new_tokens": 128,
        "recover_with": [4, 8, 16, 32, 64], "recover_steps": 24, "recover_seeds": 2, "keep_every": 12, "measure_n": 192,
        "openers": ["Okay", "Consider"],
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
    parser.add_argument("--student", type=nonempty, nargs="+", metavar="M",
                        help="hub names or folders of the models to fine-tune")
    parser.add_argument("--teacher", type=nonempty, nargs="+", metavar="M",
                        help="hub names or folders of the models to learn from")
    parser.add_argument("--prompts", default="alpaca", metavar="P", help=generate.PROMPTS)
    parser.add_argument("--n-train", type=positive_int, default=1000, metavar="N", help="teacher responses")
    parser.add_argument("--benchmarks", nargs="+", default=["mmlu", "ifeval", "math500", "olympiads"],
                        metavar="NAME", help=evaluate.BENCHMARKS)
    parser.add_argument("--n", type=positive_int, default=200, help="problems of each benchmark")
    parser.add_argument("--levels", nargs="+", default=[], metavar="LEVEL", help=evaluate.LEVELS)
    parser.add_argument("--recover-with", type=positive_int, nargs="+", default=[8, 32, 128], metavar="N",
                        help="numbers of native examples, a recovered checkpoint each")
    parser.add_argument("--recover-seeds", type=positive_int, default=1, metavar="K",
                        help="recover so many times, each time from other native examples")
    parser.add_argument("--keep-every", type=positive_int, metavar="STEPS",
                        help="also evaluate the student after every so many steps of SFT: the dose curve")
    parser.add_argument("--controls", action=argparse.BooleanOptionalAction, default=False,
                        help="also SFT on the student's own responses, at --temperature and as unlikely as the "
                        "teacher's; noise of the same norm; more teacher data; the adapter scaled; the likelihood of "
                        "the data; the KL from the base model; with --openers or --style-systems, source × style")
    styles = parser.add_mutually_exclusive_group()
    styles.add_argument("--openers", nargs=2, metavar=("STUDENT", "TEACHER"),
                        help="what responses in the student's and in the teacher's style begin with: the student is "
                        "also evaluated with the teacher's forced, and off-model with its own")
    styles.add_argument("--style-systems", nargs=2, metavar=("STUDENT", "TEACHER"),
                        help="the same by system prompts, which are left out of training")
    parser.add_argument("--eval-system", nargs="+", default=[], metavar="TEXT",
                        help="evaluate base and off-model student under these system prompts too")
    parser.add_argument("--measure-n", type=positive_int, default=64, metavar="N",
                        help="responses of each kind that likelihood and KL are measured on, and temperatures tried")
    parser.add_argument("--max-new-tokens", type=positive_int, default=512, help="limit of a response, everywhere")
    parser.add_argument("--temperature", type=temperature, default=0.7,
                        help="of training data; benchmarks are answered greedily")
    parser.add_argument("--recover-epochs", type=train.EPOCHS, default=2, help="passes over the native examples")
    parser.add_argument("--recover-steps", type=train.STEPS, metavar="S",
                        help="besides, every N in the same number of steps: by epochs, more examples are more steps")
    parser.add_argument("--recover-lr", type=number(float, above=0, high=1e30),
                        help="peak learning rate of recovery (default: --lr)")
    parser.add_argument("--recover-batch-tokens", type=positive_int, default=1024,
                        help="tokens of an optimiser step in recovery, at most")
    generate.cache_options(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="the experiment's folder")
    train.training_options(parser)
    device_options(parser, train.TRAINED_IN)
    args = parser.parse_args(argv)
    if args.preset:
        parser.set_defaults(**PRESETS[args.preset])
        args = parser.parse_args(argv)  # again, so that what is given comes before the preset
    missing = [f"--{name}" for name in ("student", "teacher", "out") if getattr(args, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)} (or --preset mini)")
    if args.style_systems and args.preset:  # these come in the place of the preset's
        args.openers = None
    if args.openers and (not all(args.openers) or any(a.startswith(b) for a, b in permutations(args.openers))):
        parser.error(f"--openers {args.openers} can't be told apart: neither may be empty or begin with the other")
    args.recover_lr = args.recover_lr or args.lr
    args.recover_with = sorted(set(args.recover_with))
    args.student, args.teacher = list(dict.fromkeys(args.student)), list(dict.fromkeys(args.teacher))
    train.resolve_adapter(args)
    return args


def main(argv: list[str] | None = None) -> None:
    """Run one pair's stages, or those of all pairs."""
    args = parse(argv)
    pairs = [(student, teacher) for student in args.student for teacher in args.teacher if student != teacher]
    if len(args.student) == len(args.teacher) == 1 and not any(args.out.glob(CELLS)):
        with alone(args.out / ".lock"):
            run_pair(args, args.student[0], args.teacher[0], args.out)
        return
    from analysis.matrix import write_matrix

    names = {model: short_name(model) for model in (*args.student, *args.teacher)}
    if len(set(names.values())) < len(names):
        raise UserError("two models have the same last name, which their cells' folders would share; rename one")
    for model in names:  # a name that is wrong is found before the first cell
        model_folder(model)
    for student, teacher in pairs:
        print(f"\n=== {names[student]}--{names[teacher]}", flush=True)
        cell = args.out / f"{names[student]}--{names[teacher]}"
        with alone(cell / ".lock"):  # other cells may be other processes'
            run_pair(args, student, teacher, cell)
    with alone(args.out / ".lock", wait=True):
        write_matrix(args.out)
    print(f"\n{args.out / 'matrix.md'}")


def run_pair(args: argparse.Namespace, student: str, teacher: str, out: Path) -> None:
    """The experiment for one pair in its folder, stage by stage."""
    # Whatever can be wrong with the input is found before the first hour is spent
    most, natives = args.recover_with[-1], args.recover_with[-1] * args.recover_seeds
    # what changes no result, or is better told by a checksum
    aside = ("preset", "out", "slots", "kv_memory", "micro_batch_tokens", "checkpoint_activations", "save_every",
             "device", "prompts", "benchmarks")
    options = {name: value for name, value in vars(args).items() if name not in aside}
    options |= {"student": student, "teacher": teacher,
                "dtype": str(resolve_device(args.device, args.dtype)[1]).removeprefix("torch.")}
    for role in ("student", "teacher"):
        options[f"{role}_revision"] = fingerprint(model_folder(options[role]))
    asked, prompts = load_prompts(args.prompts, 0, args.n_train + natives)
    if args.style_systems and any(row["system"] is not None for row in asked):
        raise UserError(f"--style-systems are system prompts, and {args.prompts} brings its own; take --openers")
    benchmarks = load_benchmarks(args.benchmarks, args.n, 0, args.levels)
    options["prompts_sha256"] = prompts["sha256"]
    options["benchmarks"] = {benchmark.name: benchmark.dataset["sha256"] for benchmark in benchmarks}
    if same_run_folder(out / "config.json", options) and (out / "report.json").exists():
        print(f"{out}: done already; see {out / 'report.md'}")
        return
    check_sampler(args, student)
    write_record(out / "config.json", options, {
        "prompts": prompts, "benchmark_data": [benchmark.dataset for benchmark in benchmarks],
        "note": ORGANISM if {MINIATURE} == {Path(student).parent, Path(teacher).parent} else ""})

    pair = Pair(args, student, teacher, out, [benchmark.name for benchmark in benchmarks if not benchmark.choices])
    teacher_rows = pair.respond("teacher.jsonl", teacher, 0, args.n_train)
    pair.evaluate("teacher", teacher)
    native_rows = pair.respond("native.jsonl", student, args.n_train, natives)  # recovery's prompts are others
    pair.evaluate("base", student)

    off_model = pair.sft("off_model", teacher_rows, *as_arguments(args, ("epochs", "steps", "keep_every")))
    steps = steps_of(off_model)
    kept = range(args.keep_every or steps, steps, args.keep_every or steps)
    for step in kept:
        pair.follow(f"off_model_step_{step}", off_model / "steps" / str(step))
    pair.follow("off_model", off_model)

    arms = {"recovered": ("--epochs", args.recover_epochs)}
    if args.recover_steps:
        arms[f"recovered_in_{args.recover_steps}_steps"] = ("--steps", args.recover_steps)
    for again in range(1, args.recover_seeds):  # of an option given twice, the second counts
        arms |= {f"{arm}_seed_{again}": (*arguments, "--skip", again * most, "--seed", args.seed + again)
                 for arm, arguments in arms.items() if "_seed_" not in arm}
    for arm, arguments in arms.items():
        for n in args.recover_with:
            adapter = pair.recover(f"{arm}/{n}", native_rows, "--n", n, *arguments)
            pair.follow(f"{arm}_{n}", adapter, measured=arm == "recovered")

    if pair.forced:
        pair.evaluate("base_in_teacher_style", student, *pair.style("teacher"))
        pair.follow("off_model_in_student_style", off_model, *pair.style("student"), measured=False)
    for i, system in enumerate(args.eval_system, 1):
        pair.evaluate(f"base_under_system_{i}", student, "--system", system)
        pair.follow(f"off_model_under_system_{i}", off_model, "--system", system, measured=False)
    if args.controls:
        run_controls(pair, off_model, teacher_rows)
        # Whose responses are they, by the two models' own likelihoods? Comparable where both see the same tokens
        if pair.sampled and same_tokenizer(student, teacher):
            for checkpoint in ("base", *(f"off_model_step_{step}" for step in kept), "off_model",
                               *(f"recovered_{n}" for n in args.recover_with)):
                for role, model in (("student", student), ("teacher", teacher)):
                    pair.measure(f"{checkpoint}_under_{role}", model, "--responses", *pair.written(checkpoint))

    print(f"\n$ python -m analysis.report {shlex.quote(str(out))}", flush=True)
    from analysis.report import summary_table, write_report

    print(f"\n{summary_table(write_report(out))}\n{out / 'report.md'}")


def run_controls(pair: "Pair", off_model: Path, teacher_rows: Path) -> None:
    """One control for each explanation of what SFT on the teacher's responses has cost."""
    args, student, teacher = pair.args, pair.student, pair.teacher
    most = args.recover_with[-1]

    def control(name: str, model: str, *more: object) -> None:
        """SFT of as many steps as off_model's, on other responses to the same prompts."""
        rows = pair.respond(f"controls/{name}.jsonl", model, 0, args.n_train, *more)
        pair.follow(f"control_{name}", pair.sft(f"controls/{name}", rows, "--steps", steps_of(off_model)))

    # Is it SFT as such? Is it that the data is unlikely under the student, whoever wrote it?
    control("native", student)
    likelihood = pair.measure("teacher_data", student, "--responses", teacher_rows)
    control("matched_nll", student, "--temperature", matching_temperature(pair, likelihood))
    pair.measure("own_data", student, "--responses", *(pair.out / f"controls/{name}.jsonl"
                                                       for name in ("native", "matched_nll")))
    # Is it noise on the weights?
    for i in range(NOISES):
        name = "control_noise" if i == 0 else f"control_noise_seed_{i}"
        pair.follow(name, off_model, "--scramble", args.seed + i)
    # Is it more training, of any kind, that brings back what was lost? (The recovery's prompts, steps and rate)
    more_rows = pair.respond("controls/more_teacher.jsonl", teacher, args.n_train, most)
    adapter = pair.recover("controls/more_teacher", more_rows, "--steps", steps_of(pair.out / f"recovered/{most}"))
    pair.follow("control_more_teacher", adapter)
    # How far along the way from base to off-model does it break?
    for scale in SCALES:
        pair.follow(f"scaled_{scale}", off_model, "--adapter-scale", scale)
    # Is it the source of the responses, or their style?
    if pair.forced:
        control("native_in_teacher_style", student, *pair.style("teacher"))
        control("teacher_in_student_style", teacher, *pair.style("student"))


class Pair:
    """A student, a teacher, and the stages of their experiment: each a script's command and what it writes."""
    def __init__(self, args: argparse.Namespace, student: str, teacher: str, out: Path, sampled: list[str]) -> None:
        """`sampled`: names of the benchmarks that are answered in words, not with a choice."""
        self.args, self.student, self.teacher, self.out, self.sampled = args, student, teacher, out, sampled
        self.stages = read_json(out / "stages.json", STAGES) if (out / "stages.json").exists() else {}
        self.forced = args.openers or args.style_systems
        self.sampling = as_arguments(args, ("max_new_tokens", "slots", "kv_memory", "seed"))
        # a response that the student's context can't hold is left out, and listed
        self.learning = ("--model", student, "--drop-long", *as_arguments(args, TRAINING),
                         *(("--no-system",) if args.style_systems else ()))

    def run(self, script: ModuleType, place: str, *arguments: object) -> Path:
        """Run one stage, which writes `place`, and note its time; returns the place's path."""
        words = [*map(str, arguments), *as_arguments(self.args, MODEL)]
        stage = self.stages.setdefault(place, {"seconds": 0, "done": False})
        stage["command"] = ["python", f"{script.__name__}.py", *words]
        if not stage["done"] and borrow(self.out, place, stage["command"]):
            print(f"\n{self.out / place}: copied from where the same command made it", flush=True)
        print(f"\n$ {shlex.join(stage['command'])} --out {shlex.quote(str(self.out / place))}", flush=True)
        start = time.perf_counter()
        try:
            script.main([*words, "--out", str(self.out / place)])
            stage["done"] = True
        finally:
            stage["seconds"] = round(stage["seconds"] + time.perf_counter() - start, 3)
            write_json(self.out / "stages.json", self.stages)
            gc.collect()  # the stage's model, before the next one loads its own
        return self.out / place

    def respond(self, place: str, model: str, skip: int, n: int, *more: object) -> Path:
        """A model's responses to n prompts behind the first `skip`, at --temperature unless `more` gives another."""
        return self.run(generate, place, "--model", model, "--prompts", self.args.prompts, "--temperature",
                        self.args.temperature, "--skip", skip, "--n", n, *more, *self.sampling)

    def evaluate(self, checkpoint: str, model: str, *more: object) -> Path:
        """A model, or with --adapter in `more` that adapter, on the benchmarks."""
        return self.run(evaluate, f"evals/{checkpoint}", "--model", model, *more, "--benchmarks", *self.args.benchmarks,
                        "--n", self.args.n, *as_arguments(self.args, ("levels",)), *self.sampling)

    def measure(self, place: str, model: str, *more: object) -> Path:
        """The likelihood of responses under a model."""
        return self.run(measure, f"measures/{place}", "--model", model, *more, "--n", self.args.measure_n)

    def sft(self, place: str, rows: Path, *more: object) -> Path:
        """A new adapter on the student, from responses to the prompts of SFT."""
        return self.run(train, place, *self.learning, "--data", rows,
                        *as_arguments(self.args, (*train.NEW_ADAPTER, "lr", "batch_tokens")), *more)

    def recover(self, place: str, rows: Path, *more: object) -> Path:
        """The off-model adapter, trained on."""
        return self.run(train, place, *self.learning, "--adapter", self.out / "off_model", "--data", rows,
                        "--lr", self.args.recover_lr, "--batch-tokens", self.args.recover_batch_tokens, *more)

    def follow(self, checkpoint: str, adapter: Path, *more: object, measured: bool = True) -> None:
        """Evaluate an adapter, and with --controls measure how far it has moved from the student's own responses."""
        self.evaluate(checkpoint, self.student, "--adapter", adapter, *more)
        if self.args.controls and measured:
            self.measure(checkpoint, self.student, "--adapter", adapter, *more,
                         "--responses", self.out / "native.jsonl", *self.written("base"))

    def written(self, checkpoint: str) -> list[Path]:
        """The rows of a checkpoint's evaluations that are answered in words."""
        return [self.out / "evals" / checkpoint / f"{name}.jsonl" for name in self.sampled]

    def style(self, whose: str) -> tuple[str, str]:
        """The option that makes a model respond in the student's or the teacher's style."""
        return ("--opener" if self.args.openers else "--system"), self.forced[whose == "teacher"]


def matching_temperature(pair: Pair, likelihood: Path) -> float:
    """The temperature at which the student's own responses are as unlikely as the teacher's (nats per token under the
    student), by bisection; where there is none from 0 to HOTTEST, the end that is nearer."""
    target = read_json(likelihood / "summary.json", {"teacher": {"nll_per_token": float}})["teacher"]["nll_per_token"]
    low, high, misses = 0.0, HOTTEST, {}
    for _ in range(TRIALS):
        middle = (low + high) / 2
        trial = pair.respond(f"controls/trials/{middle}.jsonl", pair.student, 0,
                             min(pair.args.n_train, pair.args.measure_n), "--temperature", middle)
        rows = read_rows(trial, RESPONSE)
        nll = -sum(row["logprob"] for row in rows) / sum(row["response_tokens"] for row in rows)
        misses[middle] = abs(nll - target)
        low, high = (middle, high) if nll < target else (low, middle)
    return min(misses, key=misses.get)


def steps_of(adapter: Path) -> int:
    """The optimiser steps of a finished training."""
    return read_text(adapter / "metrics.jsonl").count("\n")


def borrow(out: Path, place: str, command: list[str]) -> bool:
    """Copy what another cell of the same matrix has made by the same command and the same code; whether there is any.

    Commands that read this cell's files name its folder, and are nobody else's.
    """
    if (out / place).exists():
        return False
    ours = read_json(out / "config.json", RECORD)
    for record in sorted(out.parent.glob("*--*/stages.json")):
        theirs = read_json(record.with_name("config.json"), RECORD)
        if any(theirs[name] != ours[name] for name in ("code_sha256", "versions")) or _inputs(theirs) != _inputs(ours):
            continue
        for other, stage in read_json(record, STAGES).items():
            made = inside(record.parent, other)
            if stage["command"] != command or not stage["done"] or not made.exists():
                continue
            target = out / place  # which may have another name there: one pair's base is another one's teacher
            target.parent.mkdir(parents=True, exist_ok=True)
            if made.is_dir():
                part = out / f".{target.name}.part"  # not in evals/, where it would be one of them
                shutil.copytree(made, part, ignore=shutil.ignore_patterns(".*"))  # all but the lock of a process there
                part.replace(target)
            else:
                for suffix in (".config.json", ".jsonl"):  # the record first: without it, rows would be nobody's
                    with whole(target.with_suffix(suffix)) as part:
                        shutil.copyfile(made.with_suffix(suffix), part)
            return True
    return False


def _inputs(record: dict) -> tuple:
    return tuple(record["options"][name] for name in ("prompts_sha256", "benchmarks"))


def same_tokenizer(student: str, teacher: str) -> bool:
    """Whether the two models split text into the same tokens."""
    return len({sha256(model_folder(model) / "tokenizer.json") for model in (student, teacher)}) == 1


def short_name(model: str) -> str:
    """The last part of a hub name or of a folder's path."""
    return Path(model).resolve().name if Path(model).exists() else model.rpartition("/")[2]


def as_arguments(args: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    """Options as they would be typed; one that is not set is left out."""
    words = []
    for name in names:
        value = getattr(args, name)
        if value is None or value is False or value in ({}, []):
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            values = value if isinstance(value, list | tuple) else [value]
            words += [json.dumps(one) if isinstance(one, dict) else str(one) for one in values]
    return words


def check_sampler(args: argparse.Namespace, student: str) -> None:
    """Assert that sampler and trainer give the same log-probabilities for the same tokens.

    Whatever breaks this (a mask, a cache, a position) makes "native" data foreign, and the experiment measure a bug.
    With a new adapter on the student, so that one that doesn't fit it is found now.
    """
    import torch

    from model import lora
    from model.loss import response_logprobs
    from model.sampler import Sampler

    model, chat = generate.load_model(argparse.Namespace(**vars(args), model=student, adapter=None))
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
    bound = 1e-3 if model.dtype == torch.float32 else 0.5
    assert worst < bound, f"sampler and trainer disagree: a log-probability differs by {worst}"
    print(f"sampler and trainer agree: log-probabilities within {worst:.1e}")


if __name__ == "__main__":
    run_script(main, "finished stages, rows and steps of training",
               f"{generate.LESS_MEMORY} (sampling), or {train.LESS_MEMORY} (training)")
