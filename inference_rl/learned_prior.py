"""`LearnedPrior`: an action prior that is the same in all states, and is learned beside the policy.

Of all priors ρ(a) the one with least E_s KL(π(·|s) ‖ ρ) is the policy's own marginal, and what is
left of the divergence then is the mutual information of states and actions: what it costs to let
actions depend on states at all. It is learned by maximum likelihood of the policy's actions.

Grau-Moya, Leibfried and Vrancx (2019), "Soft Q-learning with mutual-information regularization",
ICLR, §3.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Space
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from inference_rl.truncated_normal import TruncatedNormal

NARROWEST = 1e-2
"""Least width of a learned prior on a box, in units of the action box [-1, 1]."""


class LearnedPrior(nn.Module):
    """ρ(a), with parameters: a table, or a truncated Gaussian for each dimension of a box.

    It starts uniform, or as wide as the box.
    """

    def __init__(self, action_space: Space[Any]) -> None:
        super().__init__()
        self.sizes: list[int] | None = None
        if isinstance(action_space, Discrete):
            self.sizes = [int(action_space.n)]
        elif isinstance(action_space, MultiDiscrete):
            self.sizes = [int(n) for n in action_space.nvec]
        self.many = isinstance(action_space, MultiDiscrete)
        if self.sizes is None:
            assert isinstance(action_space, Box)
            dim = math.prod(action_space.shape)
            self.loc = nn.Parameter(torch.zeros(dim))
            self.log_scale = nn.Parameter(torch.zeros(dim))
        else:
            self.logits = nn.ParameterList(torch.zeros(size) for size in self.sizes)

    def forward(self, state: Tensor) -> TorchDistribution:
        batch = state.shape[:-1] if state.is_floating_point() else state.shape
        if self.sizes is None:
            loc = self.loc.expand(*batch, -1)
            scale = (self.log_scale.exp() + NARROWEST).expand(*batch, -1)
            return TruncatedNormal(loc, scale, validate_args=False).to_event(1)
        widest = max(self.sizes)
        rows = [
            nn.functional.pad(row, (0, widest - len(row)), value=-torch.inf) for row in self.logits
        ]
        if not self.many:
            return dist.Categorical(logits=rows[0].expand(*batch, -1), validate_args=False)
        logits = torch.stack(rows).expand(*batch, -1, -1)
        return dist.Categorical(logits=logits, validate_args=False).to_event(1)
