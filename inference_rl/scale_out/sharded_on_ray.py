"""The blocks of a model as actors on a Ray cluster, which send one another what they need.

What a block hands out becomes one object for each block that needs it. Only references to these
pass through this process, and larger objects go from node to node without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from inference_rl.scale_out.crew import BlocksLost, Crew, Recipe
from inference_rl.scale_out.shard import check_machine, kind_of_machine
from inference_rl.scale_out.transport import packed, unpacked
from inference_rl.scale_out.workers import STARTING, TICK, WorkersLost

SILENCE = 180.0
"""Seconds for which an actor may give no sign of life, whatever it computes."""

_WATCH = "watch"
"""The group of an actor's calls that are answered beside others."""


class RayCrew(Crew):
    """One actor for each block, spread over the nodes.

    What a block computes may take as long as it will, for a model's own code is in it; but an actor
    that says nothing at all for `SILENCE` is lost, as one that died is: so is one whose code, of
    another language, keeps Python from running for so long.

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
            remote: Any = self._ray.remote  # whose types know of no groups
            actor = remote(
                max_restarts=0, scheduling_strategy="SPREAD", concurrency_groups={_WATCH: 1}
            )(_Actor)
            self.actors[number] = actor.remote()
        started = [self.actors[number].ask.remote("number") for number in numbers]
        _, waiting = self._ray.wait(started, num_returns=len(started), timeout=STARTING)
        if waiting:
            raise WorkersLost(
                f"workers: expected {self.count} actors to start within {STARTING:g} s, got "
                f"{self.count - len(waiting)}; the Ray cluster has no room for the others: give "
                "fewer workers, or a cluster of more processors"
            )
        machine = kind_of_machine()
        recipes = [(n, packed(self._recipe(n), "model and a prior")) for n in numbers]
        self._answers([self.actors[n].make.remote(n, recipe, machine) for n, recipe in recipes])

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
            return self._awaited(references)
        except failed as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, Exception) and not isinstance(cause, failed):
                raise cause from None
            why = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            raise BlocksLost(self._dead(), why) from error

    def _awaited(self, references: list[Any]) -> list[Any]:
        """:raises RayError: one has none. :raises BlocksLost: an actor is silent."""
        asked: dict[int, Any] = {}
        missed = dict.fromkeys(range(self.count), 0)
        waiting = references
        while waiting:
            # A `get` with a time limit would begin anew each time with what comes from afar.
            ready, waiting = self._ray.wait(waiting, num_returns=len(waiting), timeout=TICK)
            self._ray.get(ready)
            if waiting:
                self._listen(asked, missed)
        answers: list[Any] = self._ray.get(references)
        return answers

    def _listen(self, asked: dict[int, Any], missed: dict[int, int]) -> None:
        """Look for signs of life, which were asked for, and ask for others.

        :param missed: looks since the last sign, which go on only while this process does.
        :raises BlocksLost: there are too many.
        """
        for number, sign in asked.items():
            is_there = bool(self._ray.wait([sign], timeout=0)[0])  # if only that it is dead
            missed[number] = 0 if is_there else missed[number] + 1
        for number, count in missed.items():
            if count == 0:
                asked[number] = self._alive(number)
        if silent := [number for number, count in missed.items() if count * TICK > SILENCE]:
            raise BlocksLost(silent, f"nothing was heard of it for {SILENCE:g} s")

    def _alive(self, number: int) -> Any:
        return self.actors[number].ask.options(concurrency_group=_WATCH).remote("number")

    def _dead(self) -> list[int]:
        """Those whose actor does not answer any more, whatever it is at."""
        signs = [self._alive(number) for number in range(self.count)]
        there, _ = self._ray.wait(signs, num_returns=len(signs), timeout=SILENCE)
        return [number for number, sign in enumerate(signs) if not self._lives(sign, there)]

    def _lives(self, sign: Any, there: list[Any]) -> bool:
        if sign not in there:
            return False
        try:
            self._ray.get(sign)
        except self._ray.exceptions.RayError:
            return False
        return True


class _Actor:
    """A block, where Ray has room for it."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self._number = -1
        self._block: Any = None

    def make(self, number: int, recipe: bytes, machine: dict[str, str]) -> None:
        check_machine(machine)
        self._number = number
        self._block = unpacked(recipe)()

    def ask(self, method: str, *arguments: Any) -> Any:
        return self._number if method == "number" else getattr(self._block, method)(*arguments)

    def send(self, method: str, route: list[int], *arguments: Any) -> Any:
        parts = getattr(self._block, method)(*arguments)
        sent = tuple(parts[target] for target in route)
        return sent if len(sent) != 1 else sent[0]

    def receive(self, method: str, sources: list[int], *parts: Any) -> Any:
        return getattr(self._block, method)(dict(zip(sources, parts, strict=True)))
