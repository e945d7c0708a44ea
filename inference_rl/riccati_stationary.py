"""Messages without a horizon, the same at every step: `stationary_control`, `stationary_posterior`.

Doubling finds the state's own block of the message as the limit of ever longer horizons, Newton's
method the rest. The last two Newton steps are differentiable and start from the solution, which
makes first to third derivatives those of the fixed point.

The posterior of an endless episode is the limit of the first steps of ever longer ones. In the
terms of `inference_rl.linear_gaussian_backup`, with T the step backwards and Σ the noise:

1. T(P + constant) = T(P) + constant: P converges up to a constant, to T(P) = P − αλ at (1, 1).
2. λ = lim log p(O_{1:T+1}) − log p(O_{1:T}): what a step adds to the evidence, in nats.
3. V(s)/α = lim log p(O_{1:T} | s_0 = s) − log p(O_{1:T}) fixes the constant: E e^{V/α} = 1 at the
   start, and p(s_0 | O) = p(s_0) e^{V/α} as ever.
4. Q = r − αλ + α log E e^{V/α}, so that π = ρ e^{(Q−V)/α} as ever.
5. P(I + (2/α)ΣP)^{-1} = (P^{-1} + (2/α)Σ)^{-1}: luck works like one more action, of cost
   (α/2)Σ^{-1}, and doubling is that of control with (2/α)Σ added to B(...)^{-1}B'.
6. A change δ of P changes T(P) by L'δL + constant, where L is the mean of (s', 1) given (s, 1) and
   O: a Newton step is a sum along L, up to a constant, if its modes decay.

Jacobson (1973), IEEE Trans. Automatic Control 18(2), 124-131; Whittle (1981), Advances in Applied
Probability 13(4), 764-777.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from inference_rl.linear_gaussian_backup import (
    Backup,
    Problem,
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
    RateParts,
    next_covariance,
    posterior_dynamics,
    power_sum,
    rest_shift,
    rounding,
    solution_of,
    sum_from_rest,
    without_worth,
)

MAX_NEWTON = 20

CONVERGED = 1e-12
"""Relative change at which quadratic convergence leaves nothing but rounding."""


def stationary_control(problem: Problem) -> LinearGaussianSolution:
    """The same policy at every step that maximises the objective; see `solve_linear_gaussian`."""
    undiscounted = problem.discount == 1
    if undiscounted and (problem.temperature > 0 or problem.noise.any()):
        raise ValueError(
            "without a horizon the value needs a discount below 1, got 1: noise and entropy add "
            "the same amount at every step; set discount < 1 or horizon=T, or have neither noise "
            "nor temperature"
        )
    message, iterations = _fixed_point(problem, posterior=False)
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
            each = torch.diag_embed(residual.abs().sum(-1)) + rounding(steps)
            error = _carried_back(problem, steps, each)
        error_bound = 2 * torch.linalg.matrix_norm(error, ord=2)
    return solution_of(
        problem,
        message,
        steps,
        error_bound.item(),
        iterations=iterations + 1,
        residual=torch.linalg.matrix_norm(residual, ord=2).item(),
    )


def stationary_posterior(problem: Problem) -> LinearGaussianSolution:
    """The first steps of an endless episode, given O = 1 at all of them. Of discount 1."""
    relative, iterations = _fixed_point(problem, posterior=True)
    evidence_rate = _rate(problem, relative, posterior=True)
    level = _level(problem, relative)
    message = relative - problem.constant(level)
    steps = back_up(problem, expected_message(message, problem.noise, problem, posterior=True))
    gain = problem.temperature * evidence_rate
    residual = steps.value + problem.constant(gain) - message
    every_step = pad(gain.reshape(1, 1), [problem.size - 1, steps.covariance.shape[-1]] * 2)
    seen = _in_hindsight(problem, message)
    with torch.no_grad():
        error = _error_up_to_a_constant(problem, message, steps, residual)
    control_rate, more = _control_rate(problem)
    return dataclasses.replace(
        without_worth(
            problem,
            message,
            steps._replace(action_value=steps.action_value + every_step),
            2 * torch.linalg.matrix_norm(error, ord=2).item(),
            iterations=iterations + more + 1,
            residual=torch.linalg.matrix_norm(residual.detach(), ord=2).item(),
        ),
        target="posterior",
        posterior_dynamics=posterior_dynamics(problem, message, seen.advance, seen.noise),
        rate=RateParts(evidence_rate, control_rate),
    )


def _control_rate(problem: Problem) -> tuple[Tensor, int]:
    """What a step adds to the largest bound on the evidence, nats; and the iterations it took."""
    try:
        message, iterations = _fixed_point(problem, posterior=False)
    except ValueError:  # a mode that luck holds, and no action
        return problem.temperature.new_tensor(-torch.inf), 0
    return _rate(problem, message, posterior=False), iterations


def _rate(problem: Problem, message: Tensor, posterior: bool) -> Tensor:
    """λ of a `message` that is right up to a constant."""
    ahead = expected_message(message, problem.noise, problem, posterior)
    return (message - back_up(problem, ahead).value)[-1, -1] / problem.temperature


def _level(problem: Problem, message: Tensor) -> Tensor:
    """What to subtract from `message` so that its evidence at the start is 1."""
    start = expected_message(message, problem.start_noise, problem, posterior=True)
    return problem.start @ start @ problem.start


def _in_hindsight(problem: Problem, message: Tensor) -> Problem:
    """With the dynamics that are left given the evidence in `message`."""
    advance, noise = given_evidence(problem, message, problem.advance, problem.noise)
    return problem._replace(advance=advance, noise=noise)


def _fixed_point(problem: Problem, posterior: bool) -> tuple[Tensor, int]:
    """The stationary message, up to a constant if the discount is 1, and the iterations it took."""
    with torch.no_grad():
        message, iterations = _double(problem, posterior)
        for _ in range(MAX_NEWTON):
            last, message = message, _newton(problem, message, posterior)
            iterations += 1
            if (message - last).norm() <= CONVERGED * message.norm():
                break
    return _newton(problem, _newton(problem, message, posterior), posterior), iterations + 2


def _double(problem: Problem, posterior: bool) -> tuple[Tensor, int]:
    """The block of the stationary message in s alone, from the values of 1, 2, 4, 8, ... steps.

    Anderson (1978), Int. J. Control 28(2), 295-306; in the form of Chu, Fan, Lin and Wang (2004),
    Int. J. Control 77(8), 767-788, for √γA and √γB, with the cross cost eliminated.
    """
    n, (A, B) = problem.size - 1, _discounted(problem)
    inverse = torch.linalg.inv(with_prior(problem, problem.cost[n + 1 :, n + 1 :]))
    gain = inverse @ problem.cost[n + 1 :, :n]
    value = symmetrised(problem.cost[:n, :n] - problem.cost[:n, n + 1 :] @ gain)
    loop, reach = A - B @ gain, symmetrised(B @ inverse @ B.mT)
    if posterior:
        reach = reach + 2 / problem.temperature * problem.noise[:n, :n]
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
    raise ValueError(_why_unstable(problem, posterior))


def _newton(problem: Problem, message: Tensor, posterior: bool) -> Tensor:
    """The message of the policy that is greedy for this one: a step of policy iteration.

    Kleinman (1968), IEEE Trans. Automatic Control 13(1), 114-115.
    """
    steps = back_up(problem, expected_message(message, problem.noise, problem, posterior))
    seen = _in_hindsight(problem, message) if posterior else problem
    loop = math.sqrt(problem.discount) * (seen.advance @ steps.closed_loop).detach()[:-1, :-1]
    if torch.linalg.eigvals(loop).abs().max() >= 1:
        raise ValueError(_why_unstable(problem, posterior))
    return symmetrised(message + _carried_back(seen, steps, steps.value - message))


def _carried_back(problem: Problem, steps: Backup, change: Tensor) -> Tensor:
    """What adding `change`, over (s, 1), to the cost of every step adds to the policy's message.

    With discount 1, relative to the message where the policy comes to rest.
    """
    discount = problem.discount
    loop = math.sqrt(discount) * problem.advance @ steps.closed_loop
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
    if step.abs() > 8 * (rest @ rounding(steps) @ rest):
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
    squares, products, settle = _summed_error(shift, loop, residual, _inexact(steps))
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


def _error_up_to_a_constant(
    problem: Problem, message: Tensor, steps: Backup, residual: Tensor
) -> Tensor:
    """A form that dominates the error of the posterior's `message`, to first order.

    What is added to the message at rest moves its level as much, and leaves it where it is. The
    level is off by the mean error at the posterior's start, and by its own rounding.
    """
    seen, start = _in_hindsight(problem, message), problem.start
    loop, reached = seen.advance @ steps.closed_loop, problem.advance @ steps.closed_loop
    shift, back = rest_shift(loop)
    ahead = _inexact_luck(problem, message, problem.noise)
    inexact = _inexact(steps) + reached.abs().mT @ ahead @ reached.abs()
    squares, products, _ = _summed_error(shift, loop, residual, inexact)
    error = pad(squares + torch.diag(products), (0, 1, 0, 1)) + problem.constant(products.sum())
    error = back.mT @ error @ back
    mean, covariance = given_evidence(problem, message, start[:, None], problem.start_noise)
    at_start = (error * (mean @ mean.mT + covariance)).sum()
    own = start.abs() @ _inexact_luck(problem, message, problem.start_noise) @ start.abs()
    return error + problem.constant(at_start + own)


def _inexact_luck(problem: Problem, message: Tensor, covariance: Tensor) -> Tensor:
    """What rounding does to `expected_message` of the posterior, entry by entry at most."""
    tilt = 2 / problem.temperature * covariance.abs() @ message.abs()
    inverse, _ = given_evidence(problem, message, problem.identity, covariance)
    wrong = (problem.identity + tilt) @ inverse.abs()
    log_det = problem.temperature / 2 * wrong.trace()
    of_form = symmetrised((message @ inverse).abs() @ wrong)
    return problem.size * EPSILON * (of_form + problem.constant(log_det))


def _inexact(steps: Backup) -> Tensor:
    """What rounding does to one backup, entry by entry at most."""
    policy, size = steps.closed_loop.abs(), steps.action_value.shape[-1] * EPSILON
    return size * (policy.mT @ steps.action_value.abs() @ policy + steps.value.abs())


def _summed_error(
    shift: Tensor, loop: Tensor, residual: Tensor, inexact: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums along `loop` of the error of a step: of its squares, (n, n), and its products with 1.

    In coordinates from the rest point; with |(I − F)^{-1}|, (n, n), of the products' sum.
    """
    n = len(loop) - 1
    each = (shift.mT @ residual @ shift).abs() + shift.abs().mT @ inexact @ shift.abs()
    squares = power_sum(loop[:n, :n], torch.diag(each[:n, :n].sum(-1)))
    settle = torch.linalg.inv(torch.eye(n, dtype=loop.dtype) - loop[:n, :n]).abs()
    return squares, settle.mT @ each[:n, n], settle


def _discounted(problem: Problem) -> tuple[Tensor, Tensor]:
    """√γA and √γB."""
    n, advance = problem.size - 1, math.sqrt(problem.discount) * problem.advance.detach()
    return advance[:n, :n], advance[:n, n + 1 :]


def _why_unstable(problem: Problem, posterior: bool) -> str:
    """What to say when no stable solution exists: which mode is at fault (by Hautus's test)."""
    A, B = _discounted(problem)
    limit = problem.discount**-0.5
    if posterior:
        B = torch.cat([B, problem.noise[:-1, :-1].detach()], dim=1)
    for eigenvalue in torch.linalg.eigvals(A):
        shifted = A - eigenvalue * torch.eye(len(A), dtype=eigenvalue.dtype)
        reached = torch.linalg.matrix_rank(torch.cat([shifted, B.to(shifted)], dim=1)) == len(A)
        if eigenvalue.abs() >= 1 and not reached:
            if posterior:
                return (
                    "without a horizon the posterior has no limit: expected an action or noise to "
                    "reach every mode of A that does not decay, got one that grows by "
                    f"{eigenvalue.abs():.6g} a step and that neither reaches; extend B or "
                    "noise_covariance, or set horizon=T"
                )
            return (
                f"no action reaches a mode of A that grows by {eigenvalue.abs() * limit:.6g} a "
                f"step, faster than the discount {problem.discount} forgets: expected less than "
                f"{limit:.6g}; extend B, lower the discount, or set horizon=T"
            )
    if posterior:
        return (
            "without a horizon the posterior has no limit: expected every mode to decay given "
            "O = 1, got one that does not, because it costs nothing: give it a state_cost, or set "
            "horizon=T"
        )
    return (
        f"the best policy leaves a mode growing by {limit:.6g} a step or more, faster than the "
        f"discount {problem.discount} forgets, because it costs nothing: give it a state_cost, "
        "lower the discount, or set horizon=T"
    )
