"""Time `PolicyGradient` beside Stable-Baselines3's A2C on CartPole-v1, at the same batch shape.

Both collect `--environments` x `--steps` transitions and take one step of gradient descent on two
hidden layers of 64, for `--total` environment steps; evaluation, logging and saving are off. Each
side runs in a process of its own, in turn, because they may need other versions of Gymnasium; what
is timed begins after a first round. The ratio printed is the median of the pairs' ratios.

    python tests/benchmarks/collection_and_update.py --peer-python PATH

PATH is the interpreter of an environment with stable-baselines3 (this one, if not given).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from statistics import median

OURS = """
import time, torch
torch.set_num_threads(1)
from inference_rl.inference.policy_gradient import PolicyGradient, _Learner
from inference_rl.learning.collection import Collector
from inference_rl.simulate import GymnasiumModel, environments
model = GymnasiumModel("CartPole-v1")
settings = PolicyGradient(environments={environments}, steps_per_round={steps})
learner = _Learner(settings, model, model.action_prior)
collector = Collector(environments(model, {environments}), 0)
def rounds(count):
    for _ in range(count):
        learner.update(learner.collect(collector))
rounds(20)
count = {total} // ({environments} * {steps})
start = time.process_time()
rounds(count)
print(count * {environments} * {steps} / (time.process_time() - start))
"""

THEIRS = """
import time, torch
torch.set_num_threads(1)
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env
model = A2C("MlpPolicy", make_vec_env("CartPole-v1", n_envs={environments}, seed=0),
            n_steps={steps}, device="cpu", seed=0)
model.learn(20 * {environments} * {steps})
start = time.process_time()
model.learn({total}, reset_num_timesteps=False)
print({total} / (time.process_time() - start))
"""


def rate(python: str, code: str, **numbers: int) -> float:
    run = subprocess.run(
        [python, "-c", code.format(**numbers)], capture_output=True, text=True, check=True
    )
    return float(run.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--environments", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--total", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    numbers = {
        "environments": options.environments,
        "steps": options.steps,
        "total": options.total,
    }
    ours, theirs = [], []
    for _ in range(options.pairs):
        ours.append(rate(sys.executable, OURS, **numbers))
        theirs.append(rate(options.peer_python, THEIRS, **numbers))
        print(f"steps/s: ours {ours[-1]:.0f}, A2C {theirs[-1]:.0f}", flush=True)
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    print(f"median of ratios {median(ratios):.2f}; {median(ours):.0f} to {median(theirs):.0f}")


if __name__ == "__main__":
    main()
