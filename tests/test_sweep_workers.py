"""Many calls at once: what comes of each, of processes that die, and that none is left over."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inference_rl.scale_out.workers import WorkersLost
from inference_rl.sweeping.workers import Outcome, here, in_processes, on_ray


def taken(*calls: tuple[Any, ...]) -> Any:
    left = list(calls)
    return lambda: left.pop(0) if left else None


def pids(marker: str) -> set[int]:
    """Of processes on whose command line `marker` stands."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if marker.encode() in (path / "cmdline").read_bytes() and path.name != str(os.getpid()):
                found.add(int(path.name))
    return found


def gone(marker: str, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while pids(marker) and time.monotonic() < until:
        time.sleep(0.05)
    return not pids(marker)


def test_calls_in_this_process() -> None:
    outcomes = list(here(lambda a, b: a + b, taken((1, 2), (3, 4))))
    assert outcomes == [((1, 2), Outcome(value=3)), ((3, 4), Outcome(value=7))]


def test_calls_in_processes() -> None:
    calls = [(float(i),) for i in range(5)]
    outcomes = dict(in_processes("math:sqrt", taken(*calls, (-1.0,)), 2))
    assert [outcomes[call] for call in calls] == [Outcome(value=c[0] ** 0.5) for c in calls]
    assert outcomes[(-1.0,)].raised.startswith("ValueError: ")
    assert gone("math:sqrt")


def test_a_process_that_dies_is_replaced() -> None:
    marker = "signal:raise_signal"
    outcomes = dict(in_processes(marker, taken((9,), (35,), (15,), (0,)), 1))
    assert outcomes[(9,)] == Outcome(died="by SIGKILL")
    assert outcomes[(35,)] == Outcome(died="by signal 35")
    assert outcomes[(15,)] == Outcome(stopped=signal.SIGTERM)
    assert outcomes[(0,)].value is None  # in yet another process
    left = dict(in_processes("sys:exit", taken((0,)), 1))
    assert left == {(0,): Outcome(raised="SystemExit: 0")}
    assert dict(in_processes("os:_exit", taken((3,)), 1)) == {(3,): Outcome(died="with code 3")}
    assert gone(marker)


def test_what_is_printed_does_not_get_between_answers(capfd: pytest.CaptureFixture[str]) -> None:
    assert dict(in_processes("builtins:print", taken(("hello",)), 1)) == {("hello",): Outcome()}
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "hello\n")


def test_calls_that_are_given_up_are_stopped() -> None:
    pool = in_processes("time:sleep", taken((0.0,), (600.0,)), 2)
    next(pool)
    assert pids("time:sleep")
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 5
    assert gone("time:sleep")


def test_no_process_outlives_the_one_that_started_it() -> None:
    code = (
        "from inference_rl.sweeping.workers import in_processes\n"
        "calls = [(900.0,)] * 2\n"
        "list(in_processes('time:sleep', lambda: calls.pop() if calls else None, 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 60
    children: list[str] = []
    while len(children) < 2 and time.monotonic() < until:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        time.sleep(0.05)
    time.sleep(1.0)  # they are at work, or still beginning
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert len(children) == 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, "workers are left over"
        time.sleep(0.05)


@pytest.mark.slow
def test_calls_on_ray(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    calls = [(float(i),) for i in range(4)]
    outcomes = dict(on_ray("math:sqrt", taken(*calls, (-1.0,)), 2))
    assert [outcomes[call] for call in calls] == [Outcome(value=c[0] ** 0.5) for c in calls]
    assert outcomes[(-1.0,)].raised.startswith("ValueError: ")
    assert "died unexpectedly" in dict(on_ray("os:_exit", taken((3,)), 1))[(3,)].died
    assert capfd.readouterr().err == ""


@contextlib.contextmanager
def cluster(**environment: str) -> Iterator[str]:
    """The address of a cluster that another process has started."""
    code = (
        "import ray, sys\n"
        "begun = ray.init('local', num_cpus=2, include_dashboard=False)\n"
        "print(begun.address_info['gcs_address'], flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"} | environment,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate()


@pytest.mark.slow
def test_calls_on_a_ray_cluster_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    with cluster(RAY_AUTH_MODE="disabled") as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        for _ in range(2):  # it is there after the first time, too
            assert dict(on_ray("math:sqrt", taken((4.0,)), 2)) == {(4.0,): Outcome(value=2.0)}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # and not Ray's own


@pytest.mark.slow
def test_a_ray_cluster_that_asks_for_a_token() -> None:
    pytest.importorskip("ray")
    with (
        cluster(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="another" * 8) as address,
        pytest.raises(ValueError, match=r"a token, have it in .* RAY_AUTH_MODE=token"),
    ):
        list(on_ray("math:sqrt", taken((4.0,)), 2, address))


@pytest.mark.slow
def test_nodes_of_a_cluster_may_die(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls on them have died; on a cluster without any, others are not waited for."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setattr("inference_rl.sweeping.workers.STARTING", 10.0)
    ray_cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        nodes = [ray_cluster.add_node(num_cpus=1) for _ in range(2)]
        pool = on_ray("time:sleep", taken(*[(600.0,)] * 3), 2, ray_cluster.address)
        began = time.monotonic()
        for node in nodes:
            remove = threading.Timer(
                10.0, ray_cluster.remove_node, [node], {"allow_graceful": False}
            )
            remove.start()
            assert "node" in str(next(pool)[1].died)
            remove.join()
        with pytest.raises(WorkersLost, match="has had none for 10 s"):
            next(pool)
        assert time.monotonic() - began < 180
    finally:
        ray_cluster.shutdown()


def test_a_cluster_that_is_not_there_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(ValueError, match=f"127.0.0.1:{port}', where nothing answers"):
        list(on_ray("math:sqrt", taken((4.0,)), 2))
