"""What learning came to: `Runs` of one kind and several seeds, and the claims that they settle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from inference_rl.diagnostics.comparison.findings import (
    ROUNDING,
    Claim,
    Effect,
    Estimate,
    Line,
    Picture,
    Table,
    bootstrap,
    difference,
    mean,
    share_difference,
    unknown,
)
from inference_rl.diagnostics.guide import GuideQuality
from inference_rl.randomness import derived
from inference_rl.temperature import DISCRETE_SHARE

Array = np.ndarray[Any, Any]

NEAR = 0.05
"""Of a range of returns, what makes no difference."""

EXPLORING = "regular, ε-greedy"
GREEDY = "regular, greedy"
REGULAR = "regular"
AUTOMATIC = "soft, automatic"


@dataclasses.dataclass(frozen=True)
class Runs:
    """Runs of the same settings from K seeds each.

    :ivar name: of the kind, the same at all rates. :ivar temperature: reward units; 0 is regular
        RL, None is tuned. :ivar rate: of learning; in units of the usual one for networks.
    :ivar covered: states, or cells of the space of states, that it has been in, (K,).
    :ivar found: steps until what is worth finding was first seen, the budget where it never was.
    :ivar returns: of the policy it learned, reward units. :ivar greedy: of its most likely actions.
    :ivar entropies: nats per step. :ivar temperatures: where they ended, reward units.
    :ivar slipped: returns where actions slip, (K, strengths); None where that was not asked.
    :ivar guides: what the policies are as guides, one a seed; none at temperature 0, nor where that
        was not asked. :ivar rhat: of the returns of episodes, seeds as chains; None without any, or
        where all are the same.
    """

    name: str
    temperature: float | None
    rate: float
    covered: Array
    found: Array
    returns: Array
    greedy: Array
    entropies: Array
    temperatures: Array
    slipped: Array | None = None
    guides: tuple[GuideQuality, ...] = dataclasses.field(default=(), kw_only=True)
    rhat: float | None = dataclasses.field(default=None, kw_only=True)


@dataclasses.dataclass(frozen=True)
class Course:
    """All runs of a comparison, of one way to learn.

    :ivar runs: of every kind at the usual rate, and of regular and reference at the others.
    :ivar baseline: name of the regular kind that verdicts are about. :ivar reference: of the soft.
    :ivar usual: the usual rate. :ivar best: the best return, reward units. :ivar near_by: how
        near to it is as good, reward units.
    :ivar steps: of each run. :ivar worth: what is worth finding, in words.
    :ivar places: what `covered` counts. :ivar by: how it learned, in words.
    :ivar suffix: of the ids of claims, to tell several ways to learn apart.
    """

    runs: Sequence[Runs]
    baseline: str
    reference: str
    usual: float
    best: float
    near_by: float
    steps: int
    worth: str
    places: str
    by: str
    suffix: str = ""

    def usual_runs(self) -> list[Runs]:
        return [run for run in self.runs if run.rate == self.usual]

    def get(self, name: str) -> Runs:
        return next(run for run in self.usual_runs() if run.name == name)

    def at_all_rates(self, name: str) -> list[Runs]:
        return sorted((r for r in self.runs if r.name == name), key=lambda run: run.rate)

    @property
    def title(self) -> str:
        return f" ({self.suffix})" if self.suffix else ""

    def id(self, name: str) -> str:
        return f"{name}-{self.suffix}" if self.suffix else name

    @property
    def rounding(self) -> float:
        """Returns that are closer than that are the same."""
        return ROUNDING * max(1.0, abs(self.best))

    def near(self, returns: Array) -> Array:
        """Whether they are as good as the best, (K,) zeros and ones."""
        return (returns >= self.best - self.near_by - self.rounding).astype(float)


def exploration(course: Course) -> Claim:
    """Who sees more, sooner, and is not taken in by what comes first?"""
    regular, soft = course.get(course.baseline), course.get(course.reference)
    rows = tuple(
        (
            run.name,
            mean(run.covered),
            mean(run.found),
            f"{int((run.found < course.steps).sum())} of {len(run.found)}",
            mean(run.greedy),
            f"{int(course.near(run.greedy).sum())} of {len(run.greedy)}",
        )
        for run in course.usual_runs()
    )
    return Claim(
        id=course.id("exploration"),
        title="Exploration" + course.title,
        says="MaxEnt RL explores better: it sees more, finds what pays sooner, and is not held by "
        "what merely pays first.",
        measured=f"{course.by}, {course.steps:,} steps each, {_seeds(soft)}. Found: the first step "
        f"with {course.worth}; the budget where there was none. The best: the most likely actions "
        f"learned come within {course.near_by:.2g} of the best return, {course.best:.4g}.",
        effects=(
            Effect(
                f"{course.places}, {soft.name} above {regular.name}",
                difference(soft.covered, regular.covered),
                course.places.partition(" ")[0],
            ),
            Effect(
                f"steps until found, {regular.name} above {soft.name}",
                _later(course, regular, soft),
                "steps",
            ),
            Effect(
                f"share of seeds that find the best, {soft.name} above {regular.name}",
                share_difference(course.near(soft.greedy), course.near(regular.greedy)),
                "of seeds",
            ),
        ),
        table=Table(
            (
                "learner",
                course.places,
                "found after",
                "found by",
                "return, likeliest",
                "the best by",
            ),
            rows,
        ),
        picture=_beside("Steps until found", "steps", course.usual_runs(), "found"),
    )


def _later(course: Course, regular: Runs, soft: Runs) -> Estimate:
    """How many steps later regular RL finds it; not known where neither ever does."""
    if min(regular.found.min(), soft.found.min()) >= course.steps:
        return unknown(0.0, len(soft.found))
    return difference(regular.found, soft.found)


def stability(course: Course, seed: int) -> Claim:
    """Who depends less on seed and learning rate?"""
    regular, soft = (course.at_all_rates(n) for n in (course.baseline, course.reference))
    left, right = (np.stack([run.returns for run in runs]) for runs in (regular, soft))
    generator = np.random.default_rng(derived(seed, "bootstrap"))
    name = f"{regular[0].name} above {soft[0].name}"
    effects = [
        Effect(
            f"spread of the return over seeds, {name}",
            bootstrap(_over_seeds, left, right, generator),
            "reward",
            course.rounding,
        )
    ]
    if len(regular) > 1:
        effects += [
            Effect(
                f"range of the return over learning rates, {name}",
                bootstrap(_over_rates, left, right, generator),
                "reward",
                course.rounding,
            ),
            Effect(
                f"return at the worst learning rate, {soft[0].name} above {regular[0].name}",
                bootstrap(_worst_rate, right, left, generator),
                "reward",
                course.rounding,
            ),
        ]
    rows = tuple(
        (
            f"{run.name}, rate {run.rate:.3g}",
            mean(run.returns),
            f"{_plain(run.returns.std(ddof=1), course.rounding):.4g}",
            f"{run.returns.min():.4g}",
        )
        for run in [*regular, *soft]
    )
    rates = tuple(run.rate for run in regular)
    return Claim(
        id=course.id("stability"),
        title="Stability" + course.title,
        says="MaxEnt RL is stabler: what it learns depends less on the seed and on the learning "
        "rate.",
        measured=f"{course.by}, {course.steps:,} steps each, {_seeds(soft[0])} at each of "
        f"{len(rates)} learning rates. Spread: the standard deviation over seeds. Intervals by a "
        "bootstrap over seeds.",
        effects=tuple(effects),
        table=Table(("learner", "return", "spread over seeds", "worst seed"), rows),
        picture=Picture(
            "Return over the learning rate",
            "learning rate",
            "reward",
            rates,
            tuple(
                Line(runs[0].name, tuple(mean(run.returns) for run in runs))
                for runs in (regular, soft)
            ),
            logarithmic=True,
        )
        if len(rates) > 1
        else None,
        remark=_worth_of_stability(course),
    )


def _worth_of_stability(course: Course) -> str:
    """What is worse may well be steadier, which is no gain."""
    regular, soft = course.get(course.baseline), course.get(course.reference)
    lost = difference(regular.returns, soft.returns)
    if lost.low <= course.rounding:
        return ""
    return (
        f"Beware: on average {soft.name} earns less than {regular.name} at the usual rate, by "
        f"{lost.value:.4g} ({lost.low:.4g} to {lost.high:.4g}), and a smaller spread of what is "
        "worse is no gain."
    )


def _plain(value: float, rounding: float) -> float:
    return float(value) if abs(value) > rounding else 0.0


def _over_seeds(returns: Array) -> Array:
    """Standard deviations, pooled over rates: (rates, ..., K)."""
    return np.asarray(np.sqrt(returns.var(-1, ddof=1).mean(0)))


def _worst_rate(returns: Array) -> Array:
    return np.asarray(returns.mean(-1).min(0))


def _over_rates(returns: Array) -> Array:
    return np.asarray(np.ptp(returns.mean(-1), axis=0))


def automatic(course: Course) -> Claim:
    """Does a tuned temperature spare the choice of one?"""
    usual = course.usual_runs()
    fixed = [run for run in usual if run.temperature]
    tuned = [run for run in usual if run.temperature is None]
    base = Claim(
        id=course.id("automatic"),
        title="Automatic temperature" + course.title,
        says="A temperature that is tuned to a target entropy spares the choice of one.",
        measured="",
    )
    if not tuned or not fixed:
        return dataclasses.replace(
            base,
            why="nothing tunes its temperature here, for the routine cannot or the prior is not "
            "uniform, or there is no fixed one to hold it against",
        )
    best = max(fixed, key=lambda run: float(run.returns.mean()))
    blind = np.mean([run.returns for run in fixed], axis=0)
    averages = [float(run.returns.mean()) for run in fixed]
    least = NEAR * (max(averages) - min(averages))
    rows = tuple(
        (run.name, mean(run.temperatures), mean(run.entropies), mean(run.returns)) for run in usual
    )
    return dataclasses.replace(
        base,
        measured=f"{course.by}, {course.steps:,} steps each, {_seeds(best)}. The target entropy is "
        f"the default of the learned routines: {DISCRETE_SHARE:g} of the largest for discrete "
        "actions, minus their number of coordinates in a box.",
        effects=(
            Effect(
                "return, automatic above one of the fixed temperatures picked blindly",
                difference(tuned[0].returns, blind),
                "reward",
                course.rounding,
            ),
            Effect(
                f"return, automatic above the best of them, {best.name}; no worse by {NEAR:.0%} of "
                "what separates them",
                difference(tuned[0].returns, best.returns),
                "reward",
                course.rounding - least,
            ),
        ),
        table=Table(
            ("learner", "temperature at the end", "entropy per step, nats", "return"), rows
        ),
        picture=_beside("Return of what was learned", "reward", usual, "returns"),
    )


def _beside(title: str, up: str, runs: Sequence[Runs], what: str) -> Picture:
    names = tuple(run.name for run in runs)
    points = tuple(mean(getattr(run, what)) for run in runs)
    return Picture(title, "learner", up, names, (Line(title, points),))


def _seeds(runs: Runs) -> str:
    return f"{len(runs.returns)} seeds"
