"""A run that is stopped, however, and resumed ends with the bytes of one that was not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch.distributions import constraints

from inference_rl import (
    PCL,
    SAC,
    InferenceResult,
    PolicyGradient,
    evaluation,
    infer,
    load_target,
    runs,
)
from inference_rl.cli import main
from inference_rl.inference import learned, off_policy, policy_gradient, routine_class
from inference_rl.inference.setup import resume
from inference_rl.learning import checkpoints, loop
from inference_rl.learning.collection import Collector
from inference_rl.priors import CategoricalPrior
from inference_rl.simulate import EnvironmentFault, ProgramEnvironments

COMMON = {
    "total_steps": 1200,
    "environments": 4,
    "save_every": 100,
    "evaluate_every": 300,
    "evaluation_episodes": 2,
}
FIXED_WIDTH = {
    "steps_per_round": 10,
    "warmup_steps": 200,
    "batch_size": 16,
    "updates_per_step": 0.1,
    "replay_capacity": 600,
    "final_temperature": 0.01,
    "final_width": 0.1,
}
LEARNED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "sac": (
        {"warmup_steps": 200, "steps_per_round": 4, "batch_size": 16, "replay_capacity": 400},
        ["chain", "Pendulum-v1"],
    ),
    "policy-gradient": ({"steps_per_round": 10}, ["chain", "CartPole-v1"]),
    "pcl": ({"steps_per_round": 10, "replay_capacity": 300}, ["CartPole-v1"]),
    "reps": ({"epsilon": 0.1}, ["chain", "Pendulum-v1", "CartPole-v1"]),
    "soft-ddpg": (FIXED_WIDTH, ["Pendulum-v1"]),
    "soft-td3": (FIXED_WIDTH, ["Pendulum-v1"]),
    "sql": (
        {"steps_per_round": 10, "warmup_steps": 200, "updates_per_step": 0.1, "batch_size": 32},
        ["CartPole-v1"],
    ),
}
"""Routines, with settings that make their rounds small, and targets; the last one is real."""

SETTINGS = COMMON | LEARNED["policy-gradient"][0]


def as_options(settings: dict[str, Any]) -> list[str]:
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items())
    return [word for pair in pairs for word in pair]


OPTIONS = as_options(SETTINGS)


def files(run: Path) -> dict[str, str]:
    """What must be the same twice."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name != "timing.json"
    }


STARTING = 5.0
"""Seconds that a new process may take before it learns anything."""


class Stopped(BaseException):
    """What kills a run in its process."""


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    run = tmp_path_factory.mktemp("complete") / "run"
    main(["infer", "chain", "policy-gradient", *OPTIONS, "--out", str(run), "--episodes", "2"])
    return run


@pytest.fixture
def begun(complete: Path, tmp_path: Path) -> Path:
    """A run that was stopped when it had learned all."""
    run = tmp_path / "run"
    shutil.copytree(complete, run)
    (run / "run.json").unlink()
    return run


ALIKE = {("soft-ddpg", "Pendulum-v1"), ("sac", "Pendulum-v1")}
"""Whose learner, loop and environment others here have too."""


@pytest.mark.parametrize(
    ("routine", "target"),
    [
        pytest.param(name, at, marks=[pytest.mark.slow] if (name, at) in ALIKE else [])
        for name, (_, targets) in LEARNED.items()
        for at in targets
    ],
)
def test_stopped_anywhere_any_number_of_times(
    routine: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = routine_class(routine)(**COMMON, **LEARNED[routine][0])
    infer(load_target(target), settings, seed=4, directory=tmp_path / "whole").save(
        tmp_path / "whole"
    )
    rng, left = random.Random(0), 0

    def mined(original):
        def step(*given, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise Stopped
            return original(*given, **options)

        return step

    places = [(Collector, "_advance"), (Collector, "_finish"), (Collector, "state_dict")]
    places += [(loop, "_finite"), (loop, "evaluate"), (runs, "write_durably"), (runs, "flush")]
    for where, name in places:
        monkeypatch.setattr(where, name, mined(getattr(where, name)))
    run, stops = tmp_path / "stopped", 0
    while True:
        left = rng.randint(1, 100) if stops < 8 else 10**9
        try:
            result = infer(load_target(target), settings, seed=4, directory=run)
            break
        except Stopped:
            stops += 1
    assert stops >= 4
    result.save(run)
    assert files(run) == files(tmp_path / "whole")
    assert [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] == (
        result.metrics
    )


class Watching(loop.Observer):
    """Ends the run at its `last` evaluation."""

    def __init__(self, last: int) -> None:
        self.last, self.rows = last, []

    def __call__(self, words: str) -> None:
        pass

    def evaluated(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if len(self.rows) == self.last:
            raise Stopped


def test_an_observer_hears_of_every_evaluation_and_may_end_the_run(tmp_path: Path) -> None:
    chain, settings = load_target("chain"), PolicyGradient(**SETTINGS)
    with pytest.raises(Stopped):
        infer(chain, settings, seed=4, directory=tmp_path, progress=Watching(2))
    again = Watching(0)
    result = infer(chain, settings, seed=4, directory=tmp_path, progress=again)
    assert again.rows == result.metrics  # those from before the end too
    assert [row["steps"] for row in again.rows] == [320, 600, 920, 1200]
    assert result.metrics == infer(chain, settings, seed=4).metrics


def command(*words: object) -> list[str]:
    return [str(Path(sys.executable).with_name("inference-rl")), *map(str, words)]


def saves(run: Path) -> list[str]:
    return sorted(path.parent.name for path in (run / "checkpoints").glob("*/run.json"))


def struck_down(process: subprocess.Popen, run: Path, wait: float, after_a_save: bool) -> bool:
    """Kill `process` in so many seconds, or so long after its next checkpoint; False if it ended
    before."""
    found = saves(run)
    while after_a_save and saves(run) == found and process.poll() is None:
        time.sleep(0.02)
    try:
        assert process.wait(wait) == 0
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    return False


def killed(routine: str, target: str, kills: int, folder: Path, **settings: int) -> None:
    """Hold runs that SIGKILL strikes so often in all against one that it does not.

    Half of the kills come at any time after the start, and half soon after a checkpoint.
    """
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    options = as_options(COMMON | LEARNED[routine][0] | settings)
    begin = ["infer", target, routine, *options, "--episodes", "3"]
    started = time.monotonic()
    main([*begin, "--out", str(folder / "whole")])
    took = time.monotonic() - started + STARTING
    rng, struck, within, complete = random.Random(1), 0, 0, 0
    while struck < kills or not complete:
        run = folder / f"struck-{complete}"
        begun = (run / "setup.json").exists()
        words = ["infer", "--resume", run] if begun else [*begin, "--out", run]
        process = subprocess.Popen(command(*words), **quiet)
        after_a_save = rng.random() < 0.5
        wait = rng.uniform(0, 0.3 if after_a_save else took)
        if struck < kills and struck_down(process, run, wait, after_a_save):
            struck += 1
            within += bool(saves(run))
        else:
            assert process.wait() == 0
        if (run / "run.json").exists():  # some are struck while they take their leave
            assert files(run) == files(folder / "whole")
            complete += 1
    assert within >= kills / 3
    print(
        f"{routine} on {target}: {struck} kills, {within} of them in runs with a checkpoint, and "
        f"{complete} runs completed with the bytes of the one that was not killed"
    )


def test_sigkill(tmp_path: Path) -> None:
    killed("policy-gradient", "chain", 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("routine", LEARNED)
def test_twenty_sigkills(routine: str, tmp_path: Path) -> None:
    target = LEARNED[routine][1][-1]
    killed(routine, target, 20, tmp_path, total_steps=20_000, save_every=500, evaluate_every=2000)


@pytest.mark.slow
@pytest.mark.parametrize("routine", LEARNED)
def test_twenty_sigkills_on_mujoco(routine: str, tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    sizes = {"environments": 2, "total_steps": 8000, "save_every": 300, "evaluate_every": 4000}
    killed(routine, "HalfCheetah-v5", 20, tmp_path, **sizes, evaluation_episodes=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, update, rounds = tmp_path / "run", policy_gradient._Learner.update, 0

    def interrupted(self, data):
        nonlocal rounds
        rounds += 1
        if rounds == 7:
            os.kill(os.getpid(), number)
        return update(self, data)

    monkeypatch.setattr(policy_gradient._Learner, "update", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["infer", "chain", "policy-gradient", *OPTIONS, "--out", str(run)])
    assert stop.value.code == 128 + number
    assert (
        "interrupted: stopped at 280 of 1,200 steps; go on with: inference-rl infer --resume "
        f"{run}\n"
    ) in capsys.readouterr().err
    assert checkpoints.load(run)[0] == 280
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_a_fault_of_the_environment_is_named_and_what_came_before_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "leaky.py"
    file.write_text(
        "import torch, pyro.distributions as dist\n"
        "from gymnasium.spaces import Discrete\n"
        "from inference_rl import EnvironmentModel\n"
        "class Leaky(EnvironmentModel):\n"
        "    state_space, action_space, discount = Discrete(200), Discrete(2), 0.99\n"
        "    def initial_state(self): return dist.Delta(torch.tensor(0))\n"
        "    def transition(self, state, action): return dist.Delta((state + 1) % 200)\n"
        "    def reward(self, state, action, next_state):\n"
        "        return torch.where(next_state == 150, torch.nan, 1.0)\n"
    )
    with pytest.raises(SystemExit) as stop:
        main(["infer", f"{file}", "policy-gradient", *OPTIONS, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    for word in ("Leaky", "episode seed", "step 149", "reward", "nan", "--resume"):
        assert word in said
    assert list((tmp_path / "run/checkpoints").iterdir())


def test_what_is_not_finite_stops_the_run() -> None:
    settings = PolicyGradient(**SETTINGS | {"learning_rate": 1e38, "value_learning_rate": 1e38})
    with pytest.raises((FloatingPointError, ValueError), match=r"finite|nan"):
        infer(load_target("CartPole-v1"), settings)


@pytest.mark.parametrize("field", ["loss", "gradient_norm", "value_gradient_norm"])
def test_nan_stops_the_run_at_its_source(
    field: str,
    complete: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    original, rounds = policy_gradient._Learner.update, 0

    def update(self, data):
        nonlocal rounds
        rounds += 1
        found = original(self, data)
        return found | {field: torch.tensor(torch.nan)} if rounds == 12 else found

    words = ["infer", "chain", "policy-gradient", *OPTIONS, "--episodes", "2", "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(policy_gradient._Learner, "update", update)
        said = refused([*words, str(run)], capsys)
    assert f"{field}: expected a finite number in the update after step 440, got nan" in said
    assert f"--resume {run}" in said
    assert checkpoints.load(run)[0] == 400
    main(["infer", "--resume", str(run)])
    assert files(run) == files(complete)


def test_nan_in_what_was_learned_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, rounds = policy_gradient._Learner.update, 0

    def update(self, data):
        nonlocal rounds
        rounds += 1
        found = original(self, data)
        if rounds == 12:
            self.policy.parameters_of.table.data[0] = torch.nan
        return found

    monkeypatch.setattr(policy_gradient._Learner, "update", update)
    with pytest.raises(
        FloatingPointError, match=r"policy.parameters_of.table: .* step \d+, got NaN"
    ):
        infer(load_target("chain"), PolicyGradient(**SETTINGS), directory=tmp_path)
    assert checkpoints.load(tmp_path)[0] == 400


def test_a_gradient_of_the_value_that_is_not_finite_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss = policy_gradient.value_loss
    monkeypatch.setattr(policy_gradient, "value_loss", lambda *given: 0 * (loss(*given) * 0).sqrt())
    with pytest.raises(FloatingPointError, match=r"^value_gradient_norm: .* after step 0, got nan"):
        infer(load_target("chain"), PolicyGradient(**SETTINGS))


@pytest.mark.parametrize("part", ["policy", "value"])
def test_what_was_learned_is_not_saved_with_infinities(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = policy_gradient._Learner.update

    def update(self, data):
        found = original(self, data)
        if self.rounds == 10:
            next(getattr(self, part).parameters()).data[0] = torch.inf
        return found

    monkeypatch.setattr(policy_gradient._Learner, "update", update)
    with pytest.raises(FloatingPointError, match=rf"^{part}.*table: .* up to step \d+, got inf"):
        infer(load_target("chain"), PolicyGradient(**SETTINGS), directory=tmp_path)
    assert checkpoints.load(tmp_path)[0] == 320


def test_messages_that_were_learned_are_not_saved_with_infinities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, original = SAC(**COMMON, **LEARNED["sac"][0]), off_policy.Learner.update

    def update(self, data):
        found = original(self, data)
        if self.steps == 512:  # the end of the round after which it is saved
            self.q.table.data[0, 3] = torch.inf
        return found

    model = load_target("chain")
    monkeypatch.setattr(off_policy.Learner, "update", update)
    with pytest.raises(FloatingPointError, match=r"^q\.table: .* up to step \d+, got inf"):
        infer(model, settings, directory=tmp_path)
    assert checkpoints.load(tmp_path)[0] == 400


def test_progress_of_a_run_shorter_than_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAY_SECONDS", -1.0)
    said: list[str] = []
    settings = PolicyGradient(**SETTINGS | {"total_steps": 1})
    infer(load_target("chain"), settings, progress=said.append)
    assert [words for words in said if "of 1 steps" in words or "-" in words] == []
    assert any(words.startswith("━" * 20 + " 40 of 40 steps · ") for words in said)
    assert "40 of 40 steps · evaluating" in said


class Preference(torch.nn.Module):
    """A user's own policy: one preference for all discrete states."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(2))

    def forward(self, state: torch.Tensor) -> dist.Categorical:
        return dist.Categorical(logits=self.logits.expand(*state.shape, 2))


class Tilted(PyroModule):
    """Another, of boxes, with a parameter that Pyro keeps positive."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PyroModule[torch.nn.Linear](4, 2)
        self.sharpness = PyroParam(torch.tensor(1.0), constraints.positive)

    def forward(self, state: torch.Tensor) -> dist.Categorical:
        return dist.Categorical(logits=self.sharpness * self.inner(state))


@pytest.mark.parametrize(("target", "made"), [("chain", Preference), ("CartPole-v1", Tilted)])
def test_a_module_of_the_users_own_is_learned_and_resumed(
    target: str,
    made: type[torch.nn.Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(folder: Path) -> InferenceResult:
        torch.manual_seed(0)
        routine = PolicyGradient(**SETTINGS, policy=made())
        return infer(load_target(target), routine, seed=4, directory=folder)

    whole = run(tmp_path / "whole")
    torch.manual_seed(0)
    for name, parameter in made().named_parameters():
        learned_value = whole.policy.state_dict()[f"module.{name}"]
        assert not torch.equal(learned_value, parameter)
    with monkeypatch.context() as patch:
        update, rounds = policy_gradient._Learner.update, 0

        def stopped(self, data):
            nonlocal rounds
            rounds += 1
            if rounds == 12:
                raise Stopped
            return update(self, data)

        patch.setattr(policy_gradient._Learner, "update", stopped)
        with pytest.raises(Stopped):
            run(tmp_path / "run")
    again = run(tmp_path / "run")
    assert again.objective == whole.objective
    for folder, result in (("whole", whole), ("run", again)):
        result.save(tmp_path / folder)
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    with pytest.raises(ValueError, match="its policy is a module of your own"):
        InferenceResult.load(tmp_path / "run")


@pytest.mark.parametrize("routine", [n for n in LEARNED if hasattr(routine_class(n), "policy")])
def test_a_module_of_the_users_own_stays_as_it_was(routine: str) -> None:
    module = Preference()
    made = routine_class(routine)(**COMMON | LEARNED[routine][0], policy=module)
    runs_of_it = [infer(load_target("chain"), made, seed=4) for _ in range(2)]
    assert module.logits.requires_grad
    assert torch.equal(module.logits, torch.zeros(2))
    first, second = (run.policy.state_dict()["module.logits"] for run in runs_of_it)
    assert torch.equal(first, second)
    assert not torch.equal(first, module.logits)
    with pytest.raises(ValueError, match="policy: expected a module with parameters to learn, got"):
        infer(load_target("chain"), dataclasses.replace(made, policy=runs_of_it[0].policy))


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_resumed(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun
    assert "nothing to resume" in refused(["infer", "--resume", str(tmp_path)], capsys)
    assert "nothing else" in refused(["infer", "--resume", str(run), "--seed", "2"], capsys)
    again = ["infer", "chain", "policy-gradient", *OPTIONS, "--out", str(run)]
    assert "--resume" in refused(again, capsys)
    setup = json.loads((run / "setup.json").read_text())
    (run / "setup.json").write_text(json.dumps(setup | {"version": "0.0.0"}))
    assert "whose version is '0.0.0'" in refused(["infer", "--resume", str(run)], capsys)
    for damaged in ("{", "[" * 10**5):
        (run / "setup.json").write_text(damaged)
        said = refused(["infer", "--resume", str(run)], capsys)
        assert re.search(r"setup.json is damaged \(.*\); infer again, into a new run", said)
    (run / "setup.json").write_text(json.dumps(setup))
    main(["infer", "--resume", str(run), "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["routine"] == "policy-gradient"
    assert report["evaluation"]["episodes"] == 2
    assert "nothing left to resume" in refused(["infer", "--resume", str(run)], capsys)


def test_an_edited_setting_is_refused_by_name(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun
    setup = json.loads((run / "setup.json").read_text())
    edited = setup | {"settings": setup["settings"] | {"learning_rate": 0.5}}
    (run / "setup.json").write_text(json.dumps(edited))
    said = refused(["infer", "--resume", str(run)], capsys)
    was = PolicyGradient.learning_rate
    assert f"whose settings.learning_rate is {was}, and this one's is 0.5" in said
    assert not (run / "run.json").exists()
    (run / "setup.json").write_text(json.dumps(setup | {"seed": 9}))
    assert "whose seed is 0" in refused(["infer", "--resume", str(run)], capsys)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"learning_rate": "fast"}},
        {"settings": {"no_such_setting": 1}},
        {"origin": {"planet": "chain"}},
        {"origin": "chain"},
        {"episodes": "many"},
    ],
)
def test_a_damaged_setup_is_named(
    change: dict, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun
    setup = json.loads((run / "setup.json").read_text())
    (run / "setup.json").write_text(json.dumps(setup | change))
    said = refused(["infer", "--resume", str(run)], capsys)
    assert f"{run / 'setup.json'} is damaged" in said


@pytest.mark.parametrize(
    ("what", "settings", "prior"),
    [
        (r"prior \(CategoricalPrior\)", {}, CategoricalPrior([0.5, 0.5])),
        (r"policy \(Preference\)", {"policy": Preference()}, None),
    ],
)
def test_what_was_made_in_python_is_resumed_in_python(
    what: str, settings: dict, prior: object, tmp_path: Path
) -> None:
    routine = PolicyGradient(**SETTINGS, **settings)
    infer(load_target("chain"), routine, prior=prior, directory=tmp_path)
    with pytest.raises(ValueError, match=rf"{what} made in Python.*infer\(model, routine, prior="):
        resume(tmp_path)
    infer(load_target("chain"), routine, prior=prior, directory=tmp_path)


MODEL = """
import torch, pyro.distributions as dist
from gymnasium.spaces import Discrete
from inference_rl import EnvironmentModel
class Coin(EnvironmentModel):
    state_space, action_space, discount, horizon = Discrete(2), Discrete(2), 0.9, 10
    def initial_state(self): return dist.Delta(torch.tensor(0))
    def transition(self, state, action): return dist.Delta(action)
    def reward(self, state, action, next_state): return next_state.double()
"""
PRIOR = """
import torch, pyro.distributions as dist
def mine(state): return dist.Categorical(torch.tensor([0.9, 0.1]).expand(*state.shape, 2))
"""
SHA = "'[0-9a-f]{64}', and this one's is '[0-9a-f]{64}'"


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("coin.py", "0.9, 10", "0.8, 10", "discount is 0.9, and this one's is 0.8"),
        ("coin.py", "0.9, 10", "0.9, 12", "horizon is 10, and this one's is 12"),
        (
            "coin.py",
            "next_state.double()",
            "1 + next_state.double()",
            f"sha256.target_file is {SHA}",
        ),
        ("mine.py", "[0.9, 0.1]", "[0.01, 0.99]", f"sha256.prior_file is {SHA}"),
    ],
)
def test_what_changed_since_a_run_was_begun_is_named(
    file: str, old: str, new: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("coin.py", MODEL), ("mine.py", PRIOR)):
        (tmp_path / name).write_text(text)
    run = tmp_path / "run"
    prior = ["--prior", f"{tmp_path / 'mine.py'}:mine", "--episodes", "2"]
    main(
        ["infer", str(tmp_path / "coin.py"), "policy-gradient", *OPTIONS, *prior, "--out", str(run)]
    )
    (run / "run.json").unlink()
    (tmp_path / file).write_text((tmp_path / file).read_text().replace(old, new))
    assert re.search(f"is of a run whose {said}", refused(["infer", "--resume", str(run)], capsys))
    assert not (run / "run.json").exists()
    (tmp_path / file).write_text((tmp_path / file).read_text().replace(new, old))
    main(["infer", "--resume", str(run)])


@pytest.mark.parametrize("target", ["chain", "CartPole-v1"])
def test_another_prior_in_python_is_refused(target: str, tmp_path: Path) -> None:
    model, settings = load_target(target), PolicyGradient(**SETTINGS)
    infer(model, settings, prior=CategoricalPrior([0.9, 0.1]), directory=tmp_path)
    with pytest.raises(ValueError, match=rf"whose sha256\.log_prior is {SHA}"):
        infer(model, settings, prior=CategoricalPrior([0.01, 0.99]), directory=tmp_path)
    infer(model, settings, prior=CategoricalPrior([0.9, 0.1]), directory=tmp_path)


def test_a_complete_run_is_left_alone(
    complete: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "learn", None)
    with pytest.raises(FileExistsError, match="holds a run that is complete; choose another"):
        infer(load_target("chain"), PCL(), directory=complete)
    said = refused(["infer", "chain", "pcl", "--out", str(complete)], capsys)
    assert "holds another run; choose another directory with --out" in said
    assert "--resume" not in said


def test_a_run_of_another_version_or_routine_is_not_called_damaged(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = json.loads((begun / "setup.json").read_text())
    other = setup | {"version": "9.0.0", "settings": {"of_that_version": 1}}
    (begun / "setup.json").write_text(json.dumps(other))
    said = refused(["infer", "--resume", str(begun)], capsys)
    assert f"whose version is '9.0.0', and this one's is '{setup['version']}'" in said
    (begun / "setup.json").write_text(json.dumps(setup | {"routine": "soft-newton"}))
    said = refused(["infer", "--resume", str(begun)], capsys)
    assert "is of a run of the routine 'soft-newton', which this version does not have" in said


def test_the_last_evaluation_is_of_episodes_that_were_not_learned_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    reset = ProgramEnvironments.reset

    def watched(self, slots, seeds):
        seen.extend(seeds.tolist())
        return reset(self, slots, seeds)

    monkeypatch.setattr(ProgramEnvironments, "reset", watched)
    result = infer(load_target("chain"), PolicyGradient(**SETTINGS | {"evaluation_episodes": 0}))
    learned_from = set(seen)
    for seed in (None, result.seed):
        seen.clear()
        result.evaluate(20, seed=seed)
        assert len(set(seen)) == 20
        assert not learned_from & set(seen)


def test_a_second_signal_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, rounds = policy_gradient._Learner.update, 0

    def update(self, data):
        nonlocal rounds
        rounds += 1
        if rounds == 10:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, data)

    monkeypatch.setattr(policy_gradient._Learner, "update", update)
    with pytest.raises(SystemExit) as stop:
        main(["infer", "chain", "policy-gradient", *OPTIONS, "--out", str(tmp_path / "run")])
    assert stop.value.code == 130
    assert (
        "interrupted: stopped at once, by a second signal, without saving; go on with: "
        "inference-rl infer --resume"
    ) in capsys.readouterr().err


def test_the_last_evaluation_may_fail_without_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    words = ["infer", "chain", "policy-gradient", *OPTIONS, "--episodes", "3", "--out"]
    main([*words, str(whole)])

    def failing(*given, **options):
        raise EnvironmentFault("chain, slot 0: it is broken")

    places = [(loop, "evaluate"), (learned, "sampled_parts"), (InferenceResult, "evaluate")]
    for i, (where, name) in enumerate(places):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, failing)
            if where is loop:  # the last of the four
                evaluate, calls = evaluation.evaluate, 0

                def at_last(*given, evaluate=evaluate, **options):
                    nonlocal calls
                    calls += 1
                    return evaluate(*given, **options) if calls < 7 else failing()

                patch.setattr(loop, "evaluate", at_last)
            again = [*words, str(run)] if i == 0 else ["infer", "--resume", str(run)]
            said = refused(again, capsys)
        assert f"it is broken; go on with: inference-rl infer --resume {run}" in said
        steps, _ = checkpoints.load(run)
        assert steps == SETTINGS["total_steps"]
    monkeypatch.setattr(policy_gradient._Learner, "update", None)  # nothing is left to learn
    main(["infer", "--resume", str(run)])
    assert files(run) == files(whole)
    with monkeypatch.context() as patch:
        patch.setattr(InferenceResult, "evaluate", failing)
        assert refused(["evaluate", str(run)], capsys).endswith("it is broken\n")


def test_a_run_that_never_began_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["infer", "cliff", "policy-gradient", "--estimator", "pathwise", "--out", str(out)]
    assert "pathwise needs draws that can be differentiated" in refused(words, capsys)
    assert not out.exists()
    out.mkdir()
    (out / "metrics.jsonl").write_text("mine")
    refused(words, capsys)
    assert [path.name for path in out.iterdir()] == ["metrics.jsonl"]


def test_other_settings_in_the_same_place_are_refused(tmp_path: Path) -> None:
    chain = load_target("chain")
    infer(chain, PolicyGradient(**SETTINGS), directory=tmp_path)
    with pytest.raises(ValueError, match="a run is resumed as it was begun"):
        infer(chain, PolicyGradient(**SETTINGS), seed=1, directory=tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        resume(tmp_path / "elsewhere")
