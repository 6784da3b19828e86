"""Functions of singular values and eigenvalues, with derivatives that hold where values coincide."""

from typing import Any

import torch
from torch import Tensor

from convexlearn.errors import ShapeError
from convexlearn.inputs import as_tensor
from convexlearn.prox_arguments import as_signal

TINY = 1e-30


def shrink_singular_values(X: Tensor, t: Tensor, *, relative: bool = False) -> Tensor:
    """U (S - t)_+ V^H of X = U S V^H `(..., m, n)`, real or complex, with t >= 0 of shape `(...)`.

    The proximal map of t times the nuclear norm (Cai, Candes, Shen 2010). relative: t counts in units of the largest
    singular value. The derivative is that of a function of singular values (Lewis, Sendov 2005), so that
    repeated singular values do no harm.

    >>> shrink_singular_values(torch.diag(torch.tensor([3.0, 1.0])), torch.tensor(2.0)).round(decimals=4).abs()
    tensor([[1., 0.],
            [0., 0.]])
    """
    X, dtype = _matrices("shrink_singular_values", X)
    level = as_tensor("t", t, "shrink_singular_values").to(dtype=X.real.dtype, device=X.device)
    if level.ndim > X.ndim - 2 or any(a not in (1, b) for a, b in zip(level.shape[::-1], X.shape[:-2][::-1])):
        raise ShapeError(
            f"shrink_singular_values: t must broadcast to {tuple(X.shape[:-2])}, one number per matrix, got "
            f"{tuple(level.shape)}"
        )
    level = torch.where(level < 0, torch.nan, level).expand(X.shape[:-2])
    return _Shrink.apply(X, level, relative).to(dtype) if X.numel() else X.clone()  # pyright: ignore


def positive_part(X: Tensor) -> Tensor:
    """Projection of symmetric or Hermitian X `(..., n, n)` on the positive semidefinite cone (X is symmetrised).

    >>> positive_part(torch.diag(torch.tensor([1.0, -2.0]))).round(decimals=4).abs()
    tensor([[1., 0.],
            [0., 0.]])
    """
    X, dtype = _matrices("positive_part", X)
    if X.shape[-1] != X.shape[-2]:
        raise ShapeError(f"positive_part: X must be square matrices (..., n, n), got shape {tuple(X.shape)}")
    return _PositivePart.apply((X + X.mH) / 2).to(dtype) if X.numel() else X.clone()  # pyright: ignore


def nuclear_norm(X: Tensor) -> Tensor:
    """Sum of the singular values of X `(..., m, n)`, of shape `(...)`; NaN where X has an entry that is not finite.

    >>> nuclear_norm(torch.diag(torch.tensor([3.0, -1.0])))
    tensor(4.)
    """
    X, dtype = _matrices("nuclear_norm", X)
    bad = ~torch.isfinite(X.detach()).all(-1).all(-1)
    total = torch.linalg.svdvals(torch.where(bad[..., None, None], 0.0, X)).sum(-1)
    return torch.where(bad, torch.nan, total).to(dtype.to_real())


def _matrices(where: str, X: Any) -> tuple[Tensor, torch.dtype]:
    """Matrices in single precision at least, which decompositions need, and the dtype of the result."""
    X = as_signal(where, X)
    if X.ndim < 2:
        raise ShapeError(f"{where}: X must be matrices (..., m, n), got shape {tuple(X.shape)}")
    return (X.float() if X.dtype in (torch.float16, torch.bfloat16) else X), X.dtype


def _quotients(f: Tensor, s: Tensor, slope: Tensor, sign: int) -> Tensor:
    """(f_i + sign f_j) / (s_i + sign s_j), and the mean slope where the denominator vanishes."""
    rise, run = (a.unsqueeze(-1) + sign * a.unsqueeze(-2) for a in (f, s))
    scale = s.abs().amax(-1)[..., None, None].clamp(min=TINY)
    flat = run.abs() <= 1e-9 * scale
    mean = (slope.unsqueeze(-1) + slope.unsqueeze(-2)) / 2
    return torch.where(flat, mean, rise / torch.where(flat, torch.ones_like(run), run))


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, X: Tensor, t: Tensor, relative: bool) -> Tensor:
        bad = ~torch.isfinite(X).all(-1).all(-1)  # one such matrix would stop the whole batch
        U, s, Vh = _svd(torch.where(bad[..., None, None], 0.0, X))
        s = torch.where(bad[..., None], torch.nan, s)
        unit = s[..., :1] if relative else torch.ones_like(s[..., :1])
        f = (s - t.unsqueeze(-1) * unit).clamp(min=0)
        ctx.save_for_backward(U, s, Vh, f, t, unit)
        ctx.relative = relative
        return (U * f.unsqueeze(-2)) @ Vh

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        U, s, Vh, f, t, unit = ctx.saved_tensors
        (G,), V, slope = gradients, Vh.mH, (f > 0).to(s)
        UG, GV = U.mH @ G, G @ V
        M = UG @ V
        even, odd = (M + M.mH) / 2, (M - M.mH) / 2
        inner = _quotients(f, s, slope, -1) * even + _quotients(f, s, slope, 1) * odd
        level = -(slope * M.diagonal(dim1=-2, dim2=-1).real).sum(-1)  # of the threshold in absolute units
        if ctx.relative:  # which moves with the largest singular value
            inner[..., 0, 0] += t * level
        outer = torch.where(s > TINY, f / s.clamp(min=TINY), slope).unsqueeze(-2)
        left, right = (GV - U @ M) * outer, outer.mT * (UG - M @ Vh)
        return U @ (inner @ Vh + right) + left @ Vh, level * unit.squeeze(-1), None


def _svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, V^H; tall matrices in single precision through X^H X in double precision, at half the time.

    Columns of U for vanishing singular values are zero then, which the derivative takes for the space beyond U.
    """
    tall = X.shape[-2] >= 4 * X.shape[-1] and X.real.dtype == torch.float32
    if not tall:
        return torch.linalg.svd(X, full_matrices=False)
    exact = X.to(torch.complex128 if X.is_complex() else torch.float64)
    powers, V = torch.linalg.eigh(exact.mH @ exact)
    s, V = powers.clamp(min=0).sqrt().flip(-1), V.flip(-1)
    inverse = torch.where(s > 1e-7 * s[..., :1], 1 / s, torch.zeros_like(s))
    V = V.to(X.dtype)
    return (X @ V) * inverse.to(X.real.dtype).unsqueeze(-2), s.to(X.real.dtype), V.mH


class _PositivePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, X: Tensor) -> Tensor:
        bad = ~torch.isfinite(X).all(-1).all(-1)
        s, U = torch.linalg.eigh(torch.where(bad[..., None, None], 0.0, X))
        s = torch.where(bad[..., None], torch.nan, s)
        ctx.save_for_backward(s, U)
        return (U * s.clamp(min=0).unsqueeze(-2)) @ U.mH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        s, U = ctx.saved_tensors
        weights = _quotients(s.clamp(min=0), s, (s > 0).to(s), -1)
        return U @ (weights * (U.mH @ gradients[0] @ U)) @ U.mH
