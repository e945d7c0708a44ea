"""Soft actor-critic against closed forms, and what it does at the ends of episodes."""

from __future__ import annotations

import copy
import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from test_sql import BOX, PAIR, Wind
from torch import Tensor

from inference_rl import (
    SAC,
    SQL,
    CategoricalPrior,
    EnvironmentModel,
    Exact,
    InferenceResult,
    PolicyPrior,
    UniformPrior,
    infer,
    load_target,
)
from inference_rl.cli import main
from inference_rl.inference import learned, off_policy, sac, sql
from inference_rl.learning import memory
from inference_rl.learning.collection import Collector
from inference_rl.simulate import environments
from inference_rl.temperature import TemperatureState, Tuned
from inference_rl.truncated_normal import TruncatedNormal

A, B = np.array([[0.9, 0.2], [0.0, 0.8]]), np.array([[0.1], [0.6]])
COST, EFFORT, NOISE, DISCOUNT, TEMPERATURE = np.diag([1.0, 1.0]), 0.5, 0.2, 0.7, 0.06


class Regulator(EnvironmentModel):
    """Linear dynamics and quadratic costs, where torques are small against their bounds."""

    state_space, action_space = Box(-np.inf, np.inf, (2,)), Box(-1.0, 1.0, (1,))
    discount = DISCOUNT

    def initial_state(self) -> Any:
        return dist.Normal(torch.zeros(2), 0.5).to_event(1)

    def transition(self, state: Tensor, action: Tensor) -> Any:
        a, b = (torch.tensor(m, dtype=state.dtype) for m in (A, B))
        return dist.Normal(state @ a.mT + action @ b.mT, NOISE).to_event(1)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        cost = torch.tensor(np.diag(COST)).to(state.dtype)
        return -(state.square() * cost).sum(-1) - EFFORT * action.square().sum(-1)


def riccati() -> tuple[np.ndarray, float]:
    """Gain K and variance of the soft optimal policy N(-K x, variance)."""
    p = COST.copy()
    for _ in range(2000):
        curvature = EFFORT + DISCOUNT * B.T @ p @ B
        gain = np.linalg.solve(curvature, DISCOUNT * B.T @ p @ A)
        p = COST + DISCOUNT * A.T @ p @ A - DISCOUNT * A.T @ p @ B @ gain
    return gain, float(TEMPERATURE / 2 / curvature[0, 0])


class Linear(torch.nn.Module):
    """A guide that is linear in the state, and Gaussian inside the box."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Linear(2, 1)
        self.log_scale = torch.nn.Parameter(torch.zeros(1))

    def forward(self, state: Tensor) -> Any:
        loc = self.gain(state)
        scale = self.log_scale.exp().expand(loc.shape)
        return TruncatedNormal(loc, scale, validate_args=False).to_event(1)


@pytest.mark.slow
def test_it_finds_the_regulator_that_riccati_gives() -> None:
    settings = SAC(
        temperature=TEMPERATURE,
        policy=Linear(),
        total_steps=300_000,
        environments=64,
        steps_per_round=8,
        updates_per_step=0.05,
        warmup_steps=2_560,
        batch_size=2048,
        learning_rate=3e-4,
        value_learning_rate=1e-3,
        target_rate=0.02,
        hidden=(32, 32),
        activation="tanh",
        evaluation_episodes=0,
        compile="off",
    )
    result = infer(Regulator(), settings)
    gain, variance = riccati()
    torch.manual_seed(0)
    state = torch.randn(2000, 2) * 0.3
    with torch.no_grad():
        drawn = result.policy(state).expand((2000, 2000)).sample().double()
    mean, expected = drawn.mean(0), -state.double() @ torch.from_numpy(gain).mT
    error = (mean - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    ratio = drawn.var(0).mean() / variance
    print(f"gain {gain}, variance {variance:.4f}: error of mean {error:.3f}, ratio {ratio:.3f}")
    assert error < 0.05
    assert abs(ratio - 1) < 0.05


SMALL: dict[str, Any] = {
    "temperature": 0.1,
    "total_steps": 400,
    "environments": 2,
    "steps_per_round": 4,
    "warmup_steps": 40,
    "batch_size": 32,
    "replay_capacity": 200,
    "hidden": (8,),
    "evaluation_episodes": 0,
}


ANNEALED: dict[str, Any] = {"temperature": 0.2, "final_temperature": 0.02}


class Counting(EnvironmentModel):
    """Counts up, and terminates at four."""

    state_space, action_space, discount = Box(0.0, 100.0, (1,)), Discrete(2), 0.9

    def initial_state(self) -> Any:
        return dist.Delta(torch.zeros(1), event_dim=1)

    def transition(self, state: Tensor, action: Tensor) -> Any:
        return dist.Delta(state + 1, event_dim=1)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return state[..., 0]

    def terminal(self, state: Tensor) -> Tensor:
        return state[..., 0] >= 4


@pytest.mark.parametrize(("limit", "ends"), [(None, True), (3, False)])
def test_what_follows_counts_unless_the_episode_has_terminated(
    limit: int | None, ends: bool
) -> None:
    model = Counting()
    torch.manual_seed(0)
    learner = sac._learner(SAC(**SMALL), model, model.action_prior)
    learner.update(learner.collect(Collector(environments(model, 2, limit), 0)))
    batch = learner._batch(1)
    assert torch.equal(batch.next_state, batch.state + 1), "never across the end of an episode"
    assert torch.equal(batch.step, batch.state[:, 0].long())
    assert torch.equal(batch.goes_on, (batch.state[:, 0] != 3).float())
    assert bool((batch.goes_on == 0).any()) == ends


def test_the_temperature_rises_while_the_policy_is_too_far_from_its_prior() -> None:
    model = load_target("chain")
    moved = {}
    for target in (0.001, 0.6):
        settings = SAC(
            **SMALL
            | {"temperature": "auto", "target_divergence": target, "learning_rate": 0.05}
            | {"value_learning_rate": 0.05, "initial_temperature": 0.02},
            temperature_learning_rate=0.01,
        )
        found = infer(model, settings, prior=CategoricalPrior(probs=[0.5, 0.5]))
        moved[target] = found.temperature
        assert found.metrics[-1]["target_divergence"] == target
    assert moved[0.001] > 0.02 > moved[0.6]


def test_a_temperature_loss_of_the_wrong_sign_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the test above, in which a temperature then falls that should rise."""
    right = Tuned.update

    def wrong(self: Tuned, state: TemperatureState, divergence: float) -> TemperatureState:
        assert self.target_divergence is not None
        return right(self, state, 2 * self.target_divergence - divergence)

    monkeypatch.setattr(Tuned, "update", wrong)
    with pytest.raises(AssertionError, match=r"0\.02"):
        test_the_temperature_rises_while_the_policy_is_too_far_from_its_prior()


def test_the_temperature_stays_within_its_bounds() -> None:
    model = load_target("chain")
    bounds = {"least_temperature": 0.9, "greatest_temperature": 1.1}
    for target, expected in ((0.001, 1.1), (0.69, 0.9)):
        settings = SAC(
            **SMALL | {"temperature": "auto", "target_divergence": target} | bounds,
            temperature_learning_rate=0.05,
        )
        policy = CategoricalPrior(probs=[0.9, 0.1])  # which a new policy is far from
        found = infer(model, settings, prior=policy)
        assert 0.9 <= found.temperature <= 1.1
        if target == 0.001:
            assert found.temperature == pytest.approx(expected)


def test_a_temperature_that_is_not_tuned_asks_for_no_divergence() -> None:
    """To get a number from a GPU is to wait for it; a tensor on device meta has none to give."""
    model, unknown = load_target("chain"), torch.empty((), device="meta")
    for moves in ({}, {"final_temperature": 0.01}, {"temperature": "auto"}):
        tempering = learned.Tempering(SAC(**SMALL | moves), model, model.action_prior)
        if "temperature" in moves:
            with pytest.raises(RuntimeError, match="meta"):
                tempering.update(unknown, 1)
        else:
            tempering.update(unknown, 1)


def test_a_target_that_no_policy_meets_is_said() -> None:
    settings = SAC(**SMALL | {"temperature": "auto"}, target_entropy=0.8)
    with pytest.warns(UserWarning, match=r"target entropy below 0.693147 nats, .* got .*0.8\)"):
        infer(load_target("chain"), settings)


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (Box(-np.inf, np.inf, (1,)), "expected a box with bounds to squash actions into"),
        (MultiDiscrete([100, 101]), "at most 10,000 combinations of actions to sum over, got 10,1"),
    ],
)
def test_action_spaces_that_it_has_no_guide_for(space: Any, said: str) -> None:
    class Free(Regulator):
        action_space = space

        def transition(self, state: Tensor, action: Tensor) -> Any:
            return dist.Normal(state, NOISE).to_event(1)

        def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
            return state[..., 0]

    with pytest.raises(TypeError, match=said):
        infer(Free(), SAC(**SMALL))


def test_a_replay_that_does_not_fit_into_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 3000)
    said = r"replay_capacity: 200 steps take .* GiB are free; choose fewer than \d+ steps"
    with pytest.raises(MemoryError, match=said):
        infer(load_target("chain"), SAC(**SMALL))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="device: expected 'cpu', for torch sees no CUDA device"):
        infer(load_target("chain"), SAC(**SMALL, device="cuda"))


@pytest.mark.parametrize(
    ("compiler", "said"),
    [(None, r"a C\+\+ compiler, found none; inst"), ("g++", r".* found no Python\.h in /.*; ")],
    ids=["no compiler", "no headers"],
)
def test_updates_are_not_compiled_where_there_is_nothing_to_compile_with(
    compiler: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    model = load_target("chain")
    long = SMALL | {"total_steps": 10**6}
    assert not sac._learner(SAC(**long), model, model.action_prior).compiled
    with pytest.raises(ValueError, match=f"^compile: expected, for updates .* code, {said}"):
        sac._learner(SAC(**SMALL, compile="on"), model, model.action_prior)


class Compiler:
    """Makes nothing of what it is given, or breaks at the `breaks_at`th."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.breaks_at, self.calls = breaks_at, 0

    def __call__(self, record: Any, given: Any) -> Any:
        self.calls += 1
        if self.calls == self.breaks_at:
            raise OSError("cannot write\nto the cache")
        return record


def learner_that_compiles(monkeypatch: pytest.MonkeyPatch, compiler: Compiler, how: str) -> Any:
    """One whose first updates are due in the round that comes next."""
    monkeypatch.setattr(torch._inductor, "compile", compiler)
    monkeypatch.setattr(off_policy, "missing_to_compile", lambda: "")
    monkeypatch.setattr(off_policy, "WORTH_COMPILING", 1)
    model = load_target("chain")
    torch.manual_seed(0)
    settings = SAC(**SMALL | {"warmup_steps": 32}, side_by_side=False, compile=how)
    learner = sac._learner(settings, model, model.action_prior)
    collector = Collector(environments(model, 2), 0)
    while learner.steps < 24:
        learner.update(learner.collect(collector))
    assert learner.updates == 0
    return learner, learner.collect(collector)


@pytest.mark.parametrize("breaks_at", [1, 2])
def test_a_compiler_that_breaks_leaves_a_run_uncompiled_from_its_beginning(
    breaks_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it breaks at the policy, when Q would have taken its compiled step already."""
    compiler = Compiler(breaks_at)
    learner, data = learner_that_compiles(monkeypatch, compiler, "auto")
    assert learner.compiled
    said = r"updates cannot be compiled \(OSError: cannot write\), and are not in this run"
    with pytest.warns(UserWarning, match=said) as warned:
        learner.update(data)
    assert len(warned) == 1
    assert not learner.compiled
    assert compiler.calls == breaks_at
    assert learner.updates == 8
    again, _ = learner_that_compiles(monkeypatch, Compiler(1), "auto")
    again.load_state_dict(learner.state_dict())
    again.update(data)
    assert not again.compiled


def test_a_compiler_that_breaks_ends_a_run_that_asks_for_it_or_was_begun_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = r"^compile: expected torch to make machine code .* got OSError \(cannot write\); mend"
    learner, data = learner_that_compiles(monkeypatch, Compiler(1), "on")
    with pytest.raises(ValueError, match=said):
        learner.update(data)
    assert learner.updates == 0
    learner, data = learner_that_compiles(monkeypatch, Compiler(), "auto")
    learner.update(data)
    assert learner.compiled
    again, _ = learner_that_compiles(monkeypatch, Compiler(1), "auto")
    again.load_state_dict(learner.state_dict())
    with pytest.raises(ValueError, match=said):
        again.update(data)


def test_a_prior_of_tensors_on_another_device_is_said_in_one_sentence() -> None:
    """By the words of torch on a GPU, which need none: it is asked by updates alone so often."""
    asked = 0

    def prior(state: Tensor) -> Any:
        nonlocal asked
        asked += 1
        if len(state) == SMALL["batch_size"]:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                "cuda:0 and cpu!"
            )
        return dist.Categorical(probs=torch.full((*state.shape, 2), 0.5))

    said = (
        r"^device: expected all that .* to compute on cpu, .* in line \d+ of .*test_sac.py, prior;"
    )
    with pytest.raises(ValueError, match=said):
        infer(load_target("chain"), SAC(**SMALL), prior=prior)
    assert asked > 0


def test_more_than_was_collected_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps: expected at least the 64 .* got 40"):
        SAC(**SMALL | {"batch_size": 64})
    with pytest.raises(ValueError, match=r"replay_capacity: expected at least the 300 .* got 200"):
        SAC(**SMALL | {"batch_size": 300, "warmup_steps": 400})


def test_steps_side_by_side_are_taken_from_the_same_parameters() -> None:
    """In turn the policy sees the new Q, at once the old one; Q is the same either way."""
    model, after = load_target("chain"), {}
    for at_once in (True, False):
        torch.manual_seed(0)
        settings = SAC(**SMALL, side_by_side=at_once)
        learner = sac._learner(settings, model, model.action_prior)
        with torch.no_grad():
            learner.q.table.normal_()
        collector = Collector(environments(model, 2), 0)
        while learner.updates == 0:
            learner.update(learner.collect(collector))
        after[at_once] = learner
    # Several updates make a round: the first alone would leave Q the same.
    assert after[True].updates == after[False].updates > 1
    differ = after[True].policy.parameters_of.table - after[False].policy.parameters_of.table
    assert differ.abs().max() > 0


class Precise(Regulator):
    """Its states have twice the precision of networks."""

    def initial_state(self) -> Any:
        return dist.Normal(torch.zeros(2, dtype=torch.float64), 0.5).to_event(1)

    def transition(self, state: Tensor, action: Tensor) -> Any:
        return super().transition(state, action.to(state.dtype))


def test_actions_of_the_prior_have_the_precision_of_those_of_the_policy() -> None:
    """An episode that begins with the one goes on with the other."""
    model = Precise()
    learner = sac._learner(SAC(**SMALL), model, model.action_prior)
    collector = Collector(environments(model, 2), 0)
    found = []
    while learner.updates == 0:
        data = learner.collect(collector)
        learner.update(data)
        found.append((data.state.dtype, data.action.dtype))
    data = learner.collect(collector)
    found.append((data.state.dtype, data.action.dtype))
    assert len(found) > 5
    assert set(found) == {(torch.float64, torch.float32)}


@pytest.mark.parametrize(
    ("routine", "make"),
    [(SAC(**SMALL, learn_prior=True), sac._learner), (SQL(**SMALL | ANNEALED), sql._learner)],
    ids=["sac", "sql"],
)
def test_who_acts_is_who_was_learned_after_every_round(routine: Any, make: Any) -> None:
    """On a GPU the policy and the prior that act are copies, and so they are here."""
    model = load_target("chain")
    torch.manual_seed(0)
    learner = make(routine, model, model.action_prior)
    learner.policy = copy.deepcopy(learner.policy)
    pairs = [(learner.policy, learner._learned)]
    if "prior" in learner.parts:
        learner.prior = copy.deepcopy(learner.prior)
        pairs.append((learner.prior, learner.parts["prior"].module))
    collector, moved = Collector(environments(model, 2), 0), 0
    while learner.updates < 40:
        before = [copy.deepcopy(acting.state_dict()) for acting, _ in pairs]
        learner.update(learner.collect(collector))
        for (acting, behind), was in zip(pairs, before, strict=True):
            for name, value in behind.state_dict().items():
                assert torch.equal(acting.state_dict()[name], value)
                moved += not torch.equal(was[name], value)
    assert moved >= 10  # in five rounds of updates policy and prior, or Q and its temperature
    if isinstance(routine, SQL):
        assert float(learner.policy.temperature) == pytest.approx(learner.tempering.temperature)


def test_a_learned_prior_takes_its_steps_before_it_is_copied_to_who_acts() -> None:
    """On a GPU the prior that acts is a copy of the one that learns, and so it is here."""
    model = load_target("chain")
    learner = sac._learner(SAC(**SMALL, learn_prior=True), model, model.action_prior)
    copied = copy.deepcopy(learner.prior)
    assert off_policy._apart(learner.parts, learner._learned, copied) == learner._aside == ["q"]


def test_the_result_has_q_and_comes_back_from_disk(tmp_path: Any) -> None:
    result = infer(load_target("chain"), SAC(**SMALL), directory=tmp_path)
    result.save(tmp_path)
    loaded = type(result).load(tmp_path)
    state, step = torch.arange(3), torch.zeros(3, dtype=torch.long)
    assert torch.equal(loaded.q(state, None, step), result.q(state, None, step))
    assert torch.equal(loaded.policy(state).probs, result.policy(state).probs)
    assert not any(parameter.requires_grad for parameter in loaded.q.parameters())


@pytest.mark.parametrize("target", ["chain", "Pendulum-v1"])
def test_a_learned_prior_is_the_policys_marginal(target: str) -> None:
    settings = SAC(
        **SMALL | {"updates_per_step": 0.2, "replay_capacity": 2000, "batch_size": 40},
        learn_prior=True,
        learning_rate=3e-2,
    )
    model = load_target(target)
    torch.manual_seed(0)
    learner = sac._learner(settings, model, model.action_prior)
    collector = Collector(environments(model, 2), 0)
    while learner.steps < 1500:
        learner.update(learner.collect(collector))
    for i in range(400):  # the policy stays where it is
        given = (*learner._batch(i), torch.tensor(0.1))
        learner._descend("prior", learner._graphs["prior"](*given))
    state = learner.replay.sample(4000, 1, 0).state[0]
    with torch.no_grad():
        action = learner.policy(state, torch.zeros(4000, dtype=torch.long)).sample()
        prior = learner.prior(state)
    if target == "chain":
        share = action.bincount(minlength=2) / 4000
        torch.testing.assert_close(prior.probs[0], share, atol=0.05, rtol=0)
        assert abs(share[0] - 0.5) > 0.1
        return
    drawn = prior.sample()
    assert abs(drawn.mean() - action.mean()) < 0.1
    assert abs(drawn.std() - action.std()) < 0.15


def test_a_learned_prior_takes_the_place_of_no_other() -> None:
    with pytest.raises(ValueError, match=r"learn_prior: expected no other prior .* got Categ"):
        infer(
            load_target("chain"),
            SAC(**SMALL, learn_prior=True),
            prior=CategoricalPrior(probs=[0.5, 0.5]),
        )


@pytest.mark.parametrize("space", [Discrete(3), PAIR, BOX])
def test_a_learned_prior_is_saved_and_is_one_for_others(space: Any, tmp_path: Path) -> None:
    model, brief = Wind(space), SMALL | {"updates_per_step": 0.2, "total_steps": 200}
    result = infer(model, SAC(**brief, learn_prior=True, learning_rate=3e-2))
    result.save(tmp_path / "once")
    loaded = InferenceResult.load(tmp_path / "once", model=model)
    loaded.save(tmp_path / "twice")
    again = InferenceResult.load(tmp_path / "twice", model=model)
    state = model.initial_state().sample((5,))
    priors = [it.prior_source() for it in (result, loaded, again)]  # type: ignore[misc]
    priors.append(PolicyPrior(tmp_path / "once", marginal=True))
    action = priors[0](state).sample()
    log_prob = priors[0](state).log_prob(action)
    assert (log_prob - UniformPrior(space)(state).log_prob(action)).abs().max() > 0.01
    for prior in priors[1:]:
        assert torch.equal(prior(state).log_prob(action), log_prob)
    weights = [it.sample(8, seed=1)["sample_stats"]["log_weight"] for it in (result, loaded)]
    np.testing.assert_array_equal(*weights)
    assert loaded.summary() | {"seconds": 0} == result.summary() | {"seconds": 0}
    assert learned._restriction(model, priors[-1]) == (None, None), "it forbids nothing"


def test_a_marginal_that_was_not_learned(tmp_path: Path) -> None:
    result = infer(load_target("chain"), Exact(temperature=0.1))
    result.save(tmp_path)
    with pytest.raises(ValueError, match=r": expected a run whose prior was learned, got one with"):
        PolicyPrior(tmp_path, marginal=True)
    with pytest.raises(
        TypeError, match="PolicyPrior: expected with marginal=True the directory of"
    ):
        PolicyPrior(result.policy, marginal=True)


def test_the_command_learns_a_prior_and_takes_it_for_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    brief = ["--total-steps", "300", "--warmup-steps", "256", "--evaluation-episodes", "0"]
    brief += ["--hidden", "8", "--episodes", "2", "--json"]
    first, second = tmp_path / "first", tmp_path / "second"
    main(["infer", "CartPole-v1", "sac", *brief, "--learn-prior", "--out", str(first)])
    main(["evaluate", str(first), "--episodes", "2", "--json"])
    arguments = json.dumps({"policy": str(first), "marginal": True})
    words = ["--prior", "policy", "--prior-kwargs", arguments]
    main(["infer", "CartPole-v1", "sql", *brief, *words, "--out", str(second)])
    capsys.readouterr()
    log_prior = InferenceResult.load(second).policy.log_prior
    state = torch.zeros(1, 4)
    expected = InferenceResult.load(first).prior_source()(state)  # type: ignore[misc]
    torch.testing.assert_close(log_prior, expected.logits[0])
    assert (log_prior - log_prior.mean()).abs().max() > 1e-4
