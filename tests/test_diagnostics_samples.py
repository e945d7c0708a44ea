"""Sampled trajectories: what is in each group, as a file, and several runs as chains."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from test_exact import example, model_of

from inference_rl import Exact, InferenceResult, PolicyGradient, TabularPolicy, infer, load_target
from inference_rl.diagnostics.arviz_versions import arviz
from inference_rl.diagnostics.diagnostic_pictures import returns_figure
from inference_rl.diagnostics.samples import (
    as_arviz,
    chains,
    column,
    load_samples,
    rhat_of_returns,
    save_samples,
)

pytestmark = pytest.mark.filterwarnings("ignore:the posterior's policy assumes:UserWarning")
DRAWS, TEMPERATURE = 4000, 0.7
LEARNED = PolicyGradient(total_steps=256, environments=8, evaluate_every=256, temperature=0.1)


@functools.cache
def learned(seed: int) -> InferenceResult:
    return infer(load_target("chain"), LEARNED, seed=seed)


def is_mean(values: np.ndarray, expected: float) -> None:
    """Within 4.5 standard errors."""
    error = values.std(ddof=1) / math.sqrt(values.size)
    assert values.mean() == pytest.approx(expected, abs=4.5 * error)


@pytest.mark.parametrize("target", ["control", "posterior"])
def test_groups_hold_what_they_say(target: Any) -> None:
    tables = example(horizon=3, discount=0.9)
    result = infer(model_of(tables), Exact(TEMPERATURE, target))
    tree = result.sample(DRAWS, seed=2)
    reward, alive = column(tree, "posterior", "reward"), column(tree, "posterior", "alive")
    assert reward.shape == (1, DRAWS, 3)
    discounted = reward[0] @ np.array([1.0, 0.9, 0.81])
    np.testing.assert_allclose(column(tree, "sample_stats", "discounted_return")[0], discounted)
    optimality = column(tree, "log_likelihood", "optimality")
    np.testing.assert_allclose(optimality, np.where(alive, reward / TEMPERATURE, 0.0))
    undiscounted = dataclasses.replace(tables, discount=1.0)
    for group, policy in (
        ("prior_predictive", tables.prior),
        ("posterior_predictive", result.policy.probs.numpy()),
    ):
        expected = oracles.objective(undiscounted, policy, TEMPERATURE, form="reward")
        is_mean(column(tree, group, "return"), expected)


def test_the_return_of_a_posterior_is_wished_for_and_not_predicted() -> None:
    result = infer(load_target("lottery"), Exact(0.5, "posterior"))
    tree = result.sample(DRAWS, seed=2)
    wished = column(tree, "sample_stats", "return").mean()
    assert wished > column(tree, "posterior_predictive", "return").mean() + 1


@pytest.mark.parametrize("target", ["control", "posterior"])
def test_exact_values_are_those_of_control(target: Any) -> None:
    tables = example(horizon=3, discount=0.9)
    tree = infer(model_of(tables), Exact(TEMPERATURE, target)).sample(2, seed=0)
    control = oracles.brute_force_control(tables, TEMPERATURE)
    running = ~tables.terminal
    for name, expected in (("q", control.q), ("policy", control.policy)):
        got = column(tree, "exact", name)
        np.testing.assert_allclose(got[:, running], expected[:, running], rtol=1e-12)
    np.testing.assert_allclose(column(tree, "exact", "value"), control.value, atol=1e-12)
    assert column(tree, "exact", "objective") == pytest.approx(control.objective, abs=1e-12)
    evidence = oracles.brute_force_posterior(tables, TEMPERATURE).log_evidence
    assert column(tree, "exact", "log_evidence") == pytest.approx(evidence, abs=1e-12)


def test_groups_that_do_not_apply_are_left_out() -> None:
    cold = infer(model_of(example()), Exact(0.0)).sample(2)
    assert "log_likelihood" not in cold.children
    assert "log_evidence" not in cold["exact"].data_vars
    flat = infer(load_target("double-integrator"), Exact(1.0)).sample(2, horizon=3)
    assert set(flat.children) == {
        "posterior",
        "sample_stats",
        "log_likelihood",
        "posterior_predictive",
    }


def test_files_come_back_as_they_were(tmp_path: Path) -> None:
    tree = learned(0).sample(20, seed=3)
    path = save_samples(tree, tmp_path / "draws.nc")
    read = load_samples(path)
    path.unlink()  # nothing holds the file
    assert read.identical(tree)
    assert column(read, "posterior", "alive").dtype == bool
    with pytest.raises(FileNotFoundError, match="expected a file that save_samples wrote"):
        load_samples(path)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # ArviZ 0.23 announces its successor
def test_arviz_reads_the_file_and_summarises_the_draws(tmp_path: Path) -> None:
    tree = chains([learned(seed) for seed in (0, 1)], 50)
    read = arviz().from_netcdf(save_samples(tree, tmp_path / "draws.nc"))
    expected = column(tree, "posterior_predictive", "return")
    np.testing.assert_array_equal(read["posterior_predictive"]["return"].values, expected)
    table = arviz().summary(as_arviz(tree), group="posterior_predictive")
    assert float(table.loc["return", "mean"]) == pytest.approx(expected.mean(), abs=0.01)


def test_runs_are_chains_whatever_their_lengths() -> None:
    results = [learned(seed) for seed in (0, 1, 2)]
    tree = chains(results, 40, seed=5)
    state, alive = column(tree, "posterior", "state"), column(tree, "posterior", "alive")
    assert state.shape[:2] == (3, 40)
    assert alive.shape[2] + 1 == state.shape[2]
    ended = np.isin(state[:, :, -1], [0, 10])
    assert ended.all()  # those of shorter chains stand still at their end
    assert not alive[ended, -1].all()
    reward = column(tree, "posterior", "reward")
    np.testing.assert_allclose(reward.sum(2), column(tree, "sample_stats", "return"))
    assert (reward[~alive] == 0).all()
    one, two = (column(chains(results[:2], 40, seed=s), "sample_stats", "return") for s in (5, 6))
    np.testing.assert_array_equal(one, column(tree, "sample_stats", "return")[:2])
    assert (one != two).any()


def test_rhat_tells_runs_apart_that_differ() -> None:
    result = infer(load_target("chain"), Exact(0.1))
    always = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(11, 2)
    other = dataclasses.replace(result, policy=TabularPolicy(always))
    same = rhat_of_returns(chains([result, result], 400, horizon=60))
    assert same is not None
    assert same < 1.01
    differ = rhat_of_returns(chains([result, other], 400, horizon=60))
    assert differ is not None
    assert differ > 1.1
    assert rhat_of_returns(chains([result], 50, horizon=9)) is None
    assert rhat_of_returns(chains([other, other], 50, horizon=9)) is None  # nothing varies


def test_the_picture_of_returns_shows_every_chain_and_the_prior() -> None:
    tree = chains([learned(seed) for seed in (0, 1)], 50)
    (axes,) = returns_figure(tree).axes
    assert [line.get_label() for line in axes.lines] == [
        "policy, chain 0",
        "policy, chain 1",
        "prior",
    ]
    returns = np.sort(column(tree, "posterior_predictive", "return")[1])
    np.testing.assert_array_equal(axes.lines[1].get_xdata()[1:], returns)


def test_chains_refuse_what_is_not_of_one_model() -> None:
    with pytest.raises(ValueError, match="at least one, got none"):
        chains([])
    lottery = infer(load_target("lottery"), Exact(0.1))
    with pytest.raises(ValueError, match=r"one model, got states Discrete\(11\).*in result 1"):
        chains([infer(load_target("chain"), Exact(0.1)), lottery])
