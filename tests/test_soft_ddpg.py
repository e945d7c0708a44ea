"""Soft DDPG and soft TD3: the program, their limits, what follows by quadrature, and settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from pyro import poutine
from pyro.infer import Trace_ELBO
from test_bridges import BOX, CASES, Drift, stirred
from torch import Tensor
from torch.nn import functional

from inference_rl import (
    EnvironmentModel,
    GaussianPrior,
    InferenceResult,
    SoftDDPG,
    SoftTD3,
    UniformPrior,
    infer,
    load_target,
)
from inference_rl.inference import soft_ddpg, soft_td3
from inference_rl.inference.fixed_width import backed_up, considered, width_at
from inference_rl.inference.off_policy import Batch
from inference_rl.learning.collection import Segment
from inference_rl.policies import load_policy
from inference_rl.priors import ActionPrior
from inference_rl.randomness import derived
from inference_rl.squashed_normal import SquashedNormal
from inference_rl.trajectory import trajectory

BOTH = [SoftDDPG, SoftTD3]
MAKERS: dict[Any, Any] = {SoftDDPG: soft_ddpg._learner, SoftTD3: soft_td3._learner}
ROWS, SIZE, TEMPERATURE, DISCOUNT = 200, 48, 0.7, 0.9
SMALL = {"hidden": (16, 8), "batch_size": SIZE, "warmup_steps": SIZE, "compile": "off"}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Plane(Drift):
    """Without a horizon; what happens is written by `recorded`."""

    discount, horizon = DISCOUNT, None

    def __init__(self) -> None:
        super().__init__(BOX)


def recorded() -> Segment:
    """Transitions of which a third terminate, and a third of the others are cut."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    terminated = torch.rand((ROWS, 1), generator=rng) < 1 / 3
    return Segment(
        state=normal(ROWS, 1, 2),
        action=normal(ROWS, 1, 2).tanh(),
        reward=normal(ROWS, 1),
        next_state=normal(ROWS, 1, 2),
        terminated=terminated,
        truncated=~terminated & (torch.rand((ROWS, 1), generator=rng) < 1 / 3),
        step=torch.randint(4, (ROWS, 1), generator=rng),
        valid=torch.ones((ROWS, 1), dtype=torch.bool),
    )


def learner_of(
    routine: Any, model: EnvironmentModel, prior: ActionPrior | None = None, **settings: Any
) -> Any:
    """With a full replay, weights that are not what they begin with, and others behind them."""
    torch.manual_seed(3)
    rho = model.action_prior if prior is None else prior
    found = MAKERS[routine](routine(**SMALL | settings), model, rho)
    for module in (found.policy, found.q, *(lag.behind for lag in found.lags.values())):
        stirred(module)
    found.replay.add(recorded())
    return found


# The program


class Once(EnvironmentModel):
    """One decision, that is paid for by Q."""

    discount, horizon = 1.0, 1

    def __init__(self, like: EnvironmentModel, state: Tensor, q: Callable[[Tensor], Tensor]):
        self.state_space, self.action_space = like.state_space, like.action_space
        self.state, self.q = state, q

    def initial_state(self) -> Any:
        return dist.Delta(self.state, event_dim=1)

    def transition(self, state: Tensor, action: Tensor) -> Any:
        return dist.Delta(state, event_dim=1)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return self.q(action)


def bridged(routine: Any, case: str) -> tuple[Any, EnvironmentModel, ActionPrior, Batch, Tensor]:
    make_model, make_prior = CASES[case]
    model = make_model()
    prior = make_prior(model)
    learner = learner_of(routine, model, prior, temperature=TEMPERATURE, width=0.4)
    return learner, model, prior, learner._batch(7), torch.tensor(TEMPERATURE)


BOXES = [case for case in CASES if case.startswith("Box")]


@pytest.mark.parametrize("case", BOXES)
@pytest.mark.parametrize("routine", BOTH)
def test_the_guide_climbs_the_bound_of_the_program(routine: Any, case: str) -> None:
    """Value and gradient of what is recorded, against Pyro's own estimator of the bound."""
    learner, model, prior, batch, temperature = bridged(routine, case)
    policy = learner.policy
    once = Once(model, batch.state, lambda action: learner.q(batch.state, action, batch.step)[0])

    def programs(prior: Any) -> Tensor:
        def p() -> None:
            with pyro.plate("states", SIZE):
                trajectory(once, lambda s, t: prior(s), 1, temperature=TEMPERATURE)

        def q() -> None:
            with pyro.plate("states", SIZE):
                trajectory(once, lambda s, t: policy(s, batch.step), 1)

        torch.manual_seed(11)
        return TEMPERATURE * Trace_ELBO().differentiable_loss(p, q) / SIZE

    parameters = list(policy.parameters())
    loss = programs(prior)
    expected = [*torch.autograd.grad(loss, parameters), loss.detach()]
    torch.manual_seed(11)
    found = learner._graphs["policy"](*batch, temperature)
    assert learner._graphs["policy"].traced
    for a, b in zip(found, expected, strict=False):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    if case != "Box, uniform":  # without the prior it is another program
        assert (programs(UniformPrior(model.action_space)) - loss).abs() > 1e-3


def expected_target(
    learner: Any, model: EnvironmentModel, prior: ActionPrior, batch: Batch, sign: float
) -> Tensor:
    """r + γ · temperature · log p/q, from Pyro's traces of the program."""
    step, settings = batch.next_step, learner.settings

    def q(action: Tensor) -> Tensor:
        if isinstance(settings, SoftTD3):
            noise = (settings.smoothing * torch.randn(SIZE, 2)).clamp(-0.5, 0.5)
            action = (action + noise).clamp(-1, 1)
        return learner.lags["q"].behind(batch.next_state, action, step).min(0).values

    once, behind = Once(model, batch.next_state, q), learner.lags["policy"].behind
    with torch.no_grad(), pyro.plate("states", SIZE):
        guide = poutine.trace(trajectory).get_trace(once, lambda s, t: behind(s, step), 1)
        joint = poutine.trace(poutine.replay(trajectory, guide)).get_trace(
            once, lambda s, t: prior(s), 1, temperature=TEMPERATURE
        )
    guide.compute_log_prob()
    joint.compute_log_prob()
    log_ratio = guide.nodes["action_0"]["log_prob"] - joint.nodes["action_0"]["log_prob"]
    value = TEMPERATURE * (joint.nodes["optimality_0"]["log_prob"] - sign * log_ratio)
    return batch.reward + model.discount * batch.goes_on * value


def residual(learner: Any, batch: Batch, target: Tensor) -> list[Tensor]:
    """The gradients of Q's loss, and the loss."""
    found = learner.q(batch.state, batch.action, batch.step)
    loss = sum((0.5 * (one - target) ** 2).mean() for one in found)
    return [*torch.autograd.grad(loss, list(learner.q.parameters())), loss.detach()]


@pytest.mark.parametrize("case", BOXES)
@pytest.mark.parametrize("routine", BOTH)
def test_q_is_fitted_to_the_bound_of_the_program(routine: Any, case: str) -> None:
    learner, model, prior, batch, temperature = bridged(routine, case)
    torch.manual_seed(12)
    found = learner._graphs["q"](*batch, temperature)
    assert learner._graphs["q"].traced

    def by_program(sign: float = 1.0, rho: ActionPrior = prior) -> list[Tensor]:
        torch.manual_seed(12)
        return residual(learner, batch, expected_target(learner, model, rho, batch, sign))

    for a, b in zip(found, by_program(), strict=False):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    loss = found[len(list(learner.q.parameters()))]
    assert (by_program(sign=-1.0)[-1] - loss).abs() > 1e-3
    if case != "Box, uniform":
        assert (by_program(rho=UniformPrior(model.action_space))[-1] - loss).abs() > 1e-3


# The limits


def actor(parameters: list[Tensor], state: Tensor) -> Tensor:
    """tanh of a perceptron, of weights and biases in turn."""
    for weight, bias in zip(parameters[0:-2:2], parameters[1:-2:2], strict=True):
        state = functional.relu(functional.linear(state, weight, bias))
    return functional.linear(state, *parameters[-2:]).tanh()


def critic(parameters: list[Tensor], member: int, state: Tensor, action: Tensor) -> Tensor:
    """One of several perceptrons, of weights and then biases of all."""
    layers = len(parameters) // 2
    values = torch.cat([state, action], -1)
    for i in range(layers):
        values = values @ parameters[i][member] + parameters[layers + i][member]
        if i < layers - 1:
            values = values.relu()
    return values.squeeze(-1)


class ByHand:
    """DDPG, or TD3 where there are two critics, of the papers' own lines and nothing else.

    :param twin: what is deliberately done wrong.
    """

    def __init__(self, learner: Any, twin: str = "") -> None:
        def copied(module: Any) -> list[Tensor]:
            return [p.detach().clone().requires_grad_() for p in module.parameters()]

        self.mu, self.q = copied(learner.policy), copied(learner.q)
        self.mu_behind = copied(learner.lags["policy"].behind)
        self.q_behind = copied(learner.lags["q"].behind)
        self.learner, self.twin, self.updates = learner, twin, 0
        self.members = len(self.q[0])
        rate = learner.settings.learning_rate
        self.adam = torch.optim.Adam(self.q, rate), torch.optim.Adam(self.mu, rate)

    def update(self) -> dict[str, float]:
        self.updates += 1
        seed = derived(self.learner.seed, f"update {self.updates}")
        rows = self.learner.replay.sample(SIZE, 1, seed)
        state, action, reward = rows.state[0], rows.action[0], rows.reward[0]
        following, over = rows.next_state[0], rows.terminated[0]
        if self.twin == "through terminated":
            over = torch.zeros_like(over)
        if self.twin == "cut at truncated":
            over = over | rows.truncated[0]
        torch.manual_seed(seed)
        torch.randn(SIZE, 2)  # the guide's noise, which counts for nothing
        after = actor(self.mu_behind, following)
        if self.members == 2:
            noise = (0.2 * torch.randn(SIZE, 2)).clamp(-0.5, 0.5)
            after = (after + noise).clamp(-1, 1)
        behind = self.q if self.twin == "gradient of the target" else self.q_behind
        values = [critic(behind, i, following, after) for i in range(self.members)]
        target = reward + DISCOUNT * (~over) * torch.stack(values).min(0).values
        if self.twin != "gradient of the target":
            target = target.detach()
        found = [critic(self.q, i, state, action) for i in range(self.members)]
        q_loss = sum(0.5 * functional.mse_loss(one, target) for one in found)
        self._step(0, q_loss, self.q)
        losses = {"q_loss": float(torch.as_tensor(q_loss).detach())}
        if self.updates % self.members == 0:
            mu_loss = -critic(self.q, 0, state, actor(self.mu, state)).mean()
            self._step(1, mu_loss, self.mu)
            losses["policy_loss"] = float(mu_loss.detach())
            for slow, fast in ((self.q_behind, self.q), (self.mu_behind, self.mu)):
                for a, b in zip(slow, fast, strict=True):
                    a.data = 0.995 * a.data + 0.005 * b.data
        return losses

    def _step(self, which: int, loss: Any, parameters: list[Tensor]) -> None:
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = gradient
        self.adam[which].step()


def moments_apart(by_hand: ByHand, a: Tensor, learner: Any, b: Tensor) -> float:
    """How far apart what Adam remembers of the gradients of two parameters is."""
    states = [adam.state[a] for adam in by_hand.adam if a in adam.state]
    others = [adam.state[b] for adam in learner.optimisers.values() if b in adam.state]
    mine, other = states[0] if states else {}, others[0] if others else {}
    assert mine.keys() == other.keys()
    names = [name for name in mine if name.startswith("exp_avg")]
    assert len(names) in (0, 2)
    return max((float((mine[n] - other[n]).abs().max()) for n in names), default=0.0)


def compared(routine: Any, updates: int, twin: str = "", dtype: Any = torch.float64) -> float:
    """The largest difference from the papers' update: losses, gradients, weights, what lags."""
    torch.set_default_dtype(dtype)
    # Far below the rounding of u in either precision, so that the guide is its mean.
    learner = learner_of(routine, Plane(), temperature=0.0, width=1e-14)
    if twin == "gradient of the target":  # of the same values
        learner.lags["q"].behind.load_state_dict(learner.q.state_dict())
    by_hand = ByHand(learner, twin)
    worst = 0.0
    for _ in range(updates):
        expected, found = by_hand.update(), learner._update()
        learner.settle()
        worst = max(worst, *(abs(float(found[k]) - v) for k, v in expected.items()))
    assert ("policy_loss" in expected) == ("policy_loss" in found)
    pairs = [
        (by_hand.mu, learner.policy),
        (by_hand.q, learner.q),
        (by_hand.mu_behind, learner.lags["policy"].behind),
        (by_hand.q_behind, learner.lags["q"].behind),
    ]
    for mine, module in pairs:
        for a, b in zip(mine, module.parameters(), strict=True):
            worst = max(worst, float((a - b).detach().abs().max()))
            if module in (learner.policy, learner.q):
                worst = max(worst, moments_apart(by_hand, a, learner, b))
    return worst


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("routine", "updates"), [(SoftDDPG, 1), (SoftTD3, 1), (SoftTD3, 2)])
def test_without_width_and_temperature_it_is_the_papers_update(
    routine: Any, updates: int, dtype: Any, near: float
) -> None:
    assert compared(routine, updates, dtype=dtype) < near


@pytest.mark.parametrize(
    "twin", ["through terminated", "cut at truncated", "gradient of the target"]
)
@pytest.mark.parametrize("routine", BOTH)
def test_an_update_that_is_wrong_is_told_apart(routine: Any, twin: str) -> None:
    assert compared(routine, 1, twin) > 1e-3


# What follows, by quadrature

GRID = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1]


def hills(action: Tensor) -> Tensor:
    """Q of one dimension, with two hills."""
    near = -((action - 0.5).square()) / 0.05
    return near.exp() + 0.8 * (-((action + 0.6).square()) / 0.02).exp()


@pytest.mark.parametrize("prior", ["uniform", "gaussian"])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_evidence_and_boltzmann_mean_are_those_of_a_grid(prior: str, temperature: float) -> None:
    """Within four standard errors of 400,000 draws, which are seen in 20 parts."""
    space = Box(-1.0, 1.0, (1,))
    rho = UniformPrior(space) if prior == "uniform" else GaussianPrior(space, -0.3, 0.4)
    wide = SquashedNormal(torch.tensor([[0.2]]), torch.tensor([[1.2]])).to_event(1)

    def value(backup: Any) -> Tensor:
        torch.manual_seed(0)
        decision = considered(
            lambda s, t: wide.expand(s.shape[:1]),  # type: ignore[arg-type]
            rho,
            lambda action: hills(action[..., 0]),
            torch.zeros(20, 1),
            torch.zeros(20),
            temperature=torch.tensor(temperature),
            action_space=space,
            draws=20_000,
        )
        return backed_up(decision, backup)

    density = rho(torch.zeros(len(GRID), 1)).log_prob(GRID.unsqueeze(-1)).exp()
    weight = density * (hills(GRID) / temperature).exp()
    evidence = temperature * torch.trapezoid(weight, GRID).log()
    mean = torch.trapezoid(weight * hills(GRID), GRID) / torch.trapezoid(weight, GRID)
    for backup, expected in (("logsumexp", evidence), ("boltzmann", mean)):
        found = value(backup)
        assert (found.mean() - expected).abs() < 4 * found.std() / math.sqrt(20)
        assert found.std() < 0.01
    divergence = (weight / torch.trapezoid(weight, GRID)).clamp(min=1e-300)
    divergence = torch.trapezoid(divergence * (divergence / density).log(), GRID)
    torch.testing.assert_close(mean, evidence + temperature * divergence, rtol=1e-6, atol=1e-6)
    assert mean - evidence > 0.02


@pytest.mark.parametrize("backup", ["logsumexp", "boltzmann"])
@pytest.mark.parametrize("routine", BOTH)
def test_every_backup_is_recorded_and_reaches_q(routine: Any, backup: str) -> None:
    learner = learner_of(routine, Plane(), temperature=TEMPERATURE, backup=backup, samples=5)
    batch, settings = learner._batch(7), learner.settings
    torch.manual_seed(12)
    found = learner._graphs["q"](*batch, torch.tensor(TEMPERATURE))
    assert learner._graphs["q"].traced
    torch.manual_seed(12)
    behind, step = learner.lags["policy"].behind, batch.next_step
    with torch.no_grad():
        guide = behind(batch.next_state, step).expand((5, SIZE))
        action = guide.rsample()
        asked = action
        if isinstance(settings, SoftTD3):
            asked = (action + (0.2 * torch.randn(5, SIZE, 2)).clamp(-0.5, 0.5)).clamp(-1, 1)
        q = learner.lags["q"].behind(batch.next_state, asked, step).min(0).values
        log_weight = q / TEMPERATURE - 2 * math.log(2) - guide.log_prob(action)
        if backup == "logsumexp":
            value = TEMPERATURE * log_weight.exp().mean(0).log()
        else:
            value = (log_weight.exp() * q).sum(0) / log_weight.exp().sum(0)
    target = batch.reward + DISCOUNT * batch.goes_on * value
    for a, b in zip(found, residual(learner, batch, target), strict=False):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# What is learned


class Bandit(EnvironmentModel):
    """One decision: how far from 0.6."""

    state_space, action_space = Box(-1.0, 1.0, (1,)), Box(-1.0, 1.0, (1,))
    discount, horizon = 1.0, 1

    def initial_state(self) -> Any:
        return dist.Uniform(-torch.ones(1), torch.ones(1)).to_event(1)

    def transition(self, state: Tensor, action: Tensor) -> Any:
        return dist.Delta(state, event_dim=1)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return -2 * (action[..., 0] - 0.6).square()


def bound_of(mean: Tensor, width: float, temperature: float, prior: Any) -> Tensor:
    """The objective of guides with these means in `Bandit`, by quadrature; reward units."""
    standard, share = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(60))
    share = share / share.sum()
    guide = SquashedNormal(mean.unsqueeze(-1), torch.tensor(width))
    action = (guide.loc + width * standard).tanh()
    log_ratio = guide.log_prob(action) - prior.log_prob(action)
    gain = -2 * (action - 0.6).square() - temperature * log_ratio
    return (share * gain).sum(-1)


@pytest.mark.parametrize("routine", BOTH)
def test_the_best_mean_of_a_bandit_with_a_prior_is_found(routine: Any) -> None:
    """Its regret in reward units, of the states on average, among all means of this width."""
    width, temperature = 0.3, 0.5
    torch.set_default_dtype(torch.float32)
    model = Bandit()
    prior = GaussianPrior(model.action_space, -0.4, 0.3)
    settings = routine(
        total_steps=1500,
        environments=10,
        warmup_steps=300,
        updates_per_step=0.5,
        batch_size=64,
        hidden=(32,),
        learning_rate=3e-3,
        value_learning_rate=1e-2,
        temperature=temperature,
        width=width,
        evaluation_episodes=1,
    )
    policy = infer(model, settings, prior=prior, seed=1).policy
    state = torch.linspace(-1, 1, 21).unsqueeze(-1)
    mean = policy.parameters_of(state, torch.zeros(21))[:, 0].double()  # type: ignore[operator]
    torch.set_default_dtype(torch.float64)
    rho = prior(torch.zeros(1, 1, dtype=torch.float64)).base_dist
    means = torch.linspace(-2, 2, 801)
    best = bound_of(means, width, temperature, rho).max()
    assert best - bound_of(mean, width, temperature, rho).mean() < 0.02
    # Whoever forgets the prior, or the divergence from it, ends elsewhere.
    uniform = dist.Uniform(-torch.ones(1), torch.ones(1), validate_args=False)
    for forgetful in (
        means[bound_of(means, width, temperature, uniform).argmax()],
        means[bound_of(means, width, 0.0, rho).argmax()],
    ):
        assert best - bound_of(forgetful.reshape(1), width, temperature, rho) > 0.1


BRIEF = {
    "total_steps": 60,
    "warmup_steps": 20,
    "batch_size": 16,
    "hidden": (16,),
    "evaluation_episodes": 1,
    "evaluate_every": 20,
}


@pytest.mark.parametrize("routine", BOTH)
def test_width_and_temperature_move_over_the_run_and_are_saved(
    routine: Any, tmp_path: Path
) -> None:
    torch.set_default_dtype(torch.float32)
    settings = routine(
        **BRIEF, temperature=1.0, final_temperature=0.01, width=0.5, final_width=0.05
    )
    result = infer(load_target("Pendulum-v1"), settings, seed=2)
    assert [width_at(settings, steps) for steps in (0, 60, 90)] == pytest.approx([0.5, 0.05, 0.05])
    assert width_at(settings, 30) == pytest.approx(math.sqrt(0.5 * 0.05))
    temperatures = [row["temperature"] for row in result.metrics]
    assert temperatures == pytest.approx([0.01 ** (1 / 3), 0.01 ** (2 / 3), 0.01])
    assert float(result.policy.width) == pytest.approx(0.05)  # type: ignore[arg-type]
    result.save(tmp_path / "run")
    state = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for policy in (InferenceResult.load(tmp_path / "run").policy, load_policy(tmp_path / "run")):
        loaded: Any = policy(state)
        torch.testing.assert_close(loaded.base_dist.scale, torch.full((5, 1), 0.05))
        assert torch.equal(policy.mode(state), loaded.base_dist.loc.tanh())
        assert torch.equal(policy.mode(state), result.policy.mode(state))
    loaded_q: Any = InferenceResult.load(tmp_path / "run").q
    given = state, torch.zeros(5, 1), torch.zeros(5)
    assert torch.equal(loaded_q(*given), result.q(*given))


def test_what_the_latest_update_of_each_part_gave_is_logged() -> None:
    """Every row here comes after an update of Q alone; before the first there was but one."""
    torch.set_default_dtype(torch.float32)
    result = infer(load_target("Pendulum-v1"), SoftTD3(**BRIEF, policy_every=2), seed=2)
    assert [row["steps"] for row in result.metrics] == [20, 40, 60]
    assert ["policy_loss" in row for row in result.metrics] == [False, True, True]
    assert all("q_loss" in row for row in result.metrics)
    assert result.metrics[1]["policy_loss"] != result.metrics[2]["policy_loss"]


# What is refused


@pytest.mark.parametrize("routine", BOTH)
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": "auto"}, "temperature: expected a number, got 'auto', but a guide of fix"),
        ({"temperature": -1.0}, r"temperature: expected a number >= 0, got -1\.0"),
        ({"temperature": math.nan}, "temperature: expected a finite number, got nan"),
        ({"final_temperature": 0.0}, "final_temperature: annealing is geometric, expected both"),
        ({"width": 0}, "^width: expected a number > 0, got 0"),
        ({"final_width": 0}, "^final_width: expected a number > 0, got 0"),
        ({"final_width": math.inf}, "^final_width: expected a finite number or None, got inf"),
        ({"samples": 1}, "samples: expected a number >= 2, got 1"),
        ({"backup": "mean"}, "backup: expected one of 'elbo', 'logsumexp', 'boltzmann', got 'mean"),
        ({"target_rate": 0}, "target_rate: expected a number > 0, got 0"),
        ({"learning_rate": 0}, "^learning_rate: expected a number > 0, got 0"),
        ({"value_learning_rate": 0}, "value_learning_rate: expected a number > 0, got 0"),
    ],
)
def test_settings_out_of_range(routine: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        routine(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"smoothing": -0.1}, r"smoothing: expected a number >= 0, got -0\.1"),
        ({"smoothing_limit": 0}, "smoothing_limit: expected a number > 0, got 0"),
        ({"policy_every": 0}, "policy_every: expected a number >= 1, got 0"),
    ],
)
def test_settings_of_soft_td3_out_of_range(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SoftTD3(**settings)


@pytest.mark.parametrize(
    ("space", "what_to_do"),
    [
        (Discrete(2), "use sac or sql for discrete actions"),
        (Box(-np.inf, np.inf, (2,)), "give it bounds, or use policy-gradient, which needs none"),
        (Box(0.0, np.inf, (2,)), "give it bounds, or use policy-gradient, which needs none"),
    ],
)
@pytest.mark.parametrize("routine", BOTH)
def test_actions_without_bounds(routine: Any, space: Any, what_to_do: str, tmp_path: Path) -> None:
    model = Plane()
    model.action_space = space
    said = rf"action_space: expected a box with bounds for a guide .*, got {type(space).__name__}"
    with pytest.raises(TypeError, match=f"{said}.*; {what_to_do}$"):
        infer(model, routine(**BRIEF), directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()
