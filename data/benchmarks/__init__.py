"""The benchmarks by name, and the graders of saved rows."""

from collections.abc import Sequence
from pathlib import Path

from base.errors import UserError
from data.benchmarks import mathematics, mmlu
from data.benchmarks.problem import Benchmark, Grader

NAMES = ("mmlu", "math500")


def load_benchmarks(names: Sequence[str], n: int | None, seed: int) -> list[Benchmark]:
    """`load_benchmark` for several, whose names must differ, since each is saved under its own."""
    found = [load_benchmark(name, n, seed) for name in dict.fromkeys(names)]
    if len({benchmark.name for benchmark in found}) < len(found):
        raise UserError(f"two of --benchmarks {' '.join(names)} have the same name; rename one of the files")
    return found


def load_benchmark(name: str, n: int | None, seed: int) -> Benchmark:
    """A benchmark by name, or a JSONL file of problems, cut to a seeded sample of n."""
    if name == "mmlu":
        return mmlu.load(n, seed)
    if name == "math500":
        return mathematics.load_math500(n, seed)
    if Path(name).suffix != ".jsonl":
        raise UserError(f"--benchmarks {name} is not known; there are {', '.join(NAMES)}, or a JSONL file of problems")
    if Path(name).stem in (*NAMES, "config", "summary") or Path(name).stem.endswith(".partial"):
        raise UserError(f"--benchmarks {name} would be saved under a name that is taken; rename the file")
    return mathematics.load_file(Path(name), n, seed)


def load_grader(name: str) -> Grader:
    """The grader that a Benchmark's `grader` names."""
    graders = {"letters": mmlu.grade, "mathematics": mathematics.grade}
    if name not in graders:
        raise UserError(f"there is no grader {name!r}; there are {', '.join(graders)}")
    return graders[name]
