"""Domain of a parameter (nonnegative, PSD, bounds, ...) and its free coordinates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import ge, le
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexlearn.checks import Check, checked, instance, shown
from convexlearn.errors import DomainError, OptionError, ShapeError, check_options

EPSILON = 1e-3
"""A value on the boundary of its domain starts this far inside, relative to its scale."""

SLACK = 1e-5
"""Relative amount by which a value may lie outside, so that finite differences at a boundary work."""

PSD_SLACK = 1e-8
"""Eigenvalues of a PSD parameter may be as low as -PSD_SLACK |P|."""

TOUCH = 1e-12
"""Values closer to the boundary than this, relative to their scale, count as lying on it."""

ATTRIBUTES = {
    "nonneg": "nonnegative",
    "pos": "positive",
    "nonpos": "nonpositive",
    "neg": "negative",
    "symmetric": "symmetric",
    "diag": "diagonal",
    "PSD": "positive semidefinite",
    "NSD": "negative semidefinite",
}
REFUSED = ("boolean", "integer", "complex", "imag", "hermitian")
SIZE = Check("a size", lambda v: isinstance(v, int | np.integer) and not isinstance(v, bool) and bool(v >= 0))
STRUCTURES = ("symmetric", "diag", "PSD", "NSD")


@dataclass(frozen=True, eq=False)
class Domain:
    """Where a parameter of shape `shape` lives: a structure of the matrix and bounds on its entries.

    `structure` is "full", "symmetric", "diag", "sparse", "PSD" or "NSD"; `entries` are the positions
    of a sparse parameter; `lower` and `upper` have shape `shape`, or are None. All methods accept
    leading dimensions: values have shape `(*batch, *shape)`. The free coordinates of "full" have the
    same shape, those of the other structures are vectors `(*batch, k)` of the k independent entries.

    >>> domain = Domain.from_attributes((), {"nonneg": True})
    >>> domain.from_free(domain.to_free(torch.tensor(0.1)))
    tensor(0.1000)
    >>> domain.describe()
    'nonnegative'
    """

    shape: tuple[int, ...] = ()
    structure: str = "full"
    lower: np.ndarray | None = None
    upper: np.ndarray | None = None
    entries: tuple[np.ndarray, ...] | None = None
    words: tuple[str, ...] = ()

    @staticmethod
    @checked(
        shape=Check("a tuple of sizes", lambda v: isinstance(v, Sequence) and all(SIZE.fits(n) for n in v)),
        attributes=instance(Mapping, "a dict of CVXPY attributes"),
    )
    def from_attributes(
        shape: Sequence[int],
        attributes: Mapping[str, Any] | None = None,
        sparse_idx: Sequence[np.ndarray] | None = None,
    ) -> "Domain":
        """The domain that CVXPY attributes declare; `sparse_idx` are the positions of `sparsity`.

        >>> Domain.from_attributes((2,), {"bounds": [0, 1]}).describe()
        'between 0 and 1'
        """
        shape = tuple(int(n) for n in shape)
        given = {k: v for k, v in (attributes or {}).items() if not _absent(v)}
        check_options(given, {*ATTRIBUTES, *REFUSED, "bounds", "sparsity"}, "attributes of a domain")
        for name in REFUSED:
            if name in given:
                raise OptionError(
                    f"attribute '{name}' has no differentiable domain; declare the parameter real and "
                    "continuous (a boolean one, for example, as bounds=[0, 1]) or pass it as context"
                )
        structures = [name for name in STRUCTURES if name in given]
        if structures and (len(shape) < 2 or shape[-1] != shape[-2]):
            raise ShapeError(f"attribute '{structures[0]}' needs a square matrix, got shape {shape}")
        words = [text for name, text in ATTRIBUTES.items() if name in given]
        entries = None
        if "sparsity" in given:
            structures.append("sparse")
            entries = tuple(np.asarray(i) for i in (given["sparsity"] if sparse_idx is None else sparse_idx))
            words.append(f"sparse with {len(entries[0])} entries")
        if len(structures) > 1:
            raise OptionError(f"a parameter has one structure at most, got {' and '.join(structures)}")
        lower, upper, text = _bounds(shape, given)
        words += [text] if text else []
        return Domain(shape, structures[0] if structures else "full", lower, upper, entries, tuple(words))

    def describe(self) -> str:
        """The domain in words, such as "nonnegative, diagonal"."""
        return ", ".join(self.words) or "unconstrained"

    @property
    def checked(self) -> bool:
        """True when some values lie outside; symmetry is no domain, matrices are symmetrised."""
        return self.lower is not None or self.upper is not None or self.structure not in ("full", "symmetric")

    @property
    def symmetric(self) -> bool:
        """True when the parameter is a symmetric matrix."""
        return self.structure in ("symmetric", "diag", "PSD", "NSD")

    def symmetrise(self, value: Tensor) -> Tensor:
        """(V + V')/2 for a symmetric, PSD or NSD parameter, V itself otherwise; `(*batch, *shape)`."""
        return (value + value.mT) / 2 if self.structure in ("symmetric", "PSD", "NSD") else value

    def to_free(self, value: Tensor) -> Tensor:
        """Free coordinates of `value` `(*batch, *shape)`, the inverse of `from_free`.

        A value on the boundary (or slightly outside) first moves inside, by EPSILON times the largest
        magnitude in `value` (EPSILON itself where all is zero; EPSILON times the width between two
        bounds), since its gradient would be zero otherwise.
        """
        value = self.symmetrise(value)
        if self.structure in ("PSD", "NSD"):
            self._refuse_bounded_psd()
            return _psd_to_free(-value if self.structure == "NSD" else value)
        lower, upper = self._entry_bounds(value)
        return _entries_to_free(self._gather(value), lower, upper)

    def from_free(self, free: Tensor) -> Tensor:
        """The value `(*batch, *shape)` at free coordinates; smooth, and inside for every argument.

        One bound: softplus; two bounds: sigmoid; PSD: LL' with a softplus diagonal of L; symmetric,
        diagonal and sparse matrices: their independent entries.
        """
        if self.structure == "full" and self.lower is None and self.upper is None:
            return free
        if self.structure in ("PSD", "NSD"):
            self._refuse_bounded_psd()
            value = _psd_from_free(free, self.shape)
            return -value if self.structure == "NSD" else value
        return self._scatter(_entries_from_free(free, *self._entry_bounds(free)))

    def violation(self, value: Tensor) -> Tensor:
        """How far `value` `(*batch, *shape)` lies outside beyond the slack, `(*batch,)`: an error where > 0.

        Relative to max(1, |entry|) with slack SLACK for bounds and for entries that the structure says
        are zero; relative to |P| with slack PSD_SLACK for the eigenvalues of PSD and NSD matrices.
        Symmetry is no domain: an asymmetric matrix is symmetrised. NaN counts as inside.
        """
        value = value.detach()
        batch = value.shape[: value.ndim - len(self.shape)]
        amounts = [value.new_zeros(batch)]
        scale = value.abs().clamp(min=1)
        for bound, sign in ((self.lower, 1.0), (self.upper, -1.0)):
            if bound is not None and bound.size:
                outside = sign * (value.new_tensor(bound) - value) / scale
                amounts.append(_flat(outside, batch).amax(-1) - SLACK)
        if self.structure in ("diag", "sparse") and value.numel():
            rest = value - self._scatter(self._gather(value))
            amounts.append(_flat(rest.abs() / scale, batch).amax(-1) - SLACK)
        if self.structure in ("PSD", "NSD") and value.numel():
            amounts.append(_psd_violation(-value if self.structure == "NSD" else value, batch))
        return torch.stack([a.nan_to_num(0.0, torch.inf, 0.0) for a in amounts]).amax(0)

    def check(self, name: str, value: Tensor) -> None:
        """Raise DomainError, naming parameter and batch element, if `value` `(*batch, *shape)` is outside."""
        if self._plainly_inside(value):
            return
        violation = self.violation(value)
        if not bool((violation > 0).any()):
            return
        where = tuple(torch.nonzero(violation > 0)[0].tolist())
        element = f" in batch element {where[0] if len(where) == 1 else where}" if where else ""
        raise DomainError(
            f"parameter '{name}' must be {self.describe()}, "
            f"but its value{element} {self._culprit(value[where])}; "
            "change the value, or declare the parameter without that attribute"
        )

    def _plainly_inside(self, value: Tensor) -> bool:
        """True where comparisons with the bounds alone tell so; spares small batches dozens of torch calls."""
        if value.device.type != "cpu" or value.dtype == torch.bfloat16 or self.structure not in ("full", "symmetric"):
            return False
        array = value.detach().numpy()
        lower, upper = (b is None or bool(c(array, b).all()) for b, c in ((self.lower, ge), (self.upper, le)))
        return lower and upper

    def _culprit(self, value: Tensor) -> str:
        if self.structure in ("PSD", "NSD"):
            eigenvalues = torch.linalg.eigvalsh(self.symmetrise(value.detach()).double())
            worst = eigenvalues.min() if self.structure == "PSD" else eigenvalues.max()
            return f"has the eigenvalue {worst.item():.6g}"
        for index in np.ndindex(*self.shape):
            lower, upper = (None if b is None else np.asarray(b[index]) for b in (self.lower, self.upper))
            entry = Domain((), "full", lower, upper)
            off = self.structure in ("diag", "sparse") and not self._mask()[index]
            if float(entry.violation(value[index])) > 0 or (off and float(value[index]) != 0):
                place = f" at entry {index[0] if len(index) == 1 else index}" if index else ""
                return f"is {value[index].item():.6g}{place}"
        return "is outside"

    def _refuse_bounded_psd(self) -> None:
        if self.lower is not None or self.upper is not None:
            raise OptionError(
                f"a learned parameter cannot be {self.describe()} at once; declare it PSD or NSD only, "
                "or learn a factor of it"
            )

    def _index(self) -> tuple[np.ndarray, ...] | None:
        """Positions, in the last dimensions, of the independent entries; None when all are."""
        if self.structure == "symmetric":
            return np.tril_indices(self.shape[-1])
        if self.structure == "diag":
            return np.diag_indices(self.shape[-1])
        return self.entries

    def _mask(self) -> np.ndarray:
        mask = np.zeros(self.shape, bool)
        mask[(..., *(self._index() or ()))] = True
        return mask

    def _gather(self, value: Tensor) -> Tensor:
        index = self._index()
        return value if index is None else value[(..., *(torch.as_tensor(i) for i in index))]

    def _scatter(self, entries: Tensor) -> Tensor:
        """The value with these independent entries `(*batch, k)`."""
        index = self._index()
        if index is None:
            return entries
        kept = self.shape[: len(self.shape) - len(index)]
        batch = entries.shape[: entries.ndim - len(kept) - 1]
        value = entries.new_zeros(*batch, *self.shape)
        positions = tuple(torch.as_tensor(i) for i in index)
        value[(..., *positions)] = entries
        if self.structure == "symmetric":
            value[(..., *positions[::-1])] = entries
        return value

    def _entry_bounds(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        bounds = (None if b is None else torch.as_tensor(b).to(like) for b in (self.lower, self.upper))
        lower, upper = (None if b is None else self._gather(b) for b in bounds)
        return lower, upper


def _absent(attribute: Any) -> bool:
    return attribute is None or (isinstance(attribute, bool | np.bool_) and not attribute)


def _bounds(shape: tuple[int, ...], given: Mapping[str, Any]) -> tuple[np.ndarray | None, np.ndarray | None, str]:
    """Lower and upper bounds on the entries that signs and `bounds` declare, and the latter in words."""
    lower, upper, text = np.full(shape, -np.inf), np.full(shape, np.inf), ""
    if "bounds" in given:
        if not isinstance(given["bounds"], Sequence) or len(given["bounds"]) != 2:
            raise OptionError(f"bounds must be a pair [lower, upper], got {shown(given['bounds'])}")
        low, high = (_dense_bound(b, fill) for b, fill in zip(given["bounds"], (-np.inf, np.inf)))
        lower, upper = np.maximum(lower, low), np.minimum(upper, high)
        low, high = (f"{float(b.flat[0]):g}" if np.all(b == b.flat[:1]) else "given arrays" for b in (low, high))
        text = f"between {low} and {high}" if low != high else "between given arrays"
    if {"nonneg", "pos"} & given.keys():
        lower = np.maximum(lower, 0.0)
    if {"nonpos", "neg"} & given.keys():
        upper = np.minimum(upper, 0.0)
    if (lower > upper).any():
        raise OptionError(f"bounds leave no value: lower {lower} exceeds upper {upper}")
    return (
        lower if np.isfinite(lower).any() else None,
        upper if np.isfinite(upper).any() else None,
        text,
    )


def _dense_bound(bound: Any, fill: float) -> np.ndarray:
    if bound is None:
        return np.asarray(fill)
    if hasattr(bound, "parameters"):  # a CVXPY expression
        raise OptionError("bounds of a parameter must be numbers or arrays; write parametric ones as constraints")
    if hasattr(bound, "tocoo"):
        coo = bound.tocoo()
        dense = np.full(coo.shape, fill)
        dense[coo.coords] = coo.data
        return dense
    try:
        return np.asarray(bound, dtype=float)
    except (TypeError, ValueError) as error:
        raise OptionError(f"bounds must hold numbers or arrays, got {shown(bound)}") from error


def _flat(value: Tensor, batch: torch.Size) -> Tensor:
    return value.reshape(*batch, -1) if value.numel() else value.new_zeros(*batch, 1)


def _softplus(free: Tensor) -> Tensor:
    # F.softplus turns linear at 20, an error of 2e-9
    return torch.logaddexp(free, torch.zeros_like(free))


def _softplus_inverse(value: Tensor) -> Tensor:
    return value + torch.log(-torch.expm1(-value))


def _scale(value: Tensor) -> Tensor:
    """Largest magnitude in `value`, or 1 where all is zero."""
    largest = value.abs().amax() if value.numel() else value.new_tensor(1.0)
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _sides(free: Tensor, lower: Tensor | None, upper: Tensor | None) -> tuple[Tensor, ...]:
    """Finite lower and upper bounds (0 where infinite) and where there is one; all of `free`'s shape."""
    out: list[Tensor] = []
    for bound in (lower, upper):
        bound = free.new_tensor(torch.inf) if bound is None else bound
        has = torch.isfinite(bound).expand(free.shape)
        out += [torch.where(has, bound, 0.0), has]
    return tuple(out)


def _entries_from_free(free: Tensor, lower: Tensor | None, upper: Tensor | None) -> Tensor:
    if lower is None and upper is None:
        return free
    low, has_low, high, has_high = _sides(free, lower, upper)
    value = torch.where(has_low, low + _softplus(free), free)
    value = torch.where(has_high & ~has_low, high - _softplus(-free), value)
    return torch.where(has_low & has_high, low + (high - low) * torch.sigmoid(free), value)


def _entries_to_free(value: Tensor, lower: Tensor | None, upper: Tensor | None) -> Tensor:
    if lower is None and upper is None:
        return value
    low, has_low, high, has_high = _sides(value, lower, upper)
    scale = _scale(value)

    def inside(distance: Tensor) -> Tensor:
        return torch.where(distance > TOUCH * scale, distance, EPSILON * scale)

    free = torch.where(has_low, _softplus_inverse(inside(value - low)), value)
    free = torch.where(has_high & ~has_low, -_softplus_inverse(inside(high - value)), free)
    both = has_low & has_high
    width = torch.where(both & (high > low), high - low, 1.0)
    part = torch.where(both & (high > low), (value - low) / width, 0.5)
    part = torch.where(part > TOUCH, part, EPSILON)
    part = torch.where(part < 1 - TOUCH, part, 1 - EPSILON)
    return torch.where(both, torch.logit(part), free)


def _psd_from_free(free: Tensor, shape: tuple[int, ...]) -> Tensor:
    kept = shape[:-2]
    rows, cols = (torch.as_tensor(i) for i in np.tril_indices(shape[-1]))
    diagonal = torch.as_tensor(rows == cols, device=free.device)
    batch = free.shape[: free.ndim - len(kept) - 1]
    factor = free.new_zeros(*batch, *shape)
    factor[..., rows, cols] = torch.where(diagonal, _softplus(free), free)
    return factor @ factor.mT


def _psd_to_free(value: Tensor) -> Tensor:
    if not value.numel():
        return value.new_zeros(*value.shape[:-2], 0)
    eye = torch.eye(value.shape[-1], dtype=value.dtype, device=value.device)
    scale, smallest = _scale(value), torch.linalg.eigvalsh(value).amin(-1)
    lift = torch.where(smallest > TOUCH * scale, 0.0, EPSILON * scale - smallest)
    factor = torch.linalg.cholesky(value + lift[..., None, None] * eye)
    rows, cols = (torch.as_tensor(i) for i in np.tril_indices(value.shape[-1]))
    entries = factor[..., rows, cols]
    diagonal = (rows == cols).to(value.device)
    return torch.where(diagonal, _softplus_inverse(torch.where(diagonal, entries, 1.0)), entries)


def _psd_violation(value: Tensor, batch: torch.Size) -> Tensor:
    """Relative amount by which the smallest eigenvalue lies below -PSD_SLACK |P|, `(*batch,)`."""
    value = ((value + value.mT) / 2).double()
    matrices = value.reshape(-1, *value.shape[-2:])
    norm = torch.linalg.matrix_norm(matrices)
    slack = torch.eye(value.shape[-1], dtype=value.dtype, device=value.device) * (PSD_SLACK * norm)[:, None, None]
    # a Cholesky factorization is cheaper than eigenvalues: most matrices need nothing more
    bad = (torch.linalg.cholesky_ex(matrices + slack).info > 0) & torch.isfinite(norm) & (norm > 0)
    out = torch.zeros_like(norm)
    if bool(bad.any()):
        smallest = torch.linalg.eigvalsh(matrices[bad])[:, 0]
        out[bad] = (-smallest / norm[bad] - PSD_SLACK).clamp(min=0)
    return out.reshape(*batch, -1).amax(-1)
