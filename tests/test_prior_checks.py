"""What a learned routine says of a prior that does not fit the actions, before it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from torch import Tensor

from inference_rl import (
    PCL,
    REPS,
    SAC,
    CategoricalPrior,
    EnvironmentModel,
    MaskPrior,
    PolicyGradient,
    UniformPrior,
    infer,
    load_target,
)
from inference_rl.distributions import categorical
from inference_rl.prior_checks import check_prior
from inference_rl.simulate import GymnasiumModel, starting_states

QUIET: dict[str, Any] = {"total_steps": 1, "environments": 2, "evaluation_episodes": 0}
ROUTINES = {
    "policy-gradient": PolicyGradient(**QUIET),
    "pcl": PCL(**QUIET, kind="trust"),
    "sac": SAC(**QUIET, warmup_steps=100, batch_size=16),
    "reps": REPS(**QUIET),
}


def rows(*probs: float) -> Any:
    """The same in every state, over states of boxes or of tables."""
    return lambda s: dist.Categorical(torch.tensor(probs).expand(len(s), len(probs)))


def broken(state: Tensor) -> dist.Categorical:
    return dist.Categorical(logits=torch.full((len(state), 2), torch.nan), validate_args=False)


BAD = {
    "too few": ("cliff", CategoricalPrior([0.5, 0.5]), "expected 4 categories.* got 2"),
    "too many": ("CartPole-v1", CategoricalPrior([0.2, 0.3, 0.5]), "expected 2 categories.* got 3"),
    "too much": ("CartPole-v1", rows(0.75, 0.75), r"must sum to one.* sums to 1\.5"),
    "NaN": ("CartPole-v1", broken, "NaN"),
    "a density for choices": (
        "CartPole-v1",
        lambda s: dist.Normal(torch.zeros(len(s)), 1.0),
        "expected a distribution over integers, got Normal",
    ),
    "choices for a box": (
        "Pendulum-v1",
        CategoricalPrior([0.5, 0.5]),
        "expected a density over Box.* got Categorical",
    ),
    "another model's table": (
        "cliff",
        CategoricalPrior(np.full((3, 4), 0.25)),
        "expected a table of the model's 48 states, got one of 3",
    ),
    "too much, of a table": ("chain", rows(0.75, 0.75), "must sum to one"),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("routine", ROUTINES)
def test_it_is_refused_before_anything_is_written(fault: str, routine: str, tmp_path: Path) -> None:
    target, prior, said = BAD[fault]
    with pytest.raises(ValueError, match=f"^action prior .*{said}"):
        infer(load_target(target), ROUTINES[routine], prior=prior, directory=tmp_path)
    assert not list(tmp_path.iterdir())


SIZES = MultiDiscrete([2, 3])


class Pair(EnvironmentModel):
    """Two choices at once."""

    state_space, action_space, discount = Box(-1.0, 1.0, (1,)), SIZES, 0.9

    def initial_state(self) -> dist.Normal:
        return dist.Normal(torch.zeros(1), 0.1).to_event(1)

    def transition(self, state: Tensor, action: Tensor) -> dist.Normal:
        return dist.Normal(state, 0.1).to_event(1)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return state[..., 0]


def pairs(*table: tuple[float, ...]) -> Any:
    probs = torch.tensor(table)
    return lambda s: dist.Categorical(probs.expand(len(s), *probs.shape)).to_event(1)


def test_several_choices_at_once() -> None:
    states = starting_states(Pair())
    check_prior(UniformPrior(SIZES), Pair(), states)
    check_prior(pairs((0.5, 0.5, 0), (0.2, 0.3, 0.5)), Pair(), states)
    check_prior(lambda s: dist.Bernoulli(torch.full((len(s), 2), 0.5)).to_event(1), Pair(), states)
    for prior, said in (
        (pairs((0.5, 0.5), (0.5, 0.5)), r"expected categories for each of the \[2, 3\].* got 2"),
        (pairs((0.5, 0.2, 0.3), (0.2, 0.3, 0.5)), r"expected its mass on .* probability 0\.3 else"),
        (pairs((0.5, 0.6, 0), (0.2, 0.3, 0.5)), "must sum to one"),
        (pairs((0.5, 0.5, 0)), r"expected batch shape \(8,\) and event shape \(2,\)"),
        (lambda s: dist.Poisson(torch.ones(len(s), 2)).to_event(1), "expected its mass on"),
        (lambda s: dist.Normal(torch.zeros(len(s), 2), 1).to_event(1), "over integers"),
    ):
        with pytest.raises(ValueError, match=f"action prior .*{said}"):
            check_prior(prior, Pair(), states)


class Doubles(gymnasium.Env):
    """Observations in double precision."""

    observation_space = Box(-1.0, 1.0, (2,), np.float64)
    action_space = Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.np_random.normal(size=2), {}

    def step(self, action: int) -> Any:
        return self.np_random.normal(size=2), 0.0, True, False, {}


def test_a_prior_sees_states_as_they_are() -> None:
    gymnasium.register("test_prior_checks/Doubles-v0", Doubles, max_episode_steps=5)
    model = GymnasiumModel("test_prior_checks/Doubles-v0")
    weight = torch.ones(2, 3, dtype=torch.float64)

    def prior(state: Tensor) -> Any:
        assert state.dtype == torch.float64
        allowed = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
        probs = (state @ weight).softmax(-1) * allowed
        return categorical(probs / probs.sum(-1, keepdim=True))

    result = infer(model, PolicyGradient(**QUIET), prior=prior)
    assert result.policy(torch.zeros(2, dtype=torch.float64)).probs[2] == 0


def test_terminal_states_are_not_asked_about() -> None:
    model = load_target("cliff")
    allowed = torch.ones(48, 4, dtype=torch.bool)
    allowed[model.terminal(torch.arange(48))] = torch.tensor([True, False, False, False])
    infer(model, PolicyGradient(**QUIET), prior=MaskPrior(allowed))
