"""Steps a second of collection by workers, and by one process.

    OMP_NUM_THREADS=1 python tests/benchmarks/workers.py HalfCheetah-v5 --workers 2 --pairs 5
    OMP_NUM_THREADS=1 python tests/benchmarks/workers.py HalfCheetah-v5 --workers 2 --ray

All collect the same rounds, which are compared, in turn; medians of the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from statistics import median

import torch

from inference_rl import Workers, load_target
from inference_rl.evaluation import episode_limit
from inference_rl.learning.collection import Collector
from inference_rl.networks import Architecture, NetworkPolicy, described
from inference_rl.scale_out.collector import divided
from inference_rl.simulate import environments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--environments", type=int, default=16)
    parser.add_argument("--steps", type=int, default=[1, 16, 128], nargs="+", help="of a round")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--total", type=int, default=8192, help="environment steps of a timing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_target(options.target)
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
