"""Steps a second of collection by workers, and by one process; or of whole runs.

    OMP_NUM_THREADS=1 python tests/benchmarks/workers.py HalfCheetah-v5 --workers 2 --pairs 5
    OMP_NUM_THREADS=1 python tests/benchmarks/workers.py HalfCheetah-v5 --workers 2 --ray
    OMP_NUM_THREADS=1 python tests/benchmarks/workers.py HalfCheetah-v5 --routine sac --workers 1

All do the same, in turn; medians of the ratios. What is collected is compared. Of a run of `sac` or
its kin, start and warm-up are left out, and `--async` is timed too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from statistics import median
from typing import Any

import torch

from inference_rl import EnvironmentModel, Workers, infer, load_target
from inference_rl.evaluation import episode_limit
from inference_rl.inference import routine_class
from inference_rl.learning.collection import Collector
from inference_rl.learning.loop import Observer
from inference_rl.networks import Architecture, NetworkPolicy, described
from inference_rl.scale_out.collector import divided
from inference_rl.simulate import environments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target")
    parser.add_argument("--env-kwargs", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--environments", type=int, default=16)
    parser.add_argument("--steps", type=int, default=[1, 16, 128], nargs="+", help="of a round")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--total", type=int, default=8192, help="environment steps of a timing")
    parser.add_argument("--routine", help="time runs of it, at its own settings but for steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_target(options.target, env_kwargs=options.env_kwargs)
    if options.routine:
        compare_runs(model, options)
    else:
        compare_collection(model, options)


class Watch(Observer):
    """Notes when evaluations were due."""

    def __init__(self) -> None:
        self.at: list[tuple[int, float]] = []

    def __call__(self, words: str) -> None:
        pass

    def evaluated(self, row: dict[str, Any]) -> None:
        self.at.append((row["steps"], time.perf_counter()))


def compare_runs(model: EnvironmentModel, options: argparse.Namespace) -> None:
    warmup = options.total // 4
    settings = routine_class(options.routine)(
        warmup_steps=warmup,
        total_steps=warmup + options.total,
        evaluate_every=warmup,
        evaluation_episodes=0,
    )
    on: Any = "ray" if options.ray else "processes"
    who = {
        "one process": None,
        f"{options.workers} workers": Workers(options.workers, on=on),
        f"{options.workers} workers ahead": Workers(options.workers, on=on, ahead=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in who}
    for _ in range(options.pairs):
        for name, workers in who.items():
            watch = Watch()
            infer(model, settings, progress=watch, workers=workers)
            (first, start), *_, (last, end) = watch.at
            rates[name].append((last - first) / (end - start))
    for name, found in rates.items():
        ratios = [mine / one for one, mine in zip(rates["one process"], found, strict=True)]
        print(
            f"{options.routine}, {name}: {median(found):,.0f} steps/s, ratio {median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


def compare_collection(model: EnvironmentModel, options: argparse.Namespace) -> None:
    size, limit = options.environments, episode_limit(model)
    policy = NetworkPolicy(
        Architecture(described(model.state_space), described(model.action_space))
    )
    who = Workers(options.workers, on="ray" if options.ray else "processes")
    with (
        contextlib.closing(environments(model, size, limit)) as batch,
        divided(model, 0, who, size=size, limit=limit) as many,
    ):
        one = Collector(batch, 0)
        assert torch.equal(one.collect(policy, 8).reward, many.collect(policy, 8).reward)
        for steps in options.steps:
            rounds = max(options.total // (size * steps), 1)
            rates: dict[str, list[float]] = {"one": [], "many": []}
            for _ in range(options.pairs):
                rewards = []
                for name, collector in (("one", one), ("many", many)):
                    start = time.perf_counter()
                    rewards.append([collector.collect(policy, steps).reward for _ in range(rounds)])
                    seconds = time.perf_counter() - start
                    rates[name].append(rounds * size * steps / seconds)
                assert all(map(torch.equal, *rewards))
            ratios = [many / one for one, many in zip(rates["one"], rates["many"], strict=True)]
            print(
                f"{size} x {steps} steps a round: one process {median(rates['one']):,.0f} steps/s, "
                f"{who.count} {who.on if options.ray else 'workers'} "
                f"{median(rates['many']):,.0f}, ratio {median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
