"""Action priors ρ(a | s): how likely each action is before any reward is known.

A prior is any callable `state -> Pyro distribution`. Those here are the common ones. Zero mass on
an action forbids it: no policy that is inferred under the prior ever takes it. Everything a policy
pays is measured against its prior, as temperature · KL(π ‖ ρ).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Space
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference_rl.distributions import as_probs, categorical, check_probabilities
from inference_rl.learned_prior import LearnedPrior, load_learned_prior
from inference_rl.policies import Policy, TabularPolicy, load_policy
from inference_rl.truncated_normal import TruncatedNormal

ActionPrior = Callable[[Tensor], TorchDistribution]
"""ρ: `state -> distribution` over actions, of the batch shape of `state`."""


class UniformPrior:
    """Every action alike: 1/|A| each, or density 2^-d on the box [-1, 1]^d.

    In a MultiDiscrete space every combination is alike.
    """

    def __init__(self, action_space: Space[Any]) -> None:
        if not isinstance(action_space, Discrete | MultiDiscrete | Box):
            raise TypeError(
                "UniformPrior: expected a Discrete, MultiDiscrete or Box action space, got "
                f"{action_space}"
            )
        self.action_space = action_space

    def __call__(self, state: Tensor) -> TorchDistribution:
        batch, dtype = _batch(state)
        if isinstance(self.action_space, Discrete):
            return _UniformChoice(batch, int(self.action_space.n))
        if isinstance(self.action_space, MultiDiscrete):
            sizes = torch.as_tensor(self.action_space.nvec).unsqueeze(-1)
            allowed = (torch.arange(int(self.action_space.nvec.max())) < sizes).to(dtype)
            return categorical((allowed / sizes).expand(*batch, *allowed.shape)).to_event(1)
        edge = torch.ones((*batch, *self.action_space.shape), dtype=dtype)
        # Closed at both edges: tanh rounds to exactly one, and torch's own Uniform is -inf there.
        return _ClosedUniform(-edge, edge).to_event(1)


def _batch(state: Tensor) -> tuple[torch.Size, torch.dtype]:
    """The batch shape of states, and the dtype of continuous actions there."""
    if state.is_floating_point():
        return state.shape[:-1], state.dtype
    return state.shape, torch.get_default_dtype()


class _UniformChoice(dist.Categorical):
    """Uniform `Categorical`, of which torch would take longer to make one than to use it."""

    def __init__(self, batch_shape: torch.Size, size: int) -> None:
        self.probs = self._param = torch.full((), 1 / size).expand(*batch_shape, size)
        self.logits = torch.full((), -math.log(size)).expand(*batch_shape, size)
        self._num_events = size
        self._batch_shape, self._event_shape = batch_shape, torch.Size()
        self._validate_args = False

    def log_prob(self, value: Tensor) -> Tensor:
        if value.shape != self._batch_shape:
            log_prob: Tensor = super().log_prob(value)
            return log_prob
        return self.logits.gather(-1, value.long().unsqueeze(-1)).squeeze(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _UniformChoice:
        return _UniformChoice(torch.Size(batch_shape), self._num_events)


class _ClosedUniform(dist.Uniform):
    """`Uniform` with a finite density on the whole closed interval."""

    def log_prob(self, value: Tensor) -> Tensor:
        inside = (value >= self.low) & (value <= self.high)
        return torch.where(inside, -torch.log(self.high - self.low), -torch.inf)


class CategoricalPrior:
    """A table over discrete actions: `probs` or `logits` of shape (A,), or (S, A) by state.

    :raises ValueError: probabilities negative, not finite, or not summing to one.
    """

    def __init__(self, probs: Any = None, logits: Any = None) -> None:
        if (probs is None) == (logits is None):
            raise ValueError("CategoricalPrior: give either probs or logits, not both or neither")
        if probs is not None:
            table = torch.as_tensor(probs, dtype=torch.float64)
            check_probabilities(table, "CategoricalPrior")
            self.logits = table.log()
        else:
            self.logits = torch.as_tensor(logits, dtype=torch.float64).log_softmax(-1)
            if self.logits.isnan().any():
                raise ValueError(
                    "CategoricalPrior: logits must be below +inf, and above -inf for at least one "
                    "action of every state"
                )

    @property
    def num_states(self) -> int | None:
        """How many states the table is for; None for one row for all."""
        return len(self.logits) if self.logits.dim() == 2 else None

    def __call__(self, state: Tensor) -> TorchDistribution:
        if self.logits.dim() == 1:
            return dist.Categorical(logits=self.logits.expand((*_batch(state)[0], -1)))
        return dist.Categorical(logits=self.logits[state])


class GaussianPrior:
    """A Gaussian around `loc` of width `scale`, truncated to the box [-1, 1]^d and renormalised.

    :param loc, scale: numbers, or one per action dimension, or functions of the state.
    """

    def __init__(
        self,
        action_space: Space[Any],
        loc: float | Sequence[float] | Callable[[Tensor], Tensor] = 0.0,
        scale: float | Sequence[float] | Callable[[Tensor], Tensor] = 0.5,
    ) -> None:
        if not isinstance(action_space, Box):
            raise TypeError(f"GaussianPrior: expected a Box action space, got {action_space}")
        self.shape, self.loc, self.scale = action_space.shape, loc, scale

    def __call__(self, state: Tensor) -> TorchDistribution:
        batch, dtype = _batch(state)
        shape = (*batch, *self.shape)
        loc, scale = (
            (p(state) if callable(p) else torch.as_tensor(p, dtype=dtype)).expand(shape)
            for p in (self.loc, self.scale)
        )
        return TruncatedNormal(loc, scale).to_event(1)


class MaskPrior:
    """Uniform over the allowed actions; the others are forbidden.

    :param allowed: booleans of shape (A,) or (S, A), or a function from states to batch + (A,).
    :raises ValueError: a state in which no action is allowed.
    """

    def __init__(self, allowed: Any) -> None:
        self.allowed = allowed if callable(allowed) else torch.as_tensor(allowed, dtype=torch.bool)

    @property
    def num_states(self) -> int | None:
        """How many states the table is for; None for a row for all, or a function."""
        return None if callable(self.allowed) or self.allowed.dim() == 1 else len(self.allowed)

    def __call__(self, state: Tensor) -> TorchDistribution:
        if callable(self.allowed):
            allowed = self.allowed(state)
        elif self.allowed.dim() == 1:
            allowed = self.allowed.expand((*_batch(state)[0], -1))
        else:
            allowed = self.allowed[state]
        count = allowed.sum(-1, keepdim=True)
        if dist.is_validation_enabled() and (count == 0).any():
            where = state[(count == 0).squeeze(-1)][0].tolist()
            raise ValueError(
                f"MaskPrior: at least one action must be allowed in every state, but state {where} "
                "allows none; allow one there (in a terminal state any: it is never taken)"
            )
        return categorical(allowed / count)


class MixturePrior:
    """Σ_k weights_k · ρ_k(a | s)."""

    def __init__(
        self, priors: Sequence[ActionPrior], weights: Sequence[float] | None = None
    ) -> None:
        if not priors:
            raise ValueError("MixturePrior: expected at least one prior, got none")
        if weights is None:
            weights = [1 / len(priors)] * len(priors)
        self.priors, self.weights = list(priors), torch.as_tensor(weights, dtype=torch.float64)
        if self.weights.shape != (len(priors),):
            raise ValueError(
                f"MixturePrior: expected one weight for each of {len(priors)} priors, got {weights}"
            )
        check_probabilities(self.weights, "MixturePrior weights")
        if any(getattr(prior, "needs_previous_action", False) for prior in priors):
            raise TypeError(
                "MixturePrior: a StickyPrior cannot be a component, because its states hold the "
                "previous action and those of the others do not; make the mixture its base instead"
            )

    def __call__(self, state: Tensor) -> TorchDistribution:
        components: list[Any] = [prior(state) for prior in self.priors]
        if not components[0].support.is_discrete or components[0].event_dim:
            return _Mixture(self.weights.log(), components)
        size = max(c.enumerate_support(expand=False).shape[0] for c in components)
        tables = torch.stack([as_probs(c, size) for c in components], dim=-1)
        return categorical(tables @ self.weights.to(tables.dtype))


class _Mixture(TorchDistribution):
    """A mixture of any families over one box, or over combinations of actions."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, log_weights: Tensor, components: Sequence[TorchDistribution]) -> None:
        shape = torch.broadcast_shapes(*(c.batch_shape for c in components))
        self.components = [c.expand(shape) for c in components]
        self.log_weights = log_weights
        super().__init__(shape, components[0].event_shape, validate_args=False)

    @constraints.dependent_property
    def support(self) -> Any:
        return self.components[0].support

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Mixture:
        return _Mixture(self.log_weights, [c.expand(batch_shape) for c in self.components])

    def sample(self, sample_shape: Any = ()) -> Tensor:
        drawn = torch.stack([c.sample(sample_shape) for c in self.components])
        which = dist.Categorical(logits=self.log_weights).sample(
            torch.Size(sample_shape) + self.batch_shape
        )
        index = which.reshape((1, *which.shape) + (1,) * self.event_dim).expand(drawn[:1].shape)
        return drawn.gather(0, index).squeeze(0)

    def log_prob(self, value: Tensor) -> Tensor:
        terms = torch.stack([c.log_prob(value) for c in self.components], dim=-1)
        return torch.logsumexp(terms + self.log_weights.to(terms.dtype), dim=-1)


class StickyPrior:
    """Likes the previous action: stickiness · 1[a = previous] + (1 - stickiness) · base(a | s).

    The state is augmented by the previous action (`WithPreviousAction`), which `infer` does by
    itself: state s after action a becomes s·(|A|+1) + a, and s·(|A|+1) + |A| before the first.

    :param stickiness: probability, in [0, 1), of repeating the action whatever `base` says.
    :param base: the prior for the rest of the time, over the original states; uniform if None.
    """

    needs_previous_action = True

    def __init__(
        self, action_space: Space[Any], stickiness: float = 0.5, base: ActionPrior | None = None
    ) -> None:
        if not isinstance(action_space, Discrete):
            raise TypeError(
                f"StickyPrior: expected a Discrete action space, got {action_space}; for boxes "
                "write a GaussianPrior whose loc depends on the state"
            )
        if not 0 <= stickiness < 1:
            raise ValueError(f"StickyPrior: stickiness must be in [0, 1), got {stickiness}")
        if getattr(base, "needs_previous_action", False):
            raise TypeError("StickyPrior: its base cannot be a StickyPrior too; give its base here")
        self.size, self.stickiness = int(action_space.n), stickiness
        self.base = base if base is not None else UniformPrior(action_space)

    def __call__(self, state: Tensor) -> TorchDistribution:
        base = as_probs(self.base(state // (self.size + 1)), self.size)
        # Not one_hot, which asks for the largest value, and could not be recorded as a graph.
        known = (state % (self.size + 1)).unsqueeze(-1)
        previous = (known == torch.arange(self.size + 1)).to(base.dtype)
        started = 1 - previous[..., -1:]
        sticky = self.stickiness * started
        return categorical(sticky * previous[..., :-1] + (1 - sticky) * base)


class PolicyPrior:
    """A policy that was inferred before, as the prior of the next inference.

    :param policy: a policy, or the directory of a saved run.
    :param marginal: in place of the policy its mean over states, in a run that learned that as its
        own prior (`SAC(learn_prior=True)`).
    :raises ValueError: the policy depends on the step, as those of a finite horizon do; or its
        marginal was not learned.
    """

    def __init__(self, policy: Policy | str | Path, marginal: bool = False) -> None:
        self.policy: Policy | LearnedPrior
        if marginal:
            if not isinstance(policy, str | Path):
                raise TypeError(
                    "PolicyPrior: expected with marginal=True the directory of a run that learned "
                    f"its prior, got a {type(policy).__name__}"
                )
            self.policy = load_learned_prior(policy)
            return
        self.policy = load_policy(policy) if isinstance(policy, str | Path) else policy
        if isinstance(self.policy, TabularPolicy) and self.policy.probs.dim() == 3:
            raise ValueError(
                "PolicyPrior: expected a policy that does not depend on the step, got one for a "
                f"horizon of {len(self.policy.probs)}; CategoricalPrior(policy.probs[t]) is its "
                "step t"
            )

    @property
    def num_states(self) -> int | None:
        """How many states the policy is for, if it is a table."""
        return len(self.policy.probs) if isinstance(self.policy, TabularPolicy) else None

    def __call__(self, state: Tensor) -> TorchDistribution:
        chosen: TorchDistribution = self.policy(state)
        return chosen


def moved(prior: ActionPrior, device: str) -> ActionPrior:
    """`prior` with what it holds, tables and policies, on another device; functions as they are."""
    if device == "cpu" or not hasattr(prior, "__dict__") or inspect.isroutine(prior):
        return prior
    if isinstance(prior, torch.nn.Module):
        there: ActionPrior = copy.deepcopy(prior).to(device)
        return there
    new = copy.copy(prior)
    for name, value in vars(prior).items():
        if isinstance(value, Tensor):
            vars(new)[name] = value.to(device)
        elif isinstance(value, torch.nn.Module):
            vars(new)[name] = copy.deepcopy(value).to(device)
        elif isinstance(value, list):
            vars(new)[name] = [moved(part, device) for part in value]
        elif callable(value):
            vars(new)[name] = moved(value, device)
    return new
