"""Dependent active constraints: the derivative is that of a region of constant active set next to the point."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from reference import close, tensor

from convexlearn import ConvexLayer, Status
from convexlearn.solvers.quadratic import sparse

PATHS = pytest.mark.parametrize("path", ["lanes", "sparse"])


def norm_mpc(path, bounds, horizon=3):
    """A 1-norm cost of all states, the first included, so that zeros of x0 are at a kink and fixed by an equality."""
    x, u, x0 = cp.Variable((horizon + 1, 2)), cp.Variable((horizon, 1)), cp.Parameter(2, name="x0")
    A, B = np.array([[1.0, 0.2], [0.0, 0.9]]), np.array([[0.0], [1.0]])
    constraints, cost = [x[0] == x0], cp.norm1(x)
    for t in range(horizon):
        constraints += [x[t + 1] == A @ x[t] + B @ u[t], cp.abs(u[t]) <= 1]
        cost += 0.1 * cp.sum_squares(u[t])
        constraints += [cp.abs(x[t]) <= 1] if bounds else []
    return ConvexLayer(cp.Problem(cp.Minimize(cost), constraints), [x0], [x, u], solver_args={"path": path})


@PATHS
@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("start", [[0.0, 0.3], [0.5, 0.0], [0.0, 0.0], [1.0, 0.0]])
def test_equalities_at_kinks(path, bounds, start):
    """The state moves with x0, and the input brings the second state to zero at once: u[0] = -0.9 x0[1]."""
    layer, x0 = norm_mpc(path, bounds), tensor([start]).requires_grad_()
    x, u = layer(x0)
    for k in range(2):
        (gradient,) = torch.autograd.grad(x[0, 0, k], x0, retain_graph=True)
        close(gradient[0], torch.eye(2, dtype=torch.float64)[k], 1e-9)
    (gradient,) = torch.autograd.grad(u.sum(), x0)
    close(gradient[0], tensor([0.0, -0.9]), 1e-9)


@PATHS
def test_an_equality_beats_the_bound_at_its_value(path):
    x, t, b = cp.Variable(2), cp.Parameter(2, name="t"), cp.Parameter(name="b")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [cp.sum(x) == b, x[0] <= 1, x[1] <= 1])
    layer = ConvexLayer(problem, [t, b], [x], solver_args={"path": path})
    point = tensor(2.0).requires_grad_()  # feasible at x = (1, 1) only
    (found,) = layer(tensor([0.3, 0.2]), point)
    close(found.detach(), tensor([1.0, 1.0]), 1e-9)
    (gradient,) = torch.autograd.grad(found.sum(), point)
    close(gradient, tensor(1.0), 1e-9)


@PATHS
def test_of_two_equal_constraints_one_counts(path):
    """min (x - t)^2, x <= h0, x <= h1 at h0 = h1: the multiplier and the derivative belong to one of them."""
    x, t, h = cp.Variable(), cp.Parameter(name="t"), cp.Parameter(2, name="h")
    c = cp.Parameter(2, name="c", value=[1.0, 1.0])
    problem = cp.Problem(cp.Minimize(cp.square(x - t)), [c * x <= h])
    outputs = [x, problem.constraints[0].dual_variables[0]]
    layer = ConvexLayer(problem, [t, h, c], outputs, solver_args={"path": path})
    limits, factors = tensor([1.0, 1.0]).requires_grad_(), tensor([1.0, 1.0]).requires_grad_()
    found, dual = layer(tensor(2.0), limits, factors)
    close(found.detach(), tensor(1.0), 1e-10)
    close(dual.detach().sort().values, tensor([0.0, 2.0]), 1e-9)
    found.backward()
    close(limits.grad.sort().values, tensor([0.0, 1.0]), 1e-9)
    close(factors.grad.sort().values, tensor([-1.0, 0.0]), 1e-9)
    assert limits.grad.argmax() == factors.grad.argmin() == dual.argmax()


@PATHS
def test_degenerate_vertex(path):
    """A portfolio with all weights at a limit: each vertex of multipliers leaves one asset to balance the sum."""
    w, mu, cap = cp.Variable(4), cp.Parameter(4, name="mu"), cp.Parameter(4, name="cap")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(w) - mu @ w), [cp.sum(w) == 1, w >= 0, w <= cap])
    layer = ConvexLayer(problem, [mu, cap], [w], solver_args={"path": path})
    caps = tensor([[0.5, 0.5, 0.5, 0.5]] * 3).requires_grad_()
    (found,) = layer(tensor([[9.0, 8.0, 1.0, 0.0], [0.0, 9.0, 9.0, 1.0], [5.0, 0.0, 0.0, 9.0]]), caps)
    close(found.detach().sort(1).values, tensor([[0.0, 0.0, 0.5, 0.5]] * 3), 1e-9)
    for k in range(4):
        (gradient,) = torch.autograd.grad(found[:, k].sum(), caps, retain_graph=True)
        close(gradient, gradient.round(), 1e-9)  # 0, 1 or -1: a neighbour of the point, not a mean of them
    (gradient,) = torch.autograd.grad(found.sum(), caps)
    close(gradient, torch.zeros_like(caps), 1e-9)


def test_lanes_that_let_go_leave_the_others_alone():
    layer = norm_mpc("lanes", True)
    generic = 0.3 * torch.randn(11, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixed = generic.clone()
    mixed[::3] = 0.0
    mixed[1::3, 1] = 0.0
    expected, found = layer.solve(generic), layer.solve(mixed)
    assert (found.status == Status.SOLVED).all()
    for ours, theirs in zip(found.variables, expected.variables):
        assert torch.equal(ours[2::3], theirs[2::3])


@pytest.mark.parametrize("n", [20, 60])  # more constraints to let go than basis.DROPS
def test_every_kink_at_a_point_that_equalities_fix(n):
    """min |x|_1 s.t. Ax = b has one point, whose derivative is A^-1 although all of b = 0 is at kinks."""
    A = np.eye(n) + 0.3 * np.random.default_rng(0).normal(size=(n, n)) / np.sqrt(n)
    x, b = cp.Variable(n), cp.Parameter(n, name="b")
    problem = cp.Problem(cp.Minimize(cp.norm1(x)), [A @ x == b])
    layer = ConvexLayer(problem, [b], [x], solver_args={"path": "lanes"})
    slopes = torch.autograd.functional.jacobian(lambda v: layer(v)[0], torch.zeros(n, dtype=torch.float64))
    close(slopes, tensor(np.linalg.inv(A)), 1e-9)


@pytest.mark.parametrize("n", [10, 40, 100])
def test_a_zero_solution_needs_no_sparse_path(n, monkeypatch):
    """A fused lasso that shrinks everything to zero has n - 1 dependent rows; the lanes solve it by themselves."""
    monkeypatch.setattr(sparse, "solve", None)
    x, y = cp.Variable(n), cp.Parameter(n, name="y")
    cost = 0.5 * cp.sum_squares(x - y) + 0.4 * cp.norm1(cp.diff(x)) + 0.8 * cp.norm1(x)
    layer = ConvexLayer(cp.Problem(cp.Minimize(cost)), [y], [x])
    points = 0.2 * torch.randn(9, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert points.abs().max() < 0.8  # then zero is the solution, and stays so nearby
    points[4] = 0.0
    found = layer.solve(points)
    assert (found.status == Status.SOLVED).all()
    close(found.variables[0], torch.zeros_like(points), 1e-15)
    (gradient,) = torch.autograd.grad(layer(points.requires_grad_())[0].sum(), points)
    close(gradient, torch.zeros_like(points), 1e-12)
