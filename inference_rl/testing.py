"""Checks for what users write: `assert_model_valid` and `assert_prior_valid`.

In the spirit of Gymnasium's `check_env`: the first thing wrong is raised as one sentence that says
what was expected, what came, where, and what to do.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Space
from gymnasium.utils.env_checker import check_env
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl.batch import close
from inference_rl.distributions import checked_categoricals
from inference_rl.environment import RAISED, EnvironmentModel, WithPreviousAction
from inference_rl.finite import FiniteModel
from inference_rl.fixed_point import check_every_state_ends
from inference_rl.linear_gaussian import LinearGaussianModel
from inference_rl.prior_checks import check_prior, checked_vectors
from inference_rl.priors import ActionPrior
from inference_rl.simulate import (
    EnvironmentFault,
    GymnasiumModel,
    environments,
    make,
    starting_states,
)
from inference_rl.tabulation import call, checked_discrete, checked_tensor, tabulate

CHECKED_STEPS = 50
"""Steps that a simulator is taken with random actions."""


def assert_model_valid(model: EnvironmentModel, prior: ActionPrior | None = None) -> list[str]:
    """Check a model, and its action prior (or `prior` in its place).

    :returns: remarks on what is legal but may not be meant.
    :raises TypeError, ValueError: the first fault found.
    """
    if not isinstance(model, EnvironmentModel):
        raise TypeError(f"expected an EnvironmentModel, got a {type(model).__name__}")
    for name in ("state_space", "action_space"):
        if not hasattr(model, name):
            raise ValueError(
                f"{model.name}: it has no {name}; set it to a gymnasium.spaces.Discrete or Box"
            )
    if not (isinstance(model.discount, int | float) and 0 <= model.discount <= 1):
        raise ValueError(
            f"{model.name}.discount: expected a number in [0, 1], got {model.discount}"
        )
    if isinstance(model, GymnasiumModel):
        remarks = _check_simulator(model)
        if prior is not None:
            assert_prior_valid(prior, model)
        return remarks
    if getattr(prior, "needs_previous_action", False):
        model = WithPreviousAction(model)
    if isinstance(model.state_space, Discrete) and isinstance(model.action_space, Discrete):
        return _check_finite(model, prior)
    with _reproducible():
        _check_continuous(model)
    assert_prior_valid(prior or model.action_prior, model)
    return []


def assert_prior_valid(prior: ActionPrior, model: EnvironmentModel) -> None:
    """Check an action prior against the action space of `model`.

    :raises ValueError: no distribution, a wrong shape, mass that does not sum to one or that mostly
        lies outside the action space, a density that is not finite on the closed box.
    :warns UserWarning: a density with some of its mass outside the box.
    """
    if getattr(prior, "needs_previous_action", False):
        model = WithPreviousAction(model)
    with _reproducible():
        _check_prior(prior, model)


def _check_prior(prior: ActionPrior, model: EnvironmentModel) -> None:
    finite = isinstance(model.action_space, Discrete) and isinstance(model.state_space, Discrete)
    if finite and not isinstance(model, GymnasiumModel):
        tabulate(model, prior=prior)
    else:
        check_prior(prior, model, _some_states(model))


def _check_finite(model: EnvironmentModel, prior: ActionPrior | None) -> list[str]:
    finite = tabulate(model, prior=prior)
    if finite.discount == 1 and finite.horizon is None:
        check_every_state_ends(
            finite.csr, finite.log_prior.detach().numpy(), finite.is_terminal.numpy()
        )
    if isinstance(model, FiniteModel):
        return []
    _check_batches(model)
    return _unpaid_rewards(model, finite)


def _check_batches(model: EnvironmentModel) -> None:
    """Transition and reward for a single state and for a matrix of them, not just for a row."""
    assert isinstance(model.state_space, Discrete)
    size = int(model.state_space.n)
    live = (~model.terminal(torch.arange(size))).nonzero().squeeze(-1)
    if not len(live):
        return
    of = model.name
    for shape in ((), (2, 1)):
        state = live[:1].expand(shape) if shape else live[0]
        action = torch.zeros_like(state)
        with checked_categoricals(), _reproducible():
            step = call(f"{of}.transition", model.transition, state, action)
            after = checked_discrete(step, state.shape, size, f"{of}.transition").sample()
        for name, arguments in (("reward", (state, action, after)), ("terminal", (state,))):
            value = call(f"{of}.{name}", getattr(model, name), *arguments)
            checked_tensor(value, state.shape, f"{of}.{name}")


def _unpaid_rewards(model: EnvironmentModel, finite: FiniteModel) -> list[str]:
    """A reward for being in a terminal state that entering it does not pay: it is never paid."""
    entered = torch.zeros_like(finite.is_terminal)
    entered[finite.successors.long()] = True
    paid_on_entry = torch.zeros_like(finite.is_terminal)
    paid_on_entry[finite.successors[finite.rewards != 0].long()] = True
    ended = (finite.is_terminal & entered & ~paid_on_entry).nonzero().squeeze(-1)[:1000]
    state = ended.repeat_interleave(finite.num_actions)
    action = torch.arange(finite.num_actions).repeat(len(ended))
    where = f"{model.name}.reward"
    try:
        paid = call(where, model.reward, state, action, state)
        pays = checked_tensor(paid, state.shape, where) != 0
    except (TypeError, ValueError):  # in a terminal state nobody asks for it
        return []
    if not pays.any():
        return []
    return [
        f"state {state[pays][0].item()} is terminal, so the reward for staying there is never "
        "paid, and the step that enters it pays nothing; if it should, let reward look at "
        "next_state"
    ]


def _check_continuous(model: EnvironmentModel) -> None:
    """A model with a Box of states, of actions or of both, at some states that it starts in."""
    action_space, state_space = model.action_space, model.state_space
    if not isinstance(action_space, Box | Discrete) or not isinstance(state_space, Box | Discrete):
        raise ValueError(
            f"{model.name}: expected Discrete or Box state and action spaces, got {state_space} "
            f"and {action_space}"
        )
    for name, space in (("state_space", state_space), ("action_space", action_space)):
        if isinstance(space, Discrete) and space.start != 0:
            raise ValueError(
                f"{model.name}.{name}: expected a Discrete space that counts from 0, got {space}"
            )
    if isinstance(action_space, Box):
        bounded = bool((action_space.low == -1).all() and (action_space.high == 1).all())
        if not bounded and not isinstance(model, LinearGaussianModel):
            raise ValueError(
                f"{model.name}.action_space: expected the box [-1, 1]^d, got {action_space}; scale "
                "the action inside transition and reward"
            )
    states = _some_states(model)
    actions = _some_actions(action_space, states)
    where, batch = f"{model.name}.transition", states.shape[:1]
    with checked_categoricals():
        step = call(where, model.transition, states, actions)
    after = _checked_states(step, batch, state_space, where).sample()
    if after.is_floating_point():
        _check_finite_numbers(after, where)
    ended = call(f"{model.name}.terminal", model.terminal, after)
    checked_tensor(ended, batch, f"{model.name}.terminal", torch.bool)
    reward = call(f"{model.name}.reward", model.reward, states, actions, after)
    _check_finite_numbers(
        checked_tensor(reward, batch, f"{model.name}.reward"), f"{model.name}.reward"
    )


def _some_actions(space: Space[Any], states: Tensor) -> Tensor:
    """A random action of ours for each of `states`, (n, ...)."""
    if isinstance(space, Discrete | MultiDiscrete):
        sizes = torch.as_tensor(space.n if isinstance(space, Discrete) else space.nvec)
        return (torch.rand((len(states), *sizes.shape)) * sizes).long()
    dtype = states.dtype if states.is_floating_point() else torch.get_default_dtype()
    return torch.rand((len(states), *(space.shape or ())), dtype=dtype) * 2 - 1


def _checked_states(
    result: Any, batch: torch.Size, space: Space[Any], where: str
) -> TorchDistribution:
    """`result`, if it is a distribution over the states `space` of this batch shape."""
    if isinstance(space, Discrete):
        return checked_discrete(result, batch, int(space.n), where)
    return checked_vectors(result, batch, space, where)


def _check_finite_numbers(values: Tensor, where: str) -> None:
    wrong = ~torch.isfinite(values)
    if wrong.any():
        raise ValueError(f"{where}: expected finite numbers, got {values[wrong][0].item()}")


def _check_simulator(model: GymnasiumModel) -> list[str]:
    environment = make(model)
    remarks = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_env(environment.unwrapped, skip_render_check=True)
        _check_steps(model)
        remarks = [_GYMNASIUM_DRESS.sub("", str(warning.message)) for warning in caught]
    except (AssertionError, gymnasium.error.Error) as error:
        raise ValueError(f"{model.name}: Gymnasium's check_env says: {error}") from error
    except EnvironmentFault as error:
        raise ValueError(str(error)) from error
    except RAISED as error:
        raise ValueError(
            f"{model.name}: it raised {type(error).__name__} in Gymnasium's check_env: {error}"
        ) from error
    finally:
        close(environment, model.name)
    return [*remarks, "it is a simulator: its dynamics can be sampled, but not inferred exactly"]


def _check_steps(model: GymnasiumModel) -> None:
    """Some steps as they are taken in simulations, which check more than Gymnasium does."""
    with contextlib.closing(environments(model, 2)) as batch, _reproducible():
        slots, seeds = np.arange(2), np.arange(2, dtype=np.uint64) << np.uint64(33)
        state = batch.reset(slots, seeds)
        for _ in range(CHECKED_STEPS):
            slots = np.flatnonzero(batch.alive)
            if not len(slots):
                break
            batch.step(slots, _some_actions(model.action_space, state[: len(slots)]))


_GYMNASIUM_DRESS = re.compile(r"\x1b\[\d*m|WARN: ")
"""Colours and the word that Gymnasium puts around what it warns of."""


def _some_states(model: EnvironmentModel) -> Tensor:
    """Eight states that `model` can start in, (8, ...)."""
    if isinstance(model, GymnasiumModel):
        return starting_states(model)
    where = f"{model.name}.initial_state"
    with checked_categoricals():
        start = call(where, model.initial_state)
    checked = _checked_states(start, torch.Size(), model.state_space, where)
    states: Tensor = checked.sample((8,))
    if states.is_floating_point():
        _check_finite_numbers(states, where)
    return states


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """The same draws every time, and torch's own random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
