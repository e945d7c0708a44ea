"""Behaviour, and how likely an exact policy makes it: `Episode`.

What comparing priors (`prior_comparison`) and inferring rewards (`demonstrator`) have in common:
episodes of whoever acted, in a finite model, under the exact policy of control, which is its
demonstrator's if the model, the prior and the temperature are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from inference_rl.diagnostics.samples import column
from inference_rl.environment import WithPreviousAction
from inference_rl.finite import FiniteModel
from inference_rl.finite_messages import control_messages

if TYPE_CHECKING:
    import xarray


class Episode(NamedTuple):
    """What was done in one episode; a plain pair of states and actions will do too.

    :ivar states: (T + 1,), or (T,) without the last. :ivar actions: (T,).
    :ivar terminated: whether the environment said that it ends in the last state.
    :ivar truncated: whether it was cut there, as by a limit on time. What follows counts then.
    """

    states: Any
    actions: Any
    terminated: bool = False
    truncated: bool = False

    @property
    def before(self) -> Any:
        """The states in which the actions were taken, (T,)."""
        return self.states[: len(self.actions)]


def episodes_of(given: xarray.DataTree | Sequence[Episode | tuple[Any, Any]]) -> list[Episode]:
    """Those in which something is done, their states and actions as integer tensors.

    :param given: episodes, or what `InferenceResult.sample` gave, of which only what was done while
        alive counts.
    :raises ValueError: states and actions that are not whole numbers, one for each step.
    """
    if isinstance(given, Sequence):
        found = [Episode(*episode) for episode in given]
    else:
        columns = [column(given, "posterior", name) for name in ("state", "action", "alive")]
        state, action, alive = (c.reshape(-1, c.shape[-1]) for c in columns)
        steps = alive.sum(1)
        found = [Episode(s[: n + 1], a[:n]) for s, a, n in zip(state, action, steps, strict=True)]
    return [_as_tensors(e, i) for i, e in enumerate(found) if len(e.actions)]


def _as_tensors(episode: Episode, i: int) -> Episode:
    states, actions = np.asarray(episode.states), np.asarray(episode.actions)
    steps = (len(actions), len(actions) + 1)
    if states.ndim != 1 or actions.ndim != 1 or len(states) not in steps:
        raise ValueError(
            f"episodes: expected states (T + 1,) or (T,) and actions (T,), got "
            f"{states.shape} and {actions.shape} in episode {i}"
        )
    for name, values in (("states", states), ("actions", actions)):
        if values.dtype.kind not in "iu":
            raise ValueError(
                f"episodes: expected {name} as whole numbers, those of a finite model, got "
                f"{values.dtype} in episode {i}"
            )
    return episode._replace(
        states=torch.from_numpy(states.astype(np.int64)),
        actions=torch.from_numpy(actions.astype(np.int64)),
    )


def check_episodes(model: FiniteModel, episodes: Sequence[Episode]) -> None:
    """:raises ValueError: episodes that cannot be those of `model`, whatever it pays."""
    for i, episode in enumerate(episodes):
        for name, values, size in (
            ("states", episode.states, model.num_states),
            ("actions", episode.actions, model.num_actions),
        ):
            if (outside := (values < 0) | (values >= size)).any():
                raise ValueError(
                    f"episodes: expected {name} in 0..{size - 1}, got "
                    f"{int(values[outside][0])} in episode {i}"
                )
        if model.horizon is not None and len(episode.actions) > model.horizon:
            raise ValueError(
                f"episodes: the model ends after {model.horizon} steps, got "
                f"{len(episode.actions)} in episode {i}"
            )
        if (over := model.is_terminal[episode.before]).any():
            t = int(over.nonzero()[0])
            raise ValueError(
                f"episodes: nothing is done in state {int(episode.states[t])}, which is terminal, "
                f"got action {int(episode.actions[t])} there at step {t} of episode {i}"
            )
        last = int(episode.states[-1])
        whole = len(episode.states) > len(episode.actions)
        if episode.terminated and whole and not model.is_terminal[last]:
            raise ValueError(
                f"episodes: episode {i} is terminated in state {last}, where the model goes on, so "
                "that it would count on rewards that nobody could expect; make the state terminal "
                "in the model"
            )


def first_forbidden(model: FiniteModel, episodes: Sequence[Episode]) -> tuple[int, int] | None:
    """The first episode and step at which an action is taken that the prior has no mass on."""
    forbidden = model.log_prior == -math.inf
    for i, episode in enumerate(episodes):
        if (at := forbidden[episode.before, episode.actions]).any():
            return i, int(at.nonzero()[0])
    return None


def remembering(episode: Episode, model: WithPreviousAction) -> Episode:
    """The same, without its last state, in the states of `model`."""
    previous = torch.cat([torch.tensor([model.actions]), episode.actions[:-1]])
    return episode._replace(states=episode.before * model.width + previous)


def log_policy(model: FiniteModel, temperature: float | Tensor) -> Tensor:
    """log π_{ρ,α}, (S, A) or (T, S, A), from the messages: small probabilities underflow.

    :param temperature: α > 0, reward units. Differentiable, as is everything in `model`.
    """
    found = control_messages(model, temperature)
    value = found.v if model.horizon is None else found.v[:-1]
    return model.log_prior + (found.q - value.unsqueeze(-1)) / temperature


def log_likelihood(table: Tensor, episode: Episode) -> float:
    """Σ_t log π(a_t | s_t), nats, for log π as `log_policy` returns it."""
    if table.dim() == 2:
        return float(table[episode.before, episode.actions].sum())
    steps = torch.arange(len(episode.actions))
    return float(table[steps, episode.before, episode.actions].sum())
