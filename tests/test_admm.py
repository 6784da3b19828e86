"""ADMM, Algorithm 1 and ADMM-Net."""

import cvxpy as cp
import numpy as np
import pytest
import torch

from convexlearn.errors import CompileError, OptionError
from convexlearn.iterations.admm import ADMM
from convexlearn.prox import soft_threshold
from convexlearn.rules.iterative import Converged, HyperparameterWarning, Unfolded
from convexlearn.splitting import split
from tests.iteration_contract import IterationContract, N, contexts, lasso


class TestADMM(IterationContract):
    hyper = ("step", "penalty")
    untie = ("step", "penalty", "threshold", "relaxation")
    free = (("W1", "W2"), ("W1",), ("W2",))

    def make(self, parts):
        return ADMM(parts)


@pytest.fixture
def admm():
    problem, x, s = lasso()
    return ADMM(split(problem, [x], s))


def test_steps_are_those_of_algorithm_1(admm):
    x, H = contexts(), admm.split.parameters["H"].value
    penalty, mu, rho = 0.7, 1.2, 0.4
    v = u = torch.zeros(3, N, dtype=torch.float64)
    inverse = torch.linalg.inv(H.mT @ H + 2 * penalty * torch.eye(N, dtype=torch.float64))
    for _ in range(5):
        s = (x @ H + 2 * penalty * (v - u)) @ inverse.mT
        v = soft_threshold(s + u, rho / (2 * penalty))
        u = u + mu * (s - v)
    torch.testing.assert_close(Unfolded(admm.replace(penalty=penalty, step=mu), 5)(x), s, rtol=0, atol=1e-12)


@pytest.mark.parametrize("freed", [("W1", "W2"), ("W1",), ("W2",)])
def test_admm_net_starts_as_admm(admm, freed):
    iteration = admm.replace(penalty=0.3)
    net = Unfolded(iteration.free(*freed), 6, untie=[*freed, "penalty", "step"])
    torch.testing.assert_close(net(contexts()), Unfolded(iteration, 6)(contexts()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", [1.0, 1.6])
def test_convergence_for_steps_below_the_golden_ratio(admm, step):
    assert bool(Converged(admm.replace(step=step), tol=1e-9, learn=[]).solve(contexts()).converged.all())


def test_the_paper_s_any_positive_step_diverges(admm):
    with torch.no_grad():
        iterates = Unfolded(admm.replace(step=2.5), 400).iterates(contexts())
    changes = (iterates[1:] - iterates[:-1]).norm(dim=-1).amax(1)
    assert changes[-1] > 10 * changes[100]
    with pytest.raises(OptionError, match=r"converge up to 1\.61803"):
        Converged(admm.replace(step=2.5))
    with pytest.raises(OptionError, match="not with both away"):
        Converged(admm.replace(step=1.4, relaxation=1.5))


def test_constraints_with_maps_and_equalities():
    rng = np.random.default_rng(2)
    F, G, x, s = rng.normal(size=(5, 4)), rng.normal(size=(3, 4)), cp.Parameter(5, name="x"), cp.Variable(4, name="s")
    problem = cp.Problem(
        cp.Minimize(0.5 * cp.sum_squares(F @ s - x) + 0.1 * cp.norm1(s) + cp.sum(s)),
        [G @ s <= 0.5, s[0] + s[1] == 0.2, cp.norm(s) <= 2],
    )
    xs = contexts(3)
    found = Converged(ADMM(split(problem, [x], s)), tol=1e-11, learn=[])(xs)
    for row, decision in zip(xs, found):
        x.value = row.numpy()
        problem.solve(solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        np.testing.assert_allclose(decision.detach().numpy(), s.value, atol=1e-6)
        assert abs(decision[0] + decision[1] - 0.2) < 1e-10


def test_step_and_relaxation_are_not_learned_together_where_a_rule_converges(admm):
    with pytest.raises(OptionError, match="not with both away"):
        Converged(admm, learn=["step", "relaxation"])
    for fixed, learned in (("relaxation", "step"), ("step", "relaxation")):
        with pytest.raises(OptionError, match="not with both away"):
            Converged(admm.replace(**{fixed: 1.2}), learn=[learned])
    with pytest.warns(HyperparameterWarning):
        rule = Converged(admm, learn=["step"])
    with pytest.raises(OptionError, match="not with both away"):
        rule.learn("relaxation")
    Unfolded(admm, 2, untie=["step", "relaxation"])


def test_plug_and_play(admm):
    denoiser = torch.nn.Linear(N, N, dtype=torch.float64)
    net = Unfolded(admm.replace(prox=denoiser), 3)
    net(contexts()).sum().backward()
    assert denoiser.weight.grad.abs().sum() > 0


def test_an_undetermined_update_is_refused():
    x, s = cp.Parameter(3, name="x"), cp.Variable(3, name="s")
    iteration = ADMM(split(cp.Problem(cp.Minimize(cp.sum_squares(s[:2] - x[:2]) + cp.abs(s[0]))), [x], s))
    with pytest.raises(CompileError, match="do not determine all variables"):
        Unfolded(iteration, 1)(torch.ones(1, 3, dtype=torch.float64))
