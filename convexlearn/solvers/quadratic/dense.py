"""Batched interior point for QPs and LPs in dense torch linear algebra: the reference, and the GPU path.

A homogeneous self-dual embedding with predictor-corrector steps (Goulart and Chen, Clarabel, 2024)
on data equilibrated sample by sample, then an active-set polish that makes primal and dual exact.
"""

import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexlearn.program.program import Program, ProgramData, Solution, Status
from convexlearn.solvers.base import (
    Named,
    Options,
    dual_infeasible,
    polyhedral_residual,
    primal_infeasible,
    product,
    status_from_residual,
    warn_adjoint,
)

CERTIFICATE_TOLERANCE = 1e-6
REGULARIZATION = 1e-11
SHIFT = 1e-10  # of the equilibrated optimality conditions
EQUILIBRATIONS = 12
SINGULAR = 1e-6
POLISH_ROUNDS = 4
MU_FLOOR = 1e-14  # below it rounding dominates; the polish decides


@dataclass(frozen=True)
class DenseOptions(Options):
    """Options of the dense solver; its own iteration limit is 100."""


class Dense(Named):
    """The dense solver: small or dense QPs and LPs, any device; memory grows with B (n + m)^2.

    Gradients are those of the active set {i: z_i > s_i} at the solution: with weakly active or
    duplicated constraints this is one element of the generalized derivative, always finite.
    """

    name: ClassVar[str] = "dense"
    options: ClassVar[type[Options]] = DenseOptions
    native_objective: ClassVar[bool] = True

    def supports(self, program: Program) -> str | None:
        """Only the zero cone and the nonnegative orthant."""
        return None if program.cones.polyhedral else "it solves QPs and LPs only"

    def solve(self, program: Program, data: ProgramData, options: Options, warm: Solution | None = None) -> Solution:
        """Solve every sample; `warm` is tried as an active set before the interior point runs."""
        problem = _Problem.of(program, data.expanded())
        if warm is not None and warm.x.shape == (data.batch, program.n) and bool(warm.ok.all()):
            x, z, a, d = _polish(problem, warm.x, warm.z, warm.private[0] > 0.5)
            residual = polyhedral_residual(program, problem.data, x, z)
            if bool((residual <= options.tolerance).all()):
                iterations = torch.zeros_like(residual, dtype=torch.int64)
                status = status_from_residual(residual)
                return Solution(program, data, x, z, status, iterations, residual, (a, d))
        return _InteriorPoint(problem, options).run(data)

    def adjoint(self, solution: Solution, dx: Tensor, dz: Tensor) -> ProgramData:
        """Gradients of the data by one solve with the transposed optimality conditions."""
        problem = _Problem.of(solution.program, solution.data.expanded())
        ok = solution.ok[:, None]
        a, d = solution.private
        rhs = torch.where(ok, torch.cat([dx, dz], 1), 0.0)
        x, z = torch.where(ok, solution.x, 0.0), torch.where(ok, solution.z, 0.0)
        w = _solve_kkt(problem, a, d, rhs, transposed=True)
        wx, wz = (torch.where(ok, v, 0.0) for v in (w[:, : solution.program.n], a * w[:, solution.program.n :]))
        terms = (problem.P @ wx[:, :, None])[:, :, 0], (problem.A.mT @ wz[:, :, None])[:, :, 0], rhs[:, : dx.shape[1]]
        if dx.numel():
            size = torch.stack([t.abs().amax(1) for t in (*terms, rhs)]).amax(0).clamp(min=1e-300)
            warn_adjoint((terms[0] + terms[1] - terms[2]).abs().amax(1) / size)
        return _data_gradient(solution, x, z, wx, wz)


def _data_gradient(solution: Solution, x: Tensor, z: Tensor, wx: Tensor, wz: Tensor) -> ProgramData:
    program, data = solution.program, solution.data
    row, col = (torch.as_tensor(i, device=x.device).long() for i in (program.P.rows, program.P.cols))
    gP = -(wx[:, row] * x[:, col] + wx[:, col] * x[:, row]) * torch.where(row == col, 0.5, 1.0)
    row, col = (torch.as_tensor(i, device=x.device).long() for i in (program.A.rows, program.A.cols))
    gA = -(z[:, row] * wx[:, col] + wz[:, row] * x[:, col])
    found = zip(ProgramData.FIELDS, (gP, -wx, gA, wz))
    gradients = (g.sum(0, keepdim=True) if data.shared(name) and data.batch != 1 else g for name, g in found)
    return ProgramData(*gradients, batch=data.batch)


@dataclass
class _Problem:
    """Dense matrices of a batch, all (B, ...)."""

    program: Program
    data: ProgramData
    P: Tensor
    A: Tensor

    @classmethod
    def of(cls, program: Program, data: ProgramData) -> "_Problem":
        upper = program.P.dense(data.P)
        return cls(program, data, upper + upper.triu(1).mT, program.A.dense(data.A))


def _solve_kkt(problem: _Problem, a: Tensor, d: Tensor, rhs: Tensor, transposed: bool = False) -> Tensor:
    """Solve [P, A'; aA, -d] v = rhs (or its transpose), a and d (B, m): regularized LU, or least squares."""
    n, m = problem.program.n, problem.program.m
    K = rhs.new_zeros(len(rhs), n + m, n + m)
    K[:, :n, :n] = problem.P
    K[:, :n, n:] = problem.A.mT
    K[:, n:, :n] = a[:, :, None] * problem.A
    K.diagonal(dim1=1, dim2=2)[:, n:] -= d
    if transposed:
        K = K.mT.contiguous()
    if n + m == 0:
        return rhs
    R, C = _equilibrate_rows_and_columns(K)
    K, rhs = R[:, :, None] * K * C[:, None, :], (R * rhs)[:, :, None]
    regularized = K.clone()
    regularized.diagonal(dim1=1, dim2=2)[:, :n] += SHIFT
    regularized.diagonal(dim1=1, dim2=2)[:, n:] -= SHIFT
    factor, pivots, info = torch.linalg.lu_factor_ex(regularized)
    factor = torch.where((info > 0)[:, None, None], torch.eye(n + m, dtype=rhs.dtype, device=rhs.device), factor)
    v = torch.linalg.lu_solve(factor, pivots, rhs)
    best = (rhs - K @ v).abs().amax((1, 2))
    for _ in range(6):
        update = v + torch.linalg.lu_solve(factor, pivots, rhs - K @ v)
        error = (rhs - K @ update).abs().amax((1, 2))
        better = error < best
        if not bool(better.any()):
            break
        v = torch.where(better[:, None, None], update, v)
        best = torch.where(better, error, best)
    singular = best > SINGULAR * rhs.abs().amax((1, 2))
    if bool(singular.any()):  # inconsistent: the shift alone would return a huge step along the null space
        v[singular] = torch.linalg.pinv(K[singular], rtol=1e-12) @ rhs[singular]
    return C * v[:, :, 0]


def _equilibrate_rows_and_columns(K: Tensor) -> tuple[Tensor, Tensor]:
    """Scalings (B, k) of rows and columns that bring the largest entries of K (B, k, k) near 1 (Ruiz, 2001)."""
    R, C, size = K.new_ones(K.shape[:2]), K.new_ones(K.shape[:2]), K.abs()
    for _ in range(3):
        scaled = R[:, :, None] * size * C[:, None, :]
        row, column = scaled.amax(2), scaled.amax(1)
        R = R / torch.where(row > 1e-12, row, 1.0).sqrt()
        C = C / torch.where(column > 1e-12, column, 1.0).sqrt()
    return R, C


def _polish(problem: _Problem, x: Tensor, z: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact primal and dual on the active set (B, m), corrected a few times; returns x, z and (a, d).

    A correction drops rows with a negative dual and adds violated rows. The best pair by KKT
    residual is returned, the given one where no round improves on it.
    """
    program, data, zero = problem.program, problem.data, problem.program.cones.zero
    residual = polyhedral_residual(program, data, x, z)
    best_x, best_z, best_active = x, z, active
    for _ in range(POLISH_ROUNDS):
        a = active.to(x.dtype)
        v = _solve_kkt(problem, a, 1 - a, torch.cat([-data.q, a * data.b], 1))
        x, z = v[:, : program.n], v[:, program.n :]
        slack = data.b - product(program, data.A, x)
        new = polyhedral_residual(program, data, x, z * a)
        better = new < residual
        best_x = torch.where(better[:, None], x, best_x)
        best_z = torch.where(better[:, None], z * a, best_z)
        best_active = torch.where(better[:, None], active, best_active)
        residual = torch.where(better, new, residual)
        corrected = torch.where(active, z > 0, slack < 0)
        corrected[:, :zero] = True
        if bool((residual < 1e-13).all()) or bool((corrected == active).all()):
            break
        active = corrected
    a = best_active.to(x.dtype)
    return best_x, best_z, a, 1 - a


class _InteriorPoint:
    """State and steps of the embedding for one batch, in equilibrated coordinates."""

    def __init__(self, problem: _Problem, options: Options) -> None:
        self.original, self.options = problem, options
        self.program, self.zero = problem.program, problem.program.cones.zero
        self.limit = options.max_iterations or 100
        self.D, self.E, self.cost = _equilibrate(problem)
        data = problem.data
        self.P = self.cost[:, None, None] * self.D[:, :, None] * problem.P * self.D[:, None, :]
        self.A = self.E[:, :, None] * problem.A * self.D[:, None, :]
        self.q, self.b = self.cost[:, None] * self.D * data.q, self.E * data.b

    def run(self, data: ProgramData) -> Solution:
        """Iterate until every sample is solved, certified or out of iterations; then polish."""
        program, B = self.program, len(self.q)
        deadline = time.monotonic() + (self.options.time_limit or float("inf"))
        self._start()
        status = torch.full((B,), int(Status.FAILED), device=self.q.device)
        iterations = torch.zeros(B, dtype=torch.int64, device=self.q.device)
        open_ = torch.ones(B, dtype=torch.bool, device=self.q.device)
        best = self.q.new_full((B,), torch.inf)
        best_x, best_z, best_s = self.x.clone(), self.z.clone(), self.s.clone()
        for _ in range(self.limit + 1):
            x, z, s = self._unscaled()
            residual = polyhedral_residual(program, self.original.data, x, z)
            better = (residual < best) & open_
            best_x, best_z, best_s = (
                torch.where(better[:, None], new, old) for new, old in ((x, best_x), (z, best_z), (s, best_s))
            )
            best = torch.where(better, residual, best)
            status, open_ = self._close(status, open_, best)
            if not bool(open_.any()) or time.monotonic() > deadline or int(iterations.max()) >= self.limit:
                break
            iterations += open_
            self._step(open_)
        return self._finish(data, (best_x, best_z, best_s), status, iterations)

    def _close(self, status: Tensor, open_: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
        """Mark samples that are solved or certified infeasible or unbounded."""
        data = self.original.data
        x, z = self.D * self.x, self.E * self.z / self.cost[:, None]
        certified = (self.tau < 1e-2 * self.kappa.clamp(min=1e-300)) | (self.tau < 1e-8)
        infeasible = open_ & certified & primal_infeasible(self.program, data, z, CERTIFICATE_TOLERANCE)
        unbounded = open_ & certified & dual_infeasible(self.program, data, x, CERTIFICATE_TOLERANCE)
        status = torch.where(infeasible, int(Status.INFEASIBLE), status)
        status = torch.where(unbounded & ~infeasible, int(Status.UNBOUNDED), status)
        stuck = ~torch.isfinite(self.x).all(1) | (self.mu < MU_FLOOR)
        solved = best <= max(self.options.tolerance, 1e-9)  # the polish does the rest
        return status, open_ & ~infeasible & ~unbounded & ~solved & ~stuck

    def _finish(self, data: ProgramData, point: tuple[Tensor, ...], status: Tensor, iterations: Tensor) -> Solution:
        x, z, s = point
        certified = (status == Status.INFEASIBLE) | (status == Status.UNBOUNDED)
        # which of s and z is larger depends on the scale of the row: compare them equilibrated
        z_, s_ = z * self.cost[:, None] / self.E, s * self.E
        ratio = z_ / (z_ + s_).clamp(min=1e-300)
        ratio[:, : self.zero] = 1.0
        xp, zp, a, d = _polish(self.original, x, z, ratio > 0.5)
        residual = polyhedral_residual(self.program, self.original.data, xp, zp)
        # where the polish gained nothing, the derivative is that of the interior point's iterate
        kept = (xp == x).all(1, keepdim=True) & (residual > self.options.tolerance)[:, None]
        a, d = torch.where(kept, ratio, a), torch.where(kept, 1 - ratio, d)
        status = torch.where(certified, status, status_from_residual(residual))
        xp, zp = (torch.where(certified[:, None], torch.nan, v) for v in (xp, zp))
        residual = torch.where(certified, torch.inf, residual)
        return Solution(self.program, data, xp, zp, status, iterations, residual, (a, d))

    def _unscaled(self) -> tuple[Tensor, Tensor, Tensor]:
        tau = self.tau[:, None]
        return self.D * self.x / tau, self.E * self.z / (self.cost[:, None] * tau), self.s / (self.E * tau)

    def _start(self) -> None:
        """x, z from the unconstrained regularized problem, shifted into the cone (Mehrotra's start)."""
        B, m = self.b.shape
        self.h = torch.ones_like(self.b)
        self.h[:, : self.zero] = 0.0
        self._factor()
        self.x, z = self._solve(-self.q, self.b)
        s = -z
        for v in (s, z):
            v[:, self.zero :] += self._shift(v[:, self.zero :])
        s[:, : self.zero] = 0.0
        self.s, self.z = s, z
        self.tau, self.kappa = self.q.new_ones(B), self.q.new_ones(B)
        self.degree = m - self.zero + 1
        self._mu()

    @staticmethod
    def _shift(v: Tensor) -> Tensor:
        """(B, 1) amount that makes v positive: nothing where it is comfortably so."""
        if v.shape[1] == 0:
            return v.new_zeros(len(v), 1)
        low = v.amin(1, keepdim=True)
        return torch.where(low > 1e-6 * v.abs().amax(1, keepdim=True).clamp(min=1.0), 0.0, 1.0 - low)

    def _mu(self) -> None:
        gap = (self.s[:, self.zero :] * self.z[:, self.zero :]).sum(1)
        self.mu = (gap + self.tau * self.kappa) / self.degree

    def _factor(self) -> None:
        """LU of [P + G'H^-1 G, E'; E, 0], regularized; h (B, m) is the diagonal of H, 0 on equalities."""
        G, E, n = self.A[:, self.zero :], self.A[:, : self.zero], self.program.n
        size = n + self.zero
        K = self.q.new_zeros(len(self.q), size, size)
        K[:, :n, :n] = self.P + G.mT @ (G / self.h[:, self.zero :, None])
        K[:, n:, :n], K[:, :n, n:] = E, E.mT
        diagonal = K.diagonal(dim1=1, dim2=2)
        diagonal[:, :n] += REGULARIZATION * (1 + diagonal[:, :n])
        diagonal[:, n:] -= REGULARIZATION
        self.lu = torch.linalg.lu_factor_ex(K)[:2]

    def _solve(self, rx: Tensor, rz: Tensor) -> tuple[Tensor, Tensor]:
        """Solve [P, A'; A, -H] (x, z) = (rx, rz) with iterative refinement."""
        x, z = self._solve_once(rx, rz)
        for _ in range(2):
            ex = rx - (self.P @ x[:, :, None] + self.A.mT @ z[:, :, None])[:, :, 0]
            ez = rz - (self.A @ x[:, :, None])[:, :, 0] + self.h * z
            dx, dz = self._solve_once(ex, ez)
            x, z = x + dx, z + dz
        return x, z

    def _solve_once(self, rx: Tensor, rz: Tensor) -> tuple[Tensor, Tensor]:
        G, h = self.A[:, self.zero :], self.h[:, self.zero :]
        top = rx + (G.mT @ (rz[:, self.zero :] / h)[:, :, None])[:, :, 0]
        v = torch.linalg.lu_solve(*self.lu, torch.cat([top, rz[:, : self.zero]], 1)[:, :, None])[:, :, 0]
        x = v[:, : self.program.n]
        z = ((G @ x[:, :, None])[:, :, 0] - rz[:, self.zero :]) / h
        return x, torch.cat([v[:, self.program.n :], z], 1)

    def _step(self, open_: Tensor) -> None:
        """One predictor-corrector step on the open samples."""
        s, z, tau, kappa = self.s[:, self.zero :], self.z[:, self.zero :], self.tau, self.kappa
        self.h = torch.cat([torch.zeros_like(self.b[:, : self.zero]), s / z], 1)
        self._factor()
        Px = (self.P @ self.x[:, :, None])[:, :, 0]
        self.xi, self.Pxi = self.x / tau[:, None], Px / tau[:, None]
        rx = -(Px + (self.A.mT @ self.z[:, :, None])[:, :, 0] + self.q * tau[:, None])
        rz = (self.A @ self.x[:, :, None])[:, :, 0] + self.s - self.b * tau[:, None]
        rtau = (self.q * self.x).sum(1) + (self.b * self.z).sum(1) + kappa + (self.x * self.Pxi).sum(1)
        self.constant = self._solve(-self.q, self.b)
        affine = self._direction((rx, rz, rtau), self.s, kappa * tau)
        alpha = self._length(affine)
        sigma = (1 - alpha) ** 3
        _, dz, ds, dtau, dkappa = affine
        center = sigma * self.mu
        correction = torch.zeros_like(self.s)
        correction[:, self.zero :] = (s * z + ds[:, self.zero :] * dz[:, self.zero :] - center[:, None]) / z
        keep = 1 - sigma
        residuals = (keep[:, None] * rx, keep[:, None] * rz, keep * rtau)
        direction = self._direction(residuals, correction, kappa * tau + dkappa * dtau - center)
        alpha = (0.99 * self._length(direction)).clamp(max=1.0)
        finite = torch.isfinite(torch.cat([direction[0], direction[1]], 1)).all(1)
        alpha = torch.where(open_ & finite, alpha, 0.0)
        state = (self.x, self.z, self.s, self.tau, self.kappa)
        lengths = (alpha[:, None],) * 3 + (alpha,) * 2
        self.x, self.z, self.s, self.tau, self.kappa = (
            v + torch.where(a > 0, a * d, 0.0) for v, a, d in zip(state, lengths, direction)
        )
        self._mu()

    def _direction(self, residuals: tuple[Tensor, Tensor, Tensor], ds: Tensor, dkappa: Tensor) -> tuple[Tensor, ...]:
        """(dx, dz, ds, dtau, dkappa); `ds` is the complementarity term divided by z, `dkappa` by 1."""
        rx, rz, rtau = residuals
        x1, z1 = self._solve(rx, ds - rz)
        x2, z2 = self.constant
        ratio = self.kappa / self.tau
        numerator = rtau - dkappa / self.tau + (self.q * x1).sum(1) + (self.b * z1).sum(1) + 2 * (self.Pxi * x1).sum(1)
        denominator = ratio + (self.xi * self.Pxi).sum(1) - 2 * (self.Pxi * x2).sum(1)
        denominator = denominator - (self.q * x2).sum(1) - (self.b * z2).sum(1)
        dtau = numerator / denominator
        dx, dz = x1 + dtau[:, None] * x2, z1 + dtau[:, None] * z2
        slack = -(ds + self.h * dz)
        slack[:, : self.zero] = 0.0
        return dx, dz, slack, dtau, -(dkappa + self.kappa * dtau) / self.tau

    def _length(self, direction: tuple[Tensor, ...]) -> Tensor:
        """(B,) largest step in (0, 1] that keeps s, z, tau, kappa nonnegative."""
        _, dz, ds, dtau, dkappa = direction
        now = torch.cat([self.s[:, self.zero :], self.z[:, self.zero :], self.tau[:, None], self.kappa[:, None]], 1)
        step = torch.cat([ds[:, self.zero :], dz[:, self.zero :], dtau[:, None], dkappa[:, None]], 1)
        return torch.where(step < 0, -now / step, torch.inf).amin(1).clamp(max=1.0)


def _equilibrate(problem: _Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Column scaling D (B, n), row scaling E (B, m) and cost scaling (B,): Ruiz (2001)."""
    P, A, q = problem.P, problem.A, problem.data.q
    D, E = torch.ones_like(q), torch.ones_like(problem.data.b)
    for _ in range(EQUILIBRATIONS):
        P_, A_ = D[:, :, None] * P * D[:, None, :], E[:, :, None] * A * D[:, None, :]
        column = P_.abs().amax(1) if P.shape[1] else D
        if A.shape[1]:
            column = column.maximum(A_.abs().amax(1))
            row = A_.abs().amax(2) if A.shape[2] else E
            E = E / torch.where(row > 1e-12, row, 1.0).sqrt()
        D = D / torch.where(column > 1e-12, column, 1.0).sqrt()
    D, E = D.clamp(1e-6, 1e6), E.clamp(1e-6, 1e6)
    if q.shape[1] == 0:
        return D, E, q.new_ones(len(q))
    size = torch.maximum((D * q).abs().amax(1), (D[:, :, None] * P * D[:, None, :]).abs().mean(1).amax(1))
    return D, E, 1 / torch.where(size > 1e-12, size, 1.0)
