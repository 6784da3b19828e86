"""Circular convolutions are found, and ADMM divides by them in the Fourier domain."""

import cvxpy as cp
import numpy as np
import pytest
import scipy.linalg
import torch

import convexlearn as cl
from convexlearn.errors import CompileError
from convexlearn.iterations import admm
from convexlearn.iterations.circulant import gram_spectra, spectrum

H, W = 5, 6


def problem(circular=True, rho=0.05):
    rng = np.random.default_rng(0)
    C, B = scipy.linalg.circulant(rng.normal(size=H)), scipy.linalg.circulant(rng.normal(size=W))
    D, E = (np.roll(np.eye(n), 1, 1) - np.eye(n) for n in (H, W))
    if not circular:
        C[0, 0] += 1
    s, x = cp.Variable((H, W), name="s"), cp.Parameter((H, W), name="x")
    goal = 0.5 * cp.sum_squares(x - C @ s @ B) + rho * cp.norm1(D @ s) + rho * cp.sum(cp.abs(s @ E))
    return cp.Problem(cp.Minimize(goal)), x, s


def pictures(count=2):
    return torch.randn(count, H, W, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("penalty", [0.2, "two"])
def test_fourier_division_equals_the_dense_system(monkeypatch, penalty):
    parts = cl.split(*declared())
    penalty = torch.tensor([[0.2], [0.5]], dtype=torch.float64) if penalty == "two" else torch.tensor(penalty)
    iteration = cl.ADMM(parts)
    instance = iteration.bind(pictures())
    assert gram_spectra(instance, iteration.blocks(instance)) is not None
    state = iteration.start(instance)._replace(v=torch.randn(2, 2 * H * W, dtype=torch.float64))
    found = iteration.step(state, instance, {"penalty": penalty}).s
    monkeypatch.setattr(admm, "gram_spectra", lambda *_: None)
    torch.testing.assert_close(found, iteration.step(state, instance, {"penalty": penalty}).s, rtol=1e-9, atol=1e-8)


def declared(**options):
    whole, x, s = problem(**options)
    return whole, [x], s


def test_total_variation_deblurring_equals_cvxpy():
    whole, (x,), s = declared()
    found = cl.Converged(cl.ADMM(cl.split(whole, [x], s)), tol=1e-12, learn=[])(pictures())
    for picture, decision in zip(pictures(), found):
        x.value = picture.numpy()
        whole.solve(solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        np.testing.assert_allclose(decision.numpy(), s.value, atol=1e-6)


def test_eigenvalues_are_those_of_the_matrix():
    C = torch.tensor(scipy.linalg.circulant([1.0, -2.0, 0.5, 0.0, 3.0]))
    values = spectrum(lambda z: z @ (C.T @ C).T, (5,))
    assert values is not None
    torch.testing.assert_close(values.sort().values, torch.linalg.eigvalsh(C.T @ C))


def test_what_is_not_circular_keeps_the_dense_system():
    iteration = cl.ADMM(cl.split(*declared(circular=False)))
    instance = iteration.bind(pictures())
    assert gram_spectra(instance, iteration.blocks(instance)) is None
    assert spectrum(lambda z: z * torch.arange(4.0, dtype=torch.float64), (4,)) is None


def test_a_singular_circular_system_is_refused():
    s, x = cp.Variable(4, name="s"), cp.Parameter(4, name="x")
    D = np.roll(np.eye(4), 1, 1) - np.eye(4)  # nothing determines the mean
    parts = cl.split(cp.Problem(cp.Minimize(0.5 * cp.sum_squares(D @ s - x) + cp.norm1(D @ s))), [x], s)
    with pytest.raises(CompileError, match="do not determine all variables"):
        cl.Unfolded(cl.ADMM(parts), 1)(torch.ones(1, 4))


def test_large_pictures_need_no_dense_matrix():
    n = 80
    C = np.eye(n) + 0.5 * np.roll(np.eye(n), 1, 1)
    s, x = cp.Variable((n, n), name="s"), cp.Parameter((n, n), name="x")
    parts = cl.split(cp.Problem(cp.Minimize(0.5 * cp.sum_squares(C @ s @ C.T - x))), [x], s)
    assert parts.size > admm.LARGEST
    rule = cl.Unfolded(cl.ADMM(parts, penalty=0.1).replace(prox=torch.nn.Identity()), 60)
    truth = torch.rand(1, n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blurred = torch.tensor(C) @ truth @ torch.tensor(C).T
    torch.testing.assert_close(rule(blurred), truth, rtol=0, atol=1e-4)
