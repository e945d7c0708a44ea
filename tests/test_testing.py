"""`assert_model_valid` and `assert_prior_valid`: good models pass, each fault has its sentence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, Space
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl import (
    CategoricalPrior,
    EnvironmentModel,
    FiniteModel,
    GaussianPrior,
    MaskPrior,
    MixturePrior,
    SparseCategorical,
    StickyPrior,
    UniformPrior,
    load_target,
)
from inference_rl.simulate import GymnasiumModel
from inference_rl.targets import bundled
from inference_rl.testing import assert_model_valid, assert_prior_valid

END = 2


class Walk(EnvironmentModel):
    """Three places in a row; the last one ends it."""

    state_space: Space[Any] = Discrete(3)
    action_space: Space[Any] = Discrete(2)

    def initial_state(self) -> TorchDistribution:
        return dist.Categorical(torch.tensor([1.0, 0.0, 0.0]))

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        return dist.Delta((state + 2 * action - 1).clamp(0, END))

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return (next_state == END) & (state != END)

    def terminal(self, state: Tensor) -> Tensor:
        return state == END


class Drift(EnvironmentModel):
    """A point in the plane that is pushed along one axis, with noise."""

    state_space: Space[Any] = Box(-np.inf, np.inf, (2,), np.float32)
    action_space: Space[Any] = Box(-1.0, 1.0, (1,))
    discount = 0.9

    def initial_state(self) -> TorchDistribution:
        return dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        return dist.Normal(state + 0.1 * action, 0.1).to_event(1)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return -state.square().sum(-1)


def changed(base: type[EnvironmentModel], **methods: Any) -> EnvironmentModel:
    """A model with some methods (without `self`) or attributes replaced."""
    made = {n: staticmethod(m) if callable(m) else m for n, m in methods.items()}
    return type(base.__name__, (base,), made)()


# ------------------------------------------------------------------ good ones


@pytest.mark.parametrize("name", bundled("models"))
def test_every_bundled_model_is_valid(name: str) -> None:
    assert assert_model_valid(load_target(name)) == []


@pytest.mark.parametrize("target", ["FrozenLake-v1", "Taxi-v4", "CliffWalking-v1"])
def test_toy_text_is_valid(target: str) -> None:
    assert assert_model_valid(load_target(target)) == []


def test_small_models_are_valid() -> None:
    assert assert_model_valid(Walk()) == []
    assert assert_model_valid(Drift()) == []
    assert assert_model_valid(changed(Walk, terminal=lambda s: s >= END, discount=0.5)) == []


def test_terminal_states_everywhere_are_valid() -> None:
    ended = changed(Walk, terminal=lambda s: s >= 0, reward=lambda s, a, n: torch.zeros(s.shape))
    assert assert_model_valid(ended) == []


def test_a_reward_that_is_never_paid_is_remarked_on() -> None:
    on_entry = changed(Walk, reward=lambda s, a, n: (n == END).double())
    assert assert_model_valid(on_entry) == []
    never = changed(Walk, reward=lambda s, a, n: (s == END).double())
    assert assert_model_valid(never) == [
        "state 2 is terminal, so the reward for staying there is never paid, and the step that "
        "enters it pays nothing; if it should, let reward look at next_state"
    ]


def test_a_simulator_is_valid_and_its_remarks_are_plain_text() -> None:
    remarks = assert_model_valid(GymnasiumModel("Pendulum-v1"))
    assert remarks[-1] == (
        "it is a simulator: its dynamics can be sampled, but not inferred exactly"
    )
    assert remarks[0].startswith("For Box action spaces")
    assert remarks[0].endswith(".")
    assert not any("\x1b" in remark or "WARN" in remark for remark in remarks)


def test_checks_draw_the_same_every_time_and_leave_the_random_state() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert_model_valid(Drift())
    assert_model_valid(Walk())
    assert_prior_valid(GaussianPrior(Drift.action_space), Drift())
    assert torch.equal(torch.get_rng_state(), before)
    wide = lambda s: dist.Normal(torch.zeros(len(s), 1), 0.5).to_event(1)  # noqa: E731
    said = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert_prior_valid(wide, Drift())
        said.append(str(caught[0].message))
    assert said[0] == said[1]


class Thermostat(Drift):
    """A Box of states and Discrete actions."""

    action_space: Space[Any] = Discrete(3)

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        return dist.Normal(0.9 * state + (action - 1.0).unsqueeze(-1), 0.1).to_event(1)


class Dial(EnvironmentModel):
    """Discrete states and a Box of actions."""

    state_space: Space[Any] = Discrete(4)
    action_space: Space[Any] = Box(-1.0, 1.0, (1,))
    discount = 0.9

    def initial_state(self) -> TorchDistribution:
        return dist.Categorical(torch.ones(4) / 4)

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        return dist.Delta((state + (action[..., 0] > 0)) % 4)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return -action[..., 0].square()


def test_models_of_mixed_spaces_are_valid() -> None:
    assert assert_model_valid(Thermostat()) == []
    assert assert_model_valid(Thermostat(), CategoricalPrior([0.5, 0.25, 0.25])) == []
    assert assert_model_valid(Dial()) == []
    assert assert_model_valid(Dial(), GaussianPrior(Dial.action_space)) == []


@pytest.mark.parametrize(
    ("base", "methods", "message"),
    [
        (Thermostat, {"reward": lambda s, a, n: s}, r"Thermostat.reward: expected a tensor"),
        (
            Thermostat,
            {"action_space": Discrete(3, start=1)},
            r"Thermostat.action_space: expected a Discrete space that counts from 0, got",
        ),
        (
            Thermostat,
            {"action_prior": lambda s: dist.Categorical(torch.ones(len(s), 2) / 2)},
            r"action prior .*: expected 3 categories, one for each of 0..2, got 2",
        ),
        (
            Dial,
            {"transition": lambda s, a: dist.Categorical(torch.ones(len(s), 5) / 5)},
            r"Dial.transition: expected 4 categories, one for each of 0..3, got 5",
        ),
        (
            Dial,
            {"initial_state": lambda: dist.Categorical(torch.ones(4))},
            r"Dial.initial_state .*must sum to one",
        ),
        (Dial, {"action_space": Box(-2.0, 2.0, (1,))}, r"Dial.action_space: expected the box"),
    ],
)
def test_faults_of_models_of_mixed_spaces(
    base: type[EnvironmentModel], methods: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        assert_model_valid(changed(base, **methods))


@pytest.mark.parametrize("target", ["CartPole-v1", "Acrobot-v1", "Pendulum-v1"])
def test_simulators_of_all_kinds_are_valid(target: str) -> None:
    model = GymnasiumModel(target)
    assert assert_model_valid(model)[-1].startswith("it is a simulator")
    prior = UniformPrior(model.action_space)
    assert assert_model_valid(model, prior)[-1].startswith("it is a simulator")


# ------------------------------------------------------------------ faults of finite models


def categorical(*probs: float) -> Callable[..., TorchDistribution]:
    return lambda *given: dist.Categorical(
        torch.tensor(probs).expand(*(given[0].shape if given else ()), -1)
    )


def only_rows(state: Tensor, action: Tensor) -> TorchDistribution:
    assert state.dim() == 1, "I take rows only"
    return Walk().transition(state, action)


FINITE_FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "NaN reward": (
        {"reward": lambda s, a, n: torch.full(s.shape, math.nan)},
        ValueError,
        r"reward: expected finite numbers, got nan for state 0, action 0",
    ),
    "infinite reward": (
        {"reward": lambda s, a, n: torch.full(s.shape, -math.inf)},
        ValueError,
        r"reward: expected finite numbers, got -inf .*; forbid an action by a prior of zero",
    ),
    "wrong shape": (
        {"reward": lambda s, a, n: torch.zeros(1, 1)},
        ValueError,
        r"Walk.reward: expected a tensor of the batch shape of its arguments",
    ),
    "wrong dtype": (
        {"terminal": lambda s: torch.zeros(s.shape)},
        ValueError,
        r"Walk.terminal: expected dtype torch.bool, got torch.float",
    ),
    "wrong support": (
        {"transition": categorical(0.0, 0.0, 0.5, 0.5)},
        ValueError,
        r"Walk.transition: expected 3 categories, one for each of 0..2, got 4",
    ),
    "negative probabilities": (
        {"transition": categorical(1.5, -0.5)},
        ValueError,
        r"probabilities must not be negative",
    ),
    "NaN probabilities": (
        {"initial_state": categorical(math.nan, 1.0)},
        ValueError,
        r"Walk.initial_state .*probabilities must be finite",
    ),
    "a sum that is not one": (
        {"transition": categorical(0.5, 0.6)},
        ValueError,
        r"Walk.transition .*must sum to one",
    ),
    "a transition that takes rows only": (
        {"transition": only_rows},
        ValueError,
        r"Walk.transition failed when called with torch.int64 \(\), .*I take rows only",
    ),
    "a reward that flattens": (
        {"reward": lambda s, a, n: (n == END).flatten()},
        ValueError,
        r"Walk.reward: expected .* \(\), got a tensor of shape \(1,\)",
    ),
    "a transition that flattens": (
        {"transition": lambda s, a: dist.Delta((s + 1).clamp(max=END).flatten())},
        ValueError,
        r"Walk.transition: expected batch shape \(\) and event shape \(\), got \(1,\)",
    ),
    "a terminal that flattens": (
        {"terminal": lambda s: (s == END).flatten()},
        ValueError,
        r"Walk.terminal: expected .* \(\), got a tensor of shape \(1,\)",
    ),
    "discount above one": (
        {"discount": 1.5},
        ValueError,
        r"Walk.discount: expected a number in \[0, 1\], got 1.5",
    ),
    "no number as discount": (
        {"discount": None},
        ValueError,
        r"Walk.discount: expected a number in \[0, 1\], got None",
    ),
    "endless without a discount": (
        {"transition": lambda s, a: dist.Delta(s)},
        ValueError,
        r"discount: expected below 1, as state 0 can never reach a terminal state",
    ),
    "endless under the prior": (
        {"action_prior": categorical(1.0, 0.0)},
        ValueError,
        r"discount: expected below 1, as state 0 can never .* under allowed actions",
    ),
    "a space of another kind": (
        {"action_space": MultiBinary(3)},
        ValueError,
        r"Walk: expected Discrete or Box state and action spaces, got Discrete\(3\) and "
        r"MultiBinary\(3\)",
    ),
    "a Discrete space that counts from 1": (
        {"action_space": Discrete(2, start=1)},
        TypeError,
        r"Walk: exact inference .* count from 0\).* got the action space Discrete\(2, start=1\)",
    ),
}


@pytest.mark.parametrize("case", FINITE_FAULTS)
def test_faults_of_finite_models(case: str) -> None:
    methods, kind, message = FINITE_FAULTS[case]
    with pytest.raises(kind, match=message):
        assert_model_valid(changed(Walk, **methods))


def test_no_model_and_no_spaces() -> None:
    with pytest.raises(TypeError, match="expected an EnvironmentModel, got a str"):
        assert_model_valid("cliff")  # type: ignore[arg-type]

    class Bare(EnvironmentModel):
        initial_state, transition, reward = Walk.initial_state, Walk.transition, Walk.reward

    message = "Bare: it has no state_space; set it to a gymnasium.spaces.Discrete or Box"
    with pytest.raises(ValueError, match=message):
        assert_model_valid(Bare())


def test_a_horizon_needs_no_end() -> None:
    endless = lambda s, a: dist.Delta(s)  # noqa: E731
    assert assert_model_valid(changed(Walk, transition=endless, horizon=3)) == []


def test_tables_that_cannot_end() -> None:
    stay = torch.ones(1, 1, 1)
    assert assert_model_valid(FiniteModel.from_tables(stay, torch.ones(1, 1), discount=0.5)) == []
    with pytest.raises(ValueError, match="discount: expected below 1, as state 0"):
        assert_model_valid(FiniteModel.from_tables(stay, torch.ones(1, 1)))


# ------------------------------------------------------------------ faults of continuous models


CONTINUOUS_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no event": (
        {"transition": lambda s, a: dist.Normal(s, 1.0)},
        r"Drift.transition: expected batch shape \(8,\) and event shape \(2,\), got \(8, 2\) and "
        r"\(\); .to_event\(1\) makes the last dimension an event",
    ),
    "batch shape lost": (
        {"transition": lambda s, a: dist.Normal(torch.zeros(2), 1.0).to_event(1)},
        r"Drift.transition: .* got \(\) and \(2,\)",
    ),
    "no distribution": (
        {"transition": lambda s, a: s},
        r"Drift.transition: expected a Pyro distribution, got a Tensor",
    ),
    "a start without event": (
        {"initial_state": lambda: dist.Normal(torch.zeros(2), 1.0)},
        r"Drift.initial_state: expected batch shape \(\) and event shape \(2,\), got \(2,\)",
    ),
    "no start": (
        {"initial_state": lambda: torch.zeros(2)},
        r"Drift.initial_state: expected a Pyro distribution, got a Tensor",
    ),
    "a NaN start": (
        {"initial_state": lambda: dist.Delta(torch.full((2,), math.nan), event_dim=1)},
        r"Drift.initial_state: expected finite numbers, got nan",
    ),
    "an infinite step": (
        {"transition": lambda s, a: dist.Delta(s / 0, event_dim=1)},
        r"Drift.transition: expected finite numbers, got -?inf",
    ),
    "NaN reward": (
        {"reward": lambda s, a, n: s[..., 0] * math.nan},
        r"Drift.reward: expected finite numbers, got nan$",
    ),
    "a reward that keeps the last dimension": (
        {"reward": lambda s, a, n: s},
        r"Drift.reward: expected a tensor of the batch shape of its arguments, \(8,\), got a "
        r"tensor of shape \(8, 2\)",
    ),
    "no tensor": (
        {"reward": lambda s, a, n: 0.0},
        r"Drift.reward: expected a tensor .*, got a float",
    ),
    "dtype of terminal": (
        {"terminal": lambda s: s[..., 0]},
        r"Drift.terminal: expected dtype torch.bool, got torch.float32",
    ),
    "an exception": (
        {"transition": lambda s, a: dist.Normal(s @ torch.ones(3, 3), 1.0).to_event(1)},
        r"Drift.transition failed when called with torch.float32 \(8, 2\), torch.float32 \(8, 1\): "
        r"RuntimeError",
    ),
    "actions not scaled": (
        {"action_space": Box(-2.0, 2.0, (1,))},
        r"Drift.action_space: expected the box \[-1, 1\]\^d, got Box\(-2.0, 2.0.*; scale the "
        r"action inside transition and reward",
    ),
}


@pytest.mark.parametrize("case", CONTINUOUS_FAULTS)
def test_faults_of_continuous_models(case: str) -> None:
    methods, message = CONTINUOUS_FAULTS[case]
    with pytest.raises(ValueError, match=message):
        assert_model_valid(changed(Drift, **methods))


class Silent(gymnasium.Env[Any, Any]):
    """An environment whose observations lie outside its own space."""

    observation_space, action_space = Box(0, 1, (1,), np.float32), Discrete(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.full(1, 5, dtype=np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.full(1, 5, dtype=np.float32), 0.0, False, False, {}


class Unpaid(Silent):
    """An environment that pays NaN now and then."""

    observation_space: Any = Box(0, 5, (1,), np.float32)
    count = 0

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        return (
            np.full(1, 5, dtype=np.float32),
            math.nan if self.count > 9 else 0.0,
            False,
            False,
            {},
        )


def test_faults_that_only_steps_bring_to_light() -> None:
    gymnasium.register("Unpaid-v0", Unpaid)
    try:
        message = r"Unpaid-v0, slot 0 \(episode seed \d+\), step 9: reward: expected finite numbers"
        with pytest.raises(ValueError, match=message):
            assert_model_valid(GymnasiumModel("Unpaid-v0"))
    finally:
        gymnasium.registry.pop("Unpaid-v0")


def test_faults_of_simulators_are_those_that_gymnasium_finds() -> None:
    gymnasium.register("Silent-v0", Silent)
    try:
        with pytest.raises(
            ValueError, match=r"Silent-v0: Gymnasium's check_env says: .*observation"
        ):
            assert_model_valid(GymnasiumModel("Silent-v0"))
    finally:
        gymnasium.registry.pop("Silent-v0")


# ------------------------------------------------------------------ priors over discrete actions


@pytest.mark.parametrize(
    "prior",
    [
        UniformPrior(Discrete(2)),
        CategoricalPrior([0.1, 0.9]),
        MaskPrior([False, True]),
        StickyPrior(Discrete(2)),
        MixturePrior([UniformPrior(Discrete(2)), MaskPrior([False, True])]),
        lambda s: dist.Bernoulli(torch.full(s.shape, 0.25)),
    ],
)
def test_good_priors_over_discrete_actions(prior: Any) -> None:
    assert_prior_valid(prior, Walk())
    assert assert_model_valid(Walk(), prior) == []


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (categorical(0.0, 0.0), r"must sum to one, got \[0, 0\]"),
        (categorical(0.0, 0.5, 0.5), r"expected 2 categories, one for each of 0..1, got 3"),
        (categorical(0.5, 0.6), r"must sum to one, got \[0.5, 0.6\]"),
        (categorical(math.nan, 1.0), r"must be finite"),
        (lambda s: dist.Categorical(torch.ones(2) / 2), r"expected batch shape \(2,\)"),
        (lambda s: torch.ones(2), r"expected a Pyro distribution, got a Tensor"),
        (lambda s: dist.Normal(torch.zeros(s.shape), 1), r"expected a distribution over integers"),
        (lambda s: 1 / 0, r"failed when called with torch.int64 \(2,\): ZeroDivisionError"),
    ],
)
def test_bad_priors_over_discrete_actions(prior: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"action prior .*{message}"):
        assert_prior_valid(prior, Walk())
    with pytest.raises(ValueError, match=f"action prior .*{message}"):
        assert_model_valid(Walk(), prior)


def test_a_models_own_prior_is_checked_and_replaced_by_another() -> None:
    model = changed(Walk, action_prior=categorical(0.5, 0.6))
    with pytest.raises(ValueError, match=r"action prior .* sum to one"):
        assert_model_valid(model)
    model = changed(Drift, action_prior=lambda s: torch.zeros(len(s), 1))
    with pytest.raises(ValueError, match=r"action prior .*: expected a Pyro distribution"):
        assert_model_valid(model)
    assert assert_model_valid(model, UniformPrior(Drift.action_space)) == []


# ------------------------------------------------------------------ priors over boxes


def normal(loc: float, scale: float) -> Callable[[Tensor], TorchDistribution]:
    return lambda s: dist.Normal(torch.full((len(s), 1), loc), scale).to_event(1)


class Open(TorchDistribution):
    """A density on the box that is infinite, or nothing, or NaN, where it is told."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, batch: int, at_edge: float, inside: float = 0.0) -> None:
        self.at_edge, self.inside = at_edge, inside
        super().__init__(torch.Size([batch]), torch.Size([1]), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.rand((*sample_shape, *self.batch_shape, 1)) * 2 - 1

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where((value.abs() >= 1).any(-1), self.at_edge, self.inside)


@pytest.mark.parametrize(
    "prior",
    [
        UniformPrior(Drift.action_space),
        GaussianPrior(Drift.action_space, loc=0.9, scale=2.0),
        GaussianPrior(Drift.action_space, loc=lambda s: s[..., :1].tanh(), scale=0.01),
        MixturePrior(
            [UniformPrior(Drift.action_space), GaussianPrior(Drift.action_space, scale=0.1)]
        ),
        normal(0.0, 0.2),  # 6e-7 of it outside
        lambda s: Open(len(s), at_edge=-5.0),
    ],
)
def test_good_priors_over_boxes(prior: Any) -> None:
    """Without a warning: they are errors here."""
    assert_prior_valid(prior, Drift())
    assert assert_model_valid(Drift(), prior) == []


@pytest.mark.parametrize(("scale", "share"), [(0.4, r"1\.\d%"), (1.0, r"3\d\.\d%")])
def test_some_mass_outside_the_box_is_warned_of(scale: float, share: str) -> None:
    message = (
        rf"action prior .*: {share} of its mass lies outside the action box \[-1, 1\]\^d, where no "
        r"policy can go; GaussianPrior truncates and renormalises"
    )
    with pytest.warns(UserWarning, match=message):
        assert_prior_valid(normal(0.0, scale), Drift())


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (
            normal(0.0, 5.0),
            r"expected its mass inside the action box \[-1, 1\]\^d, got 8\d% of it outside; "
            r"actions are scaled to \[-1, 1\]",
        ),
        (
            lambda s: dist.Uniform(2.0, 3.0).expand([len(s), 1]).to_event(1),
            r"got 100% of it outside",
        ),
        (
            lambda s: Open(len(s), at_edge=math.inf),
            r"expected a finite density on the whole closed box, got log-density inf at "
            r"\[-1\]; saturated actions do reach its edges",
        ),
        (lambda s: Open(len(s), at_edge=-math.inf), r"got log-density -inf at \[-1\]"),
        (lambda s: Open(len(s), at_edge=-math.inf, inside=-math.inf), r"got log-density -inf"),
        (lambda s: Open(len(s), at_edge=0.0, inside=math.nan), r"got log-density nan"),
        (
            lambda s: dist.Normal(torch.zeros(len(s), 1), 0.1),
            r"expected batch shape \(8,\) and event shape \(1,\), got \(8, 1\) and \(\); .to_event",
        ),
        (
            lambda s: dist.Normal(torch.zeros(1), 0.1).to_event(1),
            r"expected batch shape \(8,\) and event shape \(1,\), got \(\) and \(1,\)",
        ),
        (lambda s: s, r"expected a Pyro distribution, got a Tensor"),
        (lambda s: 1 / 0, r"failed when called with torch.float32 \(8, 2\): ZeroDivisionError"),
        (
            lambda s: SparseCategorical(torch.zeros(len(s), 1), torch.ones(len(s), 1)),
            r"expected a density over Box\(-1.0, 1.0, \(1,\), float32\), got SparseCategorical",
        ),
    ],
)
def test_bad_priors_over_boxes(prior: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"action prior .*{message}"):
        assert_prior_valid(prior, Drift())
    with pytest.raises(ValueError, match=f"action prior .*{message}"):
        assert_model_valid(Drift(), prior)


def test_an_action_space_of_another_kind() -> None:
    model = changed(Drift, action_space=MultiBinary(3))
    with pytest.raises(
        ValueError, match=r"action prior .*: expected a Discrete, MultiDiscrete or Box action space"
    ):
        assert_prior_valid(normal(0, 0.1), model)


# ------------------------------------------------------------------ priors on simulators


def test_priors_on_simulators_see_real_observations() -> None:
    seen: list[Tensor] = []

    def prior(state: Tensor) -> TorchDistribution:
        seen.append(state)
        return dist.Categorical(torch.ones(len(state), 2) / 2)

    assert_prior_valid(prior, GymnasiumModel("CartPole-v1"))
    assert seen[0].shape == (8, 4)
    assert (seen[0] != seen[0][0]).any()
    pendulum = GymnasiumModel("Pendulum-v1")
    assert_prior_valid(GaussianPrior(pendulum.action_space), pendulum)


@pytest.mark.parametrize(
    ("target", "prior", "message"),
    [
        ("CartPole-v1", categorical(0.5, 0.5, 0.5), r"failed .* sum to one"),
        ("CartPole-v1", lambda s: dist.Categorical(torch.ones(2) / 2), r"expected batch shape"),
        ("Pendulum-v1", normal(0.0, 5.0), r"8\d% of it outside"),
    ],
)
def test_bad_priors_on_simulators(target: str, prior: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"action prior .*{message}"):
        assert_model_valid(GymnasiumModel(target), prior)
