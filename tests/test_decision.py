"""One decision as a program: its evidence, its bound, and their gap, against formulas."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from torch import Tensor

from inference_rl.decision import Decision, bound, decide, every_action, evidence
from inference_rl.distributions import categorical
from inference_rl.priors import GaussianPrior, UniformPrior
from inference_rl.squashed_normal import SquashedNormal

STATES, ACTIONS, TEMPERATURE = 7, 5, 0.6
SPACE, BOX = Discrete(ACTIONS), Box(-1.0, 1.0, (1,))


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def tables(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q, π and ρ, (N, A); the prior forbids an action, which the policy never takes."""
    random = torch.Generator().manual_seed(seed)
    q, policy, prior = torch.randn(3, STATES, ACTIONS, generator=random, dtype=torch.float64)
    prior = prior.exp() * (torch.arange(ACTIONS) != 2)
    policy = policy.exp() * (torch.arange(ACTIONS) != 2)
    return q, policy / policy.sum(-1, keepdim=True), prior / prior.sum(-1, keepdim=True)


def decided(q: Tensor, policy: Tensor, prior: Tensor, temperature: float = TEMPERATURE) -> Decision:
    return decide(
        torch.arange(STATES),
        lambda s: categorical(policy[s]),
        lambda s: categorical(prior[s]),
        lambda action: q.mT,
        temperature=number(temperature),
        action_space=SPACE,
        actions=every_action(SPACE),
    )


@pytest.mark.parametrize("seed", range(5))
def test_evidence_and_bound_of_discrete_actions(seed: int) -> None:
    q, policy, prior = tables(seed)
    found = decided(q, policy, prior)
    value = TEMPERATURE * (prior * (q / TEMPERATURE).exp()).sum(-1).log()
    torch.testing.assert_close(evidence(found), value, rtol=1e-12, atol=1e-12)
    gain, entropy, divergence = bound(found)
    ratio = torch.where(policy > 0, policy / prior, 1.0).log()
    torch.testing.assert_close(divergence, (policy * ratio).sum(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, torch.special.entr(policy).sum(-1))
    expected = (policy * (q - TEMPERATURE * ratio)).sum(-1)
    torch.testing.assert_close(gain, expected, rtol=1e-12, atol=1e-12)
    best = prior * ((q - value.unsqueeze(-1)) / TEMPERATURE).exp()
    gap = torch.where(policy > 0, policy * (policy / best).log(), 0.0).sum(-1)
    torch.testing.assert_close(value - gain, TEMPERATURE * gap, rtol=1e-9, atol=1e-12)
    attained = bound(decided(q, best, prior))[0]
    torch.testing.assert_close(attained, value, rtol=1e-12, atol=1e-12)


def test_without_temperature_it_is_the_expected_message() -> None:
    q, policy, prior = tables(0)
    gain = bound(decided(q, policy, prior, 0.0))[0]
    torch.testing.assert_close(gain, (policy * q).sum(-1), rtol=1e-14, atol=1e-14)


def test_gradients_of_the_bound_are_finite_where_actions_are_forbidden() -> None:
    q, policy, prior = tables(1)
    logits = policy.log().requires_grad_()
    found = decide(
        torch.arange(STATES),
        lambda s: dist.Categorical(logits=logits),
        lambda s: categorical(prior[s]),
        lambda action: q.mT,
        temperature=number(TEMPERATURE),
        action_space=SPACE,
        actions=every_action(SPACE),
    )
    (gradient,) = torch.autograd.grad(bound(found)[0].sum(), logits)
    soft = q - TEMPERATURE * torch.where(policy > 0, policy / prior, 1.0).log()
    expected = policy * (soft - (policy * soft).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def quadrature(function: Any) -> Tensor:
    nodes = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    return torch.trapezoid(function(nodes), nodes)


@pytest.mark.parametrize("prior", [UniformPrior(BOX), GaussianPrior(BOX, 0.3, 0.4)])
def test_bound_of_a_squashed_gaussian_is_its_integral(prior: Any) -> None:
    loc, scale = 0.4, 0.7
    guide = SquashedNormal(number(loc), number(scale))

    def gain_of(action: Tensor) -> Tensor:
        inside = action.clamp(-1 + 1e-12, 1 - 1e-12)
        u = inside.atanh()
        log_guide = dist.Normal(loc, scale).log_prob(u) - (1 - inside.square()).log()
        log_prior = prior(torch.zeros(len(action), 1).double()).log_prob(action.unsqueeze(-1))
        density = torch.where(action.abs() < 1, log_guide.exp(), 0.0)
        return density * ((3 * action).sin() - TEMPERATURE * (log_guide - log_prior))

    states = torch.zeros(200_000, 1, dtype=torch.float64)
    torch.manual_seed(0)
    found = decide(
        states,
        lambda s: guide.expand((len(s), 1)).to_event(1),
        prior,
        lambda action: (3 * action[..., 0]).sin(),
        temperature=number(TEMPERATURE),
        action_space=BOX,
    )
    gain = bound(found)[0]
    error = gain.std() / math.sqrt(len(gain))
    assert abs(gain.mean() - quadrature(gain_of)) < 4 * error
    assert error < 0.005


def test_every_action_counts_the_last_dimension_fastest() -> None:
    given = every_action(MultiDiscrete([2, 3]))
    assert given is not None
    assert given.squeeze(1).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert every_action(BOX) is None
    with pytest.raises(TypeError, match=r"at most 10,000 combinations .* got 16,777,216 in Multi"):
        every_action(MultiDiscrete([8] * 8))


class TestSquashedNormal:
    def test_density_is_that_of_the_transformed_gaussian(self) -> None:
        loc, scale = torch.randn(2, 1000, dtype=torch.float64)
        made = SquashedNormal(loc, scale.exp() / 2)
        value = made.rsample()
        transforms = [dist.transforms.TanhTransform(cache_size=1)]
        other = dist.TransformedDistribution(dist.Normal(loc, scale.exp() / 2), transforms)
        inside = value.abs() < 1 - 1e-6
        expected = other.log_prob(value)[inside]
        torch.testing.assert_close(made.log_prob(value)[inside], expected)
        torch.testing.assert_close(made.log_prob(value.clone())[inside], expected)
        assert inside.sum() > 900

    def test_a_draw_far_out_has_a_finite_density_and_gradient(self) -> None:
        loc = torch.tensor([12.0, -40.0, 0.0], requires_grad=True)
        made = SquashedNormal(loc, torch.tensor([0.1, 2.0, 1.0]))
        value = made.rsample()
        assert value[0] == 1
        assert value[1] == -1
        density = made.log_prob(value)
        (gradient,) = torch.autograd.grad(density.sum(), loc)
        assert density.isfinite().all()
        assert gradient.isfinite().all()
        # log N(u) - log(1 - tanh² u), of which the latter is 2 log 2 - 2 |u| out there.
        assert made._drawn is not None
        u = made._drawn[1][0].detach()
        exact = dist.Normal(12.0, 0.1).log_prob(u) - (2 * math.log(2) - 2 * u)
        torch.testing.assert_close(density[0].detach(), exact, rtol=1e-5, atol=1e-4)

    def test_values_at_the_edge_that_it_did_not_draw(self) -> None:
        made = SquashedNormal(torch.zeros(2), torch.ones(2))
        assert made.log_prob(torch.tensor([1.0, -1.0])).isfinite().all()

    def test_draws_follow_the_density(self) -> None:
        torch.manual_seed(0)
        made = SquashedNormal(torch.tensor(0.5), torch.tensor(0.8))
        drawn = made.expand((100_000,)).sample().double()
        u = drawn.atanh()
        assert abs(u.mean() - 0.5) < 0.01
        assert abs(u.std() - 0.8) < 0.01
        quantiles = made.icdf(torch.tensor([0.1, 0.5, 0.9]))
        torch.testing.assert_close(
            quantiles.double(),
            drawn.quantile(torch.tensor([0.1, 0.5, 0.9]).double()),
            atol=0.01,
            rtol=0,
        )
