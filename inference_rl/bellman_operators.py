"""Bellman backups on sparse tables, with their rounding error and their derivative.

Each operator T maps a value (S,) to the value one step earlier. Three facts are all that a solver
needs of it, and all that these classes offer: T V, a bound on how far the computed T V is from the
exact one, and the derivative of T at V. The derivative is discount times the transition matrix
under the policy that is best against V (control) or under the posterior's own dynamics (posterior),
so that a Newton step is an evaluation of that policy.

The transition is a CSR matrix of shape (S·A, S) whose row s·A + a is P(· | s, a). It is read in
blocks of states that share its memory, by one thread per core. `ControlBackup` also takes the rows
of n states alone, with as many columns as they see states, their own first: a value then has one
entry a column, and T V one a row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from scipy.sparse import csr_array, csr_matrix
from scipy.sparse.csgraph import connected_components

Result = TypeVar("Result")

UNIT_ROUNDOFF = float(np.finfo(np.float64).eps) / 2
WHOLE = 1e-13
"""How far a row of rounded probabilities may be from a sum of one."""
_UNDERFLOW = float(np.finfo(np.float64).smallest_subnormal)
_BLOCK_NONZEROS = 1 << 19
"""Threads take turns at Python's lock: smaller blocks would spend their time waiting for it."""
_THREAD_NONZEROS = 1 << 19
_NARROW = 16
_POWER_ITERATIONS = 5000
_NEAR = 0.5
"""Nats. Below it, the bounds on rounding of the two forms of the posterior's backup are alike."""


class LinearMap(Protocol):
    """A matrix, as a `csr_array` is one, or what can multiply like it."""

    def __matmul__(self, vector: np.ndarray) -> np.ndarray: ...


class BellmanOperator(Protocol):
    """A monotone operator on values, and what Newton's method needs of it."""

    terminal: np.ndarray
    slope: tuple[float, float]
    """Least and largest sum of a row of T's derivative at any value, non-terminal rows only."""

    def __call__(self, value: np.ndarray) -> np.ndarray:
        """T V, of shape (S,); zero at terminal states."""

    def rounding(self, value: np.ndarray, backed_up: np.ndarray) -> float:
        """Bound on the sup norm of (computed T V) - (exact T V)."""

    def derivative(self, value: np.ndarray, backed_up: np.ndarray) -> LinearMap:
        """∂T/∂V at `value`, (S, S), the one at which T was last applied. May repeat entries."""


class StateBlocks:
    """A table of transitions as blocks of consecutive states, mapped over by a few threads.

    :param threads: whether to use them; a process that shares its cores with others does not.
    """

    def __init__(self, transition: csr_array, actions: int, *, threads: bool = True) -> None:
        states = transition.shape[0] // actions
        work = transition.nnz + states * actions
        self._parallel = threads and work >= _THREAD_NONZEROS
        cores = _cores() if self._parallel else 1
        # As many for each thread, so that none is left to finish alone.
        count = min(states, cores * max(1, -(-work // (cores * _BLOCK_NONZEROS))))
        edges = np.linspace(0, states, count + 1).astype(int)
        self.blocks = [
            (int(low), int(high), _row_block(transition, low * actions, high * actions))
            for low, high in pairwise(edges)
        ]

    def map(self, work: Callable[[int, int, csr_array], None]) -> None:
        """Call `work(low, high, rows)` for every block; the result must not depend on the order."""

        def run(block: tuple[int, int, csr_array]) -> None:
            # Differences of huge values over a tiny temperature overflow to -inf, as they should.
            with np.errstate(over="ignore", under="ignore"):
                work(*block)

        if self._parallel:
            list(side_by_side(run, self.blocks))
        else:
            for block in self.blocks:
                run(block)

    def multiply(self, vector: np.ndarray) -> np.ndarray:
        """transition @ vector; with one row per state."""
        product = np.empty(self.blocks[-1][1])

        def block(low: int, high: int, rows: csr_array) -> None:
            product[low:high] = rows @ vector

        self.map(block)
        return product


def side_by_side(work: Callable[..., Result], *parts: Iterable[Any]) -> Iterator[Result]:
    """As `map`, by one thread per core; starts at once."""
    return _threads().map(work, *parts)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), thread_name_prefix="bellman")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _row_block(matrix: csr_array, low: int, high: int) -> csr_array:
    start, end = matrix.indptr[low], matrix.indptr[high]
    return csr_array(
        (
            matrix.data[start:end],
            matrix.indices[start:end],
            matrix.indptr[low : high + 1] - start,
        ),
        shape=(high - low, matrix.shape[1]),
    )


class ControlBackup:
    """Soft Bellman backup, V(s) = temperature · log Σ_a ρ(a|s) exp(Q(s,a) / temperature).

    Q = reward + discount · P V; at temperature zero V(s) = max of Q over allowed actions.
    Levine 2018 (1805.00909), §3.1, with a general prior and the expectation over next states
    outside the exponential.
    """

    def __init__(
        self,
        transition: csr_array,
        reward: np.ndarray,
        log_prior: np.ndarray,
        row_mass: np.ndarray,
        *,
        terminal: np.ndarray,
        discount: float,
        temperature: float,
        threads: bool = True,
    ) -> None:
        states, actions = reward.shape
        allowed = np.isfinite(log_prior)
        self.transition, self.terminal = transition, terminal
        self.discount, self.temperature = discount, temperature
        self.reward = np.where(allowed, reward, -np.inf)
        self.reward[terminal] = 0.0
        self.log_prior = log_prior
        self.q = np.zeros((states, actions))
        """Q (S, A) of the last backup; plus temperature · log ρ when the prior is `_folded`."""
        self._blocks = StateBlocks(transition, actions, threads=threads)
        self._reward_scale = _largest_finite(self.reward)
        penalty = temperature * max(1.0, _largest_finite(log_prior))
        self._folded = 0 < penalty <= self._reward_scale
        if self._folded:
            self.reward += temperature * log_prior
            self._reward_scale += penalty
        fanout = int(np.diff(transition.indptr).max(initial=0))
        self._backup_roundings = fanout + 4
        # NumPy sums pairwise over blocks of 128 with eight accumulators.
        self._sum_roundings = min(actions, 24 + int(np.log2(actions)))
        # Rows sum to one only up to rounding, and so does their computed sum.
        slack = (fanout + 4) * UNIT_ROUNDOFF
        self.slope = (
            discount * float(row_mass.min(initial=1.0)) * (1 - slack),
            discount * float(row_mass.max(initial=0.0)) * (1 + slack),
        )

    def __call__(self, value: np.ndarray) -> np.ndarray:
        backed_up = np.empty(len(self.q))

        def block(low: int, high: int, rows: csr_array) -> None:
            q = self.q[low:high]
            np.multiply((rows @ value).reshape(q.shape), self.discount, out=q)
            q += self.reward[low:high]
            best = _row_max(q)
            if self.temperature > 0:
                best = self._soften(q, best, slice(low, high))
            backed_up[low:high] = best

        self._blocks.map(block)
        backed_up[self.terminal] = 0.0
        return backed_up

    def _soften(self, q: np.ndarray, best: np.ndarray, states: slice) -> np.ndarray:
        growth = _columns_minus(q, best)
        growth /= self.temperature
        if self._folded:
            # NumPy's exponential of doubles takes twice as long.
            _exp(growth)
            total = np.log(growth.sum(axis=0))
            total *= self.temperature
            total += best
            return total
        growth = growth.T
        # log1p(Σ ρ expm1) keeps its digits however large the temperature is.
        np.expm1(growth, out=growth)
        growth *= self.prior[states]
        total = _row_sum(growth)
        far = np.flatnonzero(total < -0.5)
        total[far] = 0.0
        soft = best + self.temperature * np.log1p(total)
        if far.size:
            # Here little prior mass sits near the best action, and 1 + total would cancel.
            weight = q[far] + self.temperature * self.log_prior[states][far]
            top = weight.max(axis=1)
            weight = np.exp((weight - top[:, None]) / self.temperature)
            soft[far] = top + self.temperature * np.log(weight.sum(axis=1))
        return soft

    def rounding(self, value: np.ndarray, backed_up: np.ndarray) -> float:
        scale = float(np.abs(value).max())
        terms = self._backup_roundings * self.discount * scale + 4 * self._reward_scale
        if self._folded:
            terms += self.temperature * (4 * self._sum_roundings + 20)
        elif self.temperature > 0:
            # Relative error of Σ ρ expm1 times its share of V - max Q; the same holds, with the
            # logarithm, where the prior mass near the best action is small.
            best = np.where(self.terminal, 0.0, _row_max(self.q))
            drop = float(np.abs(backed_up - best).max())
            terms += (4 * self._sum_roundings + 20 + 5 * np.log1p(self.q.shape[1])) * drop
        return UNIT_ROUNDOFF * terms + 2 * self._backup_roundings * _UNDERFLOW

    def derivative(self, value: np.ndarray, backed_up: np.ndarray) -> csr_array:
        states, actions = self.q.shape
        if self.temperature == 0 and self.discount < 1:
            chosen = self.q.argmax(axis=1) + actions * np.arange(states)
            selected = self.transition[chosen]
            selected.data *= self.discount
            return selected
        return self.evaluation(self.policy(value, backed_up))

    def policy(self, value: np.ndarray, backed_up: np.ndarray) -> np.ndarray:
        """Best policy (S, A) against the value at which T was last applied.

        At temperature zero, actions that tie share the state in the prior's proportions: a policy
        that breaks ties one way may never end, and without discount has no value.
        """
        if self.temperature == 0:
            slack = 4 * self.rounding(value, backed_up)
            policy = np.where(self.q >= _row_max(self.q)[:, None] - slack, self.prior, 0.0)
            # A tie among actions of vanishing prior must not divide by zero.
            policy /= policy.max(axis=1, keepdims=True, initial=_UNDERFLOW)
        else:
            with np.errstate(over="ignore", under="ignore"):
                policy = (self.q - backed_up[:, None]) / self.temperature
                policy = _exp(policy if self._folded else policy + self.log_prior)
        return policy / policy.sum(axis=1, keepdims=True)

    @cached_property
    def prior(self) -> np.ndarray:
        """ρ (S, A)."""
        return np.exp(self.log_prior)

    def evaluation(self, policy: np.ndarray) -> csr_array:
        """discount · P under `policy` (S, A), as an (S, S) matrix that may repeat entries."""
        states, actions = self.q.shape
        weight = (self.discount * policy).ravel()
        data = np.empty_like(self.transition.data)
        indptr = self.transition.indptr

        def block(low: int, high: int, rows: csr_array) -> None:
            start, end = indptr[low * actions], indptr[high * actions]
            repeated = np.repeat(weight[low * actions : high * actions], np.diff(rows.indptr))
            np.multiply(rows.data, repeated, out=data[start:end])

        self._blocks.map(block)
        by_state = np.ascontiguousarray(indptr[::actions])
        shape = (states, self.transition.shape[1])
        return csr_array((data, self.transition.indices, by_state), shape=shape)


class PosteriorBackup:
    """V(s) = log Σ_a ρ(a|s) Σ_s' P(s'|s,a) e^w [(1-discount) + discount · e^V(s')], in nats.

    The log-evidence of O = 1 from s on, when each step survives with probability `discount`. In log
    space: `log_weight` (one per non-zero of `transition`) may be a million nats. Where all of V and
    w is below half a nat, as at a high temperature, as log1p Σ ρ P expm1 instead, whose error is
    relative to V and w. That takes rows for distributions, and so they are normalised. Where one of
    them misses a sum of one by more than rounding, all are taken at their word, in log space.
    """

    slope = (0.0, np.inf)

    def __init__(
        self,
        transition: csr_array,
        log_weight: np.ndarray,
        log_prior: np.ndarray,
        *,
        terminal: np.ndarray,
        discount: float,
    ) -> None:
        states, actions = log_prior.shape
        self.terminal, self.discount = terminal, discount
        fan = np.diff(transition.indptr)
        repeated = np.repeat(log_prior.ravel(), fan)
        mass = transition @ np.ones(states)
        used = np.isfinite(log_prior).ravel() & (fan > 0)
        whole = not used.any() or float(np.abs(mass[used] - 1).max()) <= WHOLE
        share = transition.data
        if whole:
            share = share / np.repeat(np.where(used, mass, 1.0), fan)
        with np.errstate(divide="ignore"):
            logits = np.log(share) + repeated + log_weight
        possible = logits > -np.inf
        self._possible = possible
        before = np.concatenate([[0], np.cumsum(possible)])
        indptr = before[transition.indptr[::actions]].astype(transition.indptr.dtype)
        self.matrix = csr_array(
            (logits[possible], transition.indices[possible], indptr), shape=(states, states)
        )
        """log M, (S, S), entries repeated by action; only transitions that can happen."""
        self._live = np.flatnonzero(np.diff(indptr))
        self._starts = indptr[self._live]
        self._state = np.repeat(np.arange(states), np.diff(indptr))
        fanout = int(np.diff(indptr).max(initial=1))
        self._sum_roundings = min(fanout, 24 + int(np.log2(max(fanout, 1)))) + 8
        self._scale = float(np.abs(self.matrix.data).max(initial=0.0)) + float(
            np.abs(log_weight).max(initial=0.0)
        )
        self._steepest = float(np.abs(log_weight[possible]).max(initial=0.0))
        self._may_be_near = whole and self._steepest < _NEAR
        if self._may_be_near:
            self._log_weight = log_weight[possible]
            self._share = (share * np.exp(repeated))[possible]
            # Products, normalisations and sums of probabilities, and ρ known through its logarithm.
            self._near_roundings = 3 * self._sum_roundings + 16 + np.log(actions)
        self._weights = np.empty(0)

    def __call__(self, value: np.ndarray) -> np.ndarray:
        if self._near(value):
            return self._relative_to_one(value)
        terms = self.matrix.data + self._continuation(value)[self.matrix.indices]
        backed_up = np.zeros_like(value)
        top = np.maximum.reduceat(terms, self._starts)
        full = np.zeros_like(value)
        full[self._live] = top
        terms -= full[self._state]
        np.exp(terms, out=terms)
        total = np.add.reduceat(terms, self._starts)
        backed_up[self._live] = top + np.log(total)
        full[self._live] = total
        self._weights = terms / full[self._state]
        return backed_up

    def _near(self, value: np.ndarray) -> bool:
        """Whether V is relative to the evidence of one."""
        return self._may_be_near and self._steepest + _largest(value) <= _NEAR

    def _relative_to_one(self, value: np.ndarray) -> np.ndarray:
        growth = self._log_weight + self._continuation(value)[self.matrix.indices]
        np.expm1(growth, out=growth)
        growth *= self._share
        total = np.zeros_like(value)
        total[self._live] = np.add.reduceat(growth, self._starts)
        growth += self._share
        self._weights = growth / (1 + total)[self._state]
        return np.log1p(total)

    def _continuation(self, value: np.ndarray) -> np.ndarray:
        """log[(1-discount) + discount · e^V] (S,)."""
        if self.discount == 1:
            return value
        if self.discount == 0:
            return np.zeros_like(value)
        if _largest(value) <= _NEAR:
            return np.log1p(self.discount * np.expm1(value))
        # Relative to V where V is large, and to zero where it is small, so that no digit is lost.
        high = np.maximum(value, 0.0)
        end = (1 - self.discount) * np.exp(-high)
        return high + np.log(end + self.discount * np.exp(value - high))

    def rounding(self, value: np.ndarray, backed_up: np.ndarray) -> float:
        if self._near(value):
            size = self._steepest + _largest(value)
            # The exponential of such a sum, over what its mean can be at least.
            steepness = np.exp(2 * size)
            return self._near_roundings * (UNIT_ROUNDOFF * steepness * size + 4 * _UNDERFLOW)
        scale = 4 * self._scale + 6 * _largest(value) + 8
        return UNIT_ROUNDOFF * (scale + 2 * self._sum_roundings)

    def derivative(self, value: np.ndarray, backed_up: np.ndarray) -> csr_array:
        with np.errstate(divide="ignore", over="ignore", under="ignore"):
            survives = np.exp(np.log(self.discount) + value - self._continuation(value))
        data = self._weights * survives[self.matrix.indices]
        return csr_array((data, self.matrix.indices, self.matrix.indptr), shape=self.matrix.shape)

    def prior_dynamics(self, log_weight: np.ndarray) -> tuple[csr_array, np.ndarray]:
        """discount · P under the prior, (S, S), and the expected log-weight of a step, (S,)."""
        probability = np.exp(self.matrix.data - log_weight[self._possible])
        expected = np.bincount(
            self._state, probability * log_weight[self._possible], minlength=self.terminal.size
        )
        data = self.discount * probability
        return csr_array(
            (data, self.matrix.indices, self.matrix.indptr), shape=self.matrix.shape
        ), expected.astype(np.float64)  # of whole numbers where there is nothing to count

    def log_spectral_radius(self) -> tuple[float, float]:
        """Bounds on the log of M's spectral radius over non-terminal states.

        They are as narrow as it takes to tell on which side of 1 / discount it lies.

        Collatz-Wielandt: min (M x)/x <= radius <= max (M x)/x for x > 0 and irreducible M, so the
        strongly connected classes are taken apart; the largest of theirs is M's. The power
        iteration averages M with a multiple of the identity, lest a periodic class oscillate.
        """
        # Built anew: SciPy's search never returns where an edge is listed twice.
        pairs = (np.ones(self._state.size), (self._state, self.matrix.indices))
        edges = csr_matrix(pairs, shape=self.matrix.shape)
        _, label = connected_components(edges, connection="strong")
        inside = label[self._state] == label[self.matrix.indices]
        inside &= ~self.terminal[self._state]
        source, target = self._state[inside], self.matrix.indices[inside]
        logits = self.matrix.data[inside]
        if source.size == 0:
            return -np.inf, -np.inf
        starts = np.flatnonzero(np.diff(source, prepend=-1))
        members = source[starts]
        group = label[members]
        x = np.zeros(self.terminal.size)
        log_discount = np.log(self.discount) if self.discount > 0 else -np.inf
        low = high = 0.0
        for _ in range(_POWER_ITERATIONS):
            terms = logits + x[target]
            top = np.maximum.reduceat(terms, starts)
            spread = np.repeat(top, np.diff(starts, append=source.size))
            product = top + np.log(np.add.reduceat(np.exp(terms - spread), starts))
            ratio = product - x[members]
            lows = np.full(label.max() + 1, np.inf)
            highs = np.full(label.max() + 1, -np.inf)
            np.minimum.at(lows, group, ratio)
            np.maximum.at(highs, group, ratio)
            low, high = float(lows[lows < np.inf].max()), float(highs.max())
            decided = high + log_discount < 0 or low + log_discount >= 0
            if high - low <= (1e-4 if decided else 1e-12 * max(1.0, abs(high))):
                break
            middle = highs[group]
            x[members] += np.logaddexp(ratio, middle) - middle
        return low, high


def _exp(table: np.ndarray) -> np.ndarray:
    """The exponential, in place."""
    torch.exp(torch.from_numpy(table), out=torch.from_numpy(table))
    return table


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max(initial=0.0))


def _largest_finite(table: np.ndarray) -> float:
    return float(np.abs(table, where=np.isfinite(table), out=np.zeros_like(table)).max(initial=0.0))


def _row_max(table: np.ndarray) -> np.ndarray:
    if table.shape[1] > _NARROW:
        return table.max(axis=1)
    # NumPy reduces a short last axis one row at a time, ten times slower than column by column.
    best = table[:, 0].copy()
    for column in range(1, table.shape[1]):
        np.maximum(best, table[:, column], out=best)
    return best


def _columns_minus(table: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """table.T - vector."""
    if table.shape[1] > _NARROW:
        return (table - vector[:, None]).T
    # One column after another is contiguous from here on.
    difference = np.empty(table.shape[::-1])
    for column, row in enumerate(difference):
        np.subtract(table[:, column], vector, out=row)
    return difference


def _row_sum(table: np.ndarray) -> np.ndarray:
    if table.shape[1] > _NARROW:
        return table.sum(axis=1)
    total = table[:, 0].copy()
    for column in range(1, table.shape[1]):
        total += table[:, column]
    return total
