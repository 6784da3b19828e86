"""Ordering, symbolic analysis and the factorization in lanes against dense linear algebra."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes_families import dense, family

from convexlearn.solvers.quadratic import ldl
from convexlearn.solvers.quadratic.lanes import BoxData
from convexlearn.solvers.quadratic.layout import PINNED
from convexlearn.solvers.quadratic.simd import kernel


@kernel
def factor_and_solve(w, I, F, b):
    ldl.factor(w, I, F)
    ldl.solve_factored(w, I, F, b)


@kernel
def product(w, I, F, v, r):
    ldl.multiply(w, I, F, v, r)


def fill(pattern: np.ndarray, order: np.ndarray) -> int:
    """Entries of L below the diagonal, by elimination on the dense pattern."""
    graph = pattern[np.ix_(order, order)] != 0
    count = 0
    for j in range(len(order)):
        rows = j + 1 + np.flatnonzero(graph[j + 1 :, j])
        graph[np.ix_(rows, rows)] = True
        count += len(rows)
    return count


def workspace(box, data, W):
    layout = ldl.symbolic(box)
    at = layout.offset
    F = np.zeros((layout.work, W))
    for k in range(W):
        F[at["DATA"] : at["DATA"] + at["N_ENTRY"], k] = np.concatenate([data.P[k], data.A[k], data.G[k]])
    return layout, F


def matrix(box, data: BoxData, k: int) -> np.ndarray:
    d = dense(box, data, k)
    rows = len(d.b) + len(d.h)
    C = np.vstack([d.A, d.G])
    return np.block([[d.P, C.T], [C, np.zeros((rows, rows))]])


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 10**6), st.integers(1, 14), st.integers(0, 5), st.integers(0, 9), st.sampled_from([0.15, 0.5, 1.0])
)
def test_solves_like_numpy(seed, n, rows, inequalities, density):
    box, data = family(seed, n, rows, inequalities, batch=4, density=density)
    layout, F = workspace(box, data, 4)
    at, N = layout.offset, layout.offset["N_K"]
    rng = np.random.default_rng(seed)
    diagonal = np.where(np.arange(N) < n, 1.0, -1.0)[:, None] * (0.5 + rng.random((N, 4)))
    pinned = rng.random((N, 4)) < 0.2
    diagonal[pinned] *= 100 * PINNED
    F[at["WD"] : at["WD"] + N] = diagonal
    b = rng.normal(size=(N, 4))
    F[at["R"] : at["R"] + N] = b
    factor_and_solve((0,) * 4, layout.header, F.reshape(-1), at["R"])
    for k in range(4):
        K, free = matrix(box, data, k) + np.diag(diagonal[:, k]), ~pinned[:, k]
        expected = np.zeros(N)
        expected[free] = np.linalg.solve(K[np.ix_(free, free)], b[free, k])
        np.testing.assert_allclose(F[at["R"] : at["R"] + N, k], expected, atol=1e-10, rtol=1e-10)


def test_multiply_is_the_symmetric_product():
    box, data = family(3, batch=4)
    layout, F = workspace(box, data, 4)
    at, N = layout.offset, layout.offset["N_K"]
    v = np.random.default_rng(0).normal(size=(N, 4))
    F[at["D"] : at["D"] + N], F[at["R"] : at["R"] + N] = v, 1.0
    product((0,) * 4, layout.header, F.reshape(-1), at["D"], at["R"])
    for k in range(4):
        np.testing.assert_allclose(
            F[at["R"] : at["R"] + N, k], 1 + matrix(box, data, k) @ v[:, k], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("density", [0.05, 0.2])
def test_ordering_beats_the_natural_one_and_predicts_fill(density):
    rng = np.random.default_rng(1)
    pattern = (rng.random((60, 60)) < density) | np.eye(60, dtype=bool)
    pattern |= pattern.T
    order = ldl.minimum_degree(sp.csr_array(pattern.astype(float)))
    np.testing.assert_array_equal(np.sort(order), np.arange(60))
    columns = ldl.column_patterns(sp.csr_array(pattern.astype(float)), order)
    assert sum(map(len, columns)) == fill(pattern, order) < fill(pattern, np.arange(60))
    post = order[ldl.postorder(columns)]
    assert fill(pattern, post) == fill(pattern, order)


def test_minimum_degree_has_no_fill_on_a_tree():
    parent = [max(0, (k - 1) // 2) for k in range(31)]
    pattern = np.eye(31)
    pattern[range(31), parent] = pattern[parent, range(31)] = 1
    columns = ldl.column_patterns(sp.csr_array(pattern), ldl.minimum_degree(sp.csr_array(pattern)))
    assert sum(map(len, columns)) == 30
