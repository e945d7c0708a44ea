"""Contraction, and what becomes of the soft equations where the temperature is extreme."""

from __future__ import annotations

import numpy as np
import torch

from inference_rl.backups import control_q, soft_value
from inference_rl.derivation import assumptions
from inference_rl.derivation.independent import Array
from inference_rl.derivation.step import Check, Side, Step, Twin
from inference_rl.derivation.subject import Subject

PAIRS = ("two values at random", "the same, ten times as far apart", "a value and itself plus one")


def _pairs(subject: Subject) -> list[tuple[Array, Array]]:
    """Values (S,) of live states, as they are named in `PAIRS`."""
    live, unit = subject.tables.live, max(subject.temperature, 1.0)
    one = subject.other_value
    apart = np.where(live, subject.generator("apart").normal(size=live.shape) * unit, 0.0)
    return [(one, one + apart), (one, one + 10 * apart), (one, one + unit * live)]


def _apart_after(subject: Subject, discount: float) -> Array:
    whole = subject.whole.replace(discount=discount)

    def backed_up(value: Array) -> Array:
        q = control_q(whole, torch.as_tensor(value))
        soft = soft_value(q, whole.log_prior, subject.temperature)
        return torch.where(whole.is_terminal, 0.0, soft).numpy()

    return np.array([np.abs(backed_up(v) - backed_up(w)).max() for v, w in _pairs(subject)])


CONTRACTION = Step(
    id="contraction",
    title="The backup is a contraction",
    explanation=(
        "One soft backup brings any two values closer by at least the discount. So there is only "
        "one solution, and backups lead to it from anywhere. The log-mean-exp does not spoil this, "
        "because it never stretches a difference between two Qs."
    ),
    formulas=(r"\| B V - B W \|_\infty \le \gamma\, \| V - W \|_\infty",),
    relation="<=",
    unit="reward",
    assumptions=(assumptions.discounted,),
    checks=(
        Check(
            needs=(assumptions.solvable,),
            left=Side(
                "the greatest difference after one backup by the library",
                lambda subject: _apart_after(subject, subject.whole.discount),
            ),
            right=Side(
                "the discount times the greatest difference before it",
                lambda subject: np.array(
                    [subject.whole.discount * np.abs(v - w).max() for v, w in _pairs(subject)]
                ),
            ),
            twin=Twin(
                "the discount forgotten in the backup",
                "left",
                lambda subject: _apart_after(subject, 1.0),
                blind=lambda subject: (
                    None
                    if (subject.tables.moves @ subject.tables.live).any()
                    else "every action ends the episode, so that nothing is left to discount"
                ),
            ),
            over=(PAIRS,),
        ),
    ),
    reference="Haarnoja et al. (2017), arXiv:1702.08165, appendix A.2; Levine (2018), §3.1",
    about=control_q,
)
