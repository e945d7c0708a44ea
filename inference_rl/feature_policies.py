"""Policies and values that are linear in random Fourier features of the state."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from inference_rl.features import RandomFourierFeatures
from inference_rl.networks import NARROWEST
from inference_rl.policies import Policy
from inference_rl.truncated_normal import TruncatedNormal


def with_share(state: Tensor, t: int | Tensor | None, horizon: int | None) -> Tensor:
    """States and, where there is a horizon, the share of it that has passed: (..., dim + 1).

    :raises ValueError: there is a horizon, and no step.
    """
    if horizon is None:
        return state
    if t is None:
        raise ValueError(
            f"this policy depends on the step: call policy(state, t) with t in 0..{horizon - 1}"
        )
    share = (torch.as_tensor(t) / horizon).to(state.dtype)
    return torch.cat([state, share.expand(state.shape[:-1]).unsqueeze(-1)], dim=-1)


class FeatureValue(nn.Module):
    """V(s, t) = θᵀφ(s, t) + offset, reward units; float64, of shape batch + (1,)."""

    theta: Tensor
    offset: Tensor

    def __init__(self, features: RandomFourierFeatures, horizon: int | None) -> None:
        super().__init__()
        self.features, self.horizon = features, horizon
        self.register_buffer("theta", torch.zeros(len(features.phases), dtype=torch.float64))
        self.register_buffer("offset", torch.zeros((), dtype=torch.float64))

    @classmethod
    def made_of(cls, tensors: dict[str, Tensor], horizon: int | None) -> FeatureValue:
        """One whose `state_dict` these are."""
        inputs, count = tensors["features.frequencies"].shape
        value = cls(RandomFourierFeatures(inputs, count, 1.0), horizon)
        value.load_state_dict(tensors)
        return value

    def forward(self, state: Tensor, t: int | Tensor | None = None) -> Tensor:
        inputs = with_share(state, t, self.horizon)
        found = self.features(inputs.reshape(-1, inputs.shape[-1])) @ self.theta + self.offset
        return found.reshape(*state.shape[:-1], 1)


class FeaturePolicy(Policy):
    """A Gaussian whose mean is linear in random Fourier features of the state, and a constant.

    On a bounded box it is truncated to [-1, 1]^d and its covariance is diagonal.

    :param features: of states (and the share of the horizon). :param actions: d.
    :param bounded: whether actions are. :param horizon: T, if it depends on the step.
    """

    kind = "features"
    covariance: Tensor

    def __init__(
        self,
        features: RandomFourierFeatures,
        actions: int,
        *,
        bounded: bool,
        horizon: int | None = None,
    ) -> None:
        super().__init__()
        self.features, self.bounded, self.horizon = features, bounded, horizon
        count = len(features.phases) + 1
        self.weights = nn.Parameter(torch.zeros(actions, count, dtype=torch.float64))
        self.register_buffer("covariance", 0.25 * torch.eye(actions, dtype=torch.float64))

    @classmethod
    def described_by(cls, description: dict[str, Any]) -> FeaturePolicy:
        """A new policy of the sizes that `description` gave; its features are in its state."""
        sizes = dict(description)
        features = RandomFourierFeatures(sizes.pop("inputs"), sizes.pop("features"), 1.0)
        return cls(features, **sizes)

    def description(self) -> dict[str, Any]:
        inputs, features = self.features.frequencies.shape
        return {
            "inputs": inputs,
            "features": features,
            "actions": len(self.weights),
            "bounded": self.bounded,
            "horizon": self.horizon,
        }

    def inputs(self, state: Tensor, t: int | Tensor | None = None) -> Tensor:
        """(N, K + 1): the features, and a constant, of a batch of any shape, flattened."""
        states = with_share(state, t, self.horizon)
        found = self.features(states.reshape(-1, states.shape[-1])) * math.sqrt(
            len(self.features.phases) / 2
        )
        return torch.cat([found, found.new_ones(len(found), 1)], -1)

    def forward(self, state: Tensor, t: int | Tensor | None = None) -> TorchDistribution:
        loc = (self.inputs(state, t) @ self.weights.mT).reshape(*state.shape[:-1], -1)
        loc = loc.to(state.dtype)
        if not self.bounded:
            covariance = self.covariance.to(loc.dtype)
            return dist.MultivariateNormal(loc, covariance_matrix=covariance, validate_args=False)
        scale = self.covariance.diagonal().sqrt().to(loc.dtype).clamp(min=NARROWEST)
        return TruncatedNormal(loc, scale, validate_args=False).to_event(1)

    def mode(self, state: Tensor, t: int | Tensor | None = None) -> Tensor:
        loc = (self.inputs(state, t) @ self.weights.mT).reshape(*state.shape[:-1], -1)
        loc = loc.to(state.dtype)
        return loc.clamp(-1, 1) if self.bounded else loc
