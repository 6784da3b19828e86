"""The reduction: exact in both directions, and applied where it should be and nowhere else."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from quadratic_cases import FAMILIES, arrays, dense, instance, program_of

from convexlearn.program.compiler import compile_problem
from convexlearn.program.declaration import Declaration
from convexlearn.program.elimination import choose_pivots
from convexlearn.program.program import ProgramData
from convexlearn.program.reduce import reduce
from convexlearn.solvers.base import polyhedral_residual
from convexlearn.solvers.quadratic.solver import Quadratic, QuadraticOptions


@pytest.mark.parametrize("name", FAMILIES)
def test_lifted_solutions_are_optimal_for_the_given_program(name):
    program, data = instance(name)
    solution = Quadratic().solve(program, data, QuadraticOptions(path="lanes"))
    assert (solution.status == 0).all()
    residual = polyhedral_residual(program, data, solution.x, solution.z)
    assert residual.max() < 1e-10
    torch.testing.assert_close(solution.residual, residual, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("name", FAMILIES)
def test_projecting_a_lifted_solution_gives_it_back(name):
    program, data = instance(name)
    reduction, solution = reduce(program), Quadratic().solve(program, data, QuadraticOptions(path="lanes"))
    packed = reduction.project(solution.x.numpy(), solution.z.numpy())
    x, z = reduction.lift(arrays(data), np.ascontiguousarray(packed))
    np.testing.assert_allclose(x, solution.x, atol=1e-11)
    np.testing.assert_allclose(z, solution.z, atol=1e-11)


@pytest.mark.parametrize("name", FAMILIES)
def test_reduced_matrices_are_the_substituted_ones(name):
    """P_red = T'PT and A_red = AT where x = Ty + c solves the pivot rows, computed densely."""
    program, data = instance(name, batch=1)
    pivots, reduction = choose_pivots(program), reduce(program)
    P, A = dense(program.P, data.P[0].numpy(), symmetric=True), dense(program.A, data.A[0].numpy())
    stays = np.setdiff1d(np.arange(program.n), pivots.cols)
    T = np.zeros((program.n, len(stays)))
    T[stays] = np.eye(len(stays))
    T[pivots.cols] = -np.linalg.solve(A[np.ix_(pivots.rows, pivots.cols)], A[np.ix_(pivots.rows, stays)])
    position = np.searchsorted(stays, reduction.keep)
    P_red, A_red, G_red = reduction.matrices(*(np.ascontiguousarray(v.numpy()) for v in (data.P, data.A)))
    expected = (T.T @ P @ T)[np.ix_(position, position)]
    np.testing.assert_allclose(dense(reduction.box.P, P_red[0], symmetric=True), expected, atol=1e-12)
    parts = reduction._parts()
    for pattern, values, rows in (
        (reduction.box.A, A_red[0], parts["EQUAL"]),
        (reduction.box.G, G_red[0], parts["INEQUAL"]),
    ):
        np.testing.assert_allclose(dense(pattern, values), (A @ T)[np.ix_(rows, position)], atol=1e-12)


@pytest.mark.parametrize("name", ["norm_inf", "abs", "two sides"])
def test_mpc_is_left_with_bounds_only(name):
    program, _ = instance(name)
    box = reduce(program).box
    assert box.G.shape[0] == 0
    assert len(box.lower) == len(box.upper) == 8
    assert len(box.absolute) == 0
    assert box.n + box.A.shape[0] < program.n / 2


def test_lasso_is_left_with_its_gram_matrix():
    program, _ = instance("lasso")
    box = reduce(program).box
    assert (box.n, box.A.shape[0], box.G.shape[0]) in ((12, 0, 0), (20, 8, 0))
    assert len(box.absolute) == 12


def test_second_bounds_of_a_variable_stay_rows_unless_all_are_fixed():
    program, _ = instance("scaled bounds")
    box = reduce(program).box
    assert len(np.unique(box.upper)) == len(box.upper)
    assert box.G.shape[0] >= 5  # x <= 9 next to the parametric bound, and the sum
    x = cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x)), [x <= 3, x <= 2, 2 * x >= 1])
    compiled = compile_problem(Declaration.of(problem, [], [x]))
    reduction = reduce(compiled.program)
    assert reduction.box.G.shape[0] == 0
    data = ProgramData(*(torch.tensor(f)[None] for f in compiled.program.fixed), batch=1)  # pyright: ignore
    solution = Quadratic().solve(compiled.program, data, QuadraticOptions())
    torch.testing.assert_close(solution.residual, torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-13)


def test_nothing_is_reduced_without_fixed_values():
    A = np.array([[1.0, 1.0], [1.0, 0.0]])
    program = program_of(np.eye(2), A, 1, lambda P, A: None)
    reduction = reduce(program)
    assert reduction.reduced.tape is None
    assert (reduction.box.n, reduction.box.A.shape[0], reduction.box.G.shape[0]) == (2, 1, 1)


@pytest.mark.parametrize("weight", [0.5, -0.5])
def test_a_norm_needs_a_weight_that_cannot_be_negative(weight):
    """min x^2 + q t over |x - ...| <= t: with a fixed negative q it is unbounded and must stay as it is."""
    A = np.array([[1.0, -1.0], [-1.0, -1.0]])
    q, b = np.array([0.1, weight]), np.zeros(2)
    program = program_of(np.diag([1.0, 0.0]), A, 0, lambda P, A_: (np.ones(1), q, A.T[A.T != 0], b))
    assert len(reduce(program).box.absolute) == (1 if weight > 0 else 0)
    data = ProgramData(*(torch.tensor(f)[None] for f in (np.ones(1), q, A.T[A.T != 0], b)), batch=1)
    solution = Quadratic().solve(program, data, QuadraticOptions())
    assert solution.status[0] == (0 if weight > 0 else 3)


def random_program(seed):
    """A sparse program with random fixed entries, its data, and a feasible point by construction."""
    rng = np.random.default_rng(seed)
    n, zero, m = 14, 6, 22
    A = rng.choice([-1.0, 1.0, 2.0], (m, n)) * (rng.random((m, n)) < 0.12)
    A[np.arange(zero), rng.permutation(n)[:zero]] = 1.0
    A[zero : zero + 6] = 0.0
    A[np.arange(zero, zero + 6), rng.integers(0, n, 6)] = rng.choice([-1.0, 2.0], 6)
    P, q = np.diag(rng.random(n) + 0.1), rng.standard_normal(n)
    b = A @ rng.standard_normal(n) + np.r_[np.zeros(zero), rng.random(m - zero)]

    def fixed(upper, full):
        values = np.where(rng.random(full.nnz) < 0.8, A[full.rows, full.cols], np.nan)
        return P[upper.rows, upper.cols], np.full(n, np.nan), values, np.full(m, np.nan)

    program = program_of(P, A, zero, fixed)
    values = (P[program.P.rows, program.P.cols], q, A[program.A.rows, program.A.cols], b)
    return program, ProgramData(*(torch.tensor(v)[None] for v in values), batch=1)


def test_random_programs():
    """Lifted solutions satisfy the KKT conditions of the given program, with many kinds of pivots."""
    pivots = 0
    for seed in range(12):
        program, data = random_program(seed)
        solution = Quadratic().solve(program, data, QuadraticOptions(path="lanes"))
        assert polyhedral_residual(program, data, solution.x, solution.z).max() < 1e-10, seed
        pivots += len(choose_pivots(program).rows)
    assert pivots > 12
