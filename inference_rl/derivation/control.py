"""The best guide that keeps the dynamics: soft Bellman equations."""

from __future__ import annotations

import numpy as np

from inference_rl.derivation import assumptions
from inference_rl.derivation.independent import Array, best_value
from inference_rl.derivation.step import Check, Side, Step, Twin
from inference_rl.derivation.subject import Subject
from inference_rl.finite_messages import control_messages


def live(subject: Subject, value: Array) -> Array:
    """Values of the states that act; the others are left out."""
    return np.where(subject.tables.live, value, np.nan)


SOFT_BELLMAN = Step(
    id="soft-bellman",
    title="The soft Bellman equations",
    explanation=(
        "The best bound from a state on is the soft value V: no longer the greatest Q, as in "
        "regular RL, but its log-mean-exp under the action prior. It is a smooth maximum: near the "
        "greatest Q where the temperature is small, near the prior's mean where it is large. "
        "Q and V determine each other, and there is exactly one solution."
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
                "V of `infer(model, Exact(temperature))`: Newton's method on the messages, with a "
                "certified error",
                lambda subject: live(subject, subject.control.v.numpy()),
            ),
            right=Side(
                "soft policy iteration from the prior: each policy is evaluated by solving a "
                "linear system",
                lambda subject: live(subject, best_value(subject.tables, subject.temperature)),
            ),
            twin=Twin(
                "the greatest Q in place of the log-mean-exp, as in regular RL",
                "right",
                lambda subject: live(subject, best_value(subject.tables, 0.0)),
                blind=assumptions.one_action,
            ),
            tolerance=1e-9,
            over=("state",),
        ),
    ),
    reference="Levine (2018), arXiv:1805.00909, §3.1; Haarnoja et al. (2017), arXiv:1702.08165, §3",
    about=control_messages,
)
