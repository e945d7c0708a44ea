"""Distributions that Pyro lacks and trajectories need.

`Optimality` is the factor that turns reward into evidence, `SparseCategorical` a next state with
few successors. `as_discrete`, `absorbing` and `idle` put a model's discrete distributions into one
form, so that a trajectory can stand still once it has ended without its program growing a branch.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

ROW_SUM_TOLERANCE = 1e-6
"""How far a row of probabilities may be from one; float32 tables of 10^5 entries stay within it."""


class _EqualsOne(constraints.Constraint):
    is_discrete = True
    event_dim = 0

    def check(self, value: Tensor) -> Tensor:
        return value == 1

    def __repr__(self) -> str:
        return "EqualsOne()"


class Optimality(TorchDistribution):
    """The optimality variable O_t, observed to be 1: log p(O_t = 1 | s, a, s') = `log_weight`.

    A factor, not a probability: positive rewards are legal, and p(O) may exceed one.

    :param log_weight: reward / temperature, in nats, of any batch shape.

    Levine (2018), "Reinforcement Learning and Control as Probabilistic Inference",
    arXiv:1805.00909, §2.2.
    """

    arg_constraints = {"log_weight": constraints.real}  # noqa: RUF012 (Pyro's own convention)
    support = _EqualsOne()

    def __init__(self, log_weight: Tensor, validate_args: bool | None = None) -> None:
        self.log_weight = log_weight
        super().__init__(log_weight.shape, torch.Size(), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Optimality:
        new = self._get_checked_instance(Optimality, _instance)
        new.log_weight = self.log_weight.expand(batch_shape)
        super(Optimality, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Any = ()) -> Tensor:
        raise NotImplementedError(
            "Optimality is a factor: it is observed (obs=1.0) and cannot be sampled, because "
            "exp(reward / temperature) is not a probability"
        )

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.log_weight


class SparseCategorical(TorchDistribution):
    """A categorical distribution over integers that lists only its K possible values.

    :param states: the values, integers of shape batch + (K,). Repeated values add up.
    :param probs: their probabilities, of the same shape; each row sums to one (checked, never
        renormalised, when validation is on).
    :param size: the number of categories, if the distribution is to be enumerated by Pyro.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.nonnegative_integer

    def __init__(
        self,
        states: Tensor,
        probs: Tensor,
        size: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if states.shape[-1:] != probs.shape[-1:]:
            raise ValueError(
                "SparseCategorical: states and probs list the same K values in their last "
                f"dimension, got shapes {tuple(states.shape)} and {tuple(probs.shape)}"
            )
        shape = torch.broadcast_shapes(states.shape, probs.shape)
        self.states, self.probs, self.size = states.expand(shape), probs.expand(shape), size
        super().__init__(shape[:-1], torch.Size(), validate_args=validate_args)
        if self._validate_args:
            check_probabilities(probs, "SparseCategorical")

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        return self.size is not None

    def expand(self, batch_shape: Any, _instance: Any = None) -> SparseCategorical:
        new = self._get_checked_instance(SparseCategorical, _instance)
        shape = (*batch_shape, self.states.shape[-1])
        new.states, new.probs, new.size = (
            self.states.expand(shape),
            self.probs.expand(shape),
            self.size,
        )
        super(SparseCategorical, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.states.shape
            cumulative = self.probs.cumsum(-1).expand(shape)
            total = cumulative[..., -1:]
            uniform = torch.rand((*shape[:-1], 1), dtype=cumulative.dtype) * total
            # `< total`, so that rounding can never select a value past the last possible one.
            passed = (cumulative <= uniform) & (cumulative < total)
            slot = passed.sum(-1, keepdim=True)
            return self.states.expand(shape).gather(-1, slot).squeeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        match = self.states == value.unsqueeze(-1)
        probs = torch.where(match, self.probs, 0.0).sum(-1)
        return log_or_impossible(probs)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        if self.size is None:
            raise NotImplementedError(
                "SparseCategorical can be enumerated only if it was given its size (the number of "
                "categories)"
            )
        values = torch.arange(self.size).reshape((-1,) + (1,) * len(self.batch_shape))
        return values.expand((-1, *self.batch_shape)) if expand else values


def check_probabilities(probs: Tensor, where: str) -> None:
    """Raise ValueError unless the rows of `probs` are non-negative, finite and sum to one."""
    finite = torch.isfinite(probs)
    if not finite.all():
        row = _first_row(probs, ~finite)
        raise ValueError(f"{where}: probabilities must be finite, got {row}")
    if (probs < 0).any():
        row = _first_row(probs, probs < 0)
        raise ValueError(f"{where}: probabilities must not be negative, got {row}")
    total = probs.double().sum(-1)
    wrong = (total - 1).abs() > ROW_SUM_TOLERANCE
    if wrong.any():
        row = _first_row(probs, wrong.unsqueeze(-1))
        raise ValueError(
            f"{where}: probabilities must sum to one, got {row}, which sums to "
            f"{total[wrong][0].item():.9g}; divide by the sum if that is what you mean"
        )


def _first_row(probs: Tensor, wrong: Tensor) -> str:
    rows = probs.reshape(-1, probs.shape[-1])
    which = wrong.expand(probs.shape).reshape(rows.shape).any(-1).nonzero()[0, 0]
    values = rows[which].tolist()
    shown = ", ".join(f"{v:.6g}" for v in values[:8]) + (", ..." if len(values) > 8 else "")
    return f"[{shown}]" + (f" in row {which.item()}" if len(rows) > 1 else "")


@contextlib.contextmanager
def checked_categoricals() -> Iterator[None]:
    """Within this context `Categorical(probs=...)` refuses rows that do not sum to one.

    torch divides by the sum without a word, so the fault can only be seen before it does.
    """
    original = torch.distributions.Categorical.__init__

    def checked(
        self: Any, probs: Any = None, logits: Any = None, validate_args: Any = None
    ) -> None:
        if probs is not None:
            check_probabilities(probs, "Categorical")
        original(self, probs=probs, logits=logits, validate_args=validate_args)

    torch.distributions.Categorical.__init__ = checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.distributions.Categorical.__init__ = original  # type: ignore[method-assign]


def categorical(probs: Tensor) -> TorchDistribution:
    """`Categorical(probs)` with exact log-probabilities, -inf for zero.

    torch's own stop at the logarithm of the rounding error, so that what is impossible happens once
    in 10^7 times (float32), and any reward can buy it.
    """
    distribution = dist.Categorical(probs=probs)
    distribution.logits = log_or_impossible(distribution.probs)
    return distribution


def log_or_impossible(probs: Tensor) -> Tensor:
    """log of probabilities, -inf for zero, whose gradient is zero there (that of log is NaN)."""
    possible = probs > 0
    return torch.where(possible, torch.where(possible, probs, 1.0).log(), -torch.inf)


def as_discrete(distribution: TorchDistribution, size: int | None) -> TorchDistribution:
    """A distribution over {0, ..., size-1} as a `Categorical` or an enumerable `SparseCategorical`.

    Distributions over other spaces (`size` None) are returned as they are.
    """
    if size is None:
        return distribution
    if isinstance(distribution, torch.distributions.Categorical):
        return distribution if _by_logits(distribution) else categorical(distribution.probs)
    if isinstance(distribution, SparseCategorical):
        return SparseCategorical(distribution.states, distribution.probs, size)
    if isinstance(distribution, dist.Delta):
        states = distribution.v.long().unsqueeze(-1)
        return SparseCategorical(states, torch.ones(states.shape), size)
    values = torch.arange(size).reshape((size,) + (1,) * len(distribution.batch_shape))
    support: Any = distribution.support
    inside = support.check(values)
    log_probs = distribution.log_prob(torch.where(inside, values, 0).to(torch.get_default_dtype()))
    logits = torch.where(inside, log_probs, -torch.inf).movedim(0, -1)
    outside = 1 - logits.double().exp().sum(-1)
    if (outside.abs() > ROW_SUM_TOLERANCE).any():
        raise ValueError(
            f"expected a distribution over 0..{size - 1}, but {distribution} has probability "
            f"{outside.max().item():.3g} elsewhere"
        )
    return dist.Categorical(logits=logits)


def as_probs(distribution: TorchDistribution, size: int) -> Tensor:
    """The dense table of a distribution over {0, ..., size-1}, of shape batch + (size,)."""
    distribution = as_discrete(distribution, size)
    probs: Tensor = distribution.probs
    if isinstance(distribution, SparseCategorical):
        dense = torch.zeros((*distribution.batch_shape, size), dtype=probs.dtype)
        return dense.scatter_add(-1, distribution.states, probs)
    return torch.nn.functional.pad(probs, (0, size - probs.shape[-1]))


def possible(distribution: TorchDistribution, size: int) -> Tensor:
    """Which of {0, ..., size-1} a distribution gives any mass, booleans of shape batch + (size,).

    By log-probabilities where it was given those: small probabilities round to zero long before.
    """
    if not isinstance(distribution, torch.distributions.Categorical):
        distribution = as_discrete(distribution, size)
    if isinstance(distribution, SparseCategorical):
        return as_probs(distribution, size) > 0
    by_logits = _by_logits(distribution)
    mass: Tensor = distribution.logits > -torch.inf if by_logits else distribution.probs > 0
    return torch.nn.functional.pad(mass, (0, size - mass.shape[-1]))


def _by_logits(distribution: Any) -> bool:
    """Whether a categorical distribution was given by its logits."""
    return distribution._param is vars(distribution).get("logits")


def absorbing(
    step: TorchDistribution, ended: Tensor, state: Tensor, size: int | None
) -> TorchDistribution:
    """The transition `step`, but a point mass at `state` wherever `ended` is true."""
    if size is None:
        return _PointMassWhere(step, ended, state)
    step = as_discrete(step, size)
    if isinstance(step, SparseCategorical):
        states = torch.where(ended.unsqueeze(-1), state.unsqueeze(-1), step.states)
        first = torch.zeros(states.shape[-1], dtype=step.probs.dtype)
        first[0] = 1.0
        return SparseCategorical(states, torch.where(ended.unsqueeze(-1), first, step.probs), size)
    stay = torch.nn.functional.one_hot(state, size).to(step.probs.dtype)
    return categorical(torch.where(ended.unsqueeze(-1), stay, as_probs(step, size)))


def idle(action: TorchDistribution, ended: Tensor, size: int | None) -> TorchDistribution:
    """The distribution `action`, but costing nothing in any divergence wherever `ended` is true.

    Discrete actions become uniform there, whoever chooses them (a mask would be lost when the model
    itself is enumerated); others are masked.
    """
    if size is None:
        return action.mask(~ended)
    action = as_discrete(action, size)
    if isinstance(action, SparseCategorical):
        action = categorical(as_probs(action, size))
    padding = (0, size - action.logits.shape[-1])
    logits = torch.nn.functional.pad(action.logits, padding, value=-torch.inf)
    return dist.Categorical(logits=torch.where(ended.unsqueeze(-1), -math.log(size), logits))


def _unchecked(distribution: TorchDistribution) -> TorchDistribution:
    """The same without validation: a state that stands still need not be one it could move to."""
    distribution = copy.copy(distribution)
    distribution._validate_args = False
    if hasattr(distribution, "base_dist"):
        distribution.base_dist = _unchecked(distribution.base_dist)
    return distribution


class _PointMassWhere(TorchDistribution):
    """`base`, but a point mass at `value` wherever `mask` is true (log-density 0 there)."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, base: TorchDistribution, mask: Tensor, value: Tensor) -> None:
        shape = torch.broadcast_shapes(base.batch_shape, mask.shape)
        self.base = _unchecked(base.expand(shape))
        self.mask_, self.value = mask.expand(shape), value.expand(shape + base.event_shape)
        self.has_rsample = base.has_rsample
        super().__init__(shape, base.event_shape, validate_args=False)

    @constraints.dependent_property
    def support(self) -> Any:
        return self.base.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> _PointMassWhere:
        return _PointMassWhere(
            self.base.expand(batch_shape),
            self.mask_.expand(batch_shape),
            self.value.expand(torch.Size(batch_shape) + self.event_shape),
        )

    def _select(self, drawn: Tensor) -> Tensor:
        mask = self.mask_.reshape(self.mask_.shape + (1,) * self.event_dim)
        return torch.where(mask, self.value, drawn)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self._select(self.base.sample(sample_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self._select(self.base.rsample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where(self.mask_, 0.0, self.base.log_prob(value))
