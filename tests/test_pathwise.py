"""The pathwise policy gradient against the closed form of a scalar linear-Gaussian model."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from inference_rl import LinearGaussianModel, PolicyGradient, infer, load_target
from inference_rl.inference.policy_gradient import pathwise_loss

A, B, NOISE, START, SPREAD, STEPS, DISCOUNT = 0.9, 0.5, 0.04, 1.5, 0.09, 6, 0.9
STATE_COST, ACTION_COST, PRIOR, TEMPERATURE = 0.7, 0.2, 1.3, 0.4


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(-0.3, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.tensor(-0.5, dtype=torch.float64))

    def forward(self, state: Tensor) -> dist.Normal:
        return dist.Normal(self.gain * state, self.log_scale.exp()).to_event(1)


def model() -> LinearGaussianModel:
    return LinearGaussianModel(
        [[A]],
        [[B]],
        state_cost=[[STATE_COST]],
        action_cost=[[ACTION_COST]],
        noise_covariance=[[NOISE]],
        initial_mean=[START],
        initial_covariance=[[SPREAD]],
        prior_covariance=[[PRIOR**2]],
        discount=DISCOUNT,
        horizon=STEPS,
    )


def objective(policy: Linear) -> Tensor:
    """J in KL form, from the moments of the state."""
    gain, scale = policy.gain, policy.log_scale.exp()
    mean, variance = torch.tensor(START, dtype=torch.float64), torch.tensor(SPREAD).double()
    total = torch.zeros((), dtype=torch.float64)
    for t in range(STEPS):
        square = variance + mean**2
        reward = -STATE_COST * square - ACTION_COST * (gain**2 * square + scale**2)
        divergence = (
            math.log(PRIOR) - scale.log() + (scale**2 + gain**2 * square) / (2 * PRIOR**2) - 0.5
        )
        total = total + DISCOUNT**t * (reward - TEMPERATURE * divergence)
        loop = A + B * gain
        mean, variance = loop * mean, loop**2 * variance + B**2 * scale**2 + NOISE
    return total


def gradients(flip: float = 1.0) -> tuple[Tensor, Tensor]:
    """The mean gradient of −loss over batches of paths, in standard errors of its exact value."""
    policy = Linear()
    exact = torch.stack(torch.autograd.grad(objective(policy), list(policy.parameters())))
    torch.manual_seed(0)
    drawn = []
    for _ in range(120):
        loss, *_ = pathwise_loss(
            model(),
            policy,
            model().action_prior,
            temperature=TEMPERATURE * flip,
            steps=STEPS,
            paths=100,
        )
        drawn.append(-torch.stack(torch.autograd.grad(loss, list(policy.parameters()))))
    sample = torch.stack(drawn)
    error = sample.std(0) / math.sqrt(len(sample))
    return (sample.mean(0) - exact) / error, sample.mean(0)


def test_gradient_is_unbiased() -> None:
    deviation, _ = gradients()
    assert deviation.abs().max() < 4


def test_another_temperature_is_told_apart() -> None:
    deviation, _ = gradients(flip=1.5)
    assert deviation.abs().max() > 20


def test_loss_is_minus_the_objective() -> None:
    policy = Linear()
    torch.manual_seed(1)
    with torch.no_grad():
        loss, entropy, divergence = pathwise_loss(
            model(),
            policy,
            model().action_prior,
            temperature=TEMPERATURE,
            steps=STEPS,
            paths=200_000,
        )
    assert -loss.item() == pytest.approx(objective(policy).item(), abs=0.01)
    assert divergence.item() > 0
    of_a_normal = 0.5 * math.log(2 * math.pi * math.e) + policy.log_scale.item()
    assert entropy.item() == pytest.approx(of_a_normal, abs=0.01)


def test_descends_to_the_best_linear_policy() -> None:
    settings = PolicyGradient(
        temperature=TEMPERATURE,
        estimator="pathwise",
        policy=Linear(),
        environments=64,
        steps_per_round=STEPS,
        total_steps=64 * STEPS * 300,
        learning_rate=0.02,
        evaluation_episodes=0,
    )
    result = infer(model(), settings)
    assert result.v is None
    policy = result.policy.module
    best = Linear()
    optimiser = torch.optim.LBFGS(best.parameters(), max_iter=200, tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -objective(best)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert objective(best).item() - objective(policy).item() < 0.002


def test_needs_a_program_that_can_be_reparameterised() -> None:
    settings = PolicyGradient(temperature=0.1, estimator="pathwise", total_steps=100)
    with pytest.raises(TypeError, match="actions of Chain are drawn from"):
        infer(load_target("chain"), settings)
    with pytest.raises(TypeError, match="CartPole-v1 is a simulator"):
        infer(load_target("CartPole-v1"), settings)
    with pytest.raises(ValueError, match="expected one above 0, got 0"):
        PolicyGradient(temperature=0, estimator="pathwise")
