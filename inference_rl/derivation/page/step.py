"""A step on the page: `section`. Its numbers and its twin's stand in the same place.

What has the class "as-is" is seen until the step is broken, what has the class "twin" after that;
the style sheet sees to it, so that nothing has to be computed, and it works without the script.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Literal
from xml.etree.ElementTree import Element

from inference_rl.derivation.page import charts
from inference_rl.derivation.page.mathml import mathml
from inference_rl.derivation.step import Comparison, Finding, Met, Row, Step
from inference_rl.html.charts import decimals, number
from inference_rl.html.markup import Child, element

Case = Literal["as-is", "twin"]

SIDE_DIGITS, ROW_DIGITS, GAP_DIGITS = 12, 8, 2

MARKS = {"pass": "✓", "fail": "✗", "does not apply": "–"}
RELATIONS = {"=": ("=", "≠"), "<=": ("≤", ">")}
"""Where they hold, and where they do not."""

UNITS = {"reward": "in reward units", "nats": "in nats", "": ""}

RAISED = re.compile(r"\^(\{[^{}]*\}|\w|\*)")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def section(finding: Finding) -> Element:
    """A finding, with a switch that breaks it."""
    step, twin = finding.step, finding.twin
    name = f"{step.id}-title"
    words = {"left": finding.left_words, "right": finding.right_words}
    numbers = []
    if finding.comparison is not None:
        numbers.append(_numbers(step, finding.comparison, words, "as-is"))
    if twin is not None and twin.comparison is not None:
        words[twin.replaces] = f"Broken: {twin.words}"
        numbers.append(_numbers(step, twin.comparison, words, "twin", broken=twin.replaces))
    return element(
        "section",
        element(
            "div",
            element(
                "h2",
                element("span", f"{finding.number}", class_="number"),
                element("a", step.title, href=f"#{step.id}"),
                id=name,
                tabindex="-1",
            ),
            badge(finding.verdict, "as-is"),
            None if twin is None else _twin_badge(twin.verdict),
            class_="title",
        ),
        element("p", *_inline(step.explanation), class_="explanation"),
        *(element("div", mathml(formula), class_="formula") for formula in step.formulas),
        _why(f"{finding.verdict}: {finding.why}", "as-is") if finding.why else None,
        None if twin is None else _switch(step),
        None
        if twin is None or twin.verdict in MARKS
        else _why(f"{twin.words}: {twin.verdict}", "twin"),
        element("div", *numbers, aria_live="polite") if numbers else None,
        _assumptions(finding),
        _origin(finding),
        class_="step",
        id=step.id,
        aria_labelledby=name,
        data_verdict=finding.verdict,
    )


def badge(
    verdict: str, case: Case | Literal[""] = "", says: str | None = None, *, word: bool = True
) -> Element:
    """A mark, and the verdict in words, which are never missing for those who hear the page."""
    mark = element("span", MARKS[verdict], class_="mark", aria_hidden="true")
    text = element("span", says or verdict, class_=None if word else "heard")
    return element("span", mark, text, class_=f"badge {verdict.replace(' ', '-')} {case}".strip())


def _twin_badge(verdict: str) -> Element:
    if verdict == "fail":
        return badge("fail", "twin", "fail: caught")
    return badge("does not apply", "twin", "cannot differ here")


def _why(words: str, case: Case) -> Element:
    return element("p", *_inline(words), class_=f"why {case}")


def _switch(step: Step) -> Element:
    """Shows the twin in place of what is right."""
    name = f"{step.id}-break"
    return element(
        "p",
        element("input", type="checkbox", role="switch", class_="break", id=name),
        element("label", "Break it", for_=name),
        class_="switch",
    )


def _numbers(
    step: Step, comparison: Comparison, words: dict[str, str], case: Case, *, broken: str = ""
) -> Element:
    """Both sides at the worst place, how far apart they are, and the other places.

    :param case: whose numbers these are. :param broken: which side is the twin.
    """
    worst, unit = comparison.worst, UNITS[step.unit]
    slack = step.relation == "<=" and worst.difference < 0
    apart = abs(worst.difference) if slack else worst.difference
    where = f"at {worst.place}" if worst.place else ""
    if comparison.places > 1:
        where += f", the worst of {comparison.places:,} places"
    return element(
        "div",
        element(
            "div",
            _side("left", worst.left, worst.left_error, words["left"], broken),
            element("span", RELATIONS[step.relation][not comparison.holds], class_="relation"),
            _side("right", worst.right, worst.right_error, words["right"], broken),
            class_="sides",
        ),
        charts.relation(worst, step.relation),
        element(
            "p",
            "slack " if slack else "difference ",
            _data(apart, number(apart, GAP_DIGITS), "difference"),
            ", allowed ",
            _data(worst.tolerance, number(worst.tolerance, GAP_DIGITS), "tolerance"),
            ", ".join(["", *filter(None, [unit, where])]),
            class_="difference",
        ),
        _table(step, comparison) if comparison.places > 1 else None,
        class_=f"numbers {case}",
    )


def _side(name: str, value: float, error: float | None, words: str, broken: str) -> Element:
    return element(
        "div",
        element(
            "p",
            element("span", class_="key", aria_hidden="true"),
            *_measured(value, error),
            class_="value",
        ),
        element("p", *_inline(words), class_="words"),
        class_=f"side {name}" + " broken" * (name == broken),
    )


def _measured(value: float, error: float | None) -> Iterator[Child]:
    """A value; an estimate to two digits of its standard error."""
    if not error:
        yield _data(value, number(value, SIDE_DIGITS), "value")
        return
    places = 1 - math.floor(math.log10(error))
    if not 0 <= places <= SIDE_DIGITS:
        yield _data(value, number(value, ROW_DIGITS), "value")
        yield f" ± {number(error, 2)}"
        return
    yield _data(value, decimals(value, places), "value")
    yield f" ± {decimals(error, places)}"


def _data(value: float, text: str, class_: str | None = None) -> Element:
    """A number as it is read, with the number as it is."""
    return element("data", text, value=repr(value), class_=class_)


def _table(step: Step, comparison: Comparison) -> Element:
    shown, count = comparison.rows, comparison.places
    drawn = step.relation == "<="
    sizes = [abs(at.difference) for at in shown if math.isfinite(at.difference)]
    which = f"All {count}" if len(shown) == count else f"{len(shown)} of {count:,}"

    def row(at: Row) -> Element:
        picture = element("td", charts.slack(at, max(sizes, default=0.0)), class_="picture")
        return element(
            "tr",
            element("th", at.place, scope="row"),
            element("td", _data(at.left, number(at.left, ROW_DIGITS))),
            element("td", _data(at.right, number(at.right, ROW_DIGITS))),
            element("td", _data(at.difference, number(at.difference, GAP_DIGITS))),
            picture if drawn else None,
            class_="worst" if at == comparison.worst else None,
        )

    columns = ["place", "left", "right", "difference", *(["slack"] * drawn)]
    head = element("tr", *(element("th", column, scope="col") for column in columns))
    return element(
        "details",
        element("summary", f"{which} places"),
        element(
            "div",
            element("table", element("thead", head), element("tbody", *(row(at) for at in shown))),
            class_="wide",
        ),
    )


def _assumptions(finding: Finding) -> Element | None:
    if not finding.assumptions:
        return None

    def entry(known: Met) -> Element:
        kind, says = ("pass", "met: ") if known.met else ("fail", "not met: ")
        why = "" if known.met or known.why in finding.why else f": {known.why}"
        return element("li", badge(kind, says=says, word=False), known.name + why)

    return element(
        "div",
        element("h3", "Assumes"),
        element("ul", *(entry(known) for known in finding.assumptions)),
        class_="assumes",
    )


def _origin(finding: Finding) -> Element:
    source = finding.source
    return element(
        "dl",
        element("dt", "From"),
        element("dd", *_linked(finding.step.reference)),
        element("dt", "Code"),
        element(
            "dd",
            element("code", f"{source.file}:{source.line}"),
            f" ({source.function.rpartition('.')[2]})",
        ),
        class_="origin",
    )


def _inline(text: str) -> Iterator[Child]:
    """Text in which `code` stands between backticks, and x^{y} or x^y is raised."""
    for i, part in enumerate(text.split("`")):
        if i % 2:
            yield element("code", part)
            continue
        for k, piece in enumerate(RAISED.split(part)):
            yield element("sup", piece.strip("{}")) if k % 2 else piece


def _linked(text: str) -> Iterator[Child]:
    """Text in which papers are linked, for those who are online."""
    for i, part in enumerate(ARXIV.split(text)):
        address = f"https://arxiv.org/abs/{part}"
        yield element("a", f"arXiv:{part}", href=address, rel="noreferrer") if i % 2 else part
