"""Small pictures as inline SVG: how a relation holds, and curves over temperature with a marker.

Colours are classes of `style.css`. What moves with the slider has an attribute `data-frames`: for
every attribute that changes ("text" for the text) its value at every temperature. `script.js`
picks, and computes nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element

import numpy as np

from inference_rl.derivation.step import Relation, Row
from inference_rl.html.charts import (
    LARGE,
    SMALL,
    Frame,
    Values,
    across_line,
    bottom_axis,
    height_label,
    number,
    path_of,
    power_axis,
    value_axis,
)
from inference_rl.html.markup import element

DECADES = 16.0
"""How far from its tolerance a difference is drawn, in powers of ten; farther stays at the edge."""

MOST_ACTIONS = 6
"""Told apart by colours; the others are added up."""


# ---- relations -----------------------------------------------------------------------------------


def relation(row: Row, kind: Relation) -> Element | None:
    """How the two sides relate, in one line: a difference beside its tolerance, or a slack."""
    if not all(map(math.isfinite, (row.left, row.right, row.tolerance))):
        return None
    return equality(row) if kind == "=" else inequality(row)


def equality(row: Row) -> Element:
    """The size of the difference on an axis of powers of ten, whose middle is the tolerance."""
    gap = abs(row.difference)
    with np.errstate(divide="ignore"):
        apart = np.log10(gap) - np.log10(row.tolerance) if gap > 0 else -np.inf
    at = 50 + 48 * float(np.clip(apart / DECADES, -1, 1))
    words = (
        f"The difference, {number(gap, 2)}, beside what is allowed, {number(row.tolerance, 2)}, on "
        "an axis of powers of ten."
    )
    return _strip(
        words,
        element("rect", class_="allowed", x="0", y="11", width="50%", height="6"),
        element("rect", class_="too-much", x="50%", y="11", width="50%", height="6"),
        element("line", class_="limit", x1="50%", x2="50%", y1="3", y2="25"),
        element("circle", class_="difference", cx=f"{at:.2f}%", cy="14", r="5.5"),
    )


def inequality(row: Row) -> Element:
    """Both sides on a line, and between them the slack, or what is too much."""
    low, high = min(row.left, row.right), max(row.left, row.right)
    span = (high - low) or abs(high) or 1.0
    low, high = low - 0.25 * span, high + 0.25 * span

    def at(value: float) -> float:
        return 2 + 96 * (value - low) / (high - low)

    first, last = sorted((at(row.left), at(row.right)))
    holds = row.difference <= row.tolerance
    zero = None
    if low < 0 < high:
        zero = element(
            "line", class_="zero", x1=_percent(at(0)), x2=_percent(at(0)), y1="5", y2="23"
        )
    words = f"Left {number(row.left, 4)}, right {number(row.right, 4)}: "
    words += "slack " if holds else "too much by "
    return _strip(
        f"{words}{number(abs(row.difference), 3)}.",
        element("rect", class_="line", x="0", y="13", width="100%", height="2"),
        zero,
        element(
            "rect",
            class_="slack" if holds else "excess",
            x=_percent(first),
            y="10",
            width=_percent(last - first),
            height="8",
        ),
        element("circle", class_="on-left", cx=_percent(at(row.left)), cy="14", r="5.5"),
        element("circle", class_="on-right", cx=_percent(at(row.right)), cy="14", r="5.5"),
    )


def slack(row: Row, largest: float) -> Element | None:
    """The slack of a place, or what is too much, as a share of the `largest` of a table."""
    if not math.isfinite(row.difference) or largest == 0:
        return None
    return _strip(
        f"{number(abs(row.difference) / largest, 2)} of the largest",
        element(
            "rect",
            class_="slack" if row.difference <= row.tolerance else "excess",
            x="0",
            y="10",
            width=_percent(100 * abs(row.difference) / largest),
            height="8",
        ),
    )


def _strip(words: str, *drawn: Element | None) -> Element:
    """As wide as there is room: places are percentages, so that circles stay round."""
    return element(
        "svg", *drawn, class_="strip", width="100%", height="28", role="img", aria_label=words
    )


def _percent(value: float) -> str:
    return f"{value:.2f}%"


# ---- curves --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Curve:
    """A quantity over temperature; None where it is not defined.

    :ivar colour: class of its line and its marker. :ivar is_chance: read to four decimals.
    """

    name: str
    values: Values
    colour: str
    is_chance: bool = False


def frames(**attributes: Iterable[str | float]) -> str:
    """What a part that moves with the slider is at every temperature."""
    rounded = {
        name: [round(value, 2) if isinstance(value, float) else value for value in values]
        for name, values in attributes.items()
    }
    return json.dumps(rounded, ensure_ascii=False, separators=(",", ":"))


def plot(
    title: str,
    temperatures: Sequence[float],
    chosen: int,
    curves: Sequence[Curve],
    *,
    level: float | None = None,
    powers: bool = False,
) -> Element:
    """Curves over temperature.

    :param level: of a line across, to compare with. :param powers: whether the values may be on an
        axis of powers of ten.
    """
    box = LARGE
    known = [v for curve in curves for v in curve.values if v is not None]
    up = value_axis(known + ([] if level is None else [level]), box, powers=powers)
    across = power_axis(temperatures, box)
    xs = [across.place(temperature) for temperature in temperatures]
    heights: list[Values] = [
        [None if value is None else up.place(value) for value in curve.values] for curve in curves
    ]
    drawn = [across_line("grid", up.place(tick), box) for tick in up.ticks]
    drawn += [height_label(number(tick, 3), up.place(tick), box) for tick in up.ticks]
    drawn += [] if level is None else [across_line("level", up.place(level), box)]
    drawn += [*bottom_axis(across, box), _marker(xs, chosen, box)]
    for curve, ys in zip(curves, heights, strict=True):
        drawn.append(element("path", class_=f"curve {curve.colour}", d=path_of(xs, ys)))
    for curve, ys in zip(curves, heights, strict=True):
        drawn.append(_dot(xs, ys, chosen, box, curve.colour))
    return _chart(title, box, drawn)


def shares(
    title: str, temperatures: Sequence[float], chosen: int, chances: Sequence[Curve]
) -> Element:
    """Probabilities, which sum to one, as areas on top of each other."""
    box = SMALL
    across = power_axis(temperatures, box)
    xs = [across.place(temperature) for temperature in temperatures]
    below = [box.bottom] * len(xs)
    drawn = []
    for curve in chances:
        above = [
            y - (box.bottom - box.top) * (p or 0.0)
            for y, p in zip(below, curve.values, strict=True)
        ]
        outline = [*zip(xs, above, strict=True), *zip(xs[::-1], below[::-1], strict=True)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
        drawn.append(element("polygon", class_=f"share {curve.colour}", points=points))
        below = above
    drawn += [height_label("0", box.bottom, box), height_label("1", box.top, box)]
    drawn += [*bottom_axis(across, box), _marker(xs, chosen, box)]
    return _chart(title, box, drawn)


def _chart(title: str, box: Frame, drawn: Sequence[Element]) -> Element:
    view = f"0 0 {box.width:g} {box.height:g}"
    words = f"{title}, over temperature"
    return element("svg", *drawn, class_="chart", viewBox=view, role="img", aria_label=words)


def _marker(xs: Sequence[float], chosen: int, box: Frame) -> Element:
    at = round(xs[chosen], 2)
    return element(
        "line",
        class_="marker",
        x1=at,
        x2=at,
        y1=box.top,
        y2=box.bottom,
        data_frames=frames(x1=xs, x2=xs),
    )


def _dot(xs: Sequence[float], ys: Values, chosen: int, box: Frame, colour: str) -> Element:
    """Where a curve is at the chosen temperature; hidden where it is not defined."""
    heights = [box.bottom if y is None else y for y in ys]
    seen = ["hidden" if y is None else "visible" for y in ys]
    return element(
        "circle",
        class_=f"dot {colour}",
        cx=round(xs[chosen], 2),
        cy=round(heights[chosen], 2),
        r="4.5",
        visibility=seen[chosen],
        data_frames=frames(cx=xs, cy=heights, visibility=seen),
    )
