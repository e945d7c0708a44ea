"""What learned routines compute by hand is what the trajectory program says: value and gradient.

Broken twins of what learns Q, that the checks of the right one tell apart, and where:

- entropy sign, missing prior: `test_broken_losses_are_told_apart` (SAC), the missing prior also
  `test_another_residual_of_q_is_told_apart` (SQL); both of soft DDPG and soft TD3 in
  test_soft_ddpg.py, `test_q_is_fitted_to_the_bound_of_the_program`.
- bootstrapping through terminated, gradient of the target: the first two of these (SAC, SQL), and
  `test_an_update_that_is_wrong_is_told_apart` in test_soft_ddpg.py.
- cutting at truncated: the first (SAC), and that of test_soft_ddpg.py.
- scores of u that move actions: test_stein.py,
  `test_without_preference_actions_are_uniform_and_the_twin_s_are_not`.
- sign of the temperature's loss: test_temperature.py, `test_the_wrong_sign_is_caught`, and of a
  whole run test_sac.py, `test_a_temperature_loss_of_the_wrong_sign_is_caught`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from pyro import poutine
from torch import Tensor

from inference_rl import (
    PCL,
    SAC,
    SQL,
    CategoricalPrior,
    EnvironmentModel,
    FiniteModel,
    GaussianPrior,
    MaskPrior,
    MixturePrior,
    PolicyGradient,
    PolicyPrior,
    StickyPrior,
    TabularPolicy,
    UniformPrior,
)
from inference_rl.decision import every_action
from inference_rl.distributions import Optimality, categorical
from inference_rl.environment import WithPreviousAction
from inference_rl.inference import learned, pcl, policy_gradient, sac, sql, sql_sampler
from inference_rl.inference.learned import _with_last_state, value_at
from inference_rl.inference.off_policy import Batch, Learner
from inference_rl.inference.reps import soft_reward
from inference_rl.learning.collection import Collector, Segment
from inference_rl.networks import Architecture, NetworkPolicy, described
from inference_rl.priors import ActionPrior
from inference_rl.randomness import torch_seeded
from inference_rl.simulate import environments
from inference_rl.trajectory import ONE, trajectory

STATES, ACTIONS, STEPS, SLOTS, DISCOUNT, TEMPERATURE = 4, 3, 5, 64, 0.8, 0.7


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def table(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(ACTIONS) * 3, STATES)


def finite() -> FiniteModel:
    """A random model that ends in its last state, or after `STEPS` steps."""
    rng = np.random.default_rng(0)
    reward = rng.normal(size=(STATES, ACTIONS, STATES))
    reward[-1] = 0.0
    return FiniteModel.from_tables(
        rng.dirichlet(np.ones(STATES), (STATES, ACTIONS)),
        reward,
        discount=DISCOUNT,
        initial=np.array([0.5, 0.3, 0.2, 0.0]),
        terminal=np.arange(STATES) == STATES - 1,
        horizon=STEPS,
    )


class Drift(EnvironmentModel):
    """Vectors that noise and actions move about, at a price."""

    state_space, discount, horizon = Box(-np.inf, np.inf, (2,), np.float64), DISCOUNT, STEPS

    def __init__(self, action_space: Any) -> None:
        self.action_space = action_space

    def initial_state(self) -> Any:
        return dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def transition(self, state: Tensor, action: Tensor) -> Any:
        return dist.Normal(0.8 * state + 0.3 * self._vector(action), 0.4).to_event(1)

    def _vector(self, action: Tensor) -> Tensor:
        return action.unsqueeze(-1) if isinstance(self.action_space, Discrete) else action

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        action = self._vector(action)
        return -state.square().sum(-1) - 0.2 * action.sum(-1) + next_state[..., 0]


PAIR, BOX = MultiDiscrete([2, 3]), Box(-1.0, 1.0, (2,))


def other(model: EnvironmentModel) -> NetworkPolicy:
    """A policy to serve as a prior."""
    torch.manual_seed(7)
    described_ = Architecture(described(model.state_space), described(model.action_space))
    return stirred(NetworkPolicy(described_)).requires_grad_(False)


def stirred(policy: Any) -> Any:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return policy


def allowed_in(state: Tensor) -> Tensor:
    """Of three actions the last is forbidden in most states, and another in some."""
    x, y = state.unbind(-1)
    return torch.stack([x < 1, y > -1, (x > 0.5) | (y <= -1)], dim=-1)


def pairs_in(state: Tensor) -> Any:
    """Over PAIR: of three second actions two are forbidden, by state."""
    first = torch.tensor([0.3, 0.7, 0.0]).expand(*state.shape[:-1], 3)
    second = ((state[..., :1] > 0) * 2 == torch.arange(3)).to(first.dtype)
    return categorical(torch.stack([first, second], dim=-2)).to_event(1)


CASES: dict[str, tuple[Any, Any]] = {
    "Discrete, uniform": (finite, lambda m: UniformPrior(m.action_space)),
    "Discrete, categorical": (finite, lambda m: CategoricalPrior(probs=table())),
    "Discrete, mask": (finite, lambda m: MaskPrior([False, True, True])),
    "Discrete, sticky": (
        lambda: WithPreviousAction(finite()),
        lambda m: StickyPrior(m.action_space, 0.4, CategoricalPrior(probs=table())),
    ),
    "Discrete, policy": (finite, lambda m: PolicyPrior(TabularPolicy(torch.tensor(table(2))))),
    "Discrete, mixture": (
        finite,
        lambda m: MixturePrior(
            [UniformPrior(m.action_space), CategoricalPrior(probs=table())], [0.3, 0.7]
        ),
    ),
    "Discrete, mask by state": (lambda: Drift(Discrete(3)), lambda m: MaskPrior(allowed_in)),
    "MultiDiscrete, mask by state": (lambda: Drift(PAIR), lambda m: pairs_in),
    "MultiDiscrete, uniform": (lambda: Drift(PAIR), lambda m: UniformPrior(PAIR)),
    "MultiDiscrete, policy": (lambda: Drift(PAIR), lambda m: PolicyPrior(other(m))),
    "Box, uniform": (lambda: Drift(BOX), lambda m: UniformPrior(BOX)),
    "Box, gaussian": (
        lambda: Drift(BOX),
        lambda m: GaussianPrior(BOX, loc=lambda s: (0.2 * s).clamp(-1, 1), scale=0.6),
    ),
    "Box, policy": (lambda: Drift(BOX), lambda m: PolicyPrior(other(m))),
    "Box, mixture": (
        lambda: Drift(BOX),
        lambda m: MixturePrior([UniformPrior(BOX), GaussianPrior(BOX, 0.5, 0.3)], [0.4, 0.6]),
    ),
}


def conditioned(data: Segment) -> Any:
    """The program along the paths in `data`."""
    paths = {f"state_{t}": state for t, state in enumerate(_with_last_state(data))}
    paths |= {f"action_{t}": action for t, action in enumerate(data.action)}
    return poutine.condition(trajectory, data=paths)


def program_loss(
    model: EnvironmentModel, policy: Any, prior: ActionPrior, data: Segment, sign: float = 1.0
) -> Tensor:
    """−Σ_t log q(a_t | s_t) · [temperature · log p(τ, O)/q(τ), of its factors from t on], a path.

    Every number is read off Pyro's traces of the program, conditioned on the paths in `data`.
    """
    given, steps = conditioned(data), len(data.step)
    with pyro.plate("paths", SLOTS):
        guide = poutine.trace(given).get_trace(model, policy, steps)
        joint = poutine.trace(given).get_trace(model, prior, steps, temperature=TEMPERATURE)
    guide.compute_log_prob()
    joint.compute_log_prob()
    loss, rest = torch.zeros(()), torch.zeros(SLOTS)
    for t in reversed(range(steps)):
        taken = guide.nodes[f"action_{t}"]
        weights = joint.nodes[f"optimality_{t}"]["log_prob"]
        ratio = joint.nodes[f"action_{t}"]["log_prob"] - taken["log_prob"]
        rest = rest + TEMPERATURE * (weights + sign * ratio).detach()
        loss = loss - (taken["unscaled_log_prob"] * rest).sum() / SLOTS
    return loss


def both(case: str, sign: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and its gradient, by the program and by the update."""
    make_model, make_prior = CASES[case]
    model = make_model()
    prior = make_prior(model)
    settings = PolicyGradient(
        temperature=TEMPERATURE,
        environments=SLOTS,
        steps_per_round=0,
        baseline="none",
        centre_advantages=False,
        weigh_by_discount=True,
        max_gradient_norm=None,
        hidden=(8,),
    )
    torch.manual_seed(0)
    learner = policy_gradient._Learner(settings, model, prior)
    stirred(learner.policy)
    data = learner.collect(Collector(environments(model, SLOTS), 3))
    parameters = list(learner.policy.parameters())
    loss = program_loss(model, learner.policy, prior, data, sign)
    by_program = [loss.detach(), *torch.autograd.grad(loss, parameters)]
    scale = data.steps / SLOTS  # the update's is a mean over steps, the program's over paths
    found = learner.update(data)
    by_update = [found["loss"], *(parameter.grad for parameter in parameters)]
    return by_program, [scale * part for part in by_update]


@pytest.mark.parametrize("case", list(CASES))
def test_the_update_of_the_policy_gradient_is_the_programs(case: str) -> None:
    for expected, found in zip(*both(case), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ["Discrete, categorical", "Box, gaussian"])
def test_a_program_that_pays_for_divergence_is_told_apart(case: str) -> None:
    by_program, by_update = both(case, sign=-1.0)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(by_program, by_update, strict=True))


WINDOW = 3


def path_weights(
    model: EnvironmentModel, learner: Any, data: Segment, prior: ActionPrior, sign: float
) -> Tensor:
    """Σ over paths of temperature · log p/q of `WINDOW` steps and what follows, less V(s_0)."""
    given = conditioned(data)

    def message(state: Tensor) -> Tensor:
        return value_at(learner.value, state, torch.full((SLOTS,), WINDOW))

    with pyro.plate("paths", SLOTS):
        guide = poutine.trace(given).get_trace(model, learner.policy, WINDOW)
        joint = poutine.trace(given).get_trace(
            model, prior, WINDOW, temperature=TEMPERATURE, message=message
        )
    first = value_at(learner.value, data.state[0], torch.zeros(SLOTS, dtype=torch.long))
    return TEMPERATURE * (joint.log_prob_sum() - sign * guide.log_prob_sum()) - first.sum()


def residuals(case: str, kind: str, sign: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """The residuals of the first paths, summed, and their gradients: by program and by update."""
    make_model, make_prior = CASES[case]
    model = make_model()
    prior = make_prior(model)
    settings = PCL(kind=kind, temperature=TEMPERATURE, window=WINDOW, hidden=(8,))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has random dynamics")
        learner = pcl._Learner(settings, model, prior)
    stirred(learner.policy)
    stirred(learner.value)
    data = Collector(environments(model, SLOTS), 3).collect_episodes(learner.policy)
    parameters = [*learner.policy.parameters(), *learner.value.parameters()]
    found = learner.residual(data, TEMPERATURE)[0][0].sum()
    expected = path_weights(model, learner, data, prior, sign)
    by_program, by_update = (
        [total.detach(), *torch.autograd.grad(total, parameters)] for total in (expected, found)
    )
    return by_program, by_update


FINITE = [case for case in CASES if case.startswith("Discrete")]


@pytest.mark.parametrize(
    ("case", "kind"), [*((c, "pcl") for c in CASES), *((c, "unified") for c in FINITE)]
)
def test_the_residual_of_path_consistency_is_the_programs(case: str, kind: str) -> None:
    for expected, found in zip(*residuals(case, kind), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_residual_of_the_wrong_sign_is_told_apart() -> None:
    by_program, by_update = residuals("Discrete, categorical", "pcl", sign=-1.0)
    assert (by_program[0] - by_update[0]).abs() > 1e-3


DISCRETE = [case for case in CASES if not case.startswith("Box")]


def soft_values(
    model: EnvironmentModel, prior: ActionPrior, q: Any, states: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Of N states temperature · log p(O), (N,), the posterior of every action, (A, N), and the
    actions, by running the program of one decision once for each."""
    space = model.action_space
    sizes = [int(space.n)] if isinstance(space, Discrete) else [int(n) for n in space.nvec]
    actions = list(torch.cartesian_prod(*(torch.arange(n) for n in sizes)))
    values, joints = q(states, None, steps).mean(0), []
    for number, action in enumerate(actions):

        def decision(chosen: Tensor = action, paid: Tensor = values[:, number]) -> None:
            with pyro.plate("states", len(states)):
                pyro.sample("action", prior(states), obs=chosen.expand(len(states), *chosen.shape))
                pyro.sample("optimality", Optimality(paid / TEMPERATURE), obs=torch.ones(()))

        trace = poutine.trace(decision).get_trace()
        trace.compute_log_prob()
        joints.append(sum(trace.nodes[site]["log_prob"] for site in ("action", "optimality")))
    joint = torch.stack(joints)
    return TEMPERATURE * joint.logsumexp(0), joint.softmax(0), actions


def recorded(graph: Any, *given: Tensor) -> tuple[Tensor, ...]:
    """What a graph gives, and see that it was recorded."""
    found: tuple[Tensor, ...] = graph(*given)
    assert graph.traced
    return found


def residual_of_q(case: str, twin: str = "") -> tuple[list[Tensor], list[Tensor], Any]:
    """Loss and gradient of soft Q-learning by the program and by what is recorded of it, and the
    learner."""
    make_model, make_prior = CASES[case]
    model = make_model()
    prior = make_prior(model)
    settings = SQL(temperature=TEMPERATURE, hidden=(8,), batch_size=SLOTS, compile="off")
    torch.manual_seed(0)
    learner = sql._learner(settings, model, prior)
    stirred(learner.q)
    stirred(learner.lags["q"].behind)
    collector = Collector(environments(model, SLOTS), 3)
    for _ in range(STEPS):
        learner.replay.add(collector.collect(lambda state, t: prior(state), 1))
    batch = learner._batch(5)
    assert batch.goes_on.min() == 0 or not model.can_end
    assert batch.step.max() == STEPS - 1
    found = recorded(learner._graphs["q"], *batch, torch.tensor(TEMPERATURE))
    lagging = learner.lags["q"].behind if twin != "no lag" else learner.q
    rho = UniformPrior(model.action_space) if twin == "no prior" else prior
    value = soft_values(model, rho, lagging, batch.next_state, batch.next_step)[0]
    goes_on = 1.0 if twin == "no end" else batch.goes_on
    target = batch.reward + DISCOUNT * goes_on * value
    if twin != "no lag":
        target = target.detach()
    loss = sum(
        0.5 * (member - target).square().mean()
        for member in learner.q(batch.state, batch.action, batch.step)
    )
    parameters = list(learner.q.parameters())
    by_program = [loss.detach(), *torch.autograd.grad(loss, parameters)]
    return by_program, [found[len(parameters)], *found[: len(parameters)]], learner


@pytest.mark.parametrize("case", DISCRETE)
def test_the_residual_of_soft_q_learning_is_the_programs(case: str) -> None:
    by_program, by_update, _ = residual_of_q(case)
    for expected, found in zip(by_program, by_update, strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", DISCRETE)
def test_the_policy_of_soft_q_learning_is_the_programs_posterior(case: str) -> None:
    _, _, learner = residual_of_q(case)
    model, batch = learner.model, learner._batch(6)
    _, posterior, actions = soft_values(model, learner.prior, learner.q, batch.state, batch.step)
    chosen = learner.policy(batch.state, batch.step)
    for action, expected in zip(actions, posterior, strict=True):
        given = action.expand(len(expected), *action.shape)
        torch.testing.assert_close(chosen.log_prob(given).exp(), expected)


BOXES = [case for case in CASES if case.startswith("Box")]


def joint_by_program(
    prior: ActionPrior, q: Any, state: Tensor, step: Tensor, action: Tensor
) -> Any:
    """log p(a, O | s) of actions (K, N, d), by running the program of one decision for each."""
    joints = []
    for chosen in action:

        def decision(chosen: Tensor = chosen) -> None:
            with pyro.plate("states", len(state)):
                taken = pyro.sample("action", prior(state), obs=chosen)
                paid = torch.stack([*q(state, taken, step)]).min(0).values
                pyro.sample("optimality", Optimality(paid / TEMPERATURE), obs=torch.ones(()))

        trace = poutine.trace(decision).get_trace()
        trace.compute_log_prob()
        joints.append(sum(trace.nodes[site]["log_prob"] for site in ("action", "optimality")))
    return torch.stack(joints)


def of_the_sampler(case: str, **settings: Any) -> tuple[Any, Any]:
    """A learner in a box, and a batch."""
    make_model, make_prior = CASES[case]
    model = make_model()
    prior = make_prior(model)
    made = SQL(temperature=TEMPERATURE, hidden=(8,), batch_size=SLOTS, compile="off", **settings)
    torch.manual_seed(0)
    learner = sql._learner(made, model, prior)
    stirred(learner.q)
    stirred(learner.lags["q"].behind)
    collector = Collector(environments(model, SLOTS), 3)
    for _ in range(STEPS):
        learner.replay.add(collector.collect(lambda state, t: prior(state), 1))
    return learner, learner._batch(5)


@pytest.mark.parametrize(
    ("case", "proposals"), [("Box, uniform", "uniform"), *((case, "guide") for case in BOXES)]
)
def test_the_residual_in_a_box_is_the_programs(case: str, proposals: str) -> None:
    """α log (1/K) Σ p(a_k, O) / density(a_k), of the draws that the update weighs."""
    learner, batch = of_the_sampler(case, proposals=proposals)
    parameters = list(learner.q.parameters())
    temperature = torch.tensor(TEMPERATURE)
    recorded(learner._graphs["q"], *batch, temperature)
    torch.manual_seed(9)
    found = learner._graphs["q"](*batch, temperature)
    torch.manual_seed(9)
    with torch.no_grad():
        action, log_density = sql_sampler.proposals(
            learner.policy, batch.next_state, batch.next_step, learner.settings
        )
    assert action.shape == (16, SLOTS, 2)
    lagging = learner.lags["q"].behind
    joint = joint_by_program(learner.prior, lagging, batch.next_state, batch.next_step, action)
    value = TEMPERATURE * ((joint - log_density).exp().mean(0)).log()
    target = (batch.reward + DISCOUNT * batch.goes_on * value).detach()
    loss = sum(
        0.5 * (member - target).square().mean()
        for member in learner.q(batch.state, batch.action, batch.step)
    )
    torch.testing.assert_close(found[len(parameters)], loss.detach(), rtol=1e-9, atol=1e-9)
    for expected, gradient in zip(torch.autograd.grad(loss, parameters), found, strict=False):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", BOXES)
def test_the_gradient_of_the_sampler_is_of_the_programs_score(case: str) -> None:
    """Σ over particles of −(1/K) Σ_j [κ ∇ log p(u_j) + ∇κ] · ∂u, κ of the median rule."""
    learner, batch = of_the_sampler(case, particles=8)
    parameters = list(learner.policy.sampler.parameters())
    temperature = torch.tensor(TEMPERATURE)
    recorded(learner._graphs["policy"], *batch, temperature)
    torch.manual_seed(9)
    found = learner._graphs["policy"](*batch, temperature)
    torch.manual_seed(9)
    u = sql_sampler.drawn(learner.policy, batch.state, batch.step, 8)
    still = u[:4].detach().requires_grad_()
    tanh = torch.distributions.TanhTransform()
    joint = joint_by_program(learner.prior, learner.q, batch.state, batch.step, still.tanh())
    log_density = joint + tanh.log_abs_det_jacobian(still, still.tanh()).sum(-1)
    (slopes,) = torch.autograd.grad(log_density.sum(), [still])
    loss: Any = 0.0
    for n in range(SLOTS):
        fixed, moved = still[:, n].detach(), u[4:, n]
        squares = torch.cdist(fixed, moved.detach()).square()
        width = squares.flatten().sort().values[7] / np.log(4)
        kernel = (-squares / width).exp().unsqueeze(-1)
        away = -2 * (fixed.unsqueeze(1) - moved.detach()) / width
        direction = (kernel * (slopes[:, n].unsqueeze(1) + away)).mean(0)
        loss = loss - (moved * direction).sum() / (4 * SLOTS)
    for expected, gradient in zip(torch.autograd.grad(loss, parameters), found, strict=False):
        assert expected.abs().max() > 1e-5
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("twin", ["no lag", "no prior", "no end"])
def test_another_residual_of_q_is_told_apart(twin: str) -> None:
    """The gradient of the target; another prior; V of what has ended."""
    by_program, by_update, _ = residual_of_q("Discrete, categorical", twin)
    assert (
        max(float((a - b).abs().max()) for a, b in zip(by_program, by_update, strict=True)) > 1e-3
    )


def soft_returns(case: str, sign: float = 1.0) -> tuple[Tensor, Tensor]:
    """Σ_t γ^t r̃ of all paths, by the program and as REPS weighs steps and episodes by it."""
    make_model, make_prior = CASES[case]
    model = make_model()
    prior = make_prior(model)
    settings = PolicyGradient(hidden=(8,))
    torch.manual_seed(0)
    policy = stirred(learned.networks(settings, model, prior)[0])
    data = Collector(environments(model, SLOTS), 3).collect_episodes(policy)
    with pyro.plate("paths", SLOTS), torch.no_grad():
        given, steps = conditioned(data), len(data.step)
        guide = poutine.trace(given).get_trace(model, policy, steps)
        joint = poutine.trace(given).get_trace(model, prior, steps, temperature=TEMPERATURE)
        log_ratio = policy(data.state, data.step).log_prob(data.action)
        log_ratio = log_ratio - learned.log_prior(prior, data)
    soft = soft_reward(data.reward, sign * log_ratio, TEMPERATURE)
    total = torch.where(data.valid, DISCOUNT**data.step * soft, 0.0).sum()
    return TEMPERATURE * (joint.log_prob_sum() - guide.log_prob_sum()), total


@pytest.mark.parametrize("case", list(CASES))
def test_the_soft_reward_of_reps_is_the_programs(case: str) -> None:
    by_program, by_update = soft_returns(case)
    torch.testing.assert_close(by_update, by_program, rtol=1e-10, atol=1e-10)


def test_a_soft_reward_of_the_wrong_sign_is_told_apart() -> None:
    by_program, by_update = soft_returns("Discrete, categorical", sign=-1.0)
    assert (by_program - by_update).abs() > 1e-3


BATCH = 5
"""The seed of a batch."""


def off_policy(case: str) -> tuple[Learner, tuple[Tensor, ...]]:
    """A learner of `SAC` that has begun, and what its graphs are given."""
    make_model, make_prior = CASES[case]
    model = make_model()
    settings = SAC(
        temperature=TEMPERATURE,
        hidden=(8,),
        environments=SLOTS,
        steps_per_round=STEPS,
        warmup_steps=10**9,
        batch_size=SLOTS,
        compile="off",
    )
    torch.manual_seed(0)
    learner = sac._learner(settings, model, make_prior(model))
    for module in (learner.policy, learner.q, learner.lags["q"].behind):
        stirred(module)
    learner.update(learner.collect(Collector(environments(model, SLOTS), 3)))
    short = Collector(environments(model, SLOTS, STEPS - 2), 4)  # whose episodes are cut
    learner.replay.add(short.collect(learner.policy, STEPS))
    batch = learner._batch(BATCH)
    assert 0 < batch.goes_on.sum() < SLOTS
    return learner, (*batch, torch.tensor(TEMPERATURE))


def evidence_bound(
    learner: Learner, q: Any, state: Tensor, step: Tensor, prior: ActionPrior, sign: float
) -> Tensor:
    """temperature · ELBO of one decision, of every state, by small programs of Pyro's own, (N,).

    TraceEnum_ELBO sums over Discrete actions; the combinations of a MultiDiscrete, which Pyro does
    not enumerate, are summed here; actions of boxes are drawn.
    """
    space, policy = learner.model.action_space, learner.policy
    if isinstance(space, MultiDiscrete):
        actions = every_action(space)
        values = q(state, None, step).mean(0).mT
        taken, expected = policy(state, step).log_prob(actions), prior(state).log_prob(actions)
        ever = taken > -torch.inf
        ratio = torch.where(ever, taken, 0.0) - torch.where(ever, expected, 0.0)
        return (taken.exp() * (values - sign * TEMPERATURE * ratio)).sum(0)
    if isinstance(space, Discrete):
        elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=0)
        bounds = []
        for one, t in zip(state.split(1), step.split(1), strict=True):
            weight = q(one, None, t).mean(0)[0] / (sign * TEMPERATURE)

            def one_decision(one: Tensor = one, weight: Tensor = weight) -> None:
                action = pyro.sample("action", categorical(prior(one[0]).probs))
                pyro.sample("optimality", Optimality(weight[action]), obs=ONE)

            def guide(one: Tensor = one, t: Tensor = t) -> None:
                both = {"enumerate": "parallel"}
                pyro.sample("action", policy(one[0], t[0]), infer=both)

            bounds.append(-elbo.differentiable_loss(one_decision, guide))
        return sign * TEMPERATURE * torch.stack(bounds)
    with pyro.plate("states", len(state)):
        guide_trace = poutine.trace(lambda: pyro.sample("action", policy(state, step))).get_trace()
        action = guide_trace.nodes["action"]["value"]
        program = poutine.condition(lambda: pyro.sample("action", prior(state)), {"action": action})
        joint = poutine.trace(program).get_trace()
    guide_trace.compute_log_prob()
    joint.compute_log_prob()
    ratio = guide_trace.nodes["action"]["log_prob"] - joint.nodes["action"]["log_prob"]
    return q(state, action, step).amin(0) - sign * TEMPERATURE * ratio


Losses = dict[str, list[Tensor]]
"""Of each part: its loss, and the gradient of that."""


def soft_losses(case: str, twin: str = "") -> tuple[Losses, Losses]:
    """By Pyro's programs, or a broken twin of them, and by the graphs that learn."""
    learner, given = off_policy(case)
    batch, q, lagging = Batch(*given[:-1]), learner.parts["q"].module, learner.lags["q"].behind
    prior, sign = learner.prior, -1.0 if twin == "entropy sign" else 1.0
    if twin == "missing prior":
        prior = UniformPrior(learner.model.action_space)
    moving = twin == "gradient of the target"
    by_graph: Losses = {}
    for name, part in learner.parts.items():
        with torch_seeded(7):
            gradients_and_loss = learner._graphs[name](*given)
        count = len(list(part.module.parameters()))
        assert learner._graphs[name].traced
        by_graph[name] = [gradients_and_loss[count], *gradients_and_loss[:count]]
    with torch_seeded(7):
        source = q if moving else lagging
        value = evidence_bound(learner, source, batch.next_state, batch.next_step, prior, sign)
    if not moving:
        value = value.detach()
    goes_on = torch.ones(SLOTS) if twin == "through terminated" else batch.goes_on
    if twin == "cut at truncated":
        goes_on = goes_on * ~learner.replay.sample(SLOTS, 1, BATCH).truncated[0]
    target = batch.reward + learner.model.discount * goes_on * value
    residual = q(batch.state, batch.action, batch.step) - target
    loss = {"q": 0.5 * residual.square().sum() / SLOTS}
    with torch_seeded(7):
        bounds = evidence_bound(learner, q, batch.state, batch.step, prior, sign)
    loss["policy"] = -bounds.mean()
    by_program = {
        name: [
            loss[name].detach(),
            *torch.autograd.grad(loss[name], list(part.module.parameters())),
        ]
        for name, part in learner.parts.items()
    }
    return by_program, by_graph


@pytest.mark.parametrize("case", list(CASES))
def test_the_losses_of_soft_actor_critic_are_the_programs(case: str) -> None:
    by_program, by_graph = soft_losses(case)
    for name, parts in by_program.items():
        for expected, found in zip(parts, by_graph[name], strict=True):
            assert expected.abs().max() > 1e-4
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("twin", "parts"),
    [
        ("entropy sign", ["q", "policy"]),
        ("missing prior", ["q", "policy"]),
        ("through terminated", ["q"]),
        ("cut at truncated", ["q"]),
        ("gradient of the target", ["q"]),
    ],
)
@pytest.mark.parametrize(
    "case", ["Discrete, categorical", "MultiDiscrete, policy", "Box, gaussian"]
)
def test_broken_losses_are_told_apart(case: str, twin: str, parts: list[str]) -> None:
    by_program, by_graph = soft_losses(case, twin)
    for name in parts:
        pairs = zip(by_program[name], by_graph[name], strict=True)
        assert max(float((a - b).abs().max()) for a, b in pairs) > 1e-3
