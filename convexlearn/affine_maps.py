"""Affine expressions of CVXPY as linear maps in torch: matrix(theta) z + offset(theta), differentiable in theta."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from cvxpy.cvxcore.python.canonInterface import get_problem_matrix
from cvxpy.lin_ops.lin_op import CONSTANT_ID
from torch import Tensor

from convexlearn.errors import CompileError
from convexlearn.program.declaration import quiet

DENSE = 0.1
"""A fixed matrix with a larger share of nonzeros is kept dense."""

SMALL = 4096
"""A fixed matrix with fewer entries is kept dense."""

EQUAL = 1e-10
"""Relative tolerance within which entries of A A' count as equal."""


class LinearMap:
    """A linear map of vectors `(B, columns)` -> `(B, rows)`: scaled entries, a sparse or a dense matrix.

    The dense matrix may be batched, `(B, rows, columns)`. `row_products` `(rows,)` is the diagonal of A A' where
    A A' is known to be diagonal, else None.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        matrix: Tensor | None = None,
        index: Tensor | None = None,
        scale: float = 1.0,
        row_products: Tensor | None = None,
    ) -> None:
        self.rows, self.columns = shape
        self.matrix, self.index, self.scale, self.row_products = matrix, index, scale, row_products

    @staticmethod
    def of(matrix: sp.sparray) -> "LinearMap":
        """The map of a fixed sparse matrix, stored as suits it."""
        made = LinearMap._stored(matrix)
        _ = made.tight, made.is_identity  # read here, where tensors have numbers: while a rule is traced they have none
        return made

    @staticmethod
    def _stored(matrix: sp.sparray) -> "LinearMap":
        csr = sp.csr_array(matrix)
        csr.eliminate_zeros()
        shape = (csr.shape[0], csr.shape[1])
        products = _row_products(csr)
        single = csr.nnz == shape[0] and bool((np.diff(csr.indptr) == 1).all()) and csr.nnz > 0
        if single and bool((csr.data == csr.data[0]).all()) and products is not None:
            return LinearMap(
                shape, index=torch.as_tensor(csr.indices.astype(np.int64)), scale=csr.data[0].item(),
                row_products=products,
            )  # fmt: skip
        size = shape[0] * shape[1]
        if size <= SMALL or csr.nnz > DENSE * size:
            return LinearMap(shape, matrix=torch.as_tensor(csr.toarray()), row_products=products)
        coo = csr.tocoo()
        indices = torch.as_tensor(np.stack(coo.coords).astype(np.int64))
        sparse = torch.sparse_coo_tensor(indices, torch.as_tensor(coo.data), shape, check_invariants=False).coalesce()
        return LinearMap(shape, matrix=sparse, row_products=products)

    @cached_property
    def tight(self) -> float | None:
        """a where A A' = a I, else None."""
        if self.row_products is None or not len(self.row_products):
            return None
        low, high = self.row_products.min().item(), self.row_products.max().item()
        return high if high - low <= EQUAL * high else None

    @cached_property
    def is_identity(self) -> bool:
        """True for a multiple of the identity."""
        return self.index is not None and self.rows == self.columns and bool((self.index.diff() == 1).all())

    def to(self, like: Tensor) -> "LinearMap":
        """The map with the device of `like` and its dtype, but real where it is real."""
        index = None if self.index is None else self.index.to(like.device)
        matrix = self.matrix
        if matrix is not None:
            matrix = matrix.to(device=like.device, dtype=like.dtype if matrix.is_complex() else like.real.dtype)
        products = None if self.row_products is None else self.row_products.to(like.real)
        twin = LinearMap((self.rows, self.columns), matrix=matrix, index=index, scale=self.scale, row_products=products)
        twin.__dict__.update(tight=self.tight, is_identity=self.is_identity)  # known once, not read from the copy
        return twin

    def __call__(self, z: Tensor) -> Tensor:
        """A z."""
        if self.index is not None:
            return self.scale * (z if self.is_identity else z[..., self.index])
        return _apply(self.matrix, z)

    def adjoint(self, v: Tensor) -> Tensor:
        """A^H v."""
        if self.index is not None:
            if self.is_identity:
                return self.scale * v
            zeros = v.new_zeros(*v.shape[:-1], self.columns)
            return zeros.index_add(-1, self.index, self.scale * v)
        assert self.matrix is not None
        transposed = self.matrix.t() if self.matrix.is_sparse else self.matrix.mT
        return _apply(transposed.conj() if self.matrix.is_complex() else transposed, v)

    def dense(self) -> Tensor:
        """The matrix `(rows, columns)` or `(B, rows, columns)`."""
        if self.index is not None:
            eye = torch.eye(self.columns, dtype=torch.float64, device=self.index.device)
            like = self.row_products if self.row_products is not None else eye
            return self.scale * eye.to(like)[self.index]
        assert self.matrix is not None
        return self.matrix.to_dense() if self.matrix.is_sparse else self.matrix

    def scaled(self, factor: Tensor | float) -> "LinearMap":
        """factor A; a tensor factor `()` or `(B,)` makes the matrix dense."""
        if isinstance(factor, Tensor):
            return LinearMap((self.rows, self.columns), matrix=factor.reshape(*factor.shape, 1, 1) * self.dense())
        products = None if self.row_products is None else factor**2 * self.row_products
        matrix = None if self.matrix is None else factor * self.matrix
        twin = LinearMap(
            (self.rows, self.columns), matrix=matrix, index=self.index, scale=factor * self.scale, row_products=products
        )
        tight = None if self.tight is None else factor**2 * self.tight
        twin.__dict__.update(tight=tight, is_identity=self.is_identity)
        return twin

    def norm_squared(self) -> Tensor:
        """Largest eigenvalue of A^H A, `()` or `(B,)`, differentiable where the matrix is dense."""
        if self.tight is not None:
            return torch.tensor(self.tight, dtype=torch.float64)
        if self.matrix is not None and self.matrix.is_sparse:
            coo = self.matrix.coalesce()
            csr = sp.csr_array((coo.values().numpy(), tuple(coo.indices().numpy())), shape=tuple(coo.shape))
            if min(csr.shape) > 2:
                largest = sp.linalg.svds(csr, k=1, return_singular_vectors=False, v0=np.ones(min(csr.shape)))
                return torch.tensor(largest[0] ** 2, dtype=torch.float64)
        matrix = self.dense()
        bad = ~torch.isfinite(matrix.detach()).all(-1).all(-1)  # one such matrix would stop the whole batch
        norm = torch.linalg.matrix_norm(torch.where(bad[..., None, None], 0.0, matrix), 2)
        return torch.where(bad, torch.nan, norm).square()


def _row_products(csr: sp.csr_array) -> Tensor | None:
    gram = csr @ csr.conj().T
    diagonal = gram.diagonal().real
    rest = abs(gram - sp.diags_array(diagonal))
    large = rest.max() if rest.nnz else 0.0
    if large > EQUAL * max(diagonal.max(initial=0.0), 1e-300) or (diagonal <= 0).any():
        return None
    return torch.as_tensor(diagonal.copy())


def _apply(matrix: Tensor | None, z: Tensor) -> Tensor:
    assert matrix is not None
    if z.is_complex() and not matrix.is_complex():
        return torch.complex(_apply(matrix, z.real), _apply(matrix, z.imag))
    if matrix.is_sparse:
        return torch.sparse.mm(matrix, z.mT).mT
    return z @ matrix.mT if matrix.ndim == 2 else (matrix @ z.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True, eq=False)
class Block:
    """Where the entries of a parameter's vector go: `(rows, size)`, entries row by row in both."""

    name: str
    map: LinearMap


@dataclass(frozen=True, eq=False)
class AffineMap:
    """matrix(theta) z + offset(theta) of an affine CVXPY expression, everything flattened row by row.

    shape: of the expression. fixed: the matrix when no parameter enters it; else `entries`, one Block per
    parameter from its entries to those of the matrix, plus `base`, the constant ones.
    """

    shape: tuple[int, ...]
    columns: int
    fixed: LinearMap | None
    entries: tuple[Block, ...]
    base: Tensor | None
    offsets: tuple[Block, ...]
    constant: Tensor
    text: str

    @property
    def rows(self) -> int:
        """Number of entries of the expression."""
        return int(np.prod(self.shape, dtype=int))

    @property
    def parameters(self) -> set[str]:
        """Names of the parameters that enter."""
        return {b.name for b in (*self.entries, *self.offsets)}

    def matrix(self, values: Mapping[str, Tensor], like: Tensor) -> LinearMap:
        """The linear part at flattened parameter values `(size,)` or `(B, size)`, in the dtype of `like`."""
        if self.fixed is not None:
            return self.fixed.to(like)
        assert self.base is not None
        flat: Any = self.base.to(like.real)
        for block in self.entries:
            flat = flat + _flat_image(block, values, like)
        return LinearMap((self.rows, self.columns), matrix=flat.reshape(*flat.shape[:-1], self.rows, self.columns))

    def offset(self, values: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """The constant part `(rows,)` or `(B, rows)` at flattened parameter values."""
        total = self.constant.to(like if self.constant.is_complex() else like.real)
        for block in self.offsets:
            total = total + _flat_image(block, values, like)
        return total


def _flat_image(block: Block, values: Mapping[str, Tensor], like: Tensor) -> Tensor:
    value = values[block.name]
    image = block.map.to(like)(value if value.ndim > 1 else value.unsqueeze(0))
    return image if value.ndim > 1 else image[0]


def affine_map(expression: Any, variables: Sequence[Any]) -> AffineMap:
    """Read an affine expression with respect to `variables`, stacked in that order, each row by row.

    Raises CompileError, naming the expression, where it is not affine, not DPP, or has complex coefficients.
    """
    expression = cp.Constant(expression) if not hasattr(expression, "parameters") else expression
    parameters = expression.parameters()
    tensor = _tensor(expression, variables, parameters)
    rows, columns = expression.size, sum(v.size for v in variables)
    place = np.concatenate([np.zeros(0, int), *_shifted([_inverse(v.shape) for v in variables])])
    row, column = _inverse(expression.shape)[tensor.row % rows], tensor.row // rows
    inside = column < columns
    cell = np.where(inside, row * columns + place[np.where(inside, column, 0)], row) if columns else row
    blocks, start = [], 0
    for name, size, order in [*((p.name(), p.size, _inverse(p.shape)) for p in parameters), ("", 1, np.zeros(1, int))]:
        mine = (tensor.col >= start) & (tensor.col < start + size)
        parts = []
        for chosen, length in ((mine & inside, rows * columns), (mine & ~inside, rows)):
            coords = (cell[chosen], order[tensor.col[chosen] - start])
            parts.append(sp.coo_array((tensor.data[chosen], coords), shape=(length, size)))
        blocks.append((name, *parts))
        start += size
    _, base, constant = blocks.pop()
    entries = tuple(Block(name, LinearMap.of(m)) for name, m, _ in blocks if m.nnz)
    offsets = tuple(Block(name, LinearMap.of(o)) for name, _, o in blocks if o.nnz)
    return AffineMap(
        shape=tuple(expression.shape),
        columns=columns,
        fixed=None if entries else LinearMap.of(sp.csr_array(base.reshape((rows, columns)))),
        entries=entries,
        base=torch.as_tensor(base.toarray().ravel()) if entries else None,
        offsets=offsets,
        constant=torch.as_tensor(constant.toarray().ravel()),
        text=str(expression),
    )


def _tensor(expression: Any, variables: Sequence[Any], parameters: Sequence[Any]) -> sp.coo_array:
    """CVXPY's matrix from (theta, 1) to the entries of [matrix, offset], column by column."""
    columns, starts, n = {}, {}, 0
    for v in variables:
        columns[v.id], n = n, n + v.size
    sizes, k = {}, 0
    for p in parameters:
        sizes[p.id], starts[p.id], k = p.size, k, k + p.size
    sizes[CONSTANT_ID], starts[CONSTANT_ID] = 1, k
    stray = [v.name() for v in expression.variables() if v.id not in columns]
    if stray or not expression.is_affine() or not expression.is_dpp():
        raise CompileError(
            f"cannot read {expression} as an affine expression; write it so that it is affine in the variables "
            "and in the parameters (DPP)"
        )
    if any(c.is_complex() and not c.is_real() for c in expression.constants()):
        raise CompileError(
            f"{expression} has complex constants, which are not supported in a map; declare real and imaginary "
            "parts, or pass the complex data as a cp.Parameter(complex=True)"
        )
    with quiet():
        form, extra = expression.canonical_form
        if extra:
            raise CompileError(f"{expression} is affine only by extra constraints; declare them yourself")
        return sp.coo_array(get_problem_matrix([form], n, columns, sizes, starts, expression.size, "SCIPY"))


def _inverse(shape: Sequence[int]) -> np.ndarray:
    """For each entry in CVXPY's column-by-column order, its place in row-by-row order."""
    return np.arange(int(np.prod(shape, dtype=int))).reshape(shape).ravel(order="F")


def _shifted(orders: list[np.ndarray]) -> list[np.ndarray]:
    starts = np.cumsum([0, *(len(o) for o in orders)])
    return [o + s for o, s in zip(orders, starts)]
