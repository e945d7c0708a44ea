"""The oracles themselves, against answers worked out by hand and against each other."""

from __future__ import annotations

import dataclasses
import math

import mpmath
import numpy as np
import oracles
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import Tables
from scipy import optimize
from scipy.special import softmax

LIGHT = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def two_armed_bandit(**changes: object) -> Tables:
    """One state that matters: action 0 pays 1, action 1 pays 4 or 0 by a fair coin."""
    transition = np.zeros((3, 2, 3))
    transition[0, 0] = [0, 1, 0]
    transition[0, 1] = [0, 0.5, 0.5]
    transition[1:, :, 1] = 1
    reward = np.zeros((3, 2, 3))
    reward[0, 0, 1] = 1
    reward[0, 1, 2] = 4
    reward[1:] = 100  # never paid: these states are terminal
    model = Tables(
        transition,
        reward,
        prior=np.array([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]),
        initial=np.array([1.0, 0, 0]),
        terminal=np.array([False, True, True]),
        horizon=3,
    )
    return dataclasses.replace(model, **changes)  # type: ignore[arg-type]


def ring(discount: float) -> Tables:
    """Two states, action 0 stays, action 1 moves; staying in state 1 pays 2, moving costs 1."""
    transition = np.zeros((2, 2, 2))
    transition[[0, 1], 0, [0, 1]] = 1
    transition[[0, 1], 1, [1, 0]] = 1
    reward = np.zeros((2, 2, 2))
    reward[1, 0] = 2
    reward[:, 1] = -1
    return Tables(
        transition,
        reward,
        prior=np.array([[0.75, 0.25], [0.5, 0.5]]),
        initial=np.array([1.0, 0.0]),
        terminal=np.array([False, False]),
        discount=discount,
        horizon=2,
    )


# --- Known answers --------------------------------------------------------------------------------


def test_every_path_lists_each_sequence_once() -> None:
    paths = oracles.every_path(two_armed_bandit())
    sequences = np.concatenate([paths.states, paths.actions]).T
    assert len(sequences) == 3 * (2 * 3) ** 3
    assert len(np.unique(sequences, axis=0)) == len(sequences)
    # Under any policy the probabilities sum to one.
    total = np.exp(paths.log_dynamics + paths.log_policy(np.full((3, 2), 0.5)).sum(0)).sum()
    assert total == pytest.approx(1, abs=1e-14)


def test_control_bandit_by_hand() -> None:
    # Q = (1, ½·4 = 2) at temperature 1: V = log(½e + ½e²), whatever the horizon.
    best = oracles.brute_force_control(two_armed_bandit(), 1.0)
    assert best.objective == pytest.approx(math.log((math.e + math.e**2) / 2), rel=1e-15)
    assert best.q[0, 0] == pytest.approx([1, 2])
    assert best.policy[0, 0] == pytest.approx(softmax([1, 2]))
    assert np.array_equal(best.value[:, 1:], np.zeros((4, 2)))  # terminal: the 100 is never paid


def test_posterior_bandit_by_hand() -> None:
    # Weights: ½e for action 0; ½(½ + ½e⁴) for action 1. The posterior wishes for the lucky coin.
    posterior = oracles.brute_force_posterior(two_armed_bandit(), 1.0)
    safe, risky = math.e / 2, (1 + math.exp(4)) / 4
    assert posterior.log_evidence == pytest.approx(math.log(safe + risky), rel=1e-15)
    assert posterior.action[0, 0] == pytest.approx(np.array([safe, risky]) / (safe + risky))
    assert posterior.transition[0, 0, 1] == pytest.approx(
        [0, 1 / (1 + math.exp(4)), 1 / (1 + math.exp(-4))]
    )
    assert posterior.initial == pytest.approx([1, 0, 0])
    assert posterior.state[1] == pytest.approx(
        [0, (safe + 1 / 4) / (safe + risky), math.exp(4) / 4 / (safe + risky)]
    )
    assert np.isnan(posterior.action[0, 1]).all()  # no path starts there


def test_posterior_survival_by_hand() -> None:
    # One state, one action, reward r = log 3 at temperature 1, survival ½, T = 2:
    # p(O) = 3·(½ + ½·3) = 6; of it 4.5 survived the first step.
    model = Tables(
        np.ones((1, 1, 1)),
        np.full((1, 1, 1), math.log(3)),
        np.ones((1, 1)),
        np.ones(1),
        np.array([False]),
        discount=0.5,
        horizon=2,
    )
    posterior = oracles.brute_force_posterior(model, 1.0)
    assert posterior.log_evidence == pytest.approx(math.log(6), rel=1e-15)
    assert posterior.state[:, 0] == pytest.approx([1, 0.75])


def test_posterior_survival_is_its_recursion() -> None:
    """p(O | s) = Σ ρ P e^{r/α} [(1 - γ) + γ p(O | s')]: death comes after the reward."""
    model = ring(0.9)
    evidence = np.ones(2)
    for _ in range(3):
        weight = model.transition * np.exp(model.reward) * (0.1 + 0.9 * evidence)
        evidence = (model.prior[:, :, None] * weight).sum((1, 2))
    posterior = oracles.brute_force_posterior(model, 1.0, horizon=3)
    assert posterior.log_evidence == pytest.approx(math.log(evidence[0]), rel=1e-13)


def test_objective_by_hand() -> None:
    # π = (¾, ¼): E r = ¾·1 + ¼·2; KL = ¾ log 1.5 + ¼ log ½; entropy H(π); temperature 2.
    policy = np.array([[0.75, 0.25], [1.0, 0.0], [1.0, 0.0]])
    bandit = two_armed_bandit()
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert oracles.objective(bandit, policy, 2.0) == pytest.approx(1.25 - 2 * divergence, rel=1e-14)
    assert oracles.objective(bandit, policy, 2.0, form="entropy") == pytest.approx(
        1.25 + 2 * entropy, rel=1e-14
    )
    assert oracles.objective(bandit, policy, 2.0, form="reward") == pytest.approx(1.25, rel=1e-14)
    # A forbidden action costs everything.
    forbidding = dataclasses.replace(bandit, prior=np.array([[1.0, 0], [0.5, 0.5], [0.5, 0.5]]))
    assert oracles.objective(forbidding, policy, 2.0) == -np.inf


def test_objective_discounts_by_hand() -> None:
    # Move, then stay: -1 + γ·2, against prior probabilities ¼ and ½.
    policy = np.array([[[0.0, 1.0], [1.0, 0.0]]] * 2)
    expected = -1 + 0.9 * 2 - 0.5 * (math.log(4) + 0.9 * math.log(2))
    assert oracles.objective(ring(0.9), policy, 0.5) == pytest.approx(expected, rel=1e-14)


def test_linear_solve_by_hand() -> None:
    # Always move: V = -(1 + α log(1/ρ)) alternating; V_0 = -(c_0 + γ c_1) / (1 - γ²).
    policy = np.array([[0.0, 1.0], [0.0, 1.0]])
    first, second = 1 + math.log(4), 1 + math.log(2)
    value = oracles.linear_solve_value(ring(0.5), policy, 1.0)
    assert value[0] == pytest.approx(-(first + second / 2) / 0.75, rel=1e-14)
    assert value[1] == pytest.approx(-(second + first / 2) / 0.75, rel=1e-14)
    visits = oracles.occupancy(ring(0.5), policy)
    assert visits == pytest.approx(np.array([[0, 1 / 0.75], [0, 0.5 / 0.75]]))


def test_linear_solve_of_an_episode_without_discount() -> None:
    policy = np.array([[0.75, 0.25], [1.0, 0.0], [1.0, 0.0]])
    bandit = two_armed_bandit()
    value = oracles.linear_solve_value(bandit, policy, 2.0)
    assert value[0] == pytest.approx(oracles.objective(bandit, policy, 2.0), rel=1e-14)
    assert np.array_equal(value[1:], [0, 0])
    assert oracles.occupancy(bandit, policy) == pytest.approx(
        np.array([[0.75, 0.25], [0, 0], [0, 0]])
    )


def test_occupancy_times_gain_is_the_value() -> None:
    model = ring(0.9)
    policy = np.array([[0.3, 0.7], [0.6, 0.4]])
    cost = np.log(policy / model.prior)
    gain = (model.transition * model.reward).sum(-1) - 0.5 * cost
    total = (oracles.occupancy(model, policy) * gain).sum()
    value = oracles.linear_solve_value(model, policy, 0.5)
    assert total == pytest.approx(float(model.initial @ value), rel=1e-13)
    assert oracles.occupancy(model, policy).sum() == pytest.approx(10, rel=1e-13)


def test_soft_backup_in_sixty_digits() -> None:
    # α log(½e^{1/α} + ½e^{2/α}) at α = 1; and where float64 would overflow.
    with mpmath.workdps(oracles.DIGITS):
        expected = mpmath.log((mpmath.e + mpmath.e**2) / 2)
        got = oracles.mp_soft_backup([1, 2], [mpmath.mpf(1) / 2] * 2, 1)
        assert abs(got - expected) < mpmath.mpf(10) ** -55
        huge = oracles.mp_soft_backup([0, 10**9], [mpmath.mpf(1) / 2] * 2, mpmath.mpf(1) / 1000)
        assert abs(huge - (10**9 - mpmath.log(2) / 1000)) < mpmath.mpf(10) ** -45
        assert oracles.mp_soft_backup([5, 9], [1, 0], 1) == 5  # forbidden actions do not count


def test_soft_value_iteration_in_sixty_digits_by_hand() -> None:
    # One state: V = c + γV with c = α log Σ ρ e^{r/α}.
    model = Tables(
        np.ones((1, 2, 1)),
        np.array([[[1.0], [2.0]]]),
        np.array([[0.5, 0.5]]),
        np.ones(1),
        np.array([False]),
        discount=0.75,
    )
    with mpmath.workdps(oracles.DIGITS):
        expected = 4 * mpmath.log((mpmath.e + mpmath.e**2) / 2)
        assert abs(oracles.mp_soft_value_iteration(model, 1.0)[0] - expected) < 1e-40


def test_gradient_by_hand() -> None:
    # One step, one state: ∂J/∂logits = π (q - α log π/ρ - J).
    model = two_armed_bandit(horizon=1)
    policy = np.array([[[0.75, 0.25], [0.5, 0.5], [0.5, 0.5]]])
    advantage = np.array([1.0, 2.0]) - 2 * np.log(policy[0, 0] / 0.5)
    advantage -= policy[0, 0] @ advantage
    gradient = oracles.objective_gradient(model, policy, 2.0)
    assert gradient[0, 0] == pytest.approx(policy[0, 0] * advantage, rel=1e-13)
    assert np.array_equal(gradient[0, 1:], np.zeros((2, 2)))


# --- The oracles against each other ---------------------------------------------------------------


@LIGHT
@given(oracles.finite_tables(max_states=3, max_horizon=3), oracles.temperatures())
def test_control_attains_its_value(tables: Tables, temperature: float) -> None:
    """The tree's policy, evaluated by summing paths, is worth what the tree says."""
    best = oracles.brute_force_control(tables, temperature)
    scale = 1 + np.abs(best.q).max() + temperature * 10
    attained = oracles.objective(tables, best.policy, temperature)
    assert attained == pytest.approx(best.objective, abs=1e-11 * scale)


@LIGHT
@given(st.data(), oracles.finite_tables(max_states=3, max_horizon=3), oracles.temperatures())
def test_no_policy_is_better_and_its_regret_is_a_divergence(
    data: st.DataObject, tables: Tables, temperature: float
) -> None:
    """J(π*) - J(π) = temperature · E_π Σ γ^t KL(π ‖ π*): no π beats the tree."""
    policy = data.draw(oracles.policies(tables))
    best = oracles.brute_force_control(tables, temperature)
    worth = oracles.objective(tables, policy, temperature)
    scale = 1 + np.abs(best.q).max() + temperature * 10
    assert worth <= best.objective + 1e-11 * scale
    regret = temperature * oracles.policy_divergence(tables, policy, best.policy)
    if np.isfinite(regret):  # π* underflows where an action is hopeless
        assert best.objective - worth == pytest.approx(regret, rel=1e-9, abs=1e-9 * scale)


def test_no_policy_is_better_by_search() -> None:
    model = ring(0.9)
    best = oracles.brute_force_control(model, 0.7)

    def loss(logits: np.ndarray) -> tuple[float, np.ndarray]:
        policy = softmax(logits.reshape(2, 2, 2), axis=-1)
        gradient = oracles.objective_gradient(model, policy, 0.7)
        return -oracles.objective(model, policy, 0.7), -gradient.ravel()

    found = optimize.minimize(loss, np.zeros(8), jac=True, options={"gtol": 1e-10})
    assert -found.fun == pytest.approx(best.objective, rel=1e-12)
    # State 1 is not visited at t = 0: nothing pins the policy there.
    learned = softmax(found.x.reshape(2, 2, 2), axis=-1)
    assert learned[0, 0] == pytest.approx(best.policy[0, 0], abs=1e-6)
    assert learned[1] == pytest.approx(best.policy[1], abs=1e-6)


@LIGHT
@given(st.data(), oracles.finite_tables(max_states=3, max_horizon=3, scales=(1.0,)))
def test_gradient_is_the_finite_difference(data: st.DataObject, tables: Tables) -> None:
    supported = dataclasses.replace(tables, prior=np.full_like(tables.prior, 1 / tables.actions))
    policy = 0.9 * data.draw(oracles.policies(supported)) + 0.1 / tables.actions
    logits, step = np.log(policy), 1e-5
    direction = np.random.default_rng(0).standard_normal(logits.shape)

    def moved(by: float) -> float:
        return oracles.objective(supported, softmax(logits + by * direction, axis=-1), 0.5)

    slope = (moved(step) - moved(-step)) / (2 * step)
    gradient = oracles.objective_gradient(supported, policy, 0.5)
    assert (gradient * direction).sum() == pytest.approx(slope, abs=1e-7)


@LIGHT
@given(oracles.finite_tables(max_states=3, max_horizon=3), oracles.temperatures())
def test_tree_agrees_with_sixty_digits(tables: Tables, temperature: float) -> None:
    value = oracles.brute_force_control(tables, temperature).value[0]
    exact = oracles.mp_finite_horizon(tables, temperature)
    scale = 1 + np.abs(value).max() + temperature * 10
    assert [float(v) for v in exact] == pytest.approx(value, abs=1e-12 * scale)


@LIGHT
@given(oracles.finite_tables(max_states=3, max_horizon=3, discounts=(1.0,), scales=(1.0,)))
def test_evidence_exceeds_the_bound_unless_nothing_is_random(tables: Tables) -> None:
    """log p(O) ≥ max ELBO, and equal if the start and the dynamics are deterministic."""
    evidence = oracles.brute_force_posterior(tables, 0.5).log_evidence
    bound = oracles.brute_force_control(tables, 0.5).objective / 0.5
    assert bound <= evidence + 1e-12
    certain = dataclasses.replace(
        tables, transition=np.round(tables.transition), initial=np.round(tables.initial)
    )
    if (certain.transition.sum(-1) == 1).all() and certain.initial.sum() == 1:
        assert oracles.brute_force_posterior(certain, 0.5).log_evidence == pytest.approx(
            oracles.brute_force_control(certain, 0.5).objective / 0.5, rel=1e-12, abs=1e-12
        )


@LIGHT
@given(oracles.finite_tables(max_states=3, max_actions=2), st.sampled_from([1.0, 10.0]))
def test_infinite_horizon_is_the_limit_of_finite_ones(tables: Tables, temperature: float) -> None:
    """V* in sixty digits: attained by its own greedy policy through the linear solve."""
    tables = dataclasses.replace(
        tables.stopped(), discount=0.5, reward=np.clip(tables.reward, -3, 3)
    )
    value = np.array([float(v) for v in oracles.mp_soft_value_iteration(tables, temperature)])
    backed = (tables.transition * (tables.reward + 0.5 * value)).sum(-1)
    policy = tables.prior * np.exp((backed - value[:, None]) / temperature)
    policy = tables.idle(policy / policy.sum(-1, keepdims=True))
    solved = oracles.linear_solve_value(tables, policy, temperature)
    assert solved == pytest.approx(value, abs=1e-12)


def test_strategy_reaches_every_hard_case() -> None:
    """What `finite_tables` promises, it draws."""
    seen: set[str] = set()

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(oracles.finite_tables())
    def collect(tables: Tables) -> None:
        assert tables.transition.sum(-1) == pytest.approx(1)
        assert tables.prior.sum(-1) == pytest.approx(1)
        assert tables.initial.sum() == pytest.approx(1)
        reached = tables.initial + tables.transition.sum((0, 1)) > 0
        stays = np.array([(tables.transition[s, :, s] == 1).all() for s in range(tables.states)])
        size = np.abs(tables.reward).max()
        cases = {
            "zero probability": (tables.transition == 0).any(),
            "absorbing": stays.any() and tables.states > 1,
            "unreachable": not reached.all(),
            "forbidden": (tables.prior == 0).any() and tables.actions > 1,
            "terminal": tables.terminal.any(),
            "never ends": not tables.terminal.any(),
            "tie": len(np.unique(tables.reward)) < tables.reward.size,
            "huge": size >= 1e5,
            "tiny": 0 < size <= 1e-5,
            "no future": tables.discount == 0,
            "no discount": tables.discount == 1,
        }
        seen.update(name for name, found in cases.items() if found)
        seen.add(f"T = {tables.horizon}")

    collect()
    assert seen >= {
        *("zero probability", "absorbing", "unreachable", "forbidden", "terminal", "never ends"),
        *("tie", "huge", "tiny", "no future", "no discount", "T = 1", "T = 4"),
    }
