"""Pictures of diagnostics: what a temperature does, and how returns of runs are distributed.

More of the same draws ArviZ: `az.plot_...(as_arviz(tree))`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from inference_rl.diagnostics.page import COLOURS, DPI, INK, MUTED, open_frame, plain_style
from inference_rl.diagnostics.samples import column
from inference_rl.diagnostics.temperature import TemperatureReport

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AROUND = 1e3
"""By how much the temperatures shown are lower and higher than the predicted one."""


def temperature_figure(report: TemperatureReport) -> Figure:
    """The divergence of the best policy and the dual over temperatures, the target, the prediction,
    and where a run came to.

    :raises ValueError: the report has no curve.
    """
    if report.curve is None:
        raise ValueError(f"report: expected one with a curve, got none: {report.no_curve_because}")
    curve = report.curve
    with plain_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.5, 5.0 if curve.dual else 2.8), dpi=DPI, layout="constrained")
        panels = figure.subplots(2 if curve.dual else 1, sharex=True, squeeze=False)[:, 0]
        panels[0].plot(curve.temperatures, curve.divergence, color=COLOURS[0], linewidth=1.8)
        panels[0].axhline(
            report.target_divergence, color=MUTED, linewidth=1, linestyle="--", label="target"
        )
        panels[0].set_title("divergence of the best policy, nats per step", loc="left")
        if curve.dual:
            panels[1].plot(curve.temperatures, curve.dual, color=COLOURS[1], linewidth=1.8)
            panels[1].set_yscale("symlog", linthresh=_scale(curve.dual))
            panels[1].set_title("dual, reward units", loc="left")
        for axes in panels:
            axes.set_xscale("log")
            _mark(axes, report)
            open_frame(axes)
        if report.predicted is not None:
            low, high = curve.temperatures[0], curve.temperatures[-1]
            panels[0].set_xlim(
                max(low, report.predicted / AROUND), min(high, report.predicted * AROUND)
            )
        panels[-1].set_xlabel("temperature, reward units")
        panels[0].legend(frameon=False, fontsize=8)
    return figure


def returns_figure(tree: xarray.DataTree) -> Figure:
    """The distribution of returns, of each chain of draws and of the prior: how many are less.

    :param tree: what `InferenceResult.sample` or `chains` gave.
    """
    with plain_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.5, 3.2), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        for i, values in enumerate(column(tree, "posterior_predictive", "return")):
            name = f"policy, chain {i}"
            axes.ecdf(values, color=COLOURS[i % len(COLOURS)], linewidth=1.6, label=name)
        if "prior_predictive" in tree.children:
            values = column(tree, "prior_predictive", "return").ravel()
            axes.ecdf(values, color=MUTED, linewidth=1.2, linestyle=":", label="prior")
        axes.set_xlabel("return, reward units")
        axes.set_title("share of episodes that return no more", loc="left")
        axes.legend(frameon=False, fontsize=8)
        open_frame(axes)
    return figure


def _mark(axes: Axes, report: TemperatureReport) -> None:
    if report.predicted is not None:
        axes.axvline(report.predicted, color=INK, linewidth=1, label="target met")
    if report.came_to is not None:
        axes.axvline(report.came_to, color=COLOURS[2], linestyle=":", label="the run came to")


def _scale(values: tuple[float, ...]) -> float:
    """Of the smallest values, that the logarithms of an axis shall tell apart."""
    sizes = np.abs(np.asarray(values))
    return float(sizes[sizes > 0].min()) if (sizes > 0).any() else 1.0
