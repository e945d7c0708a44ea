"""`load_target` and `load_prior`: every form of a name, and one clear sentence for every other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch

from inference_rl import (
    EnvironmentModel,
    Exact,
    FiniteModel,
    LinearGaussianModel,
    StickyPrior,
    UniformPrior,
    infer,
    load_target,
    tabulate,
)
from inference_rl.simulate import GymnasiumModel
from inference_rl.targets import bundled, load_prior

Write = Callable[..., str]

HEADER = """
import dataclasses
import torch, pyro.distributions as dist
from gymnasium.spaces import Discrete
from inference_rl import EnvironmentModel, FiniteModel
"""
MODEL = """
class {name}(EnvironmentModel):
    state_space, action_space, discount = Discrete(2), Discrete(2), 0.5
    def initial_state(self):
        return dist.Categorical(torch.tensor([1.0, 0.0]))
    def transition(self, state, action):
        return dist.Delta(action)
    def reward(self, state, action, next_state):
        return action.double()
"""
ONE = HEADER + MODEL.format(name="One")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a model file and returns its path."""

    def write_file(text: str, name: str = "model.py") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write_file


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("FrozenLake-v1", FiniteModel),
        ("Taxi-v4", FiniteModel),
        ("CartPole-v1", GymnasiumModel),
        ("Pendulum-v1", GymnasiumModel),
        ("double-integrator", LinearGaussianModel),
        ("cliff", EnvironmentModel),
    ],
)
def test_gymnasium_ids_and_bundled_names(target: str, kind: type) -> None:
    model = load_target(target)
    assert isinstance(model, kind)
    assert model.origin == {
        "target": target,
        "discount": None,
        "env_kwargs": {},
        "directory": str(Path.cwd()),
    }


def test_every_bundled_name_loads() -> None:
    names = bundled("models")
    assert {"cliff", "grid-world", "lottery", "chain", "tree", "pendulum"} <= set(names)
    for name, found in names.items():
        assert type(load_target(name)) is found


def test_module_and_id_as_gymnasium_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lakes_of_mine.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('MyLake-v0', "
        "'gymnasium.envs.toy_text.frozen_lake:FrozenLakeEnv', kwargs={'is_slippery': False})\n"
    )
    try:
        model = load_target("lakes_of_mine:MyLake-v0")
    finally:
        gymnasium.registry.pop("MyLake-v0", None)
    assert isinstance(model, FiniteModel)
    assert (model.probabilities == 1).all()
    with pytest.raises(ValueError, match=r"could not make it .*no_such_module_of_mine"):
        load_target("no_such_module_of_mine:MyLake-v0")


def test_discount_is_the_targets_own_unless_another_is_given() -> None:
    assert load_target("FrozenLake-v1").discount == 0.99
    assert load_target("Pendulum-v1").discount == 0.99
    assert load_target("cliff").discount == 1.0
    for target in ("FrozenLake-v1", "cliff", "Pendulum-v1"):
        model = load_target(target, discount=0.5)
        assert model.discount == 0.5
        assert model.origin is not None
        assert model.origin["discount"] == 0.5
    assert load_target("cliff").discount == 1.0  # the class is as it was


@pytest.mark.parametrize("discount", [-0.1, 1.5, float("nan")])
def test_discounts_out_of_range(discount: float) -> None:
    with pytest.raises(ValueError, match=r"discount: expected a number in \[0, 1\], got"):
        load_target("cliff", discount=discount)


def test_env_kwargs_go_to_gymnasium_or_to_the_constructor(write: Write) -> None:
    lake = load_target("FrozenLake-v1", env_kwargs={"is_slippery": False})
    assert isinstance(lake, FiniteModel)
    assert (lake.probabilities == 1).all()
    assert lake.gymnasium_kwargs == {"is_slippery": False}
    assert lake.origin is not None
    assert lake.origin["env_kwargs"] == {"is_slippery": False}
    assert tabulate(load_target("chain", env_kwargs={"length": 5})).num_states == 6
    pendulum = load_target("Pendulum-v1", env_kwargs={"g": 1.0})
    assert pendulum.gymnasium_kwargs == {"g": 1.0}
    given = {"is_slippery": False}
    load_target("FrozenLake-v1", env_kwargs=given)
    assert given == {"is_slippery": False}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("FrozenLake-v1", r"FrozenLake-v1: Gymnasium could not make it with {'ice': 1}: TypeError"),
        ("cliff", r"cliff: Cliff could not be constructed with {'ice': 1}: TypeError: .*'ice'"),
    ],
)
def test_env_kwargs_that_do_not_fit(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_target(target, env_kwargs={"ice": 1})


@pytest.mark.parametrize(
    ("target", "meant"),
    [("FrozenLake-v0", "FrozenLake-v1"), ("clif", "cliff"), ("CartPole", "CartPole-v1")],
)
def test_a_typo_is_answered_by_what_may_be_meant(target: str, meant: str) -> None:
    message = (
        rf"^unknown target '{target}': expected a Gymnasium id, a bundled model \(.*cliff.*\) or a "
        rf"file path/model.py\[:Name\]; did you mean '{meant}'\?$"
    )
    with pytest.raises(ValueError, match=message):
        load_target(target)


def test_nothing_is_suggested_for_what_is_like_nothing() -> None:
    with pytest.raises(ValueError, match=r"unknown target 'xyzzy'.*\[:Name\]$"):
        load_target("xyzzy")


# ------------------------------------------------------------------ files


def test_the_only_model_of_a_file(write: Write) -> None:
    path = write(ONE)
    model = load_target(path)
    assert type(model).__name__ == model.name == "One"
    assert model.discount == 0.5
    assert model.origin is not None
    assert model.origin["target"] == path


def test_a_relative_path_and_the_home_directory(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(ONE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_target("model.py").name == "One"
    assert load_target("./model.py:One").name == "One"
    assert load_target("~/model.py").name == "One"


def test_a_name_chooses_among_several(write: Write) -> None:
    path = write(ONE + MODEL.format(name="Two"))
    assert load_target(f"{path}:Two").name == "Two"
    message = (
        r"model.py: expected one model, got several \(One, Two\); choose one, as in .*model.py:One$"
    )
    with pytest.raises(ValueError, match=message):
        load_target(path)


def test_imported_models_do_not_count(write: Write) -> None:
    path = write("from inference_rl.models.chain import Chain\n" + ONE)
    assert load_target(path).name == "One"
    assert load_target(f"{path}:Chain").name == "Chain"


def test_a_base_class_that_another_completes_does_not_count(write: Write) -> None:
    base = "\nclass Base(EnvironmentModel):\n    state_space = Discrete(2)\n"
    assert load_target(write(HEADER + base + MODEL.format(name="One"))).name == "One"


def test_two_names_of_one_model_count_once(write: Write) -> None:
    assert load_target(write(ONE + "\nAlias = One\n")).name == "One"


def test_a_model_already_made_and_a_function_that_makes_one(write: Write) -> None:
    made = HEADER + "\nlake = FiniteModel.from_tables(torch.ones(1, 2, 1), torch.ones(1, 2), {})\n"
    made = made.replace("{}", "discount=0.5")
    model = load_target(write(made))
    assert isinstance(model, FiniteModel)
    with pytest.raises(ValueError, match=r"arguments {'a': 1} were given, but it is already made"):
        load_target(write(made), env_kwargs={"a": 1})
    function = "\ndef build(size=2):\n    model = One()\n    model.size = size\n    return model\n"
    path = write(ONE + function)
    assert load_target(f"{path}:build", env_kwargs={"size": 7}).size == 7  # type: ignore[attr-defined]


def test_a_dataclass_model(write: Write) -> None:
    """Dataclasses look their module up in sys.modules while they are made."""
    text = "from __future__ import annotations\n" + HEADER + "\n@dataclasses.dataclass"
    text += MODEL.format(name="One") + "\n    slip: float = 0.1\n"
    path = write(text)
    model = load_target(path, env_kwargs={"slip": 0.25})
    assert model.slip == 0.25  # type: ignore[attr-defined]
    assert sys.modules[type(model).__module__].__file__ == str(Path(path).resolve())
    result = infer(model, Exact())
    assert float(result.objective) > 0


def test_files_of_one_name_do_not_overwrite_each_other(write: Write, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = load_target(write(ONE))
    second = load_target(write(HEADER + MODEL.format(name="Two"), "other/model.py"))
    assert (first.name, second.name) == ("One", "Two")
    assert sys.modules[type(first).__module__] is not sys.modules[type(second).__module__]


def test_a_file_may_change_between_loads(write: Write) -> None:
    load_target(write(ONE))
    assert load_target(write(ONE.replace("0.5", "0.25"))).discount == 0.25


FAULTS = {
    "no file": (None, "", r"no_such.py: no such file"),
    "no model": (HEADER, "", r"expected one model, got none; write a class Name\(Env"),
    "no such name": (ONE, ":Onne", r"it has no 'Onne'; did you mean 'One'\?"),
    "import error": (
        "import no_such_module\n",
        "",
        r"failed to import: ModuleNotFoundError: No module named 'no_such_module'",
    ),
    "syntax error": ("class One(:\n", "", r"failed to import: SyntaxError: .*line 1\)"),
    "an exit": ("raise SystemExit(3)\n", "", r"failed to import: SystemExit: 3"),
    "a fault of its own": ("1 / 0\n", "", r"failed to import: ZeroDivisionError"),
    "tables with a terminal state that pays": (
        HEADER
        + "m = FiniteModel.from_tables(torch.ones(1, 1, 1), torch.ones(1, 1), "
        + "terminal=torch.tensor([True]))\n",
        "",
        r"failed to import: ValueError: reward: state 0 is terminal, but action 0 there pays 1",
    ),
    "a missing method": (
        ONE.replace("def reward", "def rewards"),
        "",
        r"One lacks the method reward; write every abstract method of EnvironmentModel",
    ),
    "missing methods": (
        HEADER + "class One(EnvironmentModel):\n    pass\n",
        "",
        r"One lacks the methods initial_state, reward, transition; write",
    ),
    "a constructor that needs arguments": (
        ONE + "\n    def __init__(self, size):\n        pass\n",
        "",
        r"One could not be constructed with no arguments: TypeError: .*'size'",
    ),
    "no model by that name": (
        HEADER + "number = 3\n",
        ":number",
        r"expected an EnvironmentModel, got a int",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_files_that_cannot_be_loaded(case: str, write: Write, tmp_path: Path) -> None:
    text, name, message = FAULTS[case]
    path = str(tmp_path / "no_such.py") if text is None else write(text)
    before = {m for m in sys.modules if m.startswith("inference_rl_target_")}
    with pytest.raises(ValueError, match=message) as caught:
        load_target(path + name)
    assert path in str(caught.value)
    if "failed to import" in message:  # nothing half made is left behind
        assert {m for m in sys.modules if m.startswith("inference_rl_target_")} == before


# ------------------------------------------------------------------ priors

PRIORS = """
import torch, pyro.distributions as dist

class Biased:
    def __init__(self, action_space, weight=0.75):
        self.action_space, self.weight = action_space, weight
    def __call__(self, state):
        probs = torch.tensor([1 - self.weight, self.weight])
        return dist.Categorical(probs.expand(*state.shape, 2))

made = Biased(None, 0.25)

def function(state):
    return dist.Categorical(torch.tensor([0.0, 1.0]).expand(*state.shape, 2))

number = 3
"""


def chances(prior: Any, write: Write) -> list[float]:
    model = load_target(write(ONE))
    return tabulate(model, prior=prior).log_prior[0].exp().tolist()


def test_priors_of_files(write: Write) -> None:
    path = write(PRIORS, "priors.py")
    model = load_target(write(ONE))
    biased = load_prior(f"{path}:Biased", model)
    assert biased.action_space is model.action_space  # type: ignore[attr-defined]
    assert chances(biased, write) == [0.25, 0.75]
    assert chances(load_prior(f"{path}:Biased", model, {"weight": 0.5}), write) == [0.5, 0.5]
    assert chances(load_prior(f"{path}:made", model), write) == [0.75, 0.25]
    assert chances(load_prior(f"{path}:function", model), write) == [0.0, 1.0]


def test_bundled_priors(write: Write) -> None:
    model = load_target(write(ONE))
    assert {"uniform", "sticky", "mask", "categorical", "gaussian"} <= set(bundled("priors"))
    assert isinstance(load_prior("uniform", model), UniformPrior)
    sticky = load_prior("sticky", model, {"stickiness": 0.25})
    assert isinstance(sticky, StickyPrior)
    assert sticky.stickiness == 0.25
    assert chances(load_prior("mask", model, {"allowed": [True, False]}), write) == [1.0, 0.0]
    categorical = load_prior("categorical", model, {"probs": [0.25, 0.75]})
    assert chances(categorical, write) == pytest.approx([0.25, 0.75])
    gaussian = load_prior("gaussian", load_target("pendulum"), {"scale": 0.25})
    assert gaussian(torch.zeros(2, 3)).event_shape == (1,)


def test_the_policy_of_a_saved_run_as_a_prior(write: Write, tmp_path: Path) -> None:
    result = infer(load_target(write(ONE)), Exact())
    result.save(tmp_path / "run")
    prior = load_prior("policy", load_target(write(ONE)), {"policy": str(tmp_path / "run")})
    assert chances(prior, write) == pytest.approx(result.policy.probs[0].tolist())


PRIOR_FAULTS: dict[str, tuple[str, dict[str, Any] | None, str]] = {
    "unknown": ("stiky", None, r"unknown prior 'stiky': expected one of .*; did you mean 'sticky'"),
    "no name": ("priors.py", None, r"say which prior of the file: .*priors.py:Name"),
    "no such name": ("priors.py:Biassed", None, r"it has no 'Biassed'; did you mean 'Biased'\?"),
    "not callable": (
        "priors.py:number",
        None,
        r"expected a function state -> distribution, got a int",
    ),
    "arguments for no class": (
        "priors.py:function",
        {"weight": 1},
        r"arguments {'weight': 1} were given, but it is no class to construct",
    ),
    "arguments that do not fit": (
        "sticky",
        {"stickyness": 1},
        r"sticky: StickyPrior could not be constructed with .*TypeError: .*stickyness",
    ),
    "arguments that are missing": ("mask", None, r"mask: MaskPrior .* TypeError: .*allowed"),
    "arguments out of range": (
        "sticky",
        {"stickiness": 2},
        r"sticky: .*ValueError: StickyPrior: stickiness must be in \[0, 1\), got 2",
    ),
    "another space": ("gaussian", None, r"gaussian: .*expected a Box action space, got Discrete"),
    "no run": ("policy", {"policy": "/no/such/run"}, r"policy: .* no saved run in /no/such/run"),
}


@pytest.mark.parametrize("case", PRIOR_FAULTS)
def test_priors_that_cannot_be_loaded(case: str, write: Write, tmp_path: Path) -> None:
    write(PRIORS, "priors.py")
    name, kwargs, message = PRIOR_FAULTS[case]
    name = str(tmp_path / name) if name.startswith("priors.py") else name
    with pytest.raises(ValueError, match=message):
        load_prior(name, load_target(write(ONE)), kwargs)
