"""Running a policy: episodes on a real Gymnasium environment, or of the program itself.

Returns here are plain sums of rewards, undiscounted unless they say otherwise; reward units.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from inference_rl.batch import Environments
from inference_rl.blocks import in_blocks
from inference_rl.environment import EnvironmentModel
from inference_rl.policies import Policy
from inference_rl.randomness import ACTIONS, derived, draw, episode_seeds
from inference_rl.simulate import environments, time_limit

STEP_LIMIT = 10_000
"""Where an episode without any other limit is cut."""

REAL_BATCH, PROGRAM_BATCH = 64, 10_000
"""Episodes that run side by side, on real environments and in programs."""


Watch = Callable[[Callable[[], int]], contextlib.AbstractContextManager[None]]
"""What sees to environments, by how often they have moved."""


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
    watch: Watch | None = None,
) -> Evaluation:
    """Run `policy` for some episodes on the real environment of `model`, or else on its program.

    :param deterministic: take the most likely action instead of drawing one.
    :param max_steps: cut episodes there, in place of `episode_limit`, unless they end before: at
        the horizon, or at the environment's own limit.
    :param watch: within which episodes are run, such as `learning.patience.Limit.on`.
    :raises ValueError: no episodes to run, or no steps.
    :raises EnvironmentFault: the environment failed, or gave NaN; see `inference_rl.batch`.

    Each episode is a function of its own seed, however many are run. The global random state of
    torch is left as it was.
    """
    if episodes < 1:
        raise ValueError(f"episodes: expected at least one, got {episodes}")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps: expected at least one, got {max_steps}")
    limit = max_steps if max_steps is not None else episode_limit(model)
    size = PROGRAM_BATCH if model.gymnasium_id is None else REAL_BATCH
    seeds = episode_seeds(derived(seed, "environment"), np.arange(episodes))
    run = _Run(model, policy, deterministic, episodes)
    with (
        torch.no_grad(),
        contextlib.nullcontext() if watch is None else watch(lambda: run.moves),
        contextlib.closing(environments(model, min(size, episodes), limit)) as batch,
    ):
        for first in range(0, episodes, batch.size):
            run.wave(batch, np.arange(first, min(first + batch.size, episodes)), seeds)
    return Evaluation(
        returns=run.returns,
        discounted_returns=run.discounted,
        lengths=run.lengths,
        cut=run.cut,
        environment=model.gymnasium_id or model.name,
    )


def episode_limit(model: EnvironmentModel) -> int:
    """Steps after which an episode of `model` is cut, by evaluation and learning alike.

    Its horizon, or else the time limit of its Gymnasium environment. Where there is neither,
    `STEP_LIMIT` if something may end an episode, and its `discounted_steps` if nothing can.
    """
    if model.horizon is not None:
        return model.horizon
    if model.gymnasium_id is not None:
        return time_limit(model) or STEP_LIMIT
    return STEP_LIMIT if model.can_end else discounted_steps(model.discount)


def discounted_steps(discount: float) -> int:
    """Steps until what follows weighs a thousandth, at most a thousand."""
    if discount in (0, 1):
        return 1 if discount == 0 else 1000
    return min(1000, math.ceil(math.log(1e-3) / math.log(discount)))


class _Run:
    """What `evaluate` adds up, episode by episode."""

    def __init__(
        self, model: EnvironmentModel, policy: Policy, deterministic: bool, episodes: int
    ) -> None:
        self.model, self.policy, self.deterministic = model, policy, deterministic
        self.returns, self.discounted = np.zeros((2, episodes))
        self.lengths = np.zeros(episodes, dtype=int)
        self.cut = self.moves = 0

    def wave(self, batch: Environments, episodes: np.ndarray, seeds: np.ndarray) -> None:
        """Run `episodes` side by side from their start, so that all are at the same step."""
        slots = np.arange(len(episodes))
        self.moves += 1
        state = batch.reset(slots, seeds[episodes])
        alive = batch.alive[slots]
        t, weight = 0, 1.0
        while alive.any():
            slots, state = slots[alive], state[torch.from_numpy(alive)]
            here = episodes[slots]
            self.moves += 1
            step = batch.step(slots, self._act(state, t, seeds[here]))
            reward = step.reward.numpy()
            self.returns[here] += reward
            self.discounted[here] += weight * reward
            self.lengths[here] += 1
            t, weight = t + 1, weight * float(self.model.discount)
            state, alive = step.next_state, batch.alive[slots]
            # The horizon ends the problem, and yet it is time that ran out.
            by_time = step.truncated
            if t == self.model.horizon:
                by_time = by_time | ~self.model.terminal(state)
            self.cut += int(by_time.sum())

    def _act(self, state: Tensor, t: int, seeds: np.ndarray) -> Tensor:
        """The actions at step `t`, which all episodes are at, (n, ...)."""

        def act(rows: Tensor) -> tuple[Tensor]:
            if self.deterministic:
                return (self.policy.mode(state[rows], t),)
            return (draw(self.policy(state[rows], t), seeds[rows.numpy()], t, ACTIONS),)

        # Networks and gains multiply matrices; tables do not, and are better read at once.
        if state.is_floating_point():
            (action,) = in_blocks(len(state), act)
        else:
            (action,) = act(torch.arange(len(state)))
        return action.long() if isinstance(self.model.action_space, Discrete) else action
