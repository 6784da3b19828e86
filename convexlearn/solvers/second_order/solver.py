"""The solver for second-order cones: batches in SIMD lanes, verified statuses, gradients of the face."""

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from convexlearn.program.program import CPU, SOLVED_RESIDUAL, Cones, Program, ProgramData, Solution, as_array
from convexlearn.solvers.base import ADJOINT_TOLERANCE, Named, Options, warn_adjoint
from convexlearn.solvers.quadratic.paths import gradients
from convexlearn.solvers.second_order.certificates import residuals, statuses


@dataclass(frozen=True)
class SecondOrderOptions(Options):
    """Options of the second-order cone solver.

    threads: None means the cores this process may use; results don't depend on it. time_limit is looked
    at between blocks of samples.
    """

    threads: int | None = None


class SecondOrder(Named):
    """Quadratic objectives over second-order cones, in batches: exact solutions, duals and gradients.

    A homogeneous interior point finds the face of the cones, Newton steps on it the solution; the
    gradient differentiates the optimality conditions there, curvature of the cones included. Where s or z
    lies on the edge between two faces, it is one element of the generalized derivative.
    """

    name: ClassVar[str] = "socp"
    options: ClassVar[type[Options]] = SecondOrderOptions
    native_objective: ClassVar[bool] = True
    takes_arrays: ClassVar[bool] = True

    def supports(self, program: Program) -> str | None:
        """Zero, nonnegative and second-order cones."""
        cones = program.cones
        flat = Cones(zero=cones.zero, nonneg=cones.nonneg, soc=cones.soc)
        return None if flat == cones else "it takes linear and second-order cone constraints only"

    def solve(self, program: Program, data: ProgramData, options: Options, warm: Solution | None = None) -> Solution:
        """Solve every sample; a warm start is a point from which the Newton steps are tried first."""
        from convexlearn.solvers.second_order import lanes

        settings = options if isinstance(options, SecondOrderOptions) else SecondOrderOptions(**vars(options))
        if not data.batch:
            integers, numbers = data.q.new_zeros(0, dtype=torch.int64), data.q.new_zeros(0)
            x, z = data.q.new_zeros(0, program.n), data.q.new_zeros(0, program.m)
            return Solution(program, data, x, z, integers, integers, numbers)
        usable = warm is not None and warm.x.shape == (data.batch, program.n)
        result = lanes.solve(
            program,
            data.arrays,
            data.batch,
            tolerance=settings.tolerance,
            max_iterations=settings.max_iterations,
            warm=np.concatenate(warm.arrays, 1) if warm is not None and usable else None,
            threads=settings.threads,
            deadline=np.inf if settings.time_limit is None else time.monotonic() + settings.time_limit,
        )
        point = result.x, result.z
        residual = residuals(program, data.arrays, point, settings.threads)
        status, solved = np.zeros(data.batch, dtype=np.int64), not result.codes.any()
        if not (solved and residual.max() <= SOLVED_RESIDUAL):
            solved = False
            status, residual = statuses(program, data.arrays, point, residual, result.codes)
        found = (*point, status, result.iterations, residual)
        if data.device != CPU:
            found = tuple(torch.from_numpy(v).to(data.device) for v in found)
        private = _State(result, settings.threads)
        return Solution(program, data, *found, private=private, all_solved=True if solved else None)

    def adjoint(self, solution: Solution, dx: Tensor | np.ndarray, dz: Tensor | np.ndarray) -> ProgramData:
        """Gradients of the data: the adjoint of the optimality conditions on the face."""
        from convexlearn.solvers.second_order import lanes

        program, data = solution.program, solution.data
        if not data.batch:
            return ProgramData(*(torch.zeros_like(f) for f in data.fields()), batch=0)
        state: _State = solution.private
        point, up, ok = solution.arrays, (as_array(dx), as_array(dz)), None
        if not solution.all_solved:
            ok = as_array(solution.ok)[:, None]
            point, up = ((np.where(ok, v[0], 0.0), np.where(ok, v[1], 0.0)) for v in (point, up))
        adjoint = lanes.adjoint(state.result, *up, state.threads)
        if ok is not None:
            adjoint = np.where(ok, adjoint[0], 0.0), np.where(ok, adjoint[1], 0.0)
        found, residual = gradients(program, data.arrays, point, up, adjoint, threads=state.threads)
        if not residual.max() <= ADJOINT_TOLERANCE:
            warn_adjoint(residual)
        found = [g.sum(0, keepdims=True) if len(f) == 1 != len(g) else g for f, g in zip(data.arrays, found)]
        if data.device != CPU:
            return ProgramData(*(torch.from_numpy(g).to(data.device) for g in found), batch=data.batch)
        return ProgramData(*found, batch=data.batch)


@dataclass(frozen=True, eq=False)
class _State:
    """What the adjoint needs."""

    result: Any
    threads: int | None
