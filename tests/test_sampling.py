"""Sampled trajectories are data that xarray saves and ArviZ reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray

from inference_rl import Exact, infer, load_target


@pytest.mark.filterwarnings("ignore::FutureWarning")  # ArviZ 0.23 announces its successor
def test_arviz_reads_what_was_saved(tmp_path: Path) -> None:
    import arviz

    result = infer(load_target("chain"), Exact(temperature=0.1))
    tree = result.sample(draws=50, horizon=20, seed=1)
    tree.to_netcdf(tmp_path / "draws.nc")
    read = arviz.from_netcdf(tmp_path / "draws.nc")
    for group in ("posterior", "sample_stats"):
        for name, values in tree[group].data_vars.items():
            np.testing.assert_array_equal(read[group][name], values)
    assert read["posterior"]["reward"].dims == ("chain", "draw", "time")
    again = xarray.open_datatree(tmp_path / "draws.nc", engine="h5netcdf")
    assert again["sample_stats"]["log_weight"].shape == (1, 50)
