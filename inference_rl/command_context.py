"""What surrounds a command: its progress, where it writes, and what is said when it stops."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from inference_rl import runs

PATIENCE = 2.0
"""Seconds before progress is shown."""

LOG_EVERY = 10.0
"""Seconds between lines of progress where stderr is no terminal."""


@contextlib.contextmanager
def reporting(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Say on stderr what is warned of and, unless `quiet`, what is being done, once it has taken
    `PATIENCE`."""
    from rich.console import Console

    console = Console(stderr=True)
    status = console.status("working")
    timer = threading.Timer(PATIENCE, status.start)
    timer.daemon = True
    if not quiet:
        timer.start()
    said: set[str] = set()
    spoken = time.monotonic()

    def warn(message: Warning | str, *_: Any) -> None:
        if str(message) not in said:  # inferring and evaluating may warn of the same
            said.add(str(message))
            console.print(f"warning: {message}", markup=False, highlight=False)

    def update(words: str) -> None:
        nonlocal spoken
        if quiet:
            return
        status.update(words)
        if not console.is_terminal and time.monotonic() - spoken > LOG_EVERY:
            spoken = time.monotonic()
            console.print(words, markup=False, highlight=False)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = warn  # type: ignore[assignment]
            yield update
    finally:
        timer.cancel()
        if not quiet:
            timer.join()
        status.stop()


@contextlib.contextmanager
def one_sentence(run: Path | None = None) -> Iterator[None]:
    """What stops a command is one sentence, and says how to go on with `run` if that is begun."""
    from inference_rl.inference.setup import SETUP
    from inference_rl.learning.checkpoints import exist
    from inference_rl.simulate import EnvironmentFault

    def how() -> str:
        if run is None or (run / runs.MANIFEST).exists() or not (run / SETUP).exists():
            return ""
        if not exist(run):
            return ""
        return f"; go on with: inference-rl infer --resume {shlex.quote(str(run))}"

    try:
        yield
    except (EnvironmentFault, FloatingPointError) as error:
        raise ValueError(f"{error}{how()}") from error
    except (FileNotFoundError, FileExistsError):  # which say themselves what to do
        raise
    except OSError as error:
        raise OSError(f"{error}{how()}") from error
    except KeyboardInterrupt as error:
        error.args = (f"{error}{how()}",)
        raise


@contextlib.contextmanager
def claimed(directory: Path) -> Iterator[Path]:
    """`directory`, made for a run, and nobody else's meanwhile; as it was before, if nothing was
    saved in it."""
    from inference_rl.inference.setup import SETUP
    from inference_rl.learning.checkpoints import exist
    from inference_rl.learning.loop import METRICS

    is_new = not directory.is_dir()
    path = runs.claim(directory)
    with runs.held(path):
        if (path / SETUP).exists():
            raise FileExistsError(
                f"{path} holds a run that was begun; go on with it by inference-rl infer --resume "
                f"{path}, or choose another directory with --out"
            )
        found = {entry.name for entry in path.iterdir()}
        try:
            yield path
        except BaseException:
            with contextlib.suppress(OSError):
                if not exist(path):  # what there is of checkpoints is a save that failed
                    for name in {SETUP, METRICS, "checkpoints", "tensorboard"} - found:
                        _remove(path / name)
                if is_new:
                    path.rmdir()  # which is refused if something was saved
            raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def free_directory(name: str, routine: str, seed: int) -> Path:
    base = f"{name.replace('/', '-')}-{routine}-{seed}"
    candidates = (Path("runs") / (f"{base}-{i}" if i else base) for i in range(10**6))
    return next(path for path in candidates if not path.exists())


@contextlib.contextmanager
def one_sentence_of_sweep(out: Path) -> Iterator[None]:
    """What stops a sweep is one sentence, and says how to go on with it if it is begun."""
    from inference_rl.sweeping.plan import PLAN

    begun_before = (out / PLAN).exists()
    try:
        yield
    except (KeyboardInterrupt, OSError, ValueError) as error:
        is_stop = isinstance(error, KeyboardInterrupt)
        if (is_stop or not begun_before) and (out / PLAN).exists():
            how = f"go on with: inference-rl sweep --resume {shlex.quote(str(out))}"
            error.args = (f"{error}; {how}",)
        raise


def check_page(path: Path | None) -> None:
    """Before minutes are spent on what is to be on it.

    :raises ValueError: no page can be written there. :raises OSError: likewise.
    """
    if path is None:
        return
    if os.path.isdir(path) or not os.path.isdir(path.parent):
        raise ValueError(
            f"--html: expected a file in a directory that exists, got {path}: name another, or "
            "make the directory"
        )
    is_new = not os.path.lexists(path)
    write_page(path, "", "a")
    if is_new:
        path.unlink()


def write_page(path: Path, text: str, mode: str = "w") -> None:
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OSError(
            f"--html: {path} cannot be written ({error.strerror}); name another file"
        ) from error
