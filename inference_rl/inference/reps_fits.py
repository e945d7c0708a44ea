"""Maximum weighted likelihood of policies that have no closed form for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inference_rl.networks import NARROWEST
from inference_rl.truncated_normal import TruncatedNormal

if TYPE_CHECKING:
    from inference_rl.feature_policies import FeaturePolicy
    from inference_rl.inference.reps import REPS
    from inference_rl.policies import Policy


def fit_module(
    policy: Policy,
    state: Tensor,
    step: Tensor,
    action: Tensor,
    weights: Tensor,
    settings: REPS,
    seed: int,
) -> None:
    """Ascend on Σ w log π by Adam, in batches drawn from `seed`, from where the policy is."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(seed % 2**63)
    share = (weights * len(weights)).to(torch.get_default_dtype())
    for _ in range(settings.fit_epochs):
        for batch in torch.randperm(len(step), generator=generator).split(settings.batch_size):
            log_prob = policy(state[batch], step[batch]).log_prob(action[batch])
            optimiser.zero_grad(set_to_none=True)
            (-(share[batch] * log_prob).mean()).backward()
            optimiser.step()


def fit_features(
    policy: FeaturePolicy,
    state: Tensor,
    step: Tensor,
    action: Tensor,
    weights: Tensor,
    penalty: float,
) -> None:
    """Maximise Σ w log π − penalty · |W|² / 2: in closed form, or on a box by L-BFGS."""
    inputs, outputs = policy.inputs(state, step), action.double()
    ridge = penalty * torch.eye(inputs.shape[1], dtype=torch.float64)
    ridge[-1, -1] = 0.0  # the constant
    weighed = weights.unsqueeze(-1) * inputs
    with torch.no_grad():
        gain = torch.linalg.solve(weighed.mT @ inputs + ridge, weighed.mT @ outputs).mT
        error = outputs - inputs @ gain.mT
        covariance = (weights.unsqueeze(-1) * error).mT @ error / weights.sum()
    if policy.bounded:
        gain, scale = _fit_truncated(policy, inputs, outputs, weights, penalty)
        covariance = scale.square().diag()
    with torch.no_grad():
        policy.weights.copy_(gain)
        policy.covariance.copy_(covariance)


def _fit_truncated(
    policy: FeaturePolicy, inputs: Tensor, outputs: Tensor, weights: Tensor, penalty: float
) -> tuple[Tensor, Tensor]:
    """From where the policy is; in W / scale² and 1 / scale² the problem is concave, in W and
    log scale it is better scaled."""
    gain = policy.weights.detach().clone().requires_grad_()
    log_scale = policy.covariance.diagonal().log().div(2).clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [gain, log_scale], max_iter=50, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        scale = log_scale.exp() + NARROWEST
        density = TruncatedNormal(inputs @ gain.mT, scale, validate_args=False)
        log_prob = density.log_prob(outputs).sum(-1)
        value = -(weights @ log_prob) + penalty * gain[:, :-1].square().sum() / 2
        value.backward()
        return value

    optimiser.step(loss)
    return gain.detach(), log_scale.detach().exp() + NARROWEST
