"""`inference-rl doctor`: what it says is so, and what is broken is told by name."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import inference_rl
from inference_rl import cli, doctor
from inference_rl.inference import InferenceResult, policy_gradient


def soft_walk() -> float:
    """J of the soft walk along the cliff, from its map alone.

    At temperature 1, without a discount and with all moves alike in the prior, z = exp(V) solves
    z(s) = mean over moves of exp(r) z(s'), which is linear.
    """
    rows, columns = 4, 12
    start, goal = (3, 0), (3, 11)
    cells = [(i, j) for i in range(rows) for j in range(columns) if i < 3 or j in (0, 11)]
    number = {cell: at for at, cell in enumerate(cells)}
    system, known = np.eye(len(cells)), np.zeros(len(cells))
    known[number[goal]] = 1.0
    for i, j in cells:
        if (i, j) == goal:
            continue
        for down, right in ((0, -1), (1, 0), (0, 1), (-1, 0)):
            cell = min(max(i + down, 0), rows - 1), min(max(j + right, 0), columns - 1)
            falls = cell not in number
            after = start if falls else cell
            system[number[i, j], number[after]] -= math.exp(-100.0 if falls else -1.0) / 4
    return math.log(np.linalg.solve(system, known)[number[start]])


def test_the_known_answers_are_right() -> None:
    assert soft_walk() == pytest.approx(doctor.SOFT_WALK, abs=1e-10)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the trials that take a process, or seconds."""
    kept = ("exact inference", "resuming a learned run")
    monkeypatch.setattr(doctor, "TRIALS", {name: doctor.TRIALS[name] for name in kept})


def told(capsys: pytest.CaptureFixture[str]) -> dict:
    cli.main(["doctor", "--json"])
    found: dict = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.usefixtures("quick")
def test_what_it_says_is_so(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys)
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["versions"]["optuna"] == doctor._version("optuna")
    assert found["cores"] > 0
    assert found["torch_threads"] == torch.get_num_threads()
    assert len(found["cuda"]) == torch.cuda.device_count()
    assert str(Path.cwd()) in found["free_disk"]
    assert [trial["failed"] for trial in found["trials"]] == [None, None]
    assert found["failed"] == 0


@pytest.mark.usefixtures("quick")
def test_people_read_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", ("no-such-package",))
    cli.main(["doctor"])
    said = capsys.readouterr().out
    for words in ("no-such-package", "not installed", "cores allowed", "free memory", "ok"):
        assert words in said
    assert "failed" not in said


def worse(result: InferenceResult) -> InferenceResult:
    assert result.objective is not None
    return dataclasses.replace(result, objective=result.objective + 1e-6)


def test_a_wrong_answer_is_told_and_ends_with_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {"exact inference": doctor.exact_answers, "derivation": lambda: None}
    monkeypatch.setattr(doctor, "TRIALS", kept)
    infer = inference_rl.infer
    monkeypatch.setattr(inference_rl, "infer", lambda *given: worse(infer(*given)))
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "--json"])
    assert stop.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == 1
    failed = found["trials"][0]["failed"]
    assert failed.startswith("ValueError: expected J = -13.0 at temperature 0, got -12.99999")
    with pytest.raises(SystemExit):
        cli.main(["doctor"])
    assert "failed: ValueError: expected J" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_does_not_go_on_where_it_was_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    doctor.resumes_exactly()
    load = policy_gradient._Learner.load_state_dict

    def elsewhere(self: policy_gradient._Learner, state: dict) -> None:
        load(self, state)
        with torch.no_grad():
            next(self.policy.parameters()).add_(1e-3)

    monkeypatch.setattr(policy_gradient._Learner, "load_state_dict", elsewhere)
    with pytest.raises(ValueError, match=r"expected the same bytes in .*, got others"):
        doctor.resumes_exactly()


@pytest.mark.slow
def test_all_trials_are_passed_and_a_worker_of_another_kind_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert [finding.failed for finding in doctor.examine()] == [None] * 4
    monkeypatch.setattr("inference_rl.scale_out.collector.kind_of_machine", dict)
    with pytest.raises(ValueError, match="workers: expected arithmetic None"):
        doctor.worker_answers()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000"}, 8.0),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8.0),
        ({"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 2.5),
        ({"cpu.max": "900000 100000"}, 8.0),
        ({}, 8.0),
    ],
)
def test_cores_are_those_that_are_allowed(
    files: dict[str, str], expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert doctor.cores(tmp_path) == expected
