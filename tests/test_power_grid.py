"""The grid's model: angles against distribution factors, CVXPY's own verdicts, the published least cost."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from reference import close, cvxpy_values, tensor

from convexlearn.problems.power_grid import ieee30

GRID = ieee30()


def declared():
    p, angle, load = cp.Variable(6), cp.Variable(30), cp.Parameter(20)
    constraints = GRID.constraints(p, angle, load)
    return cp.Problem(cp.Minimize(GRID.cost_of(p)), constraints), p, angle, load


def dispatch(seed=0):
    """Generation and loads that keep nothing."""
    generator = torch.Generator().manual_seed(seed)
    p = (1.4 * torch.rand(5, 6, generator=generator, dtype=torch.float64) - 0.2) * tensor(GRID.largest)
    return p, tensor(GRID.demand) * torch.rand(5, 20, generator=generator, dtype=torch.float64) * 2


def test_the_least_cost_is_the_published_one():
    """565.21 $/h, five digits: table of PGLib-OPF, pglib_opf_case30_fsr, column DC."""
    problem, p, _, load = declared()
    load.value = GRID.demand
    cvxpy_values(problem, [p])
    assert f"{problem.value:.2f}" == "565.21"
    assert GRID.demand.sum() == pytest.approx(189.2)


def test_cost_in_torch_and_cvxpy_agree():
    p, _ = dispatch()
    expected = [GRID.cost_of(row.numpy()).value for row in p]
    close(GRID.cost(p), tensor(expected), 1e-12)


def test_flows_by_angles_equal_those_by_distribution_factors():
    """For any balanced injection the angles of the DC equations give the flows of the factors."""
    injection = np.random.default_rng(0).standard_normal(30)
    injection -= injection.mean()
    susceptance = GRID.incidence.T @ GRID.flow_of_angle
    angle = np.linalg.lstsq(susceptance, injection)[0]
    np.testing.assert_allclose(GRID.distribution @ injection, GRID.flow_of_angle @ angle, atol=1e-12)
    np.testing.assert_allclose(GRID.incidence.T @ (GRID.distribution @ injection), injection, atol=1e-12)


def test_a_radial_line_carries_what_hangs_on_it():
    """Bus 26 hangs on the line from 25, bus 13 on that from 12."""
    lines = {tuple(ends): k for k, ends in enumerate((GRID.ends + 1).tolist())}
    np.testing.assert_allclose(GRID.distribution[lines[25, 26], 25], -1.0)
    np.testing.assert_allclose(GRID.distribution[lines[12, 13], 12], -1.0)
    assert np.count_nonzero(GRID.distribution[lines[25, 26]]) == 1


def test_both_formulations_have_one_optimum():
    problem, p, _, load = declared()
    q, d = cp.Variable(6), cp.Parameter(20)
    flow = GRID.distribution @ (GRID.placed(GRID.generator_bus) @ q - GRID.placed(GRID.load_bus) @ d)
    limits = [cp.sum(q) == cp.sum(d), cp.abs(flow) <= GRID.limit, q >= 0, q <= GRID.largest]
    factors = cp.Problem(cp.Minimize(GRID.cost_of(q)), limits)
    load.value = d.value = 1.3 * GRID.demand
    (first,), (second,) = cvxpy_values(problem, [p]), cvxpy_values(factors, [q])
    close(first, second, 1e-6)
    assert (np.abs(flow.value) > GRID.limit - 1e-5).any()  # a line limit binds


def test_excess_is_what_cvxpy_calls_a_violation():
    p, load = dispatch()
    excess = GRID.excess(p, load)
    assert (excess > 0).any(0)[0]
    problem, variable, angle, parameter = declared()
    for k in range(len(p)):
        out = load[k].sum() - p[k].sum()  # taken at the reference bus
        injection = GRID.placed(GRID.generator_bus) @ p[k].numpy() - GRID.placed(GRID.load_bus) @ load[k].numpy()
        injection[0] += float(out)
        susceptance = GRID.incidence.T @ GRID.flow_of_angle
        angles = np.zeros(30)
        angles[1:] = np.linalg.solve(susceptance[1:, 1:], injection[1:])
        variable.value, angle.value, parameter.value = p[k].numpy(), angles, load[k].numpy()
        balance, _, *limits = problem.constraints
        found = np.concatenate([c.violation() for c in limits])  # lines, lower, upper limits of generation
        expected = torch.cat([excess[k, 1:42], excess[k, 48:], excess[k, 42:48]])
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-9)
        np.testing.assert_allclose(np.abs(balance.violation()).sum(), excess[k, 0], atol=1e-9)
