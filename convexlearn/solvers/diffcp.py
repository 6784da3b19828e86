"""General cones through diffcp, with SCS behind it: an option, and an oracle for other solvers."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import diffcp
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convexlearn.errors import AdjointWarning, OptionError
from convexlearn.program.program import Cones, Program, ProgramData, Solution, Status
from convexlearn.solvers.base import Named, Options, status_from_residual

MODES = ("dense", "lsmr", "lsqr")
DENSE_ORDER = 400
ITERATION_LIMIT = 100_000
LOOKBACKS = (None, 5)  # SCS's own choice first


@dataclass(frozen=True)
class DiffcpOptions(Options):
    """Options of diffcp and of SCS behind it.

    mode: how diffcp solves for the gradient: "dense", "lsmr", "lsqr" (inaccurate when constraints
    are saturated), or None: dense up to order 400, then lsmr. acceleration_lookback: of SCS.
    threads: samples solved side by side, None means one per CPU.
    """

    mode: str | None = None
    acceleration_lookback: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode is not None and self.mode not in MODES:
            raise OptionError(f"diffcp: mode must be one of {', '.join(MODES)}, got {self.mode!r}")


class _Solved(NamedTuple):
    x: np.ndarray
    z: np.ndarray
    status: Status
    residual: float
    adjoint: Any


class Diffcp(Named):
    """Second-order, exponential and PSD cones, one sample after the other in threads.

    SCS runs to eps = tolerance (default 1e-10), since the derivative is only as good as the point it is
    taken at. Reference: Agrawal, Barratt, Boyd, Busseti, Moursi, Differentiating through a cone
    program (2019).
    """

    name: ClassVar[str] = "diffcp"
    options: ClassVar[type[Options]] = DiffcpOptions
    native_objective: ClassVar[bool] = False

    def supports(self, program: Program) -> str | None:
        """Linear objectives, no power cones, at least one row."""
        if program.P.nnz:
            return "diffcp takes a linear objective only"
        if program.cones.power:
            return "diffcp cannot differentiate power cones; write them with exponential or second-order cones"
        return None if program.m else "diffcp needs at least one constraint"

    def solve(self, program: Program, data: ProgramData, options: Options, warm: Solution | None = None) -> Solution:
        """Solve every sample; statuses from SCS, residuals computed here."""
        assert isinstance(options, DiffcpOptions)  # layers make the options from `self.options`
        host = [f.detach().cpu().numpy() for f in data.expanded().fields()]
        points = [None] * data.batch if warm is None or len(warm.x) != data.batch else warm.private[1]

        def one(i: int) -> _Solved:
            return _solve_one(program, [f[i] for f in host], options, points[i])

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inaccuracy is reported by status
            results = _threaded(one, data.batch, options.threads)
        device = data.q.device
        x, z = (
            torch.as_tensor(np.stack(part) if part else np.zeros((0, size)), device=device)
            for part, size in (([r.x for r in results], program.n), ([r.z for r in results], program.m))
        )
        status = torch.tensor([int(r.status) for r in results], dtype=torch.int64, device=device)
        residual = torch.tensor([r.residual for r in results], dtype=torch.float64, device=device)
        kept = [(r.x, r.z) if r.status <= Status.INACCURATE else None for r in results]
        private = ([r.adjoint for r in results], kept)
        return Solution(program, data, x, z, status, torch.zeros_like(status), residual, private)

    def adjoint(self, solution: Solution, dx: Tensor, dz: Tensor) -> ProgramData:
        """Gradients of the data by diffcp's adjoint derivative, sample by sample."""
        program, data = solution.program, solution.data
        ok = solution.ok.tolist()
        host_x, host_z = dx.detach().cpu().numpy(), dz.detach().cpu().numpy()

        def one(i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            derivative = solution.private[0][i]
            if not ok[i] or derivative is None or not (host_x[i].any() or host_z[i].any()):
                return np.zeros(program.n), np.zeros(program.A.nnz), np.zeros(program.m)
            dA, db, dc = derivative(host_x[i], host_z[i], np.zeros(program.m))
            return dc, np.asarray(dA.tocsc()[program.A.rows, program.A.cols]).ravel(), db

        results = _threaded(one, data.batch, None)
        if not all(np.isfinite(part).all() for r in results for part in r):
            warnings.warn("diffcp's adjoint solve returned non-finite gradients", AdjointWarning, stacklevel=2)
        sizes = (program.n, program.A.nnz, program.m)
        dq, dA, db = (
            torch.as_tensor(np.stack([r[k] for r in results]) if results else np.zeros((0, size)), device=dx.device)
            for k, size in enumerate(sizes)
        )
        gradients = {"P": dx.new_zeros(len(dx), 0), "q": dq, "A": dA, "b": db}
        shared = [g.sum(0, keepdim=True) if data.shared(k) and data.batch != 1 else g for k, g in gradients.items()]
        return ProgramData(*shared, batch=data.batch)


def _threaded(work: Any, count: int, threads: int | None) -> list:
    threads = min(count, threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    if threads <= 1:
        return [work(i) for i in range(count)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, range(count)))


def _cone_dict(cones: Cones) -> dict[str, Any]:
    return {
        "z": cones.zero,
        "l": cones.nonneg,
        "q": list(cones.soc),
        "s": list(cones.psd),
        "ep": cones.exp,
    }


def _solve_one(program: Program, values: list[np.ndarray], options: DiffcpOptions, warm: Any) -> _Solved:
    """One sample; SCS stalls on some problems with its own acceleration, so a poor result is tried again."""
    best: _Solved | None = None
    for lookback in LOOKBACKS if options.acceleration_lookback is None else (options.acceleration_lookback,):
        found = _attempt(program, values, options, (warm, lookback))
        if best is None or found.residual < best.residual:
            best = found
        if found.status in (Status.SOLVED, Status.INFEASIBLE, Status.UNBOUNDED) or options.max_iterations:
            break
    assert best is not None
    return best


def _attempt(
    program: Program, values: list[np.ndarray], options: DiffcpOptions, start: tuple[Any, int | None]
) -> _Solved:
    (_, q, entries, b), (warm, lookback) = values, start
    A = program.A.matrix(entries.copy())
    settings: dict[str, Any] = {"eps": options.tolerance, "max_iters": options.max_iterations or ITERATION_LIMIT}
    if options.time_limit is not None:
        settings["time_limit_secs"] = options.time_limit
    if lookback is not None:
        settings["acceleration_lookback"] = lookback
    mode = options.mode or ("dense" if sum(A.shape) < DENSE_ORDER else "lsmr")
    if warm is not None:
        warm = (*warm, b - A @ warm[0])
    # diffcp strips zeros in place and wants the matrix class
    matrix = sp.csc_matrix(A.copy())
    try:
        x, z, s, _, adjoint = diffcp.solve_and_derivative(
            matrix, b.copy(), q.copy(), _cone_dict(program.cones),
            warm_start=warm, mode=mode, solve_method="SCS", verbose=options.verbose, **settings,
        )  # fmt: skip
    except (diffcp.SolverError, ValueError, RuntimeError, np.linalg.LinAlgError) as error:
        return _Solved(np.full(program.n, np.nan), np.full(program.m, np.nan), _failed(str(error)), np.inf, None)
    residual = _residual(A, (b, q), (x, z, s))
    status = Status(int(status_from_residual(torch.tensor([residual]))[0]))
    return _Solved(x, z, status, residual, adjoint)


def _failed(message: str) -> Status:
    text = message.lower()
    if "infeasible" in text:
        return Status.INFEASIBLE
    return Status.UNBOUNDED if "unbounded" in text else Status.FAILED


def _residual(A: Any, data: tuple[np.ndarray, np.ndarray], point: tuple[np.ndarray, ...]) -> float:
    """Relative KKT residual; SCS returns s in K and z in K*, so the affine equations and the gap remain."""
    (b, q), (x, z, s) = data, point
    Ax, Az = A @ x, A.T @ z
    size = lambda *terms: 1 + max((float(np.abs(t).max()) for t in terms if t.size), default=0.0)  # noqa: E731
    primal = np.abs(Ax + s - b).max(initial=0.0) / size(Ax, s, b)
    dual = np.abs(Az + q).max(initial=0.0) / size(Az, q)
    gap = abs(q @ x + b @ z) / (1 + max(abs(q @ x), abs(b @ z)))
    return float(max(primal, dual, gap))
