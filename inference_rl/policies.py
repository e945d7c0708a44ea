"""Policies π(a | s): the guide's factors, which is all that inference ever fits.

A policy is a module called with states (and the step, if it depends on it) that returns a Pyro
distribution over actions.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from inference_rl import runs
from inference_rl.distributions import categorical

if TYPE_CHECKING:
    from inference_rl.priors import ActionPrior


class Policy(nn.Module, abc.ABC):
    """π(a | s, t). Subclasses are final; each names its `kind`."""

    kind: ClassVar[str]

    __call__: Callable[..., TorchDistribution]

    @abc.abstractmethod
    def forward(self, state: Tensor, t: int | Tensor | None = None) -> TorchDistribution:
        """The distribution over actions in `state` (of any batch shape) at step `t`.

        :param t: one step, or one for each state; needed by policies of finite-horizon problems
            only, others ignore it.
        """

    @abc.abstractmethod
    def mode(self, state: Tensor, t: int | Tensor | None = None) -> Tensor:
        """The most likely action; of several the first."""

    def description(self) -> dict[str, Any] | None:
        """What it takes to make such a policy, besides its parameters; JSON."""
        return None

    def act(
        self, state: Any, t: int | Tensor | None = None, *, deterministic: bool = False
    ) -> Tensor:
        """An action in `state`: drawn from π, or its most likely one."""
        state = torch.as_tensor(state)
        with torch.no_grad():
            action: Tensor = self.mode(state, t) if deterministic else self(state, t).sample()
        return action


class TabularPolicy(Policy):
    """A table of probabilities: `probs` of shape (S, A), or (T, S, A) with one for each step.

    :raises ValueError: (when called) a policy that depends on the step is called without one.
    """

    kind = "tabular"
    table: Tensor

    def __init__(self, probs: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", probs.detach())
        # A buffer has no graph; those who differentiate through the policy need it.
        self._graph = probs if probs.requires_grad else None

    @property
    def probs(self) -> Tensor:
        """π as a table, (S, A) or (T, S, A); differentiable where the inference was."""
        return self.table if self._graph is None else self._graph

    def _rows(self, state: Tensor, t: int | Tensor | None) -> Tensor:
        if self.probs.dim() == 2:
            return self.probs[state]
        _check_step(t, len(self.probs))
        return self.probs[t, state]

    def forward(self, state: Tensor, t: int | Tensor | None = None) -> TorchDistribution:
        return categorical(self._rows(state, t))

    def mode(self, state: Tensor, t: int | Tensor | None = None) -> Tensor:
        return self._rows(state, t).argmax(-1)


class LinearGaussianPolicy(Policy):
    """N(gain · s + offset, covariance); with a leading dimension T where it depends on the step.

    :param gain: (d_action, d_state), offset: (d_action,), covariance: (d_action, d_action). A zero
        covariance is the deterministic controller.
    """

    kind = "linear-gaussian"
    gain: Tensor
    offset: Tensor
    covariance: Tensor

    def __init__(self, gain: Tensor, offset: Tensor, covariance: Tensor) -> None:
        super().__init__()
        for name, value in (("gain", gain), ("offset", offset), ("covariance", covariance)):
            self.register_buffer(f"{name}_table", value.detach())
            setattr(self, name, value)

    def _at(self, value: Tensor, t: int | Tensor | None) -> Tensor:
        if self.gain.dim() == 2:
            return value
        _check_step(t, len(self.gain))
        return value[t]

    def forward(self, state: Tensor, t: int | Tensor | None = None) -> TorchDistribution:
        covariance = self._at(self.covariance, t)
        if not covariance.any():
            return dist.Delta(self.mode(state, t), event_dim=1)
        return dist.MultivariateNormal(self.mode(state, t), covariance_matrix=covariance)

    def mode(self, state: Tensor, t: int | Tensor | None = None) -> Tensor:
        gain, offset = self._at(self.gain, t), self._at(self.offset, t)
        state = state.to(gain.dtype)
        if gain.dim() == 2:
            return state @ gain.mT + offset
        return (gain @ state.unsqueeze(-1)).squeeze(-1) + offset


def _check_step(t: int | Tensor | None, horizon: int) -> None:
    """:raises ValueError: there is no step, or one outside the horizon."""
    if t is None:
        raise ValueError(
            f"this policy depends on the step: call policy(state, t) with t in 0..{horizon - 1}"
        )
    steps = torch.as_tensor(t)
    if bool(((steps < 0) | (steps >= horizon)).any()):
        raise ValueError(
            f"t: expected steps in 0..{horizon - 1}, within the horizon, got "
            f"{t if isinstance(t, int) else steps.tolist()}"
        )


def load_policy(directory: str | Path, *, prior: ActionPrior | None = None) -> Policy:
    """The policy of a saved run. Runs no code from the directory.

    :param prior: that of the run; needed where the policy asks it, whenever it is called, which
        actions of a continuous state are forbidden.
    :raises FileNotFoundError: no run there. :raises ValueError: the run is damaged, or its policy
        of a kind that this version does not know, or in need of its prior.
    """
    from inference_rl.contextual_policy import ContextualPolicy
    from inference_rl.feature_policies import FeaturePolicy
    from inference_rl.networks import ModulePolicy, NetworkPolicy
    from inference_rl.softmax_policy import SoftmaxPolicy
    from inference_rl.stein_policy import SteinPolicy

    manifest = runs.read_manifest(directory)
    kind = manifest.get("policy")
    if kind == ModulePolicy.kind:
        raise ValueError(
            f"{directory}: its policy is a module of your own, whose code a run does not hold; "
            "make the module, and load runs.read_tensors(directory, 'policy') into it"
        )
    made_of = (NetworkPolicy, SoftmaxPolicy, SteinPolicy, FeaturePolicy, ContextualPolicy)
    described: dict[str, Any] = {made.kind: made for made in made_of}
    if kind not in (TabularPolicy.kind, LinearGaussianPolicy.kind, *described):
        raise ValueError(f"{directory}: a policy of kind {kind!r}, which this version cannot load")
    tensors = runs.read_tensors(directory, "policy")
    if kind in described:
        description = manifest["policy_description"]
        needed = {}
        if description.get("support") is not None:
            if prior is None:
                raise ValueError(
                    f"{directory}: its policy asks its prior, and a prior is code, which a run "
                    "does not hold; make the prior, and give it as load_policy(directory, "
                    "prior=...), or take the policy of InferenceResult.load(directory)"
                )
            needed = {"prior": prior}
        policy = described[kind].described_by(description, **needed)
        policy.load_state_dict(tensors)
        return policy.requires_grad_(False)
    if kind == TabularPolicy.kind:
        return TabularPolicy(tensors["table"])
    return LinearGaussianPolicy(
        tensors["gain_table"], tensors["offset_table"], tensors["covariance_table"]
    )
