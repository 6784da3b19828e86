"""Exactness of the polish, warm starts, and gradients against central differences and dense KKT systems."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes_families import PARTS, dense, family, kkt_error

from convexlearn.program.program import Status
from convexlearn.solvers.quadratic import lanes


def scalar(result, weights):
    return sum((getattr(result, name) * g).sum() for name, g in zip(PARTS, weights))


def central_differences(symbolic, data, batch, weights, name, direction, **options):
    step = 1e-6
    values = []
    for sign in (1, -1):
        moved = data._replace(**{name: getattr(data, name) + sign * step * direction})
        values.append(scalar(lanes.solve(symbolic, moved, batch, **options), weights))
    return (values[0] - values[1]) / (2 * step)


def check_gradients(box, data, batch, seed, tolerance, **options):
    symbolic, rng = lanes.analyse(box), np.random.default_rng(seed)
    result = lanes.solve(symbolic, data, batch, **options)
    assert (result.status == Status.SOLVED).all()
    weights = [rng.normal(size=getattr(result, name).shape) for name in PARTS]
    gradients = lanes.adjoint(result, *weights)
    for name, gradient in zip(data._fields, gradients):
        field = getattr(data, name)
        assert gradient.shape == field.shape
        direction = rng.normal(size=field.shape)
        expected = central_differences(symbolic, data, batch, weights, name, direction, **options)
        assert (gradient * direction).sum() == pytest.approx(expected, rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("absolute", [0, 4])
@pytest.mark.parametrize("batch", [1, 9])
def test_gradients_of_all_data_for_all_upstreams(linear, absolute, batch):
    check_gradients(*family(20, linear=linear, absolute=absolute, batch=batch), batch, 0, 1e-5)


@pytest.mark.parametrize("mu", [1e-1, 1e-3])
@pytest.mark.parametrize("linear", [False, True])
def test_smoothed_gradients(mu, linear):
    check_gradients(*family(21, linear=linear, absolute=4), 5, 1, 1e-5, smoothing=mu)


def test_gradients_of_shared_fields_are_sums():
    box, data = family(22, batch=20, absolute=3)
    shared = data._replace(P=data.P[:1], A=data.A[:1], G=data.G[:1], w=data.w[:1], b=0 * data.b, h=5 + data.h)
    shared = shared._replace(l=-1 - data.w[:, :1] * 0 - np.ones_like(data.l), u=np.ones_like(data.u))
    expanded = lanes.BoxData(*(np.repeat(f, 20, axis=0) if len(f) == 1 else f for f in shared))
    symbolic, g = lanes.analyse(box), np.random.default_rng(0).normal(size=(20, 8))
    few = lanes.adjoint(lanes.solve(symbolic, shared, 20), g)
    many = lanes.adjoint(lanes.solve(symbolic, expanded, 20), g)
    for a, b in zip(few, many):
        np.testing.assert_allclose(a, b.sum(0, keepdims=True) if len(a) == 1 else b, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.booleans(), st.integers(0, 6))
def test_adjoint_equals_a_dense_solve(seed, linear, absolute):
    box, data = family(seed, 7, 2, 5, linear=linear, absolute=min(absolute, 7), batch=3)
    result = lanes.solve(lanes.analyse(box), data, 3)
    assert (result.status == Status.SOLVED).all()
    assert max(kkt_error(box, data, result, k) for k in range(3)) < 1e-10
    g = np.random.default_rng(seed).normal(size=(3, 7))
    gradients = lanes.adjoint(result, g)
    for k in range(3):
        d, x, unit = dense(box, data, k), result.x[k], np.eye(7)
        v, w = result.subgradient[k], d.w
        rows = [d.A, d.G[result.z[k] > 0], unit[box.lower][result.lower[k] > 0]]
        rows += [unit[box.upper][result.upper[k] > 0], unit[box.absolute][(x[box.absolute] == 0) & (np.abs(v) < w)]]
        J = np.vstack(rows)
        K = np.block([[d.P, J.T], [J, np.zeros((len(J), len(J)))]])
        if np.linalg.cond(K) > 1e8:
            continue
        expected = np.linalg.solve(K, np.concatenate([g[k], np.zeros(len(J))]))
        scale = 1 + np.abs(expected).max()
        np.testing.assert_allclose(gradients.q[k], -expected[:7], atol=1e-9 * scale)
        np.testing.assert_allclose(gradients.b[k], expected[7 : 7 + len(d.b)], atol=1e-9 * scale)


def test_degenerate_problems_have_finite_gradients():
    box, data = family(23, n=6, rows=1, inequalities=6, density=1.0, linear=True)
    G, h = data.G.reshape(5, 6, 6).copy(), data.h.copy()
    G[:, :, 3:], h[:, 3:] = G[:, :, :3], h[:, :3]  # every inequality twice
    data = data._replace(G=G.reshape(5, -1), h=h)
    result = lanes.solve(lanes.analyse(box), data, 5)
    assert (result.status == Status.SOLVED).all()
    gradients = lanes.adjoint(result, *(np.ones_like(getattr(result, name)) for name in PARTS))
    for field in gradients:
        assert np.isfinite(field).all()
        assert np.abs(field).max(initial=0.0) < 1e4
    # the gradient to x alone is that of the problem with every inequality once: shares add up
    once = lanes.adjoint(result, np.ones_like(result.x)).h
    single = data._replace(h=np.where(np.arange(6) < 3, h, np.inf))
    kept = lanes.solve(lanes.analyse(box), single, 5)
    np.testing.assert_allclose(kept.x, result.x, atol=1e-9)
    np.testing.assert_allclose(once[:, :3] + once[:, 3:], lanes.adjoint(kept, np.ones_like(kept.x)).h[:, :3], atol=1e-6)


def test_non_unique_solution_drops_the_free_direction():
    # min x0 + x1 over the square with x0 + x1 >= 0: a whole edge is optimal
    box, data = family(24, n=2, rows=0, inequalities=1, density=2.0, linear=True, batch=1)
    one = np.ones((1, 2))
    data = data._replace(q=one, G=-one, h=np.zeros((1, 1)), l=-one, u=one)
    result = lanes.solve(lanes.analyse(box), data, 1)
    assert result.status[0] == Status.SOLVED
    along, across = (lanes.adjoint(result, np.array([g])) for g in ([1.0, -1.0], [1.0, 1.0]))
    assert max(np.abs(f).max(initial=0.0) for f in along) < 1e-6
    np.testing.assert_allclose(across.h, -1.0, atol=1e-6)


def test_weakly_active_bound_gives_one_of_the_two_derivatives():
    box, data = family(25, n=1, rows=0, inequalities=0, batch=1)
    data = data._replace(P=np.ones((1, 1)), q=np.zeros((1, 1)), l=np.zeros((1, 1)), u=np.ones((1, 1)))
    result = lanes.solve(lanes.analyse(box), data, 1)
    gradient = lanes.adjoint(result, np.ones((1, 1)))
    assert result.x[0, 0] == pytest.approx(0.0, abs=1e-12)
    assert min(abs(gradient.q[0, 0] + 1), abs(gradient.q[0, 0])) < 1e-9


def test_warm_start_certifies_without_iterations_and_survives_garbage():
    box, data = family(26, absolute=3, batch=12)
    symbolic = lanes.analyse(box)
    cold = lanes.solve(symbolic, data, 12)
    near = data._replace(q=data.q + 1e-6)
    warm = lanes.solve(symbolic, near, 12, warm=cold)
    assert (warm.iterations == 0).all()
    np.testing.assert_allclose(warm.x, lanes.solve(symbolic, near, 12).x, atol=1e-10)
    rng = np.random.default_rng(0)
    garbage = lanes.Warm(1e3 * rng.normal(size=cold.solution.shape), 1.0 * (rng.random(cold.active.shape) < 0.5))
    again = lanes.solve(symbolic, data, 12, warm=garbage)
    assert (again.status == Status.SOLVED).all()
    np.testing.assert_allclose(again.x, cold.x, atol=1e-9)
