"""`Exact` in blocks on Ray beside one process: seconds, products, bytes, and memory of a worker.

Each worker makes its own part of the table from the program: four actions, eight random successors
at most ten places away on a ring (`ring`) or anywhere (`random`), random weights and rewards, all
functions of the state. Solved without a horizon at the default tolerance; then the same by one
process, and how far the two are apart, relative to the largest |V|.

    python tests/benchmarks/sharded_exact.py
    python tests/benchmarks/sharded_exact.py --states 100000 --workers 1 4 --family random
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from typing import Any

import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from inference_rl import EnvironmentModel, Exact, infer
from inference_rl.distributions import SparseCategorical
from inference_rl.inference import InferenceResult
from inference_rl.inference.exact_sharded import run_in_blocks
from inference_rl.scale_out.crew import Recipe
from inference_rl.scale_out.on_ray import connected
from inference_rl.scale_out.sharded_on_ray import RayCrew

ACTIONS, SUCCESSORS, WINDOW = 4, 8, 10


class Ring(EnvironmentModel):
    """Everything random is a hash of the state, the action and a number."""

    action_space = Discrete(ACTIONS)

    def __init__(self, states: int, discount: float, everywhere: bool) -> None:
        self.state_space, self.discount = Discrete(states), discount
        self.states, self.everywhere = states, everywhere

    def initial_state(self) -> SparseCategorical:
        return SparseCategorical(torch.tensor([0]), torch.tensor([1.0]), self.states)

    def transition(self, state: Tensor, action: Tensor) -> SparseCategorical:
        number = torch.arange(SUCCESSORS)
        key = ((state * ACTIONS + action) * 2 * SUCCESSORS).unsqueeze(-1) + number
        if self.everywhere:
            target = _hashed(key) % self.states
        else:
            away = _hashed(key) % (2 * WINDOW + 1) - WINDOW
            target = (state.unsqueeze(-1) + away) % self.states
        weight = _hashed(key + SUCCESSORS).double() + 1
        probs = weight / weight.sum(-1, keepdim=True)
        return SparseCategorical(target, probs, self.states)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        return _hashed(-1 - state * ACTIONS - action).double() / 2**31


def _hashed(key: Tensor) -> Tensor:
    """Whole numbers below 2^31 that look random (splitmix64's mixing, shifts made unsigned)."""
    key = key * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        key = (key ^ (key >> shift & (1 << 64 - shift) - 1)) * factor
    return (key ^ (key >> 31)) & (2**31 - 1)


class MeasuredCrew(RayCrew):
    """Asks its actors for their peak memory before it lets them go."""

    peak = 0.0

    def close(self) -> None:
        asked = [actor.__ray_call__.remote(lambda _: _peak()) for actor in self.actors]
        MeasuredCrew.peak = max(self._ray.get(asked))
        super().close()


def _peak() -> float:
    """GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _in_blocks(model: EnvironmentModel, routine: Exact, count: int) -> InferenceResult:
    def crew_of(recipe: Recipe, count: int) -> MeasuredCrew:
        return MeasuredCrew(recipe, count)

    return run_in_blocks(
        routine, model, prior=None, seed=0, progress=None, count=count, crew_of=crew_of
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--family", choices=["ring", "random"], default="ring")
    parser.add_argument("--discount", type=float, default=0.99)
    parser.add_argument("--temperature", type=float, default=0.1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    routine = Exact(temperature=options.temperature)
    print(f"{options.family}, discount {options.discount}, temperature {options.temperature}")
    print(
        "| states | workers | to start and tabulate, s | to solve and evaluate, s | exchanges | "
        "MB between workers | MB to and from the driver | peak of a worker, GB | V apart |"
    )
    print("|---" * 9 + "|")
    for states in options.states:
        model = Ring(states, options.discount, options.family == "random")
        found = []
        with connected(None, max(options.workers)):
            for count in options.workers:
                result = _in_blocks(model, routine, count)
                row: Any = result.details
                found.append((count, row, result.seconds, result.v, MeasuredCrew.peak))
        began = time.perf_counter()
        whole = infer(model, routine)
        solved = time.perf_counter() - began
        assert whole.parts is not None
        taken = time.perf_counter() - began
        scale = float(whole.v.abs().max())
        for count, row, seconds, v, peak in found:
            apart = float((v - whole.v).abs().max()) / scale
            print(
                f"| {states} | {count} | {row.seconds_to_tabulate:.1f} | "
                f"{seconds - row.seconds_to_tabulate:.1f} | {row.exchanges} | "
                f"{row.bytes_exchanged / 1e6:.3g} | {row.bytes_gathered / 1e6:.3g} | {peak:.2f} | "
                f"{apart:.1e} |",
                flush=True,
            )
        print(
            f"| {states} | one process | | {taken:.1f} in all, {taken - solved:.1f} of them to "
            f"evaluate | | | | {_peak():.2f} | |",
            flush=True,
        )
    load = " ".join(f"{part:.1f}" for part in os.getloadavg())
    print(f"{os.cpu_count()} cores, load {load}")


if __name__ == "__main__":
    main()
