"""How far a policy is from the best one, on finite models, by two computations."""

from __future__ import annotations

import torch
from torch import Tensor

from inference_rl import Exact, FiniteModel, infer
from inference_rl.inference.exact_finite import _objective
from inference_rl.policies import Policy


def policy_table(model: FiniteModel, policy: Policy) -> Tensor:
    """Probabilities, (S, A), or (T, S, A) under a horizon; float64."""
    states = torch.arange(model.num_states)

    def rows(t: int | None) -> Tensor:
        probs = policy(states, t).probs.double()
        return probs / probs.sum(-1, keepdim=True)

    if model.horizon is None:
        return rows(None)
    return torch.stack([rows(t) for t in range(model.horizon)])


def regret(model: FiniteModel, policy: Policy, temperature: float) -> float:
    """(J(π*) − J(π)) / |J(π*) − J(ρ)|, and see that J(π*) − J(π) = α E_π Σ γ^t KL(π ‖ π*)."""
    best, probs = infer(model, Exact(temperature)), policy_table(model, policy)
    short = float(best.objective - _objective(model, probs, temperature))
    by_divergence = temperature * divergence(model, probs, best.policy.probs)
    assert abs(short - by_divergence) < 1e-7 * max(1.0, abs(short))
    prior = model.log_prior.exp().expand_as(probs)
    return short / abs(float(best.objective - _objective(model, prior, temperature)))


def divergence(model: FiniteModel, policy: Tensor, other: Tensor) -> float:
    """E_π Σ γ^t KL(π(·|s_t) ‖ other(·|s_t)), nats: step by step, by where the policy is."""
    dense = torch.from_numpy(model.csr.toarray())
    dense = dense.reshape(model.num_states, model.num_actions, model.num_states)
    alive = (~model.is_terminal).double()
    here, total, weight, t = model.initial.clone(), 0.0, 1.0, 0
    while weight > 1e-14 and t != model.horizon:
        pi, rho = (p if p.dim() == 2 else p[t] for p in (policy, other))
        nats = torch.where(pi > 0, pi * (pi.log() - rho.log()), 0.0).sum(-1)
        total += weight * float((here * alive * nats).sum())
        here = torch.einsum("s,sa,sat->t", here * alive, pi, dense)
        weight, t = weight * model.discount, t + 1
        if float((here * alive).sum()) < 1e-14:
            break
    return total
