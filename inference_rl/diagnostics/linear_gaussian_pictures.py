"""Linear-Gaussian models: trajectories over V and feedback, or coordinates over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from inference_rl.diagnostics.page import (
    COLOURS,
    FAINT,
    INK,
    Array,
    Page,
    colour_map,
    labels,
    open_frame,
)
from inference_rl.inference import InferenceResult
from inference_rl.linear_gaussian import LinearGaussianModel
from inference_rl.policies import LinearGaussianPolicy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAJECTORIES = 24
"""Sampled trajectories."""

LONGEST_MEAN = 400
"""Steps of the mean trajectory without a horizon."""

SETTLED = 0.02
"""A mean trajectory has arrived when what is left of its way is this fraction of it."""


@torch.no_grad()
def linear_gaussian_figure(
    model: LinearGaussianModel, policy: LinearGaussianPolicy, result: InferenceResult
) -> Figure:
    """A phase portrait of two coordinates, the motion over time of any other number."""
    n, m = model.B.shape
    names = _coordinates(model.state_labels, n, "state")
    acts = _coordinates(model.action_labels, m, "action")
    mean = _mean_path(model, policy)
    states, actions = _paths(model, policy, len(mean) - 1, result.seed)
    if n == 2:
        return _portrait_figure(result, policy, mean, states, names, acts)
    return _motion_figure(result, states, actions, names, acts)


def _coordinates(given: Sequence[str] | None, count: int, what: str) -> list[str]:
    if given is None:
        return [what] if count == 1 else [f"{what} {i}" for i in range(count)]
    return labels(given, count, what)


def _mean_path(model: LinearGaussianModel, policy: LinearGaussianPolicy) -> Array:
    """The noiseless path (T + 1, n), until a while after it settles if there is no horizon."""
    limit = model.horizon or LONGEST_MEAN
    mean = [model.initial_mean]
    for t in range(limit):
        mean.append(model.A @ mean[-1] + model.B @ policy.mode(mean[-1], t) + model.offset)
    path = torch.stack(mean)
    if model.horizon is None:
        left = (path - path[-1]).norm(dim=-1)
        moving = (left > SETTLED * left.max().clamp(min=1e-12)).nonzero().flatten().tolist()
        limit = min(limit, max(40, int(1.3 * max(moving, default=0))))
    return path[: limit + 1].numpy()


def _paths(
    model: LinearGaussianModel, policy: LinearGaussianPolicy, steps: int, seed: int
) -> tuple[Array, Array]:
    """Sampled states (K, T + 1, n) and actions (K, T, m)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        states, actions = [model.initial_state().expand((TRAJECTORIES,)).sample()], []
        for t in range(steps):
            actions.append(policy(states[-1], t).sample())
            states.append(model.transition(states[-1], actions[-1]).sample())
    return torch.stack(states, 1).numpy(), torch.stack(actions, 1).numpy()


def _portrait_figure(
    result: InferenceResult,
    policy: LinearGaussianPolicy,
    mean: Array,
    states: Array,
    names: list[str],
    acts: list[str],
) -> Figure:
    """Two coordinates: trajectories over the contours of V, and the action along each of them."""
    from matplotlib.colors import ListedColormap

    page, stationary = Page(result, 9.6), result.model.horizon is None
    points = np.concatenate([states.reshape(-1, 2), mean, np.zeros((1, 2))])
    pad = np.maximum(0.1 * np.ptp(points, axis=0), 1e-3)
    low, high = points.min(0) - pad, points.max(0) + pad
    axes = page.axes(0.55, 0.3, 4.3, 4.3)
    grid = np.meshgrid(*np.linspace(low, high, 121).T)
    value = result.v(torch.from_numpy(np.stack(grid, -1)), t=None if stationary else 0).numpy()
    colours = ListedColormap(colour_map()(np.linspace(0.25, 1, 256)))  # light enough for ink on it
    filled = axes.contourf(*grid, value, levels=14, cmap=colours)
    axes.plot(*states.transpose(2, 1, 0), color=INK, linewidth=0.6, alpha=0.45)
    axes.plot(*mean.T, color=INK, linewidth=4)
    axes.plot(*mean.T, color="white", linewidth=2.2)
    axes.plot(*mean[0], "o", color="white", markeredgecolor=INK, markersize=8)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel=names[0], ylabel=names[1])
    page.heading(f"{TRAJECTORIES} trajectories from the start (○) and the mean", 0.55, 0.2)
    which = "V(s)" if stationary else "V at the first step"
    page.colour_bar(filled, f"{which}, reward units", 0.55, 5.2, 4.3, 0.14)
    for i in range(2):
        top = 2.55 * i
        sweep = page.axes(5.95, top + 0.3, 3.6, 1.75, below=0.45)
        _draw_feedback(sweep, policy, i, np.linspace(low[i], high[i], 101), acts)
        sweep.set(xlim=(low[i], high[i]), xlabel=names[i])
        sweep.set_ylabel(acts[0] if len(acts) == 1 else "action")
        page.heading(f"action ± 2 sd, where {names[1 - i]} is 0", 5.95, top + 0.2)
        if i == 0 and len(acts) > 1:
            sweep.legend(frameon=False, fontsize=8)
    return page.finish()


def _draw_feedback(
    axes: Axes, policy: LinearGaussianPolicy, coordinate: int, line: Array, acts: list[str]
) -> None:
    """The action, at the first step, along one coordinate of the state; the others are 0."""
    states = torch.zeros(len(line), policy.gain.shape[-1], dtype=torch.float64)
    states[:, coordinate] = torch.from_numpy(line)
    mean = policy.mode(states, 0).numpy()
    variance: Any = policy.covariance.reshape(-1, *policy.covariance.shape[-2:])[0].diagonal()
    spread = 2 * variance.clamp(min=0).sqrt().numpy()
    for colour, name, middle, width in zip(COLOURS, acts, mean.T, spread, strict=False):
        axes.fill_between(
            line, middle - width, middle + width, color=colour, alpha=0.2, linewidth=0
        )
        axes.plot(line, middle, color=colour, linewidth=1.8, label=name)
    axes.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    open_frame(axes)


def _motion_figure(
    result: InferenceResult, states: Array, actions: Array, names: list[str], acts: list[str]
) -> Figure:
    """Any number of coordinates: each over time, sampled and in the mean."""
    page = Page(result, 9.0)
    rows = [(name, states[..., i], COLOURS[0]) for i, name in enumerate(names[:6])]
    rows += [(name, actions[..., j], COLOURS[1]) for j, name in enumerate(acts[:4])]
    for k, (name, paths, colour) in enumerate(rows):
        axes = page.axes(0.8, 0.1 + 1.25 * k, 8.1, 1.05, below=0.45)
        axes.plot(paths.T, color=colour, linewidth=0.6, alpha=0.4)
        axes.plot(paths.mean(0), color=INK, linewidth=1.6)
        axes.set(xlim=(0, states.shape[1] - 1), ylabel=name)
        axes.tick_params(labelbottom=k == len(rows) - 1)
        open_frame(axes)
    axes.set_xlabel("step")
    hidden = len(names) + len(acts) - len(rows)
    note = f"{TRAJECTORIES} trajectories and their mean (black)"
    page.note(note + (f"; {hidden} more coordinates are left out" if hidden else ""))
    return page.finish()
