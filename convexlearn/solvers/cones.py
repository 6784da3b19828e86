"""Projections on the cones of a program and their derivatives, all samples and all cones of one kind at once.

The derivative of a projection on a convex cone is symmetric with eigenvalues in [0, 1]. It is kept as
E' diag(slope) E with an orthonormal E that is block diagonal over the cones, so that optimality
conditions stay symmetric and second-order cones cost O(k). Where a projection is not differentiable,
one element of its generalized derivative is taken.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from convexlearn.program.program import Cones

Array = np.ndarray
Point = tuple[Array, Array, Array, Array]  # parts in the cone and in the dual cone, slope, 1 - slope


@dataclass(frozen=True, eq=False)
class Group:
    """Cones of one kind ("soc", "psd", "exp", "power") and size: rows (C, size), and alpha (C,) of power cones."""

    kind: str
    rows: Array
    alpha: Array


@cache
def groups(cones: Cones) -> tuple[int, tuple[Group, ...]]:
    """Number of leading rows that are equalities or signs, and the groups of the others."""
    start = cones.zero + cones.nonneg
    found: dict[tuple[str, int], list[Array]] = {}
    sizes = [("soc", k) for k in cones.soc] + [("psd", k * (k + 1) // 2) for k in cones.psd]
    sizes += [("exp", 3)] * cones.exp + [("power", 3)] * len(cones.power)
    for kind, size in sizes:
        found.setdefault((kind, size), []).append(np.arange(start, start + size))
        start += size
    alpha = np.array(cones.power)
    return cones.zero + cones.nonneg, tuple(
        Group(kind, np.array(rows), alpha if kind == "power" else alpha[:0]) for (kind, _), rows in found.items()
    )


class SecondOrderBasis:
    """E of cones {(t, u): |u| <= t}: (1, d)/sqrt 2, (1, -d)/sqrt 2, then a basis orthogonal to the direction d of u."""

    def __init__(self, direction: Array) -> None:
        self.sign = np.where(direction[..., :1] < 0, -1.0, 1.0)
        reflector = direction.copy()
        reflector[..., :1] += self.sign
        self.reflector = reflector[..., None]
        self.weight = 2.0 / np.square(self.reflector).sum(-2, keepdims=True).clip(min=1.0)
        self.sign = self.sign[..., None]

    def rotate(self, X: Array) -> Array:
        """E X for X (B, C, k, w)."""
        u = self._reflect(X[..., 1:, :])
        top, along = X[..., :1, :], -self.sign * u[..., :1, :]
        return np.concatenate([np.sqrt(0.5) * (top + along), np.sqrt(0.5) * (top - along), u[..., 1:, :]], -2)

    def back(self, X: Array) -> Array:
        """E'X for X (B, C, k, w)."""
        top, along = X[..., :1, :] + X[..., 1:2, :], X[..., :1, :] - X[..., 1:2, :]
        u = np.concatenate([-self.sign * np.sqrt(0.5) * along, X[..., 2:, :]], -2)
        return np.concatenate([np.sqrt(0.5) * top, self._reflect(u)], -2)

    def _reflect(self, u: Array) -> Array:
        return u - self.weight * self.reflector * (self.reflector.swapaxes(-1, -2) @ u)


class SemidefiniteBasis:
    """E of PSD cones: coordinates Q'XQ in the eigenvectors Q (B, C, k, k), as scaled lower triangles."""

    def __init__(self, vectors: Array) -> None:
        self.vectors = vectors

    def rotate(self, X: Array) -> Array:
        """E X for X (B, C, k (k + 1) / 2, w)."""
        return self._congruence(X, self.vectors)

    def back(self, X: Array) -> Array:
        """E'X for X (B, C, k (k + 1) / 2, w)."""
        return self._congruence(X, self.vectors.swapaxes(-1, -2))

    def _congruence(self, X: Array, Q: Array) -> Array:
        Q = Q[:, :, None]
        full = matrix_of(X.swapaxes(-1, -2))
        return triangle_of(Q.swapaxes(-1, -2) @ full @ Q).swapaxes(-1, -2)


class PlainBasis:
    """E of three-dimensional cones as matrices (B, C, 3, 3)."""

    def __init__(self, E: Array) -> None:
        self.E = E

    def rotate(self, X: Array) -> Array:
        """E X for X (B, C, 3, w)."""
        return self.E @ X

    def back(self, X: Array) -> Array:
        """E'X for X (B, C, 3, w)."""
        return self.E.swapaxes(-1, -2) @ X


@dataclass(frozen=True, eq=False)
class Projection:
    """Where v = z - s splits: dual z (B, m) in K*, primal s (B, m) in K, s'z = 0.

    The derivative of z with respect to v is E' diag(slope) E; `rest` is 1 - slope, without cancellation.
    """

    cones: Cones
    dual: Array
    primal: Array
    slope: Array
    rest: Array
    bases: tuple[Any, ...]

    def rotate(self, u: Array) -> Array:
        """E u for u (B, m)."""
        return self._apply(u, "rotate")

    def back(self, u: Array) -> Array:
        """E'u for u (B, m)."""
        return self._apply(u, "back")

    def derivative(self, h: Array) -> Array:
        """Change of z (B, m) along a change h (B, m) of v."""
        return self.back(self.slope * self.rotate(h))

    def _apply(self, u: Array, how: str) -> Array:
        out = u.copy()
        for group, basis in zip(groups(self.cones)[1], self.bases):
            out[:, group.rows] = getattr(basis, how)(u[:, group.rows, None])[..., 0]
        return out


def split(cones: Cones, v: Array) -> Projection:
    """The two projections of Moreau's decomposition v = z - s, z in K*, s in K, for v (B, m) float64.

    >>> found = split(Cones(zero=1, nonneg=2), np.array([[-3.0, 2.0, -1.0]]))
    >>> found.dual.tolist(), found.primal.tolist()
    ([[-3.0, 2.0, 0.0]], [[0.0, 0.0, 1.0]])
    """
    others = groups(cones)[1]
    free = np.arange(v.shape[1]) < cones.zero
    dual = np.where(free, v, v.clip(min=0))
    slope = (free | (v > 0)).astype(float)
    primal, rest = dual - v, 1.0 - slope
    bases = []
    for group in others:
        part, basis = _SPLIT[group.kind](v[:, group.rows], group)
        bases.append(basis)
        for target, value in zip((primal, dual, slope, rest), part):
            target[:, group.rows] = value
    return Projection(cones, dual, primal, slope, rest, tuple(bases))


def project(cones: Cones, u: Array) -> Array:
    """The nearest point of K to u (B, m)."""
    return split(cones, -u).primal


def project_dual(cones: Cones, u: Array) -> Array:
    """The nearest point of the dual cone K* to u (B, m)."""
    return split(cones, u).dual


def _split_second_order(v: Array, group: Group) -> tuple[Point, Any]:
    t, u = v[..., :1], v[..., 1:]
    norm = np.sqrt(np.square(u).sum(-1, keepdims=True))
    direction = np.divide(u, norm, out=np.zeros_like(u), where=norm > 0)
    if u.shape[-1] == 0:  # {t >= 0}
        slope = (t > 0).astype(float)
        return (t.clip(min=0) - t, t.clip(min=0), slope, 1 - slope), PlainBasis(np.ones((*t.shape, 1)))
    high, low = (t + norm).clip(min=0), (norm - t).clip(min=0)
    inside, outside = norm <= t, norm < -t
    ray, back = np.concatenate([np.ones_like(t), direction], -1), np.concatenate([np.ones_like(t), -direction], -1)
    dual = np.where(inside, v, np.where(outside, 0.0, 0.5 * high * ray))
    primal = np.where(inside, 0.0, np.where(outside, -v, 0.5 * low * back))
    between = np.where(inside, 1.0, np.where(outside, 0.0, high / np.where(norm > 0, 2 * norm, 1.0)))
    spare = np.where(inside, 0.0, np.where(outside, 1.0, low / np.where(norm > 0, 2 * norm, 1.0)))
    first, second = np.where(outside, 0.0, 1.0), np.where(inside, 1.0, 0.0)
    shape = (*t.shape[:-1], v.shape[-1] - 2)
    slope = np.concatenate([first, second, np.broadcast_to(between, shape)], -1)
    rest = np.concatenate([1 - first, 1 - second, np.broadcast_to(spare, shape)], -1)
    return (primal, dual, slope, rest), SecondOrderBasis(direction)


def _split_semidefinite(v: Array, group: Group) -> tuple[Point, Any]:
    values, vectors = np.linalg.eigh(np.nan_to_num(matrix_of(v)))
    high, low = values.clip(min=0), (-values).clip(min=0)
    parts = [triangle_of((vectors * e[..., None, :]) @ vectors.swapaxes(-1, -2)) for e in (low, high)]
    i, j = _triangle(values.shape[-1])[:2]
    both, none = (values[..., i] > 0) & (values[..., j] > 0), (values[..., i] <= 0) & (values[..., j] <= 0)
    larger, smaller = np.maximum(high[..., i], high[..., j]), np.maximum(low[..., i], low[..., j])
    spread = np.where(both | none, 1.0, larger + smaller)
    slope = np.where(both, 1.0, np.where(none, 0.0, larger / spread))
    rest = np.where(both, 0.0, np.where(none, 1.0, smaller / spread))
    return (parts[0], parts[1], slope, rest), SemidefiniteBasis(vectors)


def _split_small(v: Array, group: Group) -> tuple[Point, Any]:
    from convexlearn.solvers import cone_kernels  # on first use: numba

    points = np.ascontiguousarray(-v).reshape(-1, 3)
    s, z, slope, rest = (np.empty_like(points) for _ in range(4))
    E = np.empty((len(points), 3, 3))
    if group.kind == "exp":
        cone_kernels.project_exponential(points, s, z, E, slope, rest)
    else:
        alpha = np.ascontiguousarray(np.broadcast_to(group.alpha, v.shape[:-1])).ravel()
        cone_kernels.project_power(points, alpha, s, z, E, slope, rest)
    s, z, slope, rest = (a.reshape(v.shape) for a in (s, z, slope, rest))
    return (s, z, slope, rest), PlainBasis(E.reshape(*v.shape, 3))


_SPLIT = {
    "soc": _split_second_order,
    "psd": _split_semidefinite,
    "exp": _split_small,
    "power": _split_small,
}


@cache
def _triangle(order: int) -> tuple[Array, Array, Array]:
    """Rows and columns of the lower triangle, column by column, and the scale of its entries."""
    j, i = np.triu_indices(order)
    return i, j, np.where(i == j, 1.0, np.sqrt(2.0))


def matrix_of(triangle: Array) -> Array:
    """Symmetric matrices (..., k, k) of scaled lower triangles (..., k (k + 1) / 2)."""
    order = psd_order(triangle.shape[-1])
    i, j, scale = _triangle(order)
    out = np.empty((*triangle.shape[:-1], order, order))
    out[..., i, j] = out[..., j, i] = triangle / scale
    return out


def triangle_of(matrix: Array) -> Array:
    """Scaled lower triangles (..., k (k + 1) / 2) of symmetric matrices (..., k, k)."""
    i, j, scale = _triangle(matrix.shape[-1])
    return 0.5 * (matrix[..., i, j] + matrix[..., j, i]) * scale


def psd_order(size: int) -> int:
    """Order k of a PSD cone with `size` = k (k + 1) / 2 rows."""
    return int((np.sqrt(8 * size + 1) - 1) / 2 + 0.5)
