"""Exact inference in a linear-Gaussian trajectory: `solve_linear_gaussian`.

Every message is a quadratic form, so the backward recursion over states and actions is a recursion
of matrices, the Riccati equation; `inference_rl.linear_gaussian_backup` derives a step of it. With
a horizon the steps are taken one by one; without one, doubling and Newton's method find their fixed
point.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from inference_rl.linear_gaussian import LinearGaussianModel, PosteriorDynamics
from inference_rl.linear_gaussian_backup import (
    Backup,
    Problem,
    action_shift,
    back_up,
    expected_message,
    given_evidence,
    symmetrised,
    with_prior,
)
from inference_rl.linear_gaussian_evidence import (
    EPSILON,
    MAX_DOUBLINGS,
    LinearGaussianSolution,
    gap_parts,
    next_covariance,
    power_sum,
    rest_shift,
    solution_of,
    sum_from_rest,
)

__all__ = ["LinearGaussianSolution", "solve_linear_gaussian"]

MAX_NEWTON = 20

CONVERGED = 1e-12
"""Relative change at which quadratic convergence leaves nothing but rounding."""


def solve_linear_gaussian(
    model: LinearGaussianModel,
    temperature: float | Tensor,
    target: Literal["control", "posterior"] = "control",
) -> LinearGaussianSolution:
    """The exact policy and messages of a linear-Gaussian model, in float64.

    With a horizon this is the backward recursion, linear in T. Without one the policy is the same
    at every step: doubling finds the state's own block of the message as the limit of ever longer
    horizons, Newton's method the rest. The last two Newton steps are differentiable and start from
    the solution, which makes first to third derivatives those of the fixed point.

    Without a horizon and with discount 1 the value is finite at temperature 0, without noise, if
    the state comes to rest where a step pays nothing. What a step pays there is told from 0 up to
    rounding; `error_bound` takes it to be 0.

    :param temperature: in reward units, >= 0; at 0 (control only) the linear-quadratic regulator,
        whose policy has zero covariance.
    :param target: `"control"` keeps the model's dynamics and maximises the objective; `"posterior"`
        conditions the whole trajectory on O = 1, and so wishes for lucky noise.
    :raises TypeError: the model is not a `LinearGaussianModel`.
    :raises ValueError: temperature or target out of range; the posterior without a horizon or with
        a discount below 1; neither horizon nor discount below 1, but a temperature, noise or a step
        that pays even at rest; a value that is infinite, because of costs too negative or a mode
        that grows and cannot be controlled; a mode that grows faster than the discount forgets
        because it costs nothing.
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
        return _solve_stationary(problem)
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
    if horizon is None or problem.discount != 1:
        raise ValueError(
            f"the posterior needs a horizon and discount 1, got horizon {horizon} and discount "
            f"{problem.discount}: with the discount as a survival probability it is a mixture over "
            "lengths of life, not a Gaussian, and without a horizon the evidence has no limit; set "
            "horizon=T and discount=1, or ask for the control target; the first steps of a long "
            "horizon have the policy and the dynamics that T → ∞ leads to, where it leads to any"
        )
    messages, steps = _backward(problem, horizon, posterior=True)
    _, control = _backward(problem, horizon, posterior=False)
    start = expected_message(messages[0], problem.start_noise, problem, posterior=True)
    mean, covariance = given_evidence(
        problem, messages[0], problem.start[:, None], problem.start_noise
    )
    advance, noise = given_evidence(problem, messages[1:], problem.advance, problem.noise)
    n = problem.size - 1
    shifted = advance @ action_shift(-problem.prior_mean, n + 1)
    error_bound = _rounding_bound(problem, steps, advance, noise)
    return dataclasses.replace(
        solution_of(problem, messages, steps, error_bound, iterations=2 * horizon),
        target="posterior",
        log_evidence=-(problem.start @ start @ problem.start) / problem.temperature,
        posterior_dynamics=PosteriorDynamics(
            initial_mean=mean[:n, 0],
            initial_covariance=covariance[:n, :n],
            A=shifted[:, :n, :n],
            B=shifted[:, :n, n + 1 :],
            offset=shifted[:, :n, n],
            noise_covariance=noise[:, :n, :n],
        ),
        gap=gap_parts(problem, messages, steps, control),
    )


def _solve_stationary(problem: Problem) -> LinearGaussianSolution:
    undiscounted = problem.discount == 1
    if undiscounted and (problem.temperature > 0 or problem.noise.any()):
        raise ValueError(
            "without a horizon the value needs a discount below 1, got 1: noise and entropy add "
            "the same amount at every step; set discount < 1 or horizon=T, or have neither noise "
            "nor temperature"
        )
    with torch.no_grad():
        message, iterations = _double(problem)
        for _ in range(MAX_NEWTON):
            last, message, iterations = message, _newton(problem, message), iterations + 1
            if (message - last).norm() <= CONVERGED * message.norm():
                break
    message = _newton(problem, _newton(problem, message))
    if undiscounted:
        message = _without_value_at_rest(problem, message)
    steps = back_up(problem, expected_message(message, problem.noise, problem, posterior=False))
    with torch.no_grad():
        residual = steps.value - message
        # The error is the residual carried back along the closed loop: that of this policy bounds
        # it on one side, that of the optimal policy on the other. 2 covers their difference, which
        # is of second order.
        if undiscounted:
            error = _error_from_rest(problem, message, steps, residual)
        else:
            each = torch.diag_embed(residual.abs().sum(-1)) + _rounding(steps)
            error = _carried_back(problem, steps, each)
        error_bound = 2 * torch.linalg.matrix_norm(error, ord=2)
    return solution_of(
        problem,
        message,
        steps,
        error_bound.item(),
        iterations=iterations + 3,
        residual=torch.linalg.matrix_norm(residual, ord=2).item(),
    )


def _double(problem: Problem) -> tuple[Tensor, int]:
    """The block of the stationary message in s alone, from the values of 1, 2, 4, 8, ... steps.

    Anderson (1978), Int. J. Control 28(2), 295-306; in the form of Chu, Fan, Lin and Wang (2004),
    Int. J. Control 77(8), 767-788, for √γA and √γB, with the cross cost eliminated.
    """
    n, (A, B) = problem.size - 1, _discounted(problem)
    inverse = torch.linalg.inv(with_prior(problem, problem.cost[n + 1 :, n + 1 :]))
    gain = inverse @ problem.cost[n + 1 :, :n]
    value = symmetrised(problem.cost[:n, :n] - problem.cost[:n, n + 1 :] @ gain)
    loop, reach = A - B @ gain, symmetrised(B @ inverse @ B.mT)
    smallest = torch.linalg.eigvalsh(value)[0].item()
    if smallest < -CONVERGED * problem.cost.abs().max():
        raise ValueError(
            "without a horizon no state may pay ever more: expected the cost that the best action "
            "leaves, state_cost − cross_cost · action_cost^{-1} · cross_cost', to be positive "
            f"semidefinite, got smallest eigenvalue {smallest:.6g}; raise state_cost or set "
            "horizon=T"
        )
    identity = torch.eye(n, dtype=A.dtype)
    for iteration in range(1, MAX_DOUBLINGS + 1):
        mixed = torch.linalg.solve(identity + reach @ value, torch.cat([loop, reach], dim=1))
        more = symmetrised(loop.mT @ value @ mixed[:, :n])
        reach = reach + symmetrised(loop @ mixed[:, n:] @ loop.mT)
        value, loop = value + more, loop @ mixed[:, :n]
        if more.norm() <= CONVERGED * value.norm():
            return pad(value, (0, 1, 0, 1)), iteration
        if not all(part.isfinite().all() for part in (value, reach, loop)):
            break
    raise ValueError(_why_unstable(problem))


def _newton(problem: Problem, message: Tensor) -> Tensor:
    """The message of the policy that is greedy for this one: a step of policy iteration.

    Kleinman (1968), IEEE Trans. Automatic Control 13(1), 114-115.
    """
    steps = back_up(problem, expected_message(message, problem.noise, problem, posterior=False))
    return symmetrised(message + _carried_back(problem, steps, steps.value - message))


def _carried_back(problem: Problem, steps: Backup, change: Tensor) -> Tensor:
    """What adding `change`, over (s, 1), to the cost of every step adds to the policy's message.

    With discount 1, relative to the message where the policy comes to rest.
    """
    n, discount = problem.size - 1, problem.discount
    loop = math.sqrt(discount) * problem.advance @ steps.closed_loop
    if torch.linalg.eigvals(loop[:n, :n].detach()).abs().max() >= 1:
        raise ValueError(_why_unstable(problem))
    if discount == 1:
        shift, back = rest_shift(loop)
        return back.mT @ sum_from_rest(loop, shift.mT @ change @ shift) @ back
    total = power_sum(loop, change)
    spread = next_covariance(problem.advance, problem.noise, steps)
    return total + problem.constant(discount / (1 - discount) * (spread * total).sum())


def _without_value_at_rest(problem: Problem, message: Tensor) -> Tensor:
    """The message that is 0 where its greedy policy comes to rest, for ever and so for nothing."""
    steps = back_up(problem, message)
    rest = rest_shift(problem.advance @ steps.closed_loop)[0][:, -1]
    step = rest @ (steps.value - message) @ rest
    if step.abs() > 8 * (rest @ _rounding(steps) @ rest):
        raise ValueError(
            "without a horizon and with discount 1 the value is infinite: expected a reward of 0 "
            f"in the state {[round(x, 6) for x in rest[:-1].tolist()]} that the best policy comes "
            f"to rest in, got {-step.item():.6g} a step; change reward_offset, or set discount < 1 "
            "or horizon=T"
        )
    return message - problem.constant(rest @ message @ rest)


def _error_from_rest(problem: Problem, message: Tensor, steps: Backup, residual: Tensor) -> Tensor:
    """A form that dominates the error of `message`, to first order, where the discount is 1.

    In coordinates from the rest point, where costs are squares and products with 1: the squares
    add up along the closed loop, the products to (I − F')^{-1} times theirs. The message is 0 at
    rest, so that what is left is how far the rest point is off, times the slope there.
    """
    n, loop = problem.size - 1, problem.advance @ steps.closed_loop
    shift, back = rest_shift(loop)
    size, policy = steps.action_value.shape[-1] * EPSILON, steps.closed_loop.abs()
    inexact = size * (policy.mT @ steps.action_value.abs() @ policy + steps.value.abs())
    each = (shift.mT @ residual @ shift).abs() + shift.abs().mT @ inexact @ shift.abs()
    squares = power_sum(loop[:n, :n], torch.diag(each[:n, :n].sum(-1)))
    settle = torch.linalg.inv(problem.identity[:n, :n] - loop[:n, :n]).abs()
    products = settle.mT @ each[:n, n]
    rest, push = shift[:, n].abs(), problem.advance[:n, n + 1 :].abs()
    slope_in_action = size * (steps.action_value.abs() @ policy @ rest)[n + 1 :]
    curvature = torch.linalg.inv(steps.action_value[n + 1 :, n + 1 :]).abs()
    wrong_action = curvature @ (push.mT @ products + slope_in_action)
    advanced = problem.advance.abs() @ policy @ rest
    moved = settle @ (push @ wrong_action + size * (rest + advanced)[:n])
    at_rest = 2 * (message[:n] @ shift[:, n]).abs() @ moved
    at_rest = at_rest + size * rest @ message.abs() @ rest
    error = pad(squares + torch.diag(products), (0, 1, 0, 1))
    return back.mT @ (error + problem.constant(at_rest + products.sum())) @ back


def _discounted(problem: Problem) -> tuple[Tensor, Tensor]:
    """√γA and √γB."""
    n, advance = problem.size - 1, math.sqrt(problem.discount) * problem.advance.detach()
    return advance[:n, :n], advance[:n, n + 1 :]


def _why_unstable(problem: Problem) -> str:
    """What to say when no stable solution exists: which mode is at fault (by Hautus's test)."""
    A, B = _discounted(problem)
    limit = problem.discount**-0.5
    for eigenvalue in torch.linalg.eigvals(A):
        shifted = A - eigenvalue * torch.eye(len(A), dtype=eigenvalue.dtype)
        reached = torch.linalg.matrix_rank(torch.cat([shifted, B.to(shifted)], dim=1)) == len(A)
        if eigenvalue.abs() >= 1 and not reached:
            return (
                f"no action reaches a mode of A that grows by {eigenvalue.abs() * limit:.6g} a "
                f"step, faster than the discount {problem.discount} forgets: expected less than "
                f"{limit:.6g}; extend B, lower the discount, or set horizon=T"
            )
    return (
        f"the best policy leaves a mode growing by {limit:.6g} a step or more, faster than the "
        f"discount {problem.discount} forgets, because it costs nothing: give it a state_cost, "
        "lower the discount, or set horizon=T"
    )


def _rounding(steps: Backup) -> Tensor:
    """A diagonal form that dominates what rounding does to one backup, entry by entry."""
    loop = steps.closed_loop.abs()
    entries = loop.mT @ steps.action_value.abs() @ loop + steps.value.abs()
    return torch.diag_embed(steps.action_value.shape[-1] * EPSILON * entries.sum(-1))


@torch.no_grad()
def _rounding_bound(problem: Problem, steps: Backup, advance: Tensor, noise: Tensor) -> float:
    """The rounding of every backup, carried back to the steps before it; the largest of all."""
    loops = math.sqrt(problem.discount) * advance @ steps.closed_loop
    spreads = problem.discount * next_covariance(advance, noise, steps)
    backwards = (part.flip(0) for part in (_rounding(steps), loops, spreads))
    error, largest = torch.zeros_like(problem.noise), 0.0
    for fresh, loop, spread in zip(*backwards, strict=True):
        error = fresh + loop.mT @ error @ loop + problem.constant((spread * error).sum())
        largest = max(largest, error.norm().item())
    return largest
