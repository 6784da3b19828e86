"""The primal-dual method."""

import cvxpy as cp
import numpy as np
import pytest
import torch

from convexlearn.errors import OptionError
from convexlearn.iterations.primal_dual import PrimalDual
from convexlearn.rules.iterative import Converged, HyperparameterWarning, Unfolded
from convexlearn.splitting import split
from tests.iteration_contract import IterationContract, contexts, lasso


class TestPrimalDual(IterationContract):
    hyper = ("step", "dual_step")
    untie = ("step", "dual_step", "threshold", "relaxation")

    def make(self, parts):
        return PrimalDual(parts)


def test_chambolle_pock_without_a_smooth_part():
    rng = np.random.default_rng(2)
    F, x, s = rng.normal(size=(5, 3)), cp.Parameter(5, name="x"), cp.Variable(3, name="s")
    problem = cp.Problem(cp.Minimize(cp.norm(F @ s - x, 1)), [cp.norm(s, "inf") <= 0.3])
    xs = contexts(2)
    found = Converged(PrimalDual(split(problem, [x], s)), tol=1e-12, learn=[])(xs)
    for row, decision in zip(xs, found):
        x.value = row.numpy()
        value = problem.solve(solver="CLARABEL")
        s.value = decision.numpy()
        assert abs(problem.objective.value - value) < 1e-7


def test_the_two_steps_are_not_learned_together_where_a_rule_converges():
    problem, x, s = lasso()
    iteration = PrimalDual(split(problem, [x], s))
    with pytest.raises(OptionError, match="can't both be learned"):
        Converged(iteration, learn=["step", "dual_step"])
    Unfolded(iteration, 2, untie=["step", "dual_step"])


def test_the_bound_of_the_dual_step_follows_from_a_given_step():
    problem, x, s = lasso()
    parts = split(problem, [x], s)
    step = 0.3 / parts.nominal().L.item()
    iteration = PrimalDual(parts, step=step)
    with pytest.warns(HyperparameterWarning):
        rule = Converged(iteration, tol=1e-11, max_iterations=20000, learn=["dual_step"])
    with torch.no_grad():
        rule.free["dual_step"].fill_(20.0)
    bound = 1 / step - parts.nominal().L / 2  # |K| = 1
    assert rule.dual_step.item() == pytest.approx(bound.item())
    assert bool(rule.solve(contexts()).converged.all())
