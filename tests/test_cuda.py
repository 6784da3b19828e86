"""The same numbers on a GPU as on the CPU: dense solver, iterations, filters, sum-product; skipped without one."""

import copy

import cvxpy as cp
import numpy as np
import pytest
import torch

import convexlearn as cl

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def lasso():
    s, x = cp.Variable(6, name="s"), cp.Parameter(4, name="x")
    H = cp.Parameter((4, 6), name="H", value=np.random.default_rng(0).normal(size=(4, 6)))
    rho = cp.Parameter(nonneg=True, name="rho", value=0.1)
    goal = 0.5 * cp.sum_squares(x - H @ s) + rho * cp.norm1(s) + 0.1 * cp.sum_squares(s)
    return cp.Problem(cp.Minimize(goal)), x, s


def cases():
    """Rules with a context."""
    problem, x, s = lasso()
    split, eye = cl.split(problem, [x], s), torch.eye(2, dtype=torch.float64)
    yield "dense", cl.ConvexRule(problem, [x], s, learn=["rho"], solver="dense"), draw(7, 4)
    yield "ISTA", cl.Unfolded(cl.ISTA(split), 5, untie=["step", "threshold"]), draw(7, 4)
    yield "LISTA", cl.Unfolded(cl.ISTA(split).free("W1", "W2"), 5, untie=["W1", "W2", "threshold"]), draw(7, 4)
    yield "FISTA", cl.Converged(cl.FISTA(split), learn=["rho"]), draw(7, 4)
    yield "ADMM", cl.Converged(cl.ADMM(split), learn=["rho"]), draw(7, 4)
    yield "Kalman", cl.KalmanFilter(0.9 * eye, eye, eye, 0.1 * eye, eye), draw(7, 9, 2)
    yield "smoother", cl.KalmanSmoother(0.9 * eye, eye, 0.1 * eye, eye), draw(7, 9, 2)
    yield "LQG", cl.LQG(0.9 * eye, eye, eye, eye, eye, eye, eye), draw(7, 9, 2)
    factor = cl.ChannelFactor(torch.tensor([1.0, 0.5], dtype=torch.float64), 0.3)
    yield "sum-product", cl.SumProduct(factor), draw(7, 20)
    yield "affine", cl.AffineRule(draw(3, 4)), draw(7, 4)
    yield "tree", cl.TreeRule(draw(4, 2), 4, depth=2), draw(7, 4)


CASES = list(cases()) if torch.cuda.is_available() else []


@pytest.mark.parametrize(("name", "rule", "x"), CASES, ids=[name for name, _, _ in CASES])
def test_decisions_and_gradients_agree(name, rule, x):
    other = copy.deepcopy(rule).cuda()
    s, t = rule(x), other(x.cuda())
    assert t.is_cuda
    torch.testing.assert_close(t.cpu(), s, rtol=1e-8, atol=1e-8)
    weights = draw(*s.shape)
    for decision, w in ((s, weights), (t, weights.cuda())):
        (decision * w).sum().backward()
    for (key, p), (_, q) in zip(rule.named_parameters(), other.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        if p.grad is not None:
            assert q.grad.is_cuda
            torch.testing.assert_close(q.grad.cpu(), p.grad, rtol=1e-6, atol=1e-8)


def test_tuning_and_saving_on_the_device(tmp_path):
    problem, x, s = lasso()
    rule = cl.ConvexRule(problem, [x], s, learn=["rho"], solver="dense").cuda()
    pairs = cl.simulate.Pairs(draw(16, 4).cuda(), torch.zeros(16, 6, dtype=torch.float64, device="cuda"))
    history = cl.tune(rule, pairs, cl.objectives.squared_error, steps=5, learning_rate=0.1, progress=False)
    assert history[-1]["loss"] < history[0]["loss"]
    cl.save(rule, tmp_path / "rule")
    again = cl.load(tmp_path / "rule", device="cuda")
    torch.testing.assert_close(again(pairs.x), rule(pairs.x), rtol=1e-12, atol=1e-12)
