import copy
from itertools import pairwise

import cvxpy as cp
import pytest
import torch

from convexlearn.errors import OptionError
from convexlearn.objectives import squared_error
from convexlearn.optimizers import ProximalGradient, ProximalTerm
from convexlearn.rules.affine import AffineRule
from convexlearn.simulate.pairs import Pairs
from convexlearn.tune import tune

SOFT = ProximalTerm(lambda v: 0.3 * v.abs().sum(), lambda v, t: v.sign() * (v.abs() - 0.3 * t).clamp(min=0))
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
S = X[:, :1] - 0.5 * X[:, 1:2] + 0.1 * X[:, 2:3].sin()


def test_tune_with_a_penalty_equals_the_lasso_of_cvxpy():
    rule = AffineRule(torch.zeros(1, 6, dtype=torch.float64))
    history = tune(
        rule, Pairs(X, S), squared_error, steps=400, clip=None, progress=False, learning_rate=0.1,
        optimizer=lambda groups: ProximalGradient(groups, terms={rule.free["W"]: SOFT}),
    )  # fmt: skip
    W = cp.Variable((1, 6))
    loss = cp.sum_squares(S.numpy() - X.numpy() @ W.T) / 40 + 0.3 * cp.norm1(W)
    cp.Problem(cp.Minimize(loss)).solve(solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12)
    torch.testing.assert_close(rule.W.detach(), torch.tensor(W.value), rtol=0, atol=1e-6)
    assert (rule.W == 0).sum() >= 3
    assert not history.stopped


def test_loss_and_penalty_never_increase_and_steps_adapt():
    p = torch.nn.Parameter(torch.full((6,), 2.0, dtype=torch.float64))
    optimizer, values, scales = ProximalGradient([p], lr=100.0, terms={p: SOFT}), [], []

    def closure():
        optimizer.zero_grad()
        loss = (X @ p - S[:, 0]).square().mean()
        loss.backward()
        return loss

    for _ in range(60):
        optimizer.step(closure)
        values.append(closure().item() + optimizer.penalty())
        scales.append(optimizer.param_groups[0]["scale"])
    assert all(b <= a for a, b in pairwise(values))
    assert scales[0] == 0.5
    ratios = {round(b / a, 12) for a, b in pairwise(scales)}
    assert ratios == {0.5, 1.5}


def test_a_loss_that_is_not_finite_is_refused():
    rule = AffineRule(torch.ones(1, 6, dtype=torch.float64))

    def objective(trajectory):
        error = trajectory.decision.abs().amax(1)
        return squared_error(trajectory) + torch.where(error > 50, torch.nan, 0.0)

    history = tune(
        rule, Pairs(X, S), objective, steps=60, clip=None, progress=False, learning_rate=1e3,
        optimizer=ProximalGradient,
    )  # fmt: skip
    assert not history.stopped
    assert history[-1]["loss"] < 0.01


def test_a_checkpoint_continues_with_the_adapted_step(tmp_path):
    def run(rule, steps, path=None):
        tune(rule, Pairs(X, S), squared_error, steps=steps, clip=None, progress=False, checkpoint=path,
             optimizer=ProximalGradient, learning_rate=3.0)  # fmt: skip
        return rule

    start = AffineRule(torch.zeros(1, 6, dtype=torch.float64))
    whole, halves = copy.deepcopy(start), copy.deepcopy(start)
    run(whole, 10)
    run(halves, 5, tmp_path / "a.pt")
    run(halves, 10, tmp_path / "a.pt")
    assert torch.equal(whole.W, halves.W)


def test_mistakes_are_named():
    p, other = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    with pytest.raises(OptionError, match="lr must be a number above 0"):
        ProximalGradient([p], lr=0.0)
    with pytest.raises(OptionError, match="not optimized"):
        ProximalGradient([p], terms={other: SOFT})
