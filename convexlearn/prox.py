"""Proximal maps in closed form (Eq. 13 of the paper), in batches, each tested against CVXPY.

Every map is called as prox(v, t, **data): v `(B, ...)` in the natural shape of its term, t >= 0 the weight
of the term, which broadcasts against v (indicators ignore it), and data what else the term depends on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexlearn.errors import OptionError, ShapeError
from convexlearn.prox_arguments import as_number, as_signal, as_weight, per_sample, refuse_where
from convexlearn.spectral import nuclear_norm, positive_part, shrink_singular_values
from convexlearn.taut_string import taut_string

FEASIBLE = 1e-6
"""A point this far from a set, relative to 1 + its length, counts as inside when an indicator is evaluated."""

TINY = 1e-30


def _checked(
    weight: str = "", *, dims: Sequence[int] = (), batched: bool = True, real: bool = False, square: bool = False
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """A map that refuses what it is not for: v of other dimensions, weights and data that do not fit v.

    weight: what t may be, one number per "entry", "sample" or "group" (a number always). Loops whose arguments are
    known to fit call the bare map, `Proximal.bare`.
    """

    def decorate(prox: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = prox.__name__

        def read(v: Any) -> Tensor:
            v = as_signal(name, v, dims, real=real)
            if batched and v.ndim == 0:
                raise ShapeError(f"{name}: v must have shape (B, ...), got a number")
            if square and v.shape[-1] != v.shape[-2]:
                raise ShapeError(f"{name}: v must be square matrices, got shape {tuple(v.shape)}")
            return v

        @wraps(prox)
        def call(v: Tensor, t: Any = None, **data: Any) -> Tensor:
            v = read(v)
            if data:
                data = {key: _datum(name, key, value, v) for key, value in data.items()}
                _check_bounds(name, data)
            if weight == "entry":
                t = as_weight(name, t, v, v.shape)
            elif weight == "sample":
                t = per_sample(name, t, v, "t")
            elif weight == "group":
                t = as_weight(name, t, v, _group_shape(v, t, data.get("axis", 1)))
            return prox(v, t, **data)

        call.read = read  # pyright: ignore[reportAttributeAccessIssue]
        return call

    return decorate


def _datum(name: str, key: str, value: Any, v: Tensor) -> Any:
    """What a term depends on beside its weight, read."""
    if key == "radius":
        return per_sample(name, value, v, key)
    if key == "M":
        return as_weight(name, value, v, v.shape, key)
    if key in ("lower", "upper"):
        return as_number(name, value, v, v.shape, key)
    if key == "axis" and value not in (0, 1):
        raise OptionError(f"{name}: axis must be 0 or 1, got {value!r}")
    return value


def _check_bounds(name: str, data: Mapping[str, Any]) -> None:
    lower, upper = data.get("lower"), data.get("upper")
    if lower is not None and upper is not None and not torch.compiler.is_compiling():
        refuse_where(name, lower > upper, "lower - upper must not be positive", lower - upper)


def _group_shape(v: Tensor, t: Any, axis: int) -> tuple[int, ...]:
    """Of the weights: one per group in a row, or the norms' own shape."""
    if getattr(t, "ndim", 0) == 1:
        return (v.shape[2 - axis],)
    return (len(v), v.shape[1], 1) if axis == 1 else (len(v), 1, v.shape[2])


@_checked("entry", batched=False)
def soft_threshold(v: Tensor, t: Tensor | float) -> Tensor:
    """Prox of t |v|_1: sign(v) (|v| - t)_+ entry by entry (Example 10); complex entries keep their phase.

    >>> soft_threshold(torch.tensor([-3.0, 0.5, 2.0]), 1.0)
    tensor([-2.,  0.,  1.])
    """
    if v.is_complex():
        return _shorten(v, v.abs(), t)
    bound = torch.as_tensor(t, dtype=v.dtype if v.is_floating_point() else None)
    return v - v.clamp(min=-bound, max=bound)


@_checked("entry", batched=False)
def hard_threshold(v: Tensor, t: Tensor | float) -> Tensor:
    """A minimizer of t |z|_0 + 1/2 |z - v|^2 (Eq. 5): entries up to sqrt(2 t) vanish. Not convex: no guarantees.

    >>> hard_threshold(torch.tensor([-3.0, 0.5, 2.0]), 0.5)
    tensor([-3.,  0.,  2.])
    """
    level = 2 * torch.as_tensor(t)
    return torch.where(v.abs().square() <= level, torch.zeros_like(v), v + 0 * level)  # NaN in t stays, too


@_checked("sample")
def block_threshold(v: Tensor, t: Tensor | float) -> Tensor:
    """Prox of t |v|_2, the norm over all entries of a sample: v `(B, ...)`, t scalar or `(B, 1, ...)`.

    >>> block_threshold(torch.tensor([[3.0, 4.0]]), 1.0)
    tensor([[2.4000, 3.2000]])
    """
    return _shorten(v, _length(v), t)


@_checked("group", dims=(3,))
def group_threshold(v: Tensor, t: Tensor | float, *, axis: int = 1) -> Tensor:
    """Prox of t times the sum of 2-norms along `axis` of matrices v `(B, p, q)`; t scalar or one per group.

    >>> group_threshold(torch.tensor([[[3.0, 4.0], [0.6, 0.8]]]), 1.0)
    tensor([[[2.4000, 3.2000],
             [0.0000, 0.0000]]])
    """
    weight = torch.as_tensor(t, dtype=v.real.dtype)
    weight = weight.unsqueeze(axis - 2) if weight.ndim == 1 else weight
    return _shorten(v, _norm(v, axis + 1), weight)


@_checked("sample", dims=(3,))
def singular_value_threshold(v: Tensor, t: Tensor | float) -> Tensor:
    """Prox of t times the nuclear norm of matrices v `(B, p, q)`, real or complex; t scalar or `(B, 1, 1)`."""
    weight = torch.as_tensor(t, dtype=v.real.dtype)
    return shrink_singular_values(v, weight[..., 0, 0] if weight.ndim >= 2 else weight)


@_checked("entry", batched=False, real=True)
def huber_prox(v: Tensor, t: Tensor | float, *, M: Any = 1.0) -> Tensor:
    """Prox of t times cvxpy.huber(v, M), the square up to M and 2 M |v| - M^2 beyond, entry by entry.

    >>> huber_prox(torch.tensor([1.0, 6.0]), 1.0)
    tensor([0.3333, 4.0000])
    """
    weight = 2 * torch.as_tensor(t, dtype=v.dtype)
    return torch.where(v.abs() <= M * (1 + weight), v / (1 + weight), v - weight * M * v.sign())


@_checked("sample", dims=(2,), real=True)
def total_variation_prox(v: Tensor, t: Tensor | float) -> Tensor:
    """Prox of t sum_i |v_{i+1} - v_i| of signals v `(B, n)`, exact; t scalar or `(B, 1)`.

    The segments of the solution come from the taut string (Davies, Kovac 2001); on them the solution is the
    mean of v, shifted by t over the length for each jump, which is also what is differentiated.

    >>> total_variation_prox(torch.tensor([[0.0, 0.0, 3.0]]), 0.5)
    tensor([[0.2500, 0.2500, 2.5000]])
    """
    weight = torch.as_tensor(t, dtype=v.dtype).expand(len(v), 1).reshape(-1)
    ends = [taut_string(row, w) for row, w in zip(v.detach().double().cpu().numpy(), weight.tolist())]
    segment = torch.as_tensor(np.array([e[0] for e in ends]).reshape(v.shape), device=v.device)
    shift = torch.as_tensor(np.array([e[1] for e in ends]).reshape(v.shape), device=v.device, dtype=v.dtype)
    counts = torch.zeros_like(v).scatter_add(1, segment, torch.ones_like(v)).clamp(min=1)
    sums = torch.zeros_like(v).scatter_add(1, segment, v)
    return ((sums + weight[:, None] * shift) / counts).gather(1, segment)


@_checked("sample")
def largest_entry_prox(v: Tensor, t: Tensor | float) -> Tensor:
    """Prox of t |v|_inf over all entries of a sample, by Moreau's identity v - (projection on the 1-norm ball)."""
    return v - project_norm1_ball(v, radius=t)


@_checked(batched=False)
def project_zero(v: Tensor, t: Any = None) -> Tensor:
    """Projection on {0}."""
    return torch.zeros_like(v)


@_checked(batched=False, real=True)
def project_nonnegative(v: Tensor, t: Any = None) -> Tensor:
    """Projection on the nonnegative orthant."""
    return v.clamp(min=0)


@_checked(batched=False, real=True)
def project_box(v: Tensor, t: Any = None, *, lower: Any, upper: Any) -> Tensor:
    """Projection on lower <= v <= upper; the bounds broadcast against v."""
    lower, upper = (torch.as_tensor(bound, dtype=v.dtype, device=v.device) for bound in (lower, upper))
    return torch.minimum(torch.maximum(v, lower), upper)


@_checked(real=True)
def project_simplex(v: Tensor, t: Any = None, *, radius: Any = 1.0) -> Tensor:
    """Projection on {v >= 0, sum v = radius} over all entries of a sample (Held, Wolfe, Crowder 1974).

    >>> project_simplex(torch.tensor([[2.0, 0.0]]))
    tensor([[1., 0.]])
    """
    if v[:1].numel() == 0 and len(v):
        raise ShapeError(f"project_simplex: v must have entries, got shape {tuple(v.shape)}")
    return _simplex(_flat(v), _per_sample(radius, v)).reshape(v.shape)


@_checked()
def project_ball(v: Tensor, t: Any = None, *, radius: Any = 1.0) -> Tensor:
    """Projection on |v|_2 <= radius, the norm over all entries of a sample."""
    length, bound = _length(v), _per_sample(radius, v).reshape(-1, *[1] * (v.ndim - 1))
    return torch.where(length <= bound, v, v * (bound / torch.where(length > 0, length, 1.0)))  # NaN stays NaN


@_checked()
def project_norm1_ball(v: Tensor, t: Any = None, *, radius: Any = 1.0) -> Tensor:
    """Projection on |v|_1 <= radius over all entries of a sample (Duchi et al. 2008)."""
    flat = _flat(v)
    inside = flat.abs().sum(-1, keepdim=True) <= _per_sample(radius, v)
    edge = flat.sgn() * _simplex(flat.abs(), _per_sample(radius, v))
    return torch.where(inside, flat, edge).reshape(v.shape)


@_checked(dims=(2,), real=True)
def project_second_order_cone(v: Tensor, t: Any = None) -> Tensor:
    """Projection of v = (r, x) `(B, 1 + n)` on the cone |x|_2 <= r."""
    r, x = v[:, :1], v[:, 1:]
    length = _norm(x, 1)
    half = (r + length) / 2
    edge = torch.cat([half, half * (x / torch.where(length > 0, length, 1.0))], 1)
    return torch.where(length <= r, v, torch.where(length <= -r, torch.zeros_like(v), edge))


@_checked(dims=(3,), square=True)
def project_psd(v: Tensor, t: Any = None, *, symmetric: bool = True) -> Tensor:
    """Projection of matrices v `(B, n, n)` on the symmetric (Hermitian) positive semidefinite ones.

    symmetric=False: on the matrices whose symmetric part is positive semidefinite.
    """
    return positive_part(v) if symmetric else positive_part(v) + (v - v.mH) / 2


@_checked(dims=(3,), square=True)
def symmetrise(v: Tensor, t: Any = None) -> Tensor:
    """Projection of matrices v `(B, n, n)` on the symmetric ones."""
    return (v + v.mT) / 2


@dataclass(frozen=True)
class Proximal:
    """An entry of the table: the map, the function that it belongs to, and what is known of it.

    text: as printed. prox(v, t, **data). value(v, **data): the function, one number per entry or group for
    the weighted ones, else `(B,)`; None for an indicator. separable: acts entry by entry. convex: False for
    the hard threshold, with which no guarantee holds.
    """

    text: str
    prox: Callable[..., Tensor]
    value: Callable[..., Tensor] | None = None
    separable: bool = False
    convex: bool = True

    @property
    def bare(self) -> Callable[..., Tensor]:
        """`prox` without checks of its arguments."""
        return getattr(self.prox, "__wrapped__", self.prox)

    def evaluate(self, v: Tensor, weight: Tensor, data: Mapping[str, Any]) -> Tensor:
        """Weighted value `(B,)` at v `(B, ...)`; an indicator is 0 or infinite."""
        read = getattr(self.prox, "read", None)
        v = v if read is None else read(v)
        if v.ndim == 0:
            raise ShapeError(f"{self.text}: v must have shape (B, ...), got a number")
        if self.value is None:
            distance = _flat((self.bare(v, weight, **data) - v).abs())
            outside = ~(_norm(distance, 1)[:, 0] <= FEASIBLE * (1 + _length(v).reshape(len(v))))  # NaN is outside
            return torch.where(outside, torch.inf, 0.0).to(v.real.dtype)
        values = self.value(v, **data)
        if self.value is _group_norms and getattr(weight, "ndim", 0) == 1:  # one per group
            weight = torch.as_tensor(weight).unsqueeze(data.get("axis", 1) - 2)
        return _flat(as_weight(self.text, weight, v, values.shape, "weight") * values).sum(-1)


def _sum_of_jumps(v: Tensor) -> Tensor:
    return v.diff(dim=-1).abs().sum(-1, keepdim=True)


def _group_norms(v: Tensor, *, axis: int = 1) -> Tensor:
    return torch.linalg.vector_norm(v, dim=axis + 1, keepdim=True)


def _nuclear_norm(v: Tensor) -> Tensor:
    return nuclear_norm(v)[:, None, None]


def _nonzero(v: Tensor) -> Tensor:
    return torch.where(torch.isnan(v), torch.nan, (v != 0).to(v.real.dtype))


def _huber(v: Tensor, *, M: Any = 1.0) -> Tensor:
    return torch.where(v.abs() <= M, v.square(), 2 * M * v.abs() - M * M)


def _largest(v: Tensor) -> Tensor:
    return _flat(v).abs().amax(-1).reshape(-1, *[1] * (v.ndim - 1))


PROXIMABLE = {
    "norm1": Proximal("soft threshold", soft_threshold, torch.abs, separable=True),
    "norm0": Proximal("hard threshold, not convex", hard_threshold, _nonzero, separable=True, convex=False),
    "norm2": Proximal("block threshold", block_threshold, lambda v: _length(v)),
    "group": Proximal("group threshold", group_threshold, _group_norms),
    "nuclear": Proximal("singular value threshold", singular_value_threshold, _nuclear_norm),
    "huber": Proximal("Huber", huber_prox, _huber, separable=True),
    "total_variation": Proximal("taut string", total_variation_prox, _sum_of_jumps),
    "norm_inf": Proximal("largest entry", largest_entry_prox, _largest),
    "zero": Proximal("affine set", project_zero, separable=True),
    "nonnegative": Proximal("nonnegative orthant", project_nonnegative, separable=True),
    "box": Proximal("box", project_box, separable=True),
    "simplex": Proximal("simplex", project_simplex),
    "ball": Proximal("ball", project_ball),
    "norm1_ball": Proximal("1-norm ball", project_norm1_ball),
    "second_order_cone": Proximal("second-order cone", project_second_order_cone),
    "psd_cone": Proximal("positive semidefinite cone", project_psd),
    "symmetric": Proximal("symmetric matrices", symmetrise),
}
"""Terms with a proximal map in closed form, by name."""


def _flat(v: Tensor) -> Tensor:
    """All entries of a sample in a row, `(B, n)`."""
    return v.reshape(len(v), math.prod(v.shape[1:]))


def _norm(v: Tensor, dim: int) -> Tensor:
    """2-norm along `dim`, kept, at any scale of v; its gradient at zero is zero."""
    if v.shape[dim] == 0:
        return v.real.sum(dim, keepdim=True)
    largest = v.detach().abs().amax(dim, keepdim=True)
    unit = torch.where((largest > 0) & (largest < torch.inf), largest, 1.0)  # squares neither over- nor underflow
    return unit * torch.linalg.vector_norm(v / unit, dim=dim, keepdim=True)


def _length(v: Tensor) -> Tensor:
    """2-norm over all entries of a sample, `(B, 1, ...)`."""
    return _norm(_flat(v), 1).reshape(len(v), *[1] * (v.ndim - 1))


def _shorten(v: Tensor, length: Tensor, t: Tensor | float) -> Tensor:
    """v, shorter by t along itself, or zero."""
    positive = ~(length <= 0)  # NaN stays NaN
    factor = (1 - t / torch.where(positive, length, torch.ones_like(length))).clamp(min=0)
    return torch.where(positive, v * factor, torch.zeros_like(v))


def _simplex(flat: Tensor, total: Tensor) -> Tensor:
    """Rows `(B, n)` projected on the nonnegative ones of sum `total` `(B, 1)`."""
    if flat.shape[1] == 0:
        return flat
    ordered = flat.sort(-1, descending=True).values
    rank = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=flat.dtype)
    levels = (ordered.cumsum(-1) - total) / rank
    count = (ordered > levels).sum(-1, keepdim=True).clamp(min=1)
    return (flat - levels.gather(-1, count - 1)).clamp(min=0)


def _per_sample(number: Any, v: Tensor) -> Tensor:
    """A scalar or one number per sample as `(B, 1)`."""
    return torch.as_tensor(number, dtype=v.real.dtype, device=v.device).reshape(-1, 1).expand(len(v), 1)
