"""The suite that every solver in convexlearn.solvers.SOLVERS has to pass; test_solvers.py runs it over the table."""

from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest
import torch
from reference import close, gradients, tensor

from convexlearn import ConvexLayer, Status
from convexlearn.errors import CompileError, OptionError
from convexlearn.program.compiler import compile_problem
from convexlearn.program.declaration import Declaration
from convexlearn.program.program import ProgramData

TOLERANCE = {"diffcp": 2e-6}
"""Error of values and gradients against closed forms; 1e-8 for every other solver."""

STEP = {"diffcp": 1e-4}
"""Step of finite differences; SCS leaves 1e-10 in the solution."""


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ridge():
    x = cp.Variable(3)
    A, b = cp.Parameter((5, 3), name="A"), cp.Parameter(5, name="b")
    weight = cp.Parameter(nonneg=True, name="weight")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) + weight * cp.sum_squares(x)))

    def solution(A, b, weight):
        eye = torch.eye(3, dtype=torch.float64)
        right = (A.mT @ b[..., None])[..., 0]
        return (torch.linalg.solve(A.mT @ A + weight[..., None, None] * eye, right),)

    values = normal(2, 5, 3), normal(2, 5, seed=1), tensor(0.7)
    return problem, [A, b, weight], [x], values, solution


def box():
    x, t = cp.Variable(4), cp.Parameter(4, name="t")
    low, high = cp.Parameter(4, name="low"), cp.Parameter(name="high")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [x >= low, x <= high])
    duals = [c.dual_variables[0] for c in problem.constraints]

    def solution(t, low, high):
        high = high[..., None]
        x = torch.maximum(torch.minimum(t, high), low)
        return x, 2 * (low - t).clamp(min=0), 2 * (t - high).clamp(min=0)

    values = 2 * normal(3, 4), tensor([-1.0, -0.5, -0.25, 0.0]), tensor([0.5, 1.0, 1.5])
    return problem, [t, low, high], [x, *duals], values, solution


def simplex():
    x, t, total = cp.Variable(5), cp.Parameter(5, name="t"), cp.Parameter(name="total")
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - t)), [cp.sum(x) == total, x >= 0])

    def solution(t, total):
        sorted_, _ = t.sort(dim=-1, descending=True)
        excess = sorted_.cumsum(-1) - total[..., None]
        count = torch.arange(1, 6)
        level = excess / count
        k = (sorted_ > level).sum(-1, keepdim=True)
        level = level.gather(-1, k - 1)
        return (t - level).clamp(min=0), level[..., 0]

    dual = problem.constraints[0].dual_variables[0]
    return problem, [t, total], [x, dual], (normal(3, 5), tensor(1.5)), solution


def affine_set():
    x, t = cp.Variable(4), cp.Parameter(4, name="t")
    C, d = cp.Parameter((2, 4), name="C"), cp.Parameter(2, name="d")
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - t)), [C @ x == d])

    def solution(t, C, d):
        residual = (C @ t[..., None])[..., 0] - d
        dual = torch.linalg.solve(C @ C.mT, residual[..., None])[..., 0]
        return t - (C.mT @ dual[..., None])[..., 0], dual

    dual = problem.constraints[0].dual_variables[0]
    return problem, [t, C, d], [x, dual], (normal(3, 4), normal(2, 4, seed=1), normal(3, 2, seed=2)), solution


def equality_constrained():
    x, q = cp.Variable(3), cp.Parameter(3, name="q")
    P, d = cp.Parameter((3, 3), PSD=True, name="P"), cp.Parameter(1, name="d")
    C = np.array([[1.0, 2.0, -1.0]])
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, P) + q @ x), [C @ x == d])

    def solution(P, q, d):
        P = (P + P.mT) / 2
        c = tensor(C).expand(*P.shape[:-2], 1, 3)
        top, bottom = torch.cat([P, c.mT], -1), torch.cat([c, torch.zeros_like(c[..., :1])], -1)
        v = torch.linalg.solve(torch.cat([top, bottom], -2), torch.cat([-q, d], -1))
        return v[..., :3], v[..., 3:]

    half = normal(2, 3, 3)
    values = half @ half.mT + torch.eye(3, dtype=torch.float64), normal(2, 3, seed=1), normal(2, 1, seed=2)
    return problem, [P, q, d], [x, problem.constraints[0].dual_variables[0]], values, solution


def cheapest_vertex():
    """A linear program with a unique solution: everything on the cheapest good."""
    x, c, total = cp.Variable(4), cp.Parameter(4, name="c"), cp.Parameter(name="total")
    problem = cp.Problem(cp.Minimize(c @ x), [cp.sum(x) == total, x >= 0])
    budget, sign = (k.dual_variables[0] for k in problem.constraints)

    def solution(c, total):
        low = c.amin(-1, keepdim=True)
        return torch.where(c == low, total[..., None], 0.0), -low[..., 0], c - low

    return problem, [c, total], [x, budget, sign], (normal(3, 4), tensor(2.0)), solution


def norm_ball():
    x, t, radius = cp.Variable(3), cp.Parameter(3, name="t"), cp.Parameter(nonneg=True, name="radius")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [cp.norm(x) <= radius])

    def solution(t, radius):
        norm = t.norm(dim=-1)
        scale = torch.minimum(radius / norm, torch.ones_like(norm))
        return scale[..., None] * t, 2 * (norm - radius).clamp(min=0)

    dual = problem.constraints[0].dual_variables[0]
    return problem, [t, radius], [x, dual], (normal(3, 3) + 0.2, tensor([0.5, 1.0, 9.0])), solution


def softmax():
    x, c = cp.Variable(4), cp.Parameter(4, name="c")
    problem = cp.Problem(cp.Minimize(c @ x - cp.sum(cp.entr(x))), [cp.sum(x) == 1])

    def solution(c):
        return torch.softmax(-c, -1), torch.logsumexp(-c, -1) - 1

    return problem, [c], [x, problem.constraints[0].dual_variables[0]], (normal(2, 4),), solution


def psd_projection(order):
    X, T = cp.Variable((order, order), symmetric=True), cp.Parameter((order, order), symmetric=True, name="T")
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(X - T)), [X >> 0])

    def solution(T):
        T = (T + T.mT) / 2
        values, vectors = torch.linalg.eigh(T)
        positive, negative = ((vectors * v.clamp(min=0)[..., None, :]) @ vectors.mT for v in (values, -values))
        return positive, negative

    half = normal(2, order, order)
    return problem, [T], [X, problem.constraints[0].dual_variables[0]], (half + half.mT,), solution


CLOSED_FORMS = {
    "ridge": ridge,
    "box": box,
    "simplex": simplex,
    "affine set": affine_set,
    "equality-constrained quadratic program": equality_constrained,
    "linear program": cheapest_vertex,
    "norm ball": norm_ball,
    "exponential cones": softmax,
    "semidefinite of order 3": lambda: psd_projection(3),
    "semidefinite of order 4": lambda: psd_projection(4),
}


def layer_or_skip(problem, parameters, outputs, solver, **options):
    """A layer, or a skipped test where the solver says that it does not take the problem."""
    try:
        return ConvexLayer(problem, parameters, outputs, solver=solver, **options)
    except (OptionError, CompileError) as error:
        if "does not take this problem" in str(error) or "P_sqrt" in str(error):
            pytest.skip(str(error)[:100])
        raise


def sample_program(solver):
    """A least-squares problem with polyhedral constraints, all fields of its data parametric, and a batch of 3.

    Solvers that take a quadratic objective get a parametric P.
    """
    x, P = cp.Variable(3), cp.Parameter((3, 3), PSD=True, name="P")
    A, b, c = cp.Parameter((4, 3), name="A"), cp.Parameter(4, name="b"), cp.Parameter(3, name="c")
    if solver.native_objective:
        problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) + c @ x), [A @ x <= b, cp.sum(x) == 1])
        half = normal(3, 3, 3, seed=3)
        theta = [(half @ half.mT).flatten(1)]
    else:
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x) + c @ x), [A @ x <= b, cp.sum(x) == 1])
        theta = []
    theta = torch.cat(
        [*theta, normal(3, 12, seed=4), 0.5 + normal(3, 4, seed=5).abs(), normal(3, 3), torch.ones(3, 1)], 1
    )
    parameters = [p for p in (P, A, b, c) if p is not P or solver.native_objective]
    compiled = compile_problem(Declaration.of(problem, parameters, [x]), native_objective=solver.native_objective)
    if solver.supports(compiled.program):
        pytest.skip(str(solver.supports(compiled.program)))
    fields = [tensor((compiled.maps[f] @ theta.numpy().T).T) for f in ProgramData.FIELDS]
    return compiled.program, fields


def same_rows(fields):
    """All fields but b as the first sample has them, so that they can be shared."""
    return [f if k == 3 else f[:1].expand_as(f) for k, f in enumerate(fields)]


class SolverContract:
    """Inherit, and give a fixture `solver`: an instance of the solver."""

    @pytest.fixture
    def solver(self):
        raise NotImplementedError

    @pytest.fixture
    def tolerance(self, solver):
        return TOLERANCE.get(solver.name, 1e-8)

    @pytest.fixture
    def step(self, solver):
        return STEP.get(solver.name, 1e-6)

    @pytest.mark.parametrize("name", CLOSED_FORMS)
    def test_closed_forms(self, solver, tolerance, name):
        problem, parameters, outputs, values, solution = CLOSED_FORMS[name]()
        layer = layer_or_skip(problem, parameters, outputs, solver)
        for ours, exact in zip(layer(*values), solution(*values)):
            close(ours, exact.expand_as(ours), tolerance)
        for ours, exact in zip(gradients(layer, values), gradients(solution, values)):
            close(ours, exact, 10 * tolerance)

    @pytest.mark.parametrize("name", CLOSED_FORMS)
    def test_gradcheck(self, solver, step, name):
        problem, parameters, outputs, values, _ = CLOSED_FORMS[name]()
        layer = layer_or_skip(problem, parameters, outputs, solver)
        leaves = [v.clone().requires_grad_() for v in values]
        assert torch.autograd.gradcheck(layer, leaves, eps=step, atol=2e-5, rtol=1e-4, fast_mode=True)

    @pytest.mark.parametrize("shared", [False, True])
    def test_adjoint_of_every_field(self, solver, step, shared):
        program, fields = sample_program(solver)
        fields = same_rows(fields) if shared else fields
        given = [f[:1] if shared and k != 3 else f for k, f in enumerate(fields)]
        options = solver.options()
        weight_x, weight_z = normal(3, program.n, seed=7), normal(3, program.m, seed=8)

        def value(moved):
            found = solver.solve(program, ProgramData(*moved, batch=3), options)
            assert found.ok.all()
            return float((weight_x * found.x).sum() + (weight_z * found.z).sum())

        solution = solver.solve(program, ProgramData(*given, batch=3), options)
        found = solver.adjoint(solution, weight_x, weight_z)
        for k, (name, gradient) in enumerate(zip(ProgramData.FIELDS, found.fields())):
            assert gradient.shape == given[k].shape, name
            varying = tensor(np.isnan(program.fixed[k]))
            direction = varying * normal(*given[k].shape, seed=9)
            ahead, behind = (
                value([f + sign * step * direction if j == k else f for j, f in enumerate(given)]) for sign in (1, -1)
            )
            expected = (ahead - behind) / (2 * step)
            assert abs(float((gradient * direction).sum()) - expected) < 1e-4 * (1 + abs(expected)), name

    def test_shared_fields_agree_with_expanded_ones(self, solver, tolerance):
        program, fields = sample_program(solver)
        expanded = same_rows(fields)
        shared = [f if k == 3 else f[:1].contiguous() for k, f in enumerate(expanded)]
        weights = normal(3, program.n), normal(3, program.m)
        found = []
        for given in (expanded, shared):
            solution = solver.solve(program, ProgramData(*given, batch=3), solver.options())
            found.append((solution, solver.adjoint(solution, *weights)))
        close(found[1][0].x, found[0][0].x, tolerance)
        close(found[1][0].z, found[0][0].z, tolerance)
        for k, (ours, theirs) in enumerate(zip(found[1][1].fields(), found[0][1].fields())):
            varying = torch.as_tensor(np.isnan(program.fixed[k]))
            close(ours.sum(0)[varying], theirs.sum(0)[varying], 10 * tolerance)

    @pytest.mark.parametrize("batch", [0, 1])
    def test_smallest_batches(self, solver, batch):
        program, fields = sample_program(solver)
        solution = solver.solve(program, ProgramData(*(f[:batch] for f in fields), batch=batch), solver.options())
        assert solution.x.shape == (batch, program.n)
        assert solution.z.shape == (batch, program.m)
        for part in (solution.status, solution.iterations, solution.residual):
            assert part.shape == (batch,)
        found = solver.adjoint(solution, torch.ones_like(solution.x), torch.ones_like(solution.z))
        assert [g.shape for g in found.fields()] == [f[:batch].shape for f in fields]

    def test_optimality_conditions(self, solver):
        program, fields = sample_program(solver)
        data = ProgramData(*fields, batch=3)
        solution = solver.solve(program, data, solver.options())
        assert solution.status.tolist() == [Status.SOLVED] * 3
        assert solution.residual.max() <= 1e-9
        P, A = program.P.dense(data.P), program.A.dense(data.A)
        P = P + P.triu(1).mT
        stationarity = (P @ solution.x[..., None] + A.mT @ solution.z[..., None])[..., 0] + data.q
        slack = data.b - (A @ solution.x[..., None])[..., 0]
        assert stationarity.abs().max() < 1e-7
        assert (slack * solution.z).sum(1).abs().max() < 1e-7
        zero, nonneg = program.cones.zero, program.cones.nonneg
        assert not (slack[:, :zero].abs() > 1e-8).any()
        assert not (slack[:, zero : zero + nonneg] < -1e-8).any()

    @pytest.mark.parametrize("solve", ["forward", "solve"])
    def test_statuses(self, solver, tolerance, solve):
        x, c, a = cp.Variable(2), cp.Parameter(2, name="c"), cp.Parameter(name="a")
        problem = cp.Problem(cp.Minimize(c @ x), [x >= 0, a * x[0] <= 1, x[1] <= 1])
        layer = layer_or_skip(problem, [c, a], [x], solver, on_failure="nan")
        costs = tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]).requires_grad_()
        slopes = tensor([0.5, 0.0, 1.0]).requires_grad_()
        result = layer.solve(costs, slopes)
        assert result.status.tolist() == [Status.SOLVED, Status.UNBOUNDED, Status.SOLVED]
        found = result.variables[0] if solve == "solve" else layer(costs, slopes)[0]
        assert found.isnan().all(1).tolist() == [False, True, False]
        close(found[[0, 2]].detach(), tensor([[2.0, 1.0], [0.0, 0.0]]), tolerance)
        found[:, 0].sum().backward()
        close(slopes.grad, tensor([-4.0, 0.0, 0.0]), 10 * tolerance)
        assert costs.grad.abs().max() < 10 * tolerance

    def test_infeasible_samples(self, solver, tolerance):
        x, t, low = cp.Variable(3), cp.Parameter(3, name="t"), cp.Parameter(name="low")
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [x >= low, cp.sum(x) == 1])
        layer = layer_or_skip(problem, [t, low], [x], solver, on_failure="nan")
        target, low = normal(3).requires_grad_(), tensor([0.0, 1.0, -5.0]).requires_grad_()
        result = layer.solve(target, low)
        assert result.status.tolist() == [Status.SOLVED, Status.INFEASIBLE, Status.SOLVED]
        mine = result.variables[0]
        alone = layer(target, low[[0, 2]])[0]
        close(mine[[0, 2]].detach(), alone.detach(), tolerance)
        both = [torch.autograd.grad(v.nansum(0)[0], (target, low), retain_graph=True) for v in (mine, alone)]
        for ours, theirs in zip(*both):
            close(ours, theirs, 10 * tolerance)

    def test_warm_start(self, solver, tolerance):
        problem, parameters, outputs, values, solution = box()
        layer = layer_or_skip(problem, parameters, outputs, solver)
        first = layer.solve(*values)
        moved = values[0] + 1e-3, *values[1:]
        again = layer.solve(*moved, warm_start=first)
        for ours, exact in zip(again.variables, solution(*moved)):
            close(ours, exact.expand_as(ours), tolerance)

    def test_unknown_options(self, solver):
        with pytest.raises((OptionError, TypeError)):
            replace(solver.options(), tolerancee=1.0)
        with pytest.raises(OptionError, match="max_iterations must be an integer of at least 1"):
            solver.options(max_iterations=0)
        assert isinstance(solver.name, str)
