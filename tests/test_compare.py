"""`compare`: its numbers against other ways to get them, its verdicts, its renderings."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Discrete, MultiDiscrete
from rich.console import Console
from scipy import stats

from inference_rl import CategoricalPrior, FiniteModel, UniformPrior, diagnostics, load_target
from inference_rl.action_values import ActionValues
from inference_rl.cli import main
from inference_rl.diagnostics import Comparison, compare
from inference_rl.diagnostics.comparison import (
    exact,
    findings,
    robustness,
    routines,
    sampled,
    tables,
    tabular,
    terminal,
)
from inference_rl.diagnostics.comparison.compare import _is_small
from inference_rl.diagnostics.comparison.findings import Claim, Effect, Estimate
from inference_rl.diagnostics.comparison.guides import learned_guides
from inference_rl.diagnostics.comparison.page import render
from inference_rl.diagnostics.comparison.runs import (
    Course,
    Runs,
    automatic,
    exploration,
    stability,
)
from inference_rl.diagnostics.comparison.terminal import print_comparison
from inference_rl.diagnostics.comparison.visits import Dynamics, entropy, mode
from inference_rl.diagnostics.samples import rhat
from inference_rl.inference import InferenceResult
from inference_rl.learning.collection import Collector, watched
from inference_rl.networks import Architecture, described
from inference_rl.randomness import draw
from inference_rl.simulate import environments
from inference_rl.softmax_policy import SoftmaxPolicy
from inference_rl.tabulation import tabulate

Array = np.ndarray[Any, Any]
Capture = pytest.CaptureFixture[str]

QUICK: dict[str, Any] = {"seeds": 4, "total_steps": 1000}
CLAIMS = ["randomness", "trade", "exploration", "robustness", "stability", "cost", "automatic"]


@functools.cache
def compared(target: str) -> Comparison:
    return compare(load_target(target), **QUICK)


def random_model(seed: int, *, discount: float = 0.9, horizon: int | None = None) -> FiniteModel:
    """Five states, the last of which ends, and three actions."""
    generator = np.random.default_rng(seed)
    transition = generator.dirichlet(np.ones(5), size=(5, 3))
    reward = generator.normal(size=(5, 3, 5))
    reward[4] = 0
    end = torch.arange(5) == 4
    initial = np.array([0.5, 0.5, 0, 0, 0])
    return FiniteModel.from_tables(
        transition, reward, discount=discount, initial=initial, terminal=end, horizon=horizon
    )


def dense(model: FiniteModel) -> tuple[Array, Array, Array]:
    """Transition (S, A, S), expected reward (S, A), start (S,)."""
    shape = (model.num_states, model.num_actions, model.num_states)
    return (
        model.csr.toarray().reshape(shape),
        model.expected_reward().numpy(),
        model.initial.numpy(),
    )


def solved_return(transition: Array, reward: Array, start: Array, policy: Array, g: float) -> float:
    """start · (I - γ P_π)^{-1} r_π."""
    under = np.einsum("sa,sat->st", policy, transition)
    value = np.linalg.solve(np.eye(len(start)) - g * under, (policy * reward).sum(-1))
    return float(start @ value)


def random_policies(count: int, seed: int) -> Array:
    return np.random.default_rng(seed).dirichlet(np.ones(3), size=(count, 5))


# ---- exact evaluation ----------------------------------------------------------------------------


def test_returns_and_entropies_are_those_of_linear_algebra() -> None:
    model, policies = random_model(1), random_policies(4, 2)
    transition, reward, start = dense(model)
    dynamics = Dynamics.of(model)
    lives = np.broadcast_to(~dynamics.ended[:, None], reward.shape).astype(float)
    chaos = entropy(policies)[..., None] * lives
    for policy, found, per_step, h in zip(
        policies, dynamics.returns(policies), dynamics.mean_entropies(policies), chaos, strict=True
    ):
        assert found == pytest.approx(solved_return(transition, reward, start, policy, 0.9))
        total = solved_return(transition, h, start, policy, 0.9)
        steps = solved_return(transition, lives, start, policy, 0.9)
        assert per_step == pytest.approx(total / steps)


def test_policies_that_depend_on_the_step_are_rolled_out() -> None:
    model = random_model(3, horizon=3)
    transition, reward, start = dense(model)
    policy = random_policies(3, 4)
    expected, here = 0.0, start
    chaos, weights = 0.0, 0.0
    for t in range(3):
        here = here * ~model.is_terminal.numpy()
        expected += 0.9**t * float(here @ (policy[t] * reward).sum(-1))
        chaos += 0.9**t * float(here @ entropy(policy[t]))
        weights += 0.9**t * float(here.sum())
        here = np.einsum("s,sa,sat->t", here, policy[t], transition)
    dynamics = Dynamics.of(model)
    assert dynamics.returns(policy[None])[0] == pytest.approx(expected)
    assert dynamics.mean_entropies(policy[None])[0] == pytest.approx(chaos / weights)


def test_entropy_along_the_path_is_that_of_who_is_still_on_it() -> None:
    model = random_model(5)
    transition, _, start = dense(model)
    policy = random_policies(1, 6)[0]
    found, alive = Dynamics.of(model).entropies(policy, 2)
    here = np.einsum("s,sa,sat->t", start, policy, transition)[:4]
    assert alive.tolist() == pytest.approx([1.0, here.sum()])
    expected = [start @ entropy(policy), here @ entropy(policy)[:4] / here.sum()]
    assert found.tolist() == pytest.approx(expected)


# ---- changed worlds ------------------------------------------------------------------------------


def test_slips_are_those_of_a_transition_that_slips() -> None:
    model, policies = random_model(7), random_policies(2, 8)
    transition, reward, start = dense(model)
    slipped = 0.7 * transition + 0.3 * transition.mean(1, keepdims=True)
    paid = 0.7 * reward + 0.3 * reward.mean(1, keepdims=True)
    found = Dynamics.of(model).returns(robustness.slips(policies, 0.3))
    for policy, value in zip(policies, found, strict=True):
        assert value == pytest.approx(solved_return(slipped, paid, start, policy, 0.9))


def test_other_dynamics_are_those_of_mixed_transitions() -> None:
    known = exact.policies(random_model(9), [0.5])
    transition, reward, start = dense(known.model)
    found = robustness.moved_dynamics(known, 3)
    generator = np.random.default_rng(robustness.derived(3, "dynamics"))
    mix = 0.2 * generator.dirichlet(np.ones(3), size=(5, 3)) + 0.8 * np.eye(3)
    changed = np.einsum("sab,sbt->sat", mix, transition)
    paid = np.einsum("sab,sb->sa", mix, reward)
    for policy, value in zip(known.all, found[0], strict=True):
        assert value == pytest.approx(solved_return(changed, paid, start, policy, 0.9))


def test_a_blocked_cell_is_a_wall() -> None:
    """The way round in the 4x3 world is as if the map had another wall."""
    free = Dynamics.of(tabulate(load_target("grid-world", env_kwargs={"slip": 0.0})))
    text = "...G\n##.H\nS..."
    walled = tabulate(load_target("grid-world", env_kwargs={"slip": 0.0, "text": text}))
    blocked = free.without(4)
    policy = exact.solved(walled, 0.1)[0]
    expected = Dynamics.of(walled).returns(policy[None])[0]
    assert blocked.returns(policy[None])[0] == pytest.approx(expected)
    up = np.zeros((1, 12, 4))
    up[..., 3] = 1.0
    stuck = blocked.returns(up)[0]
    assert stuck == pytest.approx(-0.04 * (1 - 0.99**1000) / 0.01)


def test_only_cells_with_a_way_round_are_blocked() -> None:
    known = exact.policies(tabulate(load_target("grid-world", env_kwargs={"text": "SG"})), [0.1])
    assert len(robustness.walls(known)) == 0
    lake = exact.policies(tabulate(load_target("FrozenLake-v1")), [0.01])
    cells = robustness.walls(lake)
    assert 0 < len(cells) <= robustness.MOST_WALLS
    assert 0 not in cells
    assert not lake.dynamics.ended[cells].any()


# ---- statistics and verdicts ---------------------------------------------------------------------


def test_intervals_are_those_of_scipy() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=7), 2 * generator.normal(size=5) + 1
    ours, theirs = findings.difference(a, b), stats.ttest_ind(a, b, equal_var=False)
    interval = theirs.confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high))
    alone = stats.ttest_1samp(a, 0.0).confidence_interval(0.95)
    assert (findings.mean(a).low, findings.mean(a).high) == pytest.approx((alone.low, alone.high))


def test_few_that_are_all_the_same_do_not_settle_a_share() -> None:
    """By hand: of 3 ones and 3 zeros, 4/5 and 1/5, give or take 1.96 · √(2 · 0.16 / 5)."""
    ones, zeros = np.ones(3), np.zeros(3)
    found = findings.share_difference(ones, zeros)
    half = 1.959964 * math.sqrt(2 * 0.16 / 5)
    assert (found.value, found.low, found.high) == pytest.approx((1, 0.6 - half, 1))
    same = Effect("e", findings.share_difference(ones, ones), "of seeds")
    assert same.verdict == "cannot be told apart"


def test_few_that_do_not_vary_have_no_interval() -> None:
    """Shuffles of three and three ones come out that far apart once in ten; of four, in 35."""
    for few, settled in ((3, False), (4, True)):
        found = findings.difference(np.ones(few), np.zeros(few))
        assert found.value == 1
        assert math.isfinite(found.low) == settled
    assert Effect("e", findings.mean(np.ones(5)), "reward").verdict == "cannot be told apart"
    assert Effect("e", findings.mean(np.ones(6)), "reward").verdict == "holds"
    assert math.isfinite(findings.difference(np.ones(3), np.array([0.0, 0.0, 0.1])).low)
    generator = np.random.default_rng(0)
    alike = findings.bootstrap(
        lambda x: x.mean(-1)[0], np.ones((1, 3)), np.zeros((1, 3)), generator
    )
    assert not math.isfinite(alike.low)


def test_the_bootstrap_of_few_is_as_wide_as_that_of_student() -> None:
    """Of three seeds at two rates, whichever is the worst: told apart by chance in 5% at most."""
    generator = np.random.default_rng(2)
    apart = 0
    for _ in range(200):
        left, right = generator.normal(size=(2, 2, 3))
        found = findings.bootstrap(lambda x: x.mean(-1).min(0), left, right, generator)
        apart += not found.low <= 0 <= found.high
    assert apart <= 10
    sample = generator.normal(size=(1, 400))
    nothing = np.zeros((1, 400))
    found = findings.bootstrap(lambda x: x.mean(-1)[0], sample, nothing, generator)
    student = findings.mean(sample[0])
    assert found.high - found.low == pytest.approx(student.high - student.low, rel=0.05)


def test_what_nobody_finds_is_found_no_sooner() -> None:
    never, some = np.full(20, 100.0), np.array([90.0] + 19 * [100.0])

    def verdict(found: Array) -> str:
        runs = [
            Runs(name, t, 1.0, *[np.ones(20)], found, *[np.ones(20)] * 4)
            for name, t in (("regular", 0.0), ("soft", 1.0))
        ]
        course = Course(
            runs, "regular", "soft", 1.0, best=1.0, near_by=0.1, steps=100, worth="w",
            places="states covered", by="b",
        )  # fmt: skip
        return exploration(course).effects[1].verdict

    assert verdict(never) == "cannot be told apart"
    assert verdict(some) == "cannot be told apart"
    assert math.isfinite(findings.difference(some, some).low)


def test_the_bootstrap_covers_a_difference_of_spreads() -> None:
    """Of normal samples of 40, whose deviations are 2 and 1; to within what 60 trials can tell."""
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(60):
        wide, narrow = 2 * generator.normal(size=(1, 40)), generator.normal(size=(1, 40))
        found = findings.bootstrap(lambda x: x.std(-1, ddof=1)[0], wide, narrow, generator)
        inside += found.low < 1 < found.high
    assert inside >= 50


@pytest.mark.parametrize(
    ("low", "high", "threshold", "verdict"),
    [
        (0.1, 0.2, 0.0, "holds"),
        (-0.2, -0.1, 0.0, "does not hold"),
        (0.0, 0.0, 0.0, "does not hold"),
        (-0.1, 0.2, 0.0, "cannot be told apart"),
        (-0.1, 0.2, -0.2, "holds"),
        (-math.inf, math.inf, 0.0, "cannot be told apart"),
    ],
)
def test_a_verdict_is_where_the_interval_lies(
    low: float, high: float, threshold: float, verdict: str
) -> None:
    effect = Effect("e", Estimate(0.0, low, high, 3), "reward", threshold)
    assert effect.verdict == verdict


def test_a_claim_sums_up_its_effects() -> None:
    def claim(*limits: tuple[float, float]) -> str:
        effects = tuple(Effect("e", Estimate(0.0, *limit, 3), "") for limit in limits)
        return Claim("id", "t", "s", "m", effects).verdict

    assert claim() == "does not apply"
    assert claim((1, 2), (1, 3)) == "holds"
    assert claim((1, 2), (-1, 1)) == "holds in part"
    assert claim((-2, -1), (-1, 1)) == "does not hold"
    assert claim((1, 2), (-2, -1)) == "holds in part"
    assert claim((-1, 1)) == "cannot be told apart"


def test_what_is_exact_is_not_told_apart_by_rounding() -> None:
    assert findings.exact_effect("e", 1.0 + 1e-12, 1.0, "reward").verdict == "does not hold"
    assert findings.exact_effect("e", 1.0 + 1e-6, 1.0, "reward").verdict == "holds"


# ---- claims on models whose answer is known ------------------------------------------------------


def test_on_the_lottery_the_cost_of_entropy_is_known() -> None:
    """The policy is ρ e^{Q/α}/Z with Q = (0.5, 0.3)."""
    found = compare(load_target("lottery"), temperatures=[0.2], **QUICK)
    ticket = 1 / (1 + math.exp(0.2 / 0.2))
    cost = found.claim("cost")
    assert cost.effects[0].estimate.value == pytest.approx(0.2 * ticket)
    assert cost.verdict == "holds"
    chaos = -ticket * math.log(ticket) - (1 - ticket) * math.log(1 - ticket)
    assert found.claim("randomness").effects[0].estimate.value == pytest.approx(chaos)


def test_where_all_actions_are_the_same_entropy_costs_nothing() -> None:
    transition = np.tile(np.array([[0.5, 0.5], [0.0, 1.0]])[:, None], (1, 2, 1))
    reward = np.array([[1.0, 1.0], [0.0, 0.0]])
    same = FiniteModel.from_tables(
        transition, reward, discount=0.9, initial=[1.0, 0.0], terminal=torch.tensor([False, True])
    )
    found = compare(same, temperatures=[0.1], **QUICK)
    assert found.claim("cost").verdict == "does not hold"
    assert found.claim("robustness").effects[0].verdict == "does not hold"
    assert found.claim("randomness").verdict == "holds"
    assert found.claim("trade").verdict == "holds in part"


def test_on_the_lottery_a_sure_choice_is_no_less_robust() -> None:
    slips = compared("lottery").claim("robustness").effects[0]
    assert slips.verdict == "does not hold"
    assert slips.estimate.exact


def test_on_the_cliff_entropy_helps_where_it_slips() -> None:
    """-72.85 beside -75.44: the hotter policy keeps away from the edge."""
    found = compared("CliffWalking-v1")
    claim = found.claim("robustness")
    assert [effect.verdict for effect in claim.effects][:2] == ["holds", "holds"]
    assert claim.effects[3].estimate.value > 50
    assert found.claim("cost").verdict == "holds"
    model = tabulate(load_target("CliffWalking-v1"))
    transition, reward, start = dense(model)
    slipped = 0.8 * transition + 0.2 * transition.mean(1, keepdims=True)
    paid = 0.8 * reward + 0.2 * reward.mean(1, keepdims=True)
    soft, hard = (
        solved_return(slipped, paid, start, exact.solved(model, t)[0], 0.99)
        for t in (found.reference, 0.0)
    )
    assert claim.effects[0].estimate.value == pytest.approx(soft - hard, abs=1e-2)


def test_the_usual_temperature_costs_no_more_than_a_tenth_of_the_range() -> None:
    known = exact.policies(tabulate(load_target("FrozenLake-v1")), None)
    best, soft, random = known.dynamics.returns(
        np.stack([known.regular, known.chosen, known.prior])
    )
    assert 0.05 < (best - soft) / (best - random) < 0.12


# ---- learning in tables --------------------------------------------------------------------------


def learned(target: str, kinds: list[tabular.Kind], steps: int, seeds: int = 6) -> list[Any]:
    model = tabulate(load_target(target))
    known = exact.policies(model, [0.2])
    return tabular.learn(
        model,
        kinds,
        seeds=seeds,
        steps=steps,
        generator=np.random.default_rng(0),
        prior=known.prior,
        worth=math.inf,
        unit=0.2,
    )


def test_learners_of_the_lottery_find_its_policies() -> None:
    """With a rate of 0.02 Q of the ticket is 0.3 give or take 0.09, a standard deviation."""
    kinds = [tabular.Kind("soft", 0.2, 0.02), tabular.Kind("regular", 0.0, 0.02, epsilon=0.5)]
    soft, regular = learned("lottery", kinds, 4000, seeds=20)
    assert soft.policies.shape == (20, 1, 4, 2)
    expected = 1 / (1 + math.exp(1.0))
    assert soft.policies[:, 0, 0, 1].mean() == pytest.approx(expected, abs=0.1)
    assert regular.greedy[:, 0, 0, 0].mean() > 0.9


def test_soft_learners_of_a_deterministic_model_reach_its_soft_policy() -> None:
    """With rate 1 nothing is averaged: what is left is what has not been seen often enough."""
    model = tabulate(load_target("chain"))
    soft = learned("chain", [tabular.Kind("soft", 0.5, 1.0)], 5000)[0]
    best = exact.solved(model, 0.5)[0]
    assert np.abs(soft.policies[:, 1:10] - best[1:10]).max() < 1e-3
    assert (soft.covered == 11).all()


def test_a_tuned_temperature_meets_its_entropy() -> None:
    tuned = learned("lottery", [tabular.Kind("tuned", None, 0.02)], 4000)[0]
    found = entropy(tuned.policies[:, 0, 0])
    assert np.abs(found - math.log(2) / 2).max() < 0.1


def test_what_is_worth_finding_is_rare() -> None:
    def worth(target: str) -> tuple[float, str]:
        model = tabulate(load_target(target))
        known = exact.policies(model, [0.1])
        return tabular.worth_finding(known.dynamics, model, known.prior)

    assert worth("FrozenLake-v1")[0] == 1.0
    assert worth("chain")[0] == 1.0
    assert worth("CliffWalking-v1")[0] == math.inf


def test_of_the_chain_the_bait_holds_the_greedy() -> None:
    """Who exploits at once never leaves the bait; who is hot enough finds the prize."""
    known = exact.policies(tabulate(load_target("chain")), [0.1])
    course = tables.course(known, seeds=6, steps=4000, seed=0, progress=None)
    greedy = course.get("regular, greedy")
    soft = course.get("soft, α = 0.1")
    assert course.near(greedy.greedy).mean() == 0
    assert course.near(soft.greedy).mean() == 1


# ---- the comparison as a whole -------------------------------------------------------------------


def test_the_numbers_come_again_from_the_seed() -> None:
    first, again = (compare(load_target("lottery"), seed=3, **QUICK).as_json() for _ in range(2))
    other = compare(load_target("lottery"), seed=4, **QUICK).as_json()
    for report in (first, again, other):
        del report["seconds"]
    assert first == again
    assert first["claims"] != other["claims"]


def test_json_holds_every_claim_with_its_numbers() -> None:
    report = json.loads(json.dumps(compared("lottery").as_json(), allow_nan=False))
    assert [claim["id"] for claim in report["claims"]] == CLAIMS
    assert report["exact"] is True
    assert report["prior"] == "uniform"
    assert sum(report["counts"].values()) == len(CLAIMS)
    for claim in report["claims"]:
        assert {"title", "claim", "measured", "verdict", "effects", "table"} <= set(claim)
        assert claim["table"]
        assert all(key == key.strip() for row in claim["table"] for key in row)
        for effect in claim["effects"]:
            assert {"name", "unit", "verdict", "threshold", "value", "low", "high"} <= set(effect)


def test_exact_policies_are_judged_as_guides() -> None:
    """On the lottery log p(O) and max ELBO are known; the ticket's luck is what they differ by."""
    found = compare(load_target("lottery"), temperatures=[0.5], **QUICK)
    assert found.guides is not None
    (row,) = found.guides.as_json()
    best = math.log((math.exp(0.5 / 0.5) + math.exp(0.3 / 0.5)) / 2)
    evidence = math.log((math.exp(0.5 / 0.5) + 0.9 + 0.1 * math.exp(3 / 0.5)) / 2)
    assert row["exact"]["value"] == pytest.approx(best)
    assert row["log p(O)"]["value"] == pytest.approx(evidence)
    drawn = row["ELBO by draws, nats"]
    assert abs(drawn["value"] - best) < 1.2 * (drawn["high"] - drawn["low"])
    assert row["Pareto k̂"] == "too few values"
    certain = compared("tree").guides
    assert certain is not None
    assert {cells[-1] for cells in certain.rows} == {"all the same"}
    assert 'id="guides"' in render(found)


def test_the_terminal_keeps_to_its_width_and_says_every_verdict() -> None:
    for target in ("lottery", "CliffWalking-v1"):
        text = io.StringIO()
        print_comparison(compared(target), Console(file=text, width=140))
        lines = text.getvalue().splitlines()
        assert max(map(len, lines)) <= 100
        for number, claim in enumerate(compared(target).claims, start=1):
            first = next(line for line in lines if line.startswith(f"{number}. "))
            assert first.endswith(claim.verdict)
        assert any(line.strip().startswith("soft, α = ") for line in lines)


def test_the_page_is_one_small_file_with_every_claim() -> None:
    page = render(compared("CliffWalking-v1"))
    assert len(page.encode()) < 2_000_000
    assert page.startswith("<!doctype html>")
    assert "http://" not in page
    assert "https://" not in page
    for claim in compared("CliffWalking-v1").claims:
        assert f'id="{claim.id}"' in page
        assert f'data-verdict="{claim.verdict}"' in page
    assert page.count('class="effect"') == sum(
        len(claim.effects) for claim in compared("CliffWalking-v1").claims
    )


def test_numbers_are_written_for_people() -> None:
    """Counts of steps are whole; what is tiny is, on the page, a power of ten as in its charts."""
    assert [terminal.figures(x) for x in (-12437.3, 9999.7, 1234.56, -8632.4, 2.163e-12)] == [
        "-12437",
        "10000",
        "1235",
        "-8632",
        "2.163e-12",
    ]
    effect = Effect("steps", Estimate(-12437.3, -16250.0, 2.5e-7, 20), "steps")
    claim = dataclasses.replace(compared("lottery").claims[0], effects=(effect,))
    assert "−12437 [−16250, 2.5 × 10⁻⁷]" in render(
        dataclasses.replace(compared("lottery"), claims=(claim,))
    )


def test_what_a_model_is_called_is_text_on_the_page() -> None:
    evil = "</title><script>alert(1)</script>\"'&amp;"
    known = compared("CliffWalking-v1")
    claim = dataclasses.replace(known.claims[0], title=evil)
    named = dataclasses.replace(
        known, target=evil, prior=evil, state_space=evil, claims=(claim, *known.claims[1:])
    )
    page = render(named)
    assert page.count("<script>") == render(known).count("<script>") == 1
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5


def test_a_learned_routine_takes_the_place_of_the_table() -> None:
    found = compare(
        load_target("lottery"),
        ["policy-gradient"],
        seeds=2,
        total_steps=640,
        temperatures=[0.1],
    )
    assert found.learned_by == ("policy-gradient",)
    assert [claim.id for claim in found.claims] == CLAIMS
    names = [row[0] for row in found.claim("exploration").table.rows]  # type: ignore[union-attr]
    assert names == ["regular", "soft, α = 0.1", "soft, automatic"]


def test_a_target_entropy_is_for_uniform_priors() -> None:
    found = compare(load_target("chain"), prior=CategoricalPrior([0.9, 0.1]), **QUICK)
    assert found.claim("automatic").verdict == "does not apply"
    assert "the prior is not uniform" in found.claim("automatic").why


@functools.cache
def learned_on_the_lottery() -> tuple[Comparison, list[str], list[int], list[InferenceResult]]:
    """With what was said, the seeds that routines were run by, and what they came to."""
    said: list[str] = []
    seeds: list[int] = []
    results: list[InferenceResult] = []
    infer = routines.infer

    def spy(*args: Any, seed: int, **kwargs: Any) -> Any:
        seeds.append(seed)
        results.append(infer(*args, seed=seed, **kwargs))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routines, "infer", spy)
        found = compare(
            load_target("lottery"), ["policy-gradient"], seeds=2, total_steps=640,
            temperatures=[0.5], progress=said.append,
        )  # fmt: skip
    return found, said, seeds, results


def test_learned_policies_are_judged_as_guides() -> None:
    """Over seeds: bounds and divergence by hand, of the probability of buying the ticket."""
    found, _, _, results = learned_on_the_lottery()
    assert found.learned_guides is not None
    regular, soft = found.learned_guides.as_json()[:2]
    assert regular["learner"] == "regular"
    assert regular["exact"] == "–"  # at temperature 0 reward is no evidence
    at, pays = torch.zeros(1, dtype=torch.long), np.array([0.5, 0.3])
    weights = np.exp(pays / 0.5) / 2
    best = weights / weights.sum()
    bounds, apart = [], []
    for result in results:
        if (
            result.temperature == 0.5
            and result.routine.learning_rate == results[0].routine.learning_rate
        ):
            with torch.no_grad():
                policy = result.policy(at, 0).probs[0].double().numpy()
            bounds.append(policy @ (pays / 0.5 - np.log(2 * policy)))
            apart.append(policy @ np.log(policy / best))
    assert len(bounds) == 2
    assert soft["exact"]["value"] == pytest.approx(np.mean(bounds), abs=1e-6)
    assert soft["exact"]["low"] == pytest.approx(findings.mean(bounds).low, abs=1e-5)
    assert soft["of at most"]["value"] == pytest.approx(math.log(weights.sum()))
    assert soft["KL to π*, nats a step"]["value"] == pytest.approx(np.mean(apart), abs=1e-6)
    assert soft["in the worst state"]["value"] == pytest.approx(np.mean(apart), abs=1e-6)
    assert 0.5 < float(soft["R̂ of returns"]) < 1.5
    assert "seeds agree" in render(found)


def test_seeds_that_differ_are_told_by_their_returns() -> None:
    runs = Runs("soft", 1.0, 1.0, *np.ones((6, 2)), rhat=rhat(np.arange(80.0).reshape(2, 40)))
    course = Course([runs], "regular", "soft", 1.0, 1.0, 0.0, 9, "", "states", "by", "sac")
    table = learned_guides([course])
    assert table.columns == ("learner", "R̂ of returns")  # and nothing that nothing is known of
    ((name, mixed),) = table.rows
    assert name == "sac: soft"
    assert float(str(mixed)) > 1.5


def test_runs_of_different_kinds_are_independent() -> None:
    """Their intervals take them for that."""
    _, said, seeds, _ = learned_on_the_lottery()
    assert len(set(seeds)) == len(seeds) == sum(words.startswith("run ") for words in said)


@pytest.mark.slow
def test_a_simulator_is_compared_by_what_is_learned() -> None:
    found = compare(
        load_target("Pendulum-v1"), ["soft-td3"], seeds=2, total_steps=640, temperatures=[0.2]
    )
    assert not found.exact
    assert [claim.id for claim in found.claims] == CLAIMS
    assert found.claim("automatic").verdict == "does not apply"
    json.dumps(found.as_json(), allow_nan=False)
    assert "does not apply" in render(found)


def test_what_a_run_sees_is_counted_within_its_budget() -> None:
    """Three steps to the right from the start of the chain, and a fourth that is not its own."""
    model = load_target("chain")
    scene = dataclasses.replace(routines.scene(model, model.action_prior, 0), worth=1.0)
    witness = routines.Witness(scene, 3)
    batch = environments(model, 1, 100)
    collector = Collector(batch, 0)
    with watched(witness):
        collector.collect(always_right, 2)
        assert (len(witness.cells), witness.found) == (3, 3)
        collector.collect(always_right, 8)
    assert (len(witness.cells), witness.found, witness.steps) == (4, 3, 3)
    whole = routines.Witness(scene, 100)
    with watched(whole):
        collector.collect(always_right, 9)
    assert whole.found == 8 or whole.found == 9
    batch.close()


def always_right(state: torch.Tensor, t: Any = None) -> Any:
    return dist.Categorical(torch.tensor([0.0, 1.0]).expand(*state.shape, 2))


def test_cells_of_states_are_those_of_a_grid() -> None:
    scene = routines.Scene(1.0, np.zeros(2), 1.0, "", np.array([0.0, -1.0]), np.array([1.0, 1.0]))
    states = torch.tensor([[0.05, -0.95], [0.95, 0.95], [2.0, -3.0]])
    assert scene.cells(states) == [(0, 0), (9, 9), (10, -1)]


def test_the_entropy_of_actions_is_that_of_where_they_fall() -> None:
    box = dist.Uniform(-torch.ones(3, 1), torch.ones(3, 1)).to_event(1)
    found = routines.action_entropies(box, 0)
    # The plug-in estimate from N draws in B bins is low by about (B - 1) / 2N.
    assert found == pytest.approx(np.full(3, math.log(20) - 19 / 400), abs=0.05)
    still = dist.Normal(torch.zeros(2, 1) + 0.01, 1e-6).to_event(1)
    assert routines.action_entropies(still, 0).tolist() == [0.0, 0.0]
    coin = dist.Categorical(torch.tensor([[0.5, 0.5]]))
    assert routines.action_entropies(coin, 0) == pytest.approx([math.log(2)])


def test_combinations_of_actions_have_an_entropy_and_slip() -> None:
    space = MultiDiscrete([2, 3])
    architecture = Architecture(
        states=described(Discrete(4)), actions=described(space), hidden=(4,)
    )
    log_prior = torch.full((6,), -math.log(6))
    policy = SoftmaxPolicy(architecture, ActionValues(architecture, 1), 1e6, log_prior=log_prior)
    states = torch.arange(4)
    with torch.no_grad():
        found = routines.action_entropies(policy(states), 0)
    assert found == pytest.approx(np.full(4, math.log(6)), abs=1e-5)
    slipping = routines.Slipping(policy, UniformPrior(space), 0.5)(states)
    drawn = draw(slipping, np.arange(4, dtype=np.uint64), 0, 0)
    assert drawn.shape == (4, 2)
    assert slipping.log_prob(drawn).exp().tolist() == pytest.approx([1 / 6] * 4, abs=1e-5)


def test_a_slip_is_an_action_of_the_prior() -> None:
    def prior(state: torch.Tensor) -> Any:
        return dist.Categorical(torch.tensor([0.5, 0.5]).expand(*state.shape, 2))

    slipping = routines.Slipping(always_right, prior, 0.2)  # type: ignore[arg-type]
    assert slipping(torch.tensor([3])).probs.tolist() == [pytest.approx([0.1, 0.9])]


def test_claims_about_what_was_learned_weigh_its_runs() -> None:
    def runs(name: str, temperature: float | None, level: float) -> Runs:
        noise = np.array([-0.1, 0.0, 0.1])
        slipped = np.stack([level + noise, level - 1 + noise, level - 2 + noise], axis=-1)
        return Runs(
            name, temperature, 1.0, 10 + noise, 20 + noise, level + noise, level + 1 + noise,
            (temperature or 0) + noise, (temperature or 0) + 0 * noise, slipped,
        )  # fmt: skip

    made = [runs("regular", 0.0, 5.0), runs("soft, α = 1", 1.0, 4.0), runs("hot", 2.0, 3.0)]
    course = Course(
        made, "regular", "soft, α = 1", 1.0, best=6.0, near_by=0.5, steps=100, worth="w",
        places="states covered", by="b",
    )  # fmt: skip
    for claim, value in (
        (sampled.randomness(course), 1.0),
        (sampled.trade(course), 2.0),
        (sampled.robustness(course), -1.0),
        (sampled.cost(course), 1.0),
    ):
        assert claim.effects[0].estimate.value == pytest.approx(value)
        assert claim.effects[0].verdict == ("holds" if value > 0 else "does not hold")
    assert exploration(course).effects[2].estimate.value == pytest.approx(-1.0)
    assert automatic(course).verdict == "does not apply"
    assert stability(course, 0).effects[0].verdict != "holds"


def test_bad_input_is_one_sentence(capsys: Capture) -> None:
    model = load_target("lottery")
    for arguments, words in (
        ({"seeds": 1}, "seeds: expected at least 2"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
        ({"total_steps": 10}, "total_steps: expected at least 640"),
        ({"temperatures": [0.0]}, "temperatures: expected finite numbers > 0"),
        ({"temperatures": [math.nan]}, "temperatures: expected finite numbers > 0"),
        ({"routines": ["exact"]}, "routines: expected learned ones, got 'exact'"),
        ({"routines": ["pcl", "pcl"]}, "routines: expected each once, got 'pcl' twice"),
    ):
        with pytest.raises(ValueError, match=words):
            compare(model, **arguments)  # type: ignore[arg-type]
    for words, said in (
        (["lottery", "sacc"], "unknown learned routine 'sacc'"),
        (["lottery", "--html", "/nowhere/page.html"], "--html: expected a file in a directory"),
        (["lottery", "--prior-kwargs", "{}", "--seeds", "1"], "seeds: expected at least 2"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["compare", *words])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_refused_at_once(
    capsys: Capture, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(diagnostics, "compare", lambda *_, **__: pytest.fail("it was compared"))
        with pytest.raises(SystemExit) as stop:
            main(["compare", "lottery", "--html", str(tmp_path / ("long" * 100))])
    assert stop.value.code == 2
    assert "cannot be written (File name too long); name another file" in capsys.readouterr().err
    fresh = tmp_path / "page.html"
    with pytest.raises(SystemExit):
        main(["compare", "lottery", "--html", str(fresh), "--seeds", "1"])
    assert not fresh.exists()


def test_the_command_prints_one_json_object_and_writes_the_page(
    capsys: Capture, tmp_path: Any
) -> None:
    file = tmp_path / "page.html"
    words = ["compare", "lottery", "--seeds", "2", "--total-steps", "640", "--html", str(file)]
    main([*words, "--temperature", "0.1", "0.3", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["temperatures"] == [0.1, 0.3]
    assert report["reference"] == 0.3
    assert file.read_text().startswith("<!doctype html>")


def test_an_episode_that_never_begins_is_refused() -> None:
    ended = FiniteModel.from_tables(
        np.ones((1, 2, 1)), np.zeros((1, 2)), discount=0.9, terminal=torch.tensor([True])
    )
    with pytest.raises(ValueError, match="terminal: expected an episode that goes beyond"):
        compare(ended)


def test_actions_without_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected discrete actions or a box with bounds.*Double"):
        compare(load_target("double-integrator"))


def test_policies_that_have_no_room_are_not_exact() -> None:
    """21 temperatures of 2 states, 3 actions and ten million steps would take ten gigabytes."""
    steps = {"transition": np.ones((2, 3, 2)) / 2, "reward": np.zeros((2, 3)), "discount": 1.0}
    assert _is_small(FiniteModel.from_tables(**steps, horizon=1000))
    assert not _is_small(FiniteModel.from_tables(**steps, horizon=10**7))


def test_regular_policies_draw_among_what_is_the_same_but_for_rounding() -> None:
    q = np.array([[1.0, 1.0 + 1e-13, 0.0], [2.0, 1.0, -np.inf]])
    assert exact.among_the_best(q).tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]


def test_the_likeliest_action_is_taken_for_certain() -> None:
    assert mode(np.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]])).tolist() == [[0, 1, 0], [1, 0, 0]]
