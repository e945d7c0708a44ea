"""Linear-Gaussian models to test with, and oracles that share none of the solver's algebra:

one large Gaussian integral over the whole trajectory (posterior), quadrature of the soft Bellman
equation (control), moments walked forward step by step, and a closed form in 40-digit arithmetic.
"""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import torch
from torch import Tensor

from inference_rl.linear_gaussian import LinearGaussianModel
from inference_rl.riccati import LinearGaussianSolution

PRIOR: dict[str, Any] = {
    "prior_mean": [0.4, -0.2],
    "prior_covariance": [[1.0, 0.3], [0.3, 0.5]],
}

SINGULAR = np.outer([1.0, -0.5, 0.2], [1.0, -0.5, 0.2])


def random_model(seed: int = 0, n: int = 3, m: int = 2, **changes: Any) -> LinearGaussianModel:
    """Every term present, all costs positive definite, modes of A on both sides of one."""
    rng = np.random.default_rng(seed)

    def positive(size: int) -> np.ndarray:
        root = rng.normal(size=(size, size))
        return root @ root.T / size

    costs = positive(n + m) + 0.1 * np.eye(n + m)
    terms: dict[str, Any] = {
        "A": rng.normal(size=(n, n)) * 0.7,
        "B": rng.normal(size=(n, m)),
        "state_cost": costs[:n, :n],
        "action_cost": costs[n:, n:],
        "cross_cost": costs[:n, n:],
        "noise_covariance": 0.3 * positive(n),
        "initial_mean": rng.normal(size=n),
        "initial_covariance": positive(n),
        "offset": rng.normal(size=n),
        "state_linear": rng.normal(size=n),
        "action_linear": rng.normal(size=m),
        "reward_offset": 0.3,
        "discount": 0.95,
    }
    return LinearGaussianModel(**{**terms, **changes})


def finite_model(seed: int = 0, horizon: int = 4, **changes: Any) -> LinearGaussianModel:
    return random_model(seed, **{"discount": 1.0, "horizon": horizon, **changes})


def close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Agreement relative to the largest entry, or absolute below one."""
    actual, expected = (
        np.asarray(x.detach() if isinstance(x, Tensor) else x) for x in (actual, expected)
    )
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def joint_gaussian(model: LinearGaussianModel, temperature: float) -> tuple[float, Any, Any]:
    """log p(O), and mean and covariance of (s_0, a_0, s_1, ..., s_T) given O, as one integral.

    Everything is affine in u = (standard noise of the start and of every step, all actions), so the
    trajectory's log-weight is −½u'Hu + g'u + c, and ∫ e^{...} du is known.
    """
    horizon = model.horizon
    assert horizon is not None
    n, m = model.B.shape
    A, B, Q, R, N, q, r, offset = (
        getattr(model, name).numpy()
        for name in (
            "A",
            "B",
            "state_cost",
            "action_cost",
            "cross_cost",
            "state_linear",
            "action_linear",
            "offset",
        )
    )
    size = n + horizon * (m + n) + 1  # the last coordinate is the constant one
    one = np.eye(size)[-1:]

    def root(covariance: Tensor) -> np.ndarray:
        values, vectors = np.linalg.eigh(covariance.numpy())
        return vectors * np.sqrt(values.clip(0))

    state = root(model.initial_covariance) @ np.eye(size)[:n]
    state = state + np.outer(model.initial_mean.numpy(), one)
    weight, rows, is_noise = np.zeros((size, size)), [state], np.zeros(size, bool)
    is_noise[:n] = True
    for t in range(horizon):
        at = n + t * (m + n)
        action, noise = np.eye(size)[at : at + m], np.eye(size)[at + m : at + m + n]
        is_noise[at + m : at + m + n] = True
        reward = -state.T @ Q @ state - action.T @ R @ action - 2 * state.T @ N @ action
        reward -= one.T @ (q @ state + r @ action + model.reward_offset.item() * one[0])[None]
        weight += reward / temperature
        if model.prior_covariance is not None:
            deviation = action - np.outer(model.prior_mean.numpy(), one)
            covariance = model.prior_covariance.numpy()
            weight -= deviation.T @ np.linalg.solve(covariance, deviation) / 2
            weight -= one.T @ one * np.linalg.slogdet(2 * np.pi * covariance)[1] / 2
        state = (
            A @ state + B @ action + np.outer(offset, one) + root(model.noise_covariance) @ noise
        )
        rows += [action, state]
    weight -= np.diag(is_noise) / 2 + one.T @ one * is_noise.sum() * math.log(2 * np.pi) / 2
    precision = -(weight + weight.T)[:-1, :-1]
    linear = (weight + weight.T)[:-1, -1]
    covariance = np.linalg.inv(precision)
    mean = covariance @ linear
    log_det = np.linalg.slogdet(precision / (2 * np.pi))[1]
    everything = np.concatenate(rows)
    return (
        weight[-1, -1] + linear @ mean / 2 - log_det / 2,
        everything @ np.append(mean, 1.0),
        everything[:, :-1] @ covariance @ everything[:, :-1].T,
    )


def rolled_out(solution: LinearGaussianSolution) -> tuple[Any, Any]:
    """Mean and covariance of (s_0, a_0, s_1, ..., s_T) under the posterior policy and dynamics."""
    dynamics, policy = solution.posterior_dynamics, solution.policy
    assert dynamics is not None
    mean, covariance = dynamics.initial_mean.numpy(), dynamics.initial_covariance.numpy()
    n, m = dynamics.B.shape[1:]

    def append(gain: Any, offset: Any, noise: Any, reach: int) -> None:
        nonlocal mean, covariance
        across = gain @ covariance[-reach:]
        corner = gain @ covariance[-reach:, -reach:] @ gain.T + noise
        mean = np.append(mean, gain @ mean[-reach:] + offset)
        covariance = np.block([[covariance, across.T], [across, corner]])

    for t in range(len(dynamics.A)):
        append(
            policy.gain[t].numpy(), policy.offset[t].numpy(), policy.covariance[t].numpy(), reach=n
        )
        gain = torch.cat([dynamics.A[t], dynamics.B[t]], dim=1).numpy()
        append(gain, dynamics.offset[t].numpy(), dynamics.noise_covariance[t].numpy(), reach=n + m)
    return mean, covariance


def value_by_quadrature(
    model: LinearGaussianModel, temperature: float, after: Any, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """V(s), and mean and variance of π(a | s), for one coordinate each, by summing over actions.

    The trapezoidal rule converges exponentially for Gaussians; `after` is V of the next state.
    """
    nodes, weights = (torch.tensor(x) for x in np.polynomial.hermite_e.hermegauss(12))
    actions = torch.linspace(-20, 20, 1001, dtype=torch.float64)[:, None]
    spacing = (actions[1] - actions[0]).item()
    state = state.expand(len(actions), 1)
    mean = state @ model.A.mT + actions @ model.B.mT + model.offset
    ahead = after(mean[:, None] + nodes[:, None] * model.noise_covariance.sqrt())
    q = model.reward(state, actions, state)
    q = q + model.discount * (ahead * weights / weights.sum()).sum(-1)
    log_weight = q / temperature + math.log(spacing)
    if model.prior_covariance is not None:
        log_weight = log_weight + model.action_prior(state).log_prob(actions)
    log_total = log_weight.logsumexp(0)
    probs, actions = (log_weight - log_total).exp(), actions[:, 0]
    centre = (probs * actions).sum()
    return temperature * log_total, centre, (probs * (actions - centre) ** 2).sum()


def objective_of(
    model: LinearGaussianModel, gain: Any, offset: Any, covariance: Any, temperature: float
) -> float:
    """J of any stationary linear-Gaussian policy under a flat prior, by walking moments forward."""
    A, B, Q, R, N, q, r, c, W = (
        x.numpy()
        for x in (
            model.A,
            model.B,
            model.state_cost,
            model.action_cost,
            model.cross_cost,
            model.state_linear,
            model.action_linear,
            model.offset,
            model.noise_covariance,
        )
    )
    mean, spread = model.initial_mean.numpy(), model.initial_covariance.numpy()
    entropy = np.linalg.slogdet(2 * np.pi * np.e * covariance)[1] / 2
    total, weight = 0.0, 1.0
    for _ in range(model.horizon or 3000):
        action = gain @ mean + offset
        second = spread + np.outer(mean, mean)
        both = gain @ spread + np.outer(action, mean)
        of_action = gain @ spread @ gain.T + covariance + np.outer(action, action)
        reward = -(Q * second).sum() - (R * of_action).sum() - 2 * (N.T * both).sum()
        reward -= q @ mean + r @ action + model.reward_offset.item()
        total += weight * (reward + temperature * entropy)
        loop = A + B @ gain
        spread = loop @ spread @ loop.T + B @ covariance @ B.T + W
        mean, weight = A @ mean + B @ action + c, weight * model.discount
    return total


def stationary_scalar(model: LinearGaussianModel, temperature: float) -> tuple[Any, Any, Any]:
    """P, p and the constant of −V(s) = P s² + p s + c for n = m = 1, in closed form."""
    a, b, q2, r2, n2, q1, r1, c0, s2, k0 = (
        mpmath.mpf(x.item())
        for x in (
            model.A,
            model.B,
            model.state_cost,
            model.action_cost,
            model.cross_cost,
            model.state_linear,
            model.action_linear,
            model.offset,
            model.noise_covariance,
            model.reward_offset,
        )
    )
    g, alpha = mpmath.mpf(model.discount), mpmath.mpf(temperature)
    # P (r2 + g b² P) = (q2 + g a² P)(r2 + g b² P) − (n2 + g a b P)², a quadratic in P.
    x2 = g * b**2
    x1 = r2 - g * a**2 * r2 - q2 * g * b**2 + 2 * n2 * g * a * b
    x0 = -(q2 * r2 - n2**2)
    P = (-x1 + mpmath.sqrt(x1**2 - 4 * x2 * x0)) / (2 * x2)
    h = r2 + g * b**2 * P
    gain = -(n2 + g * a * b * P) / h
    p = (q1 + gain * r1 + 2 * g * (a + b * gain) * P * c0) / (1 - g * (a + b * gain))
    push = (r1 + g * b * (2 * P * c0 + p)) / 2
    soft = alpha / 2 * mpmath.log(mpmath.pi * alpha / h) if alpha else 0
    constant = (k0 + g * (P * (c0**2 + s2) + p * c0) - push**2 / h - soft) / (1 - g)
    return P, p, constant


def endless_scalar(model: LinearGaussianModel, temperature: float) -> tuple[Any, Any, Any, Any]:
    """P, p, c of −V(s) = P s² + p s + c, and nats a step: the posterior of an endless episode.

    For n = m = 1 and a flat prior: completing squares by hand, with E e^{V/α} = 1 at the start.
    """
    a, b, q2, r2, n2, q1, r1, c0, s2, k0, m0, m2 = (
        mpmath.mpf(x.item())
        for x in (
            model.A,
            model.B,
            model.state_cost,
            model.action_cost,
            model.cross_cost,
            model.state_linear,
            model.action_linear,
            model.offset,
            model.noise_covariance,
            model.reward_offset,
            model.initial_mean,
            model.initial_covariance,
        )
    )
    alpha = mpmath.mpf(temperature)
    # P = q + a² P / (1 + g P), where action and luck reach g = b²/r + 2σ²/α and the best action for
    # this step alone is paid for.
    g, a_left, q_left = b**2 / r2 + 2 * s2 / alpha, a - b * n2 / r2, q2 - n2**2 / r2
    x1 = 1 - a_left**2 - q_left * g
    P = (-x1 + mpmath.sqrt(x1**2 + 4 * g * q_left)) / (2 * g)
    d = 1 + 2 * s2 * P / alpha
    h = r2 + b**2 * P / d
    gain = -(n2 + a * b * P / d) / h
    loop = (a + b * gain) / d
    p = (q1 + gain * r1 + 2 * loop * P * c0) / (1 - loop)
    push = (r1 + b * (2 * P * c0 + p) / d) / 2
    lucky = (P * c0**2 + p * c0 - s2 * p**2 / (2 * alpha)) / d + alpha / 2 * mpmath.log(d)
    step = k0 + lucky - push**2 / h - alpha / 2 * mpmath.log(mpmath.pi * alpha / h)
    d0 = 1 + 2 * m2 * P / alpha
    start = (P * m0**2 + p * m0 - m2 * p**2 / (2 * alpha)) / d0 + alpha / 2 * mpmath.log(d0)
    return P, p, -start, -step / alpha
