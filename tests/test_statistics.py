"""Are the statistics right? Known values, and what they say over many experiments with a known truth."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT

from analysis.statistics import (
    between,
    by_group,
    correlation,
    mcnemar,
    n_for_share,
    paired_difference,
    quarters,
    ratio,
    recovery,
    trend,
    wilson,
)
from data.benchmarks import load_benchmark, load_grader
from model import weights
from model.chat import Chat
from model.sampler import Sampler


def test_wilson_interval() -> None:
    # Newcombe 1998, table I: the score method without continuity correction
    for correct, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
                                  (1, 29, 0.0061, 0.1718)):
        assert wilson(correct, n) == pytest.approx((low, high), abs=1e-4)
    assert wilson(20, 20)[1] == 1.0


def test_mcnemar_and_paired_difference() -> None:
    assert mcnemar(0, 0) == mcnemar(7, 7) == 1.0
    # the exact p-value, less half of what is as likely as the observed on either side
    assert mcnemar(5, 0) == mcnemar(0, 5) == pytest.approx(2 / 32 - 1 / 32)
    assert mcnemar(10, 2) == pytest.approx((2 * (1 + 12 + 66) - 66) / 4096)
    assert mcnemar(900, 800) == pytest.approx(0.0153, abs=2e-3)  # 2.43 standard errors; 2**1700 is no float
    before, after = [True] * 60 + [False] * 40, [True] * 40 + [False] * 60
    found = paired_difference(before, after)
    assert found["points"] == 20 and found["p"] == mcnemar(20, 0)
    # 20 of 100 changed: standard error sqrt(0.2 · 0.8 / 100) = 4 points
    assert found["ci95"] == pytest.approx([12.2, 27.8], abs=1.5)
    same = paired_difference(before[:20], before[:20])
    assert (same["points"], same["p"]) == (0, 1.0)
    assert same["ci95"][0] < -5 and same["ci95"][1] > 5  # 20 problems without a change are no proof that there is none
    assert found == paired_difference(before, after)
    # a prime minister's ratings (Agresti 2002, table 10.1), 86 lost and 150 gained of 1,600: Wald's interval 2.1 to 5.9
    ratings = [True] * 880 + [False] * 720, [True] * 794 + [False] * 86 + [True] * 150 + [False] * 570
    assert paired_difference(*ratings)["ci95"] == pytest.approx([-5.9, -2.1], abs=0.06)
    # near the border the interval says what the p-value does (a bootstrap's bounds are multiples of 1 / n)
    for lost, gained, n in ((9, 2, 200), (20, 9, 200), (14, 5, 100)):
        found = paired_difference([True] * lost + [False] * (n - lost), [False] * (n - gained) + [True] * gained)
        assert found["p"] < 0.05 and found["ci95"][0] > 0


def test_false_positives_between_two_sampling_seeds() -> None:
    """The same checkpoint against itself: 1,000 comparisons of samples of the miniature student's, in the style that
    it is unsure in; of 24 samples of each of 200 problems a comparison draws two."""
    folder = ROOT / "miniature" / "student"
    model = weights.load(folder, torch.device("cpu"), torch.float32)
    chat = Chat(folder, model.config)
    benchmark = load_benchmark("reasoning", 200, 0)
    verdicts = []
    for seed in range(24):
        sampler = Sampler(model, chat.stop_ids, max_new_tokens=64, temperature=1.2, seed=seed)
        answered = {response.id: response for response in sampler.generate(
            [(problem.id, chat.prompt(problem.prompt, opener="Consider")) for problem in benchmark.problems])}
        rows = [{"response": chat.decode(answered[problem.id].tokens), "gold": problem.gold,
                 "finish_reason": answered[problem.id].finish_reason} for problem in benchmark.problems]
        verdicts.append([verdict.correct for verdict in load_grader(benchmark.grader)(rows)])
    bank = np.array(verdicts)  # (24, 200)
    unsure = (bank.mean(0) > 0.05) & (bank.mean(0) < 0.95)
    assert unsure.mean() > 0.3  # else the comparisons would be about nothing
    rng, rejected, covered = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        order = np.argsort(rng.random(bank.shape), axis=0)[:2]
        one, other = np.take_along_axis(bank, order, axis=0)
        found = paired_difference(one.tolist(), other.tolist())
        rejected += found["p"] < 0.05
        covered += found["ci95"][0] <= 0 <= found["ci95"][1]
    assert 30 <= rejected <= 70
    assert 930 <= covered <= 970


@pytest.mark.parametrize(("n", "harm"), [(200, 0.0), (200, 0.3), (500, 0.15)])
def test_intervals_of_a_drop_cover_it(n: int, harm: float) -> None:
    rng = np.random.default_rng(n)
    truth = 100 * harm * 0.5 * 0.5  # half of the problems lose a share `harm` of a probability that is 0.5 on average
    covered = 0
    for _ in range(1000):
        chance = rng.beta(0.7, 0.7, n)
        later = chance * (1 - harm * (rng.random(n) < 0.5))
        found = paired_difference((rng.random(n) < chance).tolist(), (rng.random(n) < later).tolist())
        covered += found["ci95"][0] <= truth <= found["ci95"][1]
    assert 930 <= covered <= 970


@pytest.mark.parametrize(("runs", "differ"), [(1, 0.0), (2, 0.0), (5, 0.1)])
def test_intervals_of_a_recovered_share_cover_it(runs: int, differ: float) -> None:
    rng, covered = np.random.default_rng(runs), 0
    for _ in range(300):
        base = rng.beta(1.2, 0.8, 150)
        # half of the drop comes back, on average over runs
        chances = [base, 0.5 * base, *(base * (0.75 + 0.5 * rng.uniform(-differ, differ)) for _ in range(runs))]
        drawn = [(rng.random(150) < chance).tolist() for chance in chances]
        low, high = recovery(*drawn[:2], {8: drawn[2:]})["ci95"][8]
        covered += low <= 0.5 <= high
    assert 0.92 * 300 <= covered <= 0.98 * 300


def test_intervals_of_a_ratio_cover_it() -> None:
    rng, covered = np.random.default_rng(3), 0
    for _ in range(400):
        tokens = rng.integers(5, 200, 64)
        found = ratio(tokens * rng.gamma(4, 0.125, 64), tokens)
        covered += found["ci95"][0] <= 0.5 <= found["ci95"][1]
    assert 0.91 * 400 <= covered <= 0.97 * 400


def test_a_place_between_two() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(300):
        hard = rng.normal(0, 1, 60)  # problems differ, alike for all three
        low, high, middle = (hard + mean + rng.normal(0, 0.5, 60) for mean in (0.0, 1.0, 0.3))
        found = between(middle, low, high)
        covered += found["ci95"][0] <= 0.3 <= found["ci95"][1]
    assert 0.92 * 300 <= covered <= 0.98 * 300
    assert between(low, low, high)["mean"] == 0 and between(high, low, high)["mean"] == 1
    assert between(middle, low, low + rng.normal(0, 1, 60)) is None


def test_trend() -> None:
    rng = np.random.default_rng(4)
    rejected = sum(trend(rng.choice([-1, 0, 1], 100, p=[0.1, 0.7, 0.2]), rng.integers(1, 6, 100))["p"] < 0.05
                   for _ in range(200))
    assert rejected <= 18  # 10 on average
    levels = np.repeat([1, 2, 3, 4, 5], 40)
    grows = trend((rng.random(200) < 0.1 * levels).astype(float), levels)
    assert grows["p"] < 0.01 and grows["slope"] == pytest.approx(0.1, abs=0.04)
    assert trend([1, 1, 1], [1, 2, 3]) == trend([1, 0, 1], [2, 2, 2]) == {"slope": 0.0, "p": 1.0}


def test_groups() -> None:
    assert quarters([10, 40, 20, 30, 50, 60, 70, 80]) == [1, 2, 1, 2, 3, 3, 4, 4]
    assert quarters([5, 5, 5, 9]) == [1, 1, 1, 4]
    rows = [[{"correct": bool(verdict)} for verdict in verdicts] for verdicts in ([1, 1, 1, 1, 0], [1, 1, 0, 0, 1])]
    found = by_group(*rows, [1, 1, 2, 2, 2])
    assert [(group["group"], group["n"], group["points"]) for group in found["groups"]] == [
        (1, 2, 0), (2, 3, pytest.approx(100 / 3))]


def test_recovery_and_the_n_that_it_takes() -> None:
    base, off = [True] * 100, [False] * 80 + [True] * 20
    runs = {8: [[True] * 10 + off[10:]], 32: [[True] * 40 + off[40:], [True] * 60 + off[60:]], 128: [base]}
    found = recovery(base, off, {n: some * (2 // len(some)) for n, some in runs.items()})
    assert found["share"] == {8: 0.125, 32: 0.625, 128: 1.0}
    assert 32 < found["n80"]["n"] < 128
    low, high = found["ci95"][32]
    assert 0.4 < low < 0.625 < high < 0.8
    many = recovery(base, off, {32: [[True] * right + off[right:] for right in (10, 30, 70)]})["ci95"][32]
    assert many[0] < 0.25 and many[1] > 0.7  # over runs too, where there are three
    whole = recovery(base[:20], [False] * 5 + [True] * 15, {8: [base[:20]]})  # 5 problems are not proof of all
    assert whole["share"][8] == 1 and whole["ci95"][8][0] < 0.95 and whole["n80"]["n"] is None
    nothing = recovery(off, base, {8: [base]})
    assert nothing["share"] == nothing["ci95"] == {8: None}
    unsure = recovery([True, True, False] * 7, [True, False, True] * 6 + [True, False, False], {8: [[True] * 21]})
    assert unsure["ci95"][8] == [None, None]  # a drop that may be none, a share that may be anything
    # a curve of that shape is found again: N50 = 20, k = 2
    counts = [4, 8, 16, 32, 64]
    curve = np.array([[1 / (1 + (20 / n) ** 2) for n in counts], [0.0] * 5])
    assert n_for_share(counts, curve) == pytest.approx([40, 256], rel=0.05)  # none of it: 4 times the largest


def test_correlation() -> None:
    graded = np.zeros((4, 100))
    for checkpoint, right in enumerate((90, 60, 40, 10)):
        graded[checkpoint, :right] = 1
    found = correlation(graded, [0.0, 0.3, 0.5, 0.8])
    assert found["mean"] == pytest.approx(-1) and found["ci95"][1] < -0.9
    assert correlation(graded, [0.5] * 4) is None and correlation(graded[:1].repeat(4, 0), [1, 2, 3, 4]) is None
    rng = np.random.default_rng(6)
    unsure = correlation((rng.random((4, 30)) < 0.5).astype(float), [1, 2, 3, 4])
    assert unsure["ci95"][0] < 0 < unsure["ci95"][1]


def test_results_are_json() -> None:
    """Without infinities, which JSON has no name for."""
    found = recovery([True, False] * 10, [False, True] * 5 + [False] * 10, {4: [[True] * 20]})
    json.dumps(found, allow_nan=False)
