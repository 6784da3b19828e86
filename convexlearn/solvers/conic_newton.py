"""Newton's method on the optimality conditions of a batch of conic programs, as equations in x and v = z - s.

P x + q + A'z(v) = 0 and A x + s(v) - b = 0, where z(v) and s(v) are the projections of v on K* and -v on K,
so that cones and complementarity hold exactly (Busseti, Moursi, Boyd, Solution refinement at regular
points of conic problems, 2019). The objective is scaled per sample so that z and s are of one size.
"""

from dataclasses import dataclass
from functools import reduce

import numpy as np

from convexlearn.program.program import Program
from convexlearn.program.reduce import Arrays, Pair
from convexlearn.solvers.cones import Array, Projection, split
from convexlearn.solvers.conic_system import Factored, analysis

STEPS = 30
HALVINGS = 6
EXACT = 2e-15  # relative KKT residual at which steps stop


@dataclass(eq=False)
class Point:
    """x (B, n), v (B, m) of the scaled problem, the split of v, the two equations, the relative residual (B,)."""

    x: Array
    v: Array
    split: Projection
    stationarity: Array
    feasibility: Array
    residual: Array


@dataclass(frozen=True, eq=False)
class Conditions:
    """The optimality conditions of a batch; `weight` (B, 1) scales the objective."""

    program: Program
    data: Arrays
    weight: Array

    @classmethod
    def of(cls, program: Program, data: Arrays, point: Pair) -> "Conditions":
        """Scale the objective by the sizes of s and z at a point (x, z)."""
        one = cls(program, data, np.ones((len(point[0]), 1)))
        slack = data[3] - one.products(*point)[2]
        sizes = (1 + np.abs(v).max(1, initial=0.0, keepdims=True) for v in (slack, point[1]))
        return cls(program, data, np.divide(*sizes))

    def products(self, x: Array, z: Array) -> tuple[Array, Array, Array]:
        """P x, A'z, A x with the P of the caller."""
        from convexlearn.solvers import conic_kernels

        out = np.zeros_like(x), np.zeros_like(x), np.zeros_like(z)
        P, A = self.program.P, self.program.A
        conic_kernels.products(P.rows, P.cols, A.rows, A.cols, self.data[0], self.data[2], x, z, *out)
        return out

    def at(self, x: Array, v: Array) -> Point:
        """Evaluate the conditions; residuals are relative to 1 plus the largest term, and inf where not finite."""
        found = split(self.program.cones, v)
        z = found.dual / self.weight
        Px, Az, Ax = self.products(x, z)
        _, q, _, b = self.data
        dual, primal = Px + q + Az, Ax + found.primal - b
        terms = ((dual, (Px, q, Az)), (primal, (Ax, found.primal, b)))
        parts = [_largest(error) / (1 + reduce(np.maximum, map(_largest, sizes))) for error, sizes in terms]
        residual = np.maximum(*parts)
        residual[~(np.isfinite(x).all(1) & np.isfinite(v).all(1) & np.isfinite(residual))] = np.inf
        return Point(x, v, found, self.weight * dual, primal, residual)

    def factored(self, found: Projection) -> Factored:
        """The factored system at a split of v."""
        return analysis(self.program).factored(self.weight * self.data[0], self.data[2], found)

    def step(self, point: Point) -> Pair:
        """The Newton step in (x, v)."""
        dx, dz, _ = self.factored(point.split).solve(-point.stationarity, -point.feasibility)
        return dx, dz + point.feasibility + self.products(dx, dz)[2]

    def select(self, samples: Array) -> "Conditions":
        """The conditions of some samples (indices)."""
        P, q, A, b = (f if len(f) == 1 else f[samples] for f in self.data)
        return Conditions(self.program, (P, q, A, b), self.weight[samples])


def polish(conditions: Conditions, x: Array, v: Array, steps: bool = True) -> tuple[Array, Array, Array]:
    """Damped Newton steps from (x, v) as long as residuals fall: the best x, v and residuals (B,).

    Without `steps` the point is evaluated only.
    """
    point = conditions.at(x, v)
    x, v, residual = point.x.copy(), point.v.copy(), point.residual.copy()
    moving = np.flatnonzero((residual > EXACT) & np.isfinite(residual))
    current = conditions
    if len(moving) < len(x):
        current, point = conditions.select(moving), conditions.select(moving).at(x[moving], v[moving])
    for _ in range(STEPS if steps else 0):
        if not len(moving):
            break
        dx, dv = current.step(point)
        trial = _descend(current, point, dx, dv)
        better = trial.residual < point.residual
        done = moving[better]
        x[done], v[done], residual[done] = trial.x[better], trial.v[better], trial.residual[better]
        # near rounding the residual only wavers
        keep = better & (trial.residual > EXACT) & ((trial.residual < 0.5 * point.residual) | (trial.residual > 1e-12))
        if keep.all():
            point = trial
        else:
            moving, current = moving[keep], current.select(np.flatnonzero(keep))
            point = current.at(trial.x[keep], trial.v[keep])
    return x, v, residual


def _descend(conditions: Conditions, point: Point, dx: Array, dv: Array) -> Point:
    """The full step where it lowers the residual, else the longest of a few halved ones that does."""
    trial = conditions.at(point.x + dx, point.v + dv)
    for k in range(1, HALVINGS + 1):
        worse = np.flatnonzero(~(trial.residual < point.residual))
        if not len(worse):
            break
        size = np.where(np.isin(np.arange(len(dx)), worse), 0.5**k, 0.0)[:, None]
        x, v = (np.where(size > 0, p + size * d, t) for p, d, t in ((point.x, dx, trial.x), (point.v, dv, trial.v)))
        trial = conditions.at(x, v)
    return trial


def _largest(v: Array) -> Array:
    return np.abs(v).max(1, initial=0.0)
