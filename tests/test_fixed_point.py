"""The exact solver against mpmath, dense policy iteration and answers known in closed form."""

from __future__ import annotations

import mpmath as mp
import numpy as np
import pytest
from gymnasium.envs.toy_text.frozen_lake import generate_random_map
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import csr_array

from inference_rl import Exact, bellman_operators, fixed_point, infer, load_target
from inference_rl.bellman_operators import ControlBackup, PosteriorBackup
from inference_rl.end_components import end_components
from inference_rl.fixed_point import FixedPoint, solve_control, solve_posterior
from inference_rl.policy_evaluation import PolicyEvaluation

DIGITS = 60


def control(
    transition: np.ndarray,
    reward: np.ndarray,
    *,
    discount: float,
    temperature: float,
    prior: np.ndarray | None = None,
    terminal: np.ndarray | None = None,
    **options: object,
) -> FixedPoint:
    """`solve_control` on dense tables (S, A, S)."""
    states, actions, _ = transition.shape
    prior = np.full((states, actions), 1 / actions) if prior is None else prior
    terminal = np.zeros(states, dtype=bool) if terminal is None else terminal
    with np.errstate(divide="ignore"):
        log_prior = np.log(prior)
    matrix = csr_array(np.where(terminal[:, None, None], 0, transition).reshape(-1, states))
    return solve_control(
        matrix,
        np.asarray(reward, dtype=float),
        log_prior,
        terminal=terminal,
        discount=discount,
        temperature=temperature,
        **options,  # type: ignore[arg-type]
    )


def mp_control(
    transition: np.ndarray,
    reward: np.ndarray,
    log_prior: np.ndarray,
    terminal: np.ndarray,
    discount: float,
    temperature: float,
) -> list[mp.mpf]:
    """Policy iteration in sixty digits on the tables as they are in float64."""
    states, actions, _ = transition.shape
    gamma, tau = mp.mpf(discount), mp.mpf(temperature)
    p = [[[mp.mpf(x) for x in row] for row in block] for block in transition.tolist()]
    r = [[mp.mpf(x) for x in row] for row in reward.tolist()]
    rho = [[mp.exp(mp.mpf(x)) if x > -np.inf else mp.mpf(0) for x in row] for row in log_prior]
    rho = [[x / mp.fsum(row) for x in row] for row in rho]
    policy = [list(row) for row in rho]
    value: list[mp.mpf] | None = None
    for _ in range(200):
        system, right = mp.eye(states), mp.zeros(states, 1)
        for s in range(states):
            if terminal[s]:
                continue
            for a in range(actions):
                if policy[s][a] == 0:
                    continue
                cost = tau * mp.log(policy[s][a] / rho[s][a]) if tau else 0
                right[s] += policy[s][a] * (r[s][a] - cost)
                for t in range(states):
                    if not terminal[t]:
                        system[s, t] -= gamma * policy[s][a] * p[s][a][t]
        new = list(mp.lu_solve(system, right))
        gap = max(abs(x - y) for x, y in zip(new, value or new, strict=True))
        if value and gap <= mp.mpf(10) ** (25 - DIGITS) * max(abs(x) for x in new):
            return new
        value = new
        for s in range(states):
            q = [
                r[s][a]
                + gamma * mp.fsum(p[s][a][t] * value[t] for t in range(states) if not terminal[t])
                for a in range(actions)
            ]
            best = max(x for x, y in zip(q, rho[s], strict=True) if y > 0)
            if tau:
                weight = [y * mp.exp((x - best) / tau) for x, y in zip(q, rho[s], strict=True)]
            else:
                close = best - abs(best) * mp.mpf(10) ** (20 - DIGITS)
                weight = [y if x >= close else mp.mpf(0) for x, y in zip(q, rho[s], strict=True)]
            policy[s] = [x / mp.fsum(weight) for x in weight]
    raise AssertionError("the oracle did not converge")


def distance(value: np.ndarray, exact: list[mp.mpf]) -> mp.mpf:
    return max(abs(mp.mpf(x) - y) for x, y in zip(value.tolist(), exact, strict=True))


@st.composite
def models(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Small tables with zeros, absorbing and unreachable states, ties, and any scale of reward."""
    states, actions = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    transition = rng.integers(0, 4, (states, actions, states)).astype(float)
    transition[rng.random(transition.shape) < 0.4] = 0
    empty = transition.sum(axis=2) == 0
    transition[empty, np.nonzero(empty)[0]] = 1  # absorbing, or a loop
    transition /= transition.sum(axis=2, keepdims=True)
    terminal = rng.random(states) < draw(st.sampled_from([0.0, 0.3]))
    transition[terminal] = 0
    scale = 10.0 ** draw(st.sampled_from([-300, -20, -3, 0, 0, 5, 290]))
    reward = scale * rng.integers(-3, 4, (states, actions))
    prior = rng.integers(0, 3, (states, actions)).astype(float)
    prior[prior.sum(axis=1) == 0] = 1
    if draw(st.booleans()):
        prior[:, 0] = 1e-300
        prior[:, -1] = 1
    with np.errstate(divide="ignore"):
        log_prior = np.log(prior) - np.log(prior.sum(axis=1, keepdims=True))
    return {
        "transition": transition, "reward": reward, "log_prior": log_prior, "terminal": terminal
    }  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    models(),
    st.sampled_from([0.0, 0.3, 0.9, 0.999, 1 - 1e-9]),
    st.sampled_from([0.0, 1e-6, 0.1, 10.0, 1e9]),
)
def test_control_is_within_its_bound_and_the_bound_is_near_rounding(
    model: dict[str, np.ndarray], discount: float, ratio: float
) -> None:
    temperature = ratio * (float(np.abs(model["reward"]).max()) or 1.0)
    found = solve_control(
        csr_array(model["transition"].reshape(-1, model["terminal"].size)),
        model["reward"],
        model["log_prior"],
        terminal=model["terminal"],
        discount=discount,
        temperature=temperature,
    )
    with mp.workdps(DIGITS):
        exact = mp_control(**model, discount=discount, temperature=temperature)
        error = distance(found.value, exact)
        assert error <= found.error_bound
        scale = max(float(max(abs(x) for x in exact)), float(np.abs(model["reward"]).max()))
        horizon = 1 / (1 - discount)
        assert found.error_bound <= 1e-13 * horizon * scale + 1e-320 * horizon
        assert error <= 10 * 2e-16 * horizon * scale + 1e-320 * horizon
    assert found.converged
    assert (found.value[model["terminal"]] == 0).all()


def test_a_step_that_goes_far_off_near_discount_one_is_not_taken_for_divergence() -> None:
    # Against V = 0 state 1 stays where it loses for ever; leaving pays, of vanishing prior.
    transition = np.zeros((2, 2, 2))
    transition[0, :, 0] = transition[1, 0, 0] = transition[1, 1, 1] = 1
    reward = np.array([[0.003, 0.003], [-0.003, -0.003]])
    prior = np.array([[0.5, 0.5], [1e-300, 1.0]])
    found = control(transition, reward, discount=1 - 1e-9, temperature=3e-4, prior=prior)
    assert found.converged
    assert found.value == pytest.approx([3e6, 3e6], rel=1e-6)


@pytest.mark.parametrize("temperature", [1e-6, 1e-2, 1.0, 1e3, 1e9])
@pytest.mark.parametrize("actions", [2, 1000, 100_000])
def test_one_backup_is_right_to_rounding_at_every_temperature(
    temperature: float, actions: int
) -> None:
    rng = np.random.default_rng(3)
    reward = rng.random((1, actions))
    weight = rng.random(actions)
    weight[0] = 1e-290  # log ρ spans 670 nats
    log_prior = np.log(weight / weight.sum())[None]
    found = solve_control(
        csr_array(np.ones((actions, 1))),
        reward,
        log_prior,
        terminal=np.zeros(1, dtype=bool),
        discount=0.0,
        temperature=temperature,
    )
    with mp.workdps(40):
        rho = [mp.exp(mp.mpf(x)) for x in log_prior[0].tolist()]
        total = mp.fsum(
            y * mp.exp(mp.mpf(x) / temperature)
            for x, y in zip(reward[0].tolist(), rho, strict=True)
        )
        exact = temperature * mp.log(total / mp.fsum(rho))
        error = abs(found.value[0] - exact)
    assert error <= 4e-15
    assert error <= found.error_bound <= 1e-12


def chain_posterior(
    states: int, seed: int, scale: float
) -> tuple[csr_array, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    dense = rng.random((states, 2, states)) * (rng.random((states, 2, states)) < 0.6)
    dense[..., -1] += 0.1
    dense /= dense.sum(axis=2, keepdims=True)
    terminal = np.arange(states) == states - 1
    dense[terminal] = 0
    matrix = csr_array(dense.reshape(-1, states))
    return matrix, -scale * rng.random(matrix.nnz), np.log(np.full((states, 2), 0.5)), terminal


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("states", [3, 40, 500])
def test_posterior_solves_its_linear_system(states: int, discount: float) -> None:
    matrix, weight, log_prior, terminal = chain_posterior(states, 0, 2.0)
    found = solve_posterior(matrix, weight, log_prior, terminal=terminal, discount=discount)
    tilted = csr_array((matrix.data * np.exp(weight), matrix.indices, matrix.indptr), matrix.shape)
    step = np.einsum("sat,sa->st", tilted.toarray().reshape(states, 2, states), np.exp(log_prior))
    ends = step[:, terminal].sum(axis=1)
    inner = step * ~terminal
    right = (1 - discount) * inner.sum(axis=1) + ends
    evidence = np.linalg.solve(np.eye(states) - discount * inner, right)
    exact = np.where(terminal, 0.0, np.log(np.where(terminal, 1.0, evidence)))
    np.testing.assert_allclose(found.value, exact, rtol=0, atol=1e-13)
    assert np.abs(found.value - exact).max() <= found.error_bound + 1e-14
    assert found.error_bound <= 1e-11


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.2, 0.9, 0.999]), st.sampled_from([1.0, 30.0]))
def test_posterior_is_within_its_bound(seed: int, discount: float, scale: float) -> None:
    matrix, weight, log_prior, terminal = chain_posterior(4, seed, scale)
    found = solve_posterior(matrix, weight, log_prior, terminal=terminal, discount=discount)
    with mp.workdps(DIGITS):
        system, right = mp.eye(4), mp.zeros(4, 1)
        right[3] = 1
        gamma = mp.mpf(discount)
        for row in range(6):
            for entry in range(matrix.indptr[row], matrix.indptr[row + 1]):
                target = int(matrix.indices[entry])
                mass = mp.mpf(matrix.data[entry]) * mp.exp(mp.mpf(weight[entry])) / 2
                right[row // 2] += mass if target == 3 else (1 - gamma) * mass
                if target != 3:
                    system[row // 2, target] -= gamma * mass
        exact = [mp.log(x) for x in mp.lu_solve(system, right)]
        assert distance(found.value, exact) <= found.error_bound
    assert found.error_bound <= 1e-11


@pytest.mark.parametrize("discount", [0.0, 0.7, 1.0])
def test_posterior_backup_is_one_function_where_its_two_forms_meet(discount: float) -> None:
    matrix, weight, log_prior, terminal = chain_posterior(5, 0, 0.25)
    operator = PosteriorBackup(matrix, weight, log_prior, terminal=terminal, discount=discount)
    value = np.random.default_rng(0).uniform(-1, 1, 5)
    value[0], value[terminal] = 1.0, 0.0
    value *= 0.5 - np.abs(weight).max()
    near, far = (1 - 1e-12) * value, (1 + 1e-12) * value
    below, above = operator(near), operator(far)
    rounding = operator.rounding(near, below), operator.rounding(far, above)
    assert 0.1 < rounding[0] / rounding[1] < 10
    np.testing.assert_allclose(below, above, rtol=0, atol=sum(rounding) + 2e-12)
    operator(near)
    slope = operator.derivative(near, below).toarray()
    operator(far)
    np.testing.assert_allclose(operator.derivative(far, above).toarray(), slope, atol=1e-11)


def test_posterior_of_tiny_weights_is_known_relative_to_them() -> None:
    # Two steps of w, or one: V(0) = w + log1p(expm1(w) / 2), V(1) = w.
    dense = np.array([[0, 1.0, 0], [0, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0]])
    terminal = np.array([False, False, True])
    log_prior = np.log(np.full((3, 2), 0.5))
    for w in (1e-300, 1e-15, 1e-3):
        weights = np.full(4, w)
        found = solve_posterior(
            csr_array(dense), weights, log_prior, terminal=terminal, discount=1.0
        )
        assert found.converged
        assert found.value[0] == pytest.approx(w + np.log1p(np.expm1(w) / 2), rel=1e-14, abs=0)
        assert found.value[1] == pytest.approx(w, rel=1e-14, abs=0)
        assert found.error_bound <= 1e-12 * w
    nothing = solve_posterior(
        csr_array(dense), np.zeros(4), log_prior, terminal=terminal, discount=1.0
    )
    assert (nothing.value == 0).all()
    assert nothing.error_bound <= 1e-300
    # A row that misses one by more than rounding is worth that much.
    short = solve_posterior(
        csr_array(dense * (1 - 1e-9)), np.zeros(4), log_prior, terminal=terminal, discount=1.0
    )
    assert short.value[1] == pytest.approx(-1e-9, rel=1e-6)


def test_posterior_in_log_space_alone_would_not_be_known_relative_to_tiny_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix, weight, log_prior, terminal = chain_posterior(40, 0, 1e-9)
    arguments = {"terminal": terminal, "discount": 0.9}
    right = solve_posterior(matrix, weight, log_prior, **arguments)
    monkeypatch.setattr(bellman_operators, "_NEAR", 0.0)
    broken = solve_posterior(matrix, weight, log_prior, **arguments)
    size = np.abs(right.value).max()
    assert right.error_bound <= 1e-11 * size
    assert np.abs(broken.value - right.value).max() > 1e-9 * size


def test_posterior_of_a_million_nats_a_step() -> None:
    # Two ways to the end, one of two steps and one of one: log-weights add, and the larger wins.
    matrix = csr_array(
        np.array([[0, 1.0, 0], [0, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0]])
    )
    found = solve_posterior(
        matrix,
        np.array([1e6, 1e6, 2e6, -3e6]),
        np.log(np.full((3, 2), 0.5)),
        terminal=np.array([False, False, True]),
        discount=1.0,
    )
    np.testing.assert_allclose(
        found.value, [3e6 + 2 * np.log(0.5), 2e6 + np.log(0.5), 0], rtol=1e-15
    )
    assert found.error_bound <= 1e-7


@pytest.mark.parametrize(("weight", "finite"), [(-0.01, True), (0.0, False), (0.5, False)])
def test_infinite_evidence_is_refused_with_its_radius(weight: float, finite: bool) -> None:
    # The loop survives with probability 0.9 and is worth e^(weight - log 0.9): critical at zero.
    arguments = (csr_array([[1.0]]), np.array([weight - np.log(0.9)]), np.zeros((1, 1)))
    if finite:
        found = solve_posterior(*arguments, terminal=np.zeros(1, dtype=bool), discount=0.9)
        growth = np.exp(weight)
        assert found.value[0] == pytest.approx(np.log(0.1 * growth / 0.9 / (1 - growth)), abs=1e-10)
    else:
        with pytest.raises(
            ValueError, match=r"spectral radius of M = 0\.9 · 1\.\d+ is not below 1"
        ):
            solve_posterior(*arguments, terminal=np.zeros(1, dtype=bool), discount=0.9)


def test_infinite_evidence_of_a_periodic_class_that_others_cannot_reach() -> None:
    # 0 -> end; 1 <-> 2 for ever, worth e^2 and e^-1: its radius is e^(1/2), periodic.
    matrix = csr_array(np.array([[0, 0, 0, 1.0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]))
    terminal = np.array([False, False, False, True])
    with pytest.raises(ValueError, match=r"0\.99 · 1\.6487"):
        solve_posterior(
            matrix, np.array([5.0, 2.0, -1.0]), np.zeros((4, 1)), terminal=terminal, discount=0.99
        )


def cliff(temperature: float) -> FixedPoint:
    """Sutton and Barto's cliff, 4 by 12, example 6.6."""
    states = 48
    transition, reward = np.zeros((states, 4, states)), np.full((states, 4), -1.0)
    for state in range(states):
        row, column = divmod(state, 12)
        for action, (down, right) in enumerate([(-1, 0), (0, 1), (1, 0), (0, -1)]):
            x, y = min(max(row + down, 0), 3), min(max(column + right, 0), 11)
            target = 12 * x + y
            if x == 3 and 0 < y < 11:
                target, reward[state, action] = 36, -100.0
            transition[state, action, target] = 1
    terminal = np.arange(states) == 47
    return control(transition, reward, terminal=terminal, discount=1.0, temperature=temperature)


def test_cliff_without_discount_is_worth_exactly_minus_thirteen() -> None:
    found = cliff(0.0)
    assert found.value[36] == -13
    assert found.error_bound <= 1e-11
    assert found.converged


def test_soft_cliff_without_discount_is_a_linear_system_in_exp_of_the_value() -> None:
    found = cliff(1.0)
    assert found.residual <= 1e-12
    assert found.error_bound <= 1e-9
    # Deterministic moves: control and posterior agree, and 13 steps of the best path bound V.
    assert -13 - 13 * np.log(4) <= found.value[36] <= -13


def test_without_discount_every_state_must_be_able_to_end() -> None:
    transition = np.zeros((3, 1, 3))
    transition[0, 0, 2] = transition[1, 0, 1] = 1
    with pytest.raises(ValueError, match="state 1 can never reach a terminal state"):
        control(
            transition,
            np.zeros((3, 1)),
            terminal=np.array([False, False, True]),
            discount=1.0,
            temperature=0.0,
        )


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_loop_that_pays_is_refused_without_discount(temperature: float) -> None:
    transition = np.zeros((2, 2, 2))
    transition[0, 0, 0] = transition[0, 1, 1] = 1
    arguments = {"terminal": np.array([False, True]), "temperature": temperature}
    with pytest.raises(ValueError, match="a loop through state 0 pays"):
        control(transition, np.array([[1.0, 0], [0, 0]]), discount=1.0, **arguments)
    costly = control(transition, np.array([[-1.0, 0], [0, 0]]), discount=1.0, **arguments)
    stay, leave = 0.5 * np.exp(-1 / 0.5), 0.5
    exact = 0.5 * np.log(leave / (1 - stay)) if temperature else 0.0
    assert costly.value[0] == pytest.approx(exact, abs=1e-14)


def free_loops(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random steps that cost or pay, rings that may be walked for nothing, and a last state."""
    rng = np.random.default_rng(seed)
    states, actions = int(rng.integers(3, 12)), int(rng.integers(2, 5))
    transition = np.zeros((states, actions, states))
    reward = np.round(rng.normal(size=(states, actions)) - 1.2, 1)
    for state in range(states - 1):
        for action in range(actions):
            near = rng.choice(states, rng.integers(1, 4), replace=False)
            transition[state, action, near] = rng.dirichlet(np.ones(near.size))
    for _ in range(rng.integers(1, 4)):
        ring = rng.choice(states - 1, rng.integers(1, min(4, states)), replace=False)
        for here, following in zip(ring, np.roll(ring, -1), strict=True):
            action = rng.integers(0, actions - 1)
            stays = rng.random()
            transition[here, action] = reward[here, action] = 0
            transition[here, action, following] += 1 - stays
            transition[here, action, here] += stays
    transition[:, -1] *= 0.7
    transition[:, -1, -1] += 0.3
    reward[rng.random(states) < 0.5, -1] = 1.0
    transition[-1] = reward[-1] = 0
    return transition, reward, np.arange(states) == states - 1


def least_supersolution(
    transition: np.ndarray, reward: np.ndarray, terminal: np.ndarray
) -> np.ndarray | None:
    """V of the best policy that ends, without discount: the linear program's; None if infinite."""
    live = np.flatnonzero(~terminal)
    rows = (transition - np.eye(terminal.size)[:, None])[live][:, :, live]
    solved = linprog(
        np.ones(live.size),
        A_ub=rows.reshape(-1, live.size),
        b_ub=-reward[live].ravel(),
        bounds=(None, None),
        method="highs-ds",
    )
    if solved.status == 2:
        return None
    assert solved.status == 0
    value = np.zeros(terminal.size)
    value[live] = solved.x
    return value


@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, 150), marks=pytest.mark.slow)])
def test_waiting_for_nothing_is_certified_and_loops_that_pay_are_refused(seeds: range) -> None:
    refused = 0
    for seed in seeds:
        transition, reward, terminal = free_loops(seed)
        exact = least_supersolution(transition, reward, terminal)
        arguments = {"terminal": terminal, "discount": 1.0, "temperature": 0.0}
        if exact is None:
            refused += 1
            with pytest.raises(ValueError, match="a loop through state"):
                control(transition, reward, **arguments)
            continue
        found = control(transition, reward, **arguments)
        assert found.error_bound <= 1e-10
        assert found.residual <= 1e-13
        # The program's own tolerance is 1e-9 or so.
        assert np.abs(found.value - exact).max() <= found.error_bound + 1e-8
    assert len(seeds) / 30 < refused < len(seeds) / 2


def test_what_ends_is_best_where_waiting_for_ever_would_cost_less() -> None:
    transition = np.zeros((2, 2, 2))
    transition[0, 0, 0] = transition[0, 1, 1] = 1
    for cost in (0.0, 1.0):
        found = control(
            transition,
            np.array([[0, -cost], [0, 0]]),
            terminal=np.array([False, True]),
            discount=1.0,
            temperature=0.0,
        )
        assert found.value[0] == -cost
        assert found.error_bound <= 1e-13


def there_and_back(
    there: float, back: float, *, waits: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """0 <-> 1, and 1 ends for a reward of five; state 0 may also wait, for nothing or for five."""
    transition = np.zeros((3, 2, 3))
    transition[0, 0, 1] = transition[1, 0, 0] = transition[1, 1, 2] = 1
    transition[0, 1, 0 if waits else 2] = 1
    reward = np.array([[there, 0 if waits else -5], [back, 5], [0, 0]])
    return transition, reward, np.array([False, False, True])


def test_certificate_that_leaves_free_actions_in_or_takes_others_for_free_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = {"discount": 1.0, "temperature": 0.0}
    transition, reward, terminal = there_and_back(-1.0, 0.0, waits=True)
    right = control(transition, reward, terminal=terminal, **arguments)
    assert right.value.tolist() == [4, 5, 0]
    assert right.error_bound <= 1e-13
    with monkeypatch.context() as patch:
        patch.setattr(
            fixed_point,
            "end_components",
            lambda transition, free: (np.arange(free.shape[0]), np.zeros_like(free)),
        )
        left_in = control(transition, reward, terminal=terminal, **arguments)
        assert left_in.error_bound == np.inf
    with monkeypatch.context() as patch:
        patch.setattr(
            fixed_point,
            "end_components",
            lambda transition, free: end_components(transition, ~terminal[:, None] | free),
        )
        costs = control(transition, reward, terminal=terminal, **arguments)
        assert np.abs(costs.value - [4, 5, 0]).max() > costs.error_bound + 0.5


def test_steps_that_pay_each_other_back_are_solved_but_not_certified() -> None:
    """No step of the loop is free, though all of it is: nothing is collapsed."""
    for waits in (False, True):
        transition, reward, terminal = there_and_back(-1.0, 1.0, waits=waits)
        found = control(transition, reward, terminal=terminal, discount=1.0, temperature=0.0)
        np.testing.assert_allclose(found.value, [4, 5, 0], atol=1e-14)
        assert found.error_bound == np.inf
        assert not found.converged


@pytest.mark.parametrize("seed", range(60))
def test_end_components_are_what_a_closure_of_the_graph_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    states, actions = int(rng.integers(1, 9)), int(rng.integers(1, 4))
    edges = rng.random((states, actions, states)) < rng.choice([0.15, 0.3, 0.5])
    free = (rng.random((states, actions)) < 0.8) & edges.any(axis=2)
    component, inside = end_components(
        csr_array(edges.reshape(-1, states).astype(float)), free.copy()
    )
    kept, before = free, None
    while before is None or (kept != before).any():
        near = np.eye(states) + (edges & kept[..., None]).any(axis=1)
        reach = np.linalg.matrix_power(near, states) > 0
        both = reach & reach.T
        before, kept = kept, kept & ~(edges & ~both[:, None]).any(axis=2)
    assert (inside == kept).all()
    assert ((component[:, None] == component) == both).all()


def test_ends_are_certified_near_discount_one() -> None:
    # A slippery corridor whose answer does not depend on 1/(1 - discount).
    states = 30
    transition = np.zeros((states, 2, states))
    for state in range(states - 1):
        transition[state, 0, max(state - 1, 0)] = 1
        transition[state, 1, state + 1] = 0.8
        transition[state, 1, max(state - 1, 0)] = 0.2
    terminal = np.arange(states) == states - 1
    reward = np.where(terminal[:, None], 0, -np.ones((states, 2)))
    for discount in (1.0, 1 - 1e-12):
        found = control(transition, reward, terminal=terminal, discount=discount, temperature=0.0)
        assert found.error_bound <= 1e-10
        assert found.converged


def large(kind: str, states: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    transition = np.zeros((states, 2, states))
    here = np.arange(states)
    side = int(states**0.5)
    for action in range(2):
        for _ in range(3):
            step = rng.integers(-3, 4, states)
            target = {
                "ring": (here + step) % states,
                "random": rng.integers(0, states, states),
                "sheet": (here + rng.choice([-side, -1, 0, 1, side], states)) % states,
                "maze": np.clip(here + rng.choice([-side, -1, 1, side], states), 0, states - 1),
            }[kind]
            transition[here, action, target] += rng.random(states) + 0.1
    transition /= transition.sum(axis=2, keepdims=True)
    terminal = (here == states - 1) & (kind == "maze")
    return transition, rng.random((states, 2)) - (kind == "maze"), terminal


@pytest.mark.parametrize("kind", ["ring", "random", "sheet", "maze"])
@pytest.mark.parametrize("states", [400, 1600])
@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_every_method_agrees_with_dense_policy_iteration(
    kind: str, states: int, temperature: float
) -> None:
    discount = 0.999
    transition, reward, terminal = large(kind, states)
    transition[terminal] = 0
    found = control(
        transition, reward, terminal=terminal, discount=discount, temperature=temperature
    )
    value = np.zeros(states)
    for _ in range(60):
        q = reward + discount * transition @ value
        top = q.max(axis=1, keepdims=True)
        if temperature:
            policy = np.exp((q - top) / temperature) / 2
            backed_up = top[:, 0] + temperature * np.log(policy.sum(axis=1))
            policy /= policy.sum(axis=1, keepdims=True)
        else:
            policy, backed_up = (q == top) / (q == top).sum(axis=1, keepdims=True), top[:, 0]
        change = np.where(terminal, 0, backed_up - value)
        if np.abs(change).max() <= 1e-12:
            break
        system = np.eye(states) - discount * np.einsum("sat,sa->st", transition, policy)
        value = value + np.linalg.solve(system, change)
    else:
        pytest.fail("the oracle did not converge")
    assert found.converged
    assert found.error_bound <= 1e-10 * np.abs(value).max()
    # The oracle itself is only good to rounding times the horizon.
    assert np.abs(found.value - value).max() <= found.error_bound + 1e-9


def test_a_closed_ring_beyond_small_sizes_is_certified() -> None:
    states = 6000
    rng = np.random.default_rng(0)
    target = (np.arange(states)[:, None, None] + rng.integers(-5, 6, (states, 2, 4))) % states
    weight = rng.dirichlet(np.ones(4), (states, 2))
    indptr = np.arange(0, states * 8 + 1, 4)
    matrix = csr_array((weight.ravel(), target.ravel(), indptr), shape=(2 * states, states))
    reward = rng.random((states, 2))
    for temperature in (0.0, 0.1):
        found = solve_control(
            matrix,
            reward,
            np.log(np.full((states, 2), 0.5)),
            terminal=np.zeros(states, dtype=bool),
            discount=0.9999,
            temperature=temperature,
            absolute=1e-6,
        )
        assert found.error_bound <= 1e-6
        q = reward + 0.9999 * (matrix @ found.value).reshape(states, 2)
        top = q.max(axis=1)
        if temperature:
            top = top + 0.1 * np.log(np.exp((q - top[:, None]) / 0.1).mean(axis=1))
        assert np.abs(top - found.value).max() <= 1e-6 * 1e-4 + 1e-11


def random_steps(states: int) -> tuple[csr_array, np.ndarray, np.ndarray]:
    """Eight successors anywhere."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, states, states * 16)
    weight = rng.dirichlet(np.full(8, 5.0), states * 2).ravel()
    starts = np.arange(0, states * 16 + 1, 8)
    matrix = csr_array((weight, target, starts), shape=(2 * states, states))
    return matrix, rng.random((states, 2)), np.zeros(states, dtype=bool)


def lattice(side: int, dimensions: int, *, ends: bool) -> tuple[csr_array, np.ndarray, np.ndarray]:
    """Moves along axes of a box, that slip to a neighbour; one corner may be the goal."""
    states = side**dimensions
    rng = np.random.default_rng(0)
    place = np.array(np.unravel_index(np.arange(states), (side,) * dimensions))
    rows = []
    for axis in range(dimensions):
        for sign in (-1, 1):
            near = place.copy()
            near[axis] = np.clip(near[axis] + sign, 0, side - 1)
            slip = place.copy()
            slip[(axis + 1) % dimensions] = np.clip(slip[(axis + 1) % dimensions] + 1, 0, side - 1)
            rows.append([near, slip])
    target = np.ravel_multi_index(tuple(np.moveaxis(rows, 2, 0)), (side,) * dimensions)
    target = np.moveaxis(target, 2, 0)
    actions = 2 * dimensions
    live = states - ends
    starts = np.minimum(np.arange(states * actions + 1), live * actions) * 2
    weight = np.tile([0.8, 0.2], live * actions)
    matrix = csr_array((weight, target[:live].ravel(), starts), shape=(states * actions, states))
    terminal = np.arange(states) >= live
    reward = np.where(terminal[:, None], 0.0, rng.random((states, actions)) - ends)
    return matrix, reward, terminal


@pytest.mark.parametrize("temperature", [0.0, 0.1])
@pytest.mark.parametrize(
    ("model", "discount"),
    [
        pytest.param(random_steps(5000), 0.99, id="random"),
        pytest.param(lattice(70, 2, ends=True), 0.99, id="sheet with an end"),
        pytest.param(lattice(17, 3, ends=True), 1.0, id="box with an end, no discount"),
        pytest.param(lattice(17, 3, ends=False), 0.999, id="closed box"),
    ],
)
def test_large_models_of_every_shape_agree_with_value_iteration(
    model: tuple[csr_array, np.ndarray, np.ndarray], discount: float, temperature: float
) -> None:
    matrix, reward, terminal = model
    found = solve_control(
        matrix,
        reward,
        np.full(reward.shape, -np.log(reward.shape[1])),
        terminal=terminal,
        discount=discount,
        temperature=temperature,
        absolute=1e-6,
        relative=0.0,
    )
    assert found.error_bound <= 1e-6
    value = found.value
    for _ in range(300):
        q = reward + discount * (matrix @ value).reshape(reward.shape)
        top = q.max(axis=1)
        if temperature:
            weight = np.exp((q - top[:, None]) / temperature)
            top = top + temperature * np.log(weight.mean(axis=1))
        value = np.where(terminal, 0, top)
    assert np.abs(value - found.value).max() <= found.error_bound * (1 + discount**300) + 1e-11
    if matrix.indices.size == 80_000:
        assert found.backups == found.iterations + 1, "mixing needs no product with a policy"


def test_factors_are_used_again_near_the_fixed_point() -> None:
    states = 1000
    here = np.arange(states)
    neighbours = np.concatenate([(here + 1) % states, (here - 1) % states])
    graph = csr_array((np.full(2 * states, 0.4995), (np.tile(here, 2), neighbours)))
    evaluate = PolicyEvaluation(graph, discount=0.999, closed=True)
    right = np.random.default_rng(0).normal(size=states)
    while evaluate.mixing:
        evaluate(lambda: graph, right, accuracy=0.05)
    assert evaluate.direct
    evaluate(lambda: graph, right, accuracy=0.05)
    near = evaluate(lambda: pytest.fail("J is not needed"), right / 1000, accuracy=0.05)
    np.testing.assert_allclose(near - graph @ near, right / 1000, atol=1e-12)
    slower = evaluate(lambda: 0.5 * graph, right / 2000, accuracy=0.05)
    np.testing.assert_allclose(slower - 0.5 * graph @ slower, right / 2000, atol=1e-12)


def test_backup_is_a_contraction_by_the_discount_and_monotone() -> None:
    transition, reward, terminal = large("random", 400)
    operator = ControlBackup(
        csr_array(transition.reshape(-1, 400)),
        reward,
        np.log(np.full((400, 2), 0.5)),
        transition.sum(axis=2),
        terminal=terminal,
        discount=0.9,
        temperature=0.1,
    )
    rng = np.random.default_rng(1)
    low = rng.normal(size=400)
    high = low + rng.random(400)
    below, above = operator(low), operator(high)
    assert (above >= below).all()
    assert np.abs(above - below).max() <= 0.9 * np.abs(high - low).max() + 1e-14
    np.testing.assert_allclose(operator(low + 3), below + 2.7, atol=1e-13)


def test_degenerate_models() -> None:
    one = control(np.ones((1, 1, 1)), np.array([[2.0]]), discount=0.5, temperature=1.0)
    assert one.value[0] == 4
    myopic = control(np.ones((1, 3, 1)), np.array([[1.0, 2, 3]]), discount=0.0, temperature=0.0)
    assert myopic.value[0] == 3
    over = control(
        np.zeros((2, 2, 2)),
        np.full((2, 2), 5.0),
        terminal=np.ones(2, dtype=bool),
        discount=1.0,
        temperature=0.3,
    )
    assert (over.value == 0).all()
    assert over.converged
    nothing = solve_posterior(
        csr_array((4, 2)), np.zeros(0), np.zeros((2, 2)), terminal=np.ones(2, bool), discount=1.0
    )
    assert nothing.value.dtype == np.float64
    assert (nothing.value == 0).all()
    forbidden = control(
        np.ones((1, 2, 1)),
        np.array([[1.0, np.nan]]),
        prior=np.array([[1.0, 0.0]]),
        discount=0.5,
        temperature=0.7,
    )
    assert forbidden.value[0] == 2


def test_inputs_are_left_as_they_were_and_progress_is_told() -> None:
    transition, reward, terminal = large("sheet", 1600)
    before = reward.copy()
    told: list[tuple[int, float]] = []
    control(
        transition,
        reward,
        terminal=terminal,
        discount=0.9999,
        temperature=0.1,
        progress=lambda iterations, bound: told.append((iterations, bound)),
    )
    assert (reward == before).all()
    assert all(bound > 0 for _, bound in told)
    assert [n for n, _ in told] == sorted(n for n, _ in told)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": np.zeros((2, 3))}, r"reward: expected shape \(S, A\) = \(2, 2\)"),
        ({"reward": np.array([[0, np.nan], [0, 0]])}, r"reward: .* at index \(0, 1\)"),
        ({"discount": 1.5}, "discount: expected a number in"),
        ({"temperature": -1.0}, "temperature: expected a finite number >= 0, got -1"),
        ({"log_prior": np.zeros((2, 2))}, "log_prior: .* state 0 .* got 2"),
        ({"terminal": np.zeros(3, dtype=bool)}, "terminal: expected 2 booleans"),
        ({"terminal": np.array([True, False])}, "row of state 0, action 0 to sum to 0, got 1"),
        ({"transition": csr_array(np.eye(2))}, r"transition: expected shape \(S·A, S\) = \(4, 2\)"),
        ({"transition": csr_array(0.4 * np.ones((4, 2)))}, "sum to 1, got 0.8"),
        (
            {"transition": csr_array(np.array([[2.0, -1], [1, 0], [1, 0], [1, 0]]))},
            "expected probabilities >= 0",
        ),
    ],
)
def test_errors_say_what_came_and_where(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "transition": csr_array(0.5 * np.ones((4, 2))),
        "reward": np.zeros((2, 2)),
        "log_prior": np.log(np.full((2, 2), 0.5)),
        "terminal": np.zeros(2, dtype=bool),
        "discount": 0.9,
        "temperature": 0.1,
    } | change
    with pytest.raises(ValueError, match=message):
        solve_control(**arguments)  # type: ignore[arg-type]


def test_waiting_that_hardly_ever_ends_does_not_spoil_the_value() -> None:
    # Newton's policies wait so long here that their linear systems are singular but for rounding.
    desc = generate_random_map(60, 0.9, 1)
    model = load_target("FrozenLake-v1", discount=1.0, env_kwargs={"desc": desc})
    found = infer(model, Exact(0.0))
    reward, terminal = model.expected_reward().numpy(), model.is_terminal.numpy()
    value = np.zeros(model.num_states)
    for _ in range(25_000):
        value = np.where(terminal, 0.0, (reward + (model.csr @ value).reshape(reward.shape)).max(1))
    np.testing.assert_allclose(found.v.numpy(), value, atol=1e-12)
