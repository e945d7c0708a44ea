"""What a learned run was asked to do, written before it starts: all that resuming it needs."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import inference_rl
from inference_rl import runs
from inference_rl.inference import (
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

SETUP = "setup.json"

SAME = ("torch", "numpy", "gymnasium", "pyro-ppl")
"""Packages whose versions the bytes of a run depend on."""


def write(
    directory: Path, routine: Any, model: EnvironmentModel, prior: ActionPrior | None, seed: int
) -> None:
    """Note what a run is, or see that it is still the same.

    :raises ValueError: `directory` holds a run of other settings, or by other versions.
    """
    now = {
        "format_version": runs.FORMAT_VERSION,
        "version": inference_rl.__version__,
        "packages": {name: importlib.metadata.version(name) for name in SAME},
        "routine": routine.name,
        "settings": settings_as_json(routine),
        "seed": seed,
        "model": model.name,
        "origin": model.origin,
        "prior": None if prior is None else type(prior).__name__,
    }
    path = runs.directory_for(directory) / SETUP
    if not path.exists():
        runs.write_durably(path, json.dumps(now, indent=2, allow_nan=False).encode() + b"\n")
        return
    then = read(directory)
    if changed := [name for name in now if then.get(name) != now[name]]:
        name = changed[0]
        raise ValueError(
            f"{directory} holds a run whose {name} is {then.get(name)!r}, and this one's is "
            f"{now[name]!r}: a run is resumed as it was begun; start another in a new directory"
        )


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
        setup["routine"], setup["settings"].items(), setup["seed"], setup["origin"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); infer again, into a new run") from error
    return setup


def resume(directory: str | Path, *, progress: Progress | None = None) -> InferenceResult:
    """Go on with the run in `directory` from its last checkpoint.

    Its target and prior are loaded again, which runs their code.

    :raises FileNotFoundError: no learned run there. :raises FileExistsError: it is complete.
    :raises ValueError: it was begun on a model made in Python, or by other versions.
    """
    from inference_rl.targets import load_prior, load_target

    setup = read(directory)
    if (Path(directory) / runs.MANIFEST).exists():
        raise FileExistsError(f"{directory} is complete: there is nothing left to resume")
    if setup["origin"] is None:
        raise ValueError(
            f"{directory} was begun on a model made in Python; go on with it by "
            "infer(model, routine, seed=..., directory=...) as before"
        )
    origin = dict(setup["origin"])
    named = origin.pop("prior", None)
    model = load_target(**origin)
    prior = None
    if named is not None:
        prior = load_prior(named["name"], model, named["kwargs"], directory=origin["directory"])
        assert model.origin is not None
        model.origin["prior"] = named
    routine = routine_class(setup["routine"])(**made_of_json(setup["settings"]))
    return infer(
        model, routine, prior=prior, seed=setup["seed"], progress=progress, directory=directory
    )
