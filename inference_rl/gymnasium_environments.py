"""A batch of Gymnasium environments, one for each slot, stepped one after the other."""

from __future__ import annotations

import numbers
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from inference_rl import gymnasium_spaces
from inference_rl.batch import Environments, Share, Slots, Step, close
from inference_rl.environment import RAISED, EnvironmentModel


class GymnasiumEnvironments(Environments):
    """Slots on environments made by `gymnasium.make`, all of one id.

    :param model: whose `observe` makes states of observations.
    :param environments: one for each slot, closed with this.
    :param limit: steps after which an episode that goes on is cut; None for the environment's own
        limit only. :param share: which part of a larger batch this is.

    Each episode is seeded by its own seed alone, of which Gymnasium gets 31 bits.
    """

    def __init__(
        self,
        model: EnvironmentModel,
        environments: list[gymnasium.Env[Any, Any]],
        limit: int | None = None,
        *,
        share: Share | None = None,
    ) -> None:
        name = model.gymnasium_id or model.name
        self.model, self.environments = model, environments
        self.size = len(environments)
        self.state_space, self.action_space = model.state_space, model.action_space
        first = 0 if share is None else share.first
        self._slots = Slots(name, self.size, limit, model.horizon, first)
        self._observed = environments[0].observation_space
        self._acted = environments[0].action_space
        self._shown = gymnasium_spaces.state_space(self._observed, name)
        self._taken = gymnasium_spaces.action_space(self._acted, name)
        self._plain = self._shown is self._observed
        self._shape, self._dtype = self._shown.shape or (), self._shown.dtype
        self.alive = self._slots.alive

    def reset(self, slots: np.ndarray, seeds: np.ndarray) -> Tensor:
        self._slots.start(slots, seeds)
        shown = []
        for slot, seed in zip(slots, seeds, strict=True):
            reset = self.environments[slot].reset
            given = self._slots.call(slot, "reset", lambda r=reset, s=seed: r(seed=to_31_bits(s)))
            if not (isinstance(given, tuple) and len(given) == 2):
                raise self._slots.fault(
                    slot, f"reset: expected a pair (observation, info), got {given!r}"
                )
            shown.append(self._array(slot, given[0]))
        return self._states(slots, np.stack(shown), None)

    def step(self, slots: np.ndarray, actions: Tensor) -> Step:
        self._slots.check(slots, actions, self._taken)
        shown = np.empty((len(slots), *self._shape), dtype=self._dtype)
        rewards = np.empty(len(slots))
        terminated, truncated = np.zeros((2, len(slots)), dtype=bool)
        taken = gymnasium_spaces.to_gymnasium(self._acted, actions)
        for i, slot in enumerate(slots.tolist()):
            try:
                given = self.environments[slot].step(taken[i])
            except RAISED as error:
                raise self._slots.raised(slot, "step", error) from error
            if not (isinstance(given, tuple) and len(given) == 5):
                raise self._slots.fault(
                    slot,
                    "step: expected five values (observation, reward, terminated, truncated, "
                    f"info), got {given!r}",
                )
            observation, paid, ends, cut, _ = given
            # What is as it should be, as nearly all is, is not looked into further.
            if not (
                self._plain
                and type(observation) is np.ndarray
                and observation.dtype is self._dtype
                and observation.shape == self._shape
            ):
                observation = self._array(slot, observation)
            if not (type(paid) is float and type(ends) is bool and type(cut) is bool):
                paid, ends, cut = self._outcome(slot, paid, ends, cut)
            # Copied: an environment may well go on writing into the array it gave.
            shown[i], rewards[i], terminated[i], truncated[i] = observation, paid, ends, cut
        self._slots.check_finite(slots, "reward", rewards)
        next_state, reward = self._states(slots, shown, actions), torch.from_numpy(rewards)
        return Step(next_state, reward, *self._slots.advance(slots, terminated, truncated))

    def close(self) -> None:
        for slot, environment in enumerate(self.environments, start=self._slots.first):
            close(environment, f"{self._slots.name}, slot {slot}")

    def _outcome(
        self, slot: int, reward: Any, terminated: Any, truncated: Any
    ) -> tuple[float, bool, bool]:
        if not isinstance(reward, numbers.Real | np.bool_) and np.shape(reward) != ():
            raise self._slots.fault(slot, f"reward: expected a number, got {reward!r}")
        for field, value in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(value, bool | np.bool_):
                raise self._slots.fault(slot, f"{field}: expected True or False, got {value!r}")
        number = self._slots.call(slot, "reward", float, reward)
        return number, bool(terminated), bool(truncated)

    def _array(self, slot: int, observation: Any) -> np.ndarray:
        try:
            return gymnasium_spaces.to_array(self._observed, self._shown, observation)
        except ValueError as error:
            raise self._slots.fault(slot, f"observation: {error}") from error

    def _states(self, slots: np.ndarray, shown: np.ndarray, previous: Tensor | None) -> Tensor:
        if shown.dtype.kind == "f":
            self._slots.check_finite(slots, "observation", shown)
        return self.model.observe(torch.from_numpy(shown), previous)


def to_31_bits(seed: np.uint64) -> int:
    """An episode's seed for Gymnasium: some environments hand it on to generators that take no
    more."""
    return int(seed) >> 33
