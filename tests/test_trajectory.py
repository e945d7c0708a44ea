"""The program: what it samples, what its two readings weigh, and that its bound is the objective.

Everything is compared with sums over all trajectories (`oracles`). Each check is a function of the
program, so that deliberately broken programs can be shown to fail it.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import Tables
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.inspect import get_model_relations
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from inference_rl.distributions import Optimality, SparseCategorical
from inference_rl.environment import EnvironmentModel
from inference_rl.policies import TabularPolicy
from inference_rl.trajectory import trajectory

Program = Callable[..., Tensor]
TEMPERATURE = 0.7
LIGHT = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)


# --- Models -------------------------------------------------------------------------------------


class Finite(EnvironmentModel):
    """Tables as a program, in any of the forms in which a user may write next states."""

    def __init__(self, tables: Tables, form: str = "categorical") -> None:
        self.tables, self.form = tables, form
        self.state_space, self.action_space = Discrete(tables.states), Discrete(tables.actions)
        self.discount, self.horizon = tables.discount, tables.horizon
        self.moves, self.gains, self.start, self.chances = (
            torch.as_tensor(x)
            for x in (tables.transition, tables.reward, tables.initial, tables.prior)
        )

    def _states(self, probs: Tensor) -> Any:
        if self.form == "sparse":
            # Backwards, and with one entry split in two: neither may matter.
            states = torch.arange(probs.shape[-1]).flip(-1).expand(probs.shape)
            states = torch.cat([states, states[..., :1]], dim=-1)
            probs = torch.cat([probs, probs[..., -1:] / 2], dim=-1)
            half = torch.ones(probs.shape[-1])
            half[0] = 0.5
            order = [*range(probs.shape[-1] - 2, -1, -1), probs.shape[-1] - 1]
            return SparseCategorical(states, probs[..., order] * half)
        if self.form == "delta":
            return dist.Delta(probs.argmax(-1))
        return dist.Categorical(probs)

    def initial_state(self) -> Any:
        return self._states(self.start)

    def transition(self, state: Tensor, action: Tensor) -> Any:
        return self._states(self.moves[state, action])

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return self.gains[state, action, next_state]

    def action_prior(self, state: Tensor) -> Any:
        return dist.Categorical(self.chances[state])


class FiniteEnding(Finite):
    """The same, with terminal states."""

    def terminal(self, state: Tensor) -> Tensor:
        return torch.as_tensor(self.tables.terminal)[state]


def written(tables: Tables, form: str = "categorical") -> Finite:
    return (FiniteEnding if tables.terminal.any() else Finite)(tables, form)


def example(
    *, horizon: int, discount: float = 0.9, ends: bool = True, certain: bool = False
) -> Tables:
    """Three states, two actions, rewards r(s, a, s'); the last state is terminal if `ends`."""
    random = np.random.default_rng(3)
    transition = random.dirichlet(np.ones(3), (3, 2))
    if certain:
        transition = np.eye(3)[random.integers(0, 3, (3, 2))]
    initial = np.array([1.0, 0.0, 0.0]) if certain else np.array([0.5, 0.3, 0.2])
    return Tables(
        transition,
        random.normal(size=(3, 2, 3)),
        prior=random.dirichlet(np.ones(2), 3),
        initial=initial,
        terminal=np.array([False, False, ends]),
        discount=discount,
        horizon=horizon,
    )


def prior_of(model: EnvironmentModel) -> Callable[..., Any]:
    return lambda state, t=None: model.action_prior(state)


def softmax_policy(logits: Tensor) -> Callable[..., Any]:
    return lambda state, t: dist.Categorical(logits=logits[t][state])


def random_logits(tables: Tables) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (tables.horizon or 0, tables.states, tables.actions)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def bound(
    program: Program,
    model: EnvironmentModel,
    policy: Callable[..., Any],
    horizon: int,
    temperature: float = TEMPERATURE,
    message: Callable[[Tensor], Tensor] | None = None,
    *,
    differentiable: bool = False,
) -> Any:
    """temperature · ELBO, exactly: every site of the guide enumerated."""
    elbo = TraceEnum_ELBO(max_plate_nesting=0)
    loss = (elbo.differentiable_loss if differentiable else elbo.loss)(
        lambda: program(model, prior_of(model), horizon, temperature=temperature, message=message),
        config_enumerate(lambda: program(model, policy, horizon)),
    )
    return -temperature * loss


def evidence(program: Program, model: EnvironmentModel, horizon: int) -> float:
    """log p(O), exactly: every site of the model enumerated."""
    read = config_enumerate(
        lambda: program(model, prior_of(model), horizon, temperature=TEMPERATURE)
    )
    return -TraceEnum_ELBO(max_plate_nesting=0).loss(read, lambda: None)


# --- Checks, of any program ---------------------------------------------------------------------


def check_bound_is_the_objective(program: Program) -> None:
    """temperature · ELBO = J(π), for terminal states, discount and r(s, a, s'), T = 1 and 5."""
    for horizon in (1, 5):
        tables = example(horizon=horizon)
        logits = random_logits(tables)
        got = bound(program, written(tables), softmax_policy(logits), horizon)
        expected = oracles.objective(tables, logits.softmax(-1).numpy(), TEMPERATURE)
        assert float(got) == pytest.approx(expected, abs=1e-12)


def check_gradient_of_the_bound(program: Program) -> None:
    """Its gradient by the logits is the exact one, summed over all paths."""
    for horizon in (1, 4):
        tables = example(horizon=horizon)
        logits = random_logits(tables).requires_grad_()
        policy = softmax_policy(logits)
        worth = bound(program, written(tables), policy, horizon, differentiable=True)
        (gradient,) = torch.autograd.grad(worth, logits)
        expected = oracles.objective_gradient(
            tables, logits.detach().softmax(-1).numpy(), TEMPERATURE
        )
        np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-13)


def check_evidence(program: Program) -> None:
    """log p(O) = the sum over all trajectories, with and without terminal states."""
    for ends in (True, False):
        tables = example(horizon=4, discount=1.0, ends=ends)
        expected = oracles.brute_force_posterior(tables, TEMPERATURE).log_evidence
        assert evidence(program, written(tables), 4) == pytest.approx(expected, abs=1e-10)


def check_message_stands_for_the_rest(program: Program) -> None:
    """Two steps with the exact V as message are worth what five steps are: E V(s_0)."""
    for ends in (True, False):
        tables = example(horizon=5, ends=ends)
        best = oracles.brute_force_control(tables, TEMPERATURE)
        policy = TabularPolicy(torch.as_tensor(best.policy))
        rest = torch.as_tensor(best.value[2]) + 17.0 * torch.as_tensor(tables.terminal)
        got = bound(program, written(tables), policy, 2, message=lambda state: rest[state])  # noqa: B023
        assert float(got) == pytest.approx(best.objective, abs=1e-12)


def check_log_probabilities(program: Program) -> None:
    """Both readings of one trajectory, term by term: it ends after its second step."""
    tables = example(horizon=3)
    model, logits = written(tables), random_logits(tables)
    data = {"state_0": 0, "action_0": 1, "state_1": 1, "action_1": 0, "state_2": 2}
    data |= {"action_2": 1, "state_3": 2}
    values = {name: torch.tensor(value) for name, value in data.items()}
    readings = {
        "guide": lambda: program(model, softmax_policy(logits), 3),
        "model": lambda: program(model, prior_of(model), 3, temperature=TEMPERATURE),
    }
    got = {
        name: float(poutine.trace(poutine.condition(run, values)).get_trace().log_prob_sum())
        for name, run in readings.items()
    }
    move, gain = tables.transition, tables.reward
    moves = math.log(0.5) + math.log(move[0, 1, 1]) + math.log(move[1, 0, 2])
    chosen = torch.log_softmax(logits, -1).numpy()
    idle = 0.81 * math.log(1 / 2)  # after the end actions are uniform in both readings
    acts = chosen[0, 0, 1] + 0.9 * chosen[1, 1, 0] + idle
    habits = math.log(tables.prior[0, 1]) + 0.9 * math.log(tables.prior[1, 0]) + idle
    rewards = (gain[0, 1, 1] + 0.9 * gain[1, 0, 2]) / TEMPERATURE
    assert got["guide"] == pytest.approx(moves + acts, abs=1e-13)
    assert got["model"] == pytest.approx(moves + habits + rewards, abs=1e-13)


CHECKS = [
    check_bound_is_the_objective,
    check_gradient_of_the_bound,
    check_evidence,
    check_message_stands_for_the_rest,
    check_log_probabilities,
]


@pytest.mark.parametrize("check", CHECKS)
def test_program(check: Callable[[Program], None]) -> None:
    check(trajectory)


# --- Broken programs ----------------------------------------------------------------------------


def broken(fault: str) -> Program:
    """A program like `trajectory`, written anew, with one fault ("none" for none)."""
    guide: list[Callable[..., Any]] = []

    def program(
        model: Finite,
        factor: Callable[..., Any],
        horizon: int,
        *,
        temperature: float | None = None,
        message: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        count, size = int(model.action_space.n), int(model.state_space.n)
        if temperature is None:
            guide[:] = [factor]
        discount = 1.0 if fault == "discount forgotten" else model.discount
        late = fault == "discount off by one"
        state = pyro.sample("state_0", model.initial_state())
        for t in pyro.markov(range(horizon)):
            weight = poutine.scale(scale=discount ** (t + late))
            ended = model.terminal(state)
            stays = ended & torch.tensor(fault != "terminal does not absorb")
            free = ended & torch.tensor(fault != "actions after the end cost")

            def chances(which: Callable[..., Any]) -> Tensor:
                return torch.where(free.unsqueeze(-1), 1 / count, which(state, t).probs)  # noqa: B023

            with weight:
                probs = chances(factor)
                if fault == "prior missing" and temperature is not None:
                    probs = torch.full_like(probs, 1 / count)
                action = pyro.sample(f"action_{t}", dist.Categorical(probs))
            probs = model.transition(state, action).probs
            stay = torch.nn.functional.one_hot(state, size).double()
            probs = torch.where(stays.unsqueeze(-1), stay, probs)
            following = pyro.sample(f"state_{t + 1}", dist.Categorical(probs))
            if temperature is not None:
                with weight:
                    first = state if fault != "reward of the next state" else following
                    reward = model.reward(first, action, following)
                    if fault != "pays after the end":
                        reward = torch.where(ended, 0.0, reward)
                    worth = reward / temperature
                    if fault == "temperature forgotten":
                        worth = reward
                    if fault == "entropy sign flipped" and guide:
                        policy, prior = chances(guide[0]), chances(factor)
                        ratio = (policy / prior).log().expand((*worth.shape, count))
                        worth = worth + 2 * ratio.gather(
                            -1, action.expand(worth.shape).unsqueeze(-1)
                        ).squeeze(-1)
                    pyro.sample(f"optimality_{t}", Optimality(worth), obs=torch.tensor(1.0))
                if message is not None and t + 1 == horizon:
                    rest = message(following)
                    if fault != "message ignores the end":
                        rest = torch.where(model.terminal(following), 0.0, rest)
                    power = horizon - (fault == "message discounted once too little")
                    with poutine.scale(scale=discount**power):
                        pyro.sample(
                            "optimality_rest",
                            Optimality(rest / temperature),
                            obs=torch.tensor(1.0),
                        )
            state = following
        return state

    return program


@pytest.mark.parametrize("check", CHECKS)
def test_the_twin_without_a_fault_passes(check: Callable[[Program], None]) -> None:
    check(broken("none"))


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        ("discount forgotten", "bound gradient message log_probabilities"),
        ("discount off by one", "bound gradient message log_probabilities"),
        ("prior missing", "bound gradient evidence message log_probabilities"),
        ("pays after the end", "bound gradient evidence message log_probabilities"),
        ("actions after the end cost", "bound gradient log_probabilities"),
        ("terminal does not absorb", "bound gradient evidence message log_probabilities"),
        ("reward of the next state", "bound gradient evidence message log_probabilities"),
        ("temperature forgotten", "bound gradient evidence message log_probabilities"),
        ("entropy sign flipped", "bound gradient message"),
        ("message ignores the end", "message"),
        ("message discounted once too little", "message"),
    ],
)
def test_broken_twins_are_caught(fault: str, caught_by: str) -> None:
    for check in CHECKS:
        if any(name in check.__name__ for name in caught_by.split()):
            with pytest.raises(AssertionError):
                check(broken(fault))


# --- Random models ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["categorical", "sparse"])
def test_bound_is_the_objective_on_random_models(form: str) -> None:
    """Zero probabilities, forbidden actions, ties, terminal and unreachable states, discount 0."""

    @LIGHT
    @given(st.data(), oracles.finite_tables(max_states=3, max_horizon=3), oracles.temperatures())
    def run(data: st.DataObject, tables: Tables, temperature: float) -> None:
        probs = data.draw(oracles.policies(tables))
        policy = TabularPolicy(torch.as_tensor(probs))
        steps = int(tables.horizon or 0)
        got = bound(trajectory, written(tables, form), policy, steps, temperature)
        expected = oracles.objective(tables, probs, temperature)
        scale = 1 + np.abs(tables.reward).max() + 10 * temperature
        assert got == pytest.approx(expected, abs=1e-12 * scale)

    run()


@pytest.mark.parametrize("form", ["categorical", "sparse"])
def test_evidence_on_random_models(form: str) -> None:
    @LIGHT
    @given(oracles.finite_tables(max_horizon=3, discounts=(1.0,), scales=(1e-6, 1.0, 10.0)))
    def run(tables: Tables) -> None:
        expected = oracles.brute_force_posterior(tables, TEMPERATURE).log_evidence
        got = evidence(trajectory, written(tables, form), int(tables.horizon or 0))
        assert got == pytest.approx(expected, rel=1e-12, abs=1e-10)

    run()


@pytest.mark.parametrize("form", ["delta", "sparse", "categorical"])
def test_what_is_impossible_cannot_be_bought(form: str) -> None:
    """A huge reward on a transition of probability zero adds nothing to p(O)."""
    tables = example(horizon=2, discount=1.0, ends=False, certain=True)
    tables = dataclasses.replace(
        tables, reward=np.where(tables.transition > 0, tables.reward, 60.0)
    )
    expected = oracles.brute_force_posterior(tables, TEMPERATURE).log_evidence
    got = evidence(trajectory, written(tables, form), 2)
    assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ends", [False, True])
def test_forbidden_actions_cannot_be_bought(ends: bool) -> None:
    tables = example(horizon=2, discount=1.0, ends=ends)
    tables.prior[:] = [1.0, 0.0]
    tables.reward[:, 1] = 60.0
    expected = oracles.brute_force_posterior(tables, TEMPERATURE).log_evidence
    assert evidence(trajectory, written(tables), 2) == pytest.approx(expected, abs=1e-12)
    # And a policy that takes them is infinitely far from the prior.
    policy = TabularPolicy(torch.full((3, 2), 0.5))
    assert (bound(trajectory, written(tables), policy, 2)) == -math.inf


def test_best_guide_reaches_the_evidence_if_nothing_is_random() -> None:
    tables = example(horizon=4, discount=1.0, ends=True, certain=True)
    best = oracles.brute_force_control(tables, TEMPERATURE)
    policy = TabularPolicy(torch.as_tensor(best.policy))
    got = (bound(trajectory, written(tables, "delta"), policy, 4)) / TEMPERATURE
    assert got == pytest.approx(evidence(trajectory, written(tables, "delta"), 4), abs=1e-12)


def test_discount_zero_counts_the_first_step_only() -> None:
    tables = example(horizon=3, discount=0.0)
    logits = random_logits(tables)
    got = bound(trajectory, written(tables), softmax_policy(logits), 3)
    once = dataclasses.replace(tables, horizon=1)
    expected = oracles.objective(once, logits[:1].softmax(-1).numpy(), TEMPERATURE)
    assert float(got) == pytest.approx(expected, abs=1e-13)
    message = bound(
        trajectory, written(tables), softmax_policy(logits), 1, message=lambda s: 1e6 + s.double()
    )
    assert float(message) == pytest.approx(expected, abs=1e-13)


def test_gradient_is_finite_where_a_guide_never_goes() -> None:
    """Actions of probability zero and unreachable states leave no NaN."""
    tables = example(horizon=3)
    tables.transition[:, :, 0], tables.initial[0] = 0.0, 0.0
    tables.transition[:] /= tables.transition.sum(-1, keepdims=True)
    tables.initial[:] /= tables.initial.sum()
    logits = random_logits(tables)
    logits[:, 1, 0] = -torch.inf
    logits.requires_grad_()
    worth = bound(trajectory, written(tables), softmax_policy(logits), 3, differentiable=True)
    (gradient,) = torch.autograd.grad(worth, logits)
    expected = oracles.objective_gradient(tables, logits.detach().softmax(-1).numpy(), TEMPERATURE)
    np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-13)


# --- Sites --------------------------------------------------------------------------------------


def sites(run: Callable[[], Any]) -> dict[str, dict[str, Any]]:
    trace = poutine.trace(run).get_trace()
    return {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}


@pytest.mark.parametrize("ends", [False, True])
def test_sites_and_their_order(ends: bool) -> None:
    model = written(example(horizon=2, ends=ends))
    guide = sites(lambda: trajectory(model, prior_of(model), 2))
    assert list(guide) == ["state_0", "action_0", "state_1", "action_1", "state_2"]
    assert not any(node["is_observed"] for node in guide.values())
    read = sites(lambda: trajectory(model, prior_of(model), 2, temperature=1.0))
    assert list(read) == [
        *("state_0", "action_0", "state_1", "optimality_0"),
        *("action_1", "state_2", "optimality_1"),
    ]
    observed = {name for name, node in read.items() if node["is_observed"]}
    assert observed == {"optimality_0", "optimality_1"}
    assert all(read[name]["value"] == 1 for name in observed)
    rest = sites(
        lambda: trajectory(model, prior_of(model), 2, temperature=1.0, message=lambda s: s.double())
    )
    assert set(rest) == {*read, "optimality_rest"}
    assert rest["optimality_rest"]["scale"] == pytest.approx(0.81)


def test_every_site_is_documented() -> None:
    text = importlib.import_module("inference_rl.trajectory").__doc__ or ""
    for name in ("state_0", "action_t", "state_{t+1}", "optimality_t", "optimality_rest"):
        assert f"`{name}`" in text


def test_scales_weigh_actions_and_rewards_but_not_states() -> None:
    model = written(example(horizon=3))
    read = sites(lambda: trajectory(model, prior_of(model), 3, temperature=1.0))
    for t in range(3):
        assert read[f"action_{t}"]["scale"] == pytest.approx(0.9**t)
        assert read[f"optimality_{t}"]["scale"] == pytest.approx(0.9**t)
        assert read[f"state_{t}"]["scale"] == 1


def test_returns_the_last_state() -> None:
    model = written(example(horizon=3))
    with poutine.trace() as tracer:
        last = trajectory(model, prior_of(model), 3)
    assert torch.equal(last, tracer.trace.nodes["state_3"]["value"])


def test_the_policy_is_told_the_step() -> None:
    told: list[int | None] = []
    model = written(example(horizon=4))

    def policy(state: Tensor, t: int | None = None) -> Any:
        told.append(t)
        return model.action_prior(state)

    trajectory(model, policy, 4)
    assert told == [0, 1, 2, 3]


def test_temperature_may_be_a_tensor_with_a_gradient() -> None:
    """∂/∂α of the log-weight: -rewards / α²."""
    tables = example(horizon=1)
    model, temperature = written(tables), torch.tensor(TEMPERATURE, requires_grad=True)
    values = {"state_0": 0, "action_0": 1, "state_1": 1}
    conditioned = poutine.condition(
        lambda: trajectory(model, prior_of(model), 1, temperature=temperature),
        {name: torch.tensor(value) for name, value in values.items()},
    )
    (slope,) = torch.autograd.grad(
        poutine.trace(conditioned).get_trace().log_prob_sum(), temperature
    )
    expected = -tables.reward[0, 1, 1] / TEMPERATURE**2
    assert float(slope) == pytest.approx(expected, rel=1e-13)


def test_positive_rewards_are_legal() -> None:
    """p(O) may exceed one."""
    tables = example(horizon=2, discount=1.0)
    tables = dataclasses.replace(tables, reward=np.abs(tables.reward) + 5)
    expected = oracles.brute_force_posterior(tables, TEMPERATURE).log_evidence
    assert expected > 0
    assert evidence(trajectory, written(tables), 2) == pytest.approx(expected, rel=1e-13)


def test_relations_of_the_program() -> None:
    model = written(example(horizon=2))
    relations = get_model_relations(
        lambda: trajectory(model, prior_of(model), 2, temperature=1.0, message=lambda s: s * 1.0)
    )
    parents = relations["sample_sample"]
    assert parents["state_0"] == []
    assert parents["action_0"] == ["state_0"]
    assert parents["state_1"] == ["state_0", "action_0"]
    assert parents["optimality_0"] == ["state_0", "action_0", "state_1"]
    assert parents["action_1"] == ["state_1"]
    assert parents["state_2"] == ["state_1", "action_1"]
    assert parents["optimality_rest"] == ["state_2"]
    assert relations["observed"] == ["optimality_0", "optimality_1", "optimality_rest"]
    assert relations["sample_dist"]["optimality_0"] == "Optimality"


def test_pyro_renders_the_program() -> None:
    model = written(example(horizon=2))
    graph = pyro.render_model(
        lambda: trajectory(model, prior_of(model), 2, temperature=1.0), render_distributions=True
    )
    assert "optimality_1" in graph.source


# --- In a plate ---------------------------------------------------------------------------------


def test_sampled_bound_agrees_with_the_objective() -> None:
    """`Trace_ELBO` over a plate of paths, within its own Monte Carlo error."""
    tables = example(horizon=4)
    model, logits, paths = written(tables), random_logits(tables), 5_000
    expected = oracles.objective(tables, logits.softmax(-1).numpy(), TEMPERATURE)
    returns = log_weights(model, softmax_policy(logits), 4, paths) * TEMPERATURE
    error = float(returns.std()) / math.sqrt(paths)
    assert float(returns.mean()) == pytest.approx(expected, abs=4 * error)
    assert error < 0.05

    def plated(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return pyro.plate("paths", paths)(run)

    loss = Trace_ELBO().loss(
        plated(lambda: trajectory(model, prior_of(model), 4, temperature=TEMPERATURE)),
        plated(lambda: trajectory(model, softmax_policy(logits), 4)),
    )
    assert -loss / paths * TEMPERATURE == pytest.approx(expected, abs=4 * error)


def log_weights(
    model: EnvironmentModel, policy: Callable[..., Any], horizon: int, paths: int
) -> Tensor:
    """log p(τ, O) - log q(τ) of each of `paths` trajectories drawn from the guide."""
    plate = pyro.plate("paths", paths)
    guide = poutine.trace(plate(lambda: trajectory(model, policy, horizon))).get_trace()
    read = plate(lambda: trajectory(model, prior_of(model), horizon, temperature=TEMPERATURE))
    replayed = poutine.trace(poutine.replay(read, guide)).get_trace()
    guide.compute_log_prob()
    replayed.compute_log_prob()
    total = torch.zeros(paths)
    for trace, sign in ((replayed, 1), (guide, -1)):
        for node in trace.nodes.values():
            if node["type"] == "sample" and not site_is_subsample(node):
                assert node["log_prob"].shape == (paths,)
                total = total + sign * node["log_prob"]
    return total


def test_importance_weights_are_unbiased() -> None:
    """E_q[p(τ, O) / q(τ)] = p(O)."""
    tables = example(horizon=3, discount=1.0)
    expected = math.exp(oracles.brute_force_posterior(tables, TEMPERATURE).log_evidence)
    weights = log_weights(written(tables), softmax_policy(random_logits(tables)), 3, 10_000).exp()
    error = float(weights.std()) / math.sqrt(len(weights))
    assert float(weights.mean()) == pytest.approx(expected, abs=4 * error)
    assert error < 0.05 * expected


def test_importance_weights_of_the_best_guide_are_constant() -> None:
    """They all equal p(O) when the dynamics are deterministic."""
    tables = example(horizon=4, discount=1.0, certain=True)
    best = oracles.brute_force_control(tables, TEMPERATURE)
    policy = TabularPolicy(torch.as_tensor(best.policy))
    weights = log_weights(written(tables, "delta"), policy, 4, 200)
    expected = oracles.brute_force_posterior(tables, TEMPERATURE).log_evidence
    np.testing.assert_allclose(weights.numpy(), expected, atol=1e-12)
    # Random dynamics: not constant.
    noisy = example(horizon=4, discount=1.0)
    chosen = TabularPolicy(torch.as_tensor(oracles.brute_force_control(noisy, TEMPERATURE).policy))
    assert float(log_weights(written(noisy), chosen, 4, 200).std()) > 0.1


# --- Continuous states and actions --------------------------------------------------------------


class Runway(EnvironmentModel):
    """A point on a plane that is pushed to the right, with noise; past 1 it has landed."""

    state_space = Box(-10.0, 10.0, (2,))
    action_space = Box(-1.0, 1.0, (1,))
    discount = 0.9

    def initial_state(self) -> Any:
        return dist.Normal(torch.zeros(2), 0.1).to_event(1)

    def transition(self, state: Tensor, action: Tensor) -> Any:
        return dist.Normal(state + torch.cat([action + 0.5, 0 * action], -1), 0.2).to_event(1)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return next_state[..., 0] - state[..., 0] - action.square().sum(-1)


class Landing(Runway):
    def terminal(self, state: Tensor) -> Tensor:
        return state[..., 0] > 1


def test_continuous_states_stand_still_once_they_end() -> None:
    model, paths, horizon = Landing(), 200, 8
    plate = pyro.plate("paths", paths)
    trace = poutine.trace(
        plate(lambda: trajectory(model, prior_of(model), horizon, temperature=0.5))
    ).get_trace()
    trace.compute_log_prob()
    ended = torch.zeros(paths, dtype=torch.bool)
    for t in range(horizon):
        state, following = (trace.nodes[f"state_{i}"]["value"] for i in (t, t + 1))
        assert state.shape == (paths, 2)
        ended = model.terminal(state)
        assert torch.equal(following[ended], state[ended])
        assert (following[~ended] != state[~ended]).all()
        for name in (f"action_{t}", f"state_{t + 1}", f"optimality_{t}"):
            assert (trace.nodes[name]["log_prob"][ended] == 0).all()
        running = trace.nodes[f"state_{t + 1}"]["log_prob"][~ended]
        action = trace.nodes[f"action_{t}"]["value"]
        plain = model.transition(state, action).log_prob(following)[~ended]
        torch.testing.assert_close(running, plain)
    assert 0 < int(ended.sum()) < paths or ended.all()
    assert ended.any()


def test_continuous_steps_are_reparameterised_until_the_end() -> None:
    """The gradient of the last state reaches a running action, and stops at an ended one."""
    model = Landing()
    pushes = torch.tensor([[-0.9], [0.9]], requires_grad=True)

    def policy(state: Tensor, t: int | None = None) -> Any:
        return dist.Normal(pushes, 0.01).to_event(1)

    start = {"state_0": torch.tensor([[0.0, 0.0], [2.0, 0.0]])}
    with pyro.plate("paths", 2):
        last = poutine.condition(lambda: trajectory(model, policy, 1), start)()
    (gradient,) = torch.autograd.grad(last[:, 0].sum(), pushes)
    assert gradient.flatten().tolist() == [1.0, 0.0]


def test_continuous_message_is_cut_at_the_end() -> None:
    model = Landing()
    values = {"state_0": torch.tensor([0.0, 0.0]), "action_0": torch.tensor([0.5])}

    def rest(landed: bool) -> float:
        following = torch.tensor([1.5 if landed else 0.5, 0.0])
        read = poutine.condition(
            lambda: trajectory(
                model, prior_of(model), 1, temperature=0.5, message=lambda s: 3 + s[..., 1]
            ),
            {**values, "state_1": following},
        )
        trace = poutine.trace(read).get_trace()
        trace.compute_log_prob()
        return float(trace.nodes["optimality_rest"]["log_prob"])

    assert rest(landed=True) == 0
    assert rest(landed=False) == pytest.approx(0.9 * 3 / 0.5)


def test_continuous_without_terminal_is_untouched() -> None:
    model = Runway()
    read = sites(lambda: trajectory(model, prior_of(model), 2, temperature=0.5))
    assert type(read["state_1"]["fn"]).__name__ == "Independent"


# --- The optimality variable --------------------------------------------------------------------


def test_optimality_cannot_be_sampled() -> None:
    with pytest.raises(NotImplementedError, match=r"observed \(obs=1.0\) and cannot be sampled"):
        pyro.sample("optimality", Optimality(torch.tensor(0.5)))


def test_optimality_refuses_any_other_value() -> None:
    factor = Optimality(torch.tensor(0.5), validate_args=True)
    assert float(factor.log_prob(torch.tensor(1.0))) == 0.5
    for value in (0.0, 2.0, math.nan):
        with pytest.raises(ValueError, match="EqualsOne"):
            factor.log_prob(torch.tensor(value))


def test_optimality_expands() -> None:
    factor = Optimality(torch.arange(3.0)).expand((2, 3))
    assert factor.batch_shape == (2, 3)
    assert torch.equal(factor.log_prob(torch.tensor(1.0)), torch.arange(3.0).expand(2, 3))


def test_optimality_passes_gradients() -> None:
    reward = torch.tensor(2.0, requires_grad=True)
    (slope,) = torch.autograd.grad(Optimality(reward / 0.5).log_prob(torch.tensor(1.0)), reward)
    assert float(slope) == 2.0


# --- What is refused, and who is told the step ----------------------------------------------------


def test_arguments_that_make_no_trajectory() -> None:
    model = written(example(horizon=2))
    with pytest.raises(ValueError, match=r"temperature: expected a number > 0 .*, got 0"):
        trajectory(model, prior_of(model), 2, temperature=0)
    with pytest.raises(ValueError, match="horizon: the model ends after 2 steps, got 3"):
        trajectory(model, prior_of(model), 3)


def test_only_factors_that_take_the_step_are_told_it() -> None:
    model = written(example(horizon=2))
    told: list[Any] = []

    class Module(torch.nn.Module):
        def forward(self, state: Tensor) -> Any:
            return model.action_prior(state)

    def with_option(state: Tensor, strength: float = 0.5) -> Any:
        told.append(strength)
        return model.action_prior(state)

    def with_step(state: Tensor, t: int | None = None) -> Any:
        told.append(t)
        return model.action_prior(state)

    for factor in (Module(), with_option, with_step, lambda s, _: model.action_prior(s)):
        trajectory(model, factor, 2)
    assert told == [0.5, 0.5, 0, 1]


def test_a_message_may_be_a_table() -> None:
    tables = example(horizon=2)
    model, value = written(tables), torch.linspace(0, 1, len(tables.initial))
    logs = []
    for message in (value, lambda s: value[s]):
        torch.manual_seed(0)
        trace = poutine.trace(trajectory).get_trace(
            model, prior_of(model), 2, temperature=TEMPERATURE, message=message
        )
        logs.append(float(trace.log_prob_sum()))
    assert logs[0] == logs[1]
