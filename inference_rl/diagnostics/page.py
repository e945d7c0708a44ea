"""Paper and ink for pictures: `Page`, and how values, probabilities and numbers are shown on it.

Figures are built without pyplot, so nothing global (backend, open figures, styles) is touched, and
are laid out in inches, so that letters keep their size whatever the model's.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inference_rl import runs
from inference_rl.inference import InferenceResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Array = np.ndarray[Any, Any]

DPI = 150
MARGIN = 0.35
"""Inches of paper around everything."""

INK, MUTED, FAINT = "#1f2328", "#636c76", "#d8dce1"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe & Ito's palette (2008), which readers of any colour vision can tell apart."""

HEADING_SIZE = 9.5


class Page:
    """A figure laid out in inches from the top left, under a header that says what was inferred."""

    def __init__(self, result: InferenceResult, width: float, *, moments: str = "horizon") -> None:
        """:param moments: what precedes the number of steps of a finite horizon."""
        from matplotlib.figure import Figure

        self.figure = Figure(dpi=DPI, facecolor="white")
        self.result, self.width, self.moments, self.bottom = result, width, moments, 0.0
        self.boxes: list[tuple[Axes, float, float, float, float]] = []
        self.texts: list[tuple[str, float, float, dict[str, Any]]] = []
        self.notes: list[str] = []

    def axes(
        self, left: float, top: float, wide: float, high: float, *, below: float = 0.0
    ) -> Axes:
        """:param below: room for ticks and their label."""
        axes = self.figure.add_axes((0, 0, 1, 1), label=str(len(self.boxes)))
        axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9)
        axes.xaxis.label.set(color=INK, size=9)
        axes.yaxis.label.set(color=INK, size=9)
        self.boxes.append((axes, left, top, wide, high))
        self.bottom = max(self.bottom, top + high + below)
        return axes

    def colour_bar(
        self, image: Any, label: str, left: float, top: float, wide: float, high: float
    ) -> None:
        """What the colours of `image` mean, along the longer side of this box."""
        lying = wide > high
        axes = self.axes(left, top, wide, high, below=0.45 if lying else 0.0)
        orientation = "horizontal" if lying else "vertical"
        bar = self.figure.colorbar(image, cax=axes, orientation=orientation)
        bar.outline.set_visible(False)
        bar.set_label(label, color=INK, size=9)
        axes.tick_params(length=2, colors=MUTED, labelcolor=INK, labelsize=8.5)

    def heading(self, text: str, left: float, base: float, align: str = "left") -> None:
        """What is below, in words; `base` is where the letters stand."""
        style = {"fontsize": HEADING_SIZE, "color": MUTED, "ha": align, "va": "baseline"}
        self.texts.append((text, left, base, style))

    def note(self, text: str) -> None:
        """A line below everything."""
        self.notes.append(text)

    def finish(self) -> Figure:
        """The figure, as large as what is on it."""
        facts = _wrapped(_facts(self.result, self.moments), " · ", self.width, 9)
        head = 0.36 + 0.17 * len(facts)
        notes = [line for note in self.notes for line in _wrapped(note.split(), " ", self.width, 8)]
        foot = self.bottom + (0.12 if notes else 0.0)
        title = {"fontsize": 14, "weight": "bold", "color": INK}
        self.texts.append((self.result.model.name, 0, 0.17 - head, title))
        small = {"fontsize": 9, "color": MUTED}
        for i, line in enumerate(facts):
            self.texts.append((line, 0, 0.38 + 0.17 * i - head, small))
        for i, line in enumerate(notes):
            self.texts.append((line, 0, foot + 0.12 + 0.15 * i, small | {"fontsize": 8}))
        width = self.width + 2 * MARGIN
        height = head + foot + 0.15 * len(notes) + 2 * MARGIN
        self.figure.set_size_inches(width, height)
        for axes, left, top, wide, high in self.boxes:
            base = height - MARGIN - head - top - high
            axes.set_position(((left + MARGIN) / width, base / height, wide / width, high / height))
        for text, left, base, style in self.texts:
            x, y = (left + MARGIN) / width, 1 - (MARGIN + head + base) / height
            self.figure.text(x, y, text, **style)
        return self.figure


def _facts(result: InferenceResult, moments: str) -> list[str]:
    model = result.model
    target = getattr(result.routine, "target", "control")
    facts = [
        "posterior, given optimality" if target == "posterior" else target,
        f"temperature {result.temperature:g}",
        f"discount {float(model.discount):g}",
    ]
    if result.objective is not None:
        facts.append(f"objective {float(result.objective.detach()):.4g}".replace("-", "−"))
    if model.horizon is not None:
        steps = f"{model.horizon} step" + "s" * (model.horizon > 1)
        facts.append(f"{moments} {steps}")
    return facts


def _wrapped(words: Sequence[str], glue: str, width: float, size: float) -> list[str]:
    lines = [words[0]]
    for word in words[1:]:
        longer = lines[-1] + glue + word
        if text_width([longer], size) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def text_width(texts: Sequence[str], size: float) -> float:
    """Inches that the widest of `texts` takes."""
    from matplotlib.textpath import TextPath

    paths = (TextPath((0, 0), text, size=size) for text in texts if text.strip())
    return max((path.get_extents().width for path in paths), default=0.0) / 72


def labels(given: Sequence[str] | None, count: int, what: str) -> list[str]:
    """What a model calls its states or actions, their numbers if nothing.

    :raises ValueError: there are not `count` labels.
    """
    given = [str(i) for i in range(count)] if given is None else given
    if len(given) != count:
        raise ValueError(f"{what}_labels: expected {count}, one for each {what}, got {len(given)}")
    return [str(label) for label in given]


def numbers(values: Array) -> list[str]:
    """`values` to as many decimals as tell them apart: two figures of their range."""
    size = (float(np.ptp(values)) or float(np.abs(values).max())) if values.size else 0.0
    digits = int(np.clip(1 - math.floor(math.log10(size)), 0, 3)) if size else 0
    rounded = (round(float(value), digits) + 0.0 for value in values)  # + 0.0: never minus zero
    return [f"{value:,.{digits}f}".replace("-", "−") for value in rounded]


def limits(values: Array) -> tuple[float, float]:
    """The smallest and the largest value, kept apart where they are the same."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def colour_map() -> Colormap:
    """Perceptually uniform and fit for every colour vision; nothing is painted where masked."""
    import matplotlib

    return matplotlib.colormaps["viridis"].with_extremes(bad=(0, 0, 0, 0))


def paint_values(axes: Axes, values: Array, shown: Array) -> tuple[Any, Array]:
    """A matrix of values as colours, where they are to be shown.

    :returns: the image, and what reads best on it, black or white: shape + (3,).
    """
    from matplotlib.colors import Normalize

    masked = np.ma.masked_where(~shown, values)
    norm = Normalize(*limits(masked.compressed()))
    # Never interpolated: beyond the paper's resolution all images have to pick the same cells.
    image = axes.imshow(
        masked, cmap=colour_map(), norm=norm, aspect="auto", interpolation="nearest"
    )
    return image, _ink_on(colour_map()(norm(masked.filled(0.0)))[..., :3])


def _ink_on(paper: Array) -> Array:
    from matplotlib.colors import to_rgb

    def luminance(colour: Array) -> Any:  # the web's definition, WCAG 2
        linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        return linear @ np.array([0.2126, 0.7152, 0.0722]) + 0.05

    light = luminance(paper)
    black = light / luminance(np.array(to_rgb(INK))) > 1.05 / light
    return np.where(black[..., None], to_rgb(INK), to_rgb("white"))


def paint_chances(axes: Axes, chances: Array) -> Any:
    """A matrix of probabilities as an image, nothing where they are NaN."""
    axes.spines[:].set_color(FAINT)
    return axes.imshow(
        chances, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
    )


def open_frame(axes: Axes) -> None:
    """Lines below and at the left only, as of a curve."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(MUTED)


def no_frame(axes: Axes) -> None:
    """No lines and no ticks, as of bars beside their labels."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, which replaces whatever is there."""
    drawn = io.BytesIO()
    with plain_style():
        figure.savefig(drawn, format="png", dpi=DPI)
    runs.write_durably(path, drawn.getvalue())


def plain_style() -> Any:
    """matplotlib's defaults while it lasts: on a user's dark background the ink would be lost."""
    import matplotlib.style

    return matplotlib.style.context("default")
