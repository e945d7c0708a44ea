"""`Exact` in blocks on Ray: actors that answer, that are killed, and nodes that go."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from local_crew import LocalCrew

from inference_rl import Exact, FiniteModel, Workers, infer, load_target
from inference_rl.inference import InferenceResult
from inference_rl.inference.exact_sharded import run_in_blocks
from inference_rl.learning.patience import Limit
from inference_rl.scale_out import sharded_control
from inference_rl.scale_out.crew import BlocksLost, Recipe
from inference_rl.scale_out.on_ray import connected
from inference_rl.scale_out.shard import kind_of_machine
from inference_rl.scale_out.sharded_on_ray import RayCrew
from inference_rl.scale_out.workers import WorkersLost

ray = pytest.importorskip("ray")

CORRIDOR = """
import torch, pyro.distributions as dist
from gymnasium.spaces import Discrete
from inference_rl import EnvironmentModel

class Corridor(EnvironmentModel):
    state_space, action_space, discount = Discrete(50), Discrete(2), 0.95
    def initial_state(self):
        return dist.Categorical(torch.eye(50)[0])
    def transition(self, state, action):
        ahead = (state + 2 * action - 1).clamp(0, 49)
        slip = torch.nn.functional.one_hot(state, 50) * 0.1
        return dist.Categorical(slip + torch.nn.functional.one_hot(ahead, 50) * 0.9)
    def reward(self, state, action, next_state):
        return (next_state == 49).double()
    def terminal(self, state):
        return state == 49
"""


@pytest.fixture
def lake() -> FiniteModel:
    model = load_target("FrozenLake8x8-v1", discount=0.999)
    assert isinstance(model, FiniteModel)
    return model


def rays_processes() -> list[str]:
    """Command lines of Ray's processes that this one started, or that its own started."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True)
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    ours, found = {str(os.getpid())}, []
    for pid, parent, *words in sorted(rows, key=lambda row: int(row[0])):
        if parent in ours:
            ours.add(pid)
            if words and ("raylet" in words[0] or "gcs_server" in words[0] or "ray::" in words[0]):
                found.append(words[0])
    return found


def assert_bits(one: InferenceResult, other: InferenceResult) -> None:
    assert torch.equal(one.v, other.v)
    assert torch.equal(one.q, other.q)
    assert torch.equal(one.policy.probs, other.policy.probs)
    assert one.parts == other.parts


def in_blocks(
    model: Any, crew_of: Callable[[Recipe, int], Any], count: int, temperature: float = 0.1
) -> InferenceResult:
    routine = Exact(temperature=temperature)
    return run_in_blocks(
        routine, model, prior=None, seed=0, progress=None, count=count, crew_of=crew_of
    )


def test_two_workers(lake: FiniteModel, capfd: pytest.CaptureFixture[str]) -> None:
    result = infer(lake, Exact(temperature=0.1), workers=Workers(2, on="ray"))
    whole = infer(lake, Exact(temperature=0.1))
    torch.testing.assert_close(result.v, whole.v, rtol=0, atol=1e-10)
    torch.testing.assert_close(result.policy.probs, whole.policy.probs, rtol=0, atol=1e-10)
    assert_bits(result, in_blocks(lake, LocalCrew, 2))
    assert result.details.workers == 2
    assert not ray.is_initialized()
    assert rays_processes() == []
    assert capfd.readouterr() == ("", "")


def test_where_no_cluster_is() -> None:
    with (
        pytest.raises(ValueError, match="expected the address of a Ray cluster, got '127"),
        connected("127.0.0.1:1", 1),
    ):
        pass


class Actor:
    """Answers questions as `answers` says: "here", with its number; "dead"; or with nothing."""

    def __init__(self, number: int, answers: str) -> None:
        self.number, self.answers, self.asked = number, answers, 0
        self.ask = self

    def options(self, concurrency_group: str) -> Actor:
        assert concurrency_group == "watch"
        return self

    def remote(self, method: str) -> Answer:
        assert method == "number"
        self.asked += 1
        return Answer(0, self.number, self.answers)


@dataclasses.dataclass(eq=False)
class Answer:
    """Is there after so many looks, if it ever is."""

    looks: float
    value: object
    kind: str = "here"


class Clock:
    """Stands in for Ray: only looks take time."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.seconds = 0.0

    def wait(
        self, answers: list[Answer], *, num_returns: int = 1, timeout: float
    ) -> tuple[list[Answer], list[Answer]]:
        there = [a for a in answers if a.kind != "silent" and a.looks <= 0]
        if len(there) < num_returns:
            self.seconds += timeout
            for answer in answers:
                answer.looks -= timeout > 0
        return there, [a for a in answers if a not in there]

    def get(self, answer: Any) -> Any:
        if isinstance(answer, list):
            return [self.get(a) for a in answer]
        assert answer.looks <= 0
        if answer.kind == "dead":
            raise self.exceptions.ActorDiedError
        return answer.value


def watched(*answers: str) -> tuple[RayCrew, Clock]:
    crew, clock = RayCrew(lambda number: lambda: None, len(answers)), Clock()  # type: ignore[arg-type, return-value]
    crew._ray, crew.actors = clock, [Actor(n, kind) for n, kind in enumerate(answers)]
    return crew, clock


def test_whoever_says_nothing_for_long_is_lost_and_nobody_else() -> None:
    crew, clock = watched("here", "silent", "here")
    with pytest.raises(BlocksLost, match="nothing was heard of it for 180 s") as lost:
        crew._answers([Answer(1000, "late"), Answer(0, "early")])
    assert lost.value.numbers == (1,)
    assert 180 < clock.seconds < 190


def test_whoever_lives_may_take_as_long_as_it_will() -> None:
    crew, clock = watched("here", "here")
    answers = [Answer(5000, "late"), Answer(3, "early")]
    assert crew._answers(answers) == ["late", "early"]
    assert clock.seconds == 5000
    assert crew.actors[0].asked > 4000


def test_who_is_dead_is_found_out_at_once_and_who_is_silent_in_three_minutes() -> None:
    crew, clock = watched("here", "dead", "here")
    with pytest.raises(BlocksLost, match="ActorDiedError") as lost:
        crew._answers([Answer(5000, "late"), Answer(2, None, "dead")])
    assert lost.value.numbers == (1,)
    assert clock.seconds < 5
    crew, clock = watched("silent", "dead", "silent", "here", "silent")
    assert crew._dead() == [0, 1, 2, 4]
    assert clock.seconds == 180


# ------------------------------------------------------------------ minutes


class FatalCrew(RayCrew):
    """Does something to its actors at some exchanges."""

    def __init__(self, recipe: Recipe, count: int, fatal: dict[int, Callable[[Any], None]]) -> None:
        super().__init__(recipe, count)
        self._fatal, self._exchanges = fatal, 0

    def exchange(self, send: str, arguments: Sequence[tuple[Any, ...]], receive: str) -> list[Any]:
        self._exchanges += 1
        happens = self._fatal.get(self._exchanges)
        if happens is not None:
            happens(self)
        return super().exchange(send, arguments, receive)


def kill_actor(number: int) -> Callable[[Any], None]:
    return lambda crew: ray.kill(crew.actors[number])


def kill_process(number: int) -> Callable[[Any], None]:
    def kill(crew: Any) -> None:
        pid = ray.get(crew.actors[number].__ray_call__.remote(lambda _: os.getpid()))
        os.kill(pid, signal.SIGKILL)

    return kill


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_four_workers_that_are_killed(lake: FiniteModel, temperature: float) -> None:
    undisturbed = in_blocks(lake, LocalCrew, 4, temperature)
    fatal = {2: kill_actor(3), 30: kill_process(0), 31: kill_actor(0), 60: kill_process(2)}
    with connected(None, 4):
        quiet = in_blocks(lake, RayCrew, 4, temperature)
        began = time.monotonic()
        with pytest.warns(UserWarning, match=r"lost and made again: \d"):
            hurt = in_blocks(lake, lambda r, n: FatalCrew(r, n, fatal), 4, temperature)
        assert time.monotonic() - began < 240
    assert quiet.details.recoveries == 0
    assert hurt.details.recoveries == 4
    assert_bits(quiet, undisturbed)
    assert_bits(hurt, undisturbed)
    assert rays_processes() == []


def stop_process(number: int) -> Callable[[Any], None]:
    def stop(crew: Any) -> None:
        pid = ray.get(crew.actors[number].__ray_call__.remote(lambda _: os.getpid()))
        os.kill(pid, signal.SIGSTOP)

    return stop


@pytest.mark.slow
def test_a_worker_of_which_nothing_is_heard(
    lake: FiniteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference_rl.scale_out.sharded_on_ray.SILENCE", 10.0)
    fatal = {10: stop_process(1)}
    with connected(None, 2):
        began = time.monotonic()
        with pytest.warns(UserWarning, match="made again: 1 .nothing was heard of it for 10 s"):
            hurt = in_blocks(lake, lambda r, n: FatalCrew(r, n, fatal), 2)
        assert time.monotonic() - began < 120
    assert hurt.details.recoveries == 1
    assert_bits(hurt, in_blocks(lake, LocalCrew, 2))
    assert rays_processes() == []


def slow_corridor(seconds: float) -> str:
    """The corridor, which takes that long to say where it ends."""
    before, after = CORRIDOR.split("        return state == 49\n")
    return (
        f"import time\n{before}        time.sleep({seconds})\n        return state == 49\n{after}"
    )


@pytest.mark.slow
def test_a_model_may_take_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_rl.scale_out.sharded_on_ray.SILENCE", 3.0)
    (tmp_path / "slow.py").write_text(slow_corridor(8.0))
    model = load_target(str(tmp_path / "slow.py"))
    with connected(None, 2):
        result = in_blocks(model, RayCrew, 2)
    assert result.details.recoveries == 0


@pytest.mark.slow
def test_a_machine_of_another_kind_is_refused(
    lake: FiniteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = kind_of_machine() | {"torch": "1.0"}
    monkeypatch.setattr("inference_rl.scale_out.sharded_on_ray.kind_of_machine", lambda: other)
    with pytest.raises(ValueError, match=r"expected torch 1\.0, as in the process that asks, got"):
        infer(lake, Exact(temperature=0.1), workers=Workers(2, on="ray"))


@pytest.mark.slow
def test_nothing_is_left_of_a_command_that_is_killed(tmp_path: Path) -> None:
    shared = set(Path("/dev/shm").iterdir())
    (tmp_path / "slow.py").write_text(slow_corridor(90.0))
    main = "from inference_rl.cli import main; main()"
    words = ["infer", "slow.py", "exact", "--workers", "ray", "--num-workers", "2"]
    command = subprocess.Popen([sys.executable, "-c", main, *words], cwd=tmp_path)
    until = time.monotonic() + 120
    started: list[psutil.Process] = []
    while sum("ray::_Actor" in name_of(process) for process in started) < 2:
        assert time.monotonic() < until
        time.sleep(0.2)
        started = psutil.Process(command.pid).children(recursive=True)
    command.kill()
    command.wait()
    _, alive = psutil.wait_procs(started, timeout=240)
    assert not alive, [child.cmdline() for child in alive]
    assert set(Path("/dev/shm").iterdir()) <= shared


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.mark.slow
def test_workers_that_die_again_and_again(
    lake: FiniteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded_control, "MOST_RECOVERIES", 2)
    fatal = {n: kill_actor(n % 2) for n in range(3, 1000)}
    with (
        connected(None, 4),
        pytest.warns(UserWarning, match="lost and made again"),
        pytest.raises(WorkersLost, match="at most 2 to be lost in one run, got 3"),
    ):
        in_blocks(lake, lambda r, n: FatalCrew(r, n, fatal), 2)
    assert rays_processes() == []


@pytest.fixture
def nodes() -> Iterator[tuple[Any, list[Any]]]:
    """A cluster of a head, on which nothing runs, and two nodes more."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    others = [cluster.add_node(num_cpus=2) for _ in range(2)]
    yield cluster, others
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_a_node_that_goes_in_the_middle(lake: FiniteModel, nodes: tuple[Any, list[Any]]) -> None:
    cluster, others = nodes
    undisturbed = in_blocks(lake, LocalCrew, 4)
    fatal = {25: lambda _: cluster.remove_node(others[0], allow_graceful=False)}
    with connected(cluster.address, 4):
        began = time.monotonic()
        with pytest.warns(UserWarning, match="lost and made again"):
            hurt = in_blocks(lake, lambda r, n: FatalCrew(r, n, fatal), 4)
        assert time.monotonic() - began < 300
    # How Ray spreads blocks is its own business, and it may place one on a node that is going.
    assert hurt.details.recoveries >= 1
    assert_bits(hurt, undisturbed)


@pytest.mark.slow
def test_a_large_answer_comes_from_another_node(
    nodes: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference_rl.scale_out.sharded_on_ray.TICK", 0.05)
    cluster, _ = nodes

    class Large:
        """A block whose answer takes longer to come than a look does."""

        def large(self) -> np.ndarray:
            return np.arange(5e7)

    with connected(cluster.address, 2), Limit(60.0).kept() as limit:
        crew = RayCrew(lambda number: Large, 2)  # type: ignore[arg-type, return-value]
        crew.replace([0, 1])
        with limit.on(lambda: 0):
            answers = crew.ask("large", [(), ()])
        assert [answer[-1] for answer in answers] == [5e7 - 1] * 2
        crew.close()


@pytest.mark.slow
def test_no_room_for_a_worker(
    lake: FiniteModel, nodes: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference_rl.scale_out.sharded_on_ray.STARTING", 20.0)
    cluster, others = nodes
    with connected(cluster.address, 2):
        for node in others:
            cluster.remove_node(node)
        with pytest.raises(WorkersLost, match="expected 2 actors to start within 20 s, got 0"):
            in_blocks(lake, RayCrew, 2)


@pytest.mark.slow
def test_a_model_file_from_the_command(tmp_path: Path) -> None:
    (tmp_path / "corridor.py").write_text(CORRIDOR)
    main = "from inference_rl.cli import main; main()"
    command = [sys.executable, "-c", main, "infer", "corridor.py", "exact"]
    command += ["--temperature", "0.5", "--json"]
    reports = []
    for options in ([], ["--workers", "ray", "--num-workers", "4"]):
        done = subprocess.run(
            [*command, *options, "--out", f"run{len(options)}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert "ray" not in done.stderr.lower(), done.stderr
        reports.append(json.loads(done.stdout))
    for name in ("objective", "expected_return", "entropy", "divergence"):
        assert reports[1][name] == pytest.approx(reports[0][name], rel=1e-10)


@pytest.mark.slow
def test_what_the_models_own_code_raises_comes_back_as_it_was(tmp_path: Path) -> None:
    faulty = CORRIDOR.replace("state == 49\n", "state.float()\n")
    (tmp_path / "faulty.py").write_text(faulty)
    model = load_target(str(tmp_path / "faulty.py"))
    with pytest.raises(ValueError, match=r"Corridor.terminal: expected dtype torch.bool, got"):
        infer(model, Exact(), workers=Workers(2, on="ray"))
