"""Small pictures as inline SVG: how a relation holds, and curves over temperature with a marker.

Colours are classes of `page.css`. What moves with the slider has an attribute `data-frames`: for
every attribute that changes ("text" for the text) its value at every temperature. `page.js` picks,
and computes nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from xml.etree.ElementTree import Element

import numpy as np

from inference_rl.derivation.page.markup import element
from inference_rl.derivation.step import Relation, Row

Values = Sequence[float | None]

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

DECADES = 16.0
"""How far from its tolerance a difference is drawn, in powers of ten; farther stays at the edge."""

MOST_ACTIONS = 6
"""Told apart by colours; the others are added up."""

WIDE_RANGE = 30.0
"""How many times as large as the small ones the largest number is, where powers of ten help."""


def number(value: float | None, digits: int = 6) -> str:
    """A number for people: a minus that is one, powers of ten as such."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    mantissa = mantissa.replace("-", "−")
    if not exponent:
        return mantissa
    power = f"10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    return mantissa[:-1] + power if mantissa in ("1", "−1") else f"{mantissa} × {power}"


def decimals(value: float, places: int) -> str:
    """A number to so many decimals."""
    return f"{value:.{places}f}".replace("-", "−")


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


@dataclasses.dataclass(frozen=True)
class Frame:
    """The box of a chart, and in it the rectangle of its axes."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float


LARGE = Frame(width=340, height=200, left=52, right=326, top=10, bottom=172)
SMALL = Frame(width=225, height=120, left=28, right=212, top=8, bottom=92)


@dataclasses.dataclass(frozen=True)
class Axis:
    """A scale, and where it has ticks.

    :ivar place: from a value to a coordinate.
    """

    place: Callable[[float], float]
    ticks: tuple[float, ...]


def frames(**attributes: Iterable[str | float]) -> str:
    """What a part that moves with the slider is at every temperature."""
    rounded = {
        name: [round(value, 2) if isinstance(value, float) else value for value in values]
        for name, values in attributes.items()
    }
    return json.dumps(rounded, ensure_ascii=False, separators=(",", ":"))


def temperature_axis(temperatures: Sequence[float], box: Frame) -> Axis:
    """Powers of ten."""
    low, high = math.log10(temperatures[0]), math.log10(temperatures[-1])
    decades = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
    return Axis(
        lambda value: box.left + (box.right - box.left) * (math.log10(value) - low) / (high - low),
        tuple(10.0**power for power in decades),
    )


def value_axis(values: Sequence[float], box: Frame, *, powers: bool) -> Axis:
    """Of equal steps; or, where that helps, of powers of ten outside of the small numbers."""
    sizes = np.abs(np.asarray(values))
    typical = float(np.quantile(sizes, 0.25))
    if powers and typical > 0 and sizes.max() > WIDE_RANGE * typical:
        low, high = (math.asinh(f(values) / typical) for f in (min, max))
        ticks, bend = _powers(min(values), max(values), typical), typical
    else:
        low, high = min(values), max(values)
        if low == high:
            low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
        ticks, bend = _steps(low, high), None
        low, high = min(low, *ticks), max(high, *ticks)

    def place(value: float) -> float:
        bent = value if bend is None else math.asinh(value / bend)
        return box.bottom - (box.bottom - box.top) * (bent - low) / (high - low)

    return Axis(place, ticks)


def _steps(low: float, high: float) -> tuple[float, ...]:
    """Round numbers that enclose a range, three to six of them."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(float(f"{step * i:.12g}") for i in range(first, last + 1))


def _powers(low: float, high: float, typical: float) -> tuple[float, ...]:
    """Zero and powers of ten within a range, at most three of either sign."""

    def of(limit: float) -> list[float]:
        if limit <= typical:
            return []
        least, most = math.ceil(math.log10(typical)), math.floor(math.log10(limit))
        every = max(1, math.ceil((most - least + 1) / 3))
        return [10.0**power for power in range(most, least - 1, -every)]

    zero = [0.0] if low <= 0 <= high else []
    return tuple(sorted({*zero, *of(high), *(-value for value in of(-low))}))


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
    across = temperature_axis(temperatures, box)
    xs = [across.place(temperature) for temperature in temperatures]
    heights: list[Values] = [
        [None if value is None else up.place(value) for value in curve.values] for curve in curves
    ]
    drawn = [_across("grid", up.place(tick), box) for tick in up.ticks]
    drawn += [_height(number(tick, 3), up.place(tick), box) for tick in up.ticks]
    drawn += [] if level is None else [_across("level", up.place(level), box)]
    drawn += [*_below(across, box), _marker(xs, chosen, box)]
    for curve, ys in zip(curves, heights, strict=True):
        drawn.append(element("path", class_=f"curve {curve.colour}", d=_path(xs, ys)))
    for curve, ys in zip(curves, heights, strict=True):
        drawn.append(_dot(xs, ys, chosen, box, curve.colour))
    return _chart(title, box, drawn)


def shares(
    title: str, temperatures: Sequence[float], chosen: int, chances: Sequence[Curve]
) -> Element:
    """Probabilities, which sum to one, as areas on top of each other."""
    box = SMALL
    across = temperature_axis(temperatures, box)
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
    drawn += [_height("0", box.bottom, box), _height("1", box.top, box)]
    drawn += [*_below(across, box), _marker(xs, chosen, box)]
    return _chart(title, box, drawn)


def _chart(title: str, box: Frame, drawn: Sequence[Element]) -> Element:
    view = f"0 0 {box.width:g} {box.height:g}"
    words = f"{title}, over temperature"
    return element("svg", *drawn, class_="chart", viewBox=view, role="img", aria_label=words)


def _across(class_: str, y: float, box: Frame) -> Element:
    return element("line", class_=class_, x1=box.left, x2=box.right, y1=y, y2=y)


def _height(text: str, y: float, box: Frame) -> Element:
    return element("text", text, class_="tick y", x=box.left - 6, y=y + 4)


def _below(across: Axis, box: Frame) -> Iterator[Element]:
    """The axis of temperatures."""
    yield _across("frame", box.bottom, box)
    for tick in across.ticks:
        x = across.place(tick)
        yield element("line", class_="frame", x1=x, x2=x, y1=box.bottom, y2=box.bottom + 4)
        yield element("text", number(tick, 3), class_="tick x", x=x, y=box.bottom + 17)


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


def _path(xs: Sequence[float], ys: Values) -> str:
    """A line through the points, broken where there is none."""
    words, broken = [], True
    for x, y in zip(xs, ys, strict=True):
        if y is not None:
            words.append(f"{'M' if broken else 'L'}{x:.1f},{y:.1f}")
        broken = y is None
    return " ".join(words)
