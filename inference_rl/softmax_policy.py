"""`SoftmaxPolicy`: the policy that Q itself is, of discrete actions."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Transform, constraints

from inference_rl.action_values import ActionValues, steps_in, strides
from inference_rl.networks import Architecture
from inference_rl.policies import Policy
from inference_rl.temperature import LEAST_TEMPERATURE

if TYPE_CHECKING:
    from inference_rl.priors import ActionPrior


class SoftmaxPolicy(Policy):
    """π(a | s) = ρ(a | s) e^{(Q(s, a) − V(s)) / temperature}, of discrete actions.

    Of a MultiDiscrete space over all combinations at once: its dimensions hang together as those of
    Q do. An action without prior mass is never taken.

    :param q: reward units; the mean of its members counts. It is read as it is at each call.
    :param temperature: reward units; zero is the limit.
    :param log_prior: log ρ of all actions, nats, (A,), or (S, A) for discrete states.
    :param support: in place of a table, whose prior is asked in every state: that of the model, or
        one that was given instead. :param prior: which is asked; code, and no part of what is
        saved.
    :raises ValueError: there is no such prior.
    """

    kind = "softmax"
    log_prior: Tensor
    temperature: Tensor

    def __init__(
        self,
        architecture: Architecture,
        q: ActionValues,
        temperature: float,
        *,
        log_prior: Tensor | None = None,
        support: Literal["own", "given"] | None = None,
        prior: ActionPrior | None = None,
    ) -> None:
        super().__init__()
        self.architecture, self.q, self.support = architecture, q, support
        self.register_buffer("temperature", torch.tensor(temperature))
        actions = architecture.actions
        self.sizes: list[int] = actions.get("sizes") or [actions["size"]]
        self._combined = actions["kind"] == "multi-discrete"
        # A function, and not the prior: copies of a policy are not to copy a prior, or its model.
        self._prior = None if prior is None else lambda state: prior(state)
        if support is None:
            assert log_prior is not None
            self.register_buffer("log_prior", log_prior.to(torch.get_default_dtype()))
        elif prior is None:
            raise ValueError(
                "SoftmaxPolicy: expected the prior that it weighs by e^{Q / temperature}, got "
                "none; give it as prior=..."
            )

    @classmethod
    def described_by(
        cls, description: dict[str, Any], *, prior: ActionPrior | None = None
    ) -> SoftmaxPolicy:
        """A new policy of what `description` gave."""
        made_of = description["architecture"]
        architecture = Architecture(**{**made_of, "hidden": tuple(made_of["hidden"])})
        shape = description["log_prior"]
        return cls(
            architecture,
            ActionValues(architecture, description["members"]),
            0.0,
            log_prior=None if shape is None else torch.zeros(shape),
            support=description["support"],
            prior=prior,
        )

    def description(self) -> dict[str, Any]:
        return {
            "architecture": dataclasses.asdict(self.architecture),
            "members": self.q.members,
            "log_prior": None if self.support is not None else list(self.log_prior.shape),
            "support": self.support,
        }

    def forward(self, state: Tensor, t: int | Tensor | None = None) -> TorchDistribution:
        chosen = dist.Categorical(logits=self.logits(state, t), validate_args=False)
        if not self._combined:
            return chosen
        return _Combined(chosen, [_Combination(self.sizes)], validate_args=False)

    def logits(self, state: Tensor, t: int | Tensor | None = None) -> Tensor:
        """log ρ + Q / temperature of all actions, batch + (A,)."""
        log_prior = self._log_prior_in(state)
        values = self.q.combined(state, None, steps_in(self.architecture, state, t))
        return log_prior + values / self.temperature.clamp(min=LEAST_TEMPERATURE)

    def mode(self, state: Tensor, t: int | Tensor | None = None) -> Tensor:
        number = self.logits(state, t).argmax(-1)
        return _Combination(self.sizes)(number) if self._combined else number

    def _log_prior_in(self, state: Tensor) -> Tensor:
        if self._prior is None:
            return self.log_prior if self.log_prior.dim() == 1 else self.log_prior[state]
        batch = state.shape if self.architecture.states["kind"] == "discrete" else state.shape[:-1]
        number = torch.arange(math.prod(self.sizes)).reshape(-1, *(1 for _ in batch))
        action = _Combination(self.sizes)(number) if self._combined else number
        with torch.no_grad():
            return self._prior(state).log_prob(action).movedim(0, -1)


class _Combined(dist.TransformedDistribution):
    """Combinations of actions, drawn by their numbers."""

    def entropy(self) -> Tensor:
        entropy: Tensor = self.base_dist.entropy()  # every number is another combination
        return entropy


class _Combination(Transform):
    """From the number of a combination to the actions in it, the last the fastest."""

    domain = constraints.nonnegative_integer
    codomain = constraints.independent(constraints.nonnegative_integer, 1)
    bijective = True

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self._strides = strides(sizes)

    def _call(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-1) // self._strides % torch.tensor(self.sizes)

    def _inverse(self, y: Tensor) -> Tensor:
        return (y * self._strides).sum(-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x, dtype=torch.get_default_dtype())

    def forward_shape(self, shape: Any) -> torch.Size:
        return torch.Size((*shape, len(self.sizes)))

    def inverse_shape(self, shape: Any) -> torch.Size:
        return torch.Size(shape[:-1])
