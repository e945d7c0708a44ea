"""Where policies go that were learned on the multigoal model: a picture, one panel a routine.

    OMP_NUM_THREADS=1 python tests/benchmarks/multigoal.py --out multigoal.png sql sac soft-ddpg

All routines have the same settings, at temperature 10. Prints how many of 100
walks from the centre reach each goal, and the objective with its standard error.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from inference_rl import SAC, SQL, InferenceResult, SoftDDPG, infer, load_target
from inference_rl.diagnostics.page import COLOURS, FAINT, INK
from inference_rl.learning.collection import Collector
from inference_rl.models.multigoal import EDGE, GOALS, REACHED
from inference_rl.simulate import environments

COMMON: dict[str, Any] = {
    "temperature": 10.0,
    "environments": 8,
    "warmup_steps": 10_000,  # so that Q knows the way to every goal before any is preferred
    "batch_size": 256,
    "value_learning_rate": 1e-3,
    "target_rate": 0.01,
    "hidden": (128, 128),
    "evaluation_episodes": 0,
    "compile": "off",
}
ROUTINES: dict[str, tuple[str, Any]] = {
    "sql": ("soft Q-learning: a sampler of e^(Q/α)", SQL),
    "sac": ("soft actor-critic: the tanh of a Gaussian", SAC),
    "soft-ddpg": ("soft DDPG: the same, of fixed width", SoftDDPG),
}
WALKS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("routines", nargs="+", choices=ROUTINES)
    parser.add_argument("--steps", type=int, default=24_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("multigoal.png"))
    options = parser.parse_args()
    model, walks = load_target("multigoal"), {}
    for name in options.routines:
        title, routine = ROUTINES[name]
        settings = routine(total_steps=options.steps, **COMMON)
        began = time.perf_counter()
        result = infer(model, settings, seed=options.seed)
        walks[title] = walked(result)
        print(
            f"{name}: {counts(walks[title])}, {words(result)}, {time.perf_counter() - began:.0f} s"
        )
    draw(walks, options.out)


def walked(result: InferenceResult) -> list[Tensor]:
    """Places of each walk, (T + 1, 2)."""
    batch = environments(result.model, WALKS, result.model.horizon)
    data = Collector(batch, 1).collect_episodes(result.policy)
    lengths = data.valid.sum(0).tolist()
    places = torch.cat([data.state[:1], data.next_state])
    return [places[: length + 1, walk] for walk, length in enumerate(lengths)]


def counts(walks: list[Tensor]) -> str:
    away = torch.cdist(torch.stack([walk[-1] for walk in walks]), torch.tensor(GOALS))
    reached = (away < REACHED).sum(0).tolist()
    named = zip(("right", "left", "top", "bottom"), reached, strict=True)
    return ", ".join(f"{name} {number}" for name, number in named)


def words(result: InferenceResult) -> str:
    assert result.objective is not None
    return f"J = {float(result.objective):.0f} ± {result.objective_standard_error:.0f}"


def draw(walks: dict[str, list[Tensor]], path: Path) -> None:
    figure = Figure(figsize=(4 * len(walks), 4.4), facecolor="white")
    axes = figure.subplots(1, len(walks), squeeze=False)
    axis = torch.linspace(-EDGE, EDGE, 200)
    places = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    nearest = torch.cdist(places.flatten(0, 1), torch.tensor(GOALS)).amin(-1).reshape(200, 200)
    for panel, (title, lines) in zip(axes[0], walks.items(), strict=True):
        panel.contour(axis, axis, nearest.square(), levels=12, colors=[FAINT], linewidths=0.8)
        for line in lines:
            panel.plot(*line.T, color=INK, linewidth=0.6, alpha=0.5)
        for goal in GOALS:
            panel.add_patch(Circle(goal, REACHED, color=COLOURS[1], alpha=0.5, linewidth=0))
        panel.set_title(f"{title}\n{counts(lines)}", fontsize=9)
        panel.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), aspect="equal", xticks=[], yticks=[])
    figure.savefig(path, dpi=120, bbox_inches="tight")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
