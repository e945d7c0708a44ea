"""A limit to the time that environments of this very process may take for a step."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

TICK = 0.5
"""Seconds between looks, at most."""


class Limit:
    """Interrupts environments that take longer than `seconds` from move to move.

    A thread watches, and a signal (SIGALRM) raises `TimeoutError` in whatever Python code does not
    come to an end. Code of other languages that never comes back to Python is not interrupted: only
    workers can be replaced whatever they do. Nor is anything in threads other than the main one,
    and on systems without that signal.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._moves: Callable[[], int] | None = None
        self._over = threading.Event()
        self._is_due = False

    @contextlib.contextmanager
    def kept(self) -> Iterator[Limit]:
        """Within this context there is somebody who watches."""
        watcher = threading.Thread(target=self._watch, daemon=True)
        watcher.start()
        try:
            yield self
        finally:
            self._over.set()
            watcher.join()

    @contextlib.contextmanager
    def on(self, moves: Callable[[], int]) -> Iterator[None]:
        """Within this context the limit holds.

        :param moves: how often the environments have moved.
        :raises TimeoutError: they have not for too long.
        """
        is_main = threading.current_thread() is threading.main_thread()
        if not (is_main and hasattr(signal, "SIGALRM")):
            yield
            return
        before = signal.signal(signal.SIGALRM, self._interrupt)
        self._moves = moves
        try:
            yield
        finally:
            self._moves, self._is_due = None, False
            signal.signal(signal.SIGALRM, before)

    def _watch(self) -> None:
        seen, since = (None, -1), time.monotonic()
        while not self._over.wait(min(TICK, self._seconds / 4)):
            moves = self._moves
            now: Any = None if moves is None else (moves, moves())
            if now is None or now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > self._seconds:
                self._is_due, since = True, time.monotonic()
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    def _interrupt(self, number: int, frame: Any) -> None:
        if self._is_due:
            self._is_due = False
            raise TimeoutError(f"it was not through after {self._seconds:g} s")
