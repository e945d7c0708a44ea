"""The evidence lower bound, what it leaves, and the optimism of the posterior."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from scipy.special import logsumexp
from torch import Tensor

from inference_rl.derivation import assumptions, regulator
from inference_rl.derivation.evidence import (
    action_names,
    log_evidence,
    reference_weight,
    some_weight_dominates,
    starts_of,
    trusted_evidence,
)
from inference_rl.derivation.independent import Array
from inference_rl.derivation.joint import log_joint
from inference_rl.derivation.step import Check, DoesNotApplyError, Estimate, Side, Step, Twin
from inference_rl.derivation.subject import Subject
from inference_rl.finite import FiniteModel
from inference_rl.finite_messages import (
    control_messages,
    posterior_messages,
    posterior_transition,
)
from inference_rl.inference.exact_finite import evidence_gap
from inference_rl.policies import TabularPolicy
from inference_rl.trajectory import trajectory


def enumerated_bound(model: FiniteModel, policy: Array, temperature: float) -> float:
    """ELBO of a policy, nats, by Pyro: every site of model and guide is enumerated."""
    assert model.horizon is not None
    guide, steps = TabularPolicy(torch.as_tensor(policy)), model.horizon
    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(
        lambda: trajectory(model, model.action_prior, steps, temperature=temperature),
        config_enumerate(lambda: trajectory(model, guide, steps)),
    )
    return -float(loss)


def bound_of_some_policy(subject: Subject) -> float:
    """ELBO of some policy on the excerpt, nats."""
    policy = subject.some_policy(subject.excerpt)
    return enumerated_bound(subject.excerpt, policy, subject.temperature)


def _log_q(subject: Subject) -> Array:
    return subject.paths.log_chance(subject.some_policy(subject.excerpt))


def _log_posterior(subject: Subject) -> Array:
    log_p = log_joint(subject)
    return np.asarray(log_p - logsumexp(log_p))


# --- The bound and its gap ------------------------------------------------------------------------


def _bound_from_above(subject: Subject) -> float:
    """E under p(τ | O) of log p(τ, O) / q(τ)."""
    return float(np.exp(_log_posterior(subject)) @ (log_joint(subject) - _log_q(subject)))


def _sampled_bound(subject: Subject) -> Estimate:
    if (reason := some_weight_dominates(subject)) is not None:
        raise DoesNotApplyError(reason)
    return Estimate.of(subject.rollouts("guide").log_ratio)


def _sampled_log_evidence(subject: Subject) -> Estimate:
    found = trusted_evidence(subject, "other guide")
    return Estimate(
        reference_weight(subject) + np.log(found.value), found.standard_error / found.value
    )


def _sampled_bound_from_above(subject: Subject) -> Estimate:
    log_ratio = subject.rollouts("guide").log_ratio
    share = log_ratio.softmax(0)
    mean = float(share @ log_ratio)
    spread = float((share.square() @ (log_ratio - mean).square()).sqrt())
    return Estimate(mean, spread)


def _guide_is_posterior(subject: Subject) -> str | None:
    apart = max(abs(_divergence(subject)), abs(_reversed_divergence(subject)))
    if apart <= 1e-9 * subject.size("nats"):
        return "the guide is the posterior: there is nothing to choose, and no luck"
    return None


BOUND = Step(
    id="elbo",
    title="A bound on the evidence",
    explanation=(
        "Take any guide q(τ) that draws trajectories, and average log p(τ, O) − log q(τ) over its "
        "draws. By Jensen's inequality that is never more than the log-evidence. So it is a bound "
        "that one may raise without knowing what it bounds."
    ),
    formulas=(
        r"\mathrm{ELBO}(q) = \mathbb{E}_{\tau \sim q}\left[ \log p(\tau, O) - \log q(\tau) \right]"
        r" \le \log p(O)",
    ),
    relation="<=",
    unit="nats",
    checks=(
        Check(
            needs=(assumptions.listable,),
            left=Side(
                "the bound of some policy by Pyro, which enumerates every site of the program",
                bound_of_some_policy,
            ),
            right=Side(
                "log of the sum over every single trajectory, from the tables of the model",
                lambda subject: float(logsumexp(log_joint(subject))),
            ),
            twin=Twin(
                "the average is over the posterior in place of the guide: a bound from above",
                "left",
                _bound_from_above,
                blind=_guide_is_posterior,
            ),
        ),
        Check(
            needs=(assumptions.drawn,),
            left=Side(
                "the mean log-weight of trajectories that the program drew under some policy",
                _sampled_bound,
            ),
            right=Side(
                "the log of the mean weight of trajectories of another policy",
                _sampled_log_evidence,
            ),
            twin=Twin(
                "the average is over the posterior in place of the guide: a bound from above",
                "left",
                _sampled_bound_from_above,
                blind=assumptions.too_coarse,
            ),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §3.2; Jordan et al. (1999), Machine Learning 37",
    about=trajectory,
)


def _gap(subject: Subject) -> float:
    return log_evidence(subject) - bound_of_some_policy(subject)


def _divergence(subject: Subject) -> float:
    log_q = _log_q(subject)
    return float(np.exp(log_q) @ (log_q - _log_posterior(subject)))


def _reversed_divergence(subject: Subject) -> float:
    log_p = _log_posterior(subject)
    return float(np.exp(log_p) @ (log_p - _log_q(subject)))


GAP = Step(
    id="elbo-gap",
    title="What the bound leaves is a divergence",
    explanation=(
        "How much of the evidence the bound leaves is exactly the divergence of the guide from the "
        "posterior p(τ | O), whatever the guide is. So whoever raises the bound brings the guide "
        "closer to the posterior. The bound is tight for one guide only, the posterior itself."
    ),
    formulas=(
        r"\log p(O) - \mathrm{ELBO}(q) = \mathrm{KL}\left( q(\tau) \,\|\, p(\tau \mid O) \right)",
        r"\mathrm{KL}(q \,\|\, p) = \sum_\tau q(\tau) \log \frac{q(\tau)}{p(\tau \mid O)} \ge 0",
    ),
    relation="=",
    unit="nats",
    checks=(
        Check(
            needs=(assumptions.listable,),
            left=Side(
                "log p(O) by backward messages, less the bound of some policy by Pyro, which "
                "enumerates every site of the program",
                _gap,
            ),
            right=Side(
                "a sum over every single trajectory, from the tables of the model", _divergence
            ),
            twin=Twin(
                "the divergence is taken the other way round, KL(p ‖ q)",
                "right",
                _reversed_divergence,
                blind=_guide_is_posterior,
            ),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §3.2; Blei et al. (2017), arXiv:1601.00670, §2.2",
    about=trajectory,
)


# --- Optimism -------------------------------------------------------------------------------------


def _first_transitions(subject: Subject) -> list[tuple[int, int, int]]:
    """State, action and non-zero of the excerpt for every first step that can happen."""
    model, found = subject.excerpt, []
    for s in starts_of(subject):
        for a in np.flatnonzero(model.log_prior[s].exp().numpy() > 0):
            row = int(s) * model.num_actions + int(a)
            for k in range(int(model.pointers[row]), int(model.pointers[row + 1])):
                if model.probabilities[k] > 0:
                    found.append((int(s), int(a), k))
    return found


def _outcome_names(subject: Subject) -> Sequence[str]:
    labels = subject.discounted_excerpt.state_labels
    assert labels is not None
    actions, size = action_names(subject), len(labels)
    names = []
    for s, a, k in _first_transitions(subject):
        survives, after = divmod(int(subject.excerpt.successors[k]), size)
        dies = ", not surviving" if survives else ""
        names.append(f"{labels[s]}, {actions[a]}, to {labels[after]}{dies}")
    return names


def _posterior_outcomes(subject: Subject) -> Tensor:
    model = subject.excerpt
    table = posterior_transition(
        model, posterior_messages(model, subject.temperature), subject.temperature
    )
    return table[0][[k for _, _, k in _first_transitions(subject)]]


def _outcomes_of_trajectories(subject: Subject) -> Array:
    paths, log_p = subject.paths, log_joint(subject)
    shares = []
    for s, a, k in _first_transitions(subject):
        taken = (paths.states[0] == s) & (paths.actions[0] == a)
        there = taken & (paths.states[1] == int(subject.excerpt.successors[k]))
        shares.append(np.exp(logsumexp(log_p[there]) - logsumexp(log_p[taken])))
    return np.array(shares)


def _true_outcomes(subject: Subject) -> Tensor:
    return subject.excerpt.probabilities[[k for _, _, k in _first_transitions(subject)]]


def _no_luck(subject: Subject) -> str | None:
    moved = np.abs(_outcomes_of_trajectories(subject) - _true_outcomes(subject).numpy()).max()
    return "no outcome is luckier than another" if moved <= 1e-9 else None


POSTERIOR_DYNAMICS = Step(
    id="posterior-dynamics",
    title="The posterior's dynamics are optimistic",
    explanation=(
        "Given that all went well, chance was kind: the posterior tilts every random outcome "
        "towards those after which success is likely. No environment behaves like that. Whoever "
        "acts by the posterior's policy therefore counts on luck, and buys lottery tickets. Where "
        "there is a discount, surviving a step is luck too."
    ),
    formulas=(
        r"p(s' \mid s, a, O) = p(s' \mid s, a)\, \frac{e^{r / \alpha + V^x(s')}}{e^{Q^x(s, a)}}",
    ),
    relation="=",
    unit="",
    assumptions=(assumptions.luck,),
    checks=(
        Check(
            left=Side(
                "the library's posterior dynamics, from its messages over a few steps",
                _posterior_outcomes,
            ),
            right=Side(
                "the share of the outcome among all trajectories, weighted by p(τ, O)",
                _outcomes_of_trajectories,
            ),
            twin=Twin(
                "the dynamics of the model, as if success said nothing about chance",
                "left",
                _true_outcomes,
                blind=_no_luck,
            ),
            over=(_outcome_names,),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §2.4 and §3.1",
    about=posterior_transition,
)


def _gap_in_parts(subject: Subject, *, with_dynamics: bool = True) -> float:
    model, alpha = subject.excerpt, subject.temperature
    gap = evidence_gap(
        model, alpha, control_messages(model, alpha), posterior_messages(model, alpha)
    )
    return gap.start + gap.policy + (gap.dynamics if with_dynamics else 0.0)


def _evidence_less_best_bound(subject: Subject) -> float:
    best = control_messages(subject.excerpt, subject.temperature).policy.numpy()
    bound = enumerated_bound(subject.excerpt, best, subject.temperature)
    return float(logsumexp(log_joint(subject))) - bound


def _linear_gap_in_parts(subject: Subject, *, with_dynamics: bool = True) -> float:
    gap = regulator.posterior(subject).gap
    assert gap is not None
    return float(gap.start + gap.policy + (gap.dynamics if with_dynamics else 0.0))


def _linear_evidence_less_best_bound(subject: Subject) -> float:
    model = regulator.excerpt(subject, discount=1.0)
    arrays = regulator.Arrays.of(model)
    form = regulator.best_form(subject, model, temperature_pays=True)
    second = np.outer(arrays.start, arrays.start) + arrays.start_noise
    value = -float((form * second).sum())
    return regulator.integrated_evidence(subject) - value / subject.temperature


def _certain_regulator(subject: Subject) -> str | None:
    assert subject.linear is not None
    random = bool(subject.linear.noise_covariance.any() | subject.linear.initial_covariance.any())
    return None if random else "nothing is random but the actions, and the price is 0 nats"


def _no_worth_of_luck(subject: Subject) -> str | None:
    if (reason := _no_luck(subject)) is not None:
        return reason
    worth = _gap_in_parts(subject) - _gap_in_parts(subject, with_dynamics=False)
    if worth <= 1e-9 * max(1.0, subject.size("nats")):
        return "at so high a temperature luck is worth next to nothing"
    return None


OPTIMISM = Step(
    id="price-of-optimism",
    title="The price of optimism, in nats",
    explanation=(
        "A guide that has to keep the environment's dynamics cannot be the posterior, because it "
        "must not wish for luck. What it gives up is a sum of three divergences along its own "
        "trajectories: of the start, of the actions, and of the outcomes. It is the distance of "
        "planning as posterior inference from optimal control, and zero exactly where nothing is "
        "random but the actions."
    ),
    formulas=(
        r"\log p(O) - \max_\pi \mathrm{ELBO}(\pi) = \mathrm{KL}(p_0 \,\|\, p_0^x) + \sum_t"
        r" \mathbb{E}_{\pi^*}\left[ \mathrm{KL}(\pi^* \,\|\, \pi^x)"
        r" + \mathrm{KL}(P \,\|\, P^x) \right]",
    ),
    relation="=",
    unit="nats",
    checks=(
        Check(
            needs=(assumptions.luck,),
            left=Side(
                "the library's three divergences, each computed for itself and added up",
                _gap_in_parts,
            ),
            right=Side(
                "log of the sum over every single trajectory, less the bound of the best policy by "
                "Pyro, which enumerates the program",
                _evidence_less_best_bound,
            ),
            twin=Twin(
                "the divergence of the dynamics is left out, as if nothing were random",
                "left",
                lambda subject: _gap_in_parts(subject, with_dynamics=False),
                blind=_no_worth_of_luck,
            ),
        ),
        Check(
            needs=(assumptions.linear,),
            left=Side(
                "the library's three divergences, over a few steps",
                _linear_gap_in_parts,
            ),
            right=Side(
                "one Gaussian integral over everything random, less the best bound by a Riccati "
                "recursion in NumPy",
                _linear_evidence_less_best_bound,
            ),
            twin=Twin(
                "the divergence of the dynamics is left out, as if nothing were random",
                "left",
                lambda subject: _linear_gap_in_parts(subject, with_dynamics=False),
                blind=_certain_regulator,
            ),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §3.1 and §3.2",
    about=evidence_gap,
)


STEPS = (
    BOUND,
    GAP,
    POSTERIOR_DYNAMICS,
    OPTIMISM,
)
