"""Mathematics with a final answer in \\boxed{}: MATH-500, OlympiadBench, and files in their form.

MATH-500 is arXiv 2103.03874 and 2305.20050, OlympiadBench arXiv 2402.14008. Zero-shot in the model's chat template, the
problem followed by INSTRUCTION. The answer is what stands in the response's last \\boxed{}; math-verify decides whether
it equals the reference: 1/2 and 0.5, 3, 1 and 1, 3, but not the interval (1, 3) and [1, 3].
"""

import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from base.files import sha256
from base.grading import judge
from data.benchmarks.problem import Benchmark, Problem, Verdict, sample
from data.hub import read_dataset
from data.rows import read_rows

INSTRUCTION = "\n\nReason step by step, and put your final answer within \\boxed{}."
SEVERAL = " If there are several answers, put all of them there, separated by commas."
LONGEST = 2_000  # characters of an answer; the longest reference of the benchmarks has 204
DEEPEST = 20  # braces within one another; math-verify took fractions 150 deep for equal to 1/2
UNWRITTEN = re.compile("[\x00-\x08\x0e-\x1f\ud800-\udfff]")  # no answer has these, and the parsers skip them
EXAMPLE = (r"(\frac{1}{2}, \sqrt{2}]", r"(0.5, 2^{1/2}]", "cm", "0.1")  # for `check`, before the first real one


def load_math500(n: int | None, seed: int) -> Benchmark:
    """The 500 problems, or a sample of them stratified by level (1 to 5)."""
    rows, dataset = read_dataset("HuggingFaceH4/MATH-500", "test.jsonl",
                                 columns={"problem": str, "answer": str, "level": int, "subject": str,
                                          "unique_id": str})
    problems = [Problem(row["unique_id"], row["problem"] + INSTRUCTION, row["answer"], row["level"], str(row["level"]),
                        {"subject": row["subject"]}) for row in rows]
    return Benchmark("math500", "mathematics", sample(problems, n, seed), dataset)


def load_olympiads(n: int | None, seed: int) -> Benchmark:
    """The English mathematics competitions without pictures and proofs, or a sample stratified by subject."""
    rows, dataset = read_dataset(
        "Hothan/OlympiadBench", "OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet",
        columns={"id": (int, str), "question": str, "final_answer": [str], "is_multiple_answer": bool,
                 "unit": (str, None), "error": (str, None), "subfield": str})
    problems = []
    for row in rows:
        instruction = INSTRUCTION + (SEVERAL if row["is_multiple_answer"] else "")
        if row["unit"]:
            instruction += f" The answer is to be in {row['unit']}; leave the unit out of the box."
        fields = {"subject": row["subfield"], "unit": row["unit"], "tolerance": row["error"]}
        problems.append(Problem(str(row["id"]), row["question"] + instruction, ", ".join(row["final_answer"]), None,
                                row["subfield"], {name: value for name, value in fields.items() if value}))
    return Benchmark("olympiads", "mathematics", sample(problems, n, seed), dataset)


def load_file(path: Path, n: int | None, seed: int) -> Benchmark:
    """Problems of one's own: a JSONL of `id`, `problem`, `answer` and, if any, `level`."""
    problems = []
    for row in read_rows(path, {"problem": str, "answer": str, "level": (int, str, None)}):
        level = row.get("level")
        problems.append(Problem(row["id"], row["problem"] + INSTRUCTION, row["answer"], level, str(level)))
    dataset = {"name": str(path), "revision": None, "sha256": sha256(path)}
    return Benchmark(path.stem, "mathematics", sample(problems, n, seed), dataset)


def grade(rows: Sequence[dict]) -> list[Verdict]:
    """Compare each row's last \\boxed{} with its gold answer; a row without one is wrong and has none extracted."""
    answers = [extract_boxed(row["response"]) for row in rows]
    # what is word for word the reference is right, and what can be no answer is wrong: nothing to ask
    equal = [answer is not None and answer == row["gold"].strip() for row, answer in zip(rows, answers, strict=True)]
    asked = [i for i, answer in enumerate(answers) if answer is not None and not equal[i] and _could_be(answer)]
    items = [(rows[i]["gold"], answers[i], rows[i].get("unit") or "", rows[i].get("tolerance") or "") for i in asked]
    for i, verdict in zip(asked, judge(__name__, items), strict=True):
        equal[i] = verdict
    return [Verdict(bool(verdict), answer, "grader timed out" if verdict is None else None)
            for verdict, answer in zip(equal, answers, strict=True)]


def _could_be(answer: str) -> bool:
    depths = accumulate({"{": 1, "}": -1}.get(character, 0) for character in answer[: LONGEST + 1])
    return len(answer) <= LONGEST and max(depths, default=0) <= DEEPEST and not UNWRITTEN.search(answer)


def check(gold: str, answer: str, unit: str = "", tolerance: str = "") -> bool:
    """Whether two answers in LaTeX are equal; with a tolerance also numbers so near. What a worker of `grade` runs."""
    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    answers = dict.fromkeys((answer, _without(unit.strip("$ "), answer) if unit else answer))
    try:
        # math-verify's own time limit would raise in the middle of sympy, and is off
        expected = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
        found = [parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in answers]
        if any(verify(expected, one, timeout_seconds=None) for one in found):
            return True
    except MemoryError:
        raise
    except Exception:  # a symbolic library raises anything on such input: not equal
        return False
    return bool(tolerance) and any(_near(expected, one, tolerance) for one in found)


def _near(expected: list, found: list, tolerance: str) -> bool:
    try:
        # 1 % more, as the data set's own judge allows: 4.1 is within 0.1 of 4.2
        return abs(float(expected[0]) - float(found[0])) <= 1.01 * float(tolerance)
    except (TypeError, ValueError, IndexError, OverflowError):  # not numbers
        return False


def _without(unit: str, answer: str) -> str:
    r"""An answer without the unit that it was not to have: 166 cm^2, 166\text{ cm}^2, 45\,\mathrm{min}."""
    name, _, power = unit.partition("^")
    raised = rf"\^\s*\{{?{re.escape(power.strip('{}'))}\}}?" if power else ""
    written = rf"(?:\\[a-z]+\{{\s*)?\\?{re.escape(name)}\s*\}}?{raised}\s*\}}?"
    return re.sub(rf"(?:\\[,;! ]|~|\s)*{written}\s*$", "", answer)


def extract_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{} or \\fbox{} whose braces close; None if there is none. In a single pass."""
    last, opened = (-1, -1), []  # an opening brace's position, if it is a box's, else None
    for found in re.finditer(r"(\\{1,2}(?:boxed|fbox))\{|\\.|[{}]", text, re.DOTALL):  # \{ is no group
        token = found[0]
        if token == "}":
            start = opened.pop() if opened else None
            if start is not None and start > last[0]:
                last = start, found.start()
        elif token[-1] == "{" and token != "\\{":
            opened.append(found.end() if found[1] else None)
    return text[last[0] : last[1]].strip() if last[0] >= 0 else None
