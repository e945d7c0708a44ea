"""Relative entropy policy search: the best weighting of a sample within a divergence of it.

The problem is max_w E_w[r] subject to KL(w ‖ q) <= epsilon over weightings w of N samples, q their
base weights (uniform unless given); step-based, also subject to flow: w visits a state as often as
it enters it, in the mean of features φ. Its Lagrange dual, δ_i = r_i + θᵀ d_i and
d_i = discount · φ(s'_i) - φ(s_i) + (1 - discount) · E φ(s_0):

    g(η, θ) = η · epsilon + η · log Σ_i q_i exp(δ_i / η),     w_i ∝ q_i exp(δ_i / η)

is jointly convex, and its gradient says what holds at the minimum: ∂g/∂η = epsilon - KL(w ‖ q),
∂g/∂θ = E_w[d]. KL(w ‖ q) only rises as η falls, also when θ is the best one for each η. So the
minimum is found as a root: KL(η) = epsilon by bracketing, and θ at each η by Newton's method, which
gives both constraints to rounding where minimising g gives them to its square root.

Two relaxations, for objectives that already pay for divergence and for samples that cannot close.
With `least_temperature` the minimum is over η from there on, where the divergence may be less than
epsilon. With `flow_tolerance` λ > 0 the mismatch of the flow shares the trust region with it,
KL(w ‖ q) + |E_w[d]|² / (2 λ E_q|d|²) <= epsilon, which adds λ E_q|d|² |θ|² / (2 η) to g.

η and θᵀφ are in reward units, divergences in nats; everything is NumPy float64, and torch tensors
that need no gradient are taken as arrays.

References: Peters, Mülling and Altün (2010), AAAI. Deisenroth, Neumann
and Peters (2013), doi:10.1561/2300000021. Nachum et al. (2018), arXiv:1707.01891.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import brentq
from scipy.special import logsumexp

Array = np.ndarray[Any, np.dtype[np.float64]]

_ROUNDING = 4 * np.finfo(np.float64).eps
_UNDERFLOW = 800.0
_FLOW_TOLERANCE = 1e-10
_DIVERGENCE_TOLERANCE = 1e-9
_NEWTON_STEPS = 200
_ROOT_STEPS = 200
_LARGEST_RATE = 1e8
_SATURATED = 1e-13
_LONGEST_STEP = 10.0
_COLLINEAR = 1e-9


class ConstantReturnError(ValueError):
    """Every weighting that is allowed is as good as every other: there is nothing to choose."""


class DivergenceTooLargeError(ValueError):
    """The best weighting of all lies within epsilon: the temperature would be zero."""


class DivergenceTooSmallError(ValueError):
    """No weighting within epsilon satisfies the flow constraint."""


class InfeasibleFlowError(ValueError):
    """No weighting of the sample satisfies the flow constraint at all."""


class DualNotSolvedError(RuntimeError):
    """The step-based dual did not converge."""


@dataclass(frozen=True)
class EpisodicDual:
    """The minimum of the episodic dual."""

    temperature: float
    """η, in units of the returns."""
    weights: Array
    """(N,), summing to one."""
    divergence: float
    """KL(weights ‖ base weights), nats."""
    effective_sample_size: float
    """1 / Σ weights², in [1, N]."""
    dual_value: float
    """g(η): no weighting within epsilon has a larger mean return; it is that of these weights where
    the constraint binds."""


@dataclass(frozen=True)
class StepDual:
    """The minimum of the step-based dual."""

    temperature: float
    """η, reward units."""
    theta: Array
    """(K,): of all minimisers the one of smallest norm; θᵀφ(s) is a value, in reward units."""
    weights: Array
    """(N,), summing to one."""
    divergence: float
    """KL(weights ‖ base weights), nats."""
    effective_sample_size: float
    """1 / Σ weights², in [1, N]."""
    feature_mismatch: float
    """Euclidean norm of E_w[d], in units of the features: what is left of the flow constraint."""
    advantages: Array
    """(N,): r + θᵀ(discount · φ' - φ), reward units."""
    dual_value: float
    """g(η, θ): no weighting that is allowed has a larger mean reward; it is that of these weights
    where the constraint on the divergence binds and the flow closes."""
    iterations: int
    """Newton steps in θ, over all temperatures that were tried."""


def episodic_dual(
    temperature: float, returns: ArrayLike, epsilon: float, log_base: ArrayLike | None = None
) -> tuple[float, float]:
    """g(η) = η · epsilon + η · log Σ_i q_i exp(R_i / η), and its derivative epsilon - KL(w ‖ q).

    Deisenroth, Neumann and Peters (2013), §2.4.3; g is in units of the returns.

    :param temperature: η > 0, units of the returns.
    :param returns: (N,), R.
    :param epsilon: > 0, nats.
    :param log_base: (N,), log q up to a constant; -inf leaves a sample out. Uniform if None.
    :raises ValueError: an argument outside its range, or of another shape.
    """
    gain, log_base = _checked_sample(returns, "returns", log_base)
    _check_positive(epsilon, "epsilon", "nats")
    _check_positive(temperature, "temperature", "units of the returns")
    peak = gain[log_base > -np.inf].max()
    _, divergence, log_mean = _tilted((gain - peak) / temperature, log_base)
    return float(peak + temperature * (epsilon + log_mean)), epsilon - divergence


def solve_episodic(
    returns: ArrayLike,
    epsilon: float,
    log_base: ArrayLike | None = None,
    *,
    least_temperature: float = 0.0,
) -> EpisodicDual:
    """min over η > 0 of `episodic_dual`: weights w_i ∝ q_i exp(R_i / η) with KL(w ‖ q) = epsilon.

    Returns that agree to rounding, relative to the largest in size, count as equal.

    :param returns: (N,), N >= 2, in any units.
    :param epsilon: in (0, -log q(best)), nats, q(best) the base weight of all the best samples:
        log(N / number of best) for uniform ones.
    :param log_base: (N,), log q up to a constant; -inf leaves a sample out. Uniform if None.
    :param least_temperature: >= 0, units of the returns. Above 0 the minimum is over η from there
        on: where it is at the end, KL(w ‖ q) is at most epsilon, and nothing is refused for it.
    :raises ConstantReturnError: all returns are equal. :raises DivergenceTooLargeError: epsilon at
        or above its limit. :raises ValueError: malformed arguments.
    """
    gain, log_base = _checked_sample(returns, "returns", log_base)
    _check_positive(epsilon, "epsilon", "nats")
    _check_least(least_temperature)
    if least_temperature > 0:
        peak = gain[log_base > -np.inf].max()
        if _tilted((gain - peak) / least_temperature, log_base)[1] <= epsilon:
            return _episodic_at(least_temperature, gain, epsilon, log_base)
    scaled, span, rounding = _scaled(gain, log_base, "returns")
    best = scaled >= -rounding
    limit = max(0.0, -float(logsumexp(log_base[best])))
    steepest = _UNDERFLOW / -scaled[~best & (log_base > -np.inf)].max()

    def excess(log_rate: float) -> float:
        return _tilted(math.exp(log_rate) * scaled, log_base)[1] - epsilon

    # KL <= (range / η)² / 8 (Hoeffding), so that the bracket needs no search below.
    low = math.log(8 * epsilon) / 2 - 1e-3
    high = low + 1.0
    while high < math.log(steepest) and excess(high) <= 0:
        low, high = high, high + 1.0
    if epsilon >= limit or excess(high) <= 0:
        raise DivergenceTooLargeError(
            f"epsilon: expected less than {limit:.6g} nats, the divergence of all weight on the "
            f"best of {len(gain)} returns, got {epsilon:g}, which any weighting satisfies; "
            "choose a smaller epsilon or collect more episodes"
        )
    rate = math.exp(brentq(excess, low, high, xtol=1e-15, rtol=_ROUNDING))
    return _episodic_at(span / rate, gain, epsilon, log_base)


def _episodic_at(temperature: float, gain: Array, epsilon: float, log_base: Array) -> EpisodicDual:
    peak = gain[log_base > -np.inf].max()
    weights, divergence, log_mean = _tilted((gain - peak) / temperature, log_base)
    return EpisodicDual(
        temperature=float(temperature),
        weights=weights,
        divergence=divergence,
        effective_sample_size=1 / float(weights @ weights),
        dual_value=float(peak + temperature * (epsilon + log_mean)),
    )


def trust_multiplier(returns: ArrayLike, max_divergence: float, mean_length: float) -> float:
    """Trust-PCL's λ: KL(softmax(R / λ) ‖ uniform) = max_divergence · mean_length.

    It is the temperature of `solve_episodic`. Where no λ reaches that divergence, because the
    returns are equal or the best of so few episodes lies within it, the trust region does not bind
    on them, and λ is 0: the least multiplier that keeps the divergence within its bound. Nachum et
    al. (2018), "Automatic tuning of the Lagrange multiplier λ"; their program bisects the same
    equation on [0, 1000], and ends near 0 there too.

    :param returns: (N,) of the last episodes, undiscounted sums, in reward units.
    :param max_divergence: > 0, nats per step. :param mean_length: > 0, steps per episode.
    :returns: λ >= 0, reward units.
    :raises ValueError: malformed arguments.
    """
    _check_positive(max_divergence, "max_divergence", "nats per step")
    _check_positive(mean_length, "mean_length", "steps")
    try:
        return solve_episodic(returns, max_divergence * mean_length).temperature
    except (ConstantReturnError, DivergenceTooLargeError):
        return 0.0


def step_dual(
    temperature: float,
    theta: ArrayLike,
    rewards: ArrayLike,
    features: ArrayLike,
    next_features: ArrayLike,
    epsilon: float,
    *,
    discount: float = 1.0,
    initial_features: ArrayLike | None = None,
    log_base: ArrayLike | None = None,
    horizon: int | None = None,
) -> tuple[float, float, Array]:
    """g(η, θ) = η · epsilon + η · log Σ_i q_i exp(δ_i / η), its derivative by η, and by θ (K,).

    Arguments as in `solve_step`. Peters, Mülling and Altün (2010), with the discount of Deisenroth,
    Neumann and Peters (2013), §2.4.3; g is in reward units.

    :param temperature: η > 0, reward units. :param theta: (K,), reward units per feature.
    :raises ValueError: an argument outside its range, or of another shape.
    """
    reward, log_base = _checked_sample(rewards, "rewards", log_base)
    flow, _ = _flow(len(reward), features, next_features, discount, initial_features, horizon)
    theta = np.asarray(theta, dtype=np.float64)
    if theta.shape != flow.shape[1:]:
        raise ValueError(
            f"theta: expected shape (K,) = {flow.shape[1:]}, one number per feature, got "
            f"{theta.shape}"
        )
    _check_positive(epsilon, "epsilon", "nats")
    _check_positive(temperature, "temperature", "reward units")
    advantage = reward + flow @ theta
    peak = advantage[log_base > -np.inf].max()
    weights, divergence, log_mean = _tilted((advantage - peak) / temperature, log_base)
    value = float(peak + temperature * (epsilon + log_mean))
    return value, epsilon - divergence, weights @ flow


def solve_step(
    rewards: ArrayLike,
    features: ArrayLike,
    next_features: ArrayLike,
    epsilon: float,
    *,
    discount: float = 1.0,
    initial_features: ArrayLike | None = None,
    log_base: ArrayLike | None = None,
    start: StepDual | None = None,
    horizon: int | None = None,
    least_temperature: float = 0.0,
    flow_tolerance: float = 0.0,
) -> StepDual:
    """min over η > 0 and θ of `step_dual`: KL(w ‖ q) = epsilon and E_w[d] = 0.

    Features may be collinear: only the row space of d matters, and θ is in it. One sample of φ(s')
    makes a biased estimate of the dual of the model where transitions are random, because the
    expectation over s' stands inside the exponential; pass φ' averaged over the next states of the
    same state and action where they are known, but never the mean over a batch. After a step that
    ended an episode, pass the features of an initial state, for a chain that starts again there; or
    zeros, for an end that is worth nothing, and one more sample of zero features and reward that
    has the mass of all steps after the ends.

    It takes O(N K²) per Newton step, of which it needs five to forty.

    :param rewards: (N,), r. :param features, next_features: (N, K), φ(s_i) and φ(s'_i).
    :param epsilon: > 0, nats; above the divergence of the closest weighting that satisfies the
        flow constraint, and below that of the best one.
    :param discount: in (0, 1]. Below 1 the weights are a discounted visitation from the start.
    :param initial_features: (K,), E φ(s_0), or (M, K), φ of a sample of initial states. Needed
        below discount 1 or with a horizon, without effect at 1 without one.
    :param log_base: (N,), log q up to a constant; -inf leaves a sample out. Uniform if None.
    :param start: a solution to start from, of a similar sample with the same features.
    :param horizon: T >= 1, steps of an episode, if it has a last one: features are then of the
        state and the step, zero after the last, and the start has the mass of one step in T
        (discounted: 1 / Σ_t discount^t) in place of 1 - discount.
    :param least_temperature: >= 0, reward units. Above 0 the minimum is over η from there on: where
        it is at the end, KL(w ‖ q) is at most epsilon.
    :param flow_tolerance: λ >= 0: how much the flow may fail to close, as above; 0 for not at all.
    :raises InfeasibleFlowError: no weighting satisfies the flow constraint.
    :raises DivergenceTooSmallError, DivergenceTooLargeError: epsilon outside its limits.
    :raises ConstantReturnError: all weightings that satisfy the constraint are equally good.
    :raises DualNotSolvedError: no convergence. :raises ValueError: malformed arguments.
    """
    reward, log_base = _checked_sample(rewards, "rewards", log_base)
    flow, offset = _flow(len(reward), features, next_features, discount, initial_features, horizon)
    if start is not None and start.theta.shape != flow.shape[1:]:
        raise ValueError(
            f"start: expected a solution with {flow.shape[1]} features, got one with "
            f"{len(start.theta)}; leave start out"
        )
    _check_positive(epsilon, "epsilon", "nats")
    _check_least(least_temperature)
    if not 0 <= flow_tolerance < math.inf:
        raise ValueError(f"flow_tolerance: expected a finite number >= 0, got {flow_tolerance}")
    kept = log_base > -np.inf
    try:
        span = _scaled(reward, log_base, "rewards")[1]
    except ConstantReturnError:
        if least_temperature == 0:
            raise
        span = least_temperature
    size = math.sqrt(float(np.exp(log_base[kept]) @ (flow[kept] ** 2).sum(1)))
    coordinates = _Scaled(flow[kept], size) if flow_tolerance else _Whitened(flow[kept])
    problem = _Projection(
        (reward[kept] - reward[kept].max()) / span,
        coordinates.rows,
        log_base[kept],
        epsilon,
        span / least_temperature if least_temperature else math.inf,
        flow_tolerance,
    )
    if start is None:
        rate, point = problem.solve(None)
    else:
        rate = min(span / start.temperature, problem.largest_rate)
        rate, point = problem.solve((rate, coordinates.into(start.theta) * rate / span))

    temperature = span / rate
    theta = coordinates.out_of(point) * temperature
    # From the coordinates and not from theta, which has fewer digits where features are collinear.
    exponent = np.full(len(reward), -np.inf)
    exponent[kept] = problem.exponent(rate, point)
    peak = exponent.max()
    weights, divergence, log_mean = _tilted(exponent - peak, log_base)
    spent = divergence + problem.price(point)
    dual_value = reward[kept].max() + temperature * (
        epsilon + peak + log_mean + problem.price(point)
    )
    mismatch = float(np.linalg.norm(weights @ flow))
    excess = spent - epsilon if rate < problem.largest_rate else max(spent - epsilon, 0.0)
    unmet = np.linalg.norm(weights[kept] @ coordinates.rows + flow_tolerance * point)
    if abs(excess) > 1e-6 * min(1.0, epsilon) or unmet > 1e-6:
        raise problem.not_solved(excess, mismatch)
    return StepDual(
        temperature=float(temperature),
        theta=theta,
        weights=weights,
        divergence=divergence,
        effective_sample_size=1 / float(weights @ weights),
        feature_mismatch=mismatch,
        advantages=reward + (flow - offset) @ theta,
        dual_value=float(dual_value),
        iterations=problem.iterations,
    )


class _Scaled:
    """Rows of unit mean square, in which the shortest point is that of the shortest theta."""

    def __init__(self, rows: Array, size: float) -> None:
        self.size = size if size > 0 else 1.0
        self.rows = rows / self.size

    def into(self, theta: Array) -> Array:
        """(K,): z with the same products `rows @ z` as the original rows with theta."""
        return theta * self.size

    def out_of(self, point: Array) -> Array:
        """(K,): theta with the products of `point`."""
        return point / self.size


class _Whitened:
    """Coordinates of the row space of (N, K) rows in which they have unit second moments.

    Columns are first divided by their size, so that a feature in small units is not taken for a
    combination of the others; it is one if what it adds is below 1e-9 of the features' size.
    """

    def __init__(self, rows: Array) -> None:
        scale = np.abs(rows).max(0)
        self.scale = np.where(scale > 0, scale, 1.0)
        left, sizes, right = np.linalg.svd(rows / self.scale, full_matrices=False)
        rank = int((sizes > _COLLINEAR * max(sizes[:1], default=0.0)).sum())
        root = math.sqrt(len(rows))
        self.rows = left[:, :rank] * root
        self.sizes, self.right = sizes[:rank] / root, right[:rank]
        self.basis = np.linalg.qr((self.right * self.scale).T)[0]

    def into(self, theta: Array) -> Array:
        """(rank,): z with the same products `rows @ z` as the original rows with theta."""
        return self.sizes * (self.right @ (self.scale * theta))

    def out_of(self, point: Array) -> Array:
        """(K,): of all theta with the products of `point` the shortest."""
        theta = self.right.T @ (point / self.sizes) / self.scale
        return self.basis @ (self.basis.T @ theta)


class _Projection:
    """max_w rate · E_w[r] - KL(w ‖ q) subject to E_w[d] = 0, and the rate at which KL = epsilon.

    Its dual is min_y log Σ q exp(rate · r + y·d), where rate = 1 / η and y = θ / η: smooth and
    convex in y at every rate, rate 0 included, where g is not defined. A tolerance λ adds
    λ |y|² / 2 to it, which at the minimum is what the mismatch takes of epsilon.
    """

    def __init__(
        self,
        reward: Array,
        flow: Array,
        log_base: Array,
        epsilon: float,
        largest_rate: float,
        tolerance: float,
    ) -> None:
        self.reward, self.flow, self.log_base, self.epsilon = reward, flow, log_base, epsilon
        self.largest_rate, self.tolerance = largest_rate, tolerance
        self.iterations = 0

    def price(self, point: Array) -> float:
        return self.tolerance * float(point @ point) / 2

    def exponent(self, rate: float, point: Array) -> Array:
        return rate * self.reward + self.flow @ point

    def solve(self, start: tuple[float, Array] | None) -> tuple[float, Array]:
        """The rate > 0 and y at which KL = epsilon.

        Newton in rate²/2, in which KL is a straight line at first, inside a bracket.
        """
        rate, point = start if start is not None else (0.0, np.zeros(self.flow.shape[1]))
        low, high, known_at_zero = 0.0, math.inf, False
        for _ in range(_ROOT_STEPS):
            point, divergence, slope, direction = self._closest(rate, point)
            excess = divergence - self.epsilon
            if rate > 0 and abs(excess) <= max(_DIVERGENCE_TOLERANCE * self.epsilon, 1e-14):
                return rate, point
            if rate == self.largest_rate and excess <= 0:
                return rate, point
            if rate == 0:
                self._check_at_zero(divergence, slope)
                known_at_zero = True
            if excess <= 0:
                low = rate
                saturated = rate > _LARGEST_RATE or rate**2 * slope < _SATURATED < rate
                if saturated and self.largest_rate == math.inf:
                    raise DivergenceTooLargeError(
                        f"epsilon: expected less than about {divergence:.6g} nats, the divergence "
                        f"of the best weighting that satisfies the flow constraint, got "
                        f"{self.epsilon:g}, at which the temperature is zero; choose a smaller "
                        "epsilon or collect more steps"
                    )
            else:
                high = rate
            square = rate**2 - 2 * excess / slope if slope > 0 else -math.copysign(math.inf, excess)
            if square <= 0 and not known_at_zero:
                step = 0.0
            else:
                step = math.sqrt(max(square, 0.0))
                if rate > 0:
                    step = min(step, 4 * rate)
                step = min(step, self.largest_rate)
                if not low < step < high:
                    step = math.sqrt(low * high) if low > 0 else high / 8
            point = point + (step - rate) * direction
            rate = step
        raise self.not_solved(excess, 0.0)

    def _check_at_zero(self, divergence: float, slope: float) -> None:
        if divergence >= self.epsilon:
            raise DivergenceTooSmallError(
                f"epsilon: expected more than {divergence:.6g} nats, the divergence of the closest "
                f"weighting that satisfies the flow constraint, got {self.epsilon:g}; choose a "
                "larger epsilon, collect more steps or use fewer features"
            )
        if slope < 1e-20 and self.largest_rate == math.inf:
            raise ConstantReturnError(
                "rewards: expected weightings of different mean reward among those that satisfy "
                "the flow constraint, got the same for all of them: rewards are a combination of "
                "the features, and there is nothing to choose"
            )

    def _closest(self, rate: float, point: Array) -> tuple[Array, float, float, Array]:
        """y at this rate; KL there, with the price of y; its derivative by rate²/2; dy/drate."""
        exponent = self.exponent(rate, point)
        value, weights = self._log_mean(exponent)
        value += self.price(point)
        for _ in range(_NEWTON_STEPS):
            mean = weights @ self.flow
            gradient = mean + self.tolerance * point
            curvature = self._curvature(weights, mean)
            if np.linalg.norm(gradient) <= _FLOW_TOLERANCE:
                break
            if self.tolerance == 0:
                self._check_flow(point)
            self.iterations += 1
            step = -cho_solve(curvature, gradient)
            along = self.flow @ step
            slope, size = float(gradient @ step), 1.0
            while True:
                there = point + size * step
                new_value, new_weights = self._log_mean(exponent + size * along)
                new_value += self.price(there)
                # Near the minimum the value is flat to rounding, and the gradient decides.
                left = np.linalg.norm(new_weights @ self.flow + self.tolerance * there)
                flatter = left < np.linalg.norm(gradient)
                if new_value <= value + 1e-4 * size * slope or (flatter and -slope < 1e-8):
                    break
                # The quadratic model holds for a change of the exponents by a few units at most,
                # and in a direction that the weights have left the whole step is far longer.
                size = min(size / 2, _LONGEST_STEP / float(np.ptp(along)))
                if not size * np.ptp(along) > 1e-12:
                    raise self.not_solved(0.0, float(np.linalg.norm(gradient)))
            point = there
            exponent = self.exponent(rate, point)
            value, weights = self._log_mean(exponent)
            value += self.price(point)
        else:
            raise self.not_solved(0.0, float(np.linalg.norm(gradient)))
        average = float(weights @ self.reward)
        with_reward = (weights * (self.reward - average)) @ self.flow
        direction = -cho_solve(curvature, with_reward)
        residual = self.reward - average + (self.flow - mean) @ direction
        slope = float(weights @ residual**2) + 2 * self.price(direction)
        spent = _tilted(exponent - exponent.max(), self.log_base)[1] + self.price(point)
        return point, spent, slope, direction

    def _log_mean(self, exponent: Array) -> tuple[float, Array]:
        mass = exponent + self.log_base
        peak = mass.max()
        weights = np.exp(mass - peak)
        total = weights.sum()
        return float(peak + math.log(total)), weights / total

    def _curvature(self, weights: Array, mean: Array) -> Any:
        """A Cholesky factor of Cov_w(d) + λ, with a ridge where weights have left a direction."""
        covariance = (self.flow * weights[:, None]).T @ self.flow - np.outer(mean, mean)
        covariance += self.tolerance * np.eye(len(mean))
        ridge = 1e-15 * max(float(np.trace(covariance)), 1.0)
        while True:
            try:
                return cho_factor(covariance + ridge * np.eye(len(mean)), lower=True)
            except np.linalg.LinAlgError:
                ridge *= 10

    def _check_flow(self, point: Array) -> None:
        """Whether y separates every d from zero, which no weighting can then average to."""
        size = np.linalg.norm(point)
        if size > 0 and (self.flow @ point).max() < -_FLOW_TOLERANCE * size:
            raise InfeasibleFlowError(
                "features: expected that some weighting of the steps enters every state as often "
                "as it leaves it, in the mean of the features, but none does; give initial "
                "features as the next ones where an episode ends, collect more steps or use fewer "
                "features"
            )

    def not_solved(self, excess: float, mismatch: float) -> DualNotSolvedError:
        return DualNotSolvedError(
            f"solve_step: expected convergence, stopped after {self.iterations} Newton steps with "
            f"KL - epsilon = {excess:.3g} nats and a flow residual of {mismatch:.3g}; choose "
            "another epsilon, collect more steps or use fewer features"
        )


def _tilted(exponent: Array, log_base: Array) -> tuple[Array, float, float]:
    """w ∝ q exp(exponent), KL(w ‖ q), log Σ q exp(exponent); exponents are at most about zero.

    The divergence is a sum of terms that are not negative, q (ρ log ρ - ρ + 1) with ρ = w / q, so
    that a small one keeps its digits.
    """
    base = np.exp(log_base)
    kept = base > 0
    if exponent[kept].min() > -0.5:
        log_mean = math.log1p(float(base[kept] @ np.expm1(exponent[kept])))
    else:
        log_mean = float(logsumexp(exponent[kept] + log_base[kept]))
    log_ratio = exponent[kept] - log_mean
    growth = np.expm1(log_ratio)
    divergence = float(base[kept] @ (log_ratio * (growth + 1) - growth))
    weights = np.zeros_like(exponent)
    weights[kept] = base[kept] * (growth + 1)
    return weights / weights.sum(), max(divergence, 0.0), log_mean


def _scaled(gain: Array, log_base: Array, name: str) -> tuple[Array, float, float]:
    """(gain - its maximum) / its range, the range, and what counts as equal after that."""
    kept = gain[log_base > -np.inf]
    span = float(kept.max() - kept.min())
    rounding = _ROUNDING * float(np.abs(kept).max())
    if not span > rounding:
        raise ConstantReturnError(
            f"{name}: expected at least two that differ, got {len(kept)} equal to {kept[0]:g}; "
            "there is nothing to choose: collect more, or keep the policy as it is"
        )
    if not math.isfinite(span):
        raise ValueError(f"{name}: expected a range below 1e308, got {kept.min()} to {kept.max()}")
    return np.minimum((gain - kept.max()) / span, 0.0), span, rounding / span


def _checked_sample(
    numbers: ArrayLike, name: str, log_base: ArrayLike | None
) -> tuple[Array, Array]:
    """`numbers` (N,) and normalised base log weights (N,), float64."""
    gain = np.asarray(numbers, dtype=np.float64)
    if gain.ndim != 1 or len(gain) < 2:
        raise ValueError(f"{name}: expected shape (N,) with N >= 2, got {gain.shape}")
    if not np.isfinite(gain).all():
        where = int(np.flatnonzero(~np.isfinite(gain))[0])
        raise ValueError(f"{name}: expected finite numbers, got {gain[where]} at index {where}")
    if log_base is None:
        return gain, np.full(len(gain), -math.log(len(gain)))
    base = np.asarray(log_base, dtype=np.float64)
    if base.shape != gain.shape or np.isnan(base).any() or not np.isfinite(base.max()):
        raise ValueError(
            f"log_base: expected {len(gain)} log weights below +inf, one per sample and not all "
            f"-inf, got shape {base.shape}; leave it out for uniform ones"
        )
    return gain, base - logsumexp(base)


def _flow(
    number: int,
    features: ArrayLike,
    next_features: ArrayLike,
    discount: float,
    initial_features: ArrayLike | None,
    horizon: int | None,
) -> tuple[Array, Array]:
    """d (N, K), and its constant part, E φ(s_0) times the mass of a step at the start, (K,)."""
    here, there = (np.asarray(x, dtype=np.float64) for x in (features, next_features))
    if here.ndim != 2 or len(here) != number or there.shape != here.shape:
        raise ValueError(
            f"features, next_features: expected the same shape (N, K) with N = {number}, got "
            f"{here.shape} and {there.shape}"
        )
    if not 0 < discount <= 1:
        raise ValueError(f"discount: expected a number in (0, 1], got {discount}")
    if horizon is not None and horizon < 1:
        raise ValueError(f"horizon: expected at least one step, got {horizon}")
    offset = np.zeros(here.shape[1])
    if (start := start_mass(discount, horizon)) > 0:
        if initial_features is None:
            raise ValueError(
                f"initial_features: expected those of initial states at discount {discount}"
                + (f" and horizon {horizon}" if horizon is not None else "")
                + ", got None; pass E φ(s_0), or discount=1 without a horizon"
            )
        first = np.asarray(initial_features, dtype=np.float64)
        if first.ndim not in (1, 2) or first.shape[-1:] != here.shape[1:] or not first.size:
            raise ValueError(
                f"initial_features: expected shape (K,) or (M, K) with K = {here.shape[1]}, got "
                f"{first.shape}"
            )
        offset = start * (first if first.ndim == 1 else first.mean(0))
    flow = discount * there - here + offset
    if not np.isfinite(flow).all():
        raise ValueError(
            "features, next_features, initial_features: expected finite numbers, got some that "
            "are not; look for an overflow or a missing value in the feature function"
        )
    # What is left of features that cancel but for rounding, of sums over the sample too, is no flow
    # that could be closed.
    rounding = number * np.finfo(np.float64).eps * (np.abs(here) + np.abs(there) + np.abs(offset))
    return np.where(np.abs(flow) > rounding, flow, 0.0), offset


def start_mass(discount: float, horizon: int | None) -> float:
    """Of all (discounted) steps, the share of the first ones: 1 / Σ_{t < horizon} discount^t."""
    if horizon is None:
        return 1 - discount
    return 1 / horizon if discount == 1 else (1 - discount) / (1 - discount**horizon)


def _check_least(temperature: float) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"least_temperature: expected a finite number >= 0, got {temperature}")


def _check_positive(number: float, name: str, unit: str) -> None:
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name}: expected a finite number > 0 in {unit}, got {number}")
