"""One step of message passing, in torch: differentiable, float64, safe at every temperature.

Index conventions: q, log_prior (..., S, A); v (..., S). Control messages are in reward units,
posterior messages in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inference_rl.finite import FiniteModel


def soft_value(q: Tensor, log_prior: Tensor, temperature: float | Tensor) -> Tensor:
    """V(s) = temperature · log Σ_a ρ(a|s) exp(Q(s, a) / temperature); its limit, max Q, at 0.

    The maximum runs over allowed actions (ρ > 0). Levine (2018), arXiv:1805.00909, §3.1.
    """
    allowed = log_prior > -torch.inf
    peak = torch.where(allowed, q, -torch.inf).amax(-1, keepdim=True)
    if temperature == 0:
        return peak.squeeze(-1)
    peak = peak.detach()
    advantage = torch.where(allowed, q - peak, 0.0) / temperature
    shift = (log_prior.exp() * torch.expm1(advantage)).sum(-1)
    # log1p keeps the last digits when temperature >> Q; it loses them all when the best action has
    # next to no prior, where log-sum-exp is exact.
    near = shift > -0.5
    log_mean = torch.where(
        near, torch.log1p(torch.where(near, shift, 0.0)), torch.logsumexp(log_prior + advantage, -1)
    )
    return peak.squeeze(-1) + temperature * log_mean


def soft_policy(q: Tensor, log_prior: Tensor, temperature: float | Tensor) -> Tensor:
    """π(a|s) = ρ(a|s) exp((Q - V) / temperature); at temperature 0 the first of the best actions.

    Levine (2018), §3.1, with a prior.
    """
    allowed = log_prior > -torch.inf
    masked = torch.where(allowed, q, -torch.inf)
    if temperature == 0:
        return torch.nn.functional.one_hot(masked.argmax(-1), q.shape[-1]).to(q.dtype)
    peak = masked.amax(-1, keepdim=True).detach()
    advantage = torch.where(allowed, q - peak, 0.0) / temperature
    return torch.softmax(log_prior + advantage, -1)


def log_ratio(policy: Tensor, log_prior: Tensor) -> Tensor:
    """log(π / ρ), zero where π is zero."""
    taken = policy > 0
    return torch.where(taken, policy, 1.0).log() - torch.where(taken, log_prior, 0.0)


def policy_rates(policy: Tensor, reward: Tensor, log_prior: Tensor) -> Tensor:
    """What a step brings under `policy` (..., S, A), (..., S, 4): reward (in its units), entropy,
    divergence from the prior (nats) and the step itself.

    :param reward: (S, A), expected.
    """
    entropy = -torch.special.xlogy(policy, policy).sum(-1)
    divergence = (policy * log_ratio(policy, log_prior)).sum(-1)
    paid = (policy * reward).sum(-1)
    return torch.stack([paid, entropy, divergence, torch.ones_like(entropy)], dim=-1)


def control_q(model: FiniteModel, v: Tensor) -> Tensor:
    """Q(s, a) = r̄(s, a) + discount · E[V(s')], (S, A). Levine (2018), §3.1."""
    return model.expected_reward() + model.discount * model.expected_value(v)


def survival_message(v: Tensor, discount: float) -> Tensor:
    """log [(1 - discount) + discount · exp V]: the evidence after a step one may not survive."""
    if discount == 1:
        return v
    if discount == 0:
        return torch.zeros_like(v)
    dies = torch.full_like(v, discount).neg().log1p()
    far = torch.logaddexp(dies, v + torch.full_like(v, discount).log())
    near = v.abs() < 0.5  # where the sum is close to one, and its logarithm would lose digits
    return torch.where(near, torch.log1p(discount * torch.expm1(torch.where(near, v, 0.0))), far)


def posterior_q(model: FiniteModel, v: Tensor, temperature: float | Tensor) -> Tensor:
    """Q(s, a) = log E[exp(r / temperature) · evidence after s'], nats. Levine (2018), §2.3."""
    after = survival_message(v, model.discount)[model.successors]
    return model.row_log_mean_exp(model.rewards / temperature + after)
