"""The temperature doctor: targets against closed forms and scans, and what a run came to."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import scipy.optimize
import torch
from test_exact import example, model_of

from inference_rl import REPS, Exact, FiniteModel, InferenceResult, infer, load_target
from inference_rl.cli import main
from inference_rl.diagnostics.diagnostic_pictures import temperature_figure
from inference_rl.diagnostics.temperature import (
    TemperatureReport,
    temperature_report,
    trust_region,
)
from inference_rl.temperature import Tuned, default_target_entropy


def bandit(rewards: list[float]) -> FiniteModel:
    """One state, one step."""
    size = len(rewards)
    return FiniteModel.from_tables(np.ones((1, size, 1)), np.array([rewards]), horizon=1)


def report_of(model: Any, **target: Any) -> TemperatureReport:
    return temperature_report(model, **target)


# --- Where a target is met ----------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.01, 0.2, 0.6])
def test_a_coin_in_closed_form(target: float) -> None:
    """Rewards 0 and 1: π = 1 / (1 + e^{-1/α}), and log 2 - H(π) = target."""

    def excess(p: float) -> float:
        return math.log(2) + p * math.log(p) + (1 - p) * math.log1p(-p) - target

    p = scipy.optimize.brentq(excess, 0.5 + 1e-12, 1 - 1e-12, xtol=1e-15)
    report = report_of(bandit([0.0, 1.0]), target_divergence=target)
    assert report.predicted == pytest.approx(1 / math.log(p / (1 - p)), rel=1e-8)
    assert report.target_entropy == pytest.approx(math.log(2) - target)
    assert report.infeasible_because is None
    assert report.also_met_at == ()
    same = report_of(bandit([0.0, 1.0]), target_entropy=math.log(2) - target)
    assert same.predicted == pytest.approx(report.predicted, rel=1e-9)


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("horizon", [3, None])
def test_the_prediction_is_the_minimum_of_a_convex_dual(horizon: int | None, ends: bool) -> None:
    """g by the value of another computation, minimised without its derivative."""
    tables = example(horizon=horizon, discount=0.8, ends=ends)
    target = 0.1
    report = report_of(model_of(tables), target_divergence=target)
    assert report.predicted is not None

    def objective(temperature: float) -> float:
        if horizon is not None:
            return oracles.brute_force_control(tables, temperature).objective
        return float(infer(model_of(tables), Exact(temperature)).objective)

    policy = infer(model_of(tables), Exact(report.predicted)).policy.probs.numpy()
    if horizon is None:
        steps = float(oracles.occupancy(tables, policy).sum())
    else:
        counting = dataclasses.replace(tables, reward=np.ones_like(tables.reward))
        steps = oracles.objective(counting, policy, 1.0, form="reward")

    def dual(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        return objective(temperature) + temperature * target * steps

    bounds = (math.log(report.predicted) - 2, math.log(report.predicted) + 2)
    found = scipy.optimize.minimize_scalar(dual, bounds=bounds, options={"xatol": 1e-9})
    assert math.exp(found.x) == pytest.approx(report.predicted, rel=1e-3)  # it is flat there
    curve = report.curve
    assert curve is not None
    assert curve.dual is not None
    expected = [dual(math.log(t)) for t in curve.temperatures[10:20]]
    np.testing.assert_allclose(curve.dual[10:20], expected, rtol=1e-9)
    slopes = np.diff(curve.dual) / np.diff(curve.temperatures)
    assert (np.diff(slopes) >= -1e-9 * np.abs(slopes).max()).all()
    assert (np.diff(curve.divergence) <= 1e-9).all() or ends


def test_the_default_target_is_resolved() -> None:
    model = load_target("tree")
    report = report_of(model)
    assert not report.given
    assert report.target_entropy == pytest.approx(default_target_entropy(model.action_space))


def test_a_prior_of_ones_own_takes_a_divergence() -> None:
    tables = example(horizon=3, discount=1.0, ends=False)
    report = report_of(model_of(tables), target_divergence=0.05)
    assert report.target_entropy is None
    policy = infer(model_of(tables), Exact(float(report.predicted or 0))).policy.probs.numpy()
    total = oracles.policy_divergence(tables, policy, np.broadcast_to(tables.prior, policy.shape))
    assert total / 3 == pytest.approx(0.05, abs=1e-9)
    with pytest.raises(ValueError, match="target_entropy: expected a uniform prior"):
        report_of(model_of(tables), target_entropy=0.5)


# --- Where it is not ----------------------------------------------------------------------------


def test_an_entropy_above_the_largest_is_infeasible() -> None:
    report = report_of(load_target("chain"), target_entropy=0.75)
    assert report.predicted is None
    assert report.infeasible_because is not None
    assert "a target entropy below 0.693147 nats, the largest there is" in report.infeasible_because
    assert report.curve is not None
    assert report.curve.dual is None


def test_ties_keep_the_best_policy_from_a_target() -> None:
    """Two of four actions are best: no temperature takes the divergence above log 2."""
    report = report_of(bandit([1.0, 1.0, 0.0, 0.0]), target_divergence=0.8)
    assert report.predicted is None
    assert report.largest_divergence == pytest.approx(math.log(2))
    assert "diverges by 0.693147 nats per step only" in str(report.infeasible_because)
    assert report_of(bandit([1.0, 1.0, 0.0, 0.0]), target_divergence=0.6).predicted is not None


def test_where_there_is_nothing_to_choose() -> None:
    report = report_of(bandit([2.0, 2.0]), target_divergence=0.1)
    assert report.curve is None
    assert report.predicted is None
    assert "all steps pay the same" in str(report.infeasible_because)


def test_other_models_have_a_target_and_no_curve() -> None:
    report = report_of(load_target("pendulum"))
    assert report.target_entropy == -1
    assert report.target_divergence == pytest.approx(1 + math.log(2))
    assert report.curve is None
    assert report.no_curve_because == "the model is not finite"
    large = temperature_report(load_target("tree"), most_states=100)
    assert large.no_curve_because == "the model has more than 100 states"


# --- Of a run -----------------------------------------------------------------------------------


def test_tuning_by_the_exact_policy_comes_to_rest_there() -> None:
    model, settings = load_target("tree"), Tuned(target_divergence=0.3, learning_rate=0.05)
    state = settings.initial_state()
    for _ in range(300):
        parts = infer(model, Exact(settings.temperature(state, 0))).parts
        assert parts is not None
        state = settings.update(state, parts.divergence / parts.steps)
    report = report_of(model, target_divergence=0.3)
    assert settings.temperature(state, 0) == pytest.approx(report.predicted, rel=1e-3)


def test_a_run_that_has_not_settled() -> None:
    settings = REPS(temperature="auto", target_divergence=0.2, total_steps=160, evaluate_every=80)
    result = infer(load_target("chain"), settings)
    report = temperature_report(result)
    assert report.given
    assert report.came_to == result.temperature
    assert report.measured_divergence == result.metrics[-1]["divergence"]
    assert report.settled is False
    assert report.predicted == report_of(load_target("chain"), target_divergence=0.2).predicted


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_tuned_run_comes_to_the_prediction(seed: int) -> None:
    settings = REPS(temperature="auto", target_divergence=0.3, total_steps=60_000)
    report = temperature_report(infer(load_target("FrozenLake-v1"), settings, seed=seed))
    assert report.came_to == pytest.approx(report.predicted, rel=0.15)


def test_a_fixed_temperature_has_nowhere_to_come_to() -> None:
    report = temperature_report(infer(bandit([0.0, 1.0]), Exact(0.3)), target_divergence=0.2)
    assert report.came_to is None
    assert report.settled is None
    assert report.predicted is not None


def test_the_picture_shows_the_curve_and_the_marks() -> None:
    settings = REPS(temperature="auto", target_divergence=0.2, total_steps=160, evaluate_every=160)
    report = temperature_report(infer(load_target("chain"), settings))
    above, below = temperature_figure(report).axes
    assert report.curve is not None
    np.testing.assert_array_equal(above.lines[0].get_ydata(), report.curve.divergence)
    np.testing.assert_array_equal(below.lines[0].get_ydata(), report.curve.dual)
    marks = {line.get_label(): line.get_xdata()[0] for line in above.lines[2:]}
    assert marks == {"target met": report.predicted, "the run came to": report.came_to}
    low, high = above.get_xlim()
    assert low < report.predicted < high
    alone = temperature_figure(report_of(load_target("chain"), target_entropy=0.75))
    assert len(alone.axes) == 1  # no minimum, no dual
    with pytest.raises(ValueError, match="with a curve, got none: the model is not finite"):
        temperature_figure(report_of(load_target("pendulum")))


# --- The trust region ---------------------------------------------------------------------------


def test_a_trust_region_of_two_returns_in_closed_form() -> None:
    """Of a share p of ones the best weighting within epsilon gives them w, KL(w ‖ p) = epsilon."""
    result = infer(bandit([0.0, 1.0]), Exact(0.0))
    always = torch.full((1, 1, 2), 0.5, dtype=torch.float64)
    result = dataclasses.replace(result, policy=type(result.policy)(always))
    found = trust_region(result, epsilon=0.3, draws=500)
    reward = result.routine.sample(result, 500, horizon=None, seed=0)["sample_stats"]["return"]
    p = float(reward.mean())

    def excess(w: float) -> float:
        return w * math.log(w / p) + (1 - w) * math.log((1 - w) / (1 - p)) - 0.3

    w = scipy.optimize.brentq(excess, p, 1 - 1e-12, xtol=1e-14)
    eta = 1 / math.log(w * (1 - p) / (p * (1 - w)))
    assert found.temperature == pytest.approx(eta, rel=1e-6)
    size = 500 / (w**2 / p + (1 - w) ** 2 / (1 - p))
    assert found.effective_sample_size == pytest.approx(size, rel=1e-6)
    least = int(np.argmin(found.dual))
    assert found.temperatures[least - 1] < eta < found.temperatures[least + 1]
    refused = trust_region(result, epsilon=2.0, draws=500)
    assert refused.temperature is None
    assert "choose a smaller epsilon" in str(refused.refused_because)


def test_the_rounds_of_reps_are_reported() -> None:
    settings = REPS(total_steps=800, evaluate_every=400, temperature=0.1)
    result = infer(load_target("chain"), settings)
    found = trust_region(result, draws=200)
    assert found.epsilon == settings.epsilon
    assert len(found.rounds) == len(result.metrics)
    assert found.rounds[-1]["dual_temperature"] == result.metrics[-1]["dual_temperature"]
    exact = infer(load_target("chain"), Exact(0.1))
    with pytest.raises(ValueError, match="Exact has none of its own"):
        trust_region(exact)
    with pytest.raises(ValueError, match="at least 2 episodes"):
        trust_region(result, draws=1)


# --- The command --------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(list(words))
    return capsys.readouterr().out


def test_check_examines_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(command(capsys, "check", "lottery", "--target-entropy", "0.4", "--json"))
    report = found["temperature_report"]
    expected = report_of(load_target("lottery"), target_entropy=0.4)
    assert report["predicted"] == pytest.approx(expected.predicted)
    assert len(report["curve"]["dual"]) == len(report["curve"]["temperatures"])
    shown = command(capsys, "check", "lottery", "--target-entropy", "0.4")
    assert f"met by the best policy at temperature {expected.predicted:.6g}" in shown
    shown = command(capsys, "check", "lottery", "--target-divergence", "-1")
    assert "cannot be met: expected a target divergence between 0 and 0.693147" in shown
    none = json.loads(command(capsys, "check", "lottery", "--json"))
    assert none["temperature_report"] is None


def test_evaluate_says_where_a_tuned_temperature_got_to(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = REPS(temperature="auto", total_steps=160, evaluate_every=160)
    result = infer(load_target("lottery"), settings)
    result.save("run")
    shown = command(capsys, "evaluate", "run")
    assert f"the run came to {result.temperature:.6g}, at a divergence of" in shown
    assert "it has not settled" in shown
    found = json.loads(command(capsys, "evaluate", "run", "--json"))
    assert found["temperature_report"]["came_to"] == result.temperature


def test_evaluate_reports_the_trust_region_of_reps(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = REPS(temperature=0.1, total_steps=800, evaluate_every=400)
    infer(load_target("chain"), settings).save("run")
    found = json.loads(command(capsys, "evaluate", "run", "--draws", "300", "--json"))
    region = trust_region(InferenceResult.load("run"), draws=300)
    assert found["trust_region"] == json.loads(json.dumps(region.summary()))
    assert region.temperature is not None
    assert 1 <= region.effective_sample_size <= 300
    shown = command(capsys, "evaluate", "run", "--draws", "300")
    assert f"the dual is least at temperature {region.temperature:.6g}, where they" in shown
    assert f"{region.rounds[-1]['dual_temperature']:.6g}, its sample counts as" in shown
    none = json.loads(command(capsys, "evaluate", "run", "--draws", "0", "--json"))
    assert none["trust_region"] is None
