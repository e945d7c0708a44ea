"""Waiting that is free: end components, and the Bellman backup in which each is a single state.

Without a discount and at temperature zero, a value is proved to be large enough by a supersolution
U, T U <= U - c. None exists where actions that pay nothing can keep the episode in a set of states
for ever: U(s) <= U(s) - c. Such a set is an end component, and the remedy is to make one state of
it, whose actions are those of its members but for the free ones inside (Haddad and Monmege 2018,
doi:10.1016/j.tcs.2016.12.003; Brázdil et al. 2014, arXiv:1402.2967).

That changes nothing for policies that end. From any member every other is reached for nothing, so
that all are worth the same; and a U that is constant on the component has T_a U = U for the free
actions inside, which are rows of probabilities, so that U >= T_π U, and hence U >= V_π, for every
policy π that ends.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array, csr_matrix
from scipy.sparse.csgraph import connected_components

from inference_rl.bellman_operators import ControlBackup


def end_components(transition: csr_array, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The maximal sets of states that some of the `free` actions can keep for ever.

    :param transition: (S·A, S) CSR; row s·A + a is P(· | s, a).
    :param free: (S, A) booleans, the actions that count.
    :returns: the component of each state, (S,), numbered from zero, one of its own for a state that
        belongs to none; and the actions that stay inside one, (S, A) booleans.
    """
    states, actions = free.shape
    row = np.repeat(np.arange(states * actions), np.diff(transition.indptr))
    inside = free.ravel().copy()
    kept = inside[row] & (transition.data > 0)
    row, target = row[kept], transition.indices[kept]
    stuck = np.flatnonzero(~free.any(axis=1))
    _forbid(inside, row, target, row[np.isin(target, stuck)], actions)
    while True:
        kept = inside[row]
        row, target = row[kept], target[kept]
        source = row // actions
        # SciPy's search never returns where an edge is listed twice: this adds them up.
        edges = csr_matrix((np.ones(row.size), (source, target)), shape=(states, states))
        _, component = connected_components(edges, connection="strong")
        leaving = row[component[source] != component[target]]
        if leaving.size == 0:
            return component, inside.reshape(free.shape)
        _forbid(inside, row, target, leaving, actions)


def _forbid(
    inside: np.ndarray, row: np.ndarray, target: np.ndarray, lost: np.ndarray, actions: int
) -> None:
    """Take `lost` from `inside`, and whatever may lead to a state that has no action left.

    By a search backwards: along a corridor, a search for components after each of them would take
    as many as there are states.
    """
    left = inside.reshape(-1, actions).sum(axis=1)
    order = np.argsort(target, kind="stable")
    into, starts = row[order], np.searchsorted(target[order], np.arange(left.size + 1))
    while (lost := np.unique(lost[inside[lost]])).size:
        inside[lost] = False
        states, counts = np.unique(lost // actions, return_counts=True)
        left[states] -= counts
        empty = states[left[states] == 0]
        lost = np.concatenate([lost[:0], *(into[starts[s] : starts[s + 1]] for s in empty)])


class CollapsedBackup:
    """T V(c) = max of Q(s, a) over the members s of c and their actions a, for components c.

    :param backup: the backup of all states at temperature zero, in which the actions that stay
        inside a component are forbidden.
    :param component: (S,), as `end_components` numbers them; terminal states have their own.
    """

    def __init__(self, backup: ControlBackup, component: np.ndarray) -> None:
        self.component, self.slope = component, backup.slope
        self._backup = backup
        self._members = np.argsort(component, kind="stable")
        self._starts = np.flatnonzero(np.diff(component[self._members], prepend=-1))
        self.terminal = backup.terminal[self._members[self._starts]]

    def __call__(self, value: np.ndarray) -> np.ndarray:
        return self._best(self._backup(value[self.component]))

    def rounding(self, value: np.ndarray, backed_up: np.ndarray) -> float:
        return self._backup.rounding(value[self.component], backed_up[self.component])

    def derivative(self, value: np.ndarray, backed_up: np.ndarray) -> csr_array:
        # Ties are shared, as in `ControlBackup.policy` and for the same reason.
        slack = 4 * self.rounding(value, backed_up)
        best = self._backup.q >= backed_up[self.component, None] - slack
        return self._under(np.where(best, self._backup.prior, 0.0))[0]

    def prior_dynamics(self) -> tuple[csr_array, np.ndarray]:
        """P under the prior of the actions that leave, (C, C), and their expected reward, (C,)."""
        matrix, policy = self._under(self._backup.prior)
        rate = (policy * np.where(policy > 0, self._backup.reward, 0.0)).sum(axis=1)
        return matrix, np.bincount(self.component, rate)

    def _under(self, weights: np.ndarray) -> tuple[csr_array, np.ndarray]:
        """P (C, C), entries repeated, under the policy with these weights (S, A); that policy."""
        # The largest is one, lest a sum of vanishing weights divide by zero.
        policy = weights / self._best(weights.max(axis=1))[self.component, None]
        policy /= np.bincount(self.component, policy.sum(axis=1))[self.component, None]
        rows = self._backup.evaluation(policy)[self._members]
        count = self._starts.size
        starts = rows.indptr[np.append(self._starts, rows.shape[0])]
        return csr_array((rows.data, self.component[rows.indices], starts), (count, count)), policy

    def _best(self, table: np.ndarray) -> np.ndarray:
        """The largest entry among the members, (C,)."""
        return np.maximum.reduceat(table[self._members], self._starts)
