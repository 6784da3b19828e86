"""Symbolic analysis and the factorization in lanes against dense linear algebra."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes_families import dense, family

from convexlearn.solvers.quadratic import ldl
from convexlearn.solvers.quadratic.lanes import BoxData
from convexlearn.solvers.quadratic.layout import PINNED
from convexlearn.solvers.quadratic.simd import kernel
from convexlearn.solvers.quadratic.symbolic import symbolic


@kernel
def factor_and_solve(w, I, F, b):
    ldl.factor(w, I, F)
    ldl.solve_factored(w, I, F, b)


@kernel
def product(w, I, F, v, r):
    ldl.multiply(w, I, F, v, r)


def workspace(box, data, W):
    layout = symbolic(box)
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
