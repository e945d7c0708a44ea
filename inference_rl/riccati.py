"""Exact inference in a linear-Gaussian trajectory: `solve_linear_gaussian`.

Every message is a quadratic form, so the backward recursion over states and actions is a recursion
of matrices, the Riccati equation; `inference_rl.linear_gaussian_backup` derives a step of it. With
a horizon the steps are taken one by one; without one, `inference_rl.riccati_stationary` finds their
fixed point.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from inference_rl.linear_gaussian import LinearGaussianModel
from inference_rl.linear_gaussian_backup import (
    Backup,
    Problem,
    back_up,
    expected_message,
    given_evidence,
)
from inference_rl.linear_gaussian_evidence import (
    LinearGaussianSolution,
    gap_parts,
    next_covariance,
    posterior_dynamics,
    rounding,
    solution_of,
)
from inference_rl.riccati_stationary import stationary_control, stationary_posterior

__all__ = ["LinearGaussianSolution", "solve_linear_gaussian"]


def solve_linear_gaussian(
    model: LinearGaussianModel,
    temperature: float | Tensor,
    target: Literal["control", "posterior"] = "control",
) -> LinearGaussianSolution:
    """The exact policy and messages of a linear-Gaussian model, in float64.

    With a horizon this is the backward recursion, linear in T. Without one the policy is the same
    at every step: that of the fixed point, with first to third derivatives.

    Without a horizon and with discount 1 the value is finite at temperature 0, without noise, if
    the state comes to rest where a step pays nothing. What a step pays there is told from 0 up to
    rounding; `error_bound` takes it to be 0. The posterior is there the limit of the first steps of
    ever longer horizons. Its evidence grows for ever, at `rate`, so that its messages say how a
    state or an action compares with the start; see `LinearGaussianSolution`.

    :param temperature: in reward units, >= 0; at 0 (control only) the linear-quadratic regulator,
        whose policy has zero covariance.
    :param target: `"control"` keeps the model's dynamics and maximises the objective; `"posterior"`
        conditions the whole trajectory on O = 1, and so wishes for lucky noise.
    :raises TypeError: the model is not a `LinearGaussianModel`.
    :raises ValueError: temperature or target out of range; the posterior with a discount below 1;
        control with neither horizon nor discount below 1, but a temperature, noise or a step that
        pays even at rest; a value that is infinite, because of costs too negative or a mode that
        grows and cannot be controlled (nor, by the posterior, wished away); a mode that grows
        faster than the discount forgets because it costs nothing.
    """
    if not isinstance(model, LinearGaussianModel):
        raise TypeError(f"expected a LinearGaussianModel, got {type(model).__name__}")
    temperature = torch.as_tensor(temperature, dtype=torch.float64)
    if temperature.dim() or not torch.isfinite(temperature) or temperature < 0:
        raise ValueError(
            f"temperature: expected one finite number >= 0, got {temperature.tolist()}"
        )
    if target not in ("control", "posterior"):
        raise ValueError(f'target: expected "control" or "posterior", got {target!r}')
    problem = Problem.of(model, temperature)
    if target == "posterior":
        return _solve_posterior(problem, model.horizon)
    if model.horizon is None:
        return stationary_control(problem)
    messages, steps = _backward(problem, model.horizon, posterior=False)
    error_bound = _rounding_bound(problem, steps, problem.advance, problem.noise)
    return solution_of(problem, messages, steps, error_bound, iterations=model.horizon)


def _backward(problem: Problem, horizon: int, posterior: bool) -> tuple[Tensor, Backup]:
    """Messages (T + 1, n + 1, n + 1) and backups of a finite horizon, stacked over its steps."""
    messages, steps = [torch.zeros_like(problem.noise)], []
    for _ in range(horizon):
        steps.append(
            back_up(problem, expected_message(messages[-1], problem.noise, problem, posterior))
        )
        messages.append(steps[-1].value)
    stacked = Backup(*(torch.stack(part) for part in zip(*reversed(steps), strict=True)))
    return torch.stack(messages[::-1]), stacked


def _solve_posterior(problem: Problem, horizon: int | None) -> LinearGaussianSolution:
    if problem.temperature == 0:
        raise ValueError("the posterior needs a temperature > 0: at 0 nothing has evidence")
    if problem.discount != 1:
        raise ValueError(
            f"the posterior needs discount 1, got {problem.discount}: with the discount as a "
            "survival probability it is a mixture over lengths of life, not a Gaussian; set "
            "discount=1, with or without a horizon, or ask for the control target"
        )
    if horizon is None:
        return stationary_posterior(problem)
    messages, steps = _backward(problem, horizon, posterior=True)
    _, control = _backward(problem, horizon, posterior=False)
    start = expected_message(messages[0], problem.start_noise, problem, posterior=True)
    advance, noise = given_evidence(problem, messages[1:], problem.advance, problem.noise)
    error_bound = _rounding_bound(problem, steps, advance, noise)
    return dataclasses.replace(
        solution_of(problem, messages, steps, error_bound, iterations=2 * horizon),
        target="posterior",
        log_evidence=-(problem.start @ start @ problem.start) / problem.temperature,
        posterior_dynamics=posterior_dynamics(problem, messages[0], advance, noise),
        gap=gap_parts(problem, messages, steps, control),
    )


@torch.no_grad()
def _rounding_bound(problem: Problem, steps: Backup, advance: Tensor, noise: Tensor) -> float:
    """The rounding of every backup, carried back to the steps before it; the largest of all."""
    loops = math.sqrt(problem.discount) * advance @ steps.closed_loop
    spreads = problem.discount * next_covariance(advance, noise, steps)
    backwards = (part.flip(0) for part in (rounding(steps), loops, spreads))
    error, largest = torch.zeros_like(problem.noise), 0.0
    for fresh, loop, spread in zip(*backwards, strict=True):
        error = fresh + loop.mT @ error @ loop + problem.constant((spread * error).sum())
        largest = max(largest, error.norm().item())
    return largest
