"""Soft Q-learning of discrete actions: sums over all of them, and a policy that needs no fit."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inference_rl.action_values import ActionValues
from inference_rl.decision import Decision, decide, every_action, evidence, posterior
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
from inference_rl.softmax_policy import SoftmaxPolicy

if TYPE_CHECKING:
    from inference_rl.inference.sql import SQL


def learner(
    settings: SQL, model: EnvironmentModel, prior: ActionPrior, architecture: Architecture
) -> Learner:
    """:raises TypeError: too many combinations of actions to sum over."""
    space, discount = model.action_space, float(model.discount)
    actions = every_action(space)
    assert actions is not None
    tempering = learned.Tempering(settings, model, prior)
    q = ActionValues(architecture, 1)
    log_prior = learned.log_prior_table(model, prior, actions)
    support = None if log_prior is not None else learned.support_of(model, prior)
    policy = SoftmaxPolicy(
        architecture,
        q,
        tempering.temperature,
        log_prior=log_prior,
        support=support,
        prior=None if support is None else prior,
    )
    lagging = copy.deepcopy(q).requires_grad_(False)
    for module in (policy, lagging):
        module.to(settings.device)
    actions, there = actions.to(settings.device), moved(prior, settings.device)

    def decision(state: Tensor, values: Tensor, temperature: Tensor) -> Decision:
        """:param values: of all actions, which come in this order, (N, A)."""
        return decide(
            state,
            there,
            there,
            lambda _: values.mT,
            temperature=temperature,
            action_space=space,
            actions=actions,
        )

    def loss(batch: Batch, temperature: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        (values,) = q(batch.state, None, batch.step)
        with torch.no_grad():
            (following,) = lagging(batch.next_state, None, batch.next_step)
            value = evidence(decision(batch.next_state, following, temperature))
            here = decision(batch.state, values, temperature)
            entropy, divergence = posterior(here)
        target = soft_target(batch.reward, batch.goes_on, value, discount)
        found = values.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1)
        logged = {"q": found.mean(), "entropy": entropy.mean(), "divergence": divergence.mean()}
        return residual_loss(found, target), logged

    return Learner(
        settings,
        model,
        prior,
        tempering,
        policy=policy,
        q=q,
        parts={"q": Part(q, loss, [lagging], settings.value_learning_rate)},
        lags={"q": Lag(lagging, q, settings.target_rate)},
    )
