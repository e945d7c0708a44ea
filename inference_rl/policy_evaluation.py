"""Solve (I - J) x = b, where J is discount times a policy's transition matrix.

Which method is best depends on the graph, and the graph is not known beforehand, so the methods are
tried from the cheapest to the surest, and one that is too slow is not tried again:

1. few states: dense LU.
2. policies mix fast: sum the series b + J b + J² b + ... until what is left is a constant. Where
   they mix at once, plain backups do as well, and J is never formed.
3. every state sees only its neighbours along a line or a ring: reverse Cuthill-McKee, banded LU.
   A discount near one costs nothing here.
4. sheets, and up to a thousand states of any shape: sparse LU (SuperLU).
5. otherwise: BiCGStab (van der Vorst 1992).

In a large sheet with an end, plain sweeps go first: often they find the way out before any solve.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Any, Protocol

import numpy as np
from scipy.linalg import lapack
from scipy.sparse import csc_array, csr_array, eye_array
from scipy.sparse.linalg import LinearOperator, bicgstab, splu

from inference_rl.banded import BandOrder, TwistedFactors
from inference_rl.bellman_operators import LinearMap, StateBlocks

_DENSE_STATES = 300
_MIXED = 0.6
_SERIES_TERMS = 60
_SLOW = 0.85
_SETTLING = 0.01
_SMALL_STATES = 4096
_SPARSE_STATES = 1024
_SHEET_STATES = 200_000
_KRYLOV_ITERATIONS = 400
_BAND_BYTES = 1.2e9
_BAND_WIDTH = 300
_SWEEPS_PER_LAYER = 4
_REFINEMENTS = 50


class _Method(Enum):
    DENSE = auto()
    SERIES = auto()
    BANDED = auto()
    SPARSE = auto()
    KRYLOV = auto()


class Evaluation(Protocol):
    """What Newton's method needs of whoever solves its linear systems; see `PolicyEvaluation`."""

    products: int

    @property
    def direct(self) -> bool: ...

    @property
    def sweeping(self) -> bool: ...

    @property
    def mixing(self) -> bool: ...

    def __call__(
        self, linearise: Callable[[], Any], right: np.ndarray, *, accuracy: float
    ) -> np.ndarray: ...

    def solve(self, matrix: Any, right: np.ndarray, *, accuracy: float) -> np.ndarray: ...

    def retreat(self) -> None: ...


class PolicyEvaluation:
    """Solver of (I - J) x = b for a family of matrices J on the same graph.

    :param graph: every transition of the model under any action, (S, S) CSR; values are not used.
    :param closed: no state ends the episode, so that J 1 = discount · 1.
    """

    def __init__(self, graph: csr_array, *, discount: float, closed: bool) -> None:
        self._graph, self._discount, self._closed = graph, discount, closed
        self._method: _Method = _Method.SERIES
        if graph.shape[0] <= _DENSE_STATES:
            self._method = _Method.DENSE
        self._sweeps_left = self._sweeps = 0
        self._may_sweep = False
        self._mixing = closed and discount < 1 and self._method is _Method.SERIES
        self._backups, self._recent_spread = 0, np.inf
        self._factors: TwistedFactors | None = None
        self._factorised = False
        self._last_size = np.inf
        self.products = 0
        """Products with J so far."""

    @property
    def direct(self) -> bool:
        """Whether solutions are exact up to rounding."""
        return self._method in (_Method.DENSE, _Method.BANDED, _Method.SPARSE)

    @property
    def sweeping(self) -> bool:
        """Whether Newton steps are plain backups for now."""
        return self._sweeps_left > 0

    @property
    def mixing(self) -> bool:
        """Whether Newton steps are plain backups, and all values still approach one another."""
        return self._mixing

    def __call__(
        self, linearise: Callable[[], csr_array], right: np.ndarray, *, accuracy: float
    ) -> np.ndarray:
        """A Newton step: `solve`, or b itself while sweeping, when J is not even formed."""
        if self._mixing:
            self._watch_mixing(right)
        if self._mixing:
            # J b is not known, but a constant is its own image but for the discount.
            middle = (right.max() + right.min()) / 2
            return right + self._discount / (1 - self._discount) * middle
        if self._sweeps_left > 0:
            self._sweeps_left -= 1
            return right
        size = float(np.abs(right).max(initial=0.0))
        reuse, self._last_size = size <= _SETTLING * self._last_size, size
        if reuse and self._factorised:
            # So near the fixed point J hardly changes, and new factors cost far more than its last.
            assert self._factors is not None
            return self._factors.solve(right)
        self._may_sweep = True
        step = self.solve(linearise(), right, accuracy=accuracy)
        self._may_sweep = False
        return step

    def solve(self, matrix: csr_array, right: np.ndarray, *, accuracy: float) -> np.ndarray:
        """x of shape (S,) whose residual is about `accuracy` times that of x = 0; best effort."""
        size = float(np.abs(right).max(initial=0.0))
        if size == 0 or not np.isfinite(size):
            return np.zeros_like(right)
        # Huge and tiny rewards: the squares in inner products would overflow or vanish.
        return self._solve(matrix, right / size, accuracy) * size

    def _solve(self, matrix: csr_array, right: np.ndarray, accuracy: float) -> np.ndarray:
        by_method = {
            _Method.DENSE: self._dense,
            _Method.SERIES: self._series,
            _Method.BANDED: self._banded,
            _Method.SPARSE: self._sparse,
            _Method.KRYLOV: self._krylov,
        }
        return by_method[self._method](matrix, right, accuracy)

    def retreat(self) -> None:
        """Newton steps do not help from here: sweep for a while, longer each time."""
        self._sweeps_left = self._sweeps = max(8, 2 * self._sweeps)

    def _watch_mixing(self, change: np.ndarray) -> None:
        """Stop plain backups unless the last two shrank the spread of their changes fast."""
        if self._backups % 2 == 0:
            spread = self._spread(change)
            # Noise dies out at once everywhere: only what comes after it tells the rate.
            if self._backups > 4 and spread > _MIXED**2 * self._recent_spread:
                self._mixing = False
                if spread > _SLOW**2 * self._recent_spread:
                    self._choose_slow()
            self._recent_spread = spread
        self._backups += 1

    def _dense(self, matrix: csr_array, right: np.ndarray, accuracy: float) -> np.ndarray:
        system = np.eye(right.size) - matrix.toarray()
        *_, solution, failed = lapack.dgesv(system, right)
        return np.zeros_like(right) if failed else solution

    def _series(self, matrix: csr_array, right: np.ndarray, accuracy: float) -> np.ndarray:
        rows = StateBlocks(matrix, 1)
        solution, term = right.copy(), right
        recent = spread = first = self._spread(right)
        for count in range(1, _SERIES_TERMS + 1):
            term = rows.multiply(term)
            self.products += 1
            spread = self._spread(term)
            if spread <= accuracy * first:
                break
            solution += term
            if count % 4 == 0:
                # Noise dies out at once everywhere: only what comes after it tells the rate.
                if count > 4 and spread > _SLOW**4 * recent and self._method is _Method.SERIES:
                    self._choose_slow()
                    if self._may_sweep and self._sweeps_left > 0:
                        return right
                    return self._solve(matrix, right, accuracy)
                recent = spread
        if self._closed and self._discount < 1:
            # The rest of the series, were its terms constant from here on.
            middle = (term.max() + term.min()) / 2
            solution += middle / (1 - self._discount)
        return solution

    def _spread(self, vector: np.ndarray) -> float:
        if self._closed:
            return float(vector.max() - vector.min()) / 2
        return float(np.abs(vector).max())

    def _krylov(self, matrix: csr_array, right: np.ndarray, accuracy: float) -> np.ndarray:
        rows = StateBlocks(matrix, 1)

        def apply(vector: np.ndarray) -> np.ndarray:
            self.products += 1
            return vector - rows.multiply(vector)

        system = LinearOperator(matrix.shape, matvec=apply, dtype=np.float64)
        solution, _ = bicgstab(system, right, rtol=accuracy, atol=0.0, maxiter=_KRYLOV_ITERATIONS)
        left = right - apply(solution)
        if np.isfinite(left).all() and self._spread(left) < self._spread(right):
            return solution
        return self._series(matrix, right, accuracy)

    def _choose_slow(self) -> None:
        order, states = BandOrder(self._graph), self._graph.shape[0]
        self._method = _direct_method(order) or _Method.KRYLOV
        if self._method is _Method.BANDED:
            self._factors = TwistedFactors(order)
        elif states > _SMALL_STATES and not self._closed:
            # What ends the episode is felt one step further away per sweep, and often that is all
            # there is to it: a shortest path is found without solving for any other.
            self._sweeps_left = self._sweeps = _SWEEPS_PER_LAYER * (states // order.layer)

    def _sparse(self, matrix: csr_array, right: np.ndarray, accuracy: float) -> np.ndarray:
        factors = _sparse_factors(matrix)
        return np.zeros_like(right) if factors is None else factors.solve(right)

    def _banded(self, matrix: csr_array, right: np.ndarray, accuracy: float) -> np.ndarray:
        assert self._factors is not None
        self._factorised = self._factors.factorise(matrix)
        if not self._factorised:
            return self._sparse(matrix, right, accuracy)
        return self._factors.solve(right)


class PartFactors:
    """(I - J)^{-1} of a part of the states, where it is cheap; elsewhere the identity in its place.

    :param graph: every transition within the part under any action, (n, n) CSR.
    """

    def __init__(self, graph: csr_array) -> None:
        order = BandOrder(graph)
        method = _direct_method(order)
        self.direct = method is not None
        """Whether `factorise` does anything."""
        self._banded = TwistedFactors(order) if method is _Method.BANDED else None
        self._solve: Callable[[np.ndarray], np.ndarray] | None = None

    def factorise(self, matrix: csr_array) -> None:
        """Replace the factors by those of I - `matrix`, (n, n), with the entries of the graph."""
        if self._banded is not None and self._banded.factorise(matrix):
            self._solve = self._banded.solve
            return
        factors = _sparse_factors(matrix)
        self._solve = None if factors is None else factors.solve

    def __call__(self, right: np.ndarray) -> np.ndarray:
        return right if self._solve is None else self._solve(right)


def _direct_method(order: BandOrder) -> _Method | None:
    """How to factorise I - J on this graph, if that is cheap at all."""
    states = order.place.size
    if (
        order.below + order.above <= _BAND_WIDTH
        and order.bytes <= _BAND_BYTES
        and 3 * order.width <= states
    ):
        return _Method.BANDED
    # Those of a sheet stay sparse.
    sheet = order.layer**2 <= 4 * states and states <= _SHEET_STATES
    return _Method.SPARSE if states <= _SPARSE_STATES or sheet else None


def _sparse_factors(matrix: csr_array) -> Any:
    """SuperLU's factors of I - `matrix`; None if it is singular."""
    try:
        # Rows of I - J are diagonally dominant: pivoting would only spoil the ordering.
        return splu(csc_array(eye_array(matrix.shape[0]) - matrix), diag_pivot_thresh=0.0)
    except RuntimeError:
        return None


def refined(
    evaluate: Evaluation,
    matrix: LinearMap,
    right: np.ndarray,
    *,
    accuracy: float = 1e-8,
    enough: float = 1e-14,
) -> np.ndarray:
    """x = b + J x, (S,): solved to `accuracy`, and then for what is left of it, until that is at
    most `enough` times the largest |x|.
    """
    total, left = np.zeros_like(right), right
    for _ in range(_REFINEMENTS):
        total = total + evaluate.solve(matrix, left, accuracy=accuracy)
        left = right - total + matrix @ total
        if np.abs(left).max() <= enough * np.abs(total).max():
            break
    return total
