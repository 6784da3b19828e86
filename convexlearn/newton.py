"""Newton's method for smooth functions of few variables, one for each sample, and the gradient of its minimum."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Function = Callable[..., Tensor]
"""f(z, *data): points z `(N, k)` and data `(N, ...)` to values `(N,)`, the samples independent of each other."""

BLOCK = 2**14
"""Largest number of samples times variables whose Hessians are computed at once, which bounds the memory."""

TRIES = 40
"""How often the damping is raised in one step before a sample is given up."""


class Minimum(NamedTuple):
    """Where the method ended: points `(N, k)`, and for each sample `(N,)` value, success, steps, last relative step."""

    point: Tensor
    value: Tensor
    converged: Tensor
    iterations: Tensor
    residual: Tensor


class _Step(NamedTuple):
    damping: Tensor
    accepted: Tensor
    length: Tensor


def minimize(
    function: Function,
    start: Tensor,
    data: tuple[Tensor, ...] = (),
    *,
    tol: float = 1e-9,
    max_iterations: int = 200,
    closed_form: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> Minimum:
    """A local minimum near `start` `(N, k)` for each sample: Newton's method, damped as by Levenberg and Marquardt.

    A sample has converged once an undamped step, at a positive definite Hessian, is no longer than tol max(1, |z|);
    tol is at least 100 roundings. The damping is raised until the Hessian is positive definite and the value falls
    (Armijo). Under autograd the steps are differentiable in `start`, `data` and what `function` holds, the dampings
    being piecewise constant.

    >>> minimize(lambda z: (z**4 / 4 - z).sum(1), torch.tensor([[3.0]], dtype=torch.float64)).point
    tensor([[1.]], dtype=torch.float64)
    """
    z, tol = start, max(tol, 100 * torch.finfo(start.dtype).eps)
    damping, residual = z.new_zeros(len(z)), z.new_full((len(z),), torch.inf)
    count = torch.zeros(len(z), dtype=torch.long, device=z.device)
    converged = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    active = torch.arange(len(z), device=z.device)
    for _ in range(max_iterations):
        if len(active) == 0:
            break
        here, known = z[active], tuple(part[active] for part in data)
        gradient, hessian = closed_form(here, *known) if closed_form else derivatives(function, here, known)
        with torch.no_grad():
            step = _damped(function, here, known, (gradient, hessian, damping[active], tol))
        moved = here[step.accepted] - _solve(
            hessian[step.accepted], gradient[step.accepted], step.damping[step.accepted]
        )
        arrived = step.accepted & (step.damping == 0) & (step.length <= tol)
        z = z.index_copy(0, active[step.accepted], moved)
        count[active] += 1
        residual[active] = step.length
        converged[active] = arrived
        damping[active] = torch.where(step.damping <= 4 * _least(hessian.detach()), 0.0, step.damping / 4)
        active = active[step.accepted & ~arrived]
    return Minimum(z, function(z, *data), converged, count, residual)


def derivatives(function: Function, z: Tensor, data: tuple[Tensor, ...] = ()) -> tuple[Tensor, Tensor]:
    """Gradients `(N, k)` and Hessians `(N, k, k)`, differentiable themselves."""
    size = max(1, BLOCK // max(1, z.shape[1]))
    blocks = [_derivatives(function, *parts) for parts in zip(*(part.split(size) for part in (z, *data)))]
    gradients, hessians = zip(*blocks)
    return torch.cat(gradients), torch.cat(hessians)


def attach_implicit_gradient(function: Function, point: Tensor, data: tuple[Tensor, ...] = ()) -> Tensor:
    """Stationary points `(N, k)` with their gradient to `data` and what `function` holds: -hessian^-1 d(gradient).

    By the implicit function theorem, for first derivatives. Where the Hessian is singular the gradient is zero.
    """
    at, size = point.detach(), max(1, BLOCK // max(1, point.shape[1]))
    with torch.no_grad():
        hessian = derivatives(function, at, data)[1]
        inverse, info = torch.linalg.inv_ex(hessian)
        inverse[(info != 0) | ~torch.isfinite(inverse).all(-1).all(-1)] = 0.0
    parts = zip(*(part.split(size) for part in (at, *data)))
    gradient = torch.cat([_gradient(function, rest)(block) for block, *rest in parts])
    step = (inverse @ gradient.unsqueeze(-1)).squeeze(-1)
    return at - (step - step.detach())


def _gradient(function: Function, data: list[Tensor] | tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
    return torch.func.grad(lambda z: function(z, *data).sum())


def _derivatives(function: Function, z: Tensor, *data: Tensor) -> tuple[Tensor, Tensor]:
    first, pull = torch.func.vjp(_gradient(function, data), z)  # pyright: ignore[reportAssignmentType]
    basis = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    rows = torch.func.vmap(lambda direction: pull(direction.expand_as(z))[0], out_dims=1)(basis)
    return first, (rows + rows.mT) / 2


def _damped(
    function: Function, z: Tensor, data: tuple[Tensor, ...], local: tuple[Tensor, Tensor, Tensor, float]
) -> _Step:
    """The least damping tried at which each sample may step."""
    gradient, hessian, damping, tol = local
    value, least = function(z, *data), _least(hessian)
    slack = 100 * torch.finfo(z.dtype).eps * value.abs()
    accepted, length = torch.zeros_like(value, dtype=torch.bool), torch.full_like(value, torch.inf)
    for _ in range(TRIES):
        shifted = hessian + torch.diag_embed(damping[:, None].expand_as(z))
        factor, info = torch.linalg.cholesky_ex(shifted)
        definite = info == 0
        factor = torch.where(definite[:, None, None], factor, torch.eye(z.shape[1], dtype=z.dtype, device=z.device))
        step = -torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
        length = step.norm(dim=1) / z.norm(dim=1).clamp(min=1)
        falls = function(z + step, *data) <= value + 1e-4 * (gradient * step).sum(1) + slack
        accepted = definite & (falls | ((damping == 0) & (length <= tol)))
        if bool(accepted.all()):
            break
        damping = torch.where(accepted, damping, torch.maximum(4 * damping, least))
    return _Step(damping, accepted, length)


def _solve(hessian: Tensor, gradient: Tensor, damping: Tensor) -> Tensor:
    shifted = hessian + torch.diag_embed(damping[:, None].expand_as(gradient))
    return torch.cholesky_solve(gradient.unsqueeze(-1), torch.linalg.cholesky(shifted)).squeeze(-1)


def _least(hessian: Tensor) -> Tensor:
    """The least damping above zero `(N,)`: near a thousandth of the curvature, but a power of four, hence constant."""
    size = 1e-3 * hessian.diagonal(dim1=-2, dim2=-1).abs().mean(-1)
    return 4.0 ** (size.clamp(min=torch.finfo(hessian.dtype).tiny).log2() / 2).round()
