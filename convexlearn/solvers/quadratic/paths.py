"""The two ways to solve a reduced program, and their adjoints on the original one.

A path returns an Outcome: solutions, residuals and claims on the original program, and a Part that
keeps what the adjoint needs. Nothing here decides a status; that is the solver's.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from convexlearn.parallel import block_of, count, run
from convexlearn.program.program import Program, Status
from convexlearn.program.reduce import Arrays, Pair, Reduction
from convexlearn.solvers.quadratic import shared

Adjoint = tuple[Arrays, np.ndarray]  # gradients of the data, relative residuals (B,) of the adjoint system


class Part(Protocol):
    """Samples that one path solved together."""

    def adjoint(self, data: Arrays, solution: Pair, upstream: Pair, threads: int | None) -> Adjoint:
        """Gradients of (P, q, A, b): of P and A summed (1, .) where they are shared, else per sample."""
        ...


@dataclass(eq=False)
class Outcome:
    """x (B, n), z (B, m), residual (B,) on the original program, claimed status and iterations (B,).

    worst: the largest residual, None where it is not known yet.
    """

    x: np.ndarray
    z: np.ndarray
    residual: np.ndarray
    claim: np.ndarray
    iterations: np.ndarray
    part: Part
    worst: float | None = None

    def within(self, tolerance: float) -> bool:
        """Whether no residual exceeds the tolerance."""
        worst = self.residual.max(initial=0.0) if self.worst is None else self.worst
        return bool(worst <= tolerance)


@dataclass(frozen=True, eq=False)
class SharedPart:
    """Samples of the condensed path."""

    result: shared.SharedResult

    def adjoint(self, data: Arrays, solution: Pair, upstream: Pair, threads: int | None) -> Adjoint:
        """One compiled pass."""
        return shared.adjoint(self.result, data, solution, upstream, threads)


def solve_shared(
    condensed: shared.Condensed, data: Arrays, batch: int, start: np.ndarray | None, threads: int | None
) -> Outcome:
    """The condensed path; samples it does not settle have an infinite residual."""
    x, z, residual, steps, result, worst = shared.solve(condensed, data, batch, start, threads)
    claim = np.zeros(batch, dtype=np.int64)
    if not worst < np.inf:
        claim[steps < 0] = Status.FAILED
        steps = np.maximum(steps, 0)
    return Outcome(x, z, residual, claim, steps, SharedPart(result), worst)


@dataclass(frozen=True, eq=False)
class LanesPart:
    """Samples of the interior point; sign (B, 1-norms) as the reduction's adjoint needs it."""

    reduction: Reduction
    result: Any
    sign: np.ndarray

    def adjoint(self, data: Arrays, solution: Pair, upstream: Pair, threads: int | None) -> Adjoint:
        """The reduced adjoint system is read off the gradients of the reduced vectors: vx = -dL/dq and so on."""
        from convexlearn.solvers.quadratic import lanes

        reduction = self.reduction
        packed = reduction.restrict_adjoint(data, upstream, self.sign, threads)
        v = reduction.split(packed)
        subgradient = 0.5 * (v["up"] - v["down"])
        found = lanes.adjoint(self.result, -v["q"], v["b"], v["h"], -v["l"], v["u"], subgradient)
        rest = np.zeros((len(packed), len(reduction.box.absolute)))
        lifted = np.concatenate([-found.q, found.b, found.h, -found.l, found.u, rest], axis=1)
        adjoint = reduction.lift_adjoint(data, lifted, upstream, self.sign, threads)
        failed = self.result.status > Status.INACCURATE
        if failed.any():  # their data may be no numbers, which sums over the batch must not see
            adjoint[0][failed], adjoint[1][failed] = 0.0, 0.0
        return gradients(reduction.program, data, solution, upstream, adjoint, threads=threads)


def solve_lanes(reduction: Reduction, symbolic: Any, data: Arrays, batch: int, options: dict) -> Outcome:
    """The interior point on the reduced program; `options` go to lanes.solve."""
    from convexlearn.solvers.quadratic import lanes

    threads = options["threads"]
    P, A, G = (np.ascontiguousarray(m) for m in reduction.matrices(data[0], data[2], threads))
    v = reduction.split(reduction.restrict(data, batch, threads=threads))
    box = lanes.BoxData(P, v["q"], v["w"], A, v["b"], G, v["h"], v["l"], v["u"])
    result = lanes.solve(symbolic, box, batch, **options)
    rays = (result.status == Status.INFEASIBLE) | (result.status == Status.UNBOUNDED)
    x, z = reduction.lift(data, result.solution, threads=threads)
    if rays.any():
        x[rays], z[rays] = reduction.lift(select(data, np.flatnonzero(rays)), result.solution[rays], ray=True)
    sign = np.sign(result.x[:, reduction.box.absolute])
    residual = residuals(reduction.program, data, (x, z), threads)
    part = LanesPart(reduction, result, sign)
    return Outcome(x, z, residual, result.status.copy(), result.iterations, part)


def residuals(program: Program, data: Arrays, solution: Pair, threads: int | None) -> np.ndarray:
    """Relative KKT residuals (B,) of the original program."""
    from convexlearn.solvers.quadratic import kkt_kernels

    out = np.empty(len(solution[0]))
    constants = (program.P.rows, program.P.cols, program.A.rows, program.A.cols, program.cones.zero)
    block = block_of(program.A.nnz + program.P.nnz)
    run(lambda i, j, _: kkt_kernels.residuals(*constants, *data, *solution, out, i, j), len(out), threads, block)
    return out


def gradients(
    program: Program, data: Arrays, solution: Pair, upstream: Pair, adjoint: Pair, *, threads: int | None
) -> Adjoint:
    """Data gradients from solution and adjoint (vx, vz), summed where P or A is shared.

    Second, the relative residuals (B,) of the adjoint's stationarity rows P vx + A'vz = dx.
    """
    from convexlearn.solvers.quadratic import kkt_kernels

    batch, block = len(solution[0]), block_of(program.A.nnz + program.P.nnz)
    blocks = count(batch, block)
    shared_P, shared_A = len(data[0]) == 1, len(data[2]) == 1
    gP = np.zeros((blocks if shared_P else batch, program.P.nnz))
    gA = np.zeros((blocks if shared_A else batch, program.A.nnz))
    residual = np.empty(batch)
    pattern = (program.P.rows, program.P.cols, program.A.rows, program.A.cols)
    constants = (*pattern, data[0], data[2], *upstream, *solution, *adjoint, gP, gA, residual)

    def task(first: int, last: int, number: int) -> None:
        kkt_kernels.gradients(*constants, number if shared_P else -1, number if shared_A else -1, first, last)

    run(task, batch, threads, block)
    gP, gA = (g.sum(0, keepdims=True) if total else g for g, total in ((gP, shared_P), (gA, shared_A)))
    return (gP, -adjoint[0], gA, adjoint[1]), residual


def select(data: Arrays, rows: np.ndarray) -> Arrays:
    """The values of some samples; shared fields stay shared."""
    batch = max(len(f) for f in data)
    P, q, A, b = (f if len(f) == 1 and batch != 1 else f[rows] for f in data)
    return P, q, A, b
