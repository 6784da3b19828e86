"""The dispatch problem: its rules against CVXPY, and what their constraints promise."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from reference import assert_gradients_match_differences, close, cvxpy_values, tensor

from convexlearn.errors import OptionError
from convexlearn.evaluate import evaluate
from convexlearn.problems import feasible_dispatch as dispatch
from convexlearn.problems.catalogue import Budget
from convexlearn.simulate.base import Trajectory

GRID = dispatch.GRID
SMALL = dispatch.Setting(train=128, test=64, steps=60)


@pytest.fixture(scope="module")
def study():
    return dispatch.build(0, SMALL)


def wish(load, seed=0):
    noise = torch.randn(len(load), 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 0.16 * load.sum(1, keepdim=True) + 20 * noise


def reference(objective, load):
    """CVXPY's own solution of the problem with distribution factors instead of angles."""
    p, d = cp.Variable(6), cp.Parameter(20)
    flow = GRID.distribution @ (GRID.placed(GRID.generator_bus) @ p - GRID.placed(GRID.load_bus) @ d)
    limits = [cp.sum(p) == cp.sum(d), cp.abs(flow) <= GRID.limit, p >= 0, p <= GRID.largest]
    d.value = load.numpy()
    return cvxpy_values(cp.Problem(cp.Minimize(objective(p)), limits), [p])[0]


def test_loads_are_served_within_their_bounds_and_lines_bind(study):
    demand = tensor(GRID.demand)
    assert len(study.test) == SMALL.test
    assert (study.test.x / demand - SMALL.level).abs().max() <= SMALL.common + SMALL.own
    assert torch.corrcoef(study.test.x.mT)[0, 1:].mean() > 0.1
    assert GRID.excess(study.test.s, study.test.x).max() < 1e-8
    flows_up = GRID.excess(1.001 * study.test.s, 1.001 * study.test.x)[:, 1:42]  # flows are linear in both
    assert 0.1 < (flows_up > 0).any(1).double().mean() < 0.9


def test_the_optimum_is_cvxpys(study):
    load = study.test.x[:4]
    found = dispatch.declare()(load)
    for k in range(len(load)):
        close(found[k], reference(GRID.cost_of, load[k]), 1e-7)
    close(GRID.cost(found), torch.stack([GRID.cost(reference(GRID.cost_of, row)[None])[0] for row in load]), 1e-8)


def test_projection_and_completion_are_cvxpys(study):
    load = study.test.x[:4]
    whole, part = dispatch.projected(Wish())(load), dispatch.completed(Wish(1))(load)
    for k in range(len(load)):
        y = wish(load)[k].numpy()
        close(whole[k], reference(lambda p, y=y: cp.sum_squares(p - y), load[k]), 1e-8)
        close(part[k], reference(lambda p, y=y: cp.sum_squares(p[1:] - y[1:]), load[k]), 1e-8)
    rest = dispatch.completed(Wish(1), limits=False)(load)
    close(rest[:, 1:], wish(load)[:, 1:], 1e-9)
    close(rest.sum(1), load.sum(1), 1e-9)


class Wish(torch.nn.Module):
    def __init__(self, first=0):
        super().__init__()
        self.first = first

    def forward(self, load):
        return wish(load)[:, self.first :]


@pytest.mark.parametrize("make", [dispatch.projected, dispatch.completed])
def test_gradients(study, make):
    load = study.test.x[:6]
    y = wish(load)[:, 1:] if make is dispatch.completed else wish(load)

    def run(y):
        return (make(torch.nn.Identity()).projection(y, load),)

    assert_gradients_match_differences(run, [y], step=1e-4, tolerance=1e-6)


def test_a_trained_network_keeps_every_constraint_on_other_loads(study):
    contender = study.contenders["network, projected"]
    before = evaluate(contender.rule, study.test, dispatch.gap).mean
    contender.fit(contender.rule, Budget())
    with torch.no_grad():
        trajectory = study.test(contender.rule)
    assert dispatch.violation(trajectory).max() < 1e-8  # MW
    assert dispatch.gap(trajectory).mean() < 0.25 * before
    assert (GRID.cost(trajectory.decision) > GRID.cost(study.test.s) - 1e-7).all()


def test_measures_of_a_known_dispatch():
    load = tensor(GRID.demand)[None]
    p = tensor(GRID.largest)[None] / 2
    t = Trajectory(load, p, target=2 * p)
    excess = GRID.excess(p, load)
    assert dispatch.violation(t) == excess.max()
    assert excess[0, 0] == pytest.approx(abs(GRID.largest.sum() / 2 - 189.2))
    close(dispatch.penalised(7.0)(t), GRID.cost(p) + 7 * excess.sum(1), 1e-12)
    close(dispatch.gap(t), 100 * (1 - GRID.cost(p) / GRID.cost(2 * p)), 1e-12)
    assert dispatch.violated(t) == 1


def test_the_weight_that_is_best_once_projected_is_taken_over(study):
    rule = dispatch.projected(dispatch.Networks(0, SMALL)())
    sources = {w: dispatch.Contender(dispatch.Networks(seed, SMALL)()) for w, seed in ((1.0, 3), (2.0, 4), (3.0, 5))}
    found = dispatch.least_projected(sources, study.test)(rule, Budget())
    means = [evaluate(dispatch.projected(c.rule), study.test, dispatch.gap).mean for c in sources.values()]
    np.testing.assert_allclose(found.means, means, rtol=1e-9)
    close(rule(study.test.x), dispatch.projected(sources[found.best].rule)(study.test.x), 1e-12)


def test_loads_must_stay_positive():
    with pytest.raises(OptionError, match="loads must stay positive"):
        dispatch.Setting(level=0.5, common=0.3, own=0.3)
