"""General cones: Clarabel until it is close, Newton steps to the solution, an adjoint by the same linear system."""

import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convexlearn.parallel import cores, run
from convexlearn.program.program import CPU, Cones, Program, ProgramData, Solution, Status, as_array
from convexlearn.program.reduce import Arrays, Pair
from convexlearn.solvers.base import Named, Options, status_from_residual, warn_adjoint
from convexlearn.solvers.cones import Array, groups, project, project_dual, psd_order, split
from convexlearn.solvers.conic_newton import Conditions, polish
from convexlearn.solvers.quadratic.paths import gradients, select

HAND_OVER = 1e-6  # Clarabel's tolerance at which Newton's method is tried first
TIGHT = 1e-10  # its tolerance where that failed
CERTIFIED = 1e-11  # relative KKT residual that ends the search
CERTIFICATE_TOLERANCE = 1e-7
CLAIMS = {
    "Solved": Status.SOLVED,
    "AlmostSolved": Status.INACCURATE,
    "PrimalInfeasible": Status.INFEASIBLE,
    "AlmostPrimalInfeasible": Status.INFEASIBLE,
    "DualInfeasible": Status.UNBOUNDED,
    "AlmostDualInfeasible": Status.UNBOUNDED,
}


@dataclass(frozen=True)
class ConicOptions(Options):
    """Options of the conic solver. threads: None means the cores this process may use; results don't depend on it."""

    threads: int | None = None


@dataclass(frozen=True, eq=False)
class _State:
    """What the adjoint needs: v (B, m) and the weights of the objective (B, 1)."""

    v: Array
    weight: Array
    threads: int | None


class Conic(Named):
    """Second-order, exponential, power and PSD cones with a quadratic objective.

    Clarabel (Goulart and Chen, 2024) solves to moderate accuracy; damped Newton steps on the optimality
    conditions make primal and dual exact. The adjoint is one refined solve with the same symmetric
    system. At degenerate solutions it is that of one element of the generalized derivative, always
    finite. Rotated rows of large second-order and PSD cones are dense: memory grows with their size
    times the number of variables they hold.
    """

    name: ClassVar[str] = "conic"
    options: ClassVar[type[Options]] = ConicOptions
    native_objective: ClassVar[bool] = True
    takes_arrays: ClassVar[bool] = True

    def supports(self, program: Program) -> str | None:
        """Every cone of a Program, at least one row."""
        return None if program.m else "it needs at least one constraint"

    def solve(self, program: Program, data: ProgramData, options: Options, warm: Solution | None = None) -> Solution:
        """Solve every sample; `warm` is tried as the start of Newton's method before Clarabel runs."""
        settings = options if isinstance(options, ConicOptions) else ConicOptions(**vars(options))
        start = None if warm is None or warm.arrays[0].shape != (data.batch, program.n) else warm.arrays
        call = _Call(program, data.arrays, data.batch, settings)
        call.run(start)
        found = (call.x, call.z, call.status, call.iterations, call.residual)
        if data.device != CPU:
            found = tuple(torch.from_numpy(v).to(data.device) for v in found)
        return Solution(program, data, *found, private=_State(call.v, call.weight, settings.threads))

    def adjoint(self, solution: Solution, dx: Tensor | Array, dz: Tensor | Array) -> ProgramData:
        """Gradients of the data by one refined solve per sample; an AdjointWarning where it misses its tolerance."""
        program, data, state = solution.program, solution.data.arrays, solution.private
        ok = as_array(solution.ok)[:, None]
        x, z, up_x, up_z = (np.where(ok, v, 0.0) for v in (*solution.arrays, as_array(dx), as_array(dz)))
        vx, vz, residual = np.zeros_like(x), np.zeros_like(z), np.zeros(len(x))

        def task(first: int, last: int, _: int) -> None:
            part = np.arange(first, last)[ok[first:last, 0]]
            part = part[(up_x[part] != 0).any(1) | (up_z[part] != 0).any(1)]
            if len(part):
                weight = state.weight[part]
                conditions = Conditions(program, select(data, part), weight)
                factored = conditions.factored(split(program.cones, state.v[part]))
                wx, vz[part], residual[part] = factored.solve(up_x[part], up_z[part] / weight)
                vx[part] = weight * wx

        run(task, len(x), state.threads)
        sums, stationarity = gradients(program, data, (x, z), (up_x, up_z), (vx, vz), threads=state.threads)
        warn_adjoint(np.maximum(residual, stationarity))
        fields = [g.sum(0, keepdims=True) if len(f) == 1 != len(g) else g for f, g in zip(data, sums)]
        if solution.data.device != CPU:
            fields = [torch.from_numpy(g).to(solution.data.device) for g in fields]
        return ProgramData(*fields, batch=solution.data.batch)


@dataclass(eq=False)
class _Call:
    """One call of `solve`: the best points so far, filled in by Newton's method and by Clarabel."""

    program: Program
    data: Arrays
    batch: int
    options: ConicOptions

    def __post_init__(self) -> None:
        n, m, batch = self.program.n, self.program.m, self.batch
        self.x, self.z, self.v = (np.full((batch, k), np.nan) for k in (n, m, m))
        self.weight, self.residual = np.ones((batch, 1)), np.full(batch, np.inf)
        self.status, self.iterations = np.full(batch, int(Status.FAILED)), np.zeros(batch, dtype=np.int64)
        limit = self.options.time_limit
        self.deadline = np.inf if limit is None else time.monotonic() + limit
        self.limited = limit is not None or self.options.max_iterations is not None

    def run(self, start: Pair | None) -> None:
        """Newton from the start, then from Clarabel's loose and tight solutions, as long as samples are open."""
        finite = np.ones(self.batch, dtype=bool)
        for field in self.data:
            finite &= np.isfinite(field).all(1)
        open_ = np.flatnonzero(finite)
        if start is not None:
            good = open_[np.isfinite(start[0][open_]).all(1) & np.isfinite(start[1][open_]).all(1)]
            self.improve(good, start[0][good], start[1][good])
        tight = min(self.options.tolerance, TIGHT)
        for tolerance in (tight,) if self.options.max_iterations is not None else (max(HAND_OVER, tight), tight):
            open_ = open_[(self.residual[open_] > CERTIFIED) & (self.status[open_] == Status.FAILED)]
            if len(open_):
                self.interior_point(open_, tolerance)
        undecided = self.status == Status.FAILED
        self.status[undecided] = status_from_residual(torch.from_numpy(self.residual[undecided])).numpy()

    def interior_point(self, rows: Array, tolerance: float) -> None:
        """Clarabel on some samples, their claims of infeasibility verified, the other points improved."""
        x, z = np.empty((len(rows), self.program.n)), np.empty((len(rows), self.program.m))
        claims, form = np.empty(len(rows), dtype=np.int64), _form(self.program)

        def task(k: int) -> None:
            P, q, A, b = (f[rows[k] if len(f) > 1 else 0] for f in self.data)
            found = form.solve((P, q, A, b), self.settings(tolerance))
            x[k], z[k] = found.x, np.asarray(found.z)[form.place]
            claims[k] = CLAIMS.get(str(found.status).rpartition(".")[2], Status.FAILED)
            self.iterations[rows[k]] += found.iterations

        _each(task, len(rows), self.options.threads)
        rays = (claims == Status.INFEASIBLE) | (claims == Status.UNBOUNDED)
        if rays.any():
            x[rays], z[rays], claims[rays] = self.certified(rows[rays], claims[rays], x[rays], z[rays])
            taken = rows[rays]
            self.x[taken], self.z[taken], self.status[taken] = x[rays], z[rays], claims[rays]
        rest = ~rays & np.isfinite(x).all(1) & np.isfinite(z).all(1)
        stopped = rest & (claims == Status.FAILED) & self.limited
        self.improve(rows[rest], x[rest], z[rest], steps=not stopped.any())

    def certified(self, rows: Array, claims: Array, x: Array, z: Array) -> tuple[Array, Array, Array]:
        """Claims of infeasibility or unboundedness that the conditions of a certificate confirm, else FAILED."""
        conditions = Conditions(self.program, select(self.data, rows), np.ones((len(rows), 1)))
        zero = self.program.cones
        _, q, _, b = conditions.data
        z = np.where((claims == Status.INFEASIBLE)[:, None], project_dual(zero, z), z)
        Px, Az, Ax = conditions.products(x, z)
        farkas, descent = -(b * z).sum(1), -(q * x).sum(1)
        gap = np.abs(Ax + project(zero, -Ax)).max(1, initial=0.0)
        ray = np.maximum(np.abs(Px).max(1, initial=0.0), gap)
        infeasible = (farkas > 0) & (np.abs(Az).max(1, initial=0.0) <= CERTIFICATE_TOLERANCE * farkas)
        unbounded = (descent > 0) & (ray <= CERTIFICATE_TOLERANCE * descent)
        confirmed = np.where(claims == Status.INFEASIBLE, infeasible, unbounded)
        return x, z, np.where(confirmed, claims, int(Status.FAILED))

    def improve(self, rows: Array, x: Array, z: Array, steps: bool = True) -> None:
        """Newton's method from points (x, z) of some samples; what is better than the best so far is kept."""

        def task(first: int, last: int, _: int) -> None:
            part = rows[first:last]
            point = x[first:last], z[first:last]
            conditions = Conditions.of(self.program, select(self.data, part), point)
            slack = conditions.data[3] - conditions.products(*point)[2]
            v = conditions.weight * point[1] - slack
            found = polish(conditions, point[0], v, steps)
            better = found[2] < self.residual[part]
            kept = part[better]
            self.x[kept], self.v[kept], self.residual[kept] = (f[better] for f in found)
            self.weight[kept] = conditions.weight[better]
            self.z[kept] = split(self.program.cones, found[1][better]).dual / conditions.weight[better]

        if len(rows):
            run(task, len(rows), self.options.threads)

    def settings(self, tolerance: float) -> Any:
        """Clarabel's settings for one sample."""
        import clarabel  # on first use: importing convexlearn does not pay for it

        settings = clarabel.DefaultSettings()
        settings.verbose, settings.max_threads, settings.presolve_enable = self.options.verbose, 1, False
        settings.tol_feas = settings.tol_gap_abs = settings.tol_gap_rel = tolerance
        settings.tol_infeas_abs = settings.tol_infeas_rel = 1e-9
        if self.options.max_iterations is not None:
            settings.max_iter = self.options.max_iterations
        if self.deadline < np.inf:
            settings.time_limit = max(self.deadline - time.monotonic(), 1e-9)
        return settings


@dataclass(frozen=True, eq=False)
class _Form:
    """A program as Clarabel orders it: row k of A is its row place[k]; `entries` permutes the entries of A."""

    program: Program
    place: Array
    entries: Array
    indices: Array
    cones: list[Any]

    def solve(self, values: Arrays, settings: Any) -> Any:
        """Clarabel's solution object for the values of one sample."""
        import clarabel

        program, (P, q, A, b) = self.program, values
        right = np.empty_like(b)
        right[self.place] = b
        matrix = sp.csc_array((A[self.entries], self.indices, program.A.indptr), shape=program.A.shape)
        return clarabel.DefaultSolver(program.P.matrix(P), q, matrix, right, self.cones, settings).solve()


_forms: "weakref.WeakKeyDictionary[Program, _Form]" = weakref.WeakKeyDictionary()


def _form(program: Program) -> _Form:
    """Clarabel stores the upper triangle of a PSD matrix column by column, a Program its lower triangle."""
    if program not in _forms:
        place = np.arange(program.m)
        for group in groups(program.cones)[1]:
            if group.kind == "psd":
                j, i = np.triu_indices(psd_order(group.rows.shape[1]))
                inside = np.empty(len(i), dtype=np.int64)
                inside[np.lexsort((j, i))] = np.arange(len(i))
                place[group.rows] = group.rows[:, :1] + inside
        rows = place[program.A.rows]
        entries = np.lexsort((rows, program.A.cols))
        _forms[program] = _Form(program, place, entries, rows[entries].astype(np.int32), _cones(program.cones))
    return _forms[program]


def _cones(cones: Cones) -> list[Any]:
    import clarabel

    found = [clarabel.ZeroConeT(cones.zero)] if cones.zero else []
    found += [clarabel.NonnegativeConeT(cones.nonneg)] if cones.nonneg else []
    found += [clarabel.SecondOrderConeT(k) for k in cones.soc] + [clarabel.PSDTriangleConeT(k) for k in cones.psd]
    found += [clarabel.ExponentialConeT() for _ in range(cones.exp)]
    return found + [clarabel.PowerConeT(a) for a in cones.power]


def _each(task: Callable[[int], None], batch: int, threads: int | None) -> None:
    """Call task(k) for every sample; Clarabel releases the interpreter's lock."""
    workers = min(cores() if threads is None else threads, batch)
    if workers <= 1:
        for k in range(batch):
            task(k)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="convexlearn") as pool:
        list(pool.map(task, range(batch)))
