"""The derivation: every step passes where it applies, every broken twin is caught, and a library
with a fault in it fails."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from gymnasium.spaces import Box
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracles import Tables
from test_cli import CORRIDOR

from inference_rl import (
    CategoricalPrior,
    FiniteModel,
    LinearGaussianModel,
    MaskPrior,
    StickyPrior,
    duals,
    load_target,
)
from inference_rl import trajectory as program
from inference_rl.cli import main
from inference_rl.decision import Decision
from inference_rl.derivation import (
    STEPS,
    Derivation,
    Finding,
    bound,
    consistency,
    derive,
    evidence,
    gradients,
    soft_iteration,
    subject,
)
from inference_rl.environment import EnvironmentModel
from inference_rl.models.pendulum import Pendulum

NAMES = [step.id for step in STEPS]
ONLY_BOXES = {"fixed-width-limit", "fixed-width-bound"}
ONLY_NOISE = {"posterior-dynamics", "price-of-optimism", "path-noise"}
ONLY_DISCOUNTED = {"contraction", "discount-as-survival"}
SAMPLED = {
    "reward-as-evidence",
    "joint",
    "importance-weights",
    "elbo",
    "structured-guide",
    "maxent-objective",
    "policy-gradient",
    "reps-dual",
}


def verdicts(derivation: Derivation) -> dict[str, str]:
    return {finding.step.id: finding.verdict for finding in derivation.findings}


def left_out(derivation: Derivation) -> set[str]:
    """The steps that do not apply."""
    return {name for name, verdict in verdicts(derivation).items() if verdict == "does not apply"}


def check(derivation: Derivation, expected: set[str], coarse: frozenset[str] = frozenset()) -> None:
    """Every step passes but those that do not apply, and every twin of theirs was caught.

    :param coarse: steps of which too little was drawn to tell.
    """
    for finding in derivation.findings:
        assert finding.verdict != "fail", (finding.step.id, finding.why)
        if finding.verdict == "pass":
            found = finding.step.id, finding.twin_verdict
            assert finding.twin_verdict == "fail" or finding.step.id in coarse, found
        else:
            assert finding.why
            assert finding.twin is None
    assert left_out(derivation) == expected


def step(name: str) -> int:
    """The number of a step in the ladder."""
    return NAMES.index(name) + 1


def the(name: str, model: EnvironmentModel, **settings: Any) -> Finding:
    """What comes of one step."""
    (finding,) = derive(model, step=step(name), **settings).findings
    return finding


def of_tables(tables: Tables) -> FiniteModel:
    return FiniteModel.from_tables(
        tables.transition,
        tables.stopped().reward,
        discount=tables.discount,
        initial=tables.initial,
        prior=tables.prior,
        terminal=tables.terminal,
        horizon=tables.horizon,
    )


def noisy(**changes: Any) -> FiniteModel:
    """Random everywhere, with an unequal prior, a discount, and a state that ends the episode."""
    random = np.random.default_rng(4)
    tables = Tables(
        random.dirichlet(np.ones(3), (3, 2)),
        2 * random.normal(size=(3, 2, 3)),
        prior=np.array([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]),
        initial=np.array([0.5, 0.3, 0.2]),
        terminal=np.array([False, False, True]),
        discount=0.9,
    )
    return of_tables(dataclasses.replace(tables, **changes))


def without_noise(**changes: Any) -> FiniteModel:
    """Two states and two ways, one of which ends."""
    transition = np.zeros((3, 2, 3))
    transition[0, 0, 1] = transition[0, 1, 2] = transition[1, 0, 0] = transition[1, 1, 2] = 1
    transition[2, :, 2] = 1
    reward = np.array([[0.3, -1.0], [1.0, 2.0], [0.0, 0.0]])
    arguments = {"discount": 0.9, "terminal": np.array([False, False, True])} | changes
    return FiniteModel.from_tables(transition, reward, **arguments)


# --- On models ------------------------------------------------------------------------------------

BUNDLED = {
    "lottery": ONLY_DISCOUNTED | ONLY_BOXES,
    "FrozenLake-v1": ONLY_BOXES,
    "cliff": ONLY_NOISE | ONLY_DISCOUNTED | ONLY_BOXES,
}
SLOW: list[tuple[str, dict[str, Any], set[str]]] = [
    ("FrozenLake-v1", {"is_slippery": False}, {"path-noise"} | ONLY_BOXES),
    ("chain", {}, {"path-noise"} | ONLY_BOXES),
    ("CliffWalking-v1", {}, {"path-noise"} | ONLY_BOXES),
    ("Taxi-v4", {}, {"path-noise"} | ONLY_BOXES),
    ("grid-world", {}, ONLY_BOXES),
    ("four-rooms", {}, ONLY_BOXES),
    ("tree", {}, ONLY_NOISE | ONLY_DISCOUNTED | ONLY_BOXES),
    ("tree", {"noise": 0.3}, ONLY_DISCOUNTED | ONLY_BOXES),
    ("cliff", {"slip": 0.2}, ONLY_DISCOUNTED | ONLY_BOXES),
]


@pytest.mark.parametrize("target", BUNDLED)
def test_every_step_passes_and_every_twin_is_caught(target: str) -> None:
    check(derive(load_target(target)), BUNDLED[target])


@pytest.mark.slow
@pytest.mark.parametrize(("target", "kwargs", "expected"), SLOW)
def test_every_step_passes_on_every_finite_model(
    target: str, kwargs: dict[str, Any], expected: set[str]
) -> None:
    check(derive(load_target(target, env_kwargs=kwargs)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.05, 20.0])
@pytest.mark.parametrize("target", [*BUNDLED, "grid-world", "Taxi-v4"])
def test_no_step_fails_at_other_temperatures(target: str, temperature: float) -> None:
    derivation = derive(load_target(target), temperature=temperature)
    assert derivation.failed == ()
    for finding in derivation.findings:
        assert finding.twin_verdict in (None, "fail") or finding.twin_verdict.startswith(
            "cannot differ here: "
        ), (finding.step.id, finding.twin_verdict)


def test_on_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "corridor.py").write_text(CORRIDOR)
    check(derive(load_target(str(tmp_path / "corridor.py"))), ONLY_BOXES)


def test_under_another_prior() -> None:
    tilted = CategoricalPrior(torch.tensor([0.3, 0.7]))
    derivation = derive(load_target("lottery"), prior=tilted)
    check(derivation, BUNDLED["lottery"] | {"entropy-form"})
    assert derivation.prior == "CategoricalPrior"


@pytest.mark.slow
def test_under_a_prior_that_remembers() -> None:
    lake = load_target("FrozenLake-v1")
    check(derive(lake, prior=StickyPrior(lake.action_space, 0.5)), {"entropy-form", *ONLY_BOXES})


def test_linear_gaussian_models_run_what_applies() -> None:
    random = np.random.default_rng(0)
    model = LinearGaussianModel(
        A=0.5 * random.normal(size=(2, 2)),
        B=random.normal(size=(2, 1)),
        state_cost=np.eye(2),
        action_cost=np.eye(1),
        state_linear=[0.3, -0.2],
        noise_covariance=0.05 * np.eye(2),
        initial_covariance=0.1 * np.eye(2),
        prior_mean=[0.2],
        prior_covariance=[[0.7]],
        discount=0.9,
    )
    exact = {"evidence", "price-of-optimism", "soft-bellman", "policy-ratio", "regret"}
    found = derive(model, temperature=2.0)
    check(found, set(NAMES) - exact - SAMPLED, coarse=frozenset({"elbo"}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "extra"),
    [
        ("Pendulum-v1", {"one-decision", "sampled-log-sum-exp", *ONLY_BOXES}),
        ("pendulum", {"one-decision", "sampled-log-sum-exp", *ONLY_BOXES}),
        ("CartPole-v1", {"one-decision", "sampled-log-sum-exp", "sac-actor"}),
        ("Blackjack-v1", {"one-decision", "sampled-log-sum-exp", "sac-actor"}),
    ],
)
def test_what_can_only_be_drawn_runs_what_applies(target: str, extra: set[str]) -> None:
    derivation = derive(load_target(target), temperature=2.0)
    assert derivation.failed == ()
    # Where a few draws have all the weight, what averages weights says so.
    averages = {"importance-weights", "elbo"}
    assert left_out(derivation) - averages == set(NAMES) - SAMPLED - extra
    for finding in derivation.findings:
        if finding.step.id in left_out(derivation) & averages:
            assert re.search(r"\d+ of [\d,]+ draws have most of the weight", finding.why)


@pytest.mark.slow
def test_a_thousand_states_take_less_than_a_minute() -> None:
    random, states = np.random.default_rng(0), 1000
    transition = np.zeros((states, 4, states))
    for state, action in itertools.product(range(states), range(4)):
        successors = random.choice(states, 5, replace=False)
        transition[state, action, successors] = random.dirichlet(np.ones(5))
    model = FiniteModel.from_tables(transition, random.normal(size=transition.shape), discount=0.99)
    derivation = derive(model)
    check(derivation, ONLY_BOXES)
    # Some seven seconds on an idle core; the bound is for a busy one.
    assert derivation.seconds < 60


RICH = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
@RICH
@given(
    oracles.finite_tables(max_states=4, max_actions=3, max_horizon=3, scales=(0.1, 1.0, 10.0)),
    st.sampled_from([0.3, 1.0, 3.0]),
    st.booleans(),
)
def test_no_step_fails_on_degenerate_models(
    tables: Tables, temperature: float, forever: bool
) -> None:
    """Ties, forbidden actions, unreachable states: a twin may be blind, and says why."""
    if forever:
        discount = min(tables.discount, 0.95)
        tables = dataclasses.replace(tables, horizon=None, discount=discount)
    derivation = derive(of_tables(tables), temperature=temperature)
    for finding in derivation.findings:
        assert finding.verdict != "fail", (finding.step.id, finding.why)
        twin = finding.twin_verdict
        assert twin in (None, "fail") or twin.startswith("cannot differ here: "), (
            finding.step.id,
            twin,
        )


@pytest.mark.slow
@RICH
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 3), st.sampled_from([0.5, 2.0]))
def test_every_twin_is_caught_on_models_with_something_at_stake(
    seed: int, states: int, actions: int, temperature: float
) -> None:
    random = np.random.default_rng(seed)
    tables = Tables(
        random.dirichlet(np.ones(states), (states, actions)),
        2 * random.normal(size=(states, actions, states)),
        prior=random.dirichlet(np.full(actions, 3.0), states),
        initial=random.dirichlet(np.ones(states)),
        terminal=np.zeros(states, dtype=bool),
        discount=float(random.choice([0.5, 0.9, 0.97])),
    )
    check(derive(of_tables(tables), temperature=temperature), {"entropy-form", *ONLY_BOXES})


# --- Assumptions ----------------------------------------------------------------------------------


class _Wide(Pendulum):
    """A pendulum with three motors, of which two do nothing."""

    action_space = Box(-1.0, 1.0, (3,))


def mask(model: FiniteModel) -> MaskPrior:
    return MaskPrior(torch.tensor([[True, True], [True, False], [True, True]]))


def ended() -> FiniteModel:
    return FiniteModel.from_tables(np.ones((1, 2, 1)), np.zeros((1, 2)), terminal=np.array([True]))


BROKEN: list[tuple[str, Callable[[], EnvironmentModel], str]] = [
    ("contraction", lambda: noisy(discount=1.0), "its discount is 1"),
    ("discount-as-survival", lambda: noisy(discount=1.0), "its discount is 1"),
    ("posterior-dynamics", lambda: without_noise(discount=1.0), "nothing is random here but"),
    ("price-of-optimism", lambda: without_noise(discount=1.0), "the price is 0 nats"),
    ("path-noise", without_noise, "nothing is random here but the actions"),
    ("entropy-form", noisy, "its action prior is not uniform"),
    ("soft-bellman", Pendulum, "its states or actions are not a finite set.*not linear-Gaussian"),
    ("posterior-messages", Pendulum, "its states or actions are not a finite set"),
    ("fixed-width-limit", noisy, "its actions are discrete: there is no width to fix"),
    ("fixed-width-bound", _Wide, "its actions have 3 dimensions, too many to integrate over"),
    ("sac-actor", Pendulum, r"its actions, Box\(.*\), cannot be summed over"),
    ("policy-ratio", ended, "every state ends the episode, so that there is nothing to decide"),
    ("joint", ended, "every state ends the episode"),
    ("one-decision", ended, "every state ends the episode"),
    (
        "fixed-width-limit",
        lambda: load_target("double-integrator"),
        "its actions have no bounds, and a guide of fixed width lives in a box",
    ),
    (
        "reps-dual",
        lambda: FiniteModel.from_tables(np.full((2, 2, 2), 0.5), np.ones((2, 2)), horizon=2),
        "all trajectories earn the same",
    ),
]


@pytest.mark.parametrize(("name", "model", "why"), BROKEN)
def test_a_step_whose_assumption_is_broken_does_not_apply(
    name: str, model: Callable[[], EnvironmentModel], why: str
) -> None:
    finding = the(name, model())
    assert finding.verdict == "does not apply"
    assert re.search(why, finding.why), finding.why
    assert (finding.left, finding.difference, finding.tolerance) == (None, None, None)
    assert finding.twin is None
    assert not all(met.met for met in finding.assumptions) or name == "reps-dual"


def test_a_prior_that_forbids_is_no_reward() -> None:
    finding = the("prior-as-reward", noisy(), prior=mask(noisy()))
    assert finding.verdict == "does not apply"
    assert "forbids actions, which would take a reward of −∞" in finding.why


def test_large_models_say_how_large_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("subject", "assumptions"):
        monkeypatch.setattr(f"inference_rl.derivation.{place}.MOST_STATES", 2)
    derivation = derive(noisy())
    assert derivation.failed == ()
    found = {f.step.id: f for f in derivation.findings}
    assert "it has 3 states (times steps)" in found["soft-bellman"].why
    # What lists trajectories needs no solution of the whole.
    assert found["evidence"].verdict == found["policy-gradient"].verdict == "pass"


def test_steps_with_too_many_outcomes_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_rl.derivation.subject.MOST_PATHS", 1)
    derivation = derive(noisy())
    assert derivation.failed == ()
    found = {f.step.id: f for f in derivation.findings}
    assert "has too many outcomes to list" in found["evidence"].why
    assert found["soft-bellman"].verdict == "pass"


def test_paths_are_walked_where_nothing_is_random_and_averaged_where_it_is() -> None:
    walked, averaged = the("path-consistency", without_noise()), the("path-consistency", noisy())
    assert "walks at random" in walked.right_words
    assert walked.place.startswith("from state")
    assert "averaged over outcomes" in averaged.right_words
    assert walked.verdict == averaged.verdict == "pass"


def test_a_twin_that_cannot_differ_says_why() -> None:
    one = FiniteModel.from_tables(np.full((2, 1, 2), 0.5), np.eye(2)[:, :1], discount=0.9)
    finding = the("one-decision", one)
    assert finding.verdict == "pass"
    assert finding.twin_verdict == "cannot differ here: there is but one action to choose"


# --- A library with a fault -----------------------------------------------------------------------


def shifted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Messages that are off by a thousandth."""

    def broken(*arguments: Any, **settings: Any) -> Any:
        found = function(*arguments, **settings)
        return dataclasses.replace(found, v=found.v + 1e-3, q=found.q + 1e-3)

    return broken


FAULTS: list[tuple[Any, str, Callable[[Any], Any], set[str]]] = [
    (subject, "control_messages", shifted, {"soft-bellman", "regret"}),
    (evidence, "posterior_messages", shifted, {"posterior-messages", "evidence", "elbo-gap"}),
    (
        program,
        "Optimality",
        lambda made: lambda weight: made(1.01 * weight),
        {"reward-as-evidence", "joint", "maxent-objective", "best-bound", "structured-guide"},
    ),
    (
        program,
        "_weighted",
        lambda made: lambda weight: made(1.0),
        {"maxent-objective", "structured-guide"},
    ),
    (
        gradients,
        "advantages",
        lambda made: lambda *given, **settings: 1.01 * made(*given, **settings),
        {"policy-gradient"},
    ),
    (
        Decision,
        "log_joint",
        lambda made: property(lambda self: self.log_prior + 1.01 * self.log_weight),
        {"sql-update"},
    ),
    (
        consistency,
        "path_residual",
        lambda made: lambda *given, **settings: made(*given, **settings) + 1e-6,
        {"path-noise"},
    ),
    (
        duals,
        "_tilted",
        lambda made: lambda exponent, base: made(exponent, np.full_like(base, -np.log(len(base)))),
        {"reps-dual"},
    ),
    (
        bound,
        "posterior_transition",
        lambda made: lambda *given: 1.01 * made(*given),
        {"posterior-dynamics"},
    ),
    (
        soft_iteration,
        "library_policy",
        lambda made: lambda q, log_prior, temperature: made(-q, log_prior, temperature),
        {"soft-policy-iteration"},
    ),
]


@pytest.mark.parametrize(("owner", "name", "fault", "caught"), FAULTS, ids=[f[1] for f in FAULTS])
def test_a_fault_in_the_library_makes_steps_fail(
    owner: Any,
    name: str,
    fault: Callable[[Any], Any],
    caught: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, name, fault(getattr(owner, name)))
    for known in caught:
        finding = the(known, noisy())
        assert finding.verdict == "fail", known
        assert re.search("both sides (differ|exceed the relation) by", finding.why)


def test_the_command_tells_by_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["derive", "lottery", "--step", str(step("soft-bellman"))])
    assert "1 of 1 steps pass, 0 fail" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(subject, "control_messages", shifted(subject.control_messages))
    with pytest.raises(SystemExit) as stop:
        main(["derive", "lottery", "--step", str(step("soft-bellman")), "--json"])
    assert stop.value.code == 1
    report = json.loads(capsys.readouterr().out)
    assert report["counts"]["fail"] == 1
    assert report["steps"][0]["verdict"] == "fail"
    with pytest.raises(SystemExit, match="1"):
        main(["derive", "lottery", "--only", "failed"])
    shown = capsys.readouterr().out
    assert "The soft Bellman equations" in shown
    assert "One decision" not in shown
