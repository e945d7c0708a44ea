"""Workers as the process that asks them sees them: whatever they are, they answer, or are lost."""

from __future__ import annotations

import abc
import time

TICK = 1.0
"""Seconds between looks at a worker that has not answered yet."""

STARTING = 180.0
"""Seconds that a worker may take until it does anything."""


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
    def send(self, request: bytes) -> None:
        """Ask. :raises WorkerLost: it is."""

    @abc.abstractmethod
    def answered(self, seconds: float) -> bytes | None:
        """The answer; None if it has not come within `seconds`. :raises WorkerLost: none will."""

    @abc.abstractmethod
    def moves(self) -> int:
        """How often its environments have moved, so far as is known."""

    @abc.abstractmethod
    def close(self) -> None:
        """End it, whatever it is doing, and what it holds."""

    def receive(self, patience: float) -> bytes:
        """The answer, for which the environments may take `patience` seconds from move to move.

        :raises WorkerLost: none will come.
        """
        moves, since = self.moves(), time.monotonic()
        while (answer := self.answered(TICK)) is None:
            if (now := self.moves()) != moves:
                moves, since = now, time.monotonic()
            allowed = patience if moves else max(patience, STARTING)
            if time.monotonic() - since > allowed:
                self.close()
                raise WorkerLost(
                    f"{self.name} hangs: its environments were not through a step after "
                    f"{allowed:g} s"
                    if moves
                    else f"{self.name} did not start within {allowed:g} s"
                )
        return answer
