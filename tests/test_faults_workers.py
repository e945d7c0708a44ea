"""Workers that crash, leave, or run out of memory, and commands with workers that are stopped.

Those that hang or are killed are in `test_scale_out.py`.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest

from inference_rl import EnvironmentModel, PolicyGradient, infer, load_target
from inference_rl.learning import checkpoints
from inference_rl.simulate import EnvironmentFault

COMMAND = Path(sys.executable).with_name("inference-rl")

OWN = '''
import os, pathlib, resource, signal
import torch, pyro.distributions as dist
from gymnasium.spaces import Box
from inference_rl import EnvironmentModel

CALLS, HOARD = [], []

class Own(EnvironmentModel):
    """A point that is pushed. In its 30th step of a process it does what `ways` say, each once, as
    the folder knows."""

    state_space, action_space, discount = Box(-1e3, 1e3, (1,)), Box(-1.0, 1.0, (1,)), 0.9
    horizon = 40

    def __init__(self, ways, folder):
        self.ways, self.folder = ways, pathlib.Path(folder)

    def initial_state(self):
        return dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1)

    def transition(self, state, action):
        CALLS.append(1)
        for way in self.ways:
            if len(CALLS) >= 30 and not (self.folder / way).exists():
                if way == "leaks":
                    if not HOARD:
                        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
                        most = pages * resource.getpagesize() + 2**28
                        resource.setrlimit(resource.RLIMIT_AS, (most, most))
                    while True:
                        HOARD.append(bytearray(2**24))
                (self.folder / way).touch()
                if way == "crashes":
                    os.kill(os.getpid(), signal.SIGSEGV)
                os._exit(3)
        return dist.Normal(state + action, torch.full((1,), 0.3)).to_event(1)

    def reward(self, state, action, next_state):
        return -next_state.squeeze(-1) ** 2
'''

SETTINGS = PolicyGradient(
    total_steps=600, environments=4, steps_per_round=10, save_every=40, evaluation_episodes=0
)


def own(tmp_path: Path, *ways: str) -> EnvironmentModel:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return load_target(str(path), env_kwargs={"ways": ways, "folder": str(tmp_path)})


def learned(model: EnvironmentModel, folder: Path, workers: int | None) -> dict[str, bytes]:
    infer(model, SETTINGS, directory=folder, workers=workers).save(folder)
    names = ("policy.safetensors", "messages.safetensors", "metrics.jsonl")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.slow
def test_workers_that_crash_or_leave_are_replaced_and_told_of(tmp_path: Path) -> None:
    expected = learned(own(tmp_path), tmp_path / "whole", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = learned(own(tmp_path, "crashes", "leaves"), tmp_path / "struck", 1)
    said = [str(warning.message) for warning in caught]
    assert [words.partition(" died ")[2] for words in said if " died " in words] == [
        f"(exit code {code}); another takes its place" for code in (-signal.SIGSEGV, 3)
    ]
    assert found == expected


@pytest.mark.slow
def test_a_worker_that_runs_out_of_memory_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    """An environment would run out of it again: nobody takes the worker's place by itself."""
    expected = learned(own(tmp_path), tmp_path / "whole", None)
    model = own(tmp_path, "leaks")
    with pytest.raises(EnvironmentFault, match=r"slot \d .*transition raised MemoryError"):
        infer(model, SETTINGS, directory=tmp_path / "struck", workers=1)
    assert checkpoints.load(tmp_path / "struck")[0] > 0
    (tmp_path / "leaks").touch()
    assert learned(model, tmp_path / "struck", 1) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "said"),
    [
        ([signal.SIGTERM], "interrupted: stopped at "),
        ([signal.SIGINT, signal.SIGTERM], "interrupted: stopped at once, by a second signal"),
    ],
)
def test_signals_end_a_command_and_its_workers(
    signals: list[signal.Signals], said: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["Pendulum-v1", "reps", "--total-steps", "10000000", "--environments", "4"]
    words += ["--save-every", "800", "--workers", "2", "--out", str(run)]
    process = subprocess.Popen([COMMAND, "infer", *words], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 200
        while not checkpoints.exist(run):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        for number in signals:
            process.send_signal(number)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + signals[-1], err
    assert said in err
    assert f"go on with: inference-rl infer --resume {run}" in err
    checkpoints.load(run)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
