"""Soft Q-learning, and what a log-mean-exp of few actions leaves out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from inference_rl import decision
from inference_rl.decision import decide
from inference_rl.derivation import assumptions, quadrature
from inference_rl.derivation.control import allowed
from inference_rl.derivation.decisions import decision_names, decisions
from inference_rl.derivation.independent import Array, soft_value
from inference_rl.derivation.soft_iteration import decide_everywhere
from inference_rl.derivation.step import Assumption, Check, Estimate, Side, Step, Twin
from inference_rl.derivation.subject import Subject
from inference_rl.inference.off_policy import residual_loss, soft_target
from inference_rl.policies import TabularPolicy


def _some_q(subject: Subject) -> Array:
    """Some Q (S, A) that solves no equation, reward units."""
    return subject.tables.action_value(subject.other_value)


def _residual_gradient(subject: Subject, *, soft: bool = True, paid: bool = True) -> Array:
    """∂/∂Q of SQL's loss with every transition in the batch, by autograd: (S, A)."""
    model = subject.whole
    q = torch.as_tensor(_some_q(subject)).clone().requires_grad_()
    with torch.no_grad():
        if soft:
            prior = model.log_prior.exp()
            value = decision.evidence(decide_everywhere(subject, q, prior))
        else:
            value = torch.where(model.log_prior > -torch.inf, q, -torch.inf).amax(-1)
        value = torch.where(model.is_terminal, 0.0, value)
        target = soft_target(
            model.expected_reward().flatten() * paid,
            torch.ones(q.numel()),
            model.expected_value(value).flatten(),
            model.discount,
        )
    loss = residual_loss(q.flatten().unsqueeze(0), target)
    (gradient,) = torch.autograd.grad(loss, q)
    return allowed(subject, np.asarray(gradient * q.numel()))


def _residual(subject: Subject) -> Array:
    """Q − (r̄ + γ P V), by hand."""
    tables, q = subject.tables, _some_q(subject)
    value = np.where(tables.live, soft_value(q, tables.prior, subject.temperature), 0.0)
    return allowed(subject, q - tables.action_value(value))


def _sql_check(need: Assumption, twin: Twin) -> Check:
    return Check(
        needs=(need,),
        left=Side(
            "autograd through the library's loss and target, with V from the Pyro program of one "
            "decision, at some Q",
            _residual_gradient,
        ),
        right=Side("the residual of the equation at that Q, by hand", _residual),
        twin=twin,
        tolerance=1e-9,
        over=("state", "action"),
    )


SQL_UPDATE = Step(
    id="sql-update",
    title="Soft Q-learning: the residual of the equations",
    explanation=(
        "Soft Q-learning needs no policy to learn Q. It takes the soft Bellman equations for a "
        "regression: whatever Q is, move it towards reward plus the discounted log-mean-exp of "
        "what follows. The gradient is the residual of the equation, so it vanishes exactly at "
        "the solution. With a maximum for the log-mean-exp this is Q-learning."
    ),
    formulas=(
        r"\mathcal{L}(Q) = \frac{1}{2}\, \mathbb{E}\left[ \left( Q(s, a) - r - \gamma\, V(s')"
        r" \right)^2 \right], \qquad V(s') = \alpha \log \sum_{a'} \rho(a' \mid s')\,"
        r" e^{Q(s', a') / \alpha}",
    ),
    relation="=",
    unit="reward",
    checks=(
        _sql_check(
            assumptions.sequential,
            Twin(
                "a maximum for the log-mean-exp: Q-learning",
                "left",
                lambda subject: _residual_gradient(subject, soft=False),
                blind=assumptions.one_action,
            ),
        ),
        _sql_check(
            assumptions.solvable,
            Twin(
                "the reward is left out of the target",
                "left",
                lambda subject: _residual_gradient(subject, paid=False),
                blind=assumptions.nothing_earned,
            ),
        ),
    ),
    reference="Haarnoja et al. (2017), arXiv:1702.08165, §3.2",
    about=residual_loss,
)

DRAWS = (1, 2, 64)
"""Actions that a log-mean-exp is taken of."""

REPEATS = 1000

FEW_STATES = 4


def _few_decisions(subject: Subject) -> tuple[Array, Array]:
    """Prior and Q of the first states of `decisions`, (N, A)."""
    _, prior, _, q = decisions(subject)
    return prior[:FEW_STATES], q[:FEW_STATES]


def _few_names(subject: Subject) -> Sequence[str]:
    return decision_names(subject)[:FEW_STATES]


def _sampled_value(subject: Subject, draws: int, *, mean: bool = True) -> Estimate:
    """E of α log of the mean of e^{Q/α} over draws of the prior, by the program."""
    prior, q = _few_decisions(subject)
    rows = torch.arange(len(q)).repeat(REPEATS)
    habit = TabularPolicy(torch.as_tensor(prior))
    table = torch.as_tensor(q)
    found = decide(
        rows.expand(draws, -1),
        habit,
        lambda state: habit(state),
        lambda action: table[rows, action],
        temperature=torch.tensor(subject.temperature),
        action_space=subject.model.action_space,
    )
    value = decision.evidence(found, found.log_guide)
    if not mean:
        value = value + subject.temperature * np.log(draws)
    return Estimate.of(value.reshape(REPEATS, len(q)))


def _pair_value(subject: Subject) -> Array:
    """E of the same for two draws, by a sum over all pairs of actions."""
    prior, q = _few_decisions(subject)
    alpha = subject.temperature
    both = alpha * (np.logaddexp(q[:, :, None] / alpha, q[:, None, :] / alpha) - np.log(2))
    chance = prior[:, :, None] * prior[:, None, :]
    return np.asarray((chance * both).sum((1, 2)))


def _few_draws(subject: Subject, *, mean: bool = True) -> Estimate:
    """Of one draw, two and 64: (3, N). The first two are sums, without an error."""
    prior, q = _few_decisions(subject)
    many = _sampled_value(subject, DRAWS[-1], mean=mean)
    one = (prior * q).sum(-1)
    nothing = np.zeros_like(one)
    return Estimate(
        np.array([one, _pair_value(subject), many.value]),
        np.array([nothing, nothing, many.standard_error]),
    )


def _more_draws(subject: Subject) -> Array:
    """Of two, of all, and of all: (3, N)."""
    prior, q = _few_decisions(subject)
    whole = soft_value(q, prior, subject.temperature)
    return np.array([_pair_value(subject), whole, whole])


def _box_draws(subject: Subject, *, mean: bool = True) -> Estimate:
    """Of two and 64 draws of a policy in a box, weighted by ρ/π: (2, N)."""
    found = [quadrature.small_evidence(subject, draws, REPEATS) for draws in DRAWS[1:]]
    shift = [0.0 if mean else subject.temperature * np.log(draws) for draws in DRAWS[1:]]
    return Estimate(
        np.array([part.value + more for part, more in zip(found, shift, strict=True)]),
        np.array([part.standard_error for part in found]),
    )


def _box_integrals(subject: Subject) -> Estimate:
    whole = quadrature.evidence(subject)
    return Estimate(np.array([whole.value] * 2), np.array([whole.standard_error] * 2))


SAMPLED_VALUE = Step(
    id="sampled-log-sum-exp",
    title="A log-mean-exp of few draws is too low",
    explanation=(
        "Where actions are too many to sum over, V is estimated from some of them. The mean of "
        "e^{Q/α} over draws is right on average, but its logarithm is not: by Jensen's inequality "
        "it is too low, by about one over their number. More draws only raise it, from the mean of "
        "Q for one draw to V for infinitely many."
    ),
    formulas=(
        r"V_K = \mathbb{E}\left[ \alpha \log \left( \frac{1}{K} \sum_{k = 1}^{K}"
        r" e^{Q(a_k) / \alpha} \right) \right], \qquad a_k \sim \rho",
        r"\mathbb{E}_\rho\left[ Q \right] = V_1 \le V_2 \le \cdots \le V",
    ),
    relation="<=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.discrete,),
            left=Side(
                "of one draw and of two by sums over all actions and pairs; of 64 by the program, "
                f"{REPEATS:,} times",
                _few_draws,
            ),
            right=Side("of two draws by a sum over all pairs, and V itself, twice", _more_draws),
            twin=Twin(
                "the sum over draws in place of their mean",
                "left",
                lambda subject: _few_draws(subject, mean=False),
            ),
            over=(("one draw", "two draws", "64 draws"), _few_names),
        ),
        Check(
            needs=(assumptions.small_box,),
            left=Side(
                "of two draws and of 64 of some policy, weighted by ρ/π, by the program",
                _box_draws,
            ),
            right=Side("V itself, by Gauss-Legendre quadrature", _box_integrals),
            twin=Twin(
                "the sum over draws in place of their mean",
                "left",
                lambda subject: _box_draws(subject, mean=False),
            ),
            tolerance=1e-8,
            over=(("two draws", "64 draws"), quadrature.names),
        ),
    ),
    reference="Burda et al. (2016), arXiv:1509.00519, theorem 1; Haarnoja et al. (2017), §3.2",
    about=decision.evidence,
)


STEPS = (
    SQL_UPDATE,
    SAMPLED_VALUE,
)
