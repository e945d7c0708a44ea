"""What pictures on a page are made of: numbers for people, the frames and axes of charts, lines.

Colours are classes of `style.css`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from xml.etree.ElementTree import Element

import numpy as np

from inference_rl.html.markup import element

Values = Sequence[float | None]

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

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


# ---- frames and axes -----------------------------------------------------------------------------


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


def power_axis(places: Sequence[float], box: Frame) -> Axis:
    """Powers of ten."""
    low, high = math.log10(places[0]), math.log10(places[-1])
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


# ---- what is drawn in them -----------------------------------------------------------------------


def across_line(class_: str, y: float, box: Frame) -> Element:
    return element("line", class_=class_, x1=box.left, x2=box.right, y1=y, y2=y)


def height_label(text: str, y: float, box: Frame) -> Element:
    return element("text", text, class_="tick y", x=box.left - 6, y=y + 4)


def bottom_axis(across: Axis, box: Frame) -> Iterator[Element]:
    """The axis at the bottom."""
    yield across_line("frame", box.bottom, box)
    for tick in across.ticks:
        x = across.place(tick)
        yield element("line", class_="frame", x1=x, x2=x, y1=box.bottom, y2=box.bottom + 4)
        yield element("text", number(tick, 4), class_="tick x", x=x, y=box.bottom + 17)


def path_of(xs: Sequence[float], ys: Values) -> str:
    """A line through the points, broken where there is none."""
    words, broken = [], True
    for x, y in zip(xs, ys, strict=True):
        if y is not None:
            words.append(f"{'M' if broken else 'L'}{x:.1f},{y:.1f}")
        broken = y is None
    return " ".join(words)
