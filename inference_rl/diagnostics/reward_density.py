"""The density that a demonstrator's reward is sampled from: `demonstration`, and `RewardDensity`.

`demonstration` is the program. `RewardDensity` is its logarithm as a function of a flat vector of
coordinates, without the bookkeeping of a trace, which costs four times what the likelihood does,
and mostly without that of autograd, which costs as much again; `check` compares it with the
program, and the gradient with a difference.

Coordinates are unconstrained and in units of the prior: z = (u - median) / width, u the image of a
parameter under the bijection of Pyro's `biject_to`. So the prior of z has about unit variance, and
a direction in which the Fisher information is far below one is one of which the data are silent.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import biject_to

from inference_rl.diagnostics.normal_priors import NormalPriors
from inference_rl.diagnostics.page import Array
from inference_rl.diagnostics.reward_likelihood import RewardLikelihood, no_model

PRIOR_DRAWS = 1000
"""From which the median and the width of the prior are taken."""

QUARTILES_APART = 1.349
"""Of a normal distribution, in its standard deviations."""

FAR = 100.0
"""Widths of the prior beyond which its density is taken for zero; numbers overflow there."""

NEAR = 20.0
"""Widths of the prior within which chains start, and the mode is looked for, whatever its tails."""

STEP = 1e-4
"""Of central differences, in widths of the prior."""

SAME = 1e-8
"""Relative to the log-density: how far rounding may take the program's from ours."""


def demonstration(
    likelihood: RewardLikelihood,
    priors: Mapping[str, TorchDistribution],
    temperature: float | None = None,
) -> None:
    """p(θ, α, actions | states), as a Pyro program.

    :param priors: of each parameter, and of `temperature` if that is None.
    """
    drawn = {
        name: pyro.sample(name, prior.to_event(len(prior.batch_shape)))
        for name, prior in priors.items()
    }
    alpha = drawn.pop("temperature", None)
    if alpha is None:
        alpha = torch.tensor(temperature, dtype=torch.float64)
    tables = likelihood.tables(drawn, alpha)
    for kind, counts in likelihood.counts.items():
        with pyro.plate(f"{kind}_kinds", len(counts.row)), poutine.scale(scale=counts.total):
            seen = dist.Categorical(logits=tables[kind][counts.row])
            pyro.sample(kind, seen, obs=counts.outcome)


class RewardDensity:
    """log p(θ, α, actions | states) at coordinates z, with the Jacobian of z.

    :param priors: as for `demonstration`, that of `temperature` last. :param temperature: α, if it
        is known.
    :param draws: of the priors, by name, (D, ...), float64.
    :ivar draws: of these the coordinates, (D, d), but for what is far out.
    :raises ValueError: a prior without width.
    """

    def __init__(
        self,
        likelihood: RewardLikelihood,
        priors: Mapping[str, TorchDistribution],
        temperature: float | None,
        draws: Mapping[str, Tensor],
    ) -> None:
        self.likelihood, self.temperature = likelihood, temperature
        self.priors = {name: copy.copy(prior) for name, prior in priors.items()}
        for prior in self.priors.values():
            prior._validate_args = False  # costs as much as all the rest of a prior
        self.bijections = {name: biject_to(prior.support) for name, prior in priors.items()}
        free = {name: self.bijections[name].inv(draws[name]) for name in priors}
        self.shapes = {name: values.shape[1:] for name, values in free.items()}
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]
        flat = torch.cat([values.reshape(len(values), -1) for values in free.values()], -1)
        low, self.median, high = flat.quantile(
            torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0
        )
        self.width = (high - low) / QUARTILES_APART
        if not bool((self.width > 0).all()):
            raise ValueError(
                "parameters: expected priors of some width, got one with half of its mass on one "
                "value; what is known is fixed in build"
            )
        coordinates = (flat - self.median) / self.width
        self.draws = coordinates[(coordinates.abs() < NEAR).all(-1)]
        self._log_width = self.width.log().sum()
        self._normal: NormalPriors | None = None
        if all(NormalPriors.covered(prior) for prior in priors.values()):
            self._normal = NormalPriors(priors.values())

    @property
    def size(self) -> int:
        """How many numbers are inferred."""
        return len(self.median)

    def constrained(self, z: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All that is inferred by name, the temperature included if it is, at z (..., d); and the
        unconstrained values behind it.
        """
        parts = (self.median + self.width * z).split(self.sizes, -1)
        free = {
            name: part.reshape(z.shape[:-1] + shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
        return {name: self.bijections[name](value) for name, value in free.items()}, free

    def point(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Parameters, temperature, and log p(θ, α) with the Jacobian, nats, at z, (d,)."""
        found, free = self.constrained(z)
        log_prior = self._log_width
        for name, value in found.items():
            log_prior = log_prior + self.priors[name].log_prob(value).sum()
            volume = self.bijections[name].log_abs_det_jacobian(free[name], value)
            log_prior = log_prior + volume.sum()
        if self.temperature is None:
            return found, found.pop("temperature"), log_prior
        return found, torch.tensor(self.temperature, dtype=torch.float64), log_prior

    def values(self, z: Tensor) -> dict[str, Array]:
        """All that is inferred, by name, at z (..., d)."""
        return {name: value.numpy() for name, value in self.constrained(z.detach())[0].items()}

    def parameters(self, z: Tensor) -> dict[str, Tensor]:
        """Those that `build` takes, at z (..., d)."""
        found = self.constrained(z)[0]
        found.pop("temperature", None)
        return found

    def __call__(self, z: Tensor) -> Tensor:
        """The log-density at z, (d,): a scalar in nats, but for a constant."""
        if not bool((z.detach().abs() < FAR).all()):
            return 0 * z.sum() - math.inf
        parameters, temperature, log_prior = self.point(z)
        return log_prior + self.likelihood(parameters, temperature)

    def with_gradient(self, z: Tensor) -> tuple[float, Tensor]:
        """The same, with its gradient (d,).

        By NumPy, if rewards are affine and priors normal or log-normal: autograd costs several
        times what it differentiates.
        """
        affine = self.likelihood.model.affine
        if self._normal is None or affine is None:
            with torch.enable_grad():
                point = z.detach().requires_grad_()
                value = self(point)
                (gradient,) = torch.autograd.grad(value, point)
            return float(value.detach()), gradient
        z = z.detach()
        if not bool((z.abs() < FAR).all()):
            return -math.inf, torch.zeros_like(z)
        width = self.width.numpy()
        u = self.median.numpy() + width * z.numpy()
        values, slopes = self._normal.values(u)
        log_prior, pull = self._normal.log_density(u)
        parameters, temperature = values, self.temperature
        if temperature is None:
            parameters, temperature = values[:-1], float(values[-1])
        try:
            likelihood, along = self.likelihood.with_gradient(parameters, temperature)
        except ValueError as error:
            raise no_model(self.parameters(z), error) from error
        gradient = width * (pull + slopes * along[: len(u)])
        return log_prior + likelihood + float(self._log_width), torch.from_numpy(gradient)

    def of_episodes(self, z: Tensor) -> Array:
        """The log-likelihood of each episode, nats, (E,)."""
        parameters, temperature, _ = self.point(z)
        return self.likelihood.of_episodes(parameters, temperature)

    def information(self, z: Tensor) -> Array:
        """The Fisher information of the episodes at z, (d, d): Σ over rows seen of E[∇ log p ∇ᵀ].

        Of what the demonstrator could have done where it was, not of what it did.
        """
        with torch.no_grad():
            here, slopes = self._tables(z), self._slopes(z)
        total = np.zeros((self.size, self.size))
        for kind, counts in self.likelihood.counts.items():
            weight = here[kind].exp() * counts.of_row.unsqueeze(-1)
            along = [torch.where(weight > 0, slope[kind], 0.0).flatten() for slope in slopes]
            jacobian = torch.stack(along, -1)
            total += (jacobian.T @ (weight.reshape(-1, 1) * jacobian)).numpy()
        return total

    def _tables(self, z: Tensor) -> dict[str, Tensor]:
        parameters, temperature, _ = self.point(z)
        return self.likelihood.tables(parameters, temperature)

    def _slopes(self, z: Tensor) -> list[dict[str, Tensor]]:
        """∂ tables / ∂ z_i for each i."""
        found = []
        for step in STEP * torch.eye(self.size, dtype=torch.float64):
            up, down = self._tables(z + step), self._tables(z - step)
            found.append({kind: (up[kind] - down[kind]) / (2 * STEP) for kind in up})
        return found

    def check(self, z: Tensor) -> None:
        """:raises ValueError: the density is not that of the program at z, or its gradient not its
        own: a prior whose support is another than it says, or a `build` that loses gradients.
        """
        z = z.detach()
        log_density, gradient = self.with_gradient(z)
        ours = log_density - float(self._jacobian(z))
        values = self.constrained(z)[0]
        program = poutine.condition(demonstration, data=values)
        with torch.no_grad():
            trace = poutine.trace(program).get_trace(self.likelihood, self.priors, self.temperature)
            theirs = float(trace.log_prob_sum())
        if not abs(ours - theirs) <= SAME * max(1.0, abs(theirs)):
            raise ValueError(
                f"parameters: the program has log-density {theirs:.9g} where {ours:.9g} would be "
                "sampled from; expected priors that Pyro's biject_to maps to all real numbers"
            )
        start = 0
        for name, size in zip(self.shapes, self.sizes, strict=True):
            direction = torch.zeros_like(gradient)
            direction[start : start + size] = 1 - 2 * (torch.arange(size) % 2).double()
            start += size
            with torch.no_grad():
                up, down = self(z + STEP * direction), self(z - STEP * direction)
            difference, slope = float(up - down) / (2 * STEP), float(gradient @ direction)
            if not abs(difference - slope) <= 1e-3 * (1 + abs(difference)):
                raise ValueError(
                    f"build: what it makes of {name!r} changes the log-density by {difference:.6g} "
                    f"a unit, but its gradient says {slope:.6g}; keep parameters tensors: float(p) "
                    "and torch.tensor([p]) cut them off, torch.stack and arithmetic do not"
                )

    def _jacobian(self, z: Tensor) -> Tensor:
        """log |dθ/dz|, nats."""
        values = self.constrained(z)[0]
        priors = [self.priors[name].log_prob(value).sum() for name, value in values.items()]
        return self.point(z)[2] - torch.stack(priors).sum()
