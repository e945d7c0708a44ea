"""Model and prior files of all kinds of mistakes: an answer, or one that is named, and soon.

Hypothesis puts the files together, of parts that are right but for up to three of them.
"""

from __future__ import annotations

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from inference_rl import EnvironmentModel, Exact, infer, load_target
from inference_rl.simulate import EnvironmentFault
from inference_rl.targets import load_prior
from inference_rl.testing import assert_model_valid, assert_prior_valid

NAMED = (ValueError, TypeError, EnvironmentFault)

ODD_NUMBERS = ["None", "'x'", "float('nan')", "float('inf')", "-1", "[]", "torch.tensor(0.5)", "1j"]
ODD_VALUES = ["None", "'x'", "3", "[]", "torch.tensor(0)", "self", "1 / 0", "self.missing", "{}[0]"]
ODD_SPACES = [
    "None", "3", "Discrete", "Discrete(0)", "Discrete(3, start=1)", "Discrete(10**13)", "Text(3)",
    "Box(-1, 1, (2,))", "Box(-1, 1, ())", "Box(0, 1, (2, 2))", "Box(-torch.inf, torch.inf, (1,))",
    "MultiDiscrete([2, 3])", "MultiBinary(2)", "Tuple((Discrete(2),))", "Dict({'a': Discrete(2)})",
]  # fmt: skip
ODD_DISTRIBUTIONS = [
    *ODD_VALUES, "dist.Normal(0.0, 1.0)", "dist.Normal(torch.zeros(2), 1.0).to_event(1)",
    "dist.Delta(torch.tensor(9))", "dist.Delta(torch.tensor(0.5))", "dist.Bernoulli(0.5)",
    "dist.Categorical(torch.ones(7))", "dist.Categorical(torch.tensor([0.5, 0.6, 0.7]))",
    "dist.Categorical(torch.tensor([torch.nan, 0.0, 1.0]), validate_args=False)",
    "dist.Categorical(torch.tensor([-1.0, 1.0, 1.0]), validate_args=False)",
    "dist.Categorical(torch.zeros(3), validate_args=False)",
    "dist.Categorical(logits=torch.full((3,), -torch.inf), validate_args=False)",
    "dist.Poisson(3.0)", "dist.Geometric(0.5)", "torch.distributions.Categorical(torch.ones(3))",
]  # fmt: skip
PARTS: dict[str, tuple[str, list[str]]] = {
    "top": ("", ["import no_such_module", "raise KeyError('x')", "raise SystemExit(3)", "def (",
                 "import sys; sys.exit('gone')", "x = 1 / 0", "from inference_rl import nothing"]),
    "base": ("EnvironmentModel", ["object", "3", "EnvironmentModel, dict", "type", "FiniteModel"]),
    "state_space": ("Discrete(3)", ODD_SPACES),
    "action_space": ("Discrete(2)", ODD_SPACES),
    "discount": ("0.9", ["1.0", "0.0", "0", "True", "1.5", *ODD_NUMBERS]),
    "horizon": ("None", ["3", "0", "2.5", "True", *ODD_NUMBERS]),
    "made": ("self.made = True", ["raise OSError('x')", "self.state_space = None", "del self.x",
                                  "self.initial_state = None", "self.horizon = 'soon'"]),
    "initial_state": ("dist.Categorical(torch.ones(3) / 3)", ODD_DISTRIBUTIONS),
    "transition": ("dist.Delta((state + action) % 3)", [
        *ODD_DISTRIBUTIONS, "dist.Delta(state + 9)", "dist.Delta(state - 9)",
        "dist.Delta(state * 1.0)",
        "dist.Categorical(torch.ones(*state.shape, 3) / 3)", "dist.Categorical(torch.ones(3) / 3)",
        "dist.Categorical(torch.ones(*state.shape, 9) / 9)", "dist.Delta(state[..., None])",
        "dist.Delta(torch.full_like(state, state[0, 0, 0]))", "SparseCategorical(state, action)",
        "dist.Categorical(torch.rand(*state.shape, 3))",
    ]),
    "reward": ("(next_state == 2).double()", [
        *ODD_VALUES, "next_state * torch.nan", "next_state * torch.inf", "next_state * -torch.inf",
        "torch.ones(7)", "state[..., None] * 1.0", "torch.ones(()) * 1j", "next_state",
        "state == 1", "torch.ones(state.shape, requires_grad=True)", "1e300 * next_state.double()",
    ]),
    "terminal": ("state == 2", [
        *ODD_VALUES, "True", "state >= 0", "state < 0", "state * 1.0", "torch.tensor([True])",
        "state",
    ]),
    "action_prior": ("dist.Categorical(torch.ones(*state.shape, 2) / 2)", [
        *ODD_DISTRIBUTIONS, "dist.Categorical(torch.tensor([1.0, 0.0]).expand(*state.shape, 2))",
        "dist.Categorical(torch.ones(*state.shape, 3) / 3)", "dist.Delta(state)",
    ]),
    "bottom": ("", [
        "Other = Own", "other = Own()", "Own = None", "Own = 3", "del Own", "Own = Own()",
        "Own.transition = 3", "del Own.transition", "del Own.reward", "del Own.initial_state",
        "class Second(Own): pass", "Own.name = 3", "Own.__init__ = None",
    ]),
}  # fmt: skip
METHODS = {
    "initial_state": "self",
    "transition": "self, state, action",
    "reward": "self, state, action, next_state",
    "terminal": "self, state",
    "action_prior": "self, state",
}
HEAD = """
import torch
import pyro.distributions as dist
from gymnasium.spaces import *
from inference_rl import EnvironmentModel
from inference_rl.distributions import SparseCategorical
from inference_rl.finite import FiniteModel
"""


def file_of(**parts: str) -> str:
    of = {name: good for name, (good, _) in PARTS.items()} | parts
    lines = [HEAD, of["top"], f"class Own({of['base']}):"]
    lines += [f"    {name} = {of[name]}" for name in ("state_space", "action_space")]
    lines += [f"    {name} = {of[name]}" for name in ("discount", "horizon")]
    lines += ["    def __init__(self):", f"        {of['made']}"]
    for name, arguments in METHODS.items():
        lines += [f"    def {name}({arguments}):", f"        return {of[name]}"]
    return "\n".join([*lines, of["bottom"], ""])


@st.composite
def files(draw: st.DrawFn) -> str:
    broken = draw(st.lists(st.sampled_from([*PARTS]), max_size=3, unique=True))
    return file_of(**{name: draw(st.sampled_from(PARTS[name][1])) for name in broken})


def outcome(what: Any, *given: Any) -> Any:
    """What it gives; None where that is an error with a name, which says something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return what(*given)
        except NAMED as error:
            said = str(error)
    assert len(said) > 10, said
    return None


def tried(path: Path, text: str) -> bool:
    """Whether a model came of it, and an answer of that."""
    path.write_text(text)
    model = outcome(load_target, str(path))
    if model is None:
        return False
    assert isinstance(model, EnvironmentModel)
    is_valid = outcome(assert_model_valid, model) is not None
    has_answer = outcome(infer, model, Exact(temperature=0.5)) is not None
    return is_valid and has_answer


def test_a_file_without_a_mistake_has_an_answer(tmp_path: Path) -> None:
    assert tried(tmp_path / "own.py", file_of())


QUICK = {
    "deadline": timedelta(seconds=20),
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    "database": None,
}


@pytest.mark.parametrize("reward", ["{}[0]", "None", "torch.ones(7)"])
def test_where_every_state_is_terminal_nobody_asks_for_rewards(reward: str, tmp_path: Path) -> None:
    assert tried(tmp_path / "own.py", file_of(terminal="state >= 0", reward=reward))


def test_tables_that_no_machine_holds_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(file_of(state_space="Discrete(10**13)"))
    with pytest.raises(ValueError, match=r"got 10,000,000,000,000 states .* GiB at least of \d+; "):
        infer(load_target(str(path)), Exact(temperature=0.5))
    path.write_text(file_of(base="FiniteModel"))
    with pytest.raises(TypeError, match="expected a FiniteModel with its tables, got one without"):
        infer(load_target(str(path)), Exact(temperature=0.5))


@given(text=files())
@settings(max_examples=60, **QUICK)
def test_files_of_models(text: str, tmp_path: Path) -> None:
    tried(tmp_path / "own.py", text)


@pytest.mark.slow
@given(text=files())
@settings(max_examples=3000, **QUICK)
def test_many_files_of_models(text: str, tmp_path: Path) -> None:
    tried(tmp_path / "own.py", text)


@pytest.mark.parametrize("part", PARTS)
def test_every_mistake_alone(part: str, tmp_path: Path) -> None:
    for odd in PARTS[part][1]:
        tried(tmp_path / "own.py", file_of(**{part: odd}))


@given(text=st.text(max_size=60))
@example(text="\0")
@example(text="class Own(EnvironmentModel")
@example(text="\ufeff")
@settings(max_examples=40, **QUICK)
def test_files_of_any_text(text: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert outcome(load_target, str(path)) is None
    assert outcome(load_prior, f"{path}:own", load_target("chain")) is None


@given(
    odd=st.sampled_from(PARTS["action_prior"][1]), how=st.sampled_from(["def", "class", "value"])
)
@settings(max_examples=60, **QUICK)
def test_files_of_priors(odd: str, how: str, tmp_path: Path) -> None:
    text = {
        "def": f"def own(state):\n    self = own\n    return {odd}\n",
        "class": f"class own:\n    def __call__(self, state):\n        return {odd}\n",
        "value": f"self = state = torch.arange(10)\nown = {odd}\n",
    }[how]
    path = tmp_path / "own.py"
    path.write_text(HEAD + text)
    model = load_target("chain")
    prior = outcome(load_prior, f"{path}:own", model)
    if prior is not None:
        outcome(assert_prior_valid, prior, model)
        outcome(lambda: infer(model, Exact(temperature=0.5), prior=prior))
