"""Models whose trajectories can only be drawn: a few steps from one start, by the program itself.

The guide is run once, and replayed as the model, as Pyro's own inference does. A simulator is put
into the program by `SimulatedProgram`. For the other side of a step the same model is stepped
without a program: by `inference_rl.simulate`, or by calling its methods in a loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from gymnasium.spaces import Box, Discrete
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl.distributions import as_probs, log_or_impossible
from inference_rl.environment import EnvironmentModel
from inference_rl.linear_gaussian import LinearGaussianModel
from inference_rl.randomness import derived, torch_seeded
from inference_rl.riccati import solve_linear_gaussian
from inference_rl.simulate import environments, starting_states, time_limit
from inference_rl.simulated_program import SimulatedProgram
from inference_rl.trajectory import ActionFactor, trajectory
from inference_rl.truncated_normal import TruncatedNormal

if TYPE_CHECKING:
    from inference_rl.derivation.subject import Subject

STEPS = 4
"""Of a trajectory, unless the model ends before."""

PATHS = 4000
"""Trajectories of a program."""

SIMULATED_PATHS = 200
"""Of a simulator, each of which is an environment."""

FEATURES = 6

GENTLE = 0.4
"""Strength of a policy whose draws are weighted."""


class SomePolicy:
    """A policy that is nobody's best: smooth in the state, of full support on what is allowed.

    Discrete actions tilt the prior; those of a box are truncated Gaussians, and those of a
    linear-Gaussian model Gaussians around the best ones.

    :param strength: how far from the prior it is.
    :ivar weights: (FEATURES, A or d), what a score function is the gradient by.
    """

    def __init__(self, subject: Subject, name: str, strength: float = 1.0) -> None:
        self.subject, self.space = subject, subject.model.action_space
        generator = subject.generator(f"sampled {name}")
        size = math.prod(subject.model.state_space.shape or (1,))
        self.frequencies = torch.as_tensor(generator.normal(size=(size, FEATURES)))
        self.phases = torch.as_tensor(generator.uniform(0, 2 * math.pi, FEATURES))
        out = math.prod(self.space.shape or (1,))
        if isinstance(self.space, Discrete):
            out = int(self.space.n)
        self.weights = strength * torch.as_tensor(generator.normal(size=(FEATURES, out)))
        self.best = None
        if isinstance(subject.model, LinearGaussianModel):
            self.best = solve_linear_gaussian(subject.model, subject.temperature, "control").policy

    def __call__(self, state: Tensor, t: int) -> TorchDistribution:
        vector = state if self.subject.model.state_space.shape else state.unsqueeze(-1)
        score = torch.cos(vector.double() @ self.frequencies + self.phases) @ self.weights
        if isinstance(self.space, Discrete):
            prior = as_probs(self.subject.prior(state), int(self.space.n)).double()
            return dist.Categorical(logits=log_or_impossible(prior) + score)
        if self.best is not None:
            chosen: Any = self.best(state, t)
            spread = chosen.stddev
            return dist.Normal(chosen.mean + spread * score / 4, spread).to_event(1)
        if isinstance(self.space, Box):
            return TruncatedNormal(0.6 * torch.tanh(score), torch.full_like(score, 0.4)).to_event(1)
        return self.subject.prior(state)


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """N trajectories of T steps, drawn by the program under a policy.

    :ivar states: T + 1 tensors (N, ...). :ivar actions: T of them.
    :ivar log_guide, log_prior: (T, N), log π and log ρ of what was done, nats, zero after the end.
    :ivar log_weight: (T, N), log p(O_t | ...) as the program has it, nats.
    :ivar log_joint, log_q: (N,), of whole trajectories, nats.
    :ivar alive: (T, N), whether the episode went on until then.
    """

    states: list[Tensor]
    actions: list[Tensor]
    log_guide: Tensor
    log_prior: Tensor
    log_weight: Tensor
    log_joint: Tensor
    log_q: Tensor
    alive: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """log p(τ, O) − log q(τ), (N,)."""
        return self.log_joint - self.log_q


class _FromOneStart(EnvironmentModel):
    """A model whose episodes all start in one state."""

    def __init__(self, model: EnvironmentModel, start: Tensor, discount: float) -> None:
        self.model, self.start, self.discount = model, start, discount
        self.state_space, self.action_space = model.state_space, model.action_space
        self.horizon = model.horizon

    def initial_state(self) -> TorchDistribution:
        return dist.Delta(self.start, event_dim=self.start.dim())

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        return self.model.transition(state, action)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return self.model.reward(state, action, next_state)

    def terminal(self, state: Tensor) -> Tensor:
        return self.model.terminal(state)

    @property
    def can_end(self) -> bool:
        return self.model.can_end


def steps(subject: Subject) -> int:
    """How many steps a trajectory has."""
    limits = [STEPS, subject.model.horizon or STEPS]
    if subject.simulated:
        limits.append(time_limit(subject.model) or STEPS)
    return min(limits)


def paths(subject: Subject) -> int:
    """How many trajectories are drawn."""
    return SIMULATED_PATHS if subject.simulated else PATHS


def start_of(subject: Subject) -> Tensor:
    """The state from which all of them start, one in which there is something to do."""
    states = starting_states(subject.model)
    live = (~subject.model.terminal(states)).nonzero().squeeze(-1)
    return states[live[0] if len(live) else 0]


def draw(subject: Subject, factor: ActionFactor, name: str, *, discount: float = 1.0) -> Rollouts:
    """Run q(τ) under a policy over the model's states, and replay it as p(τ, O).

    :param name: of the random numbers. :param discount: γ of the program.
    """
    count, horizon = paths(subject), steps(subject)
    with torch_seeded(derived(subject.seed, f"rollouts {name}")), contextlib.ExitStack() as stack:
        program: EnvironmentModel
        prior: ActionFactor = subject.prior
        if subject.simulated:
            simulated = SimulatedProgram(subject.model, count, _same_start(subject, count))
            stack.callback(simulated.close)
            simulated.discount = discount
            factor, prior = simulated.reading(factor), simulated.reading(prior)
            program = simulated
        else:
            program = _FromOneStart(subject.model, start_of(subject), discount)
        with torch.no_grad(), pyro.plate("paths", count):
            guide = poutine.trace(trajectory).get_trace(program, factor, horizon)
            replayed = poutine.replay(trajectory, guide)
            joint = poutine.trace(replayed).get_trace(
                program, prior, horizon, temperature=subject.temperature
            )
    for trace in (guide, joint):
        trace.compute_log_prob()

    states = [_value(guide, f"state_{t}") for t in range(horizon + 1)]
    alive = torch.stack([~program.terminal(state).expand(count) for state in states[:-1]])

    def column(trace: Any, site: str) -> Tensor:
        nodes = [trace.nodes[f"{site}_{t}"] for t in range(horizon)]
        table = torch.stack([node["unscaled_log_prob"].expand(count) for node in nodes])
        return torch.where(alive, table, 0.0)

    def whole(trace: Any) -> Tensor:
        total = torch.zeros(count, dtype=torch.float64)
        for name, node in trace.nodes.items():
            if "log_prob" in node:
                # After the end discrete actions are uniform, whoever chooses them.
                acts = name.startswith("action")
                kept = alive[int(name.rpartition("_")[2])] if acts else torch.ones(count).bool()
                total = total + torch.where(kept, node["log_prob"], 0.0)
        return total

    if subject.simulated:
        states = [simulated.observation(state) for state in states]
    return Rollouts(
        states=[state.expand(count, *state.shape[1:]) for state in states],
        actions=[_value(guide, f"action_{t}") for t in range(horizon)],
        log_guide=column(guide, "action"),
        log_prior=column(joint, "action"),
        log_weight=column(joint, "optimality"),
        log_joint=whole(joint),
        log_q=whole(guide),
        alive=alive,
    )


def _value(trace: Any, site: str) -> Tensor:
    value: Tensor = trace.nodes[site]["value"]
    return value


def _same_start(subject: Subject, count: int) -> np.ndarray:
    """Seeds of episodes that all start alike."""
    seed = np.uint64(derived(subject.seed, "start")) << np.uint64(33)
    return np.full(count, seed, dtype=np.uint64)


def stepped(subject: Subject, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """What the same actions are paid without a program, (T, N), and whether they still counted.

    A simulator is stepped anew; of a program its own methods are called.
    """
    count, horizon = paths(subject), steps(subject)
    reward = torch.zeros(horizon, count, dtype=torch.float64)
    alive = torch.zeros(horizon, count, dtype=torch.bool)
    if subject.simulated:
        slots = np.arange(count)
        with contextlib.closing(environments(subject.model, count)) as batch:
            batch.reset(slots, _same_start(subject, count))
            for t, action in enumerate(rollouts.actions):
                rows = torch.from_numpy(np.flatnonzero(batch.alive))
                if not len(rows):
                    break
                step = batch.step(rows.numpy(), action[rows])
                reward[t, rows], alive[t, rows] = step.reward.double(), True
        return reward, alive
    running = torch.ones(count, dtype=torch.bool)
    for t, action in enumerate(rollouts.actions):
        state, after = rollouts.states[t], rollouts.states[t + 1]
        running = running & ~subject.model.terminal(state)
        paid = subject.model.reward(state, action, after).double()
        reward[t], alive[t] = torch.where(running, paid, 0.0), running
    return reward, alive


def simulate(subject: Subject, factor: ActionFactor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Trajectories by a loop of our own: rewards, log π and log ρ, (T, N), zero after the end."""
    count, horizon = paths(subject), steps(subject)
    columns: list[list[Tensor]] = [[], [], []]
    with (
        torch_seeded(derived(subject.seed, f"loop {name}")),
        torch.no_grad(),
        contextlib.ExitStack() as stack,
    ):
        batch = None
        if subject.simulated:
            batch = environments(subject.model, count)
            stack.callback(batch.close)
            state = batch.reset(np.arange(count), _same_start(subject, count))
            alive = torch.from_numpy(batch.alive.copy())
        else:
            start = start_of(subject)
            state = start.expand(count, *start.shape)
            alive = ~subject.model.terminal(state)
        for t in range(horizon):
            chosen = factor(state, t)
            action = chosen.sample()
            paid = torch.zeros(count, dtype=torch.float64)
            if batch is not None:
                rows = alive.nonzero().squeeze(-1)
                after = state
                if len(rows):
                    step = batch.step(rows.numpy(), action[rows])
                    after = state.clone()
                    after[rows] = step.next_state.to(state.dtype)
                    paid[rows] = step.reward.double()
                ended = ~torch.from_numpy(batch.alive.copy())
            else:
                drawn = subject.model.transition(state, action).sample()
                going = alive.reshape(alive.shape + (1,) * (drawn.dim() - 1))
                after = torch.where(going, drawn, state)
                paid = torch.where(alive, subject.model.reward(state, action, after).double(), 0.0)
                ended = subject.model.terminal(after)
            for column, value in zip(
                columns,
                (paid, chosen.log_prob(action), subject.prior(state).log_prob(action)),
                strict=True,
            ):
                column.append(torch.where(alive, value.double(), 0.0))
            state, alive = after, alive & ~ended
    reward, log_guide, log_prior = (torch.stack(column) for column in columns)
    return reward, log_guide, log_prior
