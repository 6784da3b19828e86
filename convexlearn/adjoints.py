"""Runs of an iteration to convergence, and their gradients: implicit at the fixed point, or unrolled."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convexlearn.iterations.base import Iteration, Layer
from convexlearn.split_instance import Instance


class Run(NamedTuple):
    """Where a run ended: state, and per sample the steps taken and the last relative change `(B,)`."""

    state: Any
    iterations: Tensor
    residual: Tensor


def converge(iteration: Iteration, layer: Layer, state: Any, *, tol: float, max_iterations: int) -> Run:
    """Step until |core+ - core| <= tol max(1, |core+|) for each sample, which then stays as it is."""
    batch = len(iteration.decision(state))
    device = iteration.decision(state).device
    active = torch.ones(batch, dtype=torch.bool, device=device)
    count = torch.zeros(batch, dtype=torch.long, device=device)
    residual = iteration.decision(state).real.new_full((batch,), torch.inf)
    for _ in range(max_iterations):
        if not bool(active.any()):
            break
        new = layer(state)
        before, after = iteration.core(state), iteration.core(new)
        change = _norm((after - before).detach()) / _norm(after.detach()).clamp(min=1)
        state = _where(active, new, state)
        residual = torch.where(active, change, residual)
        count = count + active
        active = active & (change > tol)  # NaN ends a run too
    return Run(state, count, residual)


def attach_implicit_gradient(
    iteration: Iteration, live: tuple[Instance, Layer], still: Layer, core: Tensor, tol: float
) -> Tensor:
    """The converged core `(B, N)` with the gradient of the implicit function theorem at core = layer(core).

    live: instance and layer that depend on the parameters; still: the same step with parameters detached. A
    backward pass solves (I - J') w = gradient by GMRES for each sample and passes w through one step.
    """
    instance, layer = live
    point = iteration.core(layer(iteration.resume(core.detach(), instance)))
    if not point.requires_grad:
        return point

    def solve(gradient: Tensor) -> Tensor:
        with torch.enable_grad():
            at = core.detach().requires_grad_()
            image = iteration.core(still(iteration.resume(at, instance)))

        def adjoint(w: Tensor) -> Tensor:
            pulled = torch.autograd.grad(image, at, w, retain_graph=True, allow_unused=True)[0]
            return w if pulled is None else w - pulled

        return gmres(adjoint, gradient, tol=tol)

    point.register_hook(solve)
    return point


def gmres(operator: Callable[[Tensor], Tensor], b: Tensor, *, tol: float = 1e-12, cycles: int = 20) -> Tensor:
    """Solve operator(x) = b `(B, N)` for each sample by restarted GMRES (Saad, Schultz 1986); linear over the reals.

    >>> A = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    >>> gmres(lambda x: x @ A.T, torch.ones(1, 2, dtype=torch.float64)).round(decimals=6)
    tensor([[0.3333, 0.3333]], dtype=torch.float64)
    """
    if b.is_complex():
        real = gmres(lambda x: torch.view_as_real(operator(_complex(x))).flatten(1), torch.view_as_real(b).flatten(1))
        return _complex(real)
    x, r, goal = torch.zeros_like(b), b, tol * _norm(b)
    for _ in range(cycles):
        if bool((_norm(r) <= goal).all()):
            break
        x = x + _cycle(operator, r, min(b.shape[1], 60), goal)
        r = b - operator(x)
    return x


def _cycle(operator: Callable[[Tensor], Tensor], r: Tensor, size: int, goal: Tensor) -> Tensor:
    """The correction in the Krylov space of r, all samples in step."""
    beta = _norm(r)
    basis = [r / beta.clamp(min=1e-300)[:, None]]
    H = r.new_zeros(len(r), size + 1, size)
    for k in range(size):
        w = operator(basis[k])
        stacked = torch.stack(basis, 1)
        for _ in range(2):  # orthogonalized twice, which is enough
            h = (stacked @ w.unsqueeze(-1)).squeeze(-1)
            w = w - (h.unsqueeze(1) @ stacked).squeeze(1)
            H[:, : k + 1, k] += h
        length = _norm(w)
        ended = length <= 1e-14 * H[:, : k + 1, k].abs().amax(-1).clamp(min=1e-300)
        H[:, k + 1, k] = torch.where(ended, 0.0, length)
        basis.append(torch.where(ended[:, None], 0.0, w / length.clamp(min=1e-300)[:, None]))
        last = k == size - 1 or bool(ended.all())
        if last or k % 8 == 7:
            y, left = _least_squares(H[:, : k + 2, : k + 1], beta)
            if last or bool((left <= 0.5 * goal).all()):
                return (y.unsqueeze(1) @ torch.stack(basis[: k + 1], 1)).squeeze(1)
    return torch.zeros_like(r)


def _least_squares(H: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """min |H y - beta e_1|, of least length, and the residual."""
    right = H.new_zeros(*H.shape[:2], 1)
    right[:, 0, 0] = beta
    y = torch.linalg.pinv(H, rtol=1e-13) @ right
    return y.squeeze(-1), _norm((H @ y - right).squeeze(-1))


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(len(x), -1, 2).contiguous())


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.reshape(len(x), math.prod(x.shape[1:])), dim=1)


def _where(active: Tensor, new: Any, old: Any) -> Any:
    return type(new)(
        *(torch.where(active.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(new, old))
    )  # fmt: skip
