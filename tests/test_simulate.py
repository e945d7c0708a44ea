"""`evaluate`: the real environment and the program tell the same story, and the same one twice."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl import (
    EnvironmentModel,
    FiniteModel,
    LinearGaussianPolicy,
    Policy,
    TabularPolicy,
    load_target,
)
from inference_rl.distributions import categorical
from inference_rl.environment import WithPreviousAction
from inference_rl.simulate import Evaluation, GymnasiumModel, evaluate, make

DOWN, RIGHT = 1, 2


class SwingUp(Policy):
    """Push along the motion: a simple policy for the pendulum, with or without noise."""

    kind = "swing-up"

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, state: Tensor, t: int | None = None) -> TorchDistribution:
        if not self.noise:
            return dist.Delta(self.mode(state, t), event_dim=1)
        return dist.Normal(self.mode(state, t), self.noise).to_event(1)

    def mode(self, state: Tensor, t: int | None = None) -> Tensor:
        return (0.4 * state[..., 2:]).clamp(-0.5, 0.5)


class Constant(Policy):
    """Always the same action, whatever the states."""

    kind = "constant"

    def __init__(self, action: float, shape: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.action, self.shape = action, shape

    def forward(self, state: Tensor, t: int | None = None) -> TorchDistribution:
        return dist.Delta(self.mode(state, t), event_dim=len(self.shape))

    def mode(self, state: Tensor, t: int | None = None) -> Tensor:
        return torch.full((len(state), *self.shape), self.action)


def uniform(states: int, actions: int) -> TabularPolicy:
    return TabularPolicy(torch.full((states, actions), 1 / actions, dtype=torch.float64))


def lake() -> tuple[EnvironmentModel, TabularPolicy]:
    """FrozenLake and a policy that reaches the goal about one time in fifteen."""
    probs = torch.tensor([0.1, 0.4, 0.4, 0.1], dtype=torch.float64)
    return load_target("FrozenLake-v1"), TabularPolicy(probs.expand(16, 4).contiguous())


def without_gymnasium(model: EnvironmentModel) -> EnvironmentModel:
    model.gymnasium_id = None
    return model


def assert_same(one: Evaluation, other: Evaluation) -> None:
    np.testing.assert_array_equal(one.returns, other.returns)
    np.testing.assert_array_equal(one.lengths, other.lengths)
    np.testing.assert_array_equal(one.discounted_returns, other.discounted_returns)
    assert one.cut == other.cut


# ------------------------------------------------------------------ real and program


def test_the_real_lake_and_its_program_agree() -> None:
    model, policy = lake()
    real = evaluate(model, policy, episodes=2000, max_steps=100)
    program = evaluate(without_gymnasium(model), policy, episodes=2000, max_steps=100)
    assert real.environment == program.environment == "FrozenLake-v1"
    assert isinstance(model, FiniteModel)
    expected = value(model, policy, 100)
    for found in (real, program):
        assert abs(found.mean_return - expected) < 4 * found.standard_error
        assert 0 < found.standard_error < 0.01
    spread = math.hypot(*(x.lengths.std() / np.sqrt(x.episodes) for x in (real, program)))
    assert abs(real.lengths.mean() - program.lengths.mean()) < 4 * spread


def value(model: FiniteModel, policy: TabularPolicy, steps: int) -> float:
    """The undiscounted return of `steps` steps, by the recursion."""
    v = torch.zeros(model.num_states, dtype=torch.float64)
    for _ in range(steps):
        v = (policy.table * (model.expected_reward() + model.expected_value(v))).sum(-1)
    return float(model.initial @ v)


def test_the_real_pendulum_and_its_program_agree() -> None:
    """Torques in [-2, 2] are actions in [-1, 1]: unscaled, the rod would swing differently."""
    model = load_target("pendulum")
    policy = SwingUp(noise=0.1)
    real = evaluate(model, policy, episodes=150)
    assert real.environment == "Pendulum-v1"
    program = evaluate(without_gymnasium(load_target("pendulum")), policy, episodes=150)
    assert program.environment == "Pendulum"
    assert (real.lengths == 200).all()
    assert (program.lengths == 200).all()
    spread = math.hypot(real.standard_error, program.standard_error)
    assert abs(real.mean_return - program.mean_return) < 4 * spread
    assert real.returns.std() > 1


def test_one_real_episode_step_by_step() -> None:
    model = load_target("pendulum")
    found = evaluate(model, Constant(-0.5), episodes=1, seed=5)
    environment = gymnasium.make("Pendulum-v1")
    environment.reset(seed=int(np.random.SeedSequence(5).generate_state(1)[0]))
    rewards = [environment.step(np.array([-1.0], dtype=np.float32))[1] for _ in range(200)]
    environment.close()
    assert found.returns[0] == pytest.approx(sum(rewards))
    weights = 0.99 ** np.arange(200)
    assert found.discounted_returns[0] == pytest.approx(weights @ np.array(rewards))


# ------------------------------------------------------------------ boxes


class Recorder(gymnasium.Env[Any, Any]):
    """Remembers the actions it gets, and pays their sum."""

    observation_space = Box(-1, 1, (2,), np.float32)
    action_space = Box(np.array([-2, 0], np.float32), np.array([2, 10], np.float32))
    actions: list[np.ndarray] = []  # noqa: RUF012

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert action in self.action_space
        self.actions.append(action)
        return np.zeros(2, dtype=np.float32), float(action.sum()), False, False, {}


class Numbered(gymnasium.Env[Any, Any]):
    """Actions 5, 6 and 7; pays the one it gets, and ends after it."""

    observation_space, action_space = Discrete(1), Discrete(3, start=5)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        return 0, float(action), True, False, {}


@pytest.fixture
def registered() -> Any:
    gymnasium.register("Recorder-v0", Recorder, max_episode_steps=3)
    gymnasium.register("Numbered-v0", Numbered)
    Recorder.actions.clear()
    yield
    for name in ("Recorder-v0", "Numbered-v0"):
        gymnasium.registry.pop(name)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("action", "expected"),
    [(-1.0, [-2, 0]), (0.0, [0, 5]), (0.5, [1, 7.5]), (1.0, [2, 10]), (3.0, [2, 10])],
)
def test_actions_are_scaled_to_the_box_and_clipped(action: float, expected: list[float]) -> None:
    found = evaluate(GymnasiumModel("Recorder-v0"), Constant(action, (2,)), episodes=1)
    assert [list(a) for a in Recorder.actions] == [expected] * 3
    assert Recorder.actions[0].dtype == np.float32
    assert found.returns.tolist() == [3 * sum(expected)]


@pytest.mark.usefixtures("registered")
def test_discrete_actions_count_from_the_environments_first() -> None:
    policy = TabularPolicy(torch.tensor([[0.0, 0.0, 1.0]]))
    assert evaluate(GymnasiumModel("Numbered-v0"), policy, episodes=2).returns.tolist() == [7, 7]


# ------------------------------------------------------------------ seeds


def slippery() -> tuple[EnvironmentModel, Policy]:
    model, policy = lake()
    return without_gymnasium(model), policy


def swinging() -> tuple[EnvironmentModel, Policy]:
    return load_target("pendulum"), SwingUp(noise=0.3)


@pytest.mark.parametrize("pair", [lake, slippery, swinging])
def test_a_seed_reproduces_and_another_differs(pair: Any) -> None:
    model, policy = pair()
    first = evaluate(model, policy, episodes=70, seed=1, max_steps=30)
    torch.manual_seed(99)
    assert_same(first, evaluate(model, policy, episodes=70, seed=1, max_steps=30))
    other = evaluate(model, policy, episodes=70, seed=2, max_steps=30)
    assert (first.returns != other.returns).any() or (first.lengths != other.lengths).any()


@pytest.mark.parametrize("pair", [lake, slippery, swinging])
def test_the_random_state_of_torch_is_left_as_it_was(pair: Any) -> None:
    model, policy = pair()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    evaluate(model, policy, episodes=3, max_steps=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_deterministic_takes_the_most_likely_action() -> None:
    model = load_target("FrozenLake-v1", env_kwargs={"is_slippery": False})
    probs = torch.full((16, 4), 0.25, dtype=torch.float64)
    for state, action in {0: DOWN, 4: DOWN, 8: RIGHT, 9: DOWN, 13: RIGHT, 14: RIGHT}.items():
        probs[state] = torch.tensor([0.2] * 4)
        probs[state, action] = 0.4
    found = evaluate(model, TabularPolicy(probs), episodes=5, deterministic=True)
    assert found.returns.tolist() == [1.0] * 5
    assert found.lengths.tolist() == [6] * 5
    assert found.standard_error == 0
    assert found.discounted_returns.tolist() == pytest.approx([0.99**5] * 5)
    drawn = evaluate(model, TabularPolicy(probs), episodes=50)
    assert drawn.mean_return < 1


# ------------------------------------------------------------------ limits


class Clock(EnvironmentModel):
    """States count the steps; ends at ten, and pays one for each step."""

    state_space, action_space = Discrete(11), Discrete(1)

    def initial_state(self) -> TorchDistribution:
        return dist.Categorical(torch.nn.functional.one_hot(torch.tensor(0), 11).double())

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        return dist.Delta((state + 1).clamp(max=10))

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return torch.ones(state.shape)

    def terminal(self, state: Tensor) -> Tensor:
        return state == 10


def clock(**attributes: Any) -> EnvironmentModel:
    model = Clock()
    for name, given in attributes.items():
        setattr(model, name, given)
    return model


@pytest.mark.parametrize(
    ("horizon", "max_steps", "length", "cut"),
    [
        (None, None, 10, 0),
        (None, 10, 10, 0),
        (None, 4, 4, 3),
        (6, None, 6, 3),
        (6, 2, 2, 3),
        (6, 8, 6, 3),
    ],
)
def test_where_episodes_of_a_program_are_cut(
    horizon: int | None, max_steps: int | None, length: int, cut: int
) -> None:
    model, policy = clock(horizon=horizon), uniform(11, 1)
    found = evaluate(model, policy, episodes=3, max_steps=max_steps)
    assert found.lengths.tolist() == [length] * 3
    assert found.returns.tolist() == [float(length)] * 3
    assert found.cut == cut


@pytest.mark.parametrize(("max_steps", "length"), [(None, 200), (7, 7)])
def test_where_real_episodes_are_cut(max_steps: int | None, length: int) -> None:
    found = evaluate(GymnasiumModel("Pendulum-v1"), Constant(0.0), episodes=2, max_steps=max_steps)
    assert found.lengths.tolist() == [length] * 2
    assert found.cut == 2


def test_an_end_is_no_cut() -> None:
    model, policy = lake()
    found = evaluate(model, policy, episodes=130)
    assert found.episodes == 130  # more than run side by side
    assert found.cut == 0
    assert found.lengths.max() > found.lengths.min()
    stay = torch.tensor([1.0, 0, 0, 0]).expand(16, 4)
    patient = evaluate(
        load_target("FrozenLake-v1", env_kwargs={"is_slippery": False}),
        TabularPolicy(stay),
        episodes=2,
    )
    assert patient.cut == 2
    assert patient.lengths.tolist() == [100, 100]  # Gymnasium's own limit


def test_an_episode_that_starts_at_its_end() -> None:
    model = clock(terminal=lambda state: torch.ones_like(state, dtype=torch.bool))
    found = evaluate(model, uniform(11, 1), episodes=2)
    assert found.lengths.tolist() == [0, 0]
    assert found.returns.tolist() == [0.0, 0.0]
    assert found.cut == 0


def test_a_policy_that_depends_on_the_step_is_told_the_step() -> None:
    class Guess(Clock):
        action_space = Discrete(4)
        horizon = 4

        def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
            return (action == state).double()

    table = torch.eye(4, dtype=torch.float64).unsqueeze(1).expand(4, 11, 4)
    assert evaluate(Guess(), TabularPolicy(table), episodes=3).returns.tolist() == [4.0] * 3


def test_a_policy_that_remembers_the_previous_action_on_the_real_environment() -> None:
    """Down, and then never what came before: the same on the real lake and in its program."""
    table = torch.zeros(16, 5, 4, dtype=torch.float64)
    table[:, 4, DOWN] = 1.0
    for previous in range(4):
        table[:, previous, (previous + 1) % 4] = 1.0
    seen: list[int] = []

    class Watched(Policy):
        kind = "watched"

        def forward(self, state: Tensor, t: int | None = None) -> TorchDistribution:
            seen.append(int(state[0]) % 5)
            return categorical(table.reshape(80, 4)[state])

        def mode(self, state: Tensor, t: int | None = None) -> Tensor:
            return self(state).probs.argmax(-1)

    model = WithPreviousAction(load_target("FrozenLake-v1"))
    evaluate(model, Watched(), episodes=1, seed=1)
    assert len(seen) > 2
    assert seen == [4, *((DOWN + i) % 4 for i in range(len(seen) - 1))]


# ------------------------------------------------------------------ numbers


def test_summary() -> None:
    found = Evaluation(
        returns=np.array([1.0, 2.0, 6.0]),
        discounted_returns=np.array([1.0, 1.0, 4.0]),
        lengths=np.array([1, 2, 6]),
        cut=1,
        environment="here",
    )
    error = np.std([1, 2, 6], ddof=1) / np.sqrt(3)
    assert found.summary() == {
        "environment": "here",
        "episodes": 3,
        "mean_return": 3.0,
        "standard_error": pytest.approx(error),
        "mean_discounted_return": 2.0,
        "mean_length": 3.0,
        "episodes_cut_by_time_limit": 1,
    }


def test_one_episode_has_no_standard_error() -> None:
    found = evaluate(clock(), uniform(11, 1), episodes=1)
    assert math.isnan(found.standard_error)
    assert found.summary()["standard_error"] is None


def test_discounted_returns_of_a_program() -> None:
    found = evaluate(clock(discount=0.5), uniform(11, 1), episodes=2)
    assert found.discounted_returns.tolist() == pytest.approx([2 - 2**-9] * 2)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("episodes", [0, -1])
def test_no_episodes_are_refused(episodes: int) -> None:
    with pytest.raises(ValueError, match=f"episodes: expected at least one, got {episodes}"):
        evaluate(clock(), uniform(11, 1), episodes=episodes)


@pytest.mark.parametrize("max_steps", [0, -3])
def test_no_steps_are_refused(max_steps: int) -> None:
    with pytest.raises(ValueError, match=f"max_steps: expected at least one, got {max_steps}"):
        evaluate(clock(), uniform(11, 1), episodes=1, max_steps=max_steps)


def test_a_simulator_has_no_distributions() -> None:
    model = GymnasiumModel("Pendulum-v1", {"g": 1.0}, 0.5)
    assert (model.name, model.discount) == ("Pendulum-v1", 0.5)
    environment: Any = make(model)
    assert environment.unwrapped.g == 1.0
    environment.close()
    state, action = torch.zeros(1, 3), torch.zeros(1, 1)
    message = "Pendulum-v1 is a simulator: .*; write the dynamics as an EnvironmentModel"
    with pytest.raises(TypeError, match=message):
        model.initial_state()
    with pytest.raises(TypeError, match=message):
        model.transition(state, action)
    with pytest.raises(TypeError, match=message):
        model.reward(state, action, state)


def test_a_linear_policy_acts_on_real_observations() -> None:
    """Observations come as float32; a policy in float64 takes them."""
    gain = torch.tensor([[0.0, 0.0, 0.1]], dtype=torch.float64)
    covariance = torch.zeros(1, 1, dtype=torch.float64)
    policy = LinearGaussianPolicy(gain, torch.zeros(1, dtype=torch.float64), covariance)
    found = evaluate(GymnasiumModel("Pendulum-v1"), policy, episodes=2, max_steps=20)
    assert np.isfinite(found.returns).all()
