"""The optimality conditions of an active set as a sparse linear system, factored once and refined."""

from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import splu

from convexlearn.program.program import Program
from convexlearn.program.reduce import Pair

SHIFT = 1e-7  # of the equilibrated optimality conditions; refinement undoes it
REFINEMENTS = 10
ROUNDING = 1e-15
CONVERGED = 1e-13  # relative residual at which refinement has done its work
KRYLOV = 20  # dimension of the space that is searched where it has not
NOISE = 1e-8  # singular values of the preconditioned system below this come from rounding
CONSISTENT = 1e-9  # relative residual above which a singular system has no solution
PROJECTIONS = 4  # of a probe on the null space
NULL = 1e-3  # entry that remains where rows are dependent


class Kkt:
    """Factor of [P, B'; B, 0] with the active rows B of A, equilibrated and shifted to be quasi-definite.

    A quasi-definite matrix has an LDL' factorization in every symmetric order (Vanderbei 1995), so the
    order serves sparsity alone.
    """

    def __init__(self, program: Program, P: np.ndarray, A: np.ndarray, active: np.ndarray) -> None:
        self.n, self.rows = program.n, np.flatnonzero(active)
        size = self.n + len(self.rows)
        number = np.zeros(program.m, dtype=np.int32)
        number[self.rows] = np.arange(self.n, size, dtype=np.int32)
        off, kept = program.P.rows != program.P.cols, active[program.A.rows]
        row, col = number[program.A.rows[kept]], program.A.cols[kept]
        i = np.concatenate([program.P.rows, program.P.cols[off], row, col])
        j = np.concatenate([program.P.cols, program.P.rows[off], col, row])
        K = sp.csc_array((np.concatenate([P, P[off], A[kept], A[kept]]), (i, j)), shape=(size, size))
        self.scale = _ruiz(K)
        D = sp.diags_array(self.scale, format="csc")
        self.K: Any = sp.csc_array(D @ K @ D)
        symmetric = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}
        self.pivoted, self.lu = False, self._factor(symmetric)

    def _factor(self, options: dict[str, Any]) -> Any:
        shift = np.full(self.K.shape[0], SHIFT)
        shift[self.n :] = -SHIFT
        shifted: Any = sp.csc_array(self.K + sp.diags_array(shift, format="csc"))
        shifted.indices, shifted.indptr = shifted.indices.astype(np.intc), shifted.indptr.astype(np.intc)
        return splu(shifted, **options)

    @property
    def nnz(self) -> int:
        """Stored entries of the factor."""
        return self.lu.nnz

    def solve(self, top: np.ndarray, bottom: np.ndarray) -> Pair:
        """x (n,) and the multipliers (active,) of right-hand sides `top` (n,) and `bottom` (active,).

        Where the system is singular: the solution of least norm, of the part of the right-hand side
        that has one.
        """
        right = self.scale * np.concatenate([top, bottom])
        size = np.abs(right).max(initial=0.0)
        v, rest = self._refined(right)
        if not self.pivoted and not np.abs(rest).max(initial=0.0) <= CONSISTENT * size:
            # rounding can defeat a factorization without pivoting: make one with, which costs fill
            self.pivoted, self.lu = True, self._factor({"permc_spec": "COLAMD"})
            v, rest = self._refined(right)
        if np.abs(rest).max(initial=0.0) > CONVERGED * size:
            v, rest = self._krylov(v, rest)
        for _ in range(3):
            if not np.abs(rest).max(initial=0.0) > CONSISTENT * size:
                break
            # refinement is the proximal point method, so what it leaves is the projection on the null space
            right = right - rest
            v, rest = self._refined(right)
        v = self.scale * v
        return v[: self.n], v[self.n :]

    def dependence(self) -> np.ndarray | None:
        """Multipliers (active,) with B'z = 0 where rows are dependent: a probe's part in the null space."""
        probe = np.random.default_rng(0).uniform(0.5, 1.0, len(self.rows))  # the same at every call
        probe[::3] *= -1
        v = np.concatenate([np.zeros(self.n), probe])
        for _ in range(PROJECTIONS):
            v -= self.K @ self.lu.solve(v)
            v[: self.n] = 0.0
        size = np.abs(v).max(initial=0.0)
        return (self.scale * v)[self.n :] / size if size > NULL else None

    def _refined(self, right: np.ndarray) -> Pair:
        """Solution and remaining residual after iterative refinement."""
        v, rest = np.zeros_like(right), right
        best = np.abs(rest).max(initial=0.0)
        goal = ROUNDING * best
        for _ in range(REFINEMENTS):
            trial = v + self.lu.solve(rest)
            left = right - self.K @ trial
            error = np.abs(left).max(initial=0.0)
            if not error < 0.5 * best:
                # a first step without progress is a right-hand side in the null space
                return (trial, left) if error <= best else (v, rest)
            v, rest, best = trial, left, error
            if best <= goal:
                break
        return v, rest

    def _krylov(self, v: np.ndarray, rest: np.ndarray) -> Pair:
        """Solution and residual after GMRES (Saad, Schultz 1986) preconditioned by the factor, where that helps.

        Nearly dependent rows leave refinement a few slow directions, which a small Krylov space resolves.
        Directions below the noise of rounding are dropped, as they are where the system is singular.
        """
        size = np.linalg.norm(rest)
        basis, images = [rest / size], []
        for _ in range(min(KRYLOV, len(rest))):
            images.append(self.K @ self.lu.solve(basis[-1]))
            new = images[-1].copy()
            for _ in range(2):
                for old in basis:
                    new -= (new @ old) * old
            norm = np.linalg.norm(new)
            if not norm > ROUNDING * np.linalg.norm(images[-1]):
                break
            basis.append(new / norm)
        y = np.linalg.lstsq(np.stack(images, 1), rest, rcond=NOISE)[0]
        step = self.lu.solve(np.stack(basis[: len(images)], 1) @ y)
        left = rest - self.K @ step
        helps = np.abs(left).max() < 0.1 * np.abs(rest).max()
        return (v + step, left) if helps else (v, rest)


def _ruiz(K: sp.csc_array) -> np.ndarray:
    """Symmetric scaling (k,) that brings the largest entries of all columns near 1 (Ruiz, 2001)."""
    scale, size = np.ones(K.shape[1]), np.abs(K.data)
    filled = np.flatnonzero(np.diff(K.indptr))
    columns = np.repeat(np.arange(K.shape[1]), np.diff(K.indptr))
    for _ in range(4):
        if not len(filled):
            break
        largest = np.ones_like(scale)
        entries = size * scale[K.indices] * scale[columns]
        largest[filled] = np.maximum.reduceat(entries, K.indptr[filled])
        scale /= np.sqrt(np.where(largest > 1e-12, largest, 1.0))
    return np.clip(scale, 1e-6, 1e6)
