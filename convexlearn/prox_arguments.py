"""What a proximal map is called with, read once: v, the weight t of its term, and what else the term depends on."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexlearn.errors import DomainError, MissingParameterError, ShapeError
from convexlearn.inputs import as_tensor


def as_signal(where: str, v: Any, dims: Sequence[int] = (), *, real: bool = False) -> Tensor:
    """v as a floating-point or complex tensor, of one of the numbers of dimensions `dims` (default: any).

    Integers count as the default dtype. Complex numbers are refused where the map is for real ones only.

    >>> as_signal("soft_threshold", [1, 2]).dtype
    torch.float64
    """
    if not isinstance(v, Tensor):
        v = torch.as_tensor(v) if isinstance(v, np.ndarray) and v.dtype.kind == "c" else as_tensor("v", v, where)
    if v.is_complex():
        if real:
            raise MissingParameterError(f"{where}: v is complex; pass a real tensor")
    elif not v.is_floating_point():
        v = v.to(torch.get_default_dtype())
    if dims and v.ndim not in dims:
        raise ShapeError(f"{where}: v must have {' or '.join(map(str, dims))} dimensions, got shape {tuple(v.shape)}")
    return v


def as_weight(where: str, t: Any, v: Tensor, shape: Sequence[int], name: str = "t") -> Any:
    """A number or tensor t >= 0 that broadcasts to `shape`; a tensor in the precision of v. NaN is let through.

    >>> as_weight("soft_threshold", 0.5, torch.ones(2), (2,))
    0.5
    """
    if type(t) in (float, int):
        if t < 0:
            raise DomainError(f"{where}: {name} must not be negative, got {t:g}")
        return t
    t = as_number(where, t, v, shape, name)
    if not torch.compiler.is_compiling():
        refuse_where(where, t < 0, f"{name} must not be negative", t)
    return t


def as_number(where: str, value: Any, v: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """A real number or tensor that broadcasts to `shape`, in the precision and on the device of v."""
    tensor = as_tensor(name, value, where).to(dtype=v.real.dtype, device=v.device)
    padded = (1,) * (len(shape) - tensor.ndim) + tuple(tensor.shape)
    if len(padded) != len(shape) or any(a not in (1, b) for a, b in zip(padded, shape)):
        raise ShapeError(
            f"{where}: {name} must be a number or broadcast to {tuple(shape)}, got shape {tuple(tensor.shape)} "
            f"with v of shape {tuple(v.shape)}"
        )
    return tensor


def per_sample(where: str, value: Any, v: Tensor, name: str) -> Any:
    """A number t >= 0, or one per sample, `(B,)`, `(B, 1)` or `(B, 1, ...)`, of which the last is returned."""
    if isinstance(value, Tensor | np.ndarray) and tuple(value.shape) in ((len(v),), (len(v), 1)):
        value = value.reshape(len(v), *[1] * (v.ndim - 1))
    return as_weight(where, value, v, (len(v), *[1] * (v.ndim - 1)), name)


def refuse_where(where: str, bad: Tensor, text: str, value: Tensor) -> None:
    """DomainError that names the first place `bad` and its value; nothing where none can be read, as within vmap."""
    with contextlib.suppress(RuntimeError):
        if bool(bad.any()):
            place = tuple(torch.nonzero(bad)[0].tolist())
            number = f"{value.expand(bad.shape)[place].item():g}"
            raise DomainError(f"{where}: {text}, but is {number}" + (f" at entry {place}" if place else ""))
