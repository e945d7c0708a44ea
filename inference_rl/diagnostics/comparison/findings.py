"""What a comparison comes to: estimates, effects with a verdict each, and claims that they settle.

An effect is a difference whose sign the claim predicts: above zero it speaks for the claim. It
holds if its whole interval is above its threshold, does not hold if all of it is at or below, and
cannot be told apart otherwise. Intervals have 95%: Student's t for means over seeds, Welch's for
differences of two independent samples (Welch 1947, Biometrika 34), a bootstrap's for spreads. What
is exact has no interval. Intervals are of one effect each, and not of all of them together: of
twenty effects of nothing, one is to be expected that is told apart by chance.

Samples that do not vary say nothing of how far off the next value may be, and formulas would say
nought. They are taken at their word from where the order of their values alone would tell them
apart, FEWEST_ALIKE values a sample; fewer have no interval.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from scipy import stats

Array = np.ndarray[Any, Any]

LEVEL = 0.95
"""Of all intervals."""

RESAMPLES = 2000
"""Of a bootstrap."""

FEWEST_ALIKE = {1: 6, 2: 4}
"""Of one sample 2 / 2^6, of two 2 / C(8, 4), are the first below 5%: the chance that signs, or a
shuffle, come out as one-sided as that."""

ROUNDING = 1e-9
"""Relative to what is compared: exact numbers closer than that are the same."""

Verdict = Literal[
    "holds", "does not hold", "cannot be told apart", "holds in part", "does not apply"
]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval.

    :ivar samples: seeds, draws or places it is a mean over; None where it is exact.
    """

    value: float
    low: float
    high: float
    samples: int | None = None

    @property
    def exact(self) -> bool:
        return self.samples is None

    def as_json(self) -> dict[str, Any]:
        """Null in place of a limit that one sample cannot give."""
        return {
            "value": self.value,
            "low": self.low if math.isfinite(self.low) else None,
            "high": self.high if math.isfinite(self.high) else None,
            "samples": self.samples,
        }


def exactly(value: float) -> Estimate:
    return Estimate(float(value), float(value), float(value))


def mean(values: Sequence[float] | Array) -> Estimate:
    """The mean of independent values, with Student's interval; of a single one it is unbounded."""
    sample = np.asarray(values, dtype=float)
    if _too_few_alike(sample):
        return unknown(float(sample.mean()), len(sample))
    return _interval(float(sample.mean()), _squared_error(sample), len(sample) - 1, len(sample))


def difference(left: Sequence[float] | Array, right: Sequence[float] | Array) -> Estimate:
    """mean(left) - mean(right) of independent samples, with Welch's interval."""
    a, b = np.asarray(left, dtype=float), np.asarray(right, dtype=float)
    if _too_few_alike(a, b):
        return unknown(float(a.mean() - b.mean()), min(len(a), len(b)))
    errors = [_squared_error(a), _squared_error(b)]
    total = sum(errors)
    freedom = float(min(len(a), len(b)) - 1)
    if freedom > 0 and total > 0:
        freedom = total**2 / sum(e**2 / (len(x) - 1) for e, x in zip(errors, (a, b), strict=True))
    return _interval(float(a.mean() - b.mean()), total, freedom, min(len(a), len(b)))


def share_difference(left: Array, right: Array) -> Estimate:
    """The difference of two shares, of samples of zeros and ones.

    With the interval of Agresti and Caffo (2000), The American Statistician 54, which counts a
    success and a failure more in each: few that are all the same do not settle it.
    """
    squared, centre = 0.0, 0.0
    for sample, sign in ((left, 1), (right, -1)):
        size = len(sample) + 2
        share = (float(sample.sum()) + 1) / size
        squared += share * (1 - share) / size
        centre += sign * share
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) * math.sqrt(squared)
    value = float(left.mean() - right.mean())
    low, high = max(centre - half, -1.0), min(centre + half, 1.0)
    return Estimate(value, low, high, min(len(left), len(right)))


def bootstrap(
    statistic: Callable[[Array], Array],
    left: Array,
    right: Array,
    generator: np.random.Generator,
) -> Estimate:
    """statistic(left) - statistic(right), with the percentile interval of a bootstrap.

    It is widened by as much as that of a mean is too narrow beside Student's (Hesterberg 2015, The
    American Statistician 69, §4.2), by a factor of 2.7 for three seeds and 1.1 for twenty.

    :param statistic: from (rates, ..., K) to (...).
    :param left, right: (rates, K), of K independent seeds each, which are drawn again.
    """
    fewest = min(left.shape[-1], right.shape[-1])
    value = float(statistic(left) - statistic(right))
    if _too_few_alike(*left, *right):
        return unknown(value, fewest)

    def resampled(values: Array) -> Array:
        seeds = values.shape[-1]
        return statistic(values[:, generator.integers(seeds, size=(RESAMPLES, seeds))])

    draws = resampled(left) - resampled(right)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    level = (1 + LEVEL) / 2
    wider = (
        math.sqrt(fewest / (fewest - 1)) * stats.t.ppf(level, fewest - 1) / stats.norm.ppf(level)
    )
    low, high = (value + float(wider * (limit - value)) for limit in (low, high))
    return Estimate(value, low, high, fewest)


def unknown(value: float, samples: int) -> Estimate:
    """A number without an interval."""
    return Estimate(value, -math.inf, math.inf, samples)


def _too_few_alike(*samples: Array) -> bool:
    """Whether nothing varies but between samples, and they are too few to make do without that."""
    fewest = FEWEST_ALIKE[min(len(samples), 2)]
    return min(map(len, samples)) < fewest and all(
        float(np.ptp(sample)) <= ROUNDING * max(1.0, float(np.abs(sample).max()))
        for sample in samples
    )


def _squared_error(sample: Array) -> float:
    return float(sample.var(ddof=1) / len(sample)) if len(sample) > 1 else math.inf


def _interval(value: float, squared_error: float, freedom: float, samples: int) -> Estimate:
    if samples < 2:
        return unknown(value, samples)
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(squared_error)
    return Estimate(value, value - half, value + half, samples)


@dataclasses.dataclass(frozen=True)
class Effect:
    """A difference that a claim says is above its threshold.

    :ivar estimate: in `unit`. :ivar threshold: in `unit`; zero but for rounding, or below zero
        where the claim is that something is no worse by more than that.
    """

    name: str
    estimate: Estimate
    unit: str
    threshold: float = 0.0

    @property
    def verdict(self) -> Verdict:
        if self.estimate.low > self.threshold:
            return "holds"
        return "does not hold" if self.estimate.high <= self.threshold else "cannot be told apart"

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "threshold": self.threshold,
            "verdict": self.verdict,
            **self.estimate.as_json(),
        }


def exact_effect(name: str, left: float, right: float, unit: str) -> Effect:
    """left - right, both exact; equal if they differ by no more than rounding may do."""
    threshold = ROUNDING * max(1.0, abs(left), abs(right))
    return Effect(name, exactly(left - right), unit, threshold)


Cell = Estimate | str


@dataclasses.dataclass(frozen=True)
class Table:
    """Numbers as they were measured, row by row; the first cell names the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {
                column: cell if isinstance(cell, str) else cell.as_json()
                for column, cell in zip(self.columns, row, strict=True)
            }
            for row in self.rows
        ]


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve with its intervals, or a group of bars where the places have names."""

    name: str
    points: tuple[Estimate, ...]


@dataclasses.dataclass(frozen=True)
class Picture:
    """Lines over the same places.

    :ivar places: numbers to draw curves over, or names to draw intervals beside.
    :ivar logarithmic: whether the places are on an axis of powers of ten.
    """

    title: str
    across: str
    up: str
    places: tuple[float, ...] | tuple[str, ...]
    lines: tuple[Line, ...]
    logarithmic: bool = False


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something that is said of MaxEnt RL, and what this model has to say about it.

    :ivar says: the claim. :ivar measured: how it was measured. :ivar why: why it does not apply,
        where there are no effects. :ivar remark: what the numbers say besides.
    """

    id: str
    title: str
    says: str
    measured: str
    effects: tuple[Effect, ...] = ()
    table: Table | None = None
    picture: Picture | None = None
    why: str = ""
    remark: str = ""

    @property
    def verdict(self) -> Verdict:
        """It holds if all effects do, and in part if some do; it does not hold if some do not and
        none does."""
        found = {effect.verdict for effect in self.effects}
        if not found:
            return "does not apply"
        if "holds" in found:
            return "holds" if len(found) == 1 else "holds in part"
        return "does not hold" if "does not hold" in found else "cannot be told apart"

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "title": self.title,
            "claim": self.says,
            "measured": self.measured,
            "verdict": self.verdict,
            "why": self.why,
            "remark": self.remark,
            "effects": [effect.as_json() for effect in self.effects],
            "table": [] if self.table is None else self.table.as_json(),
        }
