"""The conic solver on families of second-order, exponential, power and PSD problems."""

import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from conic_families import FAMILIES, instance, values
from reference import assert_gradients_match_differences, close, cvxpy_values, gradients, tensor, weights_like

from convexlearn import ConvexLayer, Status
from convexlearn.errors import AdjointWarning, OptionError, SolverError
from convexlearn.program.program import ProgramData
from convexlearn.solvers.conic import Conic, ConicOptions

POWER = ("power cones", "production", "all cones")  # diffcp differentiates no power cones


def family(name, batch, seed=0, **options):
    problem, parameters, outputs, draw = FAMILIES[name]()
    layer = ConvexLayer(problem, parameters, outputs, solver="conic", **options)
    return layer, values(draw, batch, seed), (problem, parameters, outputs)


def test_is_the_default_for_cones():
    x, t = cp.Variable(3), cp.Parameter(3, name="t")
    for cost, name in ((cp.sum(cp.exp(x)), "conic"), (cp.sum_squares(x), "quadratic")):
        assert ConvexLayer(cp.Problem(cp.Minimize(cost), [x >= t]), [t], [x]).solver.name == name


class TestFamilies:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_values(self, name):
        """Residuals near rounding; the objective of CVXPY to 1e-7, its point as exactly as CVXPY finds it."""
        layer, given, (problem, parameters, outputs) = family(name, 4)
        found = layer.solve(*given)
        assert found.status.tolist() == [Status.SOLVED] * 4
        assert found.residual.max() < 1e-12
        for k in range(2):
            for parameter, value in zip(parameters, given):
                parameter.value = value[k].numpy()
            expected = cvxpy_values(problem, outputs)
            best = problem.objective.value
            for ours, theirs in zip(found.variables, expected):
                close(ours[k], theirs.reshape(ours[k].shape), 2e-5)
            decisions = {v.id for v in problem.variables()}
            for variable, ours in zip(outputs, found.variables):
                if variable.id in decisions:
                    variable.value = ours[k].numpy()
            if decisions <= {v.id for v in outputs}:
                assert problem.objective.value == pytest.approx(best, rel=1e-7, abs=1e-7)

    @pytest.mark.parametrize("name", FAMILIES)
    def test_gradients(self, name):
        """To 1e-6 against central differences, sample by sample, duals included."""
        layer, given, _ = family(name, 8, seed=3)
        leaves = [v.clone().requires_grad_() for v in given]
        weights = weights_like(layer(*given))
        found = torch.autograd.grad([(w * o).sum() for w, o in zip(weights, layer(*leaves))], leaves)
        for seed in range(2):
            directions = weights_like(given, seed=20 + seed)
            ahead, behind = (
                layer.solve(*(v + sign * 2e-6 * d for v, d in zip(given, directions))).variables for sign in (1, -1)
            )
            expected = sum(((a - b) * w).reshape(8, -1).sum(1) for a, b, w in zip(ahead, behind, weights)) / 4e-6
            actual = sum((g * d).reshape(8, -1).sum(1) for g, d in zip(found, directions))
            assert ((actual - expected).abs() / (1 + expected.abs())).max() < 1e-6

    @pytest.mark.parametrize("name", sorted(FAMILIES.keys() - set(POWER)))
    def test_agrees_with_diffcp(self, name):
        layer, given, (problem, parameters, outputs) = family(name, 2)
        oracle = ConvexLayer(problem, parameters, outputs, solver="diffcp")
        for ours, theirs in zip(layer(*given), oracle(*given)):
            close(ours, theirs, 1e-6)
        for ours, theirs in zip(gradients(layer, given), gradients(oracle, given)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", ["Markowitz", "all cones"])
    def test_shared_parameters(self, name):
        layer, given, _ = family(name, 5)
        mixed = [given[0], *(v[0] for v in given[1:])]
        expanded = [given[0], *(v[:1].expand_as(v) for v in given[1:])]
        for ours, theirs in zip(layer(*mixed), layer(*expanded)):
            close(ours, theirs, 1e-12)
        shared, full = gradients(layer, mixed), gradients(layer, expanded)
        for k, (ours, theirs) in enumerate(zip(shared, full)):
            close(ours, theirs.sum(0) if k else theirs, 1e-9)

    def test_results_do_not_depend_on_threads_and_batch(self):
        layer, given, _ = family("maximum entropy", 70)
        one, two = (layer(*given, solver_args={"threads": k}) for k in (1, 2))
        assert all((a == b).all() for a, b in zip(one, two))
        for ours, theirs in zip(one, layer(*(v[65] for v in given))):
            close(ours[65], theirs, 1e-10)


def second_order():
    x = cp.Variable(3)
    c, r, a = cp.Parameter(3, name="c"), cp.Parameter(name="r"), cp.Parameter(name="a")
    constraints = [cp.norm2(x[:2]) <= r, a * x[2] <= 1, x[2] >= -1, x[0] + x[1] >= 0.5]
    given = [[[1, 1, -1], [1, 2, -1], [1, 1, -1.0]], [1, 0.1, 2], [1, 1, 0.0]]
    return cp.Problem(cp.Minimize(c @ x), constraints), [c, r, a], x, given, [0.25, 0.25, 1.0]


def exponential():
    x, c, b = cp.Variable(2), cp.Parameter(2, name="c"), cp.Parameter(name="b")
    problem = cp.Problem(cp.Minimize(c @ x), [cp.exp(x[0]) <= b, x[1] >= x[0], x[1] <= 5])
    return problem, [c, b], x, [[[-1, -1], [-1, -1], [1, 1.0]], [2, -0.1, 1.0]], [np.log(2), 5]


def power():
    x, c, b = cp.Variable(3), cp.Parameter(3, name="c"), cp.Parameter(name="b")
    problem = cp.Problem(cp.Minimize(c @ x), [cp.PowCone3D(x[0], x[1], x[2], 0.5), x[0] <= b, x[2] >= 0.5])
    return problem, [c, b], x, [[[1, 1, 0], [1, 1, -1], [1, -1, -1.0]], [2, -0.1, 1.0]], [0.5, 0.5, 0.5]


def semidefinite(order):
    X, C = cp.Variable((order, order), symmetric=True), cp.Parameter((order, order), symmetric=True, name="C")
    t, u = cp.Parameter(name="t"), cp.Parameter(name="u")
    problem = cp.Problem(cp.Minimize(cp.trace(C @ X)), [X >> 0, u * cp.trace(X) <= 1, X[0, 0] >= t])
    G = np.random.default_rng(0).standard_normal((order, order))
    lowest = np.linalg.eigh(G + G.T)[1][:, 0]
    given = [[G + G.T] * 3, [-1, 2, -1], [1, 1, 0.0]]
    return problem, [C, t, u], X, given, np.outer(lowest, lowest)


class TestStatuses:
    """Solved, infeasible and unbounded samples in one batch: nothing of the others is lost."""

    MEMBERS = {
        "second-order": second_order,
        "exponential": exponential,
        "power": power,
        "PSD of order 3": lambda: semidefinite(3),
        "PSD of order 4": lambda: semidefinite(4),
    }

    @pytest.mark.parametrize("name", MEMBERS)
    def test_mixed_batch(self, name):
        problem, parameters, variable, given, exact = self.MEMBERS[name]()
        layer = ConvexLayer(problem, parameters, [variable], solver="conic", on_failure="nan")
        leaves = [tensor(v).requires_grad_() for v in given]
        found = layer.solve(*leaves)
        assert found.status.tolist() == [Status.SOLVED, Status.INFEASIBLE, Status.UNBOUNDED]
        x = found.variables[0]
        close(x[0].detach(), tensor(exact), 1e-8)
        assert x[1:].isnan().all()
        alone = [v.detach()[:1].clone().requires_grad_() for v in leaves]
        x[0].sum().backward()
        layer(*alone)[0].sum().backward()
        for ours, theirs in zip(leaves, alone):
            close(ours.grad[:1], theirs.grad, 1e-12)
            assert not ours.grad[1:].any()
        with pytest.raises(SolverError, match="sample 1 is INFEASIBLE, sample 2 is UNBOUNDED"):
            ConvexLayer(problem, parameters, [variable], solver="conic")(*leaves)

    def test_data_that_are_no_numbers(self):
        program, data = instance("exponential cones", 3)
        data[1][1, 0] = np.nan
        found = Conic().solve(program, ProgramData(*data, batch=3), ConicOptions())
        assert found.status.tolist() == [Status.SOLVED, Status.FAILED, Status.SOLVED]
        gradient = Conic().adjoint(found, torch.ones(3, program.n), torch.ones(3, program.m))
        assert all(torch.isfinite(f).all() for f in gradient.fields())

    def test_limits(self):
        layer, given, _ = family("maximum entropy", 3)
        with pytest.warns(UserWarning, match="stopped at the limit"):
            found = layer(*given, solver_args={"max_iterations": 2})
        assert all(torch.isfinite(f).all() for f in found)

    def test_options(self):
        with pytest.raises(OptionError, match="threads"):
            ConicOptions(threads=0)


class TestDegenerate:
    """Points where the solution map has kinks, or the solution is not unique: finite gradients."""

    def check(self, problem, parameters, outputs, given, exact, dropped=False):
        layer = ConvexLayer(problem, parameters, outputs, solver="conic")
        leaves = [tensor(v).requires_grad_() for v in given]
        found = layer(*leaves)
        close(found[0].detach(), tensor(exact), 1e-8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.stack([(w * f).sum() for w, f in zip(weights_like(found), found)]).sum().backward()
        assert all(torch.isfinite(v.grad).all() for v in leaves)
        assert any(issubclass(w.category, AdjointWarning) for w in caught) == dropped
        return leaves

    def test_on_the_boundary_of_a_ball_and_at_its_centre(self):
        x, t = cp.Variable(3), cp.Parameter(3, name="t")
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [cp.norm2(x) <= 1])
        given = [[1.0, 0, 0], [0, 0, 0], [0.6, 0.8, 0]]
        self.check(problem, [t], [x, problem.constraints[0].dual_variables[0]], [given], given)

    def test_zero_matrices(self):
        X, T = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3), symmetric=True, name="T")
        problem = cp.Problem(cp.Minimize(cp.sum_squares(X - T)), [X >> 0])
        given = np.stack([np.zeros((3, 3)), np.eye(3), -np.eye(3), np.diag([1.0, 0, -1])])
        self.check(problem, [T], [X, problem.constraints[0].dual_variables[0]], [given], given.clip(min=0))

    def test_at_the_apex(self):
        x, t = cp.Variable(3), cp.Parameter(3, name="t")
        problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - t) + cp.norm2(x)))
        given = [[0.6, 0.8, 0], [0, 0, 0], [2.0, 0, 0]]
        self.check(problem, [t], [x], [given], [[0.0, 0, 0], [0, 0, 0], [1, 0, 0]])

    def test_cone_of_one_point(self):
        x, r = cp.Variable(2), cp.Parameter(name="r")
        problem = cp.Problem(cp.Minimize(x[0]), [cp.norm2(x) <= r])
        self.check(problem, [r], [x], [[0.0, 1.0, 1e6]], [[0.0, 0], [-1, 0], [-1e6, 0]])

    def test_the_same_constraint_twice(self):
        x, t = cp.Variable(2), cp.Parameter(2, name="t")
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [cp.norm2(x) <= 1, cp.norm2(x) <= 1])
        half = float(np.sqrt(0.5))
        (leaf,) = self.check(problem, [t], [x], [[3.0, 3.0]], [half, half])
        w = weights_like([leaf])[0]
        close(leaf.grad, (torch.eye(2).double() - 0.5) @ w / np.sqrt(18), 1e-8)

    def test_solutions_that_are_not_unique_warn(self):
        x, c = cp.Variable(2), cp.Parameter(2, name="c")
        problem = cp.Problem(cp.Minimize(c @ x), [cp.norm_inf(x) <= 1, cp.norm2(x) <= 10])
        layer = ConvexLayer(problem, [c], [x], solver="conic")
        leaf = tensor([1.0, 0.0]).requires_grad_()
        with pytest.warns(AdjointWarning, match="not unique"):
            layer(leaf)[0].sum().backward()
        assert torch.isfinite(leaf.grad).all()


class TestWarmStart:
    def test_saves_the_interior_point(self):
        layer, given, _ = family("all cones", 4)
        first = layer.solve(*given)
        assert (first.iterations > 0).all()
        moved = [v + 1e-5 for v in given]
        again, fresh = layer.solve(*moved, warm_start=first), layer.solve(*moved)
        assert not again.iterations.any()
        for ours, theirs in zip(again.variables, fresh.variables):
            close(ours, theirs, 1e-10)

    def test_survives_a_useless_start(self):
        layer, given, _ = family("maximum cut", 3)
        first = layer.solve(*given)
        far = [-5 * v for v in given]
        for ours, theirs in zip(layer.solve(*far, warm_start=first).variables, layer(*far)):
            close(ours, theirs, 1e-9)


def test_scaled_data():
    """The same portfolio in units that differ by 1e8."""
    layer, given, _ = family("robust linear program", 3)
    exact = layer(*given)[0]
    scaled = layer(1e4 * given[0], *given[1:])[0]
    close(scaled, exact, 1e-9)
    small = layer(1e-4 * given[0], *given[1:])[0]
    close(small, exact, 1e-7)


def test_wide_second_order_cones():
    """min |A x - b| + rho/2 |x|^2 at a residual of 120 rows: stationarity by hand."""
    rng = np.random.default_rng(0)
    A, x, b = rng.standard_normal((120, 20)), cp.Variable(20), cp.Parameter(120, name="b")
    problem = cp.Problem(cp.Minimize(cp.norm2(A @ x - b) + 0.5 * cp.sum_squares(x)))
    layer = ConvexLayer(problem, [b], [x], solver="conic")
    given = [tensor(rng.standard_normal((2, 120)))]
    r = layer(*given)[0] @ tensor(A).T - given[0]
    close(r / r.norm(dim=1, keepdim=True) @ tensor(A) + layer(*given)[0], torch.zeros(2, 20).double(), 1e-10)
    assert_gradients_match_differences(layer, given, tolerance=1e-6)
