"""Claims about policies that are only known by their episodes, where no exact ones can be had."""

from __future__ import annotations

import numpy as np

from inference_rl.diagnostics.comparison.findings import (
    Cell,
    Claim,
    Effect,
    Line,
    Picture,
    Table,
    difference,
    mean,
)
from inference_rl.diagnostics.comparison.robustness import STRENGTH
from inference_rl.diagnostics.comparison.routines import (
    ACTION_BINS,
    DRAWS,
    EPISODES,
    SLIPS,
)
from inference_rl.diagnostics.comparison.runs import Course, Runs


def randomness(course: Course) -> Claim:
    """Are policies stochastic or deterministic?"""
    regular, soft = course.get(course.baseline), course.get(course.reference)
    usual = course.usual_runs()
    rows = tuple((run.name, mean(run.entropies), mean(run.temperatures)) for run in usual)
    return Claim(
        id=course.id("randomness"),
        title="Stochastic or deterministic" + course.title,
        says="MaxEnt RL acts at random where several actions are good; regular RL always takes one "
        "action.",
        measured=f"Entropy per step of what was learned by {course.by}, along its own episodes; of "
        f"actions in a box rounded to {ACTION_BINS} places a coordinate, where regular RL has "
        f"hardly any width and its density no entropy to speak of. {len(soft.returns)} seeds.",
        effects=(
            Effect(
                f"entropy per step, {soft.name} above {regular.name}",
                difference(soft.entropies, regular.entropies),
                "nats",
            ),
        ),
        table=Table(("learner", "entropy per step, nats", "temperature at the end"), rows),
        picture=Picture(
            "Entropy per step",
            "learner",
            "nats",
            tuple(run.name for run in usual),
            (Line("entropy", tuple(mean(run.entropies) for run in usual)),),
        ),
    )


def trade(course: Course) -> Claim:
    """Return against entropy as the temperature varies."""
    soft = sorted(
        (run for run in course.usual_runs() if run.temperature),
        key=lambda run: run.temperature or 0.0,
    )
    regular, hottest = course.get(course.baseline), soft[-1]
    usual = course.usual_runs()
    rows = tuple((run.name, mean(run.returns), mean(run.entropies)) for run in usual)
    return Claim(
        id=course.id("trade"),
        title="Return against entropy" + course.title,
        says="The temperature trades return for entropy: the hotter, the more random and the worse "
        "paid.",
        measured=f"Returns of {DRAWS} episodes (undiscounted, without entropy) of what was "
        f"learned by {course.by} at each temperature, {course.steps:,} steps, "
        f"{len(regular.returns)} seeds.",
        effects=(
            Effect(
                f"return, {regular.name} above {hottest.name}",
                difference(regular.returns, hottest.returns),
                "reward",
            ),
            Effect(
                f"entropy per step, {hottest.name} above {soft[0].name}",
                difference(hottest.entropies, soft[0].entropies),
                "nats",
            )
            if len(soft) > 1
            else Effect(
                f"entropy per step, {hottest.name} above {regular.name}",
                difference(hottest.entropies, regular.entropies),
                "nats",
            ),
        ),
        table=Table(("learner", "return", "entropy per step, nats"), rows),
        picture=Picture(
            "Return over temperature",
            "temperature",
            "reward",
            tuple(float(run.temperature or 0) for run in soft),
            (
                Line("soft", tuple(mean(run.returns) for run in soft)),
                Line("regular", tuple(mean(regular.returns) for _ in soft)),
            ),
            logarithmic=True,
        )
        if len(soft) > 1
        else None,
    )


def robustness(course: Course) -> Claim:
    """Does MaxEnt RL earn more when actions slip?"""
    regular, soft = course.get(course.baseline), course.get(course.reference)
    usual = course.usual_runs()
    at = SLIPS.index(STRENGTH)
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (run.name, *(mean(values) for values in _slipped(run).T)) for run in usual
    )
    return Claim(
        id=course.id("robustness"),
        title="Robustness" + course.title,
        says="A MaxEnt policy, inferred without the change, earns more than a regular one when the "
        "world changes.",
        measured=f"Returns of {EPISODES} episodes ({DRAWS} without slips) in which an action of "
        f"the prior is carried out with some probability, {STRENGTH:g} for the verdict, in place "
        "of the chosen one. Other changes need the model's tables, which a simulator has none of.",
        effects=(
            Effect(
                f"return under slips, {soft.name} above {regular.name}",
                difference(_slipped(soft)[:, at], _slipped(regular)[:, at]),
                "reward",
            ),
        ),
        table=Table(("learner", *(f"slips {delta:g}" for delta in SLIPS)), rows),
        picture=Picture(
            "Return under slips",
            "probability of a slip",
            "reward",
            SLIPS,
            tuple(
                Line(run.name, tuple(mean(values) for values in _slipped(run).T)) for run in usual
            ),
        ),
    )


def _slipped(run: Runs) -> np.ndarray:
    assert run.slipped is not None
    return run.slipped


def cost(course: Course) -> Claim:
    """What entropy costs where a deterministic policy suffices."""
    regular, soft = course.get(course.baseline), course.get(course.reference)
    rows = tuple((run.name, mean(run.returns), mean(run.greedy)) for run in course.usual_runs())
    return Claim(
        id=course.id("cost"),
        title="The cost of entropy" + course.title,
        says="Where a deterministic policy suffices, as in every fully observed model, acting at "
        "random costs return, and taking the likeliest action gives it back.",
        measured=f"Returns of {DRAWS} episodes with drawn actions and of {EPISODES} with the "
        f"likeliest, of what was learned by {course.by} in {course.steps:,} steps.",
        effects=(
            Effect(
                f"return, {regular.name} above {soft.name}",
                difference(regular.returns, soft.returns),
                "reward",
            ),
            Effect(
                f"return, likeliest actions of {soft.name} above drawn ones",
                mean(soft.greedy - soft.returns),
                "reward",
            ),
        ),
        table=Table(("learner", "return, drawn actions", "return, likeliest actions"), rows),
    )
