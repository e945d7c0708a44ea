"""Temperatures: the tuned one against the root on a bandit, its bounds, targets and state."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from scipy.optimize import brentq
from scipy.special import logsumexp

from inference_rl import temperature as module
from inference_rl.temperature import (
    Annealed,
    Fixed,
    TemperatureState,
    Tuned,
    default_target_entropy,
    divergence_of_entropy,
    feasible_target,
    max_entropy,
)

REWARD = np.array([1.0, 0.3, -0.5, 0.9, -2.0])
PRIOR = np.array([0.1, 0.4, 0.2, 0.05, 0.25])
UNIFORM = np.full(5, 0.2)
BOX = Box(-1.0, 1.0, (3,))
Array = np.ndarray[Any, np.dtype[Any]]


def policy(temperature: float, prior: Array) -> Array:
    logits = REWARD / temperature + np.log(prior)
    return np.asarray(np.exp(logits - logsumexp(logits)))


def divergence(temperature: float, prior: Array) -> float:
    probs = policy(temperature, prior)
    kept = probs > 0
    return float((probs[kept] * np.log(probs[kept] / prior[kept])).sum())


def tune(settings: Tuned, prior: Array, updates: int) -> tuple[float, TemperatureState]:
    state = settings.initial_state()
    for step in range(updates):
        measured = divergence(settings.temperature(state, step), prior)
        state = settings.update(state, measured)
    return settings.temperature(state, updates), state


@pytest.mark.parametrize("prior", [UNIFORM, PRIOR], ids=["uniform", "other"])
@pytest.mark.parametrize("start", [0.02, 30.0])
@pytest.mark.parametrize("target", [0.05, 0.5])
def test_it_converges_to_the_root_from_both_sides(
    prior: Array, start: float, target: float
) -> None:
    root = brentq(lambda t: divergence(t, prior) - target, 1e-3, 1e3)
    settings = Tuned(target_divergence=target, start=start, learning_rate=0.01)
    found, _ = tune(settings, prior, 8000)
    assert found == pytest.approx(root, rel=1e-3)


def test_the_root_minimises_the_dual_and_has_the_target_entropy() -> None:
    target = 0.7
    settings = Tuned(target_entropy=target, learning_rate=0.01).resolved(Discrete(5))
    found, _ = tune(settings, UNIFORM, 8000)

    def dual(alpha: float) -> float:
        soft_value = alpha * logsumexp(REWARD / alpha + np.log(UNIFORM))
        assert settings.target_divergence is not None
        return float(soft_value + alpha * settings.target_divergence)

    assert all(dual(found) < dual(found * factor) for factor in (0.9, 0.99, 1.01, 1.1))
    probs = policy(found, UNIFORM)
    assert -(probs @ np.log(probs)) == pytest.approx(target, abs=1e-3)


def test_the_wrong_sign_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Tuned.update

    def descent(self: Tuned, state: TemperatureState, measured: float) -> TemperatureState:
        assert self.target_divergence is not None
        return real(self, state, 2 * self.target_divergence - measured)

    monkeypatch.setattr(Tuned, "update", descent)
    with pytest.raises(AssertionError):
        test_it_converges_to_the_root_from_both_sides(UNIFORM, 30.0, 0.5)


def test_the_steps_are_those_of_torch() -> None:
    settings = Tuned(target_divergence=0.4, start=0.5, learning_rate=0.03)
    state = settings.initial_state()
    log_temperature = torch.tensor(math.log(0.5), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([log_temperature], lr=0.03)
    for measured in np.random.default_rng(0).gamma(1.0, size=50).tolist():
        state = settings.update(state, measured)
        optimiser.zero_grad()
        (-log_temperature * (measured - 0.4)).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert state.log_temperature == pytest.approx(log_temperature.item(), rel=1e-12)


@pytest.mark.parametrize(("measured", "bound"), [(1e6, 2.0), (0.0, 0.3)])
def test_bounds_are_respected(measured: float, bound: float) -> None:
    settings = Tuned(target_divergence=0.5, start=1.0, learning_rate=0.1, low=0.3, high=2.0)
    state = settings.initial_state()
    for _ in range(100):
        state = settings.update(state, measured)
        assert 0.3 <= settings.temperature(state, 0) <= 2.0
    assert settings.temperature(state, 0) == pytest.approx(bound, rel=1e-12)
    for _ in range(200):
        state = settings.update(state, 1.0 - measured)
    assert settings.temperature(state, 0) != pytest.approx(bound, rel=0.1), "it can leave again"


@pytest.mark.parametrize("through", ["json", "tensors"])
def test_a_saved_state_continues_bit_by_bit(through: str) -> None:
    settings = Tuned(target_divergence=0.3, start=0.7, learning_rate=0.01)
    _, state = tune(settings, PRIOR, 37)
    entries = dataclasses.asdict(state)
    if through == "json":
        again = TemperatureState(**json.loads(json.dumps(entries)))
    else:
        tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in entries.items()}
        numbers: dict[str, Any] = {k: v.item() for k, v in tensors.items()}
        again = TemperatureState(**numbers | {"updates": int(numbers["updates"])})
    assert again == state
    for measured in (0.1, 0.9, 0.2):
        state, again = settings.update(state, measured), settings.update(again, measured)
        assert again == state


def test_fixed_and_annealed() -> None:
    for settings in (Fixed(0.2), Annealed(1.0, 0.01, 100)):
        state = settings.initial_state()
        assert settings.update(state, 3.0) == state
    assert Fixed(0.2).temperature(TemperatureState(), 10**9) == 0.2
    annealed = Annealed(1.0, 0.01, 100)
    there = [annealed.temperature(TemperatureState(), t) for t in (0, 50, 100, 101, 10**9)]
    assert there == pytest.approx([1.0, 0.1, 0.01, 0.01, 0.01], rel=1e-14)
    assert there[-1] == 0.01


def test_default_targets() -> None:
    assert max_entropy(Discrete(4)) == pytest.approx(math.log(4))
    assert max_entropy(MultiDiscrete([2, 3])) == pytest.approx(math.log(6))
    assert max_entropy(BOX) == pytest.approx(3 * math.log(2))
    assert default_target_entropy(Discrete(4)) == pytest.approx(math.log(2))
    assert default_target_entropy(MultiDiscrete([2, 3])) == pytest.approx(math.log(6) / 2)
    assert default_target_entropy(BOX) == -3
    for uniform in (True, False):
        assert Tuned().resolved(Discrete(9), uniform_prior=uniform).target_divergence == (
            pytest.approx(math.log(3))
        )
        assert Tuned().resolved(BOX, uniform_prior=uniform).target_divergence == (
            pytest.approx(3 * math.log(2) + 3)
        )


def test_entropy_and_divergence_are_one_target_under_a_uniform_prior() -> None:
    by_entropy = Tuned(target_entropy=0.5).resolved(Discrete(5))
    by_divergence = Tuned(target_divergence=math.log(5) - 0.5).resolved(Discrete(5))
    assert by_entropy == by_divergence
    probs = policy(0.7, UNIFORM)
    assert divergence(0.7, UNIFORM) == pytest.approx(
        divergence_of_entropy(-(probs @ np.log(probs)), Discrete(5))
    )
    with pytest.raises(ValueError, match="target_entropy: expected a uniform prior"):
        Tuned(target_entropy=0.5).resolved(Discrete(5), uniform_prior=False)


@pytest.mark.parametrize(
    ("settings", "space", "message"),
    [
        (
            Tuned(target_entropy=2.0),
            Discrete(5),
            r"entropy below 1.60944 nats.*\(entropy 2\).*high",
        ),
        (Tuned(target_entropy=math.log(5)), Discrete(5), r"got .* \(entropy 1.60944\).*high"),
        (Tuned(target_entropy=2.5), BOX, r"above 0 nats, .* below 2.07944 nats.*high bound"),
        (Tuned(target_entropy=-0.1), Discrete(5), r"between 0 and 1.60944 nats.*low bound"),
        (Tuned(target_divergence=3.0), Discrete(5), r"between 0 and 1.60944 nats.*got 3 .*low"),
        (Tuned(), Discrete(1), "no policy can meet it"),
    ],
)
def test_targets_that_cannot_be_met_are_warned_of(
    settings: Tuned, space: Any, message: str
) -> None:
    with pytest.warns(UserWarning, match=message):
        settings.resolved(space)


def test_targets_that_can_be_met_are_not_warned_of() -> None:
    assert feasible_target(0.1, Discrete(5))
    assert feasible_target(50.0, BOX)
    assert feasible_target(3.0, Discrete(5), uniform_prior=False)
    with pytest.warns(UserWarning, match="expected a target divergence above 0 nats got -1; no"):
        assert not feasible_target(-1.0, Discrete(5), uniform_prior=False)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Fixed, {"value": -0.1}, "temperature: expected a finite number >= 0"),
        (Fixed, {"value": math.inf}, "temperature: expected a finite number >= 0"),
        (Annealed, {"start": 0.0}, "start: expected a finite temperature > 0"),
        (Annealed, {"end": -1.0}, "end: expected a finite temperature > 0"),
        (Annealed, {"steps": 0}, "steps: expected at least 1"),
        (Tuned, {"target_divergence": 0.1, "target_entropy": 0.1}, "expected at most one of them"),
        (Tuned, {"target_entropy": math.nan}, "target_entropy: expected a finite number"),
        (Tuned, {"low": 0.0}, "low: expected a finite temperature > 0"),
        (Tuned, {"start": 1e-3, "low": 1e-2}, "start: expected a temperature from low = 0.01"),
        (Tuned, {"learning_rate": 0.0}, "learning_rate: expected a finite number > 0"),
    ],
)
def test_settings_outside_their_range_are_refused(
    kind: Any, arguments: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_updates_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(ValueError, match="call resolved"):
        Tuned().update(TemperatureState(), 0.1)
    with pytest.raises(ValueError, match=r"divergence: expected a finite number .* got inf"):
        Tuned(target_divergence=0.5).update(TemperatureState(), math.inf)
    with pytest.raises(TypeError, match="action_space: expected a Discrete, MultiDiscrete or Box"):
        module.max_entropy(MultiBinary(3))
