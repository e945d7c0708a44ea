"""What TensorBoard is given: the numbers of the metrics, once each, whatever stopped the run."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest

from inference_rl import PolicyGradient, infer, load_target
from inference_rl.inference import policy_gradient
from inference_rl.learning.scalars import flat

SETTINGS = {
    "total_steps": 400,
    "environments": 4,
    "steps_per_round": 10,
    "save_every": 150,
    "evaluate_every": 100,
    "evaluation_episodes": 2,
    "tensorboard": True,
}


def written(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars by name, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_number_of_the_metrics_is_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    update, rounds = policy_gradient._Learner.update, 0

    def stopped(self, data):
        nonlocal rounds
        rounds += 1
        if rounds == 7:
            raise KeyboardInterrupt
        return update(self, data)

    monkeypatch.setattr(policy_gradient._Learner, "update", stopped)
    settings = PolicyGradient(**SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        infer(load_target("chain"), settings, directory=tmp_path)
    infer(load_target("chain"), settings, directory=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["steps"] for row in rows] == [120, 200, 320, 400]
    found = written(tmp_path)
    assert found.keys() == flat(rows[-1]).keys() >= {"entropy", "stochastic/mean_return"}
    for name, points in found.items():
        assert points == [(row["steps"], pytest.approx(flat(row)[name])) for row in rows]


def test_a_run_is_the_same_with_and_without(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for wanted in (True, False):
        settings = PolicyGradient(**SETTINGS | {"tensorboard": wanted})
        infer(load_target("chain"), settings, directory=tmp_path / str(wanted))
    left, right = ((tmp_path / str(w) / "metrics.jsonl").read_bytes() for w in (True, False))
    assert left == right
    assert not (tmp_path / "False" / "tensorboard").exists()


def test_it_needs_the_package_and_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, imported = PolicyGradient(**SETTINGS), builtins.__import__
    with pytest.raises(ValueError, match="tensorboard: expected a directory to write to"):
        infer(load_target("chain"), settings)

    def missing(name: str, *given):
        if name == "torch.utils.tensorboard":
            raise ImportError("No module named 'tensorboard'")
        return imported(name, *given)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"is not installed .* pip install 'inference-rl\[tensorb"):
        infer(load_target("chain"), settings, directory=tmp_path)
    assert not list(tmp_path.iterdir())
