"""The derivation as a whole: the steps in their order, and what they come to on a model."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from inference_rl.derivation import (
    bound,
    consistency,
    control,
    decisions,
    evidence,
    fixed_width,
    gradients,
    guide,
    joint,
    limits,
    reweighting,
    soft_iteration,
    soft_q_learning,
    tempering,
)
from inference_rl.derivation.curves import Curves, curves
from inference_rl.derivation.step import Finding, Step, evaluate
from inference_rl.derivation.subject import Subject
from inference_rl.environment import EnvironmentModel
from inference_rl.priors import ActionPrior

STEPS: tuple[Step, ...] = (
    *decisions.STEPS,
    *joint.STEPS,
    *evidence.STEPS,
    *bound.STEPS,
    *guide.STEPS,
    *control.STEPS,
    *limits.STEPS,
    *gradients.STEPS,
    *soft_iteration.STEPS,
    *soft_q_learning.STEPS,
    *consistency.STEPS,
    *reweighting.STEPS,
    *tempering.STEPS,
    *fixed_width.STEPS,
    control.REGRET,
)


@dataclasses.dataclass(frozen=True)
class Derivation:
    """Every step on a model.

    :ivar target: what the model is called. :ivar temperature: reward units.
    :ivar notes: what of the model the steps look at, in sentences.
    :ivar findings: in the order of the ladder. :ivar curves: over temperature, if asked for and the
        model has any.
    """

    target: str
    temperature: float
    discount: float
    horizon: int | None
    state_space: str
    action_space: str
    prior: str
    seed: int
    notes: tuple[str, ...]
    findings: tuple[Finding, ...]
    seconds: float
    curves: Curves | None = None

    @property
    def failed(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.verdict == "fail")

    @property
    def counts(self) -> dict[str, int]:
        """How many steps there are of every verdict, and how many twins were caught."""
        verdicts = [finding.verdict for finding in self.findings]
        return {
            "steps": len(verdicts),
            "pass": verdicts.count("pass"),
            "fail": verdicts.count("fail"),
            "does_not_apply": verdicts.count("does not apply"),
            "twins": sum(finding.twin is not None for finding in self.findings),
            "twins_caught": sum(finding.twin_verdict == "fail" for finding in self.findings),
        }

    def as_json(self) -> dict[str, Any]:
        """All but the curves, for `json.dumps`: null where there is no finite number."""
        kept = {f.name for f in dataclasses.fields(self)} - {"findings", "curves"}
        own = {name: value for name, value in vars(self).items() if name in kept}
        steps = [finding.as_json() for finding in self.findings]
        return own | {"counts": self.counts, "steps": steps}


def derive(
    model: EnvironmentModel,
    *,
    temperature: float = 1.0,
    prior: ActionPrior | None = None,
    seed: int = 0,
    step: int | None = None,
    with_curves: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Derivation:
    """Check every step of the derivation on a model.

    :param temperature: > 0, reward units. :param prior: in place of the model's own.
    :param step: the number of the only one to check. :param with_curves: compute them too.
    :param progress: called with a few words before every step.
    :raises ValueError: the temperature is not a finite number above 0, there is no such step, or
        the model or the prior are faulty.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature: expected a finite number > 0 in reward units, got {temperature}"
        )
    if step is not None and not 1 <= step <= len(STEPS):
        raise ValueError(f"step: expected a number from 1 to {len(STEPS)}, got {step}")
    started = time.perf_counter()
    subject = Subject(model, temperature, prior=prior, seed=seed)
    findings = []
    for number, known in enumerate(STEPS, start=1):
        if step in (None, number):
            if progress is not None:
                progress(f"step {number} of {len(STEPS)}: {known.title}")
            findings.append(evaluate(known, subject, number))
    drawn = None
    if with_curves:
        if progress is not None:
            progress("curves over temperature")
        drawn = curves(subject)
    return Derivation(
        target=(model.origin or {}).get("target") or model.name,
        temperature=float(temperature),
        discount=float(model.discount),
        horizon=model.horizon,
        state_space=str(model.state_space),
        action_space=str(model.action_space),
        prior="the model's own" if prior is None else type(prior).__name__,
        seed=seed,
        notes=subject.notes(),
        findings=tuple(findings),
        seconds=time.perf_counter() - started,
        curves=drawn,
    )
