"""Linear-Gaussian models: their distributions, and that the Pyro program weighs what is solved."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian_oracles import PRIOR, SINGULAR, close, finite_model, random_model
from pyro import poutine
from scipy.linalg import expm
from torch import Tensor

from inference_rl.linear_gaussian import LinearGaussianModel, SingularNormal, gaussian
from inference_rl.models.double_integrator import DoubleIntegrator
from inference_rl.riccati import solve_linear_gaussian
from inference_rl.trajectory import trajectory

# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (5,), (2, 1, 4)])
@pytest.mark.parametrize("noise", [np.diag([0.3, 0.1, 0.6]), SINGULAR, np.zeros((3, 3))])
@pytest.mark.parametrize("prior", [{}, PRIOR])
def test_model_takes_any_batch_shape(
    batch: tuple[int, ...], noise: np.ndarray, prior: dict[str, Any]
) -> None:
    model = random_model(15, noise_covariance=noise, **prior)
    state, action = torch.randn(*batch, 3), torch.randn(*batch, 2)
    step = model.transition(state, action)
    assert (step.batch_shape, step.event_shape) == (torch.Size(batch), (3,))
    next_state = step.sample()
    assert next_state.dtype == torch.float64
    assert step.log_prob(next_state).isfinite().all()
    assert step.expand((7, *batch)).sample().shape == (7, *batch, 3)
    reward = model.reward(state, action, next_state)
    assert reward.shape == batch
    rho = model.action_prior(state)
    assert rho.log_prob(action.double()).shape == batch
    assert prior or not rho.log_prob(action.double()).any()
    index = (0,) * len(batch)
    s, a = state[index].double().numpy(), action[index].double().numpy()
    Q, R, N, q, r = (
        getattr(model, k).numpy()
        for k in ("state_cost", "action_cost", "cross_cost", "state_linear", "action_linear")
    )
    expected = -(s @ Q @ s + a @ R @ a + 2 * s @ N @ a) - q @ s - r @ a - 0.3
    close(reward[index], np.asarray(expected))
    assert not model.terminal(state).any()


def test_singular_normal() -> None:
    pyro.set_rng_seed(0)
    covariance = torch.tensor([[0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    mean = torch.tensor([1.0, -1.0], dtype=torch.float64)
    factor = gaussian(mean, covariance)
    assert isinstance(factor, SingularNormal)
    draws = factor.sample((20_000,))
    close(draws.mean(0), mean, 0.05)
    close(draws.T.cov(), covariance, 0.05)
    # Along (1, 1)/√2 it is a standard normal.
    along = (draws - mean).sum(-1) / math.sqrt(2)
    close(factor.log_prob(draws), dist.Normal(0.0, 1.0).log_prob(along))
    assert factor.log_prob(mean + torch.tensor([0.1, 0.0])) == -torch.inf
    assert isinstance(gaussian(mean, 0 * covariance), dist.Delta)
    assert isinstance(gaussian(mean, torch.eye(2).double()), dist.MultivariateNormal)


def test_double_integrator_is_sampled_exactly() -> None:
    model = DoubleIntegrator(time_step=0.2, noise=0.5)
    drift, push = np.array([[0.0, 1.0], [0.0, 0.0]]), np.array([[0.0], [1.0]])
    held = expm(0.2 * np.block([[drift, push], [np.zeros((1, 3))]]))
    close(model.A, held[:2, :2])
    close(model.B, held[:2, 2:])
    # Van Loan (1978): the covariance that white noise accumulates over a step.
    block = expm(0.2 * np.block([[-drift, 0.25 * push @ push.T], [np.zeros((2, 2)), drift.T]]))
    close(model.noise_covariance, block[2:, 2:].T @ block[:2, 2:])
    quiet = solve_linear_gaussian(DoubleIntegrator(noise=0.0), 0.1)
    noisy = solve_linear_gaussian(DoubleIntegrator(), 0.1)
    close(quiet.policy.gain, noisy.policy.gain)
    assert quiet.objective > noisy.objective


# --- the Pyro program -----------------------------------------------------------------------------


def prior_factor(model: LinearGaussianModel) -> Any:
    return lambda state, t: model.action_prior(state)


def log_weight(
    model: LinearGaussianModel, guide: Any, temperature: float, steps: int, message: Any = None
) -> Tensor:
    """log p(τ, O) − log q(τ) at one draw from the guide."""
    rho = prior_factor(model)
    drawn = poutine.trace(guide).get_trace()
    program = poutine.replay(trajectory, trace=drawn)
    weighed = poutine.trace(program).get_trace(
        model, rho, steps, temperature=temperature, message=message
    )
    return weighed.log_prob_sum() - drawn.log_prob_sum()


@pytest.mark.parametrize("prior", [{}, PRIOR])
@pytest.mark.parametrize("horizon", [5, None])
def test_program_has_constant_weight_under_deterministic_dynamics(
    prior: dict[str, Any], horizon: int | None
) -> None:
    zero = np.zeros((3, 3))
    model = random_model(
        10, noise_covariance=zero, initial_covariance=zero, horizon=horizon, **prior
    )
    solution = solve_linear_gaussian(model, 0.5)
    message = solution.v if horizon is None else None
    pyro.set_rng_seed(0)
    for _ in range(5):
        weight = log_weight(model, lambda: trajectory(model, solution.policy, 5), 0.5, 5, message)
        close(0.5 * weight, solution.objective)


@pytest.mark.parametrize("noise", [np.diag([0.3, 0.1, 0.6]), SINGULAR, np.zeros((3, 3))])
@pytest.mark.parametrize("horizon", [4, None])
def test_program_has_constant_weight_under_the_posterior(
    noise: np.ndarray, horizon: int | None
) -> None:
    """Identity 1 where the divergence is zero: p(τ, O) / q(τ) = p(O) for every trajectory.

    Without a horizon the message stands for the rest, and each step weighs what it adds.
    """
    model = random_model(11, noise_covariance=noise, discount=1.0, horizon=horizon)
    solution = solve_linear_gaussian(model, 0.5, "posterior")
    dynamics = solution.posterior_dynamics
    assert dynamics is not None

    def guide() -> None:
        state = pyro.sample("state_0", dynamics.initial_state())
        for t in range(4):
            action = pyro.sample(f"action_{t}", solution.policy(state, t))
            state = pyro.sample(f"state_{t + 1}", dynamics.transition(state, action, t))

    weight, rest = solution.log_evidence, None
    if solution.rate is not None:
        weight, rest = 4 * solution.rate.log_evidence, solution.v
    pyro.set_rng_seed(0)
    for _ in range(5):
        close(log_weight(model, guide, 0.5, 4, rest), weight)


def test_program_in_a_plate_has_the_objective_as_its_bound() -> None:
    """Identity 2 by sampling: temperature · ELBO = J, within five standard errors."""
    model = DoubleIntegrator(horizon=20, discount=0.9, initial_spread=0.3)
    solution = solve_linear_gaussian(model, 0.2)

    def paths(*args: Any, **kwargs: Any) -> None:
        with pyro.plate("paths", 4000):
            trajectory(*args, **kwargs)

    pyro.set_rng_seed(0)
    drawn = poutine.trace(paths).get_trace(model, solution.policy, 20)
    weighed = poutine.trace(poutine.replay(paths, trace=drawn)).get_trace(
        model, prior_factor(model), 20, temperature=0.2
    )
    for trace in (drawn, weighed):
        trace.compute_log_prob()
    sites = [s for s in weighed.nodes.values() if s["type"] == "sample" and s["name"] != "paths"]
    weights = sum(s["log_prob"] for s in sites) - sum(
        drawn.nodes[s["name"]]["log_prob"] for s in sites if not s["is_observed"]
    )
    assert weights.shape == (4000,)
    error = 0.2 * weights.std() / math.sqrt(4000)
    assert (0.2 * weights.mean() - solution.objective).abs() < 5 * error
    assert error < 0.02 * solution.objective.abs()


# --- errors ---------------------------------------------------------------------------------------


def test_messages_that_depend_on_the_step_ask_for_it() -> None:
    solution = solve_linear_gaussian(finite_model(), 1.0, "posterior")
    state = torch.zeros(3)
    with pytest.raises(ValueError, match="depends on the step: pass t, from 0 to 4"):
        solution.v(state)
    with pytest.raises(ValueError, match="depends on the step"):
        solution.policy(state)
    assert solution.posterior_dynamics is not None
    with pytest.raises(ValueError, match="dynamics depend on the step: pass t, from 0 to 3"):
        solution.posterior_dynamics.transition(state, torch.zeros(2))


EYE = np.eye(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"A": np.ones((2, 3))}, r"A: expected a square matrix, got shape \(2, 3\)"),
        ({"B": np.ones(3)}, r"B: expected a matrix, got shape \(3,\)"),
        ({"B": np.ones((2, 2))}, r"B: expected shape \(3, 2\), got \(2, 2\)"),
        ({"state_cost": np.eye(2)}, r"state_cost: expected shape \(3, 3\), got \(2, 2\)"),
        ({"state_cost": np.triu(np.ones((3, 3)))}, "state_cost: expected a symmetric matrix"),
        (
            {"offset": [0.0, math.nan, 0.0]},
            r"offset: every entry must be finite, got nan at \(1,\)",
        ),
        (
            {"reward_offset": math.inf},
            r"reward_offset: every entry must be finite, got inf at \(\)",
        ),
        ({"noise_covariance": -EYE}, "noise_covariance: expected a positive semidefinite .* -1"),
        ({"initial_covariance": np.diag([1, 1, -2])}, "initial_covariance: .* eigenvalue -2"),
        ({"prior_covariance": np.diag([1, 0])}, "prior_covariance: .*positive definite .* 0;"),
        ({"prior_mean": np.zeros(2)}, "prior_mean was given without prior_covariance"),
        ({"discount": 1.5}, r"discount: expected a number in \[0, 1\], got 1.5"),
        ({"horizon": 0}, "horizon: expected a whole number of steps >= 1 or None, got 0"),
        ({"horizon": 2.5}, "horizon: expected a whole number of steps >= 1 or None, got 2.5"),
    ],
)
def test_model_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_model(**changes)


def test_double_integrator_refuses_a_time_step_of_zero() -> None:
    with pytest.raises(ValueError, match="time_step: expected a positive number of seconds, got 0"):
        DoubleIntegrator(time_step=0)
