"""Simulating a model: batches of episodes on a real Gymnasium environment, or of its own program.

`environments(model, size)` gives the batch. What happens in an episode is a function of its seed
and its actions, whatever slot and whatever batch it runs in.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from torch import Tensor

from inference_rl import gymnasium_spaces
from inference_rl.batch import EnvironmentFault, Environments, Share, Step
from inference_rl.environment import EnvironmentModel
from inference_rl.gymnasium_environments import GymnasiumEnvironments
from inference_rl.program_environments import ProgramEnvironments
from inference_rl.vector_environments import VectorEnvironments

if TYPE_CHECKING:
    from inference_rl.evaluation import Evaluation, discounted_steps, evaluate

__all__ = [
    "EnvironmentFault",
    "Environments",
    "Evaluation",
    "GymnasiumEnvironments",
    "GymnasiumModel",
    "ProgramEnvironments",
    "Share",
    "Step",
    "VectorEnvironments",
    "discounted_steps",
    "environments",
    "evaluate",
    "make",
    "starting_states",
    "time_limit",
]


class GymnasiumModel(EnvironmentModel):
    """A Gymnasium environment whose dynamics can only be sampled, step by step.

    States are its observations, flattened where they are neither vectors nor Discrete; actions of
    boxes, of whatever shape, lie in [-1, 1]^d, and Discrete ones count from 0.

    :raises TypeError: observations or actions of another kind. Or its distributions are asked for:
        exact inference needs them, and has no use for a simulator.
    """

    def __init__(
        self, environment_id: str, kwargs: dict[str, Any] | None = None, discount: float = 0.99
    ) -> None:
        self.gymnasium_id, self.gymnasium_kwargs = environment_id, dict(kwargs or {})
        self.discount = discount
        environment = make(self)
        try:
            observed, acted = environment.observation_space, environment.action_space
            self.state_space = gymnasium_spaces.state_space(observed, environment_id)
            self.action_space = gymnasium_spaces.action_space(acted, environment_id)
        finally:
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
    """The Gymnasium environment that `model` describes, with its own time limit.

    Without Gymnasium's checker around it: `GymnasiumEnvironments` checks every step itself.
    """
    assert model.gymnasium_id is not None
    kwargs = {"disable_env_checker": True, **model.gymnasium_kwargs}
    return gymnasium.make(model.gymnasium_id, **kwargs)


def time_limit(model: EnvironmentModel) -> int | None:
    """Steps after which the Gymnasium environment of `model` cuts an episode; None for never."""
    assert model.gymnasium_id is not None
    registered = gymnasium.spec(model.gymnasium_id.rpartition(":")[2]).max_episode_steps
    limit = model.gymnasium_kwargs.get("max_episode_steps") or registered
    return limit if limit is not None and limit > 0 else None


def environments(
    model: EnvironmentModel, size: int, limit: int | None = None, *, share: Share | None = None
) -> Environments:
    """A batch of `size` slots: of the Gymnasium environment of `model`, or else of its program.

    :param limit: steps after which an episode that goes on is cut (truncated), if it was not
        before: at the environment's own limit, or at the model's horizon, where it terminates.
    :param share: which part of a larger batch this is, of the same size.
    :raises ValueError: no slots, or a limit of no steps.
    """
    if model.gymnasium_id is None:
        return ProgramEnvironments(model, size, limit, share=share)
    if size < 1:
        raise ValueError(f"size: expected at least one slot, got {size}")
    return GymnasiumEnvironments(model, [make(model) for _ in range(size)], limit, share=share)


def starting_states(model: EnvironmentModel, count: int = 8) -> Tensor:
    """States that episodes of `model` start in, (count, ...), in the dtype they have there.

    :raises EnvironmentFault: an environment failed.
    """
    # The seeds 0, 1, ... in the upper bits, which are those that Gymnasium gets.
    seeds = np.arange(count, dtype=np.uint64) << np.uint64(33)
    with contextlib.closing(environments(model, count)) as batch:
        return batch.reset(np.arange(count), seeds)


def __getattr__(name: str) -> Any:
    # Evaluation is built on this module, and is still found in it.
    if name not in ("Evaluation", "discounted_steps", "evaluate"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from inference_rl import evaluation

    return getattr(evaluation, name)
