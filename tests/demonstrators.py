"""Demonstrators of the tests: soft policies and episodes by NumPy alone, and a grid that has some.

Nothing here but the tables of a model comes from the library.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import logsumexp
from torch import Tensor

from inference_rl import EnvironmentModel, tabulate
from inference_rl.models.grid_world import GridWorld

Array = np.ndarray[Any, np.dtype[Any]]

ICE = """
...G
.#.H
.CS.
"""
"""A start between a hole, past which the goal is near, and a cliff, in the way round."""

SWEEPS = 400
"""Backups after which 0.9^SWEEPS is lost in rounding."""


def slippery(parameters: dict[str, Tensor]) -> GridWorld:
    """`ICE` with slip 0.2. The goal's 1 and the step's -0.04 set unit and zero of the reward."""
    return GridWorld(
        text=ICE,
        slip=0.2,
        hole_reward=parameters["hole"],
        cliff_reward=parameters["cliff"],
        discount=0.9,
    )


class Tables:
    """A model as NumPy arrays."""

    def __init__(self, model: EnvironmentModel) -> None:
        finite = tabulate(model)
        S, A = finite.num_states, finite.num_actions
        self.transition = finite.csr.toarray().reshape(S, A, S)
        self.reward = finite.expected_reward().detach().numpy()
        self.prior, self.initial = finite.log_prior.numpy(), finite.initial.numpy()
        self.ended = finite.is_terminal.numpy()
        self.discount, self.horizon = finite.discount, finite.horizon

    def log_policy(self, temperature: float, reward: Array | None = None) -> Array:
        """log π of control by backups, (S, A), or (T, S, A) of a horizon."""
        reward = self.reward if reward is None else reward
        value, steps = np.zeros(len(self.ended)), []
        for _ in range(self.horizon or SWEEPS):
            q = reward + self.discount * self.transition @ value
            value = temperature * logsumexp(self.prior + q / temperature, axis=1)
            value[self.ended] = 0.0
            steps.append(self.prior + (q - value[:, None]) / temperature)
        return np.stack(steps[::-1]) if self.horizon else steps[-1]

    def episodes(
        self, temperature: float, number: int, steps: int, rng: np.random.Generator
    ) -> list[tuple[Array, Array]]:
        """States (T + 1,) and actions (T,) of whoever acts so, cut after `steps`."""
        policy, steps = np.exp(self.log_policy(temperature)), min(steps, self.horizon or steps)
        found = []
        for _ in range(number):
            states, actions = [rng.choice(len(self.initial), p=self.initial)], []
            while len(actions) < steps and not self.ended[states[-1]]:
                at = policy if policy.ndim == 2 else policy[len(actions)]
                weights = at[states[-1]]
                actions.append(rng.choice(len(weights), p=weights / weights.sum()))
                after = self.transition[states[-1], actions[-1]]
                states.append(rng.choice(len(after), p=after / after.sum()))
            found.append((np.array(states), np.array(actions)))
        return found
