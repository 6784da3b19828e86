import copy
import io
import logging
import pickle
import subprocess
import sys

import cvxpy as cp
import numpy as np
import pytest
import torch
from reference import assert_gradients_match_differences, close, gradients, tensor

from convexlearn import ConvexLayer, LayerSolution, Status
from convexlearn.errors import (
    AdjointWarning,
    CompileError,
    DomainError,
    LimitWarning,
    MissingParameterError,
    OptionError,
    ShapeError,
    SolverError,
)
from convexlearn.solvers.quadratic.dense import Dense


def box_problem(n=3):
    """Projection on a box: clip(target, low, high)."""
    x, target = cp.Variable(n, name="x"), cp.Parameter(n, name="target")
    low, high = cp.Parameter(name="low"), cp.Parameter(n, name="high")
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - target)), [x >= low, x <= high])
    return problem, [target, low, high], [x]


def clip(target, low, high):
    low = low[..., None]
    return torch.maximum(torch.minimum(target, high), low)


def box_values(leading=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = 2 * torch.randn(*leading, 3, generator=generator, dtype=torch.float64)
    return target, tensor(-0.9), tensor([0.3, 0.6, 0.9])


@pytest.fixture(scope="module")
def box():
    return ConvexLayer(*box_problem())


def reciprocal(**options):
    """x = 1/a for c < 0; infeasible where low > 1/a > 0; unbounded where a = 0 and c < 0."""
    x = cp.Variable(name="x")
    c, a, low = cp.Parameter(name="c"), cp.Parameter(nonneg=True, name="a"), cp.Parameter(name="low")
    return ConvexLayer(cp.Problem(cp.Minimize(c * x), [x >= low, a * x <= 1]), [c, a, low], [x], **options)


MIXED = tensor([-1.0, -1.0, -1.0, 2.0]), tensor([0.5, 1.0, 0.0, 1.0]), tensor([0.0, 3.0, 0.0, -0.5])
MIXED_STATUS = [Status.SOLVED, Status.INFEASIBLE, Status.UNBOUNDED, Status.SOLVED]


class TestShapes:
    @pytest.mark.parametrize("leading", [(), (1,), (4,), (2, 3), (2, 1, 2)])
    def test_values_and_gradients_for_leading_dimensions(self, box, leading):
        values = box_values(leading)
        (found,) = box(*values)
        assert found.shape == (*leading, 3)
        close(found, clip(*values), 1e-12)
        for ours, exact in zip(gradients(box, values), gradients(lambda *v: (clip(*v),), values)):
            close(ours, exact, 1e-10)

    @pytest.mark.parametrize("leading", [(0,), (2, 0)])
    def test_empty_batch_is_differentiable(self, box, leading):
        values = [v.requires_grad_() for v in box_values(leading)]
        (found,) = box(*values)
        assert found.shape == (*leading, 3)
        found.sum().backward()
        for value in values:
            assert value.grad.shape == value.shape
            assert not value.grad.any()

    def test_shared_gradients_are_sums_over_the_batch(self, box):
        target, low, high = box_values((5,))
        shared = gradients(box, (target, low, high))
        batched = gradients(box, (target, low.expand(5), high.expand(5, 3)))
        close(shared[0], batched[0], 1e-12)
        close(shared[1], batched[1].sum(0), 1e-12)
        close(shared[2], batched[2].sum(0), 1e-12)
        assert shared[1] != 0

    def test_several_leading_dimensions_equal_one(self, box):
        target, low, high = box_values((6,))
        high = high + torch.arange(6)[:, None] / 10
        flat = box(target, low, high)[0]
        nested = box(target.reshape(2, 3, 3), low, high.reshape(2, 3, 3))[0]
        close(nested.reshape(6, 3), flat, 0)

    def test_non_contiguous_parameters(self, box):
        values = box_values((4,))
        strided = values[0].T.contiguous().T
        assert not strided.is_contiguous()
        close(box(strided, *values[1:])[0], box(*values)[0], 0)

    def test_scalar_problem(self):
        x, t = cp.Variable(name="x"), cp.Parameter(name="t")
        layer = ConvexLayer(cp.Problem(cp.Minimize((x - t) ** 2), [x <= 1]), [t], [x, 2 * x - 1])
        (value, affine) = layer(tensor(3.0))
        assert value.shape == affine.shape == ()
        close(torch.stack([value, affine]), tensor([1.0, 1.0]), 1e-10)
        assert layer(tensor([3.0]))[0].shape == (1,)
        assert layer(0.25)[0].item() == pytest.approx(0.25, abs=1e-10)

    def test_one_by_one_matrices(self):
        x, t = cp.Variable((1, 1)), cp.Parameter((1, 1), name="t")
        P = cp.Parameter((1, 1), PSD=True, name="P")
        layer = ConvexLayer(cp.Problem(cp.Minimize(cp.quad_form(x, P) / 2 - cp.sum(cp.multiply(x, t)))), [t, P], [x])
        values = tensor([[[2.0]], [[3.0]]]), tensor([[4.0]])
        close(layer(*values)[0], values[0] / values[1], 1e-12)
        expected = gradients(lambda t, P: (t / P,), values)
        for ours, exact in zip(gradients(layer, values), expected):
            close(ours, exact, 1e-10)

    def test_matrix_parameters_are_row_major_tensors(self):
        X, T = cp.Variable((2, 3), name="X"), cp.Parameter((2, 3), name="T")
        layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(X - T))), [T], [X, X.T, X[1]])
        value = torch.arange(12, dtype=torch.float64).reshape(2, 2, 3)
        found = layer(value)
        close(found[0], value, 1e-12)
        close(found[1], value.mT, 1e-12)
        close(found[2], value[:, 1], 1e-12)


class TestTypes:
    def test_float32_in_float32_out(self, box):
        values = [v.float().requires_grad_() for v in box_values((4,))]
        (found,) = box(*values)
        assert found.dtype == torch.float32
        close(found.detach(), clip(*values).detach(), 1e-6)
        found.sum().backward()
        assert all(v.grad.dtype == torch.float32 for v in values)

    def test_solves_in_float64_inside(self, box):
        values = [v.float() for v in box_values((4,))]
        exact = box(*(v.double() for v in values))[0]
        assert torch.equal(box(*values)[0], exact.float())

    @pytest.mark.parametrize("kinds", [("float", "double", "double"), ("float", "float", "double")])
    def test_mixed_arrays_are_promoted(self, box, kinds):
        values = [getattr(v, k)() for v, k in zip(box_values((4,)), kinds)]
        assert box(*values)[0].dtype == torch.float64

    def test_scalars_do_not_promote(self, box):
        target, low, high = box_values((4,))
        assert torch.result_type(target.float(), low) == torch.float32
        assert box(target.float(), low, high.float())[0].dtype == torch.float32
        assert box(target.float(), -0.9, high.float())[0].dtype == torch.float32

    def test_numpy_and_numbers(self, box):
        target, low, high = box_values((4,))
        (found,) = box(target.numpy(), -0.9, high.tolist())
        assert isinstance(found, torch.Tensor)
        assert found.dtype == torch.float64
        close(found, clip(target, low, high), 1e-12)
        single = box(target.numpy().astype(np.float32), -0.9, high.numpy().astype(np.float32))[0]
        assert single.dtype == torch.float32

    def test_integers_count_as_the_default_dtype(self, box):
        found = box(torch.tensor([3, 0, -3]), torch.tensor(-1), torch.tensor([1, 1, 1]))[0]
        assert found.dtype == torch.get_default_dtype()
        assert found.round().tolist() == [1, 0, -1]

    def test_refuses_what_is_no_number(self, box):
        target, low, high = box_values()
        with pytest.raises(MissingParameterError, match=r"'low' must be a tensor, an array or a number, got str"):
            box(target, "low", high)
        with pytest.raises(MissingParameterError, match="'target' is complex"):
            box(target.to(torch.complex128), low, high)

    def test_none_is_an_attribute_error(self, box):
        target, _, high = box_values()
        with pytest.raises(AttributeError, match="'low' is None"):
            box(target, None, high)


class TestArguments:
    def test_by_name(self, box):
        target, low, high = box_values((2,))
        expected = box(target, low, high)[0]
        assert torch.equal(box(high=high, target=target, low=low)[0], expected)
        assert torch.equal(box(target, high=high, low=low)[0], expected)
        assert box.parameter_names == ("target", "low", "high")

    def test_wrong_names(self, box):
        target, low, high = box_values()
        with pytest.raises(OptionError, match="no parameter named 'hihg'; did you mean 'high'"):
            box(target, low, hihg=high)
        with pytest.raises(OptionError, match="'target' is given twice"):
            box(target, low, target=target)

    @pytest.mark.parametrize("count", [0, 2, 4])
    def test_wrong_number(self, box, count):
        values = (*box_values(), tensor(1.0))[:count]
        text = rf"A tensor must be provided for each CVXPY parameter; received {count} tensors, expected 3"
        with pytest.raises(ValueError, match=text):
            box(*values)

    def test_names_what_is_missing(self, box):
        with pytest.raises(ShapeError, match="missing: low, high"):
            box(box_values()[0])

    def test_inconsistent_batches(self, box):
        target, low, high = box_values((4,))
        with pytest.raises(ValueError, match=r"Inconsistent batch sizes.*'target' has \(4,\).*'high' has \(3,\)"):
            box(target, low, high.expand(3, 3))
        with pytest.raises(ValueError, match="Inconsistent batch sizes"):
            box(target, low, high.expand(1, 3))
        with pytest.raises(ValueError, match=r"Invalid parameter dimensionality for parameter 2.*Inconsistent batch"):
            box(target, low, high.expand(4, 4, 3))

    @pytest.mark.parametrize("shape", [(2,), (5, 4)])
    def test_invalid_shape(self, box, shape):
        _, low, high = box_values()
        with pytest.raises(ValueError, match=r"Invalid parameter shape for parameter 0 \('target'\)") as caught:
            box(torch.zeros(shape), low, high)
        assert "Expected: (3,)" in str(caught.value)
        assert f"Got: {shape}" in str(caught.value)

    @pytest.mark.parametrize("shape", [(), (5, 5, 4)])
    def test_invalid_dimensionality(self, box, shape):
        _, low, high = box_values()
        with pytest.raises(ValueError, match=r"Invalid parameter dimensionality for parameter 0 \('target'\)"):
            box(torch.zeros(shape), low, high)

    def test_parameters_must_match(self):
        problem, parameters, variables = box_problem()
        with pytest.raises(ValueError, match=r"must exactly match problem\.parameters.*'low'"):
            ConvexLayer(problem, [parameters[0], parameters[2]], variables)
        with pytest.raises(ValueError, match=r"must exactly match problem\.parameters.*'other'"):
            ConvexLayer(problem, [*parameters, cp.Parameter(name="other")], variables)
        with pytest.raises(ValueError, match=r"must exactly match problem\.parameters"):
            ConvexLayer(problem, [*parameters, parameters[0]], variables)
        with pytest.raises(ValueError, match="must be provided as a list or tuple"):
            ConvexLayer(problem, parameters[0], variables)
        with pytest.raises(ValueError, match="must be provided as a list or tuple"):
            ConvexLayer(problem, parameters, variables[0])

    def test_variables_must_be_the_problems(self):
        problem, parameters, variables = box_problem()
        for foreign in (cp.Variable(2, name="foreign"), parameters[0], 2 * cp.Variable()):
            with pytest.raises(ValueError, match=r"must be a subset of problem\.variables"):
                ConvexLayer(problem, parameters, [*variables, foreign])

    def test_names_must_be_unique(self):
        x, a, b = cp.Variable(), cp.Parameter(name="a"), cp.Parameter(name="a")
        with pytest.raises(CompileError, match="parameter names must be unique"):
            ConvexLayer(cp.Problem(cp.Minimize((x - a - b) ** 2)), [a, b], [x])

    def test_policies(self):
        with pytest.raises(OptionError, match="did you mean 'fallback'"):
            reciprocal(on_failure="falback")
        with pytest.raises(OptionError, match="set on_failure='fallback'"):
            reciprocal(fallback=0.0)
        with pytest.raises(OptionError, match="needs fallback="):
            reciprocal(on_failure="fallback")
        with pytest.raises(OptionError, match="must hold 1 values, got 2"):
            reciprocal(on_failure="fallback", fallback=[0.0, 1.0])
        with pytest.raises(ShapeError, match="fallback of 'x' must have shape"):
            reciprocal(on_failure="fallback", fallback=[torch.zeros(2)])


class TestOptions:
    @pytest.mark.parametrize(
        "options", [{"eps": 1e-12}, {"tol": 1e-3}, {"max_iters": 50}, {"acceleration_lookback": 0}, {"mode": "lsqr"}]
    )
    def test_names_of_other_layers(self, box, options):
        values = box_values((2,))
        torch.testing.assert_close(box(*values, solver_args=options)[0], clip(*values), rtol=0, atol=1e-9)
        ConvexLayer(*box_problem(), solver_args=options)

    def test_ignored_options_are_logged(self, box, caplog):
        with caplog.at_level(logging.DEBUG, "convexlearn"):
            box(*box_values(), solver_args={"solve_method": "SCS"})
        assert f"'solve_method' does not apply to solver '{box.solver.name}'" in caplog.text

    def test_unknown_options_are_errors(self, box):
        with pytest.raises(OptionError, match=r"unknown option 'tolerence'; did you mean 'tolerance'"):
            box(*box_values(), solver_args={"tolerence": 1e-3})
        with pytest.raises(OptionError, match=r"did you mean 'max_iterations'"):
            ConvexLayer(*box_problem(), solver_args={"max_iteration": 3})
        with pytest.raises(OptionError, match="tolerance must be a number above 0 and below 1"):
            box(*box_values(), solver_args={"tolerance": -1.0})
        with pytest.raises(OptionError, match="unknown solver 'dens'; did you mean 'dense'"):
            ConvexLayer(*box_problem(), solver="dens")

    def test_same_with_and_without_gradients(self, box):
        options = {"eps": 1e-11, "max_iters": 80}
        target, low, high = box_values((3,))
        with torch.no_grad():
            plain = box(target, low, high, solver_args=options)[0]
        traced = box(target.requires_grad_(), low, high, solver_args=options)[0]
        assert torch.equal(plain, traced.detach())
        assert not plain.requires_grad
        with torch.no_grad(), pytest.raises(OptionError, match="unknown option"):
            box(target, low, high, solver_args={"epss": 1e-3})

    @pytest.mark.parametrize("name", ["CLARABEL", "SCS", "MOREAU", "clarabel"])
    def test_names_of_other_packages_solvers(self, name, caplog):
        with caplog.at_level(logging.DEBUG):
            layer = ConvexLayer(*box_problem(), solver=name)
        assert type(layer.solver) is type(ConvexLayer(*box_problem()).solver)
        assert name in caplog.text
        close(layer(*box_values())[0], clip(*box_values()), 1e-12)

    def test_solver_that_does_not_fit(self):
        x, t = cp.Variable(3), cp.Parameter(3, name="t")
        with pytest.raises(OptionError, match=r"'dense' does not take this problem.*leave solver=None"):
            ConvexLayer(cp.Problem(cp.Minimize(cp.norm(x - t))), [t], [x], solver="dense")

    def test_solver_instance_and_case(self, box):
        values = box_values((2,))
        for solver in ("DENSE", Dense()):
            layer = ConvexLayer(*box_problem(), solver=solver)
            assert layer.solver.name == "dense"
            close(layer(*values)[0], clip(*values), 1e-12)


class TestDomains:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_non_finite_names_parameter_and_element(self, box, bad):
        target, low, high = box_values((2, 3))
        target[1, 2, 0] = bad
        with pytest.raises(DomainError, match=r"parameter 'target' has a NaN or infinite.*batch element \(1, 2\)"):
            box(target, low, high)
        with pytest.raises(DomainError, match="parameter 'high' has a NaN"):
            box(torch.zeros(3), low, high * bad)

    @pytest.mark.parametrize("bad", [0.0, -1e-7])
    def test_logarithm_of_a_geometric_program(self, bad):
        x, a = cp.Variable(pos=True), cp.Parameter(pos=True, name="a")
        layer = ConvexLayer(cp.Problem(cp.Minimize(x), [x >= a]), [a], [x], gp=True)
        with pytest.raises(DomainError, match=r"'a' of a geometric program must be positive.*batch element 1"):
            layer(tensor([1.0, bad]))

    def test_sign(self):
        layer = reciprocal()
        a = tensor([0.5, -0.25, 1.0])
        with pytest.raises(DomainError, match=r"'a' must be nonnegative.*batch element 1 is -0\.25"):
            layer(-1.0, a, 0.0)
        assert layer(1.0, tensor(-1e-6), 0.5)[0].item() == pytest.approx(0.5, abs=1e-8)

    def test_indefinite(self):
        layer = quadratic()
        P = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1)
        P[2, 0, 0] = -0.5
        with pytest.raises(DomainError, match=r"'P' must be positive semidefinite.*batch element 2.*eigenvalue -0\.5"):
            layer(P, tensor([1.0, 1.0]))

    def test_rounding_errors_of_psd_matrices_are_accepted(self):
        P = tensor([[1.0, 0.0], [0.0, -0.9e-8]])
        x = quadratic(bounded=True)(P, tensor([-1.0, -1.0]))[0]
        close(x, tensor([1.0, 5.0]), 1e-7)

    def test_symmetric_parameters_are_symmetrised(self):
        layer, q = quadratic(), tensor([1.0, -2.0])
        raw = tensor([[3.0, 0.3], [0.9, 2.0]])
        solution = lambda P, q: (-torch.linalg.solve((P + P.mT) / 2, q),)  # noqa: E731
        close(layer(raw, q)[0], solution(raw, q)[0], 1e-12)
        found, exact = gradients(layer, (raw, q)), gradients(solution, (raw, q))
        close(found[0], exact[0], 1e-11)
        assert found[0][0, 1] == pytest.approx(found[0][1, 0].item())


def quadratic(bounded=False):
    """x = -P^-1 q; bounded: inside [-5, 5]."""
    x, P, q = cp.Variable(2), cp.Parameter((2, 2), PSD=True, name="P"), cp.Parameter(2, name="q")
    constraints = [x >= -5, x <= 5] if bounded else []
    return ConvexLayer(cp.Problem(cp.Minimize(cp.quad_form(x, P) / 2 + q @ x), constraints), [P, q], [x])


class TestFailures:
    def test_error_names_samples_and_statuses(self):
        with pytest.raises(SolverError, match="2 of 4 samples failed") as caught:
            reciprocal()(*MIXED)
        assert "sample 1 is INFEASIBLE" in str(caught.value)
        assert "sample 2 is UNBOUNDED" in str(caught.value)
        diffcp = pytest.importorskip("diffcp")
        assert isinstance(caught.value, diffcp.SolverError)

    def test_error_of_several_dimensions_and_of_one_sample(self):
        layer = reciprocal()
        with pytest.raises(SolverError, match=r"sample \(0, 1\) is INFEASIBLE"):
            layer(*(v.reshape(2, 2) for v in MIXED))
        with pytest.raises(SolverError, match="1 of 1 samples failed: the only sample is INFEASIBLE"):
            layer(*(v[1] for v in MIXED))

    def test_solve_never_raises(self):
        result = reciprocal().solve(*MIXED)
        assert isinstance(result, LayerSolution)
        assert result.status.tolist() == MIXED_STATUS
        assert result.ok.tolist() == [True, False, False, True]
        assert result.residual[result.ok].max() <= 1e-9
        close(result.variables[0][result.ok], tensor([2.0, -0.5]), 1e-10)
        assert result.variables[0][~result.ok].isnan().all()
        assert (result.iterations[result.ok] > 0).all()

    @pytest.mark.parametrize("policy", ["nan", "fallback"])
    def test_other_samples_are_unharmed(self, policy):
        layer = reciprocal(on_failure=policy, fallback=7.0 if policy == "fallback" else None)
        values = [v.clone().requires_grad_() for v in MIXED]
        (found,) = layer(*values)
        filler = tensor([7.0, 7.0]) if policy == "fallback" else tensor([torch.nan, torch.nan])
        expected = torch.cat([tensor([2.0]), filler, tensor([-0.5])])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10, equal_nan=True)
        found.sum().backward()
        close(values[1].grad, tensor([-4.0, 0.0, 0.0, 0.0]), 1e-8)
        close(values[2].grad, tensor([0.0, 0.0, 0.0, 1.0]), 1e-8)
        close(values[0].grad, torch.zeros(4).double(), 1e-12)

    def test_shared_parameters_get_finite_gradients(self):
        layer = reciprocal(on_failure="nan")
        c, a = tensor(-1.0).requires_grad_(), tensor(0.5).requires_grad_()
        low = tensor([0.0, 3.0, 1.0]).requires_grad_()
        (found,) = layer(c, a, low)
        assert found.isnan().tolist() == [False, True, False]
        (found * tensor([1.0, torch.nan, 1.0])).sum().backward()
        assert a.grad.item() == pytest.approx(-8.0, abs=1e-8)
        assert torch.equal(low.grad, torch.zeros(3, dtype=torch.float64))

    def test_second_derivatives_ignore_failures(self):
        layer = reciprocal(on_failure="nan")
        a = tensor([0.5, 0.5]).requires_grad_()
        (found,) = layer(tensor(-1.0), a, tensor([0.0, 3.0]))
        (first,) = torch.autograd.grad(found[0], a, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), a)
        close(second, tensor([16.0, 0.0]), 1e-7)

    @pytest.mark.parametrize("fallback", [tensor([1.0, 2.0, 3.0]), [np.array([1.0, 2.0, 3.0])], [0.5]])
    def test_fallback_shapes(self, fallback):
        problem, parameters, variables = box_problem()
        layer = ConvexLayer(problem, parameters, variables, on_failure="fallback", fallback=fallback)
        low = tensor([0.0, 5.0])
        value = fallback[0] if isinstance(fallback, list) else fallback
        found = layer(torch.zeros(3).double(), low, torch.ones(3).double())[0]
        close(found, torch.stack([torch.zeros(3).double(), torch.as_tensor(value).double().expand(3)]), 1e-10)

    def test_other_cones(self):
        x, t = cp.Variable(2), cp.Parameter(2, name="t")
        radius = cp.Parameter(name="radius")
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [cp.norm(x) <= radius])
        layer = ConvexLayer(problem, [t, radius], [x], on_failure="nan")
        target = tensor([3.0, 4.0]).requires_grad_()
        radii = tensor([1.0, -1.0, 10.0]).requires_grad_()
        (found,) = layer(target, radii)
        assert found.isnan().all(1).tolist() == [False, True, False]
        close(found[[0, 2]].detach(), tensor([[0.6, 0.8], [3.0, 4.0]]), 1e-7)
        found[:, 0].nansum().backward()
        close(radii.grad, tensor([0.6, 0.0, 0.0]), 1e-6)
        close(target.grad, tensor([1 + 0.2 * 0.64, -0.2 * 0.48]), 1e-6)
        assert layer.solve(target, radii).status.tolist() == [Status.SOLVED, Status.INFEASIBLE, Status.SOLVED]


def polytope_problem():
    """A linear program that takes some iterations."""
    A = np.random.default_rng(0).normal(size=(40, 15))
    x, c = cp.Variable(15, name="x"), cp.Parameter(15, name="c")
    return cp.Problem(cp.Minimize(c @ x), [A @ x <= 1, x >= -10, x <= 10]), [c], [x]


def costs():
    return torch.randn(3, 15, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class TestLimits:
    def test_explicit_limit_returns_the_iterate(self):
        layer = ConvexLayer(*polytope_problem())
        with pytest.warns(LimitWarning, match="3 of 3 samples stopped at the limit"):
            (found,) = layer(costs(), solver_args={"max_iters": 2})
        assert torch.isfinite(found).all()
        assert (found - layer(costs())[0]).abs().amax(1).min() > 1e-3

    def test_limit_at_construction(self):
        layer = ConvexLayer(*polytope_problem(), solver_args={"max_iterations": 2})
        c = costs().requires_grad_()
        with pytest.warns(LimitWarning):
            (found,) = layer(c)
        with pytest.warns(AdjointWarning):  # two iterations from the start, no vertex is determined
            found.sum().backward()
        assert torch.isfinite(c.grad).all()

    def test_limit_that_is_not_reached_is_silent(self):
        layer = ConvexLayer(*polytope_problem())
        close(layer(costs(), solver_args={"max_iters": 100})[0], layer(costs())[0], 0)

    def test_time_limit(self):
        layer = ConvexLayer(*polytope_problem(), solver="dense")
        with pytest.warns(LimitWarning):
            assert torch.isfinite(layer(costs(), solver_args={"time_limit": 1e-9})[0]).all()
        assert layer.solve(costs(), solver_args={"time_limit": 100.0}).ok.all()

    def test_solve_marks_it(self):
        result = ConvexLayer(*polytope_problem()).solve(costs(), solver_args={"max_iters": 2})
        assert not result.ok.any()
        assert result.limited
        assert result.iterations.tolist() == [2, 2, 2]
        assert torch.isfinite(result.variables[0]).all()

    def test_scs_limit(self):
        x, t = cp.Variable(5), cp.Parameter(5, name="t")
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [cp.norm(x) <= 1])
        layer = ConvexLayer(problem, [t], [x], solver="diffcp")
        target = torch.linspace(1, 2, 5, dtype=torch.float64)
        with pytest.warns(LimitWarning, match="1 of 1 samples"):
            (found,) = layer(target, solver_args={"max_iters": 3})
        assert torch.isfinite(found).all()


class TestWarmStart:
    def test_solution_of_a_neighbour(self, box):
        target, low, high = box_values((4,))
        first = box.solve(target, low, high)
        again = box.solve(target + 1e-4, low, high, warm_start=first)
        close(again.variables[0], clip(target + 1e-4, low, high), 1e-12)
        assert (again.iterations <= first.iterations).all()
        assert again.iterations.max() <= 1

    def test_true_keeps_the_last_in_a_cache(self):
        layer = ConvexLayer(*box_problem())
        values = box_values((4,))
        layer(*values, warm_start=True)
        result = layer.solve(*values, warm_start=True)
        assert result.iterations.max() <= 1
        close(result.variables[0], clip(*values), 1e-12)
        assert not layer.state_dict()

    def test_gradient_is_the_same(self, box):
        values = box_values((4,))
        warm = box.solve(*values)
        cold = gradients(box, values)
        for ours, exact in zip(gradients(lambda *v: box(*v, warm_start=warm), values), cold):
            close(ours, exact, 1e-10)

    def test_other_batch_size_and_other_layer_are_cold(self, box):
        warm = box.solve(*box_values((4,)))
        values = box_values((2,))
        close(box(*values, warm_start=warm)[0], clip(*values), 1e-12)
        other = ConvexLayer(*box_problem())
        close(other(*box_values((4,)), warm_start=warm)[0], clip(*box_values((4,))), 1e-12)

    def test_after_failures(self):
        layer = reciprocal(on_failure="nan")
        warm = layer.solve(*MIXED)
        found = layer(MIXED[0], tensor([0.5, 0.25, 0.25, 1.0]), MIXED[2], warm_start=warm)[0]
        close(found, tensor([2.0, 4.0, 4.0, -0.5]), 1e-10)


class TestIndependence:
    def test_two_layers_of_one_problem(self):
        problem, parameters, variables = box_problem()
        values = box_values((3,))
        first = ConvexLayer(problem, parameters, variables)
        before = first(*values)[0]
        second = ConvexLayer(problem, parameters[::-1], [variables[0], problem.constraints[0].dual_variables[0]])
        close(second(*values[::-1])[0], before, 0)
        close(first(*values)[0], before, 0)
        close(second(*values[::-1])[1], (values[1] - values[0]).clamp(min=0), 1e-10)

    def test_the_problem_is_not_touched(self):
        problem, parameters, variables = box_problem()
        for p, v in zip(parameters, box_values()):
            p.value = v.numpy()
        ConvexLayer(problem, parameters, variables)(*box_values((3,), seed=1))
        assert variables[0].value is None
        assert problem.constraints[0].dual_variables[0].value is None
        assert problem.status is None
        assert problem._cache.param_prog is None
        for p, v in zip(parameters, box_values()):
            np.testing.assert_array_equal(p.value, v.numpy())

    def test_a_solved_problem_stays_solved(self):
        problem, parameters, variables = box_problem()
        for p, v in zip(parameters, box_values()):
            p.value = v.numpy()
        problem.solve(solver="CLARABEL")
        value = variables[0].value.copy()
        layer = ConvexLayer(problem, parameters, variables)
        layer(*box_values((3,), seed=1))
        np.testing.assert_array_equal(variables[0].value, value)
        parameters[0].value = np.array([9.0, 9.0, 9.0])
        close(layer(*box_values())[0], clip(*box_values()), 1e-12)
        problem.solve(solver="CLARABEL")
        np.testing.assert_allclose(variables[0].value, [0.3, 0.6, 0.9], atol=1e-6)

    def test_forward_writes_nothing(self, box):
        before = {k: id(v) for k, v in box.__dict__.items()}
        box(*box_values((3,)))
        assert {k: id(v) for k, v in box.__dict__.items()} == before

    def test_problem_is_a_copy(self, box):
        target, low, high = box_values()
        copied = box.problem(target=target, low=-0.9, high=high)
        copied.solve(solver="CLARABEL")
        found = copied.variables()[0].value
        np.testing.assert_allclose(found, clip(target, low, high).numpy(), atol=1e-6)
        assert box.problem().parameters()[0].value is None
        with pytest.raises(OptionError, match="did you mean 'high'"):
            box.problem(hig=1.0)


FRESH_PROCESS = """
import pickle, sys
import cvxpy as cp, torch
noise = [cp.Variable(3) for _ in range(20)]
problem = cp.Problem(cp.Minimize(cp.sum_squares(noise[0] - noise[1])), [noise[0] >= 1])
with open(sys.argv[1], "rb") as file:
    layer, values, expected = pickle.load(file)
later = [cp.Variable(3) for _ in range(20)]
problem.solve(solver="CLARABEL")
for found, value in zip(layer(*values), expected):
    torch.testing.assert_close(found, value, rtol=0, atol=1e-12)
copy = layer.problem(**dict(zip(layer.parameter_names, (v[0] if v.dim() == 2 else v for v in values))))
copy.solve(solver="CLARABEL")
ids = [v.id for v in (*noise, *later, *copy.variables())]
assert len(set(ids)) == len(ids)
from convexlearn import ConvexLayer
named = {p.name(): p for p in copy.parameters()}
again = ConvexLayer(copy, [named[n] for n in layer.parameter_names], copy.variables())
torch.testing.assert_close(again(*values)[0], expected[0], rtol=0, atol=1e-12)
"""


class TestModule:
    def twins(self):
        problem, parameters, variables = box_problem()
        outputs = [variables[0], problem.constraints[1].dual_variables[0], variables[0][0] + 1]
        layer = ConvexLayer(problem, parameters, outputs)
        return layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))

    def test_deepcopy_and_pickle(self):
        values = box_values((4,))
        layer, *others = self.twins()
        for other in others:
            for ours, theirs in zip(other(*values), layer(*values)):
                assert torch.equal(ours, theirs)
            for ours, theirs in zip(gradients(other, values), gradients(layer, values)):
                assert torch.equal(ours, theirs)
            assert pickle.loads(pickle.dumps(other))(*values)[0].shape == (4, 3)

    def test_copies_after_a_warm_start(self):
        layer = ConvexLayer(*box_problem())
        values = box_values((4,))
        layer(*(v.requires_grad_() for v in values), warm_start=True)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(*values, warm_start=True)[0], layer(*values)[0])

    def test_pickle_in_a_fresh_process(self, tmp_path):
        layer = self.twins()[0]
        values = box_values((4,))
        path = tmp_path / "layer.pickle"
        path.write_bytes(pickle.dumps((layer, values, layer(*values))))
        subprocess.run([sys.executable, "-c", FRESH_PROCESS, str(path)], check=True)

    def test_pickled_geometric_program(self):
        x, y = cp.Variable(pos=True), cp.Variable(pos=True)
        a, k = cp.Parameter(pos=True, name="a"), cp.Parameter(name="k")
        layer = ConvexLayer(cp.Problem(cp.Minimize(x + y), [x**k * y >= a]), [a, k], [x, y], gp=True)
        values = tensor(2.0), tensor(1.0)
        close(torch.stack(layer(*values)), tensor([2.0, 2.0]).sqrt(), 1e-7)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            close(torch.stack(other(*values)), tensor([2.0, 2.0]).sqrt(), 1e-7)

    def test_state_dict_is_empty(self, box):
        assert not box.state_dict()
        assert not list(box.buffers())
        box.load_state_dict({})

    def test_moves_and_modes(self, box):
        layer = copy.deepcopy(box).to(torch.float32).eval().requires_grad_(False)
        values = box_values((2,))
        assert layer(*values)[0].dtype == torch.float64
        assert layer.train()(*values)[0].shape == (2, 3)

    def test_in_a_larger_model(self):
        model = Larger()
        averaged = torch.optim.swa_utils.AveragedModel(model)
        inputs = torch.ones(2, 4, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(inputs) - 0.25).square().sum()
            loss.backward()
            optimizer.step()
            averaged.update_parameters(model)
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        assert averaged(inputs).shape == (2, 3)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        assert set(torch.load(file, weights_only=True)) == {"linear.weight", "linear.bias"}

    def test_repr_names_who_solves_in_place_of_whom(self):
        layer = ConvexLayer(*box_problem(), solver="ecos")
        assert "solver: quadratic (in place of ecos), " in repr(layer)
        assert repr(layer.solver) == "<solver 'quadratic'>"
        assert "in place" not in repr(ConvexLayer(*box_problem(), solver="dense"))

    def test_repr(self, box):
        text = repr(ConvexLayer(*box_problem(), on_failure="nan"))
        for part in ("ConvexLayer", "target (3,)", "low ()", "returns: x (3,)", "solver: ", "on_failure='nan'"):
            assert part in text
        assert "nonnegative" in repr(reciprocal())


class Larger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 3, dtype=torch.float64)
        self.layer = ConvexLayer(*box_problem())

    def forward(self, x):
        return self.layer(self.linear(x), -9.0, torch.full((3,), 9.0, dtype=torch.float64))[0]


def test_gradients_at_saturated_constraints_match_differences(box):
    values = tensor([[2.0, -3.0, 0.1], [0.2, 0.1, 5.0]]), tensor(-0.9), tensor([0.3, 0.6, 0.9])
    assert_gradients_match_differences(box, values)


def test_parameters_that_do_not_matter_get_zero_gradients():
    x, t = cp.Variable(2, name="x"), cp.Parameter(2, name="t")
    price, unused = cp.Parameter(name="price"), cp.Parameter((2, 2), PSD=True, name="unused")
    objective = cp.sum_squares(x - t) + price + 0 * cp.trace(unused) * 1.0
    layer = ConvexLayer(cp.Problem(cp.Minimize(objective)), [price, t, unused], [x])
    values = tensor([1.0, 2.0, 3.0]), tensor([1.0, 2.0]), torch.eye(2, dtype=torch.float64)
    found = layer(*values)[0]
    assert found.shape == (3, 2)
    close(found, values[1].expand(3, 2), 1e-12)
    by_price, by_target, by_unused = gradients(layer, values)
    assert not by_price.any()
    assert not by_unused.any()
    assert by_target.all()
