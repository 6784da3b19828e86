"""Symmetric positive definite block tridiagonal systems: one factorization for the solution and its gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from convexlearn.errors import DomainError, ShapeError
from convexlearn.inputs import as_floating


class Factor(NamedTuple):
    """Block Cholesky factor L: T diagonal blocks `(B, n, n)`, lower triangular, and T - 1 blocks below them."""

    diagonal: list[Tensor]
    below: list[Tensor]


def factorize(diagonal: Tensor, below: Tensor) -> Factor:
    """Factor of H with blocks H_tt = diagonal `(B, T, n, n)` and H_{t+1,t} = below `(B, T - 1, n, n)`."""
    diagonal, below = _read(diagonal, below)
    pivots, factor, under = diagonal.unbind(1), [], []
    for t, pivot in enumerate(pivots):
        if t:
            M = torch.linalg.solve_triangular(factor[-1], below[:, t - 1].mT, upper=False).mT
            under.append(M)
            pivot = pivot - M @ M.mT
        L, info = torch.linalg.cholesky_ex(pivot)
        if bool((info > 0).any()):
            i = int(torch.nonzero(info)[0])
            raise DomainError(
                f"the block tridiagonal matrix of batch element {i} is not positive definite at block {t}: "
                "nothing determines that part of the solution; add a prior, or more observations"
            )
        factor.append(L)
    return Factor(factor, under)


def solve(diagonal: Tensor, below: Tensor, right: Tensor, factor: Factor | None = None) -> Tensor:
    """z `(B, T, n)` with H z = right `(B, T, n)`; H as in `factorize`, with batch B or 1.

    The gradient is one more solve with the same factor, and differentiable again.

    >>> one = torch.ones(1, 2, 1, 1)
    >>> solve(2 * one, -one[:, :1], torch.ones(1, 2, 1)).flatten().round(decimals=5)
    tensor([1., 1.])
    """
    diagonal, below = _read(diagonal, below)
    right = as_floating("right", right, "block tridiagonal system:").to(diagonal.dtype)
    if right.ndim != 3 or right.shape[1:] != diagonal.shape[1:3] or len(diagonal) not in (1, len(right)):
        B, T, n, _ = diagonal.shape
        raise ShapeError(f"block tridiagonal system: right must have shape ({B}, {T}, {n}), got {tuple(right.shape)}")
    if factor is None:
        with torch.no_grad():
            factor = factorize(diagonal.detach(), below.detach())
    return _Solve.apply(diagonal, below, right, factor)  # pyright: ignore[reportReturnType]


def _read(diagonal: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks that fit each other, in one dtype."""
    diagonal, below = (as_floating(k, v, "blocks") for k, v in (("diagonal", diagonal), ("below", below)))
    dtype = torch.promote_types(diagonal.dtype, below.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    if diagonal.ndim != 4 or diagonal.shape[2] != diagonal.shape[3] or 0 in diagonal.shape[1:]:
        raise ShapeError(f"blocks 'diagonal' must have shape (B, T, n, n), got {tuple(diagonal.shape)}")
    B, T, n, _ = diagonal.shape
    if tuple(below.shape) != (B, T - 1, n, n):
        raise ShapeError(f"blocks 'below' must have shape {(B, T - 1, n, n)}, got {tuple(below.shape)}")
    return diagonal.to(dtype), below.to(dtype)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, diagonal: Tensor, below: Tensor, right: Tensor, factor: Factor) -> Tensor:
        z = _substitute(factor, right)
        ctx.save_for_backward(diagonal, below, z)
        ctx.factor = factor
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        diagonal, below, z = ctx.saved_tensors
        y = solve(diagonal, below, gradients[0], ctx.factor)
        outer = y[..., :, None] * z[..., None, :]
        first = y[:, 1:, :, None] * z[:, :-1, None, :]
        second = z[:, 1:, :, None] * y[:, :-1, None, :]
        shared = len(diagonal) == 1 and len(z) > 1
        parts = [-(outer + outer.mT) / 2, -(first + second)]
        return *(part.sum(0, keepdim=True) if shared else part for part in parts), y, None


def _substitute(factor: Factor, right: Tensor) -> Tensor:
    """Forward, then back substitution."""
    steps = [part[..., None] for part in right.unbind(1)]
    for t, L in enumerate(factor.diagonal):
        if t:
            steps[t] = steps[t] - factor.below[t - 1] @ steps[t - 1]
        steps[t] = _triangular(L, steps[t], upper=False)
    for t in range(len(steps) - 1, -1, -1):
        if t + 1 < len(steps):
            steps[t] = steps[t] - factor.below[t].mT @ steps[t + 1]
        steps[t] = _triangular(factor.diagonal[t].mT, steps[t], upper=True)
    return torch.stack(steps, 1)[..., 0]


def _triangular(L: Tensor, right: Tensor, *, upper: bool) -> Tensor:
    return torch.linalg.solve_triangular(L, right, upper=upper)
