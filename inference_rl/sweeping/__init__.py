"""Sweeps: the settings of a learned routine that fare best, over several seeds.

`sweep(model, routine, directory=...)` proposes settings (Optuna), infers with each under the same
seeds, ends those early that fare badly, and says which came to the highest return. It can be killed
at any time, and goes on where it was: `plan` is what is noted of it, `study` what Optuna keeps,
`trial` what one trial is, `workers` how several are run at once, `statistics` what seeds say, and
`results` what came of it. Optuna is imported when a sweep begins, and Ray where it is asked for.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib.util
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference_rl import runs
from inference_rl.inference import setup
from inference_rl.scale_out import Workers
from inference_rl.search_spaces import Space

if TYPE_CHECKING:
    from optuna.study import Study

    from inference_rl.environment import EnvironmentModel
    from inference_rl.priors import ActionPrior
    from inference_rl.sweeping.results import SweepResult
    from inference_rl.sweeping.trial import Task

MOST_DEATHS = 2
"""Of processes at one trial, which then has failed."""

Progress = Callable[[str], None]


def sweep(
    model: EnvironmentModel,
    routine: Any,
    *,
    directory: str | Path,
    trials: int = 20,
    seeds: int = 3,
    search: Mapping[str, Space | None] | None = None,
    prior: ActionPrior | None = None,
    seed: int = 0,
    episodes: int = 100,
    prune: bool = True,
    storage: str | None = None,
    workers: int | Workers = 1,
    progress: Progress | None = None,
) -> SweepResult:
    """Search the settings of a learned routine for those of the highest return.

    :param routine: settings that all trials share. Searched are those that the routine declares
        (`inference-rl list` names them) and that have their default value here.
    :param directory: of the sweep, which goes on if it was begun there, with the same as here.
    :param trials: settings to try. :param seeds: runs of each, with the seeds `seed`, `seed` + 1...
    :param search: spaces by field, in place of those that are declared, or besides; None leaves a
        field at its value in `routine`.
    :param episodes: of the evaluation that a run is scored by: its mean return, actions drawn, not
        discounted. A trial's score is the interquartile mean over its runs.
    :param prune: end trials whose evaluations stay below the median of those before, from the
        sixth trial on.
    :param storage: URL of Optuna's storage, in place of a database in `directory`; it is noted
        there, a password in it too. The study has the name of the directory.
    :param workers: trials at once, each in a process, or on Ray as a task of it, of which a file
        system must be shared; 1 runs them in this process. A trial whose environments take longer
        than their `patience` for a step has failed; not so in code of another language that never
        comes back to Python, as `learning.patience.Limit` says.
    :raises ValueError: a number out of range, nothing to search or a space that does not fit, a
        storage that cannot be opened, a package that is missing, or `directory` holds another
        sweep.
    :raises FileExistsError: `directory` holds a run.
    :raises OSError: `directory` cannot be written, another process is at work there, or the storage
        failed, or the Ray cluster has no processor left.
    :raises Interrupted: SIGINT or SIGTERM came.
    """
    from inference_rl.learning.checkpoints import check_same
    from inference_rl.sweeping import plan as plans
    from inference_rl.sweeping.spaces import resolved

    _check_numbers(trials=trials, seeds=seeds, episodes=episodes)
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    spaces = resolved(routine, search or {})
    _check_optuna()
    path = Path(directory)
    if any((path / name).exists() for name in (runs.MANIFEST, setup.SETUP)):
        raise FileExistsError(f"{path} holds a run; choose another directory with --out")
    from inference_rl.sweeping.study import absolute, check_free

    plan = plans.Plan(
        setup=plans.described(routine, model, prior, {"seed": seed, "episodes": episodes}),
        search={name: str(space) for name, space in spaces.items()},
        trials=trials,
        seeds=seeds,
        prune=prune,
        storage=None if storage is None else absolute(storage),
        study=path.resolve().name,
    )
    workers = _checked(workers, plan.setup)
    is_new = not (path / plans.PLAN).exists()
    with runs.held(runs.directory_for(path), plans.PATIENCE) as handle:
        from inference_rl.sweeping.trial import Task

        if not is_new:
            then, now = (
                {name: value for name, value in vars(p).items() if name != "trials"}
                for p in (plans.read(path), plan)
            )
            check_same(path / plans.PLAN, then, now)
        else:
            check_free(plan.url(path), plan.study)
        plans.write(path, plan)
        task = Task(path, plan, routine, model, prior, workers.patience)
        return _run(task, workers, handle, progress)


def resume(
    directory: str | Path,
    *,
    trials: int | None = None,
    workers: int | Workers = 1,
    progress: Progress | None = None,
) -> SweepResult:
    """Go on with the sweep in `directory`; if it is complete, say again what came of it.

    :param trials: in all, in place of the number it was begun with.
    :raises FileNotFoundError: there is none.
    :raises ValueError, OSError, Interrupted: as `sweep`; or its target or prior were made in
        Python, or are not what they were; or the storage has lost the sweep.
    """
    from inference_rl.sweeping import plan as plans

    path = Path(directory)
    plan = plans.read(path)
    _check_optuna()
    workers = _checked(workers, plan.setup)
    if trials is not None:
        _check_numbers(trials=trials)
        plan = dataclasses.replace(plan, trials=trials)
    with runs.held(path, plans.PATIENCE) as handle:
        from inference_rl.sweeping.trial import load

        task = dataclasses.replace(load(path, workers.patience), plan=plan)
        plans.write(path, plan)
        return _run(task, workers, handle, progress)


def _run(task: Task, workers: Workers, handle: int, progress: Progress | None) -> SweepResult:
    """Run the trials that are left, those first that were cut short."""
    from optuna.exceptions import OptunaError

    from inference_rl.learning.loop import Interrupted
    from inference_rl.sweeping import workers as pools
    from inference_rl.sweeping.results import gathered
    from inference_rl.sweeping.study import DEATHS, attached, fail, running
    from inference_rl.sweeping.trial import perform

    plan, directory, study = task.plan, str(task.directory.resolve()), task.open_study()
    again = collections.deque(running(study))

    def take() -> tuple[str, int, float] | None:
        if again:
            return directory, again.popleft(), task.patience
        if len(study.get_trials(deepcopy=False)) >= plan.trials:
            return None
        return directory, study.ask().number, task.patience

    call = f"{perform.__module__}:run_trial"
    if workers.on == "ray":
        pool = pools.on_ray(call, take, workers.count, workers.address)
    elif workers.count > 1:
        pool = pools.in_processes(call, take, workers.count, [handle])
    else:
        pool = pools.here(lambda _, number, *__: perform(task, study, number, progress), take)
    try:
        with _interruptible(), contextlib.closing(pool):
            for (_, number, _), outcome in pool:
                if outcome.stopped is not None:
                    raise Interrupted("a worker was asked to stop", outcome.stopped)
                if outcome.raised is not None:
                    raise OSError(f"trial {number}: {outcome.raised}")
                if outcome.died is not None:
                    trial = attached(study, number)
                    deaths = trial.user_attrs.get(DEATHS, 0) + 1
                    trial.set_user_attr(DEATHS, deaths)
                    if deaths < MOST_DEATHS:
                        again.append(number)
                    else:
                        fail(
                            study, number, f"{deaths} processes died at it, the last {outcome.died}"
                        )
                for message in outcome.value or ():
                    warnings.warn(message, stacklevel=3)
                if progress is not None:
                    progress(_words(study, plan.trials))
    except OptunaError as error:
        raise OSError(f"the storage of the sweep failed: {error}") from error
    result = gathered(plan, task.directory, study)
    result.write_table()
    return result


def _words(study: Study, trials: int) -> str:
    ended = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    scores = [t.value for t in ended if t.value is not None and t.state.name == "COMPLETE"]
    best = f", best score {max(scores):.4g}" if scores else ""
    return f"{len(ended)} of {trials} trials{best}"


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def _check_optuna() -> None:
    if importlib.util.find_spec("optuna") is None:
        raise ValueError(
            "a sweep needs the package optuna, which is not installed: run pip install "
            "'inference-rl[sweep]'"
        )


def _checked(workers: int | Workers, described: dict[str, Any]) -> Workers:
    """:raises ValueError: there are none, or they cannot do it."""
    workers = Workers(workers) if isinstance(workers, int) else workers
    _check_numbers(workers=workers.count)
    if workers.ahead:
        raise ValueError("workers: expected ahead=False in a sweep, whose trials are whole runs")
    in_python = setup.made_in_python(described)
    if in_python and (workers.on == "ray" or workers.count > 1):
        raise ValueError(
            f"workers: expected 1 with a {in_python} made in Python, which other processes cannot "
            "load; give one that has a name"
        )
    return workers


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """The first SIGINT or SIGTERM raises `Interrupted`; others wait until it has been seen to."""
    from inference_rl.learning.loop import Interrupted

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    words = "the sweep was stopped"

    def handle(number: int, frame: Any) -> None:
        if not asked:
            asked.append(number)
            raise Interrupted(words, number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt as stop:
        if asked and not isinstance(stop, Interrupted):  # as Ray makes of any signal
            raise Interrupted(words, asked[0]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
