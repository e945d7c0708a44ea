"""`SteinPolicy`: a network that turns noise into actions, drawn from what Q says they should be."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from gymnasium.spaces import Box
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from inference_rl import stein
from inference_rl.action_values import ActionValues, steps_in
from inference_rl.networks import Architecture
from inference_rl.policies import Policy
from inference_rl.priors import UniformPrior

if TYPE_CHECKING:
    from inference_rl.priors import ActionPrior

DRAWS = 32
"""Of which the best is the mode, and around which V is estimated."""

ROWS = 256
"""States at a time whose V is estimated."""


class SteinPolicy(Policy):
    """a = tanh(ξ + f(s, ξ)), ξ ~ N(0, 1)^d, with f fitted to ρ(a | s) e^{Q(s, a) / temperature}.

    Nobody knows the density of what a network makes of noise. What is given as the log-probability
    is that of the density which the draws are meant to have, with an estimate for its constant; so
    entropies, divergences and the objective, which are means of it over draws, trust the sampler.

    :param sampler: f, of one member, whose outputs are as many as its actions.
    :param q: reward units; the least of its members counts. Both are read as they are at each call.
    :param temperature: > 0, reward units.
    :param support: whose prior is asked: that of the model, or one that was given in its place;
        None where it is uniform. :param prior: which is asked; code, and no part of what is saved.
    :raises ValueError: there is no such prior.
    """

    kind = "stein"
    temperature: Tensor
    noise: Tensor
    cover: Tensor

    def __init__(
        self,
        architecture: Architecture,
        sampler: ActionValues,
        q: ActionValues,
        temperature: float,
        *,
        support: Literal["own", "given"] | None = None,
        prior: ActionPrior | None = None,
    ) -> None:
        super().__init__()
        self.architecture, self.sampler, self.q, self.support = architecture, sampler, q, support
        self.dim = architecture.actions["dim"]
        self.register_buffer("temperature", torch.tensor(temperature))
        # The same at every call, so that a mode is a function of the state, and V of the policy.
        self.register_buffer("noise", torch.randn(2, DRAWS, self.dim))
        self.register_buffer("cover", 2 * torch.rand(DRAWS, self.dim) - 1)
        if support is not None and prior is None:
            raise ValueError(
                "SteinPolicy: expected the prior that it weighs by e^{Q / temperature}, got none; "
                "give it as prior=..."
            )
        box = Box(-1.0, 1.0, (self.dim,), np.float32)
        rho = UniformPrior(box) if prior is None else prior
        # A function, and not the prior: copies of a policy are not to copy a prior, or its model.
        self._prior = lambda state: rho(state)

    @classmethod
    def described_by(
        cls, description: dict[str, Any], *, prior: ActionPrior | None = None
    ) -> SteinPolicy:
        """A new policy of what `description` gave."""
        made_of = description["architecture"]
        architecture = Architecture(**{**made_of, "hidden": tuple(made_of["hidden"])})
        return cls(
            architecture,
            sampler_of(architecture),
            ActionValues(architecture, description["members"]),
            1.0,
            support=description["support"],
            prior=prior,
        )

    def description(self) -> dict[str, Any]:
        return {
            "architecture": dataclasses.asdict(self.architecture),
            "members": self.q.members,
            "support": self.support,
        }

    def forward(self, state: Tensor, t: int | Tensor | None = None) -> TorchDistribution:
        return Sampled(self, state, steps_in(self.architecture, state, t))

    def particles(self, state: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """ξ + f(s, ξ), before tanh, of the shape of `noise`: (N, d) or (K, N, d).

        So they begin all over the box: particles that begin together end in one mode.
        """
        return noise + self.sampler.through(state, noise, t)[0]

    def log_joint(self, state: Tensor, action: Tensor, t: Tensor) -> Tensor:
        """log p(a, O | s) = log ρ + Q / temperature, nats, (N,) or (K, N)."""
        log_prior = self._prior(state).log_prob(action)
        return log_prior + self.q(state, action, t).amin(0) / self.temperature

    def mode(self, state: Tensor, t: int | Tensor | None = None) -> Tensor:
        """Of `DRAWS` draws, from the same noise in all states, the one that is most likely."""
        steps = steps_in(self.architecture, state, t)
        action = self.particles(state, self._alike(self.noise[0], steps), steps).tanh()
        best = self.log_joint(state, action, steps).argmax(0)
        index = best.unsqueeze(-1).expand(*best.shape, self.dim).unsqueeze(0)
        return action.gather(0, index).squeeze(0)

    def log_evidence(self, state: Tensor, t: Tensor) -> Tensor:
        """V / temperature, nats, of the shape of `t`: estimated by draws around the sampler's."""
        batch = t.shape
        states = state.reshape(-1, *state.shape[len(batch) :])
        with torch.no_grad():
            parts = [
                self._log_evidence(*rows)
                for rows in zip(states.split(ROWS), t.reshape(-1).split(ROWS), strict=True)
            ]
        return torch.cat(parts).reshape(batch)

    def _log_evidence(self, state: Tensor, t: Tensor) -> Tensor:
        centres, standard = (self._alike(noise, t) for noise in self.noise)
        particles = self.particles(state, centres, t)
        action, log_density = stein.around(particles, standard, self._alike(self.cover, t))
        log_weights = self.log_joint(state, action, t) - log_density
        return log_weights.logsumexp(0) - math.log(len(action))

    def _alike(self, draws: Tensor, t: Tensor) -> Tensor:
        """The same draws in all states, (K, N, d) of (K, d)."""
        return draws.reshape(len(draws), *(1 for _ in t.shape), -1).expand(-1, *t.shape, -1)


class SteinValue(nn.Module):
    """V(s), reward units, as the density of a `SteinPolicy` has it: an estimate, from the same
    noise in all states and at every call."""

    def __init__(self, policy: SteinPolicy) -> None:
        super().__init__()
        self._policy = (policy,)  # in a tuple, because it is no part of this module

    def forward(self, state: Tensor, t: int | Tensor | None = None) -> Tensor:
        """Batch + (1,)."""
        policy = self._policy[0]
        steps = steps_in(policy.architecture, state, t)
        return policy.temperature * policy.log_evidence(state, steps).unsqueeze(-1)


def sampler_of(architecture: Architecture) -> ActionValues:
    """The network f of a `SteinPolicy`."""
    return ActionValues(architecture, 1, outputs=architecture.actions["dim"])


class Sampled(TorchDistribution):
    """What a `SteinPolicy` does in some states."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.independent(constraints.interval(-1.0, 1.0), 1)
    has_rsample = True

    def __init__(self, policy: SteinPolicy, state: Tensor, t: Tensor) -> None:
        self.policy, self.state, self.t = policy, state, t
        super().__init__(t.shape, torch.Size([policy.dim]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Sampled:
        shape = torch.Size(batch_shape)
        event = self.state.shape[len(self.batch_shape) :]
        return Sampled(self.policy, self.state.expand(shape + event), self.t.expand(shape))

    def of_noise(self, standard: Tensor) -> Tensor:
        """The actions that standard normals become, sample_shape + batch + (d,)."""
        noise = standard.to(self.policy.noise.dtype)
        return self.policy.particles(self.state, noise, self.t).tanh()

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        noise = self.policy.noise
        return self.of_noise(torch.randn(shape, dtype=noise.dtype, device=noise.device))

    def log_prob(self, value: Tensor) -> Tensor:
        """Of the density that the draws are meant to have, ρ(a | s) e^{(Q(s, a) − V̂(s)) / α}."""
        joint = self.policy.log_joint(self.state, value, self.t)
        return joint - self.policy.log_evidence(self.state, self.t)
