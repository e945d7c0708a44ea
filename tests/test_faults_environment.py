"""Environments that fail: which one, where and what is said, what came before is saved, and no
process is left."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv

from inference_rl import PCL, REPS, PolicyGradient, Workers, infer, load_target
from inference_rl.cli import main
from inference_rl.inference import policy_gradient
from inference_rl.inference.setup import resume
from inference_rl.learning import checkpoints
from inference_rl.learning.collection import Collector, Segment
from inference_rl.learning.loop import Schedule, learn
from inference_rl.randomness import episode_seeds
from inference_rl.simulate import EnvironmentFault, environments
from inference_rl.vector_environments import VectorEnvironments

ROUNDS = {"total_steps": 300, "environments": 2, "steps_per_round": 10}
SETTINGS = ROUNDS | {"save_every": 10**6, "evaluate_every": 150, "evaluation_episodes": 1}
WORDS = [
    word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))
]


class Fragile(gymnasium.Env[Any, Any]):
    """Walks at random; fails in the way of `fault` in the fifth step of the seventh episode."""

    fault: ClassVar[str] = ""
    observation_space, action_space = Box(-100, 100, (2,)), Discrete(2)
    episodes = steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps, self.episodes = 0, self.episodes + 1
        heeded = self.fault != "ignores its seed"
        rng = self.np_random if heeded else np.random.default_rng()
        self.place = rng.uniform(-1, 1, 2).astype(np.float32)
        if self.fault == "raises in reset" and self.episodes == 7:
            raise RuntimeError("out of order")
        if self.fault == "leaves in reset" and self.episodes == 7:
            sys.exit(0)
        return self.place, {}

    def step(self, action: int) -> Any:
        self.steps += 1
        self.place = self.place + np.float32(action) - np.float32(0.5)
        told = self.place, float(self.place[0]), False, False, {}
        if self.fault == "never ends":
            return told
        if self.episodes == 7 and self.steps == 5:
            told = self._failing(told)
        return (*told[:2], self.steps == 12, *told[3:]) if len(told) == 5 else told

    def close(self) -> None:
        if self.fault == "raises in close":
            raise RuntimeError("stuck")
        if self.fault == "leaves in close":
            sys.exit(0)
        while self.fault == "hangs in close" and self.steps:
            time.sleep(0.01)

    def _failing(self, told: Any) -> Any:
        if self.fault in ("raises in step", "ignores its seed"):
            raise RuntimeError("out of order")
        if self.fault == "leaves in step":
            sys.exit(0)
        if self.fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        changed: dict[str, Any] = {
            "nan": (np.array([0, np.nan], np.float32), *told[1:]),
            "inf": (np.array([np.inf, 0], np.float32), *told[1:]),
            "reward": (told[0], np.nan, *told[2:]),
            "shape": (np.zeros(3, np.float32), *told[1:]),
            "dtype": (np.zeros(2, np.complex64), *told[1:]),
            "tuple": told[:4],
            "beyond its box": (np.full(2, 1e6, np.float32), *told[1:]),
            "word": (told[0], "high", *told[2:]),
            "nothing": (*told[:3], None, {}),
        }
        return changed.get(self.fault, told)


class Remote(Fragile):
    """Asks a process of its own, which is killed where the other fails."""

    asked: ClassVar[list[subprocess.Popen[bytes]]] = []

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self.simulator = subprocess.Popen(["cat"], stdin=pipe, stdout=pipe, bufsize=0)
        self.asked.append(self.simulator)

    def _failing(self, told: Any) -> Any:
        self.simulator.kill()
        self.simulator.wait()
        return told

    def step(self, action: int) -> Any:
        told = super().step(action)
        assert self.simulator.stdin is not None
        assert self.simulator.stdout is not None
        self.simulator.stdin.write(b"%d" % action)
        assert self.simulator.stdout.read(1) == b"%d" % action
        return told

    def close(self) -> None:
        self.simulator.kill()
        self.simulator.communicate()


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gymnasium.register("Fragile-v0", Fragile, max_episode_steps=30)
    gymnasium.register("Endless-v0", Fragile)
    gymnasium.register("Remote-v0", Remote, max_episode_steps=30)
    yield
    for name in ("Fragile-v0", "Endless-v0", "Remote-v0"):
        gymnasium.registry.pop(name)


SAYS = {
    "raises in reset": "step 0: reset raised RuntimeError: out of order",
    "raises in step": "step 4: step raised RuntimeError: out of order",
    "leaves in reset": "step 0: reset raised SystemExit: 0",
    "leaves in step": "step 4: step raised SystemExit: 0",
    "nan": "step 4: observation: expected finite numbers, got nan",
    "inf": "step 4: observation: expected finite numbers, got inf",
    "reward": "step 4: reward: expected finite numbers, got nan",
    "shape": "step 4: observation: expected shape (2,), got (3,)",
    "dtype": "step 4: observation: expected dtype float32, got complex64",
    "tuple": "step 4: step raised ValueError: not enough values",  # Gymnasium's own wrapper
    "word": "step 4: reward raised ValueError: could not convert string to float",
    "nothing": "step 4: truncated: expected True or False, got None",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the environment as long as it does not fail."""
    gymnasium.register("Fragile-v0", Fragile, max_episode_steps=30)
    run = tmp_path_factory.mktemp("whole") / "run"
    infer(load_target("Fragile-v0"), PolicyGradient(**SETTINGS), directory=run).save(run)
    gymnasium.registry.pop("Fragile-v0")
    return run


@pytest.mark.parametrize("fault", SAYS)
def test_a_fault_is_named_and_the_run_goes_on_once_it_is_mended(
    fault: str,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(Fragile, "fault", fault)
    with pytest.raises(SystemExit) as stop:
        main(["infer", "Fragile-v0", "policy-gradient", *WORDS, "--out", str(run)])
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: Fragile-v0, slot 0 (episode seed ")
    assert SAYS[fault] in said
    assert said.endswith(f"; go on with: inference-rl infer --resume {run}")
    steps, state = checkpoints.load(run)
    assert steps == 140  # in its seventh episode of twelve steps, each of two slots
    assert state["metrics"] == []
    monkeypatch.setattr(Fragile, "fault", "")
    resume(run).save(run)
    for name in ("policy.safetensors", "messages.safetensors", "metrics.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_on_an_environment_that_ignores_its_seed_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fragile, "fault", "ignores its seed")
    model, run = load_target("Fragile-v0"), tmp_path / "run"
    with pytest.raises(EnvironmentFault, match="out of order"):
        infer(model, PolicyGradient(**SETTINGS), directory=run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(EnvironmentFault, match=r"replayed from its seed .* went another way"):
        resume(run)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_an_environment_that_hangs_in_close_loses_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fragile, "fault", "hangs in close")
    run, model = tmp_path / "run", load_target("Fragile-v0")
    with pytest.warns(UserWarning, match="close raised TimeoutError: it was not through after 0.3"):
        infer(
            model, PolicyGradient(**SETTINGS), directory=run, workers=Workers(0, patience=0.3)
        ).save(run)
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


BY_EPISODES = {name: value for name, value in SETTINGS.items() if name != "steps_per_round"}


@pytest.mark.parametrize(
    ("settings", "saved"),  # rounds of ten steps of each of two slots, or of twelve: an episode
    [
        (PolicyGradient(**SETTINGS), 140),
        (PCL(**SETTINGS), 140),
        (REPS(**BY_EPISODES, feature_count=10), 144),
    ],
)
def test_a_simulator_that_dies_is_named_and_every_routine_saves_what_it_learned(
    settings: Any, saved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Remote, "asked", [])
    model = load_target("Remote-v0")
    said = r"Remote-v0, slot 0 \(episode seed \d+\), step 4: step raised BrokenPipeError: .*pipe"
    with pytest.raises(EnvironmentFault, match=said):
        infer(model, settings, directory=tmp_path)
    assert len(Remote.asked) >= 2
    assert all(simulator.returncode is not None for simulator in Remote.asked)
    assert checkpoints.load(tmp_path)[0] == saved
    monkeypatch.setattr(Remote, "_failing", lambda self, told: told)
    resumed = infer(model, settings, directory=tmp_path)
    assert resumed.metrics == infer(model, settings).metrics


COIN = """
import os, sys, time
import torch, pyro.distributions as dist
from gymnasium.spaces import Discrete
from inference_rl import EnvironmentModel

CALLS = []

class Coin(EnvironmentModel):
    state_space, action_space, discount, horizon = Discrete(2), Discrete(2), 0.9, 5
    def initial_state(self):
        return dist.Categorical(torch.ones(2) / 2)
    def transition(self, state, action):
        return dist.Categorical(torch.ones(*action.shape, 2) / 2)
"""

LEAVING = (
    COIN
    + """
    def reward(self, state, action, next_state):
        CALLS.append(1)
        if len(CALLS) > {calls}:
            sys.exit(0)
        return action.double()
    def action_prior(self, state):
        {prior}
        return dist.Categorical(torch.ones(*state.shape, 2) / 2)
"""
)


@pytest.mark.parametrize(
    ("calls", "prior", "words", "said"),
    [
        (
            40,
            "",
            ["policy-gradient", *WORDS],
            r"Coin, slot 0 .*: reward raised SystemExit: 0; go",
        ),
        (0, "", ["exact"], r"Coin.reward failed when called with .*: SystemExit: 0"),
        (0, "sys.exit(0)", ["policy-gradient", *WORDS], "SystemExit: 0"),
    ],
)
def test_a_program_that_leaves_does_not_take_the_command_along(
    calls: int,
    prior: str,
    words: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "own.py").write_text(LEAVING.format(calls=calls, prior=prior))
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        main(["infer", str(tmp_path / "own.py"), *words, "--out", str(run)])
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(f"^error: .*{said}", shown.err.splitlines()[-1]), shown.err
    assert checkpoints.exist(run) == bool(calls)


HANGING = (
    COIN
    + """
    def reward(self, state, action, next_state):
        # Of two slots each in collection, of others in an evaluation, and for the objective.
        CALLS.append(len(state))
        if os.path.exists("ill") and CALLS[-1] == int(os.environ["SLOTS"]):
            number = int(os.environ.get("SIGNAL", "0"))
            if number:
                os.kill(os.getpid(), number)
            while True:
                time.sleep(0.01)
        return action.double()
"""
)


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An infer command whose model hangs where there are SLOTS of them, as long as it is ill."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(HANGING)
    Path("ill").touch()
    run = ["--out", "run", "--episodes", "7"]
    return ["infer", "own.py", "policy-gradient", *WORDS, "--evaluation-episodes", "3", *run]


@pytest.mark.parametrize(("slots", "steps"), [(3, 160), (32, 300), (7, 300)])
def test_a_model_that_hangs_beyond_collection_is_stopped_too(
    slots: int,
    steps: int,
    hanging: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In an evaluation, in estimating the objective, and in the evaluation at the end."""
    monkeypatch.setenv("SLOTS", str(slots))
    with pytest.raises(SystemExit) as stop:
        main([*hanging, "--patience", "0.4"])
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    raised = r"reward of \d+ slots .* raised TimeoutError: it was not through after 0\.4 s"
    how = "go on with: inference-rl infer --resume run$"
    assert re.search(f"^error: Coin, slot 0 .*: {raised}; {how}", said), said
    assert checkpoints.load(Path("run"))[0] == steps
    Path("ill").unlink()
    main(["infer", "--resume", "run", "--json"])
    capsys.readouterr()
    Path("ill").touch()
    monkeypatch.setenv("SLOTS", "9")
    with pytest.raises(SystemExit):
        main(["evaluate", "run", "--episodes", "9", "--patience", "0.4"])
    assert re.search(raised, capsys.readouterr().err)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_evaluation_that_does_not_end(
    number: int,
    hanging: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLOTS", "3")
    monkeypatch.setenv("SIGNAL", str(int(number)))
    with pytest.raises(SystemExit) as stop:
        main(hanging)
    assert stop.value.code == 128 + number
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("interrupted: stopped at 160 of 300 steps; go on with: ")
    Path("ill").unlink()
    main(["infer", "--resume", "run", "--json"])
    main([*hanging, "--out", "whole", "--json"])
    for name in ("policy.safetensors", "metrics.jsonl"):
        assert (Path("run") / name).read_bytes() == (Path("whole") / name).read_bytes()


def test_an_environment_that_never_ends_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fragile, "fault", "never ends")
    monkeypatch.setattr("inference_rl.evaluation.STEP_LIMIT", 40)
    model = load_target("Endless-v0")
    for rounds in (10, 0):
        settings = PolicyGradient(**SETTINGS | {"steps_per_round": rounds})
        with pytest.warns(
            UserWarning, match="Endless-v0 sets no limit .* cut after 40 steps; .*max"
        ):
            result = infer(model, settings)
        assert result.metrics[-1]["stochastic"]["mean_length"] == 40
        assert result.parts.steps == pytest.approx((1 - 0.99**40) / 0.01)


def vector(kind: str, size: int = 3) -> VectorEnv:
    make: Any = {"sync": SyncVectorEnv, "async": AsyncVectorEnv}[kind]
    return make([Fragile] * size)


def run_for_ever(batch: VectorEnvironments) -> None:
    slots, number = np.arange(batch.size), 0
    while True:
        batch.reset(slots, episode_seeds(0, slots + batch.size * number))
        number += 1
        while batch.alive.any():
            batch.step(np.flatnonzero(batch.alive), torch.zeros(batch.size, dtype=torch.long))


def left_over(vector_env: VectorEnv) -> list[int]:
    """Workers of it that are still there."""
    processes = getattr(vector_env, "processes", [])
    return [process.pid for process in processes if Path(f"/proc/{process.pid}").exists()]


IN_VECTORS = {
    "raises in step": {"sync": "raised RuntimeError: out of order", "async": "out of order"},
    "raises in reset": {"sync": "raised RuntimeError: out of order", "async": "out of order"},
    "leaves in step": {"sync": "step of 3 slots raised SystemExit: 0"},
    "nan": dict.fromkeys(("sync", "async"), "observation: expected finite numbers, got nan"),
    "inf": dict.fromkeys(("sync", "async"), "observation: expected finite numbers, got inf"),
    "reward": dict.fromkeys(("sync", "async"), "reward: expected finite numbers, got nan"),
    "shape": {"sync": "step of 3 slots raised ValueError", "async": "it raised ValueError"},
    "tuple": {"sync": "not enough values to unpack", "async": "not enough values to unpack"},
    "dies": {"async": "step: its worker died \\(exit code -9\\)"},
}


@pytest.mark.parametrize(
    ("fault", "kind"), [(fault, kind) for fault, kinds in IN_VECTORS.items() for kind in kinds]
)
@pytest.mark.filterwarnings("ignore")
def test_faults_in_a_vector_environment(
    fault: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fragile, "fault", fault)
    inner = vector(kind)
    batch = VectorEnvironments(inner)
    with pytest.raises(EnvironmentFault, match=IN_VECTORS[fault][kind]) as caught:
        run_for_ever(batch)
    for word in ("VectorEnv", "episode seed"):
        assert word in str(caught.value)
    if kind == "async":
        place = 0 if fault == "raises in reset" else 4
        slot = 1 if "slot 1" in str(caught.value) else 0  # all of them died at once
        seed = episode_seeds(0, np.array([3 * 6 + slot]))[0]
        assert f"slot {slot} (episode seed {seed}), step {place}" in str(caught.value)
    batch.close()
    assert left_over(inner) == []
    assert multiprocessing.active_children() == []


def vector_run(run: Path, kill_in_round: int | None) -> list[int]:
    """Learn on workers, of which one may be killed; the processes that are left."""
    model, settings = load_target("Fragile-v0"), PolicyGradient(**SETTINGS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        learner = policy_gradient._Learner(settings, model, model.action_prior)
    inner = vector("async", 2)
    batch, update, rounds = VectorEnvironments(inner, model), learner.update, 0

    def struck(data: Any) -> Any:
        nonlocal rounds
        rounds += 1
        if rounds == kill_in_round:
            os.kill(inner.processes[1].pid, signal.SIGKILL)
        return update(data)

    learner.update = struck  # type: ignore[method-assign]
    try:
        learn(
            model,
            learner,
            Collector(batch, 0),
            Schedule(600, 200, 0, 10**6),
            seed=0,
            run=run,
        )
    finally:
        batch.close()
    return left_over(inner)


def test_a_run_whose_worker_was_killed_goes_on_with_others(tmp_path: Path) -> None:
    for name in ("whole", "struck"):
        (tmp_path / name).mkdir()
    assert vector_run(tmp_path / "whole", None) == []
    with pytest.raises(
        EnvironmentFault, match=r"slot 1 \(episode seed \d+\), step 2: step: its worker"
    ):
        vector_run(tmp_path / "struck", 17)
    assert multiprocessing.active_children() == []
    assert checkpoints.load(tmp_path / "struck")[0] == 340
    assert vector_run(tmp_path / "struck", None) == []
    found = [
        {
            str(path.relative_to(tmp_path / name)): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("whole", "struck")
    ]
    assert found[0] == found[1]


def test_workers_collect_what_one_process_does() -> None:
    model = load_target("Fragile-v0")
    settings = PolicyGradient(**SETTINGS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = policy_gradient._Learner(settings, model, model.action_prior).policy
    alone = Collector(environments(model, 2), 3).collect(policy, 40)
    batch = VectorEnvironments(vector("async", 2), model)
    together = Collector(batch, 3).collect(policy, 40)
    batch.close()
    assert torch.equal(alone.state, together.state)
    assert json.dumps(alone.reward.tolist()) == json.dumps(together.reward.tolist())


@pytest.mark.parametrize(
    ("fault", "raised"),
    [("raises in close", "RuntimeError: stuck"), ("leaves in close", "SystemExit: 0")],
)
def test_an_environment_that_cannot_be_closed_loses_nothing(
    fault: str, raised: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fragile, "fault", fault)
    run = tmp_path / "run"
    with pytest.warns(UserWarning, match=f"close raised {raised}") as caught:
        infer(load_target("Fragile-v0"), PolicyGradient(**SETTINGS), directory=run).save(run)
    said = {str(warning.message) for warning in caught}
    what = f"close raised {raised}; what it holds may be left over"
    assert said >= {f"Fragile-v0: {what}", *(f"Fragile-v0, slot {i}: {what}" for i in (0, 1))}
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    with pytest.warns(UserWarning, match="DummyVectorEnv|SyncVectorEnv.*: close raised"):
        VectorEnvironments(vector("sync")).close()


class Writing(Fragile):
    """May write over the actions that it is given, and over what it has shown."""

    writes: ClassVar[bool] = False
    action_space = Box(-1, 1, (2,))
    shown = np.zeros(2, np.float32)

    def step(self, action: Any) -> Any:
        place, *rest = super().step(action[0])
        if self.writes:
            action[:], self.shown[:] = np.nan, np.nan
        self.shown = place.copy()
        return self.shown, *rest


def collected(target: str) -> Segment:
    """What a policy does in two slots of it, for eight episodes each."""
    model = load_target(target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = PolicyGradient(**SETTINGS)
        policy = policy_gradient._Learner(settings, model, model.action_prior).policy
    return Collector(environments(model, 2), 3).collect(policy, 100)


def test_what_an_environment_writes_over_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    gymnasium.register("Writing-v0", Writing, max_episode_steps=30)
    monkeypatch.setattr(Writing, "writes", False)
    expected = collected("Writing-v0")
    monkeypatch.setattr(Writing, "writes", True)
    found = collected("Writing-v0")
    gymnasium.registry.pop("Writing-v0")
    for name in ("state", "action", "reward", "next_state"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_what_is_beyond_a_box_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many environments of Gymnasium's own go beyond their bounds."""
    expected = collected("Fragile-v0")
    monkeypatch.setattr(Fragile, "fault", "beyond its box")
    found = collected("Fragile-v0")
    differs = (found.next_state != expected.next_state).any(-1)
    assert differs.sum() == 2  # once in each slot
    assert (found.next_state[differs] == 1e6).all()
