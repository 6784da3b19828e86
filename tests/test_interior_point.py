"""Solutions, statuses and certificates of the solver in lanes against Clarabel and the KKT conditions."""

import multiprocessing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes_families import PARTS, clarabel_solution, dense, family, kkt_error, objective

from convexlearn.program.program import Status
from convexlearn.solvers.quadratic import lanes


def solve(box, data, batch=5, **options):
    return lanes.solve(lanes.analyse(box), data, batch, **options)


def assert_solved(box, data, result):
    assert (result.status == Status.SOLVED).all(), result.status
    assert max(kkt_error(box, data, result, k) for k in range(result.batch)) < 1e-9


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 12), st.booleans(), st.data())
def test_agrees_with_clarabel(seed, n, linear, draw):
    rows, inequalities = draw.draw(st.integers(0, n // 2)), draw.draw(st.integers(0, 2 * n))
    absolute = draw.draw(st.integers(0, n))
    box, data = family(seed, n, rows, inequalities, linear=linear, absolute=absolute, batch=3)
    result = solve(box, data, 3)
    assert_solved(box, data, result)
    assert result.polished.all()
    for k in range(3):
        status, value = clarabel_solution(box, data, k)
        if status == "Solved":
            assert objective(box, data, result, k) == pytest.approx(value, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 9, 17])
def test_lanes_do_not_touch_each_other(batch):
    box, data = family(0, batch=batch, absolute=3)
    result = solve(box, data, batch)
    for k in range(batch):
        alone = solve(box, lanes.BoxData(*(f[k : k + 1] for f in data)), 1)
        np.testing.assert_allclose(result.solution[k], alone.solution[0], atol=1e-11)


def test_mixed_batch_reports_every_status():
    box, data = family(1, n=4, rows=0, inequalities=2, bounds=2, density=1.0, batch=6, linear=True)
    free = np.setdiff1d(np.arange(4), box.lower)
    q, G, h, l = data.q.copy(), np.zeros_like(data.G), np.ones_like(data.h), data.l.copy()
    q[:, free] = 0.0
    q[1, free] = 1.0  # unbounded below along -free
    l[2] = data.u[2] + 1  # empty box
    G[3, :] = np.tile([1.0, -1.0], 4)
    h[3] = [0.0, -1.0]  # sum x <= 0 and sum x >= 1
    q[4, 0] = np.nan
    data = data._replace(q=q, G=G, h=h, l=l)
    result = solve(box, data, 6)
    expected = [Status.SOLVED, Status.UNBOUNDED, Status.INFEASIBLE, Status.INFEASIBLE, Status.FAILED, Status.SOLVED]
    np.testing.assert_array_equal(result.status, expected)
    assert max(kkt_error(box, data, result, k) for k in (0, 5)) < 1e-10
    gradients = lanes.adjoint(result, np.ones((6, 4)))
    for name, field in zip(gradients._fields, gradients):
        assert np.isfinite(field).all(), name
        assert (field[1:5] == 0).all(), name


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.booleans())
def test_infeasible_certificates(seed, linear):
    box, data = family(seed, 6, 2, 4, density=1.0, linear=linear, absolute=2)
    result = solve(box, data._replace(b=data.b + 50.0))
    assert (result.status == Status.INFEASIBLE).all()
    for k in range(5):
        d = dense(box, data._replace(b=data.b + 50.0), k)
        y, z, lower, upper = (getattr(result, name)[k] for name in PARTS[1:5])
        pull = d.A.T @ y + d.G.T @ z
        pull[box.lower] -= lower
        pull[box.upper] += upper
        assert np.abs(pull).max() < 1e-6
        assert min(z.min(), lower.min(), upper.min()) > -1e-6
        assert d.b @ y + d.h @ z - d.l @ lower + d.u @ upper == pytest.approx(-1.0, abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.booleans())
def test_unbounded_rays(seed, linear):
    box, data = family(seed, 7, 2, 0, linear=linear, bounds=2, absolute=2, density=1.0)
    if not linear:  # keep only curvature along the bounded variables
        keep = np.isin(box.P.rows, box.lower) & np.isin(box.P.cols, box.lower)
        data = data._replace(P=data.P * keep)
    data = data._replace(q=data.q * 10, w=0.1 * data.w)
    result = solve(box, data)
    assert (result.status == Status.UNBOUNDED).all()
    for k in range(5):
        d, x = dense(box, data, k), result.x[k]
        assert max(np.abs(d.P @ x).max(), np.abs(d.A @ x).max()) < 1e-6
        assert -x[box.lower].min() < 1e-6
        assert x[box.upper].max() < 1e-6
        assert d.q @ x + d.w @ np.abs(x[box.absolute]) == pytest.approx(-1.0, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("kind", ["objective", "limits", "rows"])
def test_badly_scaled_data(kind, scale):
    box, data = family(4, density=1.0)
    reference = solve(box, data)
    factor = 1.0
    if kind == "objective":
        data = data._replace(P=data.P * scale, q=data.q * scale)
    elif kind == "limits":  # x scales with the limits when the linear term does
        factor = scale
        data = data._replace(q=data.q * scale, b=data.b * scale, h=data.h * scale, l=data.l * scale, u=data.u * scale)
    else:
        rows = scale ** np.random.default_rng(0).random(box.A.shape[0])
        data = data._replace(A=data.A * rows[box.A.rows], b=data.b * rows)
    result = solve(box, data)
    assert (result.status == Status.SOLVED).all()
    np.testing.assert_allclose(result.x, factor * reference.x, rtol=1e-8, atol=1e-8 * factor)


def test_dependent_equality_rows():
    box, data = family(5, n=8, rows=4, density=1.0)
    A, b = data.A.reshape(5, 8, 4).copy(), data.b.copy()
    A[:, :, 3], b[:, 3] = A[:, :, 0] + A[:, :, 1], b[:, 0] + b[:, 1]
    data = data._replace(A=A.reshape(5, -1), b=b)
    assert_solved(box, data, solve(box, data))
    b = b.copy()
    b[::2, 3] += 1.0
    result = solve(box, data._replace(b=b))
    np.testing.assert_array_equal(result.status, [2, 0, 2, 0, 2])


def test_absent_and_equal_bounds_and_zero_weights():
    box, data = family(6, absolute=4)
    l, u, w, h = data.l.copy(), data.u.copy(), data.w.copy(), data.h.copy()
    l[::2], u[:, 1], h[1, 2] = -np.inf, np.inf, np.inf
    l[:, 0] = u[:, 0] = 0.5 * (data.l[:, 0] + data.u[:, 0])
    w[:, 0], w[1, 1], w[2, 2] = 0.0, -1.0, 1e-12
    data = data._replace(l=l, u=u, w=w, h=h)
    result = solve(box, data)
    solved = result.status == Status.SOLVED  # a fixed variable can make a sample infeasible
    assert solved.sum() >= 3
    for k in range(5):
        status = clarabel_solution(box, data, k)[0]
        assert (status == "Solved") == solved[k]
        if solved[k]:
            assert kkt_error(box, data, result, k) < 1e-9
    np.testing.assert_array_equal(result.x[solved][:, box.lower[0]], l[solved][:, 0])


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("mu", [1e-1, 1e-3, 1e-5])
def test_smoothing_returns_the_central_path(mu, linear):
    box, data = family(7, linear=linear, absolute=3)
    result = solve(box, data, smoothing=mu)
    assert (result.status == Status.SOLVED).all()
    for k in range(5):
        d, x = dense(box, data, k), result.x[k]
        np.testing.assert_allclose((d.h - d.G @ x) * result.z[k], mu, rtol=1e-6)
        np.testing.assert_allclose((x[box.lower] - d.l) * result.lower[k], mu, rtol=1e-6)
        v, kinks = result.subgradient[k], x[box.absolute]
        # (w + v)(t - x) = (w - v)(t + x) = 2 mu with t eliminated
        np.testing.assert_allclose(2 * mu / (d.w - v) - 2 * mu / (d.w + v), 2 * kinks, rtol=1e-5, atol=1e-7)


def test_iteration_limit_returns_the_iterate():
    box, data = family(8, inequalities=10, linear=True)
    result = solve(box, data, max_iterations=2)
    assert result.iterations.max() <= 2
    assert np.isfinite(result.x).all()
    assert (result.status == Status.FAILED).any()


def test_threads_give_the_same_bits():
    box, data = family(9, batch=100, absolute=3)
    shared = data._replace(P=data.P[:1], w=data.w[:1])
    one, two = (solve(box, shared, 100, threads=t) for t in (1, 2))
    np.testing.assert_array_equal(one.solution, two.solution)
    g = np.random.default_rng(0).normal(size=one.x.shape)
    for a, b in zip(lanes.adjoint(one, g), lanes.adjoint(two, g)):
        np.testing.assert_array_equal(a, b)


def _child(queue):
    box, data = family(10, batch=40)
    queue.put(solve(box, data, 40, threads=2).x)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_works():
    box, data = family(10, batch=40)
    expected = solve(box, data, 40, threads=2).x
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=60), expected)
    child.join()


def test_wrong_shapes_are_errors():
    box, data = family(11)
    with pytest.raises(ValueError, match=r"q has shape \(5, 7\)"):
        solve(box, data._replace(q=data.q[:, :7]))
