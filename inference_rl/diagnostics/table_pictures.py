"""Finite models without a layout: every state as a row, or the most visited ones of many."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from inference_rl.diagnostics.finite_tables import Tables
from inference_rl.diagnostics.page import (
    COLOURS,
    FAINT,
    HEADING_SIZE,
    INK,
    MUTED,
    Array,
    Page,
    limits,
    no_frame,
    numbers,
    open_frame,
    paint_chances,
    paint_values,
    text_width,
)
from inference_rl.inference import InferenceResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LARGEST_TABLE = 60
"""States up to which a model without a layout is drawn state by state."""

MOST_VISITED = 15
"""States listed for a larger one."""

LONGEST_LABEL = 60
"""Letters of a state's name that are shown."""


def table_figure(result: InferenceResult, tables: Tables) -> Figure:
    """A table of all states, or an overview if there are too many."""
    if (~tables.ended).sum() <= LARGEST_TABLE:
        return _states_figure(result, tables)
    return _overview_figure(result, tables)


def _states_figure(result: InferenceResult, tables: Tables) -> Figure:
    """Each state a row: what it is called, π there, and V: as bars, or over time."""
    some = tables.model.num_states > LARGEST_TABLE
    states = np.flatnonzero(~tables.ended) if some else np.arange(tables.model.num_states)
    ended, steps = tables.ended[states], tables.model.horizon or 1
    policy, heading, hidden = tables.policy[states], "π(a | s)", ended
    if steps > 1:
        reached = tables.reachable()[:steps, states]
        first = np.argmax(reached, axis=0)
        policy, hidden = tables.policies[first, states], ended | (reached.sum(axis=0) == 0)
        heading += " on first arrival" if first.any() else ""
    policy = np.where(hidden[:, None], np.nan, policy)
    names = [tables.states[s] for s in states]
    left, policy_wide = text_width(names, 9) + 0.1, _policy_width(tables.actions)
    right = left + max(policy_wide, text_width([heading], HEADING_SIZE)) + 0.4
    wide = 3.2 if steps == 1 else float(np.clip(0.55 * steps, 1.4, 4.5))
    high = float(np.clip(8 / len(states), 0.17, 0.34)) * len(states)
    top = 0.3 + _action_labels(tables.actions, policy_wide)[2]
    page = Page(result, max(right + wide + 0.9, 4.6))
    axes, value_axes = page.axes(left, top, policy_wide, high), page.axes(right, top, wide, high)
    _draw_policy_rows(axes, policy, tables.actions, policy_wide, high)
    axes.set_yticks(range(len(states)), names)
    style: dict[str, Any] = {"fontsize": 7.5, "style": "italic", "ha": "center", "va": "center"}
    for row in np.flatnonzero(ended).tolist():
        axes.text(policy.shape[1] / 2 - 0.5, row, "the episode ends", color=MUTED, **style)
    page.heading(heading, left, 0.2)
    if steps == 1:
        _draw_value_bars(value_axes, tables.value[states], ended)
        page.heading("V(s), reward units", right, 0.2)
    else:
        values, shown = tables.values[:steps, states].T, (reached & ~ended).T
        image = _draw_values_over_time(value_axes, values, shown)
        page.colour_bar(image, "reward units", right + wide + 0.12, top, 0.14, min(high, 3))
        page.heading("V(s) by step", right, 0.2)
    if some:
        count = tables.model.num_states - len(states)
        page.note(f"{count} states that end the episode are left out")
    return page.finish()


def _overview_figure(result: InferenceResult, tables: Tables) -> Figure:
    """Distributions of V and of the entropy of π over states, and the states most visited."""
    visits, steps = tables.visits()
    top = [s for s in np.argsort(-visits, kind="stable")[:MOST_VISITED] if visits[s] > 0]
    names = [_shortened(tables.states[s]) for s in top]
    left = max(text_width(names, 9), text_width(["most visited states"], HEADING_SIZE)) + 0.2
    policy_wide, bars_wide = _policy_width(tables.actions), 1.9
    right = left + bars_wide + 0.8
    wide = max(right + policy_wide, 7.2)
    page = Page(result, wide, moments="first of")
    value, policy = tables.value[~tables.ended], tables.policy[~tables.ended]
    entropy = -(policy * np.log(np.where(policy > 0, policy, 1))).sum(-1)
    most, each = max(math.log(policy.shape[1]), 1e-3), (wide - 0.5) / 2
    for at, data, ends, title, unit in (
        (0.55, value, limits(value), tables.value_name, "reward units"),
        (each + 1.05, entropy, (0.0, most), "entropy of π(· | s)", "nats"),
    ):
        _draw_histogram(page.axes(at, 0.3, each - 0.55, 1.6, below=0.45), data, ends, unit)
        page.heading(f"{title} over all states", at, 0.2)
    start = 2.75 + _action_labels(tables.actions, policy_wide)[2]
    high = 0.27 * len(top)
    bars = page.axes(left, start, bars_wide, high)
    _draw_visits(bars, visits[top])
    bars.set_yticks(range(len(top)), names)
    style: dict[str, Any] = {"transform": bars.get_yaxis_transform(), "fontsize": 8.5, "color": INK}
    for i, number in enumerate(numbers(tables.value[top])):
        bars.text(1 + 0.68 / bars_wide, i, number, ha="right", va="center", **style)
    heat = page.axes(right, start, policy_wide, high)
    _draw_policy_rows(heat, tables.policy[top], tables.actions, policy_wide, high)
    heat.set_yticks([])
    page.heading("most visited states", 0, 2.65)
    page.heading("expected visits", left, 2.65)
    page.heading("V", right - 0.12, 2.65, align="right")
    page.heading("π(a | s)", right, 2.65)
    page.note(f"visits: in the first {steps} steps, under π and the model's own dynamics")
    return page.finish()


def _shortened(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


def _draw_histogram(axes: Axes, data: Array, ends: tuple[float, float], unit: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.hist(data.clip(*ends), bins=40, range=ends, color=COLOURS[0], linewidth=0)
    axes.set(xlabel=unit, ylabel="states")
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    open_frame(axes)


def _draw_visits(axes: Axes, visits: Array) -> None:
    axes.barh(range(len(visits)), visits, height=0.62, color=COLOURS[0])
    axes.set(ylim=(len(visits) - 0.5, -0.5), xlim=(0, visits.max() * 1.02), xticks=[])
    no_frame(axes)
    for i, number in enumerate(numbers(visits)):
        inside = visits[i] > 0.75 * visits.max()
        axes.annotate(
            number,
            (visits[i], i),
            xytext=(-3 if inside else 3, 0),
            textcoords="offset points",
            color="white" if inside else INK,
            fontsize=8,
            ha="right" if inside else "left",
            va="center",
        )


def _policy_width(actions: list[str]) -> float:
    """Inches for the columns of π."""
    widest = text_width(actions, 8.5) + 0.16
    return min(max(0.48, widest) * len(actions), max(6.0, 0.06 * len(actions)), 8.0)


def _action_labels(actions: list[str], wide: float) -> tuple[range, bool, float]:
    """Which labels fit over columns `wide` inches in all, whether turned, and how high they are."""
    column = wide / len(actions)
    shown = range(0, len(actions), math.ceil(0.16 / column))
    longest = text_width([actions[a] for a in shown], 8.5)
    turned = column * shown.step < longest + 0.06
    return shown, turned, longest + 0.1 if turned else 0.2


def _draw_policy_rows(
    axes: Axes, policy: Array, actions: list[str], wide: float, high: float
) -> None:
    """π as a heat map of states (rows) by actions (columns)."""
    rows, columns = policy.shape
    paint_chances(axes, policy)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    shown, turned, _ = _action_labels(actions, wide)
    axes.set_xticks(shown, [actions[a] for a in shown], rotation=90 if turned else 0, fontsize=8.5)
    if wide / columns < 0.34 or high / rows < 0.16:
        return
    for (i, a), chance in np.ndenumerate(policy):
        if chance >= 0.005:
            colour = "white" if chance > 0.55 else INK
            axes.text(a, i, f"{chance:.2f}", color=colour, fontsize=7.5, ha="center", va="center")


def _draw_value_bars(axes: Axes, value: Array, ended: Array) -> None:
    rows = np.arange(len(value))
    axes.barh(rows, value, height=0.62, color=COLOURS[0])
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set(ylim=(len(value) - 0.5, -0.5), xticks=[], yticks=[])
    no_frame(axes)
    style: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "fontsize": 8.5, "color": INK}
    for row, number in zip(rows[~ended], numbers(value[~ended]), strict=True):
        axes.text(1.02, row, number, ha="left", va="center", **style)


def _draw_values_over_time(axes: Axes, value: Array, shown: Array) -> Any:
    """:param value, shown: (S, T). :returns: the image."""
    from matplotlib.ticker import MaxNLocator

    axes.set_facecolor("#f3f4f6")
    image, ink = paint_values(axes, value, shown)
    axes.set_yticks([])
    axes.xaxis.tick_top()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(length=0)
    axes.spines[:].set_color(FAINT)
    if value.shape[1] <= 9 and value.shape[0] <= 45:
        style: dict[str, Any] = {"fontsize": 7, "ha": "center", "va": "center"}
        for (row, step), number in zip(np.argwhere(shown), numbers(value[shown]), strict=True):
            axes.text(step, row, number, color=ink[row, step], **style)
    return image
