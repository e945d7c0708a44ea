"""Exact inference on finite models against sums over all trajectories, Pyro, and sixty digits."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import scipy.stats
import torch
from gymnasium.spaces import Discrete
from hypothesis import HealthCheck, assume, given, settings
from oracles import Tables
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from inference_rl import EnvironmentModel, Exact, InferenceResult, infer, load_target, runs
from inference_rl.distributions import SparseCategorical
from inference_rl.finite import FiniteModel
from inference_rl.priors import CategoricalPrior, StickyPrior
from inference_rl.tabulation import tabulate
from inference_rl.trajectory import trajectory

pytestmark = pytest.mark.filterwarnings("ignore:the posterior's policy assumes:UserWarning")

LIGHT = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TARGETS = ["control", "posterior"]
HORIZONS = [pytest.param(3, id="finite"), pytest.param(None, id="infinite")]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)


# --- Models ---------------------------------------------------------------------------------------


def model_of(tables: Tables, **changes: Any) -> FiniteModel:
    arguments: dict[str, Any] = {
        "discount": tables.discount,
        "initial": tables.initial,
        "prior": tables.prior,
        "terminal": tables.terminal,
        "horizon": tables.horizon,
    }
    reward = tables.stopped().reward
    return FiniteModel.from_tables(tables.transition, reward, **(arguments | changes))


def example(
    *, horizon: int | None = 3, discount: float = 0.9, ends: bool = True, certain: bool = False
) -> Tables:
    """Three states, two actions, rewards r(s, a, s'); the last state is terminal if `ends`."""
    random = np.random.default_rng(3)
    transition = random.dirichlet(np.ones(3), (3, 2))
    if certain:
        transition = np.eye(3)[[[1, 0], [0, 2], [2, 1]]]
    return Tables(
        transition,
        random.normal(size=(3, 2, 3)),
        prior=random.dirichlet(np.ones(2), 3),
        initial=np.array([1.0, 0, 0]) if certain else np.array([0.5, 0.3, 0.2]),
        terminal=np.array([False, False, ends]),
        discount=discount,
        horizon=horizon,
    )


def dyadic(horizon: int | None, discount: float = 1.0, *, ends: bool = False) -> Tables:
    """Probabilities that floats hold exactly, so that sixty digits mean the same model."""
    transition = np.array(
        [[[0.25, 0.5, 0.25], [0, 0.125, 0.875]], [[1, 0, 0], [0.5, 0, 0.5]], [[0, 0, 1], [0, 1, 0]]]
    )
    reward = np.random.default_rng(5).normal(size=(3, 2, 3))
    return Tables(
        transition,
        reward,
        prior=np.array([[0.75, 0.25], [0.5, 0.5], [2.0**-40, 1 - 2.0**-40]]),
        initial=np.array([0.5, 0.25, 0.25]),
        terminal=np.array([False, False, ends]),
        discount=discount,
        horizon=horizon,
    )


def forever(tables: Tables) -> Tables:
    return dataclasses.replace(tables, horizon=None)


def ending(tables: Tables) -> Tables:
    """The same without discount, but each step ends with probability ¼ in one more state."""
    states = tables.states + 1
    transition = np.zeros((states, tables.actions, states))
    transition[:-1, :, :-1] = 0.75 * tables.transition
    transition[..., -1] += 1 - transition.sum(-1)
    reward = np.zeros_like(transition)
    reward[:-1, :, :-1] = tables.stopped().reward
    return Tables(
        transition,
        reward,
        prior=np.vstack([tables.prior, tables.prior[:1]]),
        initial=np.append(tables.initial, 0.0),
        terminal=np.append(tables.terminal, True),
        discount=1.0,
    )


def costly(tables: Tables) -> Tables:
    """The same at a cost of two a step, so that no evidence is infinite."""
    return dataclasses.replace(tables, reward=tables.reward - 2.0)


def reach(tables: Tables) -> float:
    """The largest return, and so the scale of all values, in reward units."""
    steps = tables.horizon or min(1000.0, 4.0 / (1 - min(tables.discount, 0.999)))
    return steps * float(np.abs(tables.stopped().reward).max())


def close(got: Any, expected: Any, tolerance: float) -> None:
    if isinstance(got, Tensor):
        got = got.detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance + 1e-300)


# --- Control: sums over every history -------------------------------------------------------------


@LIGHT
@given(oracles.finite_tables(max_states=3), oracles.temperatures())
def test_control_is_the_best_that_any_policy_can_do(tables: Tables, temperature: float) -> None:
    result = infer(model_of(tables), Exact(temperature))
    best = oracles.brute_force_control(tables, temperature)
    scale, live = reach(tables), ~tables.terminal
    close(result.v, best.value, 1e-10 * scale)
    close(result.q, best.q, 1e-10 * scale)
    policy = result.policy.probs.numpy()
    # log π is Q / temperature: as many digits are lost as that has.
    close(policy[:, live], best.policy[:, live], 1e-10 * max(1, 1e-4 * scale / temperature))
    close(result.objective, best.objective, 1e-10 * scale)
    slack = 1e-10 * (scale + temperature)
    close(result.objective, oracles.objective(tables, policy, temperature), slack)
    entropy_form = oracles.objective(tables, policy, temperature, form="entropy")
    close(result.objective_entropy_form, entropy_form, slack)
    parts = result.parts
    close(parts.expected_return, oracles.objective(tables, policy, 0.0, form="reward"), slack)
    close(parts.expected_return - temperature * parts.divergence, best.objective, slack)


@LIGHT
@given(oracles.finite_tables(max_actions=4), oracles.temperatures())
def test_control_without_horizon_solves_the_linear_system(
    tables: Tables, temperature: float
) -> None:
    """V is what its own policy earns (a dense solve), and no action distribution beats it."""
    assume(not tables.terminal.all())
    for case in (forever(tables), ending(tables)):
        if case.discount == 1 and case.states == tables.states:
            continue
        result = infer(model_of(case), Exact(temperature))
        scale, policy = reach(case), result.policy.probs.numpy()
        earned = oracles.linear_solve_value(case, policy, temperature)
        close(result.v, earned, 1e-10 * (scale + 1e-4 * temperature))
        stopped = case.stopped()
        v = result.v.numpy()
        q = (stopped.transition * (stopped.reward + case.discount * v)).sum(-1)
        close(result.q, q, 1e-10 * scale)
        best = oracles.soft_maximum(q, stopped.prior, temperature)
        close(v, np.where(case.terminal, 0.0, best), 1e-10 * scale)
        close(result.objective, case.initial @ v, 1e-10 * scale)
        visits = oracles.occupancy(case, policy)
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -np.where(visits > 0, visits * np.log(policy), 0.0).sum()
        close(result.parts.steps, visits.sum(), 1e-10 * visits.sum())
        close(result.parts.entropy, entropy, 1e-10 * (1 + visits.sum()))
        paid = (visits * (stopped.transition * stopped.reward).sum(-1)).sum()
        close(result.parts.expected_return, paid, 1e-10 * scale)


# --- Posterior: sums over every path --------------------------------------------------------------


@LIGHT
@given(oracles.finite_tables(max_states=3, max_actions=2), oracles.temperatures())
def test_posterior_is_the_ratio_of_sums(tables: Tables, temperature: float) -> None:
    result = infer(model_of(tables), Exact(temperature, "posterior"))
    exact = oracles.brute_force_posterior(tables, temperature)
    steps, live = int(tables.horizon or 0), ~tables.terminal
    nats = max(1.0, reach(tables) / temperature)
    close(result.log_evidence, exact.log_evidence, 1e-10 * nats)
    close(result.details.posterior_initial, exact.initial, 1e-14 * nats + 1e-10)
    # V_t(s) is the log-evidence of the t-th step on, from s.
    message = np.zeros((steps + 1, tables.states))
    for t, s in itertools.product(range(steps), range(tables.states)):
        start = dataclasses.replace(tables, initial=np.eye(tables.states)[s])
        message[t, s] = oracles.brute_force_posterior(start, temperature, steps - t).log_evidence
    close(result.v / temperature, message, 1e-10 * nats)
    stopped, gamma = tables.stopped(), tables.discount
    with np.errstate(divide="ignore"):
        after = np.logaddexp(np.log(1 - gamma), np.log(gamma) + message[1:, None, None, :])
        terms = np.log(stopped.transition) + stopped.reward / temperature + after
    close(result.q / temperature, np.logaddexp.reduce(terms, axis=-1), 1e-10 * nats)
    seen = (exact.state > 1e-200) & live
    policy = result.policy.probs.numpy()
    close(policy[seen], exact.action[seen], 1e-14 * nats + 1e-10)
    # The library's transition is joint with surviving the step.
    model = model_of(tables)
    rows = model.rows().numpy()
    s, a, s2 = rows // tables.actions, rows % tables.actions, model.successors.numpy()
    alive = np.exp(np.log(gamma) + message[1:, s2] - after[:, 0, 0, s2]) if gamma > 0 else 0.0
    taken = exact.state[:, s] * np.nan_to_num(exact.action[:, s, a]) > 1e-200
    expected = np.where(taken, exact.transition[:, s, a, s2], 0.0) * alive
    got = np.where(taken, result.details.posterior_transition.numpy(), 0.0)
    close(got, expected, 1e-14 * nats + 1e-10)
    objective = oracles.objective(tables, policy, temperature)
    close(result.objective, objective, 1e-10 * (reach(tables) + temperature))


@LIGHT
@given(oracles.finite_tables(max_states=3, max_actions=2, discounts=(1.0,)), oracles.temperatures())
def test_gap_and_its_parts(tables: Tables, temperature: float) -> None:
    result = infer(model_of(tables), Exact(temperature))
    conditioned = infer(model_of(tables), Exact(temperature, "posterior"))
    gap = result.gap
    assert gap is not None
    assert conditioned.gap == gap
    nats = max(1.0, reach(tables) / temperature)
    best = oracles.brute_force_control(tables, temperature)
    exact = oracles.brute_force_posterior(tables, temperature)
    total = exact.log_evidence - best.objective / temperature
    close(gap.log_evidence, exact.log_evidence, 1e-10 * nats)
    close(gap.total, total, 1e-10 * nats)
    close(gap.start + gap.policy + gap.dynamics, total, 1e-10 * nats)
    assert min(gap.start, gap.policy, gap.dynamics) >= -1e-10 * nats
    if nats > 500:
        return  # probabilities underflow, and with them the definition below
    # KL(q ‖ p(τ|O)), term by term along every path that the policy can take.
    paths = oracles.every_path(tables)
    policy = tables.idle(best.policy)
    log_policy = paths.log_policy(policy)
    weight = np.exp(paths.log_dynamics + log_policy.sum(0))
    taken = weight > 0
    move = (paths.states[:-1], paths.actions, paths.states[1:])
    when = np.arange(len(paths.actions))[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        start = np.log(tables.initial / exact.initial)[paths.states[0]]
        chosen = log_policy - np.log(exact.action[when, move[0], move[1]])
        moved = np.log(tables.stopped().transition[move] / exact.transition[when, *move])
    running = ~tables.terminal[paths.states[:-1]]
    for got, terms in (
        (gap.start, start),
        (gap.policy, np.where(running, chosen, 0.0).sum(0)),
        (gap.dynamics, np.where(running, moved, 0.0).sum(0)),
    ):
        close(got, (weight[taken] * terms[taken]).sum(), 1e-10 * nats)


def evidence_system(case: Tables, temperature: float) -> tuple[Any, Any, float]:
    """z = constant + matrix z for z = exp V, and the spectral radius of the matrix."""
    live, stopped = ~case.terminal, case.stopped()
    kernel = stopped.prior[..., None] * stopped.transition * np.exp(stopped.reward / temperature)
    weights = kernel.sum(1)[live]
    ends = (1 - case.discount) * weights.sum(-1) + case.discount * weights[:, ~live].sum(-1)
    matrix = case.discount * weights[:, live]
    return ends, matrix, float(np.abs(np.linalg.eigvals(matrix)).max())


@LIGHT
@given(oracles.finite_tables(scales=(1e-3, 0.1, 1.0)))
def test_posterior_without_horizon_is_a_linear_system(tables: Tables) -> None:
    assume(not tables.terminal.all())
    for case in (forever(tables), ending(tables)):
        if case.discount == 1 and case.states == tables.states:
            continue
        ends, matrix, radius = evidence_system(case, 2.0)
        if radius > 1.001:
            with pytest.raises(ValueError, match="evidence"):
                infer(model_of(case), Exact(2.0, "posterior"))
            result = infer(model_of(case), Exact(2.0))  # control does not mind
            assert result.log_evidence is None
            assert result.gap is None
            assert "evidence" in result.evidence.reason
        elif radius < 0.99:
            result = infer(model_of(case), Exact(2.0, "posterior"))
            z = np.ones(case.states)
            z[~case.terminal] = np.linalg.solve(np.eye(len(ends)) - matrix, ends)
            close(result.v / 2.0, np.log(z), 1e-10)
            close(result.log_evidence, np.log(case.initial @ z), 1e-10)
            close(result.details.posterior_initial, case.initial * z / (case.initial @ z), 1e-10)
            stopped, gamma = case.stopped(), case.discount
            kernel = stopped.transition * np.exp(stopped.reward / 2.0)
            beta = kernel @ (1 - gamma + gamma * z)
            chosen = stopped.prior * beta / (stopped.prior * beta).sum(-1, keepdims=True)
            live = ~case.terminal
            policy = result.policy.probs.numpy()
            close(policy[live], chosen[live], 1e-10)
            earned = oracles.linear_solve_value(case, policy, 2.0)
            close(result.objective, case.initial @ earned, 1e-10 * max(1, reach(case)))
            model = model_of(case)
            rows = model.rows().numpy()
            s, a, s2 = rows // case.actions, rows % case.actions, model.successors.numpy()
            moved = (kernel * gamma * z / beta[..., None])[s, a, s2]
            close(result.details.posterior_transition, moved, 1e-10)
            gap = result.gap
            close(gap.start + gap.policy + gap.dynamics, gap.total, 1e-9)


def test_acting_on_the_posterior_draws_a_warning_of_how_optimistic_it_is() -> None:
    model = model_of(example())
    gap = infer(model, Exact(0.7)).gap
    assert gap is not None
    with pytest.warns(UserWarning, match=f"optimistic by {gap.total:.3g} nats"):
        infer(model, Exact(0.7, "posterior"))


# --- Survival, programs, Pyro ---------------------------------------------------------------------


@LIGHT
@given(oracles.finite_tables(max_states=3), oracles.temperatures())
def test_discount_is_survival(tables: Tables, temperature: float) -> None:
    """Both targets on a discounted model are those of the undiscounted one that may die."""
    cases = [tables] if tables.discount == 1 or tables.terminal.all() else [tables, forever(tables)]
    for case in cases:
        model, nats = model_of(case), max(1.0, reach(case) / temperature)
        mortal = model.with_survival()
        assert mortal.discount == 1
        discounted, dying = (infer(m, Exact(temperature)) for m in (model, mortal))
        close(dying.v[..., : case.states], discounted.v, 1e-10 * reach(case))
        close(dying.objective, discounted.objective, 1e-10 * reach(case))
        same = dying.policy.probs[..., : case.states, :]
        live = ~case.terminal
        close(same[..., live, :], discounted.policy.probs[..., live, :].numpy(), 1e-13 * nats)
        if discounted.gap is None:
            assert dying.gap is None
            continue
        assert dying.gap is not None
        for name, value in dataclasses.asdict(discounted.gap).items():
            close(getattr(dying.gap, name), value, 1e-9 * nats)
        discounted, dying = (infer(m, Exact(temperature, "posterior")) for m in (model, mortal))
        close(dying.v[..., : case.states], discounted.v, 1e-10 * nats * temperature)
        same = dying.policy.probs[..., : case.states, :]
        close(same[..., live, :], discounted.policy.probs[..., live, :].numpy(), 1e-13 * nats)
        survivors = dying.details.posterior_transition[..., 0::2]
        close(survivors, discounted.details.posterior_transition.numpy(), 1e-13 * nats)


class Written(EnvironmentModel):
    """Tables as a program, in either of two forms of next state."""

    def __init__(self, tables: Tables, form: str) -> None:
        self.state_space, self.action_space = Discrete(tables.states), Discrete(tables.actions)
        self.discount, self.horizon, self.form = tables.discount, tables.horizon, form
        self.tables = {
            field.name: torch.as_tensor(getattr(tables, field.name))
            for field in dataclasses.fields(tables)
            if isinstance(getattr(tables, field.name), np.ndarray)
        }

    def _states(self, probs: Tensor) -> Any:
        if self.form == "categorical":
            return dist.Categorical(probs)
        # Backwards, and with one entry split in two: neither may matter.
        states = torch.arange(probs.shape[-1]).flip(-1).expand(probs.shape)
        states, probs = (torch.cat([x, x[..., :1]], -1) for x in (states, probs.flip(-1)))
        half = torch.ones(probs.shape[-1])
        half[0] = half[-1] = 0.5
        return SparseCategorical(states, probs * half)

    def initial_state(self) -> Any:
        return self._states(self.tables["initial"])

    def transition(self, state: Tensor, action: Tensor) -> Any:
        return self._states(self.tables["transition"][state, action])

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return self.tables["reward"][state, action, next_state]

    def terminal(self, state: Tensor) -> Tensor:
        return self.tables["terminal"][state]

    def action_prior(self, state: Tensor) -> Any:
        return dist.Categorical(self.tables["prior"][state])


@pytest.mark.parametrize("form", ["categorical", "sparse"])
def test_tabulated_program_is_its_tables(form: str) -> None:
    @LIGHT
    @given(oracles.finite_tables())
    def run(tables: Tables) -> None:
        program, direct = tabulate(Written(tables, form)), model_of(tables)
        live = ~torch.as_tensor(tables.terminal)
        for name, table in direct.tensors().items():
            got = program.tensors()[name]
            if name == "log_prior":  # nobody acts at terminal states
                table, got = table[live], got[live]
            if not table.is_floating_point():
                assert torch.equal(got, table), name
            torch.testing.assert_close(got, table, rtol=1e-15, atol=0)
        assert (program.discount, program.horizon) == (direct.discount, direct.horizon)

    run()


def test_inference_takes_a_program_or_its_tables() -> None:
    tables = example()
    for target in TARGETS:
        program, direct = (
            infer(m, Exact(0.7, target))  # type: ignore[arg-type]
            for m in (Written(tables, "sparse"), model_of(tables))
        )
        close(program.v, direct.v.numpy(), 1e-14)
        close(program.objective, float(direct.objective), 1e-14)
        close(program.log_evidence, float(direct.log_evidence), 1e-14)


def reading(model: EnvironmentModel, horizon: int, temperature: float) -> Callable[[], Tensor]:
    """p(τ, O) as a program without arguments."""
    return lambda: trajectory(
        model, lambda state, t=None: model.action_prior(state), horizon, temperature=temperature
    )


@settings(LIGHT, max_examples=20)
@given(oracles.finite_tables(max_states=3, max_actions=2, max_horizon=3, scales=(0.1, 1.0, 10.0)))
def test_pyro_enumeration_of_the_same_program_agrees(tables: Tables) -> None:
    model, steps = model_of(tables), int(tables.horizon or 0)
    result = infer(model, Exact(0.7))
    elbo = TraceEnum_ELBO(max_plate_nesting=0)
    guide = config_enumerate(lambda: trajectory(model, result.policy, steps))
    got = -0.7 * elbo.loss(reading(model, steps, 0.7), guide)
    close(got, float(result.objective), 1e-10 * max(1, reach(tables)))
    if tables.discount == 1:
        got = -elbo.loss(config_enumerate(reading(model, steps, 0.7)), lambda: None)
        close(got, float(result.log_evidence), 1e-10 * max(1, reach(tables)))


def test_importance_sampling_of_the_same_program_agrees() -> None:
    """log p(O) within the interval of 20,000 weighted trajectories of the best guide."""
    paths = 20_000
    model = model_of(example(discount=1.0))
    result = infer(model, Exact(0.7))
    plate = pyro.plate("paths", paths)
    guide = poutine.trace(plate(lambda: trajectory(model, result.policy, 3))).get_trace()
    replayed = poutine.trace(poutine.replay(plate(reading(model, 3, 0.7)), guide)).get_trace()
    log_weight = torch.zeros(paths)
    for trace, sign in ((replayed, 1), (guide, -1)):
        trace.compute_log_prob()
        for node in trace.nodes.values():
            if node["type"] == "sample" and not site_is_subsample(node):
                log_weight = log_weight + sign * node["log_prob"]
    weight = log_weight.exp()
    error = float(weight.std()) / math.sqrt(paths)
    expected = math.exp(float(result.log_evidence))
    assert float(weight.mean()) == pytest.approx(expected, abs=4 * error)
    assert error < 0.02 * expected


# --- Sampling -------------------------------------------------------------------------------------

DRAWS = 20_000


def drawn(result: InferenceResult, **options: Any) -> dict[str, np.ndarray[Any, Any]]:
    tree = result.sample(DRAWS, seed=1, **options)
    columns = {**tree["posterior"].data_vars, **tree["sample_stats"].data_vars}
    return {name: column.values[0] for name, column in columns.items()}


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_samples_have_the_exact_distribution_of_whole_paths(target: str, ends: bool) -> None:
    """χ² over all (state, action)-sequences of two steps, at a level of 10^-4."""
    tables = example(horizon=2, discount=1.0, ends=ends)
    result = infer(model_of(tables), Exact(0.7, target))  # type: ignore[arg-type]
    paths = oracles.every_path(tables)
    if target == "control":
        policy = paths.log_policy(result.policy.probs.numpy())  # the sampler acts after the end too
        probs = np.exp(paths.log_dynamics + policy.sum(0))
    else:
        habit = paths.log_policy(tables.prior).sum(0)
        probs = np.exp(paths.log_dynamics + habit + paths.rewards.sum(0) / 0.7)
        probs /= probs.sum()
    columns = drawn(result)
    place = {tuple(x): i for i, x in enumerate(np.vstack([paths.states, paths.actions]).T)}
    found = np.hstack([columns["state"], columns["action"]])
    counts = np.bincount([place[tuple(x)] for x in found], minlength=len(probs))
    assert counts[probs == 0].sum() == 0
    common = probs * DRAWS >= 5
    observed, expected = (np.append(x[common], x[~common].sum()) for x in (counts, probs * DRAWS))
    keep = expected > 0
    assert scipy.stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-4
    states, actions = columns["state"], columns["action"]
    alive = ~tables.terminal[states[:, :-1]]
    np.testing.assert_array_equal(columns["alive"], alive)
    paid = tables.stopped().reward[states[:, :-1], actions, states[:, 1:]]
    np.testing.assert_array_equal(columns["reward"], paid)
    np.testing.assert_allclose(columns["return"], paid.sum(1), atol=1e-15)


def test_posterior_samples_die_as_often_as_they_should() -> None:
    """p(alive, s_t | O) with a discount: each frequency within 4.5 standard errors."""
    tables = example(horizon=4, discount=0.6)
    columns = drawn(infer(model_of(tables), Exact(0.7, "posterior")))
    exact = oracles.brute_force_posterior(tables, 0.7).state
    for t, s in itertools.product(range(4), (0, 1)):
        got = (columns["alive"][:, t] & (columns["state"][:, t] == s)).mean()
        expected = exact[t, s]
        error = math.sqrt(expected * (1 - expected) / DRAWS)
        assert got == pytest.approx(expected, abs=4.5 * error)


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("discount", [1.0, 0.8])
def test_posterior_weights_are_constant(discount: float, horizon: int | None) -> None:
    """p(τ, O) / p(τ | O) = p(O), whatever is drawn, and wherever the drawing stops."""
    tables = costly(example(horizon=horizon, discount=discount))
    result = infer(model_of(tables), Exact(1.5, "posterior"))
    for steps in (1, 3, 3 if horizon else 30):
        weights = drawn(result, horizon=steps)["log_weight"]
        close(weights, np.full(DRAWS, float(result.log_evidence)), 1e-11)


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("discount", [1.0, 0.8])
def test_control_weights_are_constant_if_nothing_is_random(
    discount: float, horizon: int | None
) -> None:
    tables = costly(example(horizon=horizon, discount=discount, certain=True))
    result = infer(model_of(tables), Exact(0.7))
    for steps in (1, 3, 3 if horizon else 30):
        weights = drawn(result, horizon=steps)["log_weight"]
        close(weights, np.full(DRAWS, float(result.objective) / 0.7), 1e-11)
    noisy = example(horizon=horizon, discount=discount)
    assert drawn(infer(model_of(noisy), Exact(0.7)), horizon=3)["log_weight"].std() > 0.1


@pytest.mark.parametrize("ends", [True, False])
def test_control_weights_average_to_the_evidence(ends: bool) -> None:
    result = infer(model_of(example(discount=1.0, ends=ends)), Exact(0.7))
    weights = np.exp(drawn(result)["log_weight"])
    error = weights.std() / math.sqrt(DRAWS)
    expected = math.exp(float(result.log_evidence))
    assert weights.mean() == pytest.approx(expected, abs=4 * error)
    assert error < 0.02 * expected


def test_log_weights_average_to_the_bound() -> None:
    """With a discount it is the mean of the logarithms that is known: J / temperature."""
    result = infer(model_of(example(discount=0.8, horizon=None)), Exact(0.7))
    weights = drawn(result, horizon=20)["log_weight"]
    error = weights.std() / math.sqrt(DRAWS)
    assert weights.mean() == pytest.approx(float(result.objective) / 0.7, abs=4 * error)


def test_regular_rl_samples_have_no_weights_and_act_greedily() -> None:
    result = infer(model_of(example()), Exact(0.0))
    columns = drawn(result)
    assert "log_weight" not in columns
    for t in range(3):
        alive = columns["alive"][:, t]
        states, actions = columns["state"][alive, t], columns["action"][alive, t]
        np.testing.assert_array_equal(actions, result.q[t].argmax(-1).numpy()[states])


@pytest.mark.parametrize(
    ("draws", "horizon", "message"),
    [(0, None, "at least one"), (1, 0, "at least one step"), (1, 4, "ends after 3 steps, got 4")],
)
def test_sampling_says_what_is_wrong(draws: int, horizon: int | None, message: str) -> None:
    result = infer(model_of(example()), Exact(0.7))
    with pytest.raises(ValueError, match=message):
        result.sample(draws, horizon=horizon)


# --- Gradients ------------------------------------------------------------------------------------

PARAMETERS = ["reward", "transition", "prior", "initial", "temperature"]


def outputs(target: str, horizon: int | None, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What exact inference returns, as a function of what it can be differentiated by."""
    tables = example(horizon=horizon, discount=0.8)
    terminal = torch.as_tensor(tables.terminal)
    reward = torch.where(terminal[:, None, None], 0.0, values["reward"])
    model = FiniteModel.from_tables(
        values["transition"].softmax(-1),
        reward,
        discount=0.8,
        initial=values["initial"].softmax(-1),
        prior=values["prior"].softmax(-1),
        terminal=terminal,
        horizon=horizon,
    )
    settings = Exact(values["temperature"], target, tolerance=1e-14)  # type: ignore[arg-type]
    result = infer(model, settings)
    assert result.log_evidence is not None
    probs = result.policy.probs  # type: ignore[attr-defined]
    return result.objective, result.v, result.q, probs, result.log_evidence


def starting_values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"reward": (3, 2, 3), "transition": (3, 2, 3), "prior": (3, 2), "initial": (3,)}
    values = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    # Impossible actions and moves stay impossible, and must not turn gradients into NaN.
    values["transition"][0, 0, 1] = values["prior"][1, 0] = values["initial"][1] = -torch.inf
    return values | {"temperature": torch.tensor(1.5, dtype=torch.float64)}


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("target", TARGETS)
def test_gradients_are_central_differences(target: str, horizon: int | None, name: str) -> None:
    values = starting_values()
    possible = values[name].isfinite()

    def perturbed(x: Tensor) -> tuple[Tensor, ...]:
        if possible.dim():
            x = torch.full_like(values[name], -torch.inf).masked_scatter(possible, x)
        return outputs(target, horizon, values | {name: x})

    at = values[name][possible] if possible.dim() else values[name]
    assert torch.autograd.gradcheck(perturbed, (at.clone().requires_grad_(),), atol=1e-7, rtol=1e-6)
    # In the original parameters, -inf included: finite, and the same.
    whole = values[name].clone().requires_grad_()
    objective, v, q, probs, evidence = outputs(target, horizon, values | {name: whole})
    total = objective + v.sum() + (q * torch.arange(2.0)).sum() + probs[..., 0].sum() + evidence
    (gradient,) = torch.autograd.grad(total, whole)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 1e-3


def test_gradient_of_the_control_objective_is_occupancy() -> None:
    """dJ/dr = how often each (s, a, s') is seen; dJ/d(temperature) = -divergence (envelope)."""
    values = {k: x.requires_grad_() for k, x in starting_values().items()}
    objective, *_ = outputs("control", None, values)
    by_reward, by_temperature = torch.autograd.grad(
        objective, [values["reward"], values["temperature"]]
    )
    model = Tables(
        values["transition"].detach().softmax(-1).numpy(),
        values["reward"].detach().numpy(),
        values["prior"].detach().softmax(-1).numpy(),
        values["initial"].detach().softmax(-1).numpy(),
        np.array([False, False, True]),
        0.8,
    )
    result = infer(model_of(model), Exact(1.5))
    visits = oracles.occupancy(model, result.policy.probs.numpy())
    close(by_reward, visits[..., None] * model.transition, 1e-12)
    close(by_temperature, -result.parts.divergence, 1e-12)


def test_gradient_of_the_log_evidence_is_posterior_occupancy() -> None:
    """d log p(O) / dr = E[how often (s, a, s') is seen | O] / temperature."""
    tables = example(horizon=3, discount=1.0)
    reward = torch.tensor(tables.stopped().reward, requires_grad=True)
    model = FiniteModel.from_tables(
        tables.transition,
        reward,
        initial=tables.initial,
        prior=tables.prior,
        terminal=tables.terminal,
        horizon=3,
    )
    result = infer(model, Exact(0.7))
    assert result.log_evidence is not None
    (gradient,) = torch.autograd.grad(result.log_evidence, reward)
    exact = oracles.brute_force_posterior(tables, 0.7)
    seen = exact.state[..., None, None] * exact.action[..., None] * exact.transition
    seen[:, tables.terminal] = 0.0
    close(gradient, seen.sum(0) / 0.7, 1e-13)


def test_second_derivatives_are_refused_where_they_would_be_wrong() -> None:
    values = starting_values()
    prior = values["prior"].requires_grad_()
    objective, *_ = outputs("control", None, values)
    with pytest.raises(NotImplementedError, match="differentiated once only"):
        torch.autograd.grad(objective, prior, create_graph=True)


# --- Temperature zero -----------------------------------------------------------------------------


@LIGHT
@given(oracles.finite_tables(max_states=3, scales=(1e-6, 1.0, 1e6)))
def test_temperature_zero_is_the_best_deterministic_policy(tables: Tables) -> None:
    """Backward induction with a maximum; ties are counted, and the first of them is taken."""
    result = infer(model_of(tables), Exact(0.0))
    stopped, steps = tables.stopped(), int(tables.horizon or 0)
    allowed = stopped.prior > 0
    value, scale = np.zeros(tables.states), reach(tables)
    for t in reversed(range(steps)):
        q = (stopped.transition * (stopped.reward + tables.discount * value)).sum(-1)
        value = np.where(allowed, q, -np.inf).max(-1)
        close(result.v[t], value, 1e-10 * scale)
        best = allowed & (q >= value[:, None] - 1e-11 * scale)
        counts = np.where(tables.terminal, 0, best.sum(-1))
        np.testing.assert_array_equal(result.details.ties[t].numpy(), counts)
        chosen = result.policy.probs[t].numpy()
        assert set(np.unique(chosen)) <= {0.0, 1.0}
        assert (chosen.sum(-1) == 1).all()
        assert best[np.arange(tables.states), chosen.argmax(-1)].all()
    close(result.objective, tables.initial @ value, 1e-10 * scale)
    close(result.parts.expected_return, tables.initial @ value, 1e-10 * scale)
    close(result.objective_entropy_form, tables.initial @ value, 1e-10 * scale)
    assert result.log_evidence is None
    assert result.gap is None


@pytest.mark.parametrize("horizon", HORIZONS)
def test_temperature_zero_is_the_limit(horizon: int | None) -> None:
    model = model_of(example(horizon=horizon))
    hard = infer(model, Exact(0.0))
    distances = []
    for temperature in (1e-1, 1e-3, 1e-5, 1e-7):
        soft = infer(model, Exact(temperature))
        below = (hard.v - soft.v).detach().numpy()
        # KL form: at most temperature · log(1 / least prior) a step, and never above.
        most = temperature * 10 * -float(model.log_prior.min())
        assert below.min() >= -1e-13
        assert below.max() <= most
        distances.append(below.max())
    assert distances[-1] < 1e-5
    live = ~model.is_terminal
    close(soft.policy.probs[..., live, :], hard.policy.probs[..., live, :].numpy(), 1e-12)


@pytest.mark.parametrize("horizon", HORIZONS)
def test_ties_are_reported_and_only_allowed_actions_tie(horizon: int | None) -> None:
    transition = np.zeros((2, 4, 2))
    transition[0, :, 1] = transition[1, :, 1] = 1.0
    reward = np.zeros((2, 4))
    reward[0] = [0.3, 1.0, 0.1 + 0.2 + 0.7, 5.0]  # the third is one up to rounding, or not at all
    prior = np.array([[0.2, 0.4, 0.4, 0.0], [0.25] * 4])
    model = FiniteModel.from_tables(
        transition, reward, prior=prior, discount=0.5, horizon=horizon, terminal=[False, True]
    )
    result = infer(model, Exact(0.0))
    ties = result.details.ties if horizon is None else result.details.ties[0]
    assert ties.tolist() == [2, 0]
    assert result.policy(torch.tensor(0), 0).probs.argmax() == 1
    assert float(result.v.flatten()[0]) == pytest.approx(1.0, abs=1e-15)
    assert infer(model, Exact(1e-3)).details.ties is None


def test_cliff_walking_takes_thirteen_steps() -> None:
    result = infer(load_target("CliffWalking-v1", discount=1.0), Exact(0.0))
    start = 36
    assert float(result.v[start]) == -13.0
    assert result.error_bound is not None
    assert result.error_bound < 1e-9
    assert float(result.objective) == -13.0
    evaluation = result.evaluate(episodes=3, deterministic=True)
    assert evaluation.returns.tolist() == [-13.0] * 3


@pytest.mark.parametrize(
    ("slippery", "value", "state", "ties"), [(False, 1.0, 1, 3), (True, 14 / 17, 14, 1)]
)
def test_without_discount_the_greedy_policy_does_not_put_off_the_end(
    slippery: bool, value: float, state: int, ties: int
) -> None:
    """Waiting is free, and ties with walking on: but a policy that waits for ever earns nothing."""
    kwargs = {"is_slippery": slippery}
    result = infer(load_target("FrozenLake-v1", discount=1.0, env_kwargs=kwargs), Exact(0.0))
    assert float(result.objective) == pytest.approx(value, abs=1e-12)
    assert result.parts.expected_return == pytest.approx(value, abs=1e-12)
    assert result.parts.steps > 0
    policy = result.policy.probs.numpy()  # type: ignore[attr-defined]
    model: Any = result.model
    tables = Tables(
        np.where(
            model.is_terminal.numpy()[:, None, None],
            np.eye(16)[:, None],
            model.csr.toarray().reshape(16, 4, 16),
        ),
        np.zeros((16, 4, 16)),
        prior=np.full((16, 4), 0.25),
        initial=model.initial.numpy(),
        terminal=model.is_terminal.numpy(),
    )
    tables.reward[..., 15] = 1.0
    earned = oracles.linear_solve_value(tables, policy, 0.0)
    close(earned, result.v.numpy(), 1e-12)
    assert result.details.ties[state] == ties  # three ways keep off the hole; one is best


@pytest.mark.parametrize("name", ["FrozenLake-v1", "FrozenLake8x8-v1"])
def test_lakes_without_discount_are_certified_though_waiting_is_free(name: str) -> None:
    """Against sweeps from zero, which rise to the best policy's chance to reach the goal."""
    result = infer(load_target(name, discount=1.0), Exact(0.0))
    model: Any = result.model
    reward, moves = model.expected_reward().numpy(), model.csr
    value, before = np.zeros(model.num_states), None
    while before is None or np.abs(value - before).max() > 1e-18:
        before = value
        value = (reward + (moves @ value).reshape(reward.shape)).max(-1)
    assert result.error_bound is not None
    assert np.abs(result.v.numpy() - value).max() <= result.error_bound <= 1e-10
    assert float(result.objective) == pytest.approx(float(result.v[0]), abs=1e-12)


def test_gradient_without_discount_is_that_of_a_policy_that_ends() -> None:
    """The first of two best actions waits; what counts is the reward for leaving."""
    moves = torch.zeros(2, 2, 2)
    moves[0, 0, 0] = moves[0, 1, 1] = 1.0
    reward = torch.tensor([[0.0, 3.0], [0.0, 0.0]], requires_grad=True)
    model = FiniteModel.from_tables(moves, reward, terminal=[False, True], initial=[1.0, 0.0])
    result = infer(model, Exact(0.0))
    assert result.details.ties.tolist() == [2, 0]
    for output in (result.objective, result.v[0]):
        (gradient,) = torch.autograd.grad(output, reward, retain_graph=True)
        assert gradient.tolist() == [[0.0, 1.0], [0.0, 0.0]]


def lake(discount: float) -> InferenceResult:
    return infer(load_target("FrozenLake-v1", discount=discount), Exact(0.0))


def test_frozen_lake_greedy_policy_reaches_the_goal_as_often_as_is_known() -> None:
    """0.74 within 100 steps, by powers of the transition matrix, for γ of 0.99 to 0.9999."""
    for discount in (0.99, 0.999, 0.9999):
        result = lake(discount)
        model: Any = result.model
        greedy = result.policy.probs.argmax(-1)  # type: ignore[attr-defined]
        rows = torch.arange(16) * 4 + greedy
        moves = torch.as_tensor(model.csr.toarray())[rows]
        moves[model.is_terminal] = torch.eye(16)[model.is_terminal]
        reached = model.initial @ torch.linalg.matrix_power(moves, 100)
        assert float(reached[15]) == pytest.approx(0.7400, abs=2e-3)


def test_frozen_lake_greedy_policy_in_ten_thousand_real_episodes() -> None:
    evaluation = lake(0.999).evaluate(10_000, seed=0, deterministic=True, max_steps=100)
    assert evaluation.returns.mean() == pytest.approx(0.74, abs=0.02)


# --- Extremes, in sixty digits --------------------------------------------------------------------

TEMPERATURES = [1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9]


def mp_soft_value(q: Any, prior: Any, temperature: float) -> Any:
    """`oracles.mp_soft_backup` under a prior that sums to one exactly."""
    with mpmath.workdps(oracles.DIGITS):
        chances = [mpmath.mpf(float(p)) for p in prior]
        total = mpmath.fsum(chances)
        values = [x if isinstance(x, mpmath.mpf) else mpmath.mpf(float(x)) for x in q]
        return oracles.mp_soft_backup(values, [p / total for p in chances], temperature)


def mp_backup(case: Tables, value: list[Any], temperature: float, target: str) -> list[Any]:
    """One step of either recursion: reward units for control, nats for the posterior."""
    with mpmath.workdps(oracles.DIGITS):
        gamma, scale = mpmath.mpf(case.discount), mpmath.mpf(temperature)
        backed = []
        for s in range(case.states):
            if case.terminal[s]:
                backed.append(mpmath.mpf(0))
                continue
            q = []
            for a in range(case.actions):
                p, r = (
                    [mpmath.mpf(float(x)) for x in table[s, a]]
                    for table in (case.transition, case.reward)
                )
                if target == "control":
                    terms = [pk * (rk + gamma * v) for pk, rk, v in zip(p, r, value, strict=True)]
                    q.append(mpmath.fsum(terms))
                else:
                    terms = [
                        pk * mpmath.exp(rk / scale) * (1 - gamma + gamma * mpmath.exp(v))
                        for pk, rk, v in zip(p, r, value, strict=True)
                    ]
                    q.append(mpmath.log(mpmath.fsum(terms) / mpmath.fsum(p)))
            backed.append(
                mp_soft_value(q, case.prior[s], temperature if target == "control" else 1)
            )
        return backed


def mp_fixed_point(case: Tables, temperature: float, near: Any) -> list[Any]:
    """V* of control by Newton's method in sixty digits, from a value that is near already."""
    with mpmath.workdps(oracles.DIGITS):
        value = [mpmath.mpf(float(x)) for x in near]
        live = [s for s in range(case.states) if not case.terminal[s]]
        gamma, scale = mpmath.mpf(case.discount), mpmath.mpf(temperature)
        for _ in range(4):
            backed = mp_backup(case, value, temperature, "control")
            system = mpmath.eye(len(live))
            for i, s in enumerate(live):
                weights = []
                for a in range(case.actions):
                    q = mpmath.fsum(
                        mpmath.mpf(float(case.transition[s, a, x]))
                        * (mpmath.mpf(float(case.reward[s, a, x])) + gamma * value[x])
                        for x in range(case.states)
                    )
                    chance = mpmath.mpf(float(case.prior[s, a]))
                    weights.append(chance * mpmath.exp((q - backed[s]) / scale))
                total = mpmath.fsum(weights)
                for j, x in enumerate(live):
                    system[i, j] -= gamma * mpmath.fsum(
                        w / total * mpmath.mpf(float(case.transition[s, a, x]))
                        for a, w in enumerate(weights)
                    )
            change = mpmath.matrix([backed[s] - value[s] for s in live])
            step = mpmath.lu_solve(system, change)
            for i, s in enumerate(live):
                value[s] += step[i]
        moved = max(
            abs(b - v)
            for b, v in zip(mp_backup(case, value, temperature, "control"), value, strict=True)
        )
        size = max(abs(v) for v in value)
        assert moved <= mpmath.mpf(10) ** -40 * (1 + size)
        return value


def distance(got: Tensor, exact: list[Any]) -> float:
    with mpmath.workdps(oracles.DIGITS):
        pairs = zip(got.detach().tolist(), exact, strict=True)
        return float(max(abs(mpmath.mpf(x) - y) for x, y in pairs))


def size_of(exact: list[Any]) -> float:
    return float(max(abs(x) for x in exact))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("actions", [1, 3, 1000])
def test_bandits_at_every_temperature(actions: int, temperature: float) -> None:
    """Ordinary, tiny, huge and nearly impossible: priors down to 1e-300."""
    random = np.random.default_rng(actions)
    for prior in (np.ones(actions), 10.0 ** random.uniform(-300, 0, actions)):
        prior = prior / prior.sum()
        for scale in (1e-8, 1.0, 1e8):
            reward = scale * random.normal(size=(1, actions))
            exact = mp_soft_value(reward[0], prior, temperature)
            for horizon in (1, None):
                model = FiniteModel.from_tables(
                    np.ones((1, actions, 1)),
                    reward,
                    prior=prior[None],
                    discount=0.0,
                    horizon=horizon,
                )
                result = infer(model, Exact(temperature))
                got = float(result.v.flatten()[0])
                assert abs(float(got - exact)) <= 1e-10 * abs(reward).max()
                assert result.error_bound is not None
                assert abs(float(got - exact)) <= result.error_bound


@pytest.mark.parametrize("temperature", [1e-6, 1e-2, 1e9])
def test_a_hundred_thousand_actions(temperature: float) -> None:
    random = np.random.default_rng(0)
    reward = random.normal(size=(1, 100_000))
    prior = random.dirichlet(np.ones(100_000))[None]
    transition = scipy.sparse.csr_array(np.ones((100_000, 1)))
    model = FiniteModel.from_tables(transition, reward, prior=prior, horizon=1)
    result = infer(model, Exact(temperature))
    with mpmath.workdps(30):
        top = mpmath.mpf(reward.max())
        # Only what weighs anything at thirty digits need be added.
        kept = np.flatnonzero((reward[0] - reward.max()) / temperature > -80)
        total = mpmath.fsum(
            mpmath.mpf(prior[0, i]) * mpmath.exp((mpmath.mpf(reward[0, i]) - top) / temperature)
            for i in kept
        )
        mass = mpmath.fsum(map(mpmath.mpf, prior[0].tolist()))
        exact = top + temperature * mpmath.log(total / mass)
        assert abs(float(mpmath.mpf(float(result.objective)) - exact)) <= 1e-10


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("target", TARGETS)
def test_finite_horizons_at_every_temperature(target: str, temperature: float) -> None:
    for discount, ends in ((1.0, False), (0.75, True)):
        case = dyadic(4, discount, ends=ends)
        result = infer(model_of(case), Exact(temperature, target))  # type: ignore[arg-type]
        exact: list[Any] = [mpmath.mpf(0)] * 3
        for _ in range(4):
            exact = mp_backup(case.stopped(), exact, temperature, target)
        if target == "posterior":
            exact = [x * mpmath.mpf(temperature) for x in exact]
        error = distance(result.v[0], exact)
        assert error <= 1e-10 * size_of(exact)
        assert result.error_bound is not None
        assert error <= result.error_bound


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_infinite_control_at_every_temperature(temperature: float) -> None:
    for discount, ends in ((0.0, False), (0.9, False), (0.9, True), (0.99, False)):
        case = dyadic(None, discount, ends=ends)
        result = infer(model_of(case), Exact(temperature))
        exact = mp_fixed_point(case.stopped(), temperature, result.v)
        error = distance(result.v, exact)
        assert error <= 1e-10 * size_of(exact)
        assert result.error_bound is not None
        assert error <= result.error_bound


def mp_log_evidence(case: Tables, temperature: float) -> list[Any]:
    """V^x in nats: the logarithm of what solves a linear system, for rows that sum to one."""
    with mpmath.workdps(oracles.DIGITS):
        gamma, scale = mpmath.mpf(case.discount), mpmath.mpf(temperature)
        system, right = mpmath.eye(case.states), mpmath.zeros(case.states, 1)
        for s in range(case.states):
            if case.terminal[s]:
                right[s] = 1
                continue
            prior = [mpmath.mpf(float(x)) for x in case.prior[s]]
            for a in range(case.actions):
                chances = [mpmath.mpf(float(x)) for x in case.transition[s, a]]
                share = prior[a] / mpmath.fsum(prior) / mpmath.fsum(chances)
                for t, chance in enumerate(chances):
                    weight = share * chance * mpmath.exp(float(case.reward[s, a, t]) / scale)
                    right[s] += (1 - gamma) * weight
                    system[s, t] -= gamma * weight
        return [mpmath.log(z) for z in mpmath.lu_solve(system, right)]


def mp_posterior_q(case: Tables, nats: list[Any], temperature: float) -> list[Any]:
    """Q^x in nats, one after another of the states that are not terminal."""
    gamma, scale = mpmath.mpf(case.discount), mpmath.mpf(temperature)
    after = [1 - gamma + gamma * mpmath.exp(x) for x in nats]
    q = []
    for s, a in itertools.product(np.flatnonzero(~case.terminal), range(case.actions)):
        chances = [mpmath.mpf(float(x)) for x in case.transition[s, a]]
        weights = [mpmath.exp(float(x) / scale) for x in case.reward[s, a]]
        terms = [p * w * z for p, w, z in zip(chances, weights, after, strict=True)]
        q.append(mpmath.log(mpmath.fsum(terms) / mpmath.fsum(chances)))
    return q


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("discount", [0.5, 0.9, 0.99, 1.0])
def test_infinite_posterior_at_every_temperature(temperature: float, discount: float) -> None:
    """Ten digits of V itself, of a billionth of a nat as of a million nats."""
    for ends in (False, True):
        case = dyadic(None, min(discount, 0.99), ends=ends)
        case = (costly(ending(case)) if discount == 1 else costly(case)).stopped()
        result = infer(model_of(case), Exact(temperature, "posterior"))
        nats = mp_log_evidence(case, temperature)
        with mpmath.workdps(oracles.DIGITS):
            backed = mp_backup(case, nats, temperature, "posterior")
            left = max(abs(x - y) for x, y in zip(backed, nats, strict=True))
            assert left <= mpmath.mpf(10) ** -35 * size_of(nats), "the oracle is wrong"
            exact = [x * mpmath.mpf(temperature) for x in nats]
            exact_q = [x * mpmath.mpf(temperature) for x in mp_posterior_q(case, nats, temperature)]
            weighed = [p * mpmath.exp(x) for p, x in zip(case.initial.tolist(), nats, strict=True)]
            evidence = mpmath.log(mpmath.fsum(weighed))
            assert abs(float(result.log_evidence) - evidence) <= 1e-10 * abs(evidence)
        error = distance(result.v, exact)
        assert error <= 1e-10 * size_of(exact)
        assert result.error_bound is not None
        assert error <= result.error_bound <= 1e-9 * size_of(exact)
        live = ~case.terminal
        assert distance(result.q[live].flatten(), exact_q) <= 1e-10 * size_of(exact_q)
        gap = result.gap
        whole = 1e-10 * (abs(gap.log_evidence) + abs(gap.max_elbo))
        close(gap.start + gap.policy + gap.dynamics, gap.total, whole)


def test_ten_thousand_steps() -> None:
    """Two states, either of which may follow; a recursion in twenty-five digits."""
    reward, prior = [[1.0, -0.5], [0.25, 2.0]], [[0.75, 0.25], [0.5, 0.5]]
    moves = [[[0.25, 0.75], [1.0, 0.0]], [[0.5, 0.5], [0.875, 0.125]]]
    model = FiniteModel.from_tables(moves, reward, prior=prior, horizon=10_000)
    result = infer(model, Exact(0.5))
    with mpmath.workdps(25):
        exact = [mpmath.mpf(0)] * 2
        for _ in range(10_000):
            exact = [
                mpmath.log(
                    mpmath.fsum(
                        h * mpmath.exp(2 * (r + p[0] * exact[0] + p[1] * exact[1]))
                        for h, r, p in zip(*row, strict=True)
                    )
                )
                / 2
                for row in zip(prior, reward, moves, strict=True)
            ]
    error = distance(result.v[0], exact)
    assert error <= 1e-10 * size_of(exact)
    assert result.error_bound is not None
    assert error <= result.error_bound


def test_ten_thousand_posterior_steps_have_a_closed_form() -> None:
    """One state: log p(O) = T log Σ ρ e^{r/α}, to ten digits at every temperature."""
    reward, prior = np.array([[0.5, -1.0]]), np.array([[0.25, 0.75]])
    for temperature, steps in ((1e-6, 1000), (1.0, 1000), (1e9, 10_000)):
        model = FiniteModel.from_tables(np.ones((1, 2, 1)), reward, prior=prior, horizon=steps)
        exact = steps * mp_soft_value(reward[0] / temperature, prior[0], 1.0)
        got = infer(model, Exact(temperature)).log_evidence
        assert float(got) == pytest.approx(float(exact), rel=1e-10)


@pytest.mark.parametrize("distance_from_one", [1e-3, 1e-5, 1e-7, 1e-9])
@pytest.mark.parametrize("temperature", [0.1, 10.0])
def test_discounts_close_to_one(temperature: float, distance_from_one: float) -> None:
    """Within ten roundings over 1 - γ, and within the bound."""
    case = dyadic(None, 1 - distance_from_one)
    result = infer(model_of(case), Exact(temperature))
    exact = mp_fixed_point(case, temperature, result.v)
    error = distance(result.v, exact)
    assert error <= 10 * 2e-16 / distance_from_one * size_of(exact)
    assert result.error_bound is not None
    assert error <= result.error_bound


@LIGHT
@given(oracles.finite_tables(max_states=3), oracles.temperatures())
def test_the_error_bound_bounds_the_error(tables: Tables, temperature: float) -> None:
    """Finite horizons in sixty digits; the same in the stationary case."""
    result = infer(model_of(tables), Exact(temperature))
    exact: list[Any] = [mpmath.mpf(0)] * tables.states
    for _ in range(int(tables.horizon or 0)):
        exact = mp_backup(tables.stopped(), exact, temperature, "control")
    assert result.error_bound is not None
    assert distance(result.v[0], exact) <= result.error_bound
    if tables.discount < 1 and not tables.terminal.all() and reach(tables) < 1e5 * temperature:
        case = forever(tables)
        result = infer(model_of(case), Exact(temperature))
        exact = mp_fixed_point(case.stopped(), temperature, result.v)
        assert result.error_bound is not None
        assert distance(result.v, exact) <= result.error_bound


# --- Saved runs -----------------------------------------------------------------------------------


def sticky(model: EnvironmentModel) -> StickyPrior:
    return StickyPrior(model.action_space, 0.9)


CASES: dict[str, Callable[[], InferenceResult]] = {
    "python model, finite horizon": lambda: infer(model_of(example()), Exact(0.7)),
    "python model, infinite": lambda: infer(model_of(example(horizon=None)), Exact(0.7)),
    "python model, posterior": lambda: infer(model_of(example()), Exact(0.7, "posterior")),
    "python model, temperature zero": lambda: infer(model_of(example()), Exact(0.0)),
    "python program, sticky": lambda: infer(
        program := Written(example(), "sparse"), Exact(0.7), prior=sticky(program)
    ),
    "gymnasium": lambda: infer(load_target("FrozenLake-v1"), Exact(0.1)),
    "gymnasium, sticky": lambda: infer(
        lake := load_target("FrozenLake-v1"), Exact(0.1), prior=sticky(lake)
    ),
    "gymnasium, python prior": lambda: infer(
        load_target("FrozenLake-v1"), Exact(0.1), prior=CategoricalPrior([0.7, 0.1, 0.1, 0.1])
    ),
    "bundled program": lambda: infer(load_target("cliff"), Exact(0.1)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_saved_run_is_the_run(case: str, tmp_path: Path) -> None:
    result = CASES[case]()
    result.save(tmp_path / "run")
    loaded = InferenceResult.load(tmp_path / "run")
    assert torch.equal(loaded.policy.probs, result.policy.probs)  # type: ignore[attr-defined]
    assert torch.equal(loaded.q, result.q)
    assert torch.equal(loaded.v, result.v)
    assert loaded.summary() == result.summary()
    for name in ("objective", "log_evidence", "gap", "parts", "error_bound", "routine", "seed"):
        got, expected = getattr(loaded, name), getattr(result, name)
        assert got == (float(expected) if isinstance(expected, Tensor) else expected), name
    # The model comes back with its prior: paths, and their weights, are the same draw for draw.
    assert isinstance(loaded.model, FiniteModel)
    for name, table in result.model.tensors().items():  # type: ignore[attr-defined]
        assert torch.equal(loaded.model.tensors()[name], table), name
    columns, again = (r.sample(50, horizon=3, seed=4) for r in (result, loaded))
    for group in ("posterior", "sample_stats"):
        assert columns[group].to_dataset().identical(again[group].to_dataset())
    if result.model.gymnasium_id is not None:
        first, second = (r.evaluate(5, seed=2) for r in (result, loaded))
        np.testing.assert_array_equal(first.returns, second.returns)
    # And it can be saved again.
    loaded.save(tmp_path / "again")
    assert InferenceResult.load(tmp_path / "again").summary() == result.summary()


def test_a_differentiated_result_can_be_saved(tmp_path: Path) -> None:
    temperature = torch.tensor(0.7, requires_grad=True)
    result = infer(model_of(example()), Exact(temperature))  # type: ignore[arg-type]
    result.save(tmp_path / "run")
    assert InferenceResult.load(tmp_path / "run").temperature == pytest.approx(0.7)


def damage(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        (run / name).write_bytes(change((run / name).read_bytes()))

    return apply


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def edited(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(runs.sealed(json.loads(content) | changes)).encode()


@pytest.mark.parametrize(
    ("harm", "kind", "message"),
    [
        (damage("policy.safetensors", flipped), ValueError, "policy.safetensors.*damaged"),
        (damage("messages.safetensors", flipped), ValueError, "messages.safetensors.*damaged"),
        (damage("model.safetensors", flipped), ValueError, "model.safetensors.*damaged"),
        (damage("policy.safetensors", lambda c: c[:40]), ValueError, "policy.safetensors.*damaged"),
        (lambda run: (run / "policy.safetensors").unlink(), ValueError, "missing"),
        (damage("run.json", lambda c: c[: len(c) // 2]), ValueError, "run.json is damaged"),
        (damage("run.json", lambda c: b"[]"), ValueError, "run.json is damaged"),
        (damage("run.json", lambda c: c.replace(b'"seed": 0', b'"seed": 1')), ValueError, "edited"),
        (damage("run.json", edited(format_version=99)), ValueError, "format version 99"),
        (damage("run.json", edited(routine="magic")), ValueError, "unknown routine 'magic'"),
        (damage("run.json", edited(policy="magic")), ValueError, "policy of kind 'magic'"),
        (lambda run: (run / "run.json").unlink(), FileNotFoundError, "no saved run"),
    ],
)
def test_damaged_runs_are_refused(
    harm: Callable[[Path], None], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    infer(model_of(example()), Exact(0.7)).save(tmp_path / "run")
    harm(tmp_path / "run")
    with pytest.raises(kind, match=message):
        _ = InferenceResult.load(tmp_path / "run").model


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    result = infer(model_of(example()), Exact(0.7))
    result.save(tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(FileExistsError, match="holds another run"):
        infer(model_of(example()), Exact(0.1)).save(tmp_path / "run")
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_tables_may_be_read_only() -> None:
    tables = example()
    for table in (tables.transition, tables.reward, tables.prior, tables.initial, tables.terminal):
        table.flags.writeable = False
    fixed = dataclasses.replace(tables, terminal=np.broadcast_to(False, 3))
    model = model_of(fixed)
    assert float(infer(model, Exact(0.7)).objective) == pytest.approx(
        float(infer(model_of(example(ends=False)), Exact(0.7)).objective)
    )


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected a finite number >= 0.*got -1"),
        ({"temperature": math.inf}, "temperature: expected a finite number"),
        ({"temperature": math.nan}, "temperature: expected a finite number"),
        ({"target": "both"}, "target: expected 'control' or 'posterior', got 'both'"),
        ({"target": "posterior", "temperature": 0.0}, "posterior needs one above 0"),
        ({"tolerance": 0.0}, r"tolerance: expected a number in \(0, 1\)"),
    ],
)
def test_settings_say_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Exact(**arguments)


def test_no_discount_needs_an_end() -> None:
    with pytest.raises(ValueError, match="state 0 can never reach a terminal state"):
        infer(model_of(dyadic(None)), Exact(1.0))
