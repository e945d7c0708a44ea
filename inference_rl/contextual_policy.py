"""`ContextualPolicy`: a network whose parameters are a linear function of an episode's context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.func import functional_call

from inference_rl.networks import NetworkPolicy
from inference_rl.policies import Policy

if TYPE_CHECKING:
    from inference_rl.priors import ActionPrior


def flattened(policy: NetworkPolicy) -> Tensor:
    """(P,): the parameters of a policy, one after another; float64."""
    return nn.utils.parameters_to_vector(policy.parameters()).detach().double()


def evaluated(
    policy: NetworkPolicy, parameters: Tensor, state: Tensor, step: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What `policy.parameters_of` gives in each state, and the log widths, under its parameters.

    :param parameters: (N, P). :param state: (N, ...). :param step: (N,), or None.
    """
    sizes = [p.numel() for p in policy.parameters()]
    parts = {
        name: part.reshape(-1, *like.shape).to(like.dtype)
        for (name, like), part in zip(
            policy.named_parameters(), parameters.split(sizes, dim=-1), strict=True
        )
    }
    log_scale = parts.pop("log_scale", None)
    inner = policy.parameters_of
    named = {name.removeprefix("parameters_of."): part for name, part in parts.items()}

    def one(own: dict[str, Tensor], state: Tensor, step: Tensor | None) -> Tensor:
        found: Tensor = functional_call(inner, own, (state, step))
        return found

    dims = (0, 0, None if step is None else 0)
    return torch.vmap(one, in_dims=dims)(named, state, step), log_scale


class ContextualPolicy(Policy):
    """A network with parameters W ψ(c): c the entries of the state that tell the context.

    :param network: whose sizes it has. :param context: entries of the state, which do not change
        within an episode; ψ is a one before them.
    """

    kind = "contextual"
    gain: Tensor

    def __init__(self, network: NetworkPolicy, context: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.context = network, context
        start = flattened(network)
        gain = torch.zeros(len(start), 1 + len(context), dtype=torch.float64)
        gain[:, 0] = start
        self.register_buffer("gain", gain)

    @classmethod
    def described_by(
        cls, description: dict[str, Any], *, prior: ActionPrior | None = None
    ) -> ContextualPolicy:
        """A new policy of the sizes that `description` gave."""
        network = NetworkPolicy.described_by(description["network"], prior=prior)
        return cls(network, tuple(description["context"]))

    def description(self) -> dict[str, Any]:
        return {
            "network": self.network.description(),
            "context": list(self.context),
            "support": self.network.architecture.support,
        }

    def inputs(self, state: Tensor) -> Tensor:
        """ψ of the context, (N, C)."""
        entries = state[..., list(self.context)].double()
        return torch.cat([entries.new_ones(*entries.shape[:-1], 1), entries], -1)

    def _outputs(self, state: Tensor, t: int | Tensor | None) -> tuple[Tensor, Tensor | None]:
        flat = state.reshape(-1, state.shape[-1])
        step = None
        if t is not None:
            step = torch.as_tensor(t).expand(state.shape[:-1]).reshape(-1)
        found, log_scale = evaluated(self.network, self.inputs(flat) @ self.gain.mT, flat, step)
        shape = (*state.shape[:-1], -1)
        return found.reshape(shape), None if log_scale is None else log_scale.reshape(shape)

    def forward(self, state: Tensor, t: int | Tensor | None = None) -> TorchDistribution:
        return self.network.distribution(*self._outputs(state, t), state)

    def mode(self, state: Tensor, t: int | Tensor | None = None) -> Tensor:
        return self.network.mode_of(self._outputs(state, t)[0], state)
