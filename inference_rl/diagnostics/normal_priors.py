"""Priors that are normal where they are unconstrained, by NumPy: `NormalPriors`.

Normal and log-normal ones, of any shape, are what most numbers are given. A sampler asks for their
density and its gradient thousands of times, of a few numbers, and of that torch's distributions and
their tape make a millisecond's work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution

from inference_rl.diagnostics.page import Array

LOG_ROOT_TAU = math.log(math.sqrt(2 * math.pi))


class NormalPriors:
    """Of d numbers, u where they are unconstrained: u itself, or e^u if the prior is log-normal.

    :param priors: all of them `covered`.
    """

    def __init__(self, priors: Iterable[TorchDistribution]) -> None:
        parts = []
        for prior in priors:
            own = _without_events(prior)
            # In the prior's own precision, as it computes them.
            columns = (own.loc, own.scale**2, own.scale.log())
            rows = [column.expand(own.batch_shape).flatten().double() for column in columns]
            positive = torch.full_like(rows[0], isinstance(own, torch.distributions.LogNormal))
            parts.append(torch.stack([*rows, positive]))
        self.loc, self.variance, log_scale, positive = torch.cat(parts, -1).numpy()
        self.positive = positive.astype(bool)
        self._constant = -(log_scale + LOG_ROOT_TAU).sum()

    @staticmethod
    def covered(prior: TorchDistribution) -> bool:
        """Whether `prior` is of these kinds, and no other kind made of them."""
        kinds = (dist.Normal, dist.LogNormal, torch.distributions.Normal)
        return type(_without_events(prior)) in (*kinds, torch.distributions.LogNormal)

    def values(self, u: Array) -> tuple[Array, Array]:
        """The numbers themselves, and their derivatives in u, (d,) each."""
        values, slopes = u.copy(), np.ones_like(u)
        values[self.positive] = slopes[self.positive] = np.exp(u[self.positive])
        return values, slopes

    def log_density(self, u: Array) -> tuple[float, Array]:
        """Of u, nats, and its gradient, (d,)."""
        away = u - self.loc
        pull = away / self.variance
        return float(self._constant - away @ pull / 2), -pull


def _without_events(prior: TorchDistribution) -> TorchDistribution:
    while isinstance(prior, torch.distributions.Independent):
        prior = prior.base_dist
    return prior
