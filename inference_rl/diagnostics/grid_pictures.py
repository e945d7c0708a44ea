"""States on a grid: V as colour and π as arrows, or as curves along a single long row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from inference_rl.diagnostics.finite_tables import Tables
from inference_rl.diagnostics.page import (
    COLOURS,
    DPI,
    FAINT,
    INK,
    Array,
    Page,
    numbers,
    open_frame,
    paint_chances,
    paint_values,
)
from inference_rl.environment import GridLayout
from inference_rl.inference import InferenceResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WALL, HOLE, CLIFF, GOAL = "#24292f", "#6e7781", "#a8432f", "#ffffff"

GAP, REACH = 0.1, 0.36
"""Where arrows begin, from the centre of a cell, and how long one of probability 1 is; in cells."""

FADE = 0.1
"""Arrows of less probability than this are drawn ever paler."""

LARGEST_CELLS = 40
"""Cells a side up to which each cell has its own arrows; larger grids get one a block."""

BLOCKS = 28
"""Blocks along the longer side of a larger grid."""


def grid_figure(result: InferenceResult, tables: Tables, layout: GridLayout) -> Figure:
    """A map of V and π, or curves if the states are a row or column too long for one.

    :raises ValueError: the layout does not fit the model.
    """
    states, actions = tables.policy.shape
    rows, columns = layout.rows, layout.columns
    if not rows * columns == len(layout.cells) == states:
        raise ValueError(
            f"layout: expected rows · columns and the number of cells to be {states}, one for each "
            f"state, got {rows} · {columns} and {len(layout.cells)}"
        )
    if len(layout.moves) != actions:
        raise ValueError(
            f"layout: expected {actions} moves, one for each action, got {len(layout.moves)}"
        )
    cells = np.array(list(layout.cells))
    drawn = ~np.isin(cells, ("#", "C")) & ~tables.ended
    if min(rows, columns) == 1 and states > LARGEST_CELLS:
        return _corridor_figure(result, tables, layout, drawn)
    return _map_figure(result, tables, layout, drawn)


def _map_figure(
    result: InferenceResult, tables: Tables, layout: GridLayout, drawn: Array
) -> Figure:
    rows, columns = layout.rows, layout.columns
    cell = min(1.0, 8 / columns, 6.5 / rows)
    cell = max(cell, min(1 / DPI, 8 / max(rows, columns)))  # a pixel each, lest thin walls vanish
    wide, high = cell * columns, cell * rows
    beside = high >= 2.2  # where there is room for a colour bar at the right
    high = max(high, 0.35)
    page = Page(result, max(wide + (1.0 if beside else 0), 4.6), moments="first of")
    axes = page.axes(0, 0, wide, high)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    # Above the lines between cells (zorder 0.5), so that walls and cliffs look solid.
    tiles = _tiles(layout, drawn)
    axes.imshow(tiles, aspect="auto", interpolation="nearest", zorder=0.6)
    values = tables.value.reshape(rows, columns)
    image, ink = paint_values(axes, values, drawn.reshape(rows, columns))
    ink = ink.reshape(-1, 3)
    if max(rows, columns) <= LARGEST_CELLS:
        _separate_cells(axes, rows, columns)
        _draw_actions(axes, layout, tables.policy, np.flatnonzero(drawn), ink)
        _mark_cells(axes, layout, drawn, ink, cell)
        if cell >= 0.6:
            _write_values(axes, layout, tables.value, np.flatnonzero(drawn), ink)
        stays = any(move is None or not any(move) for move in layout.moves)
        ring = " or width of a ring (stay)" if stays else ""
        page.note(f"length of an arrow{ring}: probability of the action")
    else:
        block = math.ceil(max(rows, columns) / BLOCKS)
        _draw_mean_moves(axes, layout, tables.policy, np.flatnonzero(drawn), ink, block)
        _point_out(axes, layout)
        page.note(f"arrows: mean move under the policy, averaged over {block} × {block} cells")
    label = f"{tables.value_name}, reward units"
    if beside:
        page.colour_bar(image, label, wide + 0.15, 0, 0.16, high)
    else:
        page.colour_bar(image, label, 0, high + 0.2, min(wide, 3.5), 0.14)
    return page.finish()


def _corridor_figure(
    result: InferenceResult, tables: Tables, layout: GridLayout, drawn: Array
) -> Figure:
    """A single long row or column of cells: as colours it would be a hair, so V is a curve."""
    page = Page(result, 8.4, moments="first of")
    left, wide, high = 0.75, 7.6, 0.3 * len(tables.actions)
    upper = page.axes(left, 0.2, wide, 2.4)
    upper.plot(np.where(drawn, tables.value, np.nan), color=COLOURS[0], linewidth=1.6)
    upper.set(xlim=(-0.5, len(drawn) - 0.5), ylabel=f"{tables.value_name}, reward units")
    upper.tick_params(labelbottom=False)
    open_frame(upper)
    marks: list[tuple[int, str]] = []
    for state, letter in enumerate(layout.cells):
        if letter in "SGH":
            if marks and state - marks[-1][0] < 0.03 * len(drawn):  # too close to tell apart
                marks[-1] = marks[-1][0], marks[-1][1] + letter
            else:
                marks.append((state, letter))
    style: dict[str, Any] = {"ha": "center", "weight": "bold", "color": INK, "fontsize": 8}
    for state, letters in marks:
        upper.text(state, 1.02, letters, transform=upper.get_xaxis_transform(), **style)
    lower = page.axes(left, 2.8, wide, high)
    image = paint_chances(lower, np.where(drawn, tables.policy.T, np.nan))
    lower.set(yticks=range(len(tables.actions)), yticklabels=tables.actions, xlabel="state")
    page.colour_bar(image, "π(a | s)", left, 3.45 + high, 2.4, 0.12)
    return page.finish()


def _tiles(layout: GridLayout, drawn: Array) -> Array:
    """What covers cells in which nothing is decided, as an RGBA image."""
    from matplotlib.colors import to_rgba

    cells = np.array(list(layout.cells))
    tiles = np.zeros((len(cells), 4), dtype=np.uint8)
    tiles[~drawn] = np.multiply(to_rgba(FAINT), 255).astype(np.uint8)
    for letter, colour in (("#", WALL), ("H", HOLE), ("C", CLIFF), ("G", GOAL)):
        tiles[(cells == letter) & ~drawn] = np.multiply(to_rgba(colour), 255).astype(np.uint8)
    return tiles.reshape(layout.rows, layout.columns, 4)


def _separate_cells(axes: Axes, rows: int, columns: int) -> None:
    axes.set_axisbelow(True)
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0)


def _draw_actions(axes: Axes, layout: GridLayout, policy: Array, states: Array, ink: Array) -> None:
    """Around the centre of each cell an arrow for each action, or a ring if it does not move."""
    from matplotlib.collections import EllipseCollection

    row, column = np.divmod(states, layout.columns)
    centre = np.stack([column, row])
    for action, move in enumerate(layout.moves):
        chance = policy[states, action]
        colour = np.column_stack([ink[states], np.clip(chance / FADE, 0, 1)])
        if move is None or not any(move):
            size = REACH * chance
            rings = EllipseCollection(
                size,
                size,
                0,
                units="xy",
                offsets=centre.T,
                offset_transform=axes.transData,
                facecolors="none",
                edgecolors=colour,
                linewidths=1.4,
            )
            axes.add_collection(rings, autolim=False)
        else:
            ahead = np.array(move[::-1])[:, None] / math.hypot(*move)
            _draw_arrows(axes, centre + GAP * ahead, REACH * chance * ahead, colour)


def _draw_mean_moves(
    axes: Axes, layout: GridLayout, policy: Array, states: Array, ink: Array, block: int
) -> None:
    """One arrow for each block of cells, centred on them: the mean move of the policy there."""
    row, column = np.divmod(states, layout.columns)
    moves = np.array([move or (0, 0) for move in layout.moves], dtype=float)
    moves /= np.maximum(np.hypot(*moves.T), 1)[:, None]
    mean = policy[states] @ moves
    block_of = (row // block) * math.ceil(layout.columns / block) + column // block
    count = np.bincount(block_of)
    kept = np.flatnonzero(count)

    def average(values: Array) -> Array:
        return np.bincount(block_of, weights=values)[kept] / count[kept]

    y, x, down, right = (average(z) for z in (row, column, mean[:, 0], mean[:, 1]))
    shade = ink[np.rint(y).astype(int) * layout.columns + np.rint(x).astype(int)]
    colour = np.column_stack([shade, np.clip(np.hypot(down, right) / FADE, 0, 1)])
    ahead = 0.88 * block * np.stack([right, down])
    _draw_arrows(axes, np.stack([x, y]), ahead, colour, width=0.052 * block, pivot="mid")


def _draw_arrows(
    axes: Axes,
    at: Array,
    ahead: Array,
    colour: Array,
    width: float = 0.052,
    pivot: str = "tail",
) -> None:
    """:param at, ahead: (2, K), right and down, in cells."""
    axes.quiver(
        *at,
        *ahead,
        color=colour,
        pivot=pivot,
        angles="xy",
        units="xy",
        scale_units="xy",
        scale=1,
        width=width,
        headwidth=3.3,
        headlength=3.2,
        headaxislength=2.8,
        minshaft=1,
        minlength=0,
    )


def _write_values(axes: Axes, layout: GridLayout, value: Array, states: Array, ink: Array) -> None:
    style: dict[str, Any] = {"fontsize": 6.5, "ha": "right", "va": "bottom"}
    for state, number in zip(states, numbers(value[states]), strict=True):
        row, column = divmod(state, layout.columns)
        axes.text(column + 0.46, row + 0.44, number, color=ink[state], **style)


def _mark_cells(axes: Axes, layout: GridLayout, drawn: Array, ink: Array, cell: float) -> None:
    """Letters: in the middle of cells where nothing is decided, in the corner of the others."""
    from matplotlib.patches import Rectangle

    small, large = float(np.clip(18 * cell, 5, 13)), float(np.clip(28 * cell, 6, 18))
    corner: dict[str, Any] = {"fontsize": small, "ha": "left", "va": "top"}
    middle: dict[str, Any] = {"fontsize": large, "ha": "center", "va": "center_baseline"}
    for state, letter in enumerate(layout.cells):
        row, column = divmod(state, layout.columns)
        if letter not in "SGHC":
            continue
        if drawn[state]:
            x, y, colour, style = column - 0.44, row - 0.42, ink[state], corner
        else:
            x, y, colour, style = column, row, INK if letter in "SG" else "white", middle
            if letter == "G":
                frame = Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fc="none", ec=INK, lw=1.5)
                axes.add_patch(frame)
        axes.text(x, y, letter, color=colour, weight="bold", **style)


def _point_out(axes: Axes, layout: GridLayout) -> None:
    """Start and goal where cells are specks; colour alone tells holes and cliffs apart there."""
    circle = {"boxstyle": "circle,pad=0.25", "fc": "white", "ec": INK, "lw": 1}
    style: dict[str, Any] = {
        "fontsize": 9,
        "weight": "bold",
        "ha": "center",
        "va": "center",
        "bbox": circle,
    }
    for letter in "SG":
        states = [s for s, found in enumerate(layout.cells) if found == letter]
        for state in states if len(states) <= 12 else []:
            row, column = divmod(state, layout.columns)
            axes.text(column, row, letter, color=INK, **style)
