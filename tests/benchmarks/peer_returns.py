"""Returns of Stable-Baselines3's policies: one line a seed, then mean and standard error.

    OMP_NUM_THREADS=1 python tests/benchmarks/peer_returns.py Hopper-v5 SAC --steps 50000 --seeds 3

Settings are its defaults, but for those given here. TD3 and DDPG, which explore by nothing unless
told to, get normal noise of a tenth of the distance from the middle of the actions to either end.
Each policy is evaluated with its most likely actions, as `returns.py` does it.
"""

from __future__ import annotations

import argparse
import time
from statistics import mean, stdev

import gymnasium
import numpy as np
import stable_baselines3
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target")
    parser.add_argument("algorithm", choices=["SAC", "TD3", "DDPG"])
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--learning-rate", type=float)
    options = parser.parse_args()
    totals = []
    for seed in range(options.first, options.first + options.seeds):
        environment = gymnasium.make(options.target)
        given: dict[str, object] = {}
        if options.learning_rate is not None:
            given["learning_rate"] = options.learning_rate
        if options.algorithm != "SAC":
            size = environment.action_space.shape
            given["action_noise"] = NormalActionNoise(np.zeros(size), np.full(size, 0.1))
        start = time.monotonic()
        model = getattr(stable_baselines3, options.algorithm)(
            "MlpPolicy", environment, seed=seed, device="cpu", **given
        )
        model.learn(options.steps)
        seconds = time.monotonic() - start
        fresh = Monitor(gymnasium.make(options.target))
        fresh.reset(seed=seed + 1000)
        found, _ = evaluate_policy(model, fresh, n_eval_episodes=options.episodes)
        totals.append(found)
        print(f"seed {seed}: {found:.1f}, {seconds:.0f} s", flush=True)
    spread = stdev(totals) / len(totals) ** 0.5 if len(totals) > 1 else float("nan")
    print(f"{mean(totals):.1f} ± {spread:.1f} (standard error over seeds)")


if __name__ == "__main__":
    main()
