"""Control messages of a model that is cut into blocks: the same solver, with its parts elsewhere.

Without a horizon Newton's method is `inference_rl.fixed_point.newton`, as it stands: the operator
and the linear solver it is given are those of all blocks together, and so the certificate is the
same too.

1. T V: every block gets its own part of V, hands out what others need, and backs up its states.
2. (I - J) x = T V - V: GMRES (Saad and Schultz 1986, doi:10.1137/0907058), anew after `BASIS`
   vectors, orthogonalised twice. Each product with J is an exchange of halos; inner products are
   added up in the order of the blocks, whatever the order in which they come.
3. It is preconditioned from the right by the blocks' own (I - J_bb)^{-1} (block Jacobi) where they
   have cheap factors, as along lines and in sheets. Then it has to find no more than how the blocks
   depend on one another, at any discount.
4. With a horizon: one exchange for each step, exact from the last one back.

This process holds V and a few vectors of its length, and no table. All it asks for is a function of
those: where a worker is lost, its block is made again and the question is put again, so that the
answer is the same to the last bit.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np

from inference_rl.finite_messages import rounding_of_steps
from inference_rl.fixed_point import FixedPoint, Progress, newton
from inference_rl.policy_evaluation import refined
from inference_rl.scale_out.crew import BlocksLost, Crew
from inference_rl.scale_out.state_block import BASIS
from inference_rl.scale_out.workers import WorkersLost

Result = TypeVar("Result")

MOST_RECOVERIES = 20
"""Losses of workers in one run after which it is given up."""

_ITERATIONS = 400
"""Basis vectors of one linear system."""

_SUMMED = 1e-12
"""Accuracy of the sums along a policy."""

_ACCURACY = 0.01
"""Of a Newton step. Closer than asked for: products cost less here than steps, which factorise."""


@dataclasses.dataclass(frozen=True)
class ShardedMessages:
    """Control messages, gathered: reward units.

    :ivar q, policy: (S, A), or (T, S, A). :ivar v: (S,), or (T + 1, S).
    :ivar sums: (S, 4) discounted sums of `policy_rates` along the policy, from the first step on.
    :ivar error_bound, iterations, residual: as of `FixedPoint`.
    """

    q: np.ndarray
    v: np.ndarray
    policy: np.ndarray
    sums: np.ndarray
    error_bound: float
    iterations: int
    residual: float


class Shards:
    """All blocks of a model, as the process that asks them sees them.

    :param edges: (B + 1,), as for `StateBlock`.
    :ivar terminal: (S,). :ivar halo: entries that an exchange carries between blocks.
    :ivar exchanges: of halos. :ivar bytes_exchanged: between blocks, those that say which entries
        are needed included. :ivar bytes_gathered: between blocks and this process.
    :ivar recoveries: blocks that were made again.
    """

    def __init__(self, crew: Crew, edges: np.ndarray) -> None:
        self.crew, self.edges = crew, edges
        self.exchanges = self.bytes_exchanged = self.bytes_gathered = self.recoveries = 0
        self.halo = self.widest = 0
        self.largest_reward = 0.0
        self.terminal = np.empty(0, dtype=bool)
        self._prepared: PolicyMatrix | None = None
        self._begun = False
        self.surviving(self._begin)

    @property
    def states(self) -> int:
        return int(self.edges[-1])

    def surviving(self, work: Callable[[], Result]) -> Result:
        """`work()`, put again after every loss of a worker.

        :warns UserWarning: of each. :raises WorkersLost: more than `MOST_RECOVERIES` were lost.
        """
        lost: BlocksLost | None = None
        while True:
            try:
                if lost is not None:
                    self._recover(lost)
                return work()
            except BlocksLost as error:
                lost = error

    def _recover(self, lost: BlocksLost) -> None:
        self.recoveries += max(len(lost.numbers), 1)
        if self.recoveries > MOST_RECOVERIES:
            raise WorkersLost(
                f"workers: expected at most {MOST_RECOVERIES} to be lost in one run, got "
                f"{self.recoveries}, the last one because {lost}; see to the machines, or to the "
                "memory that a block takes"
            ) from lost
        which = ", ".join(map(str, lost.numbers)) or "none"
        warnings.warn(f"workers: blocks lost and made again: {which} ({lost})", stacklevel=2)
        self._prepared = None
        self.crew.replace(lost.numbers)
        self._link()

    def _begin(self) -> None:
        if not self._begun:  # or else those that were lost have been made since
            self._begun = True
            self.crew.replace(range(self.crew.count))
            self._link()

    def _link(self) -> None:
        """Let every block know what the others need of it."""
        count = self.crew.count
        self.crew.routes = [[b for b in range(count) if b != block] for block in range(count)]
        self.crew.routes = self.crew.exchange("ask_for", [(count,)] * count, "note")
        terminal, halo, widest, reward = zip(*self._ask("describe"), strict=True)
        self.terminal = np.concatenate(terminal)
        self.halo, self.widest, self.largest_reward = sum(halo), max(widest), max(reward)
        self.bytes_exchanged += 8 * self.halo
        self.bytes_gathered += self.terminal.nbytes

    def _ask(self, method: str, *same: Any) -> list[Any]:
        return self.crew.ask(method, [same] * self.crew.count)

    def _exchange(self, send: str, *same: Any, receive: str) -> list[Any]:
        self._count(1)
        return self.crew.exchange(send, [same] * self.crew.count, receive)

    def _count(self, vectors: int) -> None:
        self.exchanges += 1
        self.bytes_exchanged += 8 * self.halo * vectors

    def _parts(self, vector: np.ndarray) -> list[tuple[np.ndarray]]:
        self.bytes_gathered += vector.nbytes
        ranges = zip(self.edges[:-1], self.edges[1:], strict=True)
        return [(vector[..., low:high],) for low, high in ranges]

    def _whole(self, parts: tuple[np.ndarray, ...] | list[np.ndarray], axis: int) -> np.ndarray:
        whole = np.concatenate(parts, axis=axis)
        self.bytes_gathered += whole.nbytes
        return whole

    def allowed(self) -> np.ndarray:
        """Which actions the prior allows, (S, A)."""
        return self._whole(self._ask("allowed"), 0)

    def seen(self, vector: np.ndarray, receive: str) -> list[Any]:
        """What a method of the blocks makes of a vector (S,), or some (c, S)."""
        self._count(vector.size // self.states)
        return self.crew.exchange("send", self._parts(vector), receive)

    # ---- without a horizon -----------------------------------------------------------------------

    def back_up(self, value: np.ndarray) -> tuple[np.ndarray, float]:
        """T V, and a bound on its rounding."""
        parts, roundings = zip(*self.seen(value, "back_up"), strict=True)
        return self._whole(parts, 0), max(roundings)

    def slope(self) -> tuple[float, float]:
        """Least and largest sum of a row of T's derivative, non-terminal rows only."""
        least, most = zip(*self._ask("slope"), strict=True)
        return min(least), max(most)

    def conclude(self, value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Q and π (S, A), and the rates of π (S, 4)."""
        q, policy, rates = zip(*self.seen(value, "conclude"), strict=True)
        return self._whole(q, 0), self._whole(policy, 0), self._whole(rates, 0)

    def prepare(self, matrix: PolicyMatrix) -> None:
        """Let the blocks hold J; they may hold it already."""
        if self._prepared is matrix:
            return
        self.seen(matrix.value, "back_up" if matrix.policy == "best" else "conclude")
        self._ask("linearise", matrix.policy)
        self._prepared = matrix

    def multiply(self, vector: np.ndarray) -> np.ndarray:
        """J x."""
        return self._whole(self.seen(vector, "multiply"), 0)

    def solve(self, right: np.ndarray, accuracy: float) -> tuple[np.ndarray, int, bool]:
        """x whose residual is at most `accuracy` times that of zero, or the best there is; the
        products with J that it took; and whether it is that accurate.
        """
        first = left = _norm(self.crew.ask("begin", self._parts(right)))
        used = products = 0
        while left > accuracy * first and used < _ITERATIONS:
            before = left
            coordinates = self._krylov(left, accuracy * first)
            squares = self._exchange("improve", coordinates, receive="leftover")
            left = _norm(squares)
            used += coordinates.size
            products += coordinates.size + 1
            if not left < before:
                break
        return self._whole(self._ask("solution"), 0), products, left <= accuracy * first

    def _krylov(self, left: float, target: float) -> np.ndarray:
        """Coordinates of the step that leaves the least, in at most `BASIS` vectors."""
        heights = np.zeros((BASIS + 1, BASIS))
        right = np.zeros(BASIS + 1)
        right[0] = norm = left
        along = coordinates = np.empty(0)
        for number in range(BASIS):
            shares = self._exchange("direction", number, along, norm, receive="image")
            first = _sum(shares)
            *again, square = _sum(self._ask("orthogonalise", first))
            along = np.array(again)
            # The image without what the second round takes from it, which is next to nothing.
            norm = float(np.sqrt(max(square - along @ along, 0.0)))
            heights[: number + 1, number] = first + along
            heights[number + 1, number] = norm
            rows = slice(number + 2)
            system = heights[rows, : number + 1]
            coordinates = np.asarray(np.linalg.lstsq(system, right[rows], rcond=None)[0])
            over = float(np.linalg.norm(right[rows] - system @ coordinates))
            if over <= target or norm <= 1e-15 * float(np.linalg.norm(first)):
                break
        return coordinates

    # ---- with one --------------------------------------------------------------------------------

    def step(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """A step backwards, as `StateBlock.step`."""
        before, q, policy, largest = zip(*self.seen(columns, "step"), strict=True)
        return self._whole(before, 1), self._whole(q, 0), self._whole(policy, 0), max(largest)


class PolicyMatrix:
    """discount · P under a policy, (S, S), held by the blocks: by reference.

    :param policy: best against `value`, or the one concluded from it.
    """

    def __init__(
        self, shards: Shards, value: np.ndarray, policy: Literal["best", "concluded"]
    ) -> None:
        self.shards, self.value, self.policy = shards, value, policy

    def __matmul__(self, vector: np.ndarray) -> np.ndarray:
        def product() -> np.ndarray:
            self.shards.prepare(self)
            return self.shards.multiply(vector)

        return self.shards.surviving(product)


class ShardedBackup:
    """T of all blocks: a `BellmanOperator`."""

    def __init__(self, shards: Shards) -> None:
        self._shards, self.terminal = shards, shards.terminal
        self.slope = shards.surviving(shards.slope)
        self._rounding = 0.0

    def __call__(self, value: np.ndarray) -> np.ndarray:
        backed_up, self._rounding = self._shards.surviving(lambda: self._shards.back_up(value))
        return backed_up

    def rounding(self, value: np.ndarray, backed_up: np.ndarray) -> float:
        return self._rounding

    def derivative(self, value: np.ndarray, backed_up: np.ndarray) -> PolicyMatrix:
        return PolicyMatrix(self._shards, value, "best")


class ShardedEvaluation:
    """GMRES over all blocks: what Newton's method evaluates policies by."""

    mixing = False

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self.direct = True
        """Whether the last solution was as accurate as it was asked to be."""
        self._sweeps_left = self._sweeps = 0
        self.products = 0

    @property
    def sweeping(self) -> bool:
        return self._sweeps_left > 0

    def __call__(
        self, linearise: Callable[[], PolicyMatrix], right: np.ndarray, *, accuracy: float
    ) -> np.ndarray:
        if self._sweeps_left > 0:
            self._sweeps_left -= 1
            return right
        return self.solve(linearise(), right, accuracy=min(accuracy, _ACCURACY))

    def solve(self, matrix: PolicyMatrix, right: np.ndarray, *, accuracy: float) -> np.ndarray:
        size = float(np.abs(right).max(initial=0.0))
        if size == 0 or not np.isfinite(size):
            return np.zeros_like(right)

        def solution() -> tuple[np.ndarray, int, bool]:
            self._shards.prepare(matrix)
            # Huge and tiny rewards: the squares in inner products would overflow or vanish.
            return self._shards.solve(right / size, accuracy)

        found, products, self.direct = self._shards.surviving(solution)
        self.products += products
        return found * size

    def retreat(self) -> None:
        self._sweeps_left = self._sweeps = max(8, 2 * self._sweeps)


def endless_messages(
    shards: Shards, temperature: float, tolerance: float, progress: Progress | None
) -> ShardedMessages:
    """Control messages without a horizon, at a discount below one.

    :param temperature: of the blocks, reward units.
    :param tolerance: error of V at which to stop, relative to its largest entry.
    """
    evaluate = ShardedEvaluation(shards)
    start = np.zeros(shards.states)
    point: FixedPoint = newton(ShardedBackup(shards), evaluate, start, 0.0, tolerance, progress)
    q, policy, rates = shards.surviving(lambda: shards.conclude(point.value))
    matrix = PolicyMatrix(shards, point.value, "concluded")

    def summed(rate: np.ndarray) -> np.ndarray:
        rate = np.ascontiguousarray(rate)
        return refined(evaluate, matrix, rate, accuracy=_SUMMED, enough=10 * _SUMMED)

    _, *others = rates.T
    entropy, divergence, steps = map(summed, others)
    # V is what is paid less what the divergence costs, and known better than any sum.
    sums = (point.value + temperature * divergence, entropy, divergence, steps)
    return ShardedMessages(
        q=q,
        v=point.value,
        policy=policy,
        sums=np.stack(sums, axis=-1),
        error_bound=float(point.error_bound),
        iterations=point.iterations,
        residual=float(point.residual),
    )


def finite_messages(shards: Shards, discount: float, horizon: int) -> ShardedMessages:
    """Control messages of a finite horizon, and a bound on their rounding."""
    columns = np.zeros((5, shards.states))
    v = [columns[0]]
    q: list[np.ndarray] = []
    policy: list[np.ndarray] = []
    bound = 0.0
    for _ in range(horizon):
        columns, *tables, largest = shards.surviving(partial(shards.step, columns))
        for table, history in zip((columns[0], *tables), (v, q, policy), strict=True):
            history.append(table)
        size = max(shards.largest_reward, float(np.abs(columns[0]).max()), largest)
        bound = rounding_of_steps(bound, discount, shards.widest, size)
    return ShardedMessages(
        q=np.stack(q[::-1]),
        v=np.stack(v[::-1]),
        policy=np.stack(policy[::-1]),
        sums=columns[1:].T,
        error_bound=bound,
        iterations=horizon,
        residual=0.0,
    )


def _sum(parts: list[Any]) -> Any:
    """In the order of the blocks."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _norm(squares: list[float]) -> float:
    return float(np.sqrt(sum(squares)))
