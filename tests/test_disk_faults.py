"""Whole runs on a disk that fails: at every file operation in turn, once or from there on."""

from __future__ import annotations

import builtins
import errno
import os
import pathlib
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from inference_rl import load_target
from inference_rl.cli import main
from inference_rl.learning import checkpoints
from inference_rl.learning.collection import Collector, Segment
from inference_rl.learning.loop import Schedule, learn
from inference_rl.policies import TabularPolicy
from inference_rl.simulate import environments

SCHEDULE = Schedule(total_steps=24, evaluate_every=8, evaluation_episodes=0, save_every=8)

FAULTS = [
    (os, "open"),
    (os, "fsync"),
    (os, "replace"),
    (builtins, "open"),
    (builtins, "write"),
    (pathlib.Path, "mkdir"),
    (pathlib.Path, "unlink"),
    (shutil, "rmtree"),
]


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is what is tried here, not what survives a loss of power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Summing:
    """A learner that adds up rewards, which shows whether any step was lost or counted twice."""

    def __init__(self) -> None:
        self.policy = TabularPolicy(torch.full((10, 2), 0.5))
        self.tempering = types.SimpleNamespace(targets={})
        self.total = torch.zeros((), dtype=torch.float64)

    def collect(self, collector: Collector) -> Segment:
        return collector.collect(self.policy, 2)

    def update(self, data: Segment) -> dict[str, Any]:
        self.total = self.total * 0.9 + data.reward.sum() + data.state.sum()
        return {"entropy": 0.0, "temperature": 0.0, "total": self.total}

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"]


class Full:
    """A file on a disk that is full."""

    def __init__(self, file: Any, error: int) -> None:
        self.file, self.error = file, error

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *raised: Any) -> None:
        self.file.close()

    def write(self, content: Any) -> None:
        self.file.write(content[: len(content) // 2])
        raise OSError(self.error, os.strerror(self.error))


def run(folder: Path) -> list[dict[str, Any]]:
    model = load_target("chain")
    return learn(
        model, Summing(), Collector(environments(model, 4), 0), SCHEDULE, seed=0, run=folder
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return contents(folder)


def failing(
    original: Any, name: str, nth: int, error: int, for_ever: bool, calls: list[int]
) -> Any:
    def operation(*given: Any, **options: Any) -> Any:
        if name == "write" and not str(given[1:2] or "r").strip("(',)").startswith(("w", "a")):
            return original(*given, **options)
        calls.append(len(calls) + 1)
        if not (calls[-1] >= nth if for_ever else calls[-1] == nth):
            return original(*given, **options)
        if name == "write":
            return Full(original(*given, **options), error)
        raise OSError(error, os.strerror(error))

    return operation


@pytest.mark.parametrize(
    ("where", "name", "for_ever"),
    [(*fault, False) for fault in FAULTS] + [(*fault, True) for fault in FAULTS[2:4]],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_fault_at_any_file_operation_of_a_run_loses_nothing(
    where: Any,
    name: str,
    for_ever: bool,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attribute = "open" if name == "write" else name
    original = getattr(where, attribute)
    for nth in range(1, 1000):
        folder, calls = tmp_path / str(nth), list[int]()
        folder.mkdir()
        with monkeypatch.context() as patch:
            error = errno.EROFS if for_ever else errno.ENOSPC
            broken = failing(original, name, nth, error, for_ever, calls)
            patch.setattr(where, attribute, broken)
            stopped = None
            try:
                run(folder)
            except OSError as fault:
                stopped = fault.errno
        assert stopped in (None, error)
        if checkpoints.exist(folder):
            checkpoints.load(folder)  # warns, which is an error here, if it is damaged
        run(folder)
        assert contents(folder) == whole
        if stopped is None and len(calls) < nth:
            assert nth > 1
            return
    pytest.fail("more file operations than were tried")


@pytest.fixture
def learning(tmp_path: Path) -> tuple[Path, list[str]]:
    out = tmp_path / "run"
    words = ["--total-steps", "400", "--environments", "4", "--steps-per-round", "10"]
    words += ["--save-every", "100", "--evaluation-episodes", "0", "--episodes", "0"]
    return out, ["infer", "chain", "policy-gradient", *words, "--out", str(out)]


def test_a_full_disk_says_how_to_go_on(
    learning: tuple[Path, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (out, words), fsync, calls = learning, os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SystemExit) as stop:
            main(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: [Errno 28] No space left on device; go on with: inference-rl infer --resume "
        f"{out}\n"
    )
    assert checkpoints.load(out)[0] > 0
