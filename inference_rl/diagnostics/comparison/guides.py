"""How far each policy, as a guide, is from p(τ | O): what `guide_quality` says of them.

Exact soft policies are judged one by one, those of learners over their seeds, which are also held
against each other as chains: R̂ of the returns of their episodes.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from inference_rl.diagnostics.comparison.exact import Policies
from inference_rl.diagnostics.comparison.findings import (
    Cell,
    Estimate,
    Table,
    exactly,
    mean,
)
from inference_rl.diagnostics.comparison.runs import Course, Runs
from inference_rl.diagnostics.guide import GuideQuality, guide_quality
from inference_rl.diagnostics.pareto import reliable_k
from inference_rl.inference import infer
from inference_rl.inference.exact import Exact
from inference_rl.randomness import derived

DRAWS = 400
"""Trajectories to judge a guide by."""

UNKNOWN = "–"


def guides(known: Policies, seed: int, progress: Callable[[str], None]) -> Table:
    """A row for every temperature, by draws of the model's own program."""
    rows = []
    for name, temperature in zip(known.names[1:], known.temperatures, strict=True):
        progress(f"judging the guide: {name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ties, which are no fault here
            result = infer(known.model, Exact(temperature))
        quality = guide_quality(result, draws=DRAWS, seed=derived(seed, "guides"), most_states=0)
        rows.append((name, *_cells(quality)))
    return Table(
        (
            "policy",
            "ELBO by draws, nats",
            "exact",
            "log p(O)",
            f"{DRAWS} draws count as",
            "Pareto k̂",
        ),
        tuple(rows),
    )


def learned_guides(courses: Sequence[Course]) -> Table:
    """A row for every kind of learner at the usual rate, without columns that say nothing."""
    draws = max((g.draws for c in courses for run in c.runs for g in run.guides), default=2)
    columns = (
        "learner",
        "ELBO by draws, nats",
        "exact",
        "of at most",
        "KL to π*, nats a step",
        "in the worst state",
        f"of {draws} draws count",
        f"Pareto k̂, good below {reliable_k(draws):.2f}",
        "R̂ of returns",
    )
    rows = []
    for course in courses:
        named = f"{course.suffix}: " if course.suffix else ""
        rows += [(named + run.name, *_learned_cells(run)) for run in course.usual_runs()]
    told = [any(row[i] != UNKNOWN for row in rows) for i in range(len(columns))]
    return Table(
        tuple(itertools.compress(columns, told)),
        tuple(tuple(itertools.compress(row, told)) for row in rows),
    )


def _learned_cells(run: Runs) -> tuple[Cell, ...]:
    mixed = UNKNOWN if run.rhat is None else f"{run.rhat:.2f}"
    if not run.guides:  # at temperature 0 reward is no evidence
        return (*[UNKNOWN] * 7, mixed)
    exact = [guide.exact_elbo for guide in run.guides]
    best = [guide.max_elbo for guide in run.guides]
    apart = [guide.mean_divergence for guide in run.guides]
    worst = [None if g.divergence is None else float(g.divergence.max()) for g in run.guides]
    tails = [guide.pareto_k for guide in run.guides if guide.pareto_k is not None]
    return (
        mean([guide.elbo for guide in run.guides]),
        *map(_over_seeds, (exact, best, apart, worst)),
        f"{np.mean([guide.effective_sample_size for guide in run.guides]):.3g}",
        f"{max(tails):.2f}" if tails else "too few values",
        mixed,
    )


def _over_seeds(values: Sequence[float | None]) -> Cell:
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) and np.isfinite(known).all() else UNKNOWN


def _cells(quality: GuideQuality) -> tuple[Cell, ...]:
    low, high = quality.elbo_interval
    evidence = quality.log_evidence
    return (
        Estimate(quality.elbo, low, high, quality.draws),
        UNKNOWN if quality.max_elbo is None else exactly(quality.max_elbo),
        UNKNOWN if evidence is None else exactly(evidence),
        f"{quality.effective_sample_size:.4g}",
        _tail(quality),
    )


def _tail(quality: GuideQuality) -> str:
    if quality.constant:
        return "all the same"
    if quality.pareto_k is None:
        return "too few values"
    return f"{quality.pareto_k:.2f}" + ("" if quality.trusted is not False else ", too large")
