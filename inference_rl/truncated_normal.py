"""`TruncatedNormal`: a Gaussian that knows the edges of the action box.

Density, draws and their gradients stay accurate where the textbook formulas cancel: boxes far out
in a tail, needles inside the box, and boxes so narrow that the density on them is flat.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_GAUSS_LEGENDRE = (_NODES + 1) / 2, _WEIGHTS / 2
"""Nodes and weights on [0, 1]."""

_MANY_NODES, _MANY_WEIGHTS = np.polynomial.legendre.leggauss(48)
_FINE_GAUSS_LEGENDRE = (_MANY_NODES + 1) / 2, _MANY_WEIGHTS / 2
"""The same, enough of them for e^(-x²/2) on [-9, 9] to the last bit."""

_NEGLIGIBLE = 40.0
"""Nats below its highest point, where a density no longer counts: e^-40 < 2^-53."""


class TruncatedNormal(TorchDistribution):
    """A normal distribution restricted to [low, high] and renormalised there.

    :param loc, scale: location and width of the untruncated normal, broadcast together.
    :param low, high: the edges; the density is finite on the closed interval.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        low: float = -1.0,
        high: float = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.low, self.high = low, high
        super().__init__(self.loc.shape, torch.Size(), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        return constraints.interval(self.low, self.high)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TruncatedNormal:
        new = self._get_checked_instance(TruncatedNormal, _instance)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        new.low, new.high = self.low, self.high
        super(TruncatedNormal, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _frame(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The box in units of `scale`, mirrored so that the edge nearer to `loc` is the upper one.

        :returns: the upper edge (relative to `loc`), the width, the sign of the mirroring, and that
            edge in the units of the box.
        """
        right, dtype = self.loc >= (self.low + self.high) / 2, self.loc.dtype
        sign = torch.where(right, 1.0, -1.0).to(dtype)
        edge = torch.where(right, self.high, self.low).to(dtype)
        upper = sign * (edge - self.loc) / self.scale
        return upper, (self.high - self.low) / self.scale, sign, edge

    def _log_mass(self, upper: Tensor, width: Tensor) -> Tensor:
        """log of the mass over the density at the box's highest point, which is never far off."""
        reference = upper.clamp(max=0.0)
        # A narrow box by quadrature; the rest of a tail by Mills' ratio; the body by erf.
        nodes, weights = (upper.new_tensor(x) for x in _GAUSS_LEGENDRE)
        at = upper.unsqueeze(-1) - width.clamp(max=1.0).unsqueeze(-1) * nodes
        reference_ = reference.unsqueeze(-1)
        heights = torch.exp(-0.5 * (at - reference_) * (at + reference_))
        narrow = width * (weights * heights).sum(-1)
        tail = upper.clamp(max=-1.0)
        far = torch.exp(width * (tail - width / 2)) * _mills(tail - width)
        body = upper.clamp(min=-1.0)
        mass = torch.erf(body * math.sqrt(0.5)) - torch.erf((body - width) * math.sqrt(0.5))
        low = body.clamp(max=0.0)
        mass = mass * math.sqrt(math.pi / 2) * torch.exp(low.square() / 2)
        wide = torch.where(upper < -1, _mills(tail) - far, mass)
        return torch.where((width < 1) & (upper * width > -4), narrow, wide).log()

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        upper, width, sign, edge = self._frame()
        # Squares of huge numbers would cancel: below the highest point, not below the mode.
        inside = torch.where(upper < 0, edge, self.loc)
        below = sign * (value - inside) / self.scale
        drop = -0.5 * below * (below + 2 * upper.clamp(max=0.0))
        density: Tensor = drop - self.scale.log() - self._log_mass(upper, width)
        return density

    @property
    def mode(self) -> Tensor:
        return self.loc.clamp(self.low, self.high)

    def entropy(self) -> Tensor:
        """Nats: log of the mass over the highest density, plus how far below it a draw lies.

        The textbook's 1 + (lower φ(lower) - upper φ(upper)) / mass cancels in tails and on narrow
        boxes; here no term is negative but log(mass).
        """
        upper, width, _, _ = self._frame()
        highest = upper.clamp(max=0.0)
        above = upper - highest
        # Where e^(-x · (x + 2 · |highest|) / 2) has become negligible.
        reach = (highest.square() + 2 * _NEGLIGIBLE).sqrt() - highest
        reach = 2 * _NEGLIGIBLE / reach
        top, bottom = torch.minimum(above, reach), torch.minimum(width - above, reach)
        nodes, weights = (upper.new_tensor(x) for x in _FINE_GAUSS_LEGENDRE)
        at = top.unsqueeze(-1) - (top + bottom).unsqueeze(-1) * nodes
        drop = 0.5 * at * (at + 2 * highest.unsqueeze(-1))
        heights = weights * torch.exp(-drop)
        total = heights.sum(-1)
        entropy: Tensor = (self.scale * (top + bottom) * total).log()
        return entropy + (heights * drop).sum(-1) / total

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        return self.icdf(torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device))

    def icdf(self, value: Tensor, *, look: bool = False) -> Tensor:
        """The quantile function, with gradients to `loc` and `scale`.

        :param value: in [0, 1], of a shape that the batch shape broadcasts with.
        :param look: leave out what no entry needs, for which values have to be looked at, so that
            it cannot be recorded as tensor operations.
        """
        with torch.no_grad():
            upper, width, sign, edge = self._frame()
            share = value.to(self.loc.dtype)
            share = torch.where(sign > 0, share, 1 - share).clamp(min=_eps(self.loc) / 4)
            depth = _depth(share, upper, width, look=look).clamp(min=0.0)
            depth = torch.minimum(depth, width)
            at: Tensor = (edge - sign * self.scale * depth).clamp(self.low, self.high)
        if not torch.is_grad_enabled():
            return at
        with torch.no_grad():
            # Implicit differentiation of share = (Φ(s) - Φ(lower)) / (Φ(upper) - Φ(lower)).
            standard, lower = upper - depth, upper - width
            near = share * torch.exp(-0.5 * depth * (upper + standard))
            far = (1 - share) * torch.exp(0.5 * (width - depth) * (lower + standard))
            by_loc, by_scale = 1 - near - far, sign * (standard - near * upper - far * lower)
        draw: Tensor = (
            at
            + by_loc * (self.loc - self.loc.detach())
            + by_scale * (self.scale - self.scale.detach())
        )
        return draw


def _eps(like: Tensor) -> float:
    return torch.finfo(like.dtype).eps


def _mills(x: Tensor) -> Tensor:
    """Φ(x) / φ(x) for x ≤ -1, with a derivative that does not cancel far out."""
    inverse = 1 / x.square()
    series = (1 - inverse * (1 - inverse * (3 - 15 * inverse))) / -x
    near = x.clamp(min=-200.0)
    direct = math.sqrt(math.pi / 2) * torch.special.erfcx(-near * math.sqrt(0.5))
    return torch.where(x < -200, series, direct)


def _depth(share: Tensor, upper: Tensor, width: Tensor, *, look: bool) -> Tensor:
    """How far below `upper` a standard normal on [upper - width, upper] has `share` of its mass."""
    # In the body, the quantile function.
    inside = upper.clamp(min=-1.0)
    above, below = (torch.erfc(-x * math.sqrt(0.5)) / 2 for x in (inside, inside - width))
    depth = inside - torch.special.ndtri(below + share * (above - below))
    in_tail, is_narrow = upper < -1, width < 1e-3
    if not look or in_tail.any():
        depth = torch.where(in_tail, _depth_in_tail(share, upper, width), depth)
    if not look or is_narrow.any():
        depth = torch.where(is_narrow, _depth_if_narrow(share, upper, width), depth)
    return depth


def _depth_in_tail(share: Tensor, upper: Tensor, width: Tensor) -> Tensor:
    """By Newton's method on the concave log Φ(upper - depth) / Φ(upper)."""
    tail = upper.clamp(max=-1.0)
    whole = torch.exp(width * (tail - width / 2)) * _mills(tail - width) / _mills(tail)
    target = torch.log(share + (1 - share) * whole)
    newton = -2 * target / (torch.sqrt(tail.square() - 2 * target) - tail)
    for _ in range(4):
        ratio = _mills(tail - newton)
        missing = newton * (tail - newton / 2) + torch.log(ratio / _mills(tail)) - target
        newton = newton + missing * ratio
    return newton


def _depth_if_narrow(share: Tensor, upper: Tensor, width: Tensor) -> Tensor:
    """On a narrow box the density is an exponential, up to exp(width² / 8)."""
    slope = (upper - width / 2).clamp(max=-_eps(upper))
    tilted = torch.log1p((1 - share) * torch.expm1(slope * width)) / slope
    return torch.where(slope * width > -_eps(upper), (1 - share) * width, tilted)
