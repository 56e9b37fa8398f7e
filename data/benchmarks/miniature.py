"""The benchmarks of the miniature (data/miniature.py): reasoning, recall, format.

There is no data set behind them: problems are drawn from --sample-seed, no two the same, and a larger n contains the
smaller. A problem's id is its text.
"""

import random
from collections.abc import Sequence

from base.errors import UserError
from data import miniature
from data.benchmarks.problem import Benchmark, Problem, Verdict

DRAWN, MOST = 500, 10_000  # problems where --n does not say; as many as there are (level 1 has 4,000)


def load_reasoning(n: int | None, seed: int) -> Benchmark:
    """Chains of 3, 5, 7, 9 and 11 operands (level 1 to 5) by turns."""
    rng, levels = random.Random(f"reasoning:{seed}"), list(miniature.LEVELS)
    problems: dict[str, Problem] = {}
    while len(problems) < min(n or DRAWN, MOST):
        level = levels[len(problems) % len(levels)]
        prompt, _, _, answer = miniature.reasoning(rng, miniature.LEVELS[level])
        problems.setdefault(prompt, Problem(prompt, prompt, answer, level))
    return _benchmark("reasoning", "miniature_answer", list(problems.values()))


def load_recall(n: int | None, seed: int) -> Benchmark:
    """Questions about the memorised table with four options; the answer is the likeliest of all eight homes."""
    rng = random.Random(f"recall:{seed}")
    questions: dict[str, str] = {}
    while len(questions) < min(n or DRAWN, MOST):
        questions.setdefault(*miniature.recall(rng))
    problems = [Problem(prompt, prompt, home) for prompt, home in questions.items()]
    return _benchmark("recall", "choice", problems, choices=miniature.HOMES)


def load_format(n: int | None, seed: int) -> Benchmark:
    """Instructions of 2 to 4 words that a program can check, of which there are 219; the gold is the instruction.

    Five words are in the corpus too. In style B they are a chain that students get wrong (LOG.md, 2026-11-24), and
    this benchmark is for what needs none.
    """
    instructions = [text for text in miniature.INSTRUCTIONS if "5" not in text]
    random.Random(f"format:{seed}").shuffle(instructions)
    return _benchmark("format", "miniature_format", [Problem(text, text, text) for text in instructions[: n or DRAWN]])


def _benchmark(name: str, grader: str, problems: Sequence[Problem], choices: tuple[str, ...] = ()) -> Benchmark:
    dataset = miniature.provenance(name, [(problem.prompt, problem.gold) for problem in problems])
    return Benchmark(name, grader, tuple(problems), dataset, choices)


def grade_answer(rows: Sequence[dict]) -> list[Verdict]:
    """What stands behind the last "Answer" must be the gold answer, word for word."""
    return [Verdict(answer == row["gold"], answer) for row, answer in zip(rows, map(_answer, rows), strict=True)]


def grade_format(rows: Sequence[dict]) -> list[Verdict]:
    """What stands behind the last "Answer" must do as the instruction says."""
    for row in rows:
        if row["gold"] not in miniature.INSTRUCTIONS:
            raise UserError(f"{row['gold'][:60]!r} is no instruction of the miniature's")
    return [Verdict(answer is not None and miniature.follows_format(row["gold"], answer), answer)
            for row, answer in zip(rows, map(_answer, rows), strict=True)]


def _answer(row: dict) -> str | None:
    """Of a response that came to its end; one that was cut has not answered."""
    _, found, answer = row["response"].rpartition("Answer ")
    return answer.strip() if found and row["finish_reason"] == "stop" else None
