"""Exact decisions of the conic workloads, without any layer: Newton to rounding, then one step under autograd.

A Newton step from the solution with a constant Jacobian has the solution as its value and the implicit
derivative as its derivative.
"""

import clarabel
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

STEPS = 60
ROUNDING = 1e-13


def maximum_entropy(c: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """x (B, n) of min c'x + sum x log x, Ax = b: x = exp(-1 - c - A'y), Newton with halving on the dual y (B, m)."""

    def primal(y: Tensor, c: Tensor, A: Tensor) -> Tensor:
        return torch.exp(-1 - c - y @ A)

    def dual(y: Tensor) -> Tensor:
        return primal(y, c, A).sum(1) + (b * y).sum(1)

    with torch.no_grad():
        y = torch.zeros_like(b)
        for _ in range(STEPS):
            x = primal(y, c, A)
            step = torch.linalg.solve((A * x[:, None]) @ A.T, x @ A.T - b)
            size = torch.ones(len(b), 1, dtype=b.dtype)
            for _ in range(20):
                worse = dual(y + size * step) > dual(y) + 1e-14
                size = torch.where(worse[:, None], 0.5 * size, size)
            y = y + size * step
        x = primal(y, c, A)
        H = (A * x[:, None]) @ A.T
        assert float((x @ A.T - b).abs().max()) < 1e-12
    y = y + torch.linalg.solve(H, primal(y, c, A) @ A.T - b)
    return primal(y, c, A)


def nearest_correlation(C: Tensor) -> Tensor:
    """X (B, n, n) of min 1/2 |X - C|^2, X PSD with unit diagonal: Newton on the diagonal's dual (Qi and Sun, 2006)."""
    C = 0.5 * (C + C.mT)

    def matrix(y: Tensor, C: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(C + torch.diag_embed(y))
        return (vectors * values.clamp(min=0)[..., None, :]) @ vectors.mT

    def mismatch(y: Tensor, C: Tensor) -> Tensor:
        return matrix(y, C).diagonal(dim1=-2, dim2=-1) - 1

    rows = []
    for sample in C:
        fixed = sample.detach()
        y, size = 1 - fixed.diagonal().clone(), np.inf
        for _ in range(STEPS):
            J = torch.autograd.functional.jacobian(lambda v, C=fixed: mismatch(v, C), y)
            step, length = torch.linalg.lstsq(J, -mismatch(y, fixed)[:, None])[0][:, 0], 1.0
            while length > 1e-3 and float(mismatch(y + length * step, fixed).norm()) > size:
                length *= 0.5
            y, size = y + length * step, float(mismatch(y + length * step, fixed).norm())
            if size < ROUNDING:
                break
        assert size < 1e-12
        J = torch.autograd.functional.jacobian(lambda v, C=fixed: mismatch(v, C), y)
        rows.append(matrix(y - torch.linalg.solve(J, mismatch(y, sample)), sample))
    return torch.stack(rows)


def markowitz(mu: Tensor, F: Tensor, sigma: Tensor, leverage: float) -> Tensor:
    """w (B, n) of max mu'w, |Fw| <= sigma, 1'w = 1, |w|_1 <= leverage; positions and active limits from Clarabel."""
    return torch.stack([_portfolio(m, F, sigma, leverage) for m in mu])


def _portfolio(mu: Tensor, F: Tensor, sigma: Tensor, leverage: float) -> Tensor:
    w, risk_dual, leverage_dual = _clarabel(mu, F, sigma, leverage)
    held = np.flatnonzero(np.abs(w) > 1e-6)
    sign = torch.tensor(np.sign(w[held]))
    limited = bool(leverage_dual > 1e-6)
    assert risk_dual > 1e-6
    assert limited or np.abs(w).sum() < leverage - 1e-6
    k, G = len(held), F[:, held]

    def conditions(u: Tensor, mu: Tensor, G: Tensor, sigma: Tensor) -> Tensor:
        w, risk, budget, limit = u[:k], u[k], u[k + 1], u[k + 2]
        stationarity = -mu + risk * (G.T @ (G @ w)) + budget + limit * sign
        last = (sign * w).sum() - leverage if limited else limit
        rest = [0.5 * ((G @ w).square().sum() - sigma**2), w.sum() - 1, last]
        return torch.cat([stationarity, torch.stack(rest)])

    fixed = [v.detach() for v in (mu[held], G, sigma)]
    u = torch.tensor([*w[held], risk_dual / float(sigma.detach()), 0.0, leverage_dual])
    u[k + 1] = (fixed[0] - u[k] * (fixed[1].T @ (fixed[1] @ u[:k])) - u[k + 2] * sign).mean()
    for _ in range(8):
        J = torch.autograd.functional.jacobian(lambda v: conditions(v, *fixed), u)
        u = u - torch.linalg.solve(J, conditions(u, *fixed))
    assert float(conditions(u, *fixed).abs().max()) < 1e-12
    J = torch.autograd.functional.jacobian(lambda v: conditions(v, *fixed), u)
    u = u - torch.linalg.solve(J, conditions(u, mu[held], G, sigma))
    return torch.zeros(len(mu), dtype=mu.dtype).index_add(0, torch.as_tensor(held), u[:k])


def _clarabel(mu: Tensor, F: Tensor, sigma: Tensor, leverage: float) -> tuple[np.ndarray, float, float]:
    """w, and the duals of the risk and of the leverage, at 1e-10."""
    n = len(mu)
    eye, zero, one = np.eye(n), np.zeros((n, n)), np.ones((1, n))
    bounds = np.block([[eye, -eye], [-eye, -eye], [0 * one, one]])
    cone = np.block([[0 * one, 0 * one], [-F.detach().numpy(), zero]])
    A = np.block([[one, 0 * one], [bounds], [cone]])
    b = np.concatenate([[1.0], np.zeros(2 * n), [leverage, float(sigma.detach())], np.zeros(n)])
    cones = [clarabel.ZeroConeT(1), clarabel.NonnegativeConeT(2 * n + 1), clarabel.SecondOrderConeT(n + 1)]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    q = np.concatenate([-mu.detach().numpy(), np.zeros(n)])
    empty = sp.csc_matrix((2 * n, 2 * n))
    found = clarabel.DefaultSolver(empty, q, sp.csc_matrix(A), b, cones, settings).solve()
    return np.array(found.x)[:n], float(found.z[2 * n + 2]), float(found.z[2 * n + 1])
