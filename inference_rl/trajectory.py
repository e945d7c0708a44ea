"""The one program of this library: a trajectory.

    s_0 ~ p(s_0),   a_t ~ factor(a_t | s_t),   s_{t+1} ~ p(s_{t+1} | s_t, a_t),   O_t = 1

Given a `temperature` it is the model, p(τ, O): actions come from the action prior, and each step is
weighted by p(O_t = 1 | s_t, a_t, s_{t+1}) = exp(reward / temperature). Without one it is the guide,
q(τ): actions come from a policy and nothing is observed. Every routine of this library fits the
second to the first; log p(τ, O) − log q(τ), averaged under q and multiplied by the temperature, is

    J(π) = E_q Σ_t γ^t [ r_t − temperature · KL(π(·|s_t) ‖ ρ(·|s_t)) ]        (KL form)

Sites, the same in both readings:

| site               | value                                              |
|--------------------|----------------------------------------------------|
| `state_0`          | the initial state                                  |
| `action_t`         | the action at step t = 0, 1, ...                   |
| `state_{t+1}`      | the state after it                                 |
| `optimality_t`     | O_t, observed to be 1 (model only)                 |
| `optimality_rest`  | the evidence of all later steps (model, `message`) |

Levine (2018), arXiv:1805.00909, §2.2 (the model) and §3.2 (the guide).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import pyro
import torch
from gymnasium.spaces import Discrete, Space
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from inference_rl.distributions import Optimality, absorbing, as_discrete, idle
from inference_rl.environment import EnvironmentModel

ONE = torch.tensor(1.0)
"""The observed value of every O_t: a scalar, so that enumeration never expands it."""


ActionFactor = Callable[..., TorchDistribution]
"""What chooses actions: the prior, `state -> distribution`, or a policy, `(state, t) -> ...`."""


class MessageFunction(Protocol):
    """The log-evidence of everything after a state, times the temperature: the soft value V(s)."""

    def __call__(self, state: Tensor, /) -> Tensor: ...


def trajectory(
    model: EnvironmentModel,
    factor: ActionFactor,
    horizon: int,
    *,
    temperature: float | Tensor | None = None,
    message: MessageFunction | Tensor | None = None,
) -> Tensor:
    """p(τ, O) when `temperature` is given and `factor` is the prior; q(τ) when it is the guide.

    :param factor: a distribution over actions, from the state, or from the state and the step.
    :param horizon: how many steps the program takes. A model without a horizon of its own is cut
        there, unless `message` stands for the rest.
    :param temperature: > 0, in reward units.
    :param message: V, reward units, as a function of the state or a table (S,): the soft value of
        what follows the last step; zero at terminal states. It is discounted here.
    :returns: the last state.
    :raises ValueError: a temperature that is not positive, or more steps than the model has.

    The discount scales every factor of step t by γ^t in both readings, which makes the bound
    exactly the discounted objective and keeps the score-function gradient right. A trajectory that
    has reached a terminal state stands still: its actions cost nothing, its steps pay nothing.
    """
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature: expected a number > 0 in reward units, got {temperature}")
    if model.horizon is not None and horizon > model.horizon:
        raise ValueError(f"horizon: the model ends after {model.horizon} steps, got {horizon}")
    if isinstance(message, Tensor):
        message = message.__getitem__
    model, factor, message = _stop_at_terminal(model, factor, message)
    state = pyro.sample("state_0", model.initial_state())
    for t in pyro.markov(range(horizon)):
        weight = _weighted(model.discount**t)
        with weight:
            action = pyro.sample(f"action_{t}", factor(state, t))
        next_state = pyro.sample(f"state_{t + 1}", model.transition(state, action))
        if temperature is not None:
            with weight:
                reward = model.reward(state, action, next_state)
                pyro.sample(f"optimality_{t}", Optimality(reward / temperature), obs=ONE)
            if message is not None and t + 1 == horizon:  # inside the Markov loop: the last state
                with _weighted(model.discount**horizon):  # is out of scope after it
                    rest = message(next_state) / temperature
                    pyro.sample("optimality_rest", Optimality(rest), obs=ONE)
        state = next_state
    return state


def _weighted(weight: float) -> poutine.messenger.Messenger:
    """Scale what is sampled within; Pyro's `scale` does not take zero."""
    return poutine.scale(scale=weight) if weight > 0 else poutine.mask(mask=False)


def _stop_at_terminal(
    model: EnvironmentModel, factor: ActionFactor, message: MessageFunction | None
) -> tuple[EnvironmentModel, ActionFactor, MessageFunction | None]:
    """The same three, standing still from the first terminal state on."""
    size, with_step = _size(model.action_space), _takes_step(factor)

    def running_factor(state: Tensor, t: int) -> TorchDistribution:
        return as_discrete(factor(state, t) if with_step else factor(state), size)

    if not model.can_end:
        return _InOneForm(model), running_factor, message

    def stopped_factor(state: Tensor, t: int) -> TorchDistribution:
        return idle(running_factor(state, t), model.terminal(state), size)

    def stopped_message(state: Tensor) -> Tensor:
        assert message is not None
        return torch.where(model.terminal(state), 0.0, message(state))

    return _Stopped(model), stopped_factor, stopped_message if message is not None else None


def _takes_step(factor: ActionFactor) -> bool:
    """Whether `factor` is called with the step too, as policies are and priors are not.

    It is if its second parameter has no default, or is called `t`.
    """
    function = factor.forward if isinstance(factor, nn.Module) else factor
    parameters = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(parameters) < 2:
        return False
    return parameters[1].name == "t" or parameters[1].default is inspect.Parameter.empty


class _InOneForm(EnvironmentModel):
    """`model` with discrete states in a form that Pyro enumerates: always over the whole space."""

    def __init__(self, model: EnvironmentModel) -> None:
        self.model = model
        self.state_space, self.action_space = model.state_space, model.action_space
        self.discount, self.horizon = model.discount, model.horizon
        self.size = _size(model.state_space)

    def initial_state(self) -> TorchDistribution:
        return as_discrete(self.model.initial_state(), self.size)

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        return as_discrete(self.model.transition(state, action), self.size)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return self.model.reward(state, action, next_state)


class _Stopped(_InOneForm):
    """`model` where terminal states lead to themselves and pay nothing."""

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        step = self.model.transition(state, action)
        return absorbing(step, self.model.terminal(state), state, self.size)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        reward = self.model.reward(state, action, next_state)
        return torch.where(self.model.terminal(state), 0.0, reward)


def _size(space: Space[Any]) -> int | None:
    return int(space.n) if isinstance(space, Discrete) else None
