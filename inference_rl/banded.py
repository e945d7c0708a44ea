"""Direct solution of (I - J) x = b, where every state sees only its neighbours along a line.

In the right order of states such a matrix is banded. It is factorised from both ends at once, by
two threads that meet in a separator as wide as the band: a twisted factorisation (van der Vorst
1987, doi:10.1016/0167-8191(87)90024-4). Written K = I - J over the first half A, the second half B
in reverse, and the separator S between them,

        [ K_AA    0    K_AS ]         K_AA = U' L' is the transpose of an LU factorisation,
    K = [  0    K_BB   K_BS ]         G_A = K_SA L'^{-1},  H_A = U'^{-1} K_AS,
        [ K_SA  K_SB   K_SS ]         Schur = K_SS - G_A H_A - G_B H_B.

K_AS and K_SA reach no further than the last states of A, and so do G_A and H_A.

Rows of J are non-negative and sum to at most one, so that the columns of K' are diagonally dominant
and LAPACK, which factorises K', has no reason to interchange rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg import cython_blas, cython_lapack, lapack, solve_triangular
from scipy.sparse import csr_array, csr_matrix
from scipy.sparse.csgraph import reverse_cuthill_mckee

from inference_rl.bellman_operators import side_by_side

_RECENTRINGS = 2
_ENTRIES_AT_ONCE = 1 << 18
_THREAD_STATES = 5_000


def _routine(module: Any, name: str, arguments: int) -> Callable[..., None]:
    """A BLAS or LAPACK routine, called without holding Python's lock as SciPy's own wrappers do."""
    capsule = module.__pyx_capi__[name]
    describe = ctypes.pythonapi.PyCapsule_GetName
    describe.restype, describe.argtypes = ctypes.c_char_p, [ctypes.py_object]
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)
    return prototype(address(capsule, describe(capsule)))


_dgbtrf = _routine(cython_lapack, "dgbtrf", 8)
_dtbsv = _routine(cython_blas, "dtbsv", 9)


class BandOrder:
    """An order of states in which a graph is banded.

    :param graph: (S, S) CSR; its values are not used, and it may repeat entries.
    :ivar place: (S,), of each state in the order.
    :ivar below, above: by how much a state's place exceeds the least of its successors', and the
        greatest of theirs its own.
    """

    def __init__(self, graph: csr_array) -> None:
        order = reverse_cuthill_mckee(csr_matrix(graph), symmetric_mode=True)
        place = np.argsort(order).astype(np.int32)
        starts, columns = graph.indptr, graph.indices
        if (np.diff(starts) > 0).all():
            # A state belongs midway between the ends of its reach: a band a quarter narrower.
            for _ in range(_RECENTRINGS):
                reach = place[columns]
                middle = np.minimum.reduceat(reach, starts[:-1])
                middle += np.maximum.reduceat(reach, starts[:-1])
                order = np.argsort(middle, kind="stable")
                place[order] = np.arange(order.size, dtype=np.int32)
        offset = np.repeat(place, np.diff(starts))
        offset -= place[columns]
        self.place = place
        self.below, self.above = int(offset.max(initial=0)), int(-offset.min(initial=0))

    @property
    def width(self) -> int:
        return max(self.below, self.above, 1)

    @property
    def layer(self) -> int:
        """How many states see one another across, at most."""
        return max(min(self.below, self.above), 1)

    @property
    def bytes(self) -> int:
        """What the factors of a matrix take."""
        return 8 * (3 * self.width + 1) * self.place.size


class TwistedFactors:
    """Factors of I - J, one J after another on the graph of `order`.

    :param order: at least three times as many states as its width.
    """

    def __init__(self, order: BandOrder) -> None:
        size, width = order.place.size, order.width
        self._first = (size - width) // 2
        self._separator = slice(self._first, self._first + width)
        self._place = order.place.astype(np.int64)
        backwards = self._place >= self._separator.stop
        self._sign = np.where(backwards, -1, 1)
        # Where each state's row of K is stored, as a column of K': A, the separator, B in reverse.
        turned = size - 1 + self._separator.stop - self._place
        self._column = np.where(backwards, turned, self._place)
        self._band = np.empty((size, 3 * width + 1))
        parts = self._band[: self._first], self._band[self._separator.stop :]
        self._halves = tuple(_Half(part) for part in parts)
        self._map = side_by_side if size >= _THREAD_STATES else map

    def factorise(self, matrix: csr_array) -> bool:
        """Replace the factors by those of I - `matrix`, and tell whether there are any.

        There are none where it is singular, or so nearly that rounding alone spoils its dominance.

        :param matrix: J, (S, S) CSR, entries >= 0, rows sum to at most one. It may repeat entries.
        """
        self._store(matrix)
        if not all(self._map(_Half.factorise, self._halves)):
            return False
        left, middle, right = _rows_of_separator(self._band[self._separator])
        # B runs the other way, its states and so the order of its last ones.
        for half, into, flip in zip(self._halves, (left, right[:, ::-1]), (1, -1), strict=True):
            half.couple(into, flip)
            middle = middle - half.into @ half.out
        *self._schur, failed = lapack.dgetrf(middle)
        return not failed

    def _store(self, matrix: csr_array) -> None:
        """Write I - J: the row of each state in its `_column`, around the diagonal."""
        size, height = self._band.shape
        diagonal = height // 3 * 2
        origin = self._column * height + diagonal - self._sign * self._place
        flat = self._band.reshape(-1)

        def clear(columns: slice) -> None:
            self._band[columns, diagonal // 2 :] = 0.0
            self._band[columns, diagonal] = 1.0

        def fill(rows: slice) -> None:
            counts = np.diff(matrix.indptr[rows.start : rows.stop + 1])
            entries = slice(matrix.indptr[rows.start], matrix.indptr[rows.stop])
            position = self._place[matrix.indices[entries]]
            position *= np.repeat(self._sign[rows], counts)
            position += np.repeat(origin[rows], counts)
            np.subtract.at(flat, position, matrix.data[entries])

        # A few at a time: positions take much room.
        states = max(1, _ENTRIES_AT_ONCE * size // max(matrix.nnz, 1))
        parts = [slice(low, min(low + states, size)) for low in range(0, size, states)]
        list(self._map(clear, parts))
        list(self._map(fill, parts))

    def solve(self, right: np.ndarray) -> np.ndarray:
        """(I - J)^{-1} `right`, (S,)."""
        ordered = np.empty_like(right)
        ordered[self._column] = right
        ends = (ordered[: self._first], ordered[self._separator.stop :])
        list(self._map(_Half.forward, self._halves, ends))
        middle = ordered[self._separator]
        for half, end in zip(self._halves, ends, strict=True):
            middle = middle - half.into @ end[-half.width :]
        middle, _ = lapack.dgetrs(*self._schur, middle)
        ordered[self._separator] = middle
        for half, end in zip(self._halves, ends, strict=True):
            end[-half.width :] -= half.out @ middle
        list(self._map(_Half.backward, self._halves, ends))
        return ordered[self._column]


class _Half:
    """LU factors of the transpose of a banded matrix, in LAPACK's storage.

    :param band: (n, 3 · width + 1): in row j, column j of the transpose; its diagonal at 2 · width,
        width entries after it and width entries before it, and before them room for pivoting.
    """

    def __init__(self, band: np.ndarray) -> None:
        self.band, self.width = band, band.shape[1] // 3
        self.into = self.out = np.empty(0)

    def factorise(self) -> bool:
        states, height = self.band.shape
        pivots, info = np.empty(states, dtype=np.int32), ctypes.c_int(0)
        n, width = _pointer(states), _pointer(self.width)
        # What couples the last states to the separator lies past the matrix's end: left as it is.
        _dgbtrf(n, n, width, width, self.band.ctypes.data, _pointer(height), pivots.ctypes.data,
                ctypes.byref(info))  # fmt: skip
        in_place = np.arange(1, states + 1, dtype=np.int32)
        return info.value == 0 and bool((pivots == in_place).all())

    def couple(self, into: np.ndarray, flip: int) -> None:
        """Set G = K_SA L'^{-1} and H = U'^{-1} K_AS on the last `width` states, from K_SA."""
        width, last = self.width, self.band[-self.width :]
        square = np.zeros((width, 2 * width))
        upper = np.zeros((width, width))
        for j in range(width):
            square[j, j : j + width + 1] = last[j, 2 * width :]
            upper[: j + 1, j] = last[j, 2 * width - j : 2 * width + 1]
        lower = np.tril(square[:, :width].T, -1)
        out = square[:, width:][:, ::flip]
        self.into = solve_triangular(lower, into.T, lower=True, unit_diagonal=True).T
        self.out = solve_triangular(upper, out, trans="T")

    def forward(self, vector: np.ndarray) -> None:
        """vector <- U'^{-1} vector."""
        self._substitute(b"U", b"N", self.width, vector)

    def backward(self, vector: np.ndarray) -> None:
        """vector <- L'^{-1} vector."""
        self._substitute(b"L", b"U", 2 * self.width, vector)

    def _substitute(self, triangle: bytes, diagonal: bytes, row: int, vector: np.ndarray) -> None:
        states, height = self.band.shape
        _dtbsv(triangle, b"T", diagonal, _pointer(states), _pointer(self.width),
               self.band.ctypes.data + 8 * row, _pointer(height), vector.ctypes.data, _pointer(1),
        )  # fmt: skip


def _rows_of_separator(band: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """K_SA on the last states of A, K_SS, and K_SB on the last states of B in their own order."""
    width = len(band)
    rows = np.zeros((width, 3 * width))
    for j, row in enumerate(band):
        rows[j, j : j + 2 * width + 1] = row[width:]
    return rows[:, :width], rows[:, width : 2 * width], rows[:, 2 * width :]


def _pointer(number: int) -> Any:
    return ctypes.byref(ctypes.c_int(number))
