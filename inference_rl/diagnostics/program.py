"""A drawing of the trajectory program: its sites, and which depends on which."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer.inspect import get_model_relations

from inference_rl.environment import EnvironmentModel
from inference_rl.trajectory import trajectory

COLUMN, ROW, RADIUS = 150, 95, 30
"""Pixels between steps, between kinds of sites, and of a site."""


def draw_program(
    model: EnvironmentModel,
    path: str | Path,
    *,
    horizon: int = 3,
    temperature: float | None = 1.0,
    message: Any = None,
) -> Path:
    """Draw p(τ, O) of `model`, or q(τ) if `temperature` is None, as an SVG file.

    By `pyro.render_model` where graphviz is installed; otherwise by ourselves. Dependencies are
    read off a run of the program, not assumed.

    :raises ValueError: `path` does not end in .svg.
    """
    path = Path(path)
    if path.suffix != ".svg":
        raise ValueError(f"path: expected a name that ends in .svg, got {path}")

    arguments = {"temperature": temperature, "message": message}
    with torch.random.fork_rng(devices=[]):
        try:
            drawing = pyro.render_model(trajectory, (model, model.action_prior, horizon), arguments)
            path.write_bytes(drawing.pipe(format="svg"))
        except (ImportError, RuntimeError):  # no graphviz package, or no program behind it
            relations = get_model_relations(
                trajectory, (model, model.action_prior, horizon), arguments
            )
            path.write_text(svg(relations["sample_sample"], set(relations["observed"])))
    return path


def svg(parents: dict[str, list[str]], observed: set[str]) -> str:
    """The sites of a trajectory as SVG: time from left to right, observed sites filled.

    :param parents: for each site, the sites its distribution depends on.
    """
    place = {name: _place(name, parents) for name in parents}
    width = max(x for x, _ in place.values()) + 2 * RADIUS
    height = max(y for _, y in place.values()) + 2 * RADIUS
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-family="sans-serif" font-size="11">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#444"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
    ]
    for name, sources in parents.items():
        for source in sources:
            lines.append(_arrow(place[source], place[name]))
    for name, (x, y) in place.items():
        fill = "#d5d9e0" if name in observed else "white"
        label = html.escape(name.replace("optimality", "O"))
        lines.append(
            f'<circle cx="{x:.0f}" cy="{y:.0f}" r="{RADIUS}" fill="{fill}" stroke="#444"/>'
            f'<text x="{x:.0f}" y="{y + 4:.0f}" text-anchor="middle">{label}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def _place(name: str, parents: dict[str, list[str]]) -> tuple[float, float]:
    kind, _, step = name.rpartition("_")
    if step == "rest":
        last = max(int(n.rpartition("_")[2]) for n in parents if n.startswith("state_"))
        return 2 * RADIUS + (last + 0.5) * COLUMN, 2 * RADIUS
    row = {"optimality": 0, "state": 1, "action": 2}[kind]
    # O_t depends on all of step t, so it stands between its two states.
    offset = {"optimality": 0.5, "state": 0.0, "action": 0.25}[kind]
    return 2 * RADIUS + (int(step) + offset) * COLUMN, 2 * RADIUS + row * ROW


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    across, down = end[0] - start[0], end[1] - start[1]
    length = (across**2 + down**2) ** 0.5
    x, y = across / length * RADIUS, down / length * RADIUS
    return (
        f'<line x1="{start[0] + x:.1f}" y1="{start[1] + y:.1f}" x2="{end[0] - x:.1f}" '
        f'y2="{end[1] - y:.1f}" stroke="#444" marker-end="url(#tip)"/>'
    )
