"""The temperature doctor: what a target for the divergence comes to, `temperature_report`.

1. Of all policies with E KL(π ‖ ρ) <= target per step the best is π*_α, at the α that minimises
   g(α) = J_α + α · target · N, J_α = E V_α in KL form and N the (discounted) steps of an episode.
2. dJ_α/dα = -D_α, the divergence of π*_α summed over them; so that g is convex, and at its minimum
   D_α = target · N: a mean of `target` nats per step.
3. A routine whose temperature is "auto" lowers α while the divergence it measures is below its
   target, and raises it above: it settles where 2 holds, having learned π*_α.

Where episodes may end, N depends on the policy, and is that of the policy of 2; should the mean per
step not fall all the way as α rises, there may be several of these. Routines weigh the steps of a
batch alike and not by the discount, so that they settle a little beside the prediction.

REPS has another temperature besides: η, of its trust region KL(w ‖ q) <= epsilon, the minimum of
the dual of `inference_rl.duals`. `trust_region` says where it is and how many of the episodes still
count under its weights.

References: Haarnoja et al. (2018), arXiv:1812.05905, §5. Peters, Mülling and Altün (2010), AAAI.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import numpy as np
from gymnasium.spaces import Discrete
from scipy.optimize import brentq

from inference_rl import duals
from inference_rl.diagnostics.samples import column
from inference_rl.environment import EnvironmentModel, WithPreviousAction
from inference_rl.finite import FiniteModel
from inference_rl.finite_messages import control_messages, first_step
from inference_rl.inference import InferenceResult
from inference_rl.inference.exact_finite import objective_parts
from inference_rl.inference.learned import is_uniform
from inference_rl.inference.reference import MOST_STATES
from inference_rl.inference.sampling import program_of
from inference_rl.priors import ActionPrior
from inference_rl.simulate import GymnasiumModel
from inference_rl.tabulation import tabulate
from inference_rl.temperature import Tuned, max_entropy

POINTS = 33
"""Temperatures of a curve, by equal factors."""

COLD, HOT = 1e-4, 1e3
"""Where a curve begins and ends, in ranges of the reward; it ends later by the steps there are."""

SETTLED = 0.1
"""Of the target: how far from it a measured divergence may be, and the temperature at rest."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Exact control at `POINTS` temperatures, in ascending order.

    :ivar temperatures: reward units. :ivar dual: g, reward units; None if its minimum is nowhere.
    :ivar divergence: of π*_α from the prior, nats, mean per step. :ivar entropy: likewise.
    :ivar expected_return: of π*_α, discounted, reward units.
    """

    temperatures: tuple[float, ...]
    dual: tuple[float, ...] | None
    divergence: tuple[float, ...]
    entropy: tuple[float, ...]
    expected_return: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class TemperatureReport:
    """What a target comes to; None where a number is not known or does not apply.

    :ivar target_divergence: nats per step, as resolved. :ivar target_entropy: the same target as an
        entropy, under a uniform prior. :ivar given: whether it was chosen, or is the default.
    :ivar infeasible_because: why no temperature meets it.
    :ivar largest_divergence: of any best policy, nats per step: as the temperature goes to 0.
    :ivar curve: of a finite model. :ivar no_curve_because: why there is none.
    :ivar predicted: the temperature at which the target is met, reward units; the least of them.
    :ivar also_met_at: other temperatures that meet it.
    :ivar came_to: where a run got to, reward units. :ivar measured_divergence: by its policy then,
        nats per step.
    """

    target_divergence: float
    target_entropy: float | None
    given: bool
    infeasible_because: str | None
    largest_divergence: float | None
    curve: Curve | None
    no_curve_because: str | None
    predicted: float | None
    also_met_at: tuple[float, ...]
    came_to: float | None
    measured_divergence: float | None

    @property
    def settled(self) -> bool | None:
        """Whether a run's divergence is at its target; None without a run."""
        if self.measured_divergence is None:
            return None
        off = abs(self.measured_divergence - self.target_divergence)
        return off <= SETTLED * abs(self.target_divergence)

    def summary(self) -> dict[str, Any]:
        """JSON."""
        plain = dataclasses.asdict(self) | {"settled": self.settled}
        plain["also_met_at"] = list(self.also_met_at)
        if self.curve is not None:
            plain["curve"] = {
                name: None if values is None else list(values)
                for name, values in dataclasses.asdict(self.curve).items()
            }
        return plain


def temperature_report(
    subject: EnvironmentModel | InferenceResult,
    *,
    target_divergence: float | None = None,
    target_entropy: float | None = None,
    prior: ActionPrior | None = None,
    most_states: int = MOST_STATES,
) -> TemperatureReport:
    """Examine a target for the temperature: of a model, or of a run and where that got to.

    :param target_divergence, target_entropy: nats per step, at most one of them; else those of the
        run, or the default of `Tuned`.
    :param prior: in place of the model's own; that of a run is known.
    :param most_states: a curve is made of models of at most so many, times the steps of a horizon.
    :raises ValueError: both targets, or a target entropy and the prior is not uniform; a saved run
        that does not hold its prior.
    """
    came_to = measured = None
    model = subject.model if isinstance(subject, InferenceResult) else subject
    if isinstance(subject, InferenceResult):
        prior = subject.prior
        if prior is None:
            raise ValueError(
                "prior: expected that of the run, which was made in Python and which a saved run "
                "does not hold; examine the result before it is saved"
            )
        if getattr(subject.routine, "temperature", None) == "auto":
            came_to, measured = subject.temperature, _measured(subject)
            if target_divergence is None and target_entropy is None:
                target_divergence = subject.routine.target_divergence
                target_entropy = subject.routine.target_entropy
    if getattr(prior, "needs_previous_action", False) and not model.remembers_action:
        model = WithPreviousAction(model)
    rho = model.action_prior if prior is None else prior
    uniform = _uniform(model, rho)
    given = target_divergence is not None or target_entropy is not None
    tuned = Tuned(target_divergence=target_divergence, target_entropy=target_entropy)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        target = tuned.resolved(model.action_space, uniform_prior=uniform).target_divergence
    assert target is not None
    infeasible = None
    if said:
        infeasible = str(said[0].message).partition(";")[0].removeprefix("temperature: ")
    finite = _tables(model, rho, most_states)
    curve, largest = None, None
    met: list[float] = []
    if isinstance(finite, FiniteModel):
        if np.ptp(_rewards(finite)) > 0:
            curve, met, largest = _curve(finite, target)
            if not met and infeasible is None:
                infeasible = _out_of_reach(target, curve)
        else:
            finite = "all steps pay the same, so that no policy is better than the prior"
            infeasible = infeasible or finite
    return TemperatureReport(
        target_divergence=target,
        target_entropy=max_entropy(model.action_space) - target if uniform else None,
        given=given,
        infeasible_because=infeasible,
        largest_divergence=largest,
        curve=curve,
        no_curve_because=finite if isinstance(finite, str) else None,
        predicted=met[0] if met else None,
        also_met_at=tuple(met[1:]),
        came_to=came_to,
        measured_divergence=measured,
    )


def _uniform(model: EnvironmentModel, prior: ActionPrior) -> bool:
    """As routines see it; of tables by what is in them."""
    if isinstance(model, FiniteModel) and prior == model.action_prior:
        size = math.log(model.num_actions)
        return bool((model.log_prior + size).abs().max() < 1e-12)
    return is_uniform(model, prior)


def _measured(result: InferenceResult) -> float | None:
    """Nats per step, at the last evaluation that says so."""
    found = [row["divergence"] for row in result.metrics if row.get("divergence") is not None]
    return float(found[-1]) if found else None


def _tables(model: EnvironmentModel, prior: ActionPrior, most: int) -> FiniteModel | str:
    discrete = isinstance(model.state_space, Discrete) and isinstance(model.action_space, Discrete)
    if isinstance(model, GymnasiumModel) or not discrete:
        return "the model is not finite"
    if int(model.state_space.n) * (model.horizon or 1) > most:  # type: ignore[attr-defined]
        return f"the model has more than {most:,} states"
    return tabulate(model, prior=None if prior == model.action_prior else prior)


def _rewards(model: FiniteModel) -> np.ndarray:
    """Of every step that may be taken, and nothing, which an end pays."""
    rewards = model.rewards.detach().numpy()
    return np.append(rewards, 0.0) if model.can_end else rewards


@dataclasses.dataclass(frozen=True)
class _Point:
    objective: float
    expected_return: float
    divergence: float
    entropy: float
    steps: float

    @property
    def per_step(self) -> float:
        return self.divergence / self.steps if self.steps else 0.0


def _solved(model: FiniteModel, temperature: float) -> _Point:
    messages = control_messages(model, temperature)
    parts = objective_parts(model, messages.policy)
    return _Point(
        objective=float(model.initial @ first_step(messages.v)),
        expected_return=parts.expected_return,
        divergence=parts.divergence,
        entropy=parts.entropy,
        steps=parts.steps,
    )


def _curve(model: FiniteModel, target: float) -> tuple[Curve, list[float], float]:
    """The curve, the temperatures at which the target is met, and the largest divergence on it."""
    span = float(np.ptp(_rewards(model)))
    far = model.horizon or (1 / (1 - model.discount) if model.discount < 1 else 1000.0)
    grid = np.geomspace(COLD * span, HOT * span * far, POINTS)
    points = [_solved(model, float(temperature)) for temperature in grid]
    excess = [point.per_step - target for point in points]
    met = [
        _crossing(model, target, float(grid[i]), float(grid[i + 1]))
        for i in range(POINTS - 1)
        if excess[i] > 0 >= excess[i + 1]  # where tuning comes to rest, not where it runs away
    ]
    dual = None
    if met:
        steps = _solved(model, met[0]).steps
        dual = tuple(
            point.objective + float(temperature) * target * steps
            for point, temperature in zip(points, grid, strict=True)
        )
    curve = Curve(
        temperatures=tuple(grid.tolist()),
        dual=dual,
        divergence=tuple(point.per_step for point in points),
        entropy=tuple(p.entropy / p.steps if p.steps else 0.0 for p in points),
        expected_return=tuple(point.expected_return for point in points),
    )
    return curve, met, max(curve.divergence)


def _crossing(model: FiniteModel, target: float, low: float, high: float) -> float:
    def excess(log_temperature: float) -> float:
        return _solved(model, math.exp(log_temperature)).per_step - target

    return math.exp(brentq(excess, math.log(low), math.log(high), xtol=1e-12, rtol=1e-12))


def _out_of_reach(target: float, curve: Curve) -> str:
    return (
        f"even the coldest best policy of this model diverges by {curve.divergence[0]:.6g} nats "
        f"per step only, and the target is {target:.6g}: where actions are as good as one another "
        "it takes them all, and the temperature will run to its low bound"
    )


# --- The trust region of REPS ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrustRegion:
    """The dual of reweighting whole episodes of a policy within `epsilon`, by their soft returns.

    :ivar epsilon: nats. :ivar episodes: how many were drawn.
    :ivar temperatures, dual: g(η), both reward units, in ascending order of η.
    :ivar temperature: η at its minimum. :ivar effective_sample_size: 1 / Σ w² of `episodes` there.
    :ivar refused_because: why there is no minimum: the returns are all the same, or epsilon allows
        all weight on the best.
    :ivar rounds: what the run said of its own, one dict an evaluation: `steps`, `dual_temperature`
        and `effective_sample_size`.
    """

    epsilon: float
    episodes: int
    temperatures: tuple[float, ...]
    dual: tuple[float, ...]
    temperature: float | None
    effective_sample_size: float | None
    refused_because: str | None
    rounds: tuple[dict[str, float], ...]

    def summary(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return dataclasses.asdict(self)


def trust_region(
    result: InferenceResult, *, epsilon: float | None = None, draws: int = 1000, seed: int = 0
) -> TrustRegion:
    """What reweighting episodes of `result` within `epsilon` comes to; of REPS by its own epsilon.

    :param epsilon: > 0, nats. :param draws: episodes of the program, or of the simulator.
    :raises ValueError: no epsilon, and the routine has none; fewer than two draws.
    """
    epsilon = getattr(result.routine, "epsilon", None) if epsilon is None else epsilon
    if epsilon is None:
        raise ValueError(
            f"epsilon: expected a number > 0 in nats, for {type(result.routine).__name__} has "
            "none of its own, got None"
        )
    if draws < 2:
        raise ValueError(f"draws: expected at least 2 episodes to weigh, got {draws}")
    in_program = dataclasses.replace(result, source=program_of(result.model))
    tree = result.routine.sample(in_program, draws, horizon=None, seed=seed)
    returns = _soft_returns(result, tree)
    span = float(np.ptp(returns)) or 1.0
    grid = np.geomspace(1e-2 * span, 1e2 * span, POINTS)
    minimum, refused = None, None
    try:
        minimum = duals.solve_episodic(returns, epsilon)
    except (duals.ConstantReturnError, duals.DivergenceTooLargeError) as error:
        refused = str(error)
    names = ("steps", "dual_temperature", "effective_sample_size")
    return TrustRegion(
        epsilon=epsilon,
        episodes=draws,
        temperatures=tuple(grid.tolist()),
        dual=tuple(duals.episodic_dual(float(eta), returns, epsilon)[0] for eta in grid),
        temperature=None if minimum is None else minimum.temperature,
        effective_sample_size=None if minimum is None else minimum.effective_sample_size,
        refused_because=refused,
        rounds=tuple(
            {name: float(row[name]) for name in names}
            for row in result.metrics
            if all(row.get(name) is not None for name in names)
        ),
    )


def _soft_returns(result: InferenceResult, tree: Any) -> np.ndarray:
    """Σ γ^t [r - α log π/ρ] of every draw, reward units; without its second part at α = 0, and
    where a saved run does not hold its prior."""
    stats = tree["sample_stats"].to_dataset()
    if "log_weight" in stats:
        return column(tree, "sample_stats", "log_weight")[0] * result.temperature
    reward = column(tree, "posterior", "reward")[0]
    weights: np.ndarray = float(result.model.discount) ** np.arange(reward.shape[1])
    return np.asarray(reward @ weights)
