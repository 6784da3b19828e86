"""Other ecosystems' contracts: cvxpylayers' SolverInterface, deepinv's linear operators."""

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from cvxpylayers.interfaces.base import SolverInterface
from torch import Tensor

from convexlearn.checks import SIZES, Check, checked, shown
from convexlearn.errors import CompileError, OptionError, SolverError
from convexlearn.program.program import Cones, Program, ProgramData, Solution, Sparsity, Status
from convexlearn.solvers.quadratic.solver import Quadratic, QuadraticOptions

FLOATING = Check("a floating tensor", lambda v: isinstance(v, Tensor) and v.is_floating_point())


class QuadraticInterface(SolverInterface):
    """`CvxpyLayer(problem, ..., solver=QuadraticInterface())` solves QPs and LPs with our solver.

    For cvxpylayers 1.2 and its torch, jax and mlx layers; one instance per layer. Options of the
    solver go into the layer's solver_args. Failures raise convexlearn's SolverError.

    >>> import cvxpy as cp, torch
    >>> from cvxpylayers.torch import CvxpyLayer
    >>> x, t = cp.Variable(2), cp.Parameter(2)
    >>> problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [x >= 0])
    >>> layer = CvxpyLayer(problem, [t], [x], solver=QuadraticInterface())
    >>> layer(torch.tensor([1.0, -1.0], dtype=torch.float64))[0].abs().round(decimals=6)
    tensor([1., 0.], dtype=torch.float64)
    """

    canon_solver = "SCS"
    supports_quad_obj = True

    def __init__(self) -> None:
        self._solver, self._form = Quadratic(), None

    def setup(self, ctx: Any) -> None:
        """Read CVXPY's structure; called once by the layer."""
        if self._form is not None:
            raise OptionError("this QuadraticInterface belongs to another layer; make a new one for each")
        self._form = _Form(ctx)

    def solve_torch_batch(
        self, P: Tensor | None, q: Tensor, A: Tensor, dims: Any, solver_args: dict, needs_grad: bool
    ) -> tuple[Tensor, Tensor, Solution]:
        """x (B, n) and z (B, m), and the solution for the backward pass."""
        if self._form is None:
            raise OptionError("QuadraticInterface: give it to a CvxpyLayer, which calls setup first")
        options = QuadraticOptions().updated("QuadraticInterface", **solver_args)
        data = self._form.data(P, q, A)
        solution = self._solver.solve(self._form.program, data, options)
        failed = torch.nonzero(~solution.ok)[:, 0].tolist()
        if failed:
            names = ", ".join(f"{k} {Status(int(solution.status[k])).name}" for k in failed[:10])
            raise SolverError(f"{len(failed)} of {data.batch} samples have no solution: {names}")
        return solution.x.to(q.dtype), solution.z.to(q.dtype), solution

    def derivative_torch_batch(
        self, dprimal: Tensor, ddual: Tensor, saved_state: Solution
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients of CVXPY's (P, q, A) entries, per sample."""
        if self._form is None:
            raise OptionError("QuadraticInterface: give it to a CvxpyLayer, which calls setup first")
        # cvxpylayers stacks shared and batched parameters alike, so every sample needs its own gradient
        expanded = saved_state.replaced(data=saved_state.data.expanded())
        gradient = self._solver.adjoint(expanded, dprimal.double(), ddual.double())
        dP, dq, dA = self._form.transposed(gradient)
        return (None if dP is None else dP.to(dprimal.dtype)), dq.to(dprimal.dtype), dA.to(dprimal.dtype)


class _Form:
    """CVXPY's entries (P, q with a constant, [A b] with A negated) to ProgramData and back."""

    def __init__(self, ctx: Any) -> None:
        indices, pointers, (m, columns) = ctx.reduced_A.problem_data_index
        n = columns - 1
        cols = np.repeat(np.arange(columns), np.diff(pointers))
        self.inside = int(pointers[n])
        self.offsets = torch.as_tensor(indices[self.inside :].astype(np.int64))
        pattern = Sparsity(indices[: self.inside].astype(np.int32), cols[: self.inside].astype(np.int32), (m, n))
        upper, self.P_map = _upper_triangle(ctx.reduced_P, n)
        A = _fixed(ctx.reduced_A.reduced_mat)
        b = np.zeros(m)
        b[indices[self.inside :]] = A[self.inside :]
        P = np.zeros(0) if self.P_map is None else _fixed(self.P_map @ sp.csr_array(ctx.reduced_P.reduced_mat))
        fixed = (P, _fixed(ctx.q)[:n], -A[: self.inside], b)
        self.program = Program(n, m, _cones(ctx.cone_dims), upper, pattern, fixed)

    def data(self, P: Tensor | None, q: Tensor, A: Tensor) -> ProgramData:
        """The values in our form; fields that don't vary over the batch are stored once."""
        n, m, batch = self.program.n, self.program.m, len(q)
        A = A.double()
        b = A.new_zeros(batch, m)
        b[:, self.offsets] = A[:, self.inside :]
        if P is None or self.P_map is None:
            quadratic = A.new_zeros(1, 0)
        else:
            quadratic = _apply(self.P_map, P.double())
        fields = (quadratic, q.double()[:, :n], -A[:, : self.inside], b)
        return ProgramData(*(_once(f) for f in fields), batch=batch)

    def transposed(self, gradient: ProgramData) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients of CVXPY's entries."""
        dq = torch.cat([gradient.q, gradient.q.new_zeros(gradient.batch, 1)], 1)
        dA = torch.cat([-gradient.A, gradient.b[:, self.offsets]], 1)
        dP = None if self.P_map is None else _apply(sp.csr_array(self.P_map.T), gradient.P)
        return dP, dq, dA


def _upper_triangle(reduced: Any, n: int) -> tuple[Sparsity, sp.csr_array | None]:
    """Pattern of the upper triangle of the symmetrised P, and the map from CVXPY's entries."""
    if reduced.reduced_mat is None:
        empty = np.zeros(0, dtype=np.int32)
        return Sparsity(empty, empty, (n, n)), None
    rows, pointers, _ = reduced.problem_data_index
    cols = np.repeat(np.arange(n), np.diff(pointers))
    keys = np.maximum(rows, cols).astype(np.int64) * n + np.minimum(rows, cols)
    unique, position = np.unique(keys, return_inverse=True)
    weights = np.where(rows == cols, 1.0, 0.5)
    matrix = sp.csr_array((weights, (position, np.arange(len(rows)))), shape=(len(unique), len(rows)))
    return Sparsity((unique % n).astype(np.int32), (unique // n).astype(np.int32), (n, n)), matrix


def _fixed(matrix: Any) -> np.ndarray:
    """Entries that only the last, constant column contributes to; NaN for those that parameters change."""
    matrix = sp.csr_array(matrix)
    varying = np.diff(sp.csr_array(matrix[:, :-1]).indptr) > 0
    return np.where(varying, np.nan, matrix[:, [matrix.shape[1] - 1]].toarray().ravel())


def _cones(dims: Any) -> Cones:
    others = [name for name in ("soc", "psd", "exp", "p3d", "pnd") if getattr(dims, name, None)]
    if others:
        raise CompileError(
            f"QuadraticInterface solves QPs and LPs; this problem has cones of kind {', '.join(others)}. "
            "Leave out solver=, or use convexlearn.ConvexLayer"
        )
    return Cones(zero=int(dims.zero), nonneg=int(dims.nonneg))


def _apply(matrix: sp.csr_array, rows: Tensor) -> Tensor:
    """matrix @ row for every row of a tensor."""
    return torch.from_numpy(np.ascontiguousarray((matrix @ rows.detach().cpu().numpy().T).T)).to(rows.device)


def _once(field: Tensor) -> Tensor:
    return field[:1].contiguous() if len(field) > 1 and bool((field == field[:1]).all()) else field.contiguous()


@checked(image=SIZES, like=FLOATING)
def physics_matrix(physics: Any, image: tuple[int, ...], *, like: Tensor | None = None) -> Tensor:
    """H `(m, n)` of a linear operator by deepinv's contract, as the value of a CVXPY parameter.

    physics.A maps images `(B, *image)`, image = (C, h, w), to measurements `(B, ...)`; n and m count their entries, row
    by row. like: a tensor whose dtype and device the operator works in, by default float64 on the CPU. All n unit
    images are mapped at once. OptionError where A is not linear, or A_adjoint, if there is one, is not its adjoint.

    >>> class Halve:
    ...     def A(self, x, **kwargs):
    ...         return x[..., ::2] / 2
    >>> physics_matrix(Halve(), (1, 1, 4))
    tensor([[0.5000, 0.0000, 0.0000, 0.0000],
            [0.0000, 0.0000, 0.5000, 0.0000]], dtype=torch.float64)
    """
    if not callable(getattr(physics, "A", None)):
        raise OptionError(f"physics_matrix: physics must have a method A(x), got {shown(physics)}")
    like = torch.empty(0, dtype=torch.float64) if like is None else like
    n, kind = torch.Size(image).numel(), type(physics).__name__
    with torch.no_grad():
        unit = torch.eye(n, dtype=like.dtype, device=like.device)
        columns = physics.A(unit.reshape(n, *image))
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(2, n, generator=generator).to(like)
        measured = physics.A(probe.reshape(2, *image))
        H = columns.reshape(n, -1).mT
        tolerance = 1e3 * torch.finfo(like.dtype).eps * (1 + float(H.abs().sum(1).max()))
        if not torch.allclose(measured.flatten(1), probe @ H.mT, rtol=0, atol=tolerance):
            raise OptionError(f"physics_matrix: {kind}.A is not linear, or random; it has no matrix")
        if hasattr(physics, "A_adjoint"):
            back, tolerance = physics.A_adjoint(measured).flatten(1), tolerance * (1 + float(H.abs().sum(0).max()))
            if not torch.allclose(back, measured.flatten(1) @ H, rtol=0, atol=tolerance):
                raise OptionError(f"physics_matrix: {kind}.A_adjoint is not the adjoint of {kind}.A")
    return H.contiguous()
