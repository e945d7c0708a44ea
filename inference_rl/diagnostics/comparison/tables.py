"""The course of learning in tables: kinds of learners on a finite model, evaluated exactly."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from inference_rl.diagnostics.comparison.exact import Policies
from inference_rl.diagnostics.comparison.runs import (
    AUTOMATIC,
    EXPLORING,
    GREEDY,
    NEAR,
    Course,
    Runs,
)
from inference_rl.diagnostics.comparison.tabular import Kind, Learned, fits, learn, worth_finding
from inference_rl.randomness import derived

RATES = (0.1, 0.3, 1.0)
USUAL_RATE = 0.3

EPSILON = 0.1

STEPS, SEEDS = 20_000, 20
"""Of each learner, and learners of each kind, unless others are asked for."""


def kinds(temperatures: tuple[float, ...], *, tuned: bool) -> list[Kind]:
    """Regular and soft, at every rate."""
    return [
        kind
        for rate in RATES
        for kind in (
            Kind(GREEDY, 0.0, rate),
            Kind(EXPLORING, 0.0, rate, EPSILON),
            *(Kind(f"soft, α = {t:g}", t, rate) for t in temperatures),
            *([Kind(AUTOMATIC, None, rate)] if tuned else []),
        )
    ]


def course(
    known: Policies,
    *,
    seeds: int,
    steps: int,
    seed: int,
    progress: Callable[[str], None] | None,
) -> Course:
    """Let them learn.

    :raises ValueError: there are too many states for so many learners.
    """
    # A target entropy is one for the divergence only from a uniform prior.
    acting = known.prior[..., ~known.dynamics.ended, :]
    every = kinds(known.temperatures, tuned=bool(np.ptp(acting) < 1e-12))
    if not fits(known.model, len(every) * seeds):
        raise ValueError(
            f"seeds: expected fewer than {seeds}, for the tables of {len(every)} kinds of learners "
            f"on {known.model.num_states} states do not fit; give fewer, or a learned routine"
        )
    worth, words = worth_finding(known.dynamics, known.model, known.prior)
    learned = learn(
        known.model,
        every,
        seeds=seeds,
        steps=steps,
        generator=np.random.default_rng(derived(seed, "tables")),
        prior=known.prior,
        worth=worth,
        unit=known.temperatures[known.reference],
        progress=progress,
    )
    if progress is not None:
        progress("evaluating what was learned in tables")
    best, random = known.dynamics.returns(np.stack([known.regular, known.prior]))
    return Course(
        runs=[_runs(known, found) for found in learned],
        baseline=EXPLORING,
        reference=f"soft, {known.reference_name}",
        usual=USUAL_RATE,
        best=float(best),
        near_by=NEAR * max(float(min(best - random, abs(best) or math.inf)), 0.0),
        steps=steps,
        worth=words,
        places="states covered",
        by=f"Q-learning in a table, at rate {USUAL_RATE:g} where no other is said, with ε = "
        f"{EPSILON:g}",
    )


def _runs(known: Policies, found: Learned) -> Runs:
    return Runs(
        name=found.kind.name,
        temperature=found.kind.temperature,
        rate=found.kind.rate,
        covered=found.covered.astype(float),
        found=found.found.astype(float),
        returns=known.dynamics.returns(found.policies),
        greedy=known.dynamics.returns(found.greedy),
        entropies=known.dynamics.mean_entropies(found.policies),
        temperatures=found.temperatures,
    )
