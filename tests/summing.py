"""A run that costs next to nothing, for tests that need thousands of them."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from inference_rl import load_target
from inference_rl.learning.collection import Collector, Segment
from inference_rl.learning.loop import Schedule, learn
from inference_rl.policies import TabularPolicy
from inference_rl.simulate import environments

SCHEDULE = Schedule(total_steps=24, evaluate_every=8, evaluation_episodes=0, save_every=8)


class Summing:
    """A learner that adds up rewards, which shows whether any step was lost or counted twice."""

    def __init__(self) -> None:
        self.policy = TabularPolicy(torch.full((10, 2), 0.5))
        self.tempering = types.SimpleNamespace(targets={})
        self.total = torch.zeros((), dtype=torch.float64)

    def collect(self, collector: Collector) -> Segment:
        return collector.collect(self.policy, 2)

    def update(self, data: Segment) -> dict[str, Any]:
        self.total = self.total * 0.9 + data.reward.sum() + data.state.sum()
        return {"entropy": 0.0, "temperature": 0.0, "total": self.total}

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"]


def run(folder: Path, progress: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """Begin a run in `folder`, or go on with it; its metrics."""
    model = load_target("chain")
    collector = Collector(environments(model, 4), 0)
    return learn(model, Summing(), collector, SCHEDULE, seed=0, run=folder, progress=progress)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below `folder`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
