"""Sampled trajectories as a file, and those of several runs as chains of one data set.

What there is in them `InferenceResult.sample` says. They are an xarray `DataTree`, which a netCDF
file holds whole, and which ArviZ reads: `as_arviz(tree)` for its functions, `az.from_netcdf(path)`
for the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from inference_rl.diagnostics.arviz_versions import arviz, as_arviz
from inference_rl.diagnostics.page import Array
from inference_rl.inference import InferenceResult
from inference_rl.randomness import derived

if TYPE_CHECKING:
    import xarray

__all__ = [
    "as_arviz",
    "chains",
    "column",
    "load_samples",
    "rhat",
    "rhat_of_returns",
    "save_samples",
]


def save_samples(tree: xarray.DataTree, path: str | Path) -> Path:
    """Write draws into a netCDF file, which is overwritten.

    :returns: `path`. :raises OSError: it cannot be written.
    """
    path = Path(path)
    tree.to_netcdf(path, engine="h5netcdf")
    return path


def load_samples(path: str | Path) -> xarray.DataTree:
    """Draws from a netCDF file, all of them in memory, so that the file is free again.

    :raises FileNotFoundError: no file there. :raises OSError: it is no netCDF file.
    """
    import xarray

    if not Path(path).is_file():
        raise FileNotFoundError(f"no samples in {path}: expected a file that save_samples wrote")
    with xarray.open_datatree(path, engine="h5netcdf") as tree:
        return tree.load()


def chains(
    results: Sequence[InferenceResult],
    draws: int = 1000,
    *,
    horizon: int | None = None,
    seed: int = 0,
) -> xarray.DataTree:
    """Trajectories of several results of one model, such as runs of several seeds, a chain each.

    Each draws by a seed of its own, so that a chain that differs differs by its policy. Where
    trajectories of some results are longer, those of the others stand still at their end.

    :param draws, horizon: of each, as in `InferenceResult.sample`.
    :param seed: of everything random.
    :returns: the groups that all of them have; `exact` only if all are at one temperature.
    :raises ValueError: no results, or of models that differ in their states or actions.
    """
    import xarray

    if not results:
        raise ValueError("results: expected at least one, got none")
    spaces = [(r.model.state_space, r.model.action_space) for r in results]
    for i, these in enumerate(spaces):
        if these != spaces[0]:
            raise ValueError(
                f"results: expected results of one model, got states {spaces[0][0]} and actions "
                f"{spaces[0][1]} in the first and {these[0]} and {these[1]} in result {i}; draw "
                "from each by itself"
            )
    trees = [
        result.sample(draws, horizon=horizon, seed=derived(seed, f"chain {i}"))
        for i, result in enumerate(results)
    ]
    longest = max(tree["posterior"].sizes["time"] for tree in trees)
    shared = [name for name in trees[0].children if all(name in t.children for t in trees)]
    joined = {}
    for name in shared:
        parts = [_lengthened(tree[name].to_dataset(), longest) for tree in trees]
        if name == "exact":
            if len({result.temperature for result in results}) == 1:
                joined[name] = parts[0]
            continue
        kept = set.intersection(*(set(part.data_vars) for part in parts))
        columns = [part[[n for n in part.data_vars if n in kept]] for part in parts]
        joined[name] = xarray.concat(columns, dim="chain")
    tree = xarray.DataTree.from_dict(joined)
    attributes = [t.attrs for t in trees]
    tree.attrs.update(
        {k: v for k, v in attributes[0].items() if all(a.get(k) == v for a in attributes)}
    )
    return tree


def rhat_of_returns(tree: xarray.DataTree) -> float | None:
    """R̂ of the returns of a tree of `chains`, by ranks: near 1 if runs are as good as each other.

    Above 1.01 runs differ by more than their own spread explains. None if there is one chain, or
    all returns are the same. Vehtari et al. (2021), doi:10.1214/20-BA1221.
    """
    return rhat(column(tree, "sample_stats", "return"))


def rhat(returns: Array) -> float | None:
    """The same of returns (chain, draw)."""
    if len(returns) < 2 or returns.shape[1] < 4 or np.ptp(returns) == 0:
        return None
    found = float(arviz().rhat(returns))
    return found if math.isfinite(found) else None


def column(tree: xarray.DataTree, group: str, name: str) -> Array:
    """One variable of draws, (chain, draw, ...)."""
    return np.asarray(tree[group].to_dataset()[name].values)


def _lengthened(group: xarray.Dataset, steps: int) -> xarray.Dataset:
    """`group` with `steps` steps, in those added of which nothing happens."""
    import xarray

    columns = {}
    for name, column in group.data_vars.items():
        missing = {
            time: (0, size - column.sizes[time])
            for time, size in (("time", steps), ("time_and_end", steps + 1))
            if column.sizes.get(time, size) < size
        }
        if missing and name in ("state", "action"):
            column = column.pad(missing, mode="edge")
        elif missing:
            column = column.pad(missing, constant_values=column.dtype.type(0))
        columns[name] = column
    return xarray.Dataset(columns)
