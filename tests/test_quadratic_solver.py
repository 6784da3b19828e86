"""The quadratic solver as a whole: statuses, duals, gradients, degenerate cases, threads, processes."""

import os
import subprocess
import sys
import threading

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratic_cases import FAMILIES, instance, program_of, shared_fields
from reference import assert_as_cvxpy

from convexlearn import ConvexLayer
from convexlearn.errors import OptionError
from convexlearn.program.program import ProgramData, Status
from convexlearn.solvers.base import polyhedral_residual
from convexlearn.solvers.quadratic.solver import Quadratic, QuadraticOptions

OPTIONS = QuadraticOptions()


def nothing_fixed(upper, full):
    return None


def random_qp(rng, n=8, zero=2, m=12, batch=6, rank=None):
    """A feasible, bounded batch with dense data, all batched."""
    F = rng.standard_normal((batch, n, n if rank is None else rank))
    P = F @ F.transpose(0, 2, 1)
    A = rng.standard_normal((batch, m, n))
    x, slack = rng.standard_normal((batch, n)), np.c_[np.zeros((batch, zero)), rng.random((batch, m - zero))]
    b = np.einsum("bij,bj->bi", A, x) + slack
    dual = rng.standard_normal((batch, m)) * (slack == 0) + rng.random((batch, m)) * (np.arange(m) >= zero)
    q = -np.einsum("bij,bj->bi", P, x) - np.einsum("bij,bi->bj", A, dual)
    return batch_of(P, q, A, b, zero)


def batch_of(P, q, A, b, zero):
    program = program_of(np.ones(P.shape[1:]), np.ones(A.shape[1:]), zero, nothing_fixed)
    values = (P[:, program.P.rows, program.P.cols], q, A[:, program.A.rows, program.A.cols], b)
    return program, ProgramData(*(torch.tensor(np.ascontiguousarray(v)) for v in values), batch=len(q))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([None, 3, 0]), st.integers(0, 3))
def test_random_batches_are_solved_to_rounding(seed, rank, zero):
    """QPs, singular QPs and LPs that are feasible and bounded by construction."""
    program, data = random_qp(np.random.default_rng(seed), rank=rank, zero=zero)
    solution = Quadratic().solve(program, data, OPTIONS)
    assert (solution.status == Status.SOLVED).all()
    assert polyhedral_residual(program, data, solution.x, solution.z).max() < 1e-9


@pytest.mark.parametrize("field", ["P", "q", "A", "b"])
def test_gradients_of_all_data_match_central_differences(field):
    program, data = random_qp(np.random.default_rng(1))
    solver, generator = Quadratic(), torch.Generator().manual_seed(0)
    solution = solver.solve(program, data, OPTIONS)
    dx, dz, direction = (
        torch.randn(v.shape, generator=generator, dtype=torch.float64)
        for v in (solution.x, solution.z, getattr(data, field))
    )
    gradient = getattr(solver.adjoint(solution, dx, dz), field)

    def values(step):
        other = solver.solve(program, data.replaced(**{field: getattr(data, field) + step * direction}), OPTIONS)
        return (other.x * dx).sum(1) + (other.z * dz).sum(1)

    expected = (values(1e-6) - values(-1e-6)) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_values_and_duals_are_those_of_cvxpy(name):
    problem, parameters = FAMILIES[name]()
    rng = np.random.default_rng(0)
    for p in parameters:
        value = rng.standard_normal(p.shape)
        p.value = np.abs(value) + 0.1 if p.is_nonneg() else value
    outputs = [*problem.variables(), *(c.dual_variables[0] for c in problem.constraints)]
    layer = ConvexLayer(problem, parameters, outputs, solver=Quadratic())
    assert_as_cvxpy(layer, problem, parameters, outputs, tolerance=1e-6)


def mixed_batch():
    """min x^2 + y over a <= x <= b, c y >= d: solved, infeasible, unbounded and degenerate samples."""
    P = np.zeros((5, 2, 2))
    P[:, 0, 0] = 2.0
    A = np.tile(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, -1.0]]), (5, 1, 1))
    A[2, 2, 1] = 1.0  # y <= -d: unbounded below
    q = np.tile(np.array([0.0, 1.0]), (5, 1))
    b = np.array([[2.0, -1.0, 1.0], [1.0, -2.0, 1.0], [2.0, -1.0, 1.0], [0.0, 0.0, 1.0], [2.0, -1.0, np.nan]])
    return batch_of(P, q, A, b, 0)


def test_statuses_of_a_mixed_batch():
    program, data = mixed_batch()
    solution = Quadratic().solve(program, data, OPTIONS)
    expected = [Status.SOLVED, Status.INFEASIBLE, Status.UNBOUNDED, Status.SOLVED, Status.FAILED]
    assert solution.status.tolist() == expected
    torch.testing.assert_close(solution.x[[0, 3]], torch.tensor([[1.0, -1.0], [0.0, -1.0]]).double(), rtol=0, atol=1e-9)
    gradient = Quadratic().adjoint(solution, torch.ones_like(solution.x), torch.ones_like(solution.z))
    for name, field in zip("PqAb", gradient.fields()):
        assert torch.isfinite(field).all(), name
        assert (field[[1, 2, 4]] == 0).all(), name
    alone = data.select(torch.tensor([0]))
    single = Quadratic().solve(program, alone, OPTIONS)
    torch.testing.assert_close(single.x[0], solution.x[0], rtol=0, atol=1e-12)


def test_shared_data_keep_their_leading_dimension_with_failed_samples():
    program, data = mixed_batch()
    data = shared_fields(data)
    assert data.shared("P")
    solution = Quadratic().solve(program, data, OPTIONS)
    gradient = Quadratic().adjoint(solution, torch.ones_like(solution.x), torch.zeros_like(solution.z))
    for given_, field in zip(data.fields(), gradient.fields()):
        assert field.shape == given_.shape
        assert torch.isfinite(field).all()


def test_duplicated_and_weakly_active_constraints_have_finite_gradients():
    """min (x - t)^2, x <= 1 twice, at t = 1 (weakly active) and t = 2 (duplicated multiplier)."""
    x, t = cp.Variable(), cp.Parameter(name="t")
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.square(x - t)), [x <= 1, x <= 1]), [t], [x], solver=Quadratic())
    value = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    (out,) = layer(value)
    torch.testing.assert_close(out.detach(), torch.tensor([1.0, 1.0, 0.5]).double(), rtol=0, atol=1e-9)
    (gradient,) = torch.autograd.grad(out.sum(), value)
    assert 0 <= gradient[0] <= 1
    torch.testing.assert_close(gradient[1:], torch.tensor([0.0, 1.0]).double(), rtol=0, atol=1e-9)


def test_lp_vertex_and_smoothing():
    """min c'x over the simplex: zero gradient at a vertex, that of the central path with smoothing."""
    x, c = cp.Variable(3), cp.Parameter(3, name="c")
    problem = cp.Problem(cp.Minimize(c @ x), [cp.sum(x) == 1, x >= 0])
    cost = torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64, requires_grad=True)
    (vertex,) = ConvexLayer(problem, [c], [x], solver=Quadratic())(cost)
    torch.testing.assert_close(vertex.detach(), torch.tensor([1.0, 0.0, 0.0]).double(), rtol=0, atol=1e-9)
    assert torch.autograd.grad(vertex[0], cost)[0].abs().max() < 1e-9
    mu = 0.05
    layer = ConvexLayer(problem, [c], [x], solver=Quadratic(), solver_args={"smoothing": mu})
    (smooth,) = layer(cost)
    ratio = mu / smooth.detach() - cost.detach()  # x_i (c_i + y) = mu
    torch.testing.assert_close(ratio, ratio.mean().expand(3), rtol=0, atol=1e-7)
    gradient = torch.autograd.grad(smooth[0], cost)[0]
    weight = smooth.detach() ** 2 / mu
    expected = -weight[0] * (torch.tensor([1.0, 0.0, 0.0]) - weight / weight.sum())
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


def test_second_derivatives():
    x, t = cp.Variable(3), cp.Parameter(3, name="t")
    H = cp.Parameter((3, 3), name="H")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(H @ x - t) + 0.1 * cp.sum_squares(x)), [x <= 0.3])
    layer = ConvexLayer(problem, [H, t], [x], solver=Quadratic())
    rng = np.random.default_rng(0)
    values = [torch.tensor(rng.standard_normal(s), requires_grad=True) for s in ((3, 3), (3,))]
    assert torch.autograd.gradgradcheck(lambda *v: layer(*v)[0], values)


def test_warm_start_saves_iterations():
    program, data = random_qp(np.random.default_rng(3), n=20, m=40)
    solver = Quadratic()
    cold = solver.solve(program, data, OPTIONS)
    moved = data.replaced(q=data.q * (1 + 1e-6))
    warm, again = solver.solve(program, moved, OPTIONS, cold), solver.solve(program, moved, OPTIONS)
    assert warm.iterations.sum() < again.iterations.sum()
    torch.testing.assert_close(warm.x, again.x, rtol=0, atol=1e-9)
    program, data = instance("norm_inf", batch=20, shared=("A", "B", "Q"))
    cold = solver.solve(program, data, OPTIONS)
    warm = solver.solve(program, data, OPTIONS, cold)
    assert (warm.iterations <= 1).all()
    torch.testing.assert_close(warm.x, cold.x, rtol=0, atol=1e-12)


def test_empty_batch_and_no_constraints():
    program, data = random_qp(np.random.default_rng(0))
    nothing = data.select(torch.zeros(6, dtype=torch.bool))
    solution = Quadratic().solve(program, nothing, OPTIONS)
    assert solution.x.shape == (0, 8)
    gradient = Quadratic().adjoint(solution, solution.x, solution.z)
    assert gradient.A.shape == (0, program.A.nnz)
    x, t = cp.Variable(2), cp.Parameter(2, name="t")
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - t))), [t], [x], solver=Quadratic())
    torch.testing.assert_close(layer(torch.tensor([[1.0, -2.0]]))[0], torch.tensor([[1.0, -2.0]]))


def test_bitwise_the_same_for_any_number_of_threads():
    program, data = random_qp(np.random.default_rng(5), batch=100)
    data = ProgramData(data.P[:1], data.q, data.A, data.b, 100)
    solver, results = Quadratic(), []
    for threads in (1, 2, 4):
        solution = solver.solve(program, data, QuadraticOptions(threads=threads))
        gradient = solver.adjoint(solution, solution.x, solution.z)
        results.append((solution.x, solution.z, *gradient.fields()))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


def test_two_threads_use_the_solver_at_once():
    cases = [instance(name, batch=40, shared=("A", "B", "Q")) for name in ("norm_inf", "portfolio")]
    solver = Quadratic()
    expected = [solver.solve(*case, OPTIONS).x for case in cases]
    found: list = [None, None]

    def work(k):
        for _ in range(10):
            found[k] = solver.solve(*cases[k], OPTIONS).x

    workers = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


FORKED = """
import os, sys
import numpy as np, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from quadratic_cases import instance
from convexlearn.solvers.quadratic.solver import Quadratic, QuadraticOptions
options = QuadraticOptions(threads=2)
cases = [instance("norm_inf", 70, shared=("A", "B", "Q")), instance("portfolio", 70)]
expected = [Quadratic().solve(*case, options).x for case in cases]
child = os.fork()
if child == 0:
    same = all(torch.equal(Quadratic().solve(*c, options).x, x) for c, x in zip(cases, expected))
    os._exit(0 if same else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_solves_too():
    program = FORKED.format(tests=os.path.dirname(__file__))
    run = subprocess.run([sys.executable, "-c", program], timeout=300, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_importing_loads_nothing_compiled():
    """CVXPY may import numba by itself (through moreau); our kernels wait for the first solve."""
    program = (
        "import sys, convexlearn.solvers.quadratic.solver as s; s.Quadratic(); "
        "ours = [m for m in sys.modules if m.startswith('convexlearn.')]; "
        "assert len(ours) > 10 and not [m for m in ours if 'kernels' in m or m.endswith(('compiled', 'simd'))]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "shard"}, "did you mean 'shared'"),
        ({"smoothing": -1.0}, "smoothing must be a number of at least 0, got -1.0"),
        ({"threads": 0}, "threads must be an integer of at least 1, got 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(OptionError, match=message):
        QuadraticOptions(**options)
