"""The guide that keeps the dynamics, and the objective that its bound is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from inference_rl.derivation import assumptions, sampled
from inference_rl.derivation.bound import enumerated_bound
from inference_rl.derivation.independent import Array, Tables, best_value, divergence, entropy
from inference_rl.derivation.joint import listed, traced
from inference_rl.derivation.step import Check, Estimate, Side, Step, Twin
from inference_rl.derivation.subject import Subject, unrolled
from inference_rl.finite_messages import (
    control_messages,
)
from inference_rl.inference.exact_finite import objective_parts
from inference_rl.policies import TabularPolicy
from inference_rl.trajectory import trajectory


def _log_ratio_of_programs(subject: Subject) -> Array:
    """log p(τ, O) − log q(τ) of some trajectories, from two traces of the program."""
    model, paths = subject.discounted_excerpt, subject.discounted_paths
    guide = TabularPolicy(torch.as_tensor(subject.some_policy(model)))
    log_p = traced(model, paths, listed(paths), model.action_prior, subject.temperature)
    return log_p - traced(model, paths, listed(paths), guide, None)


def _log_ratio_by_hand(subject: Subject, *, with_prior: bool = True) -> Array:
    """Σ γ^t [r/α − log π/ρ] of the same trajectories."""
    model, paths = subject.discounted_excerpt, subject.discounted_paths
    taken = np.where(model.log_prior.exp().numpy() > 0, subject.some_policy(model), 1.0)
    cost = np.log(taken)
    if with_prior:
        cost = cost - np.where(model.log_prior.exp().numpy() > 0, model.log_prior.numpy(), 0.0)
    gained = paths.rewards / subject.temperature - paths.along(cost)
    weight = model.discount ** np.arange(len(gained))
    return np.asarray((weight[:, None] * gained).sum(0)[listed(paths)])


def _listed_discounted_names(subject: Subject) -> Sequence[str]:
    return [f"trajectory {i + 1}" for i in listed(subject.discounted_paths)]


def _sampled_log_ratio(subject: Subject, *, with_guide: bool = True) -> Tensor:
    rollouts = subject.rollouts("guide")
    reward, _ = sampled.stepped(subject, rollouts)
    cost = (rollouts.log_guide if with_guide else 0.0) - rollouts.log_prior
    return (reward / subject.temperature - cost).sum(0)


def _sampled_names(subject: Subject) -> Sequence[str]:
    return [f"trajectory {i + 1}" for i in range(sampled.paths(subject))]


STRUCTURED = Step(
    id="structured-guide",
    title="A guide that keeps the dynamics",
    explanation=(
        "The cure for optimism is to forbid it: let the guide choose actions only, and take start "
        "and dynamics from the model. Then they are in both p and q and cancel, and what is left "
        "of a trajectory's log-weight is reward and what the policy pays for leaving its habits. "
        "Nobody needs to know the dynamics to compute it."
    ),
    formulas=(
        r"q(\tau) = p(s_0) \prod_t \pi(a_t \mid s_t)\, p(s_{t+1} \mid s_t, a_t)",
        r"\log \frac{p(\tau, O)}{q(\tau)} = \sum_t \gamma^t \left[ \frac{r_t}{\alpha}"
        r" - \log \frac{\pi(a_t \mid s_t)}{\rho(a_t \mid s_t)} \right]",
    ),
    relation="=",
    unit="nats",
    checks=(
        Check(
            needs=(assumptions.listable,),
            left=Side(
                "the program read as model and as guide, both traced by Pyro on one trajectory",
                _log_ratio_of_programs,
            ),
            right=Side("reward and log π/ρ, from the tables of the model", _log_ratio_by_hand),
            twin=Twin(
                "log π in place of log π/ρ: the prior is left out",
                "right",
                lambda subject: _log_ratio_by_hand(subject, with_prior=False),
                blind=assumptions.no_choice,
            ),
            over=(_listed_discounted_names,),
        ),
        Check(
            needs=(assumptions.drawn,),
            left=Side(
                "the program run as guide and replayed as model, by Pyro",
                lambda subject: subject.rollouts("guide").log_ratio,
            ),
            right=Side(
                "rewards of the same actions without the program, and log π/ρ", _sampled_log_ratio
            ),
            twin=Twin(
                "log 1/ρ in place of log π/ρ: the policy's own density is left out",
                "right",
                lambda subject: _sampled_log_ratio(subject, with_guide=False),
            ),
            tolerance=1e-6,
            over=(_sampled_names,),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §3.2",
    about=trajectory,
)


def _objective_of_paths(subject: Subject, sign: float = 1.0) -> float:
    """J of some policy: a sum over trajectories, reward units."""
    model, paths = subject.discounted_excerpt, subject.discounted_paths
    policy, prior = subject.some_policy(model), model.log_prior.exp().numpy()
    ratio = np.log(np.where(prior > 0, policy, 1.0) / np.where(prior > 0, prior, 1.0))
    gained = paths.rewards - sign * subject.temperature * paths.along(ratio)
    weight = model.discount ** np.arange(len(gained))
    return float(np.exp(paths.log_chance(policy)) @ (weight @ gained))


def _discounted_bound(subject: Subject) -> float:
    model = subject.discounted_excerpt
    return subject.temperature * enumerated_bound(
        model, subject.some_policy(model), subject.temperature
    )


def _sampled_discounted_bound(subject: Subject) -> Estimate:
    rollouts = sampled.draw(
        subject,
        sampled.SomePolicy(subject, "guide"),
        "discounted",
        discount=float(subject.model.discount),
    )
    return Estimate.of(subject.temperature * rollouts.log_ratio)


def _simulated_objective(subject: Subject, sign: float = 1.0) -> Estimate:
    reward, log_guide, log_prior = sampled.simulate(
        subject, sampled.SomePolicy(subject, "guide"), "objective"
    )
    gained = reward - sign * subject.temperature * (log_guide - log_prior)
    weight = float(subject.model.discount) ** torch.arange(len(gained)).double()
    return Estimate.of((weight.unsqueeze(-1) * gained).sum(0))


MAXENT = Step(
    id="maxent-objective",
    title="The bound is the maximum-entropy objective",
    explanation=(
        "Averaged over the guide's trajectories and multiplied by the temperature, the bound is "
        "what maximum-entropy reinforcement learning maximises: reward, less a price for every nat "
        "by which the policy leaves its prior. Nothing was assumed besides Jensen's inequality and "
        "a guide that keeps the dynamics. A discount weighs the terms of step t by γ^t."
    ),
    formulas=(
        r"\alpha\, \mathrm{ELBO}(\pi) = J(\pi) = \mathbb{E}_\pi \sum_t \gamma^t \left[ r_t"
        r" - \alpha\, \mathrm{KL}\left( \pi(\cdot \mid s_t) \,\|\, \rho(\cdot \mid s_t) \right)"
        r" \right]",
    ),
    relation="=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.listable,),
            left=Side(
                "the temperature times the bound of some policy by Pyro, which enumerates the "
                "program",
                _discounted_bound,
            ),
            right=Side(
                "a sum of discounted reward and log π/ρ over every single trajectory",
                _objective_of_paths,
            ),
            twin=Twin(
                "the sign of the divergence is wrong: leaving habits is paid for",
                "right",
                lambda subject: _objective_of_paths(subject, -1.0),
                blind=assumptions.no_choice,
            ),
        ),
        Check(
            needs=(assumptions.drawn,),
            left=Side(
                "the temperature times the mean log-weight of trajectories that the program drew",
                _sampled_discounted_bound,
            ),
            right=Side(
                "discounted reward and log π/ρ of other trajectories, drawn without the program",
                _simulated_objective,
            ),
            twin=Twin(
                "the sign of the divergence is wrong: leaving habits is paid for",
                "right",
                lambda subject: _simulated_objective(subject, -1.0),
                blind=assumptions.too_coarse,
            ),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §3.2; Ziebart (2010), PhD thesis, ch. 5",
    about=objective_parts,
)


def _entropy_form(subject: Subject) -> float:
    """E Σ γ^t (r + αH) of some policy, by a linear solve."""
    tables, policy = subject.tables, subject.policy
    rate = (policy * tables.gain).sum(-1) + subject.temperature * entropy(policy)
    return float(subject.anywhere.initial.numpy() @ tables.along(policy, rate))


def _shifted_objective(subject: Subject, *, with_log_actions: bool = True) -> float:
    parts = objective_parts(subject.anywhere, torch.as_tensor(subject.policy))
    objective = parts.expected_return - subject.temperature * parts.divergence
    shift = subject.temperature * np.log(subject.whole.num_actions) * parts.steps
    return float(objective + (shift if with_log_actions else 0.0))


ENTROPY_FORM = Step(
    id="entropy-form",
    title="Reward plus entropy",
    explanation=(
        "Under a uniform prior the divergence of a policy is log|A| less its entropy. So the "
        "objective is the one that soft actor-critic and its kin write, reward plus α times "
        "entropy, but for a constant at every step. That constant moves no policy, as long as "
        "every policy takes equally many steps; where episodes end it pays for staying alive, "
        "which is why a number should say which form it is in."
    ),
    formulas=(
        r"\mathbb{E}_\pi \sum_t \gamma^t \left[ r_t + \alpha\, H(\pi(\cdot \mid s_t)) \right]"
        r" = \alpha\, \mathrm{ELBO}(\pi) + \alpha \log |A|\; \mathbb{E}_\pi \sum_t \gamma^t",
    ),
    relation="=",
    unit="reward",
    assumptions=(assumptions.uniform,),
    checks=(
        Check(
            left=Side(
                "the value of reward plus α times entropy, on average over all states, by a linear "
                "solve",
                _entropy_form,
            ),
            right=Side(
                "the library's return, divergence and expected number of steps", _shifted_objective
            ),
            twin=Twin(
                "the constant is left out: both forms are taken for the same number",
                "right",
                lambda subject: _shifted_objective(subject, with_log_actions=False),
                blind=assumptions.one_action,
            ),
        ),
    ),
    reference="Haarnoja et al. (2018), arXiv:1801.01290, eq. 1; Levine (2018), §3.2",
    about=objective_parts,
)


def _best_bound(subject: Subject, *, best: bool = True) -> float:
    model, alpha = subject.discounted_excerpt, subject.temperature
    policy = control_messages(model, alpha).policy if best else model.log_prior.exp()
    return alpha * enumerated_bound(model, policy.numpy(), alpha)


def _expected_best_value(subject: Subject) -> float:
    tables = Tables.of(unrolled(subject.discounted_excerpt))
    return float(tables.initial @ best_value(tables, subject.temperature))


def _prior_is_best(subject: Subject) -> str | None:
    model = subject.discounted_excerpt
    best = control_messages(model, subject.temperature).policy.numpy()
    apart = divergence(best, model.log_prior.exp().numpy())[:, ~model.is_terminal.numpy()]
    if apart.max() <= 1e-9:
        return "the prior is the best policy there is: no action is better than another"
    return None


BEST_BOUND = Step(
    id="best-bound",
    title="The best guide attains the soft value",
    explanation=(
        "Among all guides that keep the dynamics there is a best one, and its bound is the soft "
        "value of the start, over the temperature. It is found backwards, one decision at a time: "
        "each is the single decision of the first step, with what follows in place of its reward."
    ),
    formulas=(
        r"\max_\pi\, \alpha\, \mathrm{ELBO}(\pi) = \mathbb{E}_{s_0}\left[ V(s_0) \right]",
        r"\pi^*(a \mid s) = \rho(a \mid s)\, e^{(Q(s, a) - V(s)) / \alpha}",
    ),
    relation="=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.listable,),
            left=Side(
                "the temperature times the bound of the library's policy by Pyro, which enumerates "
                "the program of a few steps",
                _best_bound,
            ),
            right=Side(
                "the expected value of the start, by soft policy iteration in NumPy",
                _expected_best_value,
            ),
            twin=Twin(
                "the guide is the prior: nothing was inferred",
                "left",
                lambda subject: _best_bound(subject, best=False),
                blind=_prior_is_best,
            ),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §3.2 and §3.3",
    about=control_messages,
)


STEPS = (
    STRUCTURED,
    MAXENT,
    ENTROPY_FORM,
    BEST_BOUND,
)
