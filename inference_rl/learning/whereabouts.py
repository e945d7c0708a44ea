"""Where the slots of a batch are: the episode of each, and what was done in it.

It is all that is needed to go on, for an episode is a function of its number and of its actions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Episode:
    """A finished episode: its number, the sum of its rewards, and its length."""

    number: int
    total: float
    length: int


class Whereabouts:
    """Where N slots are.

    :param first: (N,), the numbers of the episodes that they begin with.
    :ivar episode, step, total: (N,), of the episode that goes on in each slot: its number, the
        steps taken in it, and the sum of its rewards.
    :ivar taken: actions of all slots, step by step: those of a slot's episode are its rows of the
        last `step[slot]`.
    :ivar state: (N, ...); None where no episode goes on.
    :ivar finished: episodes that ended since this was last emptied. Those of one collection are in
        the order of their numbers, which does not depend on who collected them.
    """

    def __init__(self, first: np.ndarray) -> None:
        self.episode = first.copy()
        self.step = np.zeros(len(first), dtype=np.int64)
        self.total = np.zeros(len(first))
        self.taken: list[Tensor] = []
        self.state: Tensor | None = None
        self.finished: list[Episode] = []
        self.mark()

    def mark(self) -> None:
        """Remember where every slot is, should what is collected from here on be lost."""
        del self.taken[: len(self.taken) - self.step.max()]
        self._marked = self._now()

    def _now(self) -> dict[str, Any]:
        return {
            "episode": self.episode.copy(),
            "step": self.step.copy(),
            "total": self.total.copy(),
            "taken": len(self.taken),
            "finished": len(self.finished),
            "state": self.state,
        }

    def sort(self) -> None:
        """Put what has ended since the mark in order."""
        known = self._marked["finished"]
        self.finished[known:] = sorted(self.finished[known:], key=lambda episode: episode.number)

    def state_dict(self, *, before: bool = False) -> dict[str, Any]:
        """All of it.

        :param before: as it was marked, before a collection that failed.
        """
        if not before:
            self.mark()
        return self._written(self._marked)

    def of(self, slots: slice) -> dict[str, Any]:
        """What `load_state_dict` of whoever has `slots` alone needs to go on from here."""
        whole = self._written(self._now())
        for name in ("episode", "total", "actions", "state"):
            whole[name] = None if whole[name] is None else whole[name][slots]
        return whole | {"finished": []}

    def _written(self, at: dict[str, Any]) -> dict[str, Any]:
        taken = self.taken[: at["taken"]]
        return {
            "episode": torch.from_numpy(at["episode"]),
            "total": torch.from_numpy(at["total"]),
            "actions": [
                torch.stack([action[slot] for action in taken[-steps:]]) if steps else None
                for slot, steps in enumerate(at["step"].tolist())
            ],
            "finished": [dataclasses.astuple(e) for e in self.finished[: at["finished"]]],
            "state": at["state"],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken."""
        self.episode[:] = state["episode"].numpy()
        self.finished = [Episode(*episode) for episode in state["finished"]]
        self.step[:] = [0 if taken is None else len(taken) for taken in state["actions"]]
        self.total[:] = state["total"].numpy()
        self.taken = _side_by_side(state["actions"])
        self.state = state["state"]
        self.mark()


def _side_by_side(actions: Sequence[Tensor | None]) -> list[Tensor]:
    """The actions of every slot, aligned at their ends; zeros where a slot had not begun."""
    longest = max((len(taken) for taken in actions if taken is not None), default=0)
    if longest == 0:
        return []
    some = next(taken for taken in actions if taken is not None)
    whole = some.new_zeros((longest, len(actions), *some.shape[1:]))
    for slot, taken in enumerate(actions):
        if taken is not None:
            whole[longest - len(taken) :, slot] = taken
    return list(whole)
