"""The picture of a learned policy: how it learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from inference_rl.diagnostics.page import COLOURS, INK, MUTED, Page, open_frame
from inference_rl.inference import InferenceResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def learning_figure(result: InferenceResult) -> Figure:
    """Return, entropy and temperature over environment steps."""
    rows = [row for row in result.metrics if "steps" in row]
    page = Page(result, 9.0)
    axes = page.axes(0.8, 0.3, 8.1, 2.4, below=0.2)
    page.heading("return per episode (band: ± 2 standard errors)", 0.8, 0.2)
    for colour, name, words in zip(
        COLOURS,
        ("stochastic", "deterministic"),
        ("actions drawn", "most likely actions"),
        strict=False,
    ):
        _draw_returns(axes, [row for row in rows if name in row], name, words, colour)
    trained = [row for row in rows if "training_return" in row]
    axes.plot(
        [row["steps"] for row in trained],
        [row["training_return"] for row in trained],
        color=MUTED,
        linewidth=1,
        linestyle=":",
        label="while training",
    )
    axes.legend(frameon=False, fontsize=8)
    axes.tick_params(labelbottom=False)
    open_frame(axes)
    below = page.axes(0.8, 3.15, 3.6, 1.3, below=0.45)
    _draw_measure(below, rows, "entropy", COLOURS[2])
    page.heading("entropy of the policy, nats per step", 0.8, 3.05)
    beside = page.axes(5.3, 3.15, 3.6, 1.3, below=0.45)
    _draw_measure(beside, rows, "temperature", COLOURS[1])
    page.heading("temperature, reward units", 5.3, 3.05)
    for lower in (below, beside):
        lower.set_xlabel("environment steps")
    for each in (axes, below, beside):
        _from_the_start(each, rows)
    return page.finish()


def _from_the_start(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Steps from zero on, however few evaluations there were, with room between their labels."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(0, 1.02 * max((row["steps"] for row in rows), default=1))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda steps, _: f"{steps:,.0f}"))


def _draw_returns(
    axes: Axes, rows: list[dict[str, Any]], name: str, words: str, colour: str
) -> None:
    steps = [row["steps"] for row in rows]
    mean = [row[name]["mean_return"] for row in rows]
    spread = [2 * (row[name]["standard_error"] or 0.0) for row in rows]
    low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(steps, mean, color=colour, linewidth=1.8, marker="o", markersize=3, label=words)


def _draw_measure(axes: Axes, rows: list[dict[str, Any]], name: str, colour: str) -> None:
    known = [row for row in rows if name in row]
    axes.plot(
        [row["steps"] for row in known],
        [row[name] for row in known],
        color=colour,
        linewidth=1.6,
        marker="o",
        markersize=3,
        markeredgecolor=INK,
        markeredgewidth=0.3,
    )
    open_frame(axes)
