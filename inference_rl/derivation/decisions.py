"""One decision as inference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from inference_rl import decision
from inference_rl.decision import decide
from inference_rl.derivation import assumptions, quadrature
from inference_rl.derivation.independent import (
    Array,
    divergence,
    soft_policy,
    soft_value,
)
from inference_rl.derivation.step import Check, Side, Step, Twin
from inference_rl.derivation.subject import Subject, choices, state_name
from inference_rl.distributions import as_probs
from inference_rl.policies import TabularPolicy
from inference_rl.simulate import starting_states

DECISIONS = 8
"""States in which one decision is looked at."""


def decisions(subject: Subject) -> tuple[Tensor, Array, Array, Array]:
    """Some states (N,), their prior and some policy, (N, A), and some Q, (N, A), reward units."""
    space = subject.model.action_space
    assert isinstance(space, Discrete)
    if subject.finite is not None:
        model = subject.finite
        live = (~model.is_terminal).nonzero().squeeze(-1)
        several = live[choices(model)[live]]
        states = spread_out(several if len(several) else live, DECISIONS)
        prior = model.log_prior.exp()[states].numpy()
    else:
        states = starting_states(subject.model, DECISIONS)
        prior = as_probs(subject.prior(states), int(space.n)).double().numpy()
    generator = subject.generator("decisions")
    q = 2 * subject.temperature * generator.normal(size=prior.shape)
    policy = soft_policy(generator.normal(size=prior.shape), prior, 1.0)
    return states, prior, policy, q


def spread_out(indices: Tensor, count: int) -> Tensor:
    """So many of them, evenly spread, or all."""
    places = np.linspace(0, len(indices) - 1, min(count, len(indices))).astype(int)
    return indices[np.unique(places)]


def decided(
    subject: Subject, states: Tensor, prior: Array, policy: Array, q: Array
) -> decision.Decision:
    """The program of one decision in every state, by all actions; tables as in `decisions`."""
    rows = torch.arange(len(states))
    return decide(
        rows,
        lambda state: TabularPolicy(torch.as_tensor(policy))(state),
        lambda state: TabularPolicy(torch.as_tensor(prior))(state),
        lambda _: torch.as_tensor(q).mT,
        temperature=torch.tensor(subject.temperature),
        action_space=subject.model.action_space,
        actions=decision.every_action(subject.model.action_space),
    )


def decision_names(subject: Subject) -> Sequence[str]:
    """What to call the states of `decisions`."""
    if subject.finite is None:
        return [f"start {i + 1}" for i in range(DECISIONS)]
    return [state_name(subject.finite, int(state)) for state in decisions(subject)[0]]


def _bound_and_gap(subject: Subject, sign: float) -> Array:
    states, prior, policy, q = decisions(subject)
    bound = decision.bound(decided(subject, states, prior, policy, q))[0].numpy()
    paid = (1 - sign) * divergence(policy, prior)
    best = soft_policy(q, prior, subject.temperature)
    return np.asarray(bound + subject.temperature * (divergence(policy, best) + paid))


DECISION = Step(
    id="one-decision",
    title="One decision",
    explanation=(
        "Suppose that action a is worth Q(a), and that being far from one's habits ρ has a price, "
        "the temperature for every nat. Whoever weighs both does best by the policy ρ e^{Q/α}, "
        "normalised, and what is best is the logarithm of its normaliser. Every other policy falls "
        "short of that by α times its divergence from the best one. So deciding is inferring: the "
        "best policy is a posterior, and V its log-evidence."
    ),
    formulas=(
        r"V = \alpha \log \sum_a \rho(a)\, e^{Q(a) / \alpha}",
        r"V = \mathbb{E}_\pi\left[ Q(a) - \alpha \log \frac{\pi(a)}{\rho(a)} \right]"
        r" + \alpha\, \mathrm{KL}(\pi \,\|\, \pi^*)",
        r"\pi^*(a) = \rho(a)\, e^{(Q(a) - V) / \alpha}",
    ),
    relation="=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.discrete,),
            left=Side(
                "α times the log-mean-exp of some Q under the prior, by SciPy",
                lambda subject: soft_value(*_q_and_prior(subject), subject.temperature),
            ),
            right=Side(
                "the bound of some policy by the Pyro program of one decision, plus α times its "
                "divergence from the best one, by its definition",
                lambda subject: _bound_and_gap(subject, 1.0),
            ),
            twin=Twin(
                "the divergence from the prior is paid out in place of being paid for",
                "right",
                lambda subject: _bound_and_gap(subject, -1.0),
                blind=assumptions.one_action,
            ),
            over=(decision_names,),
        ),
        Check(
            needs=(assumptions.small_box,),
            left=Side(
                "an integral of ρ e^{Q/α} over the box, by Gauss-Legendre quadrature, of some Q",
                quadrature.evidence,
            ),
            right=Side(
                "the program of one decision, by draws of a policy that are weighted by ρ/π",
                lambda subject: quadrature.weighted_evidence(subject, quadrature.MANY),
            ),
            twin=Twin(
                "the density of the draws is forgotten in their weights",
                "right",
                lambda subject: quadrature.weighted_evidence(
                    subject, quadrature.MANY, with_density=False
                ),
            ),
            tolerance=1e-8,
            over=(quadrature.names,),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §2.3; Todorov (2009), doi:10.1073/pnas.0710743106",
    about=decide,
)


def _q_and_prior(subject: Subject) -> tuple[Array, Array]:
    _, prior, _, q = decisions(subject)
    return q, prior


STEPS = (DECISION,)
