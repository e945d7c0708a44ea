"""Workers: the same run whoever collects, however many there are, and whichever are lost."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil
import pytest
import torch
from summing import SCHEDULE, Summing, contents
from test_collection import Doors, policy_for
from torch import nn

from inference_rl import EnvironmentModel, Workers, infer, load_target
from inference_rl.cli import main
from inference_rl.inference import routine_class, setup
from inference_rl.learning import checkpoints
from inference_rl.learning.collection import Collector, Segment
from inference_rl.learning.loop import learn
from inference_rl.randomness import derived
from inference_rl.scale_out import collector as collecting
from inference_rl.scale_out import workers as seen
from inference_rl.scale_out.collector import AheadCollector, DividedCollector
from inference_rl.scale_out.local import Channel, LocalWorker
from inference_rl.scale_out.shard import Shard, kind_of_machine
from inference_rl.scale_out.transport import dumped, packed, unpacked
from inference_rl.scale_out.workers import Worker, WorkerLost, WorkersLost
from inference_rl.simulate import EnvironmentFault, environments

COMMAND = Path(sys.executable).with_name("inference-rl")
SMALL = {
    "policy-gradient": {"total_steps": 600, "environments": 5, "evaluation_episodes": 2},
    "pcl": {"total_steps": 400, "environments": 5, "evaluation_episodes": 2},
    "reps": {"total_steps": 600, "environments": 5, "evaluation_episodes": 2},
    "sac": {"total_steps": 300, "environments": 5, "warmup_steps": 100, "batch_size": 16},
    "sql": {"total_steps": 300, "environments": 5, "warmup_steps": 100, "batch_size": 16},
    "soft-ddpg": {"total_steps": 300, "environments": 5, "warmup_steps": 100, "batch_size": 16},
    "soft-td3": {"total_steps": 300, "environments": 5, "warmup_steps": 100, "batch_size": 16},
}


class Inline(Worker):
    """A worker in this very process, which is lost where `loses` says so."""

    def __init__(self, name: str, loses: Callable[[], bool] = lambda: False) -> None:
        self.name, self._loses, self._shard = name, loses, Shard()

    def send(self, request: bytes, patience: float) -> None:
        if self._loses():
            raise WorkerLost(f"{self.name} was lost before it was asked")
        self._answer = self._shard.answer(request)

    def answered(self, seconds: float) -> bytes | None:
        if self._loses():
            raise WorkerLost(f"{self.name} was lost once it was asked")
        return self._answer

    def moves(self) -> int:
        return self._shard.moves

    def close(self) -> None:
        self._shard.close()
        del self._shard


def divided(model: EnvironmentModel, count: int, start=Inline, **kwargs) -> DividedCollector:
    given = {"size": 5, "limit": 60, "patience": 30.0} | kwargs
    return DividedCollector(model, 3, start, count=count, **given)


def assert_same(one: Segment, two: Segment) -> None:
    for name in Segment.__annotations__:
        left, right = getattr(one, name), getattr(two, name)
        assert left.dtype == right.dtype, name
        assert torch.equal(left, right), name


def assert_same_state(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    assert one["finished"] == two["finished"]
    for name in ("episode", "total", "state"):
        if one[name] is None:
            assert two[name] is None
        else:
            assert torch.equal(one[name], two[name]), name
    for left, right in zip(one["actions"], two["actions"], strict=True):
        assert (left is None and right is None) or torch.equal(left, right)


MODELS = [
    lambda: load_target("CartPole-v1"),
    lambda: load_target("Pendulum-v1"),
    lambda: load_target("grid-world"),
    lambda: load_target("pendulum"),
    lambda: Doors(out=2),
]
IDS = ["gymnasium, discrete", "gymnasium, box", "finite", "program, box", "ends at its start"]


@pytest.mark.parametrize("make", MODELS, ids=IDS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_what_workers_collect_is_what_one_process_collects(make, count: int) -> None:
    model = make()
    policy = policy_for(model)
    one, two = Collector(environments(model, 5, 60), 3), divided(model, count)
    for steps in (7, 61, 1):
        assert_same(one.collect(policy, steps), two.collect(policy, steps))
        assert_same_state(one.state_dict(), two.state_dict())
    one, two = Collector(environments(model, 5, 60), 3), divided(model, count)
    for _ in range(3):
        assert_same(one.collect_episodes(policy), two.collect_episodes(policy))
        assert_same_state(one.state_dict(), two.state_dict())


@pytest.mark.parametrize("make", MODELS, ids=IDS)
def test_a_run_goes_on_with_other_workers(make) -> None:
    model = make()
    policy = policy_for(model)
    one = Collector(environments(model, 5, 60), 3)
    one.collect(policy, 17)
    expected = [one.state_dict(), one.collect(policy, 30)]
    for count in (1, 3):
        two = divided(model, count)
        two.load_state_dict(expected[0])
        assert_same(expected[1], two.collect(policy, 30))
    back = Collector(environments(model, 5, 60), 3)
    back.load_state_dict(two.state_dict())
    assert_same(one.collect(policy, 9), back.collect(policy, 9))


@pytest.mark.filterwarnings("ignore:.*another takes its place")
@pytest.mark.parametrize("make", MODELS, ids=IDS)
def test_workers_lost_at_random_change_nothing(make) -> None:
    model = make()
    policy = policy_for(model)
    rng = random.Random(0)
    two = divided(model, 3, lambda name: Inline(name, lambda: rng.random() < 0.08))
    one = Collector(environments(model, 5, 60), 3)
    for _ in range(20):
        assert_same(one.collect(policy, 9), two.collect(policy, 9))
    assert two.replaced >= 3
    assert_same_state(one.state_dict(), two.state_dict())
    one, two = Collector(environments(model, 5, 60), 3), divided(model, 3, two._start)
    for _ in range(10):
        assert_same(one.collect_episodes(policy), two.collect_episodes(policy))
    assert two.replaced >= 2


def test_a_worker_that_is_lost_again_and_again_stops_the_run() -> None:
    model = load_target("CartPole-v1")
    lost = divided(model, 2, lambda name: Inline(name, lambda: True))
    with (
        pytest.warns(UserWarning, match="was lost before it was asked; another takes its place"),
        pytest.raises(WorkersLost, match=r"slots 0 to 1, whose episodes are \[0, 1\].*3 workers"),
    ):
        lost.collect(policy_for(model), 5)
    # Nothing of the round counts: another may go on from there.
    assert lost.state_dict(before=True)["episode"].tolist() == [0, 1, 2, 3, 4]


class Unseeded(gymnasium.Env[Any, Any]):
    observation_space, action_space = gymnasium.spaces.Box(0, 1, (2,)), gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.place = np.random.default_rng().uniform(size=2).astype(np.float32)
        return self.place, {}

    def step(self, action: int) -> Any:
        return self.place, 0.0, False, False, {}


def test_no_worker_replaces_one_whose_environments_ignore_their_seeds() -> None:
    gymnasium.register("Unseeded-v0", Unseeded, max_episode_steps=99)
    try:
        model = load_target("Unseeded-v0")
        lost: list[bool] = []
        two = divided(model, 2, lambda name: Inline(name, lambda: bool(lost) and lost.pop()))
        two.collect(policy_for(model), 3)
        lost.append(True)
        with (
            pytest.warns(UserWarning, match="another takes its place"),
            pytest.raises(EnvironmentFault, match="a worker replaced, went another way than"),
        ):
            two.collect(policy_for(model), 3)
    finally:
        gymnasium.registry.pop("Unseeded-v0")


def test_a_policy_that_calls_exit_in_a_worker_is_named() -> None:
    model = load_target("CartPole-v1")
    policy = policy_for(model)
    policy.register_forward_pre_hook(lambda *_: sys.exit(0))
    with pytest.raises(RuntimeError, match="SystemExit: 0"):
        divided(model, 2).collect(policy, 3)


def test_all_that_is_wrong_with_workers_is_told() -> None:
    with pytest.raises(ValueError, match="workers: expected 0 or more, got -1"):
        Workers(-1)
    with pytest.raises(ValueError, match="workers: expected at least 1, to collect on Ray or"):
        Workers(0, ahead=True)
    with pytest.raises(ValueError, match="'processes' or 'ray', got 'mars'"):
        Workers(1, on="mars")
    with pytest.raises(ValueError, match="address: expected none for processes"):
        Workers(1, address="auto")
    with pytest.raises(ValueError, match="patience: expected a positive number"):
        Workers(1, patience=0.0)
    with pytest.raises(ValueError, match="workers: expected 1 to 5, for that many environments"):
        divided(load_target("CartPole-v1"), 6)
    model = load_target("chain")
    with pytest.raises(ValueError, match="workers: expected them on Ray"):
        infer(model, routine_class("exact")(), workers=2)
    with pytest.raises(ValueError, match=r"expected ahead=False .*learns from what its own policy"):
        infer(model, routine_class("pcl")(), workers=Workers(1, ahead=True))
    held = load_target("chain")
    held.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"expected a model that can be sent .*cannot pickle"):
        divided(held, 1)


def test_a_machine_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_target("CartPole-v1")
    other = kind_of_machine() | {"torch": "1.0"}
    monkeypatch.setattr(collecting, "kind_of_machine", lambda: other)
    with pytest.raises(ValueError, match=r"expected torch 1\.0, as in the process that asks, got"):
        divided(model, 1).collect(policy_for(model), 1)


def test_a_run_and_a_worker_depend_on_the_same_packages() -> None:
    noted = setup.described(routine_class("pcl")(), load_target("chain"), None, 0)["packages"]
    assert {"inference-rl", "torch", "mujoco"} < noted.keys()
    assert noted.items() < kind_of_machine().items()


def test_tensors_arrive_as_they_were() -> None:
    kept = nn.Parameter(torch.randn(3, 2).T, requires_grad=False)
    kept.note = "of its own"  # type: ignore[attr-defined]
    sent = [
        nn.Parameter(torch.randn(7, 5)),
        nn.Parameter(torch.randn(4), requires_grad=False),
        torch.randn(2, 3, requires_grad=True),
        torch.randn(5, 6)[:, ::2],
        torch.empty(0, 3),
        torch.tensor(1.5, dtype=torch.float64),
        torch.tensor([True, False]),
        torch.randn(3).to(torch.bfloat16),
        torch.eye(3).to_sparse(),
        torch.tensor([torch.nan, -0.0, torch.inf]),
        kept,
    ]
    for arrived in (unpacked(packed(sent, "list")), pickle.loads(dumped(sent))):
        for before, after in zip(sent, arrived, strict=True):
            assert type(after) is type(before)
            assert after.requires_grad == before.requires_grad
            assert (after.dtype, after.layout) == (before.dtype, before.layout)
            torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
            if after.layout == torch.strided:
                assert after.stride() == before.stride()
                assert after.data_ptr() % 64 == 0
        assert arrived[-1].note == "of its own"
        assert torch.signbit(arrived[-2][1])


def test_policies_take_no_model_along() -> None:
    model = load_target("grid-world")
    assert unpacked(packed([model.action_prior], "policy", model=model), model=model) == [
        model.action_prior
    ]
    assert len(packed(model.action_prior, "policy", model=model)) < 200


@pytest.mark.parametrize(
    ("target", "routine", "more"),
    [
        ("CartPole-v1", "policy-gradient", {}),
        ("CartPole-v1", "policy-gradient", {"steps_per_round": 0}),
        ("CartPole-v1", "pcl", {}),
        ("CartPole-v1", "reps", {}),
        ("tree", "reps", {"kind": "episodic", "covariance": "diagonal", "total_steps": 60}),
        ("CartPole-v1", "sac", {"hidden": (8,)}),
        ("Pendulum-v1", "sac", {"hidden": (8,)}),
        ("multigoal", "sac", {"hidden": (8,)}),
    ],
)
def test_routines_learn_the_same_whoever_collects(
    target: str, routine: str, more: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "LocalWorker", Inline)
    settings = routine_class(routine)(**SMALL[routine] | {"evaluation_episodes": 0} | more)
    expected = infer(load_target(target), settings, seed=1)
    found = infer(load_target(target), settings, seed=1, workers=3)
    assert found.metrics == expected.metrics
    left, right = found.policy.state_dict(), expected.policy.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# Round by round ahead of the learner.


def test_what_is_collected_ahead_comes_of_the_policy_of_the_call_before() -> None:
    model = load_target("Pendulum-v1")
    policies = [policy_for(model) for _ in range(4)]
    for i, policy in enumerate(policies):
        with torch.no_grad():
            next(policy.parameters()).add_(i)
    single = Collector(environments(model, 5, 60), 3)
    ahead = AheadCollector(divided(model, 2))
    expected = [single.collect(policy, 40) for policy in [policies[0], *policies[:3]]]
    for policy, data in zip(policies, expected, strict=True):
        assert_same(ahead.collect(policy, 40), data)
    single.finished.clear()
    assert ahead.lag == 1


def test_collecting_ahead_goes_on_exactly_where_it_was_saved() -> None:
    model = load_target("CartPole-v1")
    policies = [policy_for(model) for _ in range(6)]
    for i, policy in enumerate(policies):
        with torch.no_grad():
            next(policy.parameters()).add_(0.1 * i)
    whole = AheadCollector(divided(model, 2))
    expected = [whole.collect(policy, 20) for policy in policies]
    before = AheadCollector(divided(model, 2))
    for policy in policies[:3]:
        before.collect(policy, 20)
    saved = pickle.loads(pickle.dumps(before.state_dict()))
    after = AheadCollector(divided(model, 3))
    after.load_state_dict(saved)
    for some in (before, after):
        for policy, data in zip(policies[3:], expected[3:], strict=True):
            assert_same(some.collect(policy, 20), data)
        assert some.finished == whole.finished
    with pytest.raises(ValueError, match="the run was begun without"):
        after.load_state_dict(divided(model, 1).state_dict())


class Faulty(Inline):
    """In the request of this number an environment fails."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(name)
        self._left = number

    def send(self, request: bytes, patience: float) -> None:
        super().send(request, patience)
        self._left -= 1
        if self._left == 0:
            self._answer = pickle.dumps(("raised", EnvironmentFault("it is broken")))


def learned_ahead(folder: Path, faulty: int) -> tuple[Summing, list[dict]]:
    """Of three rounds, each saved after the next has been begun."""
    folder.mkdir(exist_ok=True)
    learner, model = Summing(), load_target("chain")
    collector = divided(model, 1, lambda name: Faulty(name, faulty), size=4)
    ahead = AheadCollector(collector, SCHEDULE.total_steps)
    return learner, learn(model, learner, ahead, SCHEDULE, seed=0, run=folder)


def test_no_round_is_collected_ahead_that_nobody_needs(tmp_path: Path) -> None:
    whole, metrics = learned_ahead(tmp_path / "whole", 0)
    assert metrics[-1]["steps"] == 24
    assert [row["policy_lag"] for row in metrics] == [1, 1, 1]
    other, same = learned_ahead(tmp_path / "other", 4)
    assert same == metrics
    assert torch.equal(other.total, whole.total)
    assert contents(tmp_path / "other") == contents(tmp_path / "whole")


def test_what_was_learned_is_saved_though_the_round_under_way_fails(tmp_path: Path) -> None:
    whole, _ = learned_ahead(tmp_path / "whole", 0)
    for number, steps in ((1, None), (2, 8), (3, 16)):
        folder = tmp_path / str(number)
        with pytest.raises(EnvironmentFault, match="it is broken"):
            learned_ahead(folder, number)
        assert checkpoints.exist(folder) == (steps is not None)
        if steps is not None:
            assert checkpoints.load(folder)[0] == steps
        # A policy that never changes: what it begins anew comes out the same.
        found, metrics = learned_ahead(folder, 0)
        assert metrics[-1]["steps"] == 24
        assert torch.equal(found.total, whole.total)


def test_a_run_that_collects_ahead_is_resumed_as_it_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From what is there when it is killed, before its first checkpoint or after."""
    monkeypatch.setattr(collecting, "LocalWorker", Inline)
    collect, rounds = AheadCollector.collect, []

    def copying(self: AheadCollector, *given) -> Segment:
        rounds.append(1)
        if len(rounds) in (1, 45):
            shutil.copytree(tmp_path / "run", tmp_path / f"after{len(rounds)}")
        return collect(self, *given)

    words = ["infer", "Pendulum-v1", "sac", *options("sac"), "--save-every=50", "--hidden=8"]
    words += ["--episodes=0", "--json"]
    monkeypatch.setattr(AheadCollector, "collect", copying)
    main([*words, "--workers=2", "--async", f"--out={tmp_path / 'run'}"])
    monkeypatch.setattr(AheadCollector, "collect", collect)
    expected = bytes_of(tmp_path / "run")
    rows = [json.loads(line) for line in expected["metrics.jsonl"].splitlines()]
    assert [row["policy_lag"] for row in rows] == [1] * len(rows)
    assert [checkpoints.exist(tmp_path / f"after{n}") for n in (1, 45)] == [False, True]
    for name, more in [("after1", []), ("after45", []), ("after45", ["--workers=3"])]:
        run = tmp_path / f"{name}{len(more)}"
        shutil.copytree(tmp_path / name, run)
        main(["infer", "--resume", str(run), "--json", *more])
        assert bytes_of(run) == expected, (name, more)
    alone = tmp_path / "alone"
    model, settings = load_target("Pendulum-v1"), routine_class("sac")(**SMALL["sac"])
    setup.write(alone, settings, model, None, 0)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["infer", "--resume", str(alone), "--workers=2", "--async"])
    said = "workers: expected ahead=False (no --async), as the run in"
    assert said in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match=r"expected ahead=True .--async., as the run in .*was beg"):
        infer(model, settings, directory=tmp_path / "after1", workers=2)


# Processes.


@contextlib.contextmanager
def no_process_left() -> Iterator[None]:
    """Nothing that was started within is there afterwards."""
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not alive, [process.cmdline() for process in alive]


OWN = '''
import os, signal, time
import torch, pyro.distributions as dist
from gymnasium.spaces import Box
from inference_rl import EnvironmentModel

class Own(EnvironmentModel):
    """A point that is pushed; what it does in state `trouble` is up to `how`."""

    state_space, action_space = Box(-1e3, 1e3, (1,)), Box(-1.0, 1.0, (1,))
    discount = 0.9

    def __init__(self, how="nothing", flag=""):
        self.how, self.flag = how, flag

    def initial_state(self):
        return dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1)

    def transition(self, state, action):
        if self.how != "nothing" and not os.path.exists(self.flag) and state.max() > 3.0:
            if self.how.endswith("once"):
                open(self.flag, "w").close()
            if self.how.startswith("hang"):
                time.sleep(1e6)
            if self.how.startswith("raise"):
                raise OSError("broken")
            os.kill(os.getpid(), signal.SIGKILL)
        return dist.Normal(state + action, torch.full((1,), 0.3)).to_event(1)

    def reward(self, state, action, next_state):
        return -next_state.squeeze(-1) ** 2
'''


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., EnvironmentModel]:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    flag = str(tmp_path / "happened")
    return lambda how="nothing": load_target(str(path), env_kwargs={"how": how, "flag": flag})


def test_processes_take_models_of_the_users_own_files(own) -> None:
    model = own()
    policy = policy_for(model)
    one = Collector(environments(model, 5, 60), 3)
    with no_process_left():
        two = divided(model, 2, LocalWorker)
        for steps in (9, 1):
            assert_same(one.collect(policy, steps), two.collect(policy, steps))
        two.close()
    assert two.replaced == 0


@pytest.mark.parametrize("how", ["die once", "hang once"])
def test_a_process_that_dies_or_hangs_once_changes_nothing(own, how: str, tmp_path: Path) -> None:
    policy = policy_for(own())
    expected = Collector(environments(own(), 5, 60), 3).collect(policy, 50)
    with no_process_left():
        two = divided(own(how), 1, LocalWorker, patience=2.0)
        what = "died .exit code -9.|hangs: its environments were not through a step after 2 s"
        with pytest.warns(UserWarning, match=f"({what}); another takes its place"):
            data = two.collect(policy, 50)
        two.close()
    assert (tmp_path / "happened").exists()
    assert two.replaced == 1
    assert_same(expected, data)


def test_without_workers_an_environment_that_hangs_stops_the_run(own, tmp_path: Path) -> None:
    settings = routine_class("policy-gradient")(**SMALL["policy-gradient"])
    start = time.monotonic()
    with pytest.raises(EnvironmentFault, match=r"slot \d+ .*raised TimeoutError: it was not thr"):
        infer(own("hang"), settings, workers=Workers(0, patience=1.0))
    assert time.monotonic() - start < 60
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_what_an_environment_raises_in_a_process_comes_back(own) -> None:
    policy = policy_for(own())
    with pytest.raises(EnvironmentFault) as single:
        Collector(environments(own("raise"), 5, 60), 3).collect(policy, 50)
    with no_process_left():
        two = divided(own("raise"), 1, LocalWorker)
        with pytest.raises(EnvironmentFault) as found:
            two.collect(policy, 50)
    assert str(found.value) == str(single.value)
    assert "in a worker on" in found.value.__notes__[0]


KEEPER = """
import gymnasium, random, subprocess
from gymnasium.spaces import Box, Discrete
import neighbour

class Keeper(gymnasium.Env):
    observation_space, action_space = Box(-1e3, 1e3, (1,)), Discrete(2)

    def __init__(self, kept, forgets):
        self.child = subprocess.Popen(["sleep", "600"])
        with open(kept, "a") as file:
            file.write(f"{self.child.pid}\\n")
        self.kept, self.forgets, self.is_new = kept, forgets, True

    def reset(self, *, seed=None, options=None):
        return self.observation_space.low * 0, {}

    def step(self, action):
        self.is_new = False
        return self.observation_space.low * 0 + neighbour.ONE, 0.0, False, False, {}

    def close(self):
        if self.is_new or not self.forgets:
            self.child.kill()
            self.child.wait()
        with open(self.kept + ".closed", "a") as file:
            file.write(f"{self.child.pid}\\n")
"""


@pytest.fixture
def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """An environment with a process of its own, in a directory that has a file called as a module
    that is none, which the worker starts in."""
    (tmp_path / "keeper.py").write_text(KEEPER)
    (tmp_path / "neighbour.py").write_text("ONE = 1.0\n")
    for name in ("random.py", "gymnasium.py", "torch.py"):
        (tmp_path / name).write_text(f"raise OSError('{name} of the current directory')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, ""])
    gymnasium.register("Keeper-v0", "keeper:Keeper")
    kept = {"kept": str(tmp_path / "kept")}
    yield lambda forgets: load_target("Keeper-v0", env_kwargs={**kept, "forgets": forgets})
    del gymnasium.registry["Keeper-v0"]
    for name in ("keeper", "neighbour"):
        sys.modules.pop(name, None)


def runs(pid: int) -> bool:
    """Whether a process does, which nobody may have waited for."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("forgets", [False, True])
def test_environments_of_a_process_are_closed_and_what_they_started_ends(
    keeper: Callable[..., Any], forgets: bool, tmp_path: Path
) -> None:
    model = keeper(forgets)
    with no_process_left():
        two = divided(model, 1, LocalWorker, size=2)
        # What the model was looked at by is this process's own.
        (tmp_path / "kept").unlink()
        (tmp_path / "kept.closed").unlink()
        data = two.collect(policy_for(model), 3)
        children = [int(line) for line in (tmp_path / "kept").read_text().split()]
        assert len(children) == 2
        assert all(map(runs, children))
        two.close()
    assert data.next_state.eq(1.0).all()
    closed = [int(line) for line in (tmp_path / "kept.closed").read_text().split()]
    assert closed == children
    deadline = time.monotonic() + 10
    while any(map(runs, children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_that_is_stopped_is_lost_though_much_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(seen, "STARTING", 1.0)
    with no_process_left():
        worker = LocalWorker("the worker")
        os.kill(worker._process.pid, signal.SIGSTOP)
        with pytest.raises(WorkerLost, match="hangs: it took nothing of what it was asked for 1 s"):
            worker.send(bytes(3_000_000), patience=0.5)


def test_a_process_that_is_stopped_in_the_middle_of_its_answer_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(seen, "STARTING", 1.0)
    monkeypatch.setattr(seen, "TICK", 0.1)
    with no_process_left():
        worker = LocalWorker("the worker")
        worker._channel.close()
        ours, theirs = socket.socketpair()
        worker._channel = Channel(ours)
        theirs.send((12).to_bytes(8, "big") + b"a half")
        assert worker.answered(0.1) is None
        with pytest.raises(WorkerLost, match="did not start within 1 s"):
            worker.receive(patience=0.5)
        theirs.close()


def test_messages_of_any_size_arrive_in_order() -> None:
    ours, theirs = map(Channel, socket.socketpair())
    messages = [b"", b"a", bytes(range(256)) * 20_000, b"", b"z"]
    sender = threading.Thread(target=lambda: [ours.send(message) for message in messages])
    sender.start()
    assert [theirs.receive() for _ in messages] == messages
    sender.join()
    assert theirs.receive(0.0) is None
    ours.close()
    with pytest.raises(EOFError):
        theirs.receive()
    theirs.close()


def run(tmp_path: Path, name: str, *words: object, **kwargs) -> subprocess.Popen[str]:
    command = [COMMAND, "infer", *words, "--out", tmp_path / name, "--json", "--episodes", "0"]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def finished(process: subprocess.Popen[str]) -> dict:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return json.loads(out)


def bytes_of(directory: Path) -> dict[str, bytes]:
    """What a run learned: its parameters and its metrics, and its replay in the last checkpoint."""
    names = ["metrics.jsonl", *(str(p.relative_to(directory)) for p in directory.rglob("*.safe*"))]
    found = {name: (directory / name).read_bytes() for name in sorted(names)}
    assert len(found) >= 3
    return found


def options(routine: str) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in SMALL[routine].items()]


def test_workers_end_with_a_command_that_is_killed(tmp_path: Path) -> None:
    words = ["Pendulum-v1", "reps", "--total-steps", "10000000", "--environments", "4"]
    process = run(tmp_path, "run", *words, "--workers", "2")
    deadline = time.monotonic() + 120
    workers: list[psutil.Process] = []
    while len(workers) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
        workers = [
            child
            for child in psutil.Process(process.pid).children()
            if "inference_rl.scale_out.local" in child.cmdline()
        ]
    assert len(workers) == 2
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


ROUTINES = [
    ("CartPole-v1", "policy-gradient"),
    ("CartPole-v1", "pcl"),
    ("Pendulum-v1", "reps"),
    ("CartPole-v1", "sac"),
    ("Pendulum-v1", "sac"),
    ("Pendulum-v1", "sql"),
    ("Pendulum-v1", "soft-ddpg"),
    ("Pendulum-v1", "soft-td3"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "routine"), ROUTINES)
def test_a_run_is_the_same_whoever_collects(tmp_path: Path, target: str, routine: str) -> None:
    words = [target, routine, *options(routine)]
    finished(run(tmp_path, "alone", *words))
    expected = bytes_of(tmp_path / "alone")
    who = [["--workers", "1"], ["--workers", "2"], ["--workers", "4"]]
    who += [["--workers", "ray", "--num-workers", n] for n in ("1", "2", "4")]
    for i, workers in enumerate(who):
        finished(run(tmp_path, f"run{i}", *words, *workers))
        assert bytes_of(tmp_path / f"run{i}") == expected, workers


@pytest.mark.slow
@pytest.mark.parametrize(("target", "routine"), ROUTINES)
@pytest.mark.parametrize("workers", [["--workers", "2"], ["--workers", "2", "--async"]])
def test_a_run_is_the_same_whoever_is_killed(
    tmp_path: Path, target: str, routine: str, workers: list[str]
) -> None:
    """Workers, and the command itself, are killed at random, up to twelve times: first once there
    is something to lose, and then in what time a run takes. It is resumed by whoever."""
    if "--async" in workers and routine in ("policy-gradient", "pcl", "reps"):
        pytest.skip("learns from what its own policy does, and cannot be a round late")
    words = [target, routine, *options(routine), "--save-every", "50"]
    start = time.monotonic()
    finished(run(tmp_path, "alone", *words, *workers))
    seconds = time.monotonic() - start
    expected = bytes_of(tmp_path / "alone")
    rng = random.Random(derived(0, f"{target} {routine} {workers}"))
    process, kills = run(tmp_path, "run", *words, *workers), 0
    while not checkpoints.exist(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.02)
    for _ in range(12):
        if process.poll() is not None:
            break
        children = psutil.Process(process.pid).children()
        if rng.random() < 0.5 and children:
            with contextlib.suppress(psutil.NoSuchProcess):
                rng.choice(children).kill()
                kills += 1
            time.sleep(rng.uniform(0.0, 0.3) * seconds)
            continue
        process.kill()
        process.communicate()
        kills += 1
        if (tmp_path / "run" / "run.json").exists():  # it was about to leave
            break
        if (tmp_path / "run" / "setup.json").exists():
            more = rng.choice([workers, ["--workers", "1"], []])
            command = [COMMAND, "infer", "--resume", tmp_path / "run", "--json", *more]
            process = subprocess.Popen(
                list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        else:
            process = run(tmp_path, "run", *words, *workers)
        time.sleep(rng.uniform(0.3, 0.9) * seconds)
    if process.returncode != -signal.SIGKILL:
        finished(process)
    assert kills >= 1
    assert bytes_of(tmp_path / "run") == expected


# Ray.


ON_RAY = ["--workers", "ray", "--num-workers", "3"]
LONG = ["Pendulum-v1", "reps", "--total-steps=9000", "--environments=5", "--evaluate-every=1000"]
LONG += ["--evaluation-episodes=0", "--save-every=1000"]


def wait_for_metrics(directory: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    path = directory / "metrics.jsonl"
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def _nothing_left_in_shared_memory() -> Iterator[None]:
    before = set(Path("/dev/shm").iterdir())
    yield
    assert set(Path("/dev/shm").iterdir()) <= before


@pytest.mark.slow
@pytest.mark.usefixtures("_nothing_left_in_shared_memory")
def test_actors_may_be_killed(tmp_path: Path) -> None:
    finished(run(tmp_path, "alone", *LONG))
    process, rng, killed = run(tmp_path, "run", *LONG, *ON_RAY), random.Random(0), set()
    wait_for_metrics(tmp_path / "run", process)
    for rows in (1, 3, 5):  # of nine; an actor dies in the round that is under way
        while len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) < rows:
            assert process.poll() is None
            time.sleep(0.02)
        actor = rng.choice([a for a in actors_of(process) if a.pid not in killed])
        actor.kill()
        killed.add(actor.pid)
    report = finished(process)
    assert report["workers_replaced"] == len(killed) == 3
    assert bytes_of(tmp_path / "run") == bytes_of(tmp_path / "alone")


def actors_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The actors of Ray that a command has started."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(child.cmdline()).startswith("ray::_Actor"):
                    found.append(child)
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("_nothing_left_in_shared_memory")
def test_the_head_of_a_cluster_may_die(tmp_path: Path) -> None:
    """The command ends, and what it has saved is gone on with."""
    from ray.cluster_utils import Cluster

    finished(run(tmp_path, "alone", *LONG))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
    try:
        process = run(tmp_path, "run", *LONG, *ON_RAY, "--ray-address", cluster.address)
        wait_for_metrics(tmp_path / "run", process)
        cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
        _, err = process.communicate(timeout=180)  # Ray looks for it for a minute
        assert process.returncode == 1
        assert "GCS may have been killed" in err
    finally:
        cluster.shutdown()
    command = [COMMAND, "infer", "--resume", tmp_path / "run", "--json"]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    assert bytes_of(tmp_path / "run") == bytes_of(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.usefixtures("_nothing_left_in_shared_memory")
def test_nodes_of_a_cluster_may_die(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    finished(run(tmp_path, "alone", *LONG))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        process = run(tmp_path, "run", *LONG, *ON_RAY, "--ray-address", cluster.address)
        wait_for_metrics(tmp_path / "run", process)
        cluster.remove_node(nodes[0], allow_graceful=False)
        report = finished(process)
        words = [*LONG, "--workers", "ray", "--num-workers", 4, "--ray-address", cluster.address]
        small = run(tmp_path, "small", *words)
        _, err = small.communicate(timeout=120)
        assert small.returncode == 2
        assert "a processor for each of 4, got one with 3" in err
    finally:
        cluster.shutdown()
    assert report["workers_replaced"] >= 1
    assert bytes_of(tmp_path / "run") == bytes_of(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.usefixtures("_nothing_left_in_shared_memory")
def test_nothing_of_ray_is_left_when_the_command_is_killed(tmp_path: Path) -> None:
    finished(run(tmp_path, "alone", *LONG))
    process = run(tmp_path, "run", *LONG, *ON_RAY)
    wait_for_metrics(tmp_path / "run", process)
    started = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in " ".join(child.cmdline()) for child in started)
    process.kill()
    process.communicate()
    # Ray's own agents look for the end of their cluster now and then.
    _, alive = psutil.wait_procs(started, timeout=240)
    assert not alive, [child.cmdline() for child in alive]
    command = [COMMAND, "infer", "--resume", tmp_path / "run", "--workers", "2", "--json"]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    assert bytes_of(tmp_path / "run") == bytes_of(tmp_path / "alone")
