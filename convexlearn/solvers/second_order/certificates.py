"""Residuals on the original program, statuses, and certificates that hold: nothing here knows the lanes."""

import numpy as np
import torch

from convexlearn.parallel import run
from convexlearn.program.program import Cones, Program, Status
from convexlearn.program.reduce import Arrays, Pair
from convexlearn.solvers.base import product, status_from_residual, symmetric_product, transposed_product

CERTIFICATE_TOLERANCE = 1e-7


def residuals(program: Program, data: Arrays, solution: Pair, threads: int | None) -> np.ndarray:
    """Relative KKT residuals (B,), see residual_kernels.residuals."""
    from convexlearn.solvers.second_order import residual_kernels

    cones, out = program.cones, np.empty(len(solution[0]))
    pattern = program.P.rows, program.P.cols, program.A.rows, program.A.cols
    constants = (pattern, (cones.zero, cones.nonneg), np.array(cones.soc, dtype=np.int64))
    run(lambda i, j, _: residual_kernels.residuals(*constants, *data, *solution, out, i, j), len(out), threads)
    return out


def statuses(
    program: Program, data: Arrays, solution: Pair, residual: np.ndarray, claims: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Status (B,) from residuals, INFEASIBLE (claim 2) and UNBOUNDED (3) with a certificate that holds; residuals."""
    status = status_from_residual(torch.from_numpy(residual)).numpy()
    for claim, certifies in ((Status.INFEASIBLE, farkas), (Status.UNBOUNDED, recession)):
        rows = np.flatnonzero(claims == claim)
        if len(rows):
            samples = tuple(torch.from_numpy(f if len(f) == 1 and len(claims) != 1 else f[rows]) for f in data)
            error = certifies(program, samples, *(torch.from_numpy(v[rows]) for v in solution))
            status[rows] = np.where(error <= CERTIFICATE_TOLERANCE, int(claim), int(Status.FAILED))
    return status, np.where(claims >= Status.INFEASIBLE, np.inf, residual)


def farkas(program: Program, data: tuple, x: torch.Tensor, z: torch.Tensor) -> np.ndarray:
    """Error (k,) of z as a proof of infeasibility: A'z = 0, z in K*, b'z = -1; inf where b'z >= 0."""
    value = -(data[3] * z).sum(1)
    error = transposed_product(program, data[2], z).abs().amax(1)
    return _relative(error.maximum(outside(program.cones, z, free=True)), value)


def recession(program: Program, data: tuple, x: torch.Tensor, z: torch.Tensor) -> np.ndarray:
    """Error (k,) of x as a ray of unbounded descent: Px = 0, -Ax in K, q'x = -1; inf where q'x >= 0."""
    value = -(data[1] * x).sum(1)
    error = symmetric_product(program, data[0], x).abs().amax(1)
    return _relative(error.maximum(outside(program.cones, -product(program, data[2], x), free=False)), value)


def outside(cones: Cones, v: torch.Tensor, free: bool) -> torch.Tensor:
    """How far v (k, m) is outside K (the zero cone's rows count as free in K*): violations (k,) in the max norm."""
    split = [cones.zero, cones.nonneg, *cones.soc]
    zero, nonneg, *rest = torch.split(v, split, dim=1)
    parts = [v.new_zeros(len(v), 1), -nonneg, *(c[:, 1:].norm(dim=1, keepdim=True) - c[:, :1] for c in rest)]
    if not free:
        parts.append(zero.abs())
    return torch.cat(parts, 1).amax(1)


def _relative(error: torch.Tensor, value: torch.Tensor) -> np.ndarray:
    usable = (value > 0) & torch.isfinite(error)
    return torch.where(usable, error / torch.where(usable, value, 1.0), torch.inf).numpy()
