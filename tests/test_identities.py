"""The identities that the library rests on, over random models, each with broken twins it catches.

An identity is a function of `Pieces`, what the library offers, and of a model; its other side comes
from `oracles`. A twin is the library with one piece broken, and must fail the very same function.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import oracles
import pyro
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import Tables
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor

from inference_rl import Exact, InferenceResult, infer
from inference_rl.backups import control_q, soft_policy, soft_value
from inference_rl.finite import FiniteModel
from inference_rl.inference import EvidenceGap
from inference_rl.models.lottery import Lottery
from inference_rl.policies import TabularPolicy
from inference_rl.tabulation import tabulate
from inference_rl.trajectory import trajectory

pytestmark = pytest.mark.filterwarnings("ignore:the posterior's policy assumes:UserWarning")

LIGHT = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)


# --- What the library offers ----------------------------------------------------------------------


def model_of(tables: Tables) -> FiniteModel:
    return FiniteModel.from_tables(
        tables.transition,
        tables.stopped().reward,
        discount=tables.discount,
        initial=tables.initial,
        prior=tables.prior,
        terminal=tables.terminal,
        horizon=tables.horizon,
    )


def bound(tables: Tables, policy: Array, temperature: float) -> float:
    """temperature · ELBO of a policy, by Pyro, with every site enumerated."""
    model, steps = model_of(tables), int(tables.horizon or 0)
    table = np.broadcast_to(policy, (steps, *policy.shape[-2:])).copy()
    guide = TabularPolicy(torch.as_tensor(table))
    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(
        lambda: trajectory(
            model, lambda s, t=None: model.action_prior(s), steps, temperature=temperature
        ),
        config_enumerate(lambda: trajectory(model, guide, steps)),
    )
    return -temperature * float(loss)


def control(tables: Tables, temperature: float) -> InferenceResult:
    return infer(model_of(tables), Exact(temperature))


def posterior(tables: Tables, temperature: float) -> InferenceResult:
    return infer(model_of(tables), Exact(temperature, "posterior"))


def gap(tables: Tables, temperature: float) -> EvidenceGap:
    found = control(tables, temperature).gap
    assert found is not None
    return found


def backup(tables: Tables, v: Tensor, temperature: float) -> Tensor:
    model = model_of(tables)
    return torch.where(
        model.is_terminal, 0.0, soft_value(control_q(model, v), model.log_prior, temperature)
    )


def improve(tables: Tables, v: Array, temperature: float) -> tuple[Array, Array, Array]:
    """Q and soft value against V, and the policy of least divergence from them."""
    model = model_of(tables)
    q = control_q(model, torch.as_tensor(v))
    value = soft_value(q, model.log_prior, temperature)
    return q.numpy(), value.numpy(), soft_policy(q, model.log_prior, temperature).numpy()


def divergence(tables: Tables, policy: Array, best: Array) -> float:
    """E Σ γ^t KL(policy ‖ best) along `policy`, nats."""
    return oracles.policy_divergence(tables, policy, best)


def shaped(tables: Tables, potential: Array) -> Tables:
    """Reward plus γ φ(s') - φ(s); φ is zero at terminal states."""
    potential = np.where(tables.terminal, 0.0, potential)
    change = tables.discount * potential - potential[:, None, None]
    return dataclasses.replace(tables, reward=tables.reward + change)


def prior_as_reward(tables: Tables, temperature: float) -> Tables:
    """The uniform prior, and temperature · log(ρ |A|) paid for each action."""
    bonus = temperature * np.log(tables.prior * tables.actions)
    uniform = np.full_like(tables.prior, 1 / tables.actions)
    return dataclasses.replace(tables, prior=uniform, reward=tables.reward + bonus[..., None])


def survival(tables: Tables) -> FiniteModel:
    """The same without a discount, where a step is survived with probability γ."""
    return model_of(tables).with_survival()


def chosen(tables: Tables, temperature: float) -> Array:
    """The policy to act by, (T, S, A)."""
    return control(tables, temperature).policy.probs.numpy()  # type: ignore[no-any-return, attr-defined]


def log_weights(tables: Tables, temperature: float) -> Array:
    """log p(τ, O) - log q(τ) of drawn trajectories."""
    tree = control(tables, temperature).sample(4000, seed=3)
    return np.asarray(tree["sample_stats"]["log_weight"].values[0])


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Everything that the identities speak of. A twin replaces one field."""

    bound: Callable[[Tables, Array, float], float] = bound
    control: Callable[[Tables, float], InferenceResult] = control
    posterior: Callable[[Tables, float], InferenceResult] = posterior
    gap: Callable[[Tables, float], EvidenceGap] = gap
    backup: Callable[[Tables, Tensor, float], Tensor] = backup
    improve: Callable[[Tables, Array, float], tuple[Array, Array, Array]] = improve
    divergence: Callable[[Tables, Array, Array], float] = divergence
    shaped: Callable[[Tables, Array], Tables] = shaped
    prior_as_reward: Callable[[Tables, float], Tables] = prior_as_reward
    survival: Callable[[Tables], FiniteModel] = survival
    chosen: Callable[[Tables, float], Array] = chosen
    log_weights: Callable[[Tables, float], Array] = log_weights


LIBRARY = Pieces()


def close(got: Any, expected: Any, tolerance: float = 1e-10) -> None:
    got = got.detach().numpy() if isinstance(got, Tensor) else got
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


def some_policy(tables: Tables, seed: int = 0) -> Array:
    """A policy (T, S, A), or (S, A) without horizon, that takes whatever the prior allows."""
    shape = (tables.states, tables.actions)
    if tables.horizon is not None:
        shape = (tables.horizon, *shape)
    weights = np.random.default_rng(seed).uniform(0.1, 1.0, shape) * (tables.prior > 0)
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def forever(tables: Tables) -> Tables:
    return dataclasses.replace(tables, horizon=None, discount=min(tables.discount, 0.9))


def undiscounted(tables: Tables) -> Tables:
    return dataclasses.replace(tables, discount=1.0)


def without_noise(tables: Tables) -> Tables:
    """Each state and the start lead to their likeliest successor."""
    size = np.eye(tables.states)
    return dataclasses.replace(
        tables,
        transition=size[tables.transition.argmax(-1)],
        initial=size[tables.initial.argmax()],
    )


def live_reward(tables: Tables) -> Array:
    stopped = tables.stopped()
    return np.asarray((stopped.transition * stopped.reward).sum(-1))


# --- The identities -------------------------------------------------------------------------------


def evidence_is_bound_plus_divergence(p: Pieces, tables: Tables, temperature: float) -> None:
    """1. log p(O) = ELBO(q) + KL(q ‖ p(τ | O)), for any q."""
    tables = undiscounted(tables)
    policy = some_policy(tables)
    paths = oracles.every_path(tables)
    log_q = paths.log_dynamics + paths.log_policy(tables.idle(policy)).sum(0)
    habit = paths.log_policy(tables.stopped().prior).sum(0)
    log_p = paths.log_dynamics + habit + paths.rewards.sum(0) / temperature
    log_p -= np.logaddexp.reduce(log_p)
    taken = log_q > -np.inf
    distance = (np.exp(log_q[taken]) * (log_q[taken] - log_p[taken])).sum()
    evidence = p.control(tables, temperature).log_evidence
    assert evidence is not None
    close(float(evidence), p.bound(tables, policy, temperature) / temperature + distance)
    assert distance >= -1e-12


def bound_is_the_objective(p: Pieces, tables: Tables, temperature: float) -> None:
    """2. temperature · ELBO = E Σ γ^t [r - temperature · KL]; both forms, KL and entropy."""
    policy = some_policy(tables)
    close(p.bound(tables, policy, temperature), oracles.objective(tables, policy, temperature))
    uniform = np.full_like(tables.prior, 1 / tables.actions)
    tables = dataclasses.replace(tables, prior=uniform)
    policy = some_policy(tables)
    entropy_form = oracles.objective(tables, policy, temperature, form="entropy")
    alive = dataclasses.replace(tables, reward=np.ones_like(tables.reward))
    steps = oracles.objective(alive, policy, 0.0, form="reward")
    offset = temperature * math.log(tables.actions) * steps
    close(p.bound(tables, policy, temperature) + offset, entropy_form)


def best_bound_is_the_soft_value(p: Pieces, tables: Tables, temperature: float) -> None:
    """3. max ELBO = E V_0 / temperature, attained by π*; the gap to log p(O): three divergences."""
    result = p.control(tables, temperature)
    policy = result.policy.probs.numpy()  # type: ignore[attr-defined]
    value = tables.initial @ result.v[0].numpy()
    close(p.bound(tables, policy, temperature), value)
    assert p.bound(tables, some_policy(tables), temperature) <= value + 1e-10
    parts = p.gap(tables, temperature)
    close(parts.log_evidence - value / temperature, parts.start + parts.policy + parts.dynamics)
    assert (p.posterior(tables, temperature).v - result.v).min() >= -1e-10
    certain = p.gap(without_noise(tables), temperature)
    if tables.discount == 1:
        close([certain.total, certain.start, certain.policy, certain.dynamics], 0.0)


def regret_is_a_divergence(p: Pieces, tables: Tables, temperature: float) -> None:
    """4. J(π*) - J(π) = temperature · E_π Σ γ^t KL(π ‖ π*), for any π."""
    result = p.control(tables, temperature)
    policy = some_policy(tables)
    regret = float(result.objective) - p.bound(tables, policy, temperature)
    best = result.policy.probs.numpy()  # type: ignore[attr-defined]
    close(regret, temperature * p.divergence(tables, policy, best))


def backup_is_a_contraction(p: Pieces, tables: Tables, temperature: float) -> None:
    """6. γ-contraction in the sup norm, monotone, and B(V + c) = B V + γ c."""
    tables = forever(tables)
    gamma, generator = tables.discount, torch.Generator().manual_seed(0)
    live = torch.as_tensor(~tables.terminal)

    def random() -> Tensor:
        return torch.where(live, torch.randn(tables.states, generator=generator), 0.0)

    for scale in (1e-3, 1.0, 1e3):
        one, other = scale * random(), scale * random()
        images = [p.backup(tables, v, temperature) for v in (one, other)]
        moved, apart = (images[0] - images[1]).abs().max(), (one - other).abs().max()
        assert moved <= gamma * apart + 1e-12 * scale
        higher = one + scale * random().abs()
        assert (p.backup(tables, higher, temperature) >= images[0] - 1e-12 * scale).all()
        if live.all():
            lifted = p.backup(tables, one + scale, temperature)
            close(lifted, (images[0] + gamma * scale).numpy(), 1e-12 * scale)
    best = p.control(tables, temperature).v
    residual = (p.backup(tables, one, temperature) - one).abs().max()
    assert (one - best).abs().max() <= residual / (1 - gamma) + 1e-9 * scale
    close(p.backup(tables, best, temperature), best.numpy(), 1e-9)


def temperature_has_two_ends(p: Pieces, tables: Tables, temperature: float) -> None:
    """7. α → 0 is regular RL, at a price that is known at every α; α → ∞ is the prior."""
    tables = forever(tables)
    hard = infer(model_of(tables), Exact(0.0))
    span = 1 / (1 - tables.discount)
    best = hard.policy.probs.argmax(-1)  # type: ignore[attr-defined]
    chance = tables.prior[np.arange(tables.states), best.numpy()]
    live = ~tables.terminal
    price = np.log(1 / chance[live]).max()
    for alpha in (1e-6, temperature, 1e3):
        below = (p.control(tables, alpha).v - hard.v).numpy()
        assert below.max() <= 1e-9
        assert below.min() >= -alpha * price * span - 1e-9
    uniform = dataclasses.replace(tables, prior=np.full_like(tables.prior, 1 / tables.actions))
    free = infer(model_of(uniform), Exact(0.0)).v
    result = p.control(uniform, temperature)
    # Entropy form: what staying alive is worth in temperature · log|A| is paid on top.
    paid = dataclasses.replace(
        uniform, reward=uniform.reward + temperature * math.log(tables.actions)
    )
    above = (p.control(paid, temperature).v - free).numpy()
    assert above.min() >= -1e-9
    assert above.max() <= temperature * math.log(tables.actions) * span + 1e-9
    assert (result.v <= free + 1e-9).all()
    scale = np.abs(tables.reward).max() * span
    policy = p.control(tables, 1e6).policy.probs.numpy()  # type: ignore[attr-defined]
    close(policy[live], tables.prior[live], 2e-6 * scale + 1e-12)


def paths_are_consistent(p: Pieces, tables: Tables, temperature: float) -> None:
    """8. Without noise V(s_0) = Σ γ^t [r - α log π*/ρ] + γ^d V(s_d) for any actions; with noise
    one step at a time, in expectation over s'."""
    for case in (forever(tables), forever(without_noise(tables))):
        result, stopped = p.control(case, temperature), case.stopped()
        v, policy = result.v.numpy(), result.policy.probs.numpy()  # type: ignore[attr-defined]
        close(v[case.terminal], 0.0)
        allowed = (case.prior > 0) & ~case.terminal[:, None]
        ratio = np.log(np.where(allowed, policy, 1.0) / np.where(allowed, case.prior, 1.0))
        after = stopped.transition @ v
        step = live_reward(case) - temperature * ratio + case.discount * after
        close(np.where(allowed, step - v[:, None], 0.0), 0.0, 1e-9)
    random = np.random.default_rng(0)
    for state in np.flatnonzero(~case.terminal):
        here, total, weight = int(state), 0.0, 1.0
        for _ in range(6):
            if case.terminal[here]:
                break
            action = random.choice(np.flatnonzero(case.prior[here] > 0))
            total += weight * (live_reward(case)[here, action] - temperature * ratio[here, action])
            weight *= case.discount
            here = int(case.transition[here, action].argmax())
        close(total + weight * v[here], v[state], 1e-9)


def rewards_have_equivalents(p: Pieces, tables: Tables, temperature: float) -> None:
    """9. Shaping shifts V by φ; a prior is a reward; only reward / temperature matters."""
    tables = forever(tables)
    plain = p.control(tables, temperature)
    policy = plain.policy.probs.numpy()  # type: ignore[attr-defined]
    live = ~tables.terminal
    potential = np.linspace(1.0, 2.0, tables.states)
    moved = p.control(p.shaped(tables, potential), temperature)
    close(moved.v.numpy()[live], plain.v.numpy()[live] - potential[live], 1e-9)
    close(moved.policy.probs.numpy()[live], policy[live], 1e-9)  # type: ignore[attr-defined]
    scaled = dataclasses.replace(tables, reward=tables.reward / temperature)
    close(temperature * p.control(scaled, 1.0).v, plain.v.numpy(), 1e-9)
    if (tables.prior > 0).all():
        paid = p.control(p.prior_as_reward(tables, temperature), temperature)
        close(paid.v, plain.v.numpy(), 1e-9)
        close(paid.policy.probs.numpy()[live], policy[live], 1e-9)  # type: ignore[attr-defined]


def policy_iteration_is_monotone(p: Pieces, tables: Tables, temperature: float) -> None:
    """10. α lse(Q^π / α) - V^π = α KL(π ‖ π_new) at every state; V^π only ever grows, up to V*; and
    the growth is the divergence along the new policy."""
    tables = forever(tables)
    best = p.control(tables, temperature).v.numpy()
    policy, live = some_policy(tables), ~tables.terminal
    for _ in range(5):
        value = oracles.linear_solve_value(tables, policy, temperature)
        _, improved, better = p.improve(tables, value, temperature)
        taken = policy > 0
        ratio = np.log(np.where(taken, policy, 1.0) / np.where(taken, better, 1.0))
        distance = (policy * ratio).sum(-1)
        close((improved - value)[live], temperature * distance[live], 1e-9)
        grown = oracles.linear_solve_value(tables, better, temperature)
        assert (grown >= value - 1e-9).all()
        assert (grown <= best + 1e-9).all()
        # Performance difference: J(new) - J(old) = Σ occupancy of new · advantage over V_old.
        visits = oracles.occupancy(tables, better).sum(-1)
        difference = visits @ np.where(live, improved - value, 0.0)
        close(tables.initial @ (grown - value), difference, 1e-9)
        policy = better


def discount_is_survival(p: Pieces, tables: Tables, temperature: float) -> None:
    """13. Dying with probability 1 - γ a step gives control the same V, by brute force too."""
    result = infer(p.survival(tables), Exact(temperature))
    close(result.v[:, : tables.states], p.control(tables, temperature).v.numpy())
    exact = oracles.brute_force_control(tables, temperature)
    close(result.v[:, : tables.states], exact.value)
    evidence = infer(p.survival(tables), Exact(temperature, "posterior")).log_evidence
    assert evidence is not None
    close(float(evidence), oracles.brute_force_posterior(tables, temperature).log_evidence)


def weights_are_unbiased(p: Pieces, tables: Tables, temperature: float) -> None:
    """15. E_q[p(τ, O) / q(τ)] = p(O); constant if nothing is random."""
    for case in (undiscounted(tables), undiscounted(without_noise(tables))):
        expected = oracles.brute_force_posterior(case, temperature).log_evidence
        weights = np.exp(p.log_weights(case, temperature) - expected)
        error = weights.std() / math.sqrt(len(weights))
        assert abs(weights.mean() - 1) <= 5 * error + 1e-9
    assert weights.std() < 1e-9


def the_policy_to_act_by_is_the_best(p: Pieces, tables: Tables, temperature: float) -> None:
    """18. Nothing earns more than π*: not the posterior's policy, a MAP path or Boltzmann's."""
    policy = p.chosen(tables, temperature)
    earned = oracles.objective(tables, policy, temperature)
    close(earned, oracles.brute_force_control(tables, temperature).objective)


Identity = Callable[[Pieces, Tables, float], None]
IDENTITIES: list[Identity] = [
    evidence_is_bound_plus_divergence,
    bound_is_the_objective,
    best_bound_is_the_soft_value,
    regret_is_a_divergence,
    backup_is_a_contraction,
    temperature_has_two_ends,
    paths_are_consistent,
    rewards_have_equivalents,
    policy_iteration_is_monotone,
    discount_is_survival,
    weights_are_unbiased,
    the_policy_to_act_by_is_the_best,
]


def named(function: Callable[..., Any]) -> str:
    return function.__name__


@pytest.mark.parametrize("identity", IDENTITIES, ids=named)
def test_identity_on_random_models(identity: Identity) -> None:
    @LIGHT
    @given(
        oracles.finite_tables(max_states=3, max_actions=2, max_horizon=3, scales=(0.1, 1.0)),
        st.sampled_from([0.5, 2.0]),
    )
    def run(tables: Tables, temperature: float) -> None:
        if not tables.terminal.all():
            identity(LIBRARY, tables, temperature)

    run()


# --- Broken twins ---------------------------------------------------------------------------------


def noisy() -> Tables:
    """Random everywhere, with an unequal prior, a discount, and a state that ends the episode."""
    random = np.random.default_rng(4)
    return Tables(
        random.dirichlet(np.ones(3), (3, 2)),
        2 * random.normal(size=(3, 2, 3)),
        prior=np.array([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]),
        initial=np.array([0.5, 0.3, 0.2]),
        terminal=np.array([False, False, True]),
        discount=0.9,
        horizon=3,
    )


def uniform_prior(tables: Tables) -> Tables:
    return dataclasses.replace(tables, prior=np.full_like(tables.prior, 1 / tables.actions))


def never_ending(tables: Tables) -> Tables:
    return dataclasses.replace(tables, terminal=np.zeros_like(tables.terminal))


def late(tables: Tables) -> Tables:
    """Step t weighs γ^(t+1)."""
    return dataclasses.replace(tables, reward=tables.discount * tables.reward)


def changed(change: Callable[[Tables], Tables]) -> dict[str, Any]:
    """The pieces of a library that reads another model than it was given."""
    return {
        "bound": lambda tables, policy, temperature: bound(change(tables), policy, temperature),
        "control": lambda tables, temperature: control(change(tables), temperature),
    }


def optimistic_control(tables: Tables, temperature: float) -> InferenceResult:
    return posterior(tables, temperature)


def flipped_entropy(tables: Tables, policy: Array, temperature: float) -> float:
    return 2 * oracles.objective(tables, policy, 0.0, form="reward") - bound(
        tables, policy, temperature
    )


def without(part: str) -> Callable[[Tables, float], EvidenceGap]:
    return lambda tables, temperature: dataclasses.replace(gap(tables, temperature), **{part: 0.0})


def backed_up(fault: str) -> Callable[[Tables, Tensor, float], Tensor]:
    def twin(tables: Tables, v: Tensor, temperature: float) -> Tensor:
        model = model_of(tables)
        q = control_q(model, v / model.discount if fault == "discount forgotten" else v)
        inside = 1.0 if fault == "temperature forgotten" else temperature
        value = soft_value(q, model.log_prior, inside) / inside * temperature
        if fault == "minimum":
            value = -soft_value(q, model.log_prior, temperature)
        return torch.where(model.is_terminal, 0.0, value)

    return twin


def improved(fault: str) -> Callable[[Tables, Array, float], tuple[Array, Array, Array]]:
    def twin(tables: Tables, v: Array, temperature: float) -> tuple[Array, Array, Array]:
        if fault == "prior missing":
            tables = uniform_prior(tables)
        if fault == "discount forgotten":
            v = v / tables.discount
        q, value, policy = improve(tables, v, temperature)
        if fault == "greedy":
            policy = np.eye(tables.actions)[q.argmax(-1)] * 0.999 + 0.001 / tables.actions
        return q, value, policy

    return twin


def shaped_wrongly(fault: str) -> Callable[[Tables, Array], Tables]:
    def twin(tables: Tables, potential: Array) -> Tables:
        if fault == "undiscounted":
            potential = np.where(tables.terminal, 0.0, potential)
            change = potential - potential[:, None, None]
        else:  # φ of the end is not zero
            change = tables.discount * potential - potential[:, None, None]
        return dataclasses.replace(tables, reward=tables.reward + change)

    return twin


def without_log_actions(tables: Tables, temperature: float) -> Tables:
    bonus = temperature * np.log(tables.prior)
    return dataclasses.replace(uniform_prior(tables), reward=tables.reward + bonus[..., None])


def log_discount_in_the_reward(tables: Tables) -> FiniteModel:
    """The "discount" that adds log γ to each step's log-weight, and dies nowhere."""
    added = dataclasses.replace(
        tables, reward=tables.reward + TEMPERATURE * math.log(tables.discount), discount=1.0
    )
    return model_of(added)


def dies_before_it_is_paid(tables: Tables) -> FiniteModel:
    model = survival(tables)
    dead = model.successors >= tables.states
    return model.replace(rewards=torch.where(dead, 0.0, model.rewards))


def posterior_policy(tables: Tables, temperature: float) -> Array:
    return posterior(tables, temperature).policy.probs.numpy()  # type: ignore[no-any-return, attr-defined]


def boltzmann_of_the_best_return(tables: Tables, temperature: float) -> Array:
    """ρ e^{Q/α} with the Q of regular RL: expected utility, exponentiated."""
    hard = infer(model_of(tables), Exact(0.0))
    return soft_policy(hard.q, model_of(tables).log_prior, temperature).numpy()


def map_path(tables: Tables, temperature: float) -> Array:
    """At each step, the first action of the likeliest optimal path from there."""
    stopped, steps = tables.stopped(), int(tables.horizon or 0)
    with np.errstate(divide="ignore"):
        moves = np.log(stopped.transition) + stopped.reward / temperature
        habit = np.log(stopped.prior)
    value, policy = np.zeros(tables.states), np.empty((steps, tables.states, tables.actions))
    for t in reversed(range(steps)):
        q = habit + (moves + value).max(-1)
        policy[t], value = np.eye(tables.actions)[q.argmax(-1)], q.max(-1)
    return policy


def weighed(fault: str) -> Callable[[Tables, float], Array]:
    def twin(tables: Tables, temperature: float) -> Array:
        result = control(tables, temperature)
        tree = result.sample(4000, seed=3)
        weights = np.asarray(tree["sample_stats"]["log_weight"].values[0])
        if fault == "prior missing":
            first = tree["posterior"]["state"].values[0, :, 0]
            action = tree["posterior"]["action"].values[0, :, 0]
            return weights - np.log(tables.prior[first, action])
        if fault == "reward missing":
            return weights - tree["posterior"]["reward"].values[0, :, 0] / temperature
        return np.full_like(weights, weights.mean())

    return twin


TEMPERATURE = 0.7
TWINS: list[tuple[Identity, str, dict[str, Any]]] = [
    (evidence_is_bound_plus_divergence, "entropy sign", {"bound": flipped_entropy}),
    (evidence_is_bound_plus_divergence, "prior missing", changed(uniform_prior)),
    (evidence_is_bound_plus_divergence, "end does not absorb", changed(never_ending)),
    (bound_is_the_objective, "entropy sign", {"bound": flipped_entropy}),
    (bound_is_the_objective, "discount off by one", changed(late)),
    (bound_is_the_objective, "discount forgotten", changed(undiscounted)),
    (bound_is_the_objective, "prior missing", changed(uniform_prior)),
    (bound_is_the_objective, "end does not absorb", changed(never_ending)),
    (best_bound_is_the_soft_value, "optimistic", {"control": optimistic_control}),
    (best_bound_is_the_soft_value, "no KL of the start", {"gap": without("start")}),
    (best_bound_is_the_soft_value, "no KL of the policy", {"gap": without("policy")}),
    (best_bound_is_the_soft_value, "no KL of the dynamics", {"gap": without("dynamics")}),
    (
        regret_is_a_divergence,
        "KL reversed",
        {"divergence": lambda tables, policy, best: divergence(tables, best, policy)},
    ),
    (
        regret_is_a_divergence,
        "discount forgotten",
        {"divergence": lambda tables, *policies: divergence(undiscounted(tables), *policies)},
    ),
    (
        regret_is_a_divergence,
        "end does not absorb",
        {"divergence": lambda tables, *policies: divergence(never_ending(tables), *policies)},
    ),
    (backup_is_a_contraction, "discount forgotten", {"backup": backed_up("discount forgotten")}),
    (
        backup_is_a_contraction,
        "temperature forgotten",
        {"backup": backed_up("temperature forgotten")},
    ),
    (backup_is_a_contraction, "not monotone", {"backup": backed_up("minimum")}),
    (
        temperature_has_two_ends,
        "entropy form for KL form",
        {
            "control": lambda tables, temperature: control(
                dataclasses.replace(
                    tables, reward=tables.reward + temperature * math.log(tables.actions)
                ),
                temperature,
            )
        },
    ),
    (
        temperature_has_two_ends,
        "entropy sign",
        {"control": lambda tables, temperature: control(negated(tables), temperature)},
    ),
    (temperature_has_two_ends, "prior missing", changed(uniform_prior)),
    (paths_are_consistent, "prior missing", changed(uniform_prior)),
    (paths_are_consistent, "discount off by one", changed(late)),
    (paths_are_consistent, "optimistic", {"control": optimistic_control}),
    (paths_are_consistent, "end does not absorb", changed(never_ending)),
    (rewards_have_equivalents, "φ undiscounted", {"shaped": shaped_wrongly("undiscounted")}),
    (rewards_have_equivalents, "φ at the end", {"shaped": shaped_wrongly("end")}),
    (rewards_have_equivalents, "no log|A|", {"prior_as_reward": without_log_actions}),
    (policy_iteration_is_monotone, "prior missing", {"improve": improved("prior missing")}),
    (
        policy_iteration_is_monotone,
        "discount forgotten",
        {"improve": improved("discount forgotten")},
    ),
    (policy_iteration_is_monotone, "greedy", {"improve": improved("greedy")}),
    (discount_is_survival, "log γ in the reward", {"survival": log_discount_in_the_reward}),
    (discount_is_survival, "dies before it is paid", {"survival": dies_before_it_is_paid}),
    (discount_is_survival, "prior missing", changed(uniform_prior)),
    (weights_are_unbiased, "prior missing", {"log_weights": weighed("prior missing")}),
    (weights_are_unbiased, "reward missing", {"log_weights": weighed("reward missing")}),
    (weights_are_unbiased, "logarithms averaged", {"log_weights": weighed("average")}),
    (the_policy_to_act_by_is_the_best, "posterior's policy", {"chosen": posterior_policy}),
    (
        the_policy_to_act_by_is_the_best,
        "Boltzmann of expected utility",
        {"chosen": boltzmann_of_the_best_return},
    ),
    (the_policy_to_act_by_is_the_best, "MAP path", {"chosen": map_path}),
]


def negated(tables: Tables) -> Tables:
    return dataclasses.replace(tables, reward=-tables.reward)


@pytest.mark.parametrize("identity", IDENTITIES, ids=named)
def test_the_library_passes_where_its_twins_fail(identity: Identity) -> None:
    identity(LIBRARY, noisy(), TEMPERATURE)
    assert any(identity is known for known, _, _ in TWINS)


@pytest.mark.parametrize(
    ("identity", "pieces"),
    [pytest.param(i, p, id=f"{i.__name__}-{name}") for i, name, p in TWINS],
)
def test_broken_twin_is_caught(identity: Identity, pieces: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        identity(dataclasses.replace(LIBRARY, **pieces), noisy(), TEMPERATURE)


# --- What the twins of identity 18 do right -------------------------------------------------------


def test_posterior_policy_is_the_best_if_nothing_is_random() -> None:
    tables = undiscounted(without_noise(noisy()))
    the_policy_to_act_by_is_the_best(
        dataclasses.replace(LIBRARY, chosen=posterior_policy), tables, TEMPERATURE
    )


def test_boltzmann_of_expected_utility_is_right_for_a_single_choice() -> None:
    tables = dataclasses.replace(noisy(), horizon=1)
    the_policy_to_act_by_is_the_best(
        dataclasses.replace(LIBRARY, chosen=boltzmann_of_the_best_return), tables, TEMPERATURE
    )


def test_map_path_is_regular_rl_if_nothing_is_random_and_cold() -> None:
    """And under noise it buys the lottery ticket, however cold."""
    tables = undiscounted(without_noise(noisy()))
    hard = infer(model_of(tables), Exact(0.0))
    earned = oracles.objective(tables, map_path(tables, 1e-6), 0.0, form="reward")
    close(earned, float(hard.objective), 1e-9)
    lottery = tabulate(Lottery())  # a ticket is worth 0.3, a sure thing 0.5, a win 3
    transition = np.zeros((4, 2, 4))
    transition.reshape(8, 4)[:] = lottery.csr.toarray()
    reward = np.broadcast_to([0.0, 0.5, 0.0, 3.0], (4, 2, 4))
    ended = lottery.is_terminal.numpy()
    ticket = Tables(
        np.where(ended[:, None, None], np.eye(4)[:, None], transition),
        np.where(ended[:, None, None], 0.0, reward),
        prior=np.full((4, 2), 0.5),
        initial=np.eye(4)[0],
        terminal=ended,
        horizon=1,
    )
    earned = oracles.objective(ticket, map_path(ticket, 1e-6), 0.0, form="reward")
    assert earned == pytest.approx(0.3)
    assert float(infer(model_of(ticket), Exact(0.0)).objective) == 0.5


def test_excess_of_the_posterior_is_a_variance_over_twice_the_temperature() -> None:
    """3. α V^x - V → Var(r) / 2α for one step, as α grows."""
    tables = dataclasses.replace(noisy(), horizon=1, prior=np.tile([1.0, 0.0], (3, 1)))
    mean = tables.transition[0, 0] @ tables.reward[0, 0]
    variance = tables.transition[0, 0] @ (tables.reward[0, 0] - mean) ** 2
    undying = undiscounted(tables)
    for temperature in (1e2, 1e4):
        excess = posterior(undying, temperature).v[0, 0] - control(undying, temperature).v[0, 0]
        assert float(excess) == pytest.approx(variance / (2 * temperature), rel=10 / temperature)
