"""Exact inference on finite models: a policy from backward messages, and what follows."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from inference_rl.backups import log_ratio, policy_rates, soft_value
from inference_rl.distributions import log_or_impossible
from inference_rl.environment import EnvironmentModel
from inference_rl.finite import FiniteModel
from inference_rl.finite_messages import (
    ImplicitGradient,
    Messages,
    control_messages,
    first_step,
    posterior_initial,
    posterior_messages,
    posterior_transition,
    tied_actions,
)
from inference_rl.inference import (
    Evidence,
    EvidenceGap,
    InferenceResult,
    ObjectiveParts,
    Progress,
    as_number,
)
from inference_rl.inference.exact_finite_sampling import sample
from inference_rl.policies import TabularPolicy
from inference_rl.policy_evaluation import PolicyEvaluation, refined
from inference_rl.priors import ActionPrior
from inference_rl.tabulation import tabulate

if TYPE_CHECKING:
    from inference_rl.inference.exact import Exact

__all__ = ["messages", "run", "sample"]


@dataclasses.dataclass(frozen=True)
class ExactDetails:
    """What exact inference on a finite model reports besides.

    :ivar ties: (S,) or (T, S), how many actions are optimal within the error; None above
        temperature 0.
    :ivar posterior_initial: (S,) p(s_0 | O). :ivar posterior_transition: (N,) or (T, N),
        p(s', alive | s, a, O) along the non-zeros of the model. Both only for target="posterior".
    """

    ties: Tensor | None = None
    posterior_initial: Tensor | None = None
    posterior_transition: Tensor | None = None


def run(
    settings: Exact,
    model: EnvironmentModel,
    *,
    prior: ActionPrior | None,
    seed: int,
    progress: Progress | None,
) -> InferenceResult:
    started = time.perf_counter()
    finite = tabulate(model, prior=prior, progress=progress)
    temperature, tolerance = settings.temperature, settings.tolerance
    evidence: Evidence | None = None
    if settings.target == "posterior":
        posterior = posterior_messages(finite, temperature, tolerance, progress)
        control = control_messages(finite, temperature, tolerance, progress)
        evidence = _evidence(finite, temperature, control, posterior)
        objective = _objective(finite, posterior.policy, temperature)
        details = ExactDetails(
            posterior_initial=posterior_initial(finite, first_step(posterior.v)),
            posterior_transition=posterior_transition(finite, posterior, temperature),
        )
        shown = dataclasses.replace(
            posterior,
            q=posterior.q * temperature,
            v=posterior.v * temperature,
            error_bound=posterior.error_bound * as_number(temperature),
            residual=posterior.residual * as_number(temperature),
        )
    else:
        shown = control_messages(finite, temperature, tolerance, progress)
        objective = finite.initial @ first_step(shown.v)
        details = ExactDetails(ties=_ties(finite, shown) if as_number(temperature) == 0 else None)

    def evidence_on_demand() -> Evidence:
        if evidence is not None:
            return evidence
        if as_number(temperature) == 0:
            return Evidence(reason="at temperature 0 reward is no evidence")
        try:
            posterior = posterior_messages(finite, temperature, tolerance, progress)
        except ValueError as error:
            return Evidence(reason=str(error))
        return _evidence(finite, temperature, shown, posterior)

    return InferenceResult(
        source=finite,
        routine=settings,
        policy=TabularPolicy(shown.policy),
        q=shown.q,
        v=shown.v,
        objective=objective,
        parts_source=lambda: objective_parts(finite, shown.policy),
        evidence_source=evidence_on_demand,
        error_bound=shown.error_bound,
        iterations=shown.iterations,
        residual=shown.residual,
        seconds=time.perf_counter() - started,
        seed=seed,
        details=details,
    )


def _evidence(
    model: FiniteModel, temperature: float | Tensor, control: Messages, posterior: Messages
) -> Evidence:
    return Evidence(
        log_evidence=_log_mean_exp(model.initial, first_step(posterior.v)),
        gap=evidence_gap(model, temperature, control, posterior),
    )


def evidence_gap(
    model: FiniteModel, temperature: float | Tensor, control: Messages, posterior: Messages
) -> EvidenceGap:
    """The gap between the two readings and its three parts, each computed for itself.

    KL(p_0 ‖ p_0^x) = log p(O) - E V^x_0; KL(π* ‖ π^x) and KL(P ‖ P^x) as sums over π* and P,
    weighed by how often π* gets there. With a discount, P includes surviving the step.
    """
    with torch.no_grad():
        log_evidence = _log_mean_exp(model.initial, first_step(posterior.v))
        start = log_evidence - model.initial @ first_step(posterior.v)
        # From the messages: probabilities far from one another underflow.
        ratio = torch.where(
            control.policy > 0,
            _advantage(control, model) / as_number(temperature) - _advantage(posterior, model),
            0.0,
        )
        policy_cost = (control.policy * ratio).sum(-1)
        mean_weight = model.expected_reward() / temperature

        def dynamics_cost(q: Tensor, v: Tensor, pi: Tensor) -> Tensor:
            # KL(P ‖ P^x) = Q^x - E[r/α] - γ E V^x: the entropy terms of survival cancel.
            return (pi * (q - mean_weight - model.discount * model.expected_value(v))).sum(-1)

        if model.horizon is None:
            dynamics = dynamics_cost(posterior.q, posterior.v, control.policy)
        else:
            dynamics = torch.stack(
                [
                    dynamics_cost(q, v, pi)
                    for q, v, pi in zip(posterior.q, posterior.v[1:], control.policy, strict=True)
                ]
            )
        costs = torch.stack([policy_cost, dynamics], dim=-1)
        along = model.initial @ _along_policy(model, control.policy, costs)
        policy_part, dynamics_part = along.tolist()
        return EvidenceGap(
            log_evidence=as_number(log_evidence),
            max_elbo=as_number(model.initial @ first_step(control.v)) / as_number(temperature),
            start=as_number(start),
            policy=policy_part,
            dynamics=dynamics_part,
        )


def objective_parts(model: FiniteModel, policy: Tensor) -> ObjectiveParts:
    """Return, entropy, divergence from the prior and steps of `policy`, discounted sums."""
    with torch.no_grad():
        policy = policy.detach()
        rates = policy_rates(policy, model.expected_reward(), model.log_prior)
        return ObjectiveParts(*(model.initial @ _along_policy(model, policy, rates)).tolist())


def _objective(model: FiniteModel, policy: Tensor, temperature: float | Tensor) -> Tensor:
    """J(π) in KL form, differentiable in the model, the policy and the temperature."""
    gain = model.expected_reward() - temperature * log_ratio(policy, model.log_prior)
    gain = (policy * gain).sum(-1)

    def step(gain: Tensor, policy: Tensor, v: Tensor) -> Tensor:
        after = (policy * model.expected_value(v)).sum(-1)
        return torch.where(model.is_terminal, 0.0, gain + model.discount * after)

    if model.horizon is not None:
        v = torch.zeros_like(gain[0])
        for rate, pi in zip(gain.flip(0), policy.flip(0), strict=True):
            v = step(rate, pi, v)
        return model.initial @ v
    with torch.no_grad():
        v = _along_policy(model, policy, gain.unsqueeze(-1)).squeeze(-1)
    backup = step(gain, policy, v)
    if backup.requires_grad:
        moves = model.discount * _under_policy(model, policy.detach())
        v = ImplicitGradient.apply(backup, v, lambda: moves)
    return model.initial @ v


def _along_policy(model: FiniteModel, policy: Tensor, rates: Tensor) -> Tensor:
    """E Σ γ^t rates(s_t) along `policy` from each state, (S, K); `rates` (S, K) or (T, S, K)."""
    rates = torch.where(model.is_terminal.unsqueeze(-1), 0.0, rates)
    if model.horizon is not None:
        total = torch.zeros_like(rates[0])
        for pi, rate in zip(policy.flip(0), rates.flip(0), strict=True):
            after = torch.stack([model.expected_value(c) for c in total.unbind(-1)], dim=-1)
            total = rate + model.discount * (pi.unsqueeze(-1) * after).sum(1)
        return total
    matrix = _under_policy(model, policy)
    closed = not bool(model.is_terminal.any())
    evaluate = PolicyEvaluation(matrix, discount=model.discount, closed=closed)
    matrix = matrix * model.discount
    columns = [refined(evaluate, matrix, r.contiguous().numpy()) for r in rates.unbind(-1)]
    return torch.from_numpy(np.stack(columns, axis=-1))


def _under_policy(model: FiniteModel, policy: Tensor) -> scipy.sparse.csr_array:
    """The transition under `policy` (S, A), (S, S)."""
    weights = policy.flatten()[model.rows()] * model.probabilities.detach()
    grouped = model.pointers[:: model.num_actions].numpy().astype(model.csr.indptr.dtype)
    shape = (model.num_states, model.num_states)
    return scipy.sparse.csr_array((weights.numpy(), model.csr.indices, grouped), shape=shape)


def _advantage(messages: Messages, model: FiniteModel) -> Tensor:
    v = messages.v if model.horizon is None else messages.v[:-1]
    return messages.q - v.unsqueeze(-1)


def _ties(model: FiniteModel, control: Messages) -> Tensor:
    known = math.isfinite(control.error_bound)
    error = control.error_bound if known else control.residual
    tied = tied_actions(model.log_prior, control.q, error)
    return torch.where(model.is_terminal, 0, tied.sum(-1))


def _log_mean_exp(probs: Tensor, values: Tensor) -> Tensor:
    return soft_value(values, log_or_impossible(probs), 1.0)


def messages(result: InferenceResult) -> dict[str, Tensor]:
    """q and v, detached, as they are saved."""
    return {"q": result.q.detach().contiguous(), "v": result.v.detach().contiguous()}
