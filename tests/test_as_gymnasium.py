"""`as_gymnasium`: Gymnasium's checker accepts every model; the numbers are the program's."""

from __future__ import annotations

import re
import warnings
from typing import Any

import gymnasium
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.utils.env_checker import check_env
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl import EnvironmentModel, FiniteModel, as_gymnasium, load_target
from inference_rl.simulate import GymnasiumModel
from inference_rl.targets import bundled


class Corridor(EnvironmentModel):
    """The README's."""

    state_space, action_space, discount = Discrete(5), Discrete(2), 0.95

    def initial_state(self) -> TorchDistribution:
        return dist.Categorical(torch.tensor([1.0, 0, 0, 0, 0]))

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        ahead = (state + 2 * action - 1).clamp(0, 4)
        slip = torch.nn.functional.one_hot(state, 5) * 0.1
        return dist.Categorical(slip + torch.nn.functional.one_hot(ahead, 5) * 0.9)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return (next_state == 4).double()

    def terminal(self, state: Tensor) -> Tensor:
        return state == 4


class Thermostat(EnvironmentModel):
    """A Box of states and Discrete actions."""

    state_space, action_space = Box(-50.0, 50.0, (1,)), Discrete(3)
    discount = 0.9

    def initial_state(self) -> TorchDistribution:
        return dist.Normal(torch.zeros(1), 1.0).to_event(1)

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        return dist.Normal(0.9 * state + action.unsqueeze(-1) - 1.0, 0.1).to_event(1)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return -next_state.square().sum(-1)


class Steering(Thermostat):
    """A Box of both, and an end."""

    action_space = Box(-1.0, 1.0, (1,))  # type: ignore[assignment]

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        return dist.Normal(state + action, 0.1).to_event(1)

    def terminal(self, state: Tensor) -> Tensor:
        return state[..., 0].abs() > 5


def checked(model: EnvironmentModel) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(as_gymnasium(model).unwrapped, skip_render_check=True)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", bundled("models"))
def test_gymnasium_accepts_every_bundled_model(name: str) -> None:
    said = checked(load_target(name))
    unbounded = [remark for remark in said if "A Box" in remark]  # the double integrator
    assert [remark for remark in said if "recommend" not in remark] == unbounded
    assert not said or name == "double-integrator"


@pytest.mark.parametrize("model", [Corridor(), Thermostat(), Steering()])
def test_gymnasium_accepts_models_as_users_write_them(model: EnvironmentModel) -> None:
    assert checked(model) == []


def test_gymnasium_accepts_tables() -> None:
    assert checked(load_target("FrozenLake-v1")) == []


def test_a_horizon_truncates() -> None:
    model = Thermostat()
    model.horizon = 3
    environment = as_gymnasium(model)
    environment.reset(seed=0)
    ends = [environment.step(1)[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]


def test_an_end_terminates_and_is_final() -> None:
    environment = as_gymnasium(Corridor())
    environment.reset(seed=0)
    for _ in range(100):
        state, reward, terminated, truncated, _ = environment.step(1)
        if terminated:
            break
    assert (state, reward, terminated, truncated) == (4, 1.0, True, False)
    with pytest.raises(ValueError, match=r"Corridor: .* has ended or never began; reset"):
        environment.step(1)
    environment.reset()
    environment.step(1)


def test_an_episode_is_a_function_of_its_seed_and_actions() -> None:
    def run(seed: int) -> list[Any]:
        environment = as_gymnasium(Steering())
        seen = [environment.reset(seed=seed)[0]]
        return [*seen, *(environment.step(np.array([0.1], np.float32))[0] for _ in range(5))]

    np.testing.assert_array_equal(run(3), run(3))
    assert (np.array(run(3)) != np.array(run(4))).all()
    assert run(3)[0].dtype == np.float32


def test_its_steps_are_distributed_as_the_programs() -> None:
    model = load_target("FrozenLake-v1")
    assert isinstance(model, FiniteModel)
    environment = as_gymnasium(model)
    counts = np.zeros(16)
    for seed in range(600):
        environment.reset(seed=seed)
        counts[environment.step(1)[0]] += 1
    assert set(np.flatnonzero(counts)) == {0, 1, 4}
    assert abs(counts[[0, 1, 4]] / 600 - 1 / 3).max() < 5 * (2 / 9 / 600) ** 0.5


def test_rendering() -> None:
    lake = as_gymnasium(load_target("four-rooms"), "ansi")
    assert lake.render() is None
    lake.reset(seed=0)
    shown: Any = lake.render()
    assert shown.splitlines()[1].startswith("#@")
    corridor = as_gymnasium(Corridor(), "ansi")
    corridor.reset()
    assert corridor.render() == "0"
    steering = as_gymnasium(Steering(), "ansi")
    steering.reset()
    assert re.fullmatch(r"\[-?\d.*\]", str(steering.render()))
    with pytest.raises(ValueError, match="render_mode: expected 'ansi' or None, got 'human'"):
        as_gymnasium(Corridor(), "human")


def test_a_step_needs_a_reset_and_a_fitting_action() -> None:
    environment = as_gymnasium(Steering())
    with pytest.raises(RuntimeError, match="Steering: expected a reset before the first step"):
        environment.step(np.zeros(1))
    environment.reset()
    with pytest.raises(ValueError, match=r"Steering: expected an action of shape \(1,\), got \(2,"):
        environment.step(np.zeros(2))


def test_a_simulator_is_a_gymnasium_environment_already() -> None:
    with pytest.raises(TypeError, match=r"make it with gymnasium.make\('Pendulum-v1'\)"):
        as_gymnasium(GymnasiumModel("Pendulum-v1"))


def test_it_can_be_registered_and_simulated() -> None:
    from inference_rl.simulated_program import SimulatedProgram

    gymnasium.register("Corridor-v0", lambda **given: as_gymnasium(Corridor(), **given))
    try:
        simulated = SimulatedProgram(GymnasiumModel("Corridor-v0"), 3, seeds=0)
        state = simulated.initial_state().sample()
        after = simulated.transition(state, torch.ones(3, dtype=torch.long)).sample()
        assert simulated.observation(state).tolist() == [0, 0, 0]
        assert set(simulated.observation(after).tolist()) <= {0, 1}
    finally:
        gymnasium.registry.pop("Corridor-v0")
