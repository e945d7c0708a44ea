"""A crew: whatever holds the blocks of a model and lets them exchange entries of vectors."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

from inference_rl.scale_out.state_block import StateBlock

Recipe = Callable[[int], Callable[[], StateBlock]]
"""For each number, what makes that block, wherever it is called."""


class BlocksLost(Exception):
    """What holds some blocks is gone, and what was asked of them has no answer.

    :ivar numbers: which; none if nobody knows.
    """

    def __init__(self, numbers: Sequence[int], why: str) -> None:
        super().__init__(why)
        self.numbers = tuple(numbers)


class Crew(abc.ABC):
    """Blocks 0, ..., count - 1, each somewhere, once `replace` has made them.

    :ivar count: how many. :ivar routes: for each block, the numbers of those that it sends to.

    What the model's own code raises in a block is raised here.
    """

    count: int
    routes: list[list[int]]

    @abc.abstractmethod
    def ask(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of every block with its own arguments; the answers in order.

        :raises BlocksLost: there will be no answer.
        """

    @abc.abstractmethod
    def exchange(self, send: str, arguments: Sequence[tuple[Any, ...]], receive: str) -> list[Any]:
        """`send` of every block, with its own arguments, and then `receive` with what the others
        sent it, by their numbers; the answers in order.

        :raises BlocksLost: there will be no answer.
        """

    @abc.abstractmethod
    def replace(self, numbers: Sequence[int]) -> None:
        """Make these blocks, anew and elsewhere if need be.

        :raises BlocksLost: one of them is lost again. :raises WorkersLost: there is no room.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of all blocks."""
