"""The quadratic solver: reduction, choice of path, verified statuses, gradients on the original program."""

import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from convexlearn.errors import OptionError, suggest
from convexlearn.program.program import (
    CPU,
    INACCURATE_RESIDUAL,
    SOLVED_RESIDUAL,
    Program,
    ProgramData,
    Solution,
    Status,
    as_array,
)
from convexlearn.program.reduce import Arrays, Pair, Reduction, reduce
from convexlearn.solvers.base import (
    ADJOINT_TOLERANCE,
    Named,
    Options,
    dual_infeasible,
    primal_infeasible,
    status_from_residual,
    warn_adjoint,
)
from convexlearn.solvers.quadratic import shared, sparse
from convexlearn.solvers.quadratic.paths import (
    Adjoint,
    LanesPart,
    Outcome,
    Part,
    select,
    solve_lanes,
    solve_shared,
)

PATHS = ("auto", "shared", "lanes", "sparse")
CERTIFIED = 1e-11  # relative KKT residual from which a condensed solution stands
CERTIFICATE_TOLERANCE = 1e-6
LARGE = 50_000  # variables, rows and stored entries from which the sparse path spares the symbolic analysis
LARGE_FACTOR = 250_000  # entries of L from which it is faster


@dataclass(frozen=True)
class QuadraticOptions(Options):
    """Options of the quadratic solver.

    smoothing: mu > 0 returns the point of the central path with s_i z_i = mu and its derivative,
    which is informative for LPs too. threads: None means the cores this process may use; results
    don't depend on it. path: "shared" condenses matrices common to the batch and runs an active-set
    method per sample, "lanes" is the interior point, "sparse" is Clarabel with a sparse active set,
    "auto" chooses, and solves by "sparse" what the others leave open. time_limit is looked at between
    blocks of samples, and within a sample by "sparse" only.
    """

    smoothing: float = 0.0
    threads: int | None = None
    path: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path not in PATHS:
            raise OptionError(f"path='{self.path}': {suggest(self.path, PATHS)}")
        if self.path == "sparse" and self.smoothing:
            raise OptionError("smoothing needs the interior point of our own; leave path='auto'")


class Quadratic(Named):
    """QPs and LPs in batches: exact solutions, duals and gradients.

    Gradients are those of the active set that the solver found; with weakly active or duplicated
    constraints that is one element of the generalized derivative, always finite.
    """

    name: ClassVar[str] = "quadratic"
    options: ClassVar[type[Options]] = QuadraticOptions
    native_objective: ClassVar[bool] = True
    takes_arrays: ClassVar[bool] = True

    def supports(self, program: Program) -> str | None:
        """Only the zero cone and the nonnegative orthant."""
        return None if program.cones.polyhedral else "it solves QPs and LPs only"

    def solve(self, program: Program, data: ProgramData, options: Options, warm: Solution | None = None) -> Solution:
        """Solve every sample; a warm start gives the active-set method its first guess."""
        settings = options if isinstance(options, QuadraticOptions) else QuadraticOptions(**vars(options))
        if not data.batch:
            return _empty(program, data)
        usable = warm is not None and warm.x.shape == (data.batch, program.n)
        call = _Call(_analysis(program), data.arrays, data.batch, settings, warm if usable else None)
        outcome, parts = call.run()
        status = _statuses(program, data, outcome, settings)
        solved = outcome.within(SOLVED_RESIDUAL)
        if not solved and call.may_retry:
            open_ = np.flatnonzero((status == Status.INACCURATE) | (status == Status.FAILED))
            parts = call.retry(outcome, parts, open_) if len(open_) else parts
            status = _statuses(program, data, outcome, settings)
        found = (outcome.x, outcome.z, status, outcome.iterations, outcome.residual)
        if data.device != CPU:
            found = tuple(torch.from_numpy(v).to(data.device) for v in found)
        private = _State(parts, settings.threads)
        return Solution(program, data, *found, private=private, all_solved=True if solved else None)

    def adjoint(self, solution: Solution, dx: Tensor | np.ndarray, dz: Tensor | np.ndarray) -> ProgramData:
        """Gradients of the data: the adjoint of the optimality conditions, reduced and lifted like the solution."""
        state: _State = solution.private
        data, point, up = solution.data.arrays, solution.arrays, (as_array(dx), as_array(dz))
        if not solution.all_solved:
            ok = as_array(solution.ok)[:, None]
            point, up = ((np.where(ok, v[0], 0.0), np.where(ok, v[1], 0.0)) for v in (point, up))
        if len(state.parts) == 1:
            gradients, residual = state.parts[0][2].adjoint(data, point, up, state.threads)
        else:
            gradients, residual = _joined(state, data, point, up)
        gradients = [g.sum(0, keepdims=True) if len(f) == 1 != len(g) else g for f, g in zip(data, gradients)]
        if len(residual) and not residual.max() <= ADJOINT_TOLERANCE:
            warn_adjoint(residual)
        if solution.data.device != CPU:
            tensors = (torch.from_numpy(g).to(solution.data.device) for g in gradients)
            return ProgramData(*tensors, batch=solution.data.batch)
        return ProgramData(*gradients, batch=solution.data.batch)


def _joined(state: "_State", data: Arrays, point: Pair, up: Pair) -> Adjoint:
    """Gradients summed over the parts, and adjoint residuals (B,); the part for the whole batch comes first."""
    total: list[np.ndarray] = [np.zeros((min(len(f), 1), f.shape[1])) for f in data]
    residual = np.zeros(len(point[0]))
    for rows, covered, part in state.parts:
        if rows is not None:
            own, down = ((v[0][rows], v[1][rows]) for v in (point, up))
            found, residual[rows] = part.adjoint(select(data, rows), own, down, state.threads)
            for sum_, g, f in zip(total, found, data):
                if len(f) == 1:
                    sum_ += g.sum(0, keepdims=True)
                else:
                    sum_[rows] += g
            continue
        down = up[0].copy(), up[1].copy()
        if covered is not None:  # another part solved these samples anew
            down[0][covered], down[1][covered] = 0.0, 0.0
        found, residual = part.adjoint(data, point, down, state.threads)
        total = [g.sum(0, keepdims=True) if len(f) == 1 != len(g) else g for f, g in zip(data, found)]
    return (total[0], total[1], total[2], total[3]), residual


Piece = tuple[np.ndarray | None, np.ndarray | None, Part]


@dataclass(frozen=True, eq=False)
class _State:
    """What the adjoint needs.

    parts: (samples or None for all, samples of it that a later part solved anew or None, part).
    """

    parts: list[Piece]
    threads: int | None


@dataclass(eq=False)
class _Analysis:
    """Everything that depends on the program alone, and the last condensation."""

    program: Program
    reduction: Reduction
    condensable: bool
    worthwhile: bool
    lock: Any = field(default_factory=threading.Lock)
    symbolic: Any = None
    last: shared.Condensed | None = None
    refused: tuple[bytes, bytes] | None = None

    def condensed(self, data: Arrays) -> shared.Condensed | None:
        """The condensed problem, the last one where the matrices are the same (closed loops)."""
        P, A, last = data[0], data[2], self.last
        if self.refused is not None and self.refused == (P.tobytes(), A.tobytes()):
            return None
        if last is None or not last.matches(P, A):
            last = shared.condense(self.reduction, P, A, None if last is None else last.arrangement)
            self.last = last
            self.refused = (P.tobytes(), A.tobytes()) if last is None else None
        return last

    def lanes_symbolic(self) -> Any:
        """Symbolic analysis of the interior point, made at first use."""
        from convexlearn.solvers.quadratic import lanes

        with self.lock:
            if self.symbolic is None:
                self.symbolic = lanes.analyse(self.reduction.box)
        return self.symbolic


_analyses: "weakref.WeakKeyDictionary[Program, _Analysis]" = weakref.WeakKeyDictionary()
_analyses_lock = threading.Lock()


def _analysis(program: Program) -> _Analysis:
    found = _analyses.get(program)
    if found is None:
        with _analyses_lock:
            found = _analyses.get(program)
            if found is None:
                reduction = reduce(program)
                found = _Analysis(
                    program, reduction, shared.condensable(reduction.box), shared.worthwhile(reduction.box)
                )
                _analyses[program] = found
    return found


@dataclass(eq=False)
class _Call:
    """One call of `Quadratic.solve`."""

    analysis: _Analysis
    data: Arrays
    batch: int
    options: QuadraticOptions
    warm: Solution | None
    limits: sparse.Limits = field(init=False)

    def __post_init__(self) -> None:
        options = self.options
        deadline = np.inf if options.time_limit is None else time.monotonic() + options.time_limit
        self.limits = sparse.Limits(options.tolerance, options.max_iterations, deadline)

    def run(self) -> tuple[Outcome, list[Piece]]:
        """Solve, and mend what the condensed path leaves open with the interior point."""
        condensed = self._condensed()
        if condensed is None and self._prefers_sparse():
            warm = None if self.warm is None else (as_array(self.warm.x), as_array(self.warm.z))
            outcome = self._sparse(self.data, self.batch, warm)
            return outcome, [(None, None, outcome.part)]
        if condensed is None:
            previous = self.warm.private.parts if self.warm is not None else []
            whole = len(previous) == 1 and isinstance(previous[0][2], LanesPart)
            outcome = self._lanes(self.data, self.batch, previous[0][2].result if whole else None)
            return outcome, [(None, None, outcome.part)]
        start = None if self.warm is None else as_array(self.warm.x)
        outcome = solve_shared(condensed, self.data, self.batch, start, self.options.threads)
        if outcome.within(CERTIFIED):
            return outcome, [(None, None, outcome.part)]
        open_ = np.flatnonzero(~(outcome.residual <= CERTIFIED))
        mended = self._lanes(select(self.data, open_), len(open_))
        better = ~(mended.residual >= outcome.residual[open_])
        return outcome, _mend(outcome, [(None, None, outcome.part)], open_, mended, better)

    @property
    def may_retry(self) -> bool:
        """Whether samples that are left open may be solved once more."""
        return self.options.path == "auto" and not self.options.smoothing and not self.limits.set

    def retry(self, outcome: Outcome, parts: list[Piece], open_: np.ndarray) -> list[Piece]:
        """Solve the samples `open_` by the sparse path, and take over into `outcome` what is better."""
        if isinstance(parts[0][2], sparse.SparsePart):
            return parts
        before = outcome.residual[open_]
        mended = self._sparse(select(self.data, open_), len(open_), None)
        certified = (mended.claim == Status.INFEASIBLE) | (mended.claim == Status.UNBOUNDED)
        better = (mended.residual < before) | (certified & ~(before <= INACCURATE_RESIDUAL))
        return _mend(outcome, parts, open_, mended, better) if better.any() else parts

    def _prefers_sparse(self) -> bool:
        """The sparse path, by name or where the lanes would be slow; the analysis comes last as it is slow itself."""
        options, program = self.options, self.analysis.program
        if options.path != "auto" or options.smoothing:
            return options.path == "sparse"
        size = program.n + program.m + program.P.nnz + program.A.nnz
        return size > LARGE or self.analysis.lanes_symbolic().layout.offset["N_L"] > LARGE_FACTOR

    def _sparse(self, data: Arrays, batch: int, warm: Pair | None) -> Outcome:
        return sparse.solve(self.analysis.program, data, batch, warm, self.limits, self.options.threads)

    def _lanes(self, data: Arrays, batch: int, warm: Any = None) -> Outcome:
        options = self.options
        keywords = {
            "tolerance": options.tolerance,
            "max_iterations": options.max_iterations,
            "smoothing": options.smoothing,
            "threads": options.threads,
            "warm": warm,
            "deadline": self.limits.deadline,
        }
        return solve_lanes(self.analysis.reduction, self.analysis.lanes_symbolic(), data, batch, keywords)

    def _condensed(self) -> shared.Condensed | None:
        """The condensed problem where that path applies; OptionError where it is asked for and does not."""
        options, condensed = self.options, None
        wanted = options.path in ("auto", "shared") and not options.smoothing and options.max_iterations is None
        wanted = wanted and (options.path == "shared" or self.analysis.worthwhile)
        if wanted and self.analysis.condensable and len(self.data[0]) == 1 and len(self.data[2]) == 1:
            condensed = self.analysis.condensed(self.data)
        if condensed is None and options.path == "shared":
            raise OptionError(
                "path='shared' needs P and A common to the batch, and bounds only after the equalities are eliminated, "
                "or a positive definite P; leave path='auto'"
            )
        return condensed


def _mend(outcome: Outcome, parts: list[Piece], open_: np.ndarray, mended: Outcome, better: np.ndarray) -> list[Piece]:
    """Take over into `outcome` the samples open_[better] of `mended`, and their adjoint into the parts."""
    rows, outcome.worst = open_[better], None
    for name in ("x", "z", "residual", "claim", "iterations"):
        getattr(outcome, name)[rows] = getattr(mended, name)[better]
    pieces: list[Piece] = []
    for own, covered, part in parts:
        if own is None:
            pieces.append((None, rows if covered is None else np.union1d(covered, rows), part))
        else:
            pieces.append((own, covered, _Subset(part, ~np.isin(own, rows))))
    return [*pieces, (open_, None, mended.part if better.all() else _Subset(mended.part, better))]


@dataclass(frozen=True, eq=False)
class _Subset:
    """A part of which only some samples count."""

    part: Part
    counts: np.ndarray

    def adjoint(self, data: Arrays, solution: Pair, upstream: Pair, threads: int | None) -> Adjoint:
        """The part's gradients with nothing from the samples that don't count."""
        masked = tuple(np.where(self.counts[:, None], g, 0.0) for g in upstream)
        return self.part.adjoint(data, solution, (masked[0], masked[1]), threads)


def _empty(program: Program, data: ProgramData) -> Solution:
    integers, numbers = data.q.new_zeros(0, dtype=torch.int64), data.q.new_zeros(0)
    x, z = data.q.new_zeros(0, program.n), data.q.new_zeros(0, program.m)
    return Solution(program, data, x, z, integers, integers, numbers, _State([], None))


def _statuses(program: Program, data: ProgramData, outcome: Outcome, options: QuadraticOptions) -> np.ndarray:
    """Statuses from the residuals; INFEASIBLE and UNBOUNDED only with a certificate that holds."""
    status = np.zeros(len(outcome.x), dtype=np.int64)
    if outcome.within(SOLVED_RESIDUAL):
        return status
    status = status_from_residual(torch.from_numpy(outcome.residual)).numpy()
    if options.smoothing:
        return np.where(outcome.claim <= Status.INACCURATE, outcome.claim, status)
    for claim, certifies, rays in (
        (Status.INFEASIBLE, primal_infeasible, outcome.z),
        (Status.UNBOUNDED, dual_infeasible, outcome.x),
    ):
        rows = np.flatnonzero((outcome.claim == claim) & (status == Status.FAILED))
        if len(rows):
            samples = data.select(torch.from_numpy(rows).to(data.device))
            ray = torch.from_numpy(rays[rows]).to(data.device)
            holds = certifies(program, samples, ray, CERTIFICATE_TOLERANCE).cpu().numpy()
            status[rows[holds]] = int(claim)
    return status
