"""Layers of random CVXPY declarations against CVXPY, duality and differences; `pytest -m slow -s` prints the counts."""

import warnings
from collections import Counter

import cvxpy as cp
import numpy as np
import pytest
import torch
from cvxpy.constraints.zero import Equality, Zero
from random_declarations import CONSTRAINTS, TERMS, declare

import convexlearn as cl

TIGHT = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11, "tol_ktratio": 1e-9}


def solved(declared):
    """The layer's values of all variables, then of all duals, at the parameters' values; and the layer."""
    constraints = declared.problem.constraints
    outputs = [*declared.variables, *(c.dual_variables[0] for c in constraints)]
    layer = cl.ConvexLayer(declared.problem, declared.parameters, outputs)
    inputs = [torch.tensor(p.value, dtype=torch.float64) for p in declared.parameters]
    return layer, inputs, layer(*inputs)


def optimum(problem) -> tuple[float, float]:
    """The optimal value by Clarabel at the tightest tolerance that it reaches, and how far that can be trusted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # inaccurate solutions, which the second number says
        for options in (TIGHT, {}):
            value = problem.solve(solver="CLARABEL", **options)
            if problem.status == "optimal":
                return value, 1e-6
    assert problem.status == "optimal_inaccurate"
    return value, 1e-4


def lower_bound(problem, duals) -> tuple[float, float]:
    """The least Lagrangian over the variables: a bound on the optimal value by weak duality, whatever the duals."""
    cost = problem.objective.expr
    for constraint, dual in zip(problem.constraints, duals):
        if not isinstance(constraint, Equality | Zero):
            assert (dual >= -1e-9).all()
            dual = np.maximum(dual, 0.0)
        cost = cost + cp.sum(cp.multiply(cp.reshape(dual, constraint.expr.shape, order="C"), constraint.expr))
    return optimum(cp.Problem(cp.Minimize(cost)))


def check_values(declared):
    """Objective and constraints of our decision, and strong duality with our multipliers."""
    _, _, outputs = solved(declared)
    count = len(declared.variables)
    best, trust = optimum(declared.problem)
    scale = 1 + abs(best)
    for variable, value in zip(declared.variables, outputs):
        variable.save_value(value.numpy())
    assert abs(declared.problem.objective.value - best) <= trust * scale
    for constraint in declared.problem.constraints:
        assert np.max(constraint.violation()) <= 1e-7 * scale
    bound, again = lower_bound(declared.problem, [dual.numpy() for dual in outputs[count:]])
    assert best - bound <= max(trust, again) * scale


def check_gradient(declared, seed) -> bool:
    """Derivative of the decision along a random direction against differences; False at a kink nearby."""
    layer, inputs, _ = solved(declared)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(declared.variables[0].shape, generator=generator, dtype=torch.float64)
    direction = [0.5 * torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in inputs]

    def value(step):
        return float(weight @ layer(*(x + step * v for x, v in zip(inputs, direction)))[0])

    leaves = [x.clone().requires_grad_() for x in inputs]
    (weight @ layer(*leaves)[0]).backward()
    slope = sum(float((leaf.grad * v).sum()) for leaf, v in zip(leaves, direction))
    h = 1e-5
    middle, sides = value(0.0), [(value(s * h), value(2 * s * h)) for s in (1, -1)]
    one_sided = [s * (4 * near - far - 3 * middle) / (2 * h) for s, (near, far) in zip((1, -1), sides)]
    scale = 1e-5 + abs(one_sided[0])
    if abs(one_sided[0] - one_sided[1]) > 1e-4 * scale:
        return False
    assert slope == pytest.approx(np.mean(one_sided), abs=2e-4 * scale)
    return True


@pytest.mark.parametrize("seed", range(60))
def test_random_declarations(seed):
    declared = declare(seed)
    check_values(declared)
    check_gradient(declared, seed)


@pytest.mark.slow
def test_two_thousand_random_declarations():
    kinds, kinks, failures = Counter(), 0, []
    for seed in range(1000, 3000):
        declared = declare(seed)
        kinds.update(declared.kinds)
        try:
            check_values(declared)
            kinks += not check_gradient(declared, seed)
        except (AssertionError, cl.errors.ConvexLearnError) as error:
            failures.append((seed, declared.kinds, str(error)[:200]))
    assert kinds.keys() == TERMS.keys() | CONSTRAINTS.keys()
    print(f"\n2000 problems, {kinks} gradients at kinks not compared, {len(failures)} failures")
    assert not failures, failures[:5]
