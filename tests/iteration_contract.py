"""The suite that every iteration on a convex problem inherits: give `make`, get the tests."""

import copy
import pickle
import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch

from convexlearn.rules.iterative import Converged, HyperparameterWarning, Unfolded
from convexlearn.splitting import split

M, N = 5, 8
TIGHT = {"tol_gap_abs": 1e-13, "tol_gap_rel": 1e-13, "tol_feas": 1e-13}


def lasso(constrained: bool = False):
    """A lasso, plain or within a box; the problem, its context and decision."""
    rng = np.random.default_rng(0)
    x, s = cp.Parameter(M, name="x"), cp.Variable(N, name="s")
    H = cp.Parameter((M, N), name="H", value=rng.normal(size=(M, N)))
    rho = cp.Parameter(nonneg=True, name="rho", value=0.4)
    goal = 0.5 * cp.sum_squares(x - H @ s) + rho * cp.norm1(s)
    constraints = [s >= -0.1, s <= 0.2] if constrained else []
    return cp.Problem(cp.Minimize(goal), constraints), x, s


def contexts(count: int = 3) -> torch.Tensor:
    return torch.randn(count, M, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def optima(problem, x, xs):
    """CVXPY's objective values."""
    values = []
    for row in xs:
        x.value = row.numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "may be inaccurate" at these tolerances
            values.append(problem.solve(solver="CLARABEL", **TIGHT))
    return values


def objective(problem, x, s, context, decision):
    x.value, s.value = context.numpy(), decision.detach().numpy()
    violation = max([0.0, *(float(np.max(c.violation())) for c in problem.constraints)])
    return problem.objective.value, violation


class IterationContract:
    """Subclass it and give `make(split)`; `hyper` are slots whose implicit gradient must vanish, `untie` those that
    a network may learn, `free` the sets of matrices that may be freed."""

    hyper: tuple[str, ...] = ()
    untie: tuple[str, ...] = ()
    free: tuple[tuple[str, ...], ...] = ()

    def make(self, parts):
        raise NotImplementedError

    @pytest.mark.parametrize("constrained", [False, True])
    def test_reaches_the_objective_of_cvxpy(self, constrained):
        problem, x, s = lasso(constrained)
        xs = contexts()
        rule = Converged(self.make(split(problem, [x], s)), tol=1e-11, max_iterations=20000, learn=[])
        result = rule.solve(xs)
        assert bool(result.converged.all())
        for value, context, decision in zip(optima(problem, x, xs), xs, result.decision):
            reached, violation = objective(problem, x, s, context, decision)
            assert abs(reached - value) < 1e-8
            assert violation < 1e-8

    def test_unfolded_starts_as_the_iteration(self):
        problem, x, s = lasso()
        iteration, xs = self.make(split(problem, [x], s)), contexts()
        instance = iteration.bind(xs)
        state = iteration.start(instance)
        expected = [iteration.decision(state)]
        for _ in range(7):
            state = iteration.step(state, instance)
            expected.append(iteration.decision(state))
        net = Unfolded(iteration, 7, untie=self.untie)
        torch.testing.assert_close(net.iterates(xs).detach(), torch.stack(expected), rtol=0, atol=1e-12)
        torch.testing.assert_close(net(xs).detach(), expected[-1], rtol=0, atol=1e-12)
        torch.testing.assert_close(net.truncated(3)(xs).detach(), expected[3], rtol=0, atol=1e-12)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            torch.testing.assert_close(twin(xs), net(xs), rtol=0, atol=1e-14)

    def test_freed_matrices_start_as_the_iteration(self):
        """LISTA, ADMM-Net and their like."""
        problem, x, s = lasso()
        iteration = self.make(split(problem, [x], s))
        expected = Unfolded(iteration, 6).iterates(contexts())
        for freed in self.free:
            net = Unfolded(iteration.free(*freed), 6, untie=[*freed, *self.untie])
            torch.testing.assert_close(net.iterates(contexts()).detach(), expected, rtol=0, atol=1e-12)
            assert all(net.value(name).shape[0] == 6 for name in freed)

    @pytest.mark.parametrize("gradient", ["implicit", "unroll"])
    def test_gradient_equals_central_differences(self, gradient):
        problem, x, s = lasso()
        xs = contexts(2).requires_grad_()
        rule = Converged(self.make(split(problem, [x], s)), tol=1e-12, gradient=gradient, learn=["rho", "H"])
        weights = torch.linspace(-1, 1, N, dtype=torch.float64)
        rho = rule.rho
        total = (rule(xs) * weights).sum()
        got = torch.autograd.grad(total, [xs, rule.free["rho"], rule.free["H"]])
        slope = torch.autograd.grad(rho, rule.free["rho"])[0]

        def value(**changes):
            twin = Converged(rule.iteration, tol=1e-12, learn=[])
            for name, change in changes.items():
                twin.assign(name, rule.value(name).detach() + change)
            with torch.no_grad():
                return (twin(xs) * weights).sum().item()

        step = 1e-5
        numeric = (value(rho=step) - value(rho=-step)) / (2 * step)
        assert (got[1] / slope).item() == pytest.approx(numeric, rel=1e-4)
        direction = torch.randn(M, N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        numeric = (value(H=step * direction) - value(H=-step * direction)) / (2 * step)
        assert (got[2] * direction).sum().item() == pytest.approx(numeric, rel=1e-4)

    def test_implicit_and_unrolled_gradients_agree(self):
        problem, x, s = lasso()
        iteration, gradients = self.make(split(problem, [x], s)), []
        for gradient in ("implicit", "unroll"):
            xs = contexts(2).requires_grad_()
            rule = Converged(iteration, tol=1e-13, gradient=gradient, learn=["rho", "H"])
            total = (rule(xs) * torch.linspace(-1, 1, N, dtype=torch.float64)).sum()
            gradients.append(torch.autograd.grad(total, [xs, rule.free["rho"], rule.free["H"]]))
        for implicit, unrolled in zip(*gradients):
            torch.testing.assert_close(implicit, unrolled, rtol=1e-7, atol=1e-8)

    def test_implicit_gradient_of_hyperparameters_vanishes(self):
        problem, x, s = lasso()
        for name in self.hyper:
            with pytest.warns(HyperparameterWarning, match="Example 14"):
                rule = Converged(self.make(split(problem, [x], s)), tol=1e-12, learn=["rho", name])
            rule(contexts()).sum().backward()
            assert rule.free["rho"].grad.abs().item() > 1e-3
            assert rule.free[name].grad.abs().item() < 1e-8

    def test_converged_slots_stay_in_their_range(self):
        problem, x, s = lasso()
        iteration = self.make(split(problem, [x], s))
        bounds = iteration.limits(iteration.split.nominal())
        for name, bound in bounds.items():
            with pytest.warns(HyperparameterWarning):
                rule = Converged(iteration, learn=[name])
            with torch.no_grad():
                rule.free[name].fill_(3.0)
            assert 0 < rule.value(name).item() < float(bound)
            net = Unfolded(iteration, 2, learn=[name])
            with torch.no_grad():
                net.free[name].fill_(100.0)
            assert net.value(name).item() > float(bound)
