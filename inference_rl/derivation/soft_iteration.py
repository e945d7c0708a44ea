"""Soft policy iteration, and the critic and the actor that do it from samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from inference_rl import decision
from inference_rl.backups import control_q
from inference_rl.backups import soft_policy as library_policy
from inference_rl.decision import decide
from inference_rl.derivation import assumptions
from inference_rl.derivation.control import live
from inference_rl.derivation.decisions import decision_names, decisions
from inference_rl.derivation.evidence import action_names
from inference_rl.derivation.independent import Array, divergence, soft_policy
from inference_rl.derivation.step import Check, Side, Step, Twin
from inference_rl.derivation.subject import Subject
from inference_rl.distributions import log_or_impossible
from inference_rl.policies import TabularPolicy


def _value_of_policy(subject: Subject) -> Array:
    return subject.tables.value(subject.policy, subject.temperature)


def _value_of_prior(subject: Subject) -> Array:
    return subject.tables.value(subject.tables.prior, subject.temperature)


def _improved(subject: Subject) -> Array:
    """The value of the library's policy against the Q of the prior."""
    q = control_q(subject.whole, torch.as_tensor(_value_of_prior(subject)))
    better = library_policy(q, subject.whole.log_prior, subject.temperature)
    return subject.tables.value(better.numpy(), subject.temperature)


def _worsened(subject: Subject) -> Array:
    """The same with the wrong sign; and tilted so little that episodes still end."""
    tables = subject.tables
    q = tables.action_value(_value_of_prior(subject))
    worse = soft_policy(-q, tables.prior, max(subject.temperature, _spread(subject)))
    return tables.value(worse, subject.temperature)


def _spread(subject: Subject) -> float:
    """By how much the Q of the prior varies over actions, at most."""
    tables = subject.tables
    q = np.where(tables.prior > 0, tables.action_value(_value_of_prior(subject)), np.nan)
    q = q[tables.live]
    return float((np.nanmax(q, axis=-1) - np.nanmin(q, axis=-1)).max())


def _no_better_action(subject: Subject) -> str | None:
    if _spread(subject) <= 1e-9 * subject.size("reward"):
        return "no action is better than another in any state"
    return None


POLICY_ITERATION = Step(
    id="soft-policy-iteration",
    title="Soft policy iteration only improves",
    explanation=(
        "Evaluate a policy, and take in every state the posterior of the one decision that its Q "
        "poses. The new policy is better in every state, or it was the best one already. Repeated, "
        "this is soft policy iteration, of which soft actor-critic is a version with networks and "
        "samples."
    ),
    formulas=(
        r"\pi'(a \mid s) \propto \rho(a \mid s)\, e^{Q^\pi(s, a) / \alpha}",
        r"V^\pi(s) \le V^{\pi'}(s) \le V^*(s)",
    ),
    relation="<=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.solvable,),
            left=Side(
                "the value of the prior as a policy, and that of the improved one, by linear "
                "solves",
                lambda subject: np.array(
                    [live(subject, _value_of_prior(subject)), live(subject, _improved(subject))]
                ),
            ),
            right=Side(
                "the value of the policy that the library improves it to, and that of the best "
                "policy, by policy iteration to the end",
                lambda subject: np.array(
                    [live(subject, _improved(subject)), live(subject, subject.best_value)]
                ),
            ),
            twin=Twin(
                "a cost is taken for a reward: the sign of Q is wrong",
                "right",
                lambda subject: np.array(
                    [live(subject, _worsened(subject)), live(subject, subject.best_value)]
                ),
                blind=_no_better_action,
            ),
            tolerance=1e-9,
            over=(("after one improvement", "in the end"), "state"),
        ),
    ),
    reference="Haarnoja et al. (2018), arXiv:1801.01290, lemma 2 and theorem 1",
    about=library_policy,
)


def decide_everywhere(subject: Subject, q: Tensor, policy: Tensor) -> decision.Decision:
    """The program of one decision in every state of the whole."""
    return decide(
        torch.arange(subject.whole.num_states),
        TabularPolicy(policy),
        lambda state: TabularPolicy(subject.whole.log_prior.exp())(state),
        lambda _: q.mT,
        temperature=torch.tensor(subject.temperature),
        action_space=subject.whole.action_space,
        actions=decision.every_action(subject.whole.action_space),
    )


def _bound_everywhere(subject: Subject, *, with_divergence: bool = True) -> Array:
    """E_π[Q^π − α log π/ρ] in every state, by Pyro."""
    q = control_q(subject.whole, torch.as_tensor(_value_of_policy(subject)))
    policy = torch.as_tensor(subject.policy)
    if not with_divergence:
        return live(subject, np.asarray((policy * torch.where(policy > 0, q, 0.0)).sum(-1)))
    return live(subject, np.asarray(decision.bound(decide_everywhere(subject, q, policy))[0]))


CRITIC = Step(
    id="sac-critic",
    title="SAC's critic: the bound of one decision is the value",
    explanation=(
        "Cut the program after one step, and let Q stand for that step and all that follow. The "
        "bound of that one decision is the soft value of the policy: soft actor-critic's target "
        "for Q. So every update of its critic makes one small trajectory program agree with the "
        "next."
    ),
    formulas=(
        r"Q^\pi(s, a) = \bar r(s, a) + \gamma\, \mathbb{E}_{s'}\left[ V^\pi(s') \right]",
        r"V^\pi(s) = \mathbb{E}_\pi\left[ Q^\pi(s, a)"
        r" - \alpha \log \frac{\pi(a \mid s)}{\rho(a \mid s)} \right]",
    ),
    relation="=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.solvable,),
            left=Side(
                "the bound of some policy by the Pyro program of one decision, with its Q as "
                "message",
                _bound_everywhere,
            ),
            right=Side(
                "the value of that policy, by a linear solve over all states",
                lambda subject: live(subject, _value_of_policy(subject)),
            ),
            twin=Twin(
                "the mean of Q alone: the divergence is left out of the value",
                "left",
                lambda subject: _bound_everywhere(subject, with_divergence=False),
                blind=assumptions.one_action,
            ),
            tolerance=1e-9,
            over=("state",),
        ),
    ),
    reference="Haarnoja et al. (2018), arXiv:1801.01290, eqs. 2 and 3",
    about=decision.bound,
)


def _actor_gradient(subject: Subject) -> Array:
    """∂/∂logits of the bound, by autograd through the program."""
    states, prior, policy, q = decisions(subject)
    logits = log_or_impossible(torch.as_tensor(policy)).clamp(min=-1e3).requires_grad_()
    forbidden = torch.as_tensor(prior) == 0
    probs = torch.where(forbidden, -torch.inf, logits).softmax(-1)
    found = decide(
        torch.arange(len(states)),
        TabularPolicy(probs),
        lambda state: TabularPolicy(torch.as_tensor(prior))(state),
        lambda _: torch.as_tensor(q).mT,
        temperature=torch.tensor(subject.temperature),
        action_space=subject.model.action_space,
        actions=decision.every_action(subject.model.action_space),
    )
    (gradient,) = torch.autograd.grad(decision.bound(found)[0].sum(), logits)
    return np.where(prior > 0, gradient.numpy(), np.nan)


def _projection_gradient(subject: Subject, *, with_divergence: bool = True) -> Array:
    """−α ∂KL(π ‖ ρ e^{Q/α} / Z)/∂logits, by hand."""
    _, prior, policy, q = decisions(subject)
    if not with_divergence:
        slope = q - (policy * q).sum(-1, keepdims=True)
        return np.where(prior > 0, policy * slope, np.nan)
    best = soft_policy(q, prior, subject.temperature)
    ratio = np.log(np.where(prior > 0, policy, 1.0)) - np.log(np.where(prior > 0, best, 1.0))
    slope = ratio - divergence(policy, best)[:, None]
    return np.where(prior > 0, -subject.temperature * policy * slope, np.nan)


def _decision_actions(subject: Subject) -> Sequence[str]:
    count = decisions(subject)[1].shape[1]
    if subject.finite is not None:
        return action_names(subject)
    return [f"action {a}" for a in range(count)]


ACTOR = Step(
    id="sac-actor",
    title="SAC's actor: projecting onto a posterior",
    explanation=(
        "Where the policy cannot simply be set, as with a network, its bound is raised by "
        "gradients. They are those of the divergence from the posterior of one decision: soft "
        "actor-critic projects its policy onto ρ e^{Q/α}. Without the divergence the same gradient "
        "climbs Q alone, and the policy collapses onto one action."
    ),
    formulas=(
        r"\nabla_\theta\, \mathbb{E}_{\pi_\theta}\left[ Q - \alpha \log \frac{\pi_\theta}{\rho}"
        r" \right] = -\alpha\, \nabla_\theta\, \mathrm{KL}\left( \pi_\theta \,\middle\|\,"
        r" \frac{\rho\, e^{Q / \alpha}}{Z} \right)",
    ),
    relation="=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.discrete,),
            left=Side(
                "autograd through the Pyro program of one decision, by the logits of some policy",
                _actor_gradient,
            ),
            right=Side("the gradient of the divergence, by hand", _projection_gradient),
            twin=Twin(
                "the divergence is left out: the policy climbs Q alone",
                "right",
                lambda subject: _projection_gradient(subject, with_divergence=False),
                blind=assumptions.one_action,
            ),
            over=(decision_names, _decision_actions),
        ),
    ),
    reference="Haarnoja et al. (2018), arXiv:1801.01290, eq. 10",
    about=decision.bound,
)


STEPS = (
    POLICY_ITERATION,
    CRITIC,
    ACTOR,
)
