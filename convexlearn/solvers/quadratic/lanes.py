"""Batches of box QPs by the sparse interior point in SIMD lanes: the numpy interface.

    minimize 1/2 x'Px + q'x + w'|x|  subject to  Ax = b, Gx <= h, l <= x <= u        (BoxProgram)
    Lagrangian: ... + y'(Ax - b) + z'(Gx - h) + lower'(l - x) + upper'(x - u),  z, lower, upper >= 0
    stationarity: Px + q + v + A'y + G'z - lower + upper = 0,  v in w * subdifferential of |x|

    symbolic = analyse(box)                                     # once per BoxProgram; keep it
    data = BoxData(P, q, w, A, b, G, h, l, u)                   # each (B, k) or (1, k), float64, C-contiguous
    result = solve(symbolic, data, batch)                       # LanesResult, numpy arrays
    gradients = adjoint(result, gx, gy, gz, glower, gupper, gsubgradient)   # BoxData of gradients

`solve` keywords: tolerance=1e-10 (relative KKT residual of the interior point), max_iterations=None,
smoothing=0.0 (a mu > 0 returns the central path's point s_i z_i = mu, unpolished, and its derivative),
warm=None (a LanesResult of the same symbolic and batch, or Warm: x, duals and active set to try
first), threads=None (default: the cores this process may use; results don't depend on it),
deadline=inf (reading of time.monotonic() from which no further block of samples is started; those
samples are FAILED at x = 0).

Infinite entries of l, u, h mean "no constraint"; l = u fixes a variable; w <= 0 counts as 0. Empty
fields are (1, 0) or (B, 0). `adjoint` takes None for an upstream gradient that is zero; rows of
samples that are not SOLVED or INACCURATE contribute zero; a shared field (leading dimension 1) gets
the sum over the batch with leading dimension 1.

LanesResult: x (B, n), y (B, rows of A), z (B, rows of G), lower (B, len(box.lower)),
upper (B, len(box.upper)), subgradient v (B, len(box.absolute)), status (B,) int64 values of Status,
iterations (B,) int64, residual (B,) relative KKT residual in the caller's units, polished (B,) bool:
the active set was certified, so x and the duals are exact up to rounding. status INFEASIBLE: y, z, lower,
upper hold the Farkas certificate A'y + G'z - lower + upper = 0, b'y + h'z - l'lower + u'upper = -1.
UNBOUNDED: x holds the ray Px = 0, Ax = 0, Gx <= 0, x >= 0 (<= 0) where bounded below (above),
q'x + w'|x| = -1. FAILED: the last iterate.
"""

import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from convexlearn import parallel
from convexlearn.program.program import INACCURATE_RESIDUAL, SOLVED_RESIDUAL, Status
from convexlearn.program.reduce import BoxProgram
from convexlearn.solvers.quadratic import layout
from convexlearn.solvers.quadratic.symbolic import symbolic
from convexlearn.solvers.quadratic.undecided import decide

LANES = 8
LARGE_FACTOR = 10_000  # entries of L from which a few samples are solved in fewer lanes
CHUNKS = 16  # of lane blocks; fixed, so that sums over the batch don't depend on the number of threads
REGULARIZATION = 1e-7
HAND_OVER = 5e-4  # KKT residual at which the polish is tried first
HAND_OVER_LP = 1e-6  # an LP's early active sets are singular
POLISH_ROUNDS = 5
ITERATION_LIMIT = 100
PENALTY_TOLERANCE = 1e-13


class BoxData(NamedTuple):
    """Values (or gradients) of a BoxProgram's fields for a batch, each (B, k) or (1, k) float64."""

    P: np.ndarray
    q: np.ndarray
    w: np.ndarray
    A: np.ndarray
    b: np.ndarray
    G: np.ndarray
    h: np.ndarray
    l: np.ndarray
    u: np.ndarray


@dataclass(frozen=True, eq=False)
class Symbolic:
    """Everything about a BoxProgram that doesn't depend on values."""

    box: BoxProgram
    layout: layout.Layout
    lengths: tuple[int, ...]
    ends: tuple[int, ...]  # ends of x, y, z, lower, upper, v in a solution row


@dataclass(frozen=True, eq=False)
class Warm:
    """A point to try first: solutions (B, x y z lower upper v side by side) and active pairs (B, pairs)."""

    solution: np.ndarray
    active: np.ndarray


@dataclass(frozen=True, eq=False)
class LanesResult:
    """Solutions of a batch; `solution` holds x, y, z, lower, upper, v side by side (B, sum of lengths)."""

    symbolic: Symbolic
    data: BoxData
    batch: int
    solution: np.ndarray
    active: np.ndarray
    status: np.ndarray
    iterations: np.ndarray
    residual: np.ndarray
    polished: np.ndarray
    private: Any = field(default=None, repr=False)

    def _part(self, k: int) -> np.ndarray:
        ends = self.symbolic.ends
        return self.solution[:, ends[k] : ends[k + 1]]

    x = property(lambda self: self._part(0))
    y = property(lambda self: self._part(1))
    z = property(lambda self: self._part(2))
    lower = property(lambda self: self._part(3))
    upper = property(lambda self: self._part(4))
    subgradient = property(lambda self: self._part(5))


def analyse(box: BoxProgram) -> Symbolic:
    """Order and analyse the KKT matrix of a BoxProgram; the result serves every batch."""
    rows, inequalities = box.A.shape[0], box.G.shape[0]
    lower, upper, absolute = len(box.lower), len(box.upper), len(box.absolute)
    lengths = (box.P.nnz, box.n, absolute, box.A.nnz, rows, box.G.nnz, inequalities, lower, upper)
    ends = np.cumsum([0, box.n, rows, inequalities, lower, upper, absolute])
    return Symbolic(box, symbolic(box), lengths, tuple(int(e) for e in ends))


def solve(
    symbolic: Symbolic,
    data: BoxData,
    batch: int,
    *,
    tolerance: float = 1e-10,
    max_iterations: int | None = None,
    smoothing: float = 0.0,
    warm: LanesResult | Warm | None = None,
    threads: int | None = None,
    deadline: float = np.inf,
) -> LanesResult:
    """Solve a batch; see the module's docstring."""
    fields, shared = _checked(symbolic, data, batch)
    limit = ITERATION_LIMIT if max_iterations is None else max_iterations
    hand_over = max(HAND_OVER if symbolic.box.P.nnz else HAND_OVER_LP, tolerance)
    tried = float(smoothing == 0 and (warm is not None or symbolic.layout.offset["N_PAIR"] == 0))
    options = np.array([tolerance, limit, smoothing, REGULARIZATION, hand_over, tried, POLISH_ROUNDS, 0.0, 0.0])
    run = _Run(symbolic, fields, shared, _plan(symbolic, batch, threads), options)
    solution, active, info, state = run.forward(batch, warm, deadline)
    status = _status(info)
    if max_iterations is None and smoothing == 0 and deadline == np.inf and Status.FAILED in status:
        undecided = np.flatnonzero(status == Status.FAILED)
        found, rows = decide(symbolic.box, data, undecided, _penalized(symbolic, threads))
        certified = found != Status.FAILED
        status[undecided[certified]] = found[certified]
        solution[undecided[certified]] = rows[certified]
    polished = (info[:, 3] > 0.5) & (status <= Status.INACCURATE)
    iterations = info[:, 1].astype(np.int64)
    return LanesResult(
        symbolic, data, batch, solution, active, status, iterations, info[:, 2].copy(), polished, (run, state)
    )


class _Run(NamedTuple):
    """The arguments that forward and adjoint kernels share."""

    symbolic: Symbolic
    fields: tuple[np.ndarray, ...]
    shared: int
    plan: "_Plan"
    options: np.ndarray

    def forward(
        self, batch: int, warm: LanesResult | Warm | None = None, deadline: float = np.inf
    ) -> tuple[np.ndarray, ...]:
        """Solutions (B, lengths), active pairs (B, pairs), reports (B, 4) and the state of the blocks."""
        pairs, plan, header = self.symbolic.layout.offset["N_PAIR"], self.plan, self.symbolic.layout.header
        solution, active = np.empty((batch, self.symbolic.ends[-1])), np.empty((batch, pairs))
        info, state = np.empty((batch, 4)), np.empty(plan.blocks * self.symbolic.layout.state * plan.lanes)
        point, guess = _EMPTY, _EMPTY
        if warm is not None:
            if warm.solution.shape != solution.shape or warm.active.shape != active.shape:
                raise ValueError(f"warm start of shape {warm.solution.shape}, expected {solution.shape}")
            point, guess = np.nan_to_num(warm.solution).ravel(), warm.active.ravel()
        elif self.options[layout.WARM]:
            point, guess = np.zeros(solution.size), np.zeros(active.size)
        kernel, w = _kernels().solve_range, (0,) * plan.lanes
        out, found, report = solution.reshape(-1), active.reshape(-1), info.reshape(-1)
        _, fields, shared, _, options = self

        if deadline < np.inf:  # what is not started must not hold arbitrary numbers
            for v in (solution, active, state):
                v.fill(0.0)
            info[:] = (0.0, 0.0, np.inf, 0.0)

        def run(first: int, last: int, _: int) -> None:
            if time.monotonic() > deadline:
                return
            kernel(w, header, fields, shared, plan.order, first, last, options, point, guess, out, report, found, state)

        _in_threads(run, plan)
        return solution, active, info, state


def _penalized(symbolic: Symbolic, threads: int | None) -> Any:
    """A function that solves with quadratic penalties on x or on (y, z), interior point only."""

    def run(data: BoxData, batch: int, penalty_x: float, penalty_y: float) -> np.ndarray:
        fields, shared = _checked(symbolic, data, batch)
        options = [PENALTY_TOLERANCE, ITERATION_LIMIT, 0.0, REGULARIZATION, 0.0, 0.0, 0.0, penalty_x, penalty_y]
        return _Run(symbolic, fields, shared, _plan(symbolic, batch, threads), np.array(options)).forward(batch)[0]

    return run


def adjoint(
    result: LanesResult,
    gx: np.ndarray | None = None,
    gy: np.ndarray | None = None,
    gz: np.ndarray | None = None,
    glower: np.ndarray | None = None,
    gupper: np.ndarray | None = None,
    gsubgradient: np.ndarray | None = None,
) -> BoxData:
    """Gradients of a scalar with respect to all data, given those to the solution and its multipliers."""
    symbolic, batch = result.symbolic, result.batch
    (_, fields, shared, plan, options), state = result.private
    ends, lengths = symbolic.ends, symbolic.lengths
    upper = np.zeros((batch, ends[-1]))
    for k, g in enumerate((gx, gy, gz, glower, gupper, gsubgradient)):
        if g is not None:
            upper[:, ends[k] : ends[k + 1]] = g
    gradients = [np.empty((1 if (shared >> f) & 1 else batch, k)) for f, k in enumerate(lengths)]
    flat = tuple(g.reshape(-1) for g in gradients)
    width = sum(lengths)
    totals = np.zeros((len(plan.chunks), width, plan.lanes))
    adjoint_range = _kernels().adjoint_range
    w, header, g, sums = (0,) * plan.lanes, symbolic.layout.header, upper.reshape(-1), totals.reshape(-1)

    def run(first: int, last: int, chunk: int) -> None:
        adjoint_range(
            w, header, fields, shared, plan.order, first, last, options, g, state, flat, sums, chunk, _EMPTY, batch
        )

    _in_threads(run, plan)
    if shared:
        summed = totals.sum(axis=(0, 2))
        starts = symbolic.layout.header[symbolic.layout.offset["I_FIELD"] :]
        for f, k in enumerate(lengths):
            if (shared >> f) & 1:
                gradients[f][0] = summed[starts[f] : starts[f] + k]
    return BoxData(*gradients)


_EMPTY = np.zeros(0)


class _Plan(NamedTuple):
    lanes: int
    blocks: int
    order: np.ndarray
    chunks: list[tuple[int, int, int]]
    threads: int


def _plan(symbolic: Symbolic, batch: int, threads: int | None) -> _Plan:
    # each number of lanes is compiled once; eight lanes for a few samples leave cores idle, and the cache
    lanes = LANES
    if batch <= LANES and symbolic.layout.offset["N_L"] > LARGE_FACTOR:
        lanes = 1 if batch <= 2 else LANES // 2
    blocks = -(-batch // lanes)
    order = np.minimum(np.arange(blocks * lanes, dtype=np.int32), batch - 1)
    count = min(CHUNKS, blocks)
    edges = [blocks * k // count for k in range(count + 1)]
    chunks = [(edges[k], edges[k + 1], k) for k in range(count)]
    return _Plan(lanes, blocks, order, chunks, threads or parallel.cores())


def _checked(symbolic: Symbolic, data: BoxData, batch: int) -> tuple[tuple[np.ndarray, ...], int]:
    fields, shared = [], 0
    for f, (name, value, length) in enumerate(zip(BoxData._fields, data, symbolic.lengths)):
        rows, columns = value.shape
        if columns != length or (rows != batch and rows != 1):
            raise ValueError(f"{name} has shape {value.shape}, expected ({batch}, {length}) or (1, {length})")
        shared |= (rows == 1) << f
        flags = value.flags
        if value.dtype != np.float64 or not (flags.c_contiguous and flags.aligned and flags.writeable):
            value = np.array(value, dtype=np.float64, order="C")  # other arrays would compile another kernel
        fields.append(value.reshape(-1))
    return tuple(fields), shared


def _status(info: np.ndarray) -> np.ndarray:
    code, residual = info[:, 0], info[:, 2]
    if not code.any() and residual.max(initial=0.0) <= SOLVED_RESIDUAL:
        return np.zeros(len(info), dtype=np.int64)
    status = np.full(len(info), int(Status.FAILED))
    status[residual <= INACCURATE_RESIDUAL] = Status.INACCURATE
    status[residual <= SOLVED_RESIDUAL] = Status.SOLVED
    status[code == 2] = Status.INFEASIBLE
    status[code == 3] = Status.UNBOUNDED
    return status


def _in_threads(run: Any, plan: _Plan) -> None:
    parallel.run(lambda chunk, *_: run(*plan.chunks[chunk]), len(plan.chunks), plan.threads, 1)


_KERNELS: Any = None


def _kernels() -> Any:
    global _KERNELS
    if _KERNELS is None:
        from convexlearn.solvers.quadratic import kernels

        _KERNELS = kernels
    return _KERNELS
