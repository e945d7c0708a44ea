"""Sampled trajectories in the form that ArviZ and xarray read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from inference_rl.simulate import discounted_steps

if TYPE_CHECKING:
    import xarray

    from inference_rl.environment import EnvironmentModel


def effective_horizon(model: EnvironmentModel, draws: int, horizon: int | None) -> int:
    """How many steps to draw: `horizon`, the model's own, or its `discounted_steps`.

    :raises ValueError: no draws, or more steps than the model has.
    """
    if draws < 1:
        raise ValueError(f"draws: expected at least one, got {draws}")
    if horizon is not None and horizon < 1:
        raise ValueError(f"horizon: expected at least one step, got {horizon}")
    if model.horizon is not None:
        if horizon is not None and horizon > model.horizon:
            raise ValueError(f"horizon: the model ends after {model.horizon} steps, got {horizon}")
        return horizon or model.horizon
    return horizon or discounted_steps(model.discount)


def trajectories_tree(columns: dict[str, Tensor], attributes: dict[str, Any]) -> xarray.DataTree:
    """A DataTree of one chain: `posterior` (states, actions, rewards) and `sample_stats`.

    :param columns: `state` (draws, T + 1, ...), `action` (draws, T, ...), `reward` and `alive`
        (draws, T), and optionally `log_weight` (draws,), nats.
    :param attributes: numbers and strings to keep with the draws; others are left out.
    """
    import xarray

    paths = {}
    for name in ("state", "action", "reward", "alive"):
        array = columns[name].numpy()[np.newaxis]
        time = "time_and_end" if name == "state" else "time"
        extra = [f"{name}_dim_{i}" for i in range(array.ndim - 3)]
        paths[name] = (["chain", "draw", time, *extra], array)
    stats = {"return": (["chain", "draw"], columns["reward"].sum(1).numpy()[np.newaxis])}
    if "log_weight" in columns:
        stats["log_weight"] = (["chain", "draw"], columns["log_weight"].numpy()[np.newaxis])
    kept = {k: v for k, v in attributes.items() if isinstance(v, str | int | float)}
    tree = xarray.DataTree.from_dict(
        {"posterior": xarray.Dataset(paths), "sample_stats": xarray.Dataset(stats)}
    )
    tree.attrs.update(kept)
    return tree
