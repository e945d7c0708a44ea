"""What soft DDPG and soft TD3 share: a guide of fixed width, its backups, and their learner.

The guide of one decision (`decision`) is a = tanh u, u ~ N(μ(s), width²), in which only μ is
learned. Squashed, and not clipped to the box: clipping leaves mass on the edges, and its divergence
from any prior with a density is infinite. As the width goes to zero the guide becomes the point
tanh μ(s), the actor of DDPG and TD3, the gradient of its bound becomes theirs, ∇_a Q · ∂ tanh μ,
and at temperature zero so do the losses: nothing else is added to either.

Three values of what follows, of the same decision; α is the temperature:

1. elbo: E_q[Q − α log q/ρ], the bound that the guide itself has, in an update of one draw.
2. logsumexp: α log E_q[e^{Q/α} ρ/q] = α log ∫ ρ e^{Q/α}, the evidence, as soft Q-learning has it,
   with the guide as proposal (1702.08165). Of K draws it lies between 1 and that in expectation
   (Burda et al., 1509.00519).
3. boltzmann: E_q[e^{Q/α} (ρ/q) Q] / E_q[e^{Q/α} ρ/q], the mean of Q under the posterior. That is no
   log-sum-exp, and no evidence: it is larger, by α · KL(posterior ‖ ρ), for it pays for no
   divergence (SD3, 2010.09177, where ρ is uniform and 1/α is β).

2 and 3 see what the guide draws. Their weights, ρ/q, grow towards the edges of the box without any
bound on their variance, and a narrow guide tells of its own neighbourhood alone. At temperature
zero both are the greatest Q among the draws.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from gymnasium.spaces import Box, Space
from torch import Tensor

from inference_rl.action_values import ActionValues
from inference_rl.decision import Decision, bound, decide, evidence
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
from inference_rl.networks import Architecture, NetworkPolicy, described
from inference_rl.policies import Policy
from inference_rl.priors import ActionPrior, moved

Message = Callable[[Tensor], Tensor]
"""Of actions, (..., d), what follows them in given states; reward units."""


def boltzmann(decision: Decision, log_proposal: Tensor) -> Tensor:
    """E[Q | s, O], the mean of Q under the posterior of a decision; reward units, (N,).

    :param log_proposal: of which density the actions were drawn, K of them for each state, (K, N)
        nats. They are weighted by posterior / density, normalised over the K.
    """
    weight = (decision.log_joint - log_proposal).softmax(0)
    return (weight * decision.temperature * decision.log_weight).sum(0)


def backed_up(decision: Decision, backup: Literal["elbo", "logsumexp", "boltzmann"]) -> Tensor:
    """The value of a decision by the draws of its guide; reward units, (N,)."""
    if backup == "elbo":
        return bound(decision, drawn=True)[0]
    kinds = {"logsumexp": evidence, "boltzmann": boltzmann}
    return kinds[backup](decision, decision.log_guide)


def considered(
    guide: Policy,
    prior: ActionPrior,
    message: Message,
    state: Tensor,
    step: Tensor,
    *,
    temperature: Tensor,
    action_space: Space[Any],
    draws: int | None = None,
) -> Decision:
    """The decision in N states by one draw of the guide in each, or by `draws` of them, (K, N)."""
    distribution, states = guide(state, step), state
    if draws is not None:
        distribution = distribution.expand((draws, len(state)))
        states = state.expand(draws, *state.shape)
    return decide(
        states,
        lambda *_: distribution,
        prior,
        message,
        temperature=temperature,
        action_space=action_space,
    )


def width_at(settings: Any, steps: int) -> float:
    """From `width` to `final_width`, if there is one, by equal factors over the run."""
    if settings.final_width is None:
        return float(settings.width)
    share = min(steps / settings.total_steps, 1.0)
    return float(settings.width * (settings.final_width / settings.width) ** share)


def check_actions(model: EnvironmentModel) -> None:
    """:raises TypeError: the actions are no box with bounds."""
    space = model.action_space
    if not (isinstance(space, Box) and space.is_bounded()):
        raise TypeError(
            f"action_space: expected a box with bounds for a guide of fixed width, got {space}; "
            + (
                "give it bounds, or use policy-gradient, which needs none"
                if isinstance(space, Box)
                else "use sac or sql for discrete actions"
            )
        )


def learner(
    settings: Any,
    model: EnvironmentModel,
    prior: ActionPrior,
    *,
    critics: int,
    every: int = 1,
    smoothed: Callable[[Tensor], Tensor] = lambda action: action,
) -> Learner:
    """The learner of a guide of fixed width, of which both it and Q have a lagging copy.

    :param critics: Qs, of whose lagging copies the least counts; the guide follows the first.
    :param every: updates of Q between those of the guide and of what lags.
    :param smoothed: what becomes of the guide's actions before the lagging Q sees them.
    """
    space, discount = model.action_space, float(model.discount)
    architecture = Architecture(
        states=described(model.state_space),
        actions=described(space),
        horizon=model.horizon,
        hidden=tuple(settings.hidden),
        activation=settings.activation,
        scaled=settings.scale_observations,
        squashed=True,
        width=float(settings.width),
    )
    policy, q = NetworkPolicy(architecture), ActionValues(architecture, critics)
    behind = copy.deepcopy(policy).requires_grad_(False)
    q_behind = copy.deepcopy(q).requires_grad_(False)
    for module in (policy, q, behind, q_behind):
        module.to(settings.device)
    there = moved(prior, settings.device)
    draws = None if settings.backup == "elbo" else settings.samples

    def narrow(steps: int) -> None:
        for guide in (policy, behind):
            guide.width.fill_(width_at(settings, steps))

    def critic_loss(batch: Batch, temperature: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        state, step = batch.next_state, batch.next_step

        def message(action: Tensor) -> Tensor:
            return q_behind(state, smoothed(action), step).amin(0)

        with torch.no_grad():
            following = considered(
                behind,
                there,
                message,
                state,
                step,
                temperature=temperature,
                action_space=space,
                draws=draws,
            )
            value = backed_up(following, settings.backup)
        target = soft_target(batch.reward, batch.goes_on, value, discount)
        found = q(batch.state, batch.action, batch.step)
        return residual_loss(found, target), {"q": found.mean(), **_spread(following)}

    def policy_loss(batch: Batch, temperature: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        def message(action: Tensor) -> Tensor:
            return q(batch.state, action, batch.step)[0]

        here = considered(
            policy,
            there,
            message,
            batch.state,
            batch.step,
            temperature=temperature,
            action_space=space,
        )
        return -bound(here)[0].mean(), _spread(here)

    rates = settings.value_learning_rate, settings.learning_rate
    return Learner(
        settings,
        model,
        prior,
        learned.Tempering(settings, model, prior),
        policy=policy,
        q=q,
        parts={
            "q": Part(q, critic_loss, [q_behind, behind], rates[0]),
            "policy": Part(policy, policy_loss, [q], rates[1], every),
        },
        lags={
            "q": Lag(q_behind, q, settings.target_rate, every),
            "policy": Lag(behind, policy, settings.target_rate, every),
        },
        schedule=narrow,
    )


def _spread(decision: Decision) -> dict[str, Tensor]:
    """Of the guide, nats: what is logged of either loss, because the guide's is not always due."""
    log_ratio = decision.log_guide - decision.log_prior
    return {"entropy": -decision.log_guide.mean(), "divergence": log_ratio.mean()}
