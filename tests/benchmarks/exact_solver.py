"""Time `solve_control` beside QuantEcon's DiscreteDP and mdpsolver on the same tables.

Every solver is asked for a sup-norm error of 1e-6 and is verified against one reference. A peer's
own tolerance is first loosened as far as its verified error allows. Then ours and the peer run in
turn; the ratio printed is the median of the pairs' ratios, which a busy machine disturbs least.
Soft solves (temperature 0.1) are compared with the peers' hard solves: they have no other.

    python tests/benchmarks/exact_solver.py --quick
    python tests/benchmarks/exact_solver.py --sizes 10000 100000 --families ring random grid
    python tests/benchmarks/exact_solver.py --large
    python tests/benchmarks/exact_solver.py --memory
    python tests/benchmarks/exact_solver.py --bandwidth
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_array, csr_matrix

from inference_rl.bellman_operators import ControlBackup
from inference_rl.fixed_point import FixedPoint, solve_control

ACTIONS, SUCCESSORS, WINDOW, SLIP = 4, 8, 10, 0.1
ERROR = 1e-6
TEMPERATURES = (0.0, 0.1)


class Problem(NamedTuple):
    """Tables of one model."""

    transition: csr_array
    reward: np.ndarray
    terminal: np.ndarray


def ring(states: int, seed: int = 0) -> Problem:
    """Eight random successors at most ten places away on a ring, random weights and rewards."""
    rng = np.random.default_rng(seed)
    shape = (states, ACTIONS, SUCCESSORS)
    target = rng.integers(-WINDOW, WINDOW + 1, shape, dtype=np.int32)
    target += np.arange(states, dtype=np.int32)[:, None, None]
    target %= states
    return _closed(target, rng)


def scattered(states: int, seed: int = 0) -> Problem:
    """Eight successors drawn from all states, random weights and rewards."""
    rng = np.random.default_rng(seed)
    return _closed(rng.integers(0, states, (states, ACTIONS, SUCCESSORS), dtype=np.int32), rng)


def grid(states: int, seed: int = 0) -> Problem:
    """A square with one goal in a corner; moves slip sideways, each step costs one."""
    side = round(states**0.5)
    states = side * side
    row, column = np.divmod(np.arange(states), side)
    moves = [(0, 1), (1, 0), (0, -1), (-1, 0)]
    ahead = np.stack(
        [
            np.clip(row + down, 0, side - 1) * side + np.clip(column + right, 0, side - 1)
            for down, right in moves
        ],
        axis=1,
    )
    target = np.stack([ahead, np.roll(ahead, 1, axis=1), np.roll(ahead, -1, axis=1)], axis=2)
    probability = np.broadcast_to([1 - 2 * SLIP, SLIP, SLIP], target.shape)
    terminal = np.arange(states) == states - 1
    reward = np.where(terminal[:, None], 0.0, -np.ones((states, ACTIONS)))
    return Problem(_rows(target[:-1], probability[:-1], states), reward, terminal)


FAMILIES: dict[str, Callable[[int], Problem]] = {"ring": ring, "random": scattered, "grid": grid}


def _closed(target: np.ndarray, rng: np.random.Generator) -> Problem:
    states = target.shape[0]
    probability = rng.random(target.shape)
    probability /= probability.sum(axis=2, keepdims=True)
    reward = rng.random((states, ACTIONS))
    return Problem(_rows(target, probability, states), reward, np.zeros(states, dtype=bool))


def _rows(target: np.ndarray, probability: np.ndarray, states: int) -> csr_array:
    width = target.shape[2]
    starts = np.minimum(np.arange(states * ACTIONS + 1) * width, target.size).astype(np.int32)
    transition = csr_array(
        (probability.ravel(), target.ravel().astype(np.int32, copy=False), starts),
        shape=(states * ACTIONS, states),
    )
    transition.sum_duplicates()
    return transition


def solve(problem: Problem, discount: float, temperature: float, **options: Any) -> FixedPoint:
    log_prior = np.full(problem.reward.shape, -np.log(ACTIONS))
    return solve_control(
        problem.transition,
        problem.reward,
        log_prior,
        terminal=problem.terminal,
        discount=discount,
        temperature=temperature,
        **options,
    )


Peer = Callable[[float], np.ndarray]


def quantecon_peers(problem: Problem, discount: float) -> dict[str, Peer]:
    """Solvers as functions of their tolerance; the model is built once, outside the timing."""
    from quantecon.markov import DiscreteDP

    states = problem.terminal.size
    model = DiscreteDP(
        problem.reward.ravel(),
        _absorbing(problem),
        discount,
        np.repeat(np.arange(states), ACTIONS),
        np.tile(np.arange(ACTIONS), states),
    )

    def peer(method: str) -> Peer:
        return lambda epsilon: model.solve(method=method, epsilon=epsilon, max_iter=10**6).v

    names = {"modified_policy_iteration": "qe mpi", "policy_iteration": "qe pi"}
    names["value_iteration"] = "qe vi"
    return {label: peer(method) for method, label in names.items()}


def mdpsolver_peers(problem: Problem, discount: float) -> dict[str, Peer]:
    import mdpsolver

    matrix = _absorbing(problem)
    pairs = np.split(np.arange(matrix.shape[0]), problem.terminal.size)
    probabilities, columns = [], []
    for state in pairs:
        spans = [slice(matrix.indptr[row], matrix.indptr[row + 1]) for row in state]
        probabilities.append([matrix.data[span].tolist() for span in spans])
        columns.append([matrix.indices[span].tolist() for span in spans])
    model = mdpsolver.model()
    model.mdp(
        discount=discount,
        rewards=problem.reward.tolist(),
        tranMatProbs=probabilities,
        tranMatColumns=columns,
    )

    def modified_policy_iteration(tolerance: float) -> np.ndarray:
        # Gauss-Seidel updates were its fastest, and its threads only slow it down here.
        model.solve(
            algorithm="mpi",
            update="gs",
            parallel=False,
            tolerance=tolerance,
            initPolicy=[0] * problem.terminal.size,
            initValueVector=[0.0] * problem.terminal.size,
            postProcessing=False,
            makeFinalCheck=False,
        )
        return np.array(model.getValueVector())

    return {"mdpsolver mpi": modified_policy_iteration}


def _absorbing(problem: Problem) -> csr_matrix:
    """The transition with a loop at terminal states, which the peers need."""
    loops = np.flatnonzero(problem.terminal)
    rows = (loops[:, None] * ACTIONS + np.arange(ACTIONS)).ravel()
    columns = np.repeat(loops, ACTIONS)
    extra = csr_array((np.ones(rows.size), (rows, columns)), shape=problem.transition.shape)
    return csr_matrix(problem.transition + extra)


def loosest(peer: Peer, reference: np.ndarray, limit: float) -> tuple[float | None, float, float]:
    """The loosest tolerance that verifies (None if none does in time), its error and seconds."""
    for tolerance in (1e-3, 1e-4, 2e-6, 1e-7, 1e-8):
        start = time.perf_counter()
        error = float(np.abs(peer(tolerance) - reference).max())
        seconds = time.perf_counter() - start
        if error <= ERROR:
            return tolerance, error, seconds
        if seconds > limit:
            break
    return None, error, seconds


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(
    sizes: list[int],
    discounts: list[float],
    families: list[str],
    pairs: int,
    limit: float,
    among: list[str],
) -> None:
    """Print one line per problem and peer, of those named in `among` (all if empty)."""
    warm_up = ring(100)
    for peer in quantecon_peers(warm_up, 0.9).values():
        peer(1e-3)
    columns = (
        "problem  size  discount  temperature | ours s  verified error | peer  s  error | ratio"
    )
    print(columns)
    spent: dict[tuple[str, str, float], float] = {}
    for size in sizes:
        for family in families:
            problem = FAMILIES[family](size)
            for discount in discounts:
                reference = solve(problem, discount, 0.0, relative=1e-15).value
                peers = quantecon_peers(problem, discount)
                if size <= 10_000:
                    peers |= mdpsolver_peers(problem, discount)
                if family == "random" and size > 3000:
                    del peers["qe pi"]  # its factors fill in: minutes and gigabytes
                timed = {}
                for name, peer in peers.items():
                    if among and name not in among:
                        continue
                    # Ten times the states takes at least ten times as long.
                    if spent.get((family, name, discount), 0.0) > limit / 10:
                        continue
                    tolerance, error, spent[family, name, discount] = loosest(
                        peer, reference, limit
                    )
                    if tolerance is None:
                        print(f"{family} {size} {discount} {name}: not within 1e-6 in time")
                    else:
                        timed[name] = (peer, tolerance, error)
                for temperature in TEMPERATURES:
                    _race(family, size, problem, discount, temperature, timed, pairs)


def _race(
    family: str,
    size: int,
    problem: Problem,
    discount: float,
    temperature: float,
    peers: dict[str, tuple[Peer, float, float]],
    pairs: int,
) -> None:
    def ours() -> FixedPoint:
        return solve(problem, discount, temperature, absolute=ERROR, relative=0.0)

    reference = solve(problem, discount, temperature, relative=1e-15).value
    error = float(np.abs(ours().value - reference).max())
    rows = []
    for name, (peer, tolerance, peer_error) in peers.items():
        mine, theirs = [], []
        for _ in range(pairs):
            mine.append(seconds_of(ours))
            theirs.append(seconds_of(lambda: peer(tolerance)))  # noqa: B023
        ratio = median(their / my for my, their in zip(mine, theirs, strict=True))
        rows.append((ratio, name, median(theirs), peer_error, median(mine)))
    if not rows:
        rows.append((np.nan, "no peer in time", np.nan, np.nan, seconds_of(ours)))
    for ratio, name, theirs, peer_error, mine in sorted(rows):
        print(
            f"{family:6s} {size:8d} {discount:7g} {temperature:4g} | {mine:9.4f} {error:8.1e} | "
            f"{name:15s} {theirs:9.4f} {peer_error:8.1e} | {ratio:6.2f}",
            flush=True,
        )


def large() -> None:
    """Sizes at which no peer finishes in minutes."""
    for family, size, discounts in (
        ("ring", 100_000, (0.999, 0.9999)),
        ("ring", 1_000_000, (0.99,)),
        ("random", 1_000_000, (0.99,)),
        ("grid", 1_000_000, (0.99,)),
    ):
        problem = FAMILIES[family](size)
        for discount in discounts:
            for temperature in TEMPERATURES:
                start = time.perf_counter()
                found = solve(problem, discount, temperature, absolute=ERROR, relative=0.0)
                print(
                    f"{family} {size} {discount} {temperature}: "
                    f"{time.perf_counter() - start:.2f} s, bound {found.error_bound:.1e}, "
                    f"{found.iterations} steps, {found.backups} passes",
                    flush=True,
                )


def memory() -> None:
    """Peak memory of building and solving a ring of a million states, discount 0.99."""
    problem = ring(1_000_000)
    print(f"after building: {_peak():.2f} GB")
    for temperature in TEMPERATURES:
        found = solve(problem, 0.99, temperature, absolute=ERROR, relative=0.0)
        print(f"temperature {temperature}: {_peak():.2f} GB, bound {found.error_bound:.1e}")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def bandwidth() -> None:
    """Seconds per backup over the seconds that reading the transition's arrays takes."""
    problem = ring(1_000_000)
    even = problem.transition.nnz // 2 * 2
    arrays = (problem.transition.data[:even], problem.transition.indices[:even])
    value = np.random.default_rng(0).random(problem.terminal.size)
    for temperature in TEMPERATURES:
        operator = ControlBackup(
            problem.transition,
            problem.reward,
            np.full(problem.reward.shape, -np.log(ACTIONS)),
            np.ones(1),
            terminal=problem.terminal,
            discount=0.99,
            temperature=temperature,
        )
        ratios = []
        for _ in range(15):
            # A maximum is vectorised, and so bound by memory.
            read = sum(seconds_of(array.view(np.int64).max) for array in arrays)
            ratios.append(seconds_of(lambda: operator(value)) / read)  # noqa: B023
        print(f"temperature {temperature}: backup / read = {median(ratios):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--discounts", type=float, nargs="+", default=[0.99, 0.999, 0.9999])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--pairs", type=int, default=5, help="alternating runs per peer")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds a peer may take")
    parser.add_argument("--peers", nargs="+", default=[], help='such as "qe pi"; all if not given')
    parser.add_argument("--quick", action="store_true", help="size 1000, two pairs")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--bandwidth", action="store_true")
    options = parser.parse_args()
    if options.memory:
        memory()
    elif options.bandwidth:
        bandwidth()
    elif options.large:
        large()
    elif options.quick:
        compare([1000], options.discounts, options.families, 2, options.limit, options.peers)
    else:
        compare(
            options.sizes,
            options.discounts,
            options.families,
            options.pairs,
            options.limit,
            options.peers,
        )


if __name__ == "__main__":
    main()
