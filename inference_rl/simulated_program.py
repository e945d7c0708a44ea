"""A real environment inside the trajectory program, for inference that only samples.

`SimulatedProgram` is a model whose distributions are one-shot: to sample them is to start, or to
step, real environments. Under Pyro's own SVI the guide samples them, and the model, in which Pyro
replays the guide's values, takes what came. They have log-density 0 in both, as the dynamics of
model and guide are the same and cancel in log p(τ, O) - log q(τ): Levine (2018), arXiv:1805.00909,
§3.2. Inference that needs the density, or another draw from the same state, is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl.environment import EnvironmentModel
from inference_rl.randomness import derived, episode_seeds
from inference_rl.simulate import environments
from inference_rl.trajectory import ActionFactor, _takes_step


class SimulatedProgram(EnvironmentModel):
    """`size` episodes of `model` as real environments run them, for `trajectory`.

    A state is [observation, reward, ended] in float64, (size, d + 2), so that `reward` and
    `terminal` read what the environment said. Policies and priors over observations are wrapped:

        guide = lambda: trajectory(simulated, simulated.reading(policy), T)
        model = lambda: trajectory(simulated, simulated.reading(prior), T, temperature=1.0)

    within a `pyro.plate` of `size`. Truncation is no end that a program knows: it may take no more
    steps than the environment's own limit allows.

    :param model: simulated as `inference_rl.simulate.environments` does.
    :param seeds: of a run, for new episodes at each start; or (size,) seeds of the episodes of the
        only start.
    :ivar steps: steps that environments have taken, over all episodes.
    """

    def __init__(self, model: EnvironmentModel, size: int, seeds: int | np.ndarray) -> None:
        shape = model.state_space.shape
        if not isinstance(model.state_space, Discrete | Box) or shape is None or len(shape) > 1:
            raise TypeError(
                f"{model.name}: expected states that are numbers or vectors, got "
                f"{model.state_space}; flatten them"
            )
        self.model, self.size, self.seeds = model, size, seeds
        self.environments = environments(model, size)
        self.width = shape[0] if shape else 1
        self.state_space = Box(-np.inf, np.inf, (self.width + 2,), np.float64)
        self.action_space = model.action_space
        self.discount, self.horizon = model.discount, model.horizon
        self.name = f"simulated {model.name}"
        self.steps = 0
        self._cut = np.zeros(size, dtype=bool)
        self._starts = self._events = 0
        self._dtype = torch.get_default_dtype()
        self._shown = torch.zeros(0, self.width + 2, dtype=torch.float64)

    def observation(self, state: Tensor) -> Tensor:
        """What the environment showed, as the model's states are."""
        if isinstance(self.model.state_space, Discrete):
            return state[..., 0].long()
        return state[..., : self.width].to(self._dtype)

    def reading(self, factor: ActionFactor) -> ActionFactor:
        """A policy or prior over observations as one over the states of this program."""
        if _takes_step(factor):
            return lambda state, t: factor(self.observation(state), t)
        return lambda state: factor(self.observation(state))

    def initial_state(self) -> TorchDistribution:
        return Simulated(self, self._start, self.size)

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        return Simulated(self, lambda: self._step(action), self.size)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return next_state[..., self.width]

    def terminal(self, state: Tensor) -> Tensor:
        return state[..., -1] != 0

    def close(self) -> None:
        """Close the environments."""
        self.environments.close()

    def _start(self) -> Tensor:
        if isinstance(self.seeds, int):
            first = self._starts * self.size
            numbers = np.arange(first, first + self.size)
            seeds = episode_seeds(derived(self.seeds, "environment"), numbers)
        elif self._starts:
            raise RuntimeError(
                f"{self.name}: expected one start with the given episode seeds, got another; give "
                "the seed of a run (an integer) to start new episodes each time"
            )
        else:
            seeds = self.seeds
        self._starts += 1
        self._cut[:] = False
        shown = self.environments.reset(np.arange(self.size), seeds)
        self._dtype = shown.dtype
        ended = torch.from_numpy(~self.environments.alive)
        return self._write(torch.arange(self.size), shown, torch.zeros(self.size), ended)

    def _step(self, action: Tensor) -> Tensor:
        if self._cut.any():
            raise RuntimeError(
                f"{self.name}: expected no more steps than the environment's own limit, got "
                f"another for slot {int(self._cut.argmax())}, whose episode was cut there; shorten "
                "the horizon of the trajectory, or lift the limit (env_kwargs max_episode_steps)"
            )
        alive = np.flatnonzero(self.environments.alive)
        if not len(alive):
            return self._shown
        rows = torch.from_numpy(alive)
        if isinstance(self.action_space, Discrete):
            action = action.long()
        step = self.environments.step(alive, action.detach()[rows])
        self.steps += len(alive)
        self._cut[alive] = step.truncated.numpy()
        return self._write(rows, step.next_state, step.reward, step.terminated)

    def _write(self, rows: Tensor, shown: Tensor, reward: Tensor, ended: Tensor) -> Tensor:
        columns = [shown.reshape(len(rows), self.width), reward.unsqueeze(-1), ended.unsqueeze(-1)]
        state = torch.zeros(self.size, self.width + 2, dtype=torch.float64)
        state[:, : self.width] = self._shown[:, : self.width] if len(self._shown) else 0.0
        state[:, -1] = 1.0
        state[rows] = torch.cat([column.double() for column in columns], dim=-1)
        self._shown = state
        return state


class Simulated(TorchDistribution):
    """What an environment will give next: sampled once, with log-density 0.

    :raises RuntimeError: it is sampled again, or after the environment has moved on.
    :raises TypeError: it is to be enumerated, or sampled more than once in parallel.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, program: SimulatedProgram, happen: Callable[[], Tensor], size: int) -> None:
        self.program, self.happen, self.at = program, happen, program._events
        event_shape = torch.Size([program.width + 2])
        super().__init__(torch.Size([size]), event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Simulated:
        if torch.Size(batch_shape) != self.batch_shape:
            raise self._once(f"its batch shape cannot become {tuple(batch_shape)}")
        return self

    def sample(self, sample_shape: Any = ()) -> Tensor:
        if torch.Size(sample_shape):
            raise self._once(f"no {tuple(sample_shape)} draws of it can be taken")
        if self.program._events != self.at:
            raise RuntimeError(
                f"{self.program.name}: an environment cannot be stepped twice from the same state; "
                "replay the value that it gave (pyro.poutine.replay), as SVI does with the guide's"
            )
        self.program._events += 1
        return self.happen()

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.zeros(self.batch_shape, dtype=value.dtype)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        raise self._once("it cannot be enumerated")

    def _once(self, what: str) -> TypeError:
        return TypeError(
            f"{self.program.name} is a simulator of {self.batch_shape[0]} episodes that is sampled "
            f"step by step: {what}; write the dynamics as an EnvironmentModel"
        )
