"""`as_gymnasium`: any model as a Gymnasium environment, for what is written for those."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import TimeLimit
from torch import Tensor

from inference_rl.environment import EnvironmentModel
from inference_rl.program_environments import ProgramEnvironments
from inference_rl.simulate import GymnasiumModel


def as_gymnasium(
    model: EnvironmentModel, render_mode: str | None = None
) -> gymnasium.Env[Any, Any]:
    """The program of `model` as a Gymnasium environment.

    Observations are states, and actions the model's: a box of them is [-1, 1]^d. A horizon becomes
    a `gymnasium.wrappers.TimeLimit`, which truncates. All that happens in an episode is a function
    of `reset(seed=...)` and the actions.

    :param render_mode: "ansi" to have `render` say where the episode is, on the map if it has one.
    :raises TypeError: the model is a simulator, and no program. :raises ValueError: another mode.
    """
    if isinstance(model, GymnasiumModel):
        raise TypeError(
            f"as_gymnasium: expected a model with a program, but {model.name} is a Gymnasium "
            f"environment already; make it with gymnasium.make({model.gymnasium_id!r})"
        )
    if render_mode not in (None, "ansi"):
        raise ValueError(f"render_mode: expected 'ansi' or None, got {render_mode!r}")
    environment = _ModelEnvironment(model, render_mode)
    return environment if model.horizon is None else TimeLimit(environment, model.horizon)


class _ModelEnvironment(gymnasium.Env[Any, Any]):
    """One slot of `ProgramEnvironments`, without the model's horizon."""

    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012 (Gymnasium's own convention)

    def __init__(self, model: EnvironmentModel, render_mode: str | None) -> None:
        self.model, self.render_mode = model, render_mode
        self.observation_space, self.action_space = model.state_space, model.action_space
        self._batch = ProgramEnvironments(model, 1, endless=True)
        self._slot = np.zeros(1, dtype=int)
        self._state: Tensor | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        episode = self.np_random.integers(2**64, size=1, dtype=np.uint64)
        self._state = self._batch.reset(self._slot, episode)
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self._state is None:
            raise RuntimeError(f"{self.model.name}: expected a reset before the first step")
        step = self._batch.step(self._slot, self._action(action))
        self._state = step.next_state
        return self._observation(), float(step.reward), bool(step.terminated), False, {}

    def render(self) -> str | None:
        """The state in words, or its place on the map, marked @."""
        if self.render_mode is None or self._state is None:
            return None
        state, layout = self._state[0], self.model.layout
        if not isinstance(self.observation_space, Discrete):
            return str(state.tolist())
        if layout is not None:
            at = int(state)
            cells = layout.cells[:at] + "@" + layout.cells[at + 1 :]
            width = layout.columns
            return "\n".join(cells[i : i + width] for i in range(0, len(cells), width))
        labels = self.model.state_labels
        return str(int(state)) if labels is None else labels[int(state)]

    def close(self) -> None:
        self._batch.close()

    def _observation(self) -> Any:
        assert self._state is not None
        if isinstance(self.observation_space, Discrete):
            return int(self._state[0])
        return self._state[0].numpy().astype(self.observation_space.dtype)

    def _action(self, action: Any) -> Tensor:
        if isinstance(self.action_space, Discrete):
            return torch.tensor([int(action)])
        # In the precision of the states, as a policy over them would give.
        assert self._state is not None
        dtype = self._state.dtype if self._state.is_floating_point() else None
        array = np.asarray(action)
        if isinstance(self.action_space, Box) and array.shape != self.action_space.shape:
            raise ValueError(
                f"{self.model.name}: expected an action of shape {self.action_space.shape}, got "
                f"{array.shape}"
            )
        return torch.as_tensor(array, dtype=dtype or torch.get_default_dtype()).unsqueeze(0)
