"""Noise without state: Philox's own vectors, uniformity, independence, and draws that are pure."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from scipy import stats
from torch import Tensor

from inference_rl import MixturePrior, SparseCategorical, TruncatedNormal, UniformPrior
from inference_rl.distributions import absorbing, categorical, idle
from inference_rl.linear_gaussian import SingularNormal
from inference_rl.policies import LinearGaussianPolicy, TabularPolicy
from inference_rl.priors import GaussianPrior
from inference_rl.randomness import (
    ACTIONS,
    STATES,
    derived,
    draw,
    episode_seeds,
    philox,
    uniforms,
)

N = 20_000
SEEDS = episode_seeds(derived(0, "tests"), np.arange(N))
PROBABLE = 1e-4
"""Of a test that fails by bad luck; the seeds are fixed, so that it does or does not."""


# ------------------------------------------------------------------ the generator


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_vectors_of_random123(counter: list[int], key: list[int], expected: list[int]) -> None:
    """`kat_vectors` of the authors' library, philox4x32 with 10 rounds."""
    words = np.array(counter, dtype=np.uint64).reshape(4, 1, 1)
    keys = np.array([key[0] | key[1] << 32], dtype=np.uint64)
    found = philox(words[::2], words[1::2], keys).flatten()
    assert [int(found[i]) for i in (0, 2, 1, 3)] == expected


def test_uniforms_are_made_of_the_first_two_words() -> None:
    value = uniforms(np.zeros(1, dtype=np.uint64), 0, 0, 1)
    mantissa = (0x6627E8D5 >> 6) << 26 | 0xE169C58D >> 6
    assert value.item() == (mantissa + 0.5) / 2**52
    assert value.dtype == torch.float64


def test_uniforms_lie_in_the_open_interval() -> None:
    assert (2**52 - 0.5) * 2.0**-52 < 1
    values = uniforms(SEEDS, 3, 1, 5)
    assert values.shape == (N, 5)
    assert ((values > 0) & (values < 1)).all()


@pytest.mark.parametrize("dimension", [0, 1, 2, 6])
def test_uniforms_are_uniform(dimension: int) -> None:
    over_seeds = uniforms(SEEDS, 5, 2, 7)[:, dimension].numpy()
    steps = uniforms(np.repeat(SEEDS[:1], N), np.arange(N), 2, 7)[:, dimension].numpy()
    for values in (over_seeds, steps):
        assert stats.kstest(values, "uniform").pvalue > PROBABLE
        counts = np.bincount((values * 64).astype(int), minlength=64)
        assert stats.chisquare(counts).pvalue > PROBABLE
        low_bits = np.bincount((values * 2**40 % 16).astype(int), minlength=16)
        assert stats.chisquare(low_bits).pvalue > PROBABLE


def test_uniforms_are_independent() -> None:
    """Pairs of neighbours in each argument: no correlation, and uniform on the square."""
    here = uniforms(SEEDS, 7, 1, 4).numpy()
    others = {
        "seeds": np.roll(here, 1, axis=0),
        "numbers that follow": uniforms(SEEDS + np.uint64(1), 7, 1, 4).numpy(),
        "high bits": uniforms(SEEDS ^ np.uint64(1 << 63), 7, 1, 4).numpy(),
        "steps": uniforms(SEEDS, 8, 1, 4).numpy(),
        "far steps": uniforms(SEEDS, 7 + (1 << 32), 1, 4).numpy(),
        "streams": uniforms(SEEDS, 7, 2, 4).numpy(),
        "dimensions": np.roll(here, 1, axis=1),
    }
    for name, there in others.items():
        assert (here != there).all(), name
        for a, b in zip(here.T, there.T, strict=True):
            assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(N), name
            cells = np.bincount((a * 8).astype(int) * 8 + (b * 8).astype(int), minlength=64)
            assert stats.chisquare(cells).pvalue > PROBABLE, name


def test_more_numbers_begin_with_fewer() -> None:
    assert torch.equal(uniforms(SEEDS, 0, 0, 9)[:, :4], uniforms(SEEDS, 0, 0, 4))


def test_seeds_of_episodes_do_not_depend_on_their_number() -> None:
    some = episode_seeds(5, np.array([3, 10**9, 0]))
    assert some.dtype == np.uint64
    assert some[0] == episode_seeds(5, np.arange(4))[3]
    assert some[1] == episode_seeds(5, np.array([10**9]))[0]
    assert some[0] != episode_seeds(6, np.array([3]))[0]
    assert len(np.unique(SEEDS)) == N


def test_purposes_have_seeds_of_their_own() -> None:
    names = ("environment", "policy", "network", "sampling")
    seeds = {derived(seed, name) for seed in (0, 1, -1, 2**70) for name in names}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived(0, "policy") == 4874253883804920906  # on every machine
    assert episode_seeds(7, np.array([2]))[0] == 14830731780645983743


# ------------------------------------------------------------------ draws


class Triangular(TorchDistribution):
    """A user's own, known by its quantiles."""

    arg_constraints = {"width": constraints.positive}  # noqa: RUF012

    def __init__(self, width: Tensor) -> None:
        self.width = width
        super().__init__(width.shape, validate_args=False)

    def icdf(self, value: Tensor) -> Tensor:
        return self.width * value.sqrt()

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.icdf(torch.rand_like(self.width))


def rows(low: float, high: float, *shape: int) -> Tensor:
    """Parameters that differ by row and are a function of the row alone."""
    count = math.prod(shape)
    spread = torch.sin(torch.arange(N * count, dtype=torch.float64)).reshape(N, *shape)
    return low + (high - low) * (spread + 1) / 2


def covariance(size: int) -> Tensor:
    root = torch.eye(size, dtype=torch.float64) + 0.5
    return root @ root.mT


PROBS = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0], dtype=torch.float64)
CONTINUOUS: dict[str, tuple[Any, Any]] = {
    "Normal": (lambda: dist.Normal(rows(-1, 1), rows(1, 2)), lambda d, x: d.cdf(x)),
    "Uniform": (lambda: dist.Uniform(rows(-1, 0), rows(1, 2)), lambda d, x: d.cdf(x)),
    "TruncatedNormal": (
        lambda: TruncatedNormal(rows(-2, 2), rows(0.5, 2)),
        lambda d, x: (ndtr(d, x) - ndtr(d, d.low)) / (ndtr(d, d.high) - ndtr(d, d.low)),
    ),
    "Laplace": (lambda: dist.Laplace(rows(-1, 1), rows(1, 2)), lambda d, x: d.cdf(x)),
    "LogNormal": (lambda: dist.LogNormal(rows(-1, 1), rows(1, 2)), lambda d, x: d.cdf(x)),
    "a user's own": (lambda: Triangular(rows(1, 2)), lambda d, x: (x / d.width).square()),
    "masked": (
        lambda: dist.Normal(rows(-1, 1), 1.0).mask(torch.arange(N) % 2 == 0),
        lambda d, x: d.base_dist.cdf(x),
    ),
    "expanded": (
        lambda: dist.Normal(torch.tensor(0.5), 2.0).expand([N]),
        lambda d, x: dist.Normal(0.5, 2.0).cdf(x),
    ),
    "a mixture": (
        lambda: dist.MixtureSameFamily(
            dist.Categorical(rows(0.1, 1, 3)), dist.Normal(rows(-3, 3, 3), 0.5)
        ),
        lambda d, x: d.cdf(x),
    ),
    "squashed": (
        lambda: dist.TransformedDistribution(
            dist.Normal(rows(-1, 1), rows(0.5, 1)), [dist.transforms.TanhTransform()]
        ),
        lambda d, x: d.cdf(x),
    ),
}


def ndtr(d: Any, x: Any) -> Tensor:
    return torch.special.ndtr((x - d.loc) / d.scale)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_draws_have_the_distribution(name: str) -> None:
    make, cdf = CONTINUOUS[name]
    distribution = make()
    drawn = draw(distribution, SEEDS, 0, ACTIONS)
    assert drawn.shape == (N,)
    assert stats.kstest(cdf(distribution, drawn).numpy(), "uniform").pvalue > PROBABLE


@pytest.mark.parametrize(
    "distribution",
    [
        dist.Categorical(probs=PROBS),
        dist.Categorical(logits=PROBS.log()),
        categorical(PROBS.float()),
        SparseCategorical(torch.tensor([4, 3, 1, 0, 3]), torch.tensor([0.2, 0.1, 0.5, 0.0, 0.2])),
        TabularPolicy(PROBS.expand(2, 6))(torch.tensor(1)),
    ],
)
def test_draws_of_categories(distribution: TorchDistribution) -> None:
    drawn = draw(distribution.expand([N]), SEEDS, 0, ACTIONS)
    assert drawn.dtype == torch.int64
    counts = np.bincount(drawn.numpy(), minlength=6)
    possible = PROBS.numpy() > 0
    assert (counts[~possible] == 0).all()
    assert stats.chisquare(counts[possible], N * PROBS.numpy()[possible]).pvalue > PROBABLE


def test_what_has_probability_zero_is_never_drawn() -> None:
    """Not even where the numbers are as extreme as they get."""
    probs = torch.tensor([0.0, 1e-300, 0.0, 1.0, 1e-300, 0.0], dtype=torch.float64)
    drawn = draw(dist.Categorical(probs.expand(N, 6)), SEEDS, 0, STATES)
    assert set(drawn.tolist()) == {3}
    for p in (0.0, 1.0):
        coins = draw(dist.Bernoulli(torch.full((N,), p)), SEEDS, 0, STATES)
        assert (coins == p).all()


def test_draws_of_coins() -> None:
    probs = rows(0, 1)
    drawn = draw(dist.Bernoulli(probs), SEEDS, 0, STATES)
    assert set(drawn.tolist()) == {0.0, 1.0}
    assert abs((drawn - probs).mean()) < 4 * (probs * (1 - probs)).mean().sqrt() / math.sqrt(N)


@pytest.mark.parametrize(
    ("make", "rank"),
    [
        (lambda loc: dist.MultivariateNormal(loc, covariance(3)), 3),
        (lambda loc: SingularNormal(loc, covariance(3)), 3),
        (lambda loc: SingularNormal(loc, torch.ones(3, 3, dtype=torch.float64)), 1),
        (lambda loc: dist.Normal(loc, 2.0).to_event(1), 3),
        (lambda loc: dist.LowRankMultivariateNormal(loc, torch.ones(3, 1).double(), loc**0), 3),
    ],
)
def test_draws_of_vectors(make: Any, rank: int) -> None:
    loc = rows(-1, 1, 3)[: N // 4]
    distribution = make(loc)
    deviation = draw(distribution, SEEDS[: N // 4], 0, STATES) - loc
    expected = (
        torch.diag(distribution.variance[0])
        if not hasattr(distribution, "covariance_matrix")
        else distribution.covariance_matrix.reshape(-1, 3, 3)[0]
    )
    found = deviation.mT @ deviation / len(loc)
    assert (deviation.mean(0).abs() < 4 * (expected.diagonal() / len(loc)).sqrt()).all()
    assert (found - expected).abs().max() < 6 * expected.max() / math.sqrt(len(loc))
    assert torch.linalg.matrix_rank(found, rtol=1e-6) == rank


PURE: dict[str, Any] = {
    **{name: make for name, (make, _) in CONTINUOUS.items()},
    "Categorical": lambda: dist.Categorical(rows(0.1, 1, 5)),
    "SparseCategorical": lambda: SparseCategorical(
        torch.arange(5).expand(N, 5), rows(0.1, 1, 5), validate_args=False
    ),
    "Bernoulli": lambda: dist.Bernoulli(rows(0, 1)),
    "Delta": lambda: dist.Delta(rows(0, 1, 2), event_dim=1),
    "MultivariateNormal": lambda: dist.MultivariateNormal(rows(-1, 1, 3), covariance(3)),
    "SingularNormal": lambda: SingularNormal(rows(-1, 1, 3), covariance(3)),
    "a linear policy": lambda: LinearGaussianPolicy(
        torch.ones(2, 3).double(), torch.zeros(2).double(), covariance(2)
    )(rows(-1, 1, 1).expand(N, 3)),
    "a box": lambda: UniformPrior(box())(rows(-1, 1, 3)),
    "a truncated box": lambda: GaussianPrior(box())(rows(-1, 1, 3)),
    "a mixture of boxes": lambda: MixturePrior([UniformPrior(box()), GaussianPrior(box())])(
        rows(-1, 1, 3)
    ),
    "squashed vectors": lambda: dist.TransformedDistribution(
        dist.Normal(rows(-1, 1, 3).float(), 1.0), [dist.transforms.TanhTransform()]
    ).to_event(1),
    "ended": lambda: absorbing(
        dist.Normal(rows(-1, 1, 3), 1.0).to_event(1), torch.arange(N) % 3 == 0, rows(5, 6, 3), None
    ),
    "idle": lambda: idle(dist.Categorical(rows(0.1, 1, 4)), torch.arange(N) % 3 == 0, 4),
    "Beta": lambda: dist.Beta(rows(1, 2, 2), rows(1, 2, 2)).to_event(1),
    "Gamma": lambda: dist.Gamma(rows(1, 2), rows(1, 2)),
    "Dirichlet": lambda: dist.Dirichlet(rows(1, 2, 3)),
    "Binomial": lambda: dist.Binomial(10, rows(0, 1)),
    "StudentT": lambda: dist.StudentT(5.0, rows(-1, 1), 1.0),
}


def box() -> Any:
    from gymnasium.spaces import Box

    return Box(-1.0, 1.0, (2,))


def at(distribution: Any, index: np.ndarray) -> Any:
    """The same rows in another batch, by way of copies of all parameters."""
    import copy

    chosen = copy.copy(distribution)
    for name, value in vars(distribution).items():
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == N:
            setattr(chosen, name, value[torch.from_numpy(index)].contiguous())
        elif isinstance(value, torch.distributions.Distribution):
            setattr(chosen, name, at(value, index))
        elif isinstance(value, list) and value and hasattr(value[0], "batch_shape"):
            setattr(chosen, name, [at(part, index) for part in value])
    if len(distribution._batch_shape) and distribution._batch_shape[0] == N:
        chosen._batch_shape = torch.Size([len(index), *distribution._batch_shape[1:]])
    return chosen


@pytest.mark.parametrize("name", PURE)
def test_a_row_is_the_same_in_every_batch(name: str) -> None:
    distribution = PURE[name]()
    slow = name in {"Beta", "Gamma", "Dirichlet", "Binomial", "StudentT"}
    chosen = np.random.default_rng(0).permutation(N)[: 60 if slow else 3000]
    steps = np.arange(N) % 7
    whole = draw(at(distribution, chosen), SEEDS[chosen], steps[chosen], STATES)
    assert whole.dtype == PURE[name]().sample().dtype
    order = np.arange(len(chosen))
    for index in (order[::-1].copy(), *np.split(order, [1, 4, 21])):
        part = chosen[index]
        again = draw(at(distribution, part), SEEDS[part], steps[part], STATES)
        assert torch.equal(again, whole[torch.from_numpy(index)])
    assert name != "Delta" or torch.equal(whole, distribution.v[torch.from_numpy(chosen)])


@pytest.mark.parametrize("name", ["Normal", "Gamma"])
def test_draws_differ_by_seed_step_and_stream_and_leave_torch_alone(name: str) -> None:
    distribution = at(PURE[name](), np.zeros(50, dtype=int))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn = draw(distribution, SEEDS[:50], 0, STATES)
    assert len(drawn.unique()) == 50
    for seeds, steps, stream in ((SEEDS[50:100], 0, 0), (SEEDS[:50], 1, 0), (SEEDS[:50], 0, 1)):
        assert (draw(distribution, seeds, steps, stream) != drawn).all()
    assert torch.equal(torch.get_rng_state(), before)


def test_row_by_row_draws_have_the_distribution() -> None:
    gamma = dist.Gamma(torch.full((2000,), 2.0), torch.ones(2000))
    drawn = draw(gamma, SEEDS[:2000], 0, 0)
    assert stats.kstest(drawn.numpy(), stats.gamma(2).cdf).pvalue > PROBABLE


def test_single_precision_stays_inside_the_support() -> None:
    low = torch.full((N,), 1e6)
    drawn = draw(dist.Uniform(low, low + 1), SEEDS, 0, STATES)
    assert drawn.dtype == torch.float32
    assert (drawn < low + 1).all()


def test_the_quantiles_of_truncated_normals() -> None:
    p = torch.linspace(0.01, 0.99, 11, dtype=torch.float64).unsqueeze(-1)
    loc = torch.tensor([-3.0, 0.0, 0.7, 5.0], dtype=torch.float64)
    scale = torch.tensor([0.5, 1.0, 3.0, 0.7], dtype=torch.float64)
    edges = ((torch.tensor(e) - loc) / scale for e in (-1.0, 1.0))
    expected = stats.truncnorm(*(e.numpy() for e in edges), loc.numpy(), scale.numpy()).ppf(p)
    found = TruncatedNormal(loc, scale).icdf(p)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"seed: expected an integer in \[0, 2\^64\), got -1"):
        episode_seeds(-1, np.arange(2))
    with pytest.raises(ValueError, match=r"expected a distribution of batch shape \(20000,\)"):
        draw(dist.Normal(0.0, 1.0), SEEDS, 0, STATES)

    class Nameless(TorchDistribution):
        arg_constraints: dict[str, Any] = {}  # noqa: RUF012

        def __init__(self, size: int) -> None:
            super().__init__(torch.Size([size]), validate_args=False)

        def expand(self, batch_shape: Any, _instance: Any = None) -> Nameless:
            return self

    with pytest.raises(TypeError, match=r"row of Nameless cannot be drawn, .*; .* its icdf"):
        draw(Nameless(2), SEEDS[:2], 0, STATES)
