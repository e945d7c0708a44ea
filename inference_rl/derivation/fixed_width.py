"""Guides of fixed width, and the deterministic policy gradient as their limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference_rl import decision
from inference_rl.derivation import assumptions, quadrature
from inference_rl.derivation.step import (
    Check,
    Estimate,
    Side,
    Step,
    Twin,
)
from inference_rl.derivation.subject import Subject
from inference_rl.inference.fixed_width import boltzmann, considered
from inference_rl.squashed_normal import SquashedNormal

NARROW = 1e-4
"""Width of the guide where it is nearly a point."""

WIDE = 0.3


def _means(subject: Subject) -> Tensor:
    """Of some guide in a few states, before the tanh, (N, d)."""
    size = int(np.prod(subject.model.action_space.shape or ()))
    draws = subject.generator("means").normal(size=(quadrature.STARTS, size))
    return torch.as_tensor(draws / 2)


def _fixed_width(
    subject: Subject, mean: Tensor, width: float, temperature: float, draws: int
) -> decision.Decision:
    """The library's decision by draws of tanh N(mean, width²), (K, N)."""

    def guide(state: Tensor, step: Tensor) -> Any:
        return SquashedNormal(mean, torch.full_like(mean, width)).to_event(1)

    states = quadrature.states_of(subject)
    return considered(
        guide,  # type: ignore[arg-type]
        subject.prior,
        quadrature.SomeMessage(subject),
        states,
        torch.zeros(len(states), dtype=torch.long),
        temperature=torch.tensor(temperature),
        action_space=subject.model.action_space,
        draws=draws,
    )


def _narrow_gradient(subject: Subject) -> Tensor:
    """∂/∂μ of the mean Q under a guide that is nearly a point, at temperature zero, (N, d)."""
    mean = _means(subject).requires_grad_()
    found = _fixed_width(subject, mean, NARROW, 0.0, 2000)
    q = found.temperature * found.log_weight
    (gradient,) = torch.autograd.grad(q.mean(0).sum(), mean)
    return gradient


def _deterministic_gradient(subject: Subject, *, through_tanh: bool = True) -> Tensor:
    """∂ tanh μ · ∇_a Q at a = tanh μ, by hand: DDPG's, (N, d)."""
    message = quadrature.SomeMessage(subject)
    action = torch.tanh(_means(subject))
    size = action.shape[-1]
    slope = message.scale / size * (-3 * torch.sin(3 * action + message.phase) + message.slope)
    return slope * (1 - action.square()) if through_tanh else slope


def _coordinates(subject: Subject) -> Sequence[str]:
    size = int(np.prod(subject.model.action_space.shape or ()))
    return [f"coordinate {i + 1}" for i in range(size)]


WIDTH_LIMIT = Step(
    id="fixed-width-limit",
    title="Soft DDPG and TD3: guides of fixed width, and their limit",
    explanation=(
        "Let the guide be a Gaussian of fixed width, squashed into the box, and learn its mean "
        "only. Its bound is still a bound. As the width and the temperature go to zero the guide "
        "becomes a point, and the gradient of its bound becomes the deterministic policy gradient "
        "of DDPG and TD3. What they add, a second Q and noise on the target, is no part of the "
        "inference."
    ),
    formulas=(
        r"q(a \mid s) = \mathcal{L}\left( \tanh(\mu(s) + \sigma \varepsilon) \right), \qquad"
        r" \varepsilon \sim \mathcal{N}(0, 1)",
        r"\lim_{\sigma \to 0} \nabla_\mu\, \mathbb{E}_q\left[ Q(s, a) \right] ="
        r" \frac{\partial \tanh \mu}{\partial \mu} \cdot \nabla_a Q(s, a) \Big|_{a = \tanh \mu}",
    ),
    relation="=",
    unit="reward",
    assumptions=(assumptions.box,),
    checks=(
        Check(
            left=Side(
                f"autograd through the library's program of one decision, width {NARROW:g} and "
                "temperature zero, of some Q",
                _narrow_gradient,
            ),
            right=Side(
                "the deterministic policy gradient at the mean, by hand", _deterministic_gradient
            ),
            twin=Twin(
                "the derivative of the tanh is forgotten",
                "right",
                lambda subject: _deterministic_gradient(subject, through_tanh=False),
            ),
            # Of first order in the width, for few draws.
            tolerance=100 * NARROW,
            over=(quadrature.names, _coordinates),
        ),
    ),
    reference="Lillicrap et al. (2016), arXiv:1509.02971, §3; Silver et al. (2014), theorem 2",
    about=considered,
)


def _width_bounds(subject: Subject, *, mean_q: bool = False) -> Estimate:
    """E_q[Q − α log q/ρ] of two guides of fixed width, (2, N); or the posterior's mean of Q."""
    found = []
    for width in (WIDE / 3, WIDE):
        drawn = _fixed_width(subject, _means(subject), width, subject.temperature, 4000)
        gain = drawn.temperature * (drawn.log_weight - (drawn.log_guide - drawn.log_prior))
        estimate = Estimate.of(gain)
        if mean_q:
            estimate = Estimate(boltzmann(drawn, drawn.log_guide), estimate.standard_error)
        found.append(estimate)
    return Estimate(
        np.array([part.value for part in found]),
        np.array([part.standard_error for part in found]),
    )


def _evidence_twice(subject: Subject) -> Estimate:
    whole = quadrature.evidence(subject)
    return Estimate(np.array([whole.value] * 2), np.array([whole.standard_error] * 2))


WIDTH_BOUND = Step(
    id="fixed-width-bound",
    title="What a fixed width cannot reach",
    explanation=(
        "A guide of fixed width has a bound like any other, and it stays below the soft value by "
        "the temperature times its divergence from the posterior of the decision. A posterior with "
        "several hills, or of another width, is out of its reach. The mean of Q under the "
        "posterior, which some backups take, is no bound: it pays for no divergence and lies above."
    ),
    formulas=(
        r"\mathbb{E}_q\left[ Q - \alpha \log \frac{q}{\rho} \right]"
        r" = V - \alpha\, \mathrm{KL}\left( q \,\|\, \rho\, e^{(Q - V) / \alpha} \right)"
        r" \le V",
    ),
    relation="<=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.small_box,),
            left=Side(
                f"the bound of guides of width {WIDE / 3:g} and {WIDE:g}, by draws of the "
                "library's program of one decision",
                _width_bounds,
            ),
            right=Side("V, by Gauss-Legendre quadrature", _evidence_twice),
            twin=Twin(
                "the posterior's mean of Q is taken for a bound (a Boltzmann backup)",
                "left",
                lambda subject: _width_bounds(subject, mean_q=True),
                blind=assumptions.too_coarse,
            ),
            tolerance=1e-8,
            over=((f"width {WIDE / 3:g}", f"width {WIDE:g}"), quadrature.names),
        ),
    ),
    reference="Haarnoja et al. (2017), arXiv:1702.08165, §4; Pan et al. (2020), arXiv:2010.09177",
    about=boltzmann,
)


STEPS = (
    WIDTH_LIMIT,
    WIDTH_BOUND,
)
