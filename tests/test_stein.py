"""Stein gradients, discrepancies and proposals: against loops, quadrature and exact draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from inference_rl import stein
from inference_rl.decision import Decision, decide, evidence, posterior
from inference_rl.inference.sql_sampler import sampler_loss, score
from inference_rl.networks import Architecture
from inference_rl.priors import GaussianPrior, UniformPrior
from inference_rl.stein_policy import sampler_of

K, M, N, D = 6, 5, 3, 2


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def log_density(u: Tensor) -> Tensor:
    """Of something that is no product."""
    return -(u.square().sum(-1) - 1).square() - u.prod(-1).sin()


def score_of(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    u = u.detach().requires_grad_()
    return torch.autograd.grad(function(u).sum(), [u])[0]


def kernel(x: Tensor, y: Tensor, width: float) -> Tensor:
    return (-(x - y).square().sum() / width).exp()


def median_width(first: Tensor, second: Tensor) -> float:
    squares = sorted(float((x - y).square().sum()) for x in first for y in second)
    return squares[(len(squares) - 1) // 2] / math.log(len(first))


@pytest.mark.usefixtures("double")
def test_sizes_count_equal_weights_column_by_column() -> None:
    """k weights that are the same, and some that are zero, are k; others by the definition."""
    weights = torch.tensor([[3.0, 0.0, 1.0], [3.0, 0.0, 2.0], [0.0, 5.0, 4.0], [3.0, 0.0, 0.5]])
    expected = weights.sum(0) ** 2 / weights.square().sum(0)
    assert expected[:2].tolist() == [3.0, 1.0]
    torch.testing.assert_close(stein.effective_size(weights.log() - 700.0), expected)


@pytest.mark.usefixtures("double")
def test_directions_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    fixed, moved = torch.randn(K, N, D), torch.randn(M, N, D)
    found = stein.direction(fixed, score_of(log_density, fixed), moved)
    for n in range(N):
        width = median_width(fixed[:, n], moved[:, n])
        for i in range(M):
            total = torch.zeros(D)
            for x in fixed[:, n]:
                slope = torch.func.grad(kernel)(x, moved[i, n], width)
                total += kernel(x, moved[i, n], width) * score_of(log_density, x) + slope
            torch.testing.assert_close(found[i, n], total / K)


@pytest.mark.usefixtures("double")
def test_discrepancies_are_those_of_the_definition() -> None:
    """Second derivatives of the kernel by automatic differentiation."""
    torch.manual_seed(0)
    particles = torch.randn(K, N, D)
    found = stein.discrepancy(particles, score_of(log_density, particles))
    for n in range(N):
        width, total = median_width(particles[:, n], particles[:, n]), 0.0
        for i, x in enumerate(particles[:, n]):
            for j, y in enumerate(particles[:, n]):
                if i == j:
                    continue
                at_x, at_y = score_of(log_density, x), score_of(log_density, y)
                dx, dy = torch.func.grad(kernel, (0, 1))(x, y, width)
                mixed = torch.func.jacrev(torch.func.grad(kernel, 0), 1)(x, y, width)
                inner = kernel(x, y, width) * at_x @ at_y + at_x @ dy + dx @ at_y
                total += float(inner + mixed.trace())
        assert float(found[n]) == pytest.approx(total / (K * (K - 1)))


@pytest.mark.usefixtures("double")
def test_a_discrepancy_is_zero_in_expectation_for_exact_draws_alone() -> None:
    torch.manual_seed(0)
    exact = torch.randn(16, 4000, D)
    found = stein.discrepancy(exact, -exact)
    error = float(found.std()) / math.sqrt(len(found[0:1].expand(4000)))
    assert abs(float(found.mean())) < 4 * error
    wide = 1.5 * exact
    assert float(stein.discrepancy(wide, -wide).mean()) > 20 * error


@pytest.mark.usefixtures("double")
def test_slopes_of_tanh() -> None:
    u = torch.linspace(-3, 3, 41).reshape(1, -1, 1)
    torch.testing.assert_close(stein.log_slope(u), (1 - u.tanh().square()).log().squeeze(-1))
    assert float(stein.log_slope(torch.tensor([[[300.0]]]))) == pytest.approx(2 * math.log(2) - 600)


@pytest.mark.usefixtures("double")
def test_the_density_of_proposals_is_that_of_their_draws() -> None:
    """Its integral is one, and what is weighed by it has the mean of what is integrated."""
    torch.manual_seed(0)
    particles = torch.tensor([0.3, -1.1, 2.5, 0.4]).reshape(-1, 1, 1)
    rows = 40_000
    shape = len(particles), rows, 1
    actions, log_density = stein.around(
        particles.expand(shape), torch.randn(shape), 2 * torch.rand(shape) - 1
    )
    assert actions.abs().max() <= 1
    assert log_density.min() >= math.log(0.25) - 1e-12  # half of what is uniform
    for function in (torch.ones_like, torch.exp, lambda a: (5 * a).cos()):
        weighed = (function(actions).squeeze(-1) / log_density.exp()).mean(0)
        grid = torch.linspace(-1, 1, 20_001)
        expected = float(torch.trapezoid(function(grid), grid))
        error = float(weighed.std()) / math.sqrt(rows)
        assert abs(float(weighed.mean()) - expected) < 4 * error


# ------------------------------------------------------------------ of one decision


def one_bump(action: Tensor) -> Tensor:
    """Two modes, of unlike height and width; in units of the temperature."""
    a = action[..., 0]
    near, far = -((a - 0.5) / 0.15).square() / 2, -((a + 0.5) / 0.2).square() / 2
    return torch.logaddexp(near, math.log(0.5) + far)


def ring(action: Tensor) -> Tensor:
    """A ring with three heights on it."""
    x, y = action.unbind(-1)
    return -((x.square() + y.square()).sqrt() - 0.6).square() / 0.03 + torch.sin(
        3 * torch.atan2(y, x)
    )


def flat(action: Tensor) -> Tensor:
    return torch.zeros_like(action[..., 0])


TEMPERATURE = 0.7


def decided(prior: Any, density: Callable[[Tensor], Tensor], actions: Tensor) -> Decision:
    return decide(
        torch.zeros(actions.shape[1:]),
        prior,
        prior,
        lambda action: TEMPERATURE * density(action),
        temperature=torch.tensor(TEMPERATURE),
        action_space=prior_space(actions.shape[-1]),
        actions=actions,
    )


def prior_space(dim: int) -> Any:
    from gymnasium.spaces import Box

    return Box(-1.0, 1.0, (dim,))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("proposals", ["uniform", "guide"])
@pytest.mark.parametrize("prior", ["uniform", "gaussian"])
def test_evidence_entropy_and_divergence_agree_with_quadrature(proposals: str, prior: str) -> None:
    """Estimates of e^{V/α} are unbiased, so V is estimated too low, by about a half of the variance
    of that over its square, which halves as draws double; with many draws all three are exact."""
    torch.manual_seed(0)
    space = prior_space(1)
    rho: Any = UniformPrior(space) if prior == "uniform" else GaussianPrior(space, 0.2, 0.5)
    grid = ((torch.arange(20_000) + 0.5) / 10_000 - 1).reshape(-1, 1, 1)
    exact = decided(rho, one_bump, grid)
    log_cell = torch.full(exact.log_joint.shape, -math.log(2))  # as many equal cells, by density
    value = float(evidence(exact, log_cell))

    def estimated(count: int, rows: int) -> tuple[Decision, Tensor]:
        shape = count // 2, rows, 1
        uniform = 2 * torch.rand(count if proposals == "uniform" else count // 2, rows, 1) - 1
        if proposals == "uniform":
            return decided(rho, one_bump, uniform), stein.log_uniform(uniform)
        particles = 0.5 + 0.5 * torch.randn(shape)
        actions, log_density = stein.around(particles, torch.randn(shape), uniform)
        return decided(rho, one_bump, actions), log_density

    biases = []
    rows = 20_000
    for count in (8, 16, 32):
        found = evidence(*estimated(count, rows)) / TEMPERATURE
        scaled = (found - value / TEMPERATURE).exp()
        assert abs(float(scaled.mean()) - 1) < 4 * float(scaled.std()) / math.sqrt(rows)
        biases.append(float(found.mean()) - value / TEMPERATURE)
    assert biases[0] < biases[1] < biases[2] < 0
    if proposals == "uniform":  # kernels of more particles are narrower too
        assert biases[1] / biases[2] == pytest.approx(2, rel=0.25)
    many, log_density = estimated(1000, 32)
    for a, b in zip(posterior(many, log_density), posterior(exact, log_cell), strict=True):
        torch.testing.assert_close(a.mean(), b.mean(), rtol=0.02, atol=0.01)


@pytest.mark.usefixtures("double")
def test_of_a_bandit_without_preference_the_posterior_is_the_prior() -> None:
    grid = ((torch.arange(2000) + 0.5) / 1000 - 1).reshape(-1, 1, 1)
    entropy, divergence = posterior(
        decided(UniformPrior(prior_space(1)), flat, grid), stein.log_uniform(grid)
    )
    assert float(entropy) == pytest.approx(math.log(2))
    assert float(divergence) == pytest.approx(0, abs=1e-12)


def fitted(
    density: Callable[[Tensor], Tensor],
    dim: int,
    steps: int,
    *,
    count: int = 32,
    in_actions: bool = False,
) -> Callable[[int], Tensor]:
    """What a sampler draws that was fitted to a density of actions, in the way of the routine.

    :param count: of particles in each row. :param in_actions: a broken twin: particles are actions,
        and have the score of u.
    """
    torch.manual_seed(0)
    box = {"kind": "box", "dim": dim, "bounded": True}
    network = sampler_of(Architecture({**box, "dim": 1}, box, hidden=(64, 64), activation="relu"))
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
    rows, prior = 8, UniformPrior(prior_space(dim))
    state, at = torch.zeros(rows, 1), torch.zeros(rows, dtype=torch.long)

    def particles(noise: Tensor, state: Tensor, at: Tensor) -> Tensor:
        return noise + network.through(state, noise, at)[0]

    def wrong_score(a: Tensor) -> Tensor:
        return score_of(lambda a: density(a) + (1 - a.square() + 1e-6).log().sum(-1), a)

    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        u = particles(torch.randn(count, rows, dim), state, at)
        if in_actions:
            u = u.tanh()
        still, moved = u[: count // 2].detach(), u[count // 2 :]
        slopes = (
            wrong_score(still)
            if in_actions
            else score(still, lambda actions: decided(prior, density, actions))
        )
        loss = sampler_loss(moved, stein.direction(still, slopes, moved.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    def draw(count: int) -> Tensor:
        with torch.no_grad():
            return particles(torch.randn(count, 1, dim), state[:1], at[:1])[:, 0].tanh()

    return draw


def test_without_preference_actions_are_uniform_and_the_twin_s_are_not() -> None:
    """E a² = 1/3; where the score of u moves actions, their density is 1 − a², and E a² = 1/5."""
    square = float(fitted(flat, 1, 300)(20_000).square().mean())
    twin = float(fitted(flat, 1, 300, in_actions=True)(20_000).square().mean())
    assert square == pytest.approx(1 / 3, abs=0.03)
    assert twin == pytest.approx(1 / 5, abs=0.03)


def exact_draws(density: Callable[[Tensor], Tensor], dim: int) -> Callable[[int], Tensor]:
    """Draws from e^{density} on a fine grid, spread over its cells."""
    side = 4000 if dim == 1 else 400
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    grid = axis.unsqueeze(-1) if dim == 1 else torch.cartesian_prod(axis, axis)
    shares = density(grid).softmax(0)

    def draw(count: int) -> Tensor:
        cells = grid[torch.multinomial(shares, count, replacement=True)]
        return cells + (2 * torch.rand(count, dim) - 1) / side

    return draw


def mean_discrepancy(x: Tensor, y: Tensor) -> float:
    """Maximum mean discrepancy, squared, as a U-statistic, of Gaussian kernels of three widths."""

    def kernels(a: Tensor, b: Tensor) -> Tensor:
        squares = torch.cdist(a, b).square()
        return sum((-squares / (2 * width**2)).exp() for width in (0.1, 0.3, 1.0))

    def others(a: Tensor) -> Tensor:
        table = kernels(a, a)
        return (table.sum() - table.trace()) / (len(a) * (len(a) - 1))

    return float(others(x) + others(y) - 2 * kernels(x, y).mean())


def quantile_and_found(
    density: Callable[[Tensor], Tensor], dim: int, draw: Callable[[int], Tensor], count: int
) -> tuple[float, float]:
    """The 95% quantile between exact draws, and the median between these and exact ones."""
    torch.manual_seed(1)
    exact = exact_draws(density, dim)
    between = [mean_discrepancy(exact(count), exact(count)) for _ in range(100)]
    found = [mean_discrepancy(exact(count), draw(count)) for _ in range(21)]
    return float(torch.tensor(between).quantile(0.95)), float(torch.tensor(found).median())


@pytest.mark.parametrize(
    ("density", "dim", "steps", "count"),
    [(one_bump, 1, 1000, 32), pytest.param(ring, 2, 3000, 128, marks=pytest.mark.slow)],
)
def test_the_sampler_is_told_apart_from_exact_draws_by_chance_alone(
    density: Callable[[Tensor], Tensor], dim: int, steps: int, count: int
) -> None:
    """With 32 particles in the plane it is told apart: by 0.011 where the quantile is 0.007."""
    quantile, found = quantile_and_found(
        density, dim, fitted(density, dim, steps, count=count), 300
    )
    print(f"discrepancy {found:.5f}, 95% quantile of exact draws {quantile:.5f}")
    assert found < quantile


def test_a_single_bump_is_told_apart_from_two() -> None:
    quantile, found = quantile_and_found(
        one_bump, 1, lambda count: (0.5 + 0.15 * torch.randn(count, 1)).clamp(-1, 1), 300
    )
    assert found > quantile
