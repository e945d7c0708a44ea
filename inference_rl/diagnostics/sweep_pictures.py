"""The picture of a sweep: how the best came about, and the score by each setting."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING

from inference_rl.diagnostics.page import (
    COLOURS,
    DPI,
    FAINT,
    INK,
    MUTED,
    open_frame,
    plain_style,
    save,
)
from inference_rl.search_spaces import Choice, LogUniform, Uniform, text_of
from inference_rl.sweeping.results import SweepResult, TrialResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACROSS = 3
"""Panels side by side."""


def draw_sweep(result: SweepResult, path: str | Path) -> Path:
    """Draw a sweep as a PNG file, which is overwritten; see `sweep_figure`."""
    save(sweep_figure(result), Path(path))
    return Path(path)


def sweep_figure(result: SweepResult) -> Figure:
    """Scores by trial with the best so far, and by each setting, with their intervals.

    Trials that were not completed have no score: they are marked at the lower edge.
    """
    spaces = result.plan.spaces
    across = min(ACROSS, 1 + len(spaces))
    rows = math.ceil((1 + len(spaces)) / across)
    with plain_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.2 * across, 2.6 * rows), dpi=DPI, layout="constrained")
        panels = figure.subplots(rows, across, squeeze=False, sharey=True).ravel()
        for panel in panels:
            panel.tick_params(colors=MUTED, labelcolor=INK, labelsize=8)
            open_frame(panel)
        _history(panels[0], result)
        for panel, (name, space) in zip(panels[1:], spaces.items(), strict=False):
            tried = [trial for trial in result.trials if name in trial.settings]
            if isinstance(space, Choice):
                labels = [text_of(value) for value in space.values]
                at = [float(labels.index(text_of(t.settings[name]))) for t in tried]
                panel.set_xticks(range(len(labels)), labels)
                panel.set_xlim(-0.5, len(labels) - 0.5)
            else:
                at = [float(trial.settings[name]) for trial in tried]
                _range(panel, space)
            _scores(panel, tried, at, result.best)
            panel.set_xlabel(name.replace("_", " "), size=9, color=INK)
        for panel in panels[1 + len(spaces) :]:
            panel.set_axis_off()
        for panel in panels[::across]:
            panel.set_ylabel("score, reward units", size=9, color=INK)
        name = result.plan.setup["model"]
        figure.suptitle(f"{name}: {result.plan.setup['routine']}", color=INK, weight="bold")
    return figure


def _range(axes: Axes, space: Uniform | LogUniform) -> None:
    """Show all that was searched, with few and plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if isinstance(space, Uniform):
        margin = 0.04 * (space.high - space.low)
        axes.set_xlim(space.low - margin, space.high + margin)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return
    margin = (space.high / space.low) ** 0.04
    axes.set_xscale("log")
    axes.set_xlim(space.low / margin, space.high * margin)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _history(axes: Axes, result: SweepResult) -> None:
    from matplotlib.ticker import MaxNLocator

    _scores(axes, list(result.trials), [float(t.number) for t in result.trials], result.best)
    complete = [trial for trial in result.trials if trial.score is not None]
    best = list(itertools.accumulate((t.score for t in complete if t.score is not None), max))
    axes.step(
        [trial.number for trial in complete],
        best,
        where="post",
        color=COLOURS[0],
        linewidth=1.4,
        label="best so far",
    )
    axes.set_xlabel("trial", size=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8)


def _scores(
    axes: Axes, trials: list[TrialResult], at: list[float], best: TrialResult | None
) -> None:
    for trial, place in zip(trials, at, strict=True):
        if trial.score is None:
            edge = axes.get_xaxis_transform()
            axes.plot(place, 0.02, "x", color=MUTED, markersize=4, transform=edge, clip_on=False)
            continue
        if trial.interval is not None:
            axes.vlines(place, *trial.interval, color=FAINT, linewidth=1.2, zorder=1)
        is_best = best is not None and trial.number == best.number
        colour = COLOURS[1] if is_best else COLOURS[0]
        axes.plot(place, trial.score, "o", color=colour, markersize=5 if is_best else 3.5)
