"""Stein variational gradients: where particles have to move to be draws from a density, how far
they are from that, densities to weigh draws by, and how many of these count. Pure functions of
tensors.

Particles are (K, N, d): K of them for each of N densities over R^d. Actions in [-1, 1]^d are
a = tanh(u) of particles u, which have the density p(tanh u) · Π (1 − tanh² u) where actions have
p(a). Particles and score belong to one space: moved as particles a by the score of u, actions come
to have the density p(a) · Π (1 − a²).

Liu and Wang (2016), arXiv:1608.04471 (directions). Liu, Lee and Jordan (2016), arXiv:1602.03253
(discrepancy).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

NARROWEST = 1e-3
"""Least width of a kernel, as a square."""

NARROWEST_PROPOSAL = 1e-2
"""Least width of the kernels that `around` draws from."""


def log_slope(u: Tensor) -> Tensor:
    """log |da/du| of a = tanh(u), (K, N): Σ log(1 − tanh² u), in a form that does not cancel."""
    return (2 * (math.log(2) - u - softplus(-2 * u))).sum(-1)


def _width(squares: Tensor) -> Tensor:
    """h of κ(x, y) = exp(−‖x − y‖² / h), (N,), from the squares (K, M, N): the median over log K,
    at which Σ_x κ(x, y) is about one (1608.04471, §5)."""
    median = squares.flatten(0, 1).median(0).values
    return (median / math.log(len(squares))).clamp(min=NARROWEST)


def direction(fixed: Tensor, score: Tensor, moved: Tensor) -> Tensor:
    """(1/K) Σ_j [κ(u_j, u) ∇ log p(u_j) + ∇_{u_j} κ(u_j, u)] at the particles u to be moved.

    The direction, of all in the unit ball of the kernel's space, in which KL(q ‖ p) falls fastest,
    where q is what `fixed` are draws from (1608.04471, eq. 8). Zero in expectation if q is p.

    :param fixed: u_j, (K, N, d). :param score: ∇ log p there. :param moved: u, (M, N, d).
    :returns: (M, N, d).
    """
    apart = fixed.unsqueeze(1) - moved.unsqueeze(0)
    squares = apart.square().sum(-1)
    width = _width(squares)
    kernel = (-squares / width).exp().unsqueeze(-1)
    return (kernel * (score.unsqueeze(1) - 2 * apart / width.unsqueeze(-1))).mean(0)


def discrepancy(particles: Tensor, score: Tensor) -> Tensor:
    """The kernelised Stein discrepancy of particles from the density whose score they have, (N,).

    Its square, as a U-statistic (1602.03253, eqs. 8, 14): zero in expectation where they are draws
    from that density, and then as often below zero; above it in expectation where they are not.
    """
    count, dim = len(particles), particles.shape[-1]
    apart = particles.unsqueeze(1) - particles.unsqueeze(0)
    squares = apart.square().sum(-1)
    rate = 2 / _width(squares)
    along = ((score.unsqueeze(1) - score.unsqueeze(0)) * apart).sum(-1)
    both = (score.unsqueeze(1) * score.unsqueeze(0)).sum(-1)
    terms = both + rate * along + dim * rate - rate.square() * squares
    terms = (-rate / 2 * squares).exp() * terms
    others = 1 - torch.eye(count, dtype=terms.dtype, device=terms.device).unsqueeze(-1)
    return (terms * others).sum((0, 1)) / (count * (count - 1))


def effective_size(log_weights: Tensor) -> Tensor:
    """(Σ w)² / Σ w², in [1, K]: how many equal weights the K in each column are as good as.

    :param log_weights: (K, ...), nats, up to a constant; not all of a column -inf.
    """
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()


def log_uniform(actions: Tensor) -> Tensor:
    """The log-density of what is uniform on [-1, 1]^d, nats, (K, N)."""
    return torch.full_like(actions[..., 0], -actions.shape[-1] * math.log(2))


def around(particles: Tensor, standard: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Actions to weigh, of a density that is known: half of them from Gaussian kernels at
    particles, whose own density nobody knows, half from anywhere in the box.

    Every kernel gives one draw, and all are weighed by the density of the whole mixture, which
    leaves estimates unbiased and no weight above twice that of a uniform draw (Owen and Zhou 2000,
    JASA 95, 135-143). Kernels are as wide as Silverman's rule says (1986, eq. 4.14).

    :param particles: (K, N, d), before tanh. :param standard: standard normals, (K, N, d).
    :param uniform: (K, N, d), uniform on [-1, 1].
    :returns: actions (2K, N, d) and their log-densities on [-1, 1]^d, nats, (2K, N).
    """
    count, dim = len(particles), particles.shape[-1]
    spread = particles.std(0) if count > 1 else torch.ones_like(particles[0])
    width = (spread * (4 / (dim + 2) / count) ** (1 / (dim + 4))).clamp(min=NARROWEST_PROPOSAL)
    inside = 1 - torch.finfo(uniform.dtype).eps
    u = torch.cat([particles + width * standard, uniform.clamp(-inside, inside).atanh()])
    away = ((u.unsqueeze(1) - particles.unsqueeze(0)) / width).square().sum(-1)
    normal = width.log().sum(-1) + dim / 2 * math.log(2 * math.pi) + math.log(count)
    near = (-away / 2).logsumexp(1) - normal - log_slope(u)
    actions = torch.cat([u[:count].tanh(), uniform])
    return actions, torch.logaddexp(near, log_uniform(actions)) - math.log(2)
