"""Second-order cones in lanes against dense linear algebra: scaling points, products, steps to the boundary."""

import numpy as np
import pytest

from convexlearn.solvers.quadratic.simd import kernel, load, store, vsqrt
from convexlearn.solvers.second_order import jordan

LANES = 4
SLOTS = 10  # per vector


@kernel
def operations(w, F, d):
    """Slots: s, z, direction | point, eta, W z, W^-1 s, s o z, s \\ z, inverse step along the direction."""
    s, z, step = 0, SLOTS, 2 * SLOTS
    point, eta, scaled, unscaled = 3 * SLOTS, 8 * SLOTS, 4 * SLOTS, 5 * SLOTS
    jordan.scaling_point(w, F, s, z, point, eta, d)
    jordan.scale(w, F, point, load(w, F, eta), 1.0, z, scaled, d)
    jordan.scale(w, F, point, 1.0 / load(w, F, eta), -1.0, s, unscaled, d)
    jordan.product(w, F, s, z, 6 * SLOTS, d)
    for i in range(d):
        store(F, 7 * SLOTS + i, load(w, F, z + i))
    jordan.divide(w, F, s, 7 * SLOTS, d)
    store(F, 8 * SLOTS + 1, jordan.inverse_step(w, F, s, step, d))
    store(F, 8 * SLOTS + 2, vsqrt(jordan.determinant(w, F, s, d)))


@pytest.fixture(params=[1, 2, 3, 7])
def vectors(request):
    """(d, slots by lanes, results): s and z inside the cone, any direction."""
    d, rng = request.param, np.random.default_rng(request.param)
    F = np.zeros((9 * SLOTS, LANES))
    for k in range(3):
        tail = rng.normal(size=(d - 1, LANES))
        head = rng.normal(size=LANES) if k == 2 else np.linalg.norm(tail, axis=0) + 0.01 + rng.random(LANES)
        F[k * SLOTS : k * SLOTS + d] = np.vstack([head, tail])
    operations((0,) * LANES, F.reshape(-1), d)
    return d, F


def part(F, k, d, lane):
    return F[k * SLOTS : k * SLOTS + d, lane]


def arrow(v):
    """The matrix of the Jordan product with v."""
    return (
        v[0] * np.eye(len(v))
        + np.outer(v, np.eye(len(v))[0]) * (np.arange(len(v)) > 0)[:, None]
        + np.outer(np.eye(len(v))[0], v * (np.arange(len(v)) > 0))
    )


def test_scaling_maps_both_to_the_same_point(vectors):
    d, F = vectors
    for lane in range(LANES):
        s, z, w = (part(F, k, d, lane) for k in (0, 1, 3))
        eta = F[8 * SLOTS, lane]
        W = np.eye(d)
        W[0], W[:, 0] = w, w
        W[1:, 1:] += np.outer(w[1:], w[1:]) / (1 + w[0])
        W *= eta
        assert w[0] ** 2 - w[1:] @ w[1:] == pytest.approx(1.0)
        np.testing.assert_allclose(part(F, 4, d, lane), W @ z, rtol=1e-12)
        np.testing.assert_allclose(part(F, 5, d, lane), W @ z, rtol=1e-10)
        np.testing.assert_allclose(np.linalg.solve(W, s), W @ z, rtol=1e-10)


def test_product_and_division(vectors):
    d, F = vectors
    for lane in range(LANES):
        s, z = part(F, 0, d, lane), part(F, 1, d, lane)
        np.testing.assert_allclose(part(F, 6, d, lane), arrow(s) @ z, atol=1e-12)
        np.testing.assert_allclose(part(F, 7, d, lane), np.linalg.solve(arrow(s), z), rtol=1e-9)
        assert F[8 * SLOTS + 2, lane] ** 2 == pytest.approx(s[0] ** 2 - s[1:] @ s[1:])


def test_step_to_the_boundary(vectors):
    d, F = vectors
    for lane in range(LANES):
        s, step, inverse = part(F, 0, d, lane), part(F, 2, d, lane), F[8 * SLOTS + 1, lane]

        def margin(t, s=s, step=step):
            return s[0] + t * step[0] - np.linalg.norm(s[1:] + t * step[1:])

        if inverse > 0:
            assert margin(1 / inverse) == pytest.approx(0.0, abs=1e-9 * (1 + 1 / inverse))
            assert margin(0.5 / inverse) > 0
        else:
            assert margin(1e6) >= -1e-3
