"""What becomes of the best policy as the temperature moves: `curves`, for whoever draws them."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import torch

from inference_rl.derivation.independent import Array
from inference_rl.derivation.subject import MOST_STATES, Subject
from inference_rl.finite import FiniteModel
from inference_rl.inference import InferenceResult, as_number, infer
from inference_rl.inference.exact import Exact
from inference_rl.linear_gaussian import LinearGaussianModel
from inference_rl.policies import TabularPolicy

SPAN = 100.0
"""The grid goes from the temperature divided by this to it times this."""

POINTS = 25
"""Temperatures, by equal factors; odd, so that the middle one is the temperature itself."""

STATES = 6
"""States whose policies are shown: those that the policy visits most."""


@dataclasses.dataclass(frozen=True)
class Curves:
    """Exact inference at `POINTS` temperatures, in ascending order.

    :ivar temperatures: reward units. :ivar chosen: index of the derivation's own.
    :ivar objective: J in KL form, reward units. :ivar objective_entropy_form: E Σ γ^t (r + αH),
        likewise. :ivar expected_return: E Σ γ^t r, of the same policies.
    :ivar regular: the value of regular RL, reward units: the limit of the returns on the left.
    :ivar entropy: of the policy, nats, mean per step.
    :ivar log_evidence, evidence_gap: nats; None where the evidence is infinite, or not defined.
    :ivar states, actions: what they are called; empty where there is no table to show.
    :ivar policy: probabilities, by temperature, state, action.
    """

    temperatures: tuple[float, ...]
    chosen: int
    objective: tuple[float, ...]
    objective_entropy_form: tuple[float, ...]
    expected_return: tuple[float, ...]
    regular: float
    entropy: tuple[float, ...]
    log_evidence: tuple[float | None, ...]
    evidence_gap: tuple[float | None, ...]
    states: tuple[str, ...]
    actions: tuple[str, ...]
    policy: tuple[tuple[tuple[float, ...], ...], ...]


def curves(subject: Subject) -> Curves | None:
    """The curves of a model that exact inference knows; None of others, and of very large ones."""
    model: FiniteModel | LinearGaussianModel
    if subject.finite is not None and subject.whole_states <= MOST_STATES:
        model = subject.whole
    elif subject.linear is not None:
        model = subject.linear
    else:
        return None
    grid = subject.temperature * np.geomspace(1 / SPAN, SPAN, POINTS)
    grid[POINTS // 2] = subject.temperature
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [infer(model, Exact(float(temperature))) for temperature in grid]
        regular = infer(model, Exact(0.0))
    if any(result.objective is None or result.parts is None for result in results):
        return None
    parts = [result.parts for result in results if result.parts is not None]
    shown = _most_visited(subject, results[POINTS // 2])
    actions = model.num_actions if isinstance(model, FiniteModel) else 0
    return Curves(
        temperatures=tuple(grid.tolist()),
        chosen=POINTS // 2,
        objective=tuple(_number(result.objective) for result in results),
        objective_entropy_form=tuple(_number(result.objective_entropy_form) for result in results),
        expected_return=tuple(part.expected_return for part in parts),
        regular=_number(regular.objective),
        entropy=tuple(part.entropy / part.steps if part.steps else 0.0 for part in parts),
        log_evidence=tuple(
            None if result.log_evidence is None else as_number(result.log_evidence)
            for result in results
        ),
        evidence_gap=tuple(None if r.gap is None else r.gap.total for r in results),
        states=tuple(subject.label("state", state) for state in shown),
        actions=tuple(subject.label("action", action) for action in range(actions)),
        policy=tuple(
            tuple(tuple(_table(result)[state].tolist()) for state in shown) for result in results
        ),
    )


def _most_visited(subject: Subject, result: InferenceResult) -> list[int]:
    """The states that a policy visits most, in their own order."""
    if subject.finite is None:
        return []
    visits = subject.tables.visits(_table(result))
    most = torch.as_tensor(visits).argsort(descending=True, stable=True)[:STATES]
    return sorted(int(state) for state in most if visits[state] > 0)


def _table(result: InferenceResult) -> Array:
    assert isinstance(result.policy, TabularPolicy)
    return np.asarray(result.policy.probs)


def _number(value: object) -> float:
    assert value is not None
    return float(value)  # type: ignore[arg-type]
