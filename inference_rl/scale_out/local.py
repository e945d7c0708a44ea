"""Workers as processes on this machine.

Each is started anew, so that it shares nothing with this process but a pipe, and ends when that
does: `python -m inference_rl.scale_out.local FD`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING

from inference_rl.scale_out.workers import Worker, WorkerLost

if TYPE_CHECKING:
    from inference_rl.scale_out.shard import Shard

_ANSWER, _MOVES = b"a", b"m"
"""What a message begins with: an answer, or the number of moves so far."""

_BEAT = 0.5
"""Seconds between messages of a worker that is busy."""

_GRACE = 2.0
"""Seconds in which a worker that is told to end does."""


class LocalWorker(Worker):
    """A process."""

    def __init__(self, name: str) -> None:
        self._connection, theirs = Pipe()
        self._moves = 0
        with contextlib.closing(theirs):
            self._process = subprocess.Popen(
                [
                    sys.executable,
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

    def send(self, request: bytes) -> None:
        try:
            self._connection.send_bytes(request)
        except OSError as error:
            raise self._lost() from error

    def answered(self, seconds: float) -> bytes | None:
        try:
            while self._connection.poll(seconds):
                message = self._connection.recv_bytes()
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
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE if self._process.poll() is None else None)
        self._process.kill()
        self._process.wait()

    def _lost(self) -> WorkerLost:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        code = self._process.poll()
        self.close()
        how = "closed its pipe" if code is None else f"died (exit code {code})"
        return WorkerLost(f"{self.name} {how}")


def serve(shard: Shard, connection: Connection) -> None:
    """Answer until the other side is gone."""
    writing = threading.Lock()
    busy = threading.Event()

    def beat() -> None:
        while True:
            time.sleep(_BEAT)
            if busy.is_set():
                try:
                    with writing:
                        connection.send_bytes(_MOVES + str(shard.moves).encode())
                except OSError:
                    os._exit(1)  # nobody is left to answer, and an environment may hang

    threading.Thread(target=beat, daemon=True).start()
    try:
        while True:
            request = connection.recv_bytes()
            busy.set()
            answer = shard.answer(request)
            busy.clear()
            with writing:
                connection.send_bytes(_ANSWER + answer)
    except (EOFError, OSError):
        os._exit(0)  # threads of libraries may outlast the interpreter, and complain


if __name__ == "__main__":
    from inference_rl.scale_out.shard import Shard

    serve(Shard(), Connection(int(sys.argv[1])))
