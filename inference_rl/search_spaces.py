"""What a setting may be searched over, declared beside its default: intervals and choices.

`learning_rate: float = searched(3e-4, LogUniform(1e-4, 1e-2))` in the dataclass of a routine is
what `inference-rl sweep` searches unless it is told otherwise. `str(space)` is how a space is
written on the command line, and in a sweep's directory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

METADATA = "search"


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Numbers from `low` to `high`, both included; whole ones where the setting is.

    :raises ValueError: (when made) an interval that is empty or not finite.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"search: expected an interval of finite numbers, the lesser first, got {self}"
            )

    def __str__(self) -> str:
        return f"{self.low!r}:{self.high!r}"

    @property
    def extremes(self) -> tuple[float, float]:
        return self.low, self.high


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """Numbers from `low` > 0 to `high`, both included, uniform in the logarithm.

    :raises ValueError: (when made) an interval that is empty, not finite or not above zero.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (0 < self.low < self.high < math.inf):
            raise ValueError(
                "search: expected an interval of finite numbers above 0, the lesser first, got "
                f"{self}"
            )

    def __str__(self) -> str:
        return f"{self.low!r}:{self.high!r}:log"

    @property
    def extremes(self) -> tuple[float, float]:
        return self.low, self.high


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of `values`, in no order.

    :raises ValueError: (when made) fewer than two, or one of them twice.
    """

    values: tuple[Any, ...]

    def __init__(self, values: Sequence[Any]) -> None:
        # A dataclass that is frozen has no other way to take a list for a tuple.
        object.__setattr__(self, "values", tuple(values))
        written = [text_of(value) for value in self.values]
        if len(written) < 2 or len(set(written)) < len(written):
            raise ValueError(f"search: expected at least two different values, got {self}")

    def __str__(self) -> str:
        return ",".join(map(text_of, self.values))

    @property
    def extremes(self) -> tuple[Any, ...]:
        return self.values


Space = Uniform | LogUniform | Choice


def text_of(value: Any) -> str:
    """A value as it is written in a space: widths of layers are 64x64."""
    if isinstance(value, tuple | list):
        return "x".join(map(str, value))
    return str(value)


def searched(default: Any, space: Space) -> Any:
    """The field of a settings dataclass that a sweep searches over `space` by itself."""
    return dataclasses.field(default=default, metadata={METADATA: space})


def declared(settings: Any) -> dict[str, Space]:
    """The spaces that a settings dataclass declares, by field."""
    return {
        field.name: field.metadata[METADATA]
        for field in dataclasses.fields(settings)
        if METADATA in field.metadata
    }
