"""What came of a sweep: its trials, the best of them, and the command that runs it again."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from inference_rl import runs
from inference_rl.sweeping.plan import Plan
from inference_rl.sweeping.spaces import suggested_values
from inference_rl.sweeping.statistics import LEVEL, RESAMPLES, bootstrap_interval
from inference_rl.sweeping.study import RETURNS, WHY

if TYPE_CHECKING:
    from optuna.study import Study

TABLE = "trials.csv"

State = Literal["complete", "pruned", "failed", "running"]


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """A trial.

    :ivar settings: what it tried, by field.
    :ivar score: interquartile mean of `returns`; reward units, None unless it is complete.
    :ivar interval: of the score, at the level `statistics.LEVEL`; None of a single run.
    :ivar returns: mean return of each run.
    :ivar measured: what its evaluations came to, mean returns by number, of all its runs in turn.
    :ivar why: it failed.
    """

    number: int
    state: State
    settings: dict[str, Any]
    score: float | None = None
    interval: tuple[float, float] | None = None
    returns: tuple[float, ...] = ()
    measured: dict[int, float] = dataclasses.field(default_factory=dict)
    why: str | None = None


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """What came of a sweep.

    :ivar plan: what it is. :ivar directory: where it lies. :ivar trials: by number.
    """

    plan: Plan
    directory: Path
    trials: tuple[TrialResult, ...]

    @property
    def best(self) -> TrialResult | None:
        """The complete trial of the highest score, the first of several; None if there is none."""
        complete = [trial for trial in self.trials if trial.score is not None]
        return max(complete, key=lambda trial: trial.score, default=None)  # type: ignore[return-value,arg-type]

    def of(self, state: State) -> list[TrialResult]:
        return [trial for trial in self.trials if trial.state == state]

    def command(self, trial: TrialResult, seed: int) -> str:
        """What infers the same as the trial did with that seed."""
        setup = self.plan.setup
        origin = setup["origin"]
        prior = origin.get("prior", {})
        words = ["inference-rl", "infer", origin["target"], setup["routine"]]
        for name in ("discount", "env_kwargs"):
            if origin.get(name) not in (None, {}):
                words += [f"--{name.replace('_', '-')}", _word(origin[name])]
        if prior:
            words += ["--prior", prior["name"]]
            if prior["kwargs"]:
                words += ["--prior-kwargs", _word(prior["kwargs"])]
        default = type(self.plan.routine)()
        for name, value in (setup["settings"] | trial.settings).items():
            if name in trial.settings or getattr(self.plan.routine, name) != getattr(default, name):
                words += _options(name, value)
        words += ["--episodes", str(setup["episodes"]), "--seed", str(seed)]
        return shlex.join(words)

    def summary(self) -> dict[str, Any]:
        """JSON."""
        best, setup = self.best, self.plan.setup
        first = self.plan.run_seeds[0]
        named = setup["origin"] is not None
        return {
            "target": (setup["origin"] or {}).get("target"),
            "routine": setup["routine"],
            "settings": setup["settings"],
            "search": self.plan.search,
            "seeds": self.plan.run_seeds,
            "episodes": setup["episodes"],
            "score": "interquartile mean over seeds of the mean return, actions drawn",
            "interval": {"level": LEVEL, "resamples": RESAMPLES},
            "trials": [dataclasses.asdict(trial) for trial in self.trials],
            "best": None if best is None else dataclasses.asdict(best),
            "command": self.command(best, first) if best is not None and named else None,
        }

    def write_table(self) -> Path:
        """All trials as `trials.csv`, a line each."""
        text = io.StringIO(newline="")
        names = list(self.plan.search)
        seeds = [f"return_seed_{seed}" for seed in self.plan.run_seeds]
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["trial", "state", "score", "low", "high", *names, *seeds, "why"])
        for trial in self.trials:
            tried = [trial.settings.get(name, "") for name in names]
            returns = [*trial.returns, *[""] * (len(seeds) - len(trial.returns))]
            interval = trial.interval or ("", "")
            score = "" if trial.score is None else trial.score
            start = [trial.number, trial.state, score, *interval]
            rows.writerow([*start, *tried, *returns, trial.why or ""])
        path = self.directory / TABLE
        runs.write_durably(path, text.getvalue().encode())
        return path


def gathered(plan: Plan, directory: Path, study: Study) -> SweepResult:
    """What the storage has of a sweep."""
    states: dict[str, State] = {
        "COMPLETE": "complete",
        "PRUNED": "pruned",
        "FAIL": "failed",
        "RUNNING": "running",
    }
    found = []
    for frozen in study.get_trials(deepcopy=False):
        state = states[frozen.state.name]
        returns = tuple(frozen.user_attrs.get(RETURNS, ()))
        interval = None
        if state == "complete":
            interval = bootstrap_interval(np.array(returns), seed=plan.setup["seed"])
        found.append(
            TrialResult(
                number=frozen.number,
                state=state,
                settings=suggested_values(frozen.params, plan.spaces),
                score=frozen.value if state == "complete" else None,
                interval=interval,
                returns=returns,
                measured=dict(sorted(frozen.intermediate_values.items())),
                why=frozen.user_attrs.get(WHY),
            )
        )
    return SweepResult(plan, directory, tuple(found))


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _options(name: str, value: Any) -> list[str]:
    """A setting on the command line."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    if isinstance(value, tuple | list):
        return [f"--{option}", *map(str, value)]
    return [f"--{option}", str(value)]
