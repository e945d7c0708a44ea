"""The value that results of routines have which learn Q alone, by hand, by draws, by quadrature."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium.spaces import Discrete, MultiDiscrete
from test_sql import BOX, Wind
from torch import Tensor

from inference_rl import (
    SAC,
    SQL,
    CategoricalPrior,
    GaussianPrior,
    InferenceResult,
    SoftDDPG,
    SoftTD3,
    infer,
    load_target,
)
from inference_rl.decision_value import DRAWS

BRIEF: dict[str, Any] = {
    "temperature": 0.5,
    "total_steps": 60,
    "warmup_steps": 40,
    "batch_size": 32,
    "hidden": (16,),
    "value_learning_rate": 0.05,
    "evaluation_episodes": 0,
    "compile": "off",
}
PRIORS: dict[str, Any] = {
    "discrete": CategoricalPrior([0.2, 0.0, 0.8]),
    "multi-discrete": None,
    "learned": None,
    "box": GaussianPrior(BOX, 0.3, 0.5),
}
SPACES: dict[str, Any] = {
    "discrete": Discrete(3),
    "multi-discrete": MultiDiscrete([2, 3]),
    "learned": Discrete(3),
    "box": BOX,
}


def inferred(routine: Any, case: str, **settings: Any) -> tuple[InferenceResult, Tensor, Tensor]:
    model = Wind(SPACES[case])
    if case == "learned":
        settings |= {"learn_prior": True, "learning_rate": 0.1}
    result = infer(model, routine(**BRIEF | settings), prior=PRIORS[case], seed=1)
    return result, model.initial_state().sample((6,)), torch.arange(6) % 5


def every(case: str, states: int) -> Tensor:
    if case == "multi-discrete":
        pairs = torch.cartesian_prod(torch.arange(2), torch.arange(3))
        return pairs.unsqueeze(1).expand(-1, states, -1)
    return torch.arange(3).unsqueeze(-1).expand(-1, states)


@pytest.mark.parametrize(
    ("routine", "case"),
    [(r, case) for r in (SAC, SQL) for case in ("discrete", "multi-discrete")] + [(SAC, "learned")],
)
def test_of_discrete_actions_it_is_exact(routine: Any, case: str, tmp_path: Path) -> None:
    result, state, t = inferred(routine, case)
    assert result.prior_source is not None
    action = every(case, 6)
    numbers = torch.arange(len(action))
    q = torch.stack([result.q(state, n.expand(6), t).mean(0) for n in numbers]).double()
    log_prior = result.prior_source()(state).log_prob(action).double()
    if routine is SQL:
        expected = 0.5 * (log_prior + q / 0.5).logsumexp(0)
    else:
        log_policy = result.policy(state, t).log_prob(action).double()
        gain = torch.where(log_prior > -math.inf, q - 0.5 * (log_policy - log_prior), 0.0)
        expected = (log_policy.exp() * gain).sum(0)
    found = result.v(state, t)
    assert found.shape == (6, 1)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found[:, 0].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(result.v(state.reshape(2, 3, 2), t.reshape(2, 3)), found.reshape(2, 3, 1))
    with pytest.raises(ValueError, match="t: expected the step in"):
        result.v(state)
    result.save(tmp_path)
    loaded = InferenceResult.load(tmp_path, model=result.model)
    if routine is SAC and case == "discrete":  # under a prior made in Python
        assert loaded.v is None
    else:
        assert torch.equal(loaded.v(state, t), found)


def estimates(result: InferenceResult, state: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of estimates as `v` is one, by noise of their own."""
    assert result.prior_source is not None
    torch.manual_seed(5)
    guide = result.policy(state, t).expand((300 * DRAWS, len(state)))
    action = guide.sample()
    log_policy = guide.log_prob(action)
    log_prior = result.prior_source()(state).log_prob(action)
    q = result.q(state, action, t).amin(0)
    parts = [x.reshape(300, DRAWS, -1).double() for x in (q, log_prior - log_policy)]
    found = by_hand(*parts, backup=getattr(result.routine, "backup", "elbo"))
    return found.mean(0), found.std(0)


def by_hand(q: Tensor, log_ratio: Tensor, backup: str) -> Tensor:
    if backup == "elbo":
        return (q + 0.5 * log_ratio).mean(1)
    weight = (q / 0.5 + log_ratio).exp()
    return (
        0.5 * weight.mean(1).log() if backup == "logsumexp" else (weight * q).sum(1) / weight.sum(1)
    )


@pytest.mark.parametrize(
    ("routine", "settings"),
    [
        (SAC, {}),
        (SoftDDPG, {"width": 0.5}),
        (SoftDDPG, {"width": 0.5, "backup": "logsumexp"}),
        (SoftTD3, {"width": 0.5, "backup": "boltzmann"}),
    ],
)
def test_in_a_box_it_is_an_estimate_and_a_function_of_the_state(
    routine: Any, settings: dict[str, Any]
) -> None:
    result, state, t = inferred(routine, "box", **settings)
    before = torch.get_rng_state()
    found = result.v(state, t)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.shape == (6, 1)
    mean, spread = estimates(result, state, t)
    assert ((found[:, 0] - mean).abs() < 4 * spread).all()
    assert (spread < mean.std() / 3).all(), "or it would say nothing"
    some = torch.tensor([4, 0, 2])
    assert torch.equal(result.v(state[some], t[some]), found[some])
    assert torch.equal(result.v(state, 2)[2], found[2])


def test_in_a_box_soft_q_learning_weighs_draws(tmp_path: Path) -> None:
    result = infer(load_target("Pendulum-v1"), SQL(**BRIEF))
    angle = torch.linspace(-3, 3, 5)
    state = torch.stack([angle.cos(), angle.sin(), angle], -1)
    grid = torch.linspace(-1, 1, 2001)
    with torch.no_grad():
        q = result.q(state, grid.reshape(-1, 1, 1).expand(-1, 5, 1)).amin(0).double()
    greatest = q.max(0).values
    density = 0.5 * ((q - greatest) / 0.5).exp()
    expected = greatest + 0.5 * torch.trapezoid(density, grid.double(), dim=0).log()
    found = result.v(state)
    assert found.shape == (5, 1)
    assert ((found[:, 0] - expected).abs() < 0.5 * 0.2).all()
    result.save(tmp_path)
    assert torch.equal(InferenceResult.load(tmp_path).v(state), found)
