"""The contract of a solver, its options, and the optimality residuals that decide a status."""

import warnings
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from convexlearn.checks import count, number, require_that
from convexlearn.errors import AdjointWarning, check_options
from convexlearn.program.program import (
    INACCURATE_RESIDUAL,
    SOLVED_RESIDUAL,
    Program,
    ProgramData,
    Solution,
    Status,
)

LIMITS = {
    "tolerance": number(above=0, below=1),
    "max_iterations": count(),
    "time_limit": number(above=0, infinite=True),
    "threads": count(),
    "smoothing": number(least=0),
}
"""What options must be where a solver has them and they are not None."""

ADJOINT_TOLERANCE = 1e-6
EQUILIBRATIONS = 6


@dataclass(frozen=True)
class Options:
    """Options that every solver understands.

    tolerance: stopping tolerance on the relative KKT residual. max_iterations: None means the
    solver's own limit; a limit that is set explicitly returns the iterate with a warning.
    time_limit: seconds for one call, None means none. verbose: log one line per iteration.
    """

    tolerance: float = 1e-10
    max_iterations: int | None = None
    time_limit: float | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        for name, check in LIMITS.items():
            value = getattr(self, name, None)
            if value is not None or name == "tolerance":
                require_that("solver option", name, check, value)

    def updated(self, where: str, **changes: Any) -> "Options":
        """A copy with some options replaced; an unknown name is an OptionError."""
        check_options(changes, (f.name for f in fields(self)), where)
        return replace(self, **changes)


class Named:
    """A solver that is shown by its name."""

    name: ClassVar[str]

    def __repr__(self) -> str:
        return f"<solver '{self.name}'>"


@runtime_checkable
class Solver(Protocol):
    """solve(program, data) and adjoint(solution, dx, dz); stateless, so that layers can share it.

    `options` is the dataclass of options (Options or a subclass). `native_objective` tells the
    compiler whether the solver takes a quadratic objective; otherwise the objective is linear and
    squares become second-order cones. A solver whose adjoint takes arrays on the host as well as
    tensors says so by an attribute `takes_arrays = True`, which spares the layer conversions.
    """

    name: ClassVar[str]
    options: ClassVar[type[Options]]
    native_objective: ClassVar[bool]

    def supports(self, program: Program) -> str | None:
        """None if the solver takes the program, otherwise the reason why not, as half a sentence."""
        ...

    def solve(self, program: Program, data: ProgramData, options: Options, warm: Solution | None = None) -> Solution:
        """Solve every sample; failures are reported in `Solution.status`, never raised."""
        ...

    def adjoint(self, solution: Solution, dx: Tensor, dz: Tensor) -> ProgramData:
        """Gradients of a scalar with respect to the data, given those to x (B, n) and z (B, m).

        Samples that are not ok must get zero rows; shared fields get the sum over the batch.
        """
        ...


def symmetric_product(program: Program, P: Tensor, x: Tensor) -> Tensor:
    """P x (B, n) for the symmetric P whose upper triangle has the stored entries P (1 or B, nnz)."""
    rows, cols = _index(program.P, x.device)
    out = torch.zeros_like(x)
    off = (rows != cols).to(x.dtype)
    out.index_add_(1, rows, P * x[:, cols])
    return out.index_add_(1, cols, P * off * x[:, rows])


def product(program: Program, A: Tensor, x: Tensor) -> Tensor:
    """A x (B, m)."""
    rows, cols = _index(program.A, x.device)
    return x.new_zeros(len(x), program.m).index_add_(1, rows, A * x[:, cols])


def transposed_product(program: Program, A: Tensor, z: Tensor) -> Tensor:
    """A'z (B, n)."""
    rows, cols = _index(program.A, z.device)
    return z.new_zeros(len(z), program.n).index_add_(1, cols, A * z[:, rows])


def _index(sparsity: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, cols = (torch.as_tensor(i, device=device).long() for i in (sparsity.rows, sparsity.cols))
    return rows, cols


def polyhedral_residual(program: Program, data: ProgramData, x: Tensor, z: Tensor) -> Tensor:
    """Relative KKT residual (B,) of a QP or LP at primal x (B, n) and dual z (B, m).

    The largest of: constraint violation, stationarity, dual sign, complementarity (s_i z_i, entry
    by entry). Each is divided by 1 plus the largest magnitude of the terms it is a difference of.
    """
    zero = program.cones.zero
    Ax, Px, Az = (
        product(program, data.A, x),
        symmetric_product(program, data.P, x),
        transposed_product(program, data.A, z),
    )
    slack = data.b - Ax
    primal = torch.cat([slack[:, :zero].abs(), (-slack[:, zero:]).clamp(min=0)], 1)
    dual = Px + data.q + Az
    scale_primal = 1 + _largest(Ax).maximum(_largest(data.b))
    scale_dual = 1 + _largest(Px).maximum(_largest(data.q)).maximum(_largest(Az))
    inequality = z[:, zero:]
    gap = (slack[:, zero:] * inequality).abs()
    parts = (
        _largest(primal) / scale_primal,
        _largest(dual) / scale_dual,
        _largest((-inequality).clamp(min=0)) / scale_dual,
        _largest(gap) / (scale_primal * scale_dual),
    )
    worst = torch.stack(parts).amax(0)
    return torch.where(torch.isfinite(x).all(1) & torch.isfinite(z).all(1), worst, torch.inf)


def warn_adjoint(residual: Any) -> None:
    """AdjointWarning where a relative residual (B,) of the backward linear solve exceeds ADJOINT_TOLERANCE."""
    missed = [k for k, r in enumerate(residual.tolist()) if not r <= ADJOINT_TOLERANCE]
    if missed:
        worst = max(missed, key=lambda k: residual[k])
        warnings.warn(
            f"the backward linear solve of {len(missed)} of {len(residual)} samples missed its tolerance (worst: "
            f"sample {worst}, relative residual {float(residual[worst]):.1e}): the solution is not unique there, so "
            "its gradient is a least-squares one; add a small quadratic term, or use smoothing",
            AdjointWarning,
            stacklevel=4,
        )


def _largest(v: Tensor) -> Tensor:
    return v.abs().amax(1) if v.shape[1] else v.new_zeros(len(v))


def status_from_residual(residual: Tensor) -> Tensor:
    """SOLVED, INACCURATE or FAILED (B,) int64 by the size of the relative KKT residual."""
    status = torch.full(residual.shape, int(Status.FAILED), device=residual.device)
    status[residual <= INACCURATE_RESIDUAL] = Status.INACCURATE
    status[residual <= SOLVED_RESIDUAL] = Status.SOLVED
    return status


def primal_infeasible(program: Program, data: ProgramData, z: Tensor, tolerance: float) -> Tensor:
    """(B,) True where z (B, m) certifies that Ax + s = b, s >= 0 has no solution.

    Farkas: z_i >= 0 on inequality rows, A'z = 0 and b'z < 0, on equilibrated data, so that units don't matter.
    Errors are relative to the terms of A'z, and may be `tolerance` times -b'z relative to its terms.
    """
    zero = program.cones.zero
    columns, rows = _equilibration(program, data)
    z, value = z / rows, -(data.b * z).sum(1)
    negative = (-z[:, zero:]).clamp(min=0)
    error = _largest(columns * transposed_product(program, data.A, rows * z)).maximum(_largest(negative))
    return (value > 0) & (error * _largest(data.b * rows * z) <= tolerance * value * _largest(z))


def dual_infeasible(program: Program, data: ProgramData, x: Tensor, tolerance: float) -> Tensor:
    """(B,) True where x (B, n) is a direction of unbounded descent.

    Px = 0, Ax = 0 on equality rows, Ax <= 0 on inequality rows and q'x < 0, on equilibrated data, so that units
    don't matter. Errors are relative to x, and may be `tolerance` times -q'x relative to its terms.
    """
    zero = program.cones.zero
    columns, rows = _equilibration(program, data)
    value, size = -(data.q * x).sum(1), _largest(x / columns)
    Ax, Px = rows * product(program, data.A, x), columns * symmetric_product(program, data.P, x)
    error = _largest(Px).maximum(_largest(Ax[:, :zero])).maximum(_largest(Ax[:, zero:].clamp(min=0)))
    return (value > 0) & (error * _largest(data.q * x) <= tolerance * value * size)


def _equilibration(program: Program, data: ProgramData) -> tuple[Tensor, Tensor]:
    """Scalings of variables (k, n) and rows (k, m) that bring the entries of P and A near 1 (Ruiz, 2001)."""
    (i, j), (row, col) = (_index(pattern, data.q.device) for pattern in (program.P, program.A))
    i, j, batch = torch.cat([i, row + program.n]), torch.cat([j, col]), max(len(data.P), len(data.A))
    entries = torch.cat([data.P.expand(batch, -1), data.A.expand(batch, -1)], 1).abs()
    scale = entries.new_ones(batch, program.n + program.m)
    for _ in range(EQUILIBRATIONS):
        scaled = entries * scale[:, i] * scale[:, j]
        size = torch.zeros_like(scale)
        for index in (i, j):
            size = size.scatter_reduce(1, index.expand(batch, -1), scaled, "amax")
        scale = scale / torch.where(size > 0, size, 1.0).sqrt()
    return scale[:, : program.n], scale[:, program.n :]
