"""A batch of episodes that are stepped together: the interface, and what its kinds share.

`Environments` has `size` slots, each at its own episode and its own step.
"""

from __future__ import annotations

import abc
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Discrete, Space
from torch import Tensor

from inference_rl.environment import RAISED


class EnvironmentFault(RuntimeError):
    """An environment failed, or gave what it must not: which one, in which episode and step."""


def close(environment: Any, name: str) -> None:
    """Close an environment of Gymnasium. What it did is not lost if it fails in that.

    :warns UserWarning: it does.
    """
    try:
        environment.close()
    except RAISED as error:
        warnings.warn(
            f"{name}: close raised {type(error).__name__}: {error}; what it holds may be left over",
            stacklevel=3,
        )


@dataclasses.dataclass(frozen=True)
class Step:
    """What came of a step, of the slots that were stepped, in their order.

    :ivar next_state: what the step led to, (n, ...): never the state after a reset.
    :ivar reward: (n,) float64, reward units.
    :ivar terminated: (n,) bool: nothing follows, and the message of `next_state` is zero.
    :ivar truncated: (n,) bool: the episode was left there, and its message stands for the rest.
        Never both.
    """

    next_state: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor


@dataclasses.dataclass(frozen=True)
class Share:
    """Slots first, first + 1, ..., first + size - 1 of a batch of `of` that is divided."""

    first: int
    size: int
    of: int

    @property
    def slots(self) -> slice:
        return slice(self.first, self.first + self.size)


class Environments(abc.ABC):
    """`size` slots, each at its own episode. A slot starts ended, and is started by `reset`.

    :ivar state_space, action_space: as the model's: states come after `model.observe`, and the
        actions of boxes lie in [-1, 1]^d.
    :ivar alive: (size,) bool: the slots whose episode goes on. One may end where it starts.
    """

    size: int
    state_space: Space[Any]
    action_space: Space[Any]
    alive: np.ndarray

    @abc.abstractmethod
    def reset(self, slots: np.ndarray, seeds: np.ndarray) -> Tensor:
        """Start an episode in each of `slots`, whatever it was doing.

        :param slots: (n,) distinct integers, at least one.
        :param seeds: (n,) uint64, of the episodes.
        :returns: their states, (n, ...).
        :raises EnvironmentFault: an environment failed.
        """

    @abc.abstractmethod
    def step(self, slots: np.ndarray, actions: Tensor) -> Step:
        """Take a step in each of `slots`.

        :param slots: (n,) distinct integers, at least one. :param actions: (n, ...).
        :raises ValueError: a slot whose episode has ended, or actions of another shape.
        :raises EnvironmentFault: an environment failed.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Release what the environments hold."""


class Slots:
    """Which episode each slot is at, and how far.

    :param name: of the environment, for messages. :param limit: steps after which an episode is
        cut. :param horizon: steps after which it has ended, because the problem has.
    :param first: the number of the first slot, for messages.
    """

    def __init__(
        self,
        name: str,
        size: int,
        limit: int | None = None,
        horizon: int | None = None,
        first: int = 0,
    ) -> None:
        if size < 1:
            raise ValueError(f"size: expected at least one slot, got {size}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit: expected at least one step, got {limit}")
        self.name, self.size, self.limit, self.horizon = name, size, limit, horizon
        self.first = first
        self.alive = np.zeros(size, dtype=bool)
        self.seeds = np.zeros(size, dtype=np.uint64)
        self.steps = np.zeros(size, dtype=np.int64)

    def start(self, slots: np.ndarray, seeds: np.ndarray) -> None:
        if len(slots) != len(seeds):
            raise ValueError(
                f"{self.name}: expected one episode seed for each of {len(slots)} slots, got "
                f"{len(seeds)}"
            )
        self.alive[slots], self.seeds[slots], self.steps[slots] = True, seeds, 0

    def check(self, slots: np.ndarray, actions: Tensor, space: Space[Any]) -> None:
        """Refuse to step a slot that has ended, or with actions that `space` does not have."""
        if not (alive := self.alive[slots]).all():
            slot = self.first + int(np.asarray(slots)[~alive][0])
            raise ValueError(
                f"{self.name}: expected slots whose episodes go on, but that of slot {slot} has "
                "ended or never began; reset the slot first"
            )
        expected = (len(slots), *(space.shape or ()))
        if actions.shape != expected:
            raise ValueError(
                f"{self.name}: expected actions of shape {expected}, one for each slot, got "
                f"{tuple(actions.shape)}"
            )
        if actions.is_floating_point():
            self.check_finite(slots, "action", actions)
        highest = space.n if isinstance(space, Discrete) else getattr(space, "nvec", None)
        if highest is not None:
            given = actions.numpy()
            outside = (given < 0) | (given >= highest)
            if outside.any():
                row = int(np.flatnonzero(outside.reshape(len(slots), -1).any(1))[0])
                raise self.fault(
                    slots[row],
                    f"action: expected one of {space}, got {actions[row].tolist()}; see to what "
                    "the policy gives",
                )

    def advance(
        self, slots: np.ndarray, terminated: np.ndarray, truncated: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Count the step, and which episodes it ended: (terminated, truncated).

        The horizon of a model is the end of its problem: nothing is paid after it, so that its
        message is zero, and the episode has terminated.
        """
        steps = self.steps[slots] = self.steps[slots] + 1
        if self.horizon is not None:
            terminated = terminated | (steps >= self.horizon)
        if self.limit is not None:
            truncated = truncated | (steps >= self.limit)
        truncated = truncated & ~terminated
        self.alive[slots] = ~(terminated | truncated)
        return torch.from_numpy(terminated), torch.from_numpy(truncated)

    def where(self, slot: int) -> str:
        return (
            f"{self.name}, slot {self.first + int(slot)} (episode seed {int(self.seeds[slot])}), "
            f"step {int(self.steps[slot])}"
        )

    def fault(self, slot: int, what: str) -> EnvironmentFault:
        self.alive[slot] = False
        return EnvironmentFault(f"{self.where(slot)}: {what}")

    def call(self, slot: int, method: str, function: Callable[..., Any], *given: Any) -> Any:
        """`function(*given)`; whatever it raises becomes a fault of `slot`."""
        try:
            return function(*given)
        except RAISED as error:
            raise self.raised(slot, method, error) from error

    def raised(self, slot: int, method: str, error: BaseException) -> EnvironmentFault:
        return self.fault(slot, f"{method} raised {type(error).__name__}: {error}")

    def check_finite(self, slots: np.ndarray, field: str, values: Tensor | np.ndarray) -> None:
        """Refuse NaN and infinities in `values`, (n, ...)."""
        array = values.detach().numpy() if isinstance(values, Tensor) else values
        finite = np.isfinite(array)
        if not finite.all():
            row, *place = np.argwhere(~finite)[0]
            raise self.fault(
                slots[row],
                f"{field}: expected finite numbers, got {array[(row, *place)]}; see to what gives "
                "it",
            )
