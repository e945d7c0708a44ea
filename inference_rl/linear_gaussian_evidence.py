"""What the solution of a linear-Gaussian model is worth: `LinearGaussianSolution`.

Second moments of states and actions under a policy say all of it: the expected return, the
entropy and divergence of the policy, and how far apart control and posterior are, term by term.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from inference_rl.linear_gaussian import PosteriorDynamics, QuadraticForm
from inference_rl.linear_gaussian_backup import (
    Backup,
    Problem,
    action_shift,
    given_evidence,
    log_det_one_plus,
)
from inference_rl.policies import LinearGaussianPolicy

EPSILON = torch.finfo(torch.float64).eps

MAX_DOUBLINGS = 64
"""2^64 steps ahead: further than float64 can tell a discount below one from one."""


@dataclasses.dataclass(frozen=True)
class GapParts:
    """log p(O) − max ELBO = `total`, in nats: what no policy can reach under the true dynamics.

    Three divergences, averaged under the control solution (its policy π*, the true dynamics):

    :ivar start: KL(p(s_0) ‖ p(s_0 | O)).
    :ivar policy: Σ_t E KL(π*(a_t | s_t) ‖ p(a_t | s_t, O)).
    :ivar dynamics: Σ_t E KL(p(s_{t+1} | s_t, a_t) ‖ p(s_{t+1} | s_t, a_t, O)).
    """

    start: Tensor
    policy: Tensor
    dynamics: Tensor

    @property
    def total(self) -> Tensor:
        return self.start + self.policy + self.dynamics


@dataclasses.dataclass(frozen=True)
class RateParts:
    """What every step of an endless episode adds, in nats.

    :ivar log_evidence: to log p(O). :ivar max_elbo: to (largest objective) / temperature; −inf
        where no policy keeps a step's cost from growing.
    """

    log_evidence: Tensor
    max_elbo: Tensor


@dataclasses.dataclass(frozen=True)
class LinearGaussianSolution:
    """What `solve_linear_gaussian` returns; tensors are differentiable in model and temperature.

    `objective`, `objective_entropy_form`, `expected_return` and `entropy` describe `policy` in the
    true environment, whichever the target. For the posterior without a horizon they have no limit,
    no more than its evidence, and are None.

    :ivar policy: gain (m, n), offset (m,), covariance (m, m); with a leading T given a horizon T.
    :ivar v: V(s), reward units; T + 1 steps given a horizon. For the posterior target, temperature
        times the log-evidence of what follows; without a horizon less that of the episode, so that
        V(s) / temperature is the limit of log p(O_{1:T} | s_0 = s) − log p(O_{1:T}).
    :ivar q: Q(s, a), reward units; T steps given a horizon. The action prior is not part of it. For
        the posterior without a horizon less what a step adds, temperature · `rate.log_evidence`:
        always π = ρ e^{(Q − V) / temperature}.
    :ivar objective: E Σ γ^t [r − temperature · KL(π ‖ ρ)], reward units (KL form): for the control
        target E V(s_0), the largest there is. The divergence is free at temperature 0.
    :ivar objective_entropy_form: E Σ γ^t [r + temperature · H(π)], reward units.
    :ivar expected_return: E Σ γ^t r, reward units.
    :ivar entropy: E Σ γ^t H(π), nats; −inf at temperature 0.
    :ivar log_evidence: log p(O = 1), nats. None for the control target, like the next three.
    :ivar posterior_dynamics: the start and the dynamics given O = 1.
    :ivar gap: log_evidence − (largest objective) / temperature, term by term. None without a
        horizon, as is `log_evidence`.
    :ivar rate: what a step adds to either of them, without a horizon; None with one.
    :ivar error_bound: |v(s) − exact V(s)| <= error_bound · (1 + |s|²) at every s and step, reward
        units. Rounding is part of it, to first order.
    :ivar iterations: backups and doublings taken.
    :ivar residual: spectral norm of what one more backup changes in v, as a quadratic form in
        (s, 1), beyond `rate`; 0 given a horizon, which leaves no fixed point to find.
    """

    policy: LinearGaussianPolicy
    v: QuadraticForm
    q: QuadraticForm
    target: Literal["control", "posterior"]
    temperature: Tensor
    error_bound: float
    iterations: int
    residual: float
    objective: Tensor | None = None
    objective_entropy_form: Tensor | None = None
    expected_return: Tensor | None = None
    entropy: Tensor | None = None
    log_evidence: Tensor | None = None
    posterior_dynamics: PosteriorDynamics | None = None
    gap: GapParts | None = None
    rate: RateParts | None = None


def solution_of(
    problem: Problem,
    messages: Tensor,
    steps: Backup,
    error_bound: float,
    iterations: int,
    residual: float = 0.0,
) -> LinearGaussianSolution:
    """`messages` and `steps` in the model's own coordinates, and what their policy is worth.

    Of the control target: what only the posterior has is left None.
    """
    n, temperature = problem.size, problem.temperature
    occupancy = _occupancy(problem, steps)
    weight, gain = occupancy[..., n - 1, n - 1], steps.closed_loop[..., n:, :]
    expected_return = -(problem.cost * occupancy).sum()
    moved = gain @ occupancy[..., :n, :n] @ gain.mT
    divergence = (weight * steps.divergence).sum() + (problem.prior_precision * moved).sum() / 2
    log_det = torch.logdet(2 * math.pi * math.e * steps.covariance)
    soft = temperature > 0
    entropy = (weight * log_det).sum() / 2 if soft else temperature.new_tensor(-torch.inf)
    return dataclasses.replace(
        without_worth(problem, messages, steps, error_bound, iterations, residual),
        objective=expected_return - temperature * divergence if soft else expected_return,
        objective_entropy_form=expected_return + temperature * entropy if soft else expected_return,
        expected_return=expected_return,
        entropy=entropy,
    )


def without_worth(
    problem: Problem,
    messages: Tensor,
    steps: Backup,
    error_bound: float,
    iterations: int,
    residual: float = 0.0,
) -> LinearGaussianSolution:
    """`messages` and `steps` in the model's own coordinates, and no more."""
    n = problem.size
    gain, back = steps.closed_loop[..., n:, :], action_shift(-problem.prior_mean, n)
    return LinearGaussianSolution(
        policy=LinearGaussianPolicy(
            gain[..., : n - 1], gain[..., n - 1] + problem.prior_mean, steps.covariance
        ),
        v=_quadratic_form(messages, n - 1),
        q=_quadratic_form(back.mT @ steps.action_value @ back, n - 1),
        target="control",
        temperature=problem.temperature,
        error_bound=error_bound,
        iterations=iterations,
        residual=residual,
    )


def posterior_dynamics(
    problem: Problem, message: Tensor, advance: Tensor, noise: Tensor
) -> PosteriorDynamics:
    """The start given the evidence in `message`; `advance` and `noise`, given theirs, as they are.

    In the model's own coordinates; `advance` and `noise` of every step, or of all alike.
    """
    n = problem.size - 1
    mean, covariance = given_evidence(problem, message, problem.start[:, None], problem.start_noise)
    shifted = advance @ action_shift(-problem.prior_mean, n + 1)
    return PosteriorDynamics(
        initial_mean=mean[:n, 0],
        initial_covariance=covariance[:n, :n],
        A=shifted[..., :n, :n],
        B=shifted[..., :n, n + 1 :],
        offset=shifted[..., :n, n],
        noise_covariance=noise[..., :n, :n],
    )


def gap_parts(problem: Problem, messages: Tensor, steps: Backup, control: Backup) -> GapParts:
    """What `control` gives up against the posterior's `messages` and `steps`, by its moments."""
    n, m = problem.size, steps.covariance.shape[-1]
    occupancy = _occupancy(problem, control)
    deviation = (control.closed_loop - steps.closed_loop)[:, n:]
    second = control.covariance + deviation @ occupancy[:, :n, :n] @ deviation.mT
    ratio = torch.linalg.solve(steps.covariance, second).diagonal(dim1=-2, dim2=-1).sum(-1)
    log_ratio = torch.logdet(steps.covariance) - torch.logdet(control.covariance)
    ahead = problem.advance @ occupancy @ problem.advance.mT
    dynamics = [
        _noise_divergence(problem, message, moment, problem.noise)
        for message, moment in zip(messages[1:], ahead, strict=True)
    ]
    start = problem.start.outer(problem.start)
    return GapParts(
        start=_noise_divergence(problem, messages[0], start, problem.start_noise),
        policy=((ratio - m + log_ratio) / 2).sum(),
        dynamics=torch.stack(dynamics).sum(),
    )


def _noise_divergence(
    problem: Problem, message: Tensor, moment: Tensor, covariance: Tensor
) -> Tensor:
    """KL(N(μ, Σ) ‖ the same given the evidence in `message`), averaged over μ; E μμ' = `moment`.

    With S and P of the derivation it is ½[tr(S − I) − log det S + (2/α)² μ'P S^{-1}Σ Pμ].
    """
    scale = 2 / problem.temperature
    tilt = scale * covariance @ message
    _, posterior = given_evidence(problem, message, covariance, covariance)
    moved = scale**2 * (message @ posterior @ message * moment).sum()
    return (tilt.trace() - log_det_one_plus(tilt) + moved) / 2


def _occupancy(problem: Problem, steps: Backup) -> Tensor:
    """γ^t E[yy'] under the policy and the true dynamics; of a stationary policy summed over t.

    Its entry for the constant coordinate is γ^t, or 1/(1 − γ). Where that is infinite, what is at
    rest for ever is left out.
    """
    n, discount = problem.size, problem.discount
    loop = problem.advance @ steps.closed_loop
    spread = next_covariance(problem.advance, problem.noise, steps)
    moments = problem.start.outer(problem.start) + problem.start_noise
    if loop.dim() == 2 and discount == 1:
        shift, back = rest_shift(loop)
        moments = shift @ sum_from_rest(loop.mT, back @ moments @ back.mT) @ shift.mT
    elif loop.dim() == 2:
        seed = moments + discount / (1 - discount) * spread
        moments = power_sum(math.sqrt(discount) * loop.mT, seed)
    else:
        collected = [moments]
        for t in range(len(loop) - 1):
            ahead = loop[t] @ collected[-1] @ loop[t].mT + discount**t * spread[t]
            collected.append(discount * ahead)
        moments = torch.stack(collected)
    drawn = moments[..., -1:, -1:] * pad(steps.covariance, (n, 0, n, 0))
    return steps.closed_loop @ moments @ steps.closed_loop.mT + drawn


def rounding(steps: Backup) -> Tensor:
    """A diagonal form that dominates what rounding does to one backup, entry by entry."""
    loop = steps.closed_loop.abs()
    entries = loop.mT @ steps.action_value.abs() @ loop + steps.value.abs()
    return torch.diag_embed(steps.action_value.shape[-1] * EPSILON * entries.sum(-1))


def next_covariance(advance: Tensor, noise: Tensor, steps: Backup) -> Tensor:
    """Covariance of (s', 1) given s: the noise, and the policy's own."""
    push = advance[..., -steps.covariance.shape[-1] :]
    return noise + push @ steps.covariance @ push.mT


def power_sum(matrix: Tensor, seed: Tensor) -> Tensor:
    """Σ_k matrix'^k seed matrix^k for a spectral radius below 1, which solves X = seed + M'XM.

    By doubling: Smith (1968), SIAM J. Applied Mathematics 16(1), 198-201.
    """
    for _ in range(MAX_DOUBLINGS):
        seed = seed + matrix.mT @ seed @ matrix
        matrix = matrix @ matrix
        if matrix.norm().square() <= EPSILON:
            break
    return seed


def rest_shift(loop: Tensor) -> tuple[Tensor, Tensor]:
    """(s − x, 1) -> (s, 1) and back, where `loop` over (s, 1) leaves x as it is."""
    n = len(loop) - 1
    identity = torch.eye(n + 1, dtype=loop.dtype)
    rest = torch.linalg.solve(identity[:n, :n] - loop[:n, :n], loop[:n, n])
    away = pad(rest[:, None], (n, 0, 0, 1))
    return identity + away, identity - away


def sum_from_rest(loop: Tensor, seed: Tensor) -> Tensor:
    """`power_sum` in the coordinates (s − x, 1) of `rest_shift`, with 0 for the seed at rest."""
    centred = torch.block_diag(loop[:-1, :-1], loop.new_ones(1, 1))
    corner = torch.ones_like(seed)
    corner[-1, -1] = 0
    return power_sum(centred, corner * seed)


def _quadratic_form(cost: Tensor, one: int) -> QuadraticForm:
    """−x' cost x as a function of the other coordinates, where coordinate `one` is constantly 1."""
    keep = [i for i in range(cost.shape[-1]) if i != one]
    rows = cost[..., keep, :]
    return QuadraticForm(-rows[..., keep], -2 * rows[..., one], -cost[..., one, one])
