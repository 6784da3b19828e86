"""QuadraticInterface inside cvxpylayers: the same values and gradients as our own layer."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from cvxpylayers.torch import CvxpyLayer
from quadratic_cases import FAMILIES

from convexlearn import ConvexLayer
from convexlearn.errors import CompileError, OptionError, SolverError
from convexlearn.interop import QuadraticInterface


def family(name, shared, batch=4):
    problem, parameters = FAMILIES[name]()
    rng = np.random.default_rng(0)
    values = []
    for p in parameters:
        shape = p.shape if p.name() in shared else (batch, *p.shape)
        value = rng.standard_normal(shape)
        values.append(torch.tensor(np.abs(value) + 0.1 if p.is_nonneg() else value))
    return problem, parameters, values


@pytest.mark.parametrize("shared", [(), ("A", "B", "Q", "H", "rho", "F")])
@pytest.mark.parametrize("name", FAMILIES)
def test_agrees_with_our_own_layer(name, shared):
    problem, parameters, values = family(name, shared)
    variables = problem.variables()
    layers = (
        CvxpyLayer(problem, parameters, variables, solver=QuadraticInterface()),
        ConvexLayer(problem, parameters, variables, solver="quadratic"),
    )
    found = []
    for layer in layers:
        leaves = [v.clone().requires_grad_() for v in values]
        outputs = layer(*leaves)
        loss = sum(torch.sin(torch.arange(o.numel()).double()).reshape(o.shape).mul(o).sum() for o in outputs)
        found.append((*outputs, *torch.autograd.grad(loss, leaves)))
    for ours, own in zip(*found):
        torch.testing.assert_close(ours, own, rtol=1e-8, atol=1e-8)


def test_equal_values_of_a_batched_parameter_keep_their_own_gradients():
    problem, parameters, values = family("norm_inf", ("A", "B", "Q"))
    A = values[0].expand(4, -1, -1).clone().requires_grad_()
    layer = CvxpyLayer(problem, parameters, problem.variables(), solver=QuadraticInterface())
    batched = torch.autograd.grad(layer(A, *values[1:])[0][:, 0].sum(), A)[0]
    for k in range(4):
        single = values[0].clone().requires_grad_()
        loss = layer(single, *values[1:3], values[3][k])[0][0].sum()
        torch.testing.assert_close(batched[k], torch.autograd.grad(loss, single)[0], rtol=1e-9, atol=1e-9)


def test_duals_and_float32():
    x, t = cp.Variable(3), cp.Parameter(3, name="t")
    constraint = x >= 0
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [constraint])
    layer = CvxpyLayer(problem, [t], [x, constraint.dual_variables[0]], solver=QuadraticInterface())
    value = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    x_, dual = layer(value)
    torch.testing.assert_close(x_.float(), torch.tensor([1.0, 0.0, 0.5]))  # cvxpylayers widens on the CPU
    torch.testing.assert_close(dual.float(), torch.tensor([0.0, 4.0, 0.0]))
    dual.sum().backward()
    torch.testing.assert_close(value.grad, torch.tensor([0.0, -2.0, 0.0]))


def test_options_are_the_solvers():
    problem, parameters, values = family("portfolio", ())
    layer = CvxpyLayer(problem, parameters, problem.variables(), solver=QuadraticInterface())
    layer(*values, solver_args={"path": "lanes", "threads": 1})
    with pytest.raises(OptionError, match="unknown option 'pth'; did you mean 'path'"):
        layer(*values, solver_args={"pth": "lanes"})


def test_failures_name_the_samples():
    x, low = cp.Variable(), cp.Parameter(name="low")
    problem = cp.Problem(cp.Minimize(cp.square(x)), [x >= low, x <= 1])
    layer = CvxpyLayer(problem, [low], [x], solver=QuadraticInterface())
    with pytest.raises(SolverError, match="1 of 3 samples have no solution: 1 INFEASIBLE"):
        layer(torch.tensor([0.0, 2.0, 0.5], dtype=torch.float64))


def test_misuse_is_named():
    x, t = cp.Variable(3), cp.Parameter(3, name="t")
    interface = QuadraticInterface()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)))
    CvxpyLayer(problem, [t], [x], solver=interface)
    with pytest.raises(OptionError, match="belongs to another layer"):
        CvxpyLayer(problem, [t], [x], solver=interface)
    cone = cp.Problem(cp.Minimize(cp.norm(x - t)))
    with pytest.raises(CompileError, match="cones of kind soc"):
        CvxpyLayer(cone, [t], [x], solver=QuadraticInterface())
