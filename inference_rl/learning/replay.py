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
        :raises MemoryError: the ring, which is allocated with the first segment, would not fit, or
            could not be resumed from.
        """
        steps, slots = data.reward.shape
        if not self._ring:
            rows = max(self.capacity // (steps * slots), 1) * steps
            like = {name: getattr(data, name) for name in _FIELDS}
            self._check_memory(rows, like)
            self._ring = {name: self._field(rows, value) for name, value in like.items()}
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

    def _field(self, rows: int, like: Tensor) -> Tensor:
        """A field of the ring, of as many rows."""
        shape = (rows, *like.shape[1:])
        return torch.zeros(shape, dtype=self._kind(like), device=self._device)

    def _kind(self, like: Tensor) -> torch.dtype:
        return self._dtype if self._dtype and like.is_floating_point() else like.dtype

    def _check_memory(self, rows: int, like: dict[str, Tensor], *, held: int = 0) -> None:
        """:param held: bytes of the CPU's memory that are given up as the ring is filled.
        :raises MemoryError: the ring would not fit, or could not be resumed from.
        """
        sizes = [
            rows * math.prod(value.shape[1:]) * self._kind(value).itemsize
            for value in like.values()
        ]
        # To save takes no more. Whoever resumes reads all fields, and then makes those of the ring,
        # one after the other, giving up what was read: at worst the largest is there twice.
        total, largest = sum(sizes), max(sizes)
        needed = {self._device: total, "cpu": total - held}
        if self._device == "cpu":
            needed["cpu"] += largest
        for device, taken in needed.items():
            free = memory.available(device)
            if free is not None and taken > free:
                fits = int(self.capacity * free / taken)
                raise MemoryError(
                    f"replay_capacity: {self.capacity:,} steps take {taken / 2**30:.3g} GiB of the "
                    f"memory of {device}, with what it takes to resume, and {free / 2**30:.3g} GiB "
                    f"are free; choose fewer than {fits:,} steps"
                )

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
        """Go back to where `state_dict` was taken; `state` loses its ring, field by field."""
        self._next, self._stored = state["next"], state["stored"]
        self._ring, ring = {}, state["ring"]
        if ring:
            held = sum(filled.nbytes for filled in ring.values())
            self._check_memory(state["rows"], ring, held=held)
        for name in list(ring):
            filled = ring.pop(name)
            self._ring[name] = self._field(state["rows"], filled)
            self._ring[name][: len(filled)] = filled


def joined(left: Segment, right: Segment) -> Segment:
    """Two segments of the same number of steps side by side."""
    return Segment(
        **{name: torch.cat([getattr(left, name), getattr(right, name)], 1) for name in _FIELDS}
    )
