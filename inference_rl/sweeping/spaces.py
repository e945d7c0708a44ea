"""What is searched: the spaces that a routine declares, narrowed and checked, and as text.

`learning-rate=1e-4:1e-2:log` is an interval, `batch-size=64,128` a choice; how a space is written
is `str(space)`, of which `parse` is the inverse.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from inference_rl.search_spaces import Choice, LogUniform, Space, Uniform, declared, text_of

if TYPE_CHECKING:
    import optuna

OF_ALL = (
    "total_steps",
    "evaluate_every",
    "evaluation_episodes",
    "save_every",
    "tensorboard",
    "device",
    "policy",
    "feature_module",
)
"""Settings that all trials share: by them they are compared, or they are none of learning."""

FORMS = "expected NAME=LOW:HIGH, NAME=LOW:HIGH:log, or NAME=VALUE,VALUE,..."


def resolved(routine: Any, search: Mapping[str, Space | None]) -> dict[str, Space]:
    """What a sweep of `routine` searches, by field, in the order of the fields.

    Of what the routine declares a field is left out whose value in `routine` is not the default.

    :param search: fields to search in these spaces, whatever their value in `routine` is; or not to
        search (None).
    :raises ValueError: an unknown field, a space that does not fit it, a value that the settings
        refuse, or nothing to search.
    """
    if not hasattr(routine, "total_steps"):
        raise ValueError(
            f"{routine.name} has nothing to search: its answer is exact at any setting; give it "
            f"the temperature you mean, by inference-rl infer TARGET {routine.name} --temperature"
        )
    wanted: dict[str, Space | None] = {
        name: space
        for name, space in declared(routine).items()
        if getattr(routine, name) == _default(routine, name)
    }
    names = [field.name for field in dataclasses.fields(routine)]
    for name, space in search.items():
        if space is not None or name not in names:
            field_of(type(routine), name)
        wanted[name] = space
    spaces = {
        name: fitted(type(routine), name, space)
        for name in names
        if (space := wanted.get(name)) is not None
    }
    if not spaces:
        raise ValueError(
            "search: expected something to search, and every setting that is searched by itself "
            f"({', '.join(map(_option, declared(routine)))}) is given; leave one out, or name "
            "another by --search"
        )
    for name, space in spaces.items():
        for value in space.extremes:
            try:
                dataclasses.replace(routine, **{name: value})
            except ValueError as error:
                raise ValueError(
                    f"search: {_option(name)} is searched in {space}, of which {text_of(value)} is "
                    f"refused: {error}; narrow it by --search {_option(name)}=..., or give another "
                    "setting too"
                ) from error
    return spaces


def _default(routine: Any, name: str) -> Any:
    return next(f.default for f in dataclasses.fields(routine) if f.name == name)


def parse(text: str, settings: type) -> tuple[str, Space]:
    """The field and the space that `name=space` names.

    :raises ValueError: it names none.
    """
    name, equals, words = text.partition("=")
    if not equals or not words:
        raise ValueError(f"search: {FORMS}, got {text!r}")
    field = field_of(settings, name.strip("-").replace("-", "_"))
    return field, parse_space(words, settings, field)


def parse_space(text: str, settings: type, field: str) -> Space:
    """The space of a field that is written as `text`.

    :raises ValueError: it is none, or does not fit the field.
    """
    kinds = _kinds(settings, field)
    if ":" not in text:
        return Choice([_value(word, kinds, field) for word in text.split(",")])
    low, high, *scale = text.split(":")
    if scale not in ([], ["log"]):
        raise ValueError(f"search: {FORMS}, got {_option(field)}={text}")
    ends = [_value(word, kinds, field) for word in (low, high)]
    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
        raise ValueError(
            f"search: expected numbers as the ends of an interval, got {_option(field)}={text}"
        )
    return fitted(settings, field, (LogUniform if scale else Uniform)(*ends))


def fitted(settings: type, field: str, space: Space) -> Space:
    """`space` as one of what the field holds: whole numbers or others.

    :raises ValueError: the field holds no such thing.
    """
    if isinstance(space, Choice):
        return space
    kinds = _kinds(settings, field)
    if float in kinds:
        return type(space)(float(space.low), float(space.high))
    if int not in kinds:
        raise ValueError(f"search: {_option(field)} is no number; {FORMS}, got {space}")
    if space.low != int(space.low) or space.high != int(space.high):
        raise ValueError(
            f"search: {_option(field)} is a whole number, expected whole ends of its interval, got "
            f"{space}"
        )
    return type(space)(int(space.low), int(space.high))


def field_of(settings: type, name: str) -> str:
    """The field called `name`, if it can be searched.

    :raises ValueError: there is none, or all trials share it.
    """
    names = [f.name for f in dataclasses.fields(settings) if f.name not in OF_ALL]
    routine: Any = settings
    if name in OF_ALL:
        raise ValueError(
            f"search: {_option(name)} is the same for all trials, which are compared; give it as "
            f"--{_option(name)}"
        )
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        meant = f" (did you mean {_option(close[0])}?)" if close else ""
        raise ValueError(
            f"search: {routine.name} has no setting {_option(name)}{meant}; expected one of "
            f"{', '.join(map(_option, names))}"
        )
    return name


def suggested(trial: optuna.Trial, settings: type, spaces: Mapping[str, Space]) -> dict[str, Any]:
    """The values that a trial is to try, by field."""
    found: dict[str, Any] = {}
    for name, space in spaces.items():
        if isinstance(space, Choice):
            # As text: Optuna keeps no tuples.
            found[name] = trial.suggest_categorical(name, [text_of(v) for v in space.values])
            continue
        log = isinstance(space, LogUniform)
        if float in _kinds(settings, name):
            found[name] = trial.suggest_float(name, space.low, space.high, log=log)
        else:
            found[name] = trial.suggest_int(name, int(space.low), int(space.high), log=log)
    return suggested_values(found, spaces)


def suggested_values(kept: Mapping[str, Any], spaces: Mapping[str, Space]) -> dict[str, Any]:
    """Values as they are meant, of those that Optuna keeps; in the order of the spaces."""
    found = {name: kept[name] for name in spaces if name in kept}
    for name, value in found.items():
        if isinstance(space := spaces[name], Choice):
            found[name] = next(meant for meant in space.values if text_of(meant) == value)
    return found


def _option(name: str) -> str:
    return name.replace("_", "-")


def _kinds(settings: type, field: str) -> tuple[Any, ...]:
    hint = typing.get_type_hints(settings)[field]
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _value(word: str, kinds: tuple[Any, ...], field: str) -> Any:
    """What a word means where such kinds of values are expected.

    :raises ValueError: nothing.
    """
    word = word.strip()
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal and word in typing.get_args(kind):
            return word
        if typing.get_origin(kind) is tuple and word.replace("x", "").isdigit():
            return tuple(int(width) for width in word.split("x"))
        for meant, value in (("True", True), ("False", False), ("None", None)):
            if isinstance(value, kind if isinstance(kind, type) else ()) and word == meant:
                return value
    for number in (int, float):
        if number in kinds:
            with contextlib.suppress(ValueError):
                return number(word)
    raise ValueError(
        f"search: expected values that {_option(field)} may have, got {word!r}; see its line in "
        "--help"
    )
