"""Intervals and tests for accuracies on the same problems."""

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959964  # two-sided 95 % of the normal distribution


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); it stays inside [0, 1] and is sensible at 0 and n of n."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = correct / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (max(0.0, centre - half) if correct else 0.0), (min(1.0, centre + half) if correct < n else 1.0)


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p-value that `lost` and `gained` problems are a fair coin's (McNemar 1947).

    Problems with the same verdict before and after say nothing about the difference.
    """
    n, k = lost + gained, min(lost, gained)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return min(1.0, 2 * tail)


def paired_difference(before: Sequence[bool], after: Sequence[bool], seed: int = 0) -> dict:
    """before - after in percentage points: "points", "ci95" (bootstrap over problems, 10,000 draws), exact "p".

    The two sequences are verdicts on the same problems in the same order. The bootstrap draws from the counts with
    half a problem added to each of the four kinds (as Agresti and Min 2005 do for their interval): else 20 problems
    without a change would give the interval [0, 0].
    """
    assert len(before) == len(after), "paired verdicts must be on the same problems"
    n = len(before)
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    # a resample of problems matters only by how many of each kind it holds
    shares = np.array([lost + 0.5, gained + 0.5, n - lost - gained + 1.0]) / (n + 2)
    draws = np.random.default_rng(seed).multinomial(n, shares, size=10_000)
    differences = 100 * (draws[:, 0] - draws[:, 1]) / n
    low, high = np.percentile(differences, [2.5, 97.5])
    return {"points": 100 * (lost - gained) / n, "ci95": [float(low), float(high)], "p": mcnemar(lost, gained)}


def compare_rows(before: Sequence[dict], after: Sequence[dict]) -> dict:
    """`paired_difference` of graded rows on the same problems, with what became of those that were right before.

    "lost" counts them by how they went wrong: "truncated" (cut at the token limit), "unparsed" (ended without an
    answer), "wrong" (answered); "gained" are those that only the later rows got right. A style that talks past the
    limit looks like a lost capability: where most of "lost" is truncated, evaluate again with a higher limit.
    """
    difference = paired_difference([row["correct"] for row in before], [row["correct"] for row in after])
    lost = dict.fromkeys(("truncated", "unparsed", "wrong"), 0)
    gained = 0
    for one, other in zip(before, after, strict=True):
        if one["correct"] and not other["correct"]:
            lost["truncated" if other["finish_reason"] == "length" else
                 "unparsed" if other["extracted"] is None else "wrong"] += 1
        gained += other["correct"] and not one["correct"]
    return difference | {"lost": lost, "gained": gained}


def summarise(rows: Sequence[dict]) -> dict:
    """n, correct, accuracy, ci95, unparsed, truncated and by_level of graded rows (contract C3).

    Truncated are those cut at the limit, unparsed those in which no answer was found; a row can be both. by_subject and
    by_category are there where rows have these, and "instructions" (IFEval's four accuracies) where they have verdicts
    on each instruction.
    """
    correct = sum(row["correct"] for row in rows)
    summary = {
        "n": len(rows), "correct": correct, "accuracy": correct / len(rows), "ci95": list(wilson(correct, len(rows))),
        "unparsed": sum(row["extracted"] is None for row in rows),
        "truncated": sum(row["finish_reason"] == "length" for row in rows),
        "grader_timeouts": sum(row.get("note") is not None for row in rows),
        "by_level": _count_by("level", rows),
    }
    for field in ("subject", "category"):
        if counts := _count_by(field, rows):
            summary[f"by_{field}"] = counts
    if all("strict" in row for row in rows):
        summary["instructions"] = {
            f"{level}_{kind}": sum(map(sum, verdicts)) / sum(map(len, verdicts))
            for kind in ("strict", "loose")
            for level, verdicts in (("prompt", [[all(row[kind])] for row in rows]),
                                    ("instruction", [row[kind] for row in rows]))
        }
    return summary


def _count_by(field: str, rows: Sequence[dict]) -> dict[str, dict]:
    """n and correct of the rows with each value of a field, numbers in order."""
    found: dict[str, dict] = {}
    for row in rows:
        if row.get(field) is not None:
            counts = found.setdefault(str(row[field]), {"n": 0, "correct": 0})
            counts["n"] += 1
            counts["correct"] += row["correct"]
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0]) if item[0].isdigit() else (99, item[0])))
