"""`SquashedNormal`: the hyperbolic tangent of a Gaussian, the guide of soft actor-critic."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.nn.functional import softplus


class SquashedNormal(TorchDistribution):
    """tanh(u), u ~ N(loc, scale²), on [-1, 1].

    :param loc, scale: of u, broadcast together.

    A draw remembers its u: tanh rounds to exactly one from u = 9 (float32), and its inverse loses
    most of its digits long before. Of another value at the edge u is taken to be what is likeliest
    among all that rounds to it.

    log π(a) = log N(u) - log(1 - tanh² u), where log(1 - tanh² u) = 2 (log 2 - u - softplus(-2u)).
    Haarnoja et al. (2018), arXiv:1812.05905, appendix C, in a form that does not cancel.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    support = constraints.interval(-1.0, 1.0)
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self._drawn: tuple[Tensor, Tensor] | None = None
        super().__init__(self.loc.shape, torch.Size(), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SquashedNormal:
        new = self._get_checked_instance(SquashedNormal, _instance)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        new._drawn = None
        super(SquashedNormal, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mode(self) -> Tensor:
        """tanh(loc), the median; where the density is highest is not known in closed form, and may
        be at both edges."""
        return self.loc.tanh()

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        standard = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        unsquashed = self.loc + self.scale * standard
        action = unsquashed.tanh()
        self._drawn = action, unsquashed
        return action

    def icdf(self, value: Tensor) -> Tensor:
        return (self.loc + self.scale * torch.special.ndtri(value)).tanh()

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        if self._drawn is not None and value is self._drawn[0]:
            unsquashed = self._drawn[1]
        else:
            inside = 1 - torch.finfo(value.dtype).eps
            unsquashed = value.clamp(-inside, inside).atanh()
            # Of all that rounds to the edge, what is likeliest.
            beyond = value.sign() * torch.maximum(unsquashed.abs(), value.sign() * self.loc)
            unsquashed = torch.where(value.abs() >= inside, beyond, unsquashed)
        standard = (unsquashed - self.loc) / self.scale
        gaussian = -0.5 * standard.square() - self.scale.log() - 0.5 * math.log(2 * math.pi)
        return gaussian - 2 * (math.log(2) - unsquashed - softplus(-2 * unsquashed))
