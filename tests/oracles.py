"""What the library must agree with, computed by other means: sums over every trajectory.

Nothing here imports the library. Finite models are plain tables; every quantity is the definition
itself, written as a sum over all paths s_0, a_0, s_1, ..., s_T (control: over the tree of all
histories), so that no recursion over states is shared with the code under test. Linear solves and
50-digit arithmetic cover the infinite horizon. Rewards and values are in reward units, log-evidence
in nats, and temperature > 0.

Terminal states absorb: from the first one on the state stands still, nothing is paid, and actions
are uniform whoever chooses them, so that they cost nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import mpmath
import numpy as np
from hypothesis import strategies as st
from scipy.special import logsumexp

Array = np.ndarray[Any, np.dtype[Any]]
DIGITS = 60


@dataclasses.dataclass(frozen=True)
class Tables:
    """A finite model.

    :ivar transition, reward: (S, A, S), by state, action, next state. :ivar prior: (S, A).
    :ivar initial: (S,). :ivar terminal: booleans, (S,).
    """

    transition: Array
    reward: Array
    prior: Array
    initial: Array
    terminal: Array
    discount: float = 1.0
    horizon: int | None = None

    @property
    def states(self) -> int:
        return int(self.transition.shape[0])

    @property
    def actions(self) -> int:
        return int(self.transition.shape[1])

    def stopped(self) -> Tables:
        """The same, with what happens at terminal states written into the tables."""
        ended = self.terminal
        stay = np.eye(self.states)[:, None, :]
        return dataclasses.replace(
            self,
            transition=np.where(ended[:, None, None], stay, self.transition),
            reward=np.where(ended[:, None, None], 0.0, self.reward),
            prior=np.where(ended[:, None], 1 / self.actions, self.prior),
        )

    def idle(self, policy: Array) -> Array:
        """A policy (S, A) or (T, S, A), uniform at terminal states."""
        return np.where(self.terminal[:, None], 1 / self.actions, policy)


# --- Sums over every path -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Paths:
    """Every sequence of N = S·(A·S)^T states and actions, possible or not.

    :ivar states: (T+1, N). :ivar actions: (T, N). :ivar rewards: (T, N).
    :ivar log_dynamics: (N,), log p(s_0) Π p(s'|s,a).
    """

    states: Array
    actions: Array
    rewards: Array
    log_dynamics: Array

    def log_policy(self, policy: Array) -> Array:
        """log π(a_t | s_t) along each path, (T, N), for a table (S, A) or (T, S, A)."""
        steps = len(self.actions)
        table = np.broadcast_to(policy, (steps, *policy.shape[-2:]))
        return _log(table[np.arange(steps)[:, None], self.states[:-1], self.actions])


def every_path(tables: Tables, horizon: int | None = None) -> Paths:
    """All paths of `horizon` steps (the model's own unless given)."""
    steps = _steps(tables, horizon)
    stopped = tables.stopped()
    sizes = [range(tables.states)] + [range(tables.actions), range(tables.states)] * steps
    sequence = np.array(list(itertools.product(*sizes)), dtype=int).T
    states, actions = sequence[0::2], sequence[1::2]
    moves = (states[:-1], actions, states[1:])
    log_dynamics = _log(stopped.initial[states[0]]) + _log(stopped.transition[moves]).sum(0)
    return Paths(states, actions, stopped.reward[moves], log_dynamics)


def objective(
    tables: Tables,
    policy: Array,
    temperature: float,
    horizon: int | None = None,
    *,
    form: str = "kl",
) -> float:
    """J(π) = E Σ_t γ^t [r_t - temperature · c_t], in reward units.

    The `kl` form has c = log π/ρ, the `entropy` form c = log π; `reward` has none. Terminal states
    cost nothing in any of them.
    """
    paths = every_path(tables, horizon)
    stopped = tables.stopped()
    log_policy = paths.log_policy(tables.idle(policy))
    alive = ~tables.terminal[paths.states[:-1]]
    log_weight = paths.log_dynamics + log_policy.sum(0)
    taken = log_weight > -np.inf
    cost = np.zeros_like(paths.rewards)
    with np.errstate(invalid="ignore"):
        if form == "kl":
            cost = log_policy - paths.log_policy(stopped.prior)
        elif form == "entropy":
            cost = np.where(alive, log_policy, 0.0)
    gained = paths.rewards[:, taken] - temperature * cost[:, taken]
    weights = np.exp(log_weight[taken])
    discounts = _powers(tables.discount, len(paths.actions))
    return float((weights * (discounts[:, None] * gained).sum(0)).sum())


def policy_divergence(
    tables: Tables, policy: Array, other: Array, horizon: int | None = None
) -> float:
    """E_π Σ_t γ^t KL(π(·|s_t) ‖ other(·|s_t)), in nats."""
    replaced = dataclasses.replace(tables, prior=other, reward=np.zeros_like(tables.reward))
    if other.ndim == 2:
        return -objective(replaced, policy, 1.0, horizon)
    paths = every_path(tables, horizon)
    log_policy = paths.log_policy(tables.idle(policy))
    log_weight = paths.log_dynamics + log_policy.sum(0)
    taken = log_weight > -np.inf
    ratio = log_policy[:, taken] - paths.log_policy(tables.idle(other))[:, taken]
    discounts = _powers(tables.discount, len(paths.actions))
    return float((np.exp(log_weight[taken]) * (discounts[:, None] * ratio).sum(0)).sum())


def objective_gradient(
    tables: Tables, policy: Array, temperature: float, horizon: int | None = None
) -> Array:
    """∂J/∂logits of a softmax policy (T, S, A), KL form: the exact score-function gradient.

    Σ over paths of weight · Σ_t ∇log π(a_t|s_t) · (everything the path gained).
    """
    paths = every_path(tables, horizon)
    steps = len(paths.actions)
    policy = tables.idle(np.broadcast_to(policy, (steps, *policy.shape[-2:])))
    log_policy = paths.log_policy(policy)
    weights = np.exp(paths.log_dynamics + log_policy.sum(0))
    with np.errstate(invalid="ignore"):
        gained = paths.rewards - temperature * (
            log_policy - paths.log_policy(tables.stopped().prior)
        )
    gained = np.where(weights > 0, gained, 0.0)
    total = weights * (_powers(tables.discount, steps)[:, None] * gained).sum(0)
    gradient = np.zeros(policy.shape)
    for t in range(steps):
        state, action = paths.states[t], paths.actions[t]
        score = np.eye(tables.actions)[action] - policy[t, state]
        score[tables.terminal[state]] = 0.0
        np.add.at(gradient[t], state, total[:, None] * score)
    return gradient


# --- The control target ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Control:
    """The best policy under the environment's own dynamics.

    :ivar objective: max_π J(π), KL form. :ivar policy: (T, S, A). :ivar q: (T, S, A).
    :ivar value: (T+1, S), the last row zero.
    """

    objective: float
    policy: Array
    q: Array
    value: Array


def brute_force_control(tables: Tables, temperature: float, horizon: int | None = None) -> Control:
    """max_π J(π) over policies that may remember everything: backward through all histories.

    Each node of the tree is one history, never a state: its best action distribution is Gibbs'
    (max_p Σ p (q - temperature log p/ρ) = temperature log Σ ρ e^{q/temperature}). That histories
    which end in the same state agree is asserted, not assumed.
    """
    steps = _steps(tables, horizon)
    stopped = tables.stopped()
    size, count = tables.states, tables.actions
    # Axes s_0, a_0, s_1, ..., s_t: every history starts from every state.
    value: Array = np.zeros((size, *(count, size) * steps))
    policy, q = np.empty((steps, size, count)), np.empty((steps, size, count))
    values = np.zeros((steps + 1, size))
    for t in reversed(range(steps)):
        backed = (stopped.transition * (stopped.reward + tables.discount * value)).sum(-1)
        value = soft_maximum(backed, stopped.prior, temperature)
        logits = np.where(stopped.prior > 0, (backed - value[..., None]) / temperature, -np.inf)
        with np.errstate(under="ignore"):
            chosen = stopped.prior * np.exp(logits)
            chosen = chosen / chosen.sum(-1, keepdims=True)
        for table, tree in ((q[t], backed), (policy[t], chosen), (values[t], value)):
            histories = tree.reshape(-1, *table.shape)
            table[...] = histories[0]
            scale = np.abs(table).max()
            np.testing.assert_allclose(histories - table, 0.0, atol=1e-12 * scale)
    return Control(float(tables.initial @ values[0]), policy, q, values)


def soft_maximum(q: Array, prior: Array, temperature: float) -> Array:
    """temperature · log Σ_a ρ(a) e^{q(a)/temperature} over the last axis."""
    allowed = np.where(prior > 0, q, -np.inf)
    top = allowed.max(-1, keepdims=True)
    with np.errstate(under="ignore", over="ignore"):
        growth = (prior * np.expm1((allowed - top) / temperature)).sum(-1)
        direct = logsumexp((allowed - top) / temperature, b=prior, axis=-1)
    return top[..., 0] + temperature * np.where(growth > -0.5, np.log1p(growth), direct)


# --- The posterior target -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Posterior:
    """The trajectory conditioned on O = 1 at every step. NaN where the condition is impossible.

    With a discount below one a step is survived with probability `discount`, after its reward; a
    dead trajectory pays nothing more. `action` and `transition` are conditioned on being alive.

    :ivar log_evidence: log p(O = 1), nats.
    :ivar initial: p(s_0 | O), (S,). :ivar action: p(a_t | s_t, O), (T, S, A).
    :ivar transition: p(s_{t+1} | s_t, a_t, O), (T, S, A, S).
    :ivar state: p(s_t, alive | O), (T, S).
    """

    log_evidence: float
    initial: Array
    action: Array
    transition: Array
    state: Array


def brute_force_posterior(
    tables: Tables, temperature: float, horizon: int | None = None
) -> Posterior:
    """Posterior marginals as ratios of sums of path weights."""
    paths = every_path(tables, horizon)
    stopped = tables.stopped()
    steps = len(paths.actions)
    log_path = paths.log_dynamics + paths.log_policy(stopped.prior).sum(0)
    # Row k - 1: the trajectory pays for exactly its first k steps, and dies or reaches the end.
    paid = np.cumsum(paths.rewards / temperature, axis=0)
    survival = _powers(tables.discount, steps)
    died = np.full(steps, 1 - tables.discount)
    died[-1] = 1.0
    joint = log_path + paid + _log(survival * died)[:, None]
    log_evidence = float(logsumexp(joint))
    with np.errstate(under="ignore"):
        weights = np.exp(joint - log_evidence)
    shape = (steps, tables.states, tables.actions, tables.states)
    counts = np.zeros(shape)
    for t in range(steps):
        alive = weights[t:].sum(0)
        np.add.at(counts[t], (paths.states[t], paths.actions[t], paths.states[t + 1]), alive)
    initial = np.bincount(paths.states[0], weights.sum(0), tables.states)
    return Posterior(
        log_evidence,
        initial,
        _ratio(counts.sum(-1), counts.sum((-1, -2))),
        _ratio(counts, counts.sum(-1)),
        counts.sum((-1, -2)),
    )


# --- The infinite horizon -------------------------------------------------------------------------


def linear_solve_value(tables: Tables, policy: Array, temperature: float) -> Array:
    """V^π (S,) in KL form over an infinite horizon: (I - γ P_π) V = r_π - temperature · KL.

    Solved over the states that are not terminal, where V is zero.
    """
    running = np.flatnonzero(~tables.terminal)
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.where(policy > 0, policy * (_log(policy) - _log(tables.prior)), 0.0).sum(-1)
    expected = (tables.transition * tables.reward).sum(-1)
    gain = (policy * expected).sum(-1) - temperature * cost
    moves = np.einsum("sa,sax->sx", policy, tables.transition)
    within = np.eye(len(running)) - tables.discount * moves[np.ix_(running, running)]
    value = np.zeros(tables.states)
    value[running] = np.linalg.solve(within, gain[running])
    return value


def occupancy(tables: Tables, policy: Array) -> Array:
    """Σ_t γ^t p(s_t = s, a_t = a), (S, A), over an infinite horizon; zero at terminal states."""
    running = np.flatnonzero(~tables.terminal)
    moves = np.einsum("sa,sax->sx", policy, tables.transition)
    within = np.eye(len(running)) - tables.discount * moves[np.ix_(running, running)]
    visits = np.zeros(tables.states)
    visits[running] = np.linalg.solve(within.T, tables.initial[running])
    return np.asarray(visits[:, None] * policy)


# --- Fifty digits ---------------------------------------------------------------------------------

Exact = list[Any]
"""A list (of lists) of mpmath numbers."""


def mp_soft_backup(q: Any, prior: Any, temperature: Any) -> Any:
    """temperature · log Σ_a ρ(a) e^{q(a)/temperature} as an mpmath number of `DIGITS` digits."""
    with mpmath.workdps(DIGITS):
        scale = mpmath.mpf(temperature)
        pairs = [(mpmath.mpf(x), mpmath.mpf(p)) for x, p in zip(q, prior, strict=True) if p > 0]
        top = max(x for x, _ in pairs)
        total = mpmath.fsum(p * mpmath.exp((x - top) / scale) for x, p in pairs)
        return top + scale * mpmath.log(total)


def mp_finite_horizon(tables: Tables, temperature: float, horizon: int | None = None) -> Exact:
    """V_0(s) of the soft recursion after `horizon` steps. A recursion: compare with the tree."""
    value: Exact = [mpmath.mpf(0)] * tables.states
    for _ in range(_steps(tables, horizon)):
        value = _mp_backup(tables, value, temperature)
    return value


def mp_soft_value_iteration(tables: Tables, temperature: float, tolerance: float = 1e-40) -> Exact:
    """V*(s) over an infinite horizon, within `tolerance` (sup norm); discount below one."""
    assert tables.discount < 1
    value: Exact = [mpmath.mpf(0)] * tables.states
    with mpmath.workdps(DIGITS):
        slack = mpmath.mpf(tolerance) * (1 - mpmath.mpf(tables.discount))
        while True:
            backed = _mp_backup(tables, value, temperature)
            moved = max(abs(new - old) for new, old in zip(backed, value, strict=True))
            value = backed
            if moved <= slack:
                return value


def _mp_backup(tables: Tables, value: Exact, temperature: float) -> Exact:
    with mpmath.workdps(DIGITS):
        gamma = mpmath.mpf(tables.discount)
        backed: Exact = []
        for s in range(tables.states):
            if tables.terminal[s]:
                backed.append(mpmath.mpf(0))
                continue
            q = [
                mpmath.fsum(
                    mpmath.mpf(float(tables.transition[s, a, x]))
                    * (mpmath.mpf(float(tables.reward[s, a, x])) + gamma * value[x])
                    for x in range(tables.states)
                )
                for a in range(tables.actions)
            ]
            prior = [mpmath.mpf(float(p)) for p in tables.prior[s]]
            backed.append(mp_soft_backup(q, prior, temperature))
        return backed


# --- Random models --------------------------------------------------------------------------------


@st.composite
def finite_tables(
    draw: st.DrawFn,
    *,
    max_states: int = 4,
    max_actions: int = 3,
    max_horizon: int = 4,
    discounts: tuple[float, ...] = (1.0, 0.9, 0.5, 0.0),
    scales: tuple[float, ...] = (1e-6, 1e-3, 1.0, 1e3, 1e6),
) -> Tables:
    """Small models with what breaks solvers: zeros, ties, absorbing and unreachable states,
    forbidden actions, terminal states, rewards of any scale.

    Weights are small integers, so that ties and zeros are common and shrinking reads well.
    """
    states = draw(st.integers(1, max_states))
    actions = draw(st.integers(1, max_actions))
    weight = st.integers(0, 3)
    transition = _rows(draw, weight, (states, actions, states))
    if draw(st.booleans()):
        absorbing = draw(st.integers(0, states - 1))
        transition[absorbing] = np.eye(states)[absorbing]
    initial = _rows(draw, weight, (states,))
    if states > 1 and draw(st.booleans()):
        hidden = draw(st.integers(0, states - 1))
        others = [s for s in range(states) if s != hidden]
        transition[np.ix_(others, range(actions), [hidden])] = 0.0
        initial[hidden] = 0.0
        transition = _normalised(transition, others[0])
        initial = _normalised(initial, others[0])
    integers = st.integers(-3, 3)
    reward = np.array(
        draw(st.lists(integers, min_size=(n := transition.size), max_size=n)), dtype=float
    ).reshape(transition.shape)
    if draw(st.booleans()):  # r(s, a): ties between next states
        reward[...] = reward[..., :1]
    terminal = np.array(draw(st.lists(st.booleans(), min_size=states, max_size=states)))
    if draw(st.booleans()):
        terminal[...] = False
    return Tables(
        transition,
        reward * draw(st.sampled_from(scales)),
        _rows(draw, weight, (states, actions)),
        initial,
        terminal,
        draw(st.sampled_from(discounts)),
        draw(st.integers(1, max_horizon)),
    )


def policies(tables: Tables) -> st.SearchStrategy[Array]:
    """Policies (T, S, A) that take only what the prior allows, some of them never everything."""

    @st.composite
    def strategy(draw: st.DrawFn) -> Array:
        shape = (_steps(tables, None), tables.states, tables.actions)
        size = int(np.prod(shape))
        drawn = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
        weights = np.array(drawn, dtype=float).reshape(shape) * (tables.prior > 0)
        empty = weights.sum(-1, keepdims=True) == 0
        weights = np.where(empty, tables.prior, weights)
        return np.asarray(weights / weights.sum(-1, keepdims=True))

    return strategy()


def temperatures() -> st.SearchStrategy[float]:
    """Temperatures in reward units."""
    return st.sampled_from([1e-3, 0.1, 1.0, 10.0, 1e3])


def _rows(draw: st.DrawFn, weight: st.SearchStrategy[int], shape: tuple[int, ...]) -> Array:
    size = int(np.prod(shape))
    drawn = draw(st.lists(weight, min_size=size, max_size=size))
    return _normalised(np.array(drawn, dtype=float).reshape(shape), 0)


def _normalised(weights: Array, fallback: int) -> Array:
    point = np.eye(weights.shape[-1])[fallback]
    weights = np.where(weights.sum(-1, keepdims=True) > 0, weights, point)
    return np.asarray(weights / weights.sum(-1, keepdims=True))


# --- Small things ---------------------------------------------------------------------------------


def _steps(tables: Tables, horizon: int | None) -> int:
    steps = tables.horizon if horizon is None else horizon
    assert steps, "brute force needs a horizon of at least one step"
    return steps


def _log(probs: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(probs))


def _powers(discount: float, steps: int) -> Array:
    return np.array([float(discount) ** t for t in range(steps)])


def _ratio(parts: Array, whole: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return np.where(whole[..., None] > 0, parts / whole[..., None], np.nan)
