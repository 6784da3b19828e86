"""The solver for second-order cones: batches in SIMD lanes, verified statuses, gradients of the face."""

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from convexlearn.errors import OptionError
from convexlearn.program.program import SOLVED_RESIDUAL, Cones, Program, ProgramData, Solution, Status
from convexlearn.program.reduce import Arrays
from convexlearn.solvers.base import Options, warn_adjoint
from convexlearn.solvers.quadratic.paths import adjoint_residuals, gradients
from convexlearn.solvers.second_order.certificates import residuals, statuses


@dataclass(frozen=True)
class SecondOrderOptions(Options):
    """Options of the second-order cone solver.

    threads: None means the cores this process may use; results don't depend on it. time_limit is looked
    at between blocks of samples.
    """

    threads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threads is not None and self.threads < 1:
            raise OptionError(f"threads must be at least 1, got {self.threads}")


class SecondOrder:
    """Quadratic objectives over second-order cones, in batches: exact solutions, duals and gradients.

    A homogeneous interior point finds the face of the cones, Newton steps on it the solution; the
    gradient differentiates the optimality conditions there, curvature of the cones included. Where s or z
    lies on the edge between two faces, it is one element of the generalized derivative.
    """

    name: ClassVar[str] = "socp"
    options: ClassVar[type[Options]] = SecondOrderOptions
    native_objective: ClassVar[bool] = True

    def supports(self, program: Program) -> str | None:
        """Zero, nonnegative and second-order cones."""
        cones = program.cones
        flat = Cones(zero=cones.zero, nonneg=cones.nonneg, soc=cones.soc)
        return None if flat == cones else "it takes linear and second-order cone constraints only"

    def solve(self, program: Program, data: ProgramData, options: Options, warm: Solution | None = None) -> Solution:
        """Solve every sample; a warm start is a point from which the Newton steps are tried first."""
        from convexlearn.solvers.second_order import lanes

        settings = options if isinstance(options, SecondOrderOptions) else SecondOrderOptions(**vars(options))
        arrays = _arrays(data)
        if not data.batch:
            integers, numbers = data.q.new_zeros(0, dtype=torch.int64), data.q.new_zeros(0)
            x, z = data.q.new_zeros(0, program.n), data.q.new_zeros(0, program.m)
            return Solution(program, data, x, z, integers, integers, numbers)
        usable = warm is not None and warm.x.shape == (data.batch, program.n)
        result = lanes.solve(
            program,
            arrays,
            data.batch,
            tolerance=settings.tolerance,
            max_iterations=settings.max_iterations,
            warm=np.concatenate([_numpy(warm.x), _numpy(warm.z)], 1) if warm is not None and usable else None,
            threads=settings.threads,
            deadline=np.inf if settings.time_limit is None else time.monotonic() + settings.time_limit,
        )
        solution = result.x, result.z
        residual = residuals(program, arrays, solution, settings.threads)
        status, iterations = np.zeros(data.batch, dtype=np.int64), result.iterations
        if result.codes.any() or not (residual <= SOLVED_RESIDUAL).all():
            status, residual = statuses(program, arrays, solution, residual, result.codes)
        tensors = (torch.from_numpy(v) for v in (*solution, status, iterations, residual))
        if data.q.device.type != "cpu":
            tensors = (t.to(data.q.device) for t in tensors)
        return Solution(program, data, *tensors, private=_State(result, settings.threads, data, arrays))

    def adjoint(self, solution: Solution, dx: Tensor, dz: Tensor) -> ProgramData:
        """Gradients of the data: the adjoint of the optimality conditions on the face."""
        from convexlearn.solvers.second_order import lanes

        program, batch = solution.program, solution.data.batch
        if not batch:
            return ProgramData(*(torch.zeros_like(f) for f in solution.data.fields()), batch=0)
        state: _State = solution.private
        arrays = state.arrays if state.data is solution.data else _arrays(solution.data)
        x, z, up_x, up_z = (_numpy(v) for v in (solution.x, solution.z, dx, dz))
        ok = _numpy(solution.status) <= Status.INACCURATE
        if not ok.all():
            x, z, up_x, up_z = (np.where(ok[:, None], v, 0.0) for v in (x, z, up_x, up_z))
        adjoint = lanes.adjoint(state.result, up_x, up_z, state.threads)
        if not ok.all():
            for v in adjoint:
                v[~ok] = 0.0
        found = gradients(program, arrays, (x, z), adjoint, state.threads)
        missed = adjoint_residuals(program, arrays, (up_x, up_z), adjoint, state.threads)
        warn_adjoint(np.where(ok, missed, 0.0))
        sums = (g.sum(0, keepdims=True) if len(f) == 1 and len(g) != 1 else g for f, g in zip(arrays, found))
        fields = (torch.from_numpy(g) for g in sums)
        if dx.device.type != "cpu":
            fields = (g.to(dx.device) for g in fields)
        return ProgramData(*fields, batch=batch)


@dataclass(frozen=True, eq=False)
class _State:
    """What the adjoint needs; `arrays` are those of `data`."""

    result: Any
    threads: int | None
    data: ProgramData
    arrays: Arrays


def _numpy(v: Tensor) -> np.ndarray:
    """A contiguous array that shares memory with a tensor where it can."""
    if v.device.type == "cpu" and v.is_contiguous():
        return v.detach().numpy()
    return np.ascontiguousarray(v.detach().cpu().numpy())


def _arrays(data: ProgramData) -> Arrays:
    return _numpy(data.P), _numpy(data.q), _numpy(data.A), _numpy(data.b)
