"""Action priors: what they say, what they forbid, and what they refuse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary
from oracles import Tables
from pyro.infer import TraceEnum_ELBO, config_enumerate
from scipy import stats
from torch import Tensor

from inference_rl.distributions import SparseCategorical, as_probs
from inference_rl.environment import EnvironmentModel, WithPreviousAction
from inference_rl.policies import TabularPolicy
from inference_rl.priors import (
    CategoricalPrior,
    GaussianPrior,
    MaskPrior,
    MixturePrior,
    PolicyPrior,
    StickyPrior,
    UniformPrior,
)
from inference_rl.trajectory import trajectory
from inference_rl.truncated_normal import TruncatedNormal

LINE, PLANE = Box(-1.0, 1.0, (1,)), Box(-1.0, 1.0, (2,))
THREE = Discrete(3)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


STATES = torch.tensor([[0, 1, 0], [1, 0, 1]])
TABLE = [[0.2, 0.3, 0.5], [0.0, 1.0, 0.0]]

FINITE: dict[str, tuple[Callable[[Tensor], Any], list[list[float]]]] = {
    "uniform": (UniformPrior(THREE), [[1 / 3] * 3] * 2),
    "probs": (CategoricalPrior(probs=TABLE[0]), [TABLE[0]] * 2),
    "probs by state": (CategoricalPrior(probs=TABLE), TABLE),
    "logits": (CategoricalPrior(logits=[0.0, math.log(3), -math.inf]), [[0.25, 0.75, 0.0]] * 2),
    "logits by state": (
        CategoricalPrior(logits=[[0.0, 0.0, 0.0], [5.0, -math.inf, 5.0]]),
        [[1 / 3] * 3, [0.5, 0.0, 0.5]],
    ),
    "mask": (MaskPrior([True, False, True]), [[0.5, 0.0, 0.5]] * 2),
    "mask by state": (
        MaskPrior([[True, True, True], [False, True, False]]),
        [[1 / 3] * 3, [0.0, 1.0, 0.0]],
    ),
    "mask by function": (
        MaskPrior(lambda state: torch.arange(3) <= state.unsqueeze(-1)),
        [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]],
    ),
    "mixture": (
        MixturePrior([CategoricalPrior(probs=TABLE), UniformPrior(THREE)], [0.25, 0.75]),
        [[0.3, 0.325, 0.375], [0.25, 0.5, 0.25]],
    ),
    "mixture that forbids": (
        MixturePrior([CategoricalPrior(probs=TABLE), MaskPrior([False, True, False])]),
        [[0.1, 0.65, 0.25], [0.0, 1.0, 0.0]],
    ),
    "policy": (PolicyPrior(TabularPolicy(torch.tensor(TABLE))), TABLE),
}


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_finite_priors(name: str, shape: tuple[int, ...]) -> None:
    """Their table, for states of any batch shape; forbidden actions have log-probability -inf."""
    prior, table = FINITE[name]
    state = STATES.flatten()[0] if shape == () else STATES[1] if shape == (3,) else STATES
    factor = prior(state)
    assert (factor.batch_shape, factor.event_shape) == (shape, ())
    expected = np.array(table)[state.numpy()]
    np.testing.assert_allclose(as_probs(factor, 3).numpy(), expected, atol=1e-15)
    logs = factor.log_prob(torch.arange(3).reshape(3, *(1,) * len(shape)))
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(logs.movedim(0, -1).numpy(), np.log(expected), atol=1e-14)
    wide = factor.expand((4, *shape))
    assert wide.log_prob(wide.sample()).shape == (4, *shape)
    assert wide.log_prob(wide.sample()).isfinite().all()


@pytest.mark.parametrize("name", FINITE)
def test_finite_priors_draw_what_they_say(name: str) -> None:
    prior, table = FINITE[name]
    draws = prior(torch.tensor([0, 1])).sample((5000,))
    for state, row in enumerate(np.array(table)):
        counts = torch.bincount(draws[:, state], minlength=3).numpy()
        assert counts[row == 0].sum() == 0
        if (row > 0).sum() > 1:
            assert stats.chisquare(counts[row > 0], 5000 * row[row > 0]).pvalue > 1e-3


# --- Boxes ----------------------------------------------------------------------------------------

CONTINUOUS: dict[str, Callable[[Tensor], Any]] = {
    "uniform": UniformPrior(PLANE),
    "gaussian": GaussianPrior(PLANE, 0.3, 0.4),
    "gaussian by dimension": GaussianPrior(PLANE, [0.9, -0.2], [0.1, 2.0]),
    "gaussian by state": GaussianPrior(
        PLANE, lambda s: s[..., :2], lambda s: 0.5 + s[..., :2] ** 2
    ),
    "mixture": MixturePrior([UniformPrior(PLANE), GaussianPrior(PLANE, -0.5, 0.3)], [0.2, 0.8]),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_priors_sum_to_one(name: str) -> None:
    nodes, weights = np.polynomial.legendre.leggauss(80)
    points = torch.as_tensor(np.stack(np.meshgrid(nodes, nodes), -1)).reshape(-1, 2)
    factor = CONTINUOUS[name](torch.tensor([0.1, -0.4, 7.0]).expand(len(points), 3))
    mass = factor.log_prob(points).exp().numpy() @ np.outer(weights, weights).ravel()
    assert mass == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_priors_draw_what_they_say(name: str) -> None:
    """Each coordinate's marginal, by quadrature over the other one."""
    factor = CONTINUOUS[name](torch.tensor([0.1, -0.4, 7.0]))
    draws = factor.sample((3000,))
    assert draws.shape == (3000, 2)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    grid = torch.linspace(-1, 1, 401)
    for axis in range(2):
        points = torch.empty(401, 60, 2)
        points[..., axis], points[..., 1 - axis] = grid.unsqueeze(-1), torch.as_tensor(nodes)
        density = factor.log_prob(points).exp().numpy() @ weights
        cdf = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 400)])
        shares = np.interp(draws[:, axis].numpy(), grid.numpy(), cdf)
        assert stats.kstest(shares, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_continuous_priors_are_finite_on_the_closed_box(name: str, dtype: torch.dtype) -> None:
    """tanh rounds to exactly one."""
    state = torch.tensor([0.1, -0.4, 7.0], dtype=dtype)
    corners = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=dtype)
    logs = CONTINUOUS[name](state).log_prob(corners)
    assert logs.isfinite().all()
    assert logs.dtype == dtype


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_shapes(name: str) -> None:
    factor = CONTINUOUS[name](torch.zeros(4, 5, 3))
    assert (factor.batch_shape, factor.event_shape) == ((4, 5), (2,))
    wide = factor.expand((3, 4, 5))
    assert wide.log_prob(wide.sample()).shape == (3, 4, 5)
    assert factor.sample((2,)).shape == (2, 4, 5, 2)


@pytest.mark.parametrize("make", [UniformPrior, GaussianPrior])
def test_continuous_actions_in_discrete_states(make: Callable[[Any], Any]) -> None:
    factor = make(PLANE)(torch.tensor([3, 1, 2]))
    assert (factor.batch_shape, factor.event_shape) == ((3,), (2,))
    assert factor.log_prob(factor.sample()).dtype == torch.float64


def test_uniform_choices_are_a_categorical_distribution() -> None:
    found = UniformPrior(THREE)(torch.zeros(4, 2, dtype=torch.long))
    known = dist.Categorical(probs=torch.full((4, 2, 3), 1 / 3))
    for value in (torch.tensor(2), torch.ones(4, 2), torch.zeros(3, 1, 1, dtype=torch.long)):
        torch.testing.assert_close(found.log_prob(value), known.log_prob(value))
    torch.testing.assert_close(found.entropy(), known.entropy())
    assert torch.equal(found.enumerate_support(), known.enumerate_support())
    assert found.expand((5, 4, 2)).log_prob(torch.zeros(5, 4, 2)).shape == (5, 4, 2)
    with pytest.raises(RuntimeError, match="out of bounds"):
        found.log_prob(torch.full((4, 2), 3))


def test_uniform_density_is_two_to_the_minus_d() -> None:
    factor = UniformPrior(PLANE)(torch.zeros(3))
    assert float(factor.log_prob(torch.tensor([0.3, -1.0]))) == pytest.approx(-2 * math.log(2))
    assert float(factor.log_prob(torch.tensor([0.3, -1.1]))) == -math.inf


def test_gaussian_is_truncated_not_clipped() -> None:
    factor = GaussianPrior(LINE, 0.8, 0.5)(torch.zeros(3))
    exact = stats.truncnorm(-1.8 / 0.5, 0.2 / 0.5, loc=0.8, scale=0.5)
    got = float(factor.log_prob(torch.tensor([0.9])))
    assert got == pytest.approx(exact.logpdf(0.9), rel=1e-12)
    assert (factor.sample((1000,)).abs() < 1).all()


def test_mixture_of_densities() -> None:
    factor = CONTINUOUS["mixture"](torch.zeros(3))
    action = torch.tensor([0.2, 0.1])
    normal = TruncatedNormal(torch.full((2,), -0.5), torch.tensor(0.3)).to_event(1)
    expected = 0.2 * 0.25 + 0.8 * float(normal.log_prob(action).exp())
    assert float(factor.log_prob(action).exp()) == pytest.approx(expected, rel=1e-13)


# --- The previous action --------------------------------------------------------------------------


def test_sticky_repeats_the_previous_action() -> None:
    prior = StickyPrior(THREE, 0.6, CategoricalPrior(probs=TABLE))
    # State 0 after action 2, state 1 after action 0, state 0 before any.
    table = as_probs(prior(torch.tensor([2, 4, 3])), 3)
    np.testing.assert_allclose(
        table, [[0.08, 0.12, 0.8], [0.6, 0.4, 0.0], [0.2, 0.3, 0.5]], atol=1e-15
    )
    assert as_probs(StickyPrior(THREE, 0.0)(torch.tensor(1)), 3).tolist() == pytest.approx(
        [1 / 3] * 3
    )
    assert prior.needs_previous_action
    # Repeating a forbidden action is not forbidden, another one stays so.
    assert prior(torch.tensor(4)).log_prob(torch.tensor(2)) == -math.inf


def test_sticky_is_as_exact_as_its_base() -> None:
    torch.set_default_dtype(torch.float32)
    table = as_probs(StickyPrior(THREE, 0.3, CategoricalPrior(probs=TABLE))(torch.tensor(2)), 3)
    np.testing.assert_allclose(table, [0.14, 0.21, 0.65], atol=1e-15)


class Walk(EnvironmentModel):
    """Tables as a model, with next states in one of two forms, and observations of its own."""

    def __init__(self, tables: Tables, sparse: bool) -> None:
        self.tables, self.sparse = tables, sparse
        self.state_space, self.action_space = Discrete(tables.states), Discrete(tables.actions)
        self.discount, self.horizon = tables.discount, tables.horizon

    def _states(self, probs: Tensor) -> Any:
        if self.sparse:
            return SparseCategorical(torch.arange(probs.shape[-1]).expand(probs.shape), probs)
        return dist.Categorical(probs)

    def initial_state(self) -> Any:
        return self._states(torch.as_tensor(self.tables.initial))

    def transition(self, state: Tensor, action: Tensor) -> Any:
        return self._states(torch.as_tensor(self.tables.transition)[state, action])

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return torch.as_tensor(self.tables.reward)[state, action, next_state]

    def terminal(self, state: Tensor) -> Tensor:
        return torch.as_tensor(self.tables.terminal)[state]

    def action_prior(self, state: Tensor) -> Any:
        return dist.Categorical(torch.as_tensor(self.tables.prior)[state])

    def observe(self, observation: Tensor, previous_action: Tensor | None) -> Tensor:
        return observation - 100  # what the environment shows is not the state


def walk() -> Tables:
    random = np.random.default_rng(5)
    return Tables(
        random.dirichlet(np.ones(3), (3, 2)),
        random.normal(size=(3, 2, 3)),
        prior=np.array([[0.3, 0.7], [1.0, 0.0], [0.5, 0.5]]),
        initial=np.array([0.6, 0.4, 0.0]),
        terminal=np.array([False, False, True]),
        discount=1.0,
        horizon=3,
    )


def remembering(tables: Tables, stickiness: float) -> Tables:
    """The same with the previous action in the state, written out by loops."""
    width = tables.actions + 1
    size = tables.states * width
    transition = np.zeros((size, tables.actions, size))
    reward = np.zeros((size, tables.actions, size))
    prior = np.zeros((size, tables.actions))
    initial, terminal = np.zeros(size), np.zeros(size, dtype=bool)
    for s in range(tables.states):
        initial[s * width + tables.actions] = tables.initial[s]
        for previous in range(width):
            terminal[s * width + previous] = tables.terminal[s]
            for a in range(tables.actions):
                kept = stickiness if previous < tables.actions else 0.0
                prior[s * width + previous, a] = (1 - kept) * tables.prior[s, a]
                prior[s * width + previous, a] += kept * (a == previous)
                for x in range(tables.states):
                    transition[s * width + previous, a, x * width + a] = tables.transition[s, a, x]
                    reward[s * width + previous, a, x * width + a] = tables.reward[s, a, x]
    return dataclasses.replace(
        tables,
        transition=transition,
        reward=reward,
        prior=prior,
        initial=initial,
        terminal=terminal,
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_previous_action_in_the_state(sparse: bool) -> None:
    """The program over the augmented model weighs what the tables written by hand weigh."""
    tables = walk()
    model = WithPreviousAction(Walk(tables, sparse))
    sticky = StickyPrior(Discrete(2), 0.4, Walk(tables, sparse).action_prior)
    by_hand = remembering(tables, 0.4)
    # Two steps: the augmented model has nine states.
    read = config_enumerate(
        lambda: trajectory(model, lambda s, t=None: sticky(s), 2, temperature=0.7)
    )
    got = -TraceEnum_ELBO(max_plate_nesting=0).loss(read, lambda: None)
    expected = oracles.brute_force_posterior(by_hand, 0.7, horizon=2).log_evidence
    assert got == pytest.approx(expected, abs=1e-12)

    policy = torch.as_tensor(oracles.brute_force_control(by_hand, 0.7, horizon=2).policy)
    bound = -0.7 * TraceEnum_ELBO(max_plate_nesting=0).loss(
        lambda: trajectory(model, lambda s, t=None: sticky(s), 2, temperature=0.7),
        config_enumerate(lambda: trajectory(model, TabularPolicy(policy), 2)),
    )
    best = oracles.brute_force_control(by_hand, 0.7, horizon=2).objective
    assert bound == pytest.approx(best, abs=1e-12)
    # Without stickiness the memory changes nothing.
    plain = oracles.brute_force_posterior(tables, 0.7, horizon=2).log_evidence
    loose = oracles.brute_force_posterior(remembering(tables, 0.0), 0.7, horizon=2).log_evidence
    assert loose == pytest.approx(plain, rel=1e-13)
    assert abs(expected - plain) > 1e-4


@pytest.mark.parametrize("sparse", [False, True])
def test_previous_action_piece_by_piece(sparse: bool) -> None:
    tables, by_hand = walk(), remembering(walk(), 0.0)
    model = WithPreviousAction(Walk(tables, sparse))
    size = int(model.state_space.n)
    assert size == 9
    assert (model.discount, model.horizon, model.can_end) == (1.0, 3, True)
    np.testing.assert_array_equal(as_probs(model.initial_state(), size), by_hand.initial)
    state, action = torch.arange(9).unsqueeze(-1), torch.arange(2)
    moves = as_probs(model.transition(*torch.broadcast_tensors(state, action)), size)
    np.testing.assert_allclose(moves, by_hand.transition, atol=1e-15)
    np.testing.assert_array_equal(model.terminal(torch.arange(9)), by_hand.terminal)
    np.testing.assert_allclose(as_probs(model.action_prior(torch.arange(9)), 2), by_hand.prior)
    next_state = torch.arange(9).reshape(9, 1, 1)
    gains = model.reward(state.T.unsqueeze(-1), action, next_state)
    possible = by_hand.transition > 0
    np.testing.assert_array_equal(gains.movedim(0, -1).numpy()[possible], by_hand.reward[possible])


def test_previous_action_observes_the_environment() -> None:
    model = WithPreviousAction(Walk(walk(), True))
    assert int(model.observe(torch.tensor(102), None)) == 2 * 3 + 2
    assert int(model.observe(torch.tensor(102), torch.tensor(1))) == 2 * 3 + 1


def test_previous_action_with_many_states_in_single_precision() -> None:
    """States of probability zero stay impossible, however many there are."""
    torch.set_default_dtype(torch.float32)

    class Wide(EnvironmentModel):
        state_space, action_space = Discrete(5000), Discrete(2)

        def initial_state(self) -> Any:
            return dist.Categorical(torch.nn.functional.one_hot(torch.tensor(7), 5000).float())

        def transition(self, state: Tensor, action: Tensor) -> Any:
            return dist.Delta(state)

        def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
            return torch.zeros(state.shape)

    start = WithPreviousAction(Wide()).initial_state()
    assert as_probs(start, 15_000).nonzero().flatten().tolist() == [7 * 3 + 2]


def test_previous_action_needs_finite_spaces() -> None:
    model = Walk(walk(), True)
    model.action_space = LINE
    with pytest.raises(
        TypeError, match=r"needs Discrete states and actions, got Discrete\(3\) and"
    ):
        WithPreviousAction(model)


# --- A policy as a prior --------------------------------------------------------------------------


def test_policy_prior_refuses_a_policy_of_one_horizon() -> None:
    with pytest.raises(
        ValueError, match=r"does not depend on the step, got one for a horizon of 4"
    ):
        PolicyPrior(TabularPolicy(torch.full((4, 2, 3), 1 / 3)))


def test_policy_prior_of_a_missing_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no saved run"):
        PolicyPrior(tmp_path / "nothing")


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: UniformPrior(MultiBinary(3)),
            TypeError,
            "UniformPrior: expected a Discrete, MultiDiscrete or Box",
        ),
        (lambda: GaussianPrior(THREE), TypeError, r"GaussianPrior: expected a Box.*Discrete\(3\)"),
        (lambda: CategoricalPrior(), ValueError, "either probs or logits, not both or neither"),
        (
            lambda: CategoricalPrior(probs=[1.0], logits=[0.0]),
            ValueError,
            "either probs or logits, not both or neither",
        ),
        (
            lambda: CategoricalPrior(probs=[0.5, 0.6]),
            ValueError,
            r"CategoricalPrior: probabilities must sum to one, got \[0.5, 0.6\], which sums to 1.1",
        ),
        (
            lambda: CategoricalPrior(probs=[[1.0, 0], [2, -1]]),
            ValueError,
            r"negative, got \[2, -1\]",
        ),
        (lambda: CategoricalPrior(logits=[-math.inf] * 2), ValueError, "logits must be below"),
        (lambda: CategoricalPrior(logits=[math.inf, 0]), ValueError, r"logits must be below \+inf"),
        (lambda: MixturePrior([]), ValueError, "MixturePrior: expected at least one prior"),
        (
            lambda: MixturePrior([UniformPrior(THREE)], [0.5, 0.5]),
            ValueError,
            r"one weight for each of 1 priors, got \[0.5, 0.5\]",
        ),
        (
            lambda: MixturePrior([UniformPrior(THREE)] * 2, [0.5, 0.6]),
            ValueError,
            "MixturePrior weights: probabilities must sum to one",
        ),
        (
            lambda: MixturePrior([UniformPrior(THREE), StickyPrior(THREE)]),
            TypeError,
            "a StickyPrior cannot be a component.*make the mixture its base instead",
        ),
        (lambda: StickyPrior(LINE), TypeError, "StickyPrior: expected a Discrete action space"),
        (lambda: StickyPrior(THREE, 1.0), ValueError, r"stickiness must be in \[0, 1\), got 1.0"),
        (lambda: StickyPrior(THREE, -0.1), ValueError, r"stickiness must be in \[0, 1\), got -0.1"),
        (
            lambda: StickyPrior(THREE, 0.1, StickyPrior(THREE)),
            TypeError,
            "its base cannot be a Stic",
        ),
    ],
)
def test_what_is_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_mask_that_forbids_everything_names_the_state() -> None:
    by_state = MaskPrior([[True, True], [False, False]])
    with pytest.raises(ValueError, match=r"state 1 allows none; allow one there \(in a terminal"):
        by_state(torch.tensor([0, 0, 1]))
    by_function = MaskPrior(lambda state: (state[..., :1] < 0.5).expand(*state.shape[:-1], 3))
    with pytest.raises(ValueError, match=r"state \[0.75, 2.0\] allows none"):
        by_function(torch.tensor([[0.0, 1.0], [0.75, 2.0]]))
    with pytest.raises(ValueError, match="state 1 allows none"):
        by_state(torch.tensor(1))
