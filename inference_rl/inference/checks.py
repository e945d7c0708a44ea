"""Checks of the settings of learned routines; torch is not needed for them."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any


def check_temperature(settings: Any) -> None:
    """:raises ValueError: its temperature, or what goes with it, is out of range."""
    temperature, final = settings.temperature, settings.final_temperature
    targets = [settings.target_entropy, settings.target_divergence]
    if temperature == "auto":
        if final is not None:
            raise ValueError(
                "final_temperature: expected none with temperature='auto', which finds its own"
            )
        if None not in targets:
            raise ValueError("target_entropy and target_divergence: expected one of them, got both")
        return
    for name, value in (("temperature", temperature), ("final_temperature", final)):
        if value is None:
            continue
        if not (isinstance(value, int | float) and 0 <= value < math.inf):
            raise ValueError(
                f"{name}: expected a finite number >= 0 in reward units"
                + (", or 'auto'" if name == "temperature" else "")
                + f", got {value!r}"
            )
    if targets != [None, None]:
        raise ValueError(
            "target_entropy and target_divergence go with temperature='auto', got temperature "
            f"{temperature}"
        )
    _check_annealing(temperature, final)


def _check_annealing(temperature: float, final: float | None) -> None:
    if final is not None and 0 in (temperature, final):
        raise ValueError("final_temperature: annealing is geometric, expected both ends above 0")


def check_tuning(settings: Any) -> None:
    """:raises ValueError: a setting by which a temperature is tuned is out of its range."""
    check_positive(
        settings,
        "temperature_learning_rate",
        "initial_temperature",
        "least_temperature",
        "greatest_temperature",
    )
    bounds = settings.least_temperature, settings.greatest_temperature
    check_ranges(settings, initial_temperature=bounds)


def check_kinds(settings: Any) -> None:
    """:raises ValueError: a setting is not of the kind that its field says, or not finite."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        kinds = typing.get_args(hint) if union else (hint,)
        if not any(_is_of_kind(value, kind) for kind in kinds):
            expected = " or ".join(map(_kind_in_words, kinds))
            raise ValueError(f"{field.name}: expected {expected}, got {value!r}")


def _is_of_kind(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        within = typing.get_args(kind)[0]
        return isinstance(value, tuple | list) and all(_is_of_kind(v, within) for v in value)
    if kind is float:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _kind_in_words(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        words = [repr(word) for word in typing.get_args(kind)]
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    if typing.get_origin(kind) is tuple:
        return f"a tuple in which each is {_kind_in_words(typing.get_args(kind)[0])}"
    return {
        bool: "True or False",
        int: "a whole number",
        float: "a finite number",
        type(None): "None",
    }[kind]


def check_common(settings: Any) -> None:
    """:raises ValueError: a setting is of another kind than its field says, or one that all learned
    routines have is out of range."""
    check_kinds(settings)
    for name, least in (
        ("total_steps", 1),
        ("environments", 1),
        ("evaluate_every", 1),
        ("evaluation_episodes", 0),
        ("save_every", 1),
    ):
        value = getattr(settings, name)
        if value < least:
            raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r}")
    if not all(width > 0 for width in settings.hidden):
        raise ValueError(f"hidden: expected positive widths of layers, got {settings.hidden}")


def check_ranges(settings: Any, **ranges: tuple[float | None, float | None]) -> None:
    """:raises ValueError: a setting that is not None lies outside its closed range.

    None is no limit.
    """
    for name, (low, high) in ranges.items():
        if (value := getattr(settings, name)) is None:
            continue
        if not ((low is None or value >= low) and (high is None or value <= high)):
            limits = f">= {low}" if high is None else f"in [{low}, {high}]"
            raise ValueError(f"{name}: expected a number {limits}, got {value!r}")


def check_positive(settings: Any, *names: str) -> None:
    """:raises ValueError: a setting is not above 0."""
    for name in names:
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name}: expected a number > 0, got {getattr(settings, name)!r}")


def check_off_policy(settings: Any) -> None:
    """:raises ValueError: a setting that all routines with replayed transitions have is out of its
    range, or of another kind than its field says."""
    check_common(settings)
    check_ranges(
        settings,
        steps_per_round=(1, None),
        warmup_steps=(0, None),
        replay_capacity=(1, None),
        batch_size=(1, None),
        target_rate=(0, 1),
    )
    check_positive(settings, "updates_per_step", "target_rate")
    first = max(settings.warmup_steps, settings.environments * settings.steps_per_round)
    for name, least in (("warmup_steps", first), ("replay_capacity", settings.replay_capacity)):
        if least < settings.batch_size:
            raise ValueError(
                f"{name}: expected at least the {settings.batch_size} transitions of batch_size, "
                f"to draw the first update from, got {getattr(settings, name)}"
            )


def check_fixed_width(settings: Any) -> None:
    """:raises ValueError: a setting of a routine whose guide has a fixed width is out of its range,
    or of another kind than its field says."""
    if settings.temperature == "auto":
        raise ValueError(
            "temperature: expected a number, got 'auto', but a guide of fixed width has no entropy "
            "that follows the temperature; give a number, or use sac"
        )
    check_off_policy(settings)
    check_ranges(settings, temperature=(0, None), final_temperature=(0, None), samples=(2, None))
    _check_annealing(settings.temperature, settings.final_temperature)
    check_positive(settings, "learning_rate", "value_learning_rate", "width")
    if settings.final_width is not None:
        check_positive(settings, "final_width")
