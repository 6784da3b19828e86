"""What the functions of riccati.py are called with: matrices that fit each other, masks, horizons."""

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from convexlearn.errors import DomainError, MissingParameterError, ShapeError
from convexlearn.inputs import as_floating

PSD_SLACK = 1e-8
"""Eigenvalues of a PSD matrix may be as low as -PSD_SLACK |Q|."""


def control_model(A: Any, B: Any, Q: Any, R: Any) -> dict[str, tuple[Any, str]]:
    """The matrices of a plant and its cost, each with letters for its sizes."""
    return {"A": (A, "nn"), "B": (B, "nm"), "Q": (Q, "nn"), "R": (R, "mm")}


def filter_model(A: Any, C: Any, V: Any, W: Any) -> dict[str, tuple[Any, str]]:
    """The matrices of a plant, its observations and the covariances of its noise."""
    return {"A": (A, "nn"), "C": (C, "pn"), "V": (V, "nn"), "W": (W, "pp")}


def common(where: str, given: dict[str, tuple[Any, str]]) -> tuple[torch.dtype, list[Tensor]]:
    """The dtype of all, and all in float64 with the same batch dimensions; each has letters for its two sizes."""
    sizes: dict[str, int] = {}
    named = {name: (as_floating(name, value, f"{where}: matrix"), letters) for name, (value, letters) in given.items()}
    for name, (matrix, letters) in named.items():
        if matrix.ndim < 2:
            raise ShapeError(f"{where}: {name} must be a matrix ({', '.join(letters)}), got {tuple(matrix.shape)}")
        for letter, size in zip(letters, matrix.shape[-2:]):
            if sizes.setdefault(letter, size) != size or size == 0:
                shapes = ", ".join(f"{k} {tuple(m.shape)}" for k, (m, _) in named.items())
                wanted = ", ".join(f"{k} ({', '.join(letters)})" for k, (_, letters) in named.items())
                raise ShapeError(f"{where}: {name} does not fit: expected {wanted}, got {shapes}")
        bad = ~torch.isfinite(matrix.detach()).all(-1).all(-1)
        if bool(bad.any()):
            raise DomainError(f"{where}: {name}{element(bad, first(bad))} has NaN or infinite entries")
    try:
        batch = torch.broadcast_shapes(*(matrix.shape[:-2] for matrix, _ in named.values()))
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(matrix.shape)}" for name, (matrix, _) in named.items())
        raise ShapeError(f"{where}: the batch dimensions do not fit: {shapes}") from None
    dtype = reduce(torch.promote_types, (matrix.dtype for matrix, _ in named.values()))
    return dtype, [matrix.double().expand(*batch, *matrix.shape[-2:]) for matrix, _ in named.values()]


def broadcast(where: str, *batches: Any) -> torch.Size:
    """The batch dimensions that matrices and mask share."""
    try:
        return torch.broadcast_shapes(*batches)
    except RuntimeError:
        shapes = " and ".join(str(tuple(b)) for b in batches)
        raise ShapeError(f"{where}: observed does not fit: the batch dimensions are {shapes}") from None


def as_mask(where: str, observed: Any, p: int) -> Tensor:
    """Which of the p observations there are, as bools."""
    if not isinstance(observed, Tensor) or observed.dtype is not torch.bool:
        got = observed.dtype if isinstance(observed, Tensor) else type(observed).__name__
        raise MissingParameterError(f"{where}: observed must be a tensor of bools, got {got}")
    if observed.ndim < 1 or observed.shape[-1] != p:
        raise ShapeError(f"{where}: observed must have shape (*batch, {p}), got {tuple(observed.shape)}")
    return observed


def masks_of(observed: Tensor | None, horizon: int, p: int) -> tuple[int, list[Any]]:
    """From which step on nothing is missing, and the mask `(*batch, p)` of each step (None: all is there)."""
    if observed is None:
        return 0, [None] * horizon
    observed = as_mask("kalman_recursion", observed, p)
    if observed.ndim < 2 or observed.shape[-2] != horizon:
        raise ShapeError(f"observed must have shape (*batch, {horizon}, p), got {tuple(observed.shape)}")
    whole = observed.all(-1).reshape(-1, horizon).all(0)
    gaps = torch.nonzero(~whole).flatten()
    complete = int(gaps[-1]) + 1 if len(gaps) else 0
    return complete, [None if full else mask for full, mask in zip(whole.tolist(), observed.unbind(-2))]


def check_psd(name: str, M: Tensor) -> None:
    """DomainError, naming batch element and eigenvalue, unless the symmetric M `(*batch, n, n)` is PSD."""
    M = as_floating(name, M, "matrix")
    M = M.to(torch.promote_types(M.dtype, torch.float32))
    if M.ndim < 2 or M.shape[-1] != M.shape[-2]:
        raise ShapeError(f"{name} must be square matrices (*batch, n, n), got {tuple(M.shape)}")
    lost = ~torch.isfinite(M.detach()).all(-1).all(-1)
    if bool(lost.any()):
        raise DomainError(f"{name}{element(lost, first(lost))} has NaN or infinite entries")
    lowest, scale = torch.linalg.eigvalsh(M.detach())[..., 0], M.detach().abs().amax((-2, -1))
    bad = lowest < -PSD_SLACK * scale
    if bool(bad.any()):
        i = first(bad)
        raise DomainError(
            f"{name} must be positive semidefinite, but{element(bad, i)} it has the eigenvalue "
            f"{float(lowest[i]):.6g}; symmetrise it and clip its eigenvalues at zero"
        )


def check_definite(name: str, M: Tensor) -> Tensor:
    """The Cholesky factor of M."""
    factor, info = torch.linalg.cholesky_ex(M)
    if bool((info > 0).any()):
        i = first(info > 0)
        if not bool(torch.isfinite(M.detach()[i]).all()):
            raise DomainError(f"{name} has NaN or infinite entries{element(info, i)}")
        raise DomainError(
            f"{name} must be positive definite, but{element(info, i)} it has the eigenvalue "
            f"{float(torch.linalg.eigvalsh(M.detach()[i])[0]):.6g}; add a small multiple of the identity"
        )
    return factor


def check_horizon(horizon: int) -> None:
    """ShapeError unless the number of steps is a positive integer."""
    if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
        raise ShapeError(f"horizon must be a positive number of steps, got {horizon!r}")


def number_text(value: Tensor) -> str:
    """A real or complex number in a message."""
    number = complex(value)
    return f"{number.real:.6g}" if abs(number.imag) < 1e-12 else f"{number:.6g}"


def first(bad: Tensor) -> tuple[int, ...]:
    """The first index at which `bad` is True."""
    return tuple(torch.nonzero(bad)[0].tolist())


def element(mask: Tensor, index: tuple[int, ...]) -> str:
    """The batch element of a mask's index, in a message."""
    if mask.ndim == 0:
        return ""
    return f" in batch element {index[0] if len(index) == 1 else index}"
