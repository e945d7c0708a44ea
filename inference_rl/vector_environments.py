"""A batch of episodes on a `gymnasium.vector.VectorEnv` of the user's own.

A vector environment steps all of its sub-environments at once, and starts new episodes by itself,
in one of three modes. None of that shows here: a step's `next_state` is the episode's last
observation, and nothing that happens in a slot after its episode's end comes to light.

| `autoreset_mode` | after an episode's end                                                 |
|------------------|------------------------------------------------------------------------|
| NEXT_STEP        | the next step ignores its action and gives the next episode's start    |
| SAME_STEP        | the same step gives it; the last observation is `info["final_obs"]`    |
| DISABLED         | `reset(options={"reset_mask": mask})` starts it                        |
"""

from __future__ import annotations

import copy
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import iterate
from torch import Tensor

from inference_rl import gymnasium_spaces
from inference_rl.batch import EnvironmentFault, Environments, Slots, Step, close
from inference_rl.environment import RAISED, EnvironmentModel
from inference_rl.gymnasium_environments import to_31_bits

PATIENCE = 1.0
"""Seconds in which a worker that does not answer is seen to have died."""


class VectorEnvironments(Environments):
    """Slots on the sub-environments of `vector_env`, which must all be stepped together.

    :param model: whose `observe` makes states of observations; they are the states if None.
    :param limit: steps after which an episode that goes on is cut; None for its own limit only.

    Gymnasium's `SyncVectorEnv` and `AsyncVectorEnv`, and whatever has autoreset disabled, restart a
    single slot with the seed of its episode. Others cannot: unless all slots start at once, a slot
    takes the episode that the environment has begun by itself, in SAME_STEP mode right after its
    last step, in NEXT_STEP mode after one more step of the others; its seed has no effect, and what
    happens in an episode is then no function of its seed.
    """

    def __init__(
        self,
        vector_env: VectorEnv[Any, Any, Any],
        model: EnvironmentModel | None = None,
        limit: int | None = None,
    ) -> None:
        given = vector_env.metadata.get("autoreset_mode")
        try:
            self.mode = AutoresetMode(given)
        except ValueError:
            raise ValueError(
                f"{vector_env}: expected metadata['autoreset_mode'] to be one of "
                f"{', '.join(mode.name for mode in AutoresetMode)}, got {given!r}; set it to what "
                "the environment does after an episode's end"
            ) from None
        self.vector_env, self.model, self.size = vector_env, model, vector_env.num_envs
        spec = vector_env.spec
        name = spec.id if spec is not None else type(vector_env).__name__
        self._observed = vector_env.single_observation_space
        self._acted = vector_env.single_action_space
        self._shown = gymnasium_spaces.state_space(self._observed, name)
        self._taken = gymnasium_spaces.action_space(self._acted, name)
        self.state_space = self._shown if model is None else model.state_space
        self.action_space = self._taken if model is None else model.action_space
        self._slots = Slots(name, self.size, limit, None if model is None else model.horizon)
        self.alive = self._slots.alive
        of_gymnasium = isinstance(vector_env, SyncVectorEnv | AsyncVectorEnv)
        self._one_by_one = of_gymnasium or self.mode is AutoresetMode.DISABLED
        self._begun = self._failed = False
        self._over = np.zeros(self.size, dtype=bool)
        """Sub-environments whose episode has ended, and no other has begun."""
        self._fresh: dict[int, Any] = {}
        """The first observations of episodes that sub-environments have begun by themselves."""

    def reset(self, slots: np.ndarray, seeds: np.ndarray) -> Tensor:
        slots = np.asarray(slots)
        others = self.alive.copy()
        others[slots] = False
        self._slots.start(slots, seeds)
        if self._begun and others.any() and not self._one_by_one:
            shown = [self._taken_over(int(slot)) for slot in slots]
        else:
            every = self._reset(slots, seeds, all_slots=not self._begun or not self._one_by_one)
            shown = [every[slot] for slot in slots]
            self._begun = True
        return self._states(slots, shown, None)

    def step(self, slots: np.ndarray, actions: Tensor) -> Step:
        slots = np.asarray(slots)
        self._slots.check(slots, actions, self._taken)
        left_out = self.alive.copy()
        left_out[slots] = False
        if left_out.any():
            raise ValueError(
                f"{self._slots.name}: expected an action for every slot whose episode goes on, "
                f"because a vector environment steps them all, got none for slot "
                f"{int(left_out.nonzero()[0][0])}; step them together"
            )
        idle = ~self.alive
        if self.mode is AutoresetMode.DISABLED and (self._over & idle).any():
            self._reset(np.flatnonzero(self._over & idle), None, all_slots=False)
        # Whoever is idle must do something.
        everyone = actions[:1].repeat(self.size, *(1,) * (actions.dim() - 1))
        everyone[torch.from_numpy(slots)] = actions
        taken = np.asarray(gymnasium_spaces.to_gymnasium(self._acted, everyone))
        observations, reward, terminated, truncated, info = self._call(
            "step", lambda: self.vector_env.step(taken.astype(self._acted.dtype))
        )
        over = np.asarray(terminated) | np.asarray(truncated)
        shown = list(iterate(self.vector_env.observation_space, observations))
        self._note_starts(idle, over, shown)
        last = [self._last(slot, over, shown, info) for slot in slots]
        rewards = torch.from_numpy(np.asarray(reward, dtype=np.float64)[slots])
        self._slots.check_finite(slots, "reward", rewards)
        next_state = self._states(slots, last, actions)
        ends = (np.asarray(ended, dtype=bool)[slots] for ended in (terminated, truncated))
        return Step(next_state, rewards, *self._slots.advance(slots, *ends))

    def close(self) -> None:
        if self._failed and isinstance(self.vector_env, AsyncVectorEnv):
            # Its own `close` waits for answers, which a worker that died will not give.
            for process in self.vector_env.processes:
                process.kill()
                process.join()
            for pipe in self.vector_env.parent_pipes:
                if pipe is not None:
                    pipe.close()
            self.vector_env.closed = True
        else:
            close(self.vector_env, self._slots.name)

    def _note_starts(self, idle: np.ndarray, over: np.ndarray, shown: list[Any]) -> None:
        """What the step did beyond the episodes: which ones it began."""
        if self.mode is AutoresetMode.SAME_STEP:
            began = over
        elif self.mode is AutoresetMode.NEXT_STEP:
            began = self._over & idle
        else:
            began = np.zeros_like(over)
        self._fresh = {int(slot): copy.deepcopy(shown[slot]) for slot in np.flatnonzero(began)}
        self._over = over & (self.mode is not AutoresetMode.SAME_STEP)

    def _last(self, slot: int, over: np.ndarray, shown: list[Any], info: dict[str, Any]) -> Any:
        if self.mode is not AutoresetMode.SAME_STEP or not over[slot]:
            return shown[slot]
        if "final_obs" not in info:
            raise self._slots.fault(
                slot,
                "info: expected the last observation in info['final_obs'], as autoreset_mode "
                f"SAME_STEP promises, got the keys {sorted(info)}",
            )
        return info["final_obs"][slot]

    def _taken_over(self, slot: int) -> Any:
        if slot in self._fresh:
            return self._fresh.pop(slot)
        self.alive[slot] = False
        when = (
            "right after its last step"
            if self.mode is AutoresetMode.SAME_STEP
            else "one step of the other slots after its last"
        )
        raise ValueError(
            f"{self._slots.name}: slot {slot} cannot start now, because autoreset_mode "
            f"{self.mode.name} begins episodes by itself; reset it {when}, or when every slot's "
            "episode has ended, or use autoreset_mode DISABLED"
        )

    def _reset(self, slots: np.ndarray, seeds: np.ndarray | None, all_slots: bool) -> list[Any]:
        """Restart `slots` alone, or all; the observations of all."""
        each: list[int | None] = [None] * self.size
        if seeds is not None:
            for slot, seed in zip(slots, seeds, strict=True):
                each[slot] = to_31_bits(seed)
        mask = np.zeros(self.size, dtype=bool)
        mask[slots] = True
        options = None if all_slots else {"reset_mask": mask}
        # A vector environment of another make may take a single seed only.
        given: Any = each if self._one_by_one else each[int(slots[0])]
        observations, _ = self._call(
            "reset", lambda: self.vector_env.reset(seed=given, options=options)
        )
        self._over[mask | all_slots] = False
        return list(iterate(self.vector_env.observation_space, observations))

    def _call(self, method: str, function: Any) -> Any:
        try:
            return function()
        except RAISED as error:
            self._failed = True
            if isinstance(self.vector_env, AsyncVectorEnv):
                slot, what = _culprit(self.vector_env, error)
                if slot is not None:
                    raise self._slots.fault(slot, f"{method}: {what}") from error
            seeds = ", ".join(str(seed) for seed in self._slots.seeds[:8])
            raise EnvironmentFault(
                f"{self._slots.name}: {method} of {self.size} slots raised "
                f"{type(error).__name__}: {error} (episode seeds {seeds}"
                f"{', ...' if self.size > 8 else ''})"
            ) from error

    def _states(self, slots: np.ndarray, shown: list[Any], previous: Tensor | None) -> Tensor:
        arrays = []
        for slot, observation in zip(slots, shown, strict=True):
            try:
                arrays.append(gymnasium_spaces.to_array(self._observed, self._shown, observation))
            except ValueError as error:
                raise self._slots.fault(slot, f"observation: {error}") from error
        states = gymnasium_spaces.to_states(arrays)
        if states.is_floating_point():
            self._slots.check_finite(slots, "observation", states)
        return states if self.model is None else self.model.observe(states, previous)


def _culprit(vector_env: AsyncVectorEnv, error: BaseException) -> tuple[int | None, str]:
    """The slot whose worker failed, if that can be told, and what it did."""
    if not isinstance(error, OSError | EOFError):
        shut = [slot for slot, pipe in enumerate(vector_env.parent_pipes) if pipe is None]
        return (shut[0] if shut else None), f"it raised {type(error).__name__}: {error}"
    gone = wait([process.sentinel for process in vector_env.processes], PATIENCE)
    for slot, process in enumerate(vector_env.processes):
        if process.sentinel in gone:
            process.join(PATIENCE)
            return slot, (
                f"its worker died (exit code {process.exitcode}); see to what killed it, such as "
                "too little memory"
            )
    return None, ""
