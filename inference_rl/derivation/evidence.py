"""The messages of the posterior, and the evidence of a whole trajectory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyro
import torch
from pyro import poutine
from scipy.special import logsumexp
from torch import Tensor

from inference_rl.derivation import assumptions, regulator, sampled
from inference_rl.derivation.independent import (
    Array,
)
from inference_rl.derivation.joint import log_joint
from inference_rl.derivation.step import Check, DoesNotApplyError, Estimate, Side, Step, Twin
from inference_rl.derivation.subject import Subject, action_name, choices
from inference_rl.finite_messages import first_step, posterior_messages
from inference_rl.policies import TabularPolicy
from inference_rl.trajectory import trajectory

ENOUGH = 0.1
"""Share of the draws that have to count for their weights to be averaged."""

DRAWS = 4000
"""Trajectories of which weights are averaged."""


def starts_of(subject: Subject) -> Array:
    """States (of the excerpt) in which its trajectories begin and in which there is a choice."""
    model = subject.excerpt
    return ((model.initial > 0) & ~model.is_terminal).nonzero().squeeze(-1).numpy()


def start_names(subject: Subject) -> Sequence[str]:
    labels = subject.discounted_excerpt.state_labels
    assert labels is not None
    return [str(labels[s]) for s in starts_of(subject)]


def action_names(subject: Subject) -> Sequence[str]:
    assert subject.finite is not None
    return [action_name(subject.finite, a) for a in range(subject.finite.num_actions)]


def _summed_from(subject: Subject, *, with_prior: bool = True) -> Array:
    """log p(O | s_0), by sums over the trajectories from each start."""
    paths, log_p = subject.paths, log_joint(subject)
    if not with_prior:
        log_p = paths.log_start + paths.log_dynamics.sum(0)
        log_p = log_p + paths.rewards.sum(0) / subject.temperature
    return np.array(
        [
            logsumexp(log_p[here]) - paths.log_start[here][0]
            for here in (paths.states[0] == s for s in starts_of(subject))
        ]
    )


MESSAGES = Step(
    id="posterior-messages",
    title="Messages that run backwards",
    explanation=(
        "How likely is it that all goes well from a state on? Nobody needs to look at whole "
        "trajectories to know: a message that is passed backwards, step by step, has it all. "
        "Actions are averaged by the prior, and outcomes by the dynamics, both inside the "
        "logarithm. A discount is read as the chance of surviving a step."
    ),
    formulas=(
        r"Q^x(s, a) = \log \mathbb{E}_{s'}\left[ e^{r / \alpha + V^x(s')} \right]",
        r"V^x(s) = \log \sum_a \rho(a \mid s)\, e^{Q^x(s, a)} = \log p(O_{t:T} = 1 \mid s_t = s)",
    ),
    relation="=",
    unit="nats",
    checks=(
        Check(
            needs=(assumptions.listable,),
            left=Side(
                "the library's posterior messages over a few steps",
                lambda subject: posterior_messages(subject.excerpt, subject.temperature).v[0][
                    starts_of(subject)
                ],
            ),
            right=Side(
                "a sum over every single trajectory from that state, from the tables of the model",
                _summed_from,
            ),
            twin=Twin(
                "actions are added up in place of averaged by the prior",
                "right",
                lambda subject: _summed_from(subject, with_prior=False),
                blind=assumptions.no_choice,
            ),
            over=(start_names,),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §2.3",
    about=posterior_messages,
)


def _share_of_actions(subject: Subject) -> Array:
    """p(a_0 | s_0, O), (starts, A), by sums over trajectories; NaN for what is forbidden."""
    paths, log_p = subject.paths, log_joint(subject)
    starts = starts_of(subject)
    table = np.full((len(starts), subject.excerpt.num_actions), np.nan)
    for i, s in enumerate(starts):
        here = paths.states[0] == s
        whole = logsumexp(log_p[here])
        for a in np.unique(paths.actions[0][here]):
            taken = here & (paths.actions[0] == a)
            table[i, a] = np.exp(logsumexp(log_p[taken]) - whole)
    return table


def _likelihood_ratio(subject: Subject) -> Tensor:
    messages = posterior_messages(subject.excerpt, subject.temperature)
    starts = starts_of(subject)
    return (messages.q[0][starts] - messages.v[0][starts].unsqueeze(-1)).exp()


def _no_choice_at_first(subject: Subject) -> str | None:
    model = subject.excerpt
    if bool(choices(model)[model.initial > 0].any()):
        return None
    return "there is but one action to choose where trajectories start"


POSTERIOR_POLICY = Step(
    id="posterior-policy",
    title="What was done, given that all went well",
    explanation=(
        "By Bayes' rule the posterior of an action is its prior times how much more likely success "
        "is after it. This is a policy, and where nothing is random but the actions it is the best "
        "one. Where dynamics are random it is not: it tells what was done by those who were lucky."
    ),
    formulas=(r"p(a \mid s, O) = \rho(a \mid s)\, e^{Q^x(s, a) - V^x(s)}",),
    relation="=",
    unit="",
    checks=(
        Check(
            needs=(assumptions.listable,),
            left=Side(
                "the policy of the library's posterior messages",
                lambda subject: posterior_messages(subject.excerpt, subject.temperature).policy[0][
                    starts_of(subject)
                ],
            ),
            right=Side(
                "the share of the action among all trajectories, weighted by p(τ, O)",
                _share_of_actions,
            ),
            twin=Twin(
                "the prior in front is forgotten: the likelihood ratio alone",
                "left",
                _likelihood_ratio,
                blind=_no_choice_at_first,
            ),
            over=(start_names, action_names),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §2.3",
    about=posterior_messages,
)


def log_evidence(subject: Subject) -> float:
    """log p(O) of the excerpt by backward messages, nats."""
    messages = posterior_messages(subject.excerpt, subject.temperature)
    possible = subject.excerpt.initial > 0
    start = subject.excerpt.initial[possible].log() + first_step(messages.v)[possible]
    return float(start.logsumexp(0))


def _one_trajectory(subject: Subject) -> str | None:
    log_p = log_joint(subject)
    if len(log_p) == 1:
        return "there is but one trajectory"
    if logsumexp(log_p) - log_p.max() <= 1e-9 * subject.size("nats"):
        return "at so low a temperature one trajectory has all the weight"
    return None


EVIDENCE = Step(
    id="evidence",
    title="The evidence",
    explanation=(
        "The first message, averaged over the start, is the evidence: how likely it is that all "
        "goes well for someone who acts by habit. It sums over all ways in which that can happen, "
        "not over the best of them alone."
    ),
    formulas=(r"\log p(O) = \log \sum_\tau p(\tau, O) = \log \sum_{s_0} p(s_0)\, e^{V^x_0(s_0)}",),
    relation="=",
    unit="nats",
    checks=(
        Check(
            needs=(assumptions.listable,),
            left=Side("the library's posterior messages over a few steps", log_evidence),
            right=Side(
                "a sum over every single trajectory, from the tables of the model",
                lambda subject: float(logsumexp(log_joint(subject))),
            ),
            twin=Twin(
                "the likeliest trajectory alone: a maximum in place of the sum",
                "right",
                lambda subject: float(log_joint(subject).max()),
                blind=_one_trajectory,
            ),
        ),
        Check(
            needs=(assumptions.linear,),
            left=Side(
                "the library's Riccati recursion for the posterior, over a few steps",
                regulator.log_evidence,
            ),
            right=Side(
                "one Gaussian integral over all actions and all noise at once, by its determinant",
                regulator.integrated_evidence,
            ),
            twin=Twin(
                "the exponent of the likeliest trajectory, without the determinant",
                "right",
                lambda subject: regulator.integrated_evidence(subject, with_volume=False),
            ),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §2.3",
    about=posterior_messages,
)


# --- Weights --------------------------------------------------------------------------------------


def _proposal(subject: Subject) -> Array:
    """A guide (T, S, A) for weights: half the posterior's policy, half the prior."""
    messages = posterior_messages(subject.excerpt, subject.temperature)
    return (messages.policy.numpy() + subject.excerpt.log_prior.exp().numpy()) / 2


def _weights(subject: Subject, *, with_prior: bool = True) -> Estimate:
    """Mean of p(τ, O) / q(τ) over draws of the guide, relative to p(O)."""
    model, steps = subject.excerpt, int(subject.excerpt.horizon or 0)
    guide = TabularPolicy(torch.as_tensor(_proposal(subject)))
    with pyro.plate("trajectories", DRAWS):
        q = poutine.trace(trajectory).get_trace(model, guide, steps)
        replayed = poutine.replay(trajectory, q)
        p = poutine.trace(replayed).get_trace(
            model, model.action_prior, steps, temperature=subject.temperature
        )
    for trace in (q, p):
        trace.compute_log_prob()
    log_weight = torch.zeros(DRAWS, dtype=torch.float64)
    for sign, trace in ((1.0, p), (-1.0, q)):
        for name, node in trace.nodes.items():
            if "log_prob" in node and (with_prior or trace is q or not name.startswith("action")):
                log_weight = log_weight + sign * node["log_prob"]
    log_p = log_joint(subject)
    whole = float(logsumexp(log_p))
    # Of all trajectories, not of those that were drawn, which may have missed the heaviest.
    log_q = subject.paths.log_chance(_proposal(subject))
    variance = max(0.0, float(np.exp(2 * (log_p - whole) - log_q).sum()) - 1)
    weight = (log_weight - whole).exp()
    return Estimate(float(weight.mean()), np.sqrt(variance / DRAWS))


def _sampled_evidence(subject: Subject, name: str, *, with_guide: bool = True) -> Estimate:
    """p(O | s_0) by weights of a policy's draws, relative to that by another's."""
    rollouts = subject.rollouts(name)
    log_weight = rollouts.log_ratio
    if not with_guide:
        log_weight = log_weight + rollouts.log_guide.sum(0)
    return Estimate.of((log_weight - reference_weight(subject)).exp())


def reference_weight(subject: Subject) -> float:
    rollouts = subject.rollouts("guide")
    return float(rollouts.log_ratio.logsumexp(0)) - np.log(sampled.paths(subject))


def some_weight_dominates(subject: Subject) -> str | None:
    """Why sampled evidence cannot be trusted, or None."""
    for name in ("guide", "other guide"):
        share = subject.rollouts(name).log_ratio.softmax(0)
        effective = float(1 / share.square().sum())
        if effective < ENOUGH * len(share):
            return (
                f"at this temperature {effective:.0f} of {len(share):,} draws have most of the "
                "weight, too few to average; a higher one would do"
            )
    return None


def trusted_evidence(subject: Subject, name: str, *, with_guide: bool = True) -> Estimate:
    """`_sampled_evidence`, where no few draws have all the weight."""
    if (reason := some_weight_dominates(subject)) is not None:
        raise DoesNotApplyError(reason)
    return _sampled_evidence(subject, name, with_guide=with_guide)


WEIGHTS = Step(
    id="importance-weights",
    title="Weights estimate the evidence without bias",
    explanation=(
        "Trajectories that a guide draws, each weighted by p(τ, O) / q(τ), average to the evidence "
        "whatever the guide is. A good guide makes the weights alike, and they are exactly alike "
        "where it is the posterior. Their logarithms average to less: that is the bound of the "
        "next step."
    ),
    formulas=(
        r"\mathbb{E}_{\tau \sim q}\left[ \frac{p(\tau, O)}{q(\tau)} \right] = p(O)",
        r"\frac{p(\tau, O)}{q(\tau)} = \prod_t"
        r" \frac{\rho(a_t \mid s_t)\, e^{r_t / \alpha}}{\pi(a_t \mid s_t)}",
    ),
    relation="=",
    unit="",
    checks=(
        Check(
            needs=(assumptions.listable,),
            left=Side(
                f"the mean weight of {DRAWS:,} trajectories that the program drew, over the "
                "evidence; its standard error is from all trajectories",
                _weights,
            ),
            right=Side("one", lambda subject: 1.0),
            twin=Twin(
                "the action prior is left out of the weights",
                "left",
                lambda subject: _weights(subject, with_prior=False),
                blind=lambda subject: (
                    assumptions.one_action(subject) or assumptions.too_coarse(subject)
                ),
            ),
        ),
        Check(
            needs=(assumptions.drawn,),
            left=Side(
                "the mean weight of trajectories that one policy drew, relative to a reference",
                lambda subject: trusted_evidence(subject, "guide"),
            ),
            right=Side(
                "the mean weight of trajectories of another policy, relative to the same",
                lambda subject: trusted_evidence(subject, "other guide"),
            ),
            twin=Twin(
                "the density of the policy is left out of the weights",
                "left",
                lambda subject: trusted_evidence(subject, "guide", with_guide=False),
                blind=assumptions.too_coarse,
            ),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §3; Burda et al. (2016), arXiv:1509.00519, §3",
    about=trajectory,
)


STEPS = (
    MESSAGES,
    POSTERIOR_POLICY,
    EVIDENCE,
    WEIGHTS,
)
