"""What a user passes as a tensor, read once: tensors, arrays and numbers become tensors, all else is refused."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexlearn.errors import MissingParameterError, ShapeError


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
