"""Mathematics with a final answer in \\boxed{}: MATH-500 (arXiv 2103.03874, 2305.20050), and files in its form.

Zero-shot in the model's chat template, the problem followed by the instruction INSTRUCTION. The answer is what stands
in the response's last \\boxed{}; math-verify decides whether it equals the reference (grading.py).
"""

from collections.abc import Sequence
from pathlib import Path

from base.errors import UserError
from base.files import sha256
from data.benchmarks.grading import equal_answers
from data.benchmarks.problem import Benchmark, Problem, Verdict, sample
from data.hub import read_dataset
from data.rows import read_rows

INSTRUCTION = "\n\nReason step by step, and put your final answer within \\boxed{}."


def load_math500(n: int | None, seed: int) -> Benchmark:
    """The 500 problems, or a sample of them stratified by level (1 to 5)."""
    rows, dataset = read_dataset("HuggingFaceH4/MATH-500", "test.jsonl",
                                 columns=("problem", "answer", "level", "unique_id"))
    problems = [Problem(row["unique_id"], row["problem"] + INSTRUCTION, row["answer"], row["level"], str(row["level"]))
                for row in rows]
    return Benchmark("math500", "mathematics", sample(problems, n, seed), dataset)


def load_file(path: Path, n: int | None, seed: int) -> Benchmark:
    """Problems of one's own: a JSONL of `id`, `problem`, `answer` and, if any, `level`."""
    problems = []
    for row in read_rows(path, needed=("problem", "answer")):
        level = row.get("level")
        if level is not None and not isinstance(level, int | str):
            raise UserError(f"{path}: the level of {row['id']} is {level!r}; a number or text would do")
        problems.append(Problem(row["id"], row["problem"] + INSTRUCTION, row["answer"], level, str(level)))
    dataset = {"name": str(path), "revision": None, "sha256": sha256(path)}
    return Benchmark(path.stem, "mathematics", sample(problems, n, seed), dataset)


def grade(rows: Sequence[dict]) -> list[Verdict]:
    """Compare each row's last \\boxed{} with its gold answer; a row without one is wrong and has none extracted."""
    answers = [extract_boxed(row["response"]) for row in rows]
    equal = iter(equal_answers([(row["gold"], answer) for row, answer in zip(rows, answers, strict=True)
                                if answer is not None]))
    return [Verdict(False, None) if answer is None else Verdict(*_judge(next(equal), answer)) for answer in answers]


def _judge(equal: bool | None, answer: str) -> tuple[bool, str, str | None]:
    return (bool(equal), answer, "grader timed out" if equal is None else None)


def extract_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{} or \\fbox{} whose braces close; None if there is none.

    One pass from each opening, the last first, so that a hostile text costs no more than its length times the number
    of openings that never close, of which 100 are tried.
    """
    end = len(text)
    for _ in range(100):
        start = max(text.rfind("\\boxed{", 0, end), text.rfind("\\fbox{", 0, end))
        if start < 0:
            return None
        opening = text.index("{", start)
        depth, i = 0, opening
        while i < len(text):
            if text[i] == "\\":
                i += 1  # \{ and \} are characters, not groups
            elif text[i] in "{}":
                depth += 1 if text[i] == "{" else -1
                if depth == 0:
                    return text[opening + 1 : i].strip()
            i += 1
        end = start
    return None
