"""Program (structure), ProgramData (values), Solution and Status: what layer and solvers exchange."""

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor


class Status(IntEnum):
    """How the solve of one sample ended.

    SOLVED: relative KKT residual <= 1e-9; INACCURATE: <= 1e-6; INFEASIBLE and UNBOUNDED come with a
    certificate; FAILED is everything else.
    """

    SOLVED = 0
    INACCURATE = 1
    INFEASIBLE = 2
    UNBOUNDED = 3
    FAILED = 4


CPU = torch.device("cpu")
SOLVED_RESIDUAL = 1e-9
INACCURATE_RESIDUAL = 1e-6


@dataclass(frozen=True)
class Cones:
    """K = {0}^zero x R+^nonneg x second-order cones x PSD cones x exponential cones x power cones.

    Rows come in this order. A PSD cone of order k is stored as the lower triangle in column-major
    order, off-diagonal entries scaled by sqrt 2 (SCS's convention); an exponential cone is
    closure{(x, y, z): y exp(x/y) <= z, y > 0}.
    """

    zero: int = 0
    nonneg: int = 0
    soc: tuple[int, ...] = ()
    psd: tuple[int, ...] = ()
    exp: int = 0
    power: tuple[float, ...] = ()

    @property
    def size(self) -> int:
        """Number of rows."""
        psd = sum(k * (k + 1) // 2 for k in self.psd)
        return self.zero + self.nonneg + sum(self.soc) + psd + 3 * self.exp + 3 * len(self.power)

    @property
    def polyhedral(self) -> bool:
        """True when only the zero cone and the nonnegative orthant occur: a QP or an LP."""
        return self.zero + self.nonneg == self.size


@dataclass(frozen=True, eq=False)
class Sparsity:
    """Positions of a matrix's stored entries, sorted by column, then row (CSC order), no duplicates."""

    rows: np.ndarray
    cols: np.ndarray
    shape: tuple[int, int]

    @property
    def nnz(self) -> int:
        """Number of stored entries."""
        return len(self.rows)

    @property
    def indptr(self) -> np.ndarray:
        """Column pointers of the CSC form."""
        return np.searchsorted(self.cols, np.arange(self.shape[1] + 1)).astype(np.int32)

    def matrix(self, values: np.ndarray) -> sp.csc_array:
        """The sparse matrix with these `values` (nnz,); zeros stay stored."""
        return sp.csc_array((values, self.rows, self.indptr), shape=self.shape)

    def dense(self, values: Tensor) -> Tensor:
        """The matrices with these `values` (B, nnz) as a dense tensor (B, rows, cols)."""
        rows, cols = (torch.as_tensor(i, device=values.device).long() for i in (self.rows, self.cols))
        out = values.new_zeros(len(values), *self.shape)
        out[:, rows, cols] = values
        return out


@dataclass(frozen=True, eq=False)
class Program:
    """Structure of: minimize 1/2 x'Px + q'x subject to Ax + s = b, s in K.

    x: (n,), b and s: (m,). `P` stores the upper triangle only (row <= col). The dual variable
    z: (m,) lies in K* and satisfies Px + q + A'z = 0, s'z = 0. `fixed` holds for (P, q, A, b) the
    values that no parameter changes, NaN where they vary; None when nothing is known. Programs are
    immutable and compared by identity, so solvers may key their symbolic analysis on them.
    """

    n: int
    m: int
    cones: Cones
    P: Sparsity
    A: Sparsity
    fixed: tuple[np.ndarray, ...] | None = None

    def __deepcopy__(self, memo: dict) -> "Program":
        return self


def as_array(v: Tensor | np.ndarray) -> np.ndarray:
    """A contiguous array on the host that shares memory with a tensor where it can."""
    if isinstance(v, np.ndarray):
        return v
    if v.device.type == "cpu" and v.is_contiguous():
        return v.detach().numpy()
    return np.ascontiguousarray(v.detach().cpu().numpy())


def as_tensor(v: Tensor | np.ndarray) -> Tensor:
    """A tensor that shares memory with a contiguous array."""
    return torch.from_numpy(v) if isinstance(v, np.ndarray) else v


class ProgramData:
    """Values of a program for a batch: stored entries P (B, nnz), A (B, nnz) and vectors q (B, n), b (B, m).

    float64. A field that all samples share has leading dimension 1; `batch` is B. The gradient of
    a shared field is the sum over the batch and has leading dimension 1 too. Made from tensors, or from
    contiguous arrays, which become tensors when they are asked for: solvers on the host spare that time.
    """

    FIELDS = ("P", "q", "A", "b")

    def __init__(self, P: Any, q: Any, A: Any, b: Any, batch: int) -> None:
        self._given = (P, q, A, b)
        self._tensors: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._arrays: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None = None
        self.batch = batch

    def fields(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(P, q, A, b)."""
        if self._tensors is None:
            P, q, A, b = self._given
            self._tensors = as_tensor(P), as_tensor(q), as_tensor(A), as_tensor(b)
        return self._tensors

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(P, q, A, b) as contiguous arrays on the host."""
        if self._arrays is None:
            P, q, A, b = self._given
            self._arrays = as_array(P), as_array(q), as_array(A), as_array(b)
        return self._arrays

    @property
    def P(self) -> Tensor:
        """(B, nnz) or (1, nnz) entries of the upper triangle of P."""
        return self.fields()[0]

    @property
    def q(self) -> Tensor:
        """(B, n) or (1, n)."""
        return self.fields()[1]

    @property
    def A(self) -> Tensor:
        """(B, nnz) or (1, nnz)."""
        return self.fields()[2]

    @property
    def b(self) -> Tensor:
        """(B, m) or (1, m)."""
        return self.fields()[3]

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        q = self._given[1]
        return CPU if isinstance(q, np.ndarray) else q.device

    def shared(self, name: str) -> bool:
        """True when all samples share the field."""
        return getattr(self, name).shape[0] == 1

    def replaced(self, **values: Any) -> "ProgramData":
        """The same with some of P, q, A, b or batch replaced."""
        return ProgramData(**{**dict(zip(self.FIELDS, self._given)), "batch": self.batch, **values})

    def expanded(self) -> "ProgramData":
        """The same values with every field expanded (a view) to the batch."""
        return ProgramData(*(f.expand(self.batch, -1) for f in self.fields()), batch=self.batch)

    def select(self, samples: Tensor) -> "ProgramData":
        """The values of some samples (indices or a mask); shared fields stay shared."""
        picked = torch.arange(self.batch, device=samples.device)[samples]
        batch = len(picked)
        rows = [f if len(f) == 1 and self.batch != 1 else f[picked] for f in self.fields()]
        return ProgramData(*rows, batch=batch)


class Solution:
    """Solutions of a batch, with what the adjoint needs.

    x: (B, n) primal, z: (B, m) dual, status: (B,) values of Status, iterations: (B,),
    residual: (B,) relative KKT residual; tensors, or arrays that become tensors when they are asked
    for. `private` belongs to the solver that made it (factors, active sets). Rows of samples that are
    not solved hold the last iterate or NaN.
    """

    def __init__(
        self, program: Program, data: ProgramData, x: Any, z: Any, status: Any, iterations: Any, residual: Any,
        private: Any = None, all_solved: bool | None = None,
    ) -> None:  # fmt: skip
        self.program, self.data, self.private = program, data, private
        self._given, self._all_solved = (x, z, status, iterations, residual), all_solved

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """x (B, n) and z (B, m) as contiguous arrays on the host."""
        return as_array(self._given[0]), as_array(self._given[1])

    @cached_property
    def x(self) -> Tensor:
        """(B, n) primal solutions."""
        return as_tensor(self._given[0])

    @cached_property
    def z(self) -> Tensor:
        """(B, m) dual solutions."""
        return as_tensor(self._given[1])

    @cached_property
    def status(self) -> Tensor:
        """(B,) values of Status, int64."""
        return as_tensor(self._given[2])

    @cached_property
    def iterations(self) -> Tensor:
        """(B,) iterations, int64."""
        return as_tensor(self._given[3])

    @cached_property
    def residual(self) -> Tensor:
        """(B,) relative KKT residuals."""
        return as_tensor(self._given[4])

    @property
    def ok(self) -> Tensor:
        """(B,) True where the sample is SOLVED or INACCURATE."""
        return self.status <= Status.INACCURATE

    @property
    def all_solved(self) -> bool:
        """Whether every sample is SOLVED; solvers that know it pass it on."""
        if self._all_solved is None:
            self._all_solved = not as_array(self._given[2]).any()
        return self._all_solved

    def replaced(self, data: ProgramData | None = None, status: Tensor | None = None) -> "Solution":
        """The same with other data or statuses."""
        x, z, own, iterations, residual = self._given
        kept = self.data if data is None else data
        return Solution(self.program, kept, x, z, own if status is None else status, iterations, residual, self.private)
