"""Workers as the process that asks them sees them: whatever they are, they answer, or are lost."""

from __future__ import annotations

import abc
import time

TICK = 1.0
"""Seconds between looks at a worker that has not answered yet."""

STARTING = 180.0
"""Seconds that a worker may take until it does anything."""

GRACE = 5.0
"""Seconds in which a worker that is told to end may close its environments."""


class WorkerLost(Exception):
    """A worker died, or hangs, and what it was asked has not been answered; another may do it."""


class WorkersLost(ConnectionError):
    """Workers were lost, and could not be replaced."""


class Worker(abc.ABC):
    """Something that answers requests, one at a time, and may be lost at any moment.

    :ivar name: for messages.
    """

    name: str

    @abc.abstractmethod
    def send(self, request: bytes, patience: float) -> None:
        """Ask. :raises WorkerLost: it is, or takes nothing for as long as is `allowed`."""

    @abc.abstractmethod
    def answered(self, seconds: float) -> bytes | None:
        """The answer; None if it has not come within `seconds`. :raises WorkerLost: none will."""

    @abc.abstractmethod
    def moves(self) -> int:
        """How often its environments have moved, so far as is known."""

    @abc.abstractmethod
    def close(self) -> None:
        """End it, whatever it is doing, and what it holds: its environments first, if they let it
        within `GRACE`."""

    def allowed(self, patience: float) -> float:
        """Seconds that it may take to do anything, if its environments may take `patience`."""
        return patience if self.moves() else max(patience, STARTING)

    def receive(self, patience: float) -> bytes:
        """The answer, for which the environments may take `patience` seconds from move to move.

        :raises WorkerLost: none will come.
        """
        moves, since = self.moves(), time.monotonic()
        while (answer := self.answered(TICK)) is None:
            if (now := self.moves()) != moves:
                moves, since = now, time.monotonic()
            allowed = self.allowed(patience)
            if time.monotonic() - since > allowed:
                self.close()
                raise WorkerLost(
                    f"{self.name} hangs: its environments were not through a step after "
                    f"{allowed:g} s"
                    if moves
                    else f"{self.name} did not start within {allowed:g} s"
                )
        return answer
