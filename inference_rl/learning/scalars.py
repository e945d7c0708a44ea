"""Metrics as TensorBoard reads them: one scalar for each number of a row, in RUN/tensorboard.

They are for looking at while a run goes on; what counts is in metrics.jsonl. A run that is resumed
begins a file of its own, which takes the place of what was written after its checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DIRECTORY = "tensorboard"


def check_available() -> None:
    """:raises ValueError: the package tensorboard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"tensorboard: expected the package tensorboard, which is not installed ({error}); "
            "run pip install 'inference-rl[tensorboard]', or leave the option out"
        ) from error


@contextlib.contextmanager
def writer(run: Path, steps: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What writes a row of metrics, for a run that goes on from `steps`."""
    from torch.utils.tensorboard import SummaryWriter

    events = SummaryWriter(str(run / DIRECTORY), purge_step=steps)

    def write(row: dict[str, Any]) -> None:
        for name, value in flat(row).items():
            events.add_scalar(name, value, row["steps"])
        events.flush()

    try:
        yield write
    finally:
        events.close()


def flat(row: dict[str, Any], above: str = "") -> dict[str, float]:
    """The numbers of a row by name, as in `stochastic/mean_return`."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= flat(value, f"{above}{name}/")
        elif isinstance(value, int | float):
            found[f"{above}{name}"] = value
    return found
