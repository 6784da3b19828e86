"""Large sparse QPs and LPs, one sample at a time: Clarabel near the solution, an active set for the rest.

Clarabel (Goulart and Chen, 2024) runs on the original program until it is close; the optimality
conditions of the active set it suggests are then solved by a sparse LU, and the set is corrected as in the
primal-dual active set method (Hintermueller, Ito, Kunisch 2003). Only KKT residuals of the original program
accept. The adjoint reuses the factor; nothing is ever dense.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import splu

from convexlearn.parallel import cores
from convexlearn.program.program import Program, Status
from convexlearn.program.reduce import Arrays, Pair
from convexlearn.solvers.quadratic.paths import Adjoint, Outcome, gradients, residuals

HAND_OVER = 1e-5  # Clarabel's tolerance at which the active set is tried first
HAND_OVER_LP = 1e-7  # an LP's early active sets are singular
TIGHT = 1e-10  # Clarabel's tolerance where that failed
ROUNDS = 6
WARM_ROUNDS = 4
EXACT = 1e-13  # relative KKT residual at which corrections stop
CERTIFIED = 1e-11  # relative KKT residual that is accepted
SHIFT = 1e-7  # of the equilibrated optimality conditions; refinement undoes it
REFINEMENTS = 10
ROUNDING = 1e-15
CONVERGED = 1e-13  # relative residual at which refinement has done its work
KRYLOV = 20  # dimension of the space that is searched where it has not
NOISE = 1e-8  # singular values of the preconditioned system below this come from rounding
CONSISTENT = 1e-9  # relative residual above which a singular system has no solution
KEPT_ENTRIES = 30_000_000  # of the factors of a batch that wait for the adjoint; others are made again


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


@dataclass(eq=False)
class _Sample:
    """One sample: its data (each (1, k)), and the best point found so far with its active set and factor."""

    program: Program
    data: Arrays
    x: np.ndarray
    z: np.ndarray
    residual: float = np.inf
    claim: int = int(Status.FAILED)
    iterations: int = 0
    active: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    kkt: Kkt | None = None

    def error(self, x: np.ndarray, z: np.ndarray) -> float:
        """Relative KKT residual."""
        return float(residuals(self.program, self.data, (x[None], z[None]), 1)[0])

    def keep(self, x: np.ndarray, z: np.ndarray, active: np.ndarray, kkt: Kkt | None) -> bool:
        """Take over a point that is better than the last one; True if it was."""
        error = self.error(x, z)
        if not error < self.residual:
            return False
        self.x, self.z, self.residual, self.active, self.kkt = x, z, error, active, kkt
        return True

    def guess(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Rows (m,) whose multiplier is larger than their slack, both relative to the data's sizes."""
        program, (_, q, A, b) = self.program, self.data
        norm = np.sqrt(np.bincount(program.A.rows, A[0] ** 2, minlength=program.m))
        slack = b[0] - self.constraints() @ x
        size_x, size_z = 1 + np.abs(x).max(initial=0.0), 1 + np.abs(q).max(initial=0.0)
        active = z * norm**2 * size_x > slack * size_z
        active[: program.cones.zero] = True
        return active & (norm > 0)

    def constraints(self) -> sp.csc_array:
        """A (m, n)."""
        return self.program.A.matrix(self.data[2][0])

    def polish(self, x: np.ndarray, z: np.ndarray, rounds: int) -> None:
        """Solve on the active set that (x, z) suggest, correct it, and keep the best point."""
        program, (P, q, A, b) = self.program, self.data
        upper, C, zero = program.P.matrix(P[0]), self.constraints(), program.cones.zero
        active, start = self.guess(x, z), (x, z)
        for _ in range(rounds):
            kkt = Kkt(program, P[0], A[0], active)
            x, z = start[0], np.where(active, start[1], 0.0)
            for _ in range(2):  # the second step removes what rounding left of the first
                Px = upper @ x + upper.T @ x - upper.diagonal() * x
                dx, dz = kkt.solve(-(Px + q[0] + C.T @ z), (b[0] - C @ x)[active])
                x, z = x + dx, z.copy()
                z[active] += dz
                admissible = z.copy()
                admissible[zero:] = admissible[zero:].clip(min=0)
                if not self.keep(x, admissible, active, kkt):
                    break
            slack = b[0] - C @ x
            if self.residual <= EXACT or not np.isfinite(x).all():
                break
            active, last = self.corrected(active, x, z, slack), active
            if (active == last).all():
                break

    def corrected(self, active: np.ndarray, x: np.ndarray, z: np.ndarray, slack: np.ndarray) -> np.ndarray:
        """The next active set (m,): without rows of negative multiplier, with violated rows."""
        zero = self.program.cones.zero
        tiny_x, tiny_z = (EXACT * (1 + np.abs(v).max(initial=0.0)) for v in (x, z))
        found = np.where(active, z > -tiny_z, slack < -tiny_x)
        if self.program.P.nnz:
            # too many rows for the variables they hold: the slack ones among them can't be active
            found &= ~active | (slack < CONSISTENT * (1 + np.abs(x).max(initial=0.0)))
        found[:zero] = active[:zero]
        return found


@dataclass(frozen=True)
class Limits:
    """tolerance of the interior point, its max_iterations, and the clock's reading at which to stop."""

    tolerance: float = TIGHT
    max_iterations: int | None = None
    deadline: float = np.inf

    @property
    def set(self) -> bool:
        """True where the caller limits the work."""
        return self.max_iterations is not None or self.deadline < np.inf


def _run(sample: _Sample, warm: Pair | None, limits: Limits) -> _Sample:
    """Try the warm start's active set, then Clarabel loosely, then tightly, each with a polish."""
    program = sample.program
    if not all(np.isfinite(f).all() for f in sample.data):
        return sample
    if warm is not None and all(np.isfinite(v).all() for v in warm) and time.monotonic() < limits.deadline:
        sample.polish(*warm, WARM_ROUNDS)
        if sample.residual <= CERTIFIED:
            sample.claim = int(Status.SOLVED)
            return sample
    hand_over = HAND_OVER if program.P.nnz else HAND_OVER_LP
    tight = min(limits.tolerance, TIGHT)
    for tolerance in (tight,) if limits.max_iterations is not None else (max(hand_over, tight), tight):
        found, status = _clarabel(sample, tolerance, limits)
        sample.claim, sample.iterations = status, sample.iterations + found.iterations
        x, z = np.array(found.x), np.array(found.z)
        if status in (Status.INFEASIBLE, Status.UNBOUNDED):
            sample.x, sample.z, sample.residual = x, z, np.inf
            return sample
        sample.keep(x, z, sample.guess(x, z), None)
        if status == Status.FAILED and limits.set:  # the caller's limit: the iterate as it is
            if not np.isfinite(sample.residual):
                sample.x, sample.z = x, z
            return sample
        if np.isfinite(x).all() and np.isfinite(z).all():
            sample.polish(x, z, ROUNDS)
        if sample.residual <= CERTIFIED:
            break
    return sample


def _clarabel(sample: _Sample, tolerance: float, limits: Limits) -> tuple[Any, int]:
    """Clarabel's solution object, and what it claims as a Status."""
    import clarabel  # on first use: importing convexlearn does not pay for it

    program, (P, q, A, b) = sample.program, sample.data
    settings = clarabel.DefaultSettings()
    settings.verbose, settings.max_threads, settings.presolve_enable = False, 1, False
    settings.tol_feas = settings.tol_gap_abs = settings.tol_gap_rel = tolerance
    settings.tol_infeas_abs = settings.tol_infeas_rel = min(1e-9, tolerance)
    if limits.max_iterations is not None:
        settings.max_iter = limits.max_iterations
    if limits.deadline < np.inf:
        settings.time_limit = max(limits.deadline - time.monotonic(), 1e-9)
    cones = [clarabel.ZeroConeT(program.cones.zero), clarabel.NonnegativeConeT(program.cones.nonneg)]
    cones = [c for c, k in zip(cones, (program.cones.zero, program.cones.nonneg)) if k]
    matrices = program.P.matrix(P[0]), program.A.matrix(A[0])
    found = clarabel.DefaultSolver(matrices[0], q[0], matrices[1], b[0], cones, settings).solve()
    claims = {
        "Solved": Status.SOLVED,
        "AlmostSolved": Status.INACCURATE,
        "PrimalInfeasible": Status.INFEASIBLE,
        "AlmostPrimalInfeasible": Status.INFEASIBLE,
        "DualInfeasible": Status.UNBOUNDED,
        "AlmostDualInfeasible": Status.UNBOUNDED,
    }
    return found, int(claims.get(str(found.status).rpartition(".")[2], Status.FAILED))


@dataclass(frozen=True, eq=False)
class SparsePart:
    """Samples of the sparse path: active rows (B, m), and the factors that were kept."""

    program: Program
    active: np.ndarray
    factors: list[Kkt | None]

    def adjoint(self, data: Arrays, solution: Pair, upstream: Pair, threads: int | None) -> Adjoint:
        """One solve per sample with the symmetric conditions of its active set."""
        dx, dz = upstream
        vx, vz = np.zeros_like(dx), np.zeros_like(dz)

        def task(k: int) -> None:
            if not (dx[k].any() or dz[k].any()):
                return
            kkt = self.factors[k]
            if kkt is None:
                P, _, A, _ = _row(data, k)
                kkt = Kkt(self.program, P[0], A[0], self.active[k])
            vx[k], vz[k, kkt.rows] = kkt.solve(dx[k], dz[k, kkt.rows])

        _each(task, len(dx), threads)
        return gradients(self.program, data, solution, upstream, (vx, vz), threads=threads)


def solve(
    program: Program, data: Arrays, batch: int, warm: Pair | None, limits: Limits, threads: int | None
) -> Outcome:
    """Solve every sample; `warm` is a solution (x (B, n), z (B, m)) whose active sets are tried first."""
    samples: list[Any] = [None] * batch
    factors: list[Kkt | None] = [None] * batch

    def task(k: int) -> None:
        start = None if warm is None else (warm[0][k], warm[1][k])
        empty = np.full(program.n, np.nan), np.full(program.m, np.nan), np.inf
        sample = _Sample(program, _row(data, k), *empty)
        sample.active = np.arange(program.m) < program.cones.zero
        samples[k] = _run(sample, start, limits)
        kkt, sample.kkt = sample.kkt, None
        if kkt is not None and kkt.nnz * batch <= KEPT_ENTRIES:
            factors[k] = kkt

    _each(task, batch, threads)
    x, z, active = (np.stack([getattr(s, name) for s in samples]) for name in ("x", "z", "active"))
    residual = np.array([s.residual for s in samples])
    claim, iterations = (np.array([getattr(s, name) for s in samples], np.int64) for name in ("claim", "iterations"))
    return Outcome(x, z, residual, claim, iterations, SparsePart(program, active, factors))


def _row(data: Arrays, k: int) -> Arrays:
    """The values of sample k, each (1, .)."""
    P, q, A, b = (f if len(f) == 1 else f[k : k + 1] for f in data)
    return P, q, A, b


def _each(task: Callable[[int], None], batch: int, threads: int | None) -> None:
    """Call task(k) for every sample; Clarabel and SuperLU release the interpreter's lock."""
    workers = min(cores() if threads is None else threads, batch)
    if workers <= 1:
        for k in range(batch):
            task(k)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="convexlearn") as pool:
        list(pool.map(task, range(batch)))
