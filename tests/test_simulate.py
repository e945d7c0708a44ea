"""Batches of episodes and `evaluate`: environment and program tell one story, and it twice."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import gymnasium
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete, Sequence, Text
from gymnasium.spaces import Dict as DictSpace
from gymnasium.spaces import Tuple as TupleSpace
from gymnasium.spaces.utils import flatten
from gymnasium.vector import AutoresetMode, SyncVectorEnv
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
from inference_rl.evaluation import STEP_LIMIT, episode_limit
from inference_rl.gymnasium_environments import to_31_bits
from inference_rl.randomness import derived, episode_seeds
from inference_rl.simulate import (
    EnvironmentFault,
    Environments,
    Evaluation,
    GymnasiumModel,
    VectorEnvironments,
    environments,
    evaluate,
    make,
)

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
    seeds = episode_seeds(derived(5, "environment"), np.arange(1))
    environment.reset(seed=to_31_bits(seeds[0]))
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


@pytest.mark.parametrize(
    ("model", "limit"),
    [
        (lambda: clock(horizon=6), 6),
        (lambda: clock(), STEP_LIMIT),
        (lambda: load_target("double-integrator", discount=0.9), 66),
        (lambda: load_target("CartPole-v1"), 500),
        (lambda: load_target("gymnasium.envs.classic_control:CartPole-v1"), 500),
        (lambda: load_target("CartPole-v1", env_kwargs={"max_episode_steps": 12}), 12),
        (lambda: load_target("CartPole-v1", env_kwargs={"max_episode_steps": -1}), STEP_LIMIT),
    ],
)
def test_one_rule_says_where_episodes_are_cut(model: Any, limit: int) -> None:
    assert episode_limit(model()) == limit


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


# ------------------------------------------------------------------ batches


def actions_of(space: Any, count: int, generator: np.random.Generator) -> Tensor:
    if isinstance(space, Discrete):
        return torch.from_numpy(generator.integers(space.n, size=count))
    if isinstance(space, MultiDiscrete):
        return torch.from_numpy(generator.integers(space.nvec, size=(count, len(space.nvec))))
    return torch.from_numpy(generator.uniform(-1, 1, (count, *space.shape))).float()


def episode(batch: Environments, slot: int, seed: int, steps: int) -> list[Any]:
    """States, rewards and ends of an episode under actions that depend on its seed alone."""
    slots, generator = np.array([slot]), np.random.default_rng(seed)
    told = [batch.reset(slots, np.array([seed], dtype=np.uint64))[0].tolist()]
    for _ in range(steps):
        step = batch.step(slots, actions_of(batch.action_space, 1, generator))
        told.append([field[0].tolist() for field in dataclasses.astuple(step)])
        if not batch.alive[slot]:
            break
    return told


MODELS: dict[str, Any] = {
    "FrozenLake-v1": lambda: load_target("FrozenLake-v1"),
    "a lake's program": lambda: slippery()[0],
    "grid world": lambda: load_target("grid-world"),
    "pendulum's program": lambda: without_gymnasium(load_target("pendulum")),
    "double integrator": lambda: load_target("double-integrator"),
    "CartPole-v1": lambda: GymnasiumModel("CartPole-v1"),
    "Acrobot-v1": lambda: GymnasiumModel("Acrobot-v1"),
    "Pendulum-v1": lambda: GymnasiumModel("Pendulum-v1"),
    "Blackjack-v1": lambda: GymnasiumModel("Blackjack-v1"),  # Tuple observations
}


@pytest.mark.parametrize("name", MODELS)
def test_an_episode_is_the_same_in_every_slot_of_every_batch(name: str) -> None:
    seeds = episode_seeds(derived(0, "environment"), np.arange(6))
    with contextlib.closing(environments(MODELS[name](), 1, 30)) as alone:
        expected = [episode(alone, 0, int(seed), 40) for seed in seeds]
    with contextlib.closing(environments(MODELS[name](), 4, 30)) as batch:
        assert batch.size == 4
        found: list[list[Any]] = [[] for _ in seeds]
        generators = [np.random.default_rng(int(seed)) for seed in seeds]
        at, waiting = np.arange(4), [4, 5]  # which episode a slot is at
        shown = batch.reset(np.arange(4), seeds[at])
        for slot in range(4):
            found[slot].append(shown[slot].tolist())
        while batch.alive.any():
            slots = np.flatnonzero(batch.alive)[::-1].copy()
            acts = [actions_of(batch.action_space, 1, generators[at[s]]) for s in slots]
            step = batch.step(slots, torch.cat(acts))
            for i, slot in enumerate(slots):
                found[at[slot]].append([field[i].tolist() for field in dataclasses.astuple(step)])
            for slot in np.flatnonzero(~batch.alive):
                if waiting:
                    at[slot] = waiting.pop(0)
                    start = batch.reset(np.array([slot]), seeds[[at[slot]]])
                    found[at[slot]].append(start[0].tolist())
    assert found == expected
    assert any(found[0][0] != other[0] for other in found) or name in {
        "FrozenLake-v1", "a lake's program", "grid world", "double integrator"
    }  # fmt: skip


def test_the_last_bit_does_not_depend_on_the_batch() -> None:
    """A network for a model: matrix products round by the size of their operands."""
    generator = torch.Generator().manual_seed(0)
    outer = torch.randn(6, 64, generator=generator) / 2.5
    inner = torch.randn(64, 6, generator=generator) / 8

    class Network(EnvironmentModel):
        state_space, action_space = Box(-np.inf, np.inf, (6,)), Box(-1.0, 1.0, (6,))
        discount = 0.9

        def initial_state(self) -> TorchDistribution:
            return dist.MultivariateNormal(torch.zeros(6), torch.eye(6) + 0.1)

        def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
            loc = (state @ outer).tanh() @ inner + action
            return dist.MultivariateNormal(loc, torch.eye(6) + 0.1)

        def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
            return next_state.sum(-1)

    gain = torch.randn(6, 6, generator=generator) / 6
    policy = LinearGaussianPolicy(gain, torch.zeros(6), 0.1 * torch.eye(6))
    whole = evaluate(Network(), policy, episodes=200, max_steps=20)
    for episodes in (1, 2, 3, 5, 67):
        part = evaluate(Network(), policy, episodes=episodes, max_steps=20)
        np.testing.assert_array_equal(part.returns, whole.returns[:episodes])


def test_more_episodes_begin_with_fewer() -> None:
    for model, policy in (lake(), slippery(), swinging()):
        whole = evaluate(model, policy, episodes=70, max_steps=20)
        part = evaluate(model, policy, episodes=5, max_steps=20)
        np.testing.assert_array_equal(part.returns, whole.returns[:5])
        np.testing.assert_array_equal(part.lengths, whole.lengths[:5])


def test_what_a_step_gives() -> None:
    batch = environments(GymnasiumModel("CartPole-v1"), 3)
    assert (batch.state_space.shape, batch.action_space) == ((4,), Discrete(2))
    state = batch.reset(np.arange(3), np.arange(3, dtype=np.uint64) << np.uint64(33))
    assert (state.dtype, tuple(state.shape)) == (torch.float32, (3, 4))
    step = batch.step(np.array([2, 0]), torch.tensor([1, 0]))
    assert step.reward.dtype == torch.float64
    assert step.terminated.dtype == step.truncated.dtype == torch.bool
    assert step.reward.tolist() == [1.0, 1.0]
    expected = gymnasium.make("CartPole-v1")
    for slot, action, row in ((2, 1, 0), (0, 0, 1)):
        assert state[slot].tolist() == expected.reset(seed=slot)[0].tolist()
        assert step.next_state[row].tolist() == expected.step(action)[0].tolist()
    batch.close()


def test_a_horizon_terminates_and_a_limit_truncates() -> None:
    for limit, ends in ((None, (True, False)), (6, (True, False)), (5, (False, True))):
        batch = environments(clock(horizon=6), 2, limit)
        batch.reset(np.arange(2), np.zeros(2, dtype=np.uint64))
        while batch.alive.any():
            step = batch.step(np.arange(2), torch.zeros(2, dtype=torch.long))
        assert (bool(step.terminated[0]), bool(step.truncated[0])) == ends
        assert step.next_state.tolist() == [limit or 6] * 2


@pytest.mark.parametrize("make_model", [clock, lambda: GymnasiumModel("CartPole-v1")])
def test_an_ended_slot_is_not_stepped(make_model: Any) -> None:
    batch = environments(make_model(), 2, 1)
    act = lambda n: torch.zeros(n, dtype=torch.long)  # noqa: E731
    with pytest.raises(ValueError, match="slot 0 has ended or never began; reset the slot first"):
        batch.step(np.array([0]), act(1))
    batch.reset(np.arange(2), np.zeros(2, dtype=np.uint64))
    batch.step(np.array([1]), act(1))
    with pytest.raises(ValueError, match="slot 1 has ended"):
        batch.step(np.arange(2), act(2))
    with pytest.raises(ValueError, match=r"expected actions of shape \(1,\), .* got \(2,\)"):
        batch.step(np.array([0]), act(2))
    batch.reset(np.array([1]), np.zeros(1, dtype=np.uint64))
    batch.step(np.arange(2), act(2))
    batch.close()


def test_batches_have_slots_and_limits() -> None:
    for model in (clock(), GymnasiumModel("CartPole-v1")):
        with pytest.raises(ValueError, match="size: expected at least one slot, got 0"):
            environments(model, 0)
        with pytest.raises(ValueError, match="limit: expected at least one step, got 0"):
            environments(model, 1, 0)


# ------------------------------------------------------------------ spaces


class Odd(gymnasium.Env[Any, Any]):
    """An environment of any spaces, that shows and pays what it is told to, from step 2 on."""

    def __init__(self, observed: Any, acted: Any, shows: Any = None, **says: Any) -> None:
        self.observation_space, self.action_space = observed, acted
        self.shows, self.says = shows, says
        self.taken: list[Any] = []
        self.buffer = observed.sample() if shows is None else None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        self.observation_space.seed(seed)
        if "reset" in self.says:
            return self.says["reset"]
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        self.taken.append(action)
        assert action in self.action_space
        if len(self.taken) < 2:
            return self.observation_space.sample(), 1, False, False, {}
        if "raises" in self.says:
            raise self.says["raises"]
        if "step" in self.says:
            return self.says["step"]
        shows = self.observation_space.sample() if self.shows is None else self.shows
        ends = (self.says.get("terminated", False), self.says.get("truncated", False))
        return shows, self.says.get("reward", 1.0), *ends, {}


@pytest.fixture
def odd() -> Any:
    def make_model(observed: Any = None, acted: Any = None, **kwargs: Any) -> GymnasiumModel:
        spaces = {"observed": observed or Box(-1, 1, (2,)), "acted": acted or Discrete(2)}
        return GymnasiumModel("Odd-v0", {**spaces, **kwargs})

    gymnasium.register("Odd-v0", Odd)
    yield make_model
    gymnasium.registry.pop("Odd-v0")


@pytest.mark.parametrize(
    ("observed", "shape", "dtype"),
    [
        (Box(-1, 1, (2, 3)), (6,), torch.float32),
        (Box(-1, 1, ()), (1,), torch.float32),
        (Box(-1, 1, (2,), np.float64), (2,), torch.float64),
        (Box(-1, 1, (2, 1), np.float64), (2,), torch.float64),
        (Box(0, 255, (4, 4, 3), np.uint8), (48,), torch.float32),
        (Box(0, 255, (5,), np.uint8), (5,), torch.float32),
        (Discrete(3, start=5), (), torch.int64),
        (MultiDiscrete([2, 3]), (5,), torch.float32),
        (MultiBinary(4), (4,), torch.float32),
        (DictSpace({"b": Box(-1, 1, (2,)), "a": Discrete(3)}), (5,), torch.float32),
        (TupleSpace([Box(-1, 1, (2,), np.float64), MultiBinary(1)]), (3,), torch.float64),
    ],
)
def test_observations_of_all_spaces(odd: Any, observed: Any, shape: Any, dtype: Any) -> None:
    model = odd(observed)
    assert model.state_space.shape == shape
    batch = environments(model, 2)
    state = batch.reset(np.arange(2), np.array([1 << 33, 2 << 33], dtype=np.uint64))
    assert (state.dtype, tuple(state.shape)) == (dtype, (2, *shape))
    observed.seed(2)
    sample = observed.sample()
    if isinstance(observed, Discrete):
        assert state[1] == sample - 5
        assert model.state_space == Discrete(3)
    else:
        np.testing.assert_array_equal(state[1].flatten(), flatten(observed, sample))
    assert state[1].numpy().astype(model.state_space.dtype) in model.state_space
    step = batch.step(np.arange(2), torch.tensor([0, 1]))
    assert step.next_state.shape == state.shape


@pytest.mark.parametrize(
    ("acted", "action", "expected"),
    [
        (Discrete(3, start=5), torch.tensor([2]), 7),
        (MultiDiscrete([2, 3]), torch.tensor([[1, 2]]), [1, 2]),
        (Box(-2, 4, (2,)), torch.tensor([[-1.0, 0.5]]), [-2.0, 2.5]),
        (Box(-2, 4, (1,), np.float64), torch.tensor([[7.0]]), [4.0]),
        (Box(-2, 4, ()), torch.tensor([[0.5]]), 2.5),
        (
            Box(np.array([[0, 0], [0, 8]]), np.array([[2, 2], [2, 16]]), dtype=np.float64),
            torch.tensor([[-1.0, 0.5, 1.0, 0.0]]),
            [[0, 1.5], [2, 12]],
        ),
    ],
)
def test_actions_of_all_spaces(odd: Any, acted: Any, action: Tensor, expected: Any) -> None:
    batch: Any = environments(odd(acted=acted), 1)
    batch.reset(np.zeros(1, dtype=int), np.zeros(1, dtype=np.uint64))
    batch.step(np.zeros(1, dtype=int), action)
    assert np.array(batch.environments[0].unwrapped.taken[0]).tolist() == expected


@pytest.mark.parametrize(
    ("observed", "shows", "message"),
    [
        (Discrete(3), 3, r"expected one of Discrete\(3\), got 3"),
        (Discrete(3, start=5), 4, r"expected one of Discrete\(3, start=5\), got 4"),
        (Discrete(3), -1, r"expected one of Discrete\(3\), got -1"),
        (MultiDiscrete([2, 3]), np.array([2, 0]), r"expected one of MultiDiscrete.*got \[2, 0\]"),
        (MultiDiscrete([2, 3]), np.array([0, -1]), r"expected one of MultiDiscrete.*got \[0, -1\]"),
        (MultiBinary(2), np.array([0, 2]), r"expected one of MultiBinary\(2\), got \[0, 2\]"),
        (
            DictSpace({"a": Discrete(2), "b": TupleSpace([Box(-1, 1, (1,)), Discrete(2)])}),
            {"a": 1, "b": (np.zeros(1, np.float32), -1)},
            r"\['b'\]\[1\]: expected one of Discrete\(2\), got -1",
        ),
        (
            DictSpace({"a": Discrete(2)}),
            {"a": 0.5},
            r"\['a'\]: expected dtype int64, got float64",
        ),
    ],
)
def test_observations_that_are_no_choice_are_faults(
    odd: Any, observed: Any, shows: Any, message: str
) -> None:
    batch = environments(odd(observed, shows=shows), 1)
    slots = np.zeros(1, dtype=int)
    batch.reset(slots, np.full(1, 9, dtype=np.uint64))
    batch.step(slots, torch.zeros(1, dtype=torch.long))
    with pytest.raises(
        EnvironmentFault, match=rf"slot 0 \(episode seed 9\), step 1: observation: {message}"
    ):
        batch.step(slots, torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        ({"observed": Sequence(Discrete(2))}, "expected observations in a Box, .*, got Sequence"),
        ({"observed": Text(3)}, "expected observations in a Box, .*, got Text"),
        ({"acted": MultiBinary(2)}, "expected actions in a Box, .*, got MultiBinary"),
        ({"acted": DictSpace({"a": Discrete(2)})}, "expected actions in a Box, .*, got Dict"),
        ({"acted": Box(-np.inf, 1, (1,))}, "expected an action box with bounds, .*, got Box"),
    ],
)
def test_other_spaces_are_refused_by_name(odd: Any, spaces: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"Odd-v0: {message}.*; wrap the environment"):
        odd(**spaces)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"raises": KeyError("x")}, "step raised KeyError: 'x'"),
        ({"step": (1, 2)}, r"step: expected five values .*, got \(1, 2\)"),
        ({"shows": np.array([np.nan, 0], np.float32)}, "observation: expected finite .*, got nan"),
        ({"shows": np.zeros(3, np.float32)}, r"observation: expected shape \(2,\), got \(3,\)"),
        ({"shows": np.array(["a", "b"])}, "observation: expected dtype float32, got <U1"),
        ({"reward": math.inf}, "reward: expected finite numbers, got inf"),
        ({"reward": [1.0]}, r"reward: expected a number, got \[1.0\]"),
        ({"reward": None}, "reward raised TypeError"),
        ({"terminated": 1.0}, "terminated: expected True or False, got 1.0"),
        ({"truncated": None}, "truncated: expected True or False, got None"),
    ],
)
def test_faults_say_where(odd: Any, says: Any, message: str) -> None:
    batch = environments(odd(**says), 3)
    batch.reset(np.arange(3), np.arange(3, dtype=np.uint64) + np.uint64(40))
    batch.step(np.array([1]), torch.tensor([0]))
    with pytest.raises(
        EnvironmentFault, match=rf"^Odd-v0, slot 1 \(episode seed 41\), step 1: {message}"
    ):
        batch.step(np.array([1]), torch.tensor([1]))
    assert not batch.alive[1]


def test_faults_of_resets_and_of_actions(odd: Any) -> None:
    start = (np.arange(1), np.array([9], dtype=np.uint64))
    batch = environments(odd(reset=np.zeros(2)), 1)
    with pytest.raises(EnvironmentFault, match=r"seed 9\), step 0: reset: expected a pair"):
        batch.reset(*start)
    batch = environments(odd(), 1)
    batch.reset(*start)
    with pytest.raises(EnvironmentFault, match=r"action: expected one of Discrete\(2\), got 2"):
        batch.step(np.arange(1), torch.tensor([2]))
    batch = environments(odd(acted=Box(-1, 1, (1,))), 1)
    batch.reset(*start)
    with pytest.raises(EnvironmentFault, match="step 0: action: expected finite numbers, got nan"):
        batch.step(np.arange(1), torch.tensor([[math.nan]]))


def test_faults_of_programs() -> None:
    nan = lambda s, a, n: torch.full(s.shape, math.nan)  # noqa: E731
    scalar = lambda s, a, n: torch.tensor(0.0)  # noqa: E731
    for reward, message in (
        (nan, "reward: expected finite"),
        (scalar, "reward: expected a tensor"),
    ):
        batch = environments(clock(reward=reward), 2)
        batch.reset(np.arange(2), np.array([3, 4], dtype=np.uint64))
        with pytest.raises(EnvironmentFault, match=rf"Clock, slot 1 \(.* 4\), step 0: {message}"):
            batch.step(np.array([1, 0]), torch.zeros(2, dtype=torch.long))


class Fragile(Clock):
    """Goes on as many states as its action says; a method of it fails beyond the first state."""

    action_space = Discrete(2)

    def __init__(self, broken: str) -> None:
        method = getattr(self, broken)

        def fail(state: Tensor, *given: Tensor) -> Any:
            if (state > 0).any():
                raise KeyError("x")
            return method(state, *given)

        setattr(self, broken, fail)

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        return dist.Delta(state + action)


@pytest.mark.parametrize(("broken", "step"), [("terminal", 0), ("transition", 1), ("reward", 1)])
def test_what_a_program_raises_is_a_fault(broken: str, step: int) -> None:
    batch = environments(Fragile(broken), 3)
    batch.reset(np.arange(3), np.array([7, 8, 9], dtype=np.uint64))
    for _ in range(step):
        batch.step(np.arange(3), torch.tensor([0, 1, 1]))
    with pytest.raises(
        EnvironmentFault,
        match=rf"Fragile, slot 1 \(episode seed 8\), step {step}: {broken} raised KeyError: 'x'",
    ) as fault:
        batch.step(np.arange(3), torch.tensor([0, 1, 1]))
    assert isinstance(fault.value.__cause__, KeyError)


def test_what_a_program_raises_for_many_alone_or_before_it_starts_is_a_fault() -> None:
    def paid(state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return torch.ones(2)[: len(state)] + torch.zeros(len(state))

    batch = environments(clock(reward=paid), 3)
    batch.reset(np.arange(3), np.array([7, 8, 9], dtype=np.uint64))
    with pytest.raises(EnvironmentFault, match="reward of 3 slots at once, though of none alone, "):
        batch.step(np.arange(3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(EnvironmentFault, match="Clock: initial_state raised KeyError: 'x'"):
        environments(clock(initial_state=lambda: {}["x"]), 2)


class Scribbler(Odd):
    """Writes into the one array that it ever shows."""

    def __init__(self) -> None:
        super().__init__(Box(-9, 9, (1,)), Discrete(2))
        self.array = np.zeros(1, dtype=np.float32)

    def reset(self, **given: Any) -> Any:
        self.array[:] = 0
        return self.array, {}

    def step(self, action: int) -> Any:
        self.array += 1
        return self.array, 0.0, False, False, {}


def test_observations_are_copies() -> None:
    gymnasium.register("Scribbler-v0", Scribbler)
    batch = environments(GymnasiumModel("Scribbler-v0"), 1)
    gymnasium.registry.pop("Scribbler-v0")
    state = batch.reset(np.arange(1), np.zeros(1, dtype=np.uint64))
    step = batch.step(np.arange(1), torch.tensor([0]))
    batch.step(np.arange(1), torch.tensor([0]))
    assert (state.item(), step.next_state.item()) == (0.0, 1.0)


# ------------------------------------------------------------------ vector environments


class Counter(gymnasium.Env[Any, Any]):
    """Shows [10 · reset number, step]; ends after as many steps as it has had resets, and one."""

    observation_space, action_space = Box(-1e9, 1e9, (2,)), Discrete(2)

    def __init__(self) -> None:
        self.resets = 0

    def _shown(self) -> np.ndarray:
        return np.array([10 * self.resets, self.t], dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.resets, self.t = self.resets + 1, 0
        return self._shown(), {}

    def step(self, action: int) -> Any:
        self.t += 1
        return self._shown(), float(action), self.t > self.resets, False, {}


class Foreign(SyncVectorEnv):
    """A vector environment that is not known to restart one slot."""


def foreign(mode: AutoresetMode, count: int) -> VectorEnvironments:
    batch = VectorEnvironments(Foreign([Counter] * count, autoreset_mode=mode))
    batch._one_by_one = mode is AutoresetMode.DISABLED
    return batch


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_vector_environment_gives_the_same_episodes(mode: AutoresetMode) -> None:
    """In each mode those of environments that are run one by one, seed by seed."""
    seeds = episode_seeds(0, np.arange(9))
    rounds: list[list[Any]] = []
    for make_batch in (
        lambda: environments(GymnasiumModel("CartPole-v1"), 3, 25),
        lambda: VectorEnvironments(
            gymnasium.make_vec("CartPole-v1", 3, "sync", vector_kwargs={"autoreset_mode": mode}),
            limit=25,
        ),
    ):
        batch = make_batch()
        told: list[Any] = []
        at, following = np.arange(3), 3
        told.append(batch.reset(np.arange(3), seeds[:3]).tolist())
        for t in range(80):
            slots = np.flatnonzero(batch.alive)
            if not len(slots):
                break
            step = batch.step(slots, torch.from_numpy((slots + at[slots] + t // 3) % 2))
            told.append([field.tolist() for field in dataclasses.astuple(step)])
            for slot in slots[~batch.alive[slots]]:
                if following < 9:
                    at[slot], following = following, following + 1
                    told.append(batch.reset(np.array([slot]), seeds[[at[slot]]]).tolist())
        batch.close()
        rounds.append(told)
    assert rounds[0] == rounds[1]
    assert len(rounds[0]) > 40


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_starts_that_a_vector_environment_makes_by_itself(mode: AutoresetMode) -> None:
    batch = foreign(mode, 2)
    nought, both, first = np.zeros(2, dtype=np.uint64), np.arange(2), np.zeros(1, dtype=int)
    inner: Any = batch.vector_env
    inner.envs[1].resets = 4
    one = torch.ones(2, dtype=torch.long)
    assert batch.reset(both, nought).tolist() == [[10, 0], [50, 0]]
    assert batch.step(both, one).next_state.tolist() == [[10, 1], [50, 1]]
    step = batch.step(both, one)
    assert step.next_state.tolist() == [[10, 2], [50, 2]]  # and no start of another
    assert step.terminated.tolist() == [True, False]
    if mode is AutoresetMode.NEXT_STEP:
        with pytest.raises(
            ValueError, match=r"NEXT_STEP begins .*; reset it one step of the other"
        ):
            batch.reset(first, nought[:1])
        step = batch.step(both[1:], one[1:])
        assert (step.next_state.tolist(), step.reward.tolist()) == ([[50, 3]], [1.0])
    assert batch.reset(first, nought[:1]).tolist() == [[20, 0]]
    rest = [batch.step(both, one).next_state.tolist() for _ in range(2)]
    assert [row[0] for row in rest] == [[20, 1], [20, 2]]
    assert batch.alive.all()


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_what_idle_slots_do_never_comes_to_light(mode: AutoresetMode) -> None:
    """A wave that is run to its end, and another."""
    batch = foreign(mode, 2)
    inner: Any = batch.vector_env
    for expected in (2, 12):
        inner.envs[0].resets, inner.envs[1].resets = 0, 9 if expected == 2 else 12
        batch.reset(np.arange(2), np.zeros(2, dtype=np.uint64))
        lengths = np.zeros(2, dtype=int)
        while batch.alive.any():
            slots = np.flatnonzero(batch.alive)
            step = batch.step(slots, torch.zeros(len(slots), dtype=torch.long))
            lengths[slots] += 1
            assert step.next_state[:, 1].tolist() == lengths[slots].tolist()
        assert lengths[0] == 2


def test_refusals_of_vector_environments() -> None:
    inner = SyncVectorEnv([Counter] * 2)
    batch = VectorEnvironments(inner)
    batch.reset(np.arange(2), np.zeros(2, dtype=np.uint64))
    with pytest.raises(ValueError, match="steps them all, got none for slot 1; step them together"):
        batch.step(np.zeros(1, dtype=int), torch.zeros(1, dtype=torch.long))
    inner.metadata = {}
    with pytest.raises(ValueError, match=r"metadata\['autoreset_mode'\] to be one of NEXT_STEP, "):
        VectorEnvironments(inner)


def test_faults_of_vector_environments() -> None:
    class Late(Counter):
        def step(self, action: int) -> Any:
            return self._shown() * np.nan, 0.0, False, False, {}

    class Broken(Counter):
        def step(self, action: int) -> Any:
            raise KeyError("x")

    for kind, message in (
        (Late, r"SyncVectorEnv, slot 0 \(episode seed 5\), step 0: observation: expected finite"),
        (Broken, r"step of 1 slots raised KeyError: 'x' \(episode seeds 5\)"),
    ):
        batch = VectorEnvironments(SyncVectorEnv([kind]))
        batch.reset(np.arange(1), np.array([5], dtype=np.uint64))
        with pytest.raises(EnvironmentFault, match=message):
            batch.step(np.arange(1), torch.zeros(1, dtype=torch.long))
