"""Sweeps: what they find, that they go on where they were, and what they say."""

from __future__ import annotations

import contextlib
import contextvars
import csv
import dataclasses
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyro.distributions as dist
import pytest
import torch
from gymnasium.spaces import Discrete

from inference_rl import EnvironmentModel, PolicyGradient, Workers, load_target, runs
from inference_rl.cli import main
from inference_rl.diagnostics.sweep_pictures import sweep_figure
from inference_rl.learning.loop import Interrupted
from inference_rl.search_spaces import Choice, LogUniform
from inference_rl.sweeping import plan as plans
from inference_rl.sweeping import resume, sweep
from inference_rl.sweeping import trial as trials
from inference_rl.sweeping.results import SweepResult, TrialResult
from inference_rl.sweeping.statistics import bootstrap_interval, interquartile_mean
from inference_rl.sweeping.study import ByNumber, attached, open_study

BANDIT = """
import os, signal
import torch, pyro.distributions as dist
from gymnasium.spaces import Discrete
from inference_rl import EnvironmentModel

class Bandit(EnvironmentModel):
    state_space, action_space, discount, horizon = Discrete(1), Discrete(3), 1.0, 1
    def initial_state(self):
        return dist.Categorical(torch.ones(1))
    def transition(self, state, action):
        return dist.Categorical(torch.ones(*action.shape, 1))
    def reward(self, state, action, next_state):
        return action.double()
"""
SETTINGS: dict[str, Any] = {
    "total_steps": 120,
    "environments": 4,
    "steps_per_round": 1,
    "evaluate_every": 40,
    "evaluation_episodes": 5,
    "save_every": 40,
}
OPTIONS = [w for k, v in SETTINGS.items() for w in (f"--{k.replace('_', '-')}", str(v))]
SEARCH = ["--search", "learning-rate=0.001:1.0:log", "hidden=4,8x8"]
QUICK = [*OPTIONS, *SEARCH, "--episodes", "10", "--seeds", "2"]
SPACES = {"learning_rate": LogUniform(1e-3, 1.0), "hidden": Choice(((4,), (8, 8)))}

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "bandit.py").write_text(BANDIT)


@pytest.fixture
def _quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "inference_rl.diagnostics.sweep_pictures.draw_sweep"
    monkeypatch.setattr(place, lambda result, path: path.write_bytes(b"a picture"))


def refusal(capsys: Capture, *words: str, code: int = 2) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    return shown.err


def small(directory: str = "sweep", **changes: Any) -> Any:
    """A sweep of the bandit, in this process."""
    given = {"trials": 2, "seeds": 1, "episodes": 5, "search": SPACES, "directory": directory}
    model = changes.pop("model", None) or load_target("bandit.py")
    return sweep(model, PolicyGradient(**SETTINGS), **(given | changes))


def bytes_of(folder: Path, pattern: str = "trials/**/*") -> dict[str, str]:
    """What must be the same twice."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob(pattern))
        if path.is_file() and path.name != "timing.json"
    }


# ------------------------------------------------------------------ what comes of it


def test_a_sweep_finds_what_is_best_and_a_command_repeats_it(capsys: Capture) -> None:
    begin = ["sweep", "bandit.py", "policy-gradient", *QUICK, "--trials", "7", "--out", "found"]
    main([*begin, "--json"])
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    found = {trial["number"]: trial for trial in report["trials"]}
    assert list(found) == list(range(7))
    complete = [trial for trial in found.values() if trial["state"] == "complete"]
    pruned = [trial for trial in found.values() if trial["state"] == "pruned"]
    assert len(complete) + len(pruned) == 7
    assert pruned  # of learning rates that are far too small
    for trial in complete:
        scores = np.array(trial["returns"])
        assert trial["score"] == interquartile_mean(scores)
        assert tuple(trial["interval"]) == bootstrap_interval(scores, seed=0)
    best = report["best"]
    assert best == max(complete, key=lambda trial: trial["score"])
    assert best["settings"]["learning_rate"] > 0.1
    assert best["score"] > 1.6

    # Runs are those of `infer`, whose last row of metrics is what they are scored by.
    for seed, mean_return in zip(report["seeds"], best["returns"], strict=True):
        run = trials.run_directory(Path("found"), best["number"], seed)
        saved = json.loads((run / "run.json").read_text())
        assert saved["metrics"][-1]["mean_return"] == mean_return
        assert not (run / "checkpoints").exists()
    program, *words = shlex.split(report["command"])
    assert program == "inference-rl"
    main([*words, "--out", "again"])
    capsys.readouterr()
    first = trials.run_directory(Path("found"), best["number"], 0)
    again = bytes_of(Path("again"), "*")
    for name, digest in bytes_of(first, "*").items():
        assert again[name] == digest, name

    table = (Path("found") / "trials.csv").read_text()
    rows = list(csv.DictReader(table.splitlines()))
    assert [row["state"] for row in rows] == [trial["state"] for trial in found.values()]
    assert float(rows[best["number"]]["score"]) == best["score"]
    assert (Path("found") / "sweep.png").read_bytes().startswith(b"\x89PNG")

    # What is complete is said again, and not run again.
    before = bytes_of(Path("found"))
    main(["sweep", "--resume", "found"])
    out = capsys.readouterr().out
    assert bytes_of(Path("found")) == before
    assert report["command"] in out
    assert f"7 trials ({len(complete)} complete, {len(pruned)} pruned), each of seeds 0 to 1" in out
    assert "found holds a sweep; go on with it by inference-rl sweep --resume found" in (
        refusal(capsys, *begin)
    )


@pytest.mark.usefixtures("_quick_pictures")
def test_more_trials_are_those_of_a_longer_sweep() -> None:
    whole = small("whole", trials=3)
    part = small("part", trials=1)
    plan = part.plan
    study = open_study(plan.url(Path("part")), plan.study, seed=0, prune=True)
    assert trials.run_trial("part", study.ask().number, 300.0) == []  # as in another process
    main(["sweep", "--resume", "part", "--trials", "3", "--json"])
    assert bytes_of(Path("part")) == bytes_of(Path("whole"))
    assert resume("part").trials == whole.trials


def test_trials_are_proposed_by_seed_number_and_history() -> None:
    def proposed(seed: int, *, cut_short: bool) -> list[dict[str, Any]]:
        storage = optuna.storages.InMemoryStorage()

        def study() -> optuna.Study:
            return optuna.create_study(
                study_name="study", storage=storage, load_if_exists=True, sampler=ByNumber(seed)
            )

        ours, found = study(), []
        for number in range(14):  # the last four by the model of those before
            trial = ours.ask()
            x = trial.suggest_float("x", 0, 1)
            if cut_short:  # and gone on with by another process
                ours = study()
                trial = attached(ours, number)
            values = {"x": trial.suggest_float("x", 0, 1), "y": trial.suggest_int("y", 1, 9)}
            assert values["x"] == x
            ours.tell(trial, abs(values["x"] - 0.3))
            found.append(values)
        return found

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    whole = proposed(0, cut_short=False)
    assert proposed(0, cut_short=True) == whole
    assert proposed(1, cut_short=False) != whole


# ------------------------------------------------------------------ what stops it


def states(folder: Path) -> list[Any]:
    """All that the storage has of a sweep's trials, but for when they were run."""
    plan = plans.read(folder)
    study = open_study(plan.url(folder), plan.study, seed=0, prune=plan.prune)
    return [
        (t.number, t.state, t.values, t.params, t.intermediate_values, t.user_attrs)
        for t in study.get_trials()
    ]


def struck(kills: int, number: int, folder: Path) -> None:
    """Hold a sweep that SIGKILL strikes so often, at any time, against one that it does not."""
    begin = ["sweep", "bandit.py", "policy-gradient", *QUICK, "--trials", str(number)]
    whole, part = folder / "whole", folder / "part"
    started = time.monotonic()
    main([*begin, "--out", str(whole), "--json"])
    took = time.monotonic() - started
    command = str(Path(sys.executable).with_name("inference-rl"))
    rng, within = random.Random(kills), 0
    for _ in range(kills):
        begun = (part / plans.PLAN).exists()
        words = ["--resume", str(part)] if begun else [*begin[1:], "--out", str(part)]
        process = subprocess.Popen(
            [command, "sweep", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        seen, until = len(list(part.glob("trials/*/*"))), time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            if len(list(part.glob("trials/*/*"))) > seen:  # it is at work again
                break
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, took / kills))
        within += process.poll() is None
        process.kill()
        process.wait()
    main(["sweep", "--resume", str(part), "--json"])
    assert within >= kills // 2
    assert states(part) == states(whole)
    assert bytes_of(part) == bytes_of(whole)
    assert (part / "trials.csv").read_bytes() == (whole / "trials.csv").read_bytes()
    print(f"{kills} kills, {within} of them within a sweep of {number} trials")


@pytest.mark.usefixtures("_quick_pictures")
def test_a_sweep_that_is_killed_goes_on_as_if_it_were_not(tmp_path: Path) -> None:
    struck(1, 3, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("_quick_pictures")
def test_twenty_sigkills(tmp_path: Path) -> None:
    struck(20, 30, tmp_path)


class Signalled:
    """Sends itself a signal at the `at`th word of progress that names a run."""

    def __init__(self, number: int, at: int) -> None:
        self.number, self.left = number, at

    def __call__(self, words: str) -> None:
        self.left -= "run" in words
        if self.left == 0:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 1), (signal.SIGTERM, 3)])
def test_a_signal_stops_it_and_it_goes_on(number: int, at: int) -> None:
    with pytest.raises(Interrupted) as stop:
        small("stopped", progress=Signalled(number, at))
    assert stop.value.signal == number
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    assert [trial.state for trial in resume("stopped").trials] == ["complete"] * 2
    small("whole")
    assert states(Path("stopped")) == states(Path("whole"))


@pytest.mark.usefixtures("_quick_pictures")
def test_the_command_says_how_to_go_on(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("inference_rl.sweeping.trial.infer", stopped)
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "bandit.py", "policy-gradient", *QUICK, "--out", "out"])
    assert stop.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err.endswith("; go on with: inference-rl sweep --resume out\n")


def test_two_are_not_at_work_on_one_sweep(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    small()
    monkeypatch.setattr(plans, "PATIENCE", 0.2)
    with runs.held(Path("sweep")):  # by others than the command
        context = contextvars.Context()
        said = context.run(refusal, capsys, "sweep", "--resume", "sweep")
    assert "sweep is in use: expected a directory that no other process works in; wait" in said


# ------------------------------------------------------------------ trials that fail


FAILING = BANDIT.replace(
    "        return action.double()",
    """        if os.path.exists("ill") and len(os.listdir("sweep/trials")) == 2:
            {}
        return action.double()""",
)


@pytest.mark.usefixtures("_quick_pictures")
@pytest.mark.parametrize(
    ("what", "why"),
    [('raise KeyError("lost")', "KeyError"), ("raise SystemExit(0)", "SystemExit: 0")],
)
def test_a_trial_that_fails_is_noted_and_the_sweep_goes_on(
    what: str, why: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "bandit.py").write_text(FAILING.format(what))
    Path("ill").touch()
    result = small(trials=3)
    assert [trial.state for trial in result.trials] == ["complete", "failed", "complete"]
    assert why in str(result.trials[1].why)
    assert result.trials[1].score is None
    main(["sweep", "--resume", "sweep"])
    assert f"Failed: 1: {result.trials[1].why}" in capsys.readouterr().out


@pytest.mark.usefixtures("_quick_pictures")
def test_a_trial_whose_environment_hangs_has_failed(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "bandit.py").write_text(FAILING.format("while True: pass"))
    Path("ill").touch()
    result = small(trials=3, workers=Workers(1, patience=0.5))
    assert [trial.state for trial in result.trials] == ["complete", "failed", "complete"]
    assert "it was not through after 0.5 s" in str(result.trials[1].why)


@pytest.mark.slow
@pytest.mark.usefixtures("_quick_pictures")
def test_trials_of_processes_whose_environments_hang_have_failed(
    tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "bandit.py").write_text(FAILING.format("while True: pass"))
    Path("ill").touch()
    words = ["--trials", "3", "--workers", "2", "--patience", "0.5", "--out", "sweep", "--json"]
    main(["sweep", "bandit.py", "policy-gradient", *QUICK, *words])
    capsys.readouterr()
    *first, last = resume("sweep").trials
    reasons = [str(trial.why) for trial in first if trial.state == "failed"]
    assert reasons
    assert all("it was not through after 0.5 s" in why for why in reasons)
    assert last.state == "complete"


@pytest.mark.usefixtures("_quick_pictures")
def test_where_all_fail_the_exit_code_is_one(tmp_path: Path, capsys: Capture) -> None:
    text = BANDIT.replace("action.double()", "action.double() * float('nan')")
    (tmp_path / "bandit.py").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "bandit.py", "policy-gradient", *QUICK, "--trials", "2", "--out", "nan"])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "2 trials (2 failed)" in out
    assert "Failed: 0, 1: " in out
    assert "No trial was completed, so there is no best one." in out


def test_a_disk_that_fails_is_no_failure_of_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("inference_rl.sweeping.trial.infer", full)
        with pytest.raises(OSError, match="no space left on device"):
            small()
    assert [trial.state for trial in resume("sweep").trials] == ["complete"] * 2


@pytest.mark.slow
def test_trials_are_ended_by_the_median_of_their_evaluations() -> None:
    result = small("pruned", trials=9, seeds=2)
    never = small("never", trials=9, seeds=2, prune=False)
    assert {trial.state for trial in never.trials} == {"complete"}
    assert any(trial.state == "pruned" for trial in result.trials)
    complete: list[Any] = []
    for mine, whole in zip(result.trials, never.trials, strict=True):
        assert mine.settings == whole.settings  # random ones, until ten have ended
        expected = {}
        for step, value in whole.measured.items():
            expected[step] = value
            others = [other.measured[step] for other in complete]
            if len(complete) >= 5 and step < 6 and max(expected.values()) < np.median(others):
                break
        assert mine.measured == expected
        assert (mine.state == "pruned") == (len(expected) < 6)
        if mine.state == "complete":
            assert mine.score == whole.score
            complete.append(mine)


@pytest.mark.pictures
def test_the_picture_shows_scores_by_trial_and_by_setting() -> None:
    def trial(number: int, rate: float, score: float | None, **more: Any) -> TrialResult:
        settings = {"learning_rate": rate, "hidden": (4,) if number % 2 else (8, 8)}
        return TrialResult(
            number, "pruned" if score is None else "complete", settings, score, **more
        )

    shown = (
        trial(0, 0.01, 1.0, interval=(0.5, 1.5)),
        trial(1, 0.1, 3.0, interval=(2.0, 4.0)),
        trial(2, 0.3, None),
        trial(3, 0.2, 2.0),
    )
    plan = small(trials=1).plan
    plan = dataclasses.replace(
        plan, search={"learning_rate": "0.001:1.0:log", "hidden": "4,8x8"}, trials=4
    )
    figure = sweep_figure(SweepResult(plan, Path("sweep"), shown))
    by_trial, by_rate, by_width = figure.axes[:3]
    steps = next(line for line in by_trial.lines if line.get_label() == "best so far")
    assert [list(data) for data in steps.get_data()] == [[0, 1, 3], [1.0, 3.0, 3.0]]
    for axes, places in ((by_trial, [0, 1, 3]), (by_rate, [0.01, 0.1, 0.2]), (by_width, [1, 0, 0])):
        points = [line for line in axes.lines if line.get_marker() == "o"]
        assert [float(line.get_xdata()[0]) for line in points] == places
        assert [float(line.get_ydata()[0]) for line in points] == [1.0, 3.0, 2.0]
        sizes = [line.get_markersize() for line in points]
        assert sizes.index(max(sizes)) == 1  # the best one
        assert len([line for line in axes.lines if line.get_marker() == "x"]) == 1
    assert by_rate.get_xscale() == "log"
    assert [label.get_text() for label in by_width.get_xticklabels()] == ["4", "8x8"]
    heights = [
        segment[:, 1].tolist() for bar in by_rate.collections for segment in bar.get_segments()
    ]
    assert heights == [[0.5, 1.5], [2.0, 4.0]]


# ------------------------------------------------------------------ several at once


@pytest.mark.slow
@pytest.mark.usefixtures("_quick_pictures")
def test_several_processes_find_the_same(tmp_path: Path, capsys: Capture) -> None:
    begin = ["sweep", "bandit.py", "policy-gradient", *QUICK, "--trials", "4", "--no-prune"]
    main([*begin, "--out", "one", "--json"])
    main([*begin, "--out", "two", "--json", "--workers", "2"])
    assert bytes_of(Path("two")) == bytes_of(Path("one"))
    assert states(Path("two")) == states(Path("one"))


@pytest.mark.slow
def test_workers_that_are_killed_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "bandit.py").write_text(FAILING.format("os.kill(os.getpid(), signal.SIGKILL)"))
    whole = small("whole", trials=4, prune=False)
    Path("ill").touch()

    result = small(trials=4, prune=False, workers=2)
    dead = [trial for trial in result.trials if trial.state == "failed"]
    assert dead
    assert all(trial.why == "2 processes died at it, the last by SIGKILL" for trial in dead)
    alive = [trial.number for trial in result.trials if trial.state == "complete"]
    assert alive
    for number in alive:
        assert result.trials[number] == whole.trials[number]


@pytest.mark.slow
@pytest.mark.usefixtures("_quick_pictures")
def test_ray_finds_the_same(capfd: Capture) -> None:
    pytest.importorskip("ray")
    begin = ["sweep", "bandit.py", "policy-gradient", *QUICK, "--trials", "4", "--no-prune"]
    main([*begin, "--out", "one", "--json"])
    capfd.readouterr()
    main([*begin, "--out", "two", "--json", "--workers", "ray", "--num-workers", "2"])
    assert capfd.readouterr().err == ""
    assert bytes_of(Path("two")) == bytes_of(Path("one"))


# ------------------------------------------------------------------ what is given


class Mine(EnvironmentModel):
    state_space, action_space, discount, horizon = Discrete(1), Discrete(2), 1.0, 1

    def initial_state(self) -> Any:
        return dist.Categorical(torch.ones(1))

    def transition(self, state: Any, action: Any) -> Any:
        return dist.Categorical(torch.ones(*action.shape, 1))

    def reward(self, state: Any, action: Any, next_state: Any) -> Any:
        return action.double()


def test_a_model_made_in_python_is_swept_here_and_gone_on_with_here() -> None:
    part = small(model=Mine(), trials=1)
    assert part.summary()["command"] is None
    with pytest.raises(ValueError, match=r"begun with a model made in Python.* go on .* by sweep"):
        resume("sweep")
    with pytest.raises(ValueError, match="workers: expected 1 with a model made in Python"):
        small(model=Mine(), workers=2)
    whole = small(model=Mine(), trials=2)
    assert [trial.state for trial in whole.trials] == ["complete"] * 2
    assert whole.trials[0] == part.trials[0]
    with pytest.raises(ValueError, match="is of a run whose seeds is 1, and this one's is 2"):
        small(model=Mine(), seeds=2)


def test_a_target_that_has_changed_is_refused(tmp_path: Path) -> None:
    small()
    (tmp_path / "bandit.py").write_text(BANDIT + "\n# changed\n")
    with pytest.raises(ValueError, match=r"sweep.json is of a run whose sha256.target_file is"):
        resume("sweep", trials=3)


def test_a_storage_of_ones_own_holds_several_sweeps(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/all.db"
    first, second = small("first", storage=url), small("second", storage=url, seed=1)
    assert sorted(s.study_name for s in optuna.get_all_study_summaries(url)) == ["first", "second"]
    assert first.trials[0].settings != second.trials[0].settings
    assert resume("first").trials == first.trials
    with pytest.raises(ValueError, match="holds a study called 'first' already; choose another"):
        small("elsewhere/first", storage=url)


def test_a_relative_database_is_found_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = small(trials=1, storage="sqlite:///own.db")
    assert result.plan.storage == f"sqlite:///{tmp_path}/own.db"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resume(tmp_path / "sweep").trials == result.trials
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("storage", [None, "sqlite:///own.db"])
def test_a_sweep_whose_study_is_gone_is_refused(storage: str | None) -> None:
    small(trials=1, storage=storage)
    database = Path("own.db" if storage else "sweep/trials.db")
    content = database.read_bytes()
    database.unlink()
    said = "storage: expected the study 'sweep', of which trials were run, in .*; put the database"
    for again in (lambda: resume("sweep"), lambda: small(trials=1, storage=storage)):
        with pytest.raises(ValueError, match=said):
            again()
    assert not database.exists()
    open_study(f"sqlite:///{database}", "another", seed=0, prune=True)
    with pytest.raises(ValueError, match=said):
        resume("sweep")
    database.write_bytes(content)
    assert len(resume("sweep").trials) == 1


def test_a_sweep_that_was_killed_before_there_was_a_study_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Killed(BaseException):
        pass

    def killed(task: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trials.Task, "open_study", killed)
        with pytest.raises(Killed):
            small(trials=1)
    assert [trial.state for trial in resume("sweep").trials] == ["complete"]


def test_a_run_of_other_settings_is_none_of_a_trial() -> None:
    small(trials=1)
    first, second = (trials.run_directory(Path("sweep"), number, 0) for number in (0, 1))
    shutil.copytree(first, second)
    _, refused = resume("sweep", trials=2).trials
    assert refused.state == "failed"
    assert re.search(r"0001/seed-0/run.json is of a run whose settings\.\S+ is", str(refused.why))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trials", "0"], "trials: expected at least 1, got 0"),
        (["--seeds", "0"], "seeds: expected at least 1, got 0"),
        (["--episodes", "0"], "episodes: expected at least 1, got 0"),
        (["--seed", "-1"], "seed: expected 0 or more, got -1"),
        (["--workers", "0"], "workers: expected at least 1, got 0"),
        (
            ["--workers", "2", "--num-workers", "2"],
            "--num-workers and --ray-address go with --workers",
        ),
        (["--workers", "ray"], "--workers ray: say how many, by --num-workers N"),
        (["--search", "rate=1:2"], "policy-gradient has no setting rate"),
        (["--storage", "nothing"], "storage: expected a database that Optuna can open, .* nothing"),
        (["--storage", "mysql://u:p@h/d"], "storage: expected a database that Optuna can open"),
        (["--storage", "sqlite:////no/where/x.db"], "storage: expected a database that Optuna can"),
        (["--out", "bandit.py"], "bandit.py is a file; choose another directory with --out"),
        (["--out", "run"], "run holds a run; choose another directory with --out"),
    ],
)
def test_what_is_given_wrong_is_one_sentence(words: list[str], said: str, capsys: Capture) -> None:
    Path("run").mkdir()
    (Path("run") / "setup.json").touch()
    begin = ["sweep", "bandit.py", "policy-gradient", *OPTIONS, "--out", "new"]
    told = refusal(capsys, *begin, *words)
    assert re.search(said, told), told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chain", "exact"], "exact has nothing to search: its answer is exact"),
        (["chain"], "no routine: expected inference-rl sweep chain ROUTINE"),
        (["chain", "sacc"], r"unknown routine 'sacc': .*sweep chain ROUTINE.*did you mean 'sac'"),
        (["sac"], "no target: expected inference-rl sweep TARGET sac"),
        (["--resume", "nowhere"], "no sweep in nowhere: expected the file sweep.json there"),
        (["--resume", "a", "--seeds", "2"], "expected inference-rl sweep --resume DIR"),
    ],
)
def test_what_is_typed_wrong_is_one_sentence(words: list[str], said: str, capsys: Capture) -> None:
    told = refusal(capsys, "sweep", *words)
    assert re.search(said, told), told


def test_a_damaged_sweep_is_named() -> None:
    small(trials=1)
    path = Path("sweep") / plans.PLAN
    text = path.read_text()
    deep = "[" * 10**5
    odd = text.replace('"origin": {', '"origin": {"unheard": "of",')
    for changed in (
        text[:-9],
        text.replace('"policy-gradient"', '"unheard-of"'),
        "[]",
        "{}",
        deep,
        odd,
    ):
        path.write_text(changed)
        with pytest.raises(
            ValueError, match=r"sweep.json is damaged \(.*\); sweep again, into a new one"
        ):
            resume("sweep")
    now = f'"format_version": {runs.FORMAT_VERSION}'
    path.write_text(text.replace(now, '"format_version": 99', 1))
    with pytest.raises(ValueError, match="has format version 99, and this version reads"):
        resume("sweep")
    path.write_text(text)
    (Path("sweep") / plans.DATABASE).write_bytes(b"no database at all" * 100)
    with pytest.raises(ValueError, match="storage: expected a database that Optuna can open"):
        resume("sweep")


def test_without_optuna_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package optuna.* pip install 'inference-rl\["):
        small()
    assert not Path("sweep").exists()


def test_options_that_are_given_are_not_searched(capsys: Capture) -> None:
    words = ["--learning-rate=0.003", "--max-gradient-norm", "None", "--trials", "1"]
    begin = ["sweep", "bandit.py", "policy-gradient", *OPTIONS, *words, "--seeds", "1"]
    main([*begin, "--episodes", "2", "--out", "given", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert list(report["search"]) == ["temperature", "trace_decay", "value_learning_rate"]
    assert report["settings"]["learning_rate"] == 0.003  # the default, and yet given
    assert report["settings"]["max_gradient_norm"] is None
    assert "--max-gradient-norm None" in report["command"]


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom inference_rl.cli import main\n"
        "try:\n    main(['sweep', '--help'])\nexcept SystemExit: pass\n"
        "print({'torch', 'optuna', 'ray', 'matplotlib'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("set()\n")
    assert "--search" in ran.stdout


def test_the_list_says_what_is_swept(capsys: Capture) -> None:
    main(["list", "--json"])
    routines = json.loads(capsys.readouterr().out)["routines"]
    assert routines["exact"]["searches"] == {}
    assert routines["sac"]["searches"]["learning_rate"] == "0.0001:0.01:log"
    main(["list"])
    assert "sac: batch-size=64,128,256,512 learning-rate=0.0001:0.01:log" in capsys.readouterr().out


def test_the_database_is_sound_after_a_sweep() -> None:
    small(trials=1)
    with contextlib.closing(sqlite3.connect(Path("sweep") / plans.DATABASE)) as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
