"""Functions of singular values and eigenvalues, with derivatives that hold where values coincide."""

from typing import Any

import torch
from torch import Tensor

TINY = 1e-30


def shrink_singular_values(X: Tensor, t: Tensor) -> Tensor:
    """U (S - t)_+ V^H of X = U S V^H `(..., m, n)`, real or complex, with t >= 0 of shape `(...)`.

    The proximal map of t times the nuclear norm (Cai, Candes, Shen 2010). Its derivative is that of a
    function of singular values (Lewis, Sendov 2005), so that repeated singular values do no harm.

    >>> shrink_singular_values(torch.diag(torch.tensor([3.0, 1.0])), torch.tensor(2.0)).round(decimals=4).abs()
    tensor([[1., 0.],
            [0., 0.]])
    """
    return _Shrink.apply(X, torch.as_tensor(t, dtype=X.real.dtype, device=X.device).expand(X.shape[:-2]))  # pyright: ignore


def positive_part(X: Tensor) -> Tensor:
    """Projection of symmetric or Hermitian X `(..., n, n)` on the positive semidefinite cone (X is symmetrised).

    >>> positive_part(torch.diag(torch.tensor([1.0, -2.0]))).round(decimals=4).abs()
    tensor([[1., 0.],
            [0., 0.]])
    """
    return _PositivePart.apply((X + X.mH) / 2)  # pyright: ignore


def _quotients(f: Tensor, s: Tensor, slope: Tensor, sign: int) -> Tensor:
    """(f_i + sign f_j) / (s_i + sign s_j), and the mean slope where the denominator vanishes."""
    rise, run = (a.unsqueeze(-1) + sign * a.unsqueeze(-2) for a in (f, s))
    scale = s.abs().amax(-1)[..., None, None].clamp(min=TINY)
    flat = run.abs() <= 1e-9 * scale
    mean = (slope.unsqueeze(-1) + slope.unsqueeze(-2)) / 2
    return torch.where(flat, mean, rise / torch.where(flat, torch.ones_like(run), run))


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, X: Tensor, t: Tensor) -> Tensor:
        U, s, Vh = torch.linalg.svd(X, full_matrices=False)
        f = (s - t.unsqueeze(-1)).clamp(min=0)
        ctx.save_for_backward(U, s, Vh, f)
        return (U * f.unsqueeze(-2)) @ Vh

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        U, s, Vh, f = ctx.saved_tensors
        (G,), V, slope = gradients, Vh.mH, (f > 0).to(s)
        M = U.mH @ G @ V
        even, odd = (M + M.mH) / 2, (M - M.mH) / 2
        inner = _quotients(f, s, slope, -1) * even + _quotients(f, s, slope, 1) * odd
        outer = torch.where(s > TINY, f / s.clamp(min=TINY), slope).unsqueeze(-2)
        left, right = (G @ V - U @ M) * outer, outer.mT * (U.mH @ G - M @ Vh)
        kept = (U * slope.unsqueeze(-2)) @ Vh
        return U @ inner @ Vh + left @ Vh + U @ right, -(kept.conj() * G).real.sum((-1, -2))


class _PositivePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, X: Tensor) -> Tensor:
        s, U = torch.linalg.eigh(X)
        ctx.save_for_backward(s, U)
        return (U * s.clamp(min=0).unsqueeze(-2)) @ U.mH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        s, U = ctx.saved_tensors
        weights = _quotients(s.clamp(min=0), s, (s > 0).to(s), -1)
        return U @ (weights * (U.mH @ gradients[0] @ U)) @ U.mH
