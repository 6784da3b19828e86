import warnings

import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from reference import assert_as_cvxpy, assert_gradients_match_differences, close, cvxpy_values, gradients, tensor

from convexlearn import ConvexLayer
from convexlearn import layer as layer_module
from convexlearn.errors import CompileError, OptionError, SolverError
from convexlearn.program.compiler import compile_problem
from convexlearn.program.declaration import Declaration


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def least_squares(A, b):
    x = cp.Variable(3, name="x")
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b))), x


class TestParameters:
    def test_diagonal(self):
        D = cp.Parameter((3, 3), diag=True, name="D")
        D.value = np.diag([1.0, -2.0, 4.0])
        problem, x = least_squares(D, np.ones(3))
        assert_as_cvxpy(layer := ConvexLayer(problem, [D], [x]), problem, [D], [x])
        value = torch.diag(tensor([1.0, -2.0, 4.0]))
        (found,) = gradients(layer, [value])
        (exact,) = gradients(lambda D: (1 / D.diagonal(),), [value])
        close(found, exact, 1e-10)

    def test_sparse(self):
        rows, cols = np.array([2, 0, 1, 0]), np.array([2, 0, 1, 2])
        S = cp.Parameter((3, 3), sparsity=(rows, cols), name="S")
        S.value_sparse = sp.coo_array((np.array([4.0, 1.0, 2.0, 3.0]), (rows, cols)), shape=(3, 3))
        problem, x = least_squares(S, np.arange(1.0, 4.0))
        layer = ConvexLayer(problem, [S], [x])
        assert_as_cvxpy(layer, problem, [S], [x])
        value = tensor([[1.0, 0.0, 3.0], [0.0, 2.0, 0.0], [0.0, 0.0, 4.0]])
        (found,) = gradients(layer, [value])
        (exact,) = gradients(lambda S: (torch.linalg.solve(S, tensor([1.0, 2.0, 3.0])),), [value])
        close(found, torch.where(value != 0, exact, 0.0), 1e-9)

    def test_sparse_without_a_value(self):
        S = cp.Parameter((3, 3), sparsity=(np.arange(3), np.arange(3)), name="S")
        problem, x = least_squares(S, np.ones(3))
        close(ConvexLayer(problem, [S], [x])(torch.diag(tensor([1.0, 2.0, 4.0])))[0], tensor([1.0, 0.5, 0.25]), 1e-10)

    @pytest.mark.parametrize("attribute", ["symmetric", "PSD", "NSD"])
    def test_symmetric_matrices(self, rng, attribute):
        S = cp.Parameter((3, 3), name="S", **{attribute: True})
        half = rng.normal(size=(3, 3))
        S.value = {"symmetric": half + half.T, "PSD": half @ half.T, "NSD": -half @ half.T}[attribute]
        b = rng.normal(size=3)
        problem, x = least_squares(S, b)
        layer = ConvexLayer(problem, [S], [x])
        assert_as_cvxpy(layer, problem, [S], [x], 1e-6)
        (found,) = gradients(layer, [tensor(S.value)])
        (exact,) = gradients(lambda S: (torch.linalg.solve((S + S.mT) / 2, tensor(b)),), [tensor(S.value)])
        close(found, exact, 1e-6)

    @pytest.mark.parametrize("maximize", [False, True])
    def test_quadratic_form(self, rng, maximize):
        half = rng.normal(size=(3, 3))
        sign = -1 if maximize else 1
        P = cp.Parameter((3, 3), name="P", **{"NSD" if maximize else "PSD": True})
        P.value = sign * half @ half.T
        q = cp.Parameter(3, name="q", value=rng.normal(size=3))
        x = cp.Variable(3, name="x")
        constraints = [cp.sum(x) == 1, x >= -0.2]
        goal = cp.Maximize if maximize else cp.Minimize
        problem = cp.Problem(goal(cp.quad_form(x, P) + sign * q @ x), constraints)
        outputs = [x, *(c.dual_variables[0] for c in constraints)]
        layer = ConvexLayer(problem, [P, q], outputs)
        assert layer.solver.native_objective
        assert_as_cvxpy(layer, problem, [P, q], outputs)
        assert_gradients_match_differences(layer, [tensor(P.value), tensor(q.value)])

    def test_bounds_given_by_parameters(self):
        low, high = cp.Parameter(3, name="low", value=[-1.0, -1, -1]), cp.Parameter(3, name="high", value=[1.0, 2, 3])
        t = cp.Parameter(3, name="t", value=[-3.0, 0.5, 9.0])
        x = cp.Variable(3, bounds=[low, high])
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)))
        layer = ConvexLayer(problem, [low, high, t], [x])
        assert_as_cvxpy(layer, problem, [low, high, t], [x])
        found = gradients(layer, [tensor(p.value) for p in (low, high, t)])
        exact = gradients(lambda a, b, t: (torch.clamp(t, a, b),), [tensor(p.value) for p in (low, high, t)])
        for ours, theirs in zip(found, exact):
            close(ours, theirs, 1e-10)

    @pytest.mark.parametrize("attributes", [{}, {"nonneg": True}, {"pos": True}])
    def test_of_three_dimensions(self, rng, attributes):
        x, t = cp.Variable((2, 3, 2), name="x"), cp.Parameter((2, 3, 2), name="t", **attributes)
        t.value = abs(rng.normal(size=(2, 3, 2)))
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [x <= 0.5])
        dual = problem.constraints[0].dual_variables[0]
        assert_as_cvxpy(ConvexLayer(problem, [t], [x, dual]), problem, [t], [x, dual])

    def test_hidden_in_atoms(self):
        """huber keeps M beside its arguments; the minimum is at x = 4 M."""
        x, t = cp.Variable(name="x"), cp.Parameter(name="t")
        M = cp.Parameter(nonneg=True, name="M")
        problem = cp.Problem(cp.Minimize(cp.huber(x - t, M) + 0.25 * cp.square(x)))
        layer = ConvexLayer(problem, [t, M], [x])
        values = tensor(5.0), tensor([0.5, 0.6])
        close(layer(*values)[0], 4 * values[1], 1e-9)
        close(gradients(layer, values)[1], gradients(lambda t, M: (4 * M,), values)[1], 1e-9)
        assert M.value is None


class TestVariables:
    @pytest.mark.parametrize("attribute", ["nonneg", "nonpos", "pos", "neg", "free"])
    def test_signs(self, attribute):
        attributes = {} if attribute == "free" else {attribute: True}
        x = cp.Variable((2, 2), **attributes)
        t = cp.Parameter((2, 2), name="t", value=np.array([[-3.0, 0.5], [2.0, -1.0]]))
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)))
        outputs = [x, 2 * x + 1, x[0], cp.sum(x), x.T @ np.array([1.0, 2.0])]
        assert_as_cvxpy(ConvexLayer(problem, [t], outputs), problem, [t], outputs)

    @pytest.mark.parametrize("attribute", ["diag", "symmetric", "PSD", "NSD"])
    def test_structures(self, rng, attribute):
        x = cp.Variable((3, 3), **{attribute: True})
        t = cp.Parameter((3, 3), name="t", value=rng.normal(size=(3, 3)))
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)))
        assert_as_cvxpy(ConvexLayer(problem, [t], [x, 2 * x]), problem, [t], [x, 2 * x], 1e-6)

    def test_row_of_a_diagonal_variable(self):
        x, t = cp.Variable((3, 3), diag=True), cp.Parameter((3, 3), name="t")
        layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - t))), [t], [x[1], cp.trace(x)])
        row, trace = layer(torch.arange(9, dtype=torch.float64).reshape(3, 3))
        close(row, tensor([0.0, 4.0, 0.0]), 1e-12)
        close(trace, tensor(12.0), 1e-12)

    def test_sparse(self, rng):
        rows, cols = np.array([0, 1, 2, 0]), np.array([0, 1, 2, 2])
        x = cp.Variable((3, 3), sparsity=(rows, cols))
        t = cp.Parameter((3, 3), name="t", value=rng.normal(size=(3, 3)))
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)))
        assert_as_cvxpy(ConvexLayer(problem, [t], [x]), problem, [t], [x])

    @pytest.mark.parametrize("bounds", [[-1, 1], [None, 0.25], [np.array([-1.0, 0, 1]), np.inf]])
    def test_bounds(self, bounds):
        x, t = cp.Variable(3, bounds=bounds), cp.Parameter(3, name="t", value=np.array([-3.0, 0.5, 2.0]))
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)))
        assert_as_cvxpy(ConvexLayer(problem, [t], [x]), problem, [t], [x])

    def test_bounds_of_conic_problems(self):
        x, t = cp.Variable(2, bounds=[-1, 1], nonneg=False), cp.Parameter(2, name="t", value=np.array([3.0, 0.5]))
        y = cp.Variable(nonneg=True)
        problem = cp.Problem(cp.Minimize(cp.norm(x - t) + cp.exp(x[1] - y) + cp.square(y)))
        assert_as_cvxpy(ConvexLayer(problem, [t], [x, y]), problem, [t], [x, y], 1e-5)

    def test_that_do_not_appear_in_the_objective(self):
        x, y, t = cp.Variable(2), cp.Variable(2), cp.Parameter(2, name="t", value=[1.0, 2.0])
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [y == 2 * x + t])
        assert_as_cvxpy(ConvexLayer(problem, [t], [y, x]), problem, [t], [y, x])

    def test_only_in_the_constraints(self):
        x, t = cp.Variable(2), cp.Parameter(2, name="t")
        layer = ConvexLayer(cp.Problem(cp.Minimize(0), [x == 3 * t]), [t], [x])
        close(layer(tensor([1.0, 2.0]))[0], tensor([3.0, 6.0]), 1e-12)
        close(gradients(layer, [tensor([1.0, 2.0])])[0], 3 * gradients(lambda t: (t,), [tensor([1.0, 2.0])])[0], 1e-12)


class TestDuals:
    def compare(self, problem, parameters, primal, tolerance=1e-6, gp=False, solver=None):
        duals = [d for c in problem.constraints for d in c.dual_variables]
        layer = ConvexLayer(problem, parameters, [*primal, *duals], solver, gp)
        assert_as_cvxpy(layer, problem, parameters, [*primal, *duals], tolerance, gp)
        return layer

    @pytest.mark.parametrize("goal", [cp.Minimize, cp.Maximize])
    @pytest.mark.parametrize("solver", ["dense", "diffcp"])
    def test_polyhedral(self, goal, solver):
        x, q = cp.Variable(3), cp.Parameter(3, name="q", value=np.array([1.0, -2.0, 0.5]))
        sign = 1 if goal is cp.Minimize else -1
        constraints = [cp.sum(x) == 1, x <= 0.7, x >= -0.4, -x <= 1.5, x[0] - x[1] + 0.1 == 1]
        problem = cp.Problem(goal(sign * (cp.sum_squares(x) - q @ x)), constraints)
        self.compare(problem, [q], [x], solver=solver)

    def test_matrices(self, rng):
        X, B = cp.Variable((2, 3)), cp.Parameter((2, 2), name="B", value=rng.normal(size=(2, 2)))
        table = np.arange(6.0).reshape(3, 2)
        problem = cp.Problem(
            cp.Minimize(cp.sum_squares(X - table.T)), [X @ table == B, 3 * np.ones((2, 3)) >= X, X >= -3]
        )
        self.compare(problem, [B], [X])

    @pytest.mark.parametrize("axis", [0, 1])
    def test_second_order_cones(self, rng, axis):
        X, T = cp.Variable((3, 2)), cp.Parameter((3, 2), name="T", value=rng.normal(size=(3, 2)))
        r = np.array([0.3, 0.4]) if axis == 0 else np.array([0.1, 0.2, 0.3])
        problem = cp.Problem(cp.Minimize(cp.sum_squares(X - T)), [cp.SOC(cp.Constant(r), X, axis=axis)])
        self.compare(problem, [T], [X])

    def test_norm_constraint(self, rng):
        x, t = cp.Variable(3), cp.Parameter(3, name="t", value=rng.normal(size=3))
        self.compare(cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [cp.norm(x) <= 0.5]), [t], [x])

    @pytest.mark.parametrize("order", [1, 2, 3, 4])
    def test_semidefinite(self, rng, order):
        half = rng.normal(size=(order, order))
        X = cp.Variable((order, order), symmetric=True)
        T = cp.Parameter((order, order), symmetric=True, name="T", value=half + half.T)
        constraints = [X >> 0.1 * np.eye(order), X << np.eye(order)]
        layer = self.compare(cp.Problem(cp.Minimize(cp.sum_squares(X - T)), constraints), [T], [X], 1e-5)
        _, lower, upper = layer(tensor(T.value))
        for dual in (lower, upper):
            close(dual, dual.mT, 1e-12)
            assert torch.linalg.eigvalsh(dual).min() > -1e-7

    def test_semidefinite_constraint_on_a_full_variable(self, rng):
        half = rng.normal(size=(3, 3))
        X, T = cp.Variable((3, 3)), cp.Parameter((3, 3), name="T", value=half + half.T)
        self.compare(cp.Problem(cp.Minimize(cp.sum_squares(X - T)), [X >> 0, X == X.T]), [T], [X], 1e-5)

    def test_exponential_cones(self, rng):
        x, y, z = cp.Variable(3), cp.Variable(3), cp.Variable(3)
        t = cp.Parameter(3, name="t", value=rng.normal(size=3))
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t) + cp.sum(z)), [cp.ExpCone(x, y, z), y == 1, z <= 2])
        self.compare(problem, [t], [x, y, z], 1e-4)

    def test_exponential_cones_of_matrices(self, rng):
        x, t = cp.Variable((2, 3)), cp.Parameter((2, 3), name="t", value=rng.normal(size=(2, 3)))
        cone = cp.ExpCone(x, np.ones((2, 3)), 0.5 * np.arange(1.0, 7.0).reshape(2, 3))
        self.compare(cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [cone]), [t], [x], 1e-4)

    def test_geometric_programs(self):
        x, y, z = (cp.Variable(pos=True, name=n) for n in "xyz")
        a, b = cp.Parameter(pos=True, name="a", value=2.0), cp.Parameter(pos=True, name="b", value=1.0)
        c = cp.Parameter(name="c", value=0.5)
        constraints = [a * (x * y + x * z + y * z) <= b, x >= y**c]
        self.compare(cp.Problem(cp.Minimize(1 / (x * y * z)), constraints), [a, b, c], [x, y, z], 1e-4, gp=True)

    def test_are_derivatives_of_the_optimal_value(self, rng):
        """The envelope theorem, and the derivative of a dual by differences."""
        x, b = cp.Variable(3), cp.Parameter(name="b")
        q = rng.normal(size=3)
        constraint = cp.sum(x) == b
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x) + q @ x), [constraint, x >= 0])
        layer = ConvexLayer(problem, [b], [x, constraint.dual_variables[0]])
        value = tensor(1.5).requires_grad_()
        found, dual = layer(value)
        (slope,) = torch.autograd.grad(found.square().sum() + tensor(q) @ found, value)
        close(-slope, dual, 1e-9)
        assert_gradients_match_differences(layer, [tensor(1.5)])


def test_gp_duals():
    x, y = (cp.Variable(pos=True, name=n) for n in "xy")
    a = cp.Parameter(pos=True, name="a", value=2.0)
    problem = cp.Problem(cp.Maximize(x * y**2), [x + y <= a])
    outputs = [x, y, problem.constraints[0].dual_variables[0]]
    layer = ConvexLayer(problem, [a], outputs, gp=True)
    assert_as_cvxpy(layer, problem, [a], outputs, 1e-5, gp=True)
    close(torch.stack(layer(tensor(3.0))[:2]), tensor([1.0, 2.0]), 1e-7)
    assert_gradients_match_differences(layer, [tensor(3.0)], step=1e-3)


class TestOutputs:
    def test_affine_expressions(self, rng):
        x, y = cp.Variable(2), cp.Variable((2, 2))
        t = cp.Parameter(2, name="t", value=rng.normal(size=2))
        C = np.arange(4.0).reshape(2, 2)
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t) + cp.sum_squares(y - C)), [cp.sum(x) == 1])
        outputs = [
            cp.hstack([x, 3.0]), y.T, cp.vstack([x, y[0]]), cp.trace(y), y @ C - 1,
            x[::-1], cp.reshape(y, (4,), order="C"), 0 * x + 2, x[0], y[1, 0], cp.sum(y, axis=0),
        ]  # fmt: skip
        assert_as_cvxpy(ConvexLayer(problem, [t], outputs), problem, [t], outputs)

    @pytest.mark.parametrize("make", [lambda x, t: cp.square(x), lambda x, t: x + t, lambda x, t: cp.norm(x)])
    def test_other_expressions_are_refused(self, make):
        x, t = cp.Variable(2), cp.Parameter(2, name="t")
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)))
        with pytest.raises(CompileError, match="must be a variable or an affine expression"):
            ConvexLayer(problem, [t], [make(x, t)])

    def test_expressions_of_geometric_programs_are_refused(self):
        x, a = cp.Variable(pos=True), cp.Parameter(pos=True, name="a")
        with pytest.raises(CompileError, match="only variables can be decisions of a geometric program"):
            ConvexLayer(cp.Problem(cp.Minimize(x), [x >= a]), [a], [2 * x], gp=True)


class TestDegenerateProblems:
    def test_without_parameters(self):
        x = cp.Variable(2, name="x")
        layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - 1)), [x <= 0.5]), [], [x])
        (found,) = layer()
        assert found.shape == (2,)
        assert found.dtype == torch.get_default_dtype()
        close(found.double(), tensor([0.5, 0.5]), 1e-6)
        assert "parameters: none" in repr(layer)

    def test_without_parameters_on_diffcp(self):
        x = cp.Variable(2, name="x")
        layer = ConvexLayer(cp.Problem(cp.Minimize(cp.norm(x - 1)), [x <= 0.5]), [], [x])
        close(layer()[0].double(), tensor([0.5, 0.5]), 1e-6)

    def test_without_constraints(self):
        x, t = cp.Variable(2), cp.Parameter(2, name="t")
        layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum(cp.square(x - t)))), [t], [x])
        value = tensor([[1.0, 2.0], [3.0, 4.0]])
        close(layer(value)[0], value, 1e-12)
        close(gradients(layer, [value])[0], gradients(lambda t: (t,), [value])[0], 1e-12)

    def test_linear_objective_without_constraints_is_unbounded(self):
        x, t = cp.Variable(2), cp.Parameter(2, name="t")
        with pytest.raises(CompileError, match=r"CVXPY cannot canonicalize this problem.*constraint"):
            ConvexLayer(cp.Problem(cp.Minimize(t @ x)), [t], [x])
        layer = ConvexLayer(cp.Problem(cp.Minimize(t @ x), [x <= 1]), [t], [x])
        with pytest.raises(SolverError, match="sample 0 is UNBOUNDED"):
            layer(tensor([[1.0, 2.0], [-1.0, -1.0]]))

    def test_constant_constraints(self):
        x, t = cp.Variable(2), cp.Parameter(2, name="t")
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [cp.Constant(1) <= 2, x <= t + 1, t <= 3])
        layer = ConvexLayer(problem, [t], [x])
        close(layer(tensor([1.0, 2.0]))[0], tensor([1.0, 2.0]), 1e-12)
        with pytest.raises(SolverError, match="INFEASIBLE"):
            layer(tensor([1.0, 4.0]))


class TestErrors:
    def layer(self, objective, constraints=(), **options):
        problem = cp.Problem(objective, list(constraints))
        return ConvexLayer(problem, problem.parameters(), problem.variables(), **options)

    def test_product_of_parameters(self):
        x, a, b = cp.Variable(2), cp.Parameter(nonneg=True, name="a"), cp.Parameter(nonneg=True, name="b")
        with pytest.raises(CompileError, match=r"Problem must be DPP.*a \* b.*one parameter for the product"):
            self.layer(cp.Minimize(a * b * cp.norm1(x) + cp.sum_squares(x)))

    def test_product_with_a_parametric_factor(self):
        x, A, b = cp.Variable(2), cp.Parameter((2, 2), name="A"), cp.Parameter(nonneg=True, name="b")
        with pytest.raises(ValueError, match=r"Problem must be DPP.*A @ .*declare a variable y"):
            self.layer(cp.Minimize(cp.sum_squares(b * (A @ x) - 1)))

    def test_quad_form_in_a_constraint(self):
        x, P = cp.Variable(2), cp.Parameter((2, 2), PSD=True, name="P")
        with pytest.raises(CompileError, match=r"QuadForm\(.*sum_squares\(P_sqrt @ x\)"):
            self.layer(cp.Minimize(cp.sum(x)), [cp.quad_form(x, P) <= 1])

    def test_quad_form_for_a_conic_solver(self):
        x, P = cp.Variable(2), cp.Parameter((2, 2), PSD=True, name="P")
        with pytest.raises(CompileError, match=r"P_sqrt"):
            self.layer(cp.Minimize(cp.quad_form(x, P) + cp.sum(x)), solver="diffcp")
        with pytest.raises(CompileError, match=r"P_sqrt"):
            self.layer(cp.Minimize(cp.quad_form(x, P) + cp.norm(x - 1)), solver="diffcp")

    def test_division(self):
        x, a = cp.Variable(2), cp.Parameter(pos=True, name="a")
        with pytest.raises(CompileError, match=r"a.*reciprocal of a"):
            self.layer(cp.Minimize(cp.sum_squares(x - 1) + cp.norm1(x) / a))

    def test_function_of_a_parameter(self):
        x, a = cp.Variable(2), cp.Parameter(nonneg=True, name="a")
        with pytest.raises(CompileError, match=r"a.*compute it in torch"):
            self.layer(cp.Minimize(cp.exp(a) * cp.norm1(x)))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda x, a, p, S: cp.sum_squares(x - cp.pos(p)), r"subexpression maximum\(p, 0.0\) is not affine"),
            (lambda x, a, p, S: cp.exp(p) @ x, r"parameter for the value of exp\(p\) itself"),
            (lambda x, a, p, S: cp.sum(x / a**2), r"reciprocal of \w+\(a, 2.0\)"),
            (lambda x, a, p, S: cp.sum(x / a), r"reciprocal of a and"),
            (
                lambda x, a, p, S: cp.quad_form(x + p, S @ S, assume_PSD=True),
                r"one parameter for the product of S and S",
            ),
        ],
    )
    def test_names_the_part_that_parameters_enter_wrongly(self, make, message):
        x, a, p = cp.Variable(2, name="x"), cp.Parameter(pos=True, name="a"), cp.Parameter(2, name="p")
        S = cp.Parameter((2, 2), symmetric=True, name="S")
        with pytest.raises(CompileError, match=message):
            self.layer(cp.Minimize(make(x, a, p, S) + cp.sum_squares(x)))

    def test_quad_form_of_a_shifted_variable(self):
        x, p, P = cp.Variable(2, name="x"), cp.Parameter(2, name="p"), cp.Parameter((2, 2), PSD=True, name="P")
        with pytest.raises(CompileError, match=r"add the constraint y == x \+ p"):
            self.layer(cp.Minimize(cp.quad_form(x + p, P)))
        y = cp.Variable(2)
        self.layer(cp.Minimize(cp.quad_form(y, P)), [y == x + p])

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda x, p, S: (cp.quad_form(x, S), []), r"declare the parameters of S with PSD=True"),
            (lambda x, p, S: (p[0] * cp.norm1(x), []), r"declare the parameters of p\[0\] with nonneg=True"),
            (lambda x, p, S: (x[0] * x[1], []), "fix one factor"),
            (lambda x, p, S: (cp.sum(x), [cp.sum_squares(x) == 1]), "sides of an equality must be affine"),
            (lambda x, p, S: (cp.sum(x), [cp.sum_squares(x) >= 1]), "bound convex ones above"),
        ],
    )
    def test_not_convex_proposes_a_remedy(self, make, message):
        x, p = cp.Variable(2, name="x"), cp.Parameter(2, name="p")
        objective, constraints = make(x, p, cp.Parameter((2, 2), symmetric=True, name="S"))
        with pytest.raises(CompileError, match=f"not even DCP.*{message}"):
            self.layer(cp.Minimize(objective + p @ x), constraints)

    def test_not_convex(self):
        x, t = cp.Variable(2, name="x"), cp.Parameter(2, name="t")
        with pytest.raises(CompileError, match=r"not even DCP: the subexpression.*sqrt|not even DCP.*x"):
            self.layer(cp.Minimize(cp.sum(cp.sqrt(x)) + t @ x))

    def test_not_log_log_convex(self):
        x, a = cp.Variable(pos=True, name="x"), cp.Parameter(pos=True, name="a")
        with pytest.raises(CompileError, match=r"geometric programming.*not even DGP"):
            self.layer(cp.Maximize(x + a), [x <= 1], gp=True)

    @pytest.mark.parametrize("attribute", ["boolean", "integer"])
    def test_mixed_integer(self, attribute):
        n, t = cp.Variable(2, name="n", **{attribute: True}), cp.Parameter(2, name="t")
        with pytest.raises(CompileError, match=r"variables \['n'\] are boolean or integer"):
            self.layer(cp.Minimize(cp.sum_squares(n - t)))

    def test_complex(self):
        z, t = cp.Variable(2, complex=True), cp.Parameter(2, name="t")
        with pytest.raises(CompileError, match="complex"):
            self.layer(cp.Minimize(cp.sum_squares(z - t)))
        x, c = cp.Variable(2), cp.Parameter(2, complex=True, name="c")
        with pytest.raises(CompileError, match="complex"):
            self.layer(cp.Minimize(cp.sum_squares(x - c)))

    def test_power_cones(self):
        x, t = cp.Variable(2, nonneg=True), cp.Parameter(2, name="t")
        with pytest.raises(OptionError, match="power cones"):
            self.layer(cp.Minimize(cp.sum(cp.power(x, 1.3, approx=False)) - t @ x), solver="diffcp")

    def test_long_expressions_are_shortened(self):
        x, a, b = cp.Variable(50), cp.Parameter((50, 50), name="a" * 90), cp.Parameter((50, 50), name="b" * 90)
        with pytest.raises(CompileError) as caught:
            self.layer(cp.Minimize(cp.sum_squares(a @ (b @ x) - 1)))
        assert len(str(caught.value)) < 1000
        assert "..." in str(caught.value)


class TestSelfCheck:
    def problem(self):
        x, A, b = cp.Variable(2, name="x"), cp.Parameter((3, 2), name="A"), cp.Parameter(3, name="b")
        constraint = A @ x <= b
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x)), [constraint])
        return problem, [A, b], [x, constraint.dual_variables[0]]

    @pytest.mark.parametrize("field", ["A", "b", "q", "P"])
    def test_catches_corrupted_data(self, monkeypatch, field):
        def corrupted(*args, **options):
            compiled = compile_problem(*args, **options)
            matrix = compiled.maps[field].toarray()
            matrix[:, -1] += 0.25
            compiled.maps[field] = sp.csr_array(matrix)
            return compiled

        monkeypatch.setattr(layer_module, "compile_problem", corrupted)
        with pytest.raises(CompileError, match="disagrees with CVXPY's own data"):
            ConvexLayer(*self.problem())
        ConvexLayer(*self.problem(), check=False)

    def test_catches_permuted_rows(self, monkeypatch):
        def permuted(*args, **options):
            compiled = compile_problem(*args, **options)
            for field in ("A", "b"):
                compiled.maps[field] = compiled.maps[field][::-1]
            return compiled

        monkeypatch.setattr(layer_module, "compile_problem", permuted)
        with pytest.raises(CompileError, match="disagrees"):
            ConvexLayer(*self.problem())

    @pytest.mark.parametrize("which", [0, 1])
    def test_catches_a_wrong_inversion(self, monkeypatch, which):
        def swapped(*args, **options):
            compiled = compile_problem(*args, **options)
            recovery = compiled.outputs[which]
            recovery.matrix.indices[:] = recovery.matrix.indices[::-1].copy()
            return compiled

        monkeypatch.setattr(layer_module, "compile_problem", swapped)
        with pytest.raises(CompileError, match="reading off"):
            ConvexLayer(*self.problem())

    def test_at_values_and_without(self):
        problem, parameters, outputs = self.problem()
        ConvexLayer(problem, parameters, outputs)
        parameters[0].value, parameters[1].value = np.ones((3, 2)), np.ones(3)
        ConvexLayer(problem, parameters, outputs)


def test_canonicalization_backends_agree(rng):
    x, A, b = cp.Variable(3), cp.Parameter((4, 3), name="A"), cp.Parameter(4, name="b")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)), [x >= 0])
    values = tensor(rng.normal(size=(4, 3))), tensor(rng.normal(size=4))
    expected = ConvexLayer(problem, [A, b], [x])(*values)[0]
    for backend in ("CPP", "SCIPY"):
        close(ConvexLayer(problem, [A, b], [x], canon_backend=backend)(*values)[0], expected, 1e-12)


def test_fixed_values_are_those_that_no_parameter_changes():
    x, A, b = cp.Variable(2), cp.Parameter((1, 2), name="A"), cp.Parameter(name="b")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) + 3 * x[0]), [A @ x == b, x >= -2])
    program = compile_problem(Declaration.of(problem, [A, b], [x])).program
    P, q, entries, offsets = program.fixed
    np.testing.assert_allclose(P, [2.0, 2.0])
    np.testing.assert_allclose(q, [3.0, 0.0])
    assert np.isnan(entries).sum() == 2
    np.testing.assert_allclose(entries[~np.isnan(entries)], -1.0)
    assert np.isnan(offsets).sum() == 1
    np.testing.assert_allclose(offsets[1:], 2.0)


def test_construction_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        S = cp.Parameter((20, 20), sparsity=(np.arange(20), np.arange(20)), name="S")
        S.value_sparse = sp.coo_array((np.ones(20), (np.arange(20), np.arange(20))), shape=(20, 20))
        x = cp.Variable(20)
        layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(S @ x - 1))), [S], [x])
        copied = layer.problem(S=torch.eye(20, dtype=torch.float64))
    assert cvxpy_values(copied, copied.variables())[0].shape == (20,)
