"""One decision with actions in a small box: integrals on a grid, and draws of the program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference_rl import decision
from inference_rl.decision import decide
from inference_rl.derivation.independent import Array
from inference_rl.derivation.step import Estimate
from inference_rl.derivation.subject import Subject
from inference_rl.simulate import starting_states
from inference_rl.truncated_normal import TruncatedNormal

MANY = 20_000
"""Draws in each state."""

STARTS = 4
NODES = {1: (200, 150), 2: (64, 48)}
"""Per dimension, of the integral and of the one that tells how good it is."""


class SomeMessage:
    """A Q(s, a) that is smooth, with several hills, for states (N, ...); reward units."""

    def __init__(self, subject: Subject) -> None:
        generator = subject.generator("message")
        size = int(np.prod(subject.model.action_space.shape or ()))
        self.scale = 2 * subject.temperature
        self.slope = torch.as_tensor(generator.normal(size=(STARTS, size)))
        self.phase = torch.as_tensor(generator.uniform(0, 2 * np.pi, (STARTS, size)))

    def __call__(self, action: Tensor) -> Tensor:
        wave = torch.cos(3 * action.double() + self.phase) + self.slope * action.double()
        return self.scale * wave.mean(-1)


def states_of(subject: Subject) -> Tensor:
    """Some states (N, ...) to decide in."""
    return starting_states(subject.model, STARTS)


def names(subject: Subject) -> Sequence[str]:
    """What to call them."""
    return [f"start {i + 1}" for i in range(STARTS)]


def some_guide(subject: Subject) -> Any:
    """Some policy in these states."""
    generator = subject.generator("guide of a box")
    size = int(np.prod(subject.model.action_space.shape or ()))
    loc = torch.as_tensor(generator.uniform(-0.5, 0.5, (STARTS, size)))
    return TruncatedNormal(loc, torch.full_like(loc, 0.7)).to_event(1)


def evidence(subject: Subject) -> Estimate:
    """α log ∫ ρ e^{Q/α} da in every state, and how far a coarser grid is off, (N,)."""
    fine, coarse = (
        _integral(subject, nodes)
        for nodes in NODES[int(np.prod(subject.model.action_space.shape or ()))]
    )
    return Estimate(fine, np.abs(fine - coarse))


def evidence_twice(subject: Subject) -> Estimate:
    """The same for two comparisons, (2, N)."""
    whole = evidence(subject)
    return Estimate(np.array([whole.value] * 2), np.array([whole.standard_error] * 2))


def _integral(subject: Subject, nodes: int) -> Array:
    size = int(np.prod(subject.model.action_space.shape or ()))
    points, weights = np.polynomial.legendre.leggauss(nodes)
    grid = np.stack(np.meshgrid(*[points] * size, indexing="ij"), axis=-1).reshape(-1, size)
    log_volume = np.log(weights)
    for _ in range(size - 1):
        log_volume = np.add.outer(log_volume, np.log(weights))
    actions = torch.as_tensor(grid).unsqueeze(1).expand(-1, STARTS, size)
    prior: Any = subject.prior(states_of(subject))
    terms = prior.log_prob(actions) + SomeMessage(subject)(actions) / subject.temperature
    terms = terms + torch.as_tensor(log_volume.reshape(-1, 1))
    return np.asarray(subject.temperature * terms.logsumexp(0))


def drawn(subject: Subject, draws: int) -> decision.Decision:
    """The program of one decision by draws of a guide, (K, N)."""
    states = states_of(subject)
    guide = some_guide(subject).expand((draws, STARTS))
    return decide(
        states.expand(draws, *states.shape),
        lambda *_: guide,
        subject.prior,
        SomeMessage(subject),
        temperature=torch.tensor(subject.temperature),
        action_space=subject.model.action_space,
    )


def weighted_evidence(subject: Subject, draws: int, *, with_density: bool = True) -> Estimate:
    """The same as `evidence`, by draws of the program that are weighted by their density."""
    found = drawn(subject, draws)
    log_guide = found.log_guide if with_density else torch.zeros_like(found.log_guide)
    weight = (found.log_joint - log_guide).exp()
    error = subject.temperature * weight.std(0) / weight.mean(0) / np.sqrt(draws)
    return Estimate(decision.evidence(found, log_guide), error)


def small_evidence(subject: Subject, draws: int, repeats: int) -> Estimate:
    """The mean of `decision.evidence` of so few draws in every state, over many repeats, (N,)."""
    message, states = SomeMessage(subject), states_of(subject)
    states = states.repeat(repeats, *[1] * (states.dim() - 1))
    base = some_guide(subject).base_dist
    parts = (part.repeat(repeats, 1).expand(draws, -1, -1) for part in (base.loc, base.scale))
    guide = TruncatedNormal(*parts).to_event(1)
    found = decide(
        states.expand(draws, *states.shape),
        lambda *_: guide,
        subject.prior,
        lambda action: message(action.unflatten(1, (repeats, STARTS))).flatten(1),
        temperature=torch.tensor(subject.temperature),
        action_space=subject.model.action_space,
    )
    return Estimate.of(decision.evidence(found, found.log_guide).reshape(repeats, STARTS))
