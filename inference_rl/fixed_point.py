"""Infinite-horizon values of finite models: fixed points of Bellman backups, with certified bounds.

The method is Newton's. T is monotone and convex in V (a maximum, or a log-sum-exp), so the Newton
step V + (I - J)^{-1} (T V - V), J the derivative of T at V, is policy iteration (Puterman and
Brumelle 1979): it evaluates the policy that is best against V. The answer is never better known
than its bound, which is computed from T alone and so does not depend on how V was found:

- V and T V give an interval for V* (MacQueen 1966): if lower <= T V - V <= upper everywhere and no
  state ends the episode, V + lower/(1-discount) <= V* <= V + upper/(1-discount).
- With terminal states, and without discount, a supersolution does: T U <= U implies V* <= U. We try
  U = V + c·w, w the expected time to the end, and verify the inequality state by state. Where
  waiting is free, in a model in which the states that may wait for one another are one state.

Rounding of T is bounded too and enters both. Bellman backups are in `bellman_operators`, linear
solves in `policy_evaluation`, free waiting in `end_components`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy.sparse import csr_array, csr_matrix
from scipy.sparse.csgraph import breadth_first_order

from inference_rl.bellman_operators import (
    UNIT_ROUNDOFF,
    WHOLE,
    BellmanOperator,
    ControlBackup,
    PosteriorBackup,
)
from inference_rl.end_components import CollapsedBackup, end_components
from inference_rl.policy_evaluation import Evaluation, PolicyEvaluation

Progress = Callable[[int, float], None]

_ITERATIONS = 100_000
_PATIENCE = 10
_HOPELESS = 1000
_DIVERGED = 1e15
_CERTIFICATES = 10
_PROOF_SWEEPS = 500
_LOST = 1e4
_LAST_SWEEPS = 50_000
_POLISH_STATES = 4096
_ACCURACY = 0.05
_ROW_SUM_TOLERANCE = 1e-6


@dataclass(frozen=True)
class FixedPoint:
    """A value, and how far it can be from the exact one."""

    value: np.ndarray
    """(S,): reward units for control, nats for the posterior; zero at terminal states."""
    error_bound: float
    """Certified sup-norm distance of `value` to the exact fixed point, rounding included."""
    iterations: int
    """Newton steps."""
    backups: int
    """Passes over the transition arrays, products with one policy's transition matrix included."""
    residual: float
    """Sup norm of T V - V at `value`."""
    converged: bool
    """The bound met the tolerance, or rounding allows no better."""


def solve_control(
    transition: csr_array,
    reward: np.ndarray,
    log_prior: np.ndarray,
    *,
    terminal: np.ndarray,
    discount: float,
    temperature: float,
    absolute: float | None = None,
    relative: float = 1e-10,
    progress: Progress | None = None,
) -> FixedPoint:
    """Soft value V(s) = temperature · log Σ_a ρ(a|s) exp(Q(s,a)/temperature), Q = r + discount P V.

    :param transition: P, CSR of shape (S·A, S) and float64; row s·A + a is P(· | s, a). Rows of
        terminal states are empty, the others sum to one.
    :param reward: (S, A), expected immediate reward.
    :param log_prior: (S, A), log ρ; -inf forbids an action. Rows are normalised.
    :param terminal: (S,) bool; the value is zero there.
    :param discount: in [0, 1]; one is legal when every state can reach a terminal one; V is then
        that of the best policy that surely does.
    :param temperature: >= 0, reward units. Zero is regular RL: V is the maximum of Q.
    :param absolute, relative: stop once the certified error is at most
        max(absolute, relative · max |V|).
    :param progress: called as progress(iterations, error_bound), at most ten times a second.
    :raises ValueError: malformed tables, or a value that is not finite.
    """
    tables = checked_tables(transition, log_prior, terminal)
    transition, log_prior, terminal, row_mass = tables
    _check_span(transition, log_prior, terminal, discount)
    states, actions = log_prior.shape
    reward = np.asarray(reward, dtype=np.float64)
    if reward.shape != (states, actions):
        raise ValueError(
            f"reward: expected shape (S, A) = {(states, actions)}, got {reward.shape}; "
            "average rewards over next states first"
        )
    allowed = np.isfinite(log_prior) & ~terminal[:, None]
    _require(np.isfinite(reward) | ~allowed, "reward", "a finite number")
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")
    backup = partial(
        ControlBackup,
        transition,
        reward,
        row_mass=row_mass,
        terminal=terminal,
        discount=discount,
        temperature=float(temperature),
    )
    component, waits = np.arange(states), np.zeros_like(allowed)
    if discount == 1 and temperature == 0:
        free = allowed & (reward == 0)
        # A row that misses one by more than rounding is not free: it gains or loses each time.
        free[~terminal] &= np.abs(row_mass - 1) <= WHOLE
        component, waits = end_components(transition, free)
    operator = backup(log_prior)
    if waits.any():
        collapsed = CollapsedBackup(backup(np.where(waits, -np.inf, log_prior)), component)
        matrix, rate = collapsed.prior_dynamics()
        evaluate = PolicyEvaluation(matrix, discount=1.0, closed=False)
        start = evaluate.solve(matrix, rate, accuracy=1e-8)
        found = newton(collapsed, evaluate, start, absolute or 0.0, relative, progress)
        found, start = replace(found, value=found.value[component]), start[component]
    else:
        by_state = np.ascontiguousarray(transition.indptr[::actions])
        graph = csr_array((transition.data, transition.indices, by_state), shape=(states, states))
        evaluate = PolicyEvaluation(graph, discount=discount, closed=not terminal.any())
        start = np.zeros(states)
        if discount == 1:
            # The prior surely ends: its value is finite, and every Newton step improves on it.
            prior = np.exp(log_prior)
            expected = np.einsum("sa,sa->s", prior, np.where(allowed, reward, 0.0))
            start = evaluate.solve(operator.evaluation(prior), expected, accuracy=1e-8)
        found = newton(operator, evaluate, start, absolute or 0.0, relative, progress)
    if discount == 1 and found.error_bound == np.inf:
        # Policies that hardly ever end leave linear systems that no digit can be trusted of.
        swept = _swept(operator, start)
        if swept is not None:
            return replace(swept, backups=found.backups + swept.backups)
        _check_no_loop_pays(operator, found)
    return found


def _swept(operator: ControlBackup, value: np.ndarray) -> FixedPoint | None:
    """The limit of plain backups from below, without a certificate; None if they do not settle."""
    for sweep in range(1, _LAST_SWEEPS + 1):
        backed_up = operator(value)
        residual = float(np.abs(backed_up - value).max(initial=0.0))
        if residual <= operator.rounding(value, backed_up):
            return FixedPoint(backed_up, np.inf, sweep, sweep, residual, converged=False)
        value = backed_up
    return None


def solve_posterior(
    transition: csr_array,
    log_weight: np.ndarray,
    log_prior: np.ndarray,
    *,
    terminal: np.ndarray,
    discount: float,
    relative: float = 1e-10,
    progress: Progress | None = None,
) -> FixedPoint:
    """Log-evidence V(s) = log Σ_a ρ Σ_s' P e^w [(1-discount) + discount e^V(s')], in nats.

    `discount` is the probability to survive each step. V is zero at terminal states.

    :param transition: as for `solve_control`.
    :param log_weight: (nnz,), reward / temperature of each non-zero of `transition`, in its order.
    :param log_prior: (S, A), log ρ; -inf forbids an action. Rows are normalised.
    :param terminal: (S,) bool.
    :param discount: in [0, 1]; one is legal when every state can reach a terminal one.
    :param relative: stop once the certified error is at most relative · max |V|, or rounding allows
        no better.
    :param progress: called as progress(iterations, error_bound), at most ten times a second.
    :raises ValueError: malformed tables, or infinite evidence: the discount times the spectral
        radius of M(s,s') = Σ_a ρ P e^w over non-terminal s' is not below one.
    """
    weights = np.asarray(log_weight, dtype=np.float64)
    if weights.shape != (transition.nnz,):
        raise ValueError(
            f"log_weight: expected one per non-zero of transition, shape {(transition.nnz,)}, "
            f"got {weights.shape}"
        )
    _require(np.isfinite(weights), "log_weight", "a finite number")
    transition, log_prior, terminal, _ = checked_tables(transition, log_prior, terminal)
    _check_span(transition, log_prior, terminal, discount)
    operator = PosteriorBackup(transition, weights, log_prior, terminal=terminal, discount=discount)
    evaluate = PolicyEvaluation(operator.matrix, discount=discount, closed=False)
    start = np.zeros(terminal.size)
    if discount == 1:
        matrix, rate = operator.prior_dynamics(weights)
        start = evaluate.solve(matrix, rate, accuracy=1e-8)
    found = newton(operator, evaluate, start, 0.0, relative, progress)
    if found.error_bound == np.inf:
        _check_evidence_is_finite(operator)
    return found


def newton(
    operator: BellmanOperator,
    evaluate: Evaluation,
    value: np.ndarray,
    absolute: float,
    relative: float,
    progress: Progress | None,
) -> FixedPoint:
    """The fixed point of `operator`, from `value` on, known to max(absolute, relative · max |V|) or
    as well as rounding allows.

    :param evaluate: solves the linear systems; of no more than moderate accuracy, if need be.
    """
    closed = operator.slope[1] < 1 and not operator.terminal.any()
    polish = value.size <= _POLISH_STATES
    told = time.monotonic()
    best, best_bound, best_residual = value, np.inf, np.inf
    lowest = attempt = first = np.inf
    backups = stalled = iteration = 0
    while True:
        backed_up = operator(value)
        backups += 1
        change = backed_up - value
        residual = float(np.abs(change).max(initial=0.0))
        rounding = operator.rounding(value, backed_up)
        settled = residual <= 4 * rounding
        candidate, bound = _interval(operator, value, change, rounding, closed)
        size = float(np.abs(candidate).max(initial=0.0))
        target = max(absolute, relative * size)
        due = residual <= min(target, attempt) and not (
            evaluate.sweeping and _sweeps_to(target, bound, operator.slope[1]) < _PROOF_SWEEPS
        )
        if bound > target and not closed and (due or settled):
            # Verifying costs a solve: try again only once much has been gained.
            attempt = residual / 30
            proven, passes = _supersolution(
                operator, evaluate, value, backed_up, residual + 2 * rounding
            )
            backups += passes
            bound = min(bound, proven)
        improved = bound < 0.5 * best_bound or residual < 0.5 * lowest or evaluate.sweeping
        improved |= evaluate.mixing and not settled
        stalled = 0 if improved else stalled + 1
        if bound < best_bound or (bound == best_bound and residual < best_residual):
            best, best_bound = candidate, bound
            best_residual = float(np.ptp(change)) / 2 if closed else residual
        lowest = min(lowest, residual)
        first = min(first, max(size, residual))
        exhausted = stalled > 1 or (settled and not improved)
        if best_bound <= target and (not polish or evaluate.sweeping or exhausted):
            break
        if (settled and stalled > 1) or stalled > _HOPELESS or iteration >= _ITERATIONS:
            break
        # Of V itself: far from V*, the middle of a wide interval is farther than any divergence.
        reach = float(np.abs(value).max(initial=0.0))
        diverged = not reach <= _DIVERGED * max(first, 1.0 if polish else first)
        if diverged or not np.isfinite(residual):
            break
        iteration += 1
        now = time.monotonic()
        if progress is not None and now - told >= 0.1:
            told = now
            progress(iteration, best_bound)
        if stalled > _PATIENCE and not evaluate.direct:
            value, stalled = best, 0
            evaluate.retreat()
            continue
        linearise = partial(operator.derivative, value, backed_up)
        value = value + evaluate(linearise, change, accuracy=_ACCURACY)
    return FixedPoint(
        value=best,
        error_bound=best_bound,
        iterations=iteration,
        backups=backups + evaluate.products,
        residual=best_residual,
        converged=best_bound <= target or (settled and best_bound < np.inf),
    )


def _interval(
    operator: BellmanOperator,
    value: np.ndarray,
    change: np.ndarray,
    rounding: float,
    closed: bool,
) -> tuple[np.ndarray, float]:
    """A value near `value` and its certified error, by T's contraction; inf if there is none."""
    least, most = operator.slope
    if not most < 1:
        return value, np.inf
    high = float(change.max()) + rounding
    low = float(change.min()) - rounding
    if not closed:
        return value, max(high, -low) / (1 - most) * (1 + 8 * UNIT_ROUNDOFF)
    upper = high / (1 - (most if high > 0 else least))
    lower = low / (1 - (least if low > 0 else most))
    middle = value + (upper + lower) / 2
    # The two sums above, and the two quotients, are themselves rounded.
    written = 4 * UNIT_ROUNDOFF * (float(np.abs(middle).max()) + abs(upper) + abs(lower))
    return middle, ((upper - lower) / 2 + written) * (1 + 8 * UNIT_ROUNDOFF)


def _sweeps_to(target: float, bound: float, slope: float) -> float:
    """Plain backups after which `bound` meets `target` by contraction alone."""
    if not (0 < target <= bound < np.inf and slope < 1):
        return np.inf
    return float(np.log(target / bound) / np.log(slope)) if slope > 0 else 1.0


def _supersolution(
    operator: BellmanOperator,
    evaluate: Evaluation,
    value: np.ndarray,
    backed_up: np.ndarray,
    scale: float,
) -> tuple[float, int]:
    """Certified error of `value`, or inf, and the backups it took.

    U = V + c·w satisfies T U <= U, and V - c·w the reverse, once c exceeds the residual and w is
    the expected time to the end: one step with the clock running costs c. Where actions nearly tie,
    the slowest of them counts, which is the one that is best against U: w is then taken from there.
    """
    live = ~operator.terminal
    if not live.any():
        return 0.0, 0
    above, above_backed_up = value, backed_up
    least = scale
    for attempt in range(_CERTIFICATES):
        matrix = operator.derivative(above, above_backed_up)
        wait = evaluate.solve(matrix, live.astype(np.float64), accuracy=0.01)
        drift = (wait - matrix @ wait)[live].min()
        if not (np.isfinite(wait).all() and wait[live].min() > 0 and drift > 0.1):
            break
        step = 2 * scale / float(drift) * wait
        below, above = value - step, value + step
        below_backed_up = operator(below)
        under = operator.rounding(below, below_backed_up)
        above_backed_up = operator(above)
        over = operator.rounding(above, above_backed_up)
        if ((above_backed_up + over <= above) & (below_backed_up - under >= below))[live].all():
            error = max(float((above - value).max()), float((value - below).max()))
            operator(value)
            return error * (1 + 4 * UNIT_ROUNDOFF), 2 * attempt + 3
        scale = max(2 * scale, least + 2 * over, least + 2 * under)
    operator(value)
    return np.inf, 2 * attempt + 1


def _check_span(
    transition: csr_array, log_prior: np.ndarray, terminal: np.ndarray, discount: float
) -> None:
    """Raise unless these are rows of all states, whose returns are finite."""
    if transition.shape[1] != len(log_prior):
        raise ValueError(
            f"transition: expected shape (S·A, S) as log_prior is {log_prior.shape}, got "
            f"{transition.shape}"
        )
    if not 0 <= discount <= 1:
        raise ValueError(f"discount: expected a number in [0, 1], got {discount}")
    if discount == 1:
        check_every_state_ends(transition, log_prior, terminal)


def checked_tables(
    transition: csr_array, log_prior: np.ndarray, terminal: np.ndarray
) -> tuple[csr_array, np.ndarray, np.ndarray, np.ndarray]:
    """The tables of n states, verified; log_prior normalised; and the mass of each row that is not
    of a terminal state.

    :param transition: (n·A, columns). :param log_prior: (n, A). :param terminal: (n,).
    :raises ValueError: malformed tables.
    """
    log_prior = np.asarray(log_prior, dtype=np.float64)
    terminal = np.asarray(terminal)
    if log_prior.ndim != 2 or 0 in log_prior.shape:
        raise ValueError(f"log_prior: expected shape (S, A), got {log_prior.shape}")
    states, actions = log_prior.shape
    if transition.shape[0] != states * actions:
        raise ValueError(
            f"transition: expected shape (S·A, S) = {(states * actions, states)} as log_prior is "
            f"{log_prior.shape}, got {transition.shape}"
        )
    if terminal.shape != (states,) or terminal.dtype != np.bool_:
        raise ValueError(
            f"terminal: expected {states} booleans, got {terminal.dtype} of shape {terminal.shape}"
        )
    transition = csr_array(transition)
    if transition.dtype != np.float64:
        raise ValueError(f"transition: expected float64 probabilities, got {transition.dtype}")
    mass = (transition @ np.ones(transition.shape[1])).reshape(states, actions)
    if transition.data.min(initial=0.0) < 0 or not np.isfinite(mass).all():
        raise ValueError("transition: expected probabilities >= 0, got a negative or NaN entry")
    allowed = log_prior > -np.inf
    wanted = np.where(terminal, 0.0, 1.0)[:, None]
    off = (np.abs(mass - wanted) > _ROW_SUM_TOLERANCE) & (allowed | terminal[:, None])
    if off.any():
        state, action = np.argwhere(off)[0]
        raise ValueError(
            f"transition: expected row of state {state}, action {action} to sum to "
            f"{wanted[state, 0]:g}, got {mass[state, action]:.17g}; terminal rows are empty, the "
            "others are probabilities"
        )
    log_prior = np.where(terminal[:, None], -np.log(actions), log_prior)
    with np.errstate(over="ignore"):
        total = np.exp(log_prior).sum(axis=1)
    wrong = ~(np.abs(total - 1) <= _ROW_SUM_TOLERANCE)
    if wrong.any():
        state = int(np.argmax(wrong))
        raise ValueError(
            f"log_prior: expected probabilities of state {state} to sum to one, got "
            f"{total[state]:.17g}; allow at least one action and normalise"
        )
    return transition, log_prior - np.log(total)[:, None], terminal, mass[~terminal]


def check_every_state_ends(
    transition: csr_array, log_prior: np.ndarray, terminal: np.ndarray
) -> None:
    """Raise if some state cannot reach a terminal one, which discount = 1 requires."""
    states, actions = log_prior.shape
    pairs = np.repeat(np.arange(states * actions), np.diff(transition.indptr))
    possible = (transition.data > 0) & np.isfinite(log_prior).ravel()[pairs]
    ends = _ends(pairs[possible] // actions, transition.indices[possible], terminal)
    if not ends.all():
        state = int(np.argmin(ends))
        raise ValueError(
            f"discount: expected below 1, as state {state} can never reach a terminal state under "
            "allowed actions and its return would not end; lower the discount or mark states that "
            "end the episode as terminal"
        )


def _ends(source: np.ndarray, target: np.ndarray, terminal: np.ndarray) -> np.ndarray:
    """(S,) bool: the states from which edges source -> target lead to a terminal state."""
    states = terminal.size
    # Edges reversed, and one more node from which every terminal state is reached at once.
    goals = np.flatnonzero(terminal)
    row = np.concatenate([target, np.full(goals.size, states)])
    column = np.concatenate([source, goals])
    reverse = csr_matrix((np.ones(row.size), (row, column)), shape=(states + 1, states + 1))
    reached = np.zeros(states + 1, dtype=bool)
    reached[breadth_first_order(reverse, states, return_predecessors=False)] = True
    return reached[:states]


def _check_no_loop_pays(operator: ControlBackup, found: FixedPoint) -> None:
    """Raise if the search without discount did not end because the value is infinite."""
    backed_up = operator(found.value)
    matrix = operator.derivative(found.value, backed_up)
    source = np.repeat(np.arange(found.value.size), np.diff(matrix.indptr))
    taken = matrix.data > 0
    ends = _ends(source[taken], matrix.indices[taken], operator.terminal)
    # A policy that never ends is best only where each round pays, or at least costs nothing.
    state = int(np.argmin(ends)) if not ends.all() else int(np.argmax(backed_up - found.value))
    if not ends.all() or found.residual > _LOST * operator.rounding(found.value, backed_up):
        raise ValueError(
            f"discount: expected below 1, as a loop through state {state} pays at least as much "
            "as ending does and no finite value could be certified; lower the discount or the "
            "rewards of steps that do not end"
        )


def _check_evidence_is_finite(operator: PosteriorBackup) -> None:
    """Raise if discount · spectral radius of M is not below one."""
    low, high = operator.log_spectral_radius()
    if high + np.log(operator.discount) >= 0:
        radius = np.exp(np.minimum((low + high) / 2, 700))
        raise ValueError(
            f"the evidence is infinite: discount · spectral radius of M = {operator.discount:g} · "
            f"{radius:.6g} is not below 1, M(s, s') = Σ_a ρ P exp(reward / temperature); raise the "
            "temperature, lower the discount, or make rewards smaller"
        )


def _require(good: np.ndarray, name: str, expected: str) -> None:
    if not good.all():
        where = tuple(int(i) for i in np.argwhere(~good)[0])
        raise ValueError(f"{name}: expected {expected}, got another at index {where}")
