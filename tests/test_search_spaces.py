"""What a sweep searches: spaces declared, written, read, narrowed and refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import optuna
import pytest

from inference_rl import PCL, SAC, Exact
from inference_rl.inference import ROUTINES, routine_class
from inference_rl.search_spaces import Choice, LogUniform, Uniform, declared
from inference_rl.sweeping.spaces import parse, parse_space, resolved, suggested

LEARNED = [name for name in ROUTINES if name != "exact"]


@pytest.mark.parametrize("name", LEARNED)
def test_what_a_routine_declares_is_accepted_and_holds_its_default(name: str) -> None:
    settings = routine_class(name)
    spaces = resolved(settings(), {})
    assert spaces.keys() == declared(settings).keys()
    for field, space in spaces.items():
        default = getattr(settings(), field)
        if isinstance(space, Choice):
            assert default in space.values
        elif default != "auto":
            assert space.low <= default <= space.high
        assert parse_space(str(space), settings, field) == space


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("learning-rate=1e-4:1e-2:log", SAC, ("learning_rate", LogUniform(1e-4, 1e-2))),
        ("learning_rate=1:2", SAC, ("learning_rate", Uniform(1.0, 2.0))),
        ("batch-size=64,128", SAC, ("batch_size", Choice((64, 128)))),
        ("batch-size=16:256:log", SAC, ("batch_size", LogUniform(16, 256))),
        ("temperature=auto,0.1,1", SAC, ("temperature", Choice(("auto", 0.1, 1.0)))),
        ("hidden=64x64,256", SAC, ("hidden", Choice(((64, 64), (256,))))),
        ("learn-prior=True,False", SAC, ("learn_prior", Choice((True, False)))),
        ("max-gradient-norm=None,0.5", PCL, ("max_gradient_norm", Choice((None, 0.5)))),
        ("activation=tanh,relu", PCL, ("activation", Choice(("tanh", "relu")))),
    ],
)
def test_spaces_as_they_are_typed(text: str, settings: Any, expected: tuple[str, Any]) -> None:
    name, space = parse(text, settings)
    assert (name, space) == expected
    assert [type(end) for end in space.extremes] == [type(end) for end in expected[1].extremes]
    assert parse_space(str(space), settings, name) == space


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning-rate", r"search: expected NAME=LOW:HIGH, .* got 'learning-rate'"),
        ("learning-rate=", "search: expected NAME=LOW:HIGH"),
        ("learning-rate=1e-4:1e-2:lin", "search: expected NAME=LOW:HIGH.*1e-4:1e-2:lin"),
        ("lerning-rate=1:2", r"sac has no setting lerning-rate \(did you mean learning-rate\?\)"),
        ("learning-rate=fast:2", "search: expected values that learning-rate may have, got 'fast'"),
        ("learning-rate=2:1", "search: expected an interval of .* the lesser first, got 2.0:1.0"),
        ("learning-rate=0:1:log", "search: expected an interval of finite numbers above 0"),
        ("learning-rate=1:inf", "search: expected an interval of finite numbers"),
        ("batch-size=1.5:8", "search: expected values that batch-size may have, got '1.5'"),
        ("batch-size=64", "search: expected at least two different values, got 64"),
        ("batch-size=64,64", "search: expected at least two different values, got 64,64"),
        ("activation=gelu,tanh", "search: expected values that activation may have, got 'gelu'"),
        ("temperature=auto:1", "search: expected numbers as the ends of an interval"),
        ("total-steps=10,20", "search: total-steps is the same for all trials"),
        ("policy=1,2", "search: policy is the same for all trials"),
    ],
)
def test_what_is_mistyped_is_one_sentence(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(text, SAC)


def test_what_is_given_is_not_searched_unless_it_is_asked_for() -> None:
    assert list(resolved(SAC(), {})) == [
        "batch_size",
        "learning_rate",
        "value_learning_rate",
        "target_rate",
    ]
    given = SAC(learning_rate=0.01)
    assert "learning_rate" not in resolved(given, {})
    assert "learning_rate" not in resolved(SAC(), {"learning_rate": None})
    own = {"learning_rate": Uniform(1, 2), "updates_per_step": Choice((0.5, 1.0))}
    spaces = resolved(given, own)
    assert spaces["learning_rate"] == Uniform(1.0, 2.0)
    assert next(iter(spaces)) == "updates_per_step"  # in the order of the fields


@pytest.mark.parametrize(
    ("routine", "search", "said"),
    [
        (Exact(), {}, "exact has nothing to search: its answer is exact"),
        (SAC(), dict.fromkeys(declared(SAC)), "search: expected something to search"),
        (SAC(), {"rate": None}, "sac has no setting rate"),
        (SAC(), {"activation": Uniform(0, 1)}, "search: activation is no number"),
        (SAC(), {"batch_size": Uniform(1.5, 3)}, "expected whole ends of its interval, got 1.5:3"),
        (
            SAC(),
            {"target_rate": Uniform(0.1, 2)},
            r"of which 2.0 is refused: target_rate: .*\[0, 1",
        ),
        (
            SAC(warmup_steps=300),
            {},
            "batch-size is searched in .*, of which 512 is refused: warmup",
        ),
    ],
)
def test_what_cannot_be_searched_is_one_sentence(
    routine: Any, search: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        resolved(routine, search)


def test_a_trial_tries_what_the_settings_take() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    search = {"hidden": Choice(((4,), (8, 8))), "batch_size": LogUniform(16, 32)}
    spaces = resolved(SAC(), search)
    seen = set()
    for _ in range(20):
        values = suggested(study.ask(), SAC, spaces)
        settings = dataclasses.replace(SAC(), **values)
        assert list(values) == list(spaces)
        assert isinstance(settings.batch_size, int)
        assert 16 <= settings.batch_size <= 32
        assert 1e-4 <= settings.learning_rate <= 1e-2
        seen.add(settings.hidden)
    assert seen == {(4,), (8, 8)}
