"""The score-function gradient against the exact one, credit against its definition."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Space
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions.transforms import TanhTransform

from inference_rl import (
    CategoricalPrior,
    EnvironmentModel,
    Exact,
    FiniteModel,
    InferenceResult,
    MaskPrior,
    PolicyGradient,
    UniformPrior,
    infer,
    load_target,
)
from inference_rl.evaluation import episode_limit
from inference_rl.inference.exact_finite import _objective, objective_parts
from inference_rl.inference.policy_gradient import advantages, entropy_bonus_loss, score_loss
from inference_rl.learning.collection import Collector, Segment
from inference_rl.networks import Architecture, NetworkPolicy, described
from inference_rl.simulate import GymnasiumModel, environments
from inference_rl.temperature import default_target_entropy

STATES, ACTIONS, STEPS, DISCOUNT, TEMPERATURE = 3, 3, 5, 0.8, 0.7


def model(seed: int = 0, uniform: bool = False) -> FiniteModel:
    """A random model that ends in its last state, or after `STEPS` steps."""
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.ones(STATES), (STATES, ACTIONS))
    prior = rng.dirichlet(np.ones(ACTIONS) * 3, STATES)
    return FiniteModel.from_tables(
        transition,
        np.where(np.arange(STATES)[:, None, None] == STATES - 1, 0.0, rng.normal(size=(3, 3, 3))),
        discount=DISCOUNT,
        initial=np.array([0.6, 0.4, 0.0]),
        prior=None if uniform else prior,
        terminal=np.array([False, False, True]),
        horizon=STEPS,
    )


def policy_for(given: FiniteModel) -> NetworkPolicy:
    architecture = Architecture(
        described(given.state_space), described(given.action_space), horizon=given.horizon
    )
    policy = NetworkPolicy(architecture).double()
    torch.manual_seed(3)
    with torch.no_grad():
        policy.parameters_of.table.normal_()
    return policy


def exact_gradient(given: FiniteModel, policy: NetworkPolicy) -> Tensor:
    logits = policy.parameters_of.table.detach().clone().requires_grad_()
    probs = logits.reshape(STEPS, STATES, ACTIONS).softmax(-1)
    objective = _objective(given, probs, TEMPERATURE)
    return torch.autograd.grad(objective, logits)[0]


TWINS = {
    "as it is": {},
    "entropy's sign": {"sign": -1.0},
    "no prior": {"without_prior": True},
    "no discount": {"undiscounted": True},
    "no end": {"bootstrap": True},
}


SLOTS = 4000


@functools.lru_cache(maxsize=1)
def experience(
    seed: int, uniform: bool
) -> tuple[FiniteModel, NetworkPolicy, list[tuple[Segment, Tensor]]]:
    """A random model, a policy, and ten rounds of its episodes with their log-probabilities."""
    given = model(seed, uniform=uniform)
    policy = policy_for(given)
    collector = Collector(environments(given, SLOTS), 11)
    rounds = [collector.collect_episodes(policy) for _ in range(10)]
    return (
        given,
        policy,
        [(data, policy(data.state, data.step).log_prob(data.action)) for data in rounds],
    )


@pytest.mark.parametrize("twin", list(TWINS))
@pytest.mark.parametrize("baseline", [0.0, 1.5])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_gradient_is_unbiased(twin: str, uniform: bool, baseline: float, seed: int) -> None:
    if twin == "no prior" and uniform:
        pytest.skip("the uniform prior is a constant, which changes J and no gradient but at ends")
    changed = TWINS[twin]
    given, policy, rounds = experience(seed, uniform)
    drawn = []
    for data, log_prob in rounds:
        divergence = log_prob.detach()
        if not changed.get("without_prior"):
            divergence = divergence - given.action_prior(data.state).log_prob(data.action)
        reward = data.reward - changed.get("sign", 1.0) * TEMPERATURE * divergence
        value = torch.full_like(reward, baseline)
        terminated = data.terminated & (not changed.get("bootstrap", False))
        advantage = advantages(
            torch.where(data.valid, reward, 0.0),
            value,
            value + 3.0 * changed.get("bootstrap", False),
            terminated,
            data.ended,
            discount=DISCOUNT,
            trace_decay=1.0,
        )
        power = 0 if changed.get("undiscounted") else data.step
        weight = DISCOUNT**power * data.valid * torch.ones_like(reward)
        for part in torch.arange(SLOTS).chunk(20):
            loss = score_loss(log_prob[:, part], advantage[:, part], weight[:, part] / len(part))
            slope = torch.autograd.grad(loss, policy.parameters_of.table, retain_graph=True)[0]
            drawn.append(-slope)
    sample = torch.stack(drawn)
    error = sample.std(0) / math.sqrt(len(sample))
    known = error > 1e-12
    deviation = ((sample.mean(0) - exact_gradient(given, policy)) / error)[known].abs().max()
    if twin == "as it is":
        assert deviation < 4.5
    else:
        assert deviation > 6


def test_advantages_are_what_they_are_defined_to_be() -> None:
    rng = np.random.default_rng(0)
    shape, discount, decay = (30, 4), 0.9, 0.7
    reward, value, following = (torch.from_numpy(rng.normal(size=shape)) for _ in range(3))
    terminated = torch.from_numpy(rng.random(shape) < 0.1)
    ended = terminated | torch.from_numpy(rng.random(shape) < 0.1)
    found = advantages(
        reward, value, following, terminated, ended, discount=discount, trace_decay=decay
    )
    for t in range(shape[0]):
        for n in range(shape[1]):
            total, weight = 0.0, 1.0
            for k in range(t, shape[0]):
                rest = 0.0 if terminated[k, n] else discount * following[k, n]
                total += weight * (reward[k, n] + rest - value[k, n])
                weight *= discount * decay
                if ended[k, n]:
                    break
            assert found[t, n].item() == pytest.approx(float(total), abs=1e-12)


def expected_gradients(given: FiniteModel, policy: NetworkPolicy) -> tuple[Tensor, Tensor]:
    """Of the score and of the entropy-bonus estimator, over all that may happen; exact.

    The expectation is over the occupancy of (t, s) and the policy's actions, with returns to go
    replaced by their means, which are linear in both losses.
    """
    table = policy.parameters_of.table
    log_probs = table.reshape(STEPS, STATES, ACTIONS).log_softmax(-1)
    probs = log_probs.detach().exp()
    going, bonus = ~given.is_terminal, -TEMPERATURE * (probs.log() - given.log_prior)
    occupied, at = torch.zeros(STEPS, STATES, dtype=torch.float64), given.initial
    for t in range(STEPS):
        occupied[t] = at * going
        moves = (given.expected_value(torch.eye(STATES, dtype=torch.float64)[s]) for s in range(3))
        onward = torch.stack(list(moves), dim=-1)  # (S, A, S)
        at = torch.einsum("s,sa,san->n", occupied[t], probs[t], onward)
    gradients = []
    for estimator in ("score", "entropy-bonus"):
        extra = bonus if estimator == "score" else torch.zeros_like(bonus)
        credit, v = torch.zeros_like(probs), torch.zeros(STATES, dtype=torch.float64)
        for t in reversed(range(STEPS)):
            credit[t] = given.expected_reward() + extra[t] + DISCOUNT * given.expected_value(v)
            v = going * (probs[t] * credit[t]).sum(-1)
        power = torch.arange(STEPS, dtype=torch.float64).reshape(-1, 1, 1)
        weight = DISCOUNT**power * occupied.unsqueeze(-1) * probs
        if estimator == "score":
            loss = score_loss(log_probs, credit, weight)
        else:
            entropy = -(log_probs.exp() * log_probs).sum(-1, keepdim=True).expand_as(log_probs)
            loss = entropy_bonus_loss(log_probs, entropy, credit, weight, TEMPERATURE)
        gradients.append(-torch.autograd.grad(loss, table, retain_graph=True)[0])
    return gradients[0], gradients[1]


@pytest.mark.parametrize("seed", range(3))
def test_only_the_score_estimator_has_the_gradient_of_the_objective(seed: int) -> None:
    given = model(seed, uniform=True)
    policy = policy_for(given)
    exact = exact_gradient(given, policy)
    score, bonus = expected_gradients(given, policy)
    torch.testing.assert_close(score, exact, rtol=0, atol=1e-12)
    # The prior is uniform and the bonus an entropy: what differs is the entropy of later steps.
    last = (STEPS - 1) * STATES
    torch.testing.assert_close(bonus[last:], exact[last:], rtol=0, atol=1e-12)
    assert (bonus - exact)[:last].abs().max() > 1e-3


class Own(torch.nn.Linear):
    """A policy that knows of no prior."""

    def __init__(self) -> None:
        super().__init__(4, 2)

    def forward(self, state: Tensor) -> dist.Categorical:
        return dist.Categorical(logits=super().forward(state))


class Steered(EnvironmentModel):
    """A point on a line, pushed by actions of any kind; it pays to be close to 1."""

    state_space, discount, horizon = Box(-np.inf, np.inf, (1,)), 0.9, 8

    def __init__(self, action_space: Space) -> None:
        self.action_space = action_space

    def initial_state(self) -> TorchDistribution:
        return dist.Normal(torch.zeros(1), 0.1).to_event(1)

    def transition(self, state: Tensor, action: Tensor) -> TorchDistribution:
        push = action if isinstance(self.action_space, Discrete) else action.sum(-1)
        return dist.Normal(state + 0.1 * push.unsqueeze(-1), 0.01).to_event(1)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return -(next_state.squeeze(-1) - 1).square()


@pytest.mark.parametrize("estimator", ["score", "pathwise", "entropy-bonus"])
@pytest.mark.parametrize("space", [Discrete(3), MultiDiscrete([2, 3]), Box(-1.0, 1.0, (2,))])
def test_every_estimator_learns_in_every_space_that_it_can(estimator: str, space: Space) -> None:
    settings = PolicyGradient(
        estimator=estimator,
        total_steps=5000,
        environments=32,
        steps_per_round=8,
        learning_rate=0.05,
        evaluation_episodes=0,
    )
    if estimator == "pathwise" and not isinstance(space, Box):
        with pytest.raises(TypeError, match="pathwise needs draws that can be differentiated"):
            infer(Steered(space), settings)
        return
    few = dataclasses.replace(settings, total_steps=1)
    assert infer(Steered(space), settings).objective > infer(Steered(space), few).objective + 0.2


class Anything(gymnasium.Env[Any, Any]):
    """Shows and takes whatever its spaces hold, and pays one for each step."""

    def __init__(self, observed: Space, acted: Space) -> None:
        self.observation_space, self.action_space = observed, acted

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action in self.action_space
        return self.observation_space.sample(), 1.0, False, False, {}


@pytest.fixture
def anything() -> Iterator[None]:
    gymnasium.register("Anything-v0", Anything, max_episode_steps=5)
    yield
    gymnasium.registry.pop("Anything-v0")


PICTURES, TABLES = Box(0, 255, (4, 4, 3), np.uint8), Box(-1, 1, (2, 2))


@pytest.mark.usefixtures("anything")
@pytest.mark.parametrize(
    ("observed", "acted"),
    [
        (TABLES, TABLES),
        (Box(-1, 1, ()), Box(-2, 4, ())),
        (PICTURES, Discrete(2)),
        (Box(0, 9, (3,), np.int16), MultiDiscrete([2, 3])),
        (gymnasium.spaces.Dict({"a": PICTURES, "b": Discrete(2)}), Box(-1, 1, (2, 1), np.float64)),
    ],
)
def test_networks_learn_in_boxes_of_any_shape(observed: Space, acted: Space) -> None:
    given = GymnasiumModel("Anything-v0", {"observed": observed, "acted": acted})
    settings = PolicyGradient(total_steps=300, scale_observations=True, evaluation_episodes=2)
    result = infer(given, settings)
    assert result.metrics[-1]["deterministic"]["mean_return"] == 5
    (size,) = given.state_space.shape
    assert result.v(torch.zeros(7, size)).shape == (7, 1)


class Squashed(nn.Module):
    """A module of a user's own: a tanh-Gaussian, as most implementations have it."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))

    def forward(self, state: Tensor) -> TorchDistribution:
        base = dist.Normal(self.loc.expand(*state.shape[:-1], 2), 1.0).to_event(1)
        return dist.TransformedDistribution(base, [TanhTransform(cache_size=1)])


class Outputs(Squashed):
    """Another, that makes no distribution of what it puts out."""

    def forward(self, state: Tensor) -> Any:
        return self.loc.expand(*state.shape[:-1], 2)


def test_a_guide_without_an_entropy_is_refused_by_name() -> None:
    settings = PolicyGradient(estimator="entropy-bonus", policy=Squashed(), total_steps=100)
    with pytest.raises(TypeError, match=r"and TransformedDistribution.* has none in closed form"):
        infer(Steered(Box(-1.0, 1.0, (2,))), settings)


def test_a_squashed_gaussian_learns_and_is_evaluated() -> None:
    settings = PolicyGradient(policy=Squashed(), total_steps=256, evaluation_episodes=2)
    result = infer(Steered(Box(-1.0, 1.0, (2,))), settings)
    assert torch.equal(result.policy.mode(torch.zeros(1, 1))[0], result.policy.module.loc.tanh())
    assert math.isfinite(result.metrics[-1]["deterministic"]["mean_return"])
    with pytest.raises(TypeError, match="policy: expected Outputs to return a distribution"):
        infer(Steered(Box(-1.0, 1.0, (2,))), dataclasses.replace(settings, policy=Outputs()))


class PartlyFrozen(Squashed):
    """A third, of which not all is to be learned."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, state: Tensor) -> TorchDistribution:
        base = dist.Normal(self.loc.expand(*state.shape[:-1], 2), self.scale).to_event(1)
        return dist.TransformedDistribution(base, [TanhTransform(cache_size=1)])


def test_frozen_parameters_stay_as_they_are() -> None:
    settings = PolicyGradient(policy=PartlyFrozen(), total_steps=256, evaluation_episodes=0)
    learned = infer(Steered(Box(-1.0, 1.0, (2,))), settings).policy.module
    assert learned.loc.all()
    assert torch.equal(learned.scale, torch.ones(2))


def test_forbidden_actions_are_never_taken() -> None:
    lake = load_target("FrozenLake-v1")
    settings = PolicyGradient(temperature=0.05, total_steps=3000, evaluation_episodes=0)
    for prior in (
        MaskPrior([True, True, True, False]),
        CategoricalPrior(probs=[0.5, 0.25, 0.25, 0.0]),
    ):
        result = infer(lake, settings, prior=prior)
        assert not result.policy(torch.arange(16)).probs[:, 3].any()
        assert math.isfinite(result.objective)
    with pytest.raises(ValueError, match="which the policy took, got none"):
        infer(
            load_target("CartPole-v1"),
            dataclasses.replace(settings, policy=Own()),
            prior=MaskPrior(lambda s: torch.stack([s[..., 0] < 0, s[..., 0] >= 0], -1)),
        )


def test_temperatures_move() -> None:
    given = load_target("chain")
    annealed = PolicyGradient(
        temperature=1.0, final_temperature=0.01, total_steps=5000, evaluation_episodes=0
    )
    assert infer(given, annealed).temperature == pytest.approx(0.01, rel=0.1)
    tuned = PolicyGradient(
        temperature="auto",
        target_divergence=0.2,
        learning_rate=0.05,
        total_steps=60_000,
        evaluate_every=5_000,
        evaluation_episodes=0,
    )
    rows = infer(given, tuned).metrics[-4:]
    assert np.mean([row["divergence"] for row in rows]) == pytest.approx(0.2, rel=0.3)
    assert rows[-1]["temperature"] < 0.2  # from 1


@pytest.mark.parametrize("space", [Discrete(3), MultiDiscrete([2, 3]), Box(-1.0, 1.0, (2,))])
def test_what_a_temperature_is_tuned_to_is_said(space: Space) -> None:
    settings = PolicyGradient(temperature="auto", total_steps=300, evaluation_episodes=0)
    uniform = UniformPrior(space)
    (row,) = infer(Steered(space), settings).metrics
    assert row["target_entropy"] == pytest.approx(default_target_entropy(space))
    both = row["target_divergence"] + row["target_entropy"]
    assert both == pytest.approx(uniform(torch.zeros(1, 1)).entropy().item())
    told = dataclasses.replace(settings, target_divergence=0.25)
    (row,) = infer(Steered(space), told, prior=lambda state: uniform(state)).metrics
    assert row["target_divergence"] == 0.25
    assert "target_entropy" not in row  # nobody knows that this prior is uniform
    (row,) = infer(Steered(space), dataclasses.replace(settings, temperature=0.1)).metrics
    assert "target_divergence" not in row


def weights_of_paths(tree: Any) -> dict[tuple[int, ...], float]:
    """By the states and actions of a path, as long as it was alive."""
    paths = {name: tree["posterior"][name].values[0] for name in ("state", "action", "alive")}
    found = {}
    for i, weight in enumerate(tree["sample_stats"]["log_weight"].values[0].tolist()):
        steps = int(paths["alive"][i].sum())
        path = [*paths["state"][i][: steps + 1], -1, *paths["action"][i][:steps]]
        found[tuple(map(int, path))] = weight
    return found


@pytest.mark.parametrize("uniform", [False, True])
def test_paths_weigh_what_they_weigh_in_the_exact_routine(uniform: bool) -> None:
    given = model(uniform=uniform)
    exact = infer(given, Exact(temperature=TEMPERATURE))
    policy = policy_for(given)
    with torch.no_grad():
        policy.parameters_of.table.copy_(exact.policy.probs.log().reshape(-1, ACTIONS))
    learned_result = infer(given, PolicyGradient(temperature=TEMPERATURE, total_steps=100))
    learned_result.policy = policy
    expected = weights_of_paths(exact.sample(2000))
    found = weights_of_paths(learned_result.sample(2000))
    both = found.keys() & expected.keys()
    assert len(both) > 200
    for path in both:
        assert found[path] == pytest.approx(expected[path], abs=1e-12)
    drawn = learned_result.sample(4000)["sample_stats"]["log_weight"].values
    error = abs(drawn.mean() - float(exact.objective) / TEMPERATURE)
    assert error < 4 * drawn.std() / math.sqrt(4000)


def test_weights_are_left_out_where_there_are_none(tmp_path: Path) -> None:
    def weighs(result: InferenceResult) -> bool:
        return "log_weight" in result.sample(3, horizon=4)["sample_stats"]

    given, prior = load_target("chain"), CategoricalPrior(probs=[0.3, 0.7])
    settings = PolicyGradient(total_steps=100, evaluation_episodes=0)
    assert not weighs(infer(given, dataclasses.replace(settings, temperature=0.0)))
    for name, rho in (("own", None), ("in Python", prior)):
        result = infer(given, settings, prior=rho)
        assert weighs(result)
        result.save(tmp_path / name)
        loaded = InferenceResult.load(tmp_path / name)
        assert weighs(loaded) == (rho is None)
    here, again = (
        r.sample(5, horizon=4)["sample_stats"]
        for r in (infer(given, settings), InferenceResult.load(tmp_path / "own"))
    )
    assert here.equals(again)


def test_saved_and_loaded(tmp_path) -> None:
    given = load_target("chain")
    result = infer(given, PolicyGradient(total_steps=600, evaluation_episodes=2))
    result.save(tmp_path)
    loaded = InferenceResult.load(tmp_path)
    states = torch.arange(int(given.state_space.n))
    assert torch.equal(loaded.policy(states).probs, result.policy(states).probs)
    assert torch.equal(loaded.v(states), result.v(states))
    assert loaded.routine == result.routine
    assert loaded.metrics == result.metrics
    assert loaded.objective == result.objective


def test_estimated_parts_are_those_of_the_policy() -> None:
    given = model()
    policy = policy_for(given)
    from inference_rl.inference import learned

    learned_parts = [
        learned.mean_parts(learned.sampled_parts(given, policy, given.action_prior, seed))
        for seed in range(60)
    ]
    table = policy.parameters_of.table.detach().reshape(STEPS, STATES, ACTIONS).softmax(-1)
    exact = objective_parts(given, table)
    for name in ("expected_return", "entropy", "divergence", "steps"):
        drawn = np.array([getattr(parts, name) for parts in learned_parts])
        error = drawn.std(ddof=1) / math.sqrt(len(drawn))
        assert abs(drawn.mean() - getattr(exact, name)) < 4 * error


def test_the_objective_of_endless_episodes_is_cut_where_nothing_is_left() -> None:
    """One reward a step, for ever, in a model that says that it can end."""
    from inference_rl.inference import learned

    endless = FiniteModel.from_tables(
        np.array([[[1.0, 0.0]], [[0.0, 1.0]]]),
        np.array([[1.0], [0.0]]),
        discount=0.9,
        initial=[1.0, 0.0],
        terminal=[False, True],
    )
    assert endless.can_end
    assert episode_limit(endless) == 10_000
    assert learned.objective_steps(endless) == 132  # 0.9^132 < 1e-6 < 0.9^131
    acting = policy_for(endless)
    (parts, *_) = learned.sampled_parts(endless, acting, endless.action_prior, 0)
    assert parts.expected_return == pytest.approx(10.0, rel=1e-6)
    assert parts.expected_return != pytest.approx(10.0, rel=1e-7)
    endless.discount = 1.0
    assert learned.objective_steps(endless) == 10_000
    endless.discount, endless.horizon = 0.9, 5
    assert learned.objective_steps(endless) == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature: expected a finite number >= 0"),
        ({"temperature": "auto", "final_temperature": 0.1}, "final_temperature: expected none"),
        ({"final_temperature": 0.0}, "annealing is geometric"),
        ({"target_entropy": 0.1}, "go with temperature='auto'"),
        ({"total_steps": 0}, "total_steps: expected a whole number >= 1"),
        ({"trace_decay": 1.5}, r"trace_decay: expected a number in \[0, 1\]"),
        ({"hidden": (0,)}, "hidden: expected positive widths"),
        ({"baseline": "none"}, "nothing stands for what follows a segment"),
    ],
)
def test_what_is_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PolicyGradient(**settings)


def test_there_is_no_value_where_none_is_learned(tmp_path: Path) -> None:
    settings = PolicyGradient(
        baseline="none", steps_per_round=0, total_steps=400, evaluation_episodes=0
    )
    model = load_target("chain")
    result = infer(model, settings, directory=tmp_path)
    assert result.v is None
    assert infer(model, settings, directory=tmp_path).objective == result.objective
    result.save(tmp_path)
    assert InferenceResult.load(tmp_path).v is None


def test_a_run_along_paths_says_how_random_its_policy_is() -> None:
    settings = PolicyGradient(
        temperature=0.1, estimator="pathwise", steps_per_round=4, total_steps=64
    )
    result = infer(load_target("pendulum"), settings)
    row = result.metrics[-1]
    # Under a uniform prior the two add up to the entropy of the box, draw by draw.
    assert row["entropy"] + row["divergence"] == pytest.approx(math.log(2), abs=1e-5)
