"""What a derivation is made of: typed source, two kinds of numbers, text, JSON, the command."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Tables
from rich.console import Console
from scipy.special import logsumexp
from test_derivation import noisy, of_tables, step, the

from inference_rl import Exact, FiniteModel, infer, load_target, tabulate
from inference_rl.cli import main
from inference_rl.derivation import STEPS, Derivation, derive, independent, terminal
from inference_rl.derivation.curves import POINTS, STATES, curves
from inference_rl.derivation.step import (
    Check,
    Comparison,
    DoesNotApplyError,
    Estimate,
    Side,
    Step,
    Twin,
    evaluate,
    source_of,
)
from inference_rl.derivation.subject import Subject, choices, excerpt, unrolled
from inference_rl.finite_messages import control_messages

PINNED = {
    "id",
    "title",
    "relation",
    "left",
    "right",
    "difference",
    "tolerance",
    "verdict",
    "why",
    "twin_verdict",
    "reference",
}
ROOT = Path(__file__).parent.parent
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def lottery() -> Derivation:
    return derive(load_target("lottery"))


# --- The typed source -----------------------------------------------------------------------------


def test_there_are_steps_enough_in_the_order_of_the_ladder() -> None:
    names = [known.id for known in STEPS]
    assert len(names) >= 24
    assert len(set(names)) == len(names)
    ladder = [
        "one-decision",
        "reward-as-evidence",
        "joint",
        "posterior-messages",
        "evidence",
        "elbo",
        "posterior-dynamics",
        "structured-guide",
        "maxent-objective",
        "entropy-form",
        "soft-bellman",
        "policy-ratio",
        "contraction",
        "cold-limit",
        "hot-limit",
        "prior-as-reward",
        "discount-as-survival",
        "policy-gradient",
        "soft-policy-iteration",
        "sac-actor",
        "sql-update",
        "sampled-log-sum-exp",
        "path-consistency",
        "reps-dual",
        "expectation-maximisation",
        "temperature-dual",
        "temperature-optimum",
        "fixed-width-limit",
        "regret",
    ]
    assert [name for name in names if name in ladder] == ladder


@pytest.mark.parametrize("known", STEPS, ids=lambda known: known.id)
def test_a_step_says_all_that_is_to_be_said(known: Step) -> None:
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", known.id)
    assert 2 <= len(re.findall(r"[.?](?= |$)", known.explanation)) <= 5, known.explanation
    assert known.formulas
    assert re.search(r"\(\d{4}\)", known.reference)
    assert known.checks
    for check in known.checks:
        for words in (check.left.words, check.right.words, check.twin.words):
            assert words == words.strip()
            assert not words.endswith(".")
        assert check.left.compute is not check.right.compute
    source = source_of(known.about)
    text = (ROOT / source.file).read_text().splitlines()
    names = source.function.split(".")
    assert re.match(r" *(def|class|@\w+).*", text[source.line - 1])
    assert any(names[-1] in line for line in text[source.line - 1 : source.line + 3])


@pytest.mark.parametrize("known", STEPS, ids=lambda known: known.id)
def test_formulas_are_what_every_rendering_knows(known: Step) -> None:
    for latex in known.formulas:
        assert latex.count("{") == latex.count("}")
        assert latex.count(r"\left") == latex.count(r"\right")
        # What latex2mathml cannot do.
        assert not re.search(r"\\operatorname\*|\\arg\b|aligned|&", latex)
        shown = terminal.plain(latex)
        assert "\\" not in shown


@pytest.mark.parametrize(
    ("latex", "text"),
    [
        (r"\frac{a}{b + c}", "a/(b + c)"),
        (r"\log \frac{\pi(a \mid s)}{\rho(a)}", "log(π(a | s)/ρ(a))"),
        (r"V^{\pi'}(s) \le V^*(s)", "V^π'(s) ≤ V*(s)"),
        (r"e^{\left( Q(s, a) - V(s) \right) / \alpha}", "e^((Q(s, a) - V(s)) / α)"),
        (r"\sum_{s'} p(s')", "Σ_s' p(s')"),
        (r"\max_w \left\{ w \right\}", "max_w { w }"),
    ],
)
def test_formulas_as_text(latex: str, text: str) -> None:
    assert terminal.plain(latex) == text


@pytest.mark.parametrize(
    ("latex", "message"), [(r"\sqrt{x}", "LaTeX that is known"), ("a_{b", "braces that close")]
)
def test_formulas_that_are_not_known_are_refused(latex: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        terminal.plain(latex)


# --- Two sides ------------------------------------------------------------------------------------


def made(left: Any, right: Any, **changes: Any) -> Step:
    """A step with these sides, or functions of the model."""

    def side(value: Any) -> Side:
        return Side("words", value if callable(value) else lambda _: value)

    check = Check(
        left=side(left),
        right=side(right),
        twin=changes.pop("twin", Twin("wrong", "left", lambda _: np.inf)),
        over=changes.pop("over", ()),
        tolerance=changes.pop("tolerance", 1e-9),
    )
    given = {"relation": "=", "unit": "", "formulas": (), "reference": "", "explanation": ""}
    return Step(id="made", title="Made", checks=(check,), about=made, **(given | changes))


def found(known: Step) -> Comparison:
    comparison = evaluate(known, Subject(noisy(), 1.0), 1).comparison
    assert comparison is not None
    return comparison


def test_equality_is_held_to_a_tolerance_relative_to_what_is_at_stake() -> None:
    assert found(made(1.0, 1.0 + 9e-10)).holds
    assert not found(made(1.0, 1.0 + 2e-9)).holds
    assert found(made(1e6, 1e6 + 9e-4)).holds
    # In units of reward the scale is that of the model, in nats divided by the temperature.
    subject = Subject(noisy(), 0.5)
    assert subject.size("nats") == 2 * subject.size("reward")
    assert subject.size("reward") >= float(noisy().rewards.abs().max())
    assert not found(made(np.inf, 1.0)).holds
    assert found(made(-np.inf, -np.inf)).holds


def test_inequality_shows_its_slack_where_it_is_least() -> None:
    names = (("one", "two", "three"),)
    comparison = found(
        made(np.array([1.0, 2.0, 0.0]), np.array([3.0, 2.5, 9.0]), relation="<=", over=names)
    )
    assert comparison.holds
    assert (comparison.worst.place, comparison.worst.difference) == ("two", -0.5)
    assert [row.place for row in comparison.rows] == ["one", "two", "three"]
    missed = found(
        made(np.array([1.0, 2.0]), np.array([3.0, 1.9]), relation="<=", over=(("a", "b"),))
    )
    assert not missed.holds
    assert missed.worst.difference == pytest.approx(0.1)


def test_estimates_may_miss_by_five_standard_errors() -> None:
    near, far = Estimate(1.0, 0.1), Estimate(1.0, 0.05)
    assert found(made(near, 1.49)).holds
    assert not found(made(near, 1.51)).holds
    both = found(made(near, far))
    assert both.worst.tolerance == pytest.approx(5 * math.hypot(0.1, 0.05), rel=1e-6)
    assert (both.worst.left_error, both.worst.right_error) == (0.1, 0.05)
    assert found(made(1.0, far)).worst.left_error is None
    draws = np.random.default_rng(0).normal(size=(1000, 2))
    mean = Estimate.of(draws)
    np.testing.assert_allclose(mean.standard_error, draws.std(0, ddof=1) / math.sqrt(1000))


def test_places_without_numbers_are_left_out_and_long_tables_are_cut() -> None:
    names = (tuple(f"place {i}" for i in range(100)),)
    left = np.arange(100.0)
    left[:40] = np.nan
    right = left.copy()
    right[77] += 1e-12
    comparison = found(made(left, right, over=names))
    assert comparison.places == 60
    assert comparison.worst.place == "place 77"
    assert 14 <= len(comparison.rows) <= 16
    assert "place 77" in [row.place for row in comparison.rows]
    assert found(made(left[:45], right[:45], over=((*names[0][:45],),))).places == 5
    broken = evaluate(
        made(np.full(3, np.nan), np.zeros(3), over=(("a",) * 3,)), Subject(noisy(), 1), 1
    )
    assert broken.verdict == "fail"
    assert "expected numbers on both sides, got none" in broken.why


def test_a_computation_that_breaks_fails_its_step_alone() -> None:
    def breaks(_: Subject) -> float:
        raise ZeroDivisionError("too bad")

    def refuses(_: Subject) -> float:
        raise DoesNotApplyError("it has no end")

    subject = Subject(noisy(), 1.0)
    failed = evaluate(made(breaks, 1.0), subject, 7)
    assert (failed.verdict, failed.number) == ("fail", 7)
    assert failed.why == "a computation failed: ZeroDivisionError: too bad"
    refused = evaluate(made(1.0, refuses), subject, 1)
    assert (refused.verdict, refused.why) == ("does not apply", "it has no end")
    twin = evaluate(made(1.0, 1.0, twin=Twin("wrong", "left", breaks)), subject, 1)
    assert (twin.verdict, twin.twin_verdict) == (
        "pass",
        "failed to compute: ZeroDivisionError: too bad",
    )
    silent = evaluate(made(1.0, 1.0, twin=Twin("wrong", "left", refuses)), subject, 1)
    assert silent.twin_verdict == "cannot differ here: it has no end"


@pytest.mark.parametrize(
    ("replaces", "value", "blind", "verdict"),
    [
        ("left", 2.0, None, "fail"),
        ("right", 2.0, "it is blind", "fail"),
        ("right", 1.0, None, "pass"),
        ("right", 1.0, "it is blind", "cannot differ here: it is blind"),
    ],
)
def test_a_twin_takes_the_place_of_a_side(
    replaces: Any, value: float, blind: str | None, verdict: str
) -> None:
    twin = Twin("wrong", replaces, lambda _: value, lambda _: blind)
    finding = evaluate(made(1.0, 1.0, twin=twin), Subject(noisy(), 1.0), 1)
    assert finding.verdict == "pass"
    assert finding.twin is not None
    assert finding.twin_verdict == verdict
    assert finding.twin.comparison is not None
    worst = finding.twin.comparison.worst
    assert (worst.left if replaces == "left" else worst.right) == value


def test_the_same_seed_gives_the_same_numbers_whatever_else_is_checked() -> None:
    model, name = noisy(), "importance-weights"
    alone = [the(name, model, seed=3).left for _ in range(2)]
    torch.manual_seed(5)
    among = derive(model, seed=3).findings[step(name) - 1].left
    assert alone == [among, among]
    assert the(name, model, seed=4).left != among
    before = torch.random.get_rng_state()
    derive(model, step=step(name))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_default_dtype() is torch.float32


# --- The model, looked at in parts ----------------------------------------------------------------


def test_a_horizon_becomes_a_part_of_the_state() -> None:
    model = noisy(horizon=4, discount=0.9)
    with_horizon, without = control_messages(model, 0.7), control_messages(unrolled(model), 0.7)
    np.testing.assert_allclose(without.v.reshape(5, 3), with_horizon.v, atol=1e-12)
    np.testing.assert_allclose(without.policy.reshape(5, 3, 2)[:4], with_horizon.policy, atol=1e-12)
    assert Subject(model, 1.0).label("state", 3 * 2 + 1) == "step 2, state 1"


def test_long_episodes_are_solved_at_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_rl.derivation.subject.MOST_STATES", 3 * 5)
    subject = Subject(noisy(horizon=50), 1.0)
    assert subject.whole_steps == 4
    assert subject.label("state", 0) == "step 46, state 0"
    assert "Of 50 steps the last 4 are solved." in subject.notes()


def test_short_episodes_are_listed_whole_and_long_ones_in_part() -> None:
    whole = excerpt(noisy(horizon=2))
    assert whole is not None
    assert whole.horizon == 2
    np.testing.assert_allclose(whole.initial, [0.5, 0.3, 0.2])
    rooms = tabulate(load_target("four-rooms"))
    part = excerpt(rooms)
    assert part is not None
    assert part.horizon == 3
    assert part.num_states < rooms.num_states
    assert bool(choices(part)[part.initial > 0].all())
    # It moves and pays as the rooms do.
    assert part.state_labels is not None
    places = [re.findall(r"\d+", label) for label in part.state_labels]
    kept = [int(row) * 13 + int(column) for row, column in places]
    for s in (~part.is_terminal).nonzero().squeeze(-1).tolist():
        rows = slice(kept[s] * 4, kept[s] * 4 + 4)
        here = part.csr.toarray()[s * 4 : s * 4 + 4]
        np.testing.assert_allclose(here, rooms.csr.toarray()[rows][:, kept])
    paid = rooms.expected_reward()[kept][~part.is_terminal]
    np.testing.assert_allclose(part.expected_reward()[~part.is_terminal], paid)


LIGHT = settings(max_examples=20, deadline=None, derandomize=True)


@LIGHT
@given(oracles.finite_tables(max_states=3, max_actions=2, max_horizon=2, scales=(1.0,)))
def test_listed_trajectories_are_those_of_brute_force(tables: Tables) -> None:
    tables = dataclasses.replace(tables, discount=1.0)
    paths = independent.every_path(of_tables(tables))
    log_p = paths.log_chance(tables.stopped().prior) + paths.rewards.sum(0) / 0.7
    exact = oracles.brute_force_posterior(tables, 0.7).log_evidence
    assert float(logsumexp(log_p)) == pytest.approx(exact, abs=1e-11)
    chance = np.exp(paths.log_chance(tables.stopped().prior))
    assert float(chance.sum()) == pytest.approx(1, abs=1e-12)


@LIGHT
@given(
    oracles.finite_tables(max_states=3, max_actions=3, scales=(1.0,), discounts=(0.9, 0.5, 0.0)),
    st.sampled_from([0.0, 0.3, 2.0]),
)
def test_policy_iteration_finds_the_value_to_many_digits(
    tables: Tables, temperature: float
) -> None:
    tables = dataclasses.replace(tables, horizon=None)
    found_value = independent.best_value(independent.Tables.of(of_tables(tables)), temperature)
    if temperature == 0:
        regular = infer(of_tables(tables), Exact(0.0)).v
        np.testing.assert_allclose(found_value, regular, atol=1e-10)
        return
    exact = oracles.mp_soft_value_iteration(tables, temperature, 1e-14)
    np.testing.assert_allclose(found_value, [float(v) for v in exact], atol=1e-12)


def test_sums_along_a_policy_and_visits_are_two_ways_to_one_number() -> None:
    model = noisy()
    tables = independent.Tables.of(model)
    policy = np.array([[0.3, 0.7], [0.6, 0.4], [0.5, 0.5]])
    rate = np.array([1.0, -2.0, 5.0])
    along = tables.initial @ tables.along(policy, rate)
    assert along == pytest.approx(tables.visits(policy) @ rate)
    value = oracles.linear_solve_value(
        Tables(
            model.csr.toarray().reshape(3, 2, 3),
            np.broadcast_to(model.expected_reward().numpy()[..., None], (3, 2, 3)),
            tables.prior,
            tables.initial,
            ~tables.live,
            0.9,
        ),
        policy,
        0.7,
    )
    np.testing.assert_allclose(tables.value(policy, 0.7), value, atol=1e-12)


# --- Text, JSON, command --------------------------------------------------------------------------


def shown(derivation: Derivation, width: int = 100, **options: Any) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        terminal.print_derivation(derivation, console=console, **options)
    return capture.get()


@pytest.mark.parametrize("width", [100, 60])
def test_the_text_is_in_order_and_fits(lottery: Derivation, width: int) -> None:
    text = shown(lottery, width)
    assert max(len(line) for line in text.splitlines()) <= width
    numbers = [int(n) for n in re.findall(r"^ ?(\d+)\. ", text, re.MULTILINE)]
    assert numbers == list(range(1, len(STEPS) + 1))
    flat = " ".join(text.split())
    for finding in lottery.findings:
        assert finding.step.explanation in flat
        assert finding.step.reference in flat
        for formula in finding.step.formulas:
            assert " ".join(terminal.plain(formula).split()) in flat
        assert f"{finding.source.file}:{finding.source.line}" in flat
    assert "does not apply: its discount is 1" in flat
    assert "33 of 37 steps pass, 0 fail, 4 do not apply; 33 of 33 broken twins were caught" in flat
    assert "Single trajectories are listed over 1 step from 1 state: 3 of them." in flat


def test_a_long_screen_does_not_make_long_lines(lottery: Derivation) -> None:
    assert max(len(line) for line in shown(lottery, 300).splitlines()) <= 100


def test_only_what_failed(lottery: Derivation) -> None:
    assert "No step failed." in shown(lottery, only_failed=True)
    fourth = lottery.findings[3]
    bad = dataclasses.replace(fourth, verdict="fail", why="both sides differ by 1")
    derivation = dataclasses.replace(
        lottery, findings=(*lottery.findings[:3], bad, *lottery.findings[4:])
    )
    text = shown(derivation, only_failed=True)
    assert re.findall(r"^ ?(\d+)\. ", text, re.MULTILINE) == ["4"]
    assert "both sides differ by 1" in text


def test_as_json(lottery: Derivation) -> None:
    report = json.loads(json.dumps(lottery.as_json(), allow_nan=False))
    assert report["target"] == "lottery"
    assert report["counts"] == {
        "steps": 37,
        "pass": 33,
        "fail": 0,
        "does_not_apply": 4,
        "twins": 33,
        "twins_caught": 33,
    }
    for number, found_step in enumerate(report["steps"], start=1):
        assert set(found_step) > PINNED
        assert found_step["number"] == number
        numbers = [found_step[name] for name in ("left", "right", "difference", "tolerance")]
        if found_step["verdict"] == "pass":
            assert all(isinstance(value, float) for value in numbers)
            assert numbers[2] == pytest.approx(numbers[0] - numbers[1])
            assert found_step["twin_verdict"] == "fail"
            assert found_step["rows"]
            assert found_step["twin"]["place"] is not None
        else:
            assert numbers == [None] * 4
            assert found_step["twin_verdict"] is None
        assert [met["met"] for met in found_step["assumptions"]].count(False) == (
            found_step["verdict"] == "does not apply"
        )


def test_the_command_prints_one_object(capsys: Capture) -> None:
    arguments = ["derive", "chain", "--temperature", "0.5", "--discount", "0.9", "--seed", "2"]
    main([*arguments, "--env-kwargs", '{"length": 4}', "--step", "16", "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    report = json.loads(out)
    assert (report["temperature"], report["discount"], report["seed"]) == (0.5, 0.9, 2)
    assert [s["id"] for s in report["steps"]] == ["soft-bellman"]
    assert report["steps"][0]["places"] == 3
    main([*arguments, "--prior", "uniform", "--step", "16", "--only", "failed", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["prior"] == "UniformPrior"
    assert (report["steps"], report["counts"]["pass"]) == ([], 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "0"], "temperature: expected a finite number > 0 in reward units, got"),
        (["--temperature", "inf"], "temperature: expected a finite number > 0"),
        (["--step", "99"], "step: expected a number from 1 to 37, got 99"),
        (["--seed", "-1"], "--seed: expected 0 or more, got -1"),
        (["--prior-kwargs", "{}"], None),
        (["--prior-kwargs", '{"scale": 1}'], "--prior-kwargs was given without --prior"),
        (["--discount", "2"], r"discount: expected a number in \[0, 1\], got 2.0"),
        (["--only", "passed"], "failed"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], message: str | None, capsys: Capture) -> None:
    words = ["derive", "lottery", "--step", "16", *words]
    if message is None:
        main(words)
        return
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    shown_text = capsys.readouterr()
    assert shown_text.out == ""
    assert shown_text.err.count("\n") == 1
    assert re.search(message, shown_text.err)


# --- Curves ---------------------------------------------------------------------------------------


def test_curves_are_exact_inference_at_every_temperature() -> None:
    lake = load_target("FrozenLake-v1")
    drawn = derive(lake, temperature=0.3, step=1, with_curves=True).curves
    assert drawn is not None
    assert len(drawn.temperatures) == POINTS
    assert drawn.temperatures[drawn.chosen] == 0.3
    assert list(drawn.temperatures) == sorted(drawn.temperatures)
    for index in (0, drawn.chosen, POINTS - 1):
        result = infer(lake, Exact(drawn.temperatures[index]))
        assert drawn.objective[index] == pytest.approx(float(result.objective), abs=1e-9)
        assert result.parts is not None
        assert drawn.expected_return[index] == pytest.approx(result.parts.expected_return)
        assert drawn.objective_entropy_form[index] == pytest.approx(result.objective_entropy_form)
        entropy = result.parts.entropy / result.parts.steps
        assert drawn.entropy[index] == pytest.approx(entropy, abs=1e-9)
        assert result.gap is not None
        assert drawn.evidence_gap[index] == pytest.approx(result.gap.total, rel=1e-6)
        policy = np.array(drawn.policy[index])
        assert policy.shape == (STATES, 4) == (len(drawn.states), len(drawn.actions))
        np.testing.assert_allclose(policy.sum(-1), 1)
        assert any(np.allclose(row, policy[0]) for row in result.policy.probs)  # type: ignore[attr-defined]
    assert drawn.regular == pytest.approx(float(infer(lake, Exact(0.0)).objective))
    # Colder is nearer to regular RL, and hotter nearer to the prior.
    assert np.diff(drawn.objective).max() <= 1e-12
    assert np.diff(drawn.entropy).min() >= -1e-12
    assert derive(lake, step=1).curves is None


def test_curves_of_other_models() -> None:
    cart = curves(Subject(load_target("double-integrator", env_kwargs={"horizon": 3}), 1.0))
    assert cart is not None
    assert (cart.states, cart.actions) == ((), ())
    assert cart.evidence_gap[0] is None  # of a discount there is no Gaussian evidence
    assert curves(Subject(load_target("pendulum"), 1.0)) is None
    # Where a loop pays so well that the evidence is infinite, there is none.
    paid = FiniteModel.from_tables(np.full((1, 2, 1), 1.0), np.ones((1, 2)), discount=0.9)
    loop = curves(Subject(paid, 1.0))
    assert loop is not None
    assert loop.log_evidence[0] is None
    assert loop.log_evidence[-1] is not None
