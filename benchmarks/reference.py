"""Exact reference: Clarabel at 1e-12, its active set, then one dense KKT solve under torch autograd."""

from typing import Any

import clarabel
import numpy as np
import scipy.sparse as sp
import torch
from cvxpylayers.interfaces.base import SolverInterface
from torch import Tensor

TOLERANCE = 1e-12


class Exact(SolverInterface):
    """A cvxpylayers solver for QPs and LPs, one sample after the other; slow and exact.

    The gradient is that of the KKT system of the active set {i: z_i > s_i}; where the solution is
    not unique (epigraph variables without cost) the least-norm adjoint is taken.
    """

    canon_solver = "SCS"
    supports_quad_obj = True

    def setup(self, ctx: Any) -> None:
        """Remember CVXPY's sparsity patterns."""
        self.A_structure = ctx.reduced_A.problem_data_index
        self.P_structure = ctx.reduced_P.problem_data_index if ctx.reduced_P.reduced_mat is not None else None

    def solve_torch_batch(self, P, q, A, dims, solver_args, needs_grad):
        """x (B, n), z (B, m), and the graph from the data to them."""
        data = [None if v is None else v.detach().double().requires_grad_() for v in (P, q, A)]
        with torch.enable_grad():
            rows = []
            for k in range(len(q)):
                sample = [None if v is None else v[k] for v in data]
                rows.append(self._solve(*sample, dims))
            x, z = (torch.stack(v) for v in zip(*rows))
        return x.detach(), z.detach(), (data, x, z)

    def derivative_torch_batch(self, dprimal, ddual, saved_state):
        """Gradients of (P, q, A) by autograd."""
        data, x, z = saved_state
        inputs = [v for v in data if v is not None]
        grads = list(torch.autograd.grad((x, z), inputs, (dprimal, ddual)))
        return (None, *grads) if data[0] is None else tuple(grads)

    def _matrices(self, P: Tensor | None, q: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        indices, pointers, (m, columns) = self.A_structure
        n = columns - 1
        full = _dense(values, indices, pointers, (m, columns))
        quadratic = q.new_zeros(n, n)
        if P is not None and self.P_structure is not None:
            indices, pointers, _ = self.P_structure
            quadratic = _dense(P, indices, pointers, (n, n))
            quadratic = 0.5 * (quadratic + quadratic.T)
        return quadratic, q[:n], -full[:, :n], full[:, n]

    def _solve(self, P: Tensor | None, q: Tensor, values: Tensor, dims: Any) -> tuple[Tensor, Tensor]:
        P, q, A, b = self._matrices(P, q, values)
        x, z, slack = _clarabel(*(v.detach().numpy() for v in (P, q, A, b)), dims.zero)
        active = torch.as_tensor((np.arange(len(b)) < dims.zero) | (z > slack))
        n, k = len(q), int(active.sum())
        K = torch.cat([torch.cat([P, A[active].T], 1), torch.cat([A[active], A.new_zeros(k, k)], 1)])
        rhs = torch.cat([-q, b[active]])
        start = torch.cat([torch.as_tensor(x), torch.as_tensor(z)[active]])
        inverse = torch.linalg.pinv(K.detach(), hermitian=True, rtol=1e-12)
        with torch.no_grad():
            for _ in range(3):
                start = start - inverse @ (K @ start - rhs)
        # One Newton step from the solution: its value is the solution, its derivative the implicit one.
        exact = start - inverse @ (K @ start - rhs)
        return exact[:n], b.new_zeros(len(b)).masked_scatter(active, exact[n:])


def _dense(values: Tensor, indices: np.ndarray, pointers: np.ndarray, shape: tuple[int, int]) -> Tensor:
    columns = np.repeat(np.arange(len(pointers) - 1), np.diff(pointers))
    flat = torch.as_tensor(indices.astype(np.int64) * shape[1] + columns)
    return values.new_zeros(shape[0] * shape[1]).index_add(0, flat, values).reshape(shape)


def _clarabel(P: np.ndarray, q: np.ndarray, A: np.ndarray, b: np.ndarray, zero: int) -> tuple:
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = TOLERANCE
    cones = [clarabel.ZeroConeT(zero), clarabel.NonnegativeConeT(len(b) - zero)]
    solution = clarabel.DefaultSolver(
        sp.triu(sp.csc_matrix(P)).tocsc(), q, sp.csc_matrix(A), b, cones, settings
    ).solve()
    return tuple(np.array(v) for v in (solution.x, solution.z, solution.s))
