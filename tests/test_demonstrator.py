"""What a demonstrator wants: the posterior beside quadrature, and what it says it cannot know."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from demonstrators import Array, Tables, slippery
from gymnasium.spaces import Discrete
from pyro.infer.mcmc.util import initialize_model
from scipy.stats import norm
from torch import Tensor
from torch.distributions import biject_to

from inference_rl import (
    EnvironmentModel,
    Exact,
    FiniteModel,
    MaskPrior,
    SparseCategorical,
    fixed_point,
    infer,
    load_target,
    tabulate,
)
from inference_rl.diagnostics import repeated_control
from inference_rl.diagnostics.arviz_versions import arviz, as_arviz
from inference_rl.diagnostics.behaviour import Episode, episodes_of, log_policy
from inference_rl.diagnostics.demonstrator import RewardPosterior, infer_reward
from inference_rl.diagnostics.identification import not_identified
from inference_rl.diagnostics.mixing import ParameterSummary, not_mixed, summarised
from inference_rl.diagnostics.normal_priors import NormalPriors
from inference_rl.diagnostics.repeated_control import RepeatedControl
from inference_rl.diagnostics.reward_density import RewardDensity, demonstration
from inference_rl.diagnostics.reward_likelihood import ParametricModel, RewardLikelihood
from inference_rl.diagnostics.samples import column, load_samples, save_samples
from inference_rl.models.chain import Chain
from inference_rl.models.grid_world import FourRooms, GridWorld
from inference_rl.models.lottery import Lottery

QUICK = {"chains": 1, "draws": 20, "warmup": 20}
few_draws = pytest.mark.filterwarnings("ignore:.*(one chain cannot be|too few draws for)")
"""Of tests in which chains are as short as they can be, or one alone, and which warn of that."""
NORMAL = dist.Normal(torch.tensor(0.0).double(), 1.0)


def chain(parameters: dict[str, Tensor]) -> EnvironmentModel:
    """Eight steps in a corridor: the bait is known, the prize is not."""
    model = Chain(length=5, bait=0.3, prize=parameters["prize"], discount=0.95)
    model.horizon = 8
    return model


class Icy(EnvironmentModel):
    """Two places and a step between them that fails by `slip`; being away pays."""

    state_space, action_space, discount = Discrete(3), Discrete(2), 0.8

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self.slip, self.pay = parameters["slip"], parameters["pay"]

    def initial_state(self) -> Any:
        return dist.Categorical(torch.tensor([1.0, 0.0, 0.0]))

    def transition(self, state: Tensor, action: Tensor) -> Any:
        goes = torch.where(action == 1, 1 - self.slip, self.slip)
        ends = 0.1 * torch.ones_like(goes)
        outcomes = torch.stack([1 - state, state, torch.full_like(state, 2)], -1)
        return SparseCategorical(outcomes, torch.stack([0.9 * goes, 0.9 - 0.9 * goes, ends], -1))

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return self.pay * (next_state == 1) - 0.1 * action

    def terminal(self, state: Tensor) -> Tensor:
        return state == 2


def shown(
    model: EnvironmentModel, temperature: float, episodes: int = 40, seed: int = 0
) -> list[tuple[Array, Array]]:
    rng = np.random.default_rng(seed)
    return Tables(model).episodes(temperature, episodes, 30, rng)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def density_of(
    build: Callable[..., EnvironmentModel],
    episodes: list[tuple[Array, Array]],
    priors: dict[str, Any],
    temperature: float | None = None,
) -> RewardDensity:
    torch.manual_seed(0)
    draws = {name: prior.sample((1000,)).double() for name, prior in priors.items()}
    parameters = {name: values for name, values in draws.items() if name != "temperature"}
    likelihood = RewardLikelihood(ParametricModel(build, parameters), episodes_of(episodes))
    return RewardDensity(likelihood, priors, temperature, draws)


# --- The exact policy, again and again ------------------------------------------------------------


def random_model(horizon: int | None) -> FiniteModel:
    rng = np.random.default_rng(3)
    prior = rng.dirichlet(np.ones(3), 6)
    prior[2] = [0.4, 0.6, 0.0]
    return FiniteModel.from_tables(
        rng.dirichlet(np.ones(6), (6, 3)),
        np.where(np.arange(6)[:, None] == 5, 0.0, rng.normal(size=(6, 3))),
        discount=0.9,
        prior=prior,
        terminal=np.arange(6) == 5,
        horizon=horizon,
    )


def endless_walk() -> FiniteModel:
    """Undiscounted, and it may take long to end."""
    return tabulate(Chain(length=12, prize=2.0, discount=1.0))


@pytest.mark.parametrize(
    "model",
    [random_model(None), random_model(4), endless_walk(), tabulate(FourRooms())],
    ids=["random", "horizon", "undiscounted", "four rooms"],
)
@pytest.mark.parametrize("dense", [True, False])
def test_repeated_control_is_control(
    model: FiniteModel, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and gradient are those of the certified messages, from one reward to the next."""
    monkeypatch.setattr(repeated_control, "FEW_STATES", 1000 if dense else 0)
    control, torch_rng = RepeatedControl(model), torch.Generator().manual_seed(0)
    acting = ~model.is_terminal.unsqueeze(-1) & model.log_prior.isfinite()
    for temperature in (0.05, 0.7, 30.0):
        noise = torch.randn(model.log_prior.shape, generator=torch_rng, dtype=torch.float64)
        reward = model.expected_reward() + 0.1 * torch.where(acting, noise, 0.0).clamp(max=0.0)
        found = []
        for solve in (control.log_policy, lambda r, a: log_policy(paying(model, r), a)):
            r, alpha = reward.clone().requires_grad_(), number(temperature).requires_grad_()
            table = solve(r, alpha)
            weight = torch.where(acting, noise, 0.0).expand(table.shape)
            loss = (weight * torch.where(acting, table, 0.0)).sum()
            slope, along = torch.autograd.grad(loss, [r, alpha])
            found.append((torch.where(acting, table, 0.0).detach(), slope[acting], along))
        for ours, theirs in zip(*found, strict=True):
            scale = max(1.0, float(theirs.abs().max()))
            assert float((ours - theirs).abs().max()) < 1e-9 * scale


def paying(model: FiniteModel, reward: Tensor) -> FiniteModel:
    return model.replace(rewards=reward.flatten()[model.rows()])


def test_a_loop_that_pays_has_no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed_point, "_LAST_SWEEPS", 500)  # seconds, that show the same
    model = tabulate(Chain(length=4, discount=1.0))
    reward = model.expected_reward() + torch.where(model.is_terminal, 0.0, 0.5).unsqueeze(-1)
    with pytest.raises(ValueError, match="value"):
        RepeatedControl(model).log_policy(reward, number(0.5))


# --- The density ----------------------------------------------------------------------------------

CASES: dict[str, Any] = {
    "rewards alone": (
        slippery,
        {"hole": -0.8, "cliff": -0.4},
        {"hole": NORMAL, "cliff": dist.Uniform(number(-1.0), 0.0), "temperature": dist.Gamma(2, 4)},
        None,
    ),
    "normal and log-normal": (
        slippery,
        {"hole": -0.8, "cliff": -0.4},
        {
            "hole": dist.Normal(-1.0, 0.3),  # float32, as by default
            "cliff": NORMAL,
            "temperature": dist.LogNormal(number(-1.0), 0.7),
        },
        None,
    ),
    "a horizon": (chain, {"prize": 0.8}, {"prize": NORMAL}, 0.4),
    "dynamics too": (
        Icy,
        {"slip": 0.2, "pay": 0.6},
        {"slip": dist.Beta(number(2.0), 5.0), "pay": NORMAL, "temperature": dist.LogNormal(-1, 1)},
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_density_is_that_of_the_program(case: str) -> None:
    """Against Pyro's own potential: value and gradient, at draws from the prior."""
    build, truth, priors, known = CASES[case]
    episodes = shown(build({n: number(v) for n, v in truth.items()}), known or 0.3)
    density = density_of(build, episodes, priors, known)
    assert density.likelihood.model.only_rewards == (case != "dynamics too")
    constant = []
    for z in density.draws[:3]:
        density.check(z)
        free = density.constrained(z)[1]
        arguments = (density.likelihood, priors, known)
        _, potential, _, _ = initialize_model(demonstration, arguments, initial_params=free)
        leaves = {name: value.clone().requires_grad_() for name, value in free.items()}
        theirs = -potential(leaves)
        slopes = torch.autograd.grad(theirs, list(leaves.values()))
        flat = torch.cat([s.reshape(-1) for s in slopes]) * density.width
        point = z.clone().requires_grad_()
        ours = density(point)
        (slope,) = torch.autograd.grad(ours, point)
        value, sampled = density.with_gradient(z)  # which NUTS is given
        for gradient in (slope, sampled):
            assert float((gradient - flat).abs().max()) < 1e-7 * max(1.0, float(flat.abs().max()))
        assert value == pytest.approx(float(ours.detach()), abs=1e-7)
        constant.append(float((ours - theirs).detach()))
    assert np.ptp(constant) < 1e-7


def test_priors_of_any_shape_are_those_of_pyro() -> None:
    """In what NumPy makes of normal and log-normal ones."""
    priors = [
        dist.Normal(torch.zeros(2, 3), torch.tensor([0.3, 1.0, 2.0])).to_event(2),
        dist.LogNormal(number(-0.4), 0.3),
        dist.LogNormal(torch.zeros(2), 0.7).to_event(1),
    ]
    ours, u = NormalPriors(priors), torch.randn(9).double().requires_grad_()
    parts = [u[:6].reshape(2, 3), u[6], u[7:]]
    bijections = [biject_to(prior.support) for prior in priors]
    values = [to(part) for to, part in zip(bijections, parts, strict=True)]
    theirs = sum(
        prior.log_prob(value).sum() + to.log_abs_det_jacobian(part, value).sum()
        for prior, to, value, part in zip(priors, bijections, values, parts, strict=True)
    )
    (slope,) = torch.autograd.grad(theirs, u, retain_graph=True)
    (along,) = torch.autograd.grad(torch.cat([v.reshape(-1) for v in values]).sum(), u)
    found, slopes = ours.values(u.detach().numpy())
    value, gradient = ours.log_density(u.detach().numpy())
    assert value == pytest.approx(float(theirs.detach()), abs=1e-6)
    assert gradient == pytest.approx(slope.numpy(), rel=1e-9)
    assert slopes == pytest.approx(along.numpy(), rel=1e-12)
    assert found == pytest.approx(np.concatenate([v.detach().ravel() for v in values]), rel=1e-12)
    for other in (dist.Cauchy(0.0, 1.0), dist.Normal(0.0, 1.0).mask(True), dist.Gamma(2.0, 1.0)):
        assert not NormalPriors.covered(other)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_differences(case: str) -> None:
    """Of the log-likelihood in θ and α, computed by NumPy."""
    build, truth, _, known = CASES[case]
    episodes = shown(build({n: number(v) for n, v in truth.items()}), known or 0.3)
    names = [*truth, "temperature"]
    at = np.array([*truth.values(), 0.35])

    def by_numpy(values: Array) -> float:
        tables = Tables(build({n: number(v) for n, v in zip(truth, values[:-1], strict=True)}))
        return sum(log_likelihoods(tables, float(values[-1]), episodes, case == "dynamics too"))

    rng = np.random.default_rng(0)
    examples = {n: torch.from_numpy(v + 0.05 * rng.random(30)) for n, v in truth.items()}
    likelihood = RewardLikelihood(ParametricModel(build, examples), episodes_of(episodes))
    leaves = {n: number(v).requires_grad_() for n, v in zip(names, at, strict=True)}
    parameters = {n: leaves[n] for n in truth}
    value = likelihood(parameters, leaves["temperature"])
    slopes = torch.autograd.grad(value, list(leaves.values()))
    assert float(value.detach()) == pytest.approx(by_numpy(at), abs=1e-7)
    for i, slope in enumerate(slopes):
        step = np.eye(len(at))[i] * 1e-4
        difference = (by_numpy(at + step) - by_numpy(at - step)) / 2e-4
        assert float(slope) == pytest.approx(difference, rel=1e-5, abs=1e-5)


def log_likelihoods(
    tables: Tables, temperature: float, episodes: list[tuple[Array, Array]], moves: bool = False
) -> list[float]:
    """Of each episode, with what start and dynamics add if they depend on the parameters."""
    policy, found = tables.log_policy(temperature), []
    for states, actions in episodes:
        at = policy if policy.ndim == 2 else policy[np.arange(len(actions))]
        index = (states[:-1], actions) if policy.ndim == 2 else (slice(None), states[:-1], actions)
        if policy.ndim == 3:
            index = (np.arange(len(actions)), states[:-1], actions)
        total = at[index].sum()
        if moves:
            total += np.log(tables.transition[states[:-1], actions, states[1:]]).sum()
            total += np.log(tables.initial[states[0]])
        found.append(float(total))
    return found


# --- The posterior --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corridor() -> tuple[RewardPosterior, list[tuple[Array, Array]]]:
    episodes = shown(chain({"prize": number(0.8)}), 0.4, episodes=100)
    found = infer_reward(
        chain,
        episodes,
        {"prize": dist.Normal(number(0.5), 0.5)},
        dist.LogNormal(number(-1.0), 0.5),
        chains=2,
        draws=250,
        warmup=50,
        seed=1,
    )
    return found, episodes


def test_the_posterior_is_that_of_a_grid(corridor: Any) -> None:
    """Both marginals, by a sum over 40 x 30 points of a density in NumPy."""
    found, episodes = corridor
    prizes, logs = np.linspace(0.2, 1.8, 40), np.linspace(-1.6, 0.0, 30)
    density = np.empty((40, 30))
    states = np.concatenate([s[:-1] for s, _ in episodes])
    steps = np.concatenate([np.arange(len(a)) for _, a in episodes])
    taken = (steps, states, np.concatenate([a for _, a in episodes]))
    for i, prize in enumerate(prizes):
        tables = Tables(chain({"prize": number(float(prize))}))
        for j, log_alpha in enumerate(logs):
            fits = tables.log_policy(math.exp(log_alpha))[taken].sum()
            prior = norm.logpdf(prize, 0.5, 0.5) + norm.logpdf(log_alpha, -1.0, 0.5)
            density[i, j] = fits + prior
    density = np.exp(density - density.max())
    density /= density.sum()
    summary = {row.name: row for row in found.summary()}
    for name, grid, mass in (
        ("prize", prizes, density.sum(1)),
        ("temperature", np.exp(logs), density.sum(0)),
    ):
        row, draws = summary[name], column(found.posterior, "posterior", name).ravel()
        assert row.rhat < 1.03
        mean, width = mass @ grid, math.sqrt(mass @ grid**2 - (mass @ grid) ** 2)
        error = width / math.sqrt(row.ess_bulk)
        assert row.mean == pytest.approx(mean, abs=4 * error)
        assert draws.std() == pytest.approx(width, rel=0.2)
        at_least = np.array([mass[grid <= x].sum() for x in (row.low, row.mean, row.high)])
        expected = np.array([0.05, (draws <= row.mean).mean(), 0.95])
        assert np.abs(at_least - expected).max() < 0.06  # a grid's step, and the draws' error
    assert found.identified
    assert found.divergences == 0


def test_the_tree_is_what_arviz_reads(corridor: Any, tmp_path: Path) -> None:
    found, episodes = corridor
    path = save_samples(found.posterior, tmp_path / "posterior.nc")
    tree = load_samples(path)
    assert set(tree.children) == {"posterior", "sample_stats", "log_likelihood", "prior"}
    scores = column(tree, "log_likelihood", "actions")
    assert scores.shape == (2, 250, len(episodes))
    prize, temperature = (column(tree, "posterior", n)[1, 7] for n in ("prize", "temperature"))
    by_numpy = log_likelihoods(Tables(chain({"prize": number(prize)})), temperature, episodes)
    assert scores[1, 7] == pytest.approx(by_numpy, abs=1e-9)
    az = arviz()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = az.summary(as_arviz(tree), round_to="none")
        loo = az.loo(as_arviz(tree))
    rows = {row.name: row for row in found.summary()}
    assert float(table.loc["prize", "mean"]) == pytest.approx(rows["prize"].mean)
    assert float(table.loc["prize", "ess_bulk"]) == pytest.approx(rows["prize"].ess_bulk, rel=1e-6)
    assert float(table.loc["prize", "r_hat"]) == pytest.approx(rows["prize"].rhat, rel=1e-6)
    assert math.isfinite(float(getattr(loo, "elpd_loo", getattr(loo, "elpd", math.nan))))
    assert "prize" in str(found)
    assert "R-hat" in str(found)


@few_draws
def test_the_same_seed_gives_the_same_draws() -> None:
    episodes = shown(chain({"prize": number(0.8)}), 0.4)
    states = torch.get_rng_state()
    runs = [
        infer_reward(chain, episodes, {"prize": NORMAL}, 0.4, **QUICK, seed=s) for s in (3, 3, 4)
    ]
    draws = [column(run.posterior, "posterior", "prize") for run in runs]
    assert draws[0] == pytest.approx(draws[1], abs=1e-6)
    assert np.abs(draws[0] - draws[2]).max() > 0.01
    assert runs[0].posterior.attrs["temperature"] == 0.4
    assert torch.equal(torch.get_rng_state(), states)


@few_draws
def test_dynamics_that_depend_on_parameters_are_observed() -> None:
    """How slippery it is, the demonstrator's steps say, whatever it wants: 1-D quadrature."""
    truth = {"slip": number(0.25), "pay": number(0.6)}
    episodes = shown(Icy(truth), 0.3, episodes=30)
    slips = np.linspace(0.02, 0.8, 79)
    log_density = []
    for slip in slips:
        tables = Tables(Icy({"slip": number(float(slip)), "pay": number(0.6)}))
        log_density.append(sum(log_likelihoods(tables, 0.3, episodes, moves=True)))
    mass = np.exp(np.array(log_density) - max(log_density))
    mass /= mass.sum()
    found = infer_reward(
        lambda p: Icy({"slip": p["slip"], "pay": number(0.6)}),
        episodes,
        {"slip": dist.Uniform(number(0.0), 1.0)},
        0.3,
        chains=1,
        draws=40,
        warmup=20,
    )
    (row,) = found.summary()
    width = math.sqrt(mass @ slips**2 - (mass @ slips) ** 2)
    assert row.mean == pytest.approx(mass @ slips, abs=4 * width / math.sqrt(row.ess_bulk))
    assert row.high - row.low == pytest.approx(3.29 * width, rel=0.4)


@few_draws
def test_a_reward_for_every_state() -> None:
    """A parameter of several numbers, of which those that nobody could come to are its prior."""

    def build(parameters: dict[str, Tensor]) -> EnvironmentModel:
        moves = np.zeros((4, 2, 4))
        moves[[0, 1, 2, 3], 0, [0, 0, 2, 2]] = moves[[0, 1, 2, 3], 1, [1, 1, 3, 3]] = 1
        reward = parameters["pay"].unsqueeze(-1).expand(4, 2)
        return FiniteModel.from_tables(
            moves, reward, discount=0.5, initial=[1.0, 0.0, 0.0, 0.0], horizon=6
        )

    episodes = shown(build({"pay": torch.tensor([0.0, 1.0, 0.0, 0.0]).double()}), 0.5)
    prior = dist.Normal(torch.zeros(4).double(), 1.0).to_event(1)
    with pytest.warns(UserWarning, match="cannot be told apart|has no say"):
        found = infer_reward(build, episodes, {"pay": prior}, 0.5, chains=1, draws=150, warmup=30)
    rows = {row.name: row for row in found.summary()}
    assert list(rows) == [f"pay[{i}]" for i in range(4)]
    pays = column(found.posterior, "posterior", "pay")
    difference = pays[..., 1] - pays[..., 0]
    assert np.quantile(difference, 0.01) < 1.0 < np.quantile(difference, 0.99)
    assert difference.std() < 0.5
    assert len(found.not_identified) == 3
    text = " ".join(found.not_identified)
    assert "pay[2] has no say" in text
    assert "pay[3] has no say" in text
    assert "pay[0]" in text


# --- What cannot be known -------------------------------------------------------------------------


@few_draws
def test_scale_and_temperature_cannot_be_told_apart() -> None:
    def build(parameters: dict[str, Tensor]) -> EnvironmentModel:
        return Chain(length=4, bait=0.5 * parameters["prize"], prize=parameters["prize"])

    episodes = shown(build({"prize": number(1.0)}), 0.5)
    prior = {"prize": dist.LogNormal(number(0.0), 0.5)}
    with pytest.warns(UserWarning, match=r"(prize and temperature|temperature and prize) cannot"):
        found = infer_reward(build, episodes, prior, **QUICK)
    assert not found.identified
    (sentence,) = found.not_identified
    assert sentence in str(found)
    moved = [float(m) for m in re.findall(r"[+-][\d.]+", sentence)]
    prize, alpha = (column(found.posterior, "posterior", n) for n in ("prize", "temperature"))
    ratios = prize / alpha if sentence.startswith("prize") else alpha / prize
    # What a move along the ridge does to each is what it has: at a draw, but for three figures.
    assert np.abs(moved[0] / moved[1] / ratios - 1).min() < 0.01
    # With the temperature known there is nothing to report.
    assert infer_reward(build, episodes, prior, 0.5, **QUICK).identified


@few_draws
def test_a_constant_without_an_end_has_no_say() -> None:
    rng = np.random.default_rng(0)
    moves, pays = rng.dirichlet(np.ones(4), (4, 2)), torch.tensor(rng.normal(size=(4, 2)))

    def build(parameters: dict[str, Tensor]) -> EnvironmentModel:
        return FiniteModel.from_tables(moves, pays + parameters["living"], discount=0.9)

    episodes = shown(build({"living": number(0.0)}), 0.5)
    with pytest.warns(UserWarning, match="^living has no say in this behaviour"):
        found = infer_reward(build, episodes, {"living": NORMAL}, 0.5, chains=1, draws=150)
    (row,) = found.summary()
    assert row.high - row.low == pytest.approx(3.29, rel=0.2)


@few_draws
def test_shaping_is_noticed() -> None:
    """With an end there still is a potential: the price of a step for what all ends pay."""

    def build(parameters: dict[str, Tensor]) -> EnvironmentModel:
        return GridWorld(
            hole_reward=parameters["hole"], step_reward=parameters["step"], discount=0.9
        )

    truth = {"hole": number(-1.0), "step": number(-0.1)}
    episodes = shown(build(truth), 0.2)
    priors = {"hole": dist.Normal(number(-1.0), 0.5), "step": dist.Normal(number(-0.1), 0.1)}
    with pytest.warns(UserWarning, match="hole, step and temperature cannot be told apart"):
        infer_reward(build, episodes, priors, dist.LogNormal(number(-1.5), 0.5), **QUICK)
    # r + γφ(s') - φ(s), scaled so that the goal still pays one, by hand.
    scale, constant = 1.25, 0.2
    other = {
        "hole": scale * (truth["hole"] - constant),
        "step": scale * (truth["step"] - 0.1 * constant),
    }
    policies = [Tables(build(truth)).log_policy(0.2), Tables(build(other)).log_policy(0.2 * scale)]
    live = ~tabulate(build(truth)).is_terminal.numpy()
    assert np.abs(policies[0] - policies[1])[live].max() < 1e-12


@few_draws
def test_little_said_is_reported_as_little() -> None:
    episodes = shown(slippery({"hole": number(-1.0), "cliff": number(-0.5)}), 0.2, episodes=1)
    priors = {"hole": dist.Normal(number(-1.0), 0.1), "cliff": dist.Normal(number(-0.5), 0.25)}
    with pytest.warns(UserWarning, match="hole: these episodes say next to nothing, 100%"):
        found = infer_reward(slippery, episodes, priors, 0.2, **QUICK)
    assert not found.identified


def flip(parameters: dict[str, Tensor]) -> FiniteModel:
    """Eight times nothing or, by the second action, the square of x."""
    pays = torch.stack([torch.zeros(()).double(), parameters["x"] ** 2]).unsqueeze(0)
    return FiniteModel.from_tables(np.ones((1, 2, 1)), pays, discount=1.0, horizon=8)


@pytest.fixture(scope="module")
def flips() -> list[tuple[Array, Array]]:
    return shown(flip({"x": number(1.0)}), 0.5, episodes=60)


def test_of_mirror_images_each_is_sharp(flips: list[tuple[Array, Array]]) -> None:
    """At their mean, zero, nothing depends on x; at the draws it does."""
    density = density_of(flip, flips, {"x": NORMAL}, 0.5)
    z = (torch.tensor([[1.0], [-1.0]]).double() - density.median) / density.width
    draws = z.unsqueeze(1).expand(2, 10, 1)
    assert float(density.information(draws.mean((0, 1)))[0, 0]) < 0.1
    assert not_identified(density, draws) == ()
    # Of draws that are all there, the same is said of as before.
    (sentence,) = not_identified(density, draws.mean((0, 1), keepdim=True).expand(2, 10, 1))
    assert re.search(r"^x.*(next to nothing|has no say)", sentence)


def test_half_of_the_draws_that_tell_nothing_are_not_all(flips: list[tuple[Array, Array]]) -> None:
    def build(parameters: dict[str, Tensor]) -> FiniteModel:
        return flip({"x": parameters["x"].clamp(min=0.0)})

    density = density_of(build, flips, {"x": NORMAL}, 0.5)
    assert not_identified(density, torch.tensor([[[-1.0]] * 10, [[1.0]] * 10]).double()) == ()
    (sentence,) = not_identified(density, torch.full((2, 10, 1), -1.0).double())
    assert "x has no say in this behaviour" in sentence


def test_chains_on_mirror_images_are_reported(flips: list[tuple[Array, Array]]) -> None:
    said = (
        r"^x \(R-hat [1-9]\.\d+, \d+ effective draws\): chains do not agree.* a mirror image, a pr"
    )
    with pytest.warns(UserWarning, match=said):
        found = infer_reward(flip, flips, {"x": NORMAL}, 0.5, chains=4, draws=20, warmup=20)
    means = column(found.posterior, "posterior", "x").mean(1)
    assert np.abs(np.abs(means) - 1.0).max() < 0.3
    assert len(set(np.sign(means))) == 2  # of four that start on either side
    (row,) = found.summary()
    assert row.rhat > 1.3
    assert found.identified
    assert not found.mixed
    assert found.not_mixed[0] in str(found)


def test_one_chain_is_not_compared(flips: list[tuple[Array, Array]]) -> None:
    prior = {"x": dist.LogNormal(number(0.0), 0.5)}  # of both images one
    said = r"^x \(R-hat unknown, \d+ effective draws\): one chain cannot be compared with others"
    with pytest.warns(UserWarning, match=said):
        found = infer_reward(flip, flips, prior, 0.5, **QUICK)
    assert len(found.not_mixed) == 2  # and too short
    assert not found.mixed


def test_a_good_posterior_has_nothing_to_report(corridor: Any) -> None:
    """Which would have been an error of the fixture, as all warnings are."""
    found, _ = corridor
    assert found.mixed
    assert found.not_mixed == ()


def test_what_is_said_of_chains() -> None:
    """Of normal draws: alike, short, apart, and of which nothing is known."""
    rng = np.random.default_rng(0)
    alike = rng.normal(size=(4, 1000))
    rows = {
        "alike": summarised("alike", alike),
        "short": summarised("short", alike[:, :20]),
        "apart": summarised("apart", alike + np.array([[0.0], [0.0], [0.0], [1.0]])),
        "stuck": summarised("stuck", np.zeros((4, 1000)) + np.arange(4)[:, np.newaxis]),
    }
    assert not_mixed([rows["alike"]], 4) == ()
    short = ParameterSummary("short", 0.0, -1.0, 1.0, rhat=1.0, ess_bulk=150.0, ess_tail=99.0)
    (few,) = not_mixed([rows["alike"], short], 4)
    assert few.startswith("short (R-hat 1.000, 99 effective draws): too few draws for")
    assert not_mixed([dataclasses.replace(short, ess_tail=101.0)], 4) == ()
    (told,) = not_mixed([rows["alike"], rows["apart"]], 4)
    assert re.match(r"apart \(R-hat 1\.\d+, \d+ effective draws\): chains do not agree", told)
    assert "stuck" in not_mixed([rows["stuck"]], 4)[0]
    assert "short" in not_mixed([rows["short"]], 4)[-1]
    many = [dataclasses.replace(rows["apart"], name=f"pay[{i}]") for i in range(9)]
    assert "and 3 more: chains do not agree" in not_mixed(many, 4)[0]
    alone = not_mixed([summarised("alone", alike[:1])], 1)
    assert len(alone) == 1
    assert "take several" in alone[0]


# --- Models ---------------------------------------------------------------------------------------


@few_draws
def test_rewards_that_are_affine_are_asked_for_a_few_times_alone() -> None:
    calls = []

    def build(parameters: dict[str, Tensor]) -> EnvironmentModel:
        calls.append(1)
        return chain(parameters)

    def curved(parameters: dict[str, Tensor]) -> EnvironmentModel:
        calls.append(1)
        return chain({"prize": parameters["prize"].clamp(min=0.0) ** 2})

    episodes = shown(chain({"prize": number(0.8)}), 0.4)
    infer_reward(build, episodes, {"prize": NORMAL}, 0.4, **QUICK)
    assert len(calls) < 100
    calls.clear()
    infer_reward(curved, episodes, {"prize": dist.LogNormal(number(0.0), 0.3)}, 0.4, **QUICK)
    assert len(calls) > 150


def test_rewards_that_turn_out_not_to_be_affine() -> None:
    """A kink where no example was, and the posterior is."""

    def build(parameters: dict[str, Tensor]) -> EnvironmentModel:
        prize = parameters["prize"]
        return chain({"prize": torch.where(prize > 0.5, 0.5 + 2 * (prize - 0.5), prize)})

    low = {"prize": torch.linspace(-1, 0.4, 100, dtype=torch.float64)}
    high = {"prize": torch.linspace(0.6, 0.9, 5, dtype=torch.float64)}
    model = ParametricModel(build, low)
    before = model.expected_reward({"prize": number(0.8)})
    assert model.is_still_affine(low, 50)
    assert not model.is_still_affine(high, 5)
    after = model.expected_reward({"prize": number(0.8)})
    assert float(after.max() - before.max()) == pytest.approx(0.3)


def test_bundled_models_keep_the_gradient_of_their_rewards() -> None:
    def lottery(parameters: dict[str, Tensor]) -> EnvironmentModel:
        return Lottery(safe_reward=parameters["safe"], prize=parameters["prize"])

    model = ParametricModel(lottery, {n: torch.randn(40).double() for n in ("safe", "prize")})
    leaves = {n: number(v).requires_grad_() for n, v in (("safe", 0.5), ("prize", 3.0))}
    q = model.expected_reward(leaves)[0]
    assert q.tolist() == pytest.approx([0.5, 0.3])
    slope = torch.autograd.grad(q[1], leaves["prize"])[0]
    assert float(slope) == pytest.approx(0.1)


@few_draws
def test_what_sample_gave_is_a_demonstration() -> None:
    model = chain({"prize": number(0.8)})
    tree = infer(model, Exact(0.4)).sample(30, seed=0)
    listed = [
        (s[: n + 1], a[:n])
        for s, a, n in zip(
            column(tree, "posterior", "state")[0],
            column(tree, "posterior", "action")[0],
            column(tree, "posterior", "alive")[0].sum(1),
            strict=True,
        )
    ]
    runs = [infer_reward(chain, e, {"prize": NORMAL}, 0.4, **QUICK) for e in (tree, listed)]
    draws = [column(run.posterior, "posterior", "prize") for run in runs]
    assert draws[0] == pytest.approx(draws[1], abs=1e-6)


# --- Errors ---------------------------------------------------------------------------------------

DONE = [([1, 2, 1], [1, 0])]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"episodes": []}, ValueError, "at least one in which something is done, got none"),
        ({"episodes": [([1], [])]}, ValueError, "at least one in which something is done"),
        ({"episodes": [([1, 9], [1])]}, ValueError, r"states in 0\.\.5, got 9 in episode 0"),
        ({"episodes": [([1, 2], [2])]}, ValueError, r"actions in 0\.\.1, got 2 in episode 0"),
        ({"episodes": [([1.5, 2], [1])]}, ValueError, "states as whole numbers"),
        ({"episodes": [([5, 4], [1])]}, ValueError, "nothing is done in state 5, which is termin"),
        ({"episodes": [([1, 2] * 5, [1, 0] * 5)]}, ValueError, "the model ends after 8 steps"),
        ({"episodes": [Episode([1, 2], [1], True)]}, ValueError, "terminated in state 2, where"),
        ({"parameters": {"prize": 1.0}}, TypeError, "prize: expected a Pyro distribution"),
        ({"parameters": {"prize": dist.Poisson(1.0)}}, TypeError, "over continuous values"),
        ({"parameters": {"action": NORMAL}}, ValueError, "'action' is the program's own"),
        ({"parameters": {}}, ValueError, "expected something to infer, got none"),
        ({"parameters": {"prize": dist.Delta(number(1.0))}}, ValueError, "priors of some width"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0"),
        ({"temperature": NORMAL}, ValueError, "temperature: expected a prior over one number > 0"),
        ({"chains": 0}, ValueError, "chains: expected at least 1, got 0"),
        ({"draws": 3}, ValueError, "draws: expected at least 4, got 3"),
    ],
)
def test_what_cannot_be_inferred(changed: dict[str, Any], error: type, message: str) -> None:
    given = {"episodes": DONE, "parameters": {"prize": NORMAL}, "temperature": 0.4} | changed
    with pytest.raises(error, match=message):
        infer_reward(chain, **given)


def test_steps_that_the_dynamics_never_make() -> None:
    def build(parameters: dict[str, Tensor]) -> EnvironmentModel:
        return Icy({"slip": parameters["slip"], "pay": number(0.6)})

    episodes = [([0, 1, 0], [1, 1]), ([1, 0], [1])]  # the second does not start where one does
    with pytest.raises(ValueError, match="episodes: episode 1 starts or moves as the model never"):
        infer_reward(build, episodes, {"slip": dist.Beta(number(2.0), 5.0)}, 0.3, **QUICK)


@few_draws
def test_tails_of_a_prior_are_no_trouble() -> None:
    """A Cauchy distribution has draws a thousand widths away."""
    episodes = shown(chain({"prize": number(0.8)}), 0.4)
    prior = {"prize": dist.Cauchy(number(0.0), 1.0)}
    found = infer_reward(chain, episodes, prior, 0.4, **QUICK)
    (row,) = found.summary()
    assert 0.2 < row.low < row.high < 2.0


@few_draws
def test_a_temperature_alone() -> None:
    episodes = shown(chain({"prize": number(0.8)}), 0.4)
    found = infer_reward(lambda _: chain({"prize": number(0.8)}), episodes, {}, **QUICK)
    (row,) = found.summary()
    assert row.name == "temperature"
    assert 0.2 < row.low < row.high < 0.8


def masked(parameters: dict[str, Tensor]) -> EnvironmentModel:
    return tabulate(chain(parameters), prior=MaskPrior([False, True]))


def lengthening(parameters: dict[str, Tensor]) -> EnvironmentModel:
    return Chain(length=5, discount=0.9 if parameters["prize"] > 0 else 0.8)


def positive_only(parameters: dict[str, Tensor]) -> EnvironmentModel:
    if parameters["prize"] < 0:
        raise ValueError("a prize is positive")
    return chain(parameters)


def cut_off(parameters: dict[str, Tensor]) -> EnvironmentModel:
    return chain({"prize": parameters["prize"].detach() ** 2})


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (masked, ValueError, "no mass on action 0 in state 2, which was taken at step 1 of"),
        (lengthening, ValueError, "got other discount for other"),
        (positive_only, ValueError, "no valid model at prize = .*a prize is positive; narrow"),
        (cut_off, ValueError, "build: what it makes of 'prize' changes the log-density by"),
        (lambda p: load_target("pendulum"), TypeError, "exact inference covers finite models"),
        (lambda p: 3, TypeError, "build: expected an EnvironmentModel, got a int"),
        (
            lambda p: chain({"prize": p["prize"] / 0.0}),
            ValueError,
            "build: no valid model at prize",
        ),
    ],
)
def test_models_that_cannot_be_inferred(build: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        infer_reward(build, DONE, {"prize": NORMAL}, 0.4, **QUICK)
