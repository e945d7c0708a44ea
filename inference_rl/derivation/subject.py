"""What a derivation is about: a model, in the forms in which steps look at it; `Subject`.

A finite model is looked at in two forms. The *whole* has no horizon: where the model has one, the
step is part of the state. The *excerpt* is a few steps from a few states, with all that can be
reached from there, so that every single trajectory can be listed; a discount is the probability of
surviving a step in it, which makes a trajectory's chance a chance.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from inference_rl.derivation import sampled
from inference_rl.derivation.independent import (
    Array,
    Paths,
    Tables,
    best_value,
    every_path,
    soft_policy,
)
from inference_rl.environment import EnvironmentModel, WithPreviousAction
from inference_rl.finite import FiniteModel
from inference_rl.finite_messages import Messages, control_messages
from inference_rl.linear_gaussian import LinearGaussianModel
from inference_rl.priors import ActionPrior
from inference_rl.randomness import derived
from inference_rl.simulate import GymnasiumModel
from inference_rl.tabulation import tabulate

MOST_STATES = 5_000
"""Of the whole: the other side of a step solves linear systems of that size."""

MOST_PATHS = 60_000
"""Trajectories of the excerpt."""

LISTED_STATES = 300
"""Of the excerpt: Pyro enumerates pairs of them."""

STARTS = 6
"""States from which the excerpt starts, where it is not a whole episode."""

STEPS = 3
"""Of the excerpt, unless there are too many trajectories."""


class Subject:
    """A model at a temperature, and what several steps need of it.

    :param temperature: > 0, reward units. :param prior: in place of the model's own.
    :param seed: of everything random.
    :ivar finite: the model as tables, or None. :ivar linear: as linear-Gaussian, or None.
    """

    def __init__(
        self,
        model: EnvironmentModel,
        temperature: float,
        *,
        prior: ActionPrior | None = None,
        seed: int = 0,
    ) -> None:
        if getattr(prior, "needs_previous_action", False) and not model.remembers_action:
            model = WithPreviousAction(model)
        self.model, self.temperature, self.seed = model, temperature, seed
        self.prior: ActionPrior = model.action_prior if prior is None else prior
        self.linear = model if isinstance(model, LinearGaussianModel) else None
        self.simulated = isinstance(model, GymnasiumModel)
        self._solved: dict[float, Messages] = {}
        self._iterated: dict[float, Array] = {}
        self._drawn: dict[str, sampled.Rollouts] = {}
        self.finite: FiniteModel | None = None
        discrete = isinstance(model.state_space, Discrete) and isinstance(
            model.action_space, Discrete
        )
        if discrete and not self.simulated:
            self.finite = tabulate(model, prior=prior)

    # ---- the whole -------------------------------------------------------------------------------

    @functools.cached_property
    def whole(self) -> FiniteModel:
        """The finite model without a horizon: itself, or its last steps as states of their own."""
        assert self.finite is not None
        if self.finite.horizon is None:
            return self.finite
        return unrolled(self.finite.replace(horizon=self.whole_steps))

    @property
    def whole_steps(self) -> int:
        """How many of the last steps of an episode `whole` has; 0 without a horizon."""
        assert self.finite is not None
        if self.finite.horizon is None:
            return 0
        return max(1, min(self.finite.horizon, MOST_STATES // self.finite.num_states - 1))

    @functools.cached_property
    def anywhere(self) -> FiniteModel:
        """The whole, started in any state that acts, so that no state is out of sight."""
        live = ~self.whole.is_terminal
        return self.whole.replace(initial=live.double() / live.sum())

    @property
    def whole_states(self) -> int:
        """How many states `whole` has."""
        assert self.finite is not None
        return self.finite.num_states * (1 + self.whole_steps)

    @functools.cached_property
    def tables(self) -> Tables:
        return Tables.of(self.whole)

    @property
    def control(self) -> Messages:
        """The library's soft messages of the whole, reward units."""
        return self.control_at(self.temperature)

    def control_at(self, temperature: float) -> Messages:
        """The same at another temperature."""
        if temperature not in self._solved:
            self._solved[temperature] = control_messages(self.whole, temperature)
        return self._solved[temperature]

    @property
    def best_value(self) -> Array:
        """V* of the whole by soft policy iteration, (S,), which is not the library's way."""
        return self.best_value_at(self.temperature)

    def best_value_at(self, temperature: float) -> Array:
        """The same at another temperature; 0 is regular RL."""
        if temperature not in self._iterated:
            self._iterated[temperature] = best_value(self.tables, temperature)
        return self._iterated[temperature]

    @functools.cached_property
    def policy(self) -> Array:
        """Some policy, (S, A): not the best one, of full support on what is allowed, and none that
        takes for ever to end an episode."""
        advantage = np.where(
            self.tables.prior > 0, (self.control.q - self.control.v.unsqueeze(-1)).numpy(), 0.0
        )
        spread = float(np.abs(advantage[self.tables.live]).mean()) if self.tables.live.any() else 0
        noise = self.generator("policy").normal(size=advantage.shape)
        width = max(self.temperature, spread)
        return soft_policy(advantage / width + noise / 2, self.tables.prior, 1.0)

    @functools.cached_property
    def other_value(self) -> Array:
        """Some value, (S,), that solves no equation; reward units, zero at ends."""
        noise = self.generator("value").normal(size=self.tables.live.shape)
        known = self.control.v.numpy()
        scale = max(self.temperature, float(known.std()))
        return np.where(self.tables.live, known + scale * noise, 0.0)

    def size(self, unit: str) -> float:
        """What is at stake, in a unit: rounding errors are relative to it."""
        if unit == "":
            return 1.0
        return self._stake / (self.temperature if unit == "nats" else 1.0)

    @functools.cached_property
    def _stake(self) -> float:
        if self.finite is None:
            return self.temperature
        paid = float(self.finite.rewards.abs().max()) if len(self.finite.rewards) else 0.0
        if self.whole_states > MOST_STATES:
            return max(self.temperature, paid)
        worth = [self.control.v.numpy(), self.tables.value(self.policy, self.temperature)]
        return max(self.temperature, paid, *(float(np.abs(value).max()) for value in worth))

    # ---- the excerpt -----------------------------------------------------------------------------

    @functools.cached_property
    def excerpt(self) -> FiniteModel:
        """A few steps of the finite model, without a discount: a step is survived by chance."""
        return self.discounted_excerpt.with_survival() if self._dies else self.discounted_excerpt

    @property
    def _dies(self) -> bool:
        assert self.finite is not None
        return self.finite.discount < 1

    @functools.cached_property
    def discounted_excerpt(self) -> FiniteModel:
        """The same few steps, with the model's discount."""
        assert self._excerpt is not None
        return self._excerpt

    @property
    def has_excerpt(self) -> bool:
        """Whether the trajectories of a few steps are few enough to be listed."""
        return self._excerpt is not None

    @functools.cached_property
    def _excerpt(self) -> FiniteModel | None:
        assert self.finite is not None
        return excerpt(self.finite)

    @functools.cached_property
    def paths(self) -> Paths:
        """Every trajectory of the excerpt."""
        return every_path(self.excerpt)

    @functools.cached_property
    def discounted_paths(self) -> Paths:
        """Every trajectory of the discounted excerpt."""
        return every_path(self.discounted_excerpt)

    def some_policy(self, model: FiniteModel, name: str = "policy") -> Array:
        """Some policy (S, A) for a part of the model, of full support on what is allowed."""
        noise = self.generator(name).normal(size=tuple(model.log_prior.shape))
        return soft_policy(noise, model.log_prior.exp().numpy(), 1.0)

    def notes(self) -> tuple[str, ...]:
        """What of the model the steps look at, in sentences."""
        if self.finite is None:
            return (
                f"Trajectories are drawn: {sampled.paths(self):,} at a time, of "
                f"{sampled.steps(self)} steps, all from one start.",
            )
        said = []
        if self.has_excerpt:
            part = self.discounted_excerpt
            starts = int((part.initial > 0).sum())
            said.append(
                f"Single trajectories are listed over {part.horizon} "
                f"step{'s' * (part.horizon != 1)} from {starts} state{'s' * (starts != 1)}: "
                f"{self.paths.states.shape[1]:,} of them."
            )
            if self._dies:
                said.append(
                    "Where a trajectory has a probability, its discount is the chance of surviving "
                    "a step."
                )
        if self.finite.horizon is not None and self.whole_steps < self.finite.horizon:
            said.append(f"Of {self.finite.horizon} steps the last {self.whole_steps} are solved.")
        return tuple(said)

    # ---- what can only be drawn ------------------------------------------------------------------

    def rollouts(self, name: str) -> sampled.Rollouts:
        """Trajectories that the program draws under a policy not far from the prior."""
        if name not in self._drawn:
            policy = sampled.SomePolicy(self, name, sampled.GENTLE)
            self._drawn[name] = sampled.draw(self, policy, name)
        return self._drawn[name]

    # ---- both ------------------------------------------------------------------------------------

    def generator(self, name: str) -> np.random.Generator:
        """Random numbers of their own for every name."""
        return np.random.default_rng(derived(self.seed, name))

    def label(self, axis: str, index: int) -> str:
        """What to call a state of the whole, or an action."""
        assert self.finite is not None
        if axis == "action":
            return action_name(self.finite, index)
        step, state = divmod(index, self.finite.num_states)
        at = ""
        if self.finite.horizon is not None:
            at = f"step {step + self.finite.horizon - self.whole_steps}, "
        return at + state_name(self.finite, state)


def unrolled(model: FiniteModel) -> FiniteModel:
    """A model with a horizon T as one without: state t·S + s is s at step t, and step T the end."""
    steps, states = int(model.horizon or 0), model.num_states
    width, zeros = int(model.pointers[-1]), torch.zeros_like
    ends = torch.ones(states, dtype=torch.bool)
    shift = torch.arange(steps).repeat_interleave(width) + 1
    last = model.pointers[-1] * steps
    return FiniteModel(
        pointers=torch.cat(
            [
                *(model.pointers[:-1] + t * width for t in range(steps)),
                last.expand(model.log_prior.numel() + 1),
            ]
        ),
        successors=model.successors.long().repeat(steps) + shift * states,
        probabilities=model.probabilities.repeat(steps),
        rewards=model.rewards.repeat(steps),
        initial=torch.cat([model.initial, *[zeros(model.initial)] * steps]),
        log_prior=model.log_prior.repeat(steps + 1, 1),
        terminal=torch.cat([model.is_terminal.repeat(steps), ends]),
        discount=model.discount,
        horizon=None,
    )


def excerpt(model: FiniteModel) -> FiniteModel | None:
    """Few steps from a few states of a finite model, and what can be reached from there.

    A whole episode from its own start, if there is something to choose in it and it is small;
    otherwise at most `STEPS` steps from `STARTS` states, equally likely: those with a choice, and
    where what a step pays varies most. None where one step from one state has too many outcomes,
    or every state ends the episode.
    """

    def small(part: FiniteModel) -> bool:
        if part.num_states > LISTED_STATES:
            return False
        return _count(part, survives=2 if model.discount < 1 else 1) <= MOST_PATHS

    if model.horizon is not None:
        whole = _part(model, model.initial, model.horizon)
        if small(whole) and choices(whole).any():
            return whole
    live = (~model.is_terminal).nonzero().squeeze(-1)
    if len(live) == 0:
        return None
    order = live[_variety(model)[live].argsort(descending=True, stable=True)]
    order = torch.cat([order[choices(model)[order]], order[~choices(model)[order]]])
    for steps in range(min(STEPS, model.horizon or STEPS), 0, -1):
        for starts in (STARTS, 3, 1):
            first = torch.zeros(model.num_states, dtype=torch.float64)
            first[order[:starts]] = 1 / min(starts, len(order))
            part = _part(model, first, steps)
            if small(part):
                return part
    return None


def choices(model: FiniteModel) -> Tensor:
    """In which states (S,) there is more than one action to choose from."""
    return ((model.log_prior > -torch.inf).sum(-1) > 1) & ~model.is_terminal


def _variety(model: FiniteModel) -> Tensor:
    """How much what a step pays varies in each state, (S,), over actions and outcomes."""
    paid = torch.where(model.probabilities > 0, model.rewards, torch.nan)
    allowed = (model.log_prior > -torch.inf).flatten()[model.rows()]
    state = model.rows() // model.num_actions
    kept = allowed & ~paid.isnan()
    high = torch.full((model.num_states,), -torch.inf, dtype=torch.float64)
    high = high.scatter_reduce(0, state[kept], paid[kept], "amax")
    low = torch.full((model.num_states,), torch.inf, dtype=torch.float64)
    low = low.scatter_reduce(0, state[kept], paid[kept], "amin")
    return torch.where(high > -torch.inf, high - low, 0.0)


def _part(model: FiniteModel, first: Tensor, steps: int) -> FiniteModel:
    """`steps` steps from where `first` (S,) has mass, on the states that they reach."""
    reached = (first > 0).numpy()
    inner = np.zeros_like(reached)
    rows, successors = model.rows().numpy(), model.successors.numpy()
    source = rows // model.num_actions
    allowed = (model.log_prior > -torch.inf).flatten().numpy()[rows]
    possible = allowed & (model.probabilities > 0).numpy()
    for _ in range(steps):
        inner = reached.copy()
        reached[successors[possible & inner[source]]] = True
    # What is reached by the last step only is where nobody acts any more.
    kept = np.flatnonzero(reached)
    place = np.full(model.num_states, -1)
    place[kept] = np.arange(len(kept))
    ends = torch.from_numpy(~inner[kept]) | model.is_terminal[kept]
    entry = possible & inner[source] & ~model.is_terminal.numpy()[source]
    row = place[source[entry]] * model.num_actions + rows[entry] % model.num_actions
    # A row that is forbidden has no entries, and a model needs some: it stays, and pays nothing.
    table = row, place[successors[entry]], model.probabilities.numpy()[entry]
    empty = np.setdiff1d(
        np.arange(len(kept) * model.num_actions)[~ends.numpy().repeat(model.num_actions)], row
    )
    row = np.concatenate([table[0], empty])
    column = np.concatenate([table[1], empty // model.num_actions])
    chance = np.concatenate([table[2], np.ones(len(empty))])
    paid = np.concatenate([model.rewards.numpy()[entry], np.zeros(len(empty))])
    order = np.argsort(row, kind="stable")
    count = np.bincount(row, minlength=len(kept) * model.num_actions)
    part = FiniteModel(
        pointers=torch.from_numpy(np.concatenate([[0], np.cumsum(count)])),
        successors=torch.from_numpy(column[order]),
        probabilities=torch.from_numpy(chance[order]),
        rewards=torch.from_numpy(paid[order]),
        initial=first[kept],
        log_prior=model.log_prior[kept],
        terminal=ends,
        discount=float(model.discount),
        horizon=steps,
    )
    part.state_labels = [state_name(model, int(state)) for state in kept]
    part.action_labels = model.action_labels
    return part


def state_name(model: FiniteModel, state: int) -> str:
    """What to call a state: its label, its place on the grid, or its number."""
    if model.state_labels is not None:
        return f"state {model.state_labels[state]}"
    if model.layout is not None:
        return f"state {divmod(state, model.layout.columns)}"
    return f"state {state}"


def action_name(model: FiniteModel, action: int) -> str:
    """What to call an action: its label or its number."""
    return f"action {action if model.action_labels is None else model.action_labels[action]}"


def _count(model: FiniteModel, survives: int) -> float:
    """How many trajectories there are, if every step is survived (1) or may not be (2)."""
    possible = (model.log_prior > -torch.inf).flatten()[model.rows()] & (model.probabilities > 0)
    source = model.rows()[possible] // model.num_actions
    target = model.successors.long()[possible]
    ways = torch.ones(model.num_states, dtype=torch.float64)
    for _ in range(model.horizon or 0):
        onward = ways[target] + (survives - 1)
        ways = torch.where(
            model.is_terminal,
            1.0,
            torch.zeros_like(ways).scatter_add(0, source, onward),
        )
    return float(ways[model.initial > 0].sum())
