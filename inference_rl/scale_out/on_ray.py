"""Workers as actors on a Ray cluster, which is given by its address or is of this machine alone."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

from inference_rl.scale_out.workers import GRACE, Worker, WorkerLost

REACHING = 10.0
"""Seconds that a cluster may take to answer at all."""


@contextlib.contextmanager
def connected(address: str | None, count: int) -> Iterator[None]:
    """Within this context Ray is there; a cluster that was not there before is gone afterwards.

    :param address: of a cluster, as `ray.init` takes it; None for that of RAY_ADDRESS, or one on
        this machine alone.
    :param count: of workers that there must be room for.
    :raises ValueError: Ray is not installed, there is no such cluster, or it is too small.
    """
    # Ray reports its use over the network, unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # it would warn of that
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of workers that were given up
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "workers: 'ray' needs Ray; pip install 'inference-rl[ray]', or give a number for "
            "processes on this machine"
        ) from error
    if ray.is_initialized():
        _check_room(count)
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is not None:
        _check_reachable(address)
    given: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        given |= {"include_dashboard": False, "num_cpus": max(count, os.cpu_count() or 1)}
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "local", **given)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        # Ray does not say so where a cluster refuses it for want of a token.
        token = "if it asks for a token, have it in ~/.ray/auth_token and set RAY_AUTH_MODE=token"
        raise ValueError(
            f"ray_address: expected the address of a Ray cluster, got {address!r}: "
            f"{' '.join(str(error).split())[:200]}{'' if address is None else f'; {token}'}"
        ) from error
    finally:  # Ray puts a handler of its own in its place
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    try:
        _check_room(count)
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes, and say so on stderr all the while."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # "auto" and the like
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACHING).close()
    except OSError as error:
        raise ValueError(
            f"ray_address: expected the address of a Ray cluster, got {address!r}, where nothing "
            f"answers ({error}); `ray start --head` prints that of the cluster it starts"
        ) from error


def _check_room(count: int) -> None:
    """:raises ValueError: the cluster is too small for `count` workers."""
    import ray

    processors = int(ray.cluster_resources().get("CPU", 0))
    if processors < count:
        raise ValueError(
            f"workers: expected a cluster with a processor for each of {count}, got one with "
            f"{processors}; ask for fewer, or add nodes to it"
        )


class RayWorker(Worker):
    """An actor, wherever Ray has room for it: one processor each."""

    def __init__(self, name: str) -> None:
        import ray

        self.name = f"{name} (Ray actor)"
        self._ray = ray
        remote: Any = ray.remote(num_cpus=1, max_restarts=0, scheduling_strategy="SPREAD")
        self._actor = remote(_Actor).options(max_concurrency=2).remote()
        self._answer: Any = None
        self._asked: Any = None
        self._moves = 0

    def send(self, request: bytes, patience: float) -> None:
        self._answer = self._actor.answer.remote(request)

    def answered(self, seconds: float) -> bytes | None:
        ray = self._ray
        try:
            ready, _ = ray.wait([self._answer], timeout=seconds)
            if not ready:
                self._ask()
                return None
            answer: bytes = ray.get(self._answer)
            return answer
        except ray.exceptions.RayError as error:
            words = str(error).strip().splitlines()[0]
            self.close()
            raise WorkerLost(f"{self.name} was lost ({type(error).__name__}: {words})") from error

    def _ask(self) -> None:
        """Look how far it is, without waiting."""
        ray = self._ray
        if self._asked is None:
            self._asked = self._actor.moves.remote()
        elif ray.wait([self._asked], timeout=0)[0]:
            self._moves, self._asked = ray.get(self._asked), None

    def moves(self) -> int:
        return self._moves

    def close(self) -> None:
        with contextlib.suppress(Exception):  # it may be gone, and its node with it
            self._ray.wait([self._actor.close.remote()], timeout=GRACE)
            self._ray.kill(self._actor)


class _Actor:
    def __init__(self) -> None:
        from inference_rl.scale_out.shard import Shard

        self._shard = Shard()

    def answer(self, request: bytes) -> bytes:
        return self._shard.answer(request)

    def moves(self) -> int:
        return self._shard.moves

    def close(self) -> None:
        self._shard.close()
