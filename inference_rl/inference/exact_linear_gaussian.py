"""Exact inference on linear-Gaussian models: the Riccati recursions of `inference_rl.riccati`."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inference_rl.environment import EnvironmentModel
from inference_rl.inference import (
    Evidence,
    EvidenceGap,
    EvidenceRate,
    InferenceResult,
    ObjectiveParts,
    Progress,
    as_number,
)
from inference_rl.inference.sampling import effective_horizon, trajectories_tree
from inference_rl.linear_gaussian import LinearGaussianModel, QuadraticForm
from inference_rl.priors import ActionPrior
from inference_rl.riccati import LinearGaussianSolution, solve_linear_gaussian

if TYPE_CHECKING:
    import xarray

    from inference_rl.inference.exact import Exact


def run(
    settings: Exact,
    model: EnvironmentModel,
    *,
    prior: ActionPrior | None,
    seed: int,
    progress: Progress | None,
) -> InferenceResult:
    assert isinstance(model, LinearGaussianModel)
    if prior is not None:
        raise ValueError(
            "a linear-Gaussian model takes a Gaussian prior only, as its prior_mean and "
            "prior_covariance: any other would not leave the messages quadratic"
        )
    started = time.perf_counter()
    if progress is not None:
        progress("Riccati recursion")
    solution = solve_linear_gaussian(model, settings.temperature, settings.target)
    return InferenceResult(
        source=model,
        routine=settings,
        policy=solution.policy,
        q=solution.q,
        v=solution.v,
        objective=solution.objective,
        parts_source=lambda: _parts(model, as_number(settings.temperature), solution),
        evidence_source=lambda: _evidence(model, settings, solution),
        error_bound=solution.error_bound,
        iterations=solution.iterations,
        residual=solution.residual,
        seconds=time.perf_counter() - started,
        seed=seed,
        details=solution,
    )


def _evidence(
    model: LinearGaussianModel, settings: Exact, solution: LinearGaussianSolution
) -> Evidence:
    if as_number(settings.temperature) == 0:
        return Evidence(reason="at temperature 0 reward is no evidence")
    posterior = solution
    if settings.target == "control":
        try:
            posterior = solve_linear_gaussian(model, settings.temperature, "posterior")
        except ValueError as error:
            return Evidence(reason=str(error))
    if posterior.rate is not None:
        rate = EvidenceRate(float(posterior.rate.log_evidence), float(posterior.rate.max_elbo))
        return Evidence(
            reason="without a horizon log p(O) has no limit: each step adds "
            f"{rate.log_evidence:.6g} nats; set horizon=T for that of T steps",
            rate=rate,
        )
    assert posterior.gap is not None
    assert posterior.log_evidence is not None
    log_evidence = float(posterior.log_evidence)
    parts = posterior.gap
    gap = EvidenceGap(
        log_evidence=log_evidence,
        max_elbo=log_evidence - float(parts.total),
        start=float(parts.start),
        policy=float(parts.policy),
        dynamics=float(parts.dynamics),
    )
    return Evidence(posterior.log_evidence, gap)


def _parts(
    model: LinearGaussianModel, temperature: float, solution: LinearGaussianSolution
) -> ObjectiveParts | None:
    if solution.objective is None or solution.expected_return is None or solution.entropy is None:
        return None
    discount, horizon = model.discount, model.horizon
    if horizon is None:
        steps = 1 / (1 - discount) if discount < 1 else math.inf
    else:
        steps = float(horizon) if discount == 1 else (1 - discount**horizon) / (1 - discount)
    expected_return, objective = float(solution.expected_return), float(solution.objective)
    divergence = (expected_return - objective) / temperature if temperature > 0 else math.inf
    return ObjectiveParts(expected_return, float(solution.entropy), divergence, steps)


def sample(
    result: InferenceResult, draws: int, *, horizon: int | None, seed: int
) -> xarray.DataTree:
    """Trajectories of the inferred distribution; see `InferenceResult.sample`."""
    model = result.model
    assert isinstance(model, LinearGaussianModel)
    temperature, target = result.temperature, result.routine.target
    solution = result.details or solve_linear_gaussian(model, temperature, target)
    steps = effective_horizon(model, draws, horizon)
    hindsight = solution.posterior_dynamics
    states, actions, rewards = [], [], []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        start = (hindsight or model).initial_state()
        state = start.sample((draws,))
        log_weight = model.initial_state().log_prob(state) - start.log_prob(state)
        states.append(state)
        for t in range(steps):
            chosen = result.policy(state, t)
            action = chosen.sample()
            usual = model.transition(state, action)
            step = usual if hindsight is None else hindsight.transition(state, action, t)
            next_state = step.sample()
            reward = model.reward(state, action, next_state)
            if temperature > 0:
                factor = reward / temperature - chosen.log_prob(action)
                factor = factor + model.action_prior(state).log_prob(action)
                if hindsight is not None:
                    factor = factor + usual.log_prob(next_state) - step.log_prob(next_state)
                log_weight = log_weight + model.discount**t * factor
            states.append(next_state)
            actions.append(action)
            rewards.append(reward)
            state = next_state
        columns = {
            "state": torch.stack(states, dim=1),
            "action": torch.stack(actions, dim=1),
            "reward": torch.stack(rewards, dim=1),
        }
        columns["alive"] = torch.ones_like(columns["reward"], dtype=torch.bool)
        if temperature > 0:
            tail = result.v(state) if model.horizon is None else result.v(state, t=steps)
            columns["log_weight"] = log_weight + model.discount**steps * tail / temperature
        return trajectories_tree(columns, result.summary())


def messages(result: InferenceResult) -> dict[str, Tensor]:
    """The coefficients of q and v, detached, as they are saved."""
    return {
        f"{name}_{part}": getattr(form, part).detach()
        for name, form in (("q", result.q), ("v", result.v))
        for part in ("quadratic", "linear", "constant")
    }


def read_messages(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """q and v from what `messages` gave."""
    return {
        name: QuadraticForm(
            tensors[f"{name}_quadratic"], tensors[f"{name}_linear"], tensors[f"{name}_constant"]
        )
        for name in ("q", "v")
    }
