"""The benchmarks by name, and the graders of saved rows."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from base.errors import UserError
from data.benchmarks import ifeval, mathematics, miniature, mmlu
from data.benchmarks.problem import Benchmark, Grader, sample

LOADERS = {
    "mmlu": mmlu.load, "ifeval": ifeval.load, "math500": mathematics.load_math500,
    "olympiads": mathematics.load_olympiads,
    "reasoning": miniature.load_reasoning, "recall": miniature.load_recall, "format": miniature.load_format,
}
GRADERS = {
    "choice": mmlu.grade, "instructions": ifeval.grade, "mathematics": mathematics.grade,
    "miniature_answer": miniature.grade_answer, "miniature_format": miniature.grade_format,
}


def load_benchmarks(names: Sequence[str], n: int | None, seed: int, levels: Sequence[str] = ()) -> list[Benchmark]:
    """`load_benchmark` for several, whose names must differ, since each is saved under its own.

    With `levels`, those that have levels are cut to problems of these before n are drawn.
    """
    found = [load_benchmark(name, None if levels else n, seed) for name in dict.fromkeys(names)]
    found = [_of_levels(benchmark, n, seed, levels) for benchmark in found] if levels else found
    if len({benchmark.name for benchmark in found}) < len(found):
        raise UserError(f"two of --benchmarks {' '.join(names)} have the same name; rename one of the files")
    return found


def _of_levels(benchmark: Benchmark, n: int | None, seed: int, levels: Sequence[str]) -> Benchmark:
    there = {str(problem.level) for problem in benchmark.problems if problem.level is not None}
    chosen = [problem for problem in benchmark.problems if not there or str(problem.level) in levels]
    if not chosen:
        raise UserError(f"{benchmark.name} has no problem of --levels {' '.join(levels)}; there are "
                        f"{', '.join(sorted(there))}")
    return replace(benchmark, problems=sample(chosen, n, seed))


def load_benchmark(name: str, n: int | None, seed: int) -> Benchmark:
    """A benchmark by name, or a JSONL file of problems, cut to a seeded sample of n."""
    if name in LOADERS:
        return LOADERS[name](n, seed)
    if Path(name).suffix != ".jsonl":
        raise UserError(f"--benchmarks {name} is not known; there are {', '.join(LOADERS)}, or a JSONL file of "
                        "problems")
    if not re.fullmatch(r"[\w.+-]+", Path(name).stem):
        raise UserError(f"--benchmarks {name}: give the file a name of letters, digits and . + - _ alone, since "
                        "results are saved under it")
    if Path(name).stem in (*LOADERS, "config", "summary") or Path(name).stem.endswith(".partial"):
        raise UserError(f"--benchmarks {name} would be saved under a name that is taken; rename the file")
    return mathematics.load_file(Path(name), n, seed)


def load_grader(name: str) -> Grader:
    """The grader that a Benchmark's `grader` names."""
    if name not in GRADERS:
        raise UserError(f"there is no grader {name!r}; there are {', '.join(GRADERS)}")
    return GRADERS[name]
