"""So many calls of a function at once: here, in local processes, or on Ray.

`take()` gives the arguments of the next call, or None while there are none; it is asked when there
is room for one, so that what is called may depend on what has come of others. What comes of a call
is an `Outcome`, as soon as it is there. The function is named "module:function", and its arguments
and its value are JSON, but for calls in this process.

No process outlives the one that started it: a worker that loses it ends at once, and when the calls
are given up, because of a signal or for another reason, those who work are asked to stop, and
killed if they do not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import wait
from typing import Any

from inference_rl.environment import RAISED
from inference_rl.scale_out.on_ray import connected
from inference_rl.scale_out.workers import STARTING, TICK, WorkersLost

GRACE = 10.0
"""Seconds in which those who are asked to stop may save."""

Arguments = tuple[Any, ...]
Take = Callable[[], Arguments | None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a call.

    :ivar value: what it returned.
    :ivar raised: what it raised instead, in words.
    :ivar died: how its process ended instead, in words.
    :ivar stopped: the number of the signal that asked its process to stop.
    """

    value: Any = None
    raised: str | None = None
    died: str | None = None
    stopped: int | None = None


Outcomes = Generator[tuple[Arguments, Outcome], None, None]


def here(function: Callable[..., Any], take: Take) -> Outcomes:
    """One call after another, in this process."""
    while (arguments := take()) is not None:
        yield arguments, Outcome(value=function(*arguments))


def in_processes(call: str, take: Take, workers: int, handles: Sequence[int] = ()) -> Outcomes:
    """`workers` calls at once, each in a process of its own, which makes one after another.

    :param handles: of open files, which the processes are to have too.
    """
    idle: list[_Worker] = []
    busy: dict[_Worker, Arguments] = {}
    try:
        while True:
            while len(busy) < workers and (arguments := take()) is not None:
                while idle and not idle[-1].give(arguments):
                    idle.pop().close()  # it died in the meantime
                if not idle:
                    idle.append(_Worker(call, handles))
                    idle[-1].give(arguments)
                busy[idle.pop()] = arguments
            if not busy:
                return
            answering = {worker.answers.fileno(): worker for worker in busy}
            for handle in wait(list(answering)):
                worker = answering[handle]  # type: ignore[index]
                arguments, outcome = busy.pop(worker), worker.outcome()
                if worker.process.poll() is None:
                    idle.append(worker)
                else:
                    worker.close()
                yield arguments, outcome
    finally:
        _stop([*idle, *busy])


class _Worker:
    """A process that makes one call after another, in a session of its own: what the terminal
    sends to stop a command reaches the command alone, which sees to the others."""

    def __init__(self, call: str, handles: Sequence[int]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, call],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
            pass_fds=tuple(handles),
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.asked, self.answers = self.process.stdin, self.process.stdout

    def give(self, arguments: Arguments) -> bool:
        """Have it make a call; False if it is dead."""
        try:
            self.asked.write(json.dumps(arguments).encode() + b"\n")
            self.asked.flush()
        except BrokenPipeError:
            return False
        return True

    def outcome(self) -> Outcome:
        """What came of the call, once there is something to read."""
        line = self.answers.readline()
        if line.endswith(b"\n"):
            return Outcome(**json.loads(line))
        code = self.process.wait()
        number = -code if code < 0 else code - 128
        if number in (signal.SIGINT, signal.SIGTERM):
            return Outcome(stopped=number)
        return Outcome(died=f"by {_signal_name(-code)}" if code < 0 else f"with code {code}")

    def close(self) -> None:
        """Once it is dead."""
        self.process.wait()
        for pipe in (self.asked, self.answers):
            with contextlib.suppress(OSError):  # what it was asked last it has not read
                pipe.close()


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            worker.process.terminate()
    until = time.monotonic() + GRACE
    for worker in workers:
        try:
            worker.process.wait(max(until - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.process.pid, signal.SIGKILL)  # with the processes it started
            worker.process.wait()
        worker.close()


def _serve(call: str) -> None:
    """Be a worker: calls come on stdin, a line each, and outcomes go to what was stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a model prints must not get between them
    calls: queue.Queue[Arguments] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            calls.put(tuple(json.loads(line)))
        os._exit(0)  # nobody wants an answer any more

    threading.Thread(target=listen, daemon=True).start()
    function = _named(call)
    while True:
        try:
            outcome = Outcome(value=function(*calls.get()))
        except KeyboardInterrupt as stop:
            os._exit(128 + getattr(stop, "signal", signal.SIGINT))
        except RAISED as error:
            outcome = Outcome(raised=_sentence(error))
        answers.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
        answers.flush()


def _named(call: str) -> Callable[..., Any]:
    module, _, name = call.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _sentence(error: BaseException) -> str:
    return " ".join([f"{type(error).__name__}:", *str(error).split()])


def _signal_name(number: int) -> str:
    """A signal by its name, which those of real time have none of."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def on_ray(call: str, take: Take, workers: int, address: str | None = None) -> Outcomes:
    """`workers` calls at once, as tasks of a Ray cluster; see `on_ray.connected`.

    Its machines must see the same files, under the same names.

    :raises WorkersLost: it has no processor left to make a call.
    """
    with connected(address, workers):
        yield from _tasks(call, take, workers)


def _tasks(call: str, take: Take, workers: int) -> Outcomes:
    import ray

    remote = ray.remote(num_cpus=1, max_retries=0)(_on_ray)
    busy: dict[Any, Arguments] = {}
    without = 0
    try:
        while True:
            while len(busy) < workers and (arguments := take()) is not None:
                busy[remote.remote(call, arguments)] = arguments
            if not busy:
                return
            while not (ended := ray.wait(list(busy), num_returns=1, timeout=TICK)[0]):
                without = 0 if ray.cluster_resources().get("CPU", 0) >= 1 else without + 1
                if without * TICK > STARTING:
                    raise WorkersLost(
                        "workers: expected a Ray cluster with processors, got one that has had "
                        f"none for {STARTING:g} s; add nodes to it, and go on with the sweep"
                    )
            arguments = busy.pop(ended[0])
            try:
                outcome = Outcome(**ray.get(ended[0]))
            except ray.exceptions.RayError as error:
                outcome = Outcome(died=f"({' '.join(str(error).split())[:200]})")
            yield arguments, outcome
    finally:
        for task in busy:
            ray.cancel(task, force=True)


def _on_ray(call: str, arguments: Arguments) -> dict[str, Any]:
    try:
        return dataclasses.asdict(Outcome(value=_named(call)(*arguments)))
    except RAISED as error:
        return dataclasses.asdict(Outcome(raised=_sentence(error)))


if __name__ == "__main__":
    _serve(sys.argv[1])
