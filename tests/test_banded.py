"""Banded systems solved from both ends, against SciPy's sparse LU."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array, eye_array
from scipy.sparse.linalg import spsolve

from inference_rl import banded, policy_evaluation
from inference_rl.banded import BandOrder, TwistedFactors
from inference_rl.policy_evaluation import PolicyEvaluation


def walk(states: int, reach: int, rng: np.random.Generator, *, ring: bool = False) -> csr_array:
    """A random walk on a shuffled line or ring; some transitions are listed twice."""
    steps = rng.integers(-reach, reach + 1, (states, 6))
    steps[:, :2] = -1, 1  # whoever is reached can come back
    target = np.arange(states)[:, None] + steps
    target = target % states if ring else target.clip(0, states - 1)
    shuffled = rng.permutation(states)
    rows = np.empty_like(target)
    rows[shuffled] = shuffled[target]
    weights = rng.random(rows.shape)
    weights /= weights.sum(1, keepdims=True)
    starts = np.arange(0, rows.size + 1, rows.shape[1])
    return csr_array((weights.ravel(), rows.ravel(), starts), shape=(states, states))


def solved(matrix: csr_array, right: np.ndarray) -> np.ndarray:
    return spsolve((eye_array(matrix.shape[0]) - matrix).tocsc(), right)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("reach", [1, 3, 10])
@pytest.mark.parametrize("states", [200, 201, 7000])
def test_solution_is_that_of_sparse_lu(states: int, reach: int, ring: bool) -> None:
    rng = np.random.default_rng(states + reach)
    matrix = walk(states, reach, rng, ring=ring)
    factors = TwistedFactors(BandOrder(matrix))
    for discount in (0.5, 0.99, 0.9999):
        assert factors.factorise(discount * matrix)  # the same storage, again and again
        for _ in range(2):
            right = rng.normal(size=states)
            exact = solved(discount * matrix, right)
            error = np.abs(factors.solve(right) - exact).max()
            assert error <= 1e-15 / (1 - discount) * 100 * np.abs(exact).max()


def test_order_is_narrow_and_says_how_narrow() -> None:
    matrix = walk(5000, 10, np.random.default_rng(0))
    order = BandOrder(matrix)
    assert order.below <= 50
    assert order.above <= 50
    coordinates = matrix.tocoo()
    offset = order.place[coordinates.row] - order.place[coordinates.col]
    assert offset.max() == order.below
    assert offset.min() == -order.above


def test_fewest_states_for_the_band_and_subsets_of_its_graph() -> None:
    rng = np.random.default_rng(1)
    states = 12
    matrix = walk(states, 2, rng)
    order = BandOrder(matrix)
    assert 3 * order.width <= states <= 3 * order.width + 3
    factors = TwistedFactors(order)
    kept = matrix.copy()
    kept.data[rng.random(kept.nnz) < 0.5] = 0.0
    kept.eliminate_zeros()
    right = rng.normal(size=states)
    assert factors.factorise(kept)
    np.testing.assert_allclose(factors.solve(right), solved(kept, right), rtol=1e-10)


def test_components_that_do_not_touch() -> None:
    rng = np.random.default_rng(2)
    parts = [walk(150, 2, rng), walk(150, 1, rng)]
    matrix = csr_array(
        (
            np.concatenate([part.data for part in parts]),
            np.concatenate([parts[0].indices, parts[1].indices + 150]),
            np.concatenate([parts[0].indptr, parts[1].indptr[1:] + parts[0].nnz]),
        ),
        shape=(300, 300),
    )
    right = rng.normal(size=300)
    factors = TwistedFactors(BandOrder(matrix))
    assert factors.factorise(0.99 * matrix)
    np.testing.assert_allclose(factors.solve(right), solved(0.99 * matrix, right), rtol=1e-9)


def test_where_rounding_spoils_dominance_sparse_lu_takes_over() -> None:
    rng = np.random.default_rng(3)
    matrix = walk(400, 3, rng)
    graph = matrix.copy()
    matrix.data[matrix.indptr[7] : matrix.indptr[8]] = 0.0  # the only way out, without discount
    order = BandOrder(graph)
    assert 3 * order.width <= 400
    assert not TwistedFactors(order).factorise(matrix)
    evaluate = PolicyEvaluation(graph, discount=1.0, closed=False)
    evaluate._choose_slow()
    assert evaluate._method is policy_evaluation._Method.BANDED
    right = rng.random(400)
    np.testing.assert_allclose(
        evaluate.solve(matrix, right, accuracy=0.05), solved(matrix, right), rtol=1e-8
    )


def test_singular_system_is_told() -> None:
    loops = csr_array(np.eye(40))
    loops = csr_array(loops + csr_array(([1e-300], ([0], [1])), shape=(40, 40)))
    assert not TwistedFactors(BandOrder(loops)).factorise(loops)


def test_two_threads_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    matrix = 0.99 * walk(3000, 5, rng)
    right = rng.normal(size=3000)
    order = BandOrder(matrix)
    answers = []
    for threshold in (0, 10**9):
        monkeypatch.setattr(banded, "_THREAD_STATES", threshold)
        factors = TwistedFactors(order)
        assert factors.factorise(matrix)
        answers.append(factors.solve(right))
    np.testing.assert_array_equal(*answers)
