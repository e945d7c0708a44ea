"""Claims about policies that are known exactly: `Policies` of a finite model, and what they settle.

Returns are E Σ γ^t r over an episode, cut after `Dynamics.steps`; nothing here is drawn but changes
of the world that are random, which are told by their intervals.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from inference_rl.diagnostics.comparison.findings import (
    ROUNDING,
    Claim,
    Line,
    Picture,
    Table,
    exact_effect,
    exactly,
)
from inference_rl.diagnostics.comparison.visits import Dynamics, mode
from inference_rl.finite import FiniteModel
from inference_rl.inference import infer
from inference_rl.inference.exact import Exact
from inference_rl.policies import TabularPolicy

Array = np.ndarray[Any, Any]

PATH = 60
"""Steps of the path along which entropies are drawn."""

POINTS = 21
"""Temperatures of the curves of return against entropy, by equal factors."""

FACTORS = (0.1, 0.3, 1.0, 3.0)
"""Temperatures unless others are asked for, as multiples of that which `usual_temperature` finds;
verdicts are about the one that is 1."""

SPENT = 0.1
"""Of what separates regular RL from the prior, what entropy may cost at that one."""


@dataclasses.dataclass(frozen=True)
class Policies:
    """Regular RL and MaxEnt RL at several temperatures, on one finite model.

    :ivar regular: the policy of Exact(0), (S, A) or (T, S, A). :ivar soft: one a temperature.
    :ivar prior: likewise. :ivar tied: regular RL that draws among the actions of the best Q, which
        are several where they are the same but for rounding.
    :ivar reference: index of the temperature that verdicts are about.
    """

    model: FiniteModel
    dynamics: Dynamics
    temperatures: tuple[float, ...]
    reference: int
    regular: Array
    soft: tuple[Array, ...]
    prior: Array
    tied: Array

    @property
    def chosen(self) -> Array:
        """The soft policy at the temperature that verdicts are about."""
        return self.soft[self.reference]

    @property
    def all(self) -> Array:
        """Regular and soft, in this order, (1 + temperatures, ...)."""
        return np.stack([self.regular, *self.soft])

    @property
    def names(self) -> tuple[str, ...]:
        return ("regular", *(f"soft, α = {t:g}" for t in self.temperatures))

    @property
    def reference_name(self) -> str:
        return f"α = {self.temperatures[self.reference]:g}"


def policies(model: FiniteModel, temperatures: Sequence[float] | None) -> Policies:
    """Infer them all.

    :param temperatures: ascending; None chooses `FACTORS` of `usual_temperature`.
    """
    regular, q = solved(model, 0.0)
    dynamics = Dynamics.of(model)
    prior = np.broadcast_to(model.log_prior.exp().numpy(), regular.shape)
    if temperatures is None:
        usual = usual_temperature(model, dynamics, regular, q, prior)
        temperatures = [float(f"{factor * usual:.2g}") for factor in FACTORS]
    return Policies(
        model=model,
        dynamics=dynamics,
        temperatures=tuple(temperatures),
        reference=len(temperatures) // 2,
        regular=regular,
        soft=tuple(solved(model, temperature)[0] for temperature in temperatures),
        prior=prior,
        tied=among_the_best(np.where(prior > 0, q, -np.inf)),
    )


def among_the_best(q: Array) -> Array:
    """The policy that draws uniformly among the actions of the highest Q of a state."""
    size = np.abs(q[np.isfinite(q)]).max(initial=1.0)
    best = q >= q.max(-1, keepdims=True) - ROUNDING * size
    found: Array = best / best.sum(-1, keepdims=True)
    return found


def usual_temperature(
    model: FiniteModel, dynamics: Dynamics, regular: Array, q: Array, prior: Array
) -> float:
    """A temperature that fits the rewards of a model, reward units.

    By how much the best action of a state is better than the worst, the median over states; or
    less, where the entropy at that would cost more than `SPENT` of what separates regular RL from
    the prior.
    """
    allowed = np.where(np.isfinite(model.log_prior.numpy()), q, np.nan)[..., ~dynamics.ended, :]
    spread = np.nanmax(allowed, -1) - np.nanmin(allowed, -1) if allowed.size else np.zeros(1)
    spread = spread[spread > 0]
    unit = float(np.median(spread)) if spread.size else 1.0
    best, worst = dynamics.returns(np.stack([regular, prior]))

    def spends(temperature: float) -> bool:
        found = dynamics.returns(solved(model, temperature)[0][None])[0]
        return bool(best - found > SPENT * (best - worst))

    low, high = unit / 1000, unit
    if spends(low) or not spends(high):
        return low if spends(low) else high
    while high > 1.05 * low:  # in two figures
        middle = math.sqrt(low * high)
        low, high = (low, middle) if spends(middle) else (middle, high)
    return low


def solved(model: FiniteModel, temperature: float) -> tuple[Array, Array]:
    """The best policy and Q at a temperature, (S, A) or (T, S, A)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties, which are no fault here
        result = infer(model, Exact(temperature))
    assert isinstance(result.policy, TabularPolicy)
    return result.policy.probs.detach().numpy(), result.q.detach().numpy()


def randomness(known: Policies) -> Claim:
    """Are policies stochastic or deterministic?"""
    every = np.stack([*known.all, known.tied])
    found = known.dynamics.mean_entropies(every)
    paths = [known.dynamics.entropies(policy, PATH)[0] for policy in known.all]
    length = min(map(len, paths))
    rows = tuple(
        (name, exactly(h), exactly(r))
        for name, h, r in zip(
            (*known.names, "regular, drawn among ties"),
            found,
            known.dynamics.returns(every),
            strict=True,
        )
    )
    return Claim(
        id="randomness",
        title="Stochastic or deterministic",
        says="MaxEnt RL acts at random where several actions are good; regular RL always takes one "
        "action.",
        measured="Entropy of the exact policies, a mean over the steps of their own (discounted) "
        "paths; drawn step by step below. Regular RL takes the first of equally good actions; to "
        "draw among them instead is entropy that costs nothing, unless it is to wait for ever.",
        effects=(
            exact_effect(
                f"entropy per step, soft at {known.reference_name} above regular",
                found[1 + known.reference],
                found[0],
                "nats",
            ),
        ),
        table=Table(("policy", "entropy per step, nats", "return"), rows),
        picture=Picture(
            "Entropy along the path",
            "step",
            "nats",
            tuple(float(t) for t in range(length)),
            tuple(
                Line(name, tuple(exactly(value) for value in path[:length]))
                for name, path in zip(known.names, paths, strict=True)
            ),
        )
        if length > 1
        else None,
    )


def trade(known: Policies) -> Claim:
    """Return against entropy as the temperature varies."""
    low, high = known.temperatures[0] / 10, known.temperatures[-1] * 10
    grid = np.geomspace(low, high, POINTS)
    tables = np.stack([solved(known.model, float(temperature))[0] for temperature in grid])
    returns, entropies = known.dynamics.returns(tables), known.dynamics.mean_entropies(tables)
    regular = float(known.dynamics.returns(known.regular[None])[0])
    picks = known.dynamics.returns(known.all), known.dynamics.mean_entropies(known.all)
    rows = tuple(
        (name, exactly(r), exactly(h)) for name, r, h in zip(known.names, *picks, strict=True)
    )
    highest = known.names[-1]
    return Claim(
        id="trade",
        title="Return against entropy",
        says="The temperature trades return for entropy: the hotter, the more random and the worse "
        "paid.",
        measured=f"Exact policies at {POINTS} temperatures from {low:.3g} to {high:.3g}, each "
        "evaluated exactly: its (discounted) return, without its entropy.",
        effects=(
            exact_effect(f"return, regular above {highest}", regular, picks[0][-1], "reward"),
            exact_effect(
                f"entropy per step, {highest} above {known.names[1]}",
                picks[1][-1],
                picks[1][1],
                "nats",
            )
            if len(known.temperatures) > 1
            else exact_effect(f"entropy per step of {highest}", picks[1][-1], 0.0, "nats"),
        ),
        table=Table(("policy", "return", "entropy per step, nats"), rows),
        picture=Picture(
            "Return over temperature",
            "temperature",
            "reward",
            tuple(grid.tolist()),
            (
                Line("soft", tuple(map(exactly, returns))),
                Line("regular", tuple(exactly(regular) for _ in grid)),
            ),
            logarithmic=True,
        ),
        remark=_cheapest(entropies, returns, regular),
    )


def _cheapest(entropies: Array, returns: Array, regular: float) -> str:
    """How much entropy can be had for a twentieth of what there is to lose."""
    worst = float(returns.min())
    kept = returns >= regular - 0.05 * (regular - worst)
    if not kept.any() or regular <= worst:
        return ""
    return (
        f"For 5% of what separates regular RL from the hottest policy drawn, up to "
        f"{float(entropies[kept].max()):.3g} nats per step can be had."
    )


def cost(known: Policies) -> Claim:
    """What entropy costs where a deterministic policy suffices."""
    returns = known.dynamics.returns(known.all)
    modes = known.dynamics.returns(mode(known.all))
    random = float(known.dynamics.returns(known.prior[None])[0])
    best, at = float(returns[0]), 1 + known.reference
    span = best - random

    def share(value: float) -> str:
        return f"{100 * (value - random) / span:.1f}%" if span > 0 else "–"

    rows = tuple(
        (name, exactly(r), share(float(r)), exactly(m), share(float(m)))
        for name, r, m in zip(known.names, returns, modes, strict=True)
    )
    return Claim(
        id="cost",
        title="The cost of entropy",
        says="Where a deterministic policy suffices, as in every fully observed model, acting at "
        "random costs return, and taking the likeliest action gives it back.",
        measured="Exact (discounted) returns of the policies as they are, and with their most "
        "likely action taken in its place, in episodes that are cut after "
        f"{known.dynamics.steps:,} steps; 0% is the prior's return and 100% that of regular RL.",
        effects=(
            exact_effect(
                f"return, regular above soft at {known.reference_name}",
                best,
                float(returns[at]),
                "reward",
            ),
            exact_effect(
                f"return, likeliest actions at {known.reference_name} above drawn ones",
                float(modes[at]),
                float(returns[at]),
                "reward",
            ),
        ),
        table=Table(
            ("policy", "return", "of the range", "likeliest action", "of the range, likeliest"),
            rows,
        ),
        picture=Picture(
            "Drawn actions beside the likeliest",
            "temperature",
            "reward",
            known.temperatures,
            (
                Line("drawn", tuple(exactly(r) for r in returns[1:])),
                Line("likeliest", tuple(exactly(m) for m in modes[1:])),
                Line("regular", tuple(exactly(best) for _ in known.temperatures)),
            ),
            logarithmic=True,
        )
        if len(known.temperatures) > 1
        else None,
    )
