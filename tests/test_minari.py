"""Minari's datasets as demonstrations: what was collected comes back, and something is inferred."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from demonstrators import Tables
from torch import Tensor

from inference_rl import EnvironmentModel, load_target, tabulate
from inference_rl.diagnostics.demonstrator import infer_reward
from inference_rl.diagnostics.minari_episodes import episodes_from_minari

NAME, EPISODES, TEMPERATURE = "lake/demonstrated-v0", 30, 0.1
LAKE = {"is_slippery": False, "max_episode_steps": 15}


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A dataset of someone who acts by the exact policy, some of whose episodes are cut."""
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that nobody needs
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        rng = np.random.default_rng(0)
        policy = np.exp(
            Tables(load_target("FrozenLake-v1", env_kwargs=LAKE)).log_policy(TEMPERATURE)
        )
        lake, buffers = gymnasium.make("FrozenLake-v1", **LAKE), []
        for episode in range(EPISODES):
            # In place of a DataCollector, which needs JAX to gather the same.
            states, steps, over = [lake.reset(seed=episode)[0]], [], False
            while not over:
                action = rng.choice(4, p=policy[states[-1]] / policy[states[-1]].sum())
                state, reward, terminated, truncated, _ = lake.step(int(action))
                states.append(state)
                steps.append((int(action), float(reward), terminated, truncated))
                over = terminated or truncated
            columns = map(list, zip(*steps, strict=True))
            names = ("actions", "rewards", "terminations", "truncations")
            found = dict(zip(names, columns, strict=True))
            buffers.append(EpisodeBuffer(episode, episode, None, states, **found))
        lake.close()
        yield minari.create_dataset_from_buffers(NAME, buffers, env="FrozenLake-v1")


def test_episodes_come_back_whole(collected: Any) -> None:
    episodes = episodes_from_minari(NAME)
    assert len(episodes) == EPISODES
    ended = tabulate(load_target("FrozenLake-v1", env_kwargs=LAKE)).is_terminal
    for episode in episodes:
        assert len(episode.states) == len(episode.actions) + 1
        assert episode.terminated == bool(ended[episode.states[-1]])
        assert episode.truncated == (len(episode.actions) == 15)
    assert {e.terminated for e in episodes} == {e.truncated for e in episodes} == {True, False}
    given = episodes_from_minari(collected)
    assert all((a.actions == b.actions).all() for a, b in zip(episodes, given, strict=True))


@pytest.mark.filterwarnings("ignore:.*one chain cannot be compared")
def test_what_they_want_is_inferred(collected: Any) -> None:
    """How much the goal is to whoever collected it, in units of what their choices are worth."""
    lake = tabulate(load_target("FrozenLake-v1", env_kwargs=LAKE))

    def build(parameters: dict[str, Tensor]) -> EnvironmentModel:
        return lake.replace(rewards=lake.rewards * parameters["goal"])

    prior = {"goal": dist.Normal(torch.tensor(0.0).double(), 2.0)}
    found = infer_reward(
        build, episodes_from_minari(collected), prior, TEMPERATURE, chains=1, draws=80, warmup=40
    )
    (row,) = found.summary()
    assert row.low < 1.0 < row.high
    assert row.high - row.low < 2.0  # of 6.6 before
    assert found.identified


def test_what_is_not_there(collected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="no Minari dataset 'lake/other-v0' on this mach"):
        episodes_from_minari("lake/other-v0")
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'inference-rl\[minari\]'"):
        episodes_from_minari(NAME)


def test_observations_that_are_no_states() -> None:
    class Boxes:
        observation_space = gymnasium.spaces.Box(-1, 1, (2,))
        action_space = gymnasium.spaces.Discrete(2)

        class spec:
            dataset_id = "pole/some-v0"

    with pytest.raises(TypeError, match=r"some-v0: expected Discrete observations, .* got Box"):
        episodes_from_minari(Boxes())  # type: ignore[arg-type]


def test_numbers_that_do_not_start_at_zero() -> None:
    class Shifted:
        observation_space = gymnasium.spaces.Discrete(4, start=10)
        action_space = gymnasium.spaces.Discrete(2, start=1)

        def iterate_episodes(self) -> Any:
            class Data:
                observations, actions = np.array([10, 13, 11]), np.array([1, 2])
                terminations, truncations = np.array([False, True]), np.array([False, False])

            return [Data]

    (episode,) = episodes_from_minari(Shifted())  # type: ignore[arg-type]
    assert episode.states.tolist() == [0, 3, 1]
    assert episode.actions.tolist() == [0, 1]
    assert episode.terminated
    assert not episode.truncated


def test_the_install_line_is_the_extra_of_the_project() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert 'minari = ["minari[hdf5]' in text
