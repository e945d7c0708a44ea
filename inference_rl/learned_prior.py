"""`LearnedPrior`: an action prior that is the same in all states, and is learned beside the policy.

Of all priors ρ(a) the one with least E_s KL(π(·|s) ‖ ρ) is the policy's own marginal, and what is
left of the divergence then is the mutual information of states and actions: what it costs to let
actions depend on states at all. It is learned by maximum likelihood of the policy's actions.

Grau-Moya, Leibfried and Vrancx (2019), "Soft Q-learning with mutual-information regularization",
ICLR, §3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from inference_rl import runs
from inference_rl.truncated_normal import TruncatedNormal

NARROWEST = 1e-2
"""Least width of a learned prior on a box, in units of the action box [-1, 1]."""


class LearnedPrior(nn.Module):
    """ρ(a), with parameters: a table, or a truncated Gaussian for each dimension of a box.

    It starts uniform, or as wide as the box.

    :param actions: their space, as an `Architecture` has it.
    """

    def __init__(self, actions: dict[str, Any]) -> None:
        super().__init__()
        self.actions = actions
        self.sizes: list[int] | None = None
        if actions["kind"] == "box":
            self.loc = nn.Parameter(torch.zeros(actions["dim"]))
            self.log_scale = nn.Parameter(torch.zeros(actions["dim"]))
            return
        self.sizes = actions.get("sizes") or [actions["size"]]
        self.many = actions["kind"] == "multi-discrete"
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


def load_learned_prior(directory: str | Path) -> LearnedPrior:
    """The prior that was learned beside the policy of a saved run. Runs no code from the directory.

    :raises FileNotFoundError: no run there. :raises ValueError: it is damaged, or has no such
        prior.
    """
    actions = runs.read_manifest(directory).get("learned_prior")
    if actions is None:
        raise ValueError(
            f"{directory}: expected a run whose prior was learned, got one without; infer one with "
            "sac --learn-prior"
        )
    prior = LearnedPrior(actions)
    prior.load_state_dict(runs.read_tensors(directory, "learned_prior"))
    return prior.requires_grad_(False)
