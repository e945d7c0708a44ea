"""Networks: shapes, distributions, masks, scaling, and making them again from their description."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Text
from pyro.distributions.torch_distribution import TorchDistribution
from torch import nn
from torch.distributions.transforms import AbsTransform, AffineTransform, TanhTransform

from inference_rl.action_values import ActionValues
from inference_rl.distributions import categorical
from inference_rl.networks import (
    Architecture,
    ModulePolicy,
    NetworkPolicy,
    ObservationScaling,
    StateFunction,
    described,
)
from inference_rl.truncated_normal import TruncatedNormal

BOX = Box(-1.0, 1.0, (3,))


def policy(states, actions, **options) -> NetworkPolicy:
    torch.manual_seed(0)
    allowed, prior = options.pop("allowed", None), options.pop("prior", None)
    architecture = Architecture(described(states), described(actions), **options)
    made = NetworkPolicy(architecture, allowed, prior)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.3)
    return made


@pytest.mark.parametrize("states", [Discrete(5), BOX])
@pytest.mark.parametrize(
    "actions",
    [Discrete(4), MultiDiscrete([2, 3]), Box(-2.0, 2.0, (2,)), Box(-np.inf, np.inf, (2,))],
)
@pytest.mark.parametrize("batch", [(), (6,), (2, 3)])
def test_shapes(states, actions, batch) -> None:
    made = policy(states, actions)
    state = torch.randint(5, batch) if isinstance(states, Discrete) else torch.randn((*batch, 3))
    distribution = made(state)
    event = () if isinstance(actions, Discrete) else (2,)
    assert distribution.batch_shape == batch
    assert distribution.event_shape == event
    action = distribution.sample()
    assert action.shape == made.mode(state).shape == (*batch, *event)
    assert distribution.log_prob(action).shape == batch
    assert torch.isfinite(distribution.log_prob(action)).all()
    again = NetworkPolicy.described_by(made.description())
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(state).log_prob(action), distribution.log_prob(action))


def test_discrete_actions_are_drawn_in_a_plate() -> None:
    made = policy(BOX, Discrete(4))
    state = torch.randn(3)
    with pyro.plate("paths", 6):
        assert pyro.sample("action", made(state.expand(6, 3))).shape == (6,)
        assert pyro.sample("another", made(state)).shape == (6,)
    torch.testing.assert_close(made(state).expand((6,)).logits, made(state.expand(6, 3)).logits)


def test_combinations_of_actions_have_mass_one() -> None:
    made = policy(BOX, MultiDiscrete([2, 3]))
    every = torch.tensor([[i, j] for i in range(2) for j in range(3)])
    mass = made(torch.randn(3).expand(6, 3)).log_prob(every).exp().sum()
    assert mass.item() == pytest.approx(1, abs=1e-6)


def test_a_density_has_mass_one_on_the_box() -> None:
    made = policy(BOX, Box(-1.0, 1.0, (1,)))
    grid = torch.linspace(-1, 1, 4001).unsqueeze(-1)
    density = made(torch.randn(3).expand(len(grid), 3)).log_prob(grid).exp()
    assert torch.trapezoid(density, grid.squeeze(-1)).item() == pytest.approx(1, abs=1e-4)


def test_the_mode_is_most_likely() -> None:
    made = policy(Discrete(7), Discrete(4))
    states = torch.arange(7)
    assert torch.equal(made.mode(states), made(states).probs.argmax(-1))


@pytest.mark.parametrize("states", [Discrete(5), BOX])
def test_a_horizon_makes_it_depend_on_the_step(states) -> None:
    made = policy(states, Discrete(3), horizon=4)
    state = torch.arange(5) if isinstance(states, Discrete) else torch.randn(5, 3)
    early, late = made(state, 0).probs, made(state, 3).probs
    assert (early - late).abs().max() > 1e-3
    steps = torch.tensor([0, 3, 0, 3, 0])
    mixed = torch.where((steps == 0).unsqueeze(-1), early, late)
    torch.testing.assert_close(made(state, steps).probs, mixed)
    with pytest.raises(ValueError, match="depends on the step"):
        made(state)


@pytest.mark.parametrize("states", [Discrete(5), BOX])
@pytest.mark.parametrize("actions", [Discrete(3), Box(-1.0, 1.0, (2,))])
@pytest.mark.parametrize("horizon", [None, 4])
def test_messages_ask_for_the_step_under_a_horizon_only(states, actions, horizon) -> None:
    torch.manual_seed(0)
    made = ActionValues(Architecture(described(states), described(actions), horizon=horizon), 2)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    state = torch.arange(5) if isinstance(states, Discrete) else torch.randn(5, 3)
    action = torch.arange(5) % 3 if isinstance(actions, Discrete) else torch.rand(5, 2)
    found = made(state, action, torch.full((5,), 3))
    assert found.shape == (2, 5)
    if horizon is None:
        together = made.combined(state, action)
        discrete = isinstance(actions, Discrete)
        torch.testing.assert_close(together, found.mean(0) if discrete else torch.minimum(*found))
        assert torch.equal(made(state, action), found)
        return
    assert torch.equal(made(state, action, 3), found)
    assert (made(state, action, 0) - found).abs().min() > 1e-4
    with pytest.raises(ValueError, match=r"^t: expected the step in 0\.\.3, .*, got none; give it"):
        made(state, action)


def test_forbidden_actions_have_no_mass() -> None:
    allowed = torch.tensor([[True, False, True], [True, True, True], [False, False, True]])
    made = policy(Discrete(3), Discrete(3), masked=True, allowed=allowed)
    probs = made(torch.arange(3)).probs
    assert torch.equal(probs > 0, allowed)
    assert made.mode(torch.tensor(2)).item() == 2
    again = NetworkPolicy.described_by(made.description())
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(torch.arange(3)).probs, probs)


def test_the_support_of_a_prior_is_kept_to() -> None:
    def prior(state: torch.Tensor) -> TorchDistribution:
        return categorical(torch.nn.functional.one_hot((state[..., 0] > 0).long(), 3).float())

    def pair(state: torch.Tensor) -> TorchDistribution:
        probs = [prior(-state).probs, prior(state).probs]
        return categorical(torch.stack(probs, dim=-2)).to_event(1)

    states = torch.tensor([[0.5, 0.0, 0.0], [-0.5, 0.0, 0.0]])
    one = policy(BOX, Discrete(3), support="given", prior=prior)
    assert torch.equal(one(states).probs, prior(states).probs)
    assert one.mode(states).tolist() == [1, 0]
    two = policy(BOX, MultiDiscrete([2, 3]), support="own", prior=pair)
    assert two.mode(states).tolist() == two(states).sample().tolist() == [[0, 1], [1, 0]]
    assert two(states).log_prob(two.mode(states)).tolist() == [0, 0]
    with pytest.raises(ValueError, match="expected the prior whose forbidden actions"):
        NetworkPolicy.described_by(two.description())
    again = NetworkPolicy.described_by(one.description(), prior=prior)
    again.load_state_dict(one.state_dict())
    assert torch.equal(again.logits(states), one.logits(states))


def test_scaling_has_the_moments_of_all_that_was_seen() -> None:
    rng = np.random.default_rng(0)
    scaling = ObservationScaling(2)
    parts = [rng.normal(5, 3, (n, 2)) for n in (7, 1, 50)]
    for part in parts:
        scaling.update(torch.from_numpy(part))
    whole = np.concatenate(parts)
    np.testing.assert_allclose(scaling.mean.numpy(), whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(scaling.variance.numpy(), whole.var(0), rtol=1e-12)
    scaled = scaling(torch.from_numpy(whole)).numpy()
    np.testing.assert_allclose(scaled.std(0), 1, rtol=1e-9)
    assert scaling(torch.full((2,), 1e9, dtype=torch.float64)).max() == 10


def test_scaled_policies_see_scaled_observations() -> None:
    made = policy(BOX, Discrete(2), scaled=True)
    state = torch.randn(4, 3)
    before = made(state).probs
    made.parameters_of.scaling.update(torch.randn(100, 3) * 9 + 2)
    assert (made(state).probs - before).abs().max() > 1e-3


def test_a_module_of_ones_own() -> None:
    class Own(nn.Module):
        def forward(self, state):
            return torch.distributions.Categorical(logits=state)

    made = ModulePolicy(Own())
    state = torch.tensor([[0.0, 2.0, 1.0]])
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        ModulePolicy(lambda state: state)
    assert made(state).probs.argmax() == 1
    assert made.mode(state).tolist() == [1]


class Returns(nn.Module):
    """Whatever `make` makes of a layer's outputs."""

    def __init__(self, make, outputs: int = 2) -> None:
        super().__init__()
        self.layer, self.make = nn.Linear(3, outputs), make

    def forward(self, state):
        return self.make(self.layer(state))


def squashed(x):
    return dist.TransformedDistribution(
        dist.Normal(x, 0.5).to_event(1), [AffineTransform(0.1, -2.0), TanhTransform()]
    )


@pytest.mark.parametrize(
    ("make", "mode"),
    [
        (squashed, lambda x: torch.tanh(0.1 - 2 * x)),
        (
            lambda x: TruncatedNormal(3 * x, torch.tensor(0.4)).to_event(1),
            lambda x: (3 * x).clamp(-1, 1),
        ),
        (lambda x: dist.Delta(x, event_dim=1), lambda x: x),
        (
            lambda x: dist.Beta(2 + x.exp(), 3.0).to_event(1),
            lambda x: (1 + x.exp()) / (3 + x.exp()),
        ),
        (
            lambda x: dist.Categorical(logits=torch.stack([x, -x, 0 * x], -1)).to_event(1),
            lambda x: (x < 0).long(),
        ),
        (lambda x: dist.Bernoulli(logits=x[..., 0]), lambda x: (x[..., 0] > 0).long()),
    ],
)
def test_the_mode_of_a_module_of_ones_own(make, mode) -> None:
    torch.manual_seed(0)
    made = ModulePolicy(Returns(make))
    made.check(BOX)
    states = torch.randn(50, 3)
    torch.testing.assert_close(made.mode(states), mode(made.module.layer(states)))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda x: x, TypeError, "Returns to return a distribution over actions, got Tensor"),
        (
            lambda x: dist.MixtureSameFamily(dist.Categorical(logits=x), dist.Normal(x, 1.0)),
            TypeError,
            "most likely action is known, for evaluation, got MixtureSameFamily",
        ),
        (
            lambda x: dist.TransformedDistribution(dist.Normal(x, 1.0), [AbsTransform()]),
            TypeError,
            "most likely action is known, for evaluation, got TransformedDistribution",
        ),
        (
            lambda x: dist.Normal(x + torch.randn(2), 1.0).to_event(1),
            ValueError,
            "Returns to return a function of its parameters and the state, but it draws",
        ),
    ],
)
def test_modules_that_will_not_do_are_refused(make, error, words: str) -> None:
    with pytest.raises(error, match=words):
        ModulePolicy(Returns(make)).check(BOX)


def test_a_module_of_ones_own_stays_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, state):
            return dist.Categorical(logits=self.layers(state.reshape(-1, 3)))

    made = ModulePolicy(Own()).train()
    before = {name: buffer.clone() for name, buffer in made.named_buffers()}
    states = torch.randn(20, 3) + 5
    assert torch.equal(made(states).logits, made(states).logits)
    made.check(BOX)
    for name, buffer in made.named_buffers():
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (Text(3), "expected a Discrete, MultiDiscrete or Box space"),
        (MultiDiscrete([[2, 2], [2, 2]]), "of one dimension"),
    ],
)
def test_other_spaces_are_refused(space, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        described(space)


def test_a_state_function_starts_as_it_should() -> None:
    table = StateFunction(Architecture(described(Discrete(3)), described(Discrete(2))), 1, 1.0)
    assert not table(torch.arange(3)).any()
    torch.manual_seed(0)
    deep = StateFunction(Architecture(described(BOX), described(Discrete(2)), hidden=(8,)), 2, 0.01)
    assert deep(torch.randn(100, 3)).abs().max() < 0.1
