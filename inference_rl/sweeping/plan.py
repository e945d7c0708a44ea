"""What a sweep is, in the file `sweep.json` of its directory: all that resuming it needs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference_rl import runs
from inference_rl.inference import ROUTINES, made_of_json, routine_class, setup
from inference_rl.search_spaces import Space
from inference_rl.sweeping.spaces import parse_space

if TYPE_CHECKING:
    from inference_rl.environment import EnvironmentModel
    from inference_rl.priors import ActionPrior

AGAIN = "sweep again, into a new one"

PLAN = "sweep.json"
DATABASE = "trials.db"

PATIENCE = 5.0
"""Seconds that those who are at work on a sweep have to leave it."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sweep is.

    :ivar setup: what a run of it is, but for what is searched; see `inference.setup.described`.
    :ivar search: the spaces, as text, by field.
    :ivar trials: in all. :ivar seeds: runs of each trial; the first has the seed of the sweep.
    :ivar prune: whether trials are ended that fare badly.
    :ivar storage: URL of Optuna's storage; None for a database in the directory.
    :ivar study: the name of the sweep in it.
    """

    setup: dict[str, Any]
    search: dict[str, str]
    trials: int
    seeds: int
    prune: bool
    storage: str | None
    study: str

    @property
    def routine(self) -> Any:
        """The settings that trials share."""
        settings = made_of_json(self.setup["settings"])
        return routine_class(self.setup["routine"])(**settings)

    @property
    def spaces(self) -> dict[str, Space]:
        settings = routine_class(self.setup["routine"])
        return {name: parse_space(text, settings, name) for name, text in self.search.items()}

    @property
    def run_seeds(self) -> list[int]:
        first = int(self.setup["seed"])
        return list(range(first, first + self.seeds))

    def url(self, directory: Path) -> str:
        return self.storage or f"sqlite:///{directory.resolve() / DATABASE}"

    def load(self, directory: Path) -> tuple[EnvironmentModel, ActionPrior | None]:
        """The target and the prior, which runs their code.

        :raises ValueError: they were made in Python, or are not what they were.
        """
        from inference_rl.learning.checkpoints import check_same

        path = directory / PLAN
        if in_python := setup.made_in_python(self.setup):
            raise ValueError(
                f"{directory} was begun with a {in_python} made in Python, which a sweep does not "
                "hold; go on with it in Python, in one process, by sweep(...) with the same as "
                "before"
            )
        model, prior = setup.loaded(self.setup["origin"], path, AGAIN)
        check_same(path, self.setup, described(self.routine, model, prior, self.setup))
        return model, prior


def described(
    routine: Any, model: EnvironmentModel, prior: ActionPrior | None, then: Mapping[str, Any]
) -> dict[str, Any]:
    """What a run is now, of the seed and the episodes that it had then; JSON."""
    now = setup.described(routine, model, prior, then["seed"], episodes=then["episodes"])
    found: dict[str, Any] = json.loads(json.dumps(now, allow_nan=False))
    return found


def write(directory: Path, plan: Plan) -> None:
    """Note what the sweep in `directory` is."""
    whole = {"format_version": runs.FORMAT_VERSION} | dataclasses.asdict(plan)
    text = json.dumps(whole, indent=2, allow_nan=False)
    runs.write_durably(directory / PLAN, text.encode() + b"\n")


def read(directory: Path) -> Plan:
    """What the sweep in `directory` is.

    :raises FileNotFoundError: there is none. :raises ValueError: its file is damaged, or of another
        version.
    """
    path = directory / PLAN
    if not path.is_file():
        raise FileNotFoundError(f"no sweep in {directory}: expected the file {PLAN} there")
    try:
        told = json.loads(path.read_bytes())
        version = told.pop("format_version")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); {AGAIN}") from error
    if version != runs.FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, and this version reads {runs.FORMAT_VERSION}; "
            "install the version of inference-rl that wrote it"
        )
    try:
        plan = Plan(**told)
        if plan.setup["routine"] not in ROUTINES:
            raise ValueError(f"unknown routine {plan.setup['routine']!r}")
        plan.routine, plan.spaces, plan.run_seeds, plan.trials >= 1, plan.setup["origin"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {AGAIN}") from error
    return plan
