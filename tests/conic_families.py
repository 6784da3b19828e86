"""Families of conic problems: (problem, parameters, outputs, draw), where draw(rng) gives values of one sample."""

import cvxpy as cp
import numpy as np
import torch

from convexlearn.program.compiler import compile_problem
from convexlearn.program.declaration import Declaration
from convexlearn.program.program import ProgramData


def _duals(problem, *which):
    return [d for k in which for d in problem.constraints[k].dual_variables]


def _symmetric(rng, n):
    G = rng.standard_normal((n, n))
    return (G + G.T) / 2


def robust_linear_program():
    """Ellipsoidal uncertainty in every row: second-order cones of one size, with duals."""
    n, m = 4, 6
    x, c = cp.Variable(n), cp.Parameter(n, name="c")
    A, P = cp.Parameter((m, n), name="A"), [cp.Parameter((n, n), name=f"P{i}") for i in range(2)]
    constraints = [cp.SOC(1 - A[i] @ x, P[i % 2] @ x) for i in range(m)] + [x >= -2]
    problem = cp.Problem(cp.Minimize(c @ x), constraints)
    return problem, [c, A, *P], [x, *_duals(problem, 0, 3)], lambda rng: [
        rng.standard_normal(n), rng.standard_normal((m, n)), *(0.2 * rng.standard_normal((2, n, n)) + np.eye(n) / 3),
    ]  # fmt: skip


def group_lasso():
    """A quadratic objective and second-order cones of different sizes, some of them at their apex."""
    F, y, rho = cp.Parameter((8, 6), name="F"), cp.Parameter(8, name="y"), cp.Parameter(nonneg=True, name="rho")
    w = cp.Variable(6)
    cost = 0.5 * cp.sum_squares(F @ w - y) + rho * (cp.norm2(w[:3]) + cp.norm2(w[3:5]) + cp.abs(w[5]))
    return cp.Problem(cp.Minimize(cost)), [F, y, rho], [w], lambda rng: [
        rng.standard_normal((8, 6)), rng.standard_normal(8), np.array(rng.uniform(0.1, 3)),
    ]  # fmt: skip


def markowitz():
    """A linear objective over a risk cone and a 1-norm ball: a vertex of the ball's face."""
    n = 6
    mu, F, w = cp.Parameter(n, name="mu"), cp.Parameter((n, n), name="F"), cp.Variable(n)
    problem = cp.Problem(cp.Maximize(mu @ w), [cp.norm2(F @ w) <= 0.6, cp.sum(w) == 1, cp.norm1(w) <= 1.6])
    return problem, [mu, F], [w, *_duals(problem, 1, 2)], lambda rng: [
        rng.standard_normal(n), np.diag(rng.uniform(0.5, 1.5, n)) + 0.1 * rng.standard_normal((n, n)),
    ]  # fmt: skip


def maximum_entropy():
    n, m = 8, 3
    x, c = cp.Variable(n), cp.Parameter(n, name="c")
    A, b = cp.Parameter((m, n), name="A"), cp.Parameter(m, name="b")
    problem = cp.Problem(cp.Minimize(c @ x - cp.sum(cp.entr(x))), [A @ x == b, x <= 0.9])

    def draw(rng):
        A = rng.standard_normal((m, n))
        return [rng.standard_normal(n), A, A @ rng.uniform(0.1, 0.8, n)]

    return problem, [c, A, b], [x, *_duals(problem, 0, 1)], draw


def logistic_regression():
    """Exponential cones with a quadratic objective."""
    X, y, rho = cp.Parameter((12, 4), name="X"), cp.Parameter(12, name="y"), cp.Parameter(nonneg=True, name="rho")
    w, margin = cp.Variable(4), cp.Variable(12)
    cost = cp.sum(cp.logistic(margin)) - y @ margin + rho * cp.sum_squares(w)
    problem = cp.Problem(cp.Minimize(cost), [margin == X @ w])
    return problem, [X, y, rho], [w, *_duals(problem, 0)], lambda rng: [
        rng.standard_normal((12, 4)), rng.uniform(0, 1, 12), np.array(rng.uniform(0.1, 1)),
    ]  # fmt: skip


def exponential_cones():
    """Points in exponential cones nearest to given ones: the interior, the curved boundary and the flat face."""
    x, y, z = cp.Variable(5), cp.Variable(5), cp.Variable(5)
    t = cp.Parameter((3, 5), name="t")
    cost = cp.sum_squares(x - t[0]) + cp.sum_squares(y - t[1]) + cp.sum_squares(z - t[2])
    problem = cp.Problem(cp.Minimize(cost), [cp.ExpCone(x, y, z)])
    return problem, [t], [x, y, z, *_duals(problem, 0)], lambda rng: [2 * rng.standard_normal((3, 5))]


def power_cones():
    """Points in power cones nearest to given ones, with different exponents."""
    x, y, z = cp.Variable(4), cp.Variable(4), cp.Variable(4)
    t = cp.Parameter((3, 4), name="t")
    cost = cp.sum_squares(x - t[0]) + cp.sum_squares(y - t[1]) + cp.sum_squares(z - t[2])
    problem = cp.Problem(cp.Minimize(cost), [cp.PowCone3D(x, y, z, np.array([0.2, 0.5, 0.7, 0.9]))])
    return problem, [t], [x, y, z, *_duals(problem, 0)], lambda rng: [2 * rng.standard_normal((3, 4))]


def production():
    """Cobb-Douglas output under a budget, and a linear objective."""
    n = 3
    labour, capital, output = cp.Variable(n), cp.Variable(n), cp.Variable(n)
    price, cost, budget = cp.Parameter(n, name="price"), cp.Parameter((2, n), name="cost"), cp.Parameter(name="budget")
    spent = cp.sum(cp.multiply(cost[0], labour) + cp.multiply(cost[1], capital))
    effort = 0.1 * (cp.sum_squares(labour) + cp.sum_squares(capital))
    problem = cp.Problem(
        cp.Maximize(price @ output - effort),
        [cp.PowCone3D(labour, capital, output, np.array([0.3, 0.5, 0.6])), spent <= budget],
    )
    return problem, [price, cost, budget], [labour, output, *_duals(problem, 0, 1)], lambda rng: [
        rng.uniform(1, 3, n), rng.uniform(0.5, 1.5, (2, n)), np.array(rng.uniform(1, 4)),
    ]  # fmt: skip


def nearest_correlation(order):
    X, C = cp.Variable((order, order), symmetric=True), cp.Parameter((order, order), symmetric=True, name="C")
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(X - C)), [X >> 0, cp.diag(X) == 1])
    return problem, [C], [X, *_duals(problem, 0, 1)], lambda rng: [2 * _symmetric(rng, order)]


def matrix_inequality(order):
    """A linear matrix inequality with a linear objective in a ball."""
    x, c = cp.Variable(4), cp.Parameter(4, name="c")
    F = [cp.Parameter((order, order), symmetric=True, name=f"F{i}") for i in range(4)]
    pencil = np.eye(order) + sum(x[i] * F[i] for i in range(4))
    problem = cp.Problem(cp.Minimize(c @ x), [pencil >> 0, cp.norm2(x) <= 3])
    return problem, [c, *F], [x, *_duals(problem, 0, 1)], lambda rng: [
        rng.standard_normal(4), *(_symmetric(rng, order) for _ in range(4)),
    ]  # fmt: skip


def maximum_cut():
    """A linear objective over correlation matrices of order 4: solutions of low rank."""
    X, W = cp.Variable((4, 4), symmetric=True), cp.Parameter((4, 4), symmetric=True, name="W")
    problem = cp.Problem(cp.Minimize(cp.trace(W @ X)), [X >> 0, cp.diag(X) == 1])
    return problem, [W], [X, *_duals(problem, 0, 1)], lambda rng: [_symmetric(rng, 4)]


def log_determinant():
    """Sparse inverse covariance: PSD and exponential cones together."""
    S, C = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3), PSD=True, name="C")
    rho = cp.Parameter(nonneg=True, name="rho")
    problem = cp.Problem(cp.Minimize(cp.trace(C @ S) - cp.log_det(S) + rho * cp.sum(cp.abs(S))))

    def draw(rng):
        G = rng.standard_normal((3, 5))
        return [G @ G.T / 5 + 0.1 * np.eye(3), np.array(rng.uniform(0.05, 0.3))]

    return problem, [C, rho], [S], draw


def all_cones():
    """A quadratic objective with equalities, signs, a second-order, an exponential, a power and a PSD cone."""
    x, t, b = cp.Variable(6), cp.Parameter(6, name="t"), cp.Parameter(name="b")
    matrix = cp.bmat([[x[0] + 1, x[1], x[2]], [x[1], x[3] + 1, x[4]], [x[2], x[4], x[5] + 1]])
    constraints = [
        cp.sum(x) == b,
        x >= -1,
        cp.norm2(x[:4]) <= 1 + x[4],
        cp.exp(x[0]) <= 1.5 + x[5],
        cp.PowCone3D(x[1] + 2, x[2] + 2, x[3], 0.3),
        matrix >> 0,
    ]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), constraints)
    return problem, [t, b], [x, *_duals(problem, 0, 1, 5)], lambda rng: [
        1.5 * rng.standard_normal(6), np.array(rng.uniform(0, 1)),
    ]  # fmt: skip


FAMILIES = {
    "robust linear program": robust_linear_program,
    "group lasso": group_lasso,
    "Markowitz": markowitz,
    "maximum entropy": maximum_entropy,
    "logistic regression": logistic_regression,
    "exponential cones": exponential_cones,
    "power cones": power_cones,
    "production": production,
    "nearest correlation of order 3": lambda: nearest_correlation(3),
    "nearest correlation of order 4": lambda: nearest_correlation(4),
    "matrix inequality of order 3": lambda: matrix_inequality(3),
    "matrix inequality of order 4": lambda: matrix_inequality(4),
    "maximum cut": maximum_cut,
    "log-determinant": log_determinant,
    "all cones": all_cones,
}


def values(draw, batch, seed=0):
    """Parameter values (B, *shape) of `batch` samples, one tensor a parameter."""
    rng = np.random.default_rng(seed)
    samples = [draw(rng) for _ in range(batch)]
    return [torch.tensor(np.stack(column), dtype=torch.float64) for column in zip(*samples)]


def instance(name, batch=3, seed=0):
    """The Program of a family and arrays (P, q, A, b) of a batch, every field expanded."""
    problem, parameters, outputs, draw = FAMILIES[name]()
    compiled = compile_problem(Declaration.of(problem, parameters, outputs))
    given = torch.cat([v.reshape(batch, -1) for v in values(draw, batch, seed)], 1)
    theta = np.concatenate([given.numpy(), np.ones((batch, 1))], 1)
    return compiled.program, tuple(np.ascontiguousarray((compiled.maps[f] @ theta.T).T) for f in ProgramData.FIELDS)
