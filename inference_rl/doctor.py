"""What `inference-rl doctor` says: what there is on this machine, and whether it works.

`surroundings` says what is installed and free; `examine` runs real things, each in seconds: exact
inference whose answer is known, a derivation, a learned run that is broken off and goes on, a
worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEEDED = ("torch", "pyro-ppl", "gymnasium", "numpy", "scipy", "arviz", "safetensors")
OPTIONAL = ("mujoco", "ray", "optuna", "minari", "tensorboard")
"""Packages that some of the extras bring."""

SHORTEST_WALK = -13.0
"""Return of the best walk along the cliff: Sutton & Barto (2018), example 6.6."""

SOFT_WALK = -29.808652272264755
"""J of the soft walk at temperature 1, reward units, from the linear equations of exp(V)."""

_QUOTAS = (
    ("cpu.max",),
    ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"),
)
"""Where control groups, of version 2 and of 1, say how much of a period they allow."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What came of a trial.

    :ivar failed: a sentence; None where all was well.
    """

    name: str
    seconds: float
    failed: str | None


def surroundings() -> dict[str, Any]:
    """Versions, threads, devices, and what is free, for JSON; bytes are whole numbers."""
    import torch

    import inference_rl
    from inference_rl.learning import memory
    from inference_rl.learning.tracing import missing_to_compile

    gpus = [
        {
            "name": torch.cuda.get_device_name(i),
            "memory": torch.cuda.get_device_properties(i).total_memory,
            "free": memory.available(f"cuda:{i}"),
        }
        for i in range(torch.cuda.device_count())
    ]
    here, temporary = Path.cwd(), Path(tempfile.gettempdir())
    return {
        "versions": {"inference_rl": inference_rl.__version__, "python": platform.python_version()}
        | {name: _version(name) for name in (*NEEDED, *OPTIONAL)},
        "machine": platform.platform(),
        "cores": cores(),
        "torch_threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "arithmetic": torch.backends.cpu.get_cpu_capability(),
        "cuda": gpus,
        "missing_to_compile": missing_to_compile() or None,
        "free_memory": memory.available(),
        "free_disk": {str(path): shutil.disk_usage(path).free for path in (here, temporary)},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cores(group: Path = Path("/sys/fs/cgroup")) -> float:
    """How many this process may use: those it is bound to, and no more than its control group
    allows, which may be a fraction.

    :param group: where that says so.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    found = float(len(allowed) if allowed else os.cpu_count() or 1)
    for files in _QUOTAS:
        with contextlib.suppress(OSError, ValueError):  # no such group, or no limit
            quota, period = " ".join((group / file).read_text() for file in files).split()
            if int(quota) > 0:
                found = min(found, int(quota) / int(period))
    return found


# ------------------------------------------------------------------ trials


def exact_answers() -> None:
    """Exact inference on the cliff gives the answers that are known."""
    from inference_rl import Exact, infer, load_target

    cliff = load_target("cliff")
    for temperature, known in ((0.0, SHORTEST_WALK), (1.0, SOFT_WALK)):
        found = infer(cliff, Exact(temperature=temperature)).objective
        if found is None or abs(float(found) - known) > 1e-9:
            raise ValueError(f"expected J = {known} at temperature {temperature:g}, got {found}")


def derivation_holds() -> None:
    """All steps of the derivation hold on a small tree."""
    from inference_rl import load_target
    from inference_rl.derivation import derive

    found = derive(load_target("tree", env_kwargs={"depth": 2}), temperature=0.5)
    if wrong := [finding.step.title for finding in found.findings if finding.verdict == "fail"]:
        raise ValueError(f"expected every step to hold, got failures of: {', '.join(wrong)}")


class _BrokenOff(Exception):
    pass


def resumes_exactly() -> None:
    """A learned run that is broken off and goes on ends with the bytes of one that was not."""
    from inference_rl import PolicyGradient, infer, load_target
    from inference_rl.runs import TIMING

    model = load_target("chain")
    settings = PolicyGradient(
        total_steps=400, environments=4, save_every=100, evaluate_every=200, evaluation_episodes=2
    )

    def broken_off(words: str) -> None:
        if words.endswith("evaluating"):
            raise _BrokenOff

    with tempfile.TemporaryDirectory(prefix="inference-rl-doctor-") as folder:
        whole, struck = Path(folder) / "whole", Path(folder) / "struck"
        infer(model, settings, directory=whole).save(whole)
        with contextlib.suppress(_BrokenOff):
            infer(model, settings, directory=struck, progress=broken_off)
        if not any((struck / "checkpoints").iterdir()):
            raise ValueError("expected a checkpoint of the run that was broken off, got none")
        infer(model, settings, directory=struck).save(struck)
        for path in sorted(whole.rglob("*")):
            name = path.relative_to(whole)
            if not path.is_file() or path.name == TIMING:
                continue
            if path.read_bytes() != (struck / name).read_bytes():
                raise ValueError(f"expected the same bytes in {name}, got others")


def worker_answers() -> None:
    """A worker process starts, and collects what this process does."""
    import torch

    from inference_rl import Workers, load_target
    from inference_rl.learning.collection import Collector
    from inference_rl.policies import TabularPolicy
    from inference_rl.scale_out.collector import divided
    from inference_rl.simulate import environments

    model = load_target("chain")
    policy = TabularPolicy(torch.full((10, 2), 0.5))
    with contextlib.closing(environments(model, 2, 50)) as batch:
        expected = Collector(batch, 0).collect(policy, 20)
    with divided(model, 0, Workers(1), size=2, limit=50) as collector:
        found = collector.collect(policy, 20)
    for name in ("state", "action", "reward"):
        if not torch.equal(getattr(expected, name), getattr(found, name)):
            raise ValueError(f"expected the same {name}s as in this process, got others")


TRIALS: dict[str, Callable[[], None]] = {
    "exact inference": exact_answers,
    "derivation": derivation_holds,
    "resuming a learned run": resumes_exactly,
    "a worker process": worker_answers,
}


def examine(progress: Callable[[str], None] | None = None) -> list[Finding]:
    """Run every trial; about ten seconds on a machine that has nothing else to do.

    :param progress: called with the name of each before it runs.
    """
    found = []
    for name, trial in TRIALS.items():
        if progress is not None:
            progress(name)
        started, failed = time.perf_counter(), None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trial()
        except Exception as error:  # of whatever is broken here
            failed = " ".join(f"{type(error).__name__}: {error}".split())
        found.append(Finding(name, time.perf_counter() - started, failed))
    return found


def report(progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """`surroundings` and what came of the trials, for JSON."""
    told, findings = surroundings(), examine(progress)
    return told | {
        "trials": [dataclasses.asdict(finding) for finding in findings],
        "failed": sum(finding.failed is not None for finding in findings),
    }


def print_report(told: dict[str, Any]) -> None:
    """It, as tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(show_header=False)
    for name, version in told["versions"].items():
        table.add_row(name, version or "not installed")
    for name, value in _rows(told).items():
        table.add_row(name, escape(value))
    console.print(table)
    trials = Table("trial", "outcome", "seconds")
    for trial in told["trials"]:
        outcome = "ok" if trial["failed"] is None else f"failed: {trial['failed']}"
        trials.add_row(trial["name"], escape(outcome), f"{trial['seconds']:.1f}")
    console.print(trials)


def _rows(told: dict[str, Any]) -> dict[str, str]:
    gpus = [f"{gpu['name']}, {_size(gpu['free'])} free" for gpu in told["cuda"]]
    missing = told["missing_to_compile"]
    return {
        "machine": told["machine"],
        "cores allowed": f"{told['cores']:g}",
        "torch threads": f"{told['torch_threads']}",
        "OMP_NUM_THREADS": told["OMP_NUM_THREADS"] or "not set",
        "arithmetic": told["arithmetic"],
        "CUDA": "; ".join(gpus) or "none",
        "compiling updates": "possible" if missing is None else f"needs {missing}",
        "free memory": _size(told["free_memory"]),
    } | {f"free disk, {path}": _size(free) for path, free in told["free_disk"].items()}


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
