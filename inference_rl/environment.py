"""What a user writes to define an environment: `EnvironmentModel`.

A model is three conditional distributions and two functions: where an episode starts, how the state
moves, what a step pays, where it ends, and (optionally) how likely each action is before any reward
is known. Inference lives elsewhere.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from gymnasium.spaces import Discrete, Space
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl.distributions import SparseCategorical, as_discrete, as_probs
from inference_rl.priors import UniformPrior

RAISED = (Exception, SystemExit)
"""What the code of others may raise, and is blamed for: none of it may end this process, least of
all with the exit code of success."""

MOST_LABELS = 10_000
"""States beyond this many are called by number once they remember an action."""


class EnvironmentModel(abc.ABC):
    """A Markov decision process as a probabilistic program.

    Subclasses set `state_space` and `action_space` (`gymnasium.spaces.Discrete` or `Box`), and
    write `initial_state`, `transition` and `reward`. Every method takes and returns tensors with
    one common batch shape, whatever it is: integers for `Discrete`, batch + (d,) for `Box`, whose
    distributions have `event_dim` 1. Continuous actions live in [-1, 1]^d.

    :ivar discount: in [0, 1]; γ^t weighs step t. 1 needs a horizon, or terminal states that every
        state can reach.
    :ivar horizon: number of steps of an episode, or None for no limit.
    :ivar gymnasium_id, gymnasium_kwargs: the Gymnasium environment that a policy is evaluated on,
        if the model describes one.
    :ivar name: what to call the model, its class unless set.
    :ivar remembers_action: whether its states are those of `WithPreviousAction`.
    :ivar origin: the arguments with which `load_target` found the model, if it did.
    :ivar layout: how to draw the states, if they lie on a grid.
    :ivar state_labels, action_labels: what to call them in tables and pictures, if not by number.
    """

    state_space: Space[Any]
    action_space: Space[Any]
    discount: float = 1.0
    horizon: int | None = None
    gymnasium_id: str | None = None
    gymnasium_kwargs: dict[str, Any] = {}  # noqa: RUF012 (a default that is never mutated)
    name: str = ""
    remembers_action: bool = False
    origin: dict[str, Any] | None = None
    layout: GridLayout | None = None
    state_labels: Sequence[str] | None = None
    action_labels: Sequence[str] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    @abc.abstractmethod
    def initial_state(self) -> TorchDistribution:
        """p(s_0), with an empty batch shape."""

    @abc.abstractmethod
    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        """p(s' | s, a), of the batch shape of `state` and `action`."""

    @abc.abstractmethod
    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        """r(s, a, s'), of the batch shape of its arguments."""

    def terminal(self, state: Tensor) -> Tensor:
        """Whether the episode has ended in `state`: nothing happens, and nothing is paid, after it.

        :returns: booleans of the batch shape of `state`. By default no state ends an episode.
        """
        shape = state.shape[: state.dim() - len(self.state_space.shape or ())]
        return torch.zeros(shape, dtype=torch.bool)

    def action_prior(self, state: Tensor) -> TorchDistribution:
        """ρ(a | s), the action prior: uniform over the action space unless overridden."""
        return UniformPrior(self.action_space)(state)

    def observe(self, observation: Tensor, previous_action: Tensor | None) -> Tensor:
        """The model's state, given what a real environment shows and the action that led there.

        :param previous_action: None at the start of an episode.
        """
        return observation

    @property
    def can_end(self) -> bool:
        """Whether the model says anything about terminal states."""
        return type(self).terminal is not EnvironmentModel.terminal


@dataclasses.dataclass(frozen=True)
class GridLayout:
    """States that lie on a grid, row by row from the top left, and where each action points.

    :param rows, columns: state s lies in row s // columns, column s % columns.
    :param moves: for each action its (row, column) displacement, or None if it does not move.
    :param cells: one character a state: S start, G goal, H hole, C cliff, # wall, other: free.
    """

    rows: int
    columns: int
    moves: tuple[tuple[int, int] | None, ...]
    cells: str


class WithPreviousAction(EnvironmentModel):
    """A model of discrete states and actions whose state remembers the previous action.

    State s after action a is s·(|A|+1) + a; before the first action, s·(|A|+1) + |A|.
    """

    remembers_action = True

    def __init__(self, model: EnvironmentModel) -> None:
        if not (
            isinstance(model.state_space, Discrete) and isinstance(model.action_space, Discrete)
        ):
            raise TypeError(
                "a prior over the previous action needs Discrete states and actions, got "
                f"{model.state_space} and {model.action_space}"
            )
        self.model = model
        self.states, self.actions = int(model.state_space.n), int(model.action_space.n)
        self.width = self.actions + 1
        self.state_space = Discrete(self.states * self.width)
        self.action_space = model.action_space
        self.discount, self.horizon = model.discount, model.horizon
        self.gymnasium_id, self.gymnasium_kwargs = model.gymnasium_id, model.gymnasium_kwargs
        self.name, self.origin = model.name, model.origin
        self.action_labels = model.action_labels
        if self.states * self.width <= MOST_LABELS:
            self.state_labels = self._labels()

    def _labels(self) -> tuple[str, ...]:
        states, actions = self.model.state_labels, self.model.action_labels
        layout = self.model.layout
        if states is None and layout is not None:
            states = [str(divmod(s, layout.columns)) for s in range(self.states)]
        before = states or [f"state {s}" for s in range(self.states)]
        after = [f"after {a}" for a in actions or range(self.actions)] + ["at the start"]
        return tuple(f"{state}, {action}" for state in before for action in after)

    def initial_state(self) -> TorchDistribution:
        probs = as_probs(self.model.initial_state(), self.states)
        return SparseCategorical(torch.arange(self.states) * self.width + self.actions, probs)

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        step = as_discrete(self.model.transition(state // self.width, action), self.states)
        if isinstance(step, SparseCategorical):
            states, probs = step.states, step.probs
        else:
            probs = step.probs
            states = torch.arange(probs.shape[-1]).expand(probs.shape)
        return SparseCategorical(states * self.width + action.unsqueeze(-1), probs)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return self.model.reward(state // self.width, action, next_state // self.width)

    def terminal(self, state: Tensor) -> Tensor:
        return self.model.terminal(state // self.width)

    def action_prior(self, state: Tensor) -> TorchDistribution:
        return self.model.action_prior(state // self.width)

    def observe(self, observation: Tensor, previous_action: Tensor | None) -> Tensor:
        previous = self.actions if previous_action is None else previous_action
        return self.model.observe(observation, previous_action) * self.width + previous

    @property
    def can_end(self) -> bool:
        return self.model.can_end
