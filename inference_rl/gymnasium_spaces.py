"""Gymnasium's spaces as those of this library: what is observed as tensors, and actions back.

Observations of Box and Discrete spaces are states as they are (Discrete ones count from 0); those
of MultiDiscrete, MultiBinary, Dict and Tuple spaces are flattened to a Box in Gymnasium's order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Tuple
from gymnasium.spaces.utils import flatten, flatten_space
from torch import Tensor


def state_space(space: Space[Any], name: str) -> Space[Any]:
    """The states that observations in `space` become.

    :raises TypeError: a space that has no vectors of fixed length, such as Graph or Sequence.
    """
    if isinstance(space, Box):
        return space
    if isinstance(space, Discrete):
        return Discrete(int(space.n))
    if isinstance(space, MultiDiscrete | MultiBinary | Dict | Tuple) and space.is_np_flattenable:
        flat = flatten_space(space)
        assert isinstance(flat, Box)
        dtype: Any = np.float64 if _is_double(space) else np.float32
        return Box(flat.low.astype(dtype), flat.high.astype(dtype), dtype=dtype)
    raise TypeError(
        f"{name}: expected observations in a Box, Discrete, MultiDiscrete, MultiBinary, Dict or "
        f"Tuple space, got {space}; wrap the environment in one that gives vectors, such as "
        "gymnasium.wrappers.TransformObservation"
    )


def _is_double(space: Space[Any]) -> bool:
    """Whether a part of `space` is a Box in double precision, which its flat form then keeps."""
    if isinstance(space, Dict):
        return any(_is_double(part) for part in space.values())
    if isinstance(space, Tuple):
        return any(_is_double(part) for part in space)
    return isinstance(space, Box) and space.dtype == np.float64


def action_space(space: Space[Any], name: str) -> Space[Any]:
    """The actions of this library that stand for those in `space`.

    :raises TypeError: neither a bounded Box nor Discrete nor MultiDiscrete. A Box without bounds
        is refused, because nothing says how long the unit of its actions is.
    """
    if isinstance(space, Box):
        if np.isfinite(space.low).all() and np.isfinite(space.high).all():
            return Box(-1.0, 1.0, space.shape, np.float32)
        raise TypeError(
            f"{name}: expected an action box with bounds, which [-1, 1]^d is scaled to, got "
            f"{space}; wrap the environment in one whose actions are bounded, such as "
            "gymnasium.wrappers.TransformAction"
        )
    if isinstance(space, Discrete):
        return Discrete(int(space.n))
    if isinstance(space, MultiDiscrete) and len(space.shape) == 1:
        return MultiDiscrete(space.nvec)
    raise TypeError(
        f"{name}: expected actions in a Box, Discrete or MultiDiscrete (of one dimension) space, "
        f"got {space}; wrap the environment in one that takes such actions, such as "
        "gymnasium.wrappers.TransformAction"
    )


def to_array(space: Space[Any], states: Space[Any], observation: Any) -> np.ndarray:
    """One observation as an array of the shape and dtype of `states`, its own copy.

    :raises ValueError: it does not have the shape of `space`, or numbers of another kind.
    """
    if isinstance(space, Discrete):
        return np.asarray(_as_array(space, observation).astype(np.int64) - int(space.start))
    if isinstance(space, Box):
        # Copied: an environment may well go on writing into the array it gave.
        return np.array(_as_array(space, observation), dtype=states.dtype)
    try:
        flat = np.asarray(flatten(space, observation))
    except Exception as error:
        raise ValueError(f"expected an observation in {space}, got {observation!r}") from error
    assert states.shape is not None
    if flat.shape != states.shape:
        raise ValueError(f"expected {states.shape[0]} numbers of {space}, got {flat.size}")
    return np.array(flat, dtype=states.dtype)


def _as_array(space: Space[Any], observation: Any) -> np.ndarray:
    array = np.asarray(observation)
    if array.shape == space.shape and array.dtype is space.dtype:
        return array
    if array.shape != space.shape:
        raise ValueError(f"expected shape {space.shape}, got {array.shape}")
    assert space.dtype is not None
    if not np.can_cast(array.dtype, space.dtype, "same_kind"):
        raise ValueError(f"expected dtype {space.dtype}, got {array.dtype}")
    return array


def to_states(arrays: list[np.ndarray]) -> Tensor:
    """Observations of `to_array` in one tensor."""
    return torch.from_numpy(np.stack(arrays))


def to_gymnasium(space: Space[Any], actions: Tensor) -> Any:
    """Actions (n, ...) of this library as an array, or list, of those of `space`.

    Those of boxes are clipped to [-1, 1] and scaled to the box.
    """
    if isinstance(space, Discrete):
        # NumPy's own integers: `Discrete.contains` takes several times as long over Python's.
        return list((actions.numpy() + space.start).astype(space.dtype))
    if isinstance(space, MultiDiscrete):
        return (actions.long().numpy() + space.start).astype(space.dtype)
    assert isinstance(space, Box)
    unit = np.clip(actions.detach().numpy(), -1, 1)
    return (space.low + (unit + 1) / 2 * (space.high - space.low)).astype(space.dtype)
