"""Whether chains of draws are one posterior, in words: `ParameterSummary`, `not_mixed`.

Chains that started far apart and are samples of the same distribution have R-hat of about one, and
enough effective draws make an interval's ends what they are said to be. Of one chain nothing of
that is known. R-hat is by ranks, of split chains, the larger of bulk and tails; both thresholds are
those of the reference, §4.

Reference: Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), "Rank-normalization, folding, and
localization: an improved R-hat", Bayesian Analysis 16, doi:10.1214/20-BA1221.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from inference_rl.diagnostics.arviz_versions import arviz
from inference_rl.diagnostics.identification import listed
from inference_rl.diagnostics.page import Array

AGREED = 1.01
"""R-hat of chains that agree, at most."""

ENOUGH = 100
"""Effective draws: what is between the 5% and the 95% quantile is then 90% ± 3% of the posterior (a
standard error), and the mean is known to a tenth of its width."""


@dataclasses.dataclass(frozen=True)
class ParameterSummary:
    """The posterior of one number.

    :ivar low, high: the central 90%. :ivar rhat: R-hat by ranks; above 1.01 chains have not mixed,
        and of one chain it is NaN.
    :ivar ess_bulk, ess_tail: how many independent draws these are worth, for the mean and for the
        ends of the interval.
    """

    name: str
    mean: float
    low: float
    high: float
    rhat: float
    ess_bulk: float
    ess_tail: float

    @property
    def ess(self) -> float:
        """Effective draws for the mean or the interval, whichever has fewer."""
        return min(self.ess_bulk, self.ess_tail)


def summarised(name: str, values: Array) -> ParameterSummary:
    """Of draws (chain, draw)."""
    az = arviz()
    low, high = np.quantile(values, [0.05, 0.95])
    with np.errstate(divide="ignore", invalid="ignore"):  # chains that never moved have no width
        rhat = float(az.rhat(values)) if len(values) > 1 else math.nan
    return ParameterSummary(
        name=name,
        mean=float(values.mean()),
        low=float(low),
        high=float(high),
        rhat=rhat,
        ess_bulk=float(az.ess(values, method="bulk")),
        ess_tail=float(az.ess(values, method="tail", prob=(0.05, 0.95))),
    )


def not_mixed(rows: Sequence[ParameterSummary], chains: int) -> tuple[str, ...]:
    """A sentence for each way in which draws are not those of a posterior, or not known to be."""
    found: list[str] = []
    # Not >: a chain that never moved has no R-hat at all.
    apart = sorted((r for r in rows if not r.rhat <= AGREED), key=lambda r: -r.rhat)
    if chains == 1:
        apart = []
        found.append(
            f"{_named(rows)}: one chain cannot be compared with others, and what it never came to "
            "is not seen; take several, such as chains=4"
        )
    elif apart:
        found.append(
            f"{_named(apart)}: chains do not agree, R-hat is above {AGREED:g}, so that means and "
            "intervals may not be those of the posterior; take more draws, or, if some chains "
            "found another answer, such as a mirror image, a prior that excludes all but one"
        )
    few = sorted((r for r in rows if not r.ess >= ENOUGH), key=lambda r: r.ess)
    if few := [row for row in few if row not in apart]:
        found.append(
            f"{_named(few)}: too few draws for the ends of intervals, which take {ENOUGH} "
            "effective ones; take more"
        )
    return tuple(found)


def _named(rows: Sequence[ParameterSummary]) -> str:
    """Names, each with what is known of its chains."""
    rhats = ["unknown" if math.isnan(row.rhat) else f"{row.rhat:.3f}" for row in rows]
    return listed(
        [
            f"{row.name} (R-hat {rhat}, {row.ess:.0f} effective draws)"
            for row, rhat in zip(rows, rhats, strict=True)
        ]
    )
