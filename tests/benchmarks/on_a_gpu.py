"""Time an update of `SAC` on HalfCheetah-v5 on a GPU, beside the CPU's.

    OMP_NUM_THREADS=1 python tests/benchmarks/on_a_gpu.py [--rounds 5]

One learner of each kind, in one process; rounds alternate between them. Each round is one call that
takes `--updates` updates, replay and Adam included, the environment not; it ends when the device
has nothing left to do. Printed are medians in milliseconds an update, and of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch

from inference_rl import SAC, load_target
from inference_rl.inference import sac
from inference_rl.learning.collection import Collector
from inference_rl.simulate import environments

KINDS = {
    "CPU, compiled": {"device": "cpu", "compile": "on"},
    "GPU": {"device": "cuda", "compile": "off"},
    "GPU, compiled": {"device": "cuda", "compile": "on"},
}


def learner(model: Any, data: Any, **how: Any) -> Any:
    torch.manual_seed(0)
    settings = SAC(replay_capacity=100_000, warmup_steps=4096, updates_per_step=1 / 100, **how)
    made = sac._learner(settings, model, model.action_prior)
    made.update(data)  # which records and compiles
    return made


def milliseconds(learner: Any, updates: int) -> float:
    start = time.perf_counter()
    for _ in range(updates):
        learner._update()
    learner.settle()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / updates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as `infer` does
    model = load_target("HalfCheetah-v5")
    collector = Collector(environments(model, 4), 0)
    policy = sac._learner(SAC(), model, model.action_prior).policy
    data = collector.collect(policy, 1024)
    print(torch.cuda.get_device_name())
    size = {"batch_size": options.batch, "hidden": (options.hidden, options.hidden)}
    made = {name: learner(model, data, **kind, **size) for name, kind in KINDS.items()}
    found: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(options.rounds):
        for name, one in made.items():
            found[name].append(milliseconds(one, options.updates))
    for name, taken in found.items():
        ratio = median(a / b for a, b in zip(found["CPU, compiled"], taken, strict=True))
        print(f"{size}, {name}: {median(taken):.2f} ms, {ratio:.1f}x", flush=True)


if __name__ == "__main__":
    main()
