"""The sweep in Optuna's storage: its trials, who proposes them, and when one is ended.

Akiba, Sano, Yanase, Ohta and Koyama (2019), "Optuna: a next-generation hyperparameter optimization
framework", KDD 25, arXiv:1907.10902. Bergstra, Bardenet, Bengio and Kégl (2011), "Algorithms for
hyper-parameter optimization", NIPS 24 (the tree-structured Parzen estimator).
"""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from inference_rl.randomness import derived

BUSY = 120.0
"""Seconds that a process waits while another writes to a database that is a file."""


class ByNumber(BaseSampler):
    """Optuna's own sampler, begun anew for every trial and setting from a seed of theirs.

    What it proposes is a function of the sweep's seed, the trial's number and the trials that have
    ended before, whenever and wherever it is asked: a trial that was cut short while it was
    proposed is proposed again as it was.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _of(self, trial: FrozenTrial, name: str) -> TPESampler:
        seed = derived(self.seed, f"trial/{trial.number}/{name}") % 2**32
        return TPESampler(seed=seed, multivariate=True, constant_liar=True)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._of(trial, "").infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, object]:
        return self._of(trial, "").sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> object:
        sampler = self._of(trial, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)


def open_study(url: str, name: str, *, seed: int, prune: bool, begun: bool = False) -> Study:
    """The study called `name` in the storage at `url`, made if need be.

    :param prune: end trials that are worse than the median of those before, of five at least.
    :param begun: trials of it were run, so that it is there.
    :raises ValueError: the storage cannot be opened, or the study is gone from it.
    """
    if begun and not _holds(url, name):
        raise ValueError(
            f"storage: expected the study {name!r}, of which trials were run, in {url}, got none; "
            "put the database back where it was, or sweep again, into a new directory"
        )
    return optuna.create_study(
        storage=_storage(url),
        study_name=name,
        load_if_exists=True,
        direction="maximize",
        sampler=ByNumber(seed),
        pruner=optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner(),
    )


def check_free(url: str, name: str) -> None:
    """:raises ValueError: the storage cannot be opened, or holds a study of that name."""
    if _holds(url, name):
        raise ValueError(
            f"storage: {url} holds a study called {name!r} already; choose another directory with "
            "--out, whose name the study takes"
        )


def absolute(url: str) -> str:
    """`url`, which names the same database from any directory, if that is a file."""
    kind, _, _ = url.partition(":///")
    return url if (file := _file(url)) is None else f"{kind}:///{file}"


def _file(url: str) -> Path | None:
    """The file that is the database at `url`, if it is one."""
    kind, _, path = url.partition(":///")
    is_file = kind.partition("+")[0] == "sqlite" and path and not path.startswith((":", "file:"))
    return Path(path).absolute() if is_file else None


def _holds(url: str, name: str) -> bool:
    """:raises ValueError: the storage cannot be opened."""
    file = _file(url)
    if file is not None and not Path(str(file).partition("?")[0]).exists():
        return False  # rather than making it by looking
    return name in [study.study_name for study in _storage(url).get_all_studies()]


def _storage(url: str) -> optuna.storages.RDBStorage:
    """:raises ValueError: it cannot be opened."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kwargs = {"connect_args": {"timeout": BUSY}} if url.startswith("sqlite") else {}
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs=kwargs)
    except Exception as error:  # of whichever database, or for want of its driver
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            "storage: expected a database that Optuna can open, such as sqlite:///trials.db, got "
            f"{url} ({reason})"
        ) from error


def running(study: Study) -> list[int]:
    """The numbers of the trials that have not ended."""
    frozen = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return sorted(trial.number for trial in frozen)


def attached(study: Study, number: int) -> Trial:
    """A trial that has not ended, to go on with in whichever process."""
    frozen = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    # Optuna gives no other way to go on with a trial, whose identity it keeps to itself.
    return Trial(study, next(trial._trial_id for trial in frozen if trial.number == number))


def fail(study: Study, number: int, why: str) -> None:
    """End a trial, and note why."""
    trial = attached(study, number)
    trial.set_user_attr(WHY, why)
    study.tell(trial, state=TrialState.FAIL)


RETURNS, WHY, DEATHS = "returns", "why", "deaths"
"""What is noted of a trial: the mean return of each of its runs, why it failed, and how many
processes have died at it."""
