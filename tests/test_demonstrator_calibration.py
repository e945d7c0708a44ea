"""Intervals for a demonstrator's reward cover it as often as they say."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from demonstrators import Tables, slippery
from scipy.stats import kstest

from inference_rl.diagnostics.demonstrator import infer_reward

NAMES = ("hole", "cliff", "temperature")
DEMONSTRATORS, EPISODES, STEPS = 100, 50, 30
THINNED = 10
"""Of 2000 draws, so that ranks are those of draws that are about independent."""


@pytest.mark.slow
def test_intervals_cover_and_ranks_are_uniform() -> None:
    """Simulation-based calibration, Talts et al. (2018), arXiv:1804.06788, Theorem 1.

    Parameters are drawn from the priors, and behaviour is simulated by NumPy.
    """
    priors = {
        "hole": dist.Normal(torch.tensor(-1.0).double(), 0.5),
        "cliff": dist.Normal(torch.tensor(-0.5).double(), 0.25),
        "temperature": dist.LogNormal(torch.tensor(-1.5).double(), 0.5),
    }
    covered = np.zeros((DEMONSTRATORS, len(NAMES)), dtype=bool)
    ranks = np.zeros(covered.shape)
    rhats, diverged = np.zeros(covered.shape), 0
    started = time.process_time()
    for i in range(DEMONSTRATORS):
        rng = np.random.default_rng([2018, i])
        truth = {
            "hole": rng.normal(-1.0, 0.5),
            "cliff": rng.normal(-0.5, 0.25),
            "temperature": rng.lognormal(-1.5, 0.5),
        }
        rewards = {name: torch.tensor(truth[name]) for name in ("hole", "cliff")}
        shown = Tables(slippery(rewards)).episodes(truth["temperature"], EPISODES, STEPS, rng)
        with warnings.catch_warnings():
            # Of some, episodes say little; their intervals must be right all the same.
            warnings.filterwarnings("ignore", message=".*these episodes say next to nothing")
            # Counted below, by R-hat.
            warnings.filterwarnings("ignore", message=".*chains do not agree")
            found = infer_reward(
                slippery,
                shown,
                {name: priors[name] for name in rewards},
                priors["temperature"],
                seed=i,
            )
        diverged += found.divergences
        for j, row in enumerate(found.summary()):
            assert row.name == NAMES[j]
            covered[i, j] = row.low <= truth[row.name] <= row.high
            draws = found.posterior["posterior"][row.name].values[:, ::THINNED]
            ranks[i, j] = ((draws < truth[row.name]).sum() + rng.random()) / (draws.size + 1)
            rhats[i, j] = row.rhat
        mixed = (rhats[: i + 1] <= 1.01).all(1).sum()
        print(f"{i + 1}: covered {covered[: i + 1].mean(0).round(3)}, {mixed} mixed", flush=True)
    seconds = (time.process_time() - started) / DEMONSTRATORS
    uniform = [float(kstest(column, "uniform").pvalue) for column in ranks.T]
    mixed = int((rhats <= 1.01).all(1).sum())
    print(f"coverage of the 90% intervals: {dict(zip(NAMES, covered.mean(0), strict=True))}")
    print(f"ranks, p-value of uniformity: {dict(zip(NAMES, np.round(uniform, 3), strict=True))}")
    print(f"R-hat <= 1.01 in all parameters: {mixed} of {DEMONSTRATORS}, largest {rhats.max():.4f}")
    print(f"{diverged} divergent draws; {seconds:.1f} s a posterior")
    assert (np.abs(covered.mean(0) - 0.9) <= 0.07).all()
    assert min(uniform) > 0.001
    assert mixed >= 95
    assert rhats.max() < 1.05
