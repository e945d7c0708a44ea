"""The exact solution of linear-Gaussian models, against `linear_gaussian_oracles`, SciPy's Riccati
solver and finite differences.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete
from linear_gaussian_oracles import (
    PRIOR,
    SINGULAR,
    close,
    endless_scalar,
    finite_model,
    joint_gaussian,
    objective_of,
    random_model,
    rolled_out,
    stationary_scalar,
    value_by_quadrature,
)
from scipy.linalg import solve_discrete_are
from torch import Tensor

from inference_rl import (
    linear_gaussian_backup,
    linear_gaussian_evidence,
    riccati,
    riccati_stationary,
)
from inference_rl.environment import EnvironmentModel
from inference_rl.inference import InferenceResult, infer
from inference_rl.inference.exact import Exact
from inference_rl.linear_gaussian import LinearGaussianModel
from inference_rl.linear_gaussian_backup import (
    back_up,
    expected_message,
    given_evidence,
    log_det_one_plus,
)
from inference_rl.models.double_integrator import DoubleIntegrator
from inference_rl.riccati import LinearGaussianSolution, solve_linear_gaussian

# --- control, without a horizon -------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("temperature", [0.0, 1e-6, 0.5, 1e9])
@pytest.mark.parametrize("discount", [0.0, 0.9, 0.9999])
def test_stationary_matches_scipy(seed: int, temperature: float, discount: float) -> None:
    model = random_model(seed, discount=discount)
    solution = solve_linear_gaussian(model, temperature)
    root = math.sqrt(discount)
    A, B, Q, R, N = (
        x.numpy() for x in (model.A, model.B, model.state_cost, model.action_cost, model.cross_cost)
    )
    P = (
        solve_discrete_are(root * A, root * B, Q, R, s=N)
        if discount
        else Q - N @ np.linalg.solve(R, N.T)
    )
    curvature = R + discount * B.T @ P @ B
    close(-solution.v.quadratic, P)
    close(solution.policy.gain, -np.linalg.solve(curvature, N.T + discount * B.T @ P @ A))
    close(solution.policy.covariance, temperature / 2 * np.linalg.inv(curvature))
    assert solution.residual <= 1e-12 * solution.v(model.initial_mean).abs() + 1e-12
    check_relations(model, solution)


def check_relations(model: LinearGaussianModel, solution: LinearGaussianSolution) -> None:
    """Identities 2 and 3: what the numbers of one solution say of each other."""
    v = solution.v if solution.v.quadratic.dim() == 2 else solution.v.at(0)
    expected = v(model.initial_mean) + (v.quadratic * model.initial_covariance).sum()
    scale = max(1.0, abs(expected.item()))
    close(solution.objective / scale, expected / scale, 1e-9)
    if model.prior_covariance is None:
        close(solution.objective_entropy_form / scale, expected / scale, 1e-9)
    if solution.temperature > 0:
        soft = solution.expected_return + solution.temperature * solution.entropy
        close(solution.objective_entropy_form / scale, soft / scale)
    else:
        assert solution.entropy == -torch.inf
        assert solution.objective == solution.expected_return


@pytest.mark.parametrize("prior", [{}, {"prior_mean": [0.4], "prior_covariance": [[0.5]]}])
def test_stationary_message_solves_the_soft_bellman_equation(prior: dict[str, Any]) -> None:
    model = random_model(5, n=1, m=1, **prior)
    check_bellman(model, solve_linear_gaussian(model, 0.7))


def check_bellman(model: LinearGaussianModel, solution: LinearGaussianSolution) -> None:
    temperature = solution.temperature.item()
    for state in torch.tensor([[-1.0], [0.0], [2.0]], dtype=torch.float64):
        for t in [None] if model.horizon is None else range(model.horizon):
            after = solution.v if t is None else solution.v.at(t + 1)
            value, mean, variance = value_by_quadrature(model, temperature, after, state)
            close(solution.v(state, t=t), value)
            action = solution.policy(state, t)
            close(action.mean[0], mean)
            close(action.covariance_matrix[0, 0], variance)
            point = torch.tensor([0.3], dtype=torch.float64)
            advantage = (solution.q(state, point, t=t) - solution.v(state, t=t)) / temperature
            if model.prior_covariance is not None:
                advantage = advantage + model.action_prior(state).log_prob(point)
            close(action.log_prob(point), advantage)


@pytest.mark.parametrize("prior", [{}, PRIOR])
@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_stationary_is_the_limit_of_long_horizons(
    prior: dict[str, Any], temperature: float
) -> None:
    stationary = solve_linear_gaussian(random_model(1, discount=0.9, **prior), temperature)
    model = random_model(1, discount=0.9, horizon=400, **prior)
    finite = solve_linear_gaussian(model, temperature)
    close(finite.policy.gain[0], stationary.policy.gain)
    close(finite.policy.offset[0], stationary.policy.offset)
    for name in ("quadratic", "linear", "constant"):
        close(getattr(finite.v, name)[0], getattr(stationary.v, name))
        close(getattr(finite.q, name)[0], getattr(stationary.q, name))
    for name in ("objective", "objective_entropy_form", "expected_return"):
        close(getattr(finite, name), getattr(stationary, name))
    if temperature:
        close(finite.entropy, stationary.entropy)
    check_relations(model, finite)


def test_regret_is_a_divergence_to_the_optimal_policy() -> None:
    """Identity 4: J(π*) − J(π) = α E_π Σ γ^t KL(π ‖ π*), with one kind of deviation at a time."""
    temperature, model = 0.6, random_model(2)
    best = solve_linear_gaussian(model, temperature)
    gain, offset, covariance = (
        x.numpy() for x in (best.policy.gain, best.policy.offset, best.policy.covariance)
    )
    close(objective_of(model, gain, offset, covariance, temperature), best.objective.item())
    nudge = np.array([0.3, -0.4])
    regret = best.objective - objective_of(model, gain, offset + nudge, covariance, temperature)
    each = nudge @ np.linalg.solve(covariance, nudge) / 2
    close(regret, temperature * each / (1 - model.discount))
    regret = best.objective - objective_of(model, gain, offset, 1.5 * covariance, temperature)
    each = (1.5 - 1 - math.log(1.5)) * len(covariance) / 2
    close(regret, temperature * each / (1 - model.discount))


def test_reward_and_temperature_scale_together() -> None:
    model, scale = random_model(3), 7.0
    costs = ("state_cost", "action_cost", "cross_cost", "state_linear", "action_linear")
    scaled = random_model(3, **{k: getattr(model, k) * scale for k in (*costs, "reward_offset")})
    one, other = solve_linear_gaussian(model, 0.5), solve_linear_gaussian(scaled, 0.5 * scale)
    close(other.objective, scale * one.objective)
    close(other.policy.covariance, one.policy.covariance)


@pytest.mark.parametrize("prior", [{}, PRIOR])
@pytest.mark.parametrize("horizon", [None, 6])
def test_derivative_in_temperature_is_the_entropy(
    prior: dict[str, Any], horizon: int | None
) -> None:
    """Identity 14, and its form for a prior: dJ/dα = −Σ γ^t KL(π ‖ ρ)."""
    temperature = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    solution = solve_linear_gaussian(random_model(4, horizon=horizon, **prior), temperature)
    (slope,) = torch.autograd.grad(solution.objective, temperature, retain_graph=True)
    if not prior:
        close(slope, solution.entropy)
    close(slope, (solution.objective - solution.expected_return) / temperature)


# --- control, without a horizon or a discount -----------------------------------------------------

DETERMINISTIC: dict[str, Any] = {"discount": 1.0, "noise_covariance": None}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prior", [{}, PRIOR])
def test_undiscounted_regulator_matches_scipy(seed: int, prior: dict[str, Any]) -> None:
    at_zero = dict.fromkeys(("offset", "state_linear", "action_linear"))
    prior = {k: 0 * np.array(x) if k == "prior_mean" else x for k, x in prior.items()}
    model = random_model(seed, **DETERMINISTIC, **at_zero, reward_offset=0.0, **prior)
    solution = solve_linear_gaussian(model, 0.0)
    A, B, Q, R, N = (
        x.numpy() for x in (model.A, model.B, model.state_cost, model.action_cost, model.cross_cost)
    )
    P = solve_discrete_are(A, B, Q, R, s=N)
    close(-solution.v.quadratic, P, 1e-9)
    close(solution.policy.gain, -np.linalg.solve(R + B.T @ P @ B, N.T + B.T @ P @ A), 1e-9)
    close(solution.v.linear, np.zeros(3), 1e-12)
    close(solution.v.constant, 0.0, 1e-12)
    assert np.linalg.norm(P + solution.v.quadratic.numpy(), 2) <= solution.error_bound < 1e-9
    check_relations(model, solution)


def to_rest(
    A: Tensor, B: Tensor, Q: Tensor, R: Tensor, rest: Tensor, action: Tensor, slope: Tensor
) -> LinearGaussianModel:
    """A regulator to `rest`, where it is held by `action`, plus the reward slope · (s' − s).

    What that adds telescopes: V(s) = −(s − rest)'P(s − rest) + slope · (rest − s).
    """
    offset = rest - A @ rest - B @ action
    return LinearGaussianModel(
        A,
        B,
        state_cost=Q,
        action_cost=R,
        offset=offset,
        state_linear=-2 * Q @ rest - (A.mT @ slope - slope),
        action_linear=-2 * R @ action - B.mT @ slope,
        reward_offset=rest @ Q @ rest + action @ R @ action - slope @ offset,
        initial_mean=[1.0, -2.0][: len(A)],
        initial_covariance=0.3 * torch.eye(len(A)),
    )


def rest_terms(seed: int, n: int, m: int) -> list[Tensor]:
    base, generator = random_model(seed, n=n, m=m), torch.Generator().manual_seed(seed)
    point = [torch.randn(k, generator=generator, dtype=torch.float64) for k in (n, m, n)]
    return [base.A, base.B, base.state_cost, base.action_cost, *point]


@pytest.mark.parametrize("seed", range(6))
def test_undiscounted_regulator_away_from_zero(seed: int) -> None:
    terms = rest_terms(seed, n=2, m=1)
    model = to_rest(*terms)
    solution = solve_linear_gaussian(model, 0.0)
    A, B, Q, R, rest, action, slope = (x.numpy() for x in terms)
    P = solve_discrete_are(A, B, Q, R)
    close(-solution.v.quadratic, P, 1e-9)
    close(solution.v.linear, 2 * P @ rest - slope, 1e-9)
    close(solution.v.constant, -rest @ P @ rest + slope @ rest, 1e-9)
    close(solution.policy(terms[4]).mean, action, 1e-9)
    check_relations(model, solution)
    assert solution.residual <= solution.error_bound < 1e-8


@pytest.mark.parametrize("stiff", [2.0**-20, 1.0, 2.0**20])
@pytest.mark.parametrize("slope", [0.0, 5.0])
def test_undiscounted_error_bound_holds_in_forty_digits(stiff: float, slope: float) -> None:
    # All of it exact in binary, the offsets too.
    numbers = [[[1.25]], [[0.5]], [[stiff]], [[1.0]], [3.0], [-1.0], [slope]]
    model = to_rest(*(torch.tensor(x, dtype=torch.float64) for x in numbers))
    solution = solve_linear_gaussian(model, 0.0)
    with mpmath.workdps(40):
        # P = Q + A²PR / (R + B²P): B²P² + (R − A²R − QB²)P − QR = 0
        half = (mpmath.mpf(-0.5625) - mpmath.mpf(stiff) / 4) * 2
        P = -half + mpmath.sqrt(half**2 + 4 * mpmath.mpf(stiff))
        for state in (0.0, 3.0, -30.0):
            exact = -P * mpmath.mpf(state - 3.0) ** 2 + slope * mpmath.mpf(3.0 - state)
            a, b, c = (
                mpmath.mpf(x.item())
                for x in (solution.v.quadratic, solution.v.linear, solution.v.constant)
            )
            found = a * mpmath.mpf(state) ** 2 + b * mpmath.mpf(state) + c
            assert abs(found - exact) <= solution.error_bound * (1 + state**2)
    assert solution.error_bound <= 1e-8 * max(1.0, float(P))


def test_derivatives_of_the_undiscounted_regulator() -> None:
    inputs = [x.detach().clone().requires_grad_() for x in rest_terms(1, n=2, m=1)]

    def function(A: Tensor, B: Tensor, Q: Tensor, R: Tensor, *point: Tensor) -> Tensor:
        model = to_rest(A, B, (Q + Q.mT) / 2, R, *point)
        solution = solve_linear_gaussian(model, 0.0)
        outputs = [solution.objective, solution.v.quadratic, solution.v.linear]
        outputs += [solution.v.constant, solution.policy.gain, solution.policy.offset]
        everything = torch.cat([x.flatten() for x in outputs])
        return (everything * torch.linspace(0.5, 1.5, len(everything)).double()).sum()

    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-5, rtol=1e-4)
    assert torch.autograd.gradgradcheck(
        function, inputs, eps=1e-6, atol=1e-4, rtol=1e-3, fast_mode=True
    )


def test_undiscounted_regulator_as_a_result(tmp_path: Path) -> None:
    result = infer(to_rest(*rest_terms(0, n=2, m=1)), Exact(temperature=0.0))
    summary = result.summary()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["steps"] is None
    close(result.objective, result.details.expected_return)
    result.save(tmp_path / "run")
    assert InferenceResult.load(tmp_path / "run").objective == result.objective.item()


# --- control, with a horizon ----------------------------------------------------------------------


@pytest.mark.parametrize("prior", [{}, {"prior_mean": [0.4], "prior_covariance": [[0.5]]}])
@pytest.mark.parametrize("discount", [1.0, 0.8])
def test_horizon_matches_quadrature(prior: dict[str, Any], discount: float) -> None:
    model = random_model(6, n=1, m=1, horizon=3, discount=discount, **prior)
    solution = solve_linear_gaussian(model, 0.4)
    check_bellman(model, solution)
    check_relations(model, solution)
    assert solution.v(torch.zeros(1), t=3) == 0


def test_ten_thousand_steps() -> None:
    model = random_model(0, n=2, m=1, discount=1.0, horizon=10_000)
    solution = solve_linear_gaussian(model, 0.5)
    check_relations(model, solution)
    close(solution.policy.gain[0], solution.policy.gain[5000], 1e-12)
    assert torch.linalg.eigvalsh(-solution.v.quadratic[:-1]).min() > 0
    # γ → 1: all but the constant, which is what a step is worth, agrees with the discounted limit.
    limit = solve_linear_gaussian(random_model(0, n=2, m=1, discount=1 - 1e-9), 0.5)
    close(solution.v.quadratic[0], limit.v.quadratic, 1e-7)
    per_step = solution.v.constant[0] - solution.v.constant[1]
    close(per_step, limit.v.constant * 1e-9, 1e-6)
    assert solution.error_bound < 1e-6


@pytest.mark.parametrize("prior", [{}, PRIOR])
def test_temperatures_from_tiny_to_huge(prior: dict[str, Any]) -> None:
    regulator = solve_linear_gaussian(finite_model(7), 0.0)
    for temperature in 10.0 ** np.arange(-6, 10, 3):
        model = finite_model(7, **prior)
        solution = solve_linear_gaussian(model, temperature)
        check_relations(model, solution)
        check_posterior(model, solve_linear_gaussian(model, temperature, "posterior"))
        if not prior:
            close(solution.policy.gain, regulator.policy.gain)
    if prior:  # nothing is left but the prior
        close(solution.policy.gain, np.zeros((4, 2, 3)), 1e-7)
        close(solution.policy.offset, np.tile(PRIOR["prior_mean"], (4, 1)), 1e-7)
        close(solution.policy.covariance, np.tile(PRIOR["prior_covariance"], (4, 1, 1)), 1e-7)
    cold = solve_linear_gaussian(finite_model(7, **prior), 1e-6)
    close(cold.expected_return, regulator.expected_return, 1e-5)


# --- posterior ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [{}, PRIOR])
@pytest.mark.parametrize("noise", [np.diag([0.3, 0.1, 0.6]), SINGULAR, np.zeros((3, 3))])
@pytest.mark.parametrize("start", [np.eye(3), SINGULAR, np.zeros((3, 3))])
def test_posterior_matches_one_gaussian_integral(
    prior: dict[str, Any], noise: np.ndarray, start: np.ndarray
) -> None:
    model = finite_model(8, noise_covariance=noise, initial_covariance=start, **prior)
    solution = solve_linear_gaussian(model, 0.9, "posterior")
    check_posterior(model, solution)
    assert solution.gap is not None
    terms = (solution.gap.start, solution.gap.policy, solution.gap.dynamics)
    control = solve_linear_gaussian(model, 0.9)
    if not noise.any():  # a policy needs no luck if only the start is random
        close(terms[1:], (0.0, 0.0), 1e-12)
        close(solution.policy.gain, control.policy.gain)
    else:
        assert terms[1] > 1e-3
        assert terms[2] > 1e-3
        assert solution.objective < control.objective
    assert (terms[0] > 1e-3) == bool(start.any())


def test_posterior_of_a_long_horizon_begins_stationary() -> None:
    one, other = (
        solve_linear_gaussian(DoubleIntegrator(discount=1.0, horizon=T), 0.5, "posterior")
        for T in (300, 2000)
    )
    assert one.posterior_dynamics is not None
    assert other.posterior_dynamics is not None
    for name in ("gain", "offset", "covariance"):
        close(getattr(one.policy, name)[0], getattr(other.policy, name)[0], 1e-8)
        close(getattr(other.policy, name)[1000], getattr(other.policy, name)[0], 1e-8)
    for name in ("A", "B", "offset", "noise_covariance"):
        steady = getattr(other.posterior_dynamics, name)
        close(getattr(one.posterior_dynamics, name)[0], steady[0], 1e-8)
        close(steady[1000], steady[0], 1e-8)


def check_posterior(model: LinearGaussianModel, solution: LinearGaussianSolution) -> None:
    temperature = solution.temperature.item()
    assert solution.log_evidence is not None
    assert solution.gap is not None
    log_evidence, mean, covariance = joint_gaussian(model, temperature)
    close(solution.log_evidence, log_evidence, 1e-8)
    rolled_mean, rolled_covariance = rolled_out(solution)
    close(rolled_mean, mean, 1e-7)
    # Entry by entry on the scale of its two variances: at temperature 1e9 those of actions dwarf
    # those of states.
    scale = np.sqrt(np.diag(covariance).clip(1e-9))
    close(rolled_covariance / np.outer(scale, scale), covariance / np.outer(scale, scale), 1e-6)
    control = solve_linear_gaussian(model, temperature)
    gap = solution.log_evidence - control.objective / temperature
    close(solution.gap.total, gap, 1e-9)
    assert gap >= -1e-9
    value, soft_value = solution.v(model.initial_mean, t=0), control.v(model.initial_mean, t=0)
    assert value >= soft_value - 1e-9 * soft_value.abs()


def test_excess_of_the_posterior_is_half_the_variance_over_temperature() -> None:
    """α V^x − V → Var/(2α): one step whose only reward is that of a Gaussian next state."""
    model = finite_model(9, horizon=2)
    control = solve_linear_gaussian(model, 1e6)
    posterior = solve_linear_gaussian(model, 1e6, "posterior")
    state, action = model.initial_mean, torch.zeros(2, dtype=torch.float64)
    excess = posterior.q(state, action, t=0) - control.q(state, action, t=0)
    last = control.v.at(1)
    mean = model.transition(state, action).mean
    slope = 2 * last.quadratic @ mean + last.linear
    spread = last.quadratic @ model.noise_covariance
    variance = slope @ model.noise_covariance @ slope + 2 * (spread @ spread).trace()
    close(excess / variance * 2e6, torch.tensor(1.0), 1e-3)


# --- posterior, without a horizon -----------------------------------------------------------------

ENDLESS: dict[str, Any] = {"discount": 1.0}

UNREACHED: dict[str, Any] = {
    "A": np.diag([1.2, 0.5, 0.5]),
    "B": [[0, 0], [1, 0], [0, 1]],
    "cross_cost": None,
}


def endless(temperature: float, seed: int = 1, **changes: Any) -> LinearGaussianSolution:
    return solve_linear_gaussian(random_model(seed, **ENDLESS, **changes), temperature, "posterior")


def check_limit(
    solution: LinearGaussianSolution, finite: LinearGaussianSolution, longer: LinearGaussianSolution
) -> None:
    """`finite` is the posterior of a long horizon, `longer` that of one step more."""
    assert solution.posterior_dynamics is not None
    assert finite.posterior_dynamics is not None
    for name in ("gain", "offset", "covariance"):
        close(getattr(solution.policy, name), getattr(finite.policy, name)[0])
    for name in ("A", "B", "offset", "noise_covariance"):
        first = getattr(finite.posterior_dynamics, name)[0]
        close(getattr(solution.posterior_dynamics, name), first)
    for name in ("initial_mean", "initial_covariance"):
        first = getattr(finite.posterior_dynamics, name)
        close(getattr(solution.posterior_dynamics, name), first)
    assert finite.log_evidence is not None
    level = solution.temperature * finite.log_evidence
    for ours, theirs in ((solution.v, finite.v.at(0)), (solution.q, finite.q.at(0))):
        close(ours.quadratic, theirs.quadratic)
        close(ours.linear, theirs.linear)
        close(ours.constant + level, theirs.constant)
    assert solution.rate is not None
    assert finite.gap is not None
    assert longer.gap is not None
    close(solution.rate.log_evidence, longer.log_evidence - finite.log_evidence)
    bound = finite.log_evidence - finite.gap.total
    close(solution.rate.max_elbo, longer.log_evidence - longer.gap.total - bound)


@pytest.mark.parametrize("prior", [{}, PRIOR])
@pytest.mark.parametrize(
    ("seed", "temperature", "horizon"),
    [(0, 0.05, 300), (1, 0.7, 300), (2, 30.0, 300), (3, 1e6, 300), (1, 0.3, 2000)],
)
def test_endless_posterior_is_the_limit_of_long_horizons(
    prior: dict[str, Any], seed: int, temperature: float, horizon: int
) -> None:
    finite, longer = (
        solve_linear_gaussian(finite_model(seed, T, **prior), temperature, "posterior")
        for T in (horizon, horizon + 1)
    )
    check_limit(endless(temperature, seed, **prior), finite, longer)


def test_endless_posterior_of_a_bundled_model() -> None:
    solution = solve_linear_gaussian(DoubleIntegrator(discount=1.0), 0.5, "posterior")
    one, other = (
        solve_linear_gaussian(DoubleIntegrator(discount=1.0, horizon=T), 0.5, "posterior")
        for T in (300, 301)
    )
    check_limit(solution, one, other)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("temperature", [1e-6, 0.3, 20.0, 1e6])
def test_endless_posterior_in_closed_form(seed: int, temperature: float) -> None:
    model = random_model(seed, n=1, m=1, **ENDLESS)
    solution = solve_linear_gaussian(model, temperature, "posterior")
    assert solution.rate is not None
    with mpmath.workdps(40):
        P, p, constant, rate = endless_scalar(model, temperature)
        for state in (0.0, 1.0, -30.0):
            exact = -(P * mpmath.mpf(state) ** 2 + p * mpmath.mpf(state) + constant)
            a, b, c = (
                mpmath.mpf(x.item())
                for x in (solution.v.quadratic, solution.v.linear, solution.v.constant)
            )
            found = a * mpmath.mpf(state) ** 2 + b * mpmath.mpf(state) + c
            assert abs(found - exact) <= solution.error_bound * (1 + state**2)
        close(solution.rate.log_evidence, float(rate), 1e-12)
        assert solution.error_bound <= 1e-10 * max(1.0, float(P), temperature)


@pytest.mark.parametrize("prior", [{}, PRIOR])
def test_endless_messages_are_the_policy_and_the_dynamics(prior: dict[str, Any]) -> None:
    """π = ρ e^{(Q − V)/α}, and p(s' | s, a, O) = p(s' | s, a) e^{(r + V' − Q)/α − rate}."""
    model, temperature = random_model(3, **ENDLESS, **prior), 0.6
    solution = solve_linear_gaussian(model, temperature, "posterior")
    assert solution.posterior_dynamics is not None
    assert solution.rate is not None
    generator = torch.Generator().manual_seed(0)
    state, action, ahead = (
        torch.randn(7, k, generator=generator, dtype=torch.float64) for k in (3, 2, 3)
    )
    tilt = (solution.q(state, action) - solution.v(state)) / temperature
    if prior:
        tilt = tilt + model.action_prior(state).log_prob(action)
    close(solution.policy(state).log_prob(action), tilt)
    luck = model.reward(state, action, ahead) + solution.v(ahead) - solution.q(state, action)
    tilt = model.transition(state, action).log_prob(ahead) + luck / temperature
    lucky = solution.posterior_dynamics.transition(state, action).log_prob(ahead)
    close(lucky, tilt - solution.rate.log_evidence)
    start = solution.posterior_dynamics.initial_state().log_prob(state)
    close(start, model.initial_state().log_prob(state) + solution.v(state) / temperature)


def test_without_noise_an_endless_posterior_is_control() -> None:
    terms = rest_terms(0, n=2, m=1)
    solution = solve_linear_gaussian(to_rest(*terms), 0.4, "posterior")
    regulator = solve_linear_gaussian(to_rest(*terms), 0.0)
    close(solution.policy.gain, regulator.policy.gain)
    close(solution.policy.offset, regulator.policy.offset)
    close(solution.v.quadratic, regulator.v.quadratic)
    assert solution.rate is not None
    close(solution.rate.log_evidence, solution.rate.max_elbo, 1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        infer(to_rest(*terms), Exact(0.4, target="posterior"))


def test_an_endless_posterior_as_a_result(tmp_path: Path) -> None:
    model = random_model(2, **ENDLESS)
    with pytest.warns(UserWarning, match=r"optimistic by 8\.84 nats a step"):
        result = infer(model, Exact(0.7, target="posterior"))
    assert result.objective is None
    assert result.parts is None
    assert result.objective_entropy_form is None
    assert result.log_evidence is None
    assert result.gap is None
    assert result.evidence.reason is not None
    assert "log p(O) has no limit: each step adds 5.91415 nats" in result.evidence.reason
    summary = result.summary()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["objective"] is summary["steps"] is summary["log_evidence"] is None
    result.save(tmp_path / "run")
    loaded = InferenceResult.load(tmp_path / "run", model=model)
    assert loaded.objective is None
    assert loaded.parts is None
    assert loaded.evidence == result.evidence
    state, action = torch.ones(3), torch.ones(2)
    close(loaded.v(state), result.v(state), 1e-15)
    close(loaded.q(state, action), result.q(state, action), 1e-15)
    close(loaded.policy(state).mean, result.policy(state).mean, 1e-15)
    with pytest.warns(UserWarning, match="nats a step"):
        assert loaded.evaluate(2, max_steps=5).lengths.tolist() == [5, 5]
    for one in (result, loaded):
        weights = one.sample(50, horizon=12).sample_stats["log_weight"].to_numpy()
        assert result.evidence.rate is not None
        close(weights, np.full((1, 50), 12 * result.evidence.rate.log_evidence), 1e-9)


def test_an_endless_posterior_that_luck_alone_holds(tmp_path: Path) -> None:
    """No action reaches the mode that grows, but noise does: control has no bound to offer."""
    model = random_model(0, **ENDLESS, **UNREACHED)
    with pytest.warns(UserWarning, match="optimistic by inf nats a step"):
        result = infer(model, Exact(0.7, target="posterior"))
    finite, longer = (
        solve_linear_gaussian(finite_model(0, T, **UNREACHED), 0.7, "posterior") for T in (99, 100)
    )
    assert result.evidence.rate is not None
    assert finite.log_evidence is not None
    assert longer.log_evidence is not None
    grown = longer.log_evidence - finite.log_evidence
    close(result.evidence.rate.log_evidence, grown)
    assert result.summary()["evidence_rate"]["gap"] is None
    result.save(tmp_path / "run")
    loaded = InferenceResult.load(tmp_path / "run", model=model)
    assert loaded.evidence == result.evidence


def twin_ordinary(patch: pytest.MonkeyPatch) -> None:
    """The Riccati equation of control, which wishes for nothing."""
    patch.setattr(
        riccati_stationary,
        "expected_message",
        lambda message, covariance, problem, posterior: expected_message(
            message, covariance, problem, False
        ),
    )


def twin_sign(patch: pytest.MonkeyPatch) -> None:
    """I − (2/α)ΣP: as much afraid of noise as the posterior hopes for it."""
    patch.setattr(
        riccati_stationary,
        "expected_message",
        lambda message, covariance, problem, posterior: expected_message(
            message, -covariance if posterior else covariance, problem, posterior
        ),
    )


def twin_hindsight(patch: pytest.MonkeyPatch) -> None:
    """Dynamics that are not conditioned on anything."""
    patch.setattr(riccati_stationary, "_in_hindsight", lambda problem, message: problem)


@pytest.mark.parametrize("twin", [twin_ordinary, twin_sign, twin_hindsight])
def test_broken_twins_of_the_endless_posterior_are_caught(
    twin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    finite, longer = (
        solve_linear_gaussian(finite_model(3, T), 300.0, "posterior") for T in (300, 301)
    )
    check_limit(endless(300.0, seed=3), finite, longer)
    twin(monkeypatch)
    with pytest.raises(AssertionError):
        check_limit(endless(300.0, seed=3), finite, longer)


# --- derivatives ----------------------------------------------------------------------------------


def differentiable(
    target: str, horizon: int | None, discount: float, prior: bool, noise: np.ndarray
) -> Any:
    """(inputs, function of them) through every tensor of a model; symmetric ones as X + X'."""
    base = random_model(12, n=2, m=1, noise_covariance=noise, initial_covariance=noise)
    names = ["A", "B", "offset", "state_linear", "action_linear", "cross_cost", "reward_offset"]
    symmetric = ["state_cost", "action_cost", "initial_mean"]
    prior_terms = {"prior_mean": [0.4], "prior_covariance": [[0.7]]} if prior else {}
    covariances = ["noise_covariance", "initial_covariance"] if noise[1, 1] else []

    def function(temperature: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(names + symmetric + covariances + list(prior_terms), values, strict=True))
        given = {
            k: (x + x.mT) / 2 if x.dim() == 2 and k not in names else x for k, x in given.items()
        }
        model = random_model(
            12,
            n=2,
            m=1,
            **{"noise_covariance": noise, "initial_covariance": noise, **given},
            horizon=horizon,
            discount=discount,
        )
        solution = solve_linear_gaussian(model, temperature, target)  # type: ignore[arg-type]
        outputs = [solution.objective, solution.objective_entropy_form, solution.policy.gain]
        outputs += [solution.policy.offset, solution.policy.covariance, solution.v.quadratic]
        if solution.gap is not None:
            outputs += [solution.log_evidence, solution.gap.total]
        if solution.rate is not None:
            outputs += [solution.rate.log_evidence, solution.rate.max_elbo]
            outputs += [solution.v.constant, solution.q.constant]
        if solution.posterior_dynamics is not None:
            outputs += [solution.posterior_dynamics.A, solution.posterior_dynamics.noise_covariance]
        everything = torch.cat([x.flatten() for x in outputs if x is not None])
        return (everything * torch.linspace(0.5, 1.5, len(everything)).double()).sum()

    values = [getattr(base, k) for k in names + symmetric + covariances]
    values += [torch.tensor(x, dtype=torch.float64) for x in prior_terms.values()]
    inputs = [torch.tensor(0.7, dtype=torch.float64), *values]
    return [x.detach().clone().requires_grad_() for x in inputs], function


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("noise", [np.array([[0.4, 0.1], [0.1, 0.3]]), np.diag([0.4, 0.0])])
@pytest.mark.parametrize(
    ("target", "horizon", "discount"),
    [
        ("control", None, 0.9),
        ("control", 3, 0.9),
        ("posterior", 3, 1.0),
        ("posterior", None, 1.0),
    ],
)
def test_gradients_match_finite_differences(
    target: str, horizon: int | None, discount: float, prior: bool, noise: np.ndarray
) -> None:
    inputs, function = differentiable(target, horizon, discount, prior, noise)
    assert torch.autograd.gradcheck(
        function, inputs, eps=1e-6, atol=1e-5, rtol=1e-4, fast_mode=True
    )


@pytest.mark.parametrize(("target", "discount"), [("control", 0.9), ("posterior", 1.0)])
def test_second_derivatives_of_the_fixed_point(target: str, discount: float) -> None:
    inputs, function = differentiable(target, None, discount, False, np.diag([0.4, 0.1]))
    kept = inputs[:3]

    def of_few(*few: Tensor) -> Tensor:
        return function(*few, *(x.detach() for x in inputs[3:]))

    assert torch.autograd.gradgradcheck(
        of_few, kept, eps=1e-6, atol=1e-5, rtol=1e-4, fast_mode=True
    )


# --- error bounds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("discount", [0.5, 0.99, 0.999999])
@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1.0, 1e6])
def test_error_bound_holds_in_forty_digits(discount: float, temperature: float) -> None:
    model = random_model(13, n=1, m=1, discount=discount)
    solution = solve_linear_gaussian(model, temperature)
    with mpmath.workdps(40):
        exact = stationary_scalar(model, temperature)
        for state in (0.0, 1.0, -30.0):
            point = mpmath.mpf(state)
            value = -(exact[0] * point**2 + exact[1] * point + exact[2])
            ours = [mpmath.mpf(x.item()) for x in (solution.v.quadratic, solution.v.linear)]
            found = ours[0] * point**2 + ours[1] * point + mpmath.mpf(solution.v.constant.item())
            assert abs(found - value) <= solution.error_bound * (1 + state**2)
        worth = max(1.0, abs(float(exact[2])))
        assert solution.error_bound <= 1e-7 * worth / (1 - discount) ** 0.5


# --- broken twins ---------------------------------------------------------------------------------


def twin_covariance(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        riccati,
        "back_up",
        lambda *args: (lambda s: s._replace(covariance=2 * s.covariance))(back_up(*args)),
    )


def twin_log_det(patch: pytest.MonkeyPatch) -> None:
    def flipped(curvature: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        size = len(curvature)
        log_integral = (size * (math.pi * temperature).log() + torch.logdet(curvature)) / 2
        return temperature * log_integral, -log_integral - size / 2

    patch.setattr(linear_gaussian_backup, "_over_lebesgue", flipped)


def twin_evidence_log_det(patch: pytest.MonkeyPatch) -> None:
    for module in (linear_gaussian_backup, linear_gaussian_evidence):
        patch.setattr(module, "log_det_one_plus", lambda matrix: -log_det_one_plus(matrix))


def twin_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        riccati,
        "expected_message",
        lambda message, covariance, problem, posterior: expected_message(
            message, 0 * covariance if not posterior else covariance, problem, posterior
        ),
    )


def twin_risk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        riccati,
        "expected_message",
        lambda message, covariance, problem, posterior: expected_message(
            message, covariance / 2 if posterior else covariance, problem, posterior
        ),
    )


def twin_evidence(patch: pytest.MonkeyPatch) -> None:
    for module in (riccati, linear_gaussian_evidence):
        patch.setattr(
            module,
            "given_evidence",
            lambda problem, message, mean, covariance: given_evidence(
                problem, -message / 10, mean, covariance
            ),
        )


@pytest.mark.parametrize(
    ("twin", "target"),
    [
        (twin_covariance, "control"),
        (twin_log_det, "control"),
        (twin_noise, "control"),
        (twin_covariance, "posterior"),
        (twin_log_det, "posterior"),
        (twin_evidence_log_det, "posterior"),
        (twin_risk, "posterior"),
        (twin_evidence, "posterior"),
    ],
)
def test_broken_twins_are_caught(twin: Any, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = finite_model(14, n=1, m=1, horizon=2)
    checks = {"control": check_bellman, "posterior": check_posterior}
    checks[target](model, solve_linear_gaussian(model, 0.8, target))  # type: ignore[arg-type]
    twin(monkeypatch)
    with pytest.raises(AssertionError):
        checks[target](model, solve_linear_gaussian(model, 0.8, target))  # type: ignore[arg-type]


# --- errors ---------------------------------------------------------------------------------------


EYE = np.eye(3)
NO_LINEAR = {"state_linear": None, "action_linear": None}


@pytest.mark.parametrize(
    ("changes", "temperature", "target", "message"),
    [
        ({}, -1.0, "control", "temperature: expected one finite number >= 0, got -1.0"),
        ({}, math.nan, "control", "temperature: .* got nan"),
        ({}, torch.ones(2), "control", "temperature: .* got .1.0, 1.0"),
        ({}, 1.0, "optimal", "target: expected .* got 'optimal'"),
        ({}, 1.0, "posterior", "the posterior needs discount 1, got 0.95.*survival probability"),
        ({"horizon": 3}, 1.0, "posterior", "the posterior needs discount 1, got 0.95"),
        (ENDLESS, 0.0, "posterior", "needs a temperature > 0"),
        ({**ENDLESS, "state_cost": -EYE}, 1.0, "posterior", "no state may pay ever more"),
        (
            {**ENDLESS, **UNREACHED, "noise_covariance": None},
            1.0,
            "posterior",
            "an action or noise to reach every mode .* got one that grows by 1.2 a step",
        ),
        (
            {"n": 1, "m": 1, "A": [[1.2]], "state_cost": [[0.0]], "cross_cost": None, **ENDLESS},
            1.0,
            "posterior",
            "expected every mode to decay given O = 1, got one that does not.* costs nothing",
        ),
        ({"discount": 1.0, "horizon": 3}, 0.0, "posterior", "needs a temperature > 0"),
        ({"discount": 1.0}, 1.0, "control", "without a horizon .* discount below 1, got 1"),
        ({"discount": 1.0}, 0.0, "control", "without a horizon .* discount below 1, got 1"),
        (DETERMINISTIC, 1.0, "control", "without a horizon .* discount below 1, got 1"),
        (DETERMINISTIC, 0.0, "control", "expected a reward of 0 in the state .* got .* a step"),
        (
            {**DETERMINISTIC, "reward_offset": 1e-9, "offset": None, **NO_LINEAR},
            0.0,
            "control",
            "expected a reward of 0 in the state .* got -1e-09 a step",
        ),
        (
            {**DETERMINISTIC, **UNREACHED},
            0.0,
            "control",
            "no action reaches a mode of A that grows by 1.2 a step",
        ),
        ({"action_cost": -np.eye(2)}, 1.0, "control", "soft value is infinite.* eigenvalue -1;"),
        ({"action_cost": -np.eye(2), "horizon": 3}, 1.0, "control", "soft value is infinite"),
        ({"state_cost": -9 * EYE, "horizon": 9}, 1.0, "control", "soft value is infinite"),
        ({"state_cost": -EYE}, 1.0, "control", "no state may pay ever more.*eigenvalue -"),
        (
            {"state_cost": -EYE, "discount": 1.0, "horizon": 2, **PRIOR, "B": 0.1 * EYE[:, :2]},
            0.3,
            "posterior",
            "the evidence is infinite.*eigenvalues, got -",
        ),
        (UNREACHED, 1.0, "control", "no action reaches a mode of A that grows by 1.2 a step"),
        (
            {"n": 1, "m": 1, "A": [[1.2]], "state_cost": [[0.0]], "cross_cost": None},
            1.0,
            "control",
            "the best policy leaves a mode growing by 1.02598 a step or more.* costs nothing",
        ),
    ],
)
def test_solver_errors(
    changes: dict[str, Any], temperature: float, target: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        solve_linear_gaussian(random_model(**changes), temperature, target)


def test_solver_refuses_other_models() -> None:
    class Other(EnvironmentModel):
        state_space = action_space = Discrete(2)
        initial_state = transition = reward = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match="expected a LinearGaussianModel, got Other"):
        solve_linear_gaussian(Other(), 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("discount", [0.9, 1.0])
def test_what_json_has_no_word_for_survives_saving(discount: float, tmp_path: Path) -> None:
    model = DoubleIntegrator(noise=0.0, discount=discount)
    result = infer(model, Exact(temperature=0.0))
    result.save(tmp_path / "run")
    assert InferenceResult.load(tmp_path / "run", model=model).parts == result.parts
