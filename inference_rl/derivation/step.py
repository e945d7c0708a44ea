"""One step of the derivation, and what it comes to on a model: `Step`, `evaluate`, `Finding`.

A step is an equation or an inequality, and two ways to compute its sides that share nothing but the
model; a third, the *twin*, has one mistake in it that people make, and must not pass. What a step
assumes is a test of the model, so that a step whose assumptions do not hold says why it does not
apply and is never counted as passed.

A renderer gets a `Derivation` (`inference_rl.derivation.derive`): in it `findings`, in the order of
the ladder. All that is to be shown of a step is in its `Finding`: `finding.step` has the text
(`title`, `explanation`, `formulas` in LaTeX, `reference`), the finding the numbers on this model
(`left`, `right`, `difference`, `tolerance` in the unit of the step, at the `place` where they
differ most), `verdict` and `why`, both computations in words, `rows` of a table of places, the
assumptions and whether this model meets them, the place in the source, and the same numbers of the
twin. Numbers are None where a step does not apply. `as_json` is all of it as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

import inference_rl
from inference_rl.randomness import derived, torch_seeded

if TYPE_CHECKING:
    from inference_rl.derivation.subject import Subject

Array = np.ndarray[Any, np.dtype[np.float64]]
Relation = Literal["=", "<="]
Verdict = Literal["pass", "fail", "does not apply"]
Unit = Literal["reward", "nats", ""]

DEVIATIONS = 5.0
"""Standard errors by which two estimates may differ: one pair in two million does by chance."""

MOST_ROWS = 48
"""Places that are listed one by one; of more, `SHOWN_ROWS`."""
SHOWN_ROWS = 16

ROOT = Path(inference_rl.__file__).parent.parent


class DoesNotApplyError(Exception):
    """A computation finds that its step says nothing about this model; the message is why."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What was drawn at random: means and their standard errors, of one shape."""

    value: Any
    standard_error: Any

    @classmethod
    def of(cls, draws: Tensor | Array) -> Estimate:
        """The mean over the first dimension of independent draws."""
        table = _array(draws)
        error = table.std(0, ddof=1) / math.sqrt(len(table))
        return cls(table.mean(0), error)


Result = float | Array | Tensor | Estimate
Compute = Callable[["Subject"], Result]
Axis = str | tuple[str, ...] | Callable[["Subject"], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Assumption:
    """What has to hold of a model.

    :ivar name: a few words, "a discount below 1". :ivar unmet: why a model does not meet it, as the
        end of a sentence that begins with "does not apply: "; None if it does.
    """

    name: str
    unmet: Callable[[Subject], str | None]


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a relation.

    :ivar words: how it is computed. :ivar compute: a number, or an array over the places of the
        check, in the unit of the step.
    """

    words: str
    compute: Compute


@dataclasses.dataclass(frozen=True)
class Twin:
    """A side with one mistake in it, which the other side has to find.

    :ivar words: the mistake. :ivar replaces: which side it takes the place of.
    :ivar blind: models on which the mistake makes no difference: why, or None. It is asked only
        where the twin passes.
    """

    words: str
    replaces: Literal["left", "right"]
    compute: Compute
    blind: Callable[[Subject], str | None] = lambda _: None


@dataclasses.dataclass(frozen=True)
class Check:
    """Two computations of one step that share nothing but the model, for a kind of models.

    :ivar needs: what has to hold, besides the assumptions of the step.
    :ivar tolerance: for rounding, relative to the largest number on either side and to the size of
        what is at stake in the model (`Subject.size`). `DEVIATIONS` standard errors of whatever is
        an estimate are added.
    :ivar over: what the dimensions of the sides are: "state" or "action", whose names the model
        knows, names, or a function that gives names.
    """

    left: Side
    right: Side
    twin: Twin
    needs: tuple[Assumption, ...] = ()
    tolerance: float = 1e-10
    over: tuple[Axis, ...] = ()


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of the ladder.

    :ivar id: lower-case words joined by hyphens. :ivar explanation: two to five sentences.
    :ivar formulas: LaTeX. :ivar relation: of the left side to the right one.
    :ivar unit: of both. :ivar checks: the first whose needs are met is made.
    :ivar reference: paper and equation, or section. :ivar about: what of the library it is about.
    """

    id: str
    title: str
    explanation: str
    formulas: tuple[str, ...]
    relation: Relation
    unit: Unit
    checks: tuple[Check, ...]
    reference: str
    about: Callable[..., Any]
    assumptions: tuple[Assumption, ...] = ()


@dataclasses.dataclass(frozen=True)
class Row:
    """Both sides at one place. Their standard errors are None where they are no estimates."""

    place: str
    left: float
    right: float
    difference: float
    tolerance: float
    left_error: float | None = None
    right_error: float | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two sides, compared everywhere.

    :ivar worst: the place where they miss the relation most, or come nearest to it.
    :ivar rows: all places, or some of them. :ivar places: how many there are.
    """

    holds: bool
    worst: Row
    rows: tuple[Row, ...]
    places: int


@dataclasses.dataclass(frozen=True)
class Met:
    """An assumption, whether the model meets it, and why not."""

    name: str
    met: bool
    why: str = ""


@dataclasses.dataclass(frozen=True)
class TwinFinding:
    """What came of the twin.

    :ivar verdict: "fail" where the mistake was found; "cannot differ here: ..." where it makes no
        difference to this model; "pass" where it should have been found; "failed to compute: ..."
        where it gave no number.
    """

    words: str
    replaces: Literal["left", "right"]
    verdict: str
    comparison: Comparison | None


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the library has what a step is about: file and line, from the root of the project."""

    function: str
    file: str
    line: int


@dataclasses.dataclass(frozen=True)
class Finding:
    """A step on a model.

    :ivar number: in the ladder, from 1. :ivar why: of a verdict other than "pass".
    :ivar left_words, right_words: how the sides are computed. :ivar seconds: both sides and twin.
    """

    number: int
    step: Step
    verdict: Verdict
    why: str
    assumptions: tuple[Met, ...]
    left_words: str
    right_words: str
    source: Source
    comparison: Comparison | None = None
    twin: TwinFinding | None = None
    seconds: float = 0.0

    @property
    def worst(self) -> Row | None:
        """Where the sides differ most."""
        return None if self.comparison is None else self.comparison.worst

    @property
    def left(self) -> float | None:
        return None if self.worst is None else self.worst.left

    @property
    def right(self) -> float | None:
        return None if self.worst is None else self.worst.right

    @property
    def difference(self) -> float | None:
        """left − right; of an inequality below zero where it holds, by as much as its slack."""
        return None if self.worst is None else self.worst.difference

    @property
    def tolerance(self) -> float | None:
        return None if self.worst is None else self.worst.tolerance

    @property
    def place(self) -> str:
        """Which state, action or the like `left` and `right` are of; empty if there is but one."""
        return "" if self.worst is None else self.worst.place

    @property
    def rows(self) -> tuple[Row, ...]:
        return () if self.comparison is None else self.comparison.rows

    @property
    def twin_verdict(self) -> str | None:
        return None if self.twin is None else self.twin.verdict

    def as_json(self) -> dict[str, Any]:
        """All of it; numbers that are not finite are null."""
        twin = self.twin
        return {
            "number": self.number,
            "id": self.step.id,
            "title": self.step.title,
            "relation": self.step.relation,
            "left": _finite(self.left),
            "right": _finite(self.right),
            "difference": _finite(self.difference),
            "tolerance": _finite(self.tolerance),
            "unit": self.step.unit,
            "verdict": self.verdict,
            "why": self.why,
            "twin_verdict": self.twin_verdict,
            "reference": self.step.reference,
            "explanation": self.step.explanation,
            "formulas": list(self.step.formulas),
            "assumptions": [dataclasses.asdict(met) for met in self.assumptions],
            "left_words": self.left_words,
            "right_words": self.right_words,
            "left_error": None if self.worst is None else _finite(self.worst.left_error),
            "right_error": None if self.worst is None else _finite(self.worst.right_error),
            "place": self.place,
            "places": 0 if self.comparison is None else self.comparison.places,
            "rows": [_row_as_json(row) for row in self.rows],
            "twin": None
            if twin is None
            else {
                "words": twin.words,
                "replaces": twin.replaces,
                "verdict": twin.verdict,
                **(
                    {}
                    if twin.comparison is None
                    else _row_as_json(twin.comparison.worst)
                    | {"rows": [_row_as_json(row) for row in twin.comparison.rows]}
                ),
            },
            "source": dataclasses.asdict(self.source),
            "seconds": self.seconds,
        }


def evaluate(step: Step, subject: Subject, number: int) -> Finding:
    """What a step comes to on a model. The global random state is left as it was."""
    started = time.perf_counter()
    with _float64():
        return dataclasses.replace(
            _evaluated(step, subject, number), seconds=time.perf_counter() - started
        )


def _evaluated(step: Step, subject: Subject, number: int) -> Finding:
    source = source_of(step.about)
    general = [_met(assumption, subject) for assumption in step.assumptions]
    special = [[_met(need, subject) for need in check.needs] for check in step.checks]
    chosen = next((i for i, needs in enumerate(special) if all(n.met for n in needs)), None)
    check = step.checks[chosen or 0]
    known = (*general, *special[chosen or 0])
    finding = Finding(
        number, step, "does not apply", "", known, check.left.words, check.right.words, source
    )
    if not all(met.met for met in general):
        return dataclasses.replace(finding, why=_reasons(general))
    if chosen is None:
        firsts = [next(need for need in needs if not need.met) for needs in special]
        return dataclasses.replace(finding, why=_reasons(firsts))
    try:
        left, right = (_computed(side.compute, step, subject) for side in (check.left, check.right))
        comparison = compare(left, right, step, check, subject)
    except DoesNotApplyError as reason:
        return dataclasses.replace(finding, why=str(reason))
    except Exception as error:  # one computation that breaks must not take the page with it
        why = f"a computation failed: {_said(error)}"
        return dataclasses.replace(finding, verdict="fail", why=why)
    verdict: Verdict = "pass" if comparison.holds else "fail"
    return dataclasses.replace(
        finding,
        verdict=verdict,
        why="" if comparison.holds else _miss(step, comparison.worst),
        comparison=comparison,
        twin=_twin(step, check, subject, left, right),
    )


def _twin(
    step: Step, check: Check, subject: Subject, left: Estimate, right: Estimate
) -> TwinFinding:
    twin = check.twin
    try:
        broken = _computed(twin.compute, step, subject)
    except DoesNotApplyError as reason:
        verdict = f"cannot differ here: {reason}"
        return TwinFinding(twin.words, twin.replaces, verdict, None)
    except Exception as error:  # as for the sides
        return TwinFinding(twin.words, twin.replaces, f"failed to compute: {_said(error)}", None)
    sides = (broken, right) if twin.replaces == "left" else (left, broken)
    comparison = compare(*sides, step, check, subject)
    verdict = "fail"
    if comparison.holds:
        reason_why = twin.blind(subject)
        verdict = "pass" if reason_why is None else f"cannot differ here: {reason_why}"
    return TwinFinding(twin.words, twin.replaces, verdict, comparison)


def _computed(compute: Compute, step: Step, subject: Subject) -> Estimate:
    # A side draws the same numbers whatever was drawn before.
    with torch_seeded(derived(subject.seed, step.id)):
        result = compute(subject)
    if isinstance(result, Estimate):
        return Estimate(_array(result.value), _array(result.standard_error))
    return Estimate(_array(result), np.zeros(()))


def compare(
    left: Estimate, right: Estimate, step: Step, check: Check, subject: Subject
) -> Comparison:
    """Whether `left` relates to `right` as the step says, wherever there are numbers.

    NaN on either side marks a place that is left out.
    """
    one, other = np.broadcast_arrays(left.value, right.value)
    errors = [np.broadcast_to(side.standard_error, one.shape) for side in (left, right)]
    kept = ~(np.isnan(one) | np.isnan(other))
    if not kept.any():
        raise ValueError(f"{step.id}: expected numbers on both sides, got none")
    with np.errstate(invalid="ignore"):
        difference = np.where(one == other, 0.0, one - other)
    size = max(
        subject.size(step.unit),
        *(float(np.abs(side[np.isfinite(side)]).max(initial=0.0)) for side in (one, other)),
    )
    tolerance = check.tolerance * size + DEVIATIONS * np.hypot(*errors)
    excess = (np.abs(difference) if step.relation == "=" else difference) - tolerance
    excess = np.where(kept, excess, -np.inf)
    worst = int(excess.argmax())
    names = places(check.over, one.shape, subject)

    def row(index: int) -> Row:
        estimates = [
            float(error.flat[index]) if side.standard_error.any() else None
            for side, error in zip((left, right), errors, strict=True)
        ]
        return Row(
            names(index),
            float(one.flat[index]),
            float(other.flat[index]),
            float(difference.flat[index]),
            float(np.broadcast_to(tolerance, one.shape).flat[index]),
            *estimates,
        )

    indices = np.flatnonzero(kept)
    shown = indices
    if len(indices) > MOST_ROWS:
        spread = indices[np.linspace(0, len(indices) - 1, SHOWN_ROWS - 1).astype(int)]
        shown = np.union1d(spread, worst)
    return Comparison(
        holds=bool(excess.flat[worst] <= 0),
        worst=row(worst),
        rows=tuple(row(int(index)) for index in shown),
        places=len(indices),
    )


def places(
    over: tuple[Axis, ...], shape: tuple[int, ...], subject: Subject
) -> Callable[[int], str]:
    """The name of every place of an array whose dimensions are `over`, by its flat index."""
    if len(over) != len(shape):
        raise ValueError(f"over: expected a name for each dimension of {shape}, got {over}")
    known = [axis(subject) if callable(axis) else axis for axis in over]

    def name(index: int) -> str:
        at = np.unravel_index(index, shape)
        parts = (
            subject.label(axis, int(i)) if isinstance(axis, str) else axis[int(i)]
            for axis, i in zip(known, at, strict=True)
        )
        return ", ".join(parts)

    return name


def source_of(function: Callable[..., Any]) -> Source:
    """Where a function is written."""
    function = inspect.unwrap(function)
    path = Path(inspect.getsourcefile(function) or "").resolve()
    line = inspect.getsourcelines(function)[1]
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return Source(f"{function.__module__}.{function.__qualname__}", shown.as_posix(), line)


def _met(assumption: Assumption, subject: Subject) -> Met:
    reason = assumption.unmet(subject)
    return Met(assumption.name, reason is None, reason or "")


def _reasons(known: list[Met]) -> str:
    return "; ".join(dict.fromkeys(met.why for met in known if not met.met))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _miss(step: Step, worst: Row) -> str:
    at = f" at {worst.place}" if worst.place else ""
    sign = "differ by" if step.relation == "=" else "exceed the relation by"
    return f"both sides {sign} {abs(worst.difference):.3g}{at}, allowed {worst.tolerance:.3g}"


def _array(value: Any) -> Array:
    if isinstance(value, Tensor):
        value = value.detach().double().numpy()
    return np.asarray(value, dtype=np.float64)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _row_as_json(row: Row) -> dict[str, Any]:
    return {
        name: value if isinstance(value, str) else _finite(value)
        for name, value in dataclasses.asdict(row).items()
    }


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
