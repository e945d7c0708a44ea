"""One picture of what inference found: `draw_policy`, or `policy_figure` for the figure itself.

What is drawn depends on the model: a map with the value as colour and the policy as arrows for
states on a grid, tables for other finite models, motion and feedback for linear-Gaussian ones, and
for what was learned from samples how it was learned.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from inference_rl.diagnostics.finite_tables import Tables
from inference_rl.diagnostics.grid_pictures import grid_figure
from inference_rl.diagnostics.learning_pictures import learning_figure
from inference_rl.diagnostics.linear_gaussian_pictures import linear_gaussian_figure
from inference_rl.diagnostics.page import plain_style, save
from inference_rl.diagnostics.table_pictures import table_figure
from inference_rl.finite import FiniteModel
from inference_rl.inference import InferenceResult
from inference_rl.linear_gaussian import LinearGaussianModel
from inference_rl.policies import LinearGaussianPolicy, TabularPolicy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_policy(result: InferenceResult, path: str | Path) -> Path:
    """Draw what inference found as a PNG file; see `policy_figure` for what is on it.

    :param path: of the file, which is overwritten; missing folders are made.
    :returns: `path`.
    :raises TypeError, ValueError: as `policy_figure`.
    """
    path = Path(path)
    figure = policy_figure(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)
    return path


def can_be_drawn(result: InferenceResult) -> bool:
    """Whether `policy_figure` knows what to draw: not of a table that nobody here has."""
    tabular = isinstance(result.policy, TabularPolicy) and not any(
        "steps" in row for row in result.metrics
    )
    return not tabular or isinstance(result.model, FiniteModel)


def policy_figure(result: InferenceResult) -> Figure:
    """The picture of `result` as a matplotlib figure, to be saved or embedded.

    - States on a grid (`model.layout`): V as colour, π as arrows as long as the action is likely.
    - Few states: a table of π beside the values; over time where the horizon is finite.
    - Many states: how V and the entropy of π are distributed, and the states most visited.
    - Linear-Gaussian models of two coordinates: trajectories over the contours of V, and the action
      as a function of the state; of other dimensions: states and actions over time.
    - Learned policies: return, entropy and temperature as they were learned.

    With a finite horizon, V and π are those of the first step unless the picture says otherwise.

    :raises TypeError: the result is of no such kind.
    :raises ValueError: a layout or labels that do not fit the model.
    """
    model, policy = result.model, result.policy
    with plain_style():
        if isinstance(model, LinearGaussianModel) and isinstance(policy, LinearGaussianPolicy):
            return linear_gaussian_figure(model, policy, result)
        if isinstance(model, FiniteModel) and isinstance(policy, TabularPolicy):
            tables = Tables.of(model, policy, result)
            if model.layout is not None:
                return grid_figure(result, tables, model.layout)
            return table_figure(result, tables)
        if any("steps" in row for row in result.metrics):
            return learning_figure(result)
    raise TypeError(
        "a picture needs a policy in a table over a finite model, a linear-Gaussian policy of a "
        "linear-Gaussian model, or the metrics of a learned routine; got a "
        f"{type(policy).__name__} over a {type(model).__name__} without any"
    )
