"""`TruncatedNormal`: exact where others cancel, far out in the tails, on needles and flat boxes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mpmath
import numpy as np
import pyro
import pytest
import torch
from scipy import stats
from torch import Tensor

from inference_rl.truncated_normal import TruncatedNormal


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def exact_truncated(loc: float, scale: float, x: float) -> float:
    """log density at x of a normal truncated to [-1, 1], in sixty digits."""
    with mpmath.workdps(60):
        mean, width = mpmath.mpf(loc), mpmath.mpf(scale)

        def tail(at: int) -> Any:
            """The share of the normal beyond `at`, seen from `loc`'s side of the box."""
            sign = -1 if mean > 0 else 1
            return mpmath.erfc(sign * (at - mean) / (width * mpmath.sqrt(2))) / 2

        mass = abs(tail(1) - tail(-1))
        with mpmath.workdps(400):
            density = -(((mpmath.mpf(x) - mean) / width) ** 2) / 2
            return float(density - mpmath.log(width * mpmath.sqrt(2 * mpmath.pi) * mass))


LOCS = [0.0, 0.5, -0.9, 1.0, -3.0, 10.0, -50.0, 1e4]
SCALES = [1e-3, 0.05, 0.5, 3.0, 1e4, 1e9]
EXTREMES = [(loc, scale) for loc in LOCS for scale in SCALES]


@pytest.mark.parametrize(("loc", "scale"), EXTREMES)
def test_truncated_density_is_exact(loc: float, scale: float) -> None:
    """Against sixty digits, far out in the tails, on needles and on boxes that look flat."""
    truncated = TruncatedNormal(torch.tensor(loc), torch.tensor(scale))
    for x in (-1.0, -0.3, 0.0, 0.99, 1.0):
        got, expected = float(truncated.log_prob(torch.tensor(x))), exact_truncated(loc, scale, x)
        assert got == pytest.approx(expected, rel=2e-13, abs=1e-12)


@pytest.mark.parametrize(("loc", "scale"), EXTREMES)
def test_truncated_density_in_single_precision(loc: float, scale: float) -> None:
    truncated = TruncatedNormal(*(torch.tensor(x, dtype=torch.float32) for x in (loc, scale)))
    rounded = float(np.float32(loc)), float(np.float32(scale))
    for x in (-1.0, 0.0, 1.0):
        log_prob = truncated.log_prob(torch.tensor(x, dtype=torch.float32))
        assert log_prob.dtype == truncated.rsample().dtype == torch.float32
        got = float(log_prob)
        assert got == pytest.approx(exact_truncated(*rounded, x), rel=2e-5, abs=2e-5)


@pytest.mark.parametrize(("loc", "scale"), [(0.2, 0.3), (-2.0, 0.4), (6.0, 0.5), (0.0, 50.0)])
def test_truncated_sums_to_one(loc: float, scale: float) -> None:
    truncated = TruncatedNormal(torch.tensor(loc), torch.tensor(scale))
    nodes, weights = np.polynomial.legendre.leggauss(200)
    heights = truncated.log_prob(torch.as_tensor(nodes)).exp().numpy()
    assert heights @ weights == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("loc", "scale"),
    [
        *((0.0, 1e-3), (0.3, 0.5), (-0.99, 0.1), (-3.0, 0.5), (4.0, 1.0), (10.0, 0.5)),
        *((-50.0, 1.0), (1e4, 1e4), (0.0, 1e6), (0.0, 1e9), (1.5, 0.499), (2.2, 1e3)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truncated_draws_what_it_says(loc: float, scale: float, dtype: torch.dtype) -> None:
    truncated = TruncatedNormal(torch.tensor(loc, dtype=dtype), torch.tensor(scale, dtype=dtype))
    draws = truncated.rsample((4000,)).double()
    assert draws.abs().max() <= 1

    # The distribution function, from the density by quadrature on a grid in its own coordinates.
    reference = TruncatedNormal(torch.tensor(loc), torch.tensor(scale))
    inner = stats.truncnorm(*((edge - loc) / scale for edge in (-1, 1)), loc=loc, scale=scale)
    if abs(loc) < 1e3 and scale < 1e3:
        assert stats.kstest(draws.numpy(), inner.cdf).pvalue > 1e-3
    grid = torch.linspace(-1, 1, 200_001)
    heights = reference.log_prob(grid).exp().numpy()
    middle = np.concatenate([[0], np.cumsum((heights[1:] + heights[:-1]) / 2)]) * 1e-5
    if scale >= 0.1:  # the grid resolves it
        cdf = np.interp(draws.numpy(), grid.numpy(), middle / middle[-1])
        assert stats.kstest(cdf, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    ("loc", "scale"), [(0.1, 0.4), (-0.9, 2.0), (-2.5, 0.6), (6.0, 0.5), (0.3, 2e4), (0.0, 1e-2)]
)
def test_truncated_gradients_of_draws(loc: float, scale: float) -> None:
    """Pathwise gradients are the finite differences of the same draw."""

    def draw(by_loc: float, by_scale: float) -> Tensor:
        torch.manual_seed(3)
        mean, width = torch.tensor(loc + by_loc), torch.tensor(scale + by_scale)
        return TruncatedNormal(mean, width).rsample((50,))

    mean = torch.tensor(loc, requires_grad=True)
    width = torch.tensor(scale, requires_grad=True)
    torch.manual_seed(3)
    draws = TruncatedNormal(mean, width).rsample((50,))
    assert torch.equal(draws.detach(), draw(0, 0))
    slopes = [torch.autograd.grad(x, [mean, width], retain_graph=True) for x in draws]
    step = 1e-5 * scale
    by_loc = (draw(step, 0) - draw(-step, 0)) / (2 * step)
    by_scale = (draw(0, step) - draw(0, -step)) / (2 * step)
    got = torch.tensor(slopes)
    torch.testing.assert_close(got[:, 0], by_loc, atol=2e-7, rtol=2e-5)
    torch.testing.assert_close(got[:, 1], by_scale, atol=2e-7, rtol=2e-5)


@pytest.mark.parametrize(("loc", "scale"), EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truncated_gradients_are_finite(loc: float, scale: float, dtype: torch.dtype) -> None:
    mean, width = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in (loc, scale))
    truncated = TruncatedNormal(mean, width)
    draws = truncated.rsample((200,))
    values = torch.cat([draws, torch.tensor([-1.0, 1.0], dtype=dtype)])
    for total in (draws.sum(), truncated.log_prob(values).sum()):
        for slope in torch.autograd.grad(total, [mean, width], retain_graph=True):
            assert slope.isfinite()


@pytest.mark.parametrize(("loc", "scale"), [(0.3, 0.5), (-4.0, 0.7), (30.0, 1.0), (0.4, 5e3)])
def test_truncated_gradients_of_the_density(loc: float, scale: float) -> None:
    arguments = [torch.tensor(v, requires_grad=True) for v in (loc, scale, 0.6)]
    assert torch.autograd.gradcheck(
        lambda mean, width, x: TruncatedNormal(mean, width).log_prob(x), arguments, eps=1e-6 * scale
    )


def exact_entropy(loc: float, scale: float) -> float:
    """By mpmath's quadrature over where the density counts, in 25 digits."""
    with mpmath.workdps(25):
        mean, width = mpmath.mpf(loc), mpmath.mpf(scale)
        highest = min(max(mean, mpmath.mpf(-1)), mpmath.mpf(1))

        def drop(x: Any) -> Any:
            """Nats below the highest point."""
            return (x - highest) * (x + highest - 2 * mean) / (2 * width**2)

        slope = abs(highest - mean) / width
        reach = width * 240 / (slope + mpmath.sqrt(slope**2 + 240))
        low, high = max(mpmath.mpf(-1), highest - reach), min(mpmath.mpf(1), highest + reach)
        points = sorted({low, highest, high, *mpmath.linspace(low, high, 5)})
        mass = mpmath.quad(lambda x: mpmath.exp(-drop(x)), points)
        below = mpmath.quad(lambda x: drop(x) * mpmath.exp(-drop(x)), points)
        return float(mpmath.log(mass) + below / mass)


@pytest.mark.parametrize(("loc", "scale"), EXTREMES)
def test_truncated_entropy_is_exact(loc: float, scale: float) -> None:
    expected = exact_entropy(loc, scale)
    for dtype, error in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        rounded = [torch.tensor(x, dtype=dtype) for x in (loc, scale)]
        if dtype == torch.float32:
            expected = exact_entropy(*(float(x) for x in rounded))
        got = TruncatedNormal(*rounded).entropy()
        assert got.dtype == dtype
        assert float(got) == pytest.approx(expected, rel=error, abs=error)


@pytest.mark.parametrize(
    ("loc", "scale"),
    [(0.3, 0.5), (-0.9, 0.1), (-4.0, 0.7), (30.0, 1.0), (0.4, 5.0), (0.0, 1e-3), (-1.5, 0.5)],
)
def test_truncated_gradients_of_the_entropy(loc: float, scale: float) -> None:
    arguments = [torch.tensor(v, requires_grad=True) for v in (loc, scale)]
    got = torch.autograd.grad(TruncatedNormal(*arguments).entropy(), arguments)
    step = 1e-4 * scale
    for slope, (by_loc, by_scale) in zip(got, ((step, 0), (0, step)), strict=True):
        up, down = (exact_entropy(loc + s * by_loc, scale + s * by_scale) for s in (1, -1))
        assert float(slope) * scale == pytest.approx((up - down) / 2e-4, abs=1e-7)


@pytest.mark.parametrize(("loc", "scale"), EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truncated_gradients_of_the_entropy_are_finite(
    loc: float, scale: float, dtype: torch.dtype
) -> None:
    arguments = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in (loc, scale)]
    for slope in torch.autograd.grad(TruncatedNormal(*arguments).entropy(), arguments):
        assert slope.isfinite()


def test_truncated_mode_and_summed_entropy() -> None:
    wide = TruncatedNormal(torch.tensor([0.2, -3.0]), torch.tensor([0.1, 2.0]))
    assert wide.mode.tolist() == [0.2, -1.0]
    assert wide.to_event(1).entropy() == wide.entropy().sum()


def test_truncated_shapes_edges_and_support() -> None:
    truncated = TruncatedNormal(torch.zeros(3), torch.ones(2, 1), low=0.0, high=4.0)
    assert truncated.batch_shape == (2, 3)
    assert truncated.rsample((5,)).shape == (5, 2, 3)
    draws = truncated.sample((1000,))
    assert (draws.min() >= 0) & (draws.max() <= 4)
    assert draws.max() > 2
    assert truncated.expand((4, 2, 3)).log_prob(torch.ones(4, 2, 3)).shape == (4, 2, 3)
    wide = TruncatedNormal(torch.tensor(0.5), torch.tensor(2.0)).expand((3,))
    torch.testing.assert_close(
        wide.log_prob(torch.full((3,), 0.1)),
        TruncatedNormal(torch.full((3,), 0.5), torch.full((3,), 2.0)).log_prob(torch.tensor(0.1)),
    )
    with pytest.raises(ValueError, match="within the support"):
        wide.log_prob(torch.tensor([0.0, 1.5, 0.0]))
    with pytest.raises(ValueError, match="invalid values"):
        TruncatedNormal(torch.tensor(0.0), torch.tensor(-1.0))


@pytest.mark.parametrize("scale", [0.3, 3.0, 3e4])
@pytest.mark.parametrize("loc", [0.0, 5.0])
def test_truncated_draws_are_the_same_when_what_they_do_not_need_is_left_out(
    loc: float, scale: float
) -> None:
    """Body, tail and narrow box, alone and side by side."""
    share = torch.linspace(0, 1, 99).unsqueeze(-1)
    for place in (torch.tensor([loc]), torch.tensor([loc, -loc, 0.1])):
        truncated = TruncatedNormal(place, torch.tensor(scale))
        whole = truncated.icdf(share)
        with torch.no_grad():
            assert torch.equal(truncated.icdf(share, look=True), whole)
