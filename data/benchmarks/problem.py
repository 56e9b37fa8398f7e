"""What a benchmark is to the evaluator: problems, a way to answer, a way to grade."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Problem:
    """One problem; `stratum` is the group within which problems are sampled (level, subject)."""

    id: str  # the data set's own
    prompt: str  # the user's message
    gold: str
    level: int | str | None = None
    stratum: str = ""
    fields: dict = field(default_factory=dict, hash=False)  # further ones of its row: subject, what the grader needs


@dataclass(frozen=True)
class Verdict:
    """What the grader says of a response; `extracted` is None where it found no answer."""

    correct: bool
    extracted: str | None
    note: str | None = None  # such as "grader timed out"
    fields: dict = field(default_factory=dict)  # further ones of the row, such as a verdict on each instruction


# Grades rows with `response`, `gold` and a problem's further fields: saved ones, too, with no data set and no model
Grader = Callable[[Sequence[dict]], list[Verdict]]


@dataclass(frozen=True)
class Benchmark:
    """Problems with their provenance. With `choices` the answer is the likeliest of them as first token of the
    response, and nothing is sampled."""

    name: str
    grader: str  # a name that `load_grader` knows
    problems: tuple[Problem, ...]
    dataset: dict  # name, revision, sha256
    choices: tuple[str, ...] = ()


def sample(problems: Sequence[Problem], n: int | None, seed: int) -> tuple[Problem, ...]:
    """n of the problems in their own order, from each stratum its share; all if n is None or large enough.

    A function of (seed, ids) alone, so that every checkpoint gets the same ones, and a larger n of one stratum
    contains the smaller.
    """
    if n is None or n >= len(problems):
        return tuple(problems)

    def lot(key: str) -> bytes:
        return hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()

    strata = defaultdict(list)
    for problem in problems:
        strata[problem.stratum].append(problem.id)
    shares = {name: n * len(ids) / len(problems) for name, ids in strata.items()}
    quota = {name: int(share) for name, share in shares.items()}
    # largest remainders get what rounding down left over; ties are drawn by lot
    by_remainder = sorted(strata, key=lambda name: (quota[name] - shares[name], lot(name)))
    for name in by_remainder[: n - sum(quota.values())]:
        quota[name] += 1
    chosen = {id for name, ids in strata.items() for id in sorted(ids, key=lot)[: quota[name]]}
    return tuple(problem for problem in problems if problem.id in chosen)
