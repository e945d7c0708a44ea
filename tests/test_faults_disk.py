"""Runs on a disk that fails, at every file operation in turn, once or from there on.

And runs that die at any of them, that find somebody else in their directory, or whose clock is set
back: nothing that was saved is lost.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from summing import contents, run

from inference_rl import PolicyGradient, infer, load_target, runs
from inference_rl.cli import main
from inference_rl.learning import checkpoints, loop

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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A disk of its own, which is mounted, and mounted again, by the options that are given."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        words = ["mount", "-t", "tmpfs", "-o", ("remount," if mounted else "") + options, "none"]
        try:
            subprocess.run([*words, str(place)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting is not allowed here")
        mounted = True
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(
    small_disk: Callable[[str], Path], whole: dict[str, bytes]
) -> None:
    for pages in range(3, 30):
        folder = small_disk(f"size={4 * pages}k") / "run"
        folder.mkdir()
        is_full = False
        try:
            run(folder)
        except OSError as error:
            is_full = error.errno == errno.ENOSPC
            assert is_full
        if checkpoints.exist(folder):
            checkpoints.load(folder)
        small_disk("size=1m")
        run(folder)
        assert contents(folder) == whole
        if not is_full:
            assert pages > 5
            return
        shutil.rmtree(folder)
    pytest.fail("no disk was large enough")


def test_a_disk_that_becomes_read_only(
    small_disk: Callable[[str], Path], whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_disk("size=1m") / "run"
    folder.mkdir()
    save = checkpoints.save

    def at_second(run: Path, steps: int, state: Any) -> None:
        if steps == 16:
            small_disk("ro")
        save(run, steps, state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", at_second)
        with pytest.raises(OSError, match="Read-only file system"):
            run(folder)
    with pytest.raises(OSError, match=r"cannot be written \(Read-only .*; choose another"):
        runs.directory_for(folder)
    assert checkpoints.load(folder)[0] == 8
    small_disk("rw")
    run(folder)
    assert contents(folder) == whole


@pytest.mark.parametrize(
    "what",
    [
        "saving",
        pytest.param("summing", marks=pytest.mark.slow),
        pytest.param("learning", marks=pytest.mark.slow),
    ],
)
def test_dying_at_any_file_operation_or_size_loses_nothing(what: str, tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("deaths.py"))
    command = [sys.executable, script, what, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    operations, sizes = map(int, ran.stdout.split())
    assert operations >= 60
    assert sizes >= 30


# ------------------------------------------------------------------ two in one directory


@contextlib.contextmanager
def somebody_else(folder: Path) -> Iterator[None]:
    """Another process, so far as the kernel knows, is at work in `folder`."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
    os.close(handle)


def test_two_in_one_directory(
    learning: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, words = learning
    out.mkdir()
    before = contents(out)
    said = "is in use: expected a directory that no other process works in; wait until that ends"
    settings = PolicyGradient(total_steps=40, environments=4, evaluation_episodes=0)

    def refused(words: list[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert capsys.readouterr().err == (
            f"error: {out} {said}, or choose another directory with --out\n"
        )

    with somebody_else(out):
        refused(words)
        with pytest.raises(BlockingIOError, match=said):
            infer(load_target("chain"), settings, directory=out)
        assert contents(out) == before
    infer(load_target("chain"), settings, directory=out)
    before = contents(out)
    with somebody_else(out):
        refused(words)
        refused(["infer", "--resume", str(out)])
        assert contents(out) == before


def test_who_holds_a_directory_may_hold_it_again_and_another_thread_may_not(
    tmp_path: Path,
) -> None:
    found: list[str] = []

    def other() -> None:
        try:
            with runs.held(tmp_path):
                found.append("held")
        except BlockingIOError as error:
            found.append(str(error))

    def ask() -> str:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return found.pop()

    with runs.held(tmp_path):
        with runs.held(tmp_path):
            assert "is in use" in ask()
        assert "is in use" in ask()
    assert ask() == "held"


def test_where_there_are_no_locks_nothing_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with runs.held(tmp_path):
        pass


# ------------------------------------------------------------------ clocks


@pytest.mark.parametrize("pace", [0.0, -3600.0, 3600.0])
def test_a_clock_that_stands_still_or_is_set_back(
    pace: float, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times, said, saved = itertools.count(), list[str](), list[int]()
    save = checkpoints.save

    def noted(run: Path, steps: int, state: Any) -> None:
        saved.append(steps)
        save(run, steps, state)

    def now() -> float:
        return 1e9 + pace * next(times)

    monkeypatch.setattr(checkpoints, "save", noted)
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=now))
    monkeypatch.setattr(loop, "SAY_SECONDS", -1e9)
    monkeypatch.setattr(time, "time", now)
    run(tmp_path, said.append)
    assert contents(tmp_path) == whole
    assert {8, 16, 24} <= set(saved)
    assert said
    assert not any("-" in words for words in said)
