"""Which prior explains behaviour: the one it was simulated by, and what quadrature says."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import xarray
from scipy.special import logsumexp

from inference_rl import (
    CategoricalPrior,
    EnvironmentModel,
    Exact,
    FiniteModel,
    MaskPrior,
    StickyPrior,
    UniformPrior,
    infer,
    load_target,
)
from inference_rl.diagnostics.prior_comparison import PriorScore, compare_priors
from inference_rl.diagnostics.samples import column
from inference_rl.priors import ActionPrior

LIMITS = (0.05, 3.0)


def corridor() -> EnvironmentModel:
    return load_target("chain", env_kwargs={"length": 6})


def candidates(model: EnvironmentModel) -> dict[str, ActionPrior]:
    return {
        "left": CategoricalPrior([0.8, 0.2]),
        "uniform": UniformPrior(model.action_space),
        "right": CategoricalPrior([0.3, 0.7]),
        "sticky": StickyPrior(model.action_space, 0.6),
    }


def behaviour(prior: ActionPrior, episodes: int = 60, seed: int = 0) -> list[tuple[Any, Any]]:
    """What whoever acts by a prior does, at temperature 0.3: original states, and actions."""
    result = infer(corridor(), Exact(0.3), prior=prior)
    tree = result.sample(episodes, horizon=100, seed=seed)
    state, action, alive = (column(tree, "posterior", n)[0] for n in ("state", "action", "alive"))
    if result.model.remembers_action:
        state = state // 3
    return [(s[:-1][a], x[a]) for s, x, a in zip(state, action, alive, strict=True)]


def by_name(scores: list[PriorScore]) -> dict[str, PriorScore]:
    return {score.name: score for score in scores}


@pytest.mark.parametrize("true", ["left", "uniform", "right", "sticky"])
def test_the_true_prior_wins(true: str) -> None:
    priors = candidates(corridor())
    best, *others = compare_priors(corridor(), behaviour(priors[true]), priors, 0.3)
    assert best.name == true
    assert best.difference == 0
    assert [s.difference for s in others] == sorted(s.difference for s in others)
    assert not any(score.as_good_as_the_best for score in others)


@pytest.mark.parametrize("true", ["left", "uniform", "sticky"])
def test_the_true_prior_holds_its_own_where_the_temperature_is_unknown(true: str) -> None:
    """A liking for the right looks like a lower temperature, so that it may be as good."""
    priors = candidates(corridor())
    scores = compare_priors(corridor(), behaviour(priors[true]), priors, LIMITS)
    found = by_name(scores)
    assert found[true].as_good_as_the_best
    assert found[true].temperature_low < 0.3 < found[true].temperature_high
    assert sum(float(score.weight or 0) for score in scores) == pytest.approx(1, abs=1e-6)
    if true != "uniform":
        assert scores[0].name == true
        assert not found["uniform"].as_good_as_the_best
        assert max(scores, key=lambda score: score.weight or 0).name == true


def test_a_known_temperature_scores_the_log_likelihood() -> None:
    """Closed form: undiscounted, e^{V/α} is harmonic under the prior walk."""
    model = load_target("chain", env_kwargs={"length": 4, "discount": 1.0})
    place, temperature = np.arange(5) / 4, 0.3
    z = (1 - place) * math.exp(0.1 / temperature) + place * math.exp(1.0 / temperature)
    right = z[2:] / (z[:-2] + z[2:])  # π(right | s) for s = 1, 2, 3, whose prior is a half
    episodes = [([1, 2, 1, 0], [1, 0, 0]), ([1, 2, 3, 4], [1, 1, 1]), ([1, 0], [0])]
    expected = [
        math.log(right[0] * (1 - right[1]) * (1 - right[0])),
        math.log(right.prod()),
        math.log(1 - right[0]),
    ]
    priors = {"uniform": UniformPrior(model.action_space)}
    (score,) = compare_priors(model, episodes, priors, temperature)
    assert score.elpd == pytest.approx(sum(expected), abs=1e-9)
    assert score.standard_error == pytest.approx(math.sqrt(3) * np.std(expected), abs=1e-9)
    assert score.weight is None
    assert score.pareto_k is None


def test_leaving_one_out_agrees_with_quadrature() -> None:
    """log p(y_i | y_-i) by a sum over temperatures, each an inference of its own."""
    model, prior = corridor(), CategoricalPrior([0.8, 0.2])
    episodes = behaviour(prior, 25)
    grid = np.geomspace(*LIMITS, 201)
    table = np.empty((201, len(episodes)))
    for row, temperature in zip(table, grid, strict=True):
        log_policy = infer(model, Exact(float(temperature)), prior=prior).policy.probs.log()
        row[:] = [float(log_policy[s, a].sum()) for s, a in episodes]
    inner = np.full(201, 1.0)
    inner[[0, -1]] = 0.5  # trapezoids
    total = table.sum(1)
    left_out = [
        logsumexp(total, b=inner) - logsumexp(total - table[:, i], b=inner)
        for i in range(len(episodes))
    ]
    (score,) = compare_priors(model, episodes, {"left": prior}, LIMITS)
    assert score.elpd == pytest.approx(sum(left_out), abs=0.02)
    error = 5 * np.std(left_out)  # ArviZ 1.x divides by one less
    assert error - 0.02 <= score.standard_error <= error * math.sqrt(25 / 24) + 0.02
    density = inner * np.exp(total - total.max())
    mean = (density @ grid) / density.sum()
    assert score.temperature == pytest.approx(mean, rel=0.02)


def test_behaviour_that_cannot_tell() -> None:
    """Priors that differ only where nobody went explain the same equally well."""
    wide = np.full((7, 2), 0.5)
    other = wide.copy()
    other[5] = [0.9, 0.1]
    model = corridor()
    priors = {"one": CategoricalPrior(wide), "same": CategoricalPrior(wide)}
    episodes = behaviour(priors["one"])
    for temperature in (0.3, LIMITS):
        scores = compare_priors(model, episodes, priors, temperature, seed=3)
        assert all(score.as_good_as_the_best for score in scores)
        assert scores[1].difference < 0.01
    # Few episodes of a prior that is a little different: within the standard error.
    near = {"one": CategoricalPrior(wide), "near": CategoricalPrior([0.51, 0.49])}
    assert all(s.as_good_as_the_best for s in compare_priors(model, episodes[:6], near, 0.3))


def test_what_sample_gave_is_behaviour() -> None:
    prior = CategoricalPrior([0.8, 0.2])
    tree = infer(corridor(), Exact(0.3), prior=prior).sample(60, horizon=100, seed=0)
    priors = {"left": prior, "right": CategoricalPrior([0.3, 0.7])}
    drawn = by_name(compare_priors(corridor(), tree, priors, 0.3))
    listed = by_name(compare_priors(corridor(), behaviour(prior), priors, 0.3))
    assert drawn == listed
    assert isinstance(tree, xarray.DataTree)


def test_a_horizon_has_a_policy_for_every_step() -> None:
    model = load_target("tree", env_kwargs={"depth": 3})
    prior = CategoricalPrior([0.6, 0.2, 0.2])
    result = infer(model, Exact(0.5), prior=prior)
    tree = result.sample(50, seed=1)
    (score,) = compare_priors(model, tree, {"it": prior}, 0.5)
    state, action = column(tree, "posterior", "state")[0], column(tree, "posterior", "action")[0]
    probs = result.policy.probs.numpy()
    expected = np.log([probs[t, state[:, t], action[:, t]] for t in range(3)]).sum()
    assert score.elpd == pytest.approx(float(expected), abs=1e-9)


def test_a_temperature_without_a_say_is_no_trouble() -> None:
    """Nothing pays, so that every temperature gives the prior back."""
    moves = np.eye(2)[[[0, 1], [1, 0]]]
    model = FiniteModel.from_tables(moves, np.zeros((2, 2)), horizon=3)
    episodes = [([0, 1, 0], [1, 1, 0]), ([0, 0, 1], [0, 1, 1]), ([0, 1, 0], [1, 1, 1])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = compare_priors(
            model,
            episodes,
            {"half": CategoricalPrior([0.5, 0.5]), "ones": CategoricalPrior([0.2, 0.8])},
            LIMITS,
        )
    found = by_name(scores)
    assert found["half"].elpd == pytest.approx(9 * math.log(0.5), abs=1e-6)
    assert found["ones"].elpd == pytest.approx(7 * math.log(0.8) + 2 * math.log(0.2), abs=1e-6)
    assert found["ones"].pareto_k is None


def test_what_cannot_be_compared() -> None:
    model = corridor()
    prior = {"left": CategoricalPrior([0.8, 0.2])}
    two = [([1, 0], [0]), ([1, 0], [0])]
    with pytest.raises(ValueError, match="priors: expected at least one"):
        compare_priors(model, two, {}, 0.3)
    with pytest.raises(ValueError, match="at least two in which something is done"):
        compare_priors(model, [two[0], ([1], [])], prior, 0.3)
    for temperature in (0.0, (0.5, 0.1), math.inf):
        with pytest.raises(ValueError, match="temperature: expected a finite number > 0"):
            compare_priors(model, two, prior, temperature)
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\) in episode 0"):
        compare_priors(model, [([1, 2], [1, 1, 1]), two[0]], prior, 0.3)
    forbidding = {"mask": MaskPrior([False, True])}
    with pytest.raises(ValueError, match="'mask' has no mass on action 0 in state 1"):
        compare_priors(model, two, forbidding, 0.3)
    with pytest.raises(TypeError, match="exact inference covers finite models"):
        compare_priors(load_target("pendulum"), two, prior, 0.3)
