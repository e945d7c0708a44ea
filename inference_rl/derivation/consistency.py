"""Consistency along paths, and what random outcomes do to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from inference_rl.derivation import assumptions
from inference_rl.derivation.control import allowed, log_ratio
from inference_rl.derivation.independent import Array
from inference_rl.derivation.step import (
    Check,
    Side,
    Step,
    Twin,
)
from inference_rl.derivation.subject import Subject
from inference_rl.inference.pcl import path_residual, residual_loss

WINDOW = 5
"""Steps of a path."""

WALKS = 40


def _log_ratio(subject: Subject, *, with_prior: bool = True) -> Array:
    """log π*/ρ of exact inference, (S, A), or log π*; zero for what is forbidden."""
    ratio, prior = log_ratio(subject), subject.tables.prior
    return ratio if with_prior else ratio + np.log(np.where(prior > 0, prior, 1.0))


def _walks(subject: Subject) -> tuple[Array, Array, Array]:
    """States (d + 1, N), actions (d, N) of walks at random, and whether they go on (d, N)."""
    tables, generator = subject.tables, subject.generator("walks")
    live = np.flatnonzero(tables.live)
    states = [live[generator.integers(len(live), size=WALKS)]]
    actions, alive = [], []
    for _ in range(WINDOW):
        here = states[-1]
        going = tables.live[here]
        noise = generator.uniform(size=tables.prior[here].shape)
        action = np.where(tables.prior[here] > 0, noise, -1.0).argmax(-1)
        first = tables.moves.indptr[here * tables.prior.shape[1] + action]
        reached = tables.moves.indices[np.where(going, first, 0)]
        after = np.where(going, reached, here)
        states.append(after)
        actions.append(action)
        alive.append(going)
    return np.stack(states), np.stack(actions), np.stack(alive)


def _walked_value(subject: Subject, *, with_prior: bool = True) -> Array:
    """V(s_0) by the library's path residual along walks, (N,): what was paid, and V at the end."""
    states, actions, alive = _walks(subject)
    tables, value = subject.tables, subject.control.v.numpy()
    ratio = _log_ratio(subject, with_prior=with_prior)
    rate = (tables.gain - subject.temperature * ratio)[states[:-1], actions]
    after = np.where(tables.live[states[1:]], value[states[1:]], 0.0)
    residual = path_residual(
        torch.as_tensor(np.where(alive, rate, 0.0)),
        torch.as_tensor(value[states[:-1]]),
        torch.as_tensor(after),
        torch.as_tensor(alive & ~tables.live[states[1:]]),
        discount=tables.discount,
        window=WINDOW,
    )
    return np.asarray(residual[0]) + value[states[0]]


def _expected_step(subject: Subject, *, with_prior: bool = True) -> Array:
    """E[r − α log π*/ρ + γ V(s')] of every action, with the library's V and π*: (S, A)."""
    tables = subject.tables
    ratio = _log_ratio(subject, with_prior=with_prior)
    step = tables.action_value(subject.control.v.numpy()) - subject.temperature * ratio
    return allowed(subject, step)


def _walk_names(subject: Subject) -> Sequence[str]:
    states, _, alive = _walks(subject)
    return [
        f"from {subject.label('state', int(s))}, {int(going.sum())} steps"
        for s, going in zip(states[0], alive.T, strict=True)
    ]


CONSISTENCY = Step(
    id="path-consistency",
    title="Every path has the same weight",
    explanation=(
        "At the solution it does not matter which actions are taken: what an action loses in value "
        "its low probability makes up for, to the last digit. So along any path, from wherever it "
        "came, reward less α log π/ρ, plus the value at its end, is the value at its start. Path "
        "consistency learning minimises the square of what is missing. Where outcomes are random "
        "it holds for one step, on average over them."
    ),
    formulas=(
        r"V(s_0) = \sum_{t < d} \gamma^t \left[ r_t - \alpha \log"
        r" \frac{\pi^*(a_t \mid s_t)}{\rho(a_t \mid s_t)} \right] + \gamma^d\, V(s_d)",
        r"V(s) = \mathbb{E}_{s'}\left[ r + \gamma\, V(s') \right]"
        r" - \alpha \log \frac{\pi^*(a \mid s)}{\rho(a \mid s)}",
    ),
    relation="=",
    unit="reward",
    checks=(
        Check(
            needs=(assumptions.deterministic,),
            left=Side(
                "the value of the first state, by soft policy iteration",
                lambda subject: subject.best_value[_walks(subject)[0][0]],
            ),
            right=Side(
                f"the library's path residual along {WALKS} walks at random of {WINDOW} steps, "
                "with V and the policy of exact inference",
                _walked_value,
            ),
            twin=Twin(
                "log π in place of log π/ρ: the prior is left out",
                "right",
                lambda subject: _walked_value(subject, with_prior=False),
                blind=assumptions.one_action,
            ),
            tolerance=1e-9,
            over=(_walk_names,),
        ),
        Check(
            needs=(assumptions.solvable,),
            left=Side(
                "the value of the state, by soft policy iteration, whatever the action",
                lambda subject: allowed(
                    subject,
                    np.broadcast_to(subject.best_value[:, None], subject.tables.prior.shape),
                ),
            ),
            right=Side(
                "one step of every action, averaged over outcomes, with V and the policy of exact "
                "inference",
                _expected_step,
            ),
            twin=Twin(
                "log π in place of log π/ρ: the prior is left out",
                "right",
                lambda subject: _expected_step(subject, with_prior=False),
                blind=assumptions.one_action,
            ),
            tolerance=1e-9,
            over=("state", "action"),
        ),
    ),
    reference="Nachum et al. (2017), arXiv:1702.08892, §4 (theorem 1 and corollary 2)",
    about=path_residual,
)


def _some_step(subject: Subject) -> tuple[Array, Array, Array, Array]:
    """Of every non-zero of the whole: its row, its chance, r + γ V(s') and the rest of C, at some V
    and some policy, reward units."""
    whole, tables = subject.whole, subject.tables
    value = subject.other_value
    rows, chances = whole.rows().numpy(), whole.probabilities.numpy()
    after = whole.rewards.numpy() + tables.discount * value[whole.successors.numpy()]
    taken = np.where(tables.prior > 0, subject.policy, 1.0)
    habit = np.where(tables.prior > 0, tables.prior, 1.0)
    rest = -subject.temperature * np.log(taken / habit) - value[:, None]
    return rows, chances, after, rest


def _mean_loss(subject: Subject) -> Array:
    """E_{s'} ½C² of every action, by the library's loss on each outcome, (S, A)."""
    whole, tables = subject.whole, subject.tables
    rows, chances, _, _ = _some_step(subject)
    value = torch.as_tensor(subject.other_value)
    taken = np.where(
        tables.prior > 0, subject.policy / np.where(tables.prior > 0, tables.prior, 1), 1
    )
    cost = subject.temperature * torch.as_tensor(np.log(taken)).flatten()[torch.as_tensor(rows)]
    state = torch.as_tensor(rows) // tables.prior.shape[1]
    residual = path_residual(
        (whole.rewards - cost).unsqueeze(0),
        value[state].unsqueeze(0),
        value[whole.successors.long()].unsqueeze(0),
        torch.ones(1, len(rows), dtype=torch.bool),
        discount=tables.discount,
        window=1,
    )
    weight = torch.ones(residual.shape, requires_grad=True)
    # The loss adds up; its derivative by the weights has it of every outcome.
    (losses,) = torch.autograd.grad(residual_loss(residual, weight), weight)
    total = np.bincount(rows, chances * losses[0].numpy(), minlength=tables.prior.size)
    return allowed(subject, total.reshape(tables.prior.shape))


def _loss_of_mean(subject: Subject, *, with_variance: bool = True) -> Array:
    """½(E C)² + ½ Var C, by moments, (S, A)."""
    tables = subject.tables
    rows, chances, after, rest = _some_step(subject)
    size = tables.prior.size
    mean = np.bincount(rows, chances * after, minlength=size)
    spread = np.bincount(rows, chances * (after - mean[rows]) ** 2, minlength=size)
    centre = mean.reshape(rest.shape) + rest
    variance = spread.reshape(rest.shape) if with_variance else 0.0
    return allowed(subject, (centre**2 + variance) / 2)


PATH_NOISE = Step(
    id="path-noise",
    title="What a sampled outcome costs",
    explanation=(
        "Where outcomes are random, the residual of a sampled step is not zero even at the "
        "solution, and its square is too large on average by the variance of what comes next. So "
        "whoever minimises it pays for certainty too, and does not find the soft value. An average "
        "over outcomes inside the square would cure it, but needs to know them."
    ),
    formulas=(
        r"\mathbb{E}_{s'}\left[ \frac{1}{2} C^2 \right] = \frac{1}{2} \left( \mathbb{E}_{s'} C"
        r" \right)^2 + \frac{1}{2} \mathrm{Var}_{s'}\left[ r + \gamma\, V(s') \right]",
        r"C = r - \alpha \log \frac{\pi(a \mid s)}{\rho(a \mid s)} + \gamma\, V(s') - V(s)",
    ),
    relation="=",
    unit="",
    assumptions=(assumptions.noisy,),
    checks=(
        Check(
            left=Side(
                "the library's loss on every outcome of every action, weighted by its chance, at "
                "some V and some policy; reward units squared",
                _mean_loss,
            ),
            right=Side("the square of the mean, and the variance, by moments", _loss_of_mean),
            twin=Twin(
                "the variance is left out: the mean of squares is taken for the square of the mean",
                "right",
                lambda subject: _loss_of_mean(subject, with_variance=False),
                blind=lambda subject: (
                    None
                    if np.nanmax(_mean_loss(subject) - _loss_of_mean(subject, with_variance=False))
                    > 1e-9
                    else "all outcomes of an action are worth the same"
                ),
            ),
            tolerance=1e-9,
            over=("state", "action"),
        ),
    ),
    reference="Antos et al. (2008), doi:10.1007/s10994-007-5038-2, §3; Nachum et al. (2017), §4",
    about=residual_loss,
)


STEPS = (
    CONSISTENCY,
    PATH_NOISE,
)
