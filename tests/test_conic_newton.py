"""Newton's method on the optimality conditions, from points near the solution."""

import numpy as np
import pytest
from conic_families import FAMILIES, instance

from convexlearn.program.program import Cones, ProgramData
from convexlearn.solvers.conic import Conic, ConicOptions
from convexlearn.solvers.conic_newton import Conditions, polish


def solved(name, batch=4):
    program, data = instance(name, batch)
    solution = Conic().solve(program, ProgramData(*data, batch=batch), ConicOptions())
    assert solution.ok.all()
    x, z = solution.arrays
    return program, data, x, z


@pytest.mark.parametrize("name", FAMILIES)
def test_converges_from_nearby_points(name):
    program, data, x, z = solved(name)
    rng = np.random.default_rng(0)
    noise = [1e-6 * rng.standard_normal(v.shape) * (1 + np.abs(v)) for v in (x, z)]
    start = x + noise[0], z + noise[1]
    conditions = Conditions.of(program, data, start)
    v = conditions.weight * start[1] - (data[3] - conditions.products(*start)[2])
    before = conditions.at(start[0], v).residual
    found = polish(conditions, start[0], v)
    assert (before > 1e-9).all()
    assert found[2].max() < 1e-12
    assert (polish(conditions, start[0], v, steps=False)[2] == before).all()


def test_residual_is_that_of_the_definition():
    program, data, x, z = solved("all cones")
    conditions = Conditions.of(program, data, (x, z))
    rng = np.random.default_rng(1)
    x, v = x + 0.1 * rng.standard_normal(x.shape), rng.standard_normal(z.shape)
    point = conditions.at(x, v)
    assert isinstance(program.cones, Cones)
    for k in range(len(x)):
        P, A = np.zeros((program.n, program.n)), np.zeros((program.m, program.n))
        P[program.P.rows, program.P.cols], A[program.A.rows, program.A.cols] = data[0][k], data[2][k]
        P = P + np.triu(P, 1).T
        z, s = point.split.dual[k] / conditions.weight[k], point.split.primal[k]
        dual = [P @ x[k], A.T @ z, data[1][k]]
        primal = [A @ x[k], s, -data[3][k]]
        expected = max(np.abs(sum(t)).max() / (1 + max(np.abs(p).max() for p in t)) for t in (dual, primal))
        assert point.residual[k] == pytest.approx(expected, rel=1e-12)


def test_points_that_are_no_numbers_have_an_infinite_residual():
    program, data, x, z = solved("Markowitz", 2)
    conditions = Conditions.of(program, data, (x, z))
    x[1] = np.nan
    found = polish(conditions, x, conditions.weight * z)
    assert np.isfinite(found[2][0])
    assert found[2][1] == np.inf
