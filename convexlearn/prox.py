"""Proximal maps in closed form (Eq. 13 of the paper), in batches, each tested against CVXPY.

Every map is called as prox(v, t, **data): v `(B, ...)` in the natural shape of its term, t >= 0 the weight
of the term, which broadcasts against v (indicators ignore it), and data what else the term depends on.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexlearn.spectral import positive_part, shrink_singular_values

FEASIBLE = 1e-6
"""A point this far from a set, relative to 1 + its length, counts as inside when an indicator is evaluated."""

TINY = 1e-30


def soft_threshold(v: Tensor, t: Tensor | float) -> Tensor:
    """Prox of t |v|_1: sign(v) (|v| - t)_+ entry by entry (Example 10); complex entries keep their phase.

    >>> soft_threshold(torch.tensor([-3.0, 0.5, 2.0]), 1.0)
    tensor([-2.,  0.,  1.])
    """
    if v.is_complex():
        return _shorten(v, v.abs(), t)
    bound = torch.as_tensor(t, dtype=v.dtype if v.is_floating_point() else None)
    return v - v.clamp(min=-bound, max=bound)


def hard_threshold(v: Tensor, t: Tensor | float) -> Tensor:
    """A minimizer of t |z|_0 + 1/2 |z - v|^2 (Eq. 5): entries up to sqrt(2 t) vanish. Not convex: no guarantees.

    >>> hard_threshold(torch.tensor([-3.0, 0.5, 2.0]), 0.5)
    tensor([-3.,  0.,  2.])
    """
    return torch.where(v.abs().square() <= 2 * torch.as_tensor(t), torch.zeros_like(v), v)


def block_threshold(v: Tensor, t: Tensor | float) -> Tensor:
    """Prox of t |v|_2, the norm over all entries of a sample: v `(B, ...)`, t scalar or `(B, 1, ...)`.

    >>> block_threshold(torch.tensor([[3.0, 4.0]]), 1.0)
    tensor([[2.4000, 3.2000]])
    """
    return _shorten(v, _length(v), t)


def group_threshold(v: Tensor, t: Tensor | float, *, axis: int = 1) -> Tensor:
    """Prox of t times the sum of 2-norms along `axis` of matrices v `(B, p, q)`; t scalar or one per group.

    >>> group_threshold(torch.tensor([[[3.0, 4.0], [0.6, 0.8]]]), 1.0)
    tensor([[[2.4000, 3.2000],
             [0.0000, 0.0000]]])
    """
    weight = torch.as_tensor(t, dtype=v.real.dtype)
    weight = weight.unsqueeze(axis - 2) if weight.ndim == 1 else weight
    return _shorten(v, _norm(v, axis + 1), weight)


def singular_value_threshold(v: Tensor, t: Tensor | float) -> Tensor:
    """Prox of t times the nuclear norm of matrices v `(B, p, q)`, real or complex; t scalar or `(B, 1, 1)`."""
    weight = torch.as_tensor(t, dtype=v.real.dtype)
    return shrink_singular_values(v, weight[..., 0, 0] if weight.ndim >= 2 else weight)


def huber_prox(v: Tensor, t: Tensor | float, *, M: Any = 1.0) -> Tensor:
    """Prox of t times cvxpy.huber(v, M), the square up to M and 2 M |v| - M^2 beyond, entry by entry.

    >>> huber_prox(torch.tensor([1.0, 6.0]), 1.0)
    tensor([0.3333, 4.0000])
    """
    weight = 2 * torch.as_tensor(t, dtype=v.dtype)
    return torch.where(v.abs() <= M * (1 + weight), v / (1 + weight), v - weight * M * v.sign())


def total_variation_prox(v: Tensor, t: Tensor | float) -> Tensor:
    """Prox of t sum_i |v_{i+1} - v_i| of signals v `(B, n)`, exact; t scalar or `(B, 1)`.

    The segments of the solution come from the taut string (Davies, Kovac 2001); on them the solution is the
    mean of v, shifted by t over the length for each jump, which is also what is differentiated.

    >>> total_variation_prox(torch.tensor([[0.0, 0.0, 3.0]]), 0.5)
    tensor([[0.2500, 0.2500, 2.5000]])
    """
    weight = torch.as_tensor(t, dtype=v.dtype).expand(len(v), 1).reshape(-1)
    ends = [_taut_string(row, w) for row, w in zip(v.detach().double().cpu().numpy(), weight.tolist())]
    segment = torch.as_tensor(np.array([e[0] for e in ends]).reshape(v.shape), device=v.device)
    shift = torch.as_tensor(np.array([e[1] for e in ends]).reshape(v.shape), device=v.device, dtype=v.dtype)
    counts = torch.zeros_like(v).scatter_add(1, segment, torch.ones_like(v)).clamp(min=1)
    sums = torch.zeros_like(v).scatter_add(1, segment, v)
    return ((sums + weight[:, None] * shift) / counts).gather(1, segment)


def largest_entry_prox(v: Tensor, t: Tensor | float) -> Tensor:
    """Prox of t |v|_inf over all entries of a sample, by Moreau's identity v - (projection on the 1-norm ball)."""
    return v - project_norm1_ball(v, t, radius=t)


def project_zero(v: Tensor, t: Any = None) -> Tensor:
    """Projection on {0}."""
    return torch.zeros_like(v)


def project_nonnegative(v: Tensor, t: Any = None) -> Tensor:
    """Projection on the nonnegative orthant."""
    return v.clamp(min=0)


def project_box(v: Tensor, t: Any = None, *, lower: Any, upper: Any) -> Tensor:
    """Projection on lower <= v <= upper; the bounds broadcast against v."""
    lower, upper = (torch.as_tensor(bound, dtype=v.dtype, device=v.device) for bound in (lower, upper))
    return torch.minimum(torch.maximum(v, lower), upper)


def project_simplex(v: Tensor, t: Any = None, *, radius: Any = 1.0) -> Tensor:
    """Projection on {v >= 0, sum v = radius} over all entries of a sample (Held, Wolfe, Crowder 1974).

    >>> project_simplex(torch.tensor([[2.0, 0.0]]))
    tensor([[1., 0.]])
    """
    flat, total = _flat(v), _per_sample(radius, v)
    ordered = flat.sort(-1, descending=True).values
    rank = torch.arange(1, flat.shape[1] + 1, device=v.device, dtype=v.dtype)
    levels = (ordered.cumsum(-1) - total) / rank
    count = (ordered > levels).sum(-1, keepdim=True).clamp(min=1)
    return (flat - levels.gather(-1, count - 1)).clamp(min=0).reshape(v.shape)


def project_ball(v: Tensor, t: Any = None, *, radius: Any = 1.0) -> Tensor:
    """Projection on |v|_2 <= radius, the norm over all entries of a sample."""
    length, bound = _length(v), _per_sample(radius, v).reshape(-1, *[1] * (v.ndim - 1))
    return torch.where(length > bound, v * (bound / length.clamp(min=TINY)), v)


def project_norm1_ball(v: Tensor, t: Any = None, *, radius: Any = 1.0) -> Tensor:
    """Projection on |v|_1 <= radius over all entries of a sample (Duchi et al. 2008)."""
    flat = _flat(v)
    inside = flat.abs().sum(-1, keepdim=True) <= _per_sample(radius, v)
    edge = flat.sign() * project_simplex(flat.abs(), radius=radius)
    return torch.where(inside, flat, edge).reshape(v.shape)


def project_second_order_cone(v: Tensor, t: Any = None) -> Tensor:
    """Projection of v = (r, x) `(B, 1 + n)` on the cone |x|_2 <= r."""
    r, x = v[:, :1], v[:, 1:]
    length = _norm(x, 1)
    half = (r + length) / 2
    edge = torch.cat([half, half * x / length.clamp(min=TINY)], 1)
    return torch.where(length <= r, v, torch.where(length <= -r, torch.zeros_like(v), edge))


def project_psd(v: Tensor, t: Any = None, *, symmetric: bool = True) -> Tensor:
    """Projection of matrices v `(B, n, n)` on the symmetric (Hermitian) positive semidefinite ones.

    symmetric=False: on the matrices whose symmetric part is positive semidefinite.
    """
    return positive_part(v) if symmetric else positive_part(v) + (v - v.mH) / 2


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

    def evaluate(self, v: Tensor, weight: Tensor, data: Mapping[str, Any]) -> Tensor:
        """Weighted value `(B,)` at v `(B, ...)`; an indicator is 0 or infinite."""
        if self.value is None:
            distance = _flat((self.prox(v, weight, **data) - v).abs())
            outside = distance.amax(-1) > FEASIBLE * (1 + _length(v).reshape(len(v)))
            return torch.where(outside, torch.inf, 0.0).to(v.real.dtype)
        values = self.value(v, **data)
        return _flat(weight * values).sum(-1)


def _sum_of_jumps(v: Tensor) -> Tensor:
    return v.diff(dim=-1).abs().sum(-1, keepdim=True)


def _group_norms(v: Tensor, *, axis: int = 1) -> Tensor:
    return torch.linalg.vector_norm(v, dim=axis + 1)


def _nuclear_norm(v: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(v, "nuc")[:, None, None]


def _huber(v: Tensor, *, M: Any = 1.0) -> Tensor:
    return torch.where(v.abs() <= M, v.square(), 2 * M * v.abs() - M * M)


def _largest(v: Tensor) -> Tensor:
    return _flat(v).abs().amax(-1).reshape(-1, *[1] * (v.ndim - 1))


PROXIMABLE = {
    "norm1": Proximal("soft threshold", soft_threshold, torch.abs, separable=True),
    "norm0": Proximal(
        "hard threshold, not convex", hard_threshold, lambda v: (v != 0).to(v.real.dtype), separable=True, convex=False
    ),
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
    """2-norm along `dim`, kept; its gradient at zero is zero."""
    squared = (v.abs().square() if v.is_complex() else v.square()).sum(dim, keepdim=True)
    return torch.where(squared > 0, squared.clamp(min=TINY * TINY).sqrt(), squared)


def _length(v: Tensor) -> Tensor:
    """2-norm over all entries of a sample, `(B, 1, ...)`."""
    return _norm(_flat(v), 1).reshape(len(v), *[1] * (v.ndim - 1))


def _shorten(v: Tensor, length: Tensor, t: Tensor | float) -> Tensor:
    """v, shorter by t along itself, or zero."""
    positive = ~(length <= 0)  # NaN stays NaN
    factor = (1 - t / torch.where(positive, length, torch.ones_like(length))).clamp(min=0)
    return torch.where(positive, v * factor, torch.zeros_like(v))


def _per_sample(number: Any, v: Tensor) -> Tensor:
    """A scalar or one number per sample as `(B, 1)`."""
    return torch.as_tensor(number, dtype=v.real.dtype, device=v.device).reshape(-1, 1).expand(len(v), 1)


def _taut_string(v: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Number of the segment that each entry of v `(n,)` lies in, and the shift of each segment in units of t."""
    n = len(v)
    string = _string(np.concatenate([[0.0], np.cumsum(v)]), t)
    segment, shift = np.zeros(n, dtype=np.int64), np.zeros(n)
    for k, (start, stop, before, after) in enumerate(string):
        segment[start:stop], shift[k] = k, after - before
    return segment, shift


def _string(total: np.ndarray, t: float) -> list[tuple[int, int, int, int]]:
    """Straight pieces (start, stop, side at start, side at stop) of the shortest path in the tube of radius t.

    `total` `(n + 1,)` are the cumulative sums; a side is +1 where the path touches the upper wall, -1 the
    lower one and 0 at the two ends, which are fixed.
    """
    n, start, side, pieces = len(total) - 1, 0, 0, []
    while start < n:
        origin = total[start] + side * t
        low, high, low_at, high_at = -np.inf, np.inf, start, start
        stop, corner = n, 0
        for j in range(start + 1, n + 1):
            radius = t if j < n else 0.0
            lower, upper = (total[j] - radius - origin) / (j - start), (total[j] + radius - origin) / (j - start)
            if upper < low:  # the path must bend down at the lower wall's corner
                stop, corner = low_at, -1
                break
            if lower > high:
                stop, corner = high_at, 1
                break
            if lower >= low:
                low, low_at = lower, j
            if upper <= high:
                high, high_at = upper, j
        pieces.append((start, stop, side, corner))
        start, side = stop, corner
    return pieces
