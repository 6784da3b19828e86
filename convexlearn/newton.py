"""Newton's method for smooth functions of few variables, one for each sample, and the gradient of its minimum."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from convexlearn.checks import FUNCTION, count, number, require_that
from convexlearn.errors import DomainError, ShapeError
from convexlearn.inputs import as_floating

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
    _check_options(tol, max_iterations)
    start, data = _read("minimize", function, "start", start, data)
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
    z, data = _read("derivatives", function, "z", z, data)
    size = max(1, BLOCK // max(1, z.shape[1]))
    blocks = [_derivatives(function, *parts) for parts in zip(*(part.split(size) for part in (z, *data)))]
    gradients, hessians = zip(*blocks)
    return torch.cat(gradients), torch.cat(hessians)


def attach_implicit_gradient(function: Function, point: Tensor, data: tuple[Tensor, ...] = ()) -> Tensor:
    """Stationary points `(N, k)` with their gradient to `data` and what `function` holds: -hessian^-1 d(gradient).

    By the implicit function theorem, for first derivatives. Where the Hessian is singular the gradient is zero.
    """
    point, data = _read("attach_implicit_gradient", function, "point", point, data)
    at, size = point.detach(), max(1, BLOCK // max(1, point.shape[1]))
    with torch.no_grad():
        hessian = derivatives(function, at, data)[1]
        inverse, info = torch.linalg.inv_ex(hessian)
        inverse[(info != 0) | ~torch.isfinite(inverse).all(-1).all(-1)] = 0.0
    parts = zip(*(part.split(size) for part in (at, *data)))
    gradient = torch.cat([_gradient(function, rest)(block) for block, *rest in parts])
    step = (inverse @ gradient.unsqueeze(-1)).squeeze(-1)
    return at - (step - step.detach())


def _check_options(tol: float, max_iterations: int) -> None:
    require_that("minimize", "tol", number(above=0), tol)
    require_that("minimize", "max_iterations", count(), max_iterations)


def _read(
    where: str, function: Function, name: str, z: Tensor, data: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Points `(N, k)` and data `(N, ...)` that fit each other."""
    require_that(where, "function", FUNCTION, function)
    z = as_floating(name, z, f"{where}: argument")
    if z.ndim != 2 or z.shape[1] == 0:
        raise ShapeError(f"{where}: {name} must have shape (N, k) with k > 0, got {tuple(z.shape)}")
    if z.dtype in (torch.float16, torch.bfloat16):
        raise DomainError(f"{where}: {name} is {z.dtype}, too coarse for second derivatives; pass float32 or float64")
    if not isinstance(data, tuple | list):
        raise ShapeError(f"{where}: data must be a tuple of tensors (N, ...), got {type(data).__name__}")
    for k, part in enumerate(data):
        if not isinstance(part, Tensor) or part.ndim == 0 or len(part) != len(z):
            got = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ShapeError(f"{where}: data[{k}] must be a tensor ({len(z)}, ...), got {got}")
    return z, tuple(data)


def _values(function: Function, z: Tensor, data: Sequence[Tensor]) -> Tensor:
    """function(z, *data), one number per point."""
    found = function(z, *data)
    if not isinstance(found, Tensor) or found.shape != z.shape[:1]:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ShapeError(f"function must return one number per point, shape ({len(z)},), got {got}")
    return found


def _gradient(function: Function, data: list[Tensor] | tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
    return torch.func.grad(lambda z: _values(function, z, data).sum())


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
