"""Problems of the kinds that such layers are published with: values by CVXPY, gradients by differences."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from reference import assert_gradients_match_differences, close, cvxpy_values, gradients, tensor

from convexlearn import ConvexLayer
from convexlearn.errors import SolverError


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def parameter(shape, name, value, **attributes):
    return cp.Parameter(shape, name=name, value=np.asarray(value), **attributes)


def constrained_lqr():
    horizon, A = 6, np.array([[1.0, 0.2], [0.0, 1.0]])
    start = parameter(2, "start", [1.0, -0.5])
    root = parameter((2, 2), "root", [[1.0, 0.1], [0.0, 0.8]])
    x, u = cp.Variable((horizon + 1, 2)), cp.Variable((horizon, 1))
    cost, constraints = 0, [x[0] == start]
    for t in range(horizon):
        cost += cp.sum_squares(root @ x[t + 1]) + 0.1 * cp.sum_squares(u[t])
        constraints += [x[t + 1] == A @ x[t] + np.array([[0.0], [0.2]]) @ u[t], cp.abs(u[t]) <= 0.7]
    return cp.Problem(cp.Minimize(cost), constraints), [start, root], [u, x[horizon]]


def least_squares():
    A, b = parameter((6, 3), "A", normal(6, 3)), parameter(6, "b", normal(6, seed=1))
    x = cp.Variable(3)
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b))), [A, b], [x]


def nonnegative_l1_residual():
    """The first example of the readme: minimize |Ax - b|_1 over x >= 0."""
    A, b = parameter((3, 2), "A", normal(3, 2, seed=2)), parameter(3, "b", normal(3, seed=3))
    x = cp.Variable(2)
    return cp.Problem(cp.Minimize(0.5 * cp.pnorm(A @ x - b, p=1)), [x >= 0]), [A, b], [x]


def logistic_regression():
    X, y = normal(8, 2), np.where(normal(8, seed=1) > 0, 1.0, -1.0)
    data = parameter((8, 2), "data", y[:, None] * X)
    ridge = parameter((), "ridge", 0.1, nonneg=True)
    beta = cp.Variable(2)
    loss = cp.sum(cp.logistic(-data @ beta)) / 8 + ridge * cp.sum_squares(beta)
    return cp.Problem(cp.Minimize(loss)), [data, ridge], [beta]


def entropy_maximization():
    x = cp.Variable(5)
    A, b = parameter((2, 5), "A", normal(2, 5)), None
    b = parameter(2, "b", A.value @ np.array([0.1, 0.3, 0.2, 0.15, 0.25]))
    return cp.Problem(cp.Maximize(cp.sum(cp.entr(x))), [A @ x == b, cp.sum(x) == 1]), [A, b], [x]


def limited_multilabel():
    scores, x = parameter(5, "scores", normal(5)), cp.Variable(5)
    objective = -scores @ x - cp.sum(cp.entr(x)) - cp.sum(cp.entr(1 - x))
    return cp.Problem(cp.Minimize(objective), [cp.sum(x) == 2]), [scores], [x]


def sigmoid():
    scores, x = parameter(4, "scores", normal(4)), cp.Variable(4)
    return cp.Problem(cp.Minimize(-scores @ x - cp.sum(cp.entr(x) + cp.entr(1 - x)))), [scores], [x]


def sparsemax():
    scores, x = parameter(5, "scores", normal(5)), cp.Variable(5)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - scores)), [x >= 0, cp.sum(x) == 1]), [scores], [x]


def constrained_sparsemax():
    scores, cap = parameter(5, "scores", normal(5)), parameter(5, "cap", np.full(5, 0.35), nonneg=True)
    x = cp.Variable(5)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - scores)), [x >= 0, x <= cap, cp.sum(x) == 1]), [scores, cap], [x]


def rectified():
    x, y = parameter(6, "x", normal(6)), cp.Variable(6)
    return cp.Problem(cp.Minimize(cp.sum_squares(y - x)), [y >= 0]), [x], [y]


def optimal_transport():
    cost, X = parameter((3, 4), "cost", normal(3, 4)), cp.Variable((3, 4), nonneg=True)
    supply = parameter(3, "supply", [0.22, 0.35, 0.43])
    constraints = [cp.sum(X, axis=1) == supply, cp.sum(X, axis=0)[:3] == 0.25]
    return (
        cp.Problem(cp.Minimize(cp.sum(cp.multiply(cost, X)) + 0.5 * cp.sum_squares(X)), constraints),
        [cost, supply],
        [X],
    )


def second_order_cones():
    c, radius = parameter(3, "c", normal(3)), parameter(2, "radius", [1.0, 1.5])
    x = cp.Variable(3)
    constraints = [
        cp.SOC(radius[k] + 0.1 * normal(3, seed=10 + k) @ x, normal(2, 3, seed=k) @ x + normal(2, seed=5 + k))
        for k in (0, 1)
    ]
    return cp.Problem(cp.Minimize(c @ x + 0.1 * cp.sum_squares(x)), constraints), [c, radius], [x]


def semidefinite():
    half = normal(3, 3)
    C = parameter((3, 3), "C", half + half.T, symmetric=True)
    b = parameter(2, "b", [1.0, 0.3])
    X = cp.Variable((3, 3), symmetric=True)
    weights = np.diag([1.0, 2.0, 3.0]) + 0.1
    constraints = [X >> 0, cp.trace(X) == b[0], cp.trace(weights @ X) <= b[1] + 1.5]
    return cp.Problem(cp.Minimize(cp.trace(C @ X) + 0.1 * cp.sum_squares(X)), constraints), [C, b], [X]


def sparse_covariance():
    half = normal(6, 3)
    S = parameter((3, 3), "S", half.T @ half / 6, symmetric=True)
    weight = parameter((), "weight", 0.1, nonneg=True)
    Theta = cp.Variable((3, 3), symmetric=True)
    off = np.ones((3, 3)) - np.eye(3)
    objective = cp.trace(S @ Theta) - cp.log_det(Theta) + weight * cp.sum(cp.multiply(off, cp.abs(Theta)))
    return cp.Problem(cp.Minimize(objective)), [S, weight], [Theta]


def markowitz():
    half = normal(8, 4)
    mean, root = parameter(4, "mean", 0.1 * normal(4, seed=1)), parameter((8, 4), "root", half / 3)
    gamma = parameter((), "gamma", 2.0, nonneg=True)
    w, risk = cp.Variable(4), cp.Variable(8)
    problem = cp.Problem(
        cp.Maximize(mean @ w - gamma * cp.sum_squares(risk)), [risk == root @ w, cp.sum(w) == 1, cp.norm1(w) <= 1.6]
    )
    return problem, [mean, root, gamma], [w]


def signal_denoising():
    noisy, weight = parameter(8, "noisy", normal(8)), parameter((), "weight", 0.4, nonneg=True)
    x = cp.Variable(8)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - noisy) + weight * cp.tv(x))), [noisy, weight], [x]


def elastic_net():
    A, y = normal(8, 4), parameter(8, "y", normal(8, seed=1))
    first, second = parameter((), "first", 0.8, nonneg=True), parameter((), "second", 0.5, nonneg=True)
    x = cp.Variable(4)
    objective = cp.sum_squares(A @ x - y) + first * cp.norm1(x) + second * cp.sum_squares(x)
    return cp.Problem(cp.Minimize(objective)), [y, first, second], [x]


def poisoned_huber():
    A, y = normal(8, 2), parameter(8, "y", normal(8, seed=1) + 2 * np.eye(8)[0])
    x = cp.Variable(2)
    return cp.Problem(cp.Minimize(cp.sum(cp.huber(A @ x - y, 0.5)))), [y], [x]


EXAMPLES = [
    constrained_lqr, least_squares, nonnegative_l1_residual, logistic_regression, entropy_maximization,
    limited_multilabel, sigmoid, sparsemax, constrained_sparsemax, rectified, optimal_transport, second_order_cones,
    semidefinite, sparse_covariance, markowitz, signal_denoising, elastic_net, poisoned_huber,
]  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.__name__)
def test_example(example):
    problem, parameters, outputs = example()
    values = [tensor(p.value) for p in parameters]
    layer = ConvexLayer(problem, parameters, outputs)
    conic = layer.solver.name not in ("quadratic", "dense")
    expected = cvxpy_values(problem, outputs)
    for ours, theirs in zip(layer(*values), expected):
        close(ours, theirs, 1e-5 if conic else 1e-6)
    step, tolerance = (2e-4, 5e-4) if conic else (1e-6, 1e-5)
    assert_gradients_match_differences(layer, values, step=step, tolerance=tolerance)
    batched = [v.expand(2, *v.shape).contiguous() for v in values]
    batched[0] = torch.stack([values[0], 1.05 * values[0]])
    for row, theirs in zip(layer(*batched), expected):
        assert row.shape == (2, *theirs.shape)
        close(row[0], theirs, 1e-5 if conic else 1e-6)
    for single, row in zip(layer(1.05 * values[0], *values[1:]), layer(*batched)):
        close(row[1], single, 1e-6)


def sinkhorn(cost, supply):
    scores, rows = -cost / 0.2, torch.zeros_like(supply)
    for _ in range(500):
        columns = -np.log(3) - torch.logsumexp(scores + rows[:, None], 0)
        rows = supply.log() - torch.logsumexp(scores + columns, 1)
    return (torch.exp(scores + rows[:, None] + columns),)


def test_entropic_transport_agrees_with_sinkhorn():
    """One of its equalities is redundant; SCS leaves a few digits less than elsewhere."""
    cost, supply, X = cp.Parameter((3, 3), name="cost"), cp.Parameter(3, name="supply"), cp.Variable((3, 3))
    problem = cp.Problem(
        cp.Minimize(cp.sum(cp.multiply(cost, X)) - 0.2 * cp.sum(cp.entr(X))),
        [cp.sum(X, axis=1) == supply, cp.sum(X, axis=0) == 1 / 3],
    )
    values = tensor(normal(3, 3)), tensor([0.2, 0.3, 0.5])
    layer = ConvexLayer(problem, [cost, supply], [X])
    close(layer(*values)[0], sinkhorn(*values)[0], 1e-4)
    close(gradients(layer, values)[0], gradients(sinkhorn, values)[0], 1e-3)


def test_geometric_program():
    x, y, z = (cp.Variable(pos=True, name=n) for n in "xyz")
    a, b = (cp.Parameter(pos=True, name=n, value=v) for n, v in (("a", 2.0), ("b", 1.0)))
    c = cp.Parameter(name="c", value=0.5)
    problem = cp.Problem(cp.Minimize(1 / (x * y * z)), [a * (x * y + x * z + y * z) <= b, x >= y**c])
    layer = ConvexLayer(problem, [a, b, c], [x, y, z], gp=True)
    values = tensor(2.0), tensor(1.0), tensor(0.5)
    for ours, theirs in zip(layer(*values), cvxpy_values(problem, [x, y, z], gp=True)):
        close(ours, theirs, 1e-5)
    assert_gradients_match_differences(layer, values, step=1e-3, tolerance=1e-4)
    assert layer(values[0].expand(3), *values[1:])[2].shape == (3,)


def test_geometric_program_in_closed_form():
    """A box of given surface: the cube is largest."""
    h, w, d = (cp.Variable(pos=True) for _ in range(3))
    area = cp.Parameter(pos=True, name="area")
    layer = ConvexLayer(
        cp.Problem(cp.Maximize(h * w * d), [2 * (h * w + h * d + w * d) <= area]), [area], [h, w, d], gp=True
    )
    values = tensor([6.0, 24.0]).requires_grad_()
    for side in layer(values):
        close(side.detach(), (values / 6).sqrt().detach(), 1e-6)
        (slope,) = torch.autograd.grad(side.sum(), values, retain_graph=True)
        close(slope, (1 / (2 * (6 * values).sqrt())).detach(), 1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_agrees_with_the_other_package_where_it_is_installed():
    other = pytest.importorskip("cvxpylayers.torch")
    problem, parameters, outputs = second_order_cones()
    values = [tensor(p.value).requires_grad_() for p in parameters]
    theirs = other.CvxpyLayer(problem, parameters, outputs)
    (expected,) = theirs(*values, solver_args={"solve_method": "SCS", "eps": 1e-10, "mode": "dense"})
    (found,) = ConvexLayer(problem, parameters, outputs)(*values)
    close(found, expected.double(), 1e-6)
    for ours, exact in zip(torch.autograd.grad(found.sum(), values), torch.autograd.grad(expected.sum(), values)):
        close(ours, exact, 1e-5)


def test_training_loop():
    """The usual example: learn a problem's data so that its solution is given."""
    problem, parameters, outputs = sparsemax()
    layer = ConvexLayer(problem, parameters, outputs)
    scores = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    wanted = tensor([0.1, 0.2, 0.4, 0.3, 0.0])
    optimizer = torch.optim.SGD([scores], lr=0.5)
    for _ in range(40):
        optimizer.zero_grad()
        loss = (layer(scores)[0] - wanted).square().sum()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-6


def test_infeasible_batches_raise_the_usual_error():
    diffcp = pytest.importorskip("diffcp")
    x, b = cp.Variable(1), cp.Parameter(1, name="b")
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum(x)), [x >= 1, x <= b]), [b], [x])
    with pytest.raises(diffcp.SolverError):
        layer(torch.zeros(1, requires_grad=True))
    with pytest.raises(SolverError, match="sample 1 is INFEASIBLE"):
        layer(tensor([[2.0], [0.0]]))
