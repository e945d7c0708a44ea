"""What policies earn in a world that is not the one they were inferred for.

A change of what actions do, as slips are, is a matrix M(s) over actions: whoever chooses a gets
what a' would do with probability M_aa'. Then a policy π in the changed world is π M in the old one,
and everything stays exact. Rewards change in what is linear in the visits, walls in the tables.

1. slips: with probability δ an action drawn uniformly is carried out in place of the chosen one.
2. dynamics: with probability δ a random mixture of the actions' outcomes, another one for every
   state and action: Dirichlet(1, ..., 1), drawn `DRAWS` times.
3. reward: r(s, a) + δ · scale · N(0, 1), another number for every state and action. It cancels in
   the mean over draws, so what counts is the worst of `WORST_OF`: which rewards a policy can be
   hurt by is what MaxEnt RL is proved to be robust to (Eysenbach and Levine 2022,
   arXiv:2103.06257, theorem 4.1).
4. obstacles: a wall in place of one cell of the regular path, each in its turn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse.csgraph

from inference_rl.diagnostics.comparison.exact import Policies
from inference_rl.diagnostics.comparison.findings import (
    ROUNDING,
    Cell,
    Claim,
    Effect,
    Estimate,
    Line,
    Picture,
    Table,
    exact_effect,
    exactly,
    mean,
)
from inference_rl.diagnostics.comparison.visits import Dynamics
from inference_rl.randomness import derived

Array = np.ndarray[Any, Any]

STRENGTHS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
"""Probabilities δ of a slip."""

STRENGTH = 0.2
"""δ of everything that a verdict is about."""

DRAWS = 20
"""Changes of the dynamics."""

WORST_OF, WORLDS = 10, 30
"""The worst of so many rewards, so often."""

MOST_WALLS = 20
"""Cells that are blocked, those of the regular path that it visits most."""


def robustness(known: Policies, seed: int) -> Claim:
    """Does MaxEnt RL earn more when the world changes?"""
    at = 1 + known.reference
    slipped = np.array([known.dynamics.returns(slips(known.all, delta)) for delta in STRENGTHS])
    at_strength = slipped[STRENGTHS.index(STRENGTH)]
    moved = moved_dynamics(known, seed)
    paid = worst_rewards(known, seed)
    name = f"soft at {known.reference_name} above regular"
    effects = [
        exact_effect(f"return under slips, {name}", at_strength[at], at_strength[0], "reward"),
        _over(f"return under other dynamics, {name}", moved[:, at] - moved[:, 0]),
        _over(f"worst return under other rewards, {name}", paid[:, at] - paid[:, 0]),
    ]
    columns = ["policy", "as inferred", "slips", "other dynamics", "worst other reward"]
    rows: list[list[Cell]] = [
        [policy, exactly(base), exactly(slip), mean(move), mean(pay)]
        for policy, base, slip, move, pay in zip(
            known.names, slipped[0], at_strength, moved.T, paid.T, strict=True
        )
    ]
    remark = ""
    cells = walls(known)
    if len(cells):
        blocked = np.array([known.dynamics.without(int(cell)).returns(known.all) for cell in cells])
        effects.append(_over(f"return with a cell blocked, {name}", blocked[:, at] - blocked[:, 0]))
        columns.append(f"a blocked cell ({len(cells)})")
        for row, values in zip(rows, blocked.T, strict=True):
            row.append(_mean(values))
    else:
        remark = "No cell is blocked, for no grid is known, or no path with a cell to spare. "
    better = [
        f"{t:g}"
        for t, r in zip(known.temperatures, at_strength[1:], strict=True)
        if r > at_strength[0] + ROUNDING * max(1.0, abs(at_strength[0]))
    ]
    remark += (
        f"Under slips temperatures that earn more than regular RL: {', '.join(better)}."
        if better
        else "Under slips no temperature earns more than regular RL."
    )
    return Claim(
        id="robustness",
        title="Robustness",
        says="A MaxEnt policy, inferred without the change, earns more than a regular one when the "
        "world changes.",
        measured=f"Exact (discounted) returns in changed worlds. Slips: with probability "
        f"{STRENGTH:g} an action drawn uniformly is carried out in place of the chosen one. "
        f"Dynamics: with probability {STRENGTH:g} a random "
        f"mixture of what the actions do, {DRAWS} draws. Reward: {STRENGTH:g} of the spread of "
        f"rewards as noise on each state and action, the worst of {WORST_OF} draws, {WORLDS} "
        "times. Obstacles: a wall in place of a cell of the regular path, each in its turn. "
        "Intervals are over draws, or cells; episodes are cut after "
        f"{known.dynamics.steps:,} steps.",
        effects=tuple(effects),
        table=Table(tuple(columns), tuple(tuple(row) for row in rows)),
        picture=Picture(
            "Return under slips",
            "probability of a slip",
            "reward",
            STRENGTHS,
            tuple(
                Line(policy, tuple(map(exactly, values)))
                for policy, values in zip(known.names, slipped.T, strict=True)
            ),
        ),
        remark=remark,
    )


def _mean(values: Array) -> Estimate:
    return mean(values) if len(values) > 1 else exactly(float(values[0]))


def _over(name: str, differences: Array) -> Effect:
    estimate = _mean(differences)
    return Effect(name, estimate, "reward", ROUNDING * max(1.0, float(np.abs(differences).max())))


def slips(policies: Array, delta: float) -> Array:
    """What policies come to where actions slip, of the same shape."""
    return (1 - delta) * policies + delta / policies.shape[-1]


def moved_dynamics(known: Policies, seed: int) -> Array:
    """Returns under random changes of the dynamics, (DRAWS, policies)."""
    generator = np.random.default_rng(derived(seed, "dynamics"))
    states, actions = known.dynamics.reward.shape
    found = []
    for _ in range(DRAWS):
        instead = generator.dirichlet(np.ones(actions), size=(states, actions))
        mixed = known.all[..., None, :] @ instead
        changed = (1 - STRENGTH) * known.all + STRENGTH * mixed[..., 0, :]
        found.append(known.dynamics.returns(changed))
    return np.array(found)


def worst_rewards(known: Policies, seed: int) -> Array:
    """The worst of several returns under random changes of the reward, (WORLDS, policies)."""
    generator = np.random.default_rng(derived(seed, "reward"))
    reward = known.dynamics.reward
    visits = known.dynamics.visits(known.all).reshape(len(known.all), -1)
    size = (WORLDS * WORST_OF, reward.size)
    noise = STRENGTH * reward_scale(known) * generator.standard_normal(size)
    paid = (visits @ (reward.ravel() + noise).T).reshape(len(known.all), WORLDS, WORST_OF)
    found: Array = paid.min(-1).T
    return found


def reward_scale(known: Policies) -> float:
    """The standard deviation of what a step pays, over the rows of the table; 1 if there is
    none."""
    rewards = known.model.rewards.detach().numpy()
    return float(rewards.std()) or 1.0


def walls(known: Policies) -> Array:
    """Cells of the regular path that can be blocked, and an end still be reached: those visited
    most."""
    model, dynamics = known.model, known.dynamics
    if model.layout is None or model.remembers_action:
        return np.zeros(0, dtype=int)
    visited = dynamics.visits(known.regular[None])[0].sum(-1)
    candidates = (visited > 1e-6) & (dynamics.initial == 0) & ~dynamics.ended
    order = np.argsort(-visited, kind="stable")
    found = [s for s in order if candidates[s] and _can_end(dynamics.without(int(s)))]
    return np.array(found[:MOST_WALLS], dtype=int)


def _can_end(dynamics: Dynamics) -> bool:
    """Whether an end can be reached from some start, if the model has any."""
    states = len(dynamics.initial)
    actions = dynamics.reward.shape[1]
    moves = dynamics.transition.tocoo()
    graph = scipy.sparse.csr_array(
        (np.ones(len(moves.data)), (moves.row // actions, moves.col)), shape=(states, states)
    )
    reached: set[int] = set()
    for start in np.flatnonzero(dynamics.initial):
        order = scipy.sparse.csgraph.breadth_first_order(
            graph, int(start), return_predecessors=False
        )
        reached.update(int(state) for state in order)
    return bool(dynamics.ended[list(reached)].any()) or not bool(dynamics.ended.any())
