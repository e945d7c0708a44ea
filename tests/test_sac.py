"""Soft actor-critic against closed forms, and what it does at the ends of episodes."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Box, MultiDiscrete
from torch import Tensor

from inference_rl import SAC, EnvironmentModel, InferenceResult, infer, load_target
from inference_rl.inference import off_policy, sac
from inference_rl.learning import memory
from inference_rl.learning.collection import Collector
from inference_rl.simulate import environments

A, B = np.array([[0.9, 0.2], [0.0, 0.8]]), np.array([[0.1], [0.6]])
COST, EFFORT, NOISE, DISCOUNT, TEMPERATURE = np.diag([1.0, 1.0]), 1.0, 0.3, 0.7, 0.03


class Regulator(EnvironmentModel):
    """Linear dynamics and quadratic costs, where torques are small against their bounds."""

    state_space, action_space = Box(-np.inf, np.inf, (2,)), Box(-1.0, 1.0, (1,))
    discount = DISCOUNT

    def initial_state(self) -> Any:
        return dist.Normal(torch.zeros(2), 0.5).to_event(1)

    def transition(self, state: Tensor, action: Tensor) -> Any:
        a, b = (torch.tensor(m, dtype=state.dtype) for m in (A, B))
        return dist.Normal(state @ a.mT + action @ b.mT, NOISE).to_event(1)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        cost = torch.tensor(np.diag(COST)).to(state.dtype)
        return -(state.square() * cost).sum(-1) - EFFORT * action.square().sum(-1)


def riccati() -> tuple[np.ndarray, float]:
    """Gain K and variance of the soft optimal policy N(-K x, variance)."""
    p = COST.copy()
    for _ in range(2000):
        curvature = EFFORT + DISCOUNT * B.T @ p @ B
        gain = np.linalg.solve(curvature, DISCOUNT * B.T @ p @ A)
        p = COST + DISCOUNT * A.T @ p @ A - DISCOUNT * A.T @ p @ B @ gain
    return gain, float(TEMPERATURE / 2 / curvature[0, 0])


@pytest.mark.slow
def test_it_finds_the_regulator_that_riccati_gives() -> None:
    settings = SAC(
        temperature=TEMPERATURE,
        total_steps=24_000,
        environments=16,
        steps_per_round=4,
        updates_per_step=0.25,
        warmup_steps=2_000,
        hidden=(64, 64),
        activation="silu",
        learning_rate=1e-3,
        value_learning_rate=1e-3,
        evaluation_episodes=0,
        compile="off",
    )
    result = infer(Regulator(), settings)
    gain, variance = riccati()
    torch.manual_seed(0)
    state = torch.randn(2000, 2) * 0.3
    with torch.no_grad():
        drawn = result.policy(state).expand((2000, 2000)).sample().double()
    mean, expected = drawn.mean(0), -state.double() @ torch.from_numpy(gain).mT
    error = (mean - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    ratio = drawn.var(0).mean() / variance
    print(f"gain {gain}, variance {variance:.4f}: error of mean {error:.3f}, ratio {ratio:.3f}")
    assert error < 0.05
    assert abs(ratio - 1) < 0.05
