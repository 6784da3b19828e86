"""The condensed path: the same solutions, duals and gradients as the interior point, to rounding."""

import numpy as np
import pytest
import torch
from quadratic_cases import arrays, filled, instance, lasso, program_of, shared_fields

from convexlearn.program.program import ProgramData, Status
from convexlearn.program.reduce import reduce
from convexlearn.solvers.base import polyhedral_residual
from convexlearn.solvers.quadratic import shared
from convexlearn.solvers.quadratic.solver import Quadratic, QuadraticOptions

NOTHING = ("nothing",)  # no parameter has that name: only what no parameter enters is shared
GENERAL = {"simplex": NOTHING, "polytope": NOTHING, "bounded states": ("A", "B")}
CASES = {"norm_inf": ("A", "B", "Q"), "two sides": ("A", "B", "Q"), "lasso": ("H", "rho")} | GENERAL


def both(program, data):
    """Solutions of the two paths."""
    solver = Quadratic()
    return tuple(solver.solve(program, data, QuadraticOptions(path=path)) for path in ("shared", "lanes"))


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_interior_point(name):
    program, data = instance(name, batch=70, shared=CASES[name])
    assert data.shared("A")
    ours, other = both(program, data)
    assert (ours.status == Status.SOLVED).all()
    assert polyhedral_residual(program, data, ours.x, ours.z).max() < 1e-12
    torch.testing.assert_close(ours.x, other.x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.z, other.z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_gradients_agree_with_the_interior_point(name):
    program, data = instance(name, batch=70, shared=CASES[name])
    solver, generator = Quadratic(), torch.Generator().manual_seed(0)
    found = []
    dx = torch.randn(70, program.n, generator=generator, dtype=torch.float64)
    dz = torch.randn(70, program.m, generator=generator, dtype=torch.float64)
    for solution in both(program, data):
        gradient = solver.adjoint(solution, dx, dz)
        found.append(gradient)
        for name_, field, given in zip("PqAb", gradient.fields(), data.fields()):
            assert field.shape == given.shape, name_
    for a, b in zip(found[0].fields(), found[1].fields()):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.abs().max() + 1))


VARYING = [("simplex", "b"), ("polytope", "b"), ("bounded states", "A"), ("bounded states", "b")]
VARYING += [("norm_inf", "A"), ("norm_inf", "b"), ("two sides", "A"), ("lasso", "q"), ("lasso", "A"), ("lasso", "b")]


@pytest.mark.parametrize(("name", "field"), VARYING)
def test_gradients_match_central_differences(name, field):
    """Upstream gradients of the kept part of x and of all z, along a random direction of the varying entries."""
    program, data = instance(name, batch=3, shared=CASES[name])
    solver, options, kept = Quadratic(), QuadraticOptions(path="shared"), reduce(program).keep
    solution = solver.solve(program, data, options)
    generator = torch.Generator().manual_seed(1)
    dx = torch.zeros(3, program.n, dtype=torch.float64)
    dx[:, kept] = torch.randn(3, len(kept), generator=generator, dtype=torch.float64)
    dz = torch.randn(3, program.m, generator=generator, dtype=torch.float64)
    gradient = getattr(solver.adjoint(solution, dx, dz), field)
    direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
    direction *= torch.as_tensor(np.isnan(program.fixed["PqAb".index(field)]))

    def value(step):
        moved = data.replaced(**{field: getattr(data, field) + step * direction})
        other = solver.solve(program, moved, options)
        return float((other.x * dx).sum() + (other.z * dz).sum())

    expected = (value(1e-6) - value(-1e-6)) / 2e-6
    assert abs(expected) > 1e-3
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_bitwise_the_same_for_any_number_of_threads():
    program, data = instance("two sides", batch=150, shared=CASES["two sides"])
    solver, results = Quadratic(), []
    for threads in (1, 2, 3):
        solution = solver.solve(program, data, QuadraticOptions(path="shared", threads=threads))
        gradient = solver.adjoint(solution, solution.x, solution.z)
        results.append((solution.x, solution.z, *gradient.fields()))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


def box_qp(H, q, low, high):
    """min 1/2 x'Hx + q'x over low <= x <= high for a batch of q, as a program that knows its coefficients."""
    n = len(H)
    A = np.concatenate([np.eye(n), -np.eye(n)])
    program = program_of(
        H, A, 0,
        lambda P, full: (np.full(P.nnz, np.nan), np.full(n, np.nan), A[full.rows, full.cols], np.full(2 * n, np.nan)),
    )  # fmt: skip
    b = np.concatenate([high, -low], axis=1)
    values = (H[program.P.rows, program.P.cols][None], q, A[program.A.rows, program.A.cols][None], b)
    return program, ProgramData(*(torch.tensor(v) for v in values), batch=len(q))


@pytest.mark.parametrize(("n", "rank", "seed"), [(30, 30, 0), (30, 30, 1), (20, 7, 2), (40, 40, 3)])
def test_box_qps_that_are_hard_for_active_sets(n, rank, seed):
    """Ill-conditioned and singular Hessians, where primal-dual active sets may cycle."""
    rng = np.random.default_rng(seed)
    F = rng.standard_normal((n, rank)) * np.logspace(0, -2, rank)
    H, q = F @ F.T, 3 * rng.standard_normal((60, n))
    low, high = -rng.random((60, n)), rng.random((60, n))
    program, data = box_qp(H, q, low, high)
    solution = Quadratic().solve(program, data, QuadraticOptions())
    assert (solution.status == Status.SOLVED).all()
    assert polyhedral_residual(program, data, solution.x, solution.z).max() < 1e-9
    assert (solution.x >= torch.tensor(low) - 1e-8).all()


def lasso_data(rows, cols, rho, batch=256):
    """Noise seen through a Gaussian matrix with more columns than rows, as a program and its data."""
    rng = np.random.default_rng(0)
    H = rng.standard_normal((rows, cols)) / np.sqrt(rows)
    values = np.tile(H.ravel("F"), (batch, 1)), np.full((batch, 1), rho), rng.standard_normal((batch, rows))
    program, data = filled(*lasso(rows, cols), [torch.tensor(v) for v in values], batch)
    return program, shared_fields(data)


@pytest.mark.parametrize(("rows", "cols", "rho"), [(16, 32, 0.01), (10, 60, 1e-3), (30, 31, 0.01), (5, 50, 0.1)])
def test_wide_lassos_settle_without_the_interior_point(rows, cols, rho):
    """More columns than rows, a small weight: coordinate descent keeps more entries than the Gram matrix has rank."""
    program, data = lasso_data(rows, cols, rho)
    condensed = shared.condense(reduce(program), *(arrays(data)[i] for i in (0, 2)))
    settled = shared.solve(condensed, arrays(data), data.batch)
    assert (settled.residual > 1e-11).mean() <= 0.02
    ours, other = both(program, data)
    torch.testing.assert_close(ours.x, other.x, rtol=1e-9, atol=1e-9)


def test_wide_least_squares_in_a_box_settle_without_the_interior_point():
    rng = np.random.default_rng(1)
    F, q = rng.standard_normal((10, 60)), rng.standard_normal((256, 60))
    program, data = box_qp(F.T @ F, q, -np.ones((256, 60)), np.ones((256, 60)))
    condensed = shared.condense(reduce(program), *(arrays(data)[i] for i in (0, 2)))
    settled = shared.solve(condensed, arrays(data), data.batch)
    assert (settled.residual > 1e-11).mean() <= 0.02
    x, z = torch.as_tensor(settled.x), torch.as_tensor(settled.z)
    good = torch.as_tensor(settled.residual <= 1e-11)
    assert polyhedral_residual(program, data, x, z)[good].max() < 1e-12


def test_samples_that_do_not_settle_are_mended_by_the_interior_point():
    rng = np.random.default_rng(0)
    low, high, q = -np.ones((40, 5)), np.ones((40, 5)), rng.standard_normal((40, 5))
    low[7, 2] = 2.0  # empty: infeasible
    low[9] = high[9] = 0.25  # fixed
    program, data = box_qp(np.eye(5), q, low, high)
    solution = Quadratic().solve(program, data, QuadraticOptions())
    assert solution.status[7] == Status.INFEASIBLE
    others = torch.arange(40) != 7
    assert (solution.status[others] == Status.SOLVED).all()
    expected = torch.maximum(torch.minimum(-data.q, torch.tensor(high)), torch.tensor(low))
    torch.testing.assert_close(solution.x[others], expected[others], rtol=0, atol=1e-12)
    gradient = Quadratic().adjoint(solution, torch.ones_like(solution.x), torch.zeros_like(solution.z))
    assert all(torch.isfinite(f).all() for f in gradient.fields())
    assert (gradient.q[7] == 0).all()
    free = (data.q.abs() < 1) & others[:, None] & (torch.arange(40) != 9)[:, None]
    torch.testing.assert_close(gradient.q[free], -torch.ones_like(gradient.q[free]))


def test_condensation_follows_the_matrices():
    """The cached condensation is used only for the same matrices."""
    program, data = instance("norm_inf", batch=4, shared=CASES["norm_inf"])
    solver, options = Quadratic(), QuadraticOptions(path="shared")
    first = solver.solve(program, data, options)
    changed = ProgramData(data.P, data.q, data.A * (1 + 1e-3 * torch.as_tensor(np.isnan(program.fixed[2]))), data.b, 4)
    second = solver.solve(program, changed, options)
    assert not torch.allclose(first.x, second.x, atol=1e-6)
    assert polyhedral_residual(program, changed, second.x, second.z).max() < 1e-12
    again = solver.solve(program, data, options)
    assert torch.equal(again.x, first.x)


def test_refuses_to_condense_what_is_not_boxes():
    program, data = instance("portfolio", batch=3, shared=("F",))
    reduction = reduce(program)
    assert not shared.condensable(reduction.box)
    with pytest.raises(ValueError, match="path='shared' needs P and A common to the batch"):
        Quadratic().solve(program, data, QuadraticOptions(path="shared"))
    assert shared.condense(reduce(instance("lasso")[0]), *(arrays(instance("lasso", batch=1)[1])[k] for k in (0, 2)))


@pytest.mark.parametrize("name", GENERAL)
def test_general_inequalities_are_condensed(name):
    """All samples are settled by the condensed path itself, and a start at the solution needs no step."""
    program, data = instance(name, batch=70, shared=CASES[name])
    condensed = shared.condense(reduce(program), data.P.numpy(), data.A.numpy())
    assert condensed is not None
    assert condensed.arrangement.rows > 0
    cold = shared.solve(condensed, arrays(data), 70)
    assert cold.worst < 1e-12
    assert cold.steps.max() > 2
    warm = shared.solve(condensed, arrays(data), 70, cold.x)
    np.testing.assert_allclose(warm.x, cold.x, rtol=1e-9, atol=1e-11)
    assert warm.steps.mean() < 1.1


def test_projection_on_the_simplex_is_the_closed_form():
    program, data = instance("simplex", batch=300, shared=NOTHING)
    y = np.random.default_rng(0).standard_normal((300, 9))  # what `instance` drew
    solution = Quadratic().solve(program, data, QuadraticOptions(path="shared"))
    x = solution.x.numpy()[:, reduce(program).keep]
    ordered = -np.sort(-y, axis=1)
    thresholds = (ordered.cumsum(1) - 1) / np.arange(1, 10)
    count = (ordered > thresholds).sum(1)
    expected = np.maximum(y - thresholds[np.arange(300), count - 1][:, None], 0)
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-13)


def test_dependent_and_repeated_rows():
    """Five copies of each row, and vertices with more active rows than variables."""
    rng, n = np.random.default_rng(2), 4
    A = np.vstack([np.eye(n), -np.eye(n), np.ones((1, n))] * 5)
    program = program_of(
        2 * np.eye(n), A, 0, lambda P, rows: tuple(np.full(k, np.nan) for k in (P.nnz, n, rows.nnz, len(A)))
    )
    b = np.tile(np.concatenate([np.ones(n), np.zeros(n), [n]]), 5)
    q = torch.tensor(4 * rng.standard_normal((60, n)))
    fields = (torch.full((1, program.P.nnz), 2.0).double(), q, torch.tensor(A[program.A.rows, program.A.cols])[None])
    data = ProgramData(*fields, torch.tensor(b)[None], 60)
    solution = Quadratic().solve(program, data, QuadraticOptions(path="shared"))
    torch.testing.assert_close(solution.x, (-q / 2).clamp(0, 1), rtol=0, atol=1e-13)


def test_an_infeasible_sample_is_named_and_the_others_are_solved():
    program, data = instance("simplex", batch=5, shared=NOTHING)
    b = data.b.expand(5, -1).clone()
    b[3] = -b[3].abs() - 1  # x >= 1 in all entries, and a sum of 1 or less
    solution = Quadratic().solve(program, data.replaced(b=b), QuadraticOptions())
    assert solution.status.tolist() == [Status.SOLVED] * 3 + [Status.INFEASIBLE, Status.SOLVED]
