"""Every distribution: it sums to one, draws what it says, and stays finite where others do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from inference_rl.distributions import (
    Optimality,
    SparseCategorical,
    absorbing,
    as_discrete,
    as_probs,
    categorical,
    check_probabilities,
    checked_categoricals,
    idle,
    possible,
)
from inference_rl.truncated_normal import TruncatedNormal


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


# --- SparseCategorical ----------------------------------------------------------------------------


def sparse() -> SparseCategorical:
    states = torch.tensor([[4, 0, 4, 2], [1, 1, 1, 3]])
    probs = torch.tensor([[0.1, 0.3, 0.4, 0.2], [0.25, 0.25, 0.5, 0.0]])
    return SparseCategorical(states, probs, 6)


DENSE = [[0.3, 0, 0.2, 0, 0.5, 0], [0, 1.0, 0, 0, 0, 0]]


def test_sparse_probabilities_add_up() -> None:
    got = sparse().log_prob(sparse().enumerate_support()).exp().T
    np.testing.assert_allclose(got.numpy(), DENSE, atol=1e-15)
    np.testing.assert_allclose(as_probs(sparse(), 6).numpy(), DENSE, atol=1e-15)
    # What is impossible is as good as impossible in any sum of exponentials.
    assert float(sparse().log_prob(torch.tensor([5, 0])).max()) < -700


def test_sparse_draws_what_it_says() -> None:
    draws = sparse().sample((20_000,))
    assert draws.shape == (20_000, 2)
    counts = torch.bincount(draws[:, 0], minlength=6).numpy()
    mask = np.array(DENSE[0]) > 0
    assert counts[~mask].sum() == 0
    expected = 20_000 * np.array(DENSE[0])[mask]
    assert stats.chisquare(counts[mask], expected).pvalue > 1e-3
    assert (draws[:, 1] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_never_draws_the_impossible(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even when the uniform draw is at either end, and rounding adds up to the sum."""
    highest = 1 - torch.finfo(dtype).eps / 2
    probs = torch.tensor([0.0, 0.1, 0.2, 0.7 + 9e-8, 0.0], dtype=dtype)
    for edge, expected in ((0.0, 1), (highest, 3), (1.0, 3)):
        monkeypatch.setattr(torch, "rand", lambda *a, e=edge, **k: torch.full(a[0], e, dtype=dtype))
        assert int(SparseCategorical(torch.arange(5), probs).sample()) == expected


def test_sparse_shapes() -> None:
    wide = sparse().expand((3, 2))
    assert wide.batch_shape == (3, 2)
    assert wide.sample((5,)).shape == (5, 3, 2)
    assert wide.log_prob(torch.tensor([0, 1])).shape == (3, 2)
    assert wide.enumerate_support().shape == (6, 3, 2)
    assert wide.enumerate_support(expand=False).shape == (6, 1, 1)
    both = SparseCategorical(torch.tensor([0, 1]), torch.full((4, 2), 0.5))
    assert both.batch_shape == (4,)


def test_sparse_errors() -> None:
    with pytest.raises(ValueError, match=r"same K values.*\(2,\) and \(3,\)"):
        SparseCategorical(torch.arange(2), torch.ones(3) / 3)
    with pytest.raises(ValueError, match="SparseCategorical: probabilities must sum to one"):
        SparseCategorical(torch.arange(2), torch.tensor([0.5, 0.6]))
    unsized = SparseCategorical(torch.arange(2), torch.tensor([0.5, 0.5]))
    assert not unsized.has_enumerate_support
    with pytest.raises(NotImplementedError, match="only if it was given its size"):
        unsized.enumerate_support()


# --- Optimality -----------------------------------------------------------------------------------


def test_optimality_batches_and_expands() -> None:
    factor = Optimality(torch.zeros(2, 1) + torch.arange(3.0))
    assert (factor.batch_shape, factor.event_shape) == ((2, 3), ())
    wide = factor.expand((4, 2, 3))
    assert wide.log_prob(torch.tensor(1.0)).shape == (4, 2, 3)
    with pytest.raises(NotImplementedError, match="cannot be sampled"):
        factor.sample()


# --- One form for discrete distributions ----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_categorical_keeps_small_probabilities(dtype: torch.dtype) -> None:
    """torch's own stops at the rounding error."""
    probs = torch.tensor([[0.0, 1e-30, 1.0], [0.5, 0.5, 0.0]], dtype=dtype)
    got = categorical(probs)
    assert torch.equal(got.probs, probs)
    logs = [-math.inf, math.log(1e-30), 0.0]
    assert got.logits[0].tolist() == pytest.approx(logs, rel=1e-6)
    assert got.log_prob(torch.tensor([1, 2])).tolist() == pytest.approx([logs[1], -math.inf])
    assert got.expand((4, 2)).log_prob(torch.tensor(0))[2].tolist() == pytest.approx(
        [-math.inf, math.log(0.5)]
    )
    assert dist.Categorical(probs).log_prob(torch.tensor([1, 2]))[1] > -40  # the reason why


def test_categorical_gradients_are_finite() -> None:
    probs = torch.tensor([0.0, 0.25, 0.75], requires_grad=True)
    (gradient,) = torch.autograd.grad(categorical(probs).log_prob(torch.tensor(1)), probs)
    # Of log (p_1 / Σ p), as torch's own has it.
    (reference,) = torch.autograd.grad(dist.Categorical(probs).log_prob(torch.tensor(1)), probs)
    torch.testing.assert_close(gradient, reference)


DISCRETE: list[tuple[Callable[[], Any], list[float]]] = [
    (lambda: dist.Categorical(torch.tensor([0.0, 0.4, 0.6, 0.0])), [0, 0.4, 0.6, 0]),
    (lambda: dist.Categorical(logits=torch.tensor([0.0, 1.0, 0.0, -torch.inf])), []),
    (lambda: dist.Categorical(torch.tensor([0.4, 0.6])), [0.4, 0.6, 0, 0]),
    (lambda: SparseCategorical(torch.tensor([3, 1]), torch.tensor([0.9, 0.1])), [0, 0.1, 0, 0.9]),
    (lambda: dist.Delta(torch.tensor(2)), [0, 0, 1, 0]),
    (lambda: dist.Bernoulli(torch.tensor(0.3)), [0.7, 0.3, 0, 0]),
    (lambda: dist.Binomial(3, torch.tensor(0.5)), [0.125, 0.375, 0.375, 0.125]),
]


@pytest.mark.parametrize(("make", "expected"), DISCRETE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_discrete_distributions_in_one_form(
    make: Callable[[], Any], expected: list[float], dtype: torch.dtype
) -> None:
    torch.set_default_dtype(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-15
    expected = expected or [1 / (2 + math.e), math.e / (2 + math.e), 1 / (2 + math.e), 0]
    got = as_discrete(make(), 4)
    assert isinstance(got, SparseCategorical | torch.distributions.Categorical)
    assert got.has_enumerate_support
    assert as_probs(make(), 4).tolist() == pytest.approx(expected, abs=tolerance)
    values = got.enumerate_support()
    chances = got.log_prob(values).exp()
    assert chances.tolist() == pytest.approx(expected[: len(values)], abs=tolerance)
    batched = as_probs(make().expand((3, 2)), 4)
    assert batched.shape == (3, 2, 4)
    assert batched[2, 1].tolist() == pytest.approx(expected, abs=tolerance)
    assert possible(make(), 4).tolist() == [chance > 0 for chance in expected]
    assert possible(make().expand((3, 2)), 4).shape == (3, 2, 4)


def test_possible_is_what_rounds_to_zero() -> None:
    logits = torch.tensor([0.0, -1000.0, -torch.inf])
    assert as_probs(dist.Categorical(logits=logits), 3).tolist() == [1, 0, 0]
    assert possible(dist.Categorical(logits=logits), 3).tolist() == [True, True, False]


def test_other_spaces_are_left_alone() -> None:
    normal = dist.Normal(torch.tensor(0.0), torch.tensor(1.0))
    assert as_discrete(normal, None) is normal


def test_probability_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"over 0..3, but Poisson.* has probability 0.143 elsewhe"):
        as_discrete(dist.Poisson(torch.tensor(2.0)), 4)
    assert as_probs(dist.Poisson(torch.tensor(2.0)), 40).sum() == pytest.approx(1)


@pytest.mark.parametrize(("make", "expected"), DISCRETE)
def test_absorbing_and_idle(make: Callable[[], Any], expected: list[float]) -> None:
    expected = expected or [1 / (2 + math.e), math.e / (2 + math.e), 1 / (2 + math.e), 0]
    ended, state = torch.tensor([True, False]), torch.tensor([3, 0])
    stopped = as_probs(absorbing(make().expand((2,)), ended, state, 4), 4)
    assert stopped[0].tolist() == [0, 0, 0, 1]
    assert stopped[1].tolist() == pytest.approx(expected, abs=1e-15)
    idling = idle(make().expand((2,)), ended, 4)
    assert idling.probs[0].tolist() == pytest.approx([0.25] * 4)
    assert idling.probs[1].tolist() == pytest.approx(expected, abs=1e-15)
    impossible = torch.tensor(expected) == 0
    assert (idling.logits[1][impossible] == -torch.inf).all()


def test_idle_keeps_what_probabilities_cannot_hold() -> None:
    logits = torch.tensor([[0.0, -2000.0]])
    got = idle(dist.Categorical(logits=logits), torch.tensor([False]), 2)
    assert got.log_prob(torch.tensor([1])).tolist() == [-2000]


def test_idle_masks_continuous_actions() -> None:
    normal = dist.Normal(torch.zeros(2, 1), 1.0).to_event(1)
    got = idle(normal, torch.tensor([True, False]), None).log_prob(torch.ones(2, 1))
    assert got.tolist() == pytest.approx([0, float(normal.log_prob(torch.ones(2, 1))[1])])


def test_absorbing_continuous_states() -> None:
    """A point mass where it has ended, the step itself elsewhere; for any step."""
    state = torch.tensor([[5.0, 6.0], [0.0, 0.0]])
    ended = torch.tensor([True, False])
    for step in (
        dist.Normal(torch.zeros(2, 2), 1.0).to_event(1),
        dist.Delta(torch.ones(2, 2), event_dim=1),
        # Neither can reach the state in which the first one stands still.
        TruncatedNormal(torch.zeros(2, 2), torch.ones(2, 2)).to_event(1),
        dist.Uniform(torch.zeros(2, 2), 1.0).to_event(1),
    ):
        stopped = absorbing(step, ended, state, None)
        assert (stopped.batch_shape, stopped.event_shape) == ((2,), (2,))
        draw = stopped()
        assert torch.equal(draw[0], state[0])
        assert not torch.equal(draw[1], state[1])
        assert stopped.sample((3,)).shape == (3, 2, 2)
        density = stopped.log_prob(draw)
        assert density[0] == 0
        assert density[1] == step.log_prob(draw[1].expand(2, 2))[1]
        assert stopped.expand((4, 2)).log_prob(draw).shape == (4, 2)


# --- Checks of probabilities ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (
            [0.5, 0.6],
            r"here: probabilities must sum to one, got \[0.5, 0.6\], which sums to 1.1; div",
        ),
        ([0.5, -0.5], r"here: probabilities must not be negative, got \[0.5, -0.5\]"),
        ([0.5, math.nan], r"here: probabilities must be finite, got \[0.5, nan\]"),
        ([math.inf, 0.0], r"here: probabilities must be finite, got \[inf, 0\]"),
        ([[1.0, 0.0], [0.3, 0.3]], r"got \[0.3, 0.3\] in row 1, which sums to 0.6"),
        ([0.125] * 9, r"0.125, \.\.\.\], which sums to 1.125"),
    ],
)
def test_wrong_probabilities_are_named(probs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_probabilities(torch.tensor(probs), "here")


def test_right_probabilities_pass() -> None:
    check_probabilities(torch.tensor([[0.1] * 10, [0.0] * 9 + [1.0]]), "here")
    check_probabilities(torch.full((100_000,), 1e-5, dtype=torch.float32), "here")


def test_checked_categoricals() -> None:
    unnormalised = torch.tensor([0.5, 0.6])
    with checked_categoricals():
        dist.Categorical(torch.tensor([0.5, 0.5]))
        dist.Categorical(logits=unnormalised)
        with pytest.raises(ValueError, match="Categorical: probabilities must sum to one"):
            dist.Categorical(unnormalised)
    dist.Categorical(unnormalised)  # as before
    with pytest.raises(KeyError), checked_categoricals():
        raise KeyError
    dist.Categorical(unnormalised)  # restored after an error too
