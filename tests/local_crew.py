"""Blocks of a model in this process: what those on Ray are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inference_rl.scale_out.crew import Crew, Recipe
from inference_rl.scale_out.state_block import StateBlock


class LocalCrew(Crew):
    """One block after another."""

    def __init__(self, recipe: Recipe, count: int) -> None:
        self._recipe, self.count = recipe, count
        self.routes = [list(range(count))] * count
        self._blocks: dict[int, StateBlock] = {}

    def ask(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [getattr(self._blocks[b], method)(*given) for b, given in enumerate(arguments)]

    def exchange(self, send: str, arguments: Sequence[tuple[Any, ...]], receive: str) -> list[Any]:
        sent = self.ask(send, arguments)
        got: list[dict[int, Any]] = [{} for _ in sent]
        for source, (parts, route) in enumerate(zip(sent, self.routes, strict=True)):
            for target in route:
                got[target][source] = parts[target]
        return self.ask(receive, [(halo,) for halo in got])

    def replace(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._blocks[number] = self._recipe(number)()

    def close(self) -> None:
        self._blocks.clear()
