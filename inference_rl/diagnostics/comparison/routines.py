"""The course of learned routines: what `infer` comes to with each from several seeds, as `Runs`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl.diagnostics.comparison.exact import Policies
from inference_rl.diagnostics.comparison.robustness import STRENGTH
from inference_rl.diagnostics.comparison.runs import (
    AUTOMATIC,
    NEAR,
    REGULAR,
    Course,
    Runs,
)
from inference_rl.diagnostics.comparison.tabular import rare
from inference_rl.diagnostics.comparison.visits import entropy, longest, mode
from inference_rl.diagnostics.guide import GuideQuality, guide_draws, judged
from inference_rl.diagnostics.samples import column, rhat
from inference_rl.environment import EnvironmentModel
from inference_rl.evaluation import evaluate
from inference_rl.inference import InferenceResult, infer, routine_class
from inference_rl.inference.learned import is_uniform
from inference_rl.learning.collection import Collector, Segment, watched
from inference_rl.policies import Policy
from inference_rl.priors import ActionPrior, MixturePrior
from inference_rl.randomness import derived, torch_seeded
from inference_rl.simulate import environments

if TYPE_CHECKING:
    import xarray

Array = np.ndarray[Any, Any]

STEPS, SEEDS = 1_500, 3
"""Of each run, and runs of each kind, unless others are asked for."""

RATES = (1 / 3, 1.0)
"""Learning rates, in units of the usual ones."""

SLIPS = (0.0, STRENGTH, 0.4)
"""Probabilities of a slip, of policies that are evaluated by episodes."""

EPISODES = 10
"""Of an evaluation."""

DRAWS = 40
"""Trajectories of each policy, to judge it as a guide by, and where it is not evaluated exactly."""

BINS = 10
"""Of each coordinate of a state, to count where a run has been."""

ACTION_BINS, ACTION_DRAWS, ACTION_STATES = 20, 200, 200
"""How finely actions of a box are told apart, and from how many draws in how many states."""

PRIOR_EPISODES = 20
"""To see how rewards and states look before anything is learned."""

SHARES = (0.005, 0.05, 0.5)
"""Temperatures unless others are asked for, in standard deviations of a step's reward."""


def small(name: str, model: EnvironmentModel, total_steps: int) -> Any:
    """A routine for a run of so few steps: small networks, few transitions to a batch.

    :raises ValueError: no learned routine has that name.
    """
    settings = routine_class(name)()
    if not hasattr(settings, "total_steps"):
        raise ValueError(
            f"routines: expected learned ones, got {name!r}, which is compared wherever the model "
            "is finite; leave it out"
        )
    is_table = isinstance(model.state_space, Discrete)
    wanted: dict[str, Any] = {
        "hidden": (64, 64),
        "batch_size": 64,
        "warmup_steps": max(64, total_steps // 10),
        "compile": "off",
        "side_by_side": False,
    }
    if is_table and hasattr(settings, "replay_capacity") and hasattr(settings, "warmup_steps"):
        wanted |= {"learning_rate": 0.01, "value_learning_rate": 0.01}
    if not is_table and hasattr(settings, "warmup_steps"):
        # An update costs what it costs whatever its batch: half of them, of twice the batch and at
        # twice the rates, learn about as much in about half the time.
        wanted |= {"environments": 4, "updates_per_step": 0.5, "batch_size": 128}
        wanted |= {"learning_rate": 6e-3, "value_learning_rate": 6e-3, "target_rate": 0.04}
        wanted |= {"warmup_steps": max(128, total_steps // 10)}
    return shortened(changed(settings, **wanted), total_steps)


def shortened(settings: Any, total_steps: int) -> Any:
    """`settings` for so many steps, without evaluations on the way."""
    return changed(
        settings,
        total_steps=total_steps,
        evaluate_every=total_steps,
        evaluation_episodes=0,
        save_every=total_steps,
    )


def changed(settings: Any, **changes: Any) -> Any:
    """`settings` with those of the changes that it has fields for."""
    fields = {field.name for field in dataclasses.fields(settings)}
    return dataclasses.replace(settings, **{k: v for k, v in changes.items() if k in fields})


def usual(model: EnvironmentModel) -> str:
    """The name of a routine that suits the actions of a model."""
    return "sac" if isinstance(model.action_space, Box) else "sql"


@dataclasses.dataclass(frozen=True)
class Scene:
    """How a model looks under its prior, before anything is learned.

    :ivar spread: standard deviation of a step's reward, reward units. :ivar returns: one an
        episode. :ivar worth: a reward worth finding; inf for an end. :ivar words: the same.
    :ivar low, high: of each coordinate of the states, (d,); None of discrete ones.
    """

    spread: float
    returns: Array
    worth: float
    words: str
    low: Array | None
    high: Array | None

    @property
    def places(self) -> str:
        return "states covered" if self.low is None else "cells of states covered"

    def cells(self, states: Tensor) -> list[tuple[int, ...]]:
        """In which cell of a grid of `BINS` a side each of the states (n, ...) is."""
        if self.low is None:
            return [(int(state),) for state in states]
        width = np.where(self.high > self.low, self.high - self.low, 1.0)
        share = (states.double().numpy().reshape(len(states), -1) - self.low) / width
        return list(map(tuple, np.clip(np.floor(share * BINS), -1, BINS).astype(int).tolist()))


def scene(model: EnvironmentModel, prior: ActionPrior, seed: int) -> Scene:
    batch = environments(model, PRIOR_EPISODES, longest(model))
    with contextlib.closing(Collector(batch, derived(seed, "prior"))) as collector:
        data = collector.collect_episodes(lambda state, t: prior(state))  # type: ignore[arg-type]
    rewards = data.reward[data.valid].numpy()
    worth, words = rare(rewards, np.ones(len(rewards)))
    low = high = None
    if not isinstance(model.state_space, Discrete):
        states = data.state[data.valid].double().numpy().reshape(len(rewards), -1)
        low, high = states.min(0), states.max(0)
    return Scene(
        spread=float(rewards.std()) or 1.0,
        returns=np.array([episode.total for episode in collector.finished]),
        worth=worth,
        words=words,
        low=low,
        high=high,
    )


class Witness:
    """Counts what a run sees, as it is collected."""

    def __init__(self, scene: Scene, steps: int) -> None:
        self.scene, self.budget, self.steps, self.found = scene, steps, 0, steps
        self.cells: set[tuple[int, ...]] = set()

    def __call__(self, data: Segment) -> None:
        left = self.budget - self.steps
        if left <= 0:  # what follows the run is its evaluation
            return
        valid = data.valid
        states, following = data.state[valid][:left], data.next_state[valid][:left]
        for seen in (states, following):
            self.cells.update(self.scene.cells(seen))
        reward = data.reward[valid][:left].numpy()
        ended = data.terminated[valid][:left].numpy()
        hit = np.flatnonzero(ended if self.scene.worth == np.inf else reward >= self.scene.worth)
        if hit.size and self.found == self.budget:
            self.found = self.steps + int(hit[0]) + 1
        self.steps += len(reward)


class Slipping:
    """A policy whose actions are those of the prior with some probability."""

    def __init__(self, policy: Policy, prior: ActionPrior, delta: float) -> None:
        self.policy, self.prior, self.delta = policy, prior, delta

    def __call__(self, state: Tensor, t: Any = None) -> TorchDistribution:
        parts: list[ActionPrior] = [lambda given: self.policy(given, t), self.prior]
        return MixturePrior(parts, [1 - self.delta, self.delta])(state)


def course(
    model: EnvironmentModel,
    settings: Any,
    prior: ActionPrior,
    scene: Scene,
    *,
    temperatures: Sequence[float],
    reference: float,
    known: Policies | None,
    seeds: int,
    seed: int,
    suffix: str,
    progress: Callable[[str], None] | None,
) -> Course:
    """Run them all: every kind at the usual rate, regular and reference at the others.

    :param settings: of the routine; its temperature and its rates are replaced.
    :param known: the exact policies, to evaluate exactly where there are any.
    """
    bare = regular_temperature(settings, model, reference)
    baseline = REGULAR if bare == 0 else f"{REGULAR}, nearly (α = {bare:.2g})"
    plan: list[tuple[str, float | None, float]] = [(baseline, bare, 1.0)]
    plan += [(f"soft, α = {t:g}", t, 1.0) for t in temperatures]
    if tunes(settings) and is_uniform(model, prior):
        plan.append((AUTOMATIC, None, 1.0))
    chosen = f"soft, α = {reference:g}"
    for rate in RATES:
        if rate != 1.0:
            plan += [(baseline, bare, rate), (chosen, reference, rate)]
    runs = []
    for number, (name, temperature, rate) in enumerate(plan):
        found = []
        for which in range(seeds):
            said = f"{settings.name}, {name}, rate {rate:.2g}, seed {which + 1} of {seeds}"
            at = f"run {number * seeds + which + 1} of {len(plan) * seeds}: {said}"
            if progress is not None:
                progress(at)
            own = _settings(settings, temperature, rate, reference)
            # Of its own: intervals are those of independent samples.
            run_seed = derived(seed, f"{settings.name} {name} {rate:g} {which}") % 2**31
            found.append(_one(model, own, prior, scene, known, run_seed, rate == 1.0))
        columns = [np.array(values) for values in zip(*(run.row for run in found), strict=True)]
        chains = [run.returns for run in found if run.returns is not None]
        guides = tuple(run.guide for run in found if run.guide is not None)
        mixed = rhat(np.stack(chains)) if chains else None
        kind = _kind(temperature, bare)
        runs.append(Runs(name, kind, rate, *columns, guides=guides, rhat=mixed))
    best = max(float(run.greedy.max()) for run in runs)
    span = best - float(scene.returns.mean())
    if known is not None:
        best, random = known.dynamics.returns(np.stack([known.regular, known.prior])).tolist()
        span = min(best - random, abs(best) or math.inf)
    return Course(
        runs=runs,
        baseline=baseline,
        reference=chosen,
        usual=1.0,
        best=best,
        near_by=NEAR * max(span, 0.0),
        steps=settings.total_steps,
        worth=scene.words,
        places=scene.places,
        by=f"{settings.name}",
        suffix=suffix,
    )


def _kind(temperature: float | None, bare: float) -> float | None:
    return 0.0 if temperature == bare else temperature


def regular_temperature(settings: Any, model: EnvironmentModel, reference: float) -> float:
    """0, or the least that makes sense where a routine needs one above."""
    needs_one = settings.name == "pcl" and settings.kind != "trust"
    needs_one |= settings.name == "sql" and isinstance(model.action_space, Box)
    return reference / 1000 if needs_one else 0.0


def tunes(settings: Any) -> bool:
    """Whether a routine can tune its temperature."""
    return hasattr(settings, "temperature_learning_rate")


def _settings(settings: Any, temperature: float | None, rate: float, reference: float) -> Any:
    changes: dict[str, Any] = {
        name: getattr(settings, name) * rate
        for name in ("learning_rate", "value_learning_rate")
        if hasattr(settings, name)
    }
    changes |= {"temperature": temperature, "final_temperature": None}
    changes |= {"target_entropy": None, "target_divergence": None}
    if temperature is None:
        faster = max(settings.temperature_learning_rate, 3e-3)
        changes |= {"temperature": "auto", "initial_temperature": reference}
        changes |= {"temperature_learning_rate": faster}
    return changed(settings, **changes)


class _Run(NamedTuple):
    """What came of a run.

    :ivar row: as `Runs` has it. :ivar guide: what its policy is as a guide, if it was judged.
    :ivar returns: of the episodes that it was judged by, (DRAWS,).
    """

    row: tuple[Any, ...]
    guide: GuideQuality | None
    returns: Array | None


def _one(
    model: EnvironmentModel,
    settings: Any,
    prior: ActionPrior,
    scene: Scene,
    known: Policies | None,
    seed: int,
    usual: bool,
) -> _Run:
    """Run and evaluate it; at the usual rate also under slips, and as a guide."""
    witness = Witness(scene, settings.total_steps)
    with warnings.catch_warnings(), watched(witness):
        warnings.simplefilter("ignore")
        result = infer(model, settings, prior=prior, seed=seed)
    seen = (len(witness.cells), witness.found)
    if known is not None:
        table = policy_table(result, known)
        exact = known.dynamics.returns(np.stack([table, mode(table)]))
        entropy = known.dynamics.mean_entropies(table[None])[0]
        row = (*seen, *exact, entropy, result.temperature)
        if not usual:
            return _Run(row, None, None)
        # The same as tables, which are drawn from and solved in less time.
        result = dataclasses.replace(result, source=known.model)
        return _Run(row, *_judged(result, _drawn(result, None)))
    cut = longest(model)
    tree = _drawn(result, cut)
    drawn = float(column(tree, "sample_stats", "return").mean())
    likeliest = result.evaluate(EPISODES, deterministic=True, max_steps=cut).mean_return
    row = (*seen, drawn, likeliest, _entropy_along(tree, result), result.temperature)
    if not usual:
        return _Run((*row, [np.nan] * len(SLIPS)), None, None)
    slipped = [drawn, *(_slipped(model, result, prior, delta) for delta in SLIPS[1:])]
    return _Run((*row, slipped), *_judged(result, tree))


def _drawn(result: InferenceResult, steps: int | None) -> xarray.DataTree:
    return guide_draws(result, DRAWS, steps, derived(result.seed, "evaluation"))


def _judged(
    result: InferenceResult, tree: xarray.DataTree
) -> tuple[GuideQuality | None, Array | None]:
    """What a policy is as a guide, which at temperature 0 it is not; returns of its episodes."""
    guide = judged(result, tree) if result.temperature > 0 else None
    return guide, column(tree, "sample_stats", "return")[0]


def _entropy_along(tree: xarray.DataTree, result: InferenceResult) -> float:
    """The mean entropy of the actions along trajectories, nats."""
    alive = column(tree, "posterior", "alive")[0]
    draws, steps = np.nonzero(alive)
    some = np.linspace(0, len(steps) - 1, min(ACTION_STATES, len(steps))).astype(int)
    draws, steps = draws[some], steps[some]
    states = torch.from_numpy(column(tree, "posterior", "state")[0][draws, steps])
    with torch.no_grad():
        distribution = result.policy(states, torch.from_numpy(steps))
    return float(action_entropies(distribution, derived(result.seed, "entropy")).mean())


def action_entropies(distribution: Any, seed: int) -> Array:
    """Of every state's actions, nats; of boxes rounded to `ACTION_BINS` a coordinate.

    A density is no measure for policies at temperature 0, which have hardly any width: its entropy
    falls without end, and near the edges of the box float32 cannot tell it. What is rounded is at
    least at zero. Coordinates count each for itself, and draws are `ACTION_DRAWS`.
    """
    if distribution.support.is_discrete:
        return np.asarray(distribution.entropy().double().numpy())
    with torch_seeded(seed), torch.no_grad():
        actions = distribution.sample((ACTION_DRAWS,)).double().numpy()
    bins = np.clip(np.floor((actions + 1) / 2 * ACTION_BINS), 0, ACTION_BINS - 1)
    shares = (bins[..., None] == np.arange(ACTION_BINS)).mean(0)
    return entropy(shares).sum(-1)


def _slipped(
    model: EnvironmentModel, result: InferenceResult, prior: ActionPrior, delta: float
) -> float:
    policy: Any = Slipping(result.policy, prior, delta)
    seed = derived(result.seed, "evaluation")
    return evaluate(
        model, policy, episodes=EPISODES, seed=seed, max_steps=longest(model)
    ).mean_return


def policy_table(result: InferenceResult, known: Policies) -> Array:
    """The policy of a result on a finite model, (S, A) or (T, S, A)."""
    states = torch.arange(known.model.num_states)
    with torch.no_grad():
        if known.model.horizon is None:
            return _probs(result.policy(states), known)
        return np.stack(
            [_probs(result.policy(states, t), known) for t in range(known.model.horizon)]
        )


def _probs(distribution: Any, known: Policies) -> Array:
    probs = distribution.probs.double()
    table: Array = (probs / probs.sum(-1, keepdim=True)).numpy()
    return np.broadcast_to(table, known.dynamics.reward.shape)
