"""Diagnoses of problems whose degeneracy, distance to infeasibility and conditioning are known."""

from importlib import import_module

import cvxpy as cp
import pytest
import torch
from reference import tensor

from convexlearn import ConvexLayer, Status, diagnose


def interval():
    """min (x - t)^2 over low <= x <= high."""
    x, t = cp.Variable(), cp.Parameter(name="t")
    low, high = cp.Parameter(name="low"), cp.Parameter(name="high")
    return ConvexLayer(cp.Problem(cp.Minimize(cp.square(x - t)), [x >= low, x <= high]), [t, low, high], [x])


def ball():
    """min c'w over |w| <= radius."""
    w, c, radius = cp.Variable(3), cp.Parameter(3, name="c"), cp.Parameter(nonneg=True, name="radius")
    return ConvexLayer(cp.Problem(cp.Minimize(c @ w), [cp.norm2(w) <= radius]), [c, radius], [w])


def test_a_healthy_problem_has_nothing_to_object_to():
    found = diagnose(interval(), tensor([0.3, 2.0]), tensor(0.0), tensor(1.0))
    assert found.status.tolist() == [Status.SOLVED] * 2
    assert found.weakly_active.tolist() == [0, 0]
    assert found.disagreement.max() < 1e-6
    assert found.adjoint_residual.max() < 1e-12
    assert found.condition.max() < 100
    assert "Nothing to object to" in str(found)


def test_weakly_active_constraints_are_named_by_sample():
    found = diagnose(interval(), tensor([0.5, 1.0, 0.0]), tensor(0.0), tensor(1.0))
    assert found.weakly_active.tolist() == [0, 1, 1]
    assert found.gap[0] > 0.1
    assert found.gap[1:].max() < 1e-9
    assert "2 of 3 samples (1, 2): weakly active" in str(found)
    assert "smoothing" in str(found)


def test_distance_to_infeasibility_of_an_interval():
    """Rows -x <= -low, x <= high of sizes max(1, |low|), max(1, |high|): x >= low + t, x <= high - t."""
    width = tensor([0.5, 1e-5, -0.2])
    found = diagnose(interval(), tensor(0.0), tensor(0.0), width)
    torch.testing.assert_close(found.margin, width / 2, atol=1e-9, rtol=1e-7)
    assert found.status.tolist() == [Status.SOLVED, Status.SOLVED, Status.INFEASIBLE]
    assert "(1): nearly infeasible" in str(found)
    assert "(2): not solved" in str(found)
    assert found.condition[2].isnan()


def test_singular_systems():
    w, c = cp.Variable(3), cp.Parameter(3, name="c")
    layer = ConvexLayer(cp.Problem(cp.Minimize(c @ w), [w >= 0, cp.sum(w) == 1]), [c], [w])
    found = diagnose(layer, tensor([[1.0, 1.0, 2.0], [1.0, 2.0, 3.0]]))
    assert found.condition[0] == torch.inf
    assert found.condition[1] < 100
    assert "(0): singular adjoint system" in str(found)


def test_smoothing_cures_them():
    w, c = cp.Variable(3), cp.Parameter(3, name="c")
    problem = cp.Problem(cp.Minimize(c @ w), [w >= 0, cp.sum(w) == 1])
    found = diagnose(
        ConvexLayer(problem, [c], [w], solver_args={"smoothing": 1e-3}), tensor([1.0, 1.0, 2.0]), step=1e-6
    )
    assert found.condition < 1e6
    assert found.weakly_active == 0
    assert found.disagreement < 1e-5


def test_condition_number_of_an_unconstrained_problem():
    x, t = cp.Variable(2), cp.Parameter(2, name="t")
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x) / 2 - t @ x)), [t], [x])
    assert diagnose(layer, tensor([1.0, 2.0])).condition == pytest.approx(1.0)


def test_large_systems_are_estimated(monkeypatch):
    values = tensor([0.3, 2.0]), tensor(0.0), tensor(1.0)
    exact = diagnose(interval(), *values).condition
    monkeypatch.setattr(import_module("convexlearn.diagnose"), "DENSE", 0)
    estimate = diagnose(interval(), *values).condition
    assert ((estimate > 0.3 * exact) & (estimate < 10 * exact)).all()


@pytest.mark.parametrize("solver", ["conic", "diffcp"])
def test_second_order_cones(solver):
    w, c = cp.Variable(3), cp.Parameter(3, name="c")
    layer = ConvexLayer(cp.Problem(cp.Minimize(c @ w), [cp.norm2(w) <= 1]), [c], [w], solver=solver)
    found = diagnose(layer, tensor([[1.0, 1.0, 2.0], [1e-9, 0.0, 0.0]]), step=1e-4)
    assert found.condition[0] < 100
    assert found.disagreement[0] < 1e-4
    assert found.margin.tolist() == pytest.approx([0.5, 0.5], abs=1e-6)


def test_a_ball_without_interior():
    """A ball of radius 0 is its own boundary: no margin."""
    found = diagnose(ball(), tensor([1.0, 0.0, 0.0]), tensor(0.0))
    assert found.margin.abs() < 1e-6
    assert "nearly infeasible" in str(found)


def test_units_that_differ_are_named():
    x, a = cp.Variable(2), cp.Parameter(2, name="a")
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x)), [a @ x == 1]), [a], [x])
    found = diagnose(layer, tensor([1e8, 1.0]))
    assert found.spread == pytest.approx(1e8)
    assert "choose units" in str(found)


def test_by_name_and_domains():
    S, t, w = (
        cp.Variable((2, 2), symmetric=True),
        cp.Parameter((2, 2), PSD=True, name="t"),
        cp.Parameter(nonneg=True, name="w"),
    )
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(S - t) + w * cp.trace(S)), [S >= -3]), [t, w], [S])
    found = diagnose(layer, t=torch.eye(2, dtype=torch.float64), w=tensor(0.0))
    assert found.status.shape == ()
    assert found.disagreement < 1e-6
