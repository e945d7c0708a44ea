"""Gymnasium's spaces as those of this library: what is observed as tensors, and actions back.

Observations of Discrete spaces, and of Boxes that are vectors of floating-point numbers, are states
as they are (Discrete ones count from 0). Other Boxes, and MultiDiscrete, MultiBinary, Dict and
Tuple spaces, are flattened to such a Box in Gymnasium's order, whole numbers to float32. So are
actions of Boxes: one of any shape is a vector here, and gets its shape back on its way out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    if isinstance(space, Box) and len(space.shape) == 1 and np.issubdtype(space.dtype, np.floating):
        return space
    if isinstance(space, Discrete):
        return Discrete(int(space.n))
    if (
        isinstance(space, Box | MultiDiscrete | MultiBinary | Dict | Tuple)
        and space.is_np_flattenable
    ):
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
            return Box(-1.0, 1.0, (math.prod(space.shape),), np.float32)
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

    :raises ValueError: it does not have the shape of `space`, or numbers of another kind, or is
        none of the choices of a discrete space. Whether it is in a Box is left to others: many
        environments go beyond their own bounds.
    """
    if isinstance(space, Discrete):
        state = int(_as_array(space, observation)) - int(space.start)
        if not 0 <= state < space.n:
            raise ValueError(f"expected one of {space}, got {observation}")
        return np.asarray(state)
    assert states.shape is not None
    if isinstance(space, Box):
        # Copied: an environment may well go on writing into the array it gave.
        return np.array(_as_array(space, observation), dtype=states.dtype).reshape(states.shape)
    _check_choices(space, observation)
    try:
        flat = np.asarray(flatten(space, observation))
    except Exception as error:
        raise ValueError(f"expected an observation in {space}, got {observation!r}") from error
    if flat.shape != states.shape:
        raise ValueError(f"expected {states.shape[0]} numbers of {space}, got {flat.size}")
    return np.array(flat, dtype=states.dtype)


def _check_choices(space: Space[Any], observation: Any, part: str = "") -> None:
    """:raises ValueError: what a discrete part of `space` holds is none of its choices, which
    Gymnasium's `flatten` takes for another one, even of another part."""
    if isinstance(space, Dict) and isinstance(observation, Mapping):
        for name, inner in space.items():
            if name in observation:
                _check_choices(inner, observation[name], f"{part}[{name!r}]")
    elif isinstance(space, Tuple) and isinstance(observation, tuple | list):
        for i, (inner, value) in enumerate(zip(space, observation, strict=False)):
            _check_choices(inner, value, f"{part}[{i}]")
    elif isinstance(space, Discrete | MultiDiscrete | MultiBinary):
        where = f"{part}: " if part else ""
        try:
            counted = _as_array(space, observation) - getattr(space, "start", 0)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error
        size = space.n if isinstance(space, Discrete) else getattr(space, "nvec", 2)
        if not ((counted >= 0) & (counted < size)).all():
            shown = np.asarray(observation).tolist()
            raise ValueError(f"{where}expected one of {space}, got {shown}")


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

    Those of boxes are clipped to [-1, 1], scaled to the box and given its shape.
    """
    if isinstance(space, Discrete):
        # NumPy's own integers: `Discrete.contains` takes several times as long over Python's.
        return list((actions.numpy() + space.start).astype(space.dtype))
    if isinstance(space, MultiDiscrete):
        return (actions.long().numpy() + space.start).astype(space.dtype)
    assert isinstance(space, Box)
    unit = np.clip(actions.detach().numpy(), -1, 1).reshape(-1, *space.shape)
    scaled = (space.low + (unit + 1) / 2 * (space.high - space.low)).astype(space.dtype)
    # An element of a vector would be a NumPy scalar, which is in no Box.
    return scaled if space.shape else [np.asarray(action) for action in scaled]
