"""The other side of a step, for linear-Gaussian models: NumPy, from the definitions.

Evidence is one Gaussian integral over everything that is random in a few steps, actions and noise
alike. The best value is a Riccati recursion, and what a policy is worth follows from the moments of
its states. Homogeneous coordinates, z = (s, 1) and y = (s, 1, a), carry the linear terms.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np

from inference_rl.derivation.independent import Array
from inference_rl.derivation.step import DoesNotApplyError
from inference_rl.derivation.subject import Subject
from inference_rl.linear_gaussian import LinearGaussianModel
from inference_rl.riccati import LinearGaussianSolution, solve_linear_gaussian

STEPS = 4
"""Of an excerpt."""

SWEEPS = 200_000
"""Of the recursion, at most, where there is no horizon."""


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A linear-Gaussian model: reward −y'Cy, z' = Fy + noise, in homogeneous coordinates.

    :ivar cost: C, (n+1+m, n+1+m). :ivar move: F, (n+1, n+1+m). :ivar noise, start_noise: (n+1, n+1)
        covariances. :ivar start: mean of (s_0, 1). :ivar habit: mean and precision of the Gaussian
        prior, or None for a flat one.
    """

    cost: Array
    move: Array
    noise: Array
    start: Array
    start_noise: Array
    habit: tuple[Array, Array] | None
    discount: float
    states: int
    actions: int

    @classmethod
    def of(cls, model: LinearGaussianModel) -> Arrays:
        n, m = (int(size) for size in model.B.shape)
        state, action = model.state_linear.numpy() / 2, model.action_linear.numpy() / 2
        cross, constant = model.cross_cost.numpy(), float(model.reward_offset)
        cost = np.block(
            [
                [model.state_cost.numpy(), state[:, None], cross],
                [state[None], np.array([[constant]]), action[None]],
                [cross.T, action[:, None], model.action_cost.numpy()],
            ]
        )
        s, one, a = slice(0, n), slice(n, n + 1), slice(n + 1, n + 1 + m)
        move = np.zeros((n + 1, n + 1 + m))
        move[s, s], move[s, one], move[s, a] = (
            model.A.numpy(),
            model.offset.numpy()[:, None],
            model.B.numpy(),
        )
        move[n, n] = 1.0

        def padded(matrix: Any) -> Array:
            return np.pad(matrix.numpy(), ((0, 1), (0, 1)))

        habit = None
        if model.prior_covariance is not None:
            precision = np.linalg.inv(model.prior_covariance.numpy())
            habit = model.prior_mean.numpy(), precision
        return cls(
            cost=cost,
            move=move,
            noise=padded(model.noise_covariance),
            start=np.append(model.initial_mean.numpy(), 1.0),
            start_noise=padded(model.initial_covariance),
            habit=habit,
            discount=float(model.discount),
            states=n,
            actions=m,
        )

    def priced(self, temperature: float) -> tuple[Array, float]:
        """C and what is left over where −temperature · log ρ(a) is one more cost."""
        if self.habit is None:
            return self.cost, 0.0
        mean, precision = self.habit
        n, a = self.states, slice(self.states + 1, None)
        cost = self.cost.copy()
        half = temperature / 2
        cost[a, a] += half * precision
        cost[a, n] -= half * precision @ mean
        cost[n, a] -= half * precision @ mean
        cost[n, n] += half * mean @ precision @ mean
        log_det = np.linalg.slogdet(precision)[1]
        return cost, half * (self.actions * np.log(2 * np.pi) - log_det)


def excerpt(subject: Subject, *, discount: float | None = None) -> LinearGaussianModel:
    """A few steps of the model from its own start."""
    assert subject.linear is not None
    model = copy.copy(subject.linear)
    model.horizon = min(STEPS, model.horizon or STEPS)
    if discount is not None:
        model.discount = discount
    return model


def solved(model: LinearGaussianModel, temperature: float, target: Any) -> LinearGaussianSolution:
    """The library's solution, where there is one."""
    try:
        return solve_linear_gaussian(model, temperature, target)
    except ValueError as error:
        raise DoesNotApplyError(str(error)) from error


def control(subject: Subject) -> LinearGaussianSolution:
    """The library's control solution of the excerpt."""
    return solved(excerpt(subject), subject.temperature, "control")


def posterior(subject: Subject) -> LinearGaussianSolution:
    """The library's posterior of the undiscounted excerpt."""
    return solved(excerpt(subject, discount=1.0), subject.temperature, "posterior")


def log_evidence(subject: Subject) -> float:
    """log p(O) by the library, nats."""
    found = posterior(subject).log_evidence
    assert found is not None
    return float(found)


def integrated_evidence(subject: Subject, *, with_volume: bool = True) -> float:
    """log ∫ p(τ, O) over actions and standard normal noise: c + g'H⁻¹g/2 + log-volume, nats."""
    model = excerpt(subject, discount=1.0)
    arrays, alpha = Arrays.of(model), subject.temperature
    n, m, steps = arrays.states, arrays.actions, int(model.horizon or 0)
    size = n + steps * (n + m)
    cost, left_over = arrays.priced(alpha)
    # Of everything random, x, and one: (s_t, 1) = place @ (x, 1).
    place = np.zeros((n + 1, size + 1))
    place[:, -1] = arrays.start
    place[:n, :n] = _root(arrays.start_noise[:n, :n])
    form = np.zeros((size + 1, size + 1))
    form[:n, :n] = np.eye(n) / 2
    for t in range(steps):
        at = n + t * (n + m)
        act = np.zeros((m, size + 1))
        act[:, at : at + m] = np.eye(m)
        both = np.concatenate([place, act])
        form += both.T @ cost @ both / alpha
        place = arrays.move @ both
        noise = slice(at + m, at + m + n)
        place[:n, noise] += _root(arrays.noise[:n, :n])
        form[noise, noise] += np.eye(n) / 2
    quadratic, linear = 2 * form[:-1, :-1], form[:-1, -1]
    best = form[-1, -1] - 2 * linear @ np.linalg.solve(quadratic, linear)
    sign, log_det = np.linalg.slogdet(quadratic)
    assert sign > 0
    volume = (size * np.log(2 * np.pi) - log_det) / 2 - (n + steps * n) * np.log(2 * np.pi) / 2
    return float(-best - steps * left_over / alpha + (volume if with_volume else 0.0))


def _root(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)))


def best_form(subject: Subject, model: LinearGaussianModel, *, temperature_pays: bool) -> Array:
    """P of V_0(s) = −z'Pz, reward units, by the Riccati recursion; (n+1, n+1).

    :param temperature_pays: False leaves out the entropy of the policy: the linear regulator.
    """
    return _backward(subject, model, temperature_pays)[0]


def best_actions(subject: Subject, *, spread: float = 1.0) -> Array:
    """Means of the best first action in some states, (5, m), and in the last row its variances."""
    assert subject.linear is not None
    q = _backward(subject, subject.linear, True)[1]
    n = len(subject.linear.A) + 1
    gain = -np.linalg.solve(q[n:, n:], q[n:, :n])
    variance = spread * subject.temperature / 2 * np.diag(np.linalg.inv(q[n:, n:]))
    return np.concatenate([some_states(subject) @ gain.T, variance[None]])


def _backward(
    subject: Subject, model: LinearGaussianModel, temperature_pays: bool
) -> tuple[Array, Array]:
    """P of V_0 = −z'Pz and H of Q_0 = −y'Hy, in which −α log ρ is one more cost."""
    arrays, alpha = Arrays.of(model), subject.temperature
    cost, left_over = arrays.priced(alpha)
    n = arrays.states
    z, a = slice(0, n + 1), slice(n + 1, None)
    rest = np.zeros((n + 1, n + 1))
    for _ in range(model.horizon or SWEEPS):
        q = cost + arrays.discount * arrays.move.T @ rest @ arrays.move
        q[n, n] += arrays.discount * float((arrays.noise * rest).sum())
        schur = q[z, z] - q[z, a] @ np.linalg.solve(q[a, a], q[a, z])
        log_det = np.linalg.slogdet(q[a, a])[1]
        # α log ∫ e^{-a'Ha/α} da, with the normaliser of ρ
        volume = alpha / 2 * (arrays.actions * np.log(np.pi * alpha) - log_det)
        schur[n, n] += left_over - (volume if temperature_pays else 0.0)
        moved, rest = np.abs(schur - rest).max(), schur
        if model.horizon is None and moved <= 1e-15 * np.abs(rest).max():
            return rest, q
        if not np.isfinite(rest).all() or np.abs(rest).max() > 1e30:
            raise DoesNotApplyError("its cost grows without bound")
    if model.horizon is None:
        raise DoesNotApplyError(f"the Riccati recursion has not settled after {SWEEPS:,} sweeps")
    return rest, q


def at_some_states(subject: Subject, form: Array) -> Array:
    """−z'Pz at some states, (4,)."""
    return np.array([-(z @ form @ z) for z in some_states(subject)])


def some_states(subject: Subject) -> Array:
    """(4, n + 1), homogeneous: the mean start, and three around it."""
    assert subject.linear is not None
    mean = subject.linear.initial_mean.numpy()
    around = subject.generator("states").normal(size=(3, len(mean)))
    points = np.concatenate([mean[None], mean + around])
    return np.concatenate([points, np.ones((4, 1))], axis=1)


STATES = ("the mean start", "near it (1)", "near it (2)", "near it (3)")


@dataclasses.dataclass(frozen=True)
class LinearPolicy:
    """a ~ N(gain z, covariance), homogeneous: gain (T, m, n + 1), covariance (T, m, m)."""

    gain: Array
    covariance: Array


def of_solution(solution: LinearGaussianSolution) -> LinearPolicy:
    policy = solution.policy
    gain = np.concatenate(
        [policy.gain.detach().numpy(), policy.offset.detach().numpy()[..., None]], axis=-1
    )
    return LinearPolicy(gain, policy.covariance.detach().numpy())


def some_policy(subject: Subject) -> LinearPolicy:
    """Some policy of the excerpt, near the best one but wider and elsewhere."""
    best = of_solution(control(subject))
    noise = subject.generator("linear policy").normal(size=best.gain.shape)
    return LinearPolicy(best.gain + 0.2 * noise * (1 + np.abs(best.gain)), 2 * best.covariance)


def rollout(subject: Subject, policy: LinearPolicy) -> list[Array]:
    """E[yy'] at every step of the excerpt under a policy: second moments of (s, 1, a)."""
    model = excerpt(subject)
    arrays = Arrays.of(model)
    second = np.outer(arrays.start, arrays.start) + arrays.start_noise
    moments = []
    for gain, covariance in zip(policy.gain, policy.covariance, strict=True):
        lift = np.concatenate([np.eye(arrays.states + 1), gain])
        both = lift @ second @ lift.T
        both[arrays.states + 1 :, arrays.states + 1 :] += covariance
        moments.append(both)
        second = arrays.move @ both @ arrays.move.T + arrays.noise
    return moments


def objective(subject: Subject, policy: LinearPolicy) -> float:
    """J of a policy over the excerpt in KL form, reward units, by moments."""
    model = excerpt(subject)
    arrays, alpha = Arrays.of(model), subject.temperature
    cost, left_over = arrays.priced(alpha)
    total = 0.0
    for t, (both, covariance) in enumerate(
        zip(rollout(subject, policy), policy.covariance, strict=True)
    ):
        entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1]
        gained = -float((cost * both).sum()) - left_over + alpha * entropy
        total += arrays.discount**t * gained
    return total


def expected_divergence(subject: Subject, one: LinearPolicy, other: LinearPolicy) -> float:
    """E Σ γ^t KL(one ‖ other) along the first policy, nats."""
    arrays, total = Arrays.of(excerpt(subject)), 0.0
    n = arrays.states + 1
    for t, both in enumerate(rollout(subject, one)):
        apart = one.gain[t] - other.gain[t]
        precision = np.linalg.inv(other.covariance[t])
        spread = np.trace(precision @ one.covariance[t]) - arrays.actions
        spread -= np.linalg.slogdet(precision @ one.covariance[t])[1]
        distance = np.trace(precision @ apart @ both[:n, :n] @ apart.T)
        total += arrays.discount**t * (spread + distance) / 2
    return float(total)
