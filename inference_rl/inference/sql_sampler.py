"""Soft Q-learning in a box: V from weighted draws, and a sampler of ρ e^{Q/α} that is learned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inference_rl import stein
from inference_rl.action_values import ActionValues
from inference_rl.decision import Decision, decide, evidence, posterior
from inference_rl.environment import EnvironmentModel
from inference_rl.inference import learned
from inference_rl.inference.off_policy import (
    Batch,
    Lag,
    Learner,
    Part,
    residual_loss,
    soft_target,
)
from inference_rl.networks import Architecture
from inference_rl.priors import ActionPrior, moved
from inference_rl.stein_policy import SteinPolicy, sampler_of

if TYPE_CHECKING:
    from inference_rl.inference.sql import SQL

MEASURED = 32
"""States of a batch in which the sampler is measured, and the temperature tuned."""

Decide = Callable[[Tensor], Decision]
"""From actions (K, N, d) to the program of one decision that takes them."""


def sampler_loss(moved: Tensor, direction: Tensor) -> Tensor:
    """−mean u · direction, whose gradient carries a Stein gradient to what made the particles u,
    (M, N, d)."""
    return -(moved * direction.detach()).sum(-1).mean()


def score(particles: Tensor, decide_on: Decide) -> Tensor:
    """∇_u log p(u | s, O), (K, N, d), of actions tanh(u): of log p(a, O | s) + Σ log(1 − tanh² u),
    since p(O | s) does not depend on u."""
    with torch.enable_grad():
        u = particles.detach().requires_grad_()
        log_density = decide_on(u.tanh()).log_joint + stein.log_slope(u)
        (found,) = torch.autograd.grad(log_density.sum(), [u])
    return found


def drawn(policy: SteinPolicy, state: Tensor, step: Tensor, count: int) -> Tensor:
    """Particles of the sampler, (count, N, d)."""
    shape = count, len(state), policy.dim
    return policy.particles(state, torch.randn(shape, device=state.device), step)


def proposals(
    policy: SteinPolicy, state: Tensor, step: Tensor, settings: SQL
) -> tuple[Tensor, Tensor]:
    """Actions to weigh, (K, N, d), and their log-densities, nats, (K, N)."""
    guided = settings.proposals == "guide"
    count = settings.value_samples // 2 if guided else settings.value_samples
    shape = count, len(state), policy.dim
    uniform = 2 * torch.rand(shape, device=state.device) - 1
    if not guided:
        return uniform, stein.log_uniform(uniform)
    standard = torch.randn(shape, device=state.device)
    return stein.around(drawn(policy, state, step, count), standard, uniform)


def learner(
    settings: SQL, model: EnvironmentModel, prior: ActionPrior, architecture: Architecture
) -> Learner:
    """:raises ValueError: the temperature is zero. :raises TypeError: the box has no bounds."""
    space, discount = model.action_space, float(model.discount)
    if settings.temperature == 0:
        raise ValueError(
            f"temperature: expected a number > 0 for actions in {space}, whose density e^(Q / "
            "temperature) is to be sampled, got 0; choose a small one, or soft-ddpg"
        )
    if not architecture.actions["bounded"]:
        raise TypeError(
            f"sql: expected a box with bounds to draw actions from, got {space}; give the action "
            "space bounds"
        )
    tempering = learned.Tempering(settings, model, prior)
    q = ActionValues(architecture, 1)
    support = None if learned.is_uniform(model, prior) else learned.support_of(model, prior)
    policy = SteinPolicy(
        architecture,
        sampler_of(architecture),
        q,
        tempering.temperature,
        support=support,
        prior=None if support is None else prior,
    )
    lagging = copy.deepcopy(q).requires_grad_(False)
    for module in (policy, lagging):
        module.to(settings.device)
    fixed, there = settings.particles // 2, moved(prior, settings.device)

    def decisions(q: ActionValues, state: Tensor, step: Tensor, temperature: Tensor) -> Decide:
        return lambda actions: decide(
            state,
            there,
            there,
            lambda action: q(state, action, step).amin(0),
            temperature=temperature,
            action_space=space,
            actions=actions,
        )

    def critic_loss(batch: Batch, temperature: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        step = batch.next_step
        with torch.no_grad():
            actions, log_density = proposals(policy, batch.next_state, step, settings)
            weighed = decisions(lagging, batch.next_state, step, temperature)(actions)
            value = evidence(weighed, log_density)
        target = soft_target(batch.reward, batch.goes_on, value, discount)
        found = q(batch.state, batch.action, batch.step)
        return residual_loss(found, target), {"q": found.mean()}

    def policy_loss(batch: Batch, temperature: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        particles = drawn(policy, batch.state, batch.step, settings.particles)
        still, going = particles[:fixed].detach(), particles[fixed:]
        decide_on = decisions(q, batch.state, batch.step, temperature)
        slopes = score(still, decide_on)
        loss = sampler_loss(going, stein.direction(still, slopes, going.detach()))
        few = slice(MEASURED)
        with torch.no_grad():
            state, step = batch.state[few], batch.step[few]
            actions, log_density = proposals(policy, state, step, settings)
            weighed = decisions(q, state, step, temperature)(actions)
            entropy, divergence = posterior(weighed, log_density)
            size = stein.effective_size(weighed.log_joint - log_density)
            discrepancy = stein.discrepancy(still[:, few], slopes[:, few])
        return loss, {
            "entropy": entropy.mean(),
            "divergence": divergence.mean(),
            "effective_share": size.mean() / len(log_density),
            "stein_discrepancy": discrepancy.mean(),
        }

    return Learner(
        settings,
        model,
        prior,
        tempering,
        policy=policy,
        q=q,
        parts={
            "q": Part(q, critic_loss, [lagging, policy.sampler], settings.value_learning_rate),
            "policy": Part(policy.sampler, policy_loss, [q], settings.learning_rate),
        },
        lags={"q": Lag(lagging, q, settings.target_rate)},
    )
