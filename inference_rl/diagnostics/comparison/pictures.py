"""The pictures of a comparison as inline SVG: an effect beside zero, curves, intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from inference_rl.diagnostics.comparison.findings import Effect, Estimate, Picture
from inference_rl.html.charts import (
    LARGE,
    Axis,
    Frame,
    across_line,
    bottom_axis,
    height_label,
    number,
    path_of,
    power_axis,
    value_axis,
)
from inference_rl.html.markup import element

COLOURS = 6

ROW = 24.0
"""Height of a row of intervals."""

NAMES = 130.0
"""Width of what stands before them."""


def strip(effect: Effect) -> Element:
    """The interval of an effect, on a line with its threshold in the middle."""
    found = effect.estimate
    sizes = [abs(v - effect.threshold) for v in (found.value, found.low, found.high)]
    span = max([size for size in sizes if math.isfinite(size)], default=0.0) or 1.0

    def at(value: float) -> float:
        return 50 + 46 * min(max((value - effect.threshold) / span, -1.05), 1.05)

    low, high = at(found.low), at(found.high)
    says = {"holds": "slack", "does not hold": "excess"}.get(effect.verdict, "undecided")
    limits = "" if found.exact else f", from {number(found.low, 4)} to {number(found.high, 4)}"
    return element(
        "svg",
        element("rect", class_="line", x="0", y="13", width="100%", height="2"),
        element("line", class_="limit", x1="50%", x2="50%", y1="3", y2="25"),
        element("rect", class_=says, x=_percent(low), y="10", width=_percent(high - low), height=8),
        element("circle", class_="difference", cx=_percent(at(found.value)), cy="14", r="5.5"),
        class_="strip",
        width="100%",
        height="28",
        role="img",
        aria_label=f"{number(found.value, 4)}{limits}, beside {number(effect.threshold, 2)}",
    )


def _percent(value: float) -> str:
    return f"{value:.2f}%"


def drawn(picture: Picture) -> Element:
    """A picture with its legend."""
    is_named = any(isinstance(place, str) for place in picture.places)
    legend = None
    if len(picture.lines) > 1:
        legend = element(
            "dl",
            *(
                element(
                    "div",
                    element(
                        "dt",
                        element("span", class_=f"swatch {_colour(i)}", aria_hidden="true"),
                        shown.name,
                    ),
                )
                for i, shown in enumerate(picture.lines)
            ),
            class_="legend",
        )
    return element(
        "figure",
        element("figcaption", _words(picture)),
        _intervals(picture) if is_named else _curves(picture),
        legend,
        class_="measured",
    )


def _words(picture: Picture) -> str:
    return f"{picture.title} ({picture.up}), by {picture.across}"


def _colour(number: int) -> str:
    return f"c{number % COLOURS}"


def _curves(picture: Picture) -> Element:
    """Lines over numbers, and their intervals as bands around them."""
    box = LARGE
    places = [float(place) for place in picture.places]
    across = _across(places, box, picture.logarithmic)
    up = value_axis(
        [v for s in picture.lines for p in s.points for v in _finite(p)], box, powers=False
    )
    xs = [across.place(place) for place in places]
    parts = [across_line("grid", up.place(tick), box) for tick in up.ticks]
    parts += [height_label(number(tick, 4), up.place(tick), box) for tick in up.ticks]
    parts += bottom_axis(across, box)
    for i, shown in enumerate(picture.lines):
        if any(not point.exact for point in shown.points):
            parts.append(_band(xs, shown.points, up, _colour(i)))
    for i, shown in reversed([*enumerate(picture.lines)]):  # the first is seen where they meet
        heights = [up.place(point.value) for point in shown.points]
        parts.append(element("path", class_=f"curve {_colour(i)}", d=path_of(xs, heights)))
        if len(xs) <= 8:
            parts += [
                element("circle", class_=f"dot {_colour(i)}", cx=round(x, 1), cy=round(y, 1), r=3)
                for x, y in zip(xs, heights, strict=True)
            ]
    view = f"0 0 {box.width:g} {box.height:g}"
    return element(
        "svg", *parts, class_="chart", viewBox=view, role="img", aria_label=_words(picture)
    )


def _across(places: Sequence[float], box: Frame, logarithmic: bool) -> Axis:
    if logarithmic:
        axis = power_axis(places, box)
        return axis if len(axis.ticks) > 1 else Axis(axis.place, tuple(places))
    low, high = places[0], places[-1]
    ticks = value_axis((low, high), box, powers=False).ticks
    return Axis(
        lambda value: box.left + (box.right - box.left) * (value - low) / (high - low),
        tuple(tick for tick in ticks if low <= tick <= high),
    )


def _finite(point: Estimate) -> list[float]:
    return [v for v in (point.value, point.low, point.high) if math.isfinite(v)]


def _band(xs: Sequence[float], points: Sequence[Estimate], up: Axis, colour: str) -> Element:
    limits = [(p.low, p.high) if math.isfinite(p.low) else (p.value, p.value) for p in points]
    there = [(x, up.place(high)) for x, (_, high) in zip(xs, limits, strict=True)]
    back = [(x, up.place(low)) for x, (low, _) in zip(xs, limits, strict=True)]
    outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*there, *back[::-1]])
    return element("polygon", class_=f"band {colour}", points=outline)


def _intervals(picture: Picture) -> Element:
    """A row for every name: the value as a dot, its interval as a line."""
    points = picture.lines[0].points
    box = Frame(
        width=LARGE.width,
        height=ROW * len(points) + 30,
        left=NAMES,
        right=326,
        top=4,
        bottom=ROW * len(points) + 4,
    )
    values = [v for p in points for v in _finite(p)]
    ticks = value_axis(values, box, powers=False).ticks
    low, high = min(*values, *ticks), max(*values, *ticks)
    across = Axis(
        lambda value: box.left + (box.right - box.left) * (value - low) / (high - low),
        tuple(ticks[:: 2 if len(ticks) > 4 else 1]),
    )
    parts = list(bottom_axis(across, box))
    for i, (name, point) in enumerate(zip(picture.places, points, strict=True)):
        y = box.top + ROW * (i + 0.5)
        parts.append(element("text", str(name), class_="tick y", x=box.left - 8, y=y + 4))
        ends = [across.place(v) for v in _finite(point)]
        parts.append(
            element(
                "line",
                class_="interval c0",
                x1=round(min(ends), 1),
                x2=round(max(ends), 1),
                y1=y,
                y2=y,
            )
        )
        cx = round(across.place(point.value), 1)
        parts.append(element("circle", class_="dot c0", cx=cx, cy=y, r=4))
    view = f"0 0 {box.width:g} {box.height:g}"
    return element(
        "svg", *parts, class_="chart", viewBox=view, role="img", aria_label=_words(picture)
    )
