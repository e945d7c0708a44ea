"""How the temperature of a learned routine moves: fixed, annealed, or tuned to a divergence.

The three settings have the same methods: `initial_state()`, `temperature(state, step)`,
`update(state, divergence)`. All that moves is the state, four numbers to save with a run.

Tuning descends on a dual. Of all policies with E KL(π ‖ ρ) <= target the best one has the
temperature that minimises the convex g(α) = E V_α + α · target, V_α the soft value. Its derivative
is target - KL(π_α ‖ ρ), since KL(π_α ‖ ρ) = -∂V_α/∂α, which only falls as α rises: so the
temperature rises while the measured divergence exceeds its target. Under the uniform prior
KL(π ‖ ρ) = H(ρ) - H(π), and a target for the divergence is one for the entropy: target divergence =
H(ρ) - target entropy, H(ρ) = log|A| or d · log 2 on [-1, 1]^d. Under another prior the entropy need
not rise with the temperature, and a target for it may be met at none or at several.

Temperatures are in reward units, entropies and divergences in nats, time in environment steps.

References: Haarnoja et al. (2018), arXiv:1812.05905, §5, for the entropy; Kingma and Ba (2015),
arXiv:1412.6980, for the steps.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

from gymnasium.spaces import Box, Discrete, MultiDiscrete, Space

DISCRETE_SHARE = 0.5
"""Of log|A|, the entropy that discrete actions are tuned to. With 0.98 of it (Christodoulou 2019,
arXiv:1910.07207) a policy over few actions is all but uniform; with 0.15 what soft Q-learning comes
to on CartPole-v1 is lost and found again (tests/benchmarks/README.md)."""

LEAST_TEMPERATURE = 2.0**-60
"""What stands for a temperature of zero: a power of two, so that Q / temperature · temperature is Q
to the last bit, beside which log π/ρ is less than its rounding error."""

_DECAY_FIRST = 0.9
_DECAY_SECOND = 0.999
_DAMPING = 1e-8


@dataclasses.dataclass(frozen=True)
class TemperatureState:
    """What tuning remembers: a temperature and Adam's moments, Python floats.

    JSON keeps them to the last bit, `TemperatureState(**json.loads(...))` of `dataclasses.asdict`,
    and so do float64 tensors.
    """

    log_temperature: float = 0.0
    first_moment: float = 0.0
    second_moment: float = 0.0
    updates: int = 0


@dataclasses.dataclass(frozen=True)
class Fixed:
    """The same temperature throughout.

    :raises ValueError: a value below zero or not finite.
    """

    value: float = 1.0
    """>= 0, reward units; 0 is regular RL."""

    def __post_init__(self) -> None:
        if not (self.value >= 0 and math.isfinite(self.value)):
            raise ValueError(
                "temperature: expected a finite number >= 0 in reward units, got "
                f"{self.value}; give one, or 'auto'"
            )

    def initial_state(self) -> TemperatureState:
        return TemperatureState()

    def temperature(self, state: TemperatureState, step: int) -> float:
        return self.value

    def update(self, state: TemperatureState, divergence: float) -> TemperatureState:
        return state


@dataclasses.dataclass(frozen=True)
class Annealed:
    """From `start` to `end` by equal factors, and `end` from then on.

    :raises ValueError: a temperature that is not above zero and finite, or no steps.
    """

    start: float = 1.0
    """> 0, reward units."""
    end: float = 0.01
    """> 0, reward units."""
    steps: int = 100_000
    """>= 1, environment steps until `end`."""

    def __post_init__(self) -> None:
        _check_positive(self.start, "start")
        _check_positive(self.end, "end")
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1 environment step, got {self.steps}")

    def initial_state(self) -> TemperatureState:
        return TemperatureState()

    def temperature(self, state: TemperatureState, step: int) -> float:
        if step >= self.steps:
            return self.end
        return self.start * (self.end / self.start) ** (max(step, 0) / self.steps)

    def update(self, state: TemperatureState, divergence: float) -> TemperatureState:
        return state


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A temperature that moves until the policy is at a given divergence from the prior.

    Give one target or none; `resolved` then makes it a divergence that fits the action space.

    :raises ValueError: both targets, a target that is not finite, or numbers outside their ranges.
    """

    target_divergence: float | None = None
    """Nats per step, mean of KL(π(·|s) ‖ ρ(·|s)) over states."""
    target_entropy: float | None = None
    """Nats per step, mean of H(π(·|s)) over states; for uniform priors only."""
    start: float = 1.0
    """In [low, high], reward units."""
    learning_rate: float = 3e-4
    """> 0, of Adam on the logarithm of the temperature."""
    low: float = 1e-8
    """> 0, reward units: where it stops if the divergence stays below its target."""
    high: float = 1e8
    """>= low, reward units: where it stops if the divergence stays above its target."""

    def __post_init__(self) -> None:
        if self.target_divergence is not None and self.target_entropy is not None:
            raise ValueError(
                "target_divergence, target_entropy: expected at most one of them, got "
                f"{self.target_divergence} and {self.target_entropy}; leave one out"
            )
        for name in ("target_divergence", "target_entropy"):
            target = getattr(self, name)
            if target is not None and not math.isfinite(target):
                raise ValueError(f"{name}: expected a finite number in nats, got {target}")
        for name in ("start", "low", "high"):
            _check_positive(getattr(self, name), name)
        if not self.low <= self.start <= self.high:
            raise ValueError(
                f"start: expected a temperature from low = {self.low:g} to high = {self.high:g}, "
                f"got {self.start:g}"
            )
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(
                f"learning_rate: expected a finite number > 0, got {self.learning_rate}"
            )

    def resolved(self, action_space: Space[Any], *, uniform_prior: bool = True) -> Tuned:
        """These settings with a target divergence, whatever target they have.

        :warns UserWarning: no policy can meet the target.
        :raises ValueError: a target entropy, and the prior is not uniform. :raises TypeError:
            another action space than Discrete, MultiDiscrete or Box.
        """
        if self.target_entropy is not None and not uniform_prior:
            raise ValueError(
                "target_entropy: expected a uniform prior, under which entropy and divergence are "
                f"the same target, got {self.target_entropy:g} under another one; give "
                "target_divergence instead"
            )
        if self.target_divergence is not None:
            target = self.target_divergence
        elif self.target_entropy is not None:
            target = divergence_of_entropy(self.target_entropy, action_space)
        else:
            target = divergence_of_entropy(default_target_entropy(action_space), action_space)
        feasible_target(target, action_space, uniform_prior=uniform_prior, stacklevel=3)
        return dataclasses.replace(self, target_divergence=target, target_entropy=None)

    def initial_state(self) -> TemperatureState:
        return TemperatureState(log_temperature=math.log(self.start))

    def temperature(self, state: TemperatureState, step: int) -> float:
        # exp(log x) misses x by rounding, and would leave the bounds by as much.
        return min(max(math.exp(state.log_temperature), self.low), self.high)

    def update(self, state: TemperatureState, divergence: float) -> TemperatureState:
        """One step of Adam on -log(temperature) · (divergence - target), within the bounds.

        Haarnoja et al. (2018), §5, has the temperature itself in place of its logarithm, with which
        it stays positive and moves by the same factors in all reward units.

        :param divergence: nats, of the policy at this temperature, mean over a batch of states.
        :raises ValueError: a divergence that is not finite, or no target yet.
        """
        if self.target_divergence is None:
            raise ValueError(
                "target_divergence: expected a number to tune the temperature to, got None; call "
                "resolved(action_space) first"
            )
        if not math.isfinite(divergence):
            raise ValueError(
                "divergence: expected a finite number to tune the temperature by, got "
                f"{divergence} in update {state.updates}; the policy has mass where its prior has "
                "none, or has diverged: lower its learning rate"
            )
        gradient = self.target_divergence - divergence
        updates = state.updates + 1
        first = _DECAY_FIRST * state.first_moment + (1 - _DECAY_FIRST) * gradient
        second = _DECAY_SECOND * state.second_moment + (1 - _DECAY_SECOND) * gradient**2
        mean = first / (1 - _DECAY_FIRST**updates)
        size = math.sqrt(second / (1 - _DECAY_SECOND**updates)) + _DAMPING
        moved = state.log_temperature - self.learning_rate * mean / size
        inside = min(max(moved, math.log(self.low)), math.log(self.high))
        return TemperatureState(inside, first, second, updates)


def max_entropy(action_space: Space[Any]) -> float:
    """Entropy of the uniform prior, nats: log|A|, or d · log 2 on [-1, 1]^d.

    :raises TypeError: another action space than Discrete, MultiDiscrete or Box.
    """
    if isinstance(action_space, Discrete):
        return math.log(int(action_space.n))
    if isinstance(action_space, MultiDiscrete):
        return math.fsum(math.log(int(n)) for n in action_space.nvec.flat)
    if isinstance(action_space, Box):
        return math.prod(action_space.shape) * math.log(2)
    raise TypeError(
        "action_space: expected a Discrete, MultiDiscrete or Box space to know its entropy, got "
        f"{action_space}"
    )


def default_target_entropy(action_space: Space[Any]) -> float:
    """`DISCRETE_SHARE` of log|A|; -d for boxes, nats, as Haarnoja et al. (2018)."""
    if isinstance(action_space, Discrete | MultiDiscrete):
        return DISCRETE_SHARE * max_entropy(action_space)
    return -float(math.prod(action_space.shape or ()))


def divergence_of_entropy(target_entropy: float, action_space: Space[Any]) -> float:
    """The divergence from the uniform prior at an entropy, nats."""
    return max_entropy(action_space) - target_entropy


def feasible_target(
    target_divergence: float,
    action_space: Space[Any],
    *,
    uniform_prior: bool = True,
    stacklevel: int = 2,
) -> bool:
    """Whether some temperature in (0, ∞) can meet the target; warns if none can.

    The divergence of a policy that is not the prior is above zero, and from a uniform prior over
    |A| actions it is below log|A| unless the policy takes one action for certain. How far one can
    get from another prior depends on its smallest probability, which is not known here.

    :warns UserWarning: with the limits of the target, and of the entropy it stands for.
    """
    entropy = max_entropy(action_space)
    bounded = uniform_prior and isinstance(action_space, Discrete | MultiDiscrete)
    limit = entropy if bounded else math.inf
    if 0 < target_divergence < limit:
        return True
    shown = f"between 0 and {limit:.6g} nats" if bounded else "above 0 nats"
    as_entropy = (
        f", that is a target entropy below {entropy:.6g} nats, the largest there is,"
        if uniform_prior
        else ""
    )
    end = "high" if target_divergence <= 0 else "low"
    got = f"{target_divergence:.6g}"
    if uniform_prior:
        got += f" (entropy {entropy - target_divergence:.6g})"
    warnings.warn(
        f"temperature: expected a target divergence {shown}{as_entropy} got {got}; no policy can "
        f"meet it, and the temperature will run to its {end} bound; choose another target",
        stacklevel=stacklevel,
    )
    return False


def _check_positive(number: float, name: str) -> None:
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name}: expected a finite temperature > 0 in reward units, got {number}")
