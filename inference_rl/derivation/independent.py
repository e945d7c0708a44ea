"""The other side of a step, for finite models: NumPy, written from the definitions.

Nothing here calls what the library infers with. Short trajectories are listed one by one and summed
over; values are linear systems; the best policy is found by soft policy iteration, where the
library has Newton's method on messages. Values are in reward units, evidence in nats.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse
from scipy.sparse.linalg import splu
from scipy.special import logsumexp, xlogy

if TYPE_CHECKING:
    from inference_rl.finite import FiniteModel

Array = np.ndarray[Any, np.dtype[Any]]

DENSE = 1500
"""States up to which a linear system is solved as a full matrix."""

ROUNDS = 1000
"""Of policy iteration; it takes five to thirty."""


@dataclasses.dataclass(frozen=True)
class Tables:
    """A finite model without a horizon, as arrays.

    :ivar moves: (S·A, S) sparse, P(s' | s, a) in row s·A + a; rows of ends are empty.
    :ivar gain: (S, A), r̄. :ivar prior: (S, A), ρ. :ivar initial: (S,). :ivar live: (S,), whether
        there is something to choose.
    """

    moves: scipy.sparse.csr_array
    gain: Array
    prior: Array
    initial: Array
    live: Array
    discount: float

    @classmethod
    def of(cls, model: FiniteModel) -> Tables:
        """:param model: one without a horizon."""
        shape = (model.num_states, model.num_actions)
        rows = np.repeat(np.arange(shape[0] * shape[1]), np.diff(model.pointers.numpy()))
        chances, paid = model.probabilities.numpy(), model.rewards.numpy()
        moves = scipy.sparse.coo_array(
            (chances, (rows, model.successors.numpy())), shape=(shape[0] * shape[1], shape[0])
        ).tocsr()
        gain = np.bincount(rows, chances * paid, minlength=shape[0] * shape[1])
        return cls(
            moves=moves,
            gain=gain.reshape(shape),
            prior=np.exp(model.log_prior.numpy()),
            initial=model.initial.numpy(),
            live=~model.is_terminal.numpy(),
            discount=float(model.discount),
        )

    def replace(self, **changes: Any) -> Tables:
        return dataclasses.replace(self, **changes)

    def action_value(self, value: Array) -> Array:
        """Q = r̄ + γ P V, (S, A)."""
        return self.gain + self.discount * (self.moves @ value).reshape(self.gain.shape)

    def backed_up(self, value: Array, temperature: float) -> Array:
        """Soft Bellman backup of (S,); temperature zero takes the greatest Q."""
        soft = soft_value(self.action_value(value), self.prior, temperature)
        return np.where(self.live, soft, 0.0)

    def under(self, policy: Array) -> scipy.sparse.csr_array:
        """P_π, (S, S): how the state moves under a policy (S, A)."""
        states, actions = self.gain.shape
        weight = scipy.sparse.csr_array(
            (
                policy.ravel(),
                np.arange(states * actions),
                np.arange(0, states * actions + 1, actions),
            ),
            shape=(states, states * actions),
        )
        return (weight @ self.moves).tocsr()

    def along(self, policy: Array, rate: Array) -> Array:
        """E Σ γ^t rate(s_t) along a policy from every state: (S,), or (S, K) for K rates."""
        rate = np.where(self.live.reshape((-1,) + (1,) * (rate.ndim - 1)), rate, 0.0)
        return solved(self.discount * self.under(policy), rate)

    def value(self, policy: Array, temperature: float) -> Array:
        """V of a policy in KL form, (S,)."""
        return self.along(policy, self.rate(policy, temperature))

    def rate(self, policy: Array, temperature: float) -> Array:
        """E_π r − temperature · KL(π ‖ ρ), (S,)."""
        return (policy * self.gain).sum(-1) - temperature * divergence(policy, self.prior)

    def visits(self, policy: Array) -> Array:
        """E Σ γ^t [s_t = s], (S,), from the model's own start."""
        moves = self.discount * self.under(policy)
        return np.where(self.live, solved(moves.T.tocsr(), self.initial * self.live), 0.0)


def solved(matrix: scipy.sparse.csr_array, right: Array) -> Array:
    """x of (I − matrix) x = right."""
    size = matrix.shape[0]
    if size <= DENSE:
        return np.asarray(np.linalg.solve(np.eye(size) - matrix.toarray(), right))
    system = scipy.sparse.csc_array(scipy.sparse.eye_array(size) - matrix)
    return np.asarray(splu(system).solve(np.ascontiguousarray(right)))


def soft_value(q: Array, prior: Array, temperature: float) -> Array:
    """temperature · log Σ_a ρ e^{Q / temperature}; the greatest allowed Q at zero."""
    allowed = np.where(prior > 0, q, -np.inf)
    if temperature == 0:
        return np.asarray(allowed.max(-1))
    top = allowed.max(-1, keepdims=True)
    with np.errstate(under="ignore"):
        rest = logsumexp((allowed - top) / temperature, b=prior, axis=-1)
    return np.asarray(top[..., 0] + temperature * rest)


def soft_policy(q: Array, prior: Array, temperature: float) -> Array:
    """ρ e^{Q / temperature}, normalised; the best actions, in the prior's shares, at zero."""
    allowed = np.where(prior > 0, q, -np.inf)
    top = allowed.max(-1, keepdims=True)
    if temperature == 0:
        weight = np.where(allowed >= top - 1e-12 * (1 + np.abs(top)), prior, 0.0)
    else:
        with np.errstate(under="ignore", over="ignore"):
            weight = prior * np.exp((allowed - top) / temperature)
    return np.asarray(weight / weight.sum(-1, keepdims=True))


def divergence(policy: Array, other: Array) -> Array:
    """KL(policy ‖ other) over the last dimension, nats."""
    taken = policy > 0
    ratio = np.where(taken, policy, 1.0) / np.where(taken, other, 1.0)
    return np.asarray((policy * np.log(ratio)).sum(-1))


def entropy(policy: Array) -> Array:
    """H over the last dimension, nats."""
    return np.asarray(-xlogy(policy, policy).sum(-1))


def best_value(tables: Tables, temperature: float) -> Array:
    """V* (S,), by soft policy iteration from the prior: evaluate by a linear solve, improve."""
    value, last = tables.value(tables.prior, temperature), np.inf
    for _ in range(ROUNDS):
        policy = soft_policy(tables.action_value(value), tables.prior, temperature)
        better = tables.value(policy, temperature)
        moved, size = np.abs(better - value).max(), np.abs(better).max()
        value = better
        # It converges quadratically: what no longer shrinks, and is small, is rounding.
        if moved <= 1e-15 * size or (moved <= 1e-8 * size and moved >= last / 2):
            return value
        last = moved
    raise RuntimeError(f"policy iteration: expected to settle within {ROUNDS} rounds")


@dataclasses.dataclass(frozen=True)
class Paths:
    """Every trajectory of T steps that can happen under the prior, N of them.

    :ivar states: (T + 1, N). :ivar actions: (T, N). :ivar rewards: (T, N). :ivar log_start,
        log_dynamics: log p(s_0), (N,), and log p(s_{t+1} | s_t, a_t), (T, N). :ivar alive: (T, N),
        whether the step is one of the episode.
    """

    states: Array
    actions: Array
    rewards: Array
    log_start: Array
    log_dynamics: Array
    alive: Array

    def along(self, table: Array) -> Array:
        """table[s_t, a_t], (T, N), of a table (S, A) or (T, S, A); zero after the end."""
        steps = len(self.actions)
        table = np.broadcast_to(table, (steps, *table.shape[-2:]))
        taken = table[np.arange(steps)[:, None], self.states[:-1], self.actions]
        return np.where(self.alive, taken, 0.0)

    def log_chance(self, policy: Array) -> Array:
        """log q(τ) under a policy (S, A) or (T, S, A), (N,)."""
        with np.errstate(divide="ignore"):
            chosen = self.along(np.log(policy))
        return np.asarray(self.log_start + self.log_dynamics.sum(0) + chosen.sum(0))


def every_path(model: FiniteModel) -> Paths:
    """The trajectories of a finite model with a horizon, one by one.

    Terminal states stand still, take action 0, and pay nothing.
    """
    assert model.horizon is not None
    pointers, successors = model.pointers.numpy(), model.successors.numpy().astype(np.int64)
    chances, paid = model.probabilities.numpy(), model.rewards.numpy()
    allowed, ended = model.log_prior.numpy() > -np.inf, model.is_terminal.numpy()
    count = model.num_actions
    begin = np.flatnonzero(model.initial.numpy() > 0)
    states, log_start = [begin], np.log(model.initial.numpy()[begin])
    actions: list[Array] = []
    rewards: list[Array] = []
    moved: list[Array] = []
    alive: list[Array] = []
    for _ in range(model.horizon):
        here, live = states[-1], ~ended[states[-1]]
        origin, action = np.nonzero(np.where(live[:, None], allowed[here], np.arange(count) == 0))
        row = here[origin] * count + action
        fan = np.where(live[origin], pointers[row + 1] - pointers[row], 1)
        which = np.repeat(np.arange(len(origin)), fan)
        slot = pointers[row][which] + np.arange(fan.sum()) - np.repeat(np.cumsum(fan) - fan, fan)
        parent, going = origin[which], live[origin][which]
        slot = np.where(going, slot, 0).clip(max=max(len(successors) - 1, 0))
        chance = np.where(going, chances[slot] if len(chances) else 1.0, 1.0)
        possible = chance > 0
        parent, going, slot, chance = (x[possible] for x in (parent, going, slot, chance))
        states = [column[parent] for column in states]
        actions, rewards, moved, alive = (
            [column[parent] for column in columns] for columns in (actions, rewards, moved, alive)
        )
        log_start = log_start[parent]
        actions.append(action[which][possible])
        states.append(np.where(going, successors[slot] if len(chances) else 0, states[-1]))
        rewards.append(np.where(going, paid[slot] if len(chances) else 0.0, 0.0))
        moved.append(np.log(chance))
        alive.append(going)
    return Paths(
        np.stack(states),
        np.stack(actions),
        np.stack(rewards),
        log_start,
        np.stack(moved),
        np.stack(alive),
    )
