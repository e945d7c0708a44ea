"""What a learned run was asked to do, written before it starts: all that resuming it needs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import inference_rl
from inference_rl import runs
from inference_rl.inference import (
    ROUTINES,
    InferenceResult,
    Progress,
    infer,
    made_of_json,
    routine_class,
    settings_as_json,
)

if TYPE_CHECKING:
    from inference_rl.environment import EnvironmentModel
    from inference_rl.priors import ActionPrior
    from inference_rl.scale_out import Workers

SETUP = "setup.json"


def write(
    directory: Path,
    routine: Any,
    model: EnvironmentModel,
    prior: ActionPrior | None,
    seed: int,
    *,
    episodes: int | None = None,
    ahead: bool = False,
) -> dict[str, Any]:
    """Note what a run is, or see that it is still the same.

    :param episodes: of the evaluation at its end; None leaves it at what was noted.
    :param ahead: whether workers collect a round ahead, as `Workers` says.
    :returns: what was noted; every checkpoint of the run carries it.
    :raises ValueError: `directory` holds a run of other settings, of a target or a prior that has
        changed, or by other versions; or the prior does not fit the model.
    :raises FileExistsError: it holds a run that is complete.
    """
    from inference_rl.learning.checkpoints import check_same

    if (directory / runs.MANIFEST).exists():
        raise FileExistsError(
            f"{directory} holds a run that is complete; choose another directory for this one"
        )
    now = described(routine, model, prior, seed, episodes=episodes, ahead=ahead)
    path = runs.directory_for(directory) / SETUP
    text = json.dumps(now, indent=2, allow_nan=False)
    if not path.exists():
        runs.write_durably(path, text.encode() + b"\n")
        return now
    then, now = read(directory), json.loads(text)
    if episodes is None:
        now["episodes"] = then["episodes"]
    if then.get("ahead") is (not ahead):
        with_it, without = "ahead=True (--async)", "ahead=False (no --async)"
        expected, got = (without, with_it) if ahead else (with_it, without)
        raise ValueError(
            f"workers: expected {expected}, as the run in {directory} was begun, got {got}; what "
            "is learned depends on it: give the same as before, or another directory"
        )
    check_same(path, then, now)
    return now


def described(
    routine: Any,
    model: EnvironmentModel,
    prior: ActionPrior | None,
    seed: int,
    *,
    episodes: int | None = None,
    ahead: bool = False,
) -> dict[str, Any]:
    """What a run is, JSON but for tuples: all that its bytes depend on.

    :raises ValueError: the prior does not fit the model.
    """
    from inference_rl.environment import WithPreviousAction

    if getattr(prior, "needs_previous_action", False) and not model.remembers_action:
        model = WithPreviousAction(model)
    return {
        "format_version": runs.FORMAT_VERSION,
        "version": inference_rl.__version__,
        "packages": runs.versions(),
        "routine": routine.name,
        "settings": settings_as_json(routine),
        "seed": seed,
        "model": model.name,
        "origin": model.origin,
        "prior": None if prior is None else type(prior).__name__,
        "discount": float(model.discount),
        "horizon": model.horizon,
        "state_space": str(model.state_space),
        "action_space": str(model.action_space),
        "sha256": _digests(model, prior),
        "episodes": episodes,
        "ahead": ahead,
    }


def _digests(model: EnvironmentModel, prior: ActionPrior | None) -> dict[str, str | None]:
    """SHA-256 of the files that target and prior are in, and of what the prior says."""
    from inference_rl.prior_checks import fingerprint
    from inference_rl.targets import source_file

    origin = model.origin or {}
    named = {"target_file": origin.get("target"), "prior_file": origin.get("prior", {}).get("name")}
    files = {
        name: source_file(target, origin["directory"]) if target is not None else None
        for name, target in named.items()
    }
    return {
        name: None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
    } | {"log_prior": fingerprint(prior if prior is not None else model.action_prior, model)}


def read(directory: str | Path) -> dict[str, Any]:
    """What the run in `directory` was asked to do.

    :raises FileNotFoundError: no learned run there. :raises ValueError: it is damaged.
    """
    path = Path(directory) / SETUP
    if not path.is_file():
        raise FileNotFoundError(
            f"nothing to resume in {directory}: expected the file {SETUP} of a learned run there"
        )
    try:
        setup: dict[str, Any] = json.loads(path.read_bytes())
        setup["routine"], setup["settings"].items(), setup["seed"], setup["origin"], setup["prior"]
        if not isinstance(setup["episodes"], int | None):
            raise TypeError(f"episodes: expected a number or null, got {setup['episodes']!r}")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); infer again, into a new run") from error
    return setup


def resume(
    directory: str | Path,
    *,
    progress: Progress | None = None,
    workers: int | Workers | None = None,
) -> InferenceResult:
    """Go on with the run in `directory` from its last checkpoint.

    Its target and prior are loaded again, which runs their code.

    :param workers: as of `infer`; others than the run was begun with, if need be. One that was
        begun with workers who collect ahead goes on so, by one if there is no word of any.

    :raises FileNotFoundError: no learned run there. :raises FileExistsError: it is complete.
    :raises ValueError: it was begun with parts made in Python, by other versions, its target or
        prior has changed, or it is damaged.
    """
    from inference_rl.learning.checkpoints import check_same

    setup = read(directory)
    path = Path(directory) / SETUP
    if (Path(directory) / runs.MANIFEST).exists():
        raise FileExistsError(f"{directory} is complete: there is nothing left to resume")
    check_same(path, {"version": setup.get("version")}, {"version": inference_rl.__version__})
    if setup["routine"] not in ROUTINES:
        raise ValueError(
            f"{path} is of a run of the routine {setup['routine']!r}, which this version does not "
            f"have, expected one of {', '.join(ROUTINES)}; go on with the version that began it"
        )
    try:
        routine = routine_class(setup["routine"])(**made_of_json(setup["settings"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); infer again, into a new run") from error
    if in_python := made_in_python(setup):
        who = ", workers=Workers(1, ahead=True)" if setup.get("ahead") else ""
        raise ValueError(
            f"{directory} was begun with a {in_python} made in Python, which a run does not hold; "
            "go on with it in Python, by infer(model, routine, prior=..., "
            f"seed={setup['seed']}, directory={str(directory)!r}{who}) with the same as before"
        )
    model, prior = loaded(setup["origin"], path)
    return infer(
        model,
        routine,
        prior=prior,
        seed=setup["seed"],
        progress=progress,
        directory=directory,
        workers=_ahead(workers) if setup.get("ahead") else workers,
    )


def _ahead(workers: int | Workers | None) -> Workers:
    """Who goes on with a run that was begun by workers who collect ahead."""
    from inference_rl.scale_out import Workers

    given = workers if isinstance(workers, Workers) else Workers(workers or 0)
    return dataclasses.replace(given, count=max(given.count, 1), ahead=True)


def loaded(
    origin: Any, path: Path, again: str = "infer again, into a new run"
) -> tuple[EnvironmentModel, ActionPrior | None]:
    """The target and the prior that a run names, which runs their code.

    :param path: of the file that names them. :param again: what to do if that is damaged.
    :raises ValueError: there are none such any more, or the file is damaged.
    """
    from inference_rl.targets import load_prior, load_target

    if not isinstance(origin, dict):
        raise ValueError(f"{path} is damaged (origin {origin!r}); {again}")
    named = origin.get("prior")
    try:
        model = load_target(**{name: value for name, value in origin.items() if name != "prior"})
    except TypeError as error:
        raise ValueError(f"{path} is damaged ({error}); {again}") from error
    if named is None:
        return model, None
    prior = load_prior(named["name"], model, named["kwargs"], directory=origin["directory"])
    assert model.origin is not None
    model.origin["prior"] = named
    return model, prior


def made_in_python(setup: dict[str, Any]) -> str:
    """Which part of a run only its user can make again; empty if there is none."""
    if setup["origin"] is None:
        return "model"
    if setup["prior"] is not None and "prior" not in setup["origin"]:
        return f"prior ({setup['prior']})"
    if setup["settings"].get("policy") is not None:
        return f"policy ({setup['settings']['policy']})"
    return ""
