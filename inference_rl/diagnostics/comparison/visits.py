"""Exact evaluation of many policies side by side: how often each takes each action in each state.

All that is linear in the visits follows from them: E Σ γ^t r, the entropy along the path, and what
becomes of the return when rewards, or the odds of an action's being carried out, are others.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.sparse

from inference_rl.environment import EnvironmentModel
from inference_rl.evaluation import episode_limit
from inference_rl.finite import FiniteModel

Array = np.ndarray[Any, Any]

MOST_STEPS = 1000
"""Where an episode is cut if nothing else ends it."""

NEGLIGIBLE = 1e-13
"""Weight of what is still to come, relative to what has been, at which a sum is complete."""

BLOCK = 2**24
"""Entries of a table of visits that are held at once."""


def longest(model: EnvironmentModel) -> int:
    """Steps after which episodes of a comparison are cut."""
    return min(episode_limit(model), MOST_STEPS)


@dataclasses.dataclass(frozen=True)
class Dynamics:
    """The tables of a finite model, as arrays.

    :ivar transition: (S·A, S). :ivar reward: (S, A), expected, reward units.
    :ivar initial: (S,). :ivar ended: (S,) booleans.
    :ivar steps: after which an episode is cut.
    """

    transition: scipy.sparse.csr_array
    reward: Array
    initial: Array
    ended: Array
    discount: float
    steps: int

    @classmethod
    def of(cls, model: FiniteModel) -> Dynamics:
        return cls(
            transition=model.csr,
            reward=model.expected_reward().detach().numpy(),
            initial=model.initial.detach().numpy(),
            ended=model.is_terminal.numpy(),
            discount=float(model.discount),
            steps=longest(model),
        )

    def without(self, state: int) -> Dynamics:
        """With a wall in place of `state`: a step that would end there ends where it began."""
        moves = self.transition.tocoo()
        origin = moves.row // self.reward.shape[1]
        there = np.where(moves.col == state, origin, moves.col)
        changed = scipy.sparse.coo_array((moves.data, (moves.row, there)), shape=moves.shape)
        return dataclasses.replace(self, transition=changed.tocsr())

    def visits(self, policies: Array) -> Array:
        """E Σ_t γ^t 1[s_t = s, a_t = a] of each policy, (L, S, A).

        :param policies: (L, S, A), or (L, T, S, A) where they depend on the step.
        """
        size = max(1, BLOCK // self.reward.size)
        parts = [self._visits(policies[at : at + size]) for at in range(0, len(policies), size)]
        return np.concatenate(parts)

    def _visits(self, policies: Array) -> Array:
        count = len(policies)
        total = np.zeros((count, *self.reward.shape))
        here = np.tile(np.where(self.ended, 0.0, self.initial), (count, 1))
        onwards = self.transition.T.tocsr() * self.discount
        for t in range(self.steps):
            acting = here[:, :, None] * at_step(policies, t)
            total += acting
            here = (onwards @ acting.reshape(count, -1).T).T
            here[:, self.ended] = 0.0
            if here.max() <= NEGLIGIBLE * total.max():
                break
        return total

    def returns(self, policies: Array) -> Array:
        """E Σ_t γ^t r_t of each policy, (L,), reward units."""
        found: Array = (self.visits(policies) * self.reward).sum((-2, -1))
        return found

    def mean_entropies(self, policies: Array) -> Array:
        """E Σ_t γ^t H(π(·|s_t)) / E Σ_t γ^t of each policy, (L,), nats per step."""
        if policies.ndim == 3:
            here = self.visits(policies).sum(-1)
            sums = (here * entropy(policies)).sum(-1)
            return np.asarray(sums / np.maximum(here.sum(-1), NEGLIGIBLE))
        paths = [self.entropies(policy, self.steps) for policy in policies]
        weights = [going * self.discount ** np.arange(len(going)) for _, going in paths]
        return np.array([found @ w / w.sum() for (found, _), w in zip(paths, weights, strict=True)])

    def entropies(self, policy: Array, steps: int) -> tuple[Array, Array]:
        """E[H(π(·|s_t)) | the episode goes on] and the chance that it does, for t < `steps`.

        :param policy: (S, A) or (T, S, A).
        """
        here = np.where(self.ended, 0.0, self.initial)
        onwards = self.transition.T.tocsr()
        found, alive = [], []
        for t in range(min(steps, self.steps)):
            going = float(here.sum())
            if going < 1e-6:
                break
            now = at_step(policy[None], t)[0]
            found.append(float(here @ entropy(now)) / going)
            alive.append(going)
            here = onwards @ (here[:, None] * now).ravel()
            here[self.ended] = 0.0
        return np.array(found), np.array(alive)


def at_step(policies: Array, t: int) -> Array:
    """The tables of policies at step `t`, (L, S, A)."""
    return policies if policies.ndim == 3 else policies[:, t]


def entropy(policy: Array) -> Array:
    """H(π(·|s)), nats, over the last axis."""
    safe = np.where(policy > 0, policy, 1.0)
    found: Array = -(policy * np.log(safe)).sum(-1)
    return found


def mode(policy: Array) -> Array:
    """The policy that takes the most likely action, the first of several."""
    return np.eye(policy.shape[-1])[policy.argmax(-1)]
