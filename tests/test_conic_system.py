"""The batched sparse system against dense linear algebra."""

import numpy as np
import pytest
from conic_families import FAMILIES, instance

from convexlearn.solvers.cones import split
from convexlearn.solvers.conic_system import analysis


def dense(program, data, found, k):
    """[P, A'; D A, D - I] of sample k, with the derivative D of the projection on the dual cone."""
    P, A = np.zeros((program.n, program.n)), np.zeros((program.m, program.n))
    P[program.P.rows, program.P.cols] = data[0][k]
    A[program.A.rows, program.A.cols] = data[2][k]
    P = P + np.triu(P, 1).T
    D = np.stack([found.derivative(np.tile(e, (len(found.dual), 1)))[k] for e in np.eye(program.m)], 1)
    return np.block([[P, A.T], [D @ A, D - np.eye(program.m)]]), D


@pytest.mark.parametrize("name", FAMILIES)
def test_solves_like_dense_linear_algebra(name):
    program, data = instance(name, batch=3)
    rng = np.random.default_rng(5)
    v, top, bottom = (rng.standard_normal((3, k)) for k in (program.m, program.n, program.m))
    data = (data[0] + 0.0, *data[1:])
    found = split(program.cones, v)
    x, y, residual = analysis(program).factored(data[0], data[2], found).solve(top, bottom)
    for k in range(3):
        K, D = dense(program, data, found, k)
        right = np.concatenate([top[k], D @ bottom[k]])
        if np.linalg.cond(K) < 1e10:
            np.testing.assert_allclose(np.concatenate([x[k], y[k]]), np.linalg.solve(K, right), rtol=1e-7, atol=1e-7)
            assert residual[k] < 1e-12
        else:
            assert np.isfinite(x[k]).all()


def test_right_hand_sides_without_a_solution_are_reported():
    """All rows inactive: a linear objective has no Newton step, and the least-squares one is zero."""
    program, data = instance("maximum cut", batch=2)
    inside = np.zeros((2, program.m))
    inside[:, program.cones.zero :][:, [0, 4, 7, 9]] = -1.0  # minus the identity of order 4
    found = split(program.cones, inside)
    factored = analysis(program).factored(data[0], data[2], found)
    top = np.random.default_rng(0).standard_normal((2, program.n))
    x, y, residual = factored.solve(top, np.zeros((2, program.m)))
    # the equalities fix the diagonal; the part of `top` off the diagonal is lost
    K, D = dense(program, data, found, 0)
    K[: program.n, program.n :] = K[: program.n, program.n :] @ D  # D is 0 or 1 here: the symmetric form
    expected = np.linalg.pinv(K) @ np.concatenate([top[0], np.zeros(program.m)])
    np.testing.assert_allclose(np.concatenate([x[0], y[0]]), expected, atol=1e-8)
    assert (residual > 0.1).all()


def test_samples_do_not_depend_on_their_neighbours():
    program, data = instance("all cones", batch=4)
    rng = np.random.default_rng(1)
    v, top, bottom = (rng.standard_normal((4, k)) for k in (program.m, program.n, program.m))
    together = analysis(program).factored(data[0], data[2], split(program.cones, v)).solve(top, bottom)
    alone = analysis(program).factored(data[0][2:3], data[2][2:3], split(program.cones, v[2:3]))
    for a, b in zip(together, alone.solve(top[2:3], bottom[2:3])):
        np.testing.assert_allclose(a[2:3], b, rtol=1e-13, atol=1e-13)
