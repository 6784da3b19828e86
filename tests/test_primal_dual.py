"""The primal-dual method."""

import cvxpy as cp
import numpy as np

from convexlearn.iterations.primal_dual import PrimalDual
from convexlearn.rules.iterative import Converged
from convexlearn.splitting import split
from tests.iteration_contract import IterationContract, contexts


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
