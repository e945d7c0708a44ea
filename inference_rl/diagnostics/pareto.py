"""How far weights of importance can be trusted: Pareto k̂ of their upper tail, and effective size.

The largest weights of n are taken for a generalised Pareto distribution, whose shape k says how
many moments they have: 1 / k. Below `reliable_k(n)` an average under these weights is as good as
its standard error says; from 0.7 on no n that one can afford makes it so, and from 1 on the weights
have no mean.

The fit is that of ArviZ, which is too slow to import for a number at the end of a command, and
whose tail must not be constant.

References: Vehtari, Simpson, Gelman, Yao and Gabry (2024), arXiv:1507.02646, §2.2 and §3. Zhang and
Stephens (2009), doi:10.1198/tech.2009.08017, for the fit.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from inference_rl import stein
from inference_rl.diagnostics.page import Array

FEWEST = 5
"""Different values in a tail, for a distribution to be fitted to it."""

SAME = 1e-9
"""Nats, relative to the largest of them: log-weights this close are the same up to rounding."""

NEARLY_CONSTANT = 0.9
"""Of all draws: an effective size above which weights vary so little that the shape of what little
they vary, an atom or two, says nothing."""


def are_constant(log_weights: Array) -> bool:
    """Whether all weights are the same, up to rounding: then every average is exact.

    :param log_weights: (n,), nats, up to a constant.
    """
    with np.errstate(invalid="ignore"):
        spread = float(np.ptp(log_weights))
    return spread <= SAME * max(1.0, float(np.abs(log_weights).max()))


def pareto_k(log_weights: Array) -> float | None:
    """k̂ of the largest min(n / 5, 3 √n) weights; None where these take too few values to tell, and
    inf where next to the largest all but a few are nothing.

    Weights of few values, such as those of an episode that pays once or not at all, may look heavy
    though they are bounded, until what is rare has been drawn often.

    :param log_weights: (n,), nats, up to a constant; -inf for a weight of zero.
    """
    ordered = np.sort(np.asarray(log_weights, dtype=float))
    size = math.ceil(min(len(ordered) / 5, 3 * math.sqrt(len(ordered))))
    if size >= len(ordered) or are_constant(ordered):
        return None
    if not np.isfinite(ordered[-1]):
        return math.inf
    ordered -= ordered[-1]
    nothing = math.log(np.finfo(float).tiny)
    cutoff = max(float(ordered[-size - 1]), nothing)
    tail = ordered[ordered > cutoff]
    if len(tail) < FEWEST:
        return math.inf if cutoff == nothing else None
    first_quartile = tail[int(len(tail) / 4 + 0.5) - 1]
    if (np.diff(tail) > SAME).sum() + 1 < FEWEST or first_quartile - tail[0] <= SAME:
        return None
    return _shape(np.exp(tail) - math.exp(cutoff))


def _shape(excess: Array) -> float:
    """The posterior mean of k for a sorted sample, pulled to 1/2 as if by ten more of it."""
    n = len(excess)
    grid = np.arange(1, 31 + math.isqrt(n))
    rates = 1 / excess[-1] + (1 - np.sqrt(grid[-1] / (grid - 0.5))) / (
        3 * excess[int(n / 4 + 0.5) - 1]
    )
    shapes = np.log1p(-rates[:, None] * excess).mean(1)
    log_likelihood = n * (np.log(-rates / shapes) - shapes - 1)
    weights = np.exp(log_likelihood - log_likelihood.max())
    rate = (weights @ rates) / weights.sum()
    return float((n * np.log1p(-rate * excess).mean() + 5) / (n + 10))


def reliable_k(draws: int) -> float:
    """The k̂ below which so many weights are enough, at most 0.7; Vehtari et al. (2024), §3.2.4."""
    return min(1 - 1 / math.log10(draws), 0.7) if draws > 1 else -math.inf


def effective_sample_size(log_weights: Array) -> float:
    """(Σ w)² / Σ w², in [1, n]: how many equal weights are as good; 0 where all are zero.

    :param log_weights: (n,), nats, up to a constant.
    """
    if not np.isfinite(log_weights.max()):
        return 0.0
    return float(stein.effective_size(torch.tensor(log_weights, dtype=torch.float64)))
