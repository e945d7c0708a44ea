"""A real environment in the trajectory program: Pyro's own SVI runs on it, one step at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from gymnasium.spaces import Box
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from inference_rl import Exact, FiniteModel, Policy, infer, load_target, tabulate
from inference_rl.distributions import categorical
from inference_rl.randomness import episode_seeds
from inference_rl.simulate import GymnasiumModel
from inference_rl.simulated_program import SimulatedProgram
from inference_rl.trajectory import trajectory

T, SIZE, TEMPERATURE = 4, 256, 0.5


class Softmax(Policy):
    """A table of logits to learn."""

    kind = "softmax"

    def __init__(self, states: int, actions: int) -> None:
        super().__init__()
        start = torch.sin(torch.arange(states * actions, dtype=torch.float64))
        self.logits = torch.nn.Parameter(start.reshape(states, actions))

    def forward(self, state: Tensor, t: int | None = None) -> TorchDistribution:
        return categorical(self.logits[state].softmax(-1))

    def mode(self, state: Tensor, t: int | None = None) -> Tensor:
        return self.logits[state].argmax(-1)


def objective(model: FiniteModel, policy: Softmax) -> Tensor:
    """J of `T` steps by the recursion, differentiable in the logits."""
    log_policy = policy.logits.log_softmax(-1)
    bonus = -TEMPERATURE * (log_policy + math.log(model.num_actions))
    v = torch.zeros(model.num_states, dtype=torch.float64)
    for _ in range(T):
        q = model.expected_reward() + bonus + model.discount * model.expected_value(v)
        v = torch.where(model.is_terminal, 0.0, (log_policy.exp() * q).sum(-1))
    return model.initial @ v


def programs(simulated: SimulatedProgram, policy: Policy, steps: int = T) -> tuple[Any, Any]:
    prior, chosen = simulated.reading(simulated.model.action_prior), simulated.reading(policy)

    def model() -> None:
        with pyro.plate("episodes", simulated.size):
            trajectory(simulated, prior, steps, temperature=TEMPERATURE)

    def guide() -> None:
        pyro.module("policy", policy)
        with pyro.plate("episodes", simulated.size):
            trajectory(simulated, chosen, steps)

    return model, guide


@pytest.mark.parametrize("target", ["grid-world", "FrozenLake-v1"])
def test_the_gradient_of_svi_is_the_exact_one_on_average(target: str) -> None:
    described = load_target(target, discount=0.9)
    finite = tabulate(described)
    policy = Softmax(finite.num_states, finite.num_actions)
    exact = torch.autograd.grad(objective(finite, policy), policy.logits)[0]
    repeats, size = (40, SIZE) if target == "grid-world" else (15, 64)
    simulated = SimulatedProgram(described, size, seeds=3)
    model, guide = programs(simulated, policy)
    torch.manual_seed(0)
    found, losses = [], []
    for _ in range(repeats):
        loss = Trace_ELBO().differentiable_loss(model, guide)
        found.append(-TEMPERATURE / size * torch.autograd.grad(loss, policy.logits)[0])
        losses.append(-TEMPERATURE / size * float(loss.detach()))
    simulated.close()
    gradients = torch.stack(found)
    error = gradients.std(0) / math.sqrt(repeats)
    assert not ((gradients.mean(0) - exact).abs() > 5 * error + 1e-12).any()
    assert ((exact.abs() > 5 * error) & (error > 0)).sum() > 3
    value = float(objective(finite, policy).detach())
    assert abs(np.mean(losses) - value) < 5 * np.std(losses) / math.sqrt(repeats)


def test_svi_improves_the_objective() -> None:
    described = load_target("grid-world", discount=0.9)
    finite = tabulate(described)
    policy = Softmax(finite.num_states, finite.num_actions)
    simulated = SimulatedProgram(described, SIZE, seeds=0)
    before = float(objective(finite, policy).detach())
    pyro.clear_param_store()
    svi = SVI(*programs(simulated, policy), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    torch.manual_seed(0)
    for _ in range(40):
        svi.step()
    assert float(objective(finite, policy).detach()) > before + 0.05
    pyro.clear_param_store()


def test_each_episode_takes_as_many_steps_as_the_program() -> None:
    simulated = SimulatedProgram(GymnasiumModel("Pendulum-v1"), 3, seeds=0)
    zero = lambda state: pyro.distributions.Delta(state[..., :1] * 0, event_dim=1)  # noqa: E731
    model = lambda factor: trajectory(simulated, factor, T, temperature=1.0)  # noqa: E731
    for turn in (1, 2):
        with pyro.plate("episodes", 3):
            guide = poutine.trace(trajectory).get_trace(simulated, simulated.reading(zero), T)
        assert simulated.steps == turn * 3 * T
        with pyro.plate("episodes", 3):
            replayed = poutine.trace(poutine.replay(model, guide)).get_trace(
                simulated.reading(zero)
            )
        assert simulated.steps == turn * 3 * T
        for t in range(T):
            state, weight = (
                guide.nodes[f"state_{t + 1}"]["value"],
                replayed.nodes[f"optimality_{t}"],
            )
            assert torch.equal(weight["fn"].log_weight, state[:, 3])
            assert (state[:, 3] < 0).all()
    assert simulated.observation(state).dtype == torch.float32
    assert simulated.observation(state).shape == (3, 3)
    simulated.close()


def test_an_ended_episode_stands_still() -> None:
    simulated = SimulatedProgram(GymnasiumModel("CartPole-v1"), 4, seeds=0)
    push = lambda state: pyro.distributions.Delta(torch.ones(len(state), dtype=torch.long))  # noqa: E731
    with pyro.plate("episodes", 4):
        trace = poutine.trace(trajectory).get_trace(simulated, simulated.reading(push), 30)
    states = torch.stack([trace.nodes[f"state_{t}"]["value"] for t in range(31)])
    ended = simulated.terminal(states)
    lengths = (~ended).sum(0)
    assert ended[-1].all()
    assert simulated.steps == int(lengths.sum())
    assert (states[:, :, 4].sum(0) >= 1).all()
    for slot, length in enumerate(lengths.tolist()):
        assert torch.equal(states[length, slot], states[-1, slot])


# ------------------------------------------------------------------ refusals


def test_an_environment_cannot_be_stepped_twice() -> None:
    simulated = SimulatedProgram(load_target("chain"), 2, seeds=0)
    start = simulated.initial_state()
    state = start.sample()
    with pytest.raises(RuntimeError, match=r"cannot be stepped twice .*; replay the value"):
        start.sample()
    step = simulated.transition(state, torch.zeros(2, dtype=torch.long))
    other = simulated.transition(state, torch.ones(2, dtype=torch.long))
    step.sample()
    for again in (step, other):
        with pytest.raises(RuntimeError, match="an environment cannot be stepped twice"):
            again.sample()
    assert simulated.steps == 2


def test_given_episodes_start_once() -> None:
    seeds = episode_seeds(0, np.arange(2))
    simulated = SimulatedProgram(load_target("chain"), 2, seeds=seeds)
    simulated.initial_state().sample()
    with pytest.raises(RuntimeError, match="expected one start with the given episode seeds"):
        simulated.initial_state().sample()


def test_a_trajectory_longer_than_the_environments_limit_is_refused() -> None:
    model = GymnasiumModel("Pendulum-v1", {"max_episode_steps": 3})
    simulated = SimulatedProgram(model, 2, seeds=0)
    zero = simulated.reading(lambda s: pyro.distributions.Delta(s[..., :1] * 0, event_dim=1))
    trajectory(simulated, zero, 3)
    with pytest.raises(RuntimeError, match=r"no more steps than the environment's own limit"):
        trajectory(simulated, zero, 4)


def test_what_needs_its_density_or_more_draws_is_refused() -> None:
    simulated = SimulatedProgram(load_target("chain"), 2, seeds=0)
    step = simulated.initial_state()
    message = "simulated Chain is a simulator of 2 episodes .*; write the dynamics"
    with pytest.raises(TypeError, match=message):
        step.sample((3,))
    with pytest.raises(TypeError, match=message):
        step.enumerate_support()
    with pytest.raises(TypeError, match=message):
        step.expand((3, 2))
    with pytest.raises(TypeError, match="exact inference covers finite models"):
        infer(simulated, Exact(temperature=1.0))


def test_pictures_are_no_states() -> None:
    class Pictures(GymnasiumModel):
        def __init__(self) -> None:
            super().__init__("Pendulum-v1")
            self.state_space = Box(0, 255, (4, 4, 3), np.uint8)

    with pytest.raises(TypeError, match="expected states that are numbers or vectors"):
        SimulatedProgram(Pictures(), 1, seeds=0)
