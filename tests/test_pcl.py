"""Path consistency: zero on every path at the solution, and its gradients, against other means."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from pyro import poutine
from torch import Tensor

from inference_rl import (
    PCL,
    CategoricalPrior,
    Exact,
    FiniteModel,
    InferenceResult,
    MaskPrior,
    infer,
    load_target,
)
from inference_rl.duals import solve_episodic
from inference_rl.inference.pcl import _Learner, follow, path_residual, residual_loss, unified
from inference_rl.learning.collection import Collector, Segment
from inference_rl.policies import TabularPolicy
from inference_rl.simulate import environments
from inference_rl.trajectory import trajectory

DISCOUNT, TEMPERATURE, STATES, ACTIONS = 0.8, 0.7, 5, 3


def model(seed: int = 0, *, random: bool = False, horizon: int | None = None) -> FiniteModel:
    """Random rewards and prior; states lead anywhere, the last one ends an episode."""
    rng = np.random.default_rng(seed)
    if random:
        transition = rng.dirichlet(np.ones(STATES), (STATES, ACTIONS))
    else:
        transition = np.eye(STATES)[rng.integers(STATES, size=(STATES, ACTIONS))]
        transition[0, 0] = np.eye(STATES)[-1]
    reward = rng.normal(size=(STATES, ACTIONS, STATES))
    reward[-1] = 0.0
    return FiniteModel.from_tables(
        transition,
        reward,
        discount=DISCOUNT,
        initial=np.r_[np.ones(STATES - 1), 0.0] / (STATES - 1),
        prior=rng.dirichlet(np.ones(ACTIONS) * 2, STATES),
        terminal=np.arange(STATES) == STATES - 1,
        horizon=horizon,
    )


def wandering(given: FiniteModel, steps: int = 12, slots: int = 60) -> Segment:
    """What a policy that is not the optimal one does; some episodes end, some are cut."""
    policy = TabularPolicy(torch.full((STATES, ACTIONS), 1 / ACTIONS, dtype=torch.float64))
    return Collector(environments(given, slots, 5), 3).collect(policy, steps)


def solution(given: FiniteModel, data: Segment) -> tuple[Tensor, Tensor, Tensor]:
    """log π*(a|s) − log ρ(a|s), V*(s) and V*(s'), where `data` went; V* = 0 where it terminated."""
    result = infer(given, Exact(TEMPERATURE, tolerance=1e-13))
    log_ratio = result.policy.probs.log() - given.log_prior
    if given.horizon is None:
        at = log_ratio[data.state, data.action]
        return at, result.v[data.state], result.v[data.next_state] * ~data.terminated
    here, after = result.v[data.step, data.state], result.v[data.step + 1, data.next_state]
    return log_ratio[data.step, data.state, data.action], here, after * ~data.terminated


def exact_residual(given: FiniteModel, window: int, **changes: bool) -> Tensor:
    data = wandering(given)
    log_ratio, value, next_value = solution(given, data)
    if changes.get("bootstrap"):
        next_value = infer(given, Exact(TEMPERATURE)).v[0] + 0 * next_value
    sign = -1.0 if changes.get("sign") else 1.0
    if changes.get("without_prior"):
        log_ratio = log_ratio + given.log_prior[data.state, data.action]
    ended = torch.zeros_like(data.ended) if changes.get("through_ends") else data.ended
    return path_residual(
        data.reward - sign * TEMPERATURE * log_ratio,
        value,
        next_value,
        ended,
        discount=DISCOUNT**2 if changes.get("discount") else DISCOUNT,
        window=window,
    )


@pytest.mark.parametrize("horizon", [None, 4])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 12, 30])
@pytest.mark.parametrize("seed", range(3))
def test_zero_on_every_path_at_the_solution(seed: int, window: int, horizon: int | None) -> None:
    assert exact_residual(model(seed, horizon=horizon), window).abs().max() < 1e-11


@pytest.mark.parametrize("twin", ["bootstrap", "sign", "without_prior", "through_ends", "discount"])
def test_broken_ones_are_not(twin: str) -> None:
    assert exact_residual(model(1), 5, **{twin: True}).abs().max() > 0.05


@pytest.mark.parametrize("window", [1, 3, 7, 50])
def test_residual_is_what_it_is_defined_to_be(window: int) -> None:
    rng = np.random.default_rng(1)
    shape = (20, 4)
    rate, value, following = (torch.from_numpy(rng.normal(size=shape)) for _ in range(3))
    ended = torch.from_numpy(rng.random(shape) < 0.15)
    found = path_residual(rate, value, following, ended, discount=0.9, window=window)
    for t in range(shape[0]):
        for n in range(shape[1]):
            total, j = -value[t, n], 0
            while True:
                total = total + 0.9**j * rate[t + j, n]
                j += 1
                if j == window or ended[t + j - 1, n] or t + j == shape[0]:
                    break
            total = total + 0.9**j * following[t + j - 1, n]
            assert found[t, n].item() == pytest.approx(total.item(), abs=1e-12)


def test_it_is_the_log_weight_of_the_program() -> None:
    """α (log p − log q) of the program, with V for what follows, less V(s_0)."""
    given, steps = model(2, random=True), 3
    rng = np.random.default_rng(5)
    probs = torch.from_numpy(rng.dirichlet(np.ones(ACTIONS), STATES))
    value = torch.from_numpy(np.r_[rng.normal(size=STATES - 1), 0.0])
    policy = TabularPolicy(probs)
    data = Collector(environments(given, 40, steps), 8).collect_episodes(policy)
    log_ratio = probs[data.state, data.action].log() - given.log_prior[data.state, data.action]
    rate = torch.where(data.valid, data.reward - TEMPERATURE * log_ratio, 0.0)
    following = value[data.next_state] * ~data.terminated
    found = path_residual(
        rate, value[data.state], following, data.ended, discount=DISCOUNT, window=steps
    )[0]
    for n in range(40):
        alive = int(data.valid[:, n].sum())
        went = {"state_0": data.state[0, n]}
        for t in range(steps):
            at = min(t, alive - 1)
            went[f"action_{t}"] = data.action[at, n]
            went[f"state_{t + 1}"] = data.next_state[at, n]

        def log_prob(program, went=went) -> Tensor:
            trace = poutine.trace(poutine.condition(program, went)).get_trace()
            return trace.log_prob_sum()

        joint = log_prob(
            lambda: trajectory(
                given, given.action_prior, steps, temperature=TEMPERATURE, message=value
            )
        )
        guide = log_prob(lambda: trajectory(given, policy, steps))
        weight = TEMPERATURE * (joint - guide)
        assert found[n].item() == pytest.approx(float(weight - value[data.state[0, n]]), abs=1e-10)


def unified_gradients(stop: bool = False) -> tuple[Tensor, Tensor]:
    """Of the logits, by Unified PCL with d = 1 and by the squared residual of soft Q-learning."""
    given = model(3)
    data = wandering(given)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(STATES, ACTIONS, generator=generator, dtype=torch.float64)
    weight = torch.full(data.reward.shape, 1 / data.reward.numel(), dtype=torch.float64)

    logits = table.clone().requires_grad_()
    log_probs, value = unified(logits, TEMPERATURE)
    log_ratio = (log_probs - given.log_prior)[data.state, data.action]
    residual = path_residual(
        data.reward - TEMPERATURE * log_ratio,
        value[data.state],
        value[data.next_state] * ~data.terminated,
        data.ended,
        discount=DISCOUNT,
        window=1,
    )
    consistency = torch.autograd.grad(residual_loss(residual, weight), logits)[0]

    logits = table.clone().requires_grad_()
    q = TEMPERATURE * (logits - given.log_prior)
    soft = TEMPERATURE * torch.logsumexp(given.log_prior + q / TEMPERATURE, -1)
    soft = soft.detach() if stop else soft
    target = data.reward + DISCOUNT * soft[data.next_state] * ~data.terminated
    bellman = 0.5 * (weight * (target - q[data.state, data.action]).square()).sum()
    return consistency, torch.autograd.grad(bellman, logits)[0]


def test_unified_is_the_residual_of_soft_q_learning() -> None:
    consistency, bellman = unified_gradients()
    torch.testing.assert_close(consistency, bellman, rtol=1e-12, atol=1e-14)


def test_without_the_gradient_of_the_target_it_is_not() -> None:
    consistency, bellman = unified_gradients(stop=True)
    assert (consistency - bellman).abs().max() > 1e-3


def moments(given: FiniteModel) -> tuple[Tensor, Tensor, Tensor]:
    """E C² over s' at random V and π, C² of the expectation, and γ² Var V(s'), (S, A)."""
    rng = np.random.default_rng(0)
    value = torch.from_numpy(np.r_[rng.normal(size=STATES - 1), 0.0])
    dense = torch.from_numpy(given.csr.toarray()).reshape(STATES, ACTIONS, STATES)
    reward = torch.zeros(STATES, ACTIONS, STATES, dtype=torch.float64)
    for s in range(STATES - 1):
        for a in range(ACTIONS):
            here = torch.full((STATES,), s), torch.full((STATES,), a), torch.arange(STATES)
            reward[s, a] = given.reward(*here)
    paid = reward + DISCOUNT * value
    sampled = (dense * (paid - value[:, None, None]).square()).sum(-1)
    expected = ((dense * paid).sum(-1) - value[:, None]).square()
    spread = (dense * (paid - (dense * paid).sum(-1, keepdim=True)).square()).sum(-1)
    return sampled, expected, spread


def test_random_dynamics_bias_the_squared_residual_by_the_variance() -> None:
    sampled, expected, spread = moments(model(random=True))
    torch.testing.assert_close(sampled - expected, spread)
    assert spread[:-1].max() > 0.1
    assert moments(model())[2].abs().max() < 1e-12


def learner(given: FiniteModel, **settings) -> _Learner:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = _Learner(PCL(**{"temperature": TEMPERATURE, **settings}), given, given.action_prior)
    for module in (made.policy, made.value):
        module.double()
    return made


@pytest.mark.parametrize("horizon", [None, 4])
def test_expectation_over_successors_is_consistent_where_samples_are_not(
    horizon: int | None,
) -> None:
    given = model(4, random=True, horizon=horizon)
    result = infer(given, Exact(TEMPERATURE, tolerance=1e-13))
    made = learner(given, expectation="model", window=1)
    rows = slice(None) if horizon is None else slice(0, horizon)
    with torch.no_grad():
        made.policy.parameters_of.table.copy_(result.policy.probs.log().reshape(-1, ACTIONS))
        made.value.table.copy_(result.v[rows].reshape(-1, 1))
    data = wandering(given)
    numbers, _ = made._descend(data, data.reward.shape[1])
    assert float(numbers["loss"]) < 1e-20
    sampled = learner(given, window=1)
    with torch.no_grad():
        sampled.policy.parameters_of.table.copy_(result.policy.probs.log().reshape(-1, ACTIONS))
        sampled.value.table.copy_(result.v[rows].reshape(-1, 1))
    assert float(sampled._descend(data, data.reward.shape[1])[0]["loss"]) > 1e-2


def test_random_dynamics_are_warned_of() -> None:
    short = {"total_steps": 300, "evaluation_episodes": 0}
    with pytest.warns(UserWarning, match="is biased by the variance of the value it leads to"):
        infer(load_target("FrozenLake-v1"), PCL(**short))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        infer(load_target("chain"), PCL(**short))
        infer(load_target("FrozenLake-v1"), PCL(expectation="model", window=1, **short))


def test_the_multiplier_is_the_temperature_of_the_reps_dual() -> None:
    made = learner(model(), kind="trust", max_divergence=0.05)
    rng = np.random.default_rng(0)
    made.episodes = [(float(r), int(n)) for r, n in zip(rng.normal(size=50), [8] * 50, strict=True)]
    returns = [total for total, _ in made.episodes]
    dual = solve_episodic(returns, 0.05 * 8)
    assert made._multiplier() == dual.temperature
    assert dual.divergence == pytest.approx(0.4, rel=1e-9)
    made.episodes = made.episodes[:1]
    assert made._multiplier() == 0.0


def test_trust_is_another_prior_at_a_higher_temperature() -> None:
    """λ log(π/π̃) + α log(π/ρ) = (α + λ) log(π / ρ^{α/(α+λ)} π̃^{λ/(α+λ)})."""
    given = model(5)
    data, multiplier = wandering(given), 0.9
    made = learner(given, kind="trust")
    made._multiplier = lambda: multiplier
    lagging = made.lagging["policy"][0].double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in (made.policy, lagging):
            module.parameters_of.table.normal_(generator=generator)
    total = TEMPERATURE + multiplier
    before = lagging.parameters_of.table.log_softmax(-1)
    mixed = (TEMPERATURE * given.log_prior + multiplier * before) / total
    other = learner(given, temperature=total)
    other.policy.load_state_dict(made.policy.state_dict())
    other.value.load_state_dict(made.value.state_dict())
    other.prior = lambda state: _Unnormalised(mixed[state])
    count = data.reward.shape[1]
    found, expected = made._descend(data, count)[0], other._descend(data, count)[0]
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-12)
    gradients = [m.policy.parameters_of.table.grad for m in (made, other)]
    torch.testing.assert_close(*gradients)


class _Unnormalised:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def log_prob(self, action: Tensor) -> Tensor:
        return self.logits.gather(-1, action.unsqueeze(-1)).squeeze(-1)


def test_lagging_parameters_follow() -> None:
    lagging, leading = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.75 * lagging.weight + 0.25 * leading.weight
    follow(lagging, leading, 0.25)
    torch.testing.assert_close(lagging.weight, expected)
    follow(lagging, leading, 1.0)
    assert torch.equal(lagging.weight, leading.weight)


EPISODES = {"evaluation_episodes": 0, "total_steps": 2000, "environments": 4}


@pytest.mark.parametrize("kind", ["pcl", "unified", "trust"])
def test_saved_and_loaded(kind: str, tmp_path) -> None:
    given = load_target("chain")
    result = infer(given, PCL(kind=kind, **EPISODES))
    result.save(tmp_path)
    loaded = InferenceResult.load(tmp_path)
    states = torch.arange(int(given.state_space.n))
    assert torch.equal(loaded.policy(states).probs, result.policy(states).probs)
    assert torch.equal(loaded.v(states), result.v(states))
    assert loaded.routine == result.routine


@pytest.mark.parametrize("kind", ["pcl", "unified", "trust"])
def test_forbidden_actions_are_never_taken(kind: str) -> None:
    lake = load_target("FrozenLake-v1", env_kwargs={"is_slippery": False})
    for prior in (
        MaskPrior([True, True, True, False]),
        CategoricalPrior(probs=[0.5, 0.25, 0.25, 0.0]),
    ):
        result = infer(lake, PCL(kind=kind, temperature=0.05, **EPISODES), prior=prior)
        assert not result.policy(torch.arange(16)).probs[:, 3].any()
        assert math.isfinite(result.objective)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, "expected one above 0, got 0; at 0 use kind 'trust'"),
        ({"window": 0}, "window: expected a number >= 1"),
        ({"expectation": "model"}, "expected 1 with expectation='model', got 20"),
        ({"max_divergence": 0.0}, "max_divergence: expected a number above 0"),
        ({"value_target_rate": 0.0}, "value_target_rate: expected a number in"),
        ({"policy_target_rate": 1.5}, r"policy_target_rate: expected a number in \[0, 1\]"),
        ({"kind": "unified", "policy": torch.nn.Linear(1, 1)}, "policy: kind 'unified' reads"),
        ({"replayed_paths": -1}, "replayed_paths: expected a number >= 0"),
    ],
)
def test_what_is_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PCL(**settings)


def test_what_models_are_refused() -> None:
    with pytest.raises(TypeError, match="CartPole-v1 is none; use expectation='sample'"):
        infer(load_target("CartPole-v1"), PCL(expectation="model", window=1))
    with pytest.raises(TypeError, match="'unified' sums over the actions"):
        infer(load_target("Pendulum-v1"), PCL(kind="unified"))
