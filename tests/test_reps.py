"""REPS against exact inference, closed forms, a published program's numbers and broken twins."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Box
from regret import regret
from torch import Tensor, nn

from inference_rl import (
    REPS,
    CategoricalPrior,
    EnvironmentModel,
    Exact,
    FiniteModel,
    InferenceResult,
    MaskPrior,
    StickyPrior,
    infer,
    load_target,
)
from inference_rl.duals import solve_episodic
from inference_rl.inference import reps, reps_episodic, reps_rows, reps_step
from inference_rl.inference.reps_episodic import divergence_of_gaussians
from inference_rl.learning.loop import Interrupted

TEMPERATURE = 0.05
STEPS = {"tree": 5_000, "chain": 10_000, "FrozenLake-v1": 10_000}
QUIET: dict[str, Any] = {"evaluation_episodes": 0, "evaluate_every": 10**9}


def finite(target: str) -> FiniteModel:
    return infer(load_target(target), Exact(TEMPERATURE)).model


def learned(target: str, seed: int = 0, **changes: Any) -> tuple[FiniteModel, InferenceResult]:
    given = finite(target)
    steps = STEPS.get(target, 20_000)
    settings = {"temperature": TEMPERATURE, "total_steps": steps, **QUIET, **changes}
    return given, infer(given, REPS(**settings), seed=seed)


@pytest.mark.parametrize("target", list(STEPS))
def test_finds_what_exact_inference_finds(target: str) -> None:
    given, result = learned(target)
    assert regret(given, result.policy, TEMPERATURE) < 0.01
    # The message of the start is the soft value; one that no flow passes is held by nothing.
    best, start = infer(given, Exact(TEMPERATURE)), given.initial > 0
    states = torch.arange(given.num_states)
    found = result.v(states, None if given.horizon is None else 0).squeeze(-1).double()
    exact = best.v if given.horizon is None else best.v[0]
    assert found[start].item() == pytest.approx(exact[start].item(), abs=0.01)


@pytest.mark.parametrize("expectation", ["model", "sample"])
def test_an_episode_of_one_step_has_no_flow_to_close(expectation: str) -> None:
    """All steps are at the start: the flow is zero, but for the rounding of a sum."""
    lottery = load_target("lottery")
    settings = REPS(temperature=0.2, total_steps=600, expectation=expectation, **QUIET)  # type: ignore[arg-type]
    found = infer(lottery, settings).policy(torch.tensor(0), 0).probs
    best = infer(lottery, Exact(0.2)).policy.probs[0, 0]
    # A ticket that wins once in ten is worth 0.3 give or take 0.09 by a hundred draws.
    near = 1e-3 if expectation == "model" else 0.2
    assert found[0].item() == pytest.approx(best[0].item(), abs=near)


def test_draws_suffice_where_nothing_else_is_random() -> None:
    given, result = learned("chain", expectation="sample", environments=32)
    assert regret(given, result.policy, TEMPERATURE) < 0.01


class Flat(EnvironmentModel):
    """One step: the reward is −(action − target)², the target an entry of the state."""

    state_space = Box(-1.0, 1.0, (2,))
    action_space = Box(-1.0, 1.0, (1,))
    discount, horizon = 1.0, 1

    def initial_state(self) -> Any:
        return dist.Uniform(-torch.ones(2) * 0.5, torch.ones(2) * 0.5).to_event(1)

    def transition(self, state: Tensor, action: Tensor) -> Any:
        return dist.Delta(state, event_dim=1)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return -((action[..., 0] - state[..., 0]) ** 2)


def test_a_search_with_contexts_finds_the_best_action_in_each() -> None:
    settings = REPS(
        kind="episodic", context=(0,), environments=64, total_steps=8000, temperature=1e-3, **QUIET
    )
    result = infer(Flat(), settings)
    for target in (-0.4, 0.0, 0.3):
        state = torch.tensor([target, 0.1])
        assert result.policy.act(state, 0, deterministic=True).item() == pytest.approx(
            target, abs=0.1
        )
    # The divergence of a round is what it was allowed.
    assert result.metrics[-1]["divergence_of_weights"] == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("form", ["linear", "neural"])
def test_a_box_is_learned_step_by_step(form: str) -> None:
    settings = REPS(
        form=form, environments=128, total_steps=128 * 30, feature_count=20, hidden=(16,),
        learning_rate=1e-2, temperature=0.01, **QUIET,
    )  # fmt: skip
    result = infer(Flat(), settings)
    for target in (-0.4, 0.3):
        action = result.policy.act(torch.tensor([target, 0.1]), 0, deterministic=True)
        assert action.item() == pytest.approx(target, abs=0.15)


def test_features_of_a_network_hold_the_flow(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = 3  # the state, and the share of the horizon that has passed
    network = nn.Sequential(nn.Linear(inputs, 24), nn.Tanh())
    settings = REPS(
        feature_module=network, environments=256, total_steps=256 * 25, hidden=(16,),
        learning_rate=1e-2, temperature=0.01, **QUIET,
    )  # fmt: skip
    result = infer(Flat(), settings)
    for target in (-0.4, 0.3):
        action = result.policy.act(torch.tensor([target, 0.1]), 0, deterministic=True)
        assert action.item() == pytest.approx(target, abs=0.15)
    result.save(tmp_path)
    loaded = InferenceResult.load(tmp_path, model=Flat())
    state = torch.tensor([0.3, 0.1])
    assert torch.equal(loaded.policy.mode(state, 0), result.policy.mode(state, 0))


def test_a_search_improves_on_the_prior() -> None:
    given, result = learned("tree", kind="episodic", environments=64, total_steps=5_000)
    assert regret(given, result.policy, TEMPERATURE) < 0.7


# ---- priors, horizons, temperatures


def test_forbidden_actions_are_never_taken() -> None:
    lake = load_target("FrozenLake-v1")
    prior = MaskPrior([True, True, True, False])
    for changes in ({}, {"expectation": "sample"}, {"kind": "episodic", "covariance": "diagonal"}):
        settings = REPS(temperature=TEMPERATURE, total_steps=3000, **QUIET, **changes)
        result = infer(lake, settings, prior=prior)
        assert not result.policy(torch.arange(16)).probs[:, 3].any()


@pytest.mark.parametrize("prior", [CategoricalPrior(probs=[0.8, 0.2]), StickyPrior])
def test_priors_are_kept_to(prior: Any) -> None:
    given = load_target("chain")
    rho = prior(given.action_space) if isinstance(prior, type) else prior
    best = infer(given, Exact(0.3), prior=rho)
    result = infer(given, REPS(temperature=0.3, total_steps=10_000, **QUIET), prior=rho)
    states = torch.arange(int(best.model.num_states))
    reached = reps_rows.reachable(best.model)[0]
    found, exact = result.policy(states).probs.double(), best.policy(states).probs
    assert torch.allclose(found[reached], exact[reached], atol=0.03)


def test_temperatures_move() -> None:
    given = load_target("chain")
    annealed = REPS(temperature=1.0, final_temperature=0.01, total_steps=5000, **QUIET)
    assert infer(given, annealed).temperature == pytest.approx(0.01, rel=0.2)
    tuned = REPS(temperature="auto", target_divergence=0.2, total_steps=5000, **QUIET)
    assert infer(given, tuned).temperature != 1.0


# ---- functions


def test_a_weighted_gaussian_is_the_weighted_moments() -> None:
    rng = np.random.default_rng(0)
    x, w = torch.from_numpy(rng.normal(size=(20, 3))), torch.from_numpy(rng.random(20))
    gain, covariance = reps.weighted_gaussian(torch.ones(20, 1).double(), x, w)
    mean = np.average(x, axis=0, weights=w)
    assert np.allclose(gain[:, 0], mean)
    assert np.allclose(covariance, np.cov(x.T, aweights=w))
    # With contexts: the normal equations, in which the errors average to zero.
    inputs = torch.from_numpy(rng.normal(size=(20, 2)))
    gain, _ = reps.weighted_gaussian(inputs, x, w)
    assert np.allclose((w[:, None] * inputs).mT @ (x - inputs @ gain.mT), 0, atol=1e-12)


PUBLISHED = {
    0.1: (
        [-0.08301128786672954, -0.043178005024227945, -0.017982099254958094, -0.11768657308282167],
        [0.43591509803224526, -0.15335207415252256, 0.03845129820746329, -0.04864230823845638],
    ),
    0.5: (
        [-0.03857338334418169, 0.08645522656353331, 0.13049634609958544, -0.02614462878200616],
        [0.32977321806073107, -0.11836989436091697, 0.01945039894891707, -0.04787249185789156],
    ),
    1.5: (
        [-0.01709158740037374, 0.22519498637849322, 0.37962309913270964, 0.11826175796102217],
        [0.16452672029318288, -0.034500433145349514, -0.00923475661777015, -0.07216114062441761],
    ),
}
"""By epsilon, mean and first row of the covariance that MushroomRL 1.10.2's episodic REPS gives for
these parameters and returns, as `tests/benchmarks/episodic_reps.py` prints them."""


@pytest.mark.parametrize("epsilon", list(PUBLISHED))
def test_an_update_is_that_of_the_published_program(epsilon: float) -> None:
    grid = np.arange(160).reshape(40, 4)
    parameters = np.sin(1.7 * grid + 0.3 * grid**2 % 7)
    returns = -((parameters - 0.3) ** 2).sum(1) * 10 + np.cos(5.0 * np.arange(40)) - 20
    weights = torch.from_numpy(solve_episodic(returns, epsilon).weights)
    one = torch.ones(40, 1, dtype=torch.float64)
    gain, covariance = reps.weighted_gaussian(one, torch.from_numpy(parameters), weights)
    mean, row = PUBLISHED[epsilon]
    assert np.allclose(gain[:, 0], mean, rtol=1e-9, atol=1e-10)
    assert np.allclose(covariance[0], row, rtol=1e-9, atol=1e-10)


def test_the_divergence_of_gaussians_is_that_of_torch() -> None:
    rng = np.random.default_rng(1)
    roots = torch.from_numpy(rng.normal(size=(2, 3, 3)))
    ours, theirs = roots @ roots.mT + torch.eye(3)
    gains = torch.from_numpy(rng.normal(size=(2, 3, 2)))
    inputs = torch.from_numpy(rng.normal(size=(5, 2)))
    p, q = (
        torch.distributions.MultivariateNormal(inputs @ gain.mT, covariance)
        for gain, covariance in zip(gains, (ours, theirs), strict=True)
    )
    expected = torch.distributions.kl_divergence(p, q).mean()
    found = divergence_of_gaussians(gains[0], ours, gains[1], theirs, inputs)
    assert found == pytest.approx(float(expected), rel=1e-10)


def test_steps_after_an_end_are_counted() -> None:
    step = torch.arange(4)
    endless = reps.absorbed(step, 0.9, None)
    assert torch.allclose(endless, 0.9 ** (step.double() + 1) * 10)
    for discount in (1.0, 0.9):
        counted = [sum(discount**k for k in range(t + 1, 4)) for t in range(4)]
        assert torch.allclose(
            reps.absorbed(step, discount, 4), torch.tensor(counted, dtype=torch.float64)
        )


def test_tables_from_draws_leave_out_how_often_an_action_was_drawn() -> None:
    logits = torch.log(torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.3, 0.5]], dtype=torch.float64))
    row, action = torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1])
    base, weight = torch.full((4,), 0.25).double(), torch.tensor([0.3, 0.3, 0.3, 0.1]).double()
    found = reps.table_from_draws(logits, row, action, base, weight).softmax(-1)
    change = torch.tensor([1.2, 0.4, 1.0], dtype=torch.float64) * logits[0].exp()
    assert torch.allclose(found[0], change / change.sum())
    assert torch.allclose(found[1], logits[1].exp())


# ---- saving, resuming, refusing


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("chain", {}),
        ("Pendulum-v1", {"form": "neural", "hidden": (8,), "feature_count": 30}),
        ("Pendulum-v1", {"kind": "episodic"}),
        ("pendulum", {"form": "linear", "feature_count": 30}),
    ],
)
def test_saved_and_loaded(target: str, changes: dict[str, Any], tmp_path: Path) -> None:
    given = load_target(target)
    settings = REPS(total_steps=800, environments=2, **QUIET | changes)
    result = infer(given, settings)
    result.save(tmp_path)
    loaded = InferenceResult.load(tmp_path)
    state = torch.arange(10) if target == "chain" else torch.rand(5, 3)
    for _ in range(2):
        found, expected = loaded.policy(state, 3), result.policy(state, 3)
        action = expected.sample()
        assert torch.equal(found.log_prob(action), expected.log_prob(action))
    if settings.kind == "step":
        assert torch.equal(loaded.v(state, 3), result.v(state, 3))
    else:
        assert loaded.v is None
    assert loaded.routine == settings
    assert loaded.evaluate(2).mean_return == result.evaluate(2).mean_return


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("chain", {}),
        ("chain", {"expectation": "sample"}),
        ("Pendulum-v1", {"form": "linear", "feature_count": 20}),
        ("Pendulum-v1", {"form": "neural", "hidden": (8,), "feature_count": 20}),
        ("Pendulum-v1", {"kind": "episodic"}),
    ],
)
def test_stopped_and_resumed_ends_the_same(
    target: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 400 if target == "chain" else 800
    settings = REPS(
        total_steps=steps, environments=2, save_every=1, evaluation_episodes=0, **changes
    )
    whole = infer(load_target(target), settings, directory=tmp_path / "whole")
    learner = reps_step.StepLearner if settings.kind == "step" else reps_episodic.EpisodicLearner
    original, left = learner.update, 2

    def update(self: Any, data: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise Interrupted("stopped", 2)
        return original(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(learner, "update", update)
        with pytest.raises(Interrupted):
            infer(load_target(target), settings, directory=tmp_path / "part")
    torch.rand(3)  # the global state is nobody's
    resumed = infer(load_target(target), settings, directory=tmp_path / "part")
    assert resumed.metrics == whole.metrics
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, resumed.policy.state_dict()[name])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epsilon": 0.0}, "epsilon: expected a number > 0"),
        ({"bandwidth": -1.0}, "bandwidth: expected a number > 0"),
        ({"flow_tolerance": -1.0}, "flow_tolerance: expected a number >= 0"),
        ({"temperature": -1.0}, "temperature: expected a finite number >= 0"),
        ({"kind": "episodic", "epsilon": 3.0}, r"epsilon: expected less than log\(environments\)"),
        ({"kind": "episodic", "policy": nn.Identity()}, "policy: expected none with kind"),
        ({"context": (0,)}, "context: expected none with kind='step'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        REPS(**settings)


class Drifting(Flat):
    """The context moves."""

    horizon = 3

    def transition(self, state: Tensor, action: Tensor) -> Any:
        return dist.Delta(state * 0.5, event_dim=1)


class Endless(Flat):
    discount, horizon = 0.9, None


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        (Drifting, {"kind": "episodic", "context": (0,)}, "context: expected entries .* to stay"),
        (Flat, {"kind": "episodic", "context": (5,)}, "context: expected entries of a Box state"),
        (Endless, {}, "horizon: expected one, as a round is whole episodes"),
        (Endless, {"kind": "episodic"}, "horizon: expected one"),
        (Flat, {"form": "table"}, "form: a table policy needs Discrete states and actions"),
        (Flat, {"features": "tabular"}, "features: expected fourier ones"),
        (
            Flat,
            {"kind": "episodic", "covariance": "full", "environments": 4},
            "environments: expected more than 5 episodes",
        ),
    ],
)
def test_models_that_are_refused(model: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        infer(model(), REPS(total_steps=100, **QUIET, **settings))


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="discount: expected one above 0, and below 1 where"):
        infer(load_target("chain", discount=1.0), REPS(total_steps=100))
    with pytest.raises(TypeError, match="expectation: expected a finite model"):
        infer(Flat(), REPS(total_steps=100, expectation="model"))
    # At temperature zero nothing stands in for a degenerate dual.
    lake = load_target("FrozenLake-v1")
    with pytest.raises(ValueError, match="rewards: expected"):
        infer(lake, REPS(temperature=0.0, environments=2, total_steps=100, expectation="sample"))


# ---- broken twins


def fails_to_learn(target: str, **changes: Any) -> bool:
    given, result = learned(target, **changes)
    return regret(given, result.policy, TEMPERATURE) > 0.05


def test_a_wrong_sign_of_the_prior_term_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def reversed_sign(reward: Tensor, log_ratio: Tensor, temperature: float) -> Tensor:
        return reward + temperature * log_ratio

    monkeypatch.setattr(reps, "soft_reward", reversed_sign)
    assert fails_to_learn("chain")


def test_the_mean_over_a_batch_of_next_features_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = reps_rows.ModelRows.weighed

    def averaged(self: Any, *given: Any) -> Any:
        rows = original(self, *given)
        mean = rows.next_features.mean(0, keepdim=True).expand_as(rows.next_features)
        return reps_rows.Rows(rows.reward, rows.features, mean.clone(), rows.base)

    monkeypatch.setattr(reps_rows.ModelRows, "weighed", averaged)
    assert fails_to_learn("tree")


def test_a_chain_that_starts_again_at_its_ends_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = reps_rows.ModelRows.weighed

    def restarted(self: Any, *given: Any) -> Any:
        rows = original(self, *given)
        missing = 1 - rows.next_features.sum(1, keepdim=True)
        start = self.columns(torch.tensor([1]), torch.tensor([0]))
        return reps_rows.Rows(
            rows.reward, rows.features, rows.next_features + missing * start, rows.base
        )

    monkeypatch.setattr(reps_rows.ModelRows, "weighed", restarted)
    monkeypatch.setattr(reps_rows.Rows, "absorbing", lambda self, mass: self)
    assert fails_to_learn("chain")


def test_the_own_features_of_the_start_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published constraint, on a sample of few episodes."""
    from inference_rl import duals

    original = duals.solve_step

    def own_start(*given: Any, **options: Any) -> Any:
        start = np.zeros(given[1].shape[1])
        start[0] = 1.0
        return original(*given, **options | {"initial_features": start})

    monkeypatch.setattr(duals, "solve_step", own_start)
    assert fails_to_learn("FrozenLake-v1", flow_tolerance=1e-3, total_steps=5000)


def test_a_finite_number_of_everything() -> None:
    _, result = learned("chain", total_steps=2000)
    for name in ("divergence_of_weights", "feature_mismatch", "effective_sample_size"):
        assert math.isfinite(result.metrics[-1][name])
