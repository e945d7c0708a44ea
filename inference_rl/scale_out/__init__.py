"""Beyond one process: collection by workers, on this machine or on a Ray cluster.

`Workers` says who; it is no setting of a run, which comes out the same whoever collects.
"""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Workers:
    """Among whom work is divided: who steps the environments of a learned routine, holds the blocks
    of a finite model, or runs the trials of a sweep.

    Of a learned routine each has a share of the environments that are stepped side by side, and the
    policy. The run is the same to the last bit for any number of them, wherever they are, and
    whichever of them are lost: `ahead` alone changes it.

    :ivar count: how many; of a learned routine at most as many as there are environments, and 0 is
        this process itself.
    :ivar on: processes of this machine, or actors on a Ray cluster.
    :ivar address: of the cluster, as `ray.init` takes it; None for that of RAY_ADDRESS, or one of
        this machine alone.
    :ivar patience: seconds that a step of the environments may take. A worker that takes longer is
        lost, and replaced; this process stops, with an `EnvironmentFault`, unless it is in code of
        another language that never comes back to Python; see `learning.patience.Limit`.
    :ivar ahead: let them collect the next round while this process learns from the last one. The
        policy that collects is then one round older than the one that learns, no more and no less.
        For routines that learn from replay only.
    :raises ValueError: a number that is too low, or what needs workers without any.
    """

    count: int
    on: Literal["processes", "ray"] = "processes"
    address: str | None = None
    patience: float = 300.0
    ahead: bool = False

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"workers: expected 0 or more, got {self.count}")
        if self.on not in ("processes", "ray"):
            raise ValueError(f"workers: expected them on 'processes' or 'ray', got {self.on!r}")
        if self.address is not None and self.on != "ray":
            raise ValueError(
                f"address: expected none for processes of this machine, got {self.address!r}; "
                "use it with on='ray'"
            )
        if self.count == 0 and (self.ahead or self.on == "ray"):
            raise ValueError("workers: expected at least 1, to collect on Ray or ahead, got 0")
        if not self.patience > 0:
            raise ValueError(
                f"patience: expected a positive number of seconds, got {self.patience}"
            )
