"""A batch of episodes of a model's own program, all stepped at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from inference_rl.batch import EnvironmentFault, Environments, Share, Slots, Step
from inference_rl.blocks import in_blocks, in_place
from inference_rl.environment import RAISED, EnvironmentModel
from inference_rl.randomness import STATES, draw


class ProgramEnvironments(Environments):
    """Slots on the program of `model`, whose draws are functions of the episodes' seeds.

    Programs over boxes run `in_blocks`, and others `in_place`, for the sake of their rounding.

    :param limit: steps after which an episode that goes on is cut; None for no limit. One that
        reaches the model's horizon has terminated: see `Slots.advance`.
    :param endless: leave the horizon to somebody else.
    :param share: which part of a larger batch this is.
    """

    def __init__(
        self,
        model: EnvironmentModel,
        size: int,
        limit: int | None = None,
        *,
        endless: bool = False,
        share: Share | None = None,
    ) -> None:
        self.model, self.size = model, size
        self._share = Share(0, size, size) if share is None else share
        self.state_space, self.action_space = model.state_space, model.action_space
        horizon = None if endless else model.horizon
        self._slots = Slots(model.name, size, limit, horizon, self._share.first)
        self.alive = self._slots.alive
        try:
            self._start = model.initial_state()
        except RAISED as error:
            raise EnvironmentFault(
                f"{model.name}: initial_state raised {type(error).__name__}: {error}"
            ) from error
        self._discrete = isinstance(model.state_space, Discrete)
        self._state: Tensor | None = None

    def reset(self, slots: np.ndarray, seeds: np.ndarray) -> Tensor:
        slots = np.asarray(slots)
        self._slots.start(slots, seeds)
        start = self._start.expand(torch.Size([len(slots)]))
        drawn = self._as_state(draw(start, seeds, 0, STATES))
        if not self._discrete:
            self._slots.check_finite(slots, "state", drawn)
        if self._state is None:
            self._state = drawn.new_zeros((self.size, *drawn.shape[1:]))
        self._state[torch.from_numpy(slots)] = drawn
        ended = self._call(slots, "terminal", self.model.terminal, drawn)
        self.alive[slots] = ~ended.numpy()
        return drawn

    def step(self, slots: np.ndarray, actions: Tensor) -> Step:
        slots = np.asarray(slots)
        self._slots.check(slots, actions, self.action_space)
        assert self._state is not None
        rows = torch.from_numpy(slots)
        state, seeds, steps = self._state[rows], self._slots.seeds[slots], self._slots.steps[slots]

        def transition(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            model, here, action, those = self.model, state[at], actions[at], slots[at.numpy()]
            step = self._call(those, "transition", model.transition, here, action)
            drawn = self._as_state(draw(step, seeds[at.numpy()], steps[at.numpy()] + 1, STATES))
            reward = self._call(those, "reward", model.reward, here, action, drawn)
            ended = self._call(those, "terminal", model.terminal, drawn)
            self._check_shapes(slots, len(at), reward, ended)
            return drawn, reward.double(), ended

        with torch.no_grad():
            if self._discrete:
                place = rows + self._share.first
                next_state, reward, ended = in_place(place, self._share.of, transition)
            else:
                next_state, reward, ended = in_blocks(len(slots), transition)
        self._slots.check_finite(slots, "reward", reward)
        if not self._discrete:
            self._slots.check_finite(slots, "state", next_state)
        self._state[rows] = next_state
        never = np.zeros(len(slots), dtype=bool)
        return Step(next_state, reward, *self._slots.advance(slots, ended.numpy(), never))

    def close(self) -> None:
        self._state = None

    def _call(
        self, slots: np.ndarray, method: str, function: Callable[..., Any], *given: Tensor
    ) -> Any:
        """`function(*given)`; what it raises becomes a fault of the first slot that is to blame."""
        try:
            return function(*given)
        except EnvironmentFault:
            raise
        except RAISED as error:
            for row, slot in enumerate(slots):
                self._slots.call(slot, method, function, *(part[row : row + 1] for part in given))
            raise self._slots.fault(
                slots[0],
                f"{method} of {len(slots)} slots at once, though of none alone, raised "
                f"{type(error).__name__}: {error}",
            ) from error

    def _as_state(self, drawn: Tensor) -> Tensor:
        return drawn.long() if self._discrete else drawn

    def _check_shapes(self, slots: np.ndarray, count: int, reward: Any, ended: Any) -> None:
        for field, values in (("reward", reward), ("terminal", ended)):
            if not isinstance(values, Tensor) or values.shape != (count,):
                got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise self._slots.fault(
                    slots[0],
                    f"{field}: expected a tensor of the batch shape of its arguments, ({count},), "
                    f"got {got}",
                )
