"""Running a policy: episodes on a real Gymnasium environment, or of the program itself.

Returns here are plain sums of rewards, undiscounted unless they say otherwise; reward units.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from inference_rl.environment import EnvironmentModel
from inference_rl.policies import Policy

STEP_LIMIT = 10_000
"""Where an episode without any other limit is cut."""

BATCH = 64
"""Episodes that run side by side on real environments."""


class GymnasiumModel(EnvironmentModel):
    """A Gymnasium environment whose dynamics can only be sampled, step by step.

    :raises TypeError: its distributions are asked for; exact inference needs them, and has no use
        for a simulator.
    """

    def __init__(
        self, environment_id: str, kwargs: dict[str, Any] | None = None, discount: float = 0.99
    ) -> None:
        self.gymnasium_id, self.gymnasium_kwargs = environment_id, dict(kwargs or {})
        self.discount = discount
        environment = make(self)
        self.state_space, self.action_space = (
            environment.observation_space,
            environment.action_space,
        )
        environment.close()
        self.name = environment_id

    def _no_distribution(self) -> TypeError:
        return TypeError(
            f"{self.gymnasium_id} is a simulator: it can be sampled, but its transition "
            "distribution is not known, and exact inference needs it; write the dynamics as an "
            "EnvironmentModel"
        )

    def initial_state(self) -> Any:
        raise self._no_distribution()

    def transition(self, state: Tensor, action: Tensor) -> Any:
        raise self._no_distribution()

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        raise self._no_distribution()


def make(model: EnvironmentModel) -> gymnasium.Env[Any, Any]:
    """The Gymnasium environment that `model` describes, with its own time limit."""
    assert model.gymnasium_id is not None
    return gymnasium.make(model.gymnasium_id, **model.gymnasium_kwargs)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What came of running a policy for some episodes.

    :ivar returns: (episodes,) sums of rewards. :ivar discounted_returns: the same, discounted.
    :ivar lengths: (episodes,) steps. :ivar cut: episodes that ended by a limit on time.
    :ivar environment: what they ran on.
    """

    returns: np.ndarray
    discounted_returns: np.ndarray
    lengths: np.ndarray
    cut: int
    environment: str

    @property
    def episodes(self) -> int:
        return len(self.returns)

    @property
    def mean_return(self) -> float:
        return float(self.returns.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean return; NaN for a single episode."""
        if self.episodes < 2:
            return float("nan")
        return float(self.returns.std(ddof=1) / np.sqrt(self.episodes))

    def summary(self) -> dict[str, Any]:
        """JSON."""
        error = self.standard_error
        return {
            "environment": self.environment,
            "episodes": self.episodes,
            "mean_return": self.mean_return,
            "standard_error": None if np.isnan(error) else error,
            "mean_discounted_return": float(self.discounted_returns.mean()),
            "mean_length": float(self.lengths.mean()),
            "episodes_cut_by_time_limit": self.cut,
        }


def evaluate(
    model: EnvironmentModel,
    policy: Policy,
    *,
    episodes: int = 100,
    seed: int = 0,
    deterministic: bool = False,
    max_steps: int | None = None,
) -> Evaluation:
    """Run `policy` for some episodes on the real environment of `model`, or else on its program.

    :param deterministic: take the most likely action instead of drawing one.
    :param max_steps: cut episodes there, if not before: at the environment's own limit or horizon;
        where there is none, at `STEP_LIMIT` if the model has an end, and else at its
        `discounted_steps`.
    :raises ValueError: no episodes to run, or no steps.

    The global random state of torch is left as it was.
    """
    if episodes < 1:
        raise ValueError(f"episodes: expected at least one, got {episodes}")
    endless = model.gymnasium_id is None and not model.can_end
    natural = discounted_steps(model.discount) if endless else STEP_LIMIT
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps: expected at least one, got {max_steps}")
    given = [steps for steps in (max_steps, model.horizon) if steps is not None]
    limit = min(given, default=natural)
    run = _run_gymnasium if model.gymnasium_id is not None else _run_program
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        rewards, lengths, cut = run(model, policy, episodes, seed, deterministic, limit)
    weights = float(model.discount) ** np.arange(rewards.shape[1])
    return Evaluation(
        returns=rewards.sum(1),
        discounted_returns=rewards @ weights,
        lengths=lengths,
        cut=cut,
        environment=model.gymnasium_id or model.name,
    )


def discounted_steps(discount: float) -> int:
    """Steps until what follows weighs a thousandth, at most a thousand."""
    if discount in (0, 1):
        return 1 if discount == 0 else 1000
    return min(1000, math.ceil(math.log(1e-3) / math.log(discount)))


def _run_gymnasium(
    model: EnvironmentModel,
    policy: Policy,
    episodes: int,
    seed: int,
    deterministic: bool,
    limit: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    environments = [make(model) for _ in range(min(BATCH, episodes))]
    seeds = np.random.SeedSequence(seed).generate_state(episodes)
    rows: list[list[float]] = [[] for _ in range(episodes)]
    cut = 0
    try:
        for first in range(0, episodes, len(environments)):
            batch = range(first, min(first + len(environments), episodes))
            shown = {e: environments[e - first].reset(seed=int(seeds[e]))[0] for e in batch}
            previous: Tensor | None = None
            for t in range(limit):
                observation = torch.as_tensor(np.stack(list(shown.values())))
                state = model.observe(observation, previous)
                actions = policy.act(state, t, deterministic=deterministic)
                alive = []
                for i, e in enumerate(list(shown)):
                    environment = environments[e - first]
                    action = _to_gymnasium(environment.action_space, actions[i])
                    shown[e], reward, terminated, truncated, _ = environment.step(action)
                    rows[e].append(float(reward))
                    if terminated or truncated:
                        cut += not terminated
                        del shown[e]
                    else:
                        alive.append(i)
                if not shown:
                    break
                previous = actions[alive]
            cut += len(shown)
    finally:
        for environment in environments:
            environment.close()
    lengths = np.array([len(row) for row in rows])
    rewards = np.zeros((episodes, lengths.max()))
    for e, row in enumerate(rows):
        rewards[e, : len(row)] = row
    return rewards, lengths, cut


def _to_gymnasium(space: Any, action: Tensor) -> Any:
    """An action of ours as one of `space`: boxes are rescaled from [-1, 1]."""
    if isinstance(space, Discrete):
        return int(action) + int(space.start)
    assert isinstance(space, Box)
    unit = np.clip(action.numpy(), -1, 1)
    return (space.low + (unit + 1) / 2 * (space.high - space.low)).astype(space.dtype)


def _run_program(
    model: EnvironmentModel,
    policy: Policy,
    episodes: int,
    seed: int,
    deterministic: bool,
    limit: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    state = model.initial_state().sample((episodes,))
    lengths = np.zeros(episodes, dtype=int)
    columns = []
    alive = ~model.terminal(state)
    for t in range(limit):
        if not alive.any():
            break
        action = policy.act(state, t, deterministic=deterministic)
        next_state = model.transition(state, action).sample()
        reward = torch.where(alive, model.reward(state, action, next_state), 0.0)
        columns.append(reward.double().numpy())
        lengths += alive.numpy()
        mask = alive.reshape(alive.shape + (1,) * (state.dim() - 1))
        state = torch.where(mask, next_state, state)
        alive = alive & ~model.terminal(state)
    rewards = np.stack(columns, axis=1) if columns else np.zeros((episodes, 1))
    return rewards, lengths, int(alive.sum())
