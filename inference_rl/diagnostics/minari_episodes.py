"""Minari datasets as demonstrations: `episodes_from_minari`.

Minari keeps what was collected in Gymnasium environments, https://minari.farama.org. Observations
are taken for states, so that the environment is one of discrete states, such as FrozenLake-v1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from gymnasium.spaces import Discrete

from inference_rl.diagnostics.behaviour import Episode

if TYPE_CHECKING:
    from minari import MinariDataset

INSTALL = "pip install 'inference-rl[minari]'"


def episodes_from_minari(dataset: str | MinariDataset) -> list[Episode]:
    """All episodes of a dataset, with whether each was terminated or truncated.

    :param dataset: or the id of one on this machine, where `MINARI_DATASETS_PATH` says.
    :returns: states (T + 1,) and actions (T,), counted from 0.
    :raises ModuleNotFoundError: Minari is not installed.
    :raises FileNotFoundError: no such dataset.
    :raises TypeError: its observations or actions are not discrete.
    """
    if isinstance(dataset, str):
        dataset = _loaded(dataset)
    starts = []
    for name, space in (
        ("observations", dataset.observation_space),
        ("actions", dataset.action_space),
    ):
        if not isinstance(space, Discrete):
            raise TypeError(
                f"{dataset.spec.dataset_id}: expected Discrete {name}, those of a finite model, "
                f"got {space}"
            )
        starts.append(int(space.start))
    return [
        Episode(
            np.asarray(episode.observations) - starts[0],
            np.asarray(episode.actions) - starts[1],
            terminated=bool(episode.terminations[-1]),
            truncated=bool(episode.truncations[-1]),
        )
        for episode in dataset.iterate_episodes()
    ]


def _loaded(name: str) -> MinariDataset:
    try:
        import minari
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"Minari datasets need Minari: {INSTALL}") from error
    try:
        return minari.load_dataset(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no Minari dataset {name!r} on this machine: minari list local shows those there are, "
            f"minari download {name} fetches it"
        ) from error
