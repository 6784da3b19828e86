"""Infinite bounds are no bounds; other infinite constants are refused."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from reference import close, tensor

from convexlearn import ConvexLayer, Status
from convexlearn.errors import CompileError

UPPER = np.array([1.0, np.inf, 2.0])


@pytest.mark.parametrize("solver", [None, "dense", "conic"])
@pytest.mark.parametrize("cone", [False, True])
def test_infinite_bounds_are_left_out(solver, cone):
    y, p = cp.Variable(3), cp.Parameter(3, name="p")
    bounds, extra = [y <= UPPER, y >= np.array([-np.inf, 0.0, -np.inf])], [cp.norm(y) <= 50] if cone else []
    if cone and solver == "dense":
        return
    duals = [c.dual_variables[0] for c in bounds]
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(y - p)), bounds + extra), [p], [y, *duals], solver=solver)
    x = tensor([3.0, -1.0, 5.0]).requires_grad_()
    result = layer.solve(x)
    assert result.status == Status.SOLVED
    found = [v.detach() for v in result.variables]
    for ours, exact in zip(found, ([1.0, 0.0, 2.0], [4.0, 0.0, 6.0], [0.0, 2.0, 0.0])):
        close(ours, tensor(exact), 1e-7)
    result.variables[1].sum().backward()
    close(x.grad, tensor([2.0, 0.0, 2.0]), 1e-6)


def test_no_row_is_left():
    y, p = cp.Variable(2), cp.Parameter(2, name="p")
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(y - p)), [y <= np.inf]), [p], [y])
    close(layer(tensor([[3.0, 4.0]]))[0], tensor([[3.0, 4.0]]), 1e-12)


@pytest.mark.parametrize("bound", [-np.inf, np.inf])
def test_other_infinite_constants_are_refused(bound):
    y, p = cp.Variable(2), cp.Parameter(2, name="p")
    constraint = y <= bound if bound < 0 else y == bound
    problem = cp.Problem(cp.Minimize(cp.sum_squares(y - p)), [constraint])
    with pytest.raises(CompileError, match="infinite constant"):
        ConvexLayer(problem, [p], [y])


def test_parameters_may_enter_rows_beside():
    y, p = cp.Variable(2), cp.Parameter(2, name="p")
    rows = [cp.hstack([p @ y, y[0]]) <= np.array([np.inf, 0.25]), y >= p - 1]
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(y - 1)), rows), [p], [y])
    close(layer(torch.ones(2, dtype=torch.float64))[0], tensor([0.25, 1.0]), 1e-9)
