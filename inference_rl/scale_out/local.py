"""Workers as processes on this machine.

Each is started anew, so that it shares nothing with this process but a socket, and ends when that
does, with whatever its environments have started: `python -m inference_rl.scale_out.local FD`.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

from inference_rl.scale_out.workers import GRACE, Worker, WorkerLost

if TYPE_CHECKING:
    from inference_rl.scale_out.shard import Shard

_ANSWER, _MOVES = b"a", b"m"
"""What a message begins with: an answer, or the number of moves so far."""

_BEAT = 0.5
"""Seconds between messages of a worker that is busy."""

_LENGTH = 8
"""Bytes before each message that say how long it is."""

_PIECE = 2**20
"""Bytes that are read at once, at most."""


class Channel:
    """Messages over a socket, to and fro, none of which need be waited for without end."""

    def __init__(self, end: socket.socket) -> None:
        self._socket, self._arrived = end, bytearray()

    def send(self, message: bytes, seconds: float | None = None) -> None:
        """Have it taken.

        :raises TimeoutError: for `seconds`, nobody took anything. :raises OSError: nobody is there.
        """
        self._socket.settimeout(seconds)
        left = memoryview(len(message).to_bytes(_LENGTH, "big") + message)
        while left:
            left = left[self._socket.send(left) :]

    def receive(self, seconds: float = math.inf) -> bytes | None:
        """The next message; None if it is not whole within `seconds`.

        :raises EOFError: there is none. :raises OSError: it was broken off.
        """
        until = time.monotonic() + seconds
        while (message := self._whole()) is None:
            left = max(until - time.monotonic(), 0.0)
            self._socket.settimeout(None if left == math.inf else left)
            try:
                piece = self._socket.recv(_PIECE)
            except (TimeoutError, BlockingIOError):
                return None
            if not piece:
                raise EOFError
            self._arrived += piece
        return message

    def _whole(self) -> bytes | None:
        """Of what has arrived, the first message."""
        end = _LENGTH + int.from_bytes(self._arrived[:_LENGTH], "big")
        if len(self._arrived) < max(end, _LENGTH):
            return None
        message = bytes(self._arrived[_LENGTH:end])
        del self._arrived[:end]
        return message

    def close(self) -> None:
        self._socket.close()


class LocalWorker(Worker):
    """A process."""

    def __init__(self, name: str) -> None:
        ours, theirs = socket.socketpair()
        self._channel, self._moves = Channel(ours), 0
        with contextlib.closing(theirs):
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",  # files of this directory must not take the place of modules
                    "-W",
                    "ignore",
                    "-m",
                    "inference_rl.scale_out.local",
                    str(theirs.fileno()),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # this process's own is for results
                start_new_session=True,  # whoever interrupts this one means this one alone
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.name = f"{name} (process {self._process.pid})"

    def send(self, request: bytes, patience: float) -> None:
        allowed = self.allowed(patience)
        try:
            self._channel.send(request, allowed)
        except TimeoutError as error:
            self.close()
            raise WorkerLost(
                f"{self.name} hangs: it took nothing of what it was asked for {allowed:g} s"
            ) from error
        except OSError as error:
            raise self._lost() from error

    def answered(self, seconds: float) -> bytes | None:
        try:
            while (message := self._channel.receive(seconds)) is not None:
                if message[:1] == _ANSWER:
                    return message[1:]
                self._moves = int(message[1:])
                seconds = 0.0
        except (OSError, EOFError) as error:
            raise self._lost() from error
        return None

    def moves(self) -> int:
        return self._moves

    def close(self) -> None:
        self._channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with what its environments have started
        self._process.wait()

    def _lost(self) -> WorkerLost:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        code = self._process.poll()
        self.close()
        how = "closed its socket" if code is None else f"died (exit code {code})"
        return WorkerLost(f"{self.name} {how}")


def serve(shard: Shard, channel: Channel) -> None:
    """Answer until the other side is gone; then close the environments, and end."""
    writing = threading.Lock()
    busy = threading.Event()

    def beat() -> None:
        while True:
            time.sleep(_BEAT)
            if busy.is_set():
                try:
                    with writing:
                        channel.send(_MOVES + str(shard.moves).encode())
                except OSError:  # nobody is left to answer, and an environment may hang
                    time.sleep(GRACE)
                    _end()

    threading.Thread(target=beat, daemon=True).start()
    try:
        while True:
            request = channel.receive()
            assert request is not None
            busy.set()
            answer = shard.answer(request)
            busy.clear()
            with writing:
                channel.send(_ANSWER + answer)
    except (EOFError, OSError):
        threading.Timer(GRACE, _end).start()
        with contextlib.suppress(Exception):  # nobody is left to hear of it
            shard.close()
        _end()


def _end() -> None:
    """End at once, for threads of libraries may outlast the interpreter, and complain; and what
    environments have started and not ended with it."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    from inference_rl.scale_out.shard import Shard

    serve(Shard(), Channel(socket.socket(fileno=int(sys.argv[1]))))
