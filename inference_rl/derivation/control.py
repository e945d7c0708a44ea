"""The best guide that keeps the dynamics: soft Bellman equations, and the regret of all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from inference_rl.backups import soft_policy as library_policy
from inference_rl.derivation import assumptions, regulator
from inference_rl.derivation.independent import (
    Array,
    soft_policy,
)
from inference_rl.derivation.step import Assumption, Check, Side, Step, Twin
from inference_rl.derivation.subject import Subject
from inference_rl.finite_messages import control_messages
from inference_rl.linear_gaussian import QuadraticForm


def live(subject: Subject, table: Array) -> Array:
    """A table (S,) or (S, A) of the states that act; the others are left out."""
    shape = (-1,) + (1,) * (table.ndim - 1)
    return np.where(subject.tables.live.reshape(shape), table, np.nan)


def allowed(subject: Subject, table: Array) -> Array:
    """A table (S, A) of what is allowed in states that act; the rest is left out."""
    return live(subject, np.where(subject.tables.prior > 0, table, np.nan))


def independent_q(subject: Subject) -> Array:
    """Q* (S, A), of soft policy iteration."""
    return subject.tables.action_value(subject.best_value)


# --- The equations --------------------------------------------------------------------------------


def _greatest(subject: Subject) -> Array:
    q = np.where(subject.tables.prior > 0, independent_q(subject), -np.inf)
    return live(subject, q.max(-1))


def _linear_value(subject: Subject) -> Array:
    assert subject.linear is not None
    v = regulator.solved(subject.linear, subject.temperature, "control").v
    if subject.linear.horizon is not None:
        v = v.at(0)
    assert isinstance(v, QuadraticForm)
    points = torch.as_tensor(regulator.some_states(subject)[:, :-1])
    return np.asarray(v(points).detach())


def _riccati(subject: Subject, *, temperature_pays: bool = True) -> Array:
    assert subject.linear is not None
    form = regulator.best_form(subject, subject.linear, temperature_pays=temperature_pays)
    return regulator.at_some_states(subject, form)


SOFT_BELLMAN = Step(
    id="soft-bellman",
    title="The soft Bellman equations",
    explanation=(
        "The best bound from a state on is the soft value V: no longer the greatest Q, as in "
        "regular reinforcement learning, but its log-mean-exp under the action prior. It is a "
        "smooth maximum: near the greatest Q where the temperature is small, near the prior's mean "
        "where it is large. Q and V determine each other, and there is exactly one solution."
    ),
    formulas=(
        r"Q(s, a) = \bar r(s, a) + \gamma \sum_{s'} P(s' \mid s, a)\, V(s')",
        r"V(s) = \alpha \log \sum_a \rho(a \mid s)\, e^{Q(s, a) / \alpha}",
    ),
    relation="=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.solvable,),
            left=Side(
                "V of exact inference: Newton's method on the messages, with a certified error",
                lambda subject: live(subject, subject.control.v.numpy()),
            ),
            right=Side(
                "soft policy iteration from the prior: each policy is evaluated by solving a "
                "linear system",
                lambda subject: live(subject, subject.best_value),
            ),
            twin=Twin(
                "the greatest Q in place of the log-mean-exp, as in regular RL",
                "right",
                _greatest,
                blind=assumptions.nothing_at_stake,
            ),
            tolerance=1e-9,
            over=("state",),
        ),
        Check(
            needs=(assumptions.linear,),
            left=Side("V of exact inference at some states: the library's Riccati", _linear_value),
            right=Side(
                "the Riccati recursion in NumPy, in homogeneous coordinates, until it settles",
                _riccati,
            ),
            twin=Twin(
                "the ordinary linear regulator: what randomness is worth is left out",
                "right",
                lambda subject: _riccati(subject, temperature_pays=False),
            ),
            tolerance=1e-8,
            over=(regulator.STATES,),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §3.3; Haarnoja et al. (2017), arXiv:1702.08165, §3",
    about=control_messages,
)


def _linear_actions(subject: Subject) -> Array:
    """As `regulator.best_actions`, by the library."""
    assert subject.linear is not None
    policy = regulator.solved(subject.linear, subject.temperature, "control").policy
    chosen: Any = policy(torch.as_tensor(regulator.some_states(subject)[:, :-1]), 0)
    return np.concatenate([chosen.mean.detach().numpy(), chosen.variance.detach().numpy()[:1]])


def _coordinates(subject: Subject) -> Sequence[str]:
    assert subject.linear is not None
    return [f"action coordinate {i + 1}" for i in range(subject.linear.B.shape[1])]


def _softmax_of_q(subject: Subject) -> Array:
    tables = subject.tables
    return live(subject, soft_policy(independent_q(subject), tables.prior, subject.temperature))


def _boltzmann_of_regular_q(subject: Subject) -> Array:
    """The policy with the Q of a temperature a thousand times lower: that of regular RL, nearly."""
    tables = subject.tables
    q = tables.action_value(subject.best_value_at(subject.temperature / 1000))
    return live(subject, soft_policy(q, tables.prior, subject.temperature))


def _ratio_alone(subject: Subject) -> Array:
    advantage = independent_q(subject) - subject.best_value[:, None]
    return allowed(subject, np.exp(advantage / subject.temperature))


def _policy_check(need: Assumption, twin: Twin) -> Check:
    return Check(
        needs=(need,),
        left=Side(
            "the policy of exact inference",
            lambda subject: allowed(subject, subject.control.policy.numpy()),
        ),
        right=Side("ρ e^{Q/α}, normalised, with the Q of soft policy iteration", _softmax_of_q),
        twin=twin,
        tolerance=1e-9,
        over=("state", "action"),
    )


POLICY = Step(
    id="policy-ratio",
    title="The policy is a ratio of messages",
    explanation=(
        "The best policy raises the prior of every action by how much better than average it is, "
        "in units of the temperature. No maximum is taken and nothing is fitted: the messages are "
        "the policy. It is not the softmax of regular reinforcement learning's Q, which forgets "
        "that whoever acts later is soft too."
    ),
    formulas=(r"\pi^*(a \mid s) = \rho(a \mid s)\, e^{(Q(s, a) - V(s)) / \alpha}",),
    relation="=",
    unit="",
    checks=(
        _policy_check(
            assumptions.sequential,
            Twin(
                "the softmax of regular RL's Q: Boltzmann exploration",
                "right",
                _boltzmann_of_regular_q,
                blind=lambda subject: (
                    assumptions.nothing_at_stake(subject) or _later_selves_agree(subject)
                ),
            ),
        ),
        _policy_check(
            assumptions.solvable,
            Twin(
                "the prior in front is forgotten",
                "right",
                _ratio_alone,
                blind=assumptions.one_action,
            ),
        ),
        Check(
            needs=(assumptions.linear,),
            left=Side(
                "means and variances of the policy of exact inference at some states",
                _linear_actions,
            ),
            right=Side(
                "those of the Gaussian ∝ ρ e^{Q/α}, from the Riccati recursion in NumPy",
                regulator.best_actions,
            ),
            twin=Twin(
                "the covariance is α H⁻¹, without the half",
                "right",
                lambda subject: regulator.best_actions(subject, spread=2.0),
            ),
            tolerance=1e-9,
            over=((*regulator.STATES, "the variance"), _coordinates),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §3.3; Haarnoja et al. (2017), theorem 1",
    about=library_policy,
)


def _later_selves_agree(subject: Subject) -> str | None:
    """Whether being soft costs the same after every action, so that the two Qs prefer alike."""
    tables = subject.tables
    cold = tables.action_value(subject.best_value_at(subject.temperature / 1000))
    apart = allowed(subject, (cold - independent_q(subject)) / subject.temperature)
    apart = apart[tables.live]
    if (np.nanmax(apart, axis=-1) - np.nanmin(apart, axis=-1)).max() <= 1e-6:
        return "being soft later on costs the same after every action"
    if np.nanmax(np.abs(_boltzmann_of_regular_q(subject) - _softmax_of_q(subject))) <= 1e-8:
        return "at so low a temperature both policies are all but deterministic"
    return None


# --- Regret ---------------------------------------------------------------------------------------


def _regret(subject: Subject) -> Array:
    value = subject.tables.value(subject.policy, subject.temperature)
    return live(subject, subject.control.v.numpy() - value)


def log_ratio(subject: Subject) -> Array:
    """log π*/ρ of exact inference, (S, A), from its messages, which never underflow; zero for what
    is forbidden."""
    control = subject.control
    advantage = (control.q - control.v.unsqueeze(-1)).numpy() / subject.temperature
    return np.where(subject.tables.prior > 0, advantage, 0.0)


def _expected_divergence(subject: Subject, *, reverse: bool = False) -> Array:
    tables, policy = subject.tables, subject.policy
    possible = np.where(tables.prior > 0, policy, 1.0) / np.where(tables.prior > 0, tables.prior, 1)
    apart = np.log(possible) - log_ratio(subject)
    weight = -subject.control.policy.numpy() if reverse else policy
    along = tables.along(policy, (weight * apart).sum(-1))
    return live(subject, subject.temperature * along)


def _linear_regret(subject: Subject) -> float:
    best = regulator.control(subject).objective
    assert best is not None
    return float(best) - regulator.objective(subject, regulator.some_policy(subject))


def _linear_divergence(subject: Subject, *, reverse: bool = False) -> float:
    pair = regulator.some_policy(subject), regulator.of_solution(regulator.control(subject))
    if reverse:
        apart = regulator.expected_divergence(subject, *pair[::-1])
    else:
        apart = regulator.expected_divergence(subject, *pair)
    return subject.temperature * apart


REGRET = Step(
    id="regret",
    title="Regret is a divergence",
    explanation=(
        "What a policy loses against the best one is the temperature times its divergence from it, "
        "summed along its own trajectories. So the whole problem was to bring one distribution "
        "close to another, and how close is what every reward curve shows. The last step is the "
        "first one again, one decision after another."
    ),
    formulas=(
        r"V^*(s) - V^\pi(s) = \alpha\, \mathbb{E}_\pi\left[ \sum_t \gamma^t\,"
        r" \mathrm{KL}\left( \pi(\cdot \mid s_t) \,\|\, \pi^*(\cdot \mid s_t) \right)"
        r" \,\middle|\, s_0 = s \right]",
    ),
    relation="=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.solvable,),
            left=Side(
                "V of exact inference, less the value of some policy by a linear solve", _regret
            ),
            right=Side(
                "the temperature times the divergence of that policy from the best one, summed "
                "along its trajectories by another linear solve",
                _expected_divergence,
            ),
            twin=Twin(
                "the divergence is taken the other way round, KL(π* ‖ π)",
                "right",
                lambda subject: _expected_divergence(subject, reverse=True),
                blind=assumptions.one_action,
            ),
            tolerance=1e-9,
            over=("state",),
        ),
        Check(
            needs=(assumptions.linear,),
            left=Side(
                "the objective of exact inference over a few steps, less that of some policy from "
                "the moments of its states",
                _linear_regret,
            ),
            right=Side(
                "the temperature times the divergence of the two Gaussians, by moments",
                _linear_divergence,
            ),
            twin=Twin(
                "the divergence is taken the other way round, KL(π* ‖ π)",
                "right",
                lambda subject: _linear_divergence(subject, reverse=True),
            ),
            tolerance=1e-9,
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §3.2; Ziebart (2010), PhD thesis, ch. 5",
    about=control_messages,
)
STEPS = (SOFT_BELLMAN, POLICY)
