"""Duals of relative entropy policy search, against primal problems, formulas and broken twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from inference_rl import duals
from inference_rl.duals import (
    ConstantReturnError,
    DivergenceTooLargeError,
    DivergenceTooSmallError,
    InfeasibleFlowError,
    episodic_dual,
    solve_episodic,
    solve_step,
    step_dual,
    trust_multiplier,
)

LIGHT = settings(max_examples=60, deadline=None, derandomize=True)
Array = np.ndarray[Any, np.dtype[Any]]


def kl(weights: Array, base: Array) -> float:
    kept = weights > 0
    return float((weights[kept] * np.log(weights[kept] / base[kept])).sum())


def derivative(function: Callable[[float], float], at: float, step: float = 1e-6) -> float:
    return (function(at + step) - function(at - step)) / (2 * step)


def best_weighting(reward: Array, base: Array, epsilon: float, flow: Array) -> Array:
    """The primal problem by SLSQP, which knows no dual; `flow` (N, K) is to average to zero."""
    tiny = 1e-12
    constraints = [
        {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        {
            "type": "ineq",
            "fun": lambda w: epsilon - (w * np.log(np.maximum(w, tiny) / base)).sum(),
            "jac": lambda w: -np.log(np.maximum(w, tiny) / base) - 1,
        },
    ]
    if flow.shape[1]:
        constraints.append({"type": "eq", "fun": lambda w: w @ flow, "jac": lambda w: flow.T})
    result = minimize(
        lambda w: -w @ reward,
        base,
        jac=lambda w: -reward,
        bounds=[(tiny, 1)] * len(reward),
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return np.asarray(result.x)


class ThreeStates:
    """An MDP of three states and two actions, fully enumerated: φ' averaged, base weights μ ρ."""

    def __init__(self, discount: float, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        transition = rng.dirichlet(np.ones(3), size=(3, 2))
        prior = rng.dirichlet(np.ones(2), size=3)
        self.discount, self.first = discount, rng.dirichlet(np.ones(3))
        chain = discount * np.einsum("sa,sat->st", prior, transition)
        chain = chain + (1 - discount) * self.first
        visits = np.linalg.matrix_power(chain, 200)[0]
        self.base = (visits[:, None] * prior).ravel()
        self.reward = rng.normal(size=6)
        self.features = np.repeat(np.eye(3), 2, axis=0)
        self.next_features = transition.reshape(6, 3)

    def flow(self) -> Array:
        return self.discount * self.next_features - self.features + (1 - self.discount) * self.first

    def arguments(self) -> tuple[Any, ...]:
        return self.reward, self.features, self.next_features

    def options(self) -> dict[str, Any]:
        return {
            "discount": self.discount,
            "initial_features": self.first,
            "log_base": np.log(self.base),
        }


def walk(states: int, steps: int, seed: int) -> tuple[Array, Array, Array]:
    """Rewards, states and next states along one random walk of a random chain."""
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.ones(states), size=states)
    visited = [0]
    for _ in range(steps):
        visited.append(int(rng.choice(states, p=transition[visited[-1]])))
    return rng.normal(size=steps), np.array(visited[:-1]), np.array(visited[1:])


# ---- episodic


@pytest.mark.parametrize("temperature", [0.03, 0.7, 20.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_episodic_gradient_is_that_of_the_value(temperature: float, weighted: bool) -> None:
    rng = np.random.default_rng(3)
    returns = rng.normal(size=9)
    base = rng.normal(size=9) if weighted else None
    _, gradient = episodic_dual(temperature, returns, 0.3, base)
    numeric = derivative(
        lambda t: episodic_dual(t, returns, 0.3, base)[0], temperature, 1e-5 * temperature
    )
    assert gradient == pytest.approx(numeric, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("size", [2, 3, 100, 1_000_000])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.9, 1 - 1e-9])
def test_the_divergence_is_epsilon(size: int, scale: float, fraction: float) -> None:
    returns = scale * np.random.default_rng(size).normal(size=size)
    epsilon = fraction * np.log(size)
    solution = solve_episodic(returns, epsilon)
    assert solution.divergence == pytest.approx(epsilon, rel=1e-10, abs=0)
    # A plain sum of w log w / q has lost its digits where epsilon is small.
    assert kl(solution.weights, np.full(size, 1 / size)) == pytest.approx(epsilon, abs=1e-10)
    mean = solution.weights @ returns
    assert solution.dual_value == pytest.approx(mean, rel=1e-8, abs=1e-8 * scale)
    assert 1 <= solution.effective_sample_size <= size * (1 + 1e-12)
    assert solution.effective_sample_size == pytest.approx(1 / (solution.weights**2).sum())


def test_huge_offsets_do_not_matter() -> None:
    returns = np.arange(8.0) ** 2
    for offset in (2.0**40, -(2.0**40)):
        assert np.allclose(
            solve_episodic(returns + offset, 0.5).weights,
            solve_episodic(returns, 0.5).weights,
            rtol=1e-12,
        )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weighted", [False, True])
def test_the_dual_value_is_that_of_the_primal_problem(seed: int, weighted: bool) -> None:
    rng = np.random.default_rng(seed)
    returns = rng.normal(size=5)
    base = rng.dirichlet(np.ones(5)) if weighted else np.full(5, 0.2)
    epsilon = 0.5 * -np.log(base[returns.argmax()])
    solution = solve_episodic(returns, epsilon, np.log(base))
    primal = best_weighting(returns, base, epsilon, np.zeros((5, 0)))
    assert solution.dual_value == pytest.approx(primal @ returns, abs=1e-7)
    assert np.allclose(solution.weights, primal, atol=1e-4)


@LIGHT
@given(
    returns=st.lists(st.integers(-20, 20), min_size=2, max_size=30).filter(
        lambda r: len(set(r)) > 1
    ),
    scale=st.sampled_from([1e-9, 0.3, 7.0, 1e9]),
    shift=st.integers(-1000, 1000),
    fraction=st.floats(0.01, 0.99),
)
def test_temperature_scales_and_weights_do_not(
    returns: list[int], scale: float, shift: int, fraction: float
) -> None:
    array = np.array(returns, dtype=float)
    epsilon = fraction * np.log(len(array) / (array == array.max()).sum())
    plain = solve_episodic(array, epsilon)
    moved = solve_episodic(scale * (array + shift), epsilon)
    assert moved.temperature == pytest.approx(scale * plain.temperature, rel=1e-6)
    assert np.allclose(moved.weights, plain.weights, rtol=1e-6, atol=1e-12)


def test_base_weights_count_samples() -> None:
    repeated = solve_episodic([1.0, 1.0, 1.0, 2.0, 4.0], 0.3)
    counted = solve_episodic([1.0, 2.0, 4.0, 9.0], 0.3, np.log([3, 1, 1, 1e-300]) + 5)
    left_out = solve_episodic([1.0, 2.0, 4.0, 9.0], 0.3, np.array([np.log(3), 0, 0, -np.inf]))
    assert left_out.temperature == pytest.approx(repeated.temperature, rel=1e-12)
    assert left_out.weights[0] == pytest.approx(repeated.weights[:3].sum(), rel=1e-12)
    assert left_out.weights[3] == 0
    assert counted.weights[3] > 0


@pytest.mark.parametrize("best", [1, 3])
def test_epsilon_at_its_limit_is_refused(best: int) -> None:
    returns = np.concatenate([np.zeros(9), np.ones(best)])
    limit = np.log(len(returns) / best)
    assert solve_episodic(returns, limit * (1 - 1e-9)).temperature > 0
    for epsilon in (limit, limit + 1):
        with pytest.raises(DivergenceTooLargeError, match=r"epsilon: expected less than .* nats"):
            solve_episodic(returns, epsilon)


@pytest.mark.parametrize("value", [0.0, -1e9, 0.1])
def test_equal_returns_are_refused(value: float) -> None:
    with pytest.raises(ConstantReturnError, match="returns: expected at least two that differ"):
        solve_episodic(np.full(7, value), 0.1)
    with pytest.raises(ConstantReturnError):
        solve_episodic(np.full(7, value) * (1 + 1e-16 * np.arange(7)), 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], 0.1), "returns: expected shape"),
        (([[1.0, 2.0]], 0.1), "returns: expected shape"),
        (([1.0, np.nan], 0.1), "returns: expected finite numbers, got nan at index 1"),
        (([1.0, 2.0], 0.0), "epsilon: expected a finite number > 0"),
        (([1.0, 2.0], np.nan), "epsilon: expected a finite number > 0"),
        (([1.0, 2.0], 0.1, [0.0]), "log_base: expected 2 log weights"),
        (([1.0, 2.0], 0.1, [-np.inf, -np.inf]), "log_base: expected 2 log weights"),
        (([-1e308, 1e308], 0.1), "returns: expected a range below"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_malformed_arguments_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve_episodic(*arguments)


def test_tensors_are_taken() -> None:
    returns = [1.0, 2.0, 5.0]
    assert np.array_equal(
        solve_episodic(torch.tensor(returns), 0.2).weights, solve_episodic(returns, 0.2).weights
    )


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 1.5])
def test_weights_are_those_of_the_published_program(epsilon: float) -> None:
    """MushroomRL's: g with the maximum subtracted, minimised by L-BFGS-B, d = exp((R - max)/η)."""
    returns = 3 * np.random.default_rng(7).normal(size=40) - 50
    centred = returns - returns.max()

    def dual(point: Array) -> tuple[float, Array]:
        mass = np.exp(centred / point[0])
        value = point[0] * (epsilon + np.log(mass.mean())) + returns.max()
        slope = epsilon + np.log(mass.mean()) - (mass * centred).mean() / (point[0] * mass.mean())
        return value, np.array([slope])

    found = minimize(
        dual,
        np.ones(1),
        jac=True,
        bounds=((np.finfo(np.float32).eps, np.inf),),
        method="L-BFGS-B",
        options={"ftol": 1e-16, "gtol": 1e-12},
    )
    theirs = np.exp(centred / found.x[0])
    assert np.allclose(solve_episodic(returns, epsilon).weights, theirs / theirs.sum(), atol=1e-6)


def bisected_multiplier(returns: Array, divergence: float) -> float:
    """The published Trust-PCL program, run until it no longer moves."""
    left, right = 0.0, 1000.0
    for _ in range(60):
        middle = (left + right) / 2
        scaled = returns / middle
        log_mean = scaled.max() + np.log(np.mean(np.exp(scaled - scaled.max())))
        found = np.mean(np.exp(scaled - log_mean) * scaled) - log_mean
        left, right = (middle, right) if found > divergence else (left, middle)
    return (left + right) / 2


@pytest.mark.parametrize("max_divergence", [1e-4, 1e-3, 1e-2])
def test_trust_multiplier_is_that_of_the_published_program(max_divergence: float) -> None:
    returns = np.random.default_rng(1).normal(size=100) * 30 + 200
    assert trust_multiplier(returns, max_divergence, 150.0) == pytest.approx(
        bisected_multiplier(returns, max_divergence * 150), rel=1e-9
    )


@pytest.mark.filterwarnings("ignore")
def test_trust_multiplier_is_zero_where_the_region_does_not_bind() -> None:
    few = np.array([1.0, 2.0, 3.0])
    assert trust_multiplier(few, 0.01, 200.0) == 0
    assert bisected_multiplier(few, 2.0) == pytest.approx(0, abs=1e-2)
    assert trust_multiplier(np.ones(10), 0.01, 10.0) == 0
    for arguments in ((few, 0.0, 10.0), (few, 0.1, 0.0), ([np.nan, 1.0], 0.1, 1.0)):
        with pytest.raises(ValueError, match="expected"):
            trust_multiplier(*arguments)  # type: ignore[arg-type]


# ---- step-based


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_step_gradients_are_those_of_the_value(discount: float) -> None:
    model = ThreeStates(discount)
    theta = np.array([0.3, -1.0, 0.5])

    def value(temperature: float, at: Array) -> float:
        return step_dual(temperature, at, *model.arguments(), 0.2, **model.options())[0]

    _, by_temperature, by_theta = step_dual(0.7, theta, *model.arguments(), 0.2, **model.options())
    assert by_temperature == pytest.approx(derivative(lambda t: value(t, theta), 0.7), rel=1e-7)
    for k, unit in enumerate(np.eye(3)):
        numeric = derivative(lambda x, unit=unit: value(0.7, theta + x * unit), 0.0)
        assert by_theta[k] == pytest.approx(numeric, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("discount", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("epsilon", [0.01, 0.2])
def test_step_solution_is_that_of_the_primal_problem(
    seed: int, discount: float, epsilon: float
) -> None:
    model = ThreeStates(discount, seed)
    solution = solve_step(*model.arguments(), epsilon, **model.options())
    flow = model.flow()
    assert solution.weights.sum() == pytest.approx(1, abs=1e-12)
    assert kl(solution.weights, model.base) == pytest.approx(epsilon, abs=1e-8)
    assert np.abs(solution.weights @ flow).max() < 1e-9
    assert solution.feature_mismatch == pytest.approx(
        np.linalg.norm(solution.weights @ flow), abs=1e-14
    )
    assert solution.dual_value == pytest.approx(solution.weights @ model.reward, abs=1e-8)
    # One of the three flow constraints follows from the other two and normalisation.
    primal = best_weighting(model.reward, model.base, epsilon, flow[:, :2])
    assert solution.dual_value == pytest.approx(primal @ model.reward, abs=1e-7)
    assert np.allclose(solution.weights, primal, atol=1e-5)


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_the_gradient_vanishes_at_the_solution(discount: float) -> None:
    model = ThreeStates(discount)
    solution = solve_step(*model.arguments(), 0.2, **model.options())
    value, by_temperature, by_theta = step_dual(
        solution.temperature, solution.theta, *model.arguments(), 0.2, **model.options()
    )
    assert value == pytest.approx(solution.dual_value, rel=1e-12)
    assert by_temperature == pytest.approx(0, abs=1e-8)
    assert np.abs(by_theta).max() < 1e-9
    assert np.allclose(
        solution.advantages,
        model.reward + (discount * model.next_features - model.features) @ solution.theta,
    )
    exponent = (model.reward + model.flow() @ solution.theta) / solution.temperature
    weights = model.base * np.exp(exponent - exponent.max())
    assert np.allclose(solution.weights, weights / weights.sum(), rtol=1e-10)


@pytest.mark.parametrize("discount", [1.0, 0.95])
@pytest.mark.parametrize("epsilon", [0.3, 1.0])
def test_one_hot_and_other_collinear_features(discount: float, epsilon: float) -> None:
    reward, here, there = walk(10, 500, seed=0)
    phi = np.eye(10)
    initial = phi[0] if discount == 1 else np.full(10, 0.1)
    plain = solve_step(
        reward, phi[here], phi[there], epsilon, discount=discount, initial_features=initial
    )
    assert plain.divergence == pytest.approx(epsilon, rel=1e-6)
    assert plain.feature_mismatch < 1e-8
    assert plain.theta.sum() == pytest.approx(0, abs=1e-10), "constants are in the null space"
    # Copies, unvisited states and units change nothing that is identified.
    mixed = np.hstack([phi, np.zeros((10, 3)), 1e-6 * phi[:, :4], 1e6 * phi[:, 2:] @ phi[2:, :8]])
    again = solve_step(
        reward,
        mixed[here],
        mixed[there],
        epsilon,
        discount=discount,
        initial_features=initial @ mixed,
    )
    assert np.allclose(again.weights, plain.weights, rtol=1e-6, atol=1e-12)
    assert np.allclose(again.temperature, plain.temperature, rtol=1e-7)
    assert np.linalg.norm(again.theta) < np.linalg.norm(plain.theta)


def test_steps_scale_and_shift() -> None:
    reward, here, there = walk(6, 300, seed=2)
    phi = np.random.default_rng(0).normal(size=(6, 3))
    plain = solve_step(reward, phi[here], phi[there], 0.4)
    moved = solve_step(1e6 * reward + 1e8, phi[here], phi[there], 0.4)
    assert moved.temperature == pytest.approx(1e6 * plain.temperature, rel=1e-6)
    assert np.allclose(moved.theta, 1e6 * plain.theta, rtol=1e-5)
    assert np.allclose(moved.weights, plain.weights, rtol=1e-6)


def test_without_flow_it_is_the_episodic_dual() -> None:
    reward = np.random.default_rng(5).normal(size=30)
    still = np.ones((30, 2))
    step, episodic = solve_step(reward, still, still, 0.7), solve_episodic(reward, 0.7)
    assert step.temperature == pytest.approx(episodic.temperature, rel=1e-8)
    assert np.allclose(step.weights, episodic.weights, rtol=1e-8)
    assert not step.theta.any()


def test_starting_from_a_solution_leads_to_the_same() -> None:
    reward, here, there = walk(10, 500, seed=4)
    phi = np.eye(10)
    cold = solve_step(reward, phi[here], phi[there], 0.5)
    other = reward + 0.1 * np.random.default_rng(0).normal(size=500)
    for epsilon in (0.05, 0.5, 2.0):
        near = solve_step(other, phi[here], phi[there], epsilon, start=cold)
        far = solve_step(other, phi[here], phi[there], epsilon)
        assert np.allclose(near.weights, far.weights, rtol=1e-6, atol=1e-12)
        assert np.allclose(near.theta, far.theta, rtol=1e-6, atol=1e-9)
    assert solve_step(reward, phi[here], phi[there], 0.5, start=cold).iterations <= 1
    with pytest.raises(DivergenceTooSmallError):
        solve_step(reward, phi[here], phi[there], 1e-9, start=cold)
    with pytest.raises(ValueError, match="start: expected a solution with 3 features, got one"):
        solve_step(reward, phi[here, :3], phi[there, :3], 0.5, start=cold)


def test_a_state_that_is_never_entered_gets_no_weight() -> None:
    """The only weightings that satisfy the constraint are on the boundary of the simplex."""
    reward, here, there = walk(5, 200, seed=1)
    here[0] = 5
    phi = np.eye(6)
    solution = solve_step(reward, phi[here], phi[there], 0.5)
    assert solution.weights[0] < 1e-9
    assert solution.divergence == pytest.approx(0.5, rel=1e-6)
    assert solution.feature_mismatch < 1e-8


def test_steps_that_no_weighting_can_balance_are_refused() -> None:
    forward = np.eye(5)
    reward = np.arange(4.0)
    with pytest.raises(InfeasibleFlowError, match="features: expected that some weighting"):
        solve_step(reward, forward[:4], forward[1:], 0.5)
    # With a restart where the episode ends, the flow closes, in one way only.
    closed = np.vstack([forward[1:4], forward[:1]])
    with pytest.raises(ConstantReturnError, match="rewards: expected weightings of different"):
        solve_step(reward, forward[:4], closed, 0.5)


def test_epsilon_outside_its_limits_is_refused_with_steps() -> None:
    reward, here, there = walk(6, 60, seed=3)
    phi = np.eye(6)
    flow = phi[there] - phi[here]
    closest = minimize(
        lambda y: np.log(np.exp(flow @ y).mean()), np.zeros(6), method="BFGS", tol=1e-10
    )
    with pytest.raises(DivergenceTooSmallError, match="expected more than") as refused:
        solve_step(reward, phi[here], phi[there], 1e-9)
    assert f"{-closest.fun:.4g}"[:5] in str(refused.value)
    with pytest.raises(DivergenceTooLargeError, match="expected less than about"):
        solve_step(reward, phi[here], phi[there], np.log(60))


@pytest.mark.parametrize("seed", range(60))
def test_samples_of_any_shape_are_solved_or_refused_by_name(seed: int) -> None:
    """Heavy tails, features of eight orders of magnitude, nearly collinear, few or many steps."""
    rng = np.random.default_rng(seed)
    size, count = int(rng.choice([20, 100, 500])), int(rng.choice([1, 3, 10, 25]))
    positions = np.mod(np.cumsum(rng.normal(size=(size + 1, 2)) * 0.3, 0), 3)
    waves = positions @ rng.normal(size=(2, count)) * rng.choice([0.1, 1, 5])
    phi = np.cos(waves + rng.uniform(0, 6, count)) * 10.0 ** rng.uniform(-4, 4, count)
    reward = rng.standard_t(1.5, size=size) * 10.0 ** rng.uniform(-6, 6)
    discount, epsilon = float(rng.choice([1.0, 0.9])), float(10 ** rng.uniform(-2, 0.3))
    try:
        solution = solve_step(
            reward, phi[:-1], phi[1:], epsilon, discount=discount, initial_features=phi.mean(0)
        )
    except (
        ConstantReturnError,
        DivergenceTooLargeError,
        DivergenceTooSmallError,
        InfeasibleFlowError,
    ):
        return
    assert solution.divergence == pytest.approx(epsilon, rel=1e-6)
    flow = discount * phi[1:] - phi[:-1] + (1 - discount) * phi.mean(0)
    assert np.linalg.norm(solution.weights @ flow) <= 1e-6 * np.sqrt((flow**2).sum(1).mean())
    assert solution.dual_value == pytest.approx(
        solution.weights @ reward, rel=1e-6, abs=1e-6 * np.ptp(reward)
    )


def test_rewards_that_are_a_potential_leave_nothing_to_choose() -> None:
    _, here, there = walk(6, 100, seed=3)
    phi = np.eye(6)
    potential = np.arange(6.0)
    with pytest.raises(ConstantReturnError, match="combination of the features"):
        solve_step(potential[here] - potential[there], phi[here], phi[there], 0.5)
    with pytest.raises(ConstantReturnError, match="rewards: expected at least two that differ"):
        solve_step(np.ones(100), phi[here], phi[there], 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.ones((3, 2))}, "features, next_features: expected the same shape"),
        ({"next_features": np.ones((4, 3))}, "features, next_features: expected the same shape"),
        ({"features": np.full((4, 2), np.nan)}, "expected finite numbers"),
        ({"discount": 0.0}, "discount: expected a number in"),
        ({"discount": 0.9}, "initial_features: expected those of initial states at discount 0.9"),
        ({"discount": 0.9, "initial_features": np.ones(3)}, "initial_features: expected shape"),
        ({"epsilon": -1.0}, "epsilon: expected a finite number > 0"),
        ({"rewards": [1.0, 2.0, np.inf, 3.0]}, "rewards: expected finite numbers"),
    ],
)
def test_malformed_steps_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "rewards": np.arange(4.0),
        "features": np.ones((4, 2)),
        "next_features": np.ones((4, 2)),
        "epsilon": 0.1,
    }
    with pytest.raises(ValueError, match=message):
        solve_step(**arguments | change)


def test_step_dual_refuses_another_theta() -> None:
    with pytest.raises(ValueError, match=r"theta: expected shape \(K,\) = \(2,\)"):
        step_dual(1.0, np.ones(3), np.arange(4.0), np.ones((4, 2)), np.ones((4, 2)), 0.1)


# ---- a least temperature, a horizon, a tolerance


@pytest.mark.parametrize("least", [1e-3, 0.1, 5.0])
def test_a_least_temperature_binds_where_the_divergence_does_not(least: float) -> None:
    returns = np.random.default_rng(2).normal(size=50)
    free = solve_episodic(returns, 0.3)
    bounded = solve_episodic(returns, 0.3, least_temperature=least)
    if free.temperature >= least:
        assert np.array_equal(bounded.weights, free.weights)
    else:
        assert bounded.temperature == least
        assert bounded.divergence < 0.3
    # The minimum over η >= least: g rises from there on, or has no slope there.
    value, slope = episodic_dual(bounded.temperature, returns, 0.3)
    assert bounded.dual_value == pytest.approx(value, rel=1e-12)
    assert slope > 0 if free.temperature < least else abs(slope) < 1e-9


@pytest.mark.parametrize("least", [1e-3, 0.5, 20.0])
@pytest.mark.parametrize("warm", [False, True])
def test_a_least_temperature_binds_with_steps(least: float, warm: bool) -> None:
    model = ThreeStates(0.9)
    free = solve_step(*model.arguments(), 0.2, **model.options())
    bounded = solve_step(
        *model.arguments(),
        0.2,
        **model.options(),
        least_temperature=least,
        start=free if warm else None,
    )
    assert bounded.temperature == pytest.approx(max(least, free.temperature), rel=1e-7)
    _, slope, by_theta = step_dual(
        bounded.temperature, bounded.theta, *model.arguments(), 0.2, **model.options()
    )
    assert np.abs(by_theta).max() < 1e-9
    assert slope > 0 if least > free.temperature else abs(slope) < 1e-8
    assert kl(bounded.weights, model.base) == pytest.approx(bounded.divergence, abs=1e-12)


def test_a_least_temperature_solves_what_is_degenerate_without() -> None:
    constant = solve_episodic(np.ones(7), 0.1, least_temperature=0.5)
    assert np.allclose(constant.weights, 1 / 7)
    assert constant.divergence == 0
    assert solve_episodic([0.0, 1.0], 5.0, least_temperature=0.5).temperature == 0.5
    _, here, there = walk(6, 100, seed=3)
    phi, potential = np.eye(6), np.arange(6.0)
    for reward in (np.ones(100), potential[here] - potential[there]):
        solution = solve_step(reward, phi[here], phi[there], 0.5, least_temperature=0.1)
        assert solution.temperature == pytest.approx(0.1)
        assert solution.feature_mismatch < 1e-8
    large = solve_step(np.arange(100.0), phi[here], phi[there], np.log(100), least_temperature=0.1)
    assert large.temperature == pytest.approx(0.1)
    with pytest.raises(DivergenceTooSmallError):
        solve_step(potential[here], phi[here], phi[there], 1e-9, least_temperature=0.1)
    for least in (-1.0, np.inf):
        with pytest.raises(ValueError, match="least_temperature: expected a finite number >= 0"):
            solve_episodic([1.0, 2.0], 0.1, least_temperature=least)


class Layers:
    """A random model of T steps: one feature per state and step, zero after the last."""

    def __init__(self, discount: float, steps: int = 3, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        transition = rng.dirichlet(np.ones(2), size=(2, 2))
        prior, first = rng.dirichlet(np.ones(2), size=2), rng.dirichlet(np.ones(2))
        self.discount, self.steps = discount, steps
        size = 2 * steps
        self.initial = np.zeros(size)
        self.initial[:2] = first
        self.features = np.repeat(np.eye(size), 2, axis=0)
        self.next_features = np.zeros((2 * size, size))
        visits, base = first, []
        for t in range(steps):
            if t + 1 < steps:
                block = transition.reshape(4, 2)
                self.next_features[4 * t : 4 * t + 4, 2 * t + 2 : 2 * t + 4] = block
            base.append(discount**t * (visits[:, None] * prior).ravel())
            visits = np.einsum("s,sa,sat->t", visits, prior, transition)
        self.base = np.concatenate(base) / np.concatenate(base).sum()
        self.reward = rng.normal(size=2 * size)


@pytest.mark.parametrize("discount", [1.0, 0.8])
def test_with_a_horizon_the_visits_of_a_policy_close_the_flow(discount: float) -> None:
    model = Layers(discount)
    arguments = (model.reward, model.features, model.next_features)
    options = {
        "discount": discount,
        "horizon": model.steps,
        "initial_features": model.initial,
        "log_base": np.log(model.base),
    }
    theta = np.random.default_rng(1).normal(size=6)
    _, _, slope = step_dual(0.7, theta * 0, 0 * model.reward, *arguments[1:], 0.1, **options)
    assert np.abs(slope).max() < 1e-15  # the base is a visitation
    _, _, by_theta = step_dual(0.7, theta, *arguments, 0.1, **options)
    for k, unit in enumerate(np.eye(6)):
        numeric = derivative(
            lambda x, unit=unit: step_dual(0.7, theta + x * unit, *arguments, 0.1, **options)[0], 0
        )
        assert by_theta[k] == pytest.approx(numeric, rel=1e-7, abs=1e-9)
    solution = solve_step(*arguments, 0.1, **options)
    assert solution.divergence == pytest.approx(0.1, rel=1e-7)
    total = model.steps if discount == 1 else (1 - discount**model.steps) / (1 - discount)
    assert solution.weights[:4].sum() == pytest.approx(1 / total, rel=1e-9)
    with pytest.raises(ValueError, match="initial_features: expected those of initial states"):
        solve_step(*arguments, 0.1, discount=discount, horizon=model.steps)
    with pytest.raises(ValueError, match="horizon: expected at least one step"):
        solve_step(*arguments, 0.1, **options | {"horizon": 0})


@pytest.mark.parametrize("tolerance", [1e-4, 0.1])
@pytest.mark.parametrize("least", [0.0, 3.0])
def test_the_mismatch_shares_the_trust_region(tolerance: float, least: float) -> None:
    reward, here, there = walk(5, 80, seed=1)
    phi = np.random.default_rng(0).normal(size=(5, 3))
    options = {"flow_tolerance": tolerance, "least_temperature": least}
    solution = solve_step(reward, phi[here], phi[there], 0.3, **options)
    flow = phi[there] - phi[here]
    size = (flow**2).sum(1).mean()
    mean = solution.weights @ flow
    assert np.allclose(mean, -tolerance * size * solution.theta / solution.temperature, atol=1e-8)
    spent = solution.divergence + mean @ mean / (2 * tolerance * size)
    assert spent == pytest.approx(0.3, rel=1e-6) if not least else spent < 0.3
    assert solution.feature_mismatch == pytest.approx(np.linalg.norm(mean))
    if not least:
        # The penalised dual is least there, in η and in θ.
        def penalised(temperature: float, theta: Array) -> float:
            plain = step_dual(temperature, theta, reward, phi[here], phi[there], 0.3)[0]
            return plain + tolerance * size * theta @ theta / (2 * temperature)

        best = penalised(solution.temperature, solution.theta)
        assert solution.dual_value == pytest.approx(best, rel=1e-9)
        rng = np.random.default_rng(3)
        for _ in range(20):
            moved = solution.theta + 0.01 * rng.normal(size=3)
            assert penalised(solution.temperature * (1 + 0.01 * rng.normal()), moved) > best


def test_a_tolerance_lets_pass_what_cannot_close() -> None:
    forward = np.eye(5)
    solution = solve_step(np.arange(4.0), forward[:4], forward[1:], 0.5, flow_tolerance=1.0)
    assert 0 < solution.feature_mismatch < 1
    with pytest.raises(DivergenceTooSmallError, match="epsilon: expected more than"):
        solve_step(np.arange(4.0), forward[:4], forward[1:], 0.5, flow_tolerance=1e-6)
    with pytest.raises(ValueError, match="flow_tolerance: expected a finite number >= 0"):
        solve_step(np.arange(4.0), forward[:4], forward[1:], 0.5, flow_tolerance=-1.0)


# ---- broken twins


def test_a_missing_log_n_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = duals._checked_sample

    def unnormalised(*arguments: Any) -> tuple[Array, Array]:
        gain, log_base = checked(*arguments)
        return gain, np.zeros_like(log_base)

    monkeypatch.setattr(duals, "_checked_sample", unnormalised)
    with pytest.raises((AssertionError, DivergenceTooLargeError)):
        test_the_divergence_is_epsilon(100, 1.0, 0.01)
    with pytest.raises((AssertionError, DivergenceTooLargeError)):
        test_weights_are_those_of_the_published_program(0.5)


def test_a_wrong_sign_of_the_flow_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = duals._flow

    def reversed_flow(number: int, here: Any, there: Any, *rest: Any) -> tuple[Array, Array]:
        return real(number, there, here, *rest)

    monkeypatch.setattr(duals, "_flow", reversed_flow)
    with pytest.raises(AssertionError):
        test_the_gradient_vanishes_at_the_solution(1.0)
    with pytest.raises((AssertionError, ValueError)):
        test_step_solution_is_that_of_the_primal_problem(0, 0.9, 0.2)
