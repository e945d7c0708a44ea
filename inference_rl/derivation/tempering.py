"""The temperature as a dual variable, and its optimum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from inference_rl.derivation import assumptions
from inference_rl.derivation.independent import Array, divergence, soft_policy
from inference_rl.derivation.step import (
    Check,
    Side,
    Step,
    Twin,
)
from inference_rl.derivation.subject import Subject
from inference_rl.finite_messages import control_messages
from inference_rl.temperature import Tuned


def _slope(subject: Subject) -> float:
    """dJ/dα of exact inference, by autograd through the fixed point, nats."""
    temperature = torch.tensor(subject.temperature, requires_grad=True)
    objective: Any = subject.anywhere.initial @ control_messages(subject.whole, temperature).v
    if not objective.requires_grad:
        return 0.0
    (slope,) = torch.autograd.grad(objective, temperature)
    return float(slope)


def _paid_divergence(subject: Subject, temperature: float) -> float:
    """E Σ γ^t KL(π* ‖ ρ) along the best policy at a temperature, nats, by policy iteration."""
    tables = subject.tables
    value = subject.best_value_at(temperature)
    policy = soft_policy(tables.action_value(value), tables.prior, temperature)
    start = subject.anywhere.initial.numpy()
    return float(start @ tables.along(policy, divergence(policy, tables.prior)))


def _pays_nothing(subject: Subject) -> str | None:
    if (reason := assumptions.nothing_at_stake(subject)) is not None:
        return reason
    if _paid_divergence(subject, subject.temperature) <= 1e-9 * max(1.0, subject.size("nats")):
        return "at so high a temperature the policy is all but the prior"
    return None


SLOPE = Step(
    id="temperature-dual",
    title="The temperature is a dual variable",
    explanation=(
        "What does the best objective lose if the temperature rises a little? Exactly the nats "
        "that its policy pays, though the policy changes too: at the optimum, to first order, that "
        "costs nothing. So the temperature is the price of a constraint on the divergence from the "
        "prior, or, under a uniform prior, on the entropy."
    ),
    formulas=(
        r"\frac{\mathrm{d}}{\mathrm{d} \alpha}\, \mathbb{E}\left[ V_\alpha(s_0) \right] ="
        r" - \mathbb{E}_{\pi^*_\alpha} \sum_t \gamma^t\, \mathrm{KL}\left( \pi^*_\alpha \,\|\, \rho"
        r" \right)",
    ),
    relation="=",
    unit="nats",
    checks=(
        Check(
            needs=(assumptions.solvable,),
            left=Side("autograd through exact inference, by the implicit function theorem", _slope),
            right=Side(
                "the divergence of the best policy, summed along its trajectories by a linear "
                "solve, with the sign turned",
                lambda subject: -_paid_divergence(subject, subject.temperature),
            ),
            twin=Twin(
                "the sign is wrong: randomness is taken for a gain, as in the entropy form",
                "right",
                lambda subject: _paid_divergence(subject, subject.temperature),
                blind=_pays_nothing,
            ),
            tolerance=1e-9,
        ),
    ),
    reference="Haarnoja et al. (2018), arXiv:1812.05905, §5 (eqs. 11 to 18)",
    about=control_messages,
)

TEMPERATURES = (0.5, 1.5, 2.5, 4.0)
"""In multiples of the temperature, around twice that, which is the best one."""


def _dual_at_best(subject: Subject) -> Array:
    """g(2α) with the divergence at 2α for a target, by policy iteration, reward units."""
    best = 2 * subject.temperature
    value = float(subject.anywhere.initial.numpy() @ subject.best_value_at(best))
    target = _paid_divergence(subject, best)
    return np.full(len(TEMPERATURES), value + best * target)


def _dual_elsewhere(subject: Subject, *, with_target: bool = True) -> Array:
    """g at other temperatures, with the same target, by the library."""
    target = _paid_divergence(subject, 2 * subject.temperature) if with_target else 0.0
    found = []
    for factor in TEMPERATURES:
        temperature = factor * subject.temperature
        value = subject.control_at(temperature).v
        found.append(float(subject.anywhere.initial @ value) + temperature * target)
    return np.array(found)


def _temperature_names(subject: Subject) -> Sequence[str]:
    return [f"temperature {factor * subject.temperature:.3g}" for factor in TEMPERATURES]


OPTIMUM = Step(
    id="temperature-optimum",
    title="Tuning the temperature to a target",
    explanation=(
        "Of all policies that pay at most a given number of nats, which earns most? The best one "
        "at some temperature, and that is where the dual is least: it is convex, and its slope is "
        "the target less what the policy pays. Soft actor-critic's automatic temperature descends "
        "on it. Here the target is what the best policy pays at twice the temperature, so that no "
        "other temperature can do better than that one."
    ),
    formulas=(
        r"g(\alpha) = \mathbb{E}\left[ V_\alpha(s_0) \right] + \alpha\, D, \qquad"
        r" g'(\alpha) = D - \mathbb{E}_{\pi^*_\alpha} \sum_t \gamma^t\, \mathrm{KL}\left("
        r" \pi^*_\alpha \,\|\, \rho \right)",
        r"g(\alpha^*) \le g(\alpha), \qquad \mathrm{KL}(\pi^*_{\alpha^*}) = D",
    ),
    relation="<=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.solvable,),
            left=Side(
                "the dual where the target is met, by soft policy iteration and a linear solve",
                _dual_at_best,
            ),
            right=Side("the dual at other temperatures, by exact inference", _dual_elsewhere),
            twin=Twin(
                "the target is left out of the dual, and the temperature runs away",
                "right",
                lambda subject: _dual_elsewhere(subject, with_target=False),
                blind=assumptions.nothing_at_stake,
            ),
            tolerance=1e-9,
            over=(_temperature_names,),
        ),
    ),
    reference="Haarnoja et al. (2018), arXiv:1812.05905, §5; Boyd and Vandenberghe (2004), §5.2",
    about=Tuned.update,
)


STEPS = (
    SLOPE,
    OPTIMUM,
)
