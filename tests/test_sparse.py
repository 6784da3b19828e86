"""Large sparse programs, and the sparse path as the last resort of the others."""

from time import process_time

import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from reference import close, cvxpy_values, tensor

from convexlearn import ConvexLayer, Status
from convexlearn.errors import AdjointWarning, OptionError
from convexlearn.solvers.quadratic import solver, sparse
from convexlearn.solvers.quadratic.solver import QuadraticOptions
from convexlearn.solvers.quadratic.sparse_kkt import Kkt

SPARSE = {"path": "sparse"}


def large(n, rows, per_row=3, seed=0):
    """A strictly convex QP with bounds and random sparse rows, a third of them equalities; q and h are parameters."""
    rng = np.random.default_rng(seed)
    index = np.repeat(np.arange(rows), per_row), rng.integers(0, n, rows * per_row)
    A = sp.csr_array((rng.standard_normal(rows * per_row), index), shape=(rows, n))
    b, equal = A @ rng.uniform(-1, 1, n), rows // 3
    root, x = np.sqrt(rng.uniform(0.05, 1, n)), cp.Variable(n)
    q, h = cp.Parameter(n, name="q"), cp.Parameter(rows - equal, name="h")
    objective = cp.sum_squares(cp.multiply(root, x)) + q @ x
    constraints = [A[:equal] @ x == b[:equal], A[equal:] @ x <= h, x >= -1, x <= 1]
    q.value, h.value = 2 * rng.standard_normal(n), b[equal:] + 0.1
    return cp.Problem(cp.Minimize(objective), constraints), [q, h], [x, constraints[1].dual_variables[0]]


def values(parameters):
    return [tensor(p.value) for p in parameters]


def weights(found, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(f.shape, generator=generator, dtype=torch.float64) for f in found]


def timed(call):
    """The result and the CPU time of a call."""
    start = process_time()
    result = call()
    return result, process_time() - start


def weighted(found):
    return torch.stack([(f * w).sum() for f, w in zip(found, weights(found))]).sum()


def assert_directional(layer, given, step, tolerance, warm=False):
    """Gradients of a random weighting against a central difference along a random direction."""
    leaves = [v.clone().requires_grad_() for v in given]
    weighted(layer(*leaves, warm_start=warm)).backward()
    directions = weights(given, seed=9)
    slope = sum(float((leaf.grad * d).sum()) for leaf, d in zip(leaves, directions))
    with torch.no_grad():
        ahead, behind = (
            float(weighted(layer(*(v + s * step * d for v, d in zip(given, directions)), warm_start=warm)))
            for s in (1, -1)
        )
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=tolerance)


def test_ten_thousand_variables():
    problem, parameters, outputs = large(10_000, 5000)
    layer = ConvexLayer(problem, parameters, outputs)
    given = values(parameters)
    leaves = [v.clone().requires_grad_() for v in given]
    layer.solve(*given)  # analyses the structure, once per layer
    runs = [timed(lambda: layer.solve(*leaves)) for _ in range(5)]
    result, forward = min(runs, key=lambda run: run[1])  # what neighbours on the machine add is not ours
    assert forward < 2
    assert result.status == Status.SOLVED
    assert isinstance(result.solution.private.parts[0][2], sparse.SparsePart)
    assert result.residual < 1e-13
    _, backward = timed(weighted(result.variables).backward)
    assert backward < 1
    for ours, theirs in zip(result.variables, cvxpy_values(problem, outputs)):
        close(ours.detach(), theirs, 2e-5)  # what Clarabel attains; the residual above is ours
    assert_directional(layer, given, 1e-7, 1e-5, warm=result)


def test_agrees_with_the_lanes():
    problem, parameters, outputs = large(300, 150)
    given = [torch.stack([v, 0.9 * v, 1.1 * v]) if k == 0 else v for k, v in enumerate(values(parameters))]
    layers = [ConvexLayer(problem, parameters, outputs, solver_args={"path": p}) for p in ("sparse", "lanes")]
    results = []
    for layer in layers:
        leaves = [v.clone().requires_grad_() for v in given]
        found = layer(*leaves)
        weighted(found).backward()
        results.append([f.detach() for f in found] + [leaf.grad for leaf in leaves])
    for ours, theirs in zip(*results):
        close(ours, theirs, 1e-9)
    assert_directional(layers[0], given, 1e-6, 1e-6)


def test_warm_start_needs_no_interior_point():
    problem, parameters, outputs = large(300, 150)
    layer = ConvexLayer(problem, parameters, outputs, solver_args=SPARSE)
    given = values(parameters)
    first = layer.solve(*given)
    again = layer.solve(given[0] + 1e-3, given[1], warm_start=first)
    assert first.iterations > 0
    assert again.iterations == 0
    assert again.residual < 1e-13


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_matter(threads):
    problem, parameters, outputs = large(200, 100)
    given = values(parameters)
    batch = torch.stack([given[0], -given[0], 0.5 * given[0]])
    found = []
    for count in (1, threads):
        layer = ConvexLayer(problem, parameters, outputs, solver_args={"path": "sparse", "threads": count})
        leaf = given[1].clone().requires_grad_()
        out = layer(batch, leaf)
        weighted(out).backward()
        found.append([*out, leaf.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_statuses_of_a_mixed_batch():
    x, c, a = cp.Variable(2), cp.Parameter(2, name="c"), cp.Parameter(2, name="a")
    problem = cp.Problem(cp.Minimize(c @ x), [x >= 0, a[0] * x[0] <= 1, x[1] <= a[1]])
    layer = ConvexLayer(problem, [c, a], [x], on_failure="nan", solver_args=SPARSE)
    costs = tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]).requires_grad_()
    limits = tensor([[0.5, 1.0], [0.0, 1.0], [1.0, -1.0], [1.0, 1.0]]).requires_grad_()
    result = layer.solve(costs, limits)
    assert result.status.tolist() == [Status.SOLVED, Status.UNBOUNDED, Status.INFEASIBLE, Status.SOLVED]
    result.variables[0][[0, 3]].sum().backward()
    close(limits.grad, tensor([[-4.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), 1e-10)
    assert costs.grad.abs().max() < 1e-10


def test_degenerate_active_sets_have_finite_gradients():
    x, t, h = cp.Variable(3), cp.Parameter(3, name="t"), cp.Parameter(4, name="h")
    rows = np.array([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [1.0, 1.0, 0]])  # twice, and a sum of others
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [rows @ x <= h])
    layer = ConvexLayer(problem, [t, h], [x, problem.constraints[0].dual_variables[0]], solver_args=SPARSE)
    t_, h_ = tensor([2.0, 2.0, 0.5]).requires_grad_(), tensor([1.0, 1.0, 1.0, 2.0]).requires_grad_()
    found, dual = layer(t_, h_)
    close(found.detach(), tensor([1.0, 1.0, 0.5]), 1e-12)
    assert (dual >= 0).all()
    found.sum().backward()
    assert h_.grad.isfinite().all()
    assert h_.grad.abs().max() < 10
    close(t_.grad, tensor([0.0, 0.0, 1.0]), 1e-9)


def test_linear_program_with_many_solutions():
    x, c = cp.Variable(3), cp.Parameter(3, name="c")
    problem = cp.Problem(cp.Minimize(c @ x), [cp.sum(x) == 1, x >= 0])
    layer = ConvexLayer(problem, [c], [x], solver_args=SPARSE)
    cost = tensor([1.0, 1.0, 2.0]).requires_grad_()
    (found,) = layer(cost)
    assert float(found.detach() @ cost.detach()) == pytest.approx(1.0, abs=1e-10)
    with pytest.warns(AdjointWarning, match="not unique"):
        found[:1].sum().backward()
    assert cost.grad.isfinite().all()
    assert cost.grad.abs().max() < 1e3


def test_singular_system_gets_the_least_solution():
    problem, parameters, _ = large(20, 10)
    layer = ConvexLayer(problem, parameters, [problem.variables()[0]], solver_args=SPARSE)
    program = layer._compiled.program
    P, A = np.zeros(program.P.nnz), np.ones(program.A.nnz)
    active = np.arange(program.m) < 5
    kkt = Kkt(program, P, A, active)
    K = kkt.K.toarray() / np.outer(kkt.scale, kkt.scale)
    right = np.random.default_rng(0).standard_normal(len(K))
    x, z = kkt.solve(right[: program.n], right[program.n :])
    right *= kkt.scale  # least squares in the equilibrated coordinates
    expected = np.linalg.pinv(kkt.K.toarray()) @ right
    np.testing.assert_allclose(np.concatenate([x, z]) / kkt.scale, expected, atol=1e-6)


def test_last_resort(monkeypatch):
    problem, parameters, outputs = large(60, 30)
    given = values(parameters)
    batch = torch.stack([given[0], 0.9 * given[0], 1.1 * given[0]])
    exact = ConvexLayer(problem, parameters, outputs)(batch, given[1])

    def spoiled(*arguments):
        outcome = solve_lanes(*arguments)
        outcome.x[1] += 1.0
        outcome.residual[1] = 1.0
        return outcome

    solve_lanes = solver.solve_lanes
    monkeypatch.setattr(solver, "solve_lanes", spoiled)
    leaf, reference = (batch.clone().requires_grad_() for _ in range(2))
    layer = ConvexLayer(problem, parameters, outputs)
    found = layer.solve(leaf, given[1])
    assert found.status.tolist() == [Status.SOLVED] * 3
    assert len(found.solution.private.parts) == 2
    for ours, theirs in zip(found.variables, exact):
        close(ours.detach(), theirs, 1e-10)
    weighted(found.variables).backward()
    monkeypatch.undo()
    weighted(ConvexLayer(problem, parameters, outputs)(reference, given[1])).backward()
    close(leaf.grad, reference.grad, 1e-10)


@pytest.mark.parametrize("path", ["sparse", "lanes"])
@pytest.mark.parametrize("option", [{"time_limit": 1e-9}, {"max_iterations": 1}])
def test_limits_return_the_iterate(path, option):
    problem, parameters, outputs = large(200, 100)
    layer = ConvexLayer(problem, parameters, outputs, solver_args={"path": path})
    with pytest.warns(UserWarning, match="limit"):
        found = layer(*values(parameters), solver_args=option)
    assert all(f.isfinite().all() for f in found)


def test_smoothing_is_refused():
    with pytest.raises(OptionError, match="smoothing"):
        QuadraticOptions(path="sparse", smoothing=1e-3)


def test_no_rows_and_not_a_number():
    x, t = cp.Variable(3), cp.Parameter(3, name="t")
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - t))), [t], [x], solver_args=SPARSE)
    result = layer.solve(tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
    close(result.variables[0][1], tensor([3.0, 2.0, 1.0]), 1e-12)
    data = result.solution.data
    spoiled = data.replaced(q=torch.cat([data.q[:1] * torch.nan, data.q[:1]]), batch=2)
    found = layer.solver.solve(result.solution.program, spoiled, QuadraticOptions(path="sparse"))
    assert found.status.tolist() == [Status.FAILED, Status.SOLVED]
