"""One trial: the same settings under each of the sweep's seeds, and what that comes to.

Each run lies in a directory of its own, as `inference-rl infer` makes it, and goes on from its last
checkpoint there; the checkpoints of runs that are over are removed. What a run comes to is the mean
return of its last policy, whose actions are drawn, over the episodes that `infer` evaluates it on;
what the trial comes to is the interquartile mean of that over seeds.

A trial is measured at every evaluation of its runs, one run after another, and may be ended there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.exceptions import OptunaError
from optuna.trial import Trial, TrialState

from inference_rl import runs
from inference_rl.environment import RAISED
from inference_rl.inference import infer, settings_as_json, setup
from inference_rl.learning.checkpoints import check_same
from inference_rl.learning.loop import Observer
from inference_rl.scale_out import Workers
from inference_rl.simulate import EnvironmentFault
from inference_rl.sweeping import plan as plans
from inference_rl.sweeping.plan import Plan
from inference_rl.sweeping.spaces import suggested
from inference_rl.sweeping.statistics import interquartile_mean
from inference_rl.sweeping.study import RETURNS, attached, fail, open_study

if TYPE_CHECKING:
    from optuna.study import Study

    from inference_rl.environment import EnvironmentModel
    from inference_rl.priors import ActionPrior


TRIALS = "trials"


class _Pruned(Exception):
    """The trial fares badly."""


class _Watch(Observer):
    """Measures a trial by the evaluations of one of its runs, the one of number `index`."""

    def __init__(
        self,
        trial: Trial,
        settings: Any,
        index: int,
        seeds: int,
        progress: Callable[[str], None] | None,
    ) -> None:
        self.trial, self.progress = trial, progress
        self.every, self.total = settings.evaluate_every, settings.total_steps
        evaluations = -(-self.total // self.every)
        self.first, self.last = index * evaluations, seeds * evaluations
        self.measured = set(
            trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        )
        self.words = f"trial {trial.number}, run {index + 1} of {seeds}"

    def __call__(self, words: str) -> None:
        if self.progress is not None:
            self.progress(f"{self.words}: {words}")

    def evaluated(self, row: dict[str, Any]) -> None:
        if "stochastic" not in row:
            return
        # Rounds are of different lengths in different trials: an evaluation counts as the one that
        # was due, and a run's last one as the last.
        is_last = row["steps"] >= self.total
        due = -(-self.total // self.every) if is_last else row["steps"] // self.every
        number = self.first + due
        if number not in self.measured:
            self.measured.add(number)
            self.trial.report(row["stochastic"]["mean_return"], number)
        # After its last measurement nothing is saved by ending it.
        if number < self.last and self.trial.should_prune():
            raise _Pruned


@dataclasses.dataclass(frozen=True)
class Task:
    """What all trials of the sweep in a directory share.

    :ivar routine: its settings but for what is searched. :ivar prior: in place of the model's own.
    :ivar patience: seconds that a step of the environments may take, before the trial fails.
    """

    directory: Path
    plan: Plan
    routine: Any
    model: EnvironmentModel
    prior: ActionPrior | None
    patience: float

    def open_study(self) -> Study:
        plan = self.plan
        url = plan.url(self.directory)
        return open_study(
            url,
            plan.study,
            seed=plan.setup["seed"],
            prune=plan.prune,
            begun=(self.directory / TRIALS).exists(),
        )


def load(directory: Path, patience: float) -> Task:
    """The task of the sweep in `directory`, which runs the code of its target and its prior.

    :raises ValueError: target or prior were made in Python, or are not what they were.
    """
    plan = plans.read(directory)
    model, prior = plan.load(directory)
    return Task(directory, plan, plan.routine, model, prior, patience)


def run_trial(directory: str, number: int, patience: float) -> list[str]:
    """As `perform`, by a process that knows of the sweep where it lies, and nothing else."""
    task = _loaded(Path(directory), patience)
    return perform(task, task.open_study(), number)


_loaded = functools.cache(load)


def perform(
    task: Task, study: Study, number: int, progress: Callable[[str], None] | None = None
) -> list[str]:
    """Run a trial that has not ended to its end, and note that in the storage.

    :returns: what was warned of.
    :raises OSError, OptunaError: disk or storage failed; it can be run again, as after a kill.
    """
    trial = attached(study, number)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            returns = _returns(task, trial, progress)
        except _Pruned:
            study.tell(trial, state=TrialState.PRUNED)
        except (OSError, OptunaError):
            raise
        except RAISED as error:  # a model's or a prior's code may raise anything
            known = isinstance(error, ValueError | FloatingPointError | EnvironmentFault)
            said = [] if known else [f"{type(error).__name__}:"]
            fail(study, number, " ".join([*said, *str(error).split()]))
        else:
            trial.set_user_attr(RETURNS, returns)
            study.tell(trial, interquartile_mean(np.array(returns)))
    return list(dict.fromkeys(str(warning.message) for warning in caught))


def _returns(task: Task, trial: Trial, progress: Callable[[str], None] | None) -> list[float]:
    """The mean return of each run."""
    plan = task.plan
    values = suggested(trial, type(task.routine), plan.spaces)
    settings = dataclasses.replace(task.routine, **values)
    found = []
    for index, seed in enumerate(plan.run_seeds):
        run = run_directory(task.directory, trial.number, seed)
        watch = _Watch(trial, settings, index, plan.seeds, progress)
        try:
            found.append(_mean_return(run, task, settings, seed, watch))
        except _Pruned:
            _forget_checkpoints(run)
            raise
    return found


def run_directory(directory: Path, number: int, seed: int) -> Path:
    """Where the run of that seed of a trial lies."""
    return directory / TRIALS / f"{number:04d}" / f"seed-{seed}"


def _mean_return(run: Path, task: Task, settings: Any, seed: int, watch: _Watch) -> float:
    """What a run comes to, which is run if it is not there yet.

    :raises ValueError: what is there is another run.
    """
    if not (run / runs.MANIFEST).exists():
        model, prior, episodes = task.model, task.prior, task.plan.setup["episodes"]
        setup.write(run, settings, model, prior, seed, episodes=episodes)
        here = Workers(0, patience=task.patience)
        result = infer(
            model, settings, prior=prior, seed=seed, progress=watch, directory=run, workers=here
        )
        result.metrics.append(result.evaluate(episodes, patience=task.patience).summary())
        result.save(run)
    _forget_checkpoints(run)
    saved = runs.read_manifest(run)
    asked = {"routine": settings.name, "settings": settings_as_json(settings), "seed": seed}
    then = {name: saved[name] for name in asked}
    check_same(run / runs.MANIFEST, then, json.loads(json.dumps(asked)))
    return float(saved["metrics"][-1]["mean_return"])


def _forget_checkpoints(run: Path) -> None:
    if (run / "checkpoints").exists():
        shutil.rmtree(run / "checkpoints")
