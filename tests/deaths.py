"""Runs that die at every one of their file operations, or reach the largest file they may write.

`python tests/deaths.py saving|summing|learning FOLDER`: each child of this process is struck
elsewhere; a run that goes on where it left off must end with the bytes of one that was not. Prints
how many were struck in either way.
"""

from __future__ import annotations

import builtins
import errno
import os
import resource
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import summing
import torch

from inference_rl import PolicyGradient, infer, load_target
from inference_rl.learning import checkpoints

OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir"}
STRUCK, FULL = 9, 7


def saving(folder: Path) -> None:
    """Three checkpoints, of which two are kept."""
    last = checkpoints.load(folder)[0] if checkpoints.exist(folder) else 0
    for steps in range(last + 1, 4):
        checkpoints.save(folder, steps, {"steps": steps, "tensor": torch.arange(40.0)})
    checkpoints.keep(folder, 2)


def learning(folder: Path) -> None:
    """A whole run of a routine, which is saved at its end."""
    settings = PolicyGradient(
        total_steps=80, environments=2, steps_per_round=10, save_every=40, evaluation_episodes=0
    )
    if not (folder / "run.json").exists():
        infer(load_target("chain"), settings, directory=folder).save(folder)
    (folder / "timing.json").unlink(missing_ok=True)


JOBS: dict[str, Callable[[Path], Any]] = {
    "saving": saving,
    "summing": summing.run,
    "learning": learning,
}


class Torn:
    """A file, in the middle of whose writes one may die."""

    def __init__(self, file: Any, is_due: Callable[[], bool]) -> None:
        self._file, self._is_due = file, is_due

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, content: Any) -> None:
        if self._is_due():
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            os._exit(STRUCK)
        self._file.write(content)


def die_at(nth: int, folder: Path) -> None:
    """Let this process die right before its nth file operation, or in the middle of it."""
    count = 0

    def is_due() -> bool:
        nonlocal count
        count += 1
        return count == nth

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event not in OPERATIONS:
            return
        path = os.fspath(given[0]) if isinstance(given[0], str | Path) else ""
        if event == "open" and os.path.isabs(path) and not path.startswith(str(folder)):
            return  # a module, or what the kernel says
        if is_due():
            os._exit(STRUCK)

    def fsync(handle: int) -> None:
        if is_due():
            os._exit(STRUCK)

    original = builtins.open

    def opened(file: Any, mode: str = "r", *given: Any, **options: Any) -> Any:
        found = original(file, mode, *given, **options)
        return Torn(found, is_due) if mode[0] in "wa" else found

    os.fsync, builtins.open = fsync, opened  # type: ignore[assignment]
    sys.addaudithook(hook)


def write_at_most(size: int, folder: Path) -> None:
    """Let writing end in the middle, by the kernel, where a file would become larger than `size`
    bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def child(strike: Callable[[int, Path], None], number: int, job: Any, folder: Path) -> int:
    """The exit code of a process that was struck."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        strike(number, folder)
        job(folder)
        code = 0
    except OSError as error:
        code = FULL if error.errno == errno.EFBIG else 1
    finally:
        if code == 1:
            traceback.print_exc()
        os._exit(code)


def strikes(how: str, job: Callable[[Path], Any], base: Path) -> int:
    """Strike until a run gets through; how often that was not so."""
    base.mkdir()
    whole = base / "whole"
    whole.mkdir()
    job(whole)
    expected = summing.contents(whole)
    largest = max(map(len, expected.values()))
    strike = {"operations": die_at, "sizes": write_at_most}[how]
    numbers = range(1, 10_000) if how == "operations" else range(0, 2 * largest, largest // 60)
    for struck, number in enumerate(numbers):
        folder = base / str(number)
        folder.mkdir()
        code = child(strike, number, job, folder)
        assert code in (0, STRUCK, FULL), f"{how} {number}: exit code {code}"
        if checkpoints.exist(folder):
            checkpoints.load(folder)
        job(folder)
        assert summing.contents(folder) == expected, f"{how} {number}"
        if code == 0:
            return struck
    raise AssertionError(f"{how}: there is more than was tried")


if __name__ == "__main__":
    warnings.simplefilter("error")  # a checkpoint that is damaged is warned of
    os.fsync = lambda handle: None  # type: ignore[assignment]
    what, base = JOBS[sys.argv[1]], Path(sys.argv[2])
    print(*(strikes(how, what, base / how) for how in ("operations", "sizes")))
