"""Environments with linear dynamics, Gaussian noise and quadratic reward: `LinearGaussianModel`.

The continuous counterpart of a finite table: every message is a quadratic form, every policy that
inference returns is linear-Gaussian, and `inference_rl.riccati` computes both in closed form. It is
an ordinary `EnvironmentModel`, so every learned routine runs on it and can be held to that answer.
`QuadraticForm` and `PosteriorDynamics` are the pieces such an answer is made of.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from gymnasium.spaces import Box
from numpy.typing import ArrayLike
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl.environment import EnvironmentModel

SYMMETRY_TOLERANCE = 1e-9
"""Relative to a matrix's largest entry: by how much it may fail to be symmetric or semidefinite."""

SUPPORT_TOLERANCE = 1e-9
"""Relative to the coordinates: how far off its support a value of a singular Gaussian may lie."""


class LinearGaussianModel(EnvironmentModel):
    """Linear dynamics, Gaussian noise, quadratic reward; n state and m action coordinates.

        s' = A s + B a + offset + w,    w ~ N(0, noise_covariance)
        r(s, a) = −(s' Q s + a' R a + 2 s' N a) − q's − r'a − reward_offset

    with Q = `state_cost`, R = `action_cost`, N = `cross_cost`, q = `state_linear` and
    r = `action_linear`: there is no factor of one half, and costs are positive where they hurt.

    Actions range over all of R^m, in the units of B, and are not scaled to [−1, 1]: a
    linear-quadratic problem has no box. There is no uniform distribution over R^m, so the action
    prior is either the Gaussian that is given, or Lebesgue measure: log-density 0 everywhere.
    KL(π ‖ ρ) is then −H(π), and the objective's KL form and entropy form are the same number.

    All tensors are float64. Those passed in keep their autograd graph, so that whatever is computed
    from the model can be differentiated in them.

    :param A: (n, n). :param B: (n, m).
    :param state_cost: (n, n), symmetric. :param action_cost: (m, m), symmetric.
    :param noise_covariance: (n, n), symmetric and positive semidefinite; zero, the default, makes
        the dynamics deterministic.
    :param initial_mean: (n,), of the Gaussian s_0; zero by default.
    :param initial_covariance: (n, n); zero, the default, fixes the start.
    :param offset: (n,). :param cross_cost: (n, m). :param state_linear: (n,).
    :param action_linear: (m,). :param reward_offset: a number. All zero by default.
    :param prior_mean: (m,), of the Gaussian action prior; zero by default.
    :param prior_covariance: (m, m), positive definite; None, the default, means a flat prior.
    :param discount: in [0, 1]. :param horizon: steps of an episode, or None for no limit.
    :raises ValueError: a wrong shape, an entry that is not finite, a matrix that is not symmetric
        or not (semi)definite where it has to be, a discount or horizon out of range; the message
        names the argument. Whether the costs make the problem well posed depends on temperature
        and target, and is for `solve_linear_gaussian` to say.
    """

    state_space: Box
    action_space: Box

    def __init__(
        self,
        A: Tensor | ArrayLike,
        B: Tensor | ArrayLike,
        *,
        state_cost: Tensor | ArrayLike,
        action_cost: Tensor | ArrayLike,
        noise_covariance: Tensor | ArrayLike | None = None,
        initial_mean: Tensor | ArrayLike | None = None,
        initial_covariance: Tensor | ArrayLike | None = None,
        offset: Tensor | ArrayLike | None = None,
        cross_cost: Tensor | ArrayLike | None = None,
        state_linear: Tensor | ArrayLike | None = None,
        action_linear: Tensor | ArrayLike | None = None,
        reward_offset: Tensor | float = 0.0,
        prior_mean: Tensor | ArrayLike | None = None,
        prior_covariance: Tensor | ArrayLike | None = None,
        discount: float = 1.0,
        horizon: int | None = None,
    ) -> None:
        self.A, self.B = (torch.as_tensor(x, dtype=torch.float64) for x in (A, B))
        if self.A.dim() != 2 or self.A.shape[0] != self.A.shape[1]:
            raise ValueError(f"A: expected a square matrix, got shape {tuple(self.A.shape)}")
        if self.B.dim() != 2:
            raise ValueError(f"B: expected a matrix, got shape {tuple(self.B.shape)}")
        n, m = len(self.A), self.B.shape[1]
        self.A, self.B = _array("A", self.A, (n, n)), _array("B", self.B, (n, m))
        self.state_cost = _symmetric("state_cost", state_cost, n)
        self.action_cost = _symmetric("action_cost", action_cost, m)
        self.noise_covariance = _covariance("noise_covariance", noise_covariance, n)
        self.initial_mean = _array("initial_mean", initial_mean, (n,))
        self.initial_covariance = _covariance("initial_covariance", initial_covariance, n)
        self.offset = _array("offset", offset, (n,))
        self.cross_cost = _array("cross_cost", cross_cost, (n, m))
        self.state_linear = _array("state_linear", state_linear, (n,))
        self.action_linear = _array("action_linear", action_linear, (m,))
        self.reward_offset = _array("reward_offset", reward_offset, ())
        if prior_mean is not None and prior_covariance is None:
            raise ValueError(
                "prior_mean was given without prior_covariance: give both, or neither for a flat "
                "prior"
            )
        self.prior_mean = _array("prior_mean", prior_mean, (m,))
        self.prior_covariance: Tensor | None = None
        if prior_covariance is not None:
            self.prior_covariance = _covariance("prior_covariance", prior_covariance, m)
            if _rank(self.prior_covariance) < m:
                raise ValueError(
                    "prior_covariance: expected a positive definite matrix, got smallest "
                    f"eigenvalue {_eigenvalues(self.prior_covariance)[0]:.6g}; forbid a direction "
                    "of action by leaving it out of B"
                )
        if not 0 <= discount <= 1:
            raise ValueError(f"discount: expected a number in [0, 1], got {discount}")
        if horizon is not None and (not isinstance(horizon, int) or horizon < 1):
            raise ValueError(
                f"horizon: expected a whole number of steps >= 1 or None, got {horizon!r}"
            )
        self.discount, self.horizon = discount, horizon
        self.state_space = Box(-np.inf, np.inf, (n,), np.float64)
        self.action_space = Box(-np.inf, np.inf, (m,), np.float64)

    def initial_state(self) -> TorchDistribution:
        return gaussian(self.initial_mean, self.initial_covariance)

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        mean = state.to(self.A) @ self.A.mT + action.to(self.B) @ self.B.mT + self.offset
        return gaussian(mean, self.noise_covariance)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        state, action = state.to(self.A), action.to(self.B)
        of_state = state @ self.state_cost + self.state_linear + 2 * action @ self.cross_cost.mT
        of_action = action @ self.action_cost + self.action_linear
        return -(of_state * state).sum(-1) - (of_action * action).sum(-1) - self.reward_offset

    def action_prior(self, state: Tensor) -> TorchDistribution:
        """The Gaussian prior, or Lebesgue measure on R^m: log-density 0, not to be sampled."""
        batch = state.shape[:-1]
        if self.prior_covariance is None:
            return dist.ImproperUniform(constraints.real_vector, batch, self.prior_mean.shape)
        return gaussian(self.prior_mean.expand((*batch, -1)), self.prior_covariance)


def gaussian(mean: Tensor, covariance: Tensor) -> TorchDistribution:
    """N(mean, covariance) of any rank: a `Delta` if the covariance is zero.

    :param mean: batch + (n,). :param covariance: (n, n), positive semidefinite.
    """
    rank = _rank(covariance)
    if rank == 0:
        return dist.Delta(mean, event_dim=1)
    if rank == len(covariance):
        return dist.MultivariateNormal(mean, scale_tril=torch.linalg.cholesky(covariance))
    return SingularNormal(mean, covariance)


class SingularNormal(TorchDistribution):
    """A Gaussian whose covariance has less than full rank: it lives on an affine subspace.

    Its density is taken with respect to Lebesgue measure on that subspace, and is zero off it, so a
    rank of zero would be a `Delta`. Draws and densities are differentiable in `loc`, not in the
    covariance: the subspace jumps when the rank does.

    :param loc: batch + (n,). :param covariance: (n, n), positive semidefinite, not zero.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, covariance: Tensor) -> None:
        self.loc, self.covariance_matrix = loc, covariance
        rank = _rank(covariance)
        values, vectors = torch.linalg.eigh(covariance.detach())
        self._scales, self._axes = values[-rank:].sqrt(), vectors[:, -rank:]
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SingularNormal:
        shape = torch.Size(batch_shape) + self.event_shape
        return SingularNormal(self.loc.expand(shape), self.covariance_matrix)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape + self._scales.shape
        standard = torch.randn(shape, dtype=self.loc.dtype)
        value: Tensor = self.loc + (standard * self._scales) @ self._axes.mT
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        deviation = value - self.loc
        along = deviation @ self._axes
        off = (deviation - along @ self._axes.mT).abs().amax(-1)
        size = 1 + value.abs().amax(-1) + self.loc.abs().amax(-1)
        density = -0.5 * (along / self._scales).square() - self._scales.log()
        inside = (density - 0.5 * math.log(2 * math.pi)).sum(-1)
        log_prob: Tensor = torch.where(off <= SUPPORT_TOLERANCE * size, inside, -torch.inf)
        return log_prob


@dataclasses.dataclass(frozen=True)
class QuadraticForm:
    """f(x) = x' quadratic x + linear' x + constant; reward units for messages.

    :param quadratic: (d, d), symmetric. :param linear: (d,). :param constant: (). Each has a
        leading dimension of steps where the message depends on the step.
    """

    quadratic: Tensor
    linear: Tensor
    constant: Tensor

    def at(self, t: int) -> QuadraticForm:
        """The form of step `t`; a message for `trajectory`."""
        return QuadraticForm(self.quadratic[t], self.linear[t], self.constant[t])

    def __call__(self, *point: Tensor, t: int | None = None) -> Tensor:
        """f at a point of shape batch + (d,), or at parts of it: `v(state)`, `q(state, action)`.

        :raises ValueError: the form depends on the step and is called without one.
        """
        if self.quadratic.dim() == 3:
            if t is None:
                raise ValueError(
                    "this message depends on the step: pass t, from 0 to "
                    f"{len(self.quadratic) - 1}, or take .at(t)"
                )
            return self.at(t)(*point)
        x = torch.cat([part.to(self.quadratic) for part in point], dim=-1)
        value: Tensor = ((x @ self.quadratic + self.linear) * x).sum(-1) + self.constant
        return value


@dataclasses.dataclass(frozen=True)
class PosteriorDynamics:
    """p(s_0 | O = 1) and p(s' | s, a, O = 1): what the start and the noise were like in hindsight.

    :param initial_mean: (n,), initial_covariance: (n, n), of the start.
    :param A: (T, n, n), B: (T, n, m), offset: (T, n), noise_covariance: (T, n, n), of step t; or
        without the T where all steps are alike.
    """

    initial_mean: Tensor
    initial_covariance: Tensor
    A: Tensor
    B: Tensor
    offset: Tensor
    noise_covariance: Tensor

    def initial_state(self) -> TorchDistribution:
        return gaussian(self.initial_mean, self.initial_covariance)

    def transition(self, state: Tensor, action: Tensor, t: int | None = None) -> TorchDistribution:
        """p(s' | s, a, O = 1) at step `t`.

        :raises ValueError: the dynamics depend on the step and are asked for without one.
        """
        tables = self.A, self.B, self.offset, self.noise_covariance
        if self.A.dim() == 3:
            if t is None:
                raise ValueError(
                    "these dynamics depend on the step: pass t, from 0 to "
                    f"{len(self.A) - 1}, as transition(state, action, t)"
                )
            tables = self.A[t], self.B[t], self.offset[t], self.noise_covariance[t]
        A, B, offset, covariance = tables
        return gaussian(state.to(A) @ A.mT + action.to(B) @ B.mT + offset, covariance)


def _eigenvalues(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(matrix.detach())


def _rank(covariance: Tensor) -> int:
    values = _eigenvalues(covariance)
    return int((values > len(values) * torch.finfo(values.dtype).eps * values[-1]).sum())


def _array(name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    """`value` in float64, zeros if None; refused if its shape is wrong or an entry not finite."""
    if value is None:
        return torch.zeros(shape, dtype=torch.float64)
    array = torch.as_tensor(value, dtype=torch.float64)
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(array.shape)}")
    if not torch.isfinite(array).all():
        where = tuple((~torch.isfinite(array)).nonzero()[0].tolist())
        raise ValueError(
            f"{name}: every entry must be finite, got {array[where].item()} at {where}"
        )
    return array


def _symmetric(name: str, value: Any, size: int) -> Tensor:
    matrix = _array(name, value, (size, size))
    gap = (matrix - matrix.mT).abs().max().item()
    if gap > SYMMETRY_TOLERANCE * matrix.abs().max().item():
        raise ValueError(
            f"{name}: expected a symmetric matrix, but it differs from its transpose by {gap:.6g}; "
            "(M + M') / 2 describes the same quadratic form"
        )
    return (matrix + matrix.mT) / 2


def _covariance(name: str, value: Any, size: int) -> Tensor:
    matrix = _symmetric(name, value, size)
    values = _eigenvalues(matrix)
    if values[0] < -SYMMETRY_TOLERANCE * values.abs().max():
        raise ValueError(
            f"{name}: expected a positive semidefinite matrix, got smallest eigenvalue "
            f"{values[0]:.6g}"
        )
    return matrix
