"""One step of inference in a linear-Gaussian trajectory: `back_up`.

Every message is a quadratic form, so a step backwards over states and actions is a map of matrices.
In homogeneous coordinates z = (s, 1) and y = (s, 1, a), which make linear and constant terms
entries of one matrix, r = −y'Cy, V = −z'Pz, Q = −y'Hy, and z' has mean Fy and covariance Σ:

1. Control averages the message over noise: E V = −(Fy)'P(Fy) − tr ΣP.
2. The posterior averages its exponential. With S = I + (2/α)ΣP,
   α log E e^{V/α} = −(Fy)'PS^{-1}(Fy) − (α/2) log det S.
3. Q = r + γ · (1 or 2), so H = C + γF'(...)F.
4. V = α log ∫ ρ e^{Q/α} da: the Schur complement of H_aa in H, and a log-determinant. Where ρ is
   Lebesgue measure that is (α/2)[m log πα − log det H_aa]. A Gaussian ρ of precision Λ adds (α/2)Λ
   to H_aa, and the term is −(α/2) log det(I + (2/α)Λ^{-1}H_aa).
5. π = ρ e^{(Q−V)/α} = N(−H_aa^{-1}H_az z, (α/2)H_aa^{-1}): for α → 0 the linear regulator.
6. Given O = 1, z' has mean S^{-1}Fy and covariance S^{-1}Σ. No step needs an inverse of Σ.

1 with 5 is the maximum-entropy regulator, 2 the risk-seeking one (Jacobson 1973, IEEE Trans.
Automatic Control 18(2), 124-131). As inference: Toussaint (2009), ICML, "Robot trajectory
optimization using approximate inference"; Levine (2018), arXiv:1805.00909, sections 2 and 3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from inference_rl.linear_gaussian import LinearGaussianModel


class Problem(NamedTuple):
    """The model in homogeneous coordinates, actions from the prior mean: y = (s, 1, a − mean).

    `noise` and `start_noise` are covariances of (s', 1) and (s_0, 1), `start` the mean of (s_0, 1).
    """

    cost: Tensor
    advance: Tensor
    noise: Tensor
    start: Tensor
    start_noise: Tensor
    prior_mean: Tensor
    prior_covariance: Tensor | None
    prior_precision: Tensor
    temperature: Tensor
    discount: float

    @classmethod
    def of(cls, model: LinearGaussianModel, temperature: Tensor) -> Problem:
        n, m = model.B.shape
        state, action = model.state_linear[:, None] / 2, model.action_linear[:, None] / 2
        constant = model.reward_offset.reshape(1, 1)
        rows = (
            torch.cat([model.state_cost, state, model.cross_cost], dim=1),
            torch.cat([state.mT, constant, action.mT], dim=1),
            torch.cat([model.cross_cost.mT, action, model.action_cost], dim=1),
        )
        advance = torch.cat([model.A, model.offset[:, None], model.B], dim=1)
        one = torch.eye(n + 1 + m, dtype=advance.dtype)[n]
        shift = action_shift(model.prior_mean, n + 1)
        prior = model.prior_covariance
        return cls(
            cost=shift.mT @ torch.cat(rows) @ shift,
            advance=torch.cat([advance, one[None]]) @ shift,
            noise=pad(model.noise_covariance, (0, 1, 0, 1)),
            start=pad(model.initial_mean, (0, 1), value=1.0),
            start_noise=pad(model.initial_covariance, (0, 1, 0, 1)),
            prior_mean=model.prior_mean,
            prior_covariance=prior,
            prior_precision=advance.new_zeros(m, m) if prior is None else torch.linalg.inv(prior),
            temperature=temperature,
            discount=model.discount,
        )

    @property
    def size(self) -> int:
        """n + 1: the coordinates of (s, 1)."""
        return len(self.start)

    @property
    def identity(self) -> Tensor:
        return torch.eye(self.size, dtype=self.start.dtype)

    def constant(self, value: Tensor) -> Tensor:
        """The quadratic form over (s, 1) that has this value everywhere."""
        return pad(value.reshape(1, 1), (self.size - 1, 0, self.size - 1, 0))


class Backup(NamedTuple):
    """One step of the recursion, or all steps stacked, in the coordinates of `Problem`.

    `value` is P and `action_value` H; `closed_loop` maps (s, 1) to the policy's mean of y;
    `divergence` is KL(π ‖ ρ) less the part that depends on the state.
    """

    value: Tensor
    action_value: Tensor
    closed_loop: Tensor
    covariance: Tensor
    divergence: Tensor


def expected_message(
    message: Tensor, covariance: Tensor, problem: Problem, posterior: bool
) -> Tensor:
    """Lines 1 and 2 of the derivation: `message` as a function of the mean of its argument."""
    if not posterior:
        return message + problem.constant((covariance * message).sum())
    tilt = 2 / problem.temperature * covariance @ message
    smallest = 1 + torch.linalg.eigvals(tilt.detach()).real.min().item()
    if smallest <= 0:
        raise ValueError(
            "the evidence is infinite: expected I + (2 / temperature) · covariance · (cost of what "
            f"follows) to have positive eigenvalues, got {smallest:.6g}; a negative cost outgrows "
            "the Gaussian tails: raise the temperature or the costs, or ask for the control target"
        )
    log_det = problem.temperature / 2 * log_det_one_plus(tilt)
    shrunk = torch.linalg.solve(problem.identity + tilt.mT, message)
    return symmetrised(shrunk) + problem.constant(log_det)


def back_up(problem: Problem, expected: Tensor) -> Backup:
    """Lines 3 to 5 of the derivation, given line 1 or 2."""
    n, temperature = problem.size, problem.temperature
    ahead = problem.discount * problem.advance.mT @ expected @ problem.advance
    action_value = symmetrised(problem.cost + ahead)
    curvature = action_value[n:, n:]
    inverse = torch.linalg.inv(with_prior(problem, curvature))
    gain = -inverse @ action_value[n:, :n]
    if temperature == 0:
        log_integral, divergence = temperature, temperature.new_tensor(torch.inf)
    elif problem.prior_covariance is None:
        log_integral, divergence = _over_lebesgue(curvature, temperature)
    else:
        log_integral, divergence = _over_gaussian(curvature, problem.prior_covariance, temperature)
    closed_loop = torch.cat([problem.identity, gain])
    # The Schur complement as a sum of squares: it stays semidefinite over 10^4 steps.
    paid = closed_loop.mT @ action_value @ closed_loop
    kept = temperature / 2 * gain.mT @ problem.prior_precision @ gain
    value = symmetrised(paid + kept) - problem.constant(log_integral)
    covariance = temperature / 2 * symmetrised(inverse)
    return Backup(value, action_value, closed_loop, covariance, divergence)


def given_evidence(
    problem: Problem, message: Tensor, mean: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor]:
    """Line 6 of the derivation: `mean` (a map) and `covariance`, given what `message` knows."""
    tilt = problem.identity + 2 / problem.temperature * covariance @ message
    # Expanded, or `solve` takes a matrix for a batch of vectors when the horizon is n + 1.
    mean, covariance = (x.expand(*tilt.shape[:-2], *x.shape) for x in (mean, covariance))
    return torch.linalg.solve(tilt, mean), symmetrised(torch.linalg.solve(tilt, covariance))


def with_prior(problem: Problem, curvature: Tensor) -> Tensor:
    """The curvature in the action of cost and divergence: positive definite, or refused."""
    total = curvature + problem.temperature / 2 * problem.prior_precision
    # Not by Cholesky: torch starts its threads to cut out a triangle of whatever size, and on a
    # busy machine that takes milliseconds, at each of 10^4 steps.
    smallest = torch.linalg.eigvalsh(total.detach())[0].item()
    if smallest <= 0:
        raise ValueError(
            "the soft value is infinite: expected action_cost plus the cost of what follows (plus "
            "temperature / 2 · a Gaussian prior's precision) to be positive definite, got smallest "
            f"eigenvalue {smallest:.6g}; raise action_cost, or give a Gaussian prior"
        )
    return total


def _over_lebesgue(curvature: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """α log ∫ exp(−a' curvature a/α) da, and minus the entropy of the integrand as a density."""
    size = len(curvature)
    log_integral = (size * (math.pi * temperature).log() - torch.logdet(curvature)) / 2
    return temperature * log_integral, -log_integral - size / 2


def _over_gaussian(curvature: Tensor, prior: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """α log E exp(−a' curvature a/α) under N(0, prior), and KL(the integrand ‖ N(0, prior)).

    Both as functions of what the costs add to the prior, and so accurate where that is tiny.
    """
    tilt = 2 / temperature * prior @ curvature
    log_det = log_det_one_plus(tilt)
    moved = torch.linalg.solve(torch.eye(len(tilt), dtype=tilt.dtype) + tilt, tilt)
    return -temperature / 2 * log_det, (log_det - moved.trace()) / 2


def log_det_one_plus(matrix: Tensor) -> Tensor:
    """log det(I + matrix), to full relative accuracy even where the matrix is tiny."""
    if matrix.norm() > 1e-2:
        return torch.logdet(torch.eye(len(matrix), dtype=matrix.dtype) + matrix)
    total, power = matrix.new_zeros(()), matrix
    for k in range(1, 9):  # tr log(I + X) = tr X − tr X²/2 + ...: the ninth term is below 1e-18
        total = total - (-1) ** k / k * power.trace()
        power = power @ matrix
    return total


def action_shift(mean: Tensor, size: int) -> Tensor:
    """(s, 1, b) -> (s, 1, b + mean), where (s, 1) has `size` coordinates."""
    identity = torch.eye(size + len(mean), dtype=mean.dtype)
    return identity + pad(mean, (size, 0)).outer(identity[size - 1])


def symmetrised(matrix: Tensor) -> Tensor:
    """What of a matrix its quadratic form depends on; takes rounding out of symmetric ones."""
    return (matrix + matrix.mT) / 2
