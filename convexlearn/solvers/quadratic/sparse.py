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

from convexlearn.parallel import cores
from convexlearn.program.program import Program, Status
from convexlearn.program.reduce import Arrays, Pair
from convexlearn.solvers.quadratic.paths import Adjoint, Outcome, gradients, residuals
from convexlearn.solvers.quadratic.sparse_kkt import CONSISTENT, Kkt

HAND_OVER = 1e-5  # Clarabel's tolerance at which the active set is tried first
HAND_OVER_LP = 1e-7  # an LP's early active sets are singular
TIGHT = 1e-10  # Clarabel's tolerance where that failed
ROUNDS = 6
WARM_ROUNDS = 4
EXACT = 1e-13  # relative KKT residual at which corrections stop
CERTIFIED = 1e-11  # relative KKT residual that is accepted
INVOLVED = 1e-6  # smallest entry that counts of a direction of entries up to 1
DROPS = 30  # dependent rows that are let go at most
SPARED = 1_000_000  # entries of a factor from which none are, since each costs a factorization
KEPT_ENTRIES = 30_000_000  # of the factors of a batch that wait for the adjoint; others are made again


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
        with np.errstate(over="ignore"):  # a point that diverged
            active = z * norm**2 * size_x > slack * size_z
        active[: program.cones.zero] = True
        return active & (norm > 0)

    def constraints(self) -> sp.csc_array:
        """A (m, n)."""
        return self.program.A.matrix(self.data[2][0])

    def polish(self, x: np.ndarray, z: np.ndarray, rounds: int) -> None:
        """Solve on the active set that (x, z) suggest, correct it, and keep the best point."""
        program, (P, _, A, b) = self.program, self.data
        C, zero = self.constraints(), program.cones.zero
        active, start = self.guess(x, z), (x, z)
        for _ in range(rounds):
            kkt = Kkt(program, P[0], A[0], active)
            x, z = start[0], np.where(active, start[1], 0.0)
            for _ in range(2):  # the second step removes what rounding left of the first
                x, z = self.newton(kkt, x, z)
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

    def newton(self, kkt: Kkt, x: np.ndarray, z: np.ndarray) -> Pair:
        """x and z after one step with the conditions of an active set."""
        P, q, _, b = self.data
        upper, C = self.program.P.matrix(P[0]), self.constraints()
        Px = upper @ x + upper.T @ x - upper.diagonal() * x
        dx, dz = kkt.solve(-(Px + q[0] + C.T @ z), (b[0] - C @ x)[kkt.rows])
        z = z.copy()
        z[kkt.rows] += dz
        return x + dx, z

    def let_go(self) -> None:
        """Drop inequality rows that depend on other active rows, one after the other, as basis.py does."""
        zero, (P, _, A, _) = self.program.cones.zero, self.data
        for _ in range(DROPS):
            along = None if self.kkt is None or self.residual > CERTIFIED else self.kkt.dependence()
            if self.kkt is None or along is None or self.kkt.nnz > SPARED:
                return
            rows = self.kkt.rows
            involved = (rows >= zero) & (np.abs(along) > INVOLVED * self.kkt.scale[self.program.n :])
            if not involved.any():
                return
            slope = np.where(involved, along, 0.0)
            with np.errstate(divide="ignore"):
                reach = np.where(involved, self.z[rows], np.inf) / np.abs(slope)
            sense = 1.0 if reach[slope < 0].min(initial=np.inf) <= reach[slope > 0].min(initial=np.inf) else -1.0
            first = int(np.argmin(np.where(sense * slope < 0, reach, np.inf)))
            z, active = self.z.copy(), self.active.copy()
            z[rows] += sense * reach[first] * along
            active[rows[first]], z[rows[first]] = False, 0.0
            kkt = Kkt(self.program, P[0], A[0], active)
            x, z = self.newton(kkt, self.x, z)
            z[zero:] = z[zero:].clip(min=0)
            error = self.error(x, z)
            if not error <= CERTIFIED:
                return
            self.x, self.z, self.residual, self.active, self.kkt = x, z, error, active, kkt

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
            sample.let_go()
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
    sample.let_go()
    return sample


def _clarabel(sample: _Sample, tolerance: float, limits: Limits) -> tuple[Any, int]:
    """Clarabel's solution object, and what it claims as a Status."""
    import clarabel  # on first use: importing convexlearn does not pay for it

    program, (P, q, A, b) = sample.program, sample.data
    settings = clarabel.DefaultSettings()
    settings.verbose, settings.max_threads, settings.presolve_enable = False, 1, False
    settings.tol_feas = settings.tol_gap_abs = settings.tol_gap_rel = tolerance
    settings.tol_infeas_abs = settings.tol_infeas_rel = min(1e-9, tolerance)
    # a loose iterate only has to show its active set: refining each of its steps costs up to half the time
    settings.iterative_refinement_enable = tolerance <= TIGHT
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
