"""The blocks of a model as actors on a Ray cluster, which send one another what they need.

What a block hands out becomes one object for each block that needs it. Only references to these
pass through this process, and larger objects go from node to node without it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import cloudpickle

from inference_rl.scale_out.crew import BlocksLost, Crew, Recipe, WorkersLost
from inference_rl.targets import FILE_MODULES

REACHING = 10.0
"""Seconds that a cluster may take to answer at all."""

STARTING = 180.0
"""Seconds that actors may take to start, of which importing torch is most where cores are few."""


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[int]:
    """Within this context Ray is there; gives the number of processors of the cluster.

    :param address: of the cluster, as `ray.init` takes it; None for one of this machine alone,
        which is gone afterwards. A cluster that this process is connected to already stays.
    :raises ValueError: Ray is not installed, or there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # it would warn of that
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "workers: 'ray' needs Ray; pip install 'inference-rl[ray]', or leave it out to infer "
            "in this process"
        ) from error
    if ray.is_initialized():
        yield _processors()
        return
    if address is not None:
        _check_reachable(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        quiet["include_dashboard"] = False
    try:
        ray.init(address=address or "local", **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ValueError(
            f"ray_address: expected the address of a Ray cluster, got {address!r}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    try:
        yield _processors()
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


def _processors() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


class RayCrew(Crew):
    """One actor for each block, spread over the nodes.

    :ivar actors: the actors, by number of block.
    """

    def __init__(self, recipe: Recipe, count: int) -> None:
        import ray

        self._ray, self._recipe, self.count = ray, recipe, count
        self.routes = [list(range(count))] * count
        self.actors: list[Any] = [None] * count

    def ask(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        actors = zip(self.actors, arguments, strict=True)
        return self._answers([actor.ask.remote(method, *given) for actor, given in actors])

    def exchange(self, send: str, arguments: Sequence[tuple[Any, ...]], receive: str) -> list[Any]:
        got: list[dict[int, Any]] = [{} for _ in self.actors]
        for source, (given, route) in enumerate(zip(arguments, self.routes, strict=True)):
            call = self.actors[source].send.options(num_returns=max(len(route), 1))
            sent = call.remote(send, route, *given)
            for target, part in zip(route, sent if len(route) > 1 else [sent], strict=False):
                got[target][source] = part
        return self._answers(
            [
                actor.receive.remote(receive, list(halo), *halo.values())
                for actor, halo in zip(self.actors, got, strict=True)
            ]
        )

    def replace(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._close(number)
            # Room for one processor to start, and none from then on: where nodes are lost, those
            # that are left may hold several blocks each.
            actor: Any = self._ray.remote(max_restarts=0, scheduling_strategy="SPREAD")(_Actor)
            self.actors[number] = actor.remote()
        started = [self.actors[number].ask.remote("number") for number in numbers]
        _, waiting = self._ray.wait(started, num_returns=len(started), timeout=STARTING)
        if waiting:
            raise WorkersLost(
                f"workers: expected {self.count} actors to start within {STARTING:g} s, got "
                f"{self.count - len(waiting)}; the Ray cluster has no room for the others: give "
                "fewer workers, or a cluster of more processors"
            )
        recipes = [(n, _packed(self._recipe(n))) for n in numbers]
        self._answers([self.actors[n].make.remote(n, recipe) for n, recipe in recipes])

    def close(self) -> None:
        for number in range(self.count):
            self._close(number)

    def _close(self, number: int) -> None:
        if self.actors[number] is not None:
            with contextlib.suppress(Exception):  # it may be gone, and its node with it
                self._ray.kill(self.actors[number])

    def _answers(self, references: list[Any]) -> list[Any]:
        failed = self._ray.exceptions.RayError
        try:
            answers: list[Any] = self._ray.get(references)
            return answers
        except failed as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, Exception) and not isinstance(cause, failed):
                raise cause from None
            why = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            raise BlocksLost(self._dead(), why) from error

    def _dead(self) -> list[int]:
        """Those whose actor does not answer any more; the others finish what they do first."""
        asked = [actor.ask.remote("number") for actor in self.actors]
        dead = []
        for number, reference in enumerate(asked):
            try:
                self._ray.get(reference)
            except self._ray.exceptions.RayError:
                dead.append(number)
        return dead


class _Actor:
    """A block, where Ray has room for it."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self._number = -1
        self._block: Any = None

    def make(self, number: int, recipe: bytes) -> None:
        self._number = number
        self._block = pickle.loads(recipe)()

    def ask(self, method: str, *arguments: Any) -> Any:
        return self._number if method == "number" else getattr(self._block, method)(*arguments)

    def send(self, method: str, route: list[int], *arguments: Any) -> Any:
        parts = getattr(self._block, method)(*arguments)
        sent = tuple(parts[target] for target in route)
        return sent if len(sent) != 1 else sent[0]

    def receive(self, method: str, sources: list[int], *parts: Any) -> Any:
        return getattr(self._block, method)(dict(zip(sources, parts, strict=True)))


def _packed(recipe: Any) -> bytes:
    """For another process; classes of a script or a model file, which that one cannot import,
    travel with their code.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith(FILE_MODULES):
            cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(recipe)
    except Exception as error:
        raise ValueError(
            f"workers: expected a model and a prior that can be sent to another process, got one "
            f"that holds what cannot ({type(error).__name__}: {error}); make that where it is "
            "used, or infer without workers"
        ) from error
