"""Loading a TARGET: a Gymnasium id, a bundled or installed model's name, or a file.

Model files and Gymnasium ids are code, and loading one runs it.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
from gymnasium.spaces import Discrete

from inference_rl.batch import close
from inference_rl.environment import RAISED, EnvironmentModel
from inference_rl.priors import ActionPrior
from inference_rl.simulate import GymnasiumModel
from inference_rl.toy_text import from_toy_text

GYMNASIUM_DISCOUNT = 0.99
"""Gymnasium environments carry no discount; this one is theirs unless another is given."""

FILE_MODULES = "inference_rl_target_"
"""What the names of modules that were loaded from files begin with; only this process has them."""


def load_target(
    target: str,
    *,
    discount: float | None = None,
    env_kwargs: dict[str, Any] | None = None,
    directory: str | Path = "",
) -> EnvironmentModel:
    """The model that `target` names.

    :param target: a Gymnasium id (`FrozenLake-v1`), a bundled model's name (`cliff`), or a file
        with one (`path/model.py`, or `path/model.py:Name` where it has several).
    :param discount: in place of the target's own.
    :param env_kwargs: for `gymnasium.make`, or for the constructor of the model.
    :param directory: where a file's relative path starts; the current directory if not given.
    :raises ValueError: no such target, or one that cannot be loaded; says what to do.
    """
    kwargs = dict(env_kwargs or {})
    if _is_file(target):
        found = _from_file(target, EnvironmentModel, "model", directory)
        model = _construct(found, kwargs, target)
    elif (entry := _entry_points("models").get(target)) is not None:
        model = _construct(entry.load(), kwargs, target)
    elif ":" in target or target in gymnasium.registry:  # with a colon, module:id
        model = _from_gymnasium(target, kwargs)
        kwargs = model.gymnasium_kwargs
    else:
        names = sorted(_entry_points("models")) + sorted(gymnasium.registry)
        raise ValueError(
            f"unknown target {target!r}: expected a Gymnasium id, a bundled model "
            f"({', '.join(sorted(_entry_points('models')))}) or a file path/model.py[:Name]"
            + _suggestion(target, names)
        )
    if not isinstance(model, EnvironmentModel):
        raise ValueError(f"{target}: expected an EnvironmentModel, got a {type(model).__name__}")
    if discount is not None:
        if not 0 <= discount <= 1:
            raise ValueError(f"discount: expected a number in [0, 1], got {discount}")
        model.discount = discount
    model.origin = {
        "target": target,
        "discount": discount,
        "env_kwargs": kwargs,
        "directory": str(Path(directory).resolve()),
    }
    return model


def load_prior(
    name: str,
    model: EnvironmentModel,
    kwargs: dict[str, Any] | None = None,
    *,
    directory: str | Path = "",
) -> ActionPrior:
    """The action prior that `name` names, for `model`.

    :param name: a bundled prior (`sticky`) or `file.py:Name`, where Name is a prior, a function
        `state -> distribution`, or a class.
    :param kwargs: for the constructor of a class. A parameter `action_space` is filled in; `priors`
        and `base` may name priors.
    :param directory: where a file's relative path starts; the current directory if not given.
    :raises ValueError: no such prior, or arguments that do not fit it.
    """
    kwargs = dict(kwargs or {})
    prior: Any
    if _is_file(name):
        prior = _from_file(name, None, "prior", directory)
    elif (entry := _entry_points("priors").get(name)) is not None:
        prior = entry.load()
    else:
        names = sorted(_entry_points("priors"))
        raise ValueError(
            f"unknown prior {name!r}: expected one of {', '.join(names)}, or file.py:Name"
            + _suggestion(name, names)
        )
    if inspect.isclass(prior):
        for part in ("priors", "base"):  # priors made of priors
            if part in kwargs:
                kwargs[part] = _load_parts(kwargs[part], model, directory)
        if "action_space" in inspect.signature(prior).parameters:
            kwargs.setdefault("action_space", model.action_space)
        prior = _construct(prior, kwargs, name)
    elif kwargs:
        raise ValueError(f"{name}: arguments {kwargs} were given, but it is no class to construct")
    if not callable(prior):
        raise ValueError(
            f"{name}: expected a function state -> distribution, got a {type(prior).__name__}"
        )
    return prior


def _load_parts(named: Any, model: EnvironmentModel, directory: str | Path) -> Any:
    if isinstance(named, list):
        return [_load_parts(part, model, directory) for part in named]
    return load_prior(named, model, directory=directory) if isinstance(named, str) else named


def bundled(group: str) -> dict[str, Any]:
    """The installed `models` or `priors`, by name."""
    return {name: entry.load() for name, entry in sorted(_entry_points(group).items())}


def _entry_points(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    return {e.name: e for e in importlib.metadata.entry_points(group=f"inference_rl.{group}")}


def _suggestion(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _is_file(target: str) -> bool:
    return target.partition(".py:")[0].endswith(".py") or ".py:" in target


def source_file(target: str, directory: str | Path = "") -> Path | None:
    """The file that a target or a prior is in; None for what is known by its name alone."""
    if not _is_file(target):
        return None
    head, found, _ = target.partition(".py:")
    return (Path(directory) / Path(f"{head}.py" if found else target).expanduser()).resolve()


def _from_gymnasium(target: str, kwargs: dict[str, Any]) -> EnvironmentModel:
    try:
        environment = gymnasium.make(target, **kwargs)
    except RAISED as error:
        raise ValueError(
            f"{target}: Gymnasium could not make it with {kwargs or 'no arguments'}: "
            f"{type(error).__name__}: {error}"
        ) from error
    with_tables = hasattr(environment.unwrapped, "P") and isinstance(
        environment.observation_space, Discrete
    )
    try:
        if with_tables:
            return from_toy_text(environment, kwargs, GYMNASIUM_DISCOUNT)
        return GymnasiumModel(target, kwargs, GYMNASIUM_DISCOUNT)
    finally:
        close(environment, target)


def _construct(found: Any, kwargs: dict[str, Any], where: str) -> Any:
    if not inspect.isclass(found) and not inspect.isfunction(found):
        if kwargs:
            raise ValueError(f"{where}: arguments {kwargs} were given, but it is already made")
        return found
    missing = getattr(found, "__abstractmethods__", ())
    if missing:
        raise ValueError(
            f"{where}: {found.__name__} lacks the method{'s' * (len(missing) > 1)} "
            f"{', '.join(sorted(missing))}; write every abstract method of EnvironmentModel"
        )
    try:
        return found(**kwargs)
    except RAISED as error:
        raise ValueError(
            f"{where}: {found.__name__} could not be constructed with "
            f"{kwargs or 'no arguments'}: {type(error).__name__}: {error}"
        ) from error


def _from_file(target: str, kind: type | None, what: str, directory: str | Path) -> Any:
    """The object that `path/file.py:Name` names, or the only one of `kind` in the file."""
    name, path = target.partition(".py:")[2], source_file(target, directory)
    assert path is not None
    module = _load_module(path)
    if name:
        if not hasattr(module, name):
            public = [n for n in vars(module) if not n.startswith("_")]
            raise ValueError(f"{path}: it has no {name!r}" + _suggestion(name, public))
        return getattr(module, name)
    if kind is None:
        raise ValueError(f"{target}: say which {what} of the file: {target}:Name")
    own = {
        id(value): (name, value)
        for name, value in vars(module).items()
        if (
            inspect.isclass(value)
            and issubclass(value, kind)
            and value.__module__ == module.__name__
        )
        or isinstance(value, kind)
    }
    # A base class that others complete is none to choose; one alone is named with what it lacks.
    whole = [(name, value) for name, value in own.values() if not inspect.isabstract(value)]
    found = whole or list(own.values())
    if not found:
        raise ValueError(
            f"{path}: expected one {what}, got none; write a class Name({kind.__name__}) in it"
        )
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise ValueError(
            f"{path}: expected one {what}, got several ({names}); choose one, as in "
            f"{target}:{found[0][0]}"
        )
    return found[0][1]


def _load_module(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    name = f"{FILE_MODULES}{path.stem}_{abs(hash(str(path)))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs: dataclasses look their own module up while they are being made.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(f"{path}: it failed to import: {type(error).__name__}: {error}") from error
    return module
