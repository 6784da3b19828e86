import contextlib

import cvxpy as cp
import numpy as np
import pytest
import torch
from reference import assert_as_cvxpy, close, gradients, tensor
from solver_contract import CLOSED_FORMS, layer_or_skip, normal

from convexlearn import ConvexLayer, Status
from convexlearn.errors import AdjointWarning
from convexlearn.program.program import Cones, Program, ProgramData, Sparsity
from convexlearn.solvers.base import dual_infeasible, primal_infeasible
from convexlearn.solvers.quadratic.dense import Dense, DenseOptions

QUADRATIC = [n for n in CLOSED_FORMS if n not in ("norm ball", "exponential cones") and "semidefinite" not in n]


def full(rows, cols):
    col, row = np.meshgrid(np.arange(cols), np.arange(rows), indexing="ij")
    return Sparsity(row.ravel().astype(np.int32), col.ravel().astype(np.int32), (rows, cols))


def upper(n):
    pattern = full(n, n)
    kept = pattern.rows <= pattern.cols
    return Sparsity(pattern.rows[kept], pattern.cols[kept], (n, n))


def stated(P, q, A, b, zero):
    """Program and data of one dense problem, all numpy: minimize x'Px/2 + q'x, the first `zero` rows equalities."""
    n, m = len(q), len(b)
    program = Program(n, m, Cones(zero, m - zero), upper(n), full(m, n))
    entries = P[program.P.rows, program.P.cols], q, A[program.A.rows, program.A.cols], b
    return program, ProgramData(*(tensor(e)[None] for e in entries), batch=1)


def known(rng, n, zero, inequalities):
    """A random problem built backwards from its strictly complementary solution; half of the freedom is taken."""
    half, active = rng.normal(size=(n, n + 2)), min(zero + (n - zero) // 2, zero + inequalities)
    P, A = half @ half.T, rng.normal(size=(zero + inequalities, n))
    x, s, z = rng.normal(size=n), 0.1 + rng.exponential(size=len(A)), 0.1 + rng.exponential(size=len(A))
    s[:active], z[active:], z[:zero] = 0, 0, rng.normal(size=zero)
    return (P, -P @ x - A.T @ z, A, A @ x + s, zero), x, z


@pytest.mark.parametrize("seed", range(8))
def test_random_strictly_convex_programs(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    parts, x, z = known(rng, n, int(rng.integers(0, n // 2 + 1)), int(rng.integers(0, 2 * n)))
    solution = Dense().solve(*stated(*parts), DenseOptions())
    assert solution.status.item() == Status.SOLVED
    close(solution.x[0], tensor(x), 1e-8)
    close(solution.z[0], tensor(z), 1e-7)


@pytest.mark.parametrize("seed", range(6))
def test_badly_scaled_rows_change_nothing(seed):
    rng = np.random.default_rng(seed)
    (P, q, A, b, zero), x, _ = known(rng, 6, 2, 9)
    scale = 10 ** rng.uniform(-4, 4, size=len(b))
    outcome = []
    for r in (np.ones_like(scale), scale):
        program, data = stated(P, q, r[:, None] * A, r * b, zero)
        solution = Dense().solve(program, data, DenseOptions())
        assert solution.status.item() == Status.SOLVED
        close(solution.x[0], tensor(x), 1e-8)
        gradient = Dense().adjoint(solution, normal(1, 6), torch.zeros_like(solution.z))
        outcome.append((solution.z[0] * tensor(r), gradient.q[0], gradient.b[0] * tensor(r)))
    for ours, exact in zip(outcome[1], outcome[0]):
        close(ours, exact, 1e-7)


@pytest.mark.parametrize("exponent", [-5, 5])
def test_badly_scaled_objective(exponent):
    (P, q, A, b, zero), x, z = known(np.random.default_rng(0), 6, 1, 8)
    scale = 10.0**exponent
    solution = Dense().solve(*stated(scale * P, scale * q, A, b, zero), DenseOptions())
    close(solution.x[0], tensor(x), 1e-8)
    close(solution.z[0] / scale, tensor(z), 1e-7)


def transport(rows=4, cols=5):
    X, cost = cp.Variable((rows, cols), nonneg=True), cp.Parameter((rows, cols), name="cost")
    supply, demand = np.full(rows, 1 / rows), np.full(cols, 1 / cols)
    problem = cp.Problem(
        cp.Minimize(cp.sum(cp.multiply(cost, X))), [cp.sum(X, axis=1) == supply, cp.sum(X, axis=0) == demand]
    )
    return problem, [cost], [X]


def test_transport_with_a_redundant_equality():
    problem, parameters, outputs = transport()
    parameters[0].value = normal(4, 5).numpy()
    layer = ConvexLayer(problem, parameters, outputs, solver="dense")
    assert_as_cvxpy(layer, problem, parameters, outputs)
    (found,) = gradients(layer, [normal(3, 4, 5)])
    close(found, torch.zeros_like(found), 1e-6)


@pytest.mark.parametrize("name", QUADRATIC)
def test_second_derivatives(name):
    problem, parameters, outputs, values, _ = CLOSED_FORMS[name]()
    layer = layer_or_skip(problem, parameters, outputs, Dense())
    small = [v[:1] if v.dim() > len(p.shape) else v for v, p in zip(values, parameters)]
    leaves = [v.clone().requires_grad_() for v in small]
    assert torch.autograd.gradgradcheck(layer, leaves, eps=1e-5, atol=1e-4, rtol=1e-3, fast_mode=True)


def test_hessian_equals_the_closed_form():
    x, a = cp.Variable(2), cp.Parameter(nonneg=True, name="a")
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - 1) + a * cp.sum_squares(x))), [a], [x], solver="dense"
    )
    value = tensor(0.5).requires_grad_()
    (first,) = torch.autograd.grad(layer(value)[0].sum(), value, create_graph=True)
    (second,) = torch.autograd.grad(first, value, create_graph=True)
    (third,) = torch.autograd.grad(second, value)
    close(torch.stack([first, second, third]).detach(), tensor([-2 / 1.5**2, 4 / 1.5**3, -12 / 1.5**4]), 1e-8)


@pytest.mark.parametrize("copies", [2, 3])
def test_repeated_constraints(copies):
    """Duals and gradients of copies are not unique, but their sums are, and all are finite."""
    x, t, low = cp.Variable(3), cp.Parameter(3, name="t"), cp.Parameter(name="low")
    outcome = []
    for count in (1, copies):
        constraints = [x >= low] * count + [cp.sum(x) == 1] * count
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), constraints)
        layer = ConvexLayer(problem, [t, low], [x], solver="dense")
        values = tensor([[1.0, -0.5, 0.3], [0.2, 0.5, -1.0]]), tensor(0.05)
        outcome.append((layer(*values)[0], *gradients(layer, values)))
    for ours, exact in zip(outcome[1], outcome[0]):
        assert torch.isfinite(ours).all()
        close(ours, exact, 1e-7)


def test_weakly_active_constraints_give_a_one_sided_derivative():
    x, t = cp.Variable(), cp.Parameter(name="t")
    layer = ConvexLayer(cp.Problem(cp.Minimize((x - t) ** 2), [x >= 0]), [t], [x], solver="dense")
    value = tensor(0.0).requires_grad_()
    (found,) = layer(value)
    close(found.detach(), tensor(0.0), 1e-7)
    (slope,) = torch.autograd.grad(found, value)
    assert 0 <= slope.item() <= 1


def test_fixed_variables():
    x, t, c = cp.Variable(3), cp.Parameter(3, name="t"), cp.Parameter(name="c")
    for constraints in ([x[0] == c], [x[0] >= c, x[0] <= c]):
        layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - t)), constraints), [t, c], [x], solver="dense")
        values = tensor([3.0, 1.0, -1.0]), tensor(0.5)
        close(layer(*values)[0], tensor([0.5, 1.0, -1.0]), 1e-7)
        leaves = [v.clone().requires_grad_() for v in values]
        by_target, by_fixed = torch.autograd.grad(layer(*leaves)[0].sum(), leaves)
        close(by_target, tensor([0.0, 1.0, 1.0]), 1e-6)
        close(by_fixed, tensor(1.0), 1e-6)


def test_variables_without_cost_or_constraint():
    """A free direction: the solution is one of many, and stays finite."""
    x, t = cp.Variable(3), cp.Parameter(name="t")
    problem = cp.Problem(cp.Minimize(cp.square(x[0] - t)), [x[1] <= 5, x[0] + 0 * x[2] <= 9])
    result = ConvexLayer(problem, [t], [x], solver="dense").solve(tensor(2.0))
    assert result.ok
    assert result.variables[0][0].item() == pytest.approx(2.0, abs=1e-8)
    assert torch.isfinite(result.variables[0]).all()
    assert result.variables[0][1] <= 5 + 1e-8


def test_linear_program_with_many_solutions():
    x, c = cp.Variable(3), cp.Parameter(3, name="c")
    layer = ConvexLayer(cp.Problem(cp.Minimize(c @ x), [x >= 0, cp.sum(x) == 1]), [c], [x], solver="dense")
    cost = tensor([1.0, 1.0, 2.0]).requires_grad_()
    result = layer.solve(cost)
    assert result.status.item() == Status.SOLVED
    (found,) = result.variables
    close((found.detach() * cost.detach()).sum(), tensor(1.0), 1e-8)
    with pytest.warns(AdjointWarning, match="1 of 1 samples missed its tolerance"):
        (gradient,) = torch.autograd.grad(found[0], cost)
    assert gradient.abs().max() < 1e3


def test_feasibility_problem():
    x, b = cp.Variable(2), cp.Parameter(name="b")
    layer = ConvexLayer(cp.Problem(cp.Minimize(0), [cp.sum(x) <= b, x >= 1]), [b], [x], solver="dense")
    found = layer(tensor([2.5, 4.0]))[0]
    assert (found >= 1 - 1e-8).all()
    assert (found.sum(1) <= tensor([2.5, 4.0]) + 1e-8).all()
    assert layer.solve(tensor([1.0])).status.item() == Status.INFEASIBLE


def test_no_rows_and_no_columns():
    program, data = stated(np.eye(2), np.array([1.0, -2.0]), np.zeros((0, 2)), np.zeros(0), 0)
    solution = Dense().solve(program, data, DenseOptions())
    close(solution.x, tensor([[-1.0, 2.0]]), 1e-12)
    assert solution.z.shape == (1, 0)
    gradient = Dense().adjoint(solution, torch.ones(1, 2).double(), solution.z)
    close(gradient.q, tensor([[-1.0, -1.0]]), 1e-12)
    close(gradient.P, tensor([[1.0, -1.0, -2.0]]), 1e-12)


CERTIFICATES = {
    "contradicting bounds": (np.zeros((1, 1)), [1.0], [[1.0], [-1.0]], [0.0, -1.0], 0, Status.INFEASIBLE),
    "contradicting equalities": (np.eye(2), [0, 0], [[1.0, 1.0], [2.0, 2.0]], [1.0, 3.0], 2, Status.INFEASIBLE),
    "empty row": (np.eye(1), [0], [[0.0]], [-1.0], 0, Status.INFEASIBLE),
    "nearly contradicting": (np.eye(1), [0], [[1.0], [-1.0]], [0.0, -1e-3], 0, Status.INFEASIBLE),
    "undetermined coordinate": (np.zeros((2, 2)), [1.0, 0], [[-1.0, 0.0]], [1.0], 0, Status.SOLVED),
    "unbounded ray": (np.zeros((2, 2)), [-1.0, 0], [[-1.0, 0.0]], [1.0], 0, Status.UNBOUNDED),
    "flat quadratic": (np.diag([1.0, 0.0]), [0, -1.0], [[1.0, 0.0]], [1.0], 0, Status.UNBOUNDED),
    "unbounded along an equality": (np.zeros((2, 2)), [-1.0, -1.0], [[1.0, -1.0]], [0.0], 1, Status.UNBOUNDED),
}


@pytest.mark.parametrize("name", CERTIFICATES)
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
def test_certificates(name, scale):
    P, q, A, b, zero, expected = CERTIFICATES[name]
    program, data = stated(scale * P, scale * np.array(q, dtype=float), np.array(A), np.array(b), zero)
    solution = Dense().solve(program, data, DenseOptions())
    assert solution.status.item() == expected
    undetermined = pytest.warns(AdjointWarning) if expected == Status.SOLVED else contextlib.nullcontext()
    with undetermined:
        gradient = Dense().adjoint(solution, torch.ones_like(solution.x), torch.ones_like(solution.z))
    assert all(torch.isfinite(g).all() for g in gradient.fields())
    if expected != Status.SOLVED:
        assert solution.x.isnan().all()
        assert not any(g.any() for g in gradient.fields())


def test_certificate_functions():
    program, data = stated(np.zeros((1, 1)), np.array([-1.0]), np.array([[1.0], [-1.0]]), np.array([0.0, -1.0]), 0)
    assert primal_infeasible(program, data, tensor([[1.0, 1.0]]), 1e-9).tolist() == [True]
    assert primal_infeasible(program, data, tensor([[1.0, 0.5]]), 1e-9).tolist() == [False]
    assert primal_infeasible(program, data, tensor([[-1.0, -1.0]]), 1e-9).tolist() == [False]
    assert dual_infeasible(program, data, tensor([[1.0]]), 1e-9).tolist() == [False]
    free, data = stated(np.zeros((1, 1)), np.array([-1.0]), np.array([[-1.0]]), np.array([1.0]), 0)
    assert dual_infeasible(free, data, tensor([[1.0]]), 1e-9).tolist() == [True]


def test_failed_samples_leave_gradients_of_the_others_alone():
    parts, _, _ = known(np.random.default_rng(3), 4, 1, 6)
    program, data = stated(*parts)
    broken = data.b.clone()
    broken[:, 1], broken[:, 2] = -50.0, -50.0
    A = data.A.clone().reshape(4, 7)
    A[:, 2] = -A[:, 1]
    joined = ProgramData(data.P, data.q, torch.cat([data.A, A.reshape(1, -1)]), torch.cat([data.b, broken]), batch=2)
    solution = Dense().solve(program, joined, DenseOptions())
    assert solution.ok.tolist() == [True, False]
    alone = Dense().solve(program, data, DenseOptions())
    weights = normal(2, 4), normal(2, 7)
    ours = Dense().adjoint(solution, *weights)
    exact = Dense().adjoint(alone, *(w[:1] for w in weights))
    for field in ProgramData.FIELDS:
        close(getattr(ours, field)[:1], getattr(exact, field), 1e-10)
    assert not ours.A[1].any()


def test_larger_programs_agree_with_cvxpy():
    rng = np.random.default_rng(0)
    x, r = cp.Variable(30), cp.Parameter(30, name="r", value=rng.normal(size=30))
    half = rng.normal(size=(30, 5))
    constraints = [cp.sum(x) == 1, x >= 0, x <= 0.2, half.T @ x <= 0.1]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(half.T @ x) + 0.1 * cp.sum_squares(x) - r @ x), constraints)
    outputs = [x, *(c.dual_variables[0] for c in constraints)]
    assert_as_cvxpy(ConvexLayer(problem, [r], outputs, solver="dense"), problem, [r], outputs, 1e-6)
