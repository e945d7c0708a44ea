"""How good a guide is: against sums over all paths, closed forms and ArviZ; and the command."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import scipy.stats
import torch
import xarray
from test_exact import example, model_of

from inference_rl import (
    CategoricalPrior,
    Exact,
    InferenceResult,
    PolicyGradient,
    TabularPolicy,
    infer,
    load_target,
)
from inference_rl.cli import main
from inference_rl.diagnostics.arviz_versions import arviz
from inference_rl.diagnostics.guide import GuideQuality, guide_quality
from inference_rl.diagnostics.pareto import (
    are_constant,
    effective_sample_size,
    pareto_k,
    reliable_k,
)

pytestmark = pytest.mark.filterwarnings("ignore:the posterior's policy assumes:UserWarning")
TEMPERATURE = 0.7


def with_policy(result: InferenceResult, probs: Any) -> InferenceResult:
    table = torch.as_tensor(probs, dtype=torch.float64).expand(result.policy.probs.shape)
    return dataclasses.replace(result, policy=TabularPolicy(table))


def sampled_right(guide: GuideQuality, expected: float) -> None:
    """Within 4.5 standard errors, or rounding where nothing varies."""
    assert guide.elbo == pytest.approx(expected, abs=4.5 * guide.elbo_standard_error + 1e-9)


# --- Weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("draws", [60, 1000])
def test_pareto_k_is_that_of_arviz(draws: int, scale: float) -> None:
    log_weights = scale * np.random.default_rng(0).normal(size=draws)
    if hasattr(az := arviz(), "psislw"):
        expected, close = az.psislw(log_weights)[1], 1e-9
    else:  # 1.x takes log likelihoods, and one weight less into the tail
        column = xarray.DataArray(-log_weights, dims=["sample"])
        expected, close = column.azstats.psislw(dim="sample")[1], 0.03
    assert pareto_k(log_weights) == pytest.approx(float(expected), abs=close)


@pytest.mark.parametrize("shape", [-0.3, 0.2, 0.5, 1.0])
def test_pareto_k_is_the_shape_of_a_pareto_tail(shape: float) -> None:
    """Mean over ten samples of 20,000: the standard error of one is (1 + k) / √424, at most 0.1."""
    random = np.random.default_rng(1)
    weights = scipy.stats.genpareto.rvs(shape, size=(10, 20_000), random_state=random)
    found = [pareto_k(np.log(row)) for row in weights]
    assert np.mean(found) == pytest.approx(shape, abs=0.1)  # a tail is that of its excess, nearly


def test_weights_without_a_tail() -> None:
    same = np.full(1000, -3.0) + 1e-13 * np.random.default_rng(0).normal(size=1000)
    assert are_constant(same)
    assert pareto_k(same) is None
    assert effective_sample_size(same) == pytest.approx(1000)
    few = np.random.default_rng(0).choice([0.0, 1.0, 2.0], size=1000)
    assert not are_constant(few)
    assert pareto_k(few) is None
    assert pareto_k(np.zeros(3) + np.arange(3)) is None  # too few of them


def test_one_weight_that_is_all_there_is() -> None:
    alone = np.append(np.full(999, -1000.0) - np.arange(999), 0.0)
    assert pareto_k(alone) == math.inf
    assert effective_sample_size(alone) == 1
    assert pareto_k(np.full(10, -math.inf)) == math.inf
    assert effective_sample_size(np.full(10, -math.inf)) == 0


def test_effective_sample_size_counts_equal_weights() -> None:
    assert effective_sample_size(np.array([5.0, 5.0, -math.inf, 5.0])) == pytest.approx(3)
    assert reliable_k(100) == pytest.approx(0.5)
    assert reliable_k(10**6) == 0.7


# --- Against what is exact ----------------------------------------------------------------------


@pytest.mark.parametrize("discount", [1.0, 0.8])
@pytest.mark.parametrize("which", ["best", "prior", "odd"])
def test_a_guide_of_a_few_steps(which: str, discount: float) -> None:
    """Every number against sums over all trajectories."""
    tables = example(horizon=3, discount=discount)
    result = infer(model_of(tables), Exact(TEMPERATURE))
    if which == "prior":
        result = with_policy(result, tables.prior)
    elif which == "odd":
        result = with_policy(result, [0.9, 0.1])
    policy = result.policy.probs.numpy()
    guide = guide_quality(result, draws=4000, seed=1)
    control = oracles.brute_force_control(tables, TEMPERATURE)
    posterior = oracles.brute_force_posterior(tables, TEMPERATURE)
    bound = oracles.objective(tables, policy, TEMPERATURE) / TEMPERATURE
    assert guide.exact_elbo == pytest.approx(bound, abs=1e-12)
    assert guide.max_elbo == pytest.approx(control.objective / TEMPERATURE, abs=1e-12)
    assert guide.log_evidence == pytest.approx(posterior.log_evidence, abs=1e-12)
    sampled_right(guide, bound)
    divergence = (policy * np.log(policy / control.policy)).sum(-1)
    running = ~tables.terminal
    assert guide.divergence is not None
    np.testing.assert_allclose(guide.divergence[:, running], divergence[:, running], atol=1e-12)
    assert (guide.divergence[:, ~running] == 0).all()
    left = oracles.policy_divergence(tables, policy, control.policy)
    assert guide.left_to_learn == pytest.approx(left, abs=1e-12)
    if discount == 1:
        assert guide.evidence_estimate == pytest.approx(
            posterior.log_evidence, abs=4.5 * guide.evidence_standard_error
        )
    else:
        assert guide.evidence_estimate is None


@pytest.mark.parametrize("ends", [True, False])
def test_a_guide_without_a_horizon(ends: bool) -> None:
    tables = example(horizon=None, discount=0.8, ends=ends)
    result = infer(model_of(tables), Exact(TEMPERATURE))
    guide = guide_quality(with_policy(result, [0.9, 0.1]), draws=4000, seed=1)
    policy = np.broadcast_to([0.9, 0.1], (3, 2))
    value = oracles.linear_solve_value(tables, policy, TEMPERATURE)
    bound = float(tables.initial @ value) / TEMPERATURE
    assert guide.exact_elbo == pytest.approx(bound, abs=1e-12)
    sampled_right(guide, bound)
    visits = oracles.occupancy(tables, policy).sum(-1)
    assert guide.divergence is not None
    assert guide.left_to_learn == pytest.approx(float(visits @ guide.divergence), abs=1e-12)
    steps = visits[~tables.terminal].sum()
    assert guide.mean_divergence == pytest.approx(guide.left_to_learn / steps, abs=1e-12)
    assert guide.unfinished == (0 if ends else 1)


@pytest.mark.parametrize("horizon", [3, None])
def test_the_exact_guide_passes_where_nothing_else_is_random(horizon: int | None) -> None:
    tables = example(horizon=horizon, discount=0.8, certain=True)
    guide = guide_quality(infer(model_of(tables), Exact(TEMPERATURE)))
    assert guide.constant
    assert guide.trusted
    assert guide.pareto_k is None
    assert guide.effective_sample_size == pytest.approx(1000)
    assert guide.left_to_learn == pytest.approx(0, abs=1e-12)
    assert guide.elbo == pytest.approx(guide.exact_elbo, abs=1e-9)


def test_a_bad_guide_is_flagged() -> None:
    """Cold, the leaves of a tree differ by e^{4 / 0.25}: drawn alike they are not to be trusted."""
    best = infer(load_target("tree"), Exact(0.25))
    assert guide_quality(best).trusted
    bad = guide_quality(with_policy(best, [1 / 3, 1 / 3, 1 / 3]))
    assert bad.trusted is False
    assert bad.pareto_k is not None
    assert bad.pareto_k > 0.7
    assert bad.effective_sample_size < 100
    assert bad.left_to_learn is not None
    assert bad.left_to_learn > 1


def test_weights_that_hardly_vary_are_not_flagged() -> None:
    """Hot, the few episodes that reach the goal of a lake weigh a little more than all others."""
    guide = guide_quality(infer(load_target("FrozenLake-v1"), Exact(2.0)))
    assert guide.effective_sample_size > 950
    assert guide.trusted is not False


def test_a_posterior_is_its_own_evidence() -> None:
    guide = guide_quality(infer(model_of(example(discount=0.8)), Exact(TEMPERATURE, "posterior")))
    assert guide.constant
    assert guide.elbo == pytest.approx(guide.log_evidence, abs=1e-10)
    assert guide.evidence_estimate == pytest.approx(guide.log_evidence, abs=1e-10)
    # The rounding of weights that are the same is no error of a mean.
    assert guide.elbo_standard_error == guide.evidence_standard_error == 0
    assert guide.elbo > guide.max_elbo  # of policies, which leave the dynamics as they are
    assert guide.exact_elbo is None
    assert "dynamics of its own" in str(guide.no_exact_because)


def test_a_learned_guide_on_a_known_model() -> None:
    settings = PolicyGradient(total_steps=512, evaluate_every=512, temperature=0.2)
    result = infer(load_target("tree"), settings)
    guide = guide_quality(result, draws=2000, seed=1)
    assert guide.exact_elbo is not None
    sampled_right(guide, guide.exact_elbo)
    exact = infer(load_target("tree"), Exact(0.2))
    assert guide.max_elbo == pytest.approx(float(exact.objective) / 0.2, abs=1e-12)
    assert guide.left_to_learn > 0.01


def test_a_linear_gaussian_guide() -> None:
    result = infer(load_target("double-integrator"), Exact(1.0))
    guide = guide_quality(result)
    assert guide.max_elbo == pytest.approx(float(result.objective), rel=1e-12)
    sampled_right(guide, float(result.objective))
    assert guide.no_exact_because == "the model is not finite"


def test_a_guide_that_does_what_the_prior_forbids() -> None:
    result = infer(load_target("tree"), Exact(1.0), prior=CategoricalPrior([0.5, 0.5, 0.0]))
    guide = guide_quality(with_policy(result, [0.3, 0.3, 0.4]))
    assert guide.elbo == -math.inf
    assert guide.exact_elbo is None
    assert guide.no_exact_because == "the guide has mass where the prior has none"
    assert guide.divergence is not None
    assert guide.divergence.max() == math.inf
    json.dumps(guide.summary(), allow_nan=False)


def test_what_cannot_be_judged() -> None:
    result = infer(load_target("chain"), Exact(0.1))
    with pytest.raises(ValueError, match="draws: expected at least 2"):
        guide_quality(result, draws=1)
    with pytest.raises(ValueError, match="at 0 reward is no evidence"):
        guide_quality(infer(load_target("chain"), Exact(0.0)))
    settings = PolicyGradient(total_steps=64, evaluate_every=64)
    lost = dataclasses.replace(infer(load_target("chain"), settings), prior_source=None)
    with pytest.raises(ValueError, match="made in Python and which a saved run does not hold"):
        guide_quality(lost)
    small = guide_quality(result, most_states=5, horizon=5)
    assert small.no_exact_because == "the model has more than 5 states"
    assert small.exact_elbo is None


# --- The command --------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(list(words))
    return capsys.readouterr().out


def test_evaluate_judges_the_guide(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    infer(load_target("tree"), Exact(0.5)).save("tree")
    found = json.loads(command(capsys, "evaluate", "tree", "--json"))
    guide = found["guide"]
    assert guide["constant"] is True
    assert guide["draws"] == 1000
    assert guide["elbo"] == pytest.approx(guide["log_evidence"])
    assert guide["pareto_k"] is None
    assert found["no_guide_because"] is None
    shown = command(capsys, "evaluate", "tree")
    assert "All weights p(τ, O) / q(τ) of 1000 draws are the same." in shown
    assert f"{guide['max_elbo']:.6g}" in shown
    none = json.loads(command(capsys, "evaluate", "tree", "--draws", "0", "--json"))
    assert none["guide"] is None
    assert none["no_guide_because"] == "no draws were asked for"
    other = json.loads(command(capsys, "evaluate", "tree", "--target", "tree", "--json"))
    assert other["no_guide_because"] == "a guide is judged on the target that it was inferred on"
    with pytest.raises(SystemExit):
        main(["evaluate", "tree", "--draws", "1"])
    assert "--draws: expected 0, or at least 2, got 1" in capsys.readouterr().err


def test_evaluate_says_why_a_guide_is_not_judged(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    infer(load_target("tree"), Exact(0)).save("cold")
    words = ("evaluate", "cold", "--episodes", "1")
    assert "The guide was not judged: temperature: expected one above 0" in command(capsys, *words)
    assert "judged" not in command(capsys, *words, "--draws", "0")


def test_evaluate_runs_no_simulator_for_it_unless_asked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = PolicyGradient(total_steps=64, environments=2, evaluate_every=64, temperature=1.0)
    infer(load_target("CartPole-v1"), settings).save("cart")
    words = ("evaluate", "cart", "--episodes", "1", "--json")
    found = json.loads(command(capsys, *words))
    assert found["guide"] is None
    assert "--draws N does" in found["no_guide_because"]
    found = json.loads(command(capsys, *words, "--draws", "2"))
    assert found["guide"]["draws"] == 2
    assert found["guide"]["exact_elbo"] is None
    assert found["guide"]["no_exact_because"] == "the model is not finite"
