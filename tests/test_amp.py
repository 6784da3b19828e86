"""Approximate message passing."""

import math

import cvxpy as cp
import pytest
import torch

from convexlearn.errors import CompileError
from convexlearn.iterations.amp import AMP
from convexlearn.prox import soft_threshold
from convexlearn.rules.iterative import Unfolded
from convexlearn.splitting import split


def problem(m, n, generator):
    A = torch.randn(m, n, generator=generator, dtype=torch.float64) / math.sqrt(m)
    x, s = cp.Parameter(m, name="x"), cp.Variable(n, name="s")
    return A, split(cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - A.numpy() @ s) + cp.norm1(s))), [x], s)


def test_steps_and_learned_forms():
    generator = torch.Generator().manual_seed(0)
    A, parts = problem(6, 9, generator)
    x = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    z, r = torch.zeros(3, 9, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.float64)
    for _ in range(4):
        r = x - z @ A.mT + (z != 0).double().sum(1, keepdim=True) / 6 * r
        z = soft_threshold(z + r @ A, 1.4 * r.norm(dim=1, keepdim=True) / math.sqrt(6))
    for iteration, untie in ((AMP(parts), ["threshold"]), (AMP(parts).free("W1"), ["W1", "threshold"])):
        torch.testing.assert_close(Unfolded(iteration, 4, untie=untie)(x).detach(), z, rtol=0, atol=1e-12)


def test_sixteen_iterations_recover_sparse_vectors():
    generator = torch.Generator().manual_seed(0)
    A, parts = problem(250, 500, generator)
    chosen = torch.rand(50, 500, generator=generator) < 0.1
    s = torch.randn(50, 500, generator=generator, dtype=torch.float64) * chosen
    error = Unfolded(AMP(parts, threshold=1.15), 16)(s @ A.mT) - s
    assert 10 * math.log10(error.square().sum() / s.square().sum()) < -27


def test_other_problems_are_refused():
    x, s = cp.Parameter(3, name="x"), cp.Variable(3, name="s")
    with pytest.raises(CompileError, match=r"AMP is for .* only"):
        AMP(split(cp.Problem(cp.Minimize(cp.sum_squares(x - s) + cp.norm(s))), [x], s))
