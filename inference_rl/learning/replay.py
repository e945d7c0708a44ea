"""Replay: what was collected before, drawn again as stretches of time.

A ring of time steps for each slot, allocated when the first segment comes. Stretches are contiguous
in time, with the ends of episodes marked in them as in what was collected, so that whoever looks
ahead along a path sees where it stops.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference_rl.learning import memory
from inference_rl.learning.collection import Segment

_FIELDS = [field.name for field in dataclasses.fields(Segment)]


class PathReplay:
    """The last `capacity` steps of a run, over all slots.

    :param capacity: steps; a whole number of rounds of every slot fits in, and at least one.
    :param dtype: in which floating-point numbers are kept; as they come, if it is not given.
    :param device: where they are kept, and drawn.
    """

    def __init__(
        self, capacity: int, *, dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> None:
        self.capacity, self._dtype, self._device = capacity, dtype, device
        self._ring: dict[str, Tensor] = {}
        self._next = self._stored = 0

    def add(self, data: Segment) -> None:
        """Store a segment (T, N), in place of the oldest steps once the ring is full.

        :raises ValueError: the segment has another number of slots than those before.
        :raises MemoryError: the ring, which is allocated with the first segment, would not fit.
        """
        steps, slots = data.reward.shape
        if not self._ring:
            rows = max(self.capacity // (steps * slots), 1) * steps
            self._allocate(rows, {name: getattr(data, name) for name in _FIELDS})
        rows = len(self._ring["reward"])
        if self._ring["reward"].shape[1] != slots or rows % steps:
            raise ValueError(
                f"replay: expected segments of {self._ring['reward'].shape[1]} slots whose steps "
                f"divide {rows}, got one of {steps} steps in {slots} slots"
            )
        for name, ring in self._ring.items():
            ring[self._next : self._next + steps] = getattr(data, name)
        self._next = (self._next + steps) % rows
        self._stored = min(self._stored + steps, rows)

    def _allocate(self, rows: int, like: dict[str, Tensor]) -> None:
        kinds = {
            name: self._dtype if self._dtype and value.is_floating_point() else value.dtype
            for name, value in like.items()
        }
        shapes = {name: (rows, *value.shape[1:]) for name, value in like.items()}
        needed = sum(math.prod(shapes[name]) * kinds[name].itemsize for name in _FIELDS)
        free = memory.available(self._device)
        if free is not None and needed > free:
            fits = int(self.capacity * free / needed)
            raise MemoryError(
                f"replay_capacity: {self.capacity:,} steps take {needed / 2**30:.3g} GiB, and "
                f"{free / 2**30:.3g} GiB are free; choose fewer than {fits:,} steps"
            )
        self._ring = {
            name: torch.zeros(shapes[name], dtype=kinds[name], device=self._device)
            for name in _FIELDS
        }

    def sample(self, count: int, steps: int, seed: int) -> Segment:
        """`count` stretches of `steps` steps, (steps, count), uniform over slots and starts.

        Fewer steps, if fewer are stored.

        :param seed: all that the choice depends on, besides what is stored.
        """
        rng = np.random.Generator(np.random.Philox(seed))
        rows, slots = self._ring["reward"].shape
        steps = min(steps, self._stored)
        oldest = (self._next - self._stored) % rows
        first = rng.integers(self._stored - steps + 1, size=count)
        at = (oldest + first + np.arange(steps)[:, np.newaxis]) % rows
        # One index into rows of all slots, because torch is slow to look up two at a time.
        flat = torch.from_numpy((at * slots + rng.integers(slots, size=count)).ravel())
        flat = flat.to(self._device)
        return Segment(
            **{
                name: ring.flatten(0, 1).index_select(0, flat).reshape(-1, count, *ring.shape[2:])
                for name, ring in self._ring.items()
            }
        )

    def state_dict(self) -> dict[str, Any]:
        # The first rows are those that have been written, until all have.
        filled = {name: ring[: self._stored] for name, ring in self._ring.items()}
        rows = len(self._ring["reward"]) if self._ring else 0
        return {"ring": filled, "rows": rows, "next": self._next, "stored": self._stored}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next, self._stored = state["next"], state["stored"]
        self._ring = {}
        if state["rows"]:
            self._allocate(state["rows"], state["ring"])
        for name, filled in state["ring"].items():
            self._ring[name][: len(filled)] = filled


def joined(left: Segment, right: Segment) -> Segment:
    """Two segments of the same number of steps side by side."""
    return Segment(
        **{name: torch.cat([getattr(left, name), getattr(right, name)], 1) for name in _FIELDS}
    )
