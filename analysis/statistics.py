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
    """Two-sided mid-p-value that `lost` and `gained` problems are a fair coin's (McNemar 1947; Fagerland, Lydersen
    and Laake 2013).

    Problems with the same verdict before and after say nothing about the difference. The exact p-value finds a
    difference where there is none in 2.5 to 4.5 % of comparisons at 0.05; counting half of what is as likely as the
    observed, the mid-p-value does in 4 to 6 %.
    """
    n, k = lost + gained, min(lost, gained)
    if lost == gained:
        return 1.0
    # in whole numbers to the end: 2**n is beyond any float from n = 1024 on
    return (2 * sum(math.comb(n, i) for i in range(k + 1)) - math.comb(n, k)) / 2**n


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> dict:
    """before - after in percentage points: "points", "ci95" (Agresti and Min 2005) and "p" (`mcnemar`).

    The two sequences are verdicts on the same problems in the same order. The interval is Wald's with half a problem
    added to each of the four kinds: else 20 problems without a change would give [0, 0].
    """
    assert len(before) == len(after), "paired verdicts must be on the same problems"
    n = len(before)
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    centre = (lost - gained) / (n + 2)
    half = Z95 * math.sqrt(((lost + gained + 1) / (n + 2) - centre**2) / (n + 2))
    ci95 = [100 * max(-1.0, centre - half), 100 * min(1.0, centre + half)]
    return {"points": 100 * (lost - gained) / n, "ci95": ci95, "p": mcnemar(lost, gained)}


def _resamples(rows: int, seed: int) -> np.ndarray:
    """(2000, rows) bootstrap samples: how often each row is in each."""
    return np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=2_000)


def ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> dict:
    """sum(numerators) / sum(denominators) as "mean", and "ci95" by a bootstrap over rows: nats per token, say."""
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    counts = _resamples(len(top), seed)
    low, high = np.percentile(counts @ top / (counts @ bottom), [2.5, 97.5])
    return {"mean": float(top.sum() / bottom.sum()), "ci95": [float(low), float(high)]}


def between(values: Sequence[float], low: Sequence[float], high: Sequence[float], seed: int = 0) -> dict | None:
    """Where the mean of `values` lies between those of `low` (0) and `high` (1), with "ci95", by a bootstrap over the
    problems that all three are on; None where `low` and `high` are not apart."""
    numbers = np.array([values, low, high], float)

    def place(sums: np.ndarray) -> np.ndarray:
        return (sums[0] - sums[1]) / (sums[2] - sums[1])

    sums = numbers @ _resamples(numbers.shape[1], seed).T  # (3, D)
    if (sums[2] <= sums[1]).mean() > 0.025:
        return None
    bounds = np.percentile(place(sums[:, sums[2] > sums[1]]), [2.5, 97.5])
    return {"mean": float(place(numbers.sum(1))), "ci95": bounds.tolist()}


def trend(differences: Sequence[float], ranks: Sequence[float], seed: int = 0) -> dict:
    """Do the differences grow with the ranks? "slope" (least squares, per rank) and its two-sided permutation "p".

    Under the null hypothesis a problem's rank (its level, say) says nothing about its difference: 10,000 shuffles.
    """
    values, places = np.asarray(differences, float), np.asarray(ranks, float)
    places = places - places.mean()
    if not places.any() or not (values - values.mean()).any():
        return {"slope": 0.0, "p": 1.0}
    rng = np.random.default_rng(seed)
    shuffled = np.array([rng.permutation(places) @ values for _ in range(9_999)])
    observed = places @ values
    # the observed order is one of the possible ones: never a p of 0
    p = (1 + (np.abs(shuffled) >= abs(observed) - 1e-9).sum()) / 10_000
    return {"slope": float(observed / (places @ places)), "p": float(p)}


def by_group(before: Sequence[dict], after: Sequence[dict], groups: Sequence[float]) -> dict:
    """The drop of the problems in each group, with the trend of the drop over groups, which are numbers in order.

    "groups" is a list of {"group", "n", "points", "ci95", "p"} with all of `paired_difference`; "trend" is `trend` in
    points per rank.
    """
    names = sorted(set(groups))
    verdicts = [(one["correct"], other["correct"]) for one, other in zip(before, after, strict=True)]
    found = []
    for name in names:
        chosen = [pair for pair, group in zip(verdicts, groups, strict=True) if group == name]
        found.append({"group": name, "n": len(chosen), **paired_difference(*zip(*chosen, strict=True))})
    over = trend([100 * (one - other) for one, other in verdicts], [names.index(group) for group in groups])
    return {"groups": found, "trend": over}


def quarters(lengths: Sequence[int]) -> list[int]:
    """The quarter of the sorted lengths, 1 (short) to 4 (long), that each falls into; equal ones into the same."""
    bounds = np.quantile(np.asarray(lengths), [0.25, 0.5, 0.75])
    return [1 + int((length > bounds).sum()) for length in lengths]


def recovery(base: Sequence[bool], off: Sequence[bool], recovered: dict[int, Sequence[Sequence[bool]]],
             seed: int = 0) -> dict:
    """What share of the drop from `base` to `off` each number N of native examples brought back, and what N would
    bring back 80 %.

    `recovered` holds the verdicts of one or more runs for each N; all verdicts are on the same problems. Returns
    "share" {N: share of the drop, the mean of the runs}, "ci95" {N: [low, high]} and, with three N or more, "n80" with
    "n" and "ci95", by a bootstrap over problems, and over runs where there are three or more: two say too little of
    how much runs differ. Half a problem that was lost and stayed so, and half a one that came back, are added, as
    `paired_difference` adds some. None where nothing was lost: a share of nothing is no number. A draw without a drop
    counts against both ends, so that intervals are wide where the drop is uncertain; a None there is no bound.
    """
    counts_of = sorted(recovered)
    verdicts = np.array([base, off], float)
    drop = verdicts[0] - verdicts[1]  # (P,)
    back = np.array([recovered[n] for n in counts_of], float) - verdicts[1]  # (N, R, P)
    nothing = {"n": None, "ci95": None}
    if drop.sum() <= 0:
        return {"share": dict.fromkeys(counts_of), "ci95": dict.fromkeys(counts_of), "n80": nothing}
    shares = back.mean(1).sum(-1) / drop.sum()  # (N,)

    rng, (runs, problems) = np.random.default_rng(seed), back.shape[1:]
    weights = np.array([*np.ones(problems), 0.5, 0.5]) / (problems + 1)
    drawn = rng.multinomial(problems, weights, size=2_000)  # (D, P + 2)
    halves = np.broadcast_to([0.0, 1.0], (*back.shape[:2], 2))
    of_runs = rng.multinomial(runs, np.full(runs, 1 / runs), size=2_000) if runs > 2 else np.ones((2_000, runs))
    gains = np.einsum("dp,nrp,dr->dn", drawn, np.concatenate((back, halves), -1), of_runs / runs, optimize=True)
    drops = drawn @ np.concatenate((drop, [1.0, 1.0]))
    fine = drops > 0
    draws = gains / np.where(fine, drops, 1)[:, None]  # (D, N), of which those without a drop are not looked at

    def bounds(values: np.ndarray, least: float, most: float) -> np.ndarray:
        """(2, …) the 95 % interval of (D, …), draws without a drop being at both ends."""
        return np.array([np.percentile(np.where(fine, values.T, end), percent, axis=-1, method="nearest")
                         for end, percent in ((least, 2.5), (most, 97.5))])

    low, high = bounds(draws, -np.inf, np.inf)
    n80 = nothing
    if len(counts_of) > 2:
        n80 = {"n": float(n_for_share(counts_of, shares[None])[0]),
               "ci95": bounds(n_for_share(counts_of, draws), 0.0, 4.0 * counts_of[-1]).tolist()}
    return {"share": dict(zip(counts_of, shares.tolist(), strict=True)),
            "ci95": {n: [float(end[i]) if np.isfinite(end[i]) else None for end in (low, high)]
                     for i, n in enumerate(counts_of)},
            "n80": n80}


def n_for_share(counts: Sequence[int], shares: np.ndarray, share: float = 0.8) -> np.ndarray:
    """(D,) the N at which each curve of (D, len(counts)) shares reaches `share`: by the log-logistic curve
    1 / (1 + (N50 / N)^k) that is nearest in least squares, found on a grid.

    At most 4 times the largest count, which says no more than "far beyond".
    """
    places = np.asarray(counts, float)
    n50, k = (axis.ravel() for axis in np.meshgrid(np.geomspace(places[0] / 4, places[-1] * 4, 80),
                                                   [0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8]))
    curves = 1 / (1 + (n50[:, None] / places) ** k[:, None])  # (G, N)
    errors = (curves**2).sum(-1) - 2 * shares @ curves.T  # (D, G), but for what is the same for all curves
    best = errors.argmin(-1)
    n = n50[best] * (share / (1 - share)) ** (1 / k[best])
    return np.minimum(n, 4 * places[-1])


def correlation(graded: np.ndarray, values: Sequence[float], seed: int = 0) -> dict | None:
    """Pearson's correlation of checkpoints' accuracy with `values`: "mean", and "ci95" by a bootstrap over problems.

    graded (checkpoints, problems), 1 where right. None where one of the two does not vary. Not of ranks: on a plateau
    they would be those of its noise.
    """
    places = np.asarray(values, float) - np.mean(values)

    def correlate(accuracy: np.ndarray) -> np.ndarray:
        """(D,) for accuracies (D, checkpoints)."""
        accuracy = accuracy - accuracy.mean(-1, keepdims=True)
        scale = np.sqrt((accuracy**2).sum(-1) * (places**2).sum())
        return np.divide(accuracy @ places, scale, out=np.zeros(len(accuracy)), where=scale > 1e-12)

    mean = graded.mean(-1)
    if not np.ptp(mean) or not np.ptp(places):
        return None
    problems = graded.shape[1]
    bounds = np.percentile(correlate(_resamples(problems, seed) @ graded.T / problems), [2.5, 97.5])
    return {"mean": float(correlate(mean[None])[0]), "ci95": bounds.tolist()}


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
                 "unparsed" if other.get("extracted") is None else "wrong"] += 1
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
        "unparsed": sum(row.get("extracted") is None for row in rows),
        "truncated": sum(row["finish_reason"] == "length" for row in rows),
        "grader_timeouts": sum(row.get("note") is not None for row in rows),
        "by_level": _count_by("level", rows),
    }
    for field in ("subject", "category"):
        if counts := _count_by(field, rows):
            summary[f"by_{field}"] = counts
    if all(row.get("strict") and row.get("loose") for row in rows):
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
