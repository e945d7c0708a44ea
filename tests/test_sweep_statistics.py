"""The interquartile mean and its interval, beside SciPy's and beside what simulations say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from inference_rl.sweeping.statistics import bootstrap_interval, interquartile_mean


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 10, 33])
def test_the_interquartile_mean_is_scipys_trimmed_mean(size: int) -> None:
    scores = np.random.default_rng(size).normal(size=size)
    assert interquartile_mean(scores) == pytest.approx(stats.trim_mean(scores, 0.25), rel=1e-14)


def test_it_is_of_all_tasks_together() -> None:
    scores = np.random.default_rng(0).normal(size=(6, 3))
    expected = stats.trim_mean(scores, 0.25, axis=None)
    assert interquartile_mean(scores) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("size", [5, 12])
def test_the_interval_is_that_of_scipys_bootstrap(size: int) -> None:
    scores = np.random.default_rng(1).gamma(2.0, size=size)

    def trimmed(sample: np.ndarray, axis: int) -> np.ndarray:
        return stats.trim_mean(sample, 0.25, axis=axis)

    expected = stats.bootstrap(
        (scores,), trimmed, n_resamples=20_000, method="percentile", rng=2
    ).confidence_interval
    found = bootstrap_interval(scores, seed=0, resamples=20_000)
    # Both are percentiles of 20,000 draws: 5 standard errors of such a percentile.
    density = stats.gaussian_kde(
        [
            stats.trim_mean(row, 0.25)
            for row in np.random.default_rng(3).choice(scores, (4000, size))
        ]
    )
    for mine, theirs in zip(found, expected, strict=True):
        error = math.sqrt(2 * 0.025 * 0.975 / 20_000) / density(theirs)[0]
        assert abs(mine - theirs) < 5 * error


def test_runs_are_drawn_from_their_own_task() -> None:
    # Tasks whose runs are all the same: however runs are drawn within them, nothing changes.
    scores = np.tile([0.0, 1.0, 5.0, 100.0], (6, 1))
    assert bootstrap_interval(scores, seed=0) == (3.0, 3.0)


def test_it_is_a_function_of_its_seed() -> None:
    scores = np.random.default_rng(0).normal(size=8)
    assert bootstrap_interval(scores, seed=1) == bootstrap_interval(scores, seed=1)
    assert bootstrap_interval(scores, seed=1) != bootstrap_interval(scores, seed=2)


def test_one_run_says_nothing_of_others() -> None:
    assert bootstrap_interval(np.array([1.0]), seed=0) is None


@pytest.mark.parametrize("scores", [[], [1.0, math.nan], [math.inf]])
def test_scores_are_finite_numbers(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="scores: expected at least one, and all of them finite"):
        interquartile_mean(np.array(scores))


@pytest.mark.parametrize(("runs", "stated"), [(3, 0.74), (5, 0.90), (10, 0.93), (20, 0.94)])
def test_coverage_on_normal_scores_is_what_the_documentation_says(runs: int, stated: float) -> None:
    rng = np.random.default_rng(runs)
    trials = 1000
    intervals = [
        bootstrap_interval(rng.normal(size=runs), seed=i, resamples=500) for i in range(trials)
    ]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    # Rounded to a percent, and four standard errors of a thousand simulations.
    assert abs(covered - stated) < 0.005 + 4 * math.sqrt(stated * (1 - stated) / trials)
