"""What a user passes as a tensor, read once: tensors, arrays and numbers become tensors, all else is refused."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexlearn.checks import shown
from convexlearn.errors import DomainError, MissingParameterError, ShapeError


def as_tensor(name: str, value: Any, kind: str = "parameter") -> Tensor:
    """`value` as a real tensor; None, complex numbers and what is no number are a MissingParameterError.

    >>> as_tensor("rho", 2)
    tensor(2., dtype=torch.float64)
    """
    if value is None:
        raise MissingParameterError(f"{kind} '{name}' is None; pass a tensor, an array or a number")
    is_tensor = isinstance(value, Tensor)
    if value.is_complex() if is_tensor else np.iscomplexobj(value):
        raise MissingParameterError(f"{kind} '{name}' is complex; pass a real tensor")
    if is_tensor:
        return value
    try:
        array = np.asarray(value)
        return torch.as_tensor(array if array.dtype in (np.float32, np.float64) else array.astype(float))
    except (TypeError, ValueError) as error:
        raise MissingParameterError(
            f"{kind} '{name}' must be a tensor, an array or a number, got {type(value).__name__}"
        ) from error


def as_floating(name: str, value: Any, kind: str = "parameter") -> Tensor:
    """As `as_tensor`; integers count as the default dtype.

    >>> as_floating("x", torch.tensor([True, False]))
    tensor([1., 0.])
    """
    tensor = as_tensor(name, value, kind)
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def as_contexts(owner: str, x: Sequence[Any], most: int | None = None) -> tuple[Tensor, ...]:
    """The contexts `(B, ...)` that a rule was called with, as floating-point tensors; at least one, at most `most`."""
    if not x:
        raise MissingParameterError(f"{owner} needs a context x, as in rule(x) with x of shape (B, ...)")
    if most is not None and len(x) > most:
        raise ShapeError(f"{owner} takes {most} context{'s' if most > 1 else ''}, got {len(x)}")
    names = ["x"] if len(x) == 1 else [f"x{k}" for k in range(len(x))]
    tensors = tuple(as_floating(name, part, f"{owner}: context") for name, part in zip(names, x))
    for name, part in zip(names, tensors):
        if part.ndim == 0:
            raise ShapeError(f"{owner}: context '{name}' must have shape (B, ...), got a number; use x[None] for B = 1")
    return tensors


def flattened(owner: str, x: Sequence[Any]) -> Tensor:
    """`(B, n)`: the entries of all contexts, joined.

    >>> flattened("AffineRule", (torch.ones(2, 3, 1), torch.zeros(2))).shape
    torch.Size([2, 4])
    """
    parts = [part[:, None] if part.ndim == 1 else part.flatten(1) for part in as_contexts(owner, x)]
    if len({len(part) for part in parts}) > 1:
        raise ShapeError(f"{owner}: contexts have different batch sizes {[len(part) for part in parts]}")
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def check_step(owner: str, z: Any, n: int, u: Any, m: int, w: Any = 0.0) -> None:
    """Refuse what is no state `(..., n)`, input `(..., m)` of the same batch, or noise added to the state.

    For plants, which are called at every step: a few comparisons where all is well.
    """
    if isinstance(z, Tensor) and isinstance(u, Tensor):
        batch = z.shape[:-1]
        fits = batch and z.shape[-1] == n and u.shape == (*batch, m)
        if fits and z.is_floating_point() and u.is_floating_point():
            check_noise(owner, w, z)
            return
    check_rows(owner, "z", z, n)
    check_rows(owner, "u", u, m)
    raise ShapeError(f"{owner}: z and u must have the same batch, got {tuple(z.shape)} and {tuple(u.shape)}")


def check_noise(owner: str, w: Any, like: Tensor) -> None:
    """Refuse noise that is no number and no floating tensor of the shape of `like`, to which it is added."""
    if isinstance(w, Tensor):
        if w.is_floating_point() and (w.shape == like.shape or not w.ndim):
            return
    elif isinstance(w, int | float):
        return
    raise ShapeError(f"{owner}: w must be a number, or floating and of shape {tuple(like.shape)}, got {shown(w)}")


def check_rows(owner: str, name: str, value: Any, size: int) -> None:
    """Refuse what is no floating tensor `(..., size)` with the batch first."""
    if not isinstance(value, Tensor):
        raise MissingParameterError(f"{owner}: {name} must be a tensor (B, {size}), got {shown(value)}")
    if not value.is_floating_point():
        raise ShapeError(f"{owner}: {name} must be of a real floating dtype, got {value.dtype}")
    if value.ndim < 2 or value.shape[-1] != size:
        raise ShapeError(f"{owner}: {name} must have shape (B, {size}), got {tuple(value.shape)}")


def start_state(owner: str, state: Any, like: Tensor, n: int) -> Tensor:
    """The state `(B, n)` at the start, `(n,)` or `(B, n)`, in the dtype of `like` `(B, ...)`; zero by default."""
    batch = len(like)
    if state is None:
        return like.new_zeros(batch, n)
    state = as_floating("state", state, f"{owner}: argument")
    if tuple(state.shape) not in {(n,), (batch, n)}:
        raise ShapeError(f"state must have shape ({n},) or ({batch}, {n}), got {tuple(state.shape)}")
    refuse_not_finite("state", state)
    return state.to(like.dtype).expand(batch, n)


def refuse_not_finite(name: str, value: Tensor) -> None:
    """DomainError, naming the index, for an entry that is NaN or infinite."""
    bad = ~torch.isfinite(value.detach())
    if bool(bad.any()):
        raise DomainError(
            f"{name} is NaN or infinite at index {tuple(torch.nonzero(bad)[0].tolist())}; only x may have NaN entries"
        )
