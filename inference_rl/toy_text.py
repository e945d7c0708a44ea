"""Gymnasium's toy-text environments (FrozenLake, CliffWalking, Taxi) as finite models.

Their table `P[s][a] = [(probability, next state, reward, terminated), ...]` is taken as it is but
for two faults: a next state may be listed more than once (its probabilities are added up), and the
states that end an episode may have successors of their own (nothing follows them here). Taxi also
enters some of those without ending the episode, but only from states that no episode reaches; it
ends there too here. The time limit is not part of `P`, and so not of the model; evaluation runs
with it.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import scipy.sparse
import torch

from inference_rl.environment import GridLayout
from inference_rl.finite import FiniteModel, index_dtype, uniform_log_prior

_LEFT, _DOWN, _RIGHT, _UP = (0, -1), (1, 0), (0, 1), (-1, 0)


def from_toy_text(
    environment: gymnasium.Env[Any, Any], kwargs: dict[str, Any], discount: float
) -> FiniteModel:
    """The finite model of an environment that has the table `P` and `initial_state_distrib`.

    :param kwargs: what the environment was made with.
    :raises ValueError: dynamics that `P` does not hold, a state that some transitions enter as the
        end and others do not, or a transition whose reward is random beyond (s, a, s').
    """
    assert environment.spec is not None
    inside: Any = environment.unwrapped
    if getattr(inside, "fickle_passenger", False):
        raise ValueError(
            f"{environment.spec.id}: fickle_passenger is no part of Gymnasium's table of the "
            "dynamics, so the passenger's whims cannot be inferred on; leave it out"
        )
    states, actions = len(inside.P), len(inside.P[0])
    entries = np.array(
        [
            (s * actions + a, s2, p, r, ends)
            for s in range(states)
            for a in range(actions)
            for p, s2, r, ends in inside.P[s][a]
            if p > 0
        ],
        dtype=float,
    )
    rows, successors = entries[:, 0].astype(np.int64), entries[:, 1].astype(np.int64)
    ends = entries[:, 4] > 0
    terminal = np.zeros(states, dtype=bool)
    terminal[successors[ends]] = True
    live = ~terminal[rows // actions]
    initial = np.asarray(inside.initial_state_distrib, dtype=float)
    reached = _reachable(initial > 0, rows[live] // actions, successors[live])
    torn = live & ~ends & terminal[successors] & reached[rows // actions]
    if torn.any():
        raise ValueError(
            f"{environment.spec.id}: expected every transition into a terminal state to end the "
            f"episode, but state {successors[torn][0]} is also entered without ending it"
        )
    rows, successors, entries = rows[live], successors[live], entries[live]
    keys, place = np.unique(rows * states + successors, return_inverse=True)
    rewards = np.zeros(len(keys))
    rewards[place] = entries[:, 3]
    several = rewards[place] != entries[:, 3]
    if several.any():
        row, successor = rows[several][0], successors[several][0]
        raise ValueError(
            f"{environment.spec.id}: expected one reward for each (state, action, next state), got "
            f"several for ({row // actions}, {row % actions}, {successor}); write it as an "
            "EnvironmentModel in which the next state tells them apart"
        )
    model = FiniteModel(
        pointers=torch.from_numpy(np.searchsorted(keys // states, np.arange(states * actions + 1))),
        successors=torch.from_numpy(keys % states).to(index_dtype(states)),
        probabilities=torch.from_numpy(np.bincount(place, weights=entries[:, 2])),
        rewards=torch.from_numpy(rewards),
        initial=torch.from_numpy(initial),
        log_prior=uniform_log_prior(states, actions),
        terminal=torch.from_numpy(terminal),
        discount=discount,
        horizon=None,
    )
    model.gymnasium_id, model.gymnasium_kwargs = environment.spec.id, dict(kwargs)
    if kwargs.get("map_name", "") is None:  # a map at random, and another one the next time
        model.gymnasium_kwargs["desc"] = [b"".join(row).decode() for row in inside.desc]
    model.name = environment.spec.id
    _describe(model, inside)
    return model


def _reachable(start: np.ndarray, origin: np.ndarray, successor: np.ndarray) -> np.ndarray:
    """Which states the edges origin -> successor lead to from `start`, (S,) booleans each."""
    shape = (len(start), len(start))
    edges = scipy.sparse.csr_array((np.ones(len(origin)), (successor, origin)), shape=shape)
    reached, before = start, None
    while before is None or (reached != before).any():
        before = reached
        reached = before | (edges @ before.astype(float) > 0)
    return reached


def _describe(model: FiniteModel, inside: Any) -> None:
    """Labels and layout of the environments we know; others keep their numbers."""
    kind = type(inside).__name__
    if kind == "FrozenLakeEnv":
        model.action_labels = ("left", "down", "right", "up")
        lake = "".join(b"".join(row).decode() for row in inside.desc)
        moves = (_LEFT, _DOWN, _RIGHT, _UP)
        model.layout = GridLayout(inside.nrow, inside.ncol, moves, lake)
    elif kind == "CliffWalkingEnv":
        rows, columns = inside.shape
        model.action_labels = ("up", "right", "down", "left")
        cells = ["C" if cliff else "." for cliff in inside._cliff.flatten()]
        cells[inside.start_state_index], cells[-1] = "S", "G"
        moves = (_UP, _RIGHT, _DOWN, _LEFT)
        model.layout = GridLayout(rows, columns, moves, "".join(cells))
    elif kind == "TaxiEnv":
        model.action_labels = ("south", "north", "east", "west", "pick up", "drop off")
        stands = ("red", "green", "yellow", "blue")
        labels = []
        for state in range(model.num_states):
            row, column, passenger, destination = inside.decode(state)
            where = (*(f"at {s}" for s in stands), "in the taxi")[passenger]
            labels.append(f"taxi ({row}, {column}), passenger {where}, to {stands[destination]}")
        model.state_labels = tuple(labels)
