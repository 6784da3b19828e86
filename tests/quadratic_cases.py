"""Families of QPs and LPs with random data, compiled to programs, and programs built from dense matrices."""

import cvxpy as cp
import numpy as np
import torch

from convexlearn.program.compiler import compile_problem
from convexlearn.program.data_map import DataMap
from convexlearn.program.declaration import Declaration
from convexlearn.program.program import Cones, Program, ProgramData, Sparsity


def mpc(bound):
    n, m, horizon = 3, 2, 4
    A, B = cp.Parameter((n, n), name="A"), cp.Parameter((n, m), name="B")
    Q, x0 = cp.Parameter((n, n), name="Q"), cp.Parameter(n, name="x0")
    u, x = cp.Variable((horizon, m)), cp.Variable((horizon + 1, n))
    cost, constraints = cp.sum_squares(x[horizon]), [x[0] == x0]
    for t in range(horizon):
        cost += 0.3 * cp.sum_squares(u[t]) + cp.sum_squares(Q @ x[t])
        constraints += [x[t + 1] == A @ x[t] + B @ u[t], *bound(u[t])]
    return cp.Problem(cp.Minimize(cost), constraints), [A, B, Q, x0]


def lasso(rows=8, cols=12):
    H, rho, y = cp.Parameter((rows, cols), name="H"), cp.Parameter(nonneg=True, name="rho"), cp.Parameter(rows)
    s = cp.Variable(cols)
    return cp.Problem(cp.Minimize(0.5 * cp.sum_squares(y - H @ s) + rho * cp.norm1(s))), [H, rho, y]


def portfolio():
    n = 6
    mu, F, w = cp.Parameter(n, name="mu"), cp.Parameter((3, n), name="F"), cp.Variable(n)
    held = cp.Parameter(n, name="held")
    risk = cp.sum_squares(F @ w) + 0.1 * cp.sum_squares(w)
    cost = risk - mu @ w + 0.3 * cp.norm1(w - held)
    return cp.Problem(cp.Minimize(cost), [cp.sum(w) == 1, w >= 0, w <= 0.5, w[0] <= 0.4]), [mu, F, held]


def total_variation():
    y, x = cp.Parameter(10, name="y"), cp.Variable(10)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y) + 0.5 * cp.tv(x))), [y]


def simplex():
    y, x = cp.Parameter(9, name="y"), cp.Variable(9)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.sum(x) == 1, x >= 0]), [y]


def polytope():
    y, x = cp.Parameter(6, name="y"), cp.Variable(6)
    C = np.random.default_rng(4).standard_normal((15, 6))
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [C @ x <= 0.5, x[0] + x[1] == 0.1, x >= -1]), [y]


def bounded_states():
    n, m, horizon = 3, 2, 4
    A, B, x0 = cp.Parameter((n, n), name="A"), cp.Parameter((n, m), name="B"), cp.Parameter(n, name="x0")
    u, x, over = cp.Variable((horizon, m)), cp.Variable((horizon + 1, n)), cp.Variable((horizon, n))
    cost, constraints = (
        cp.sum_squares(x) + 0.3 * cp.sum_squares(u) + cp.sum(over + 5 * over**2),
        [x[0] == x0, over >= 0],
    )
    for t in range(horizon):
        constraints += [x[t + 1] == A @ x[t] + B @ u[t], cp.abs(u[t]) <= 0.5]
        constraints += [x[t + 1] <= 0.3 + over[t], x[t + 1] >= -0.3 - over[t]]
    return cp.Problem(cp.Minimize(cost), constraints), [A, B, x0]


def quantiles():
    y, q = cp.Parameter(9, name="y"), cp.Variable()
    cost = cp.sum(0.3 * cp.pos(y - q) + 0.7 * cp.neg(y - q)) + 0.01 * cp.square(q)
    return cp.Problem(cp.Minimize(cost)), [y]


def scaled_bounds():
    t, x, y = cp.Parameter(5, name="t"), cp.Variable(5), cp.Variable(5)
    constraints = [2 * x <= t + 3, -4 * x <= 1, x <= 9, y == 3 * x + t, cp.sum(y) >= -1, cp.abs(x[0]) <= 2]
    cost = cp.sum_squares(x - t) + cp.sum_squares(y) + 0.2 * cp.norm1(x)
    return cp.Problem(cp.Minimize(cost), constraints), [t]


FAMILIES = {
    "norm_inf": lambda: mpc(lambda u: [cp.norm_inf(u) <= 0.5]),
    "abs": lambda: mpc(lambda u: [cp.abs(u) <= 0.5]),
    "two sides": lambda: mpc(lambda u: [u <= 0.5, u >= -0.4]),
    "lasso": lasso,
    "portfolio": portfolio,
    "total variation": total_variation,
    "simplex": simplex,
    "polytope": polytope,
    "bounded states": bounded_states,
    "quantiles": quantiles,
    "scaled bounds": scaled_bounds,
}


def shared_fields(data):
    """The same data with fields that don't vary stored once."""
    fields = [f[:1].clone() if bool((f == f[:1]).all()) else f for f in data.fields()]
    return ProgramData(*fields, batch=data.batch)


def instance(name, batch=5, seed=0, shared=()):
    """A compiled family and random data; parameters batched but for those whose names are in `shared`."""
    problem, parameters = FAMILIES[name]()
    rng = np.random.default_rng(seed)
    values = []
    for p in parameters:
        value = rng.standard_normal((batch, *p.shape)) * (0.7 if len(p.shape) == 2 else 1.0)
        value = torch.tensor(np.abs(value) + 0.1 if p.is_nonneg() else value).reshape(batch, -1)
        values.append(value[:1].expand(batch, -1) if p.name() in shared else value)
    program, data = filled(problem, parameters, values, batch)
    return program, shared_fields(data) if shared else data


def filled(problem, parameters, values, batch):
    """A compiled problem and its data for values (batch, size) of the parameters, all of them expanded."""
    compiled = compile_problem(Declaration.of(problem, parameters, problem.variables()))
    widths = tuple(v.shape[1] for v in values)
    data = DataMap(compiled, widths, (True,) * len(values))(torch.ones(1, 1).double(), torch.cat(values, 1), batch)
    return compiled.program, data.expanded()


def arrays(data):
    return tuple(np.ascontiguousarray(f.numpy()) for f in data.fields())


def dense(pattern, values, symmetric=False):
    matrix = np.zeros(pattern.shape)
    matrix[pattern.rows, pattern.cols] = values
    return matrix + np.triu(matrix, 1).T if symmetric else matrix


def program_of(P, A, zero, fixed):
    rows, cols = np.nonzero(np.triu(P).T)
    upper = Sparsity(cols.astype(np.int32), rows.astype(np.int32), P.shape)
    cols_A, rows_A = np.nonzero(A.T)
    full = Sparsity(rows_A.astype(np.int32), cols_A.astype(np.int32), A.shape)
    m = len(A)
    return Program(P.shape[0], m, Cones(zero=zero, nonneg=m - zero), upper, full, fixed(upper, full))
