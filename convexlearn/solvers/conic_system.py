"""The linear system of Newton steps and of the adjoint of a conic program: symmetric, sparse, batched.

With the derivative E' diag(slope) E of the projection on K* and R = diag(slope)^(1/2) E, both are solves with

    [P, (R A)'; R A, slope - 1].

Its pattern is the same for all samples, so the symbolic analysis happens once for a program.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from convexlearn.program.program import Program
from convexlearn.solvers.cones import Array, Projection, groups

FACTOR = ("n", "ei", "ej", "perm", "kp", "ki", "ks", "lp", "li", "rp", "rk", "rx")
SOLVE = ("ei", "ej", "perm", "lp", "li")


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of one group of cones: `source` (C, size, w) are entries of A, one past the last for zeros."""

    rows: Array
    source: Array


@dataclass(frozen=True, eq=False)
class System:
    """Symbolic analysis of a program's system: entries of P, of A in leading rows, and of rotated blocks."""

    program: Program
    leading: Array
    blocks: tuple[Block | None, ...]
    arrays: dict[str, Any]

    def factored(self, P: Array, A: Array, projection: Projection) -> "Factored":
        """Assemble and factor the systems of a batch; P (1 or B, nnz), A (1 or B, nnz)."""
        from convexlearn.solvers import conic_kernels

        batch, root = len(projection.dual), np.sqrt(projection.slope)
        parts = [np.broadcast_to(P, (batch, P.shape[1])), A[:, self.leading] * root[:, self._leading_rows()]]
        padded = np.concatenate([A, np.zeros((len(A), 1))], 1)
        for block, basis in zip(self.blocks, projection.bases):
            if block is not None:
                rotated = basis.rotate(padded[:, block.source]) * root[:, block.rows, None]
                parts.append(rotated.reshape(batch, -1))
        values = np.concatenate(parts, 1)
        diagonals = np.concatenate([np.zeros((batch, self.program.n)), -projection.rest], 1)
        size, entries = self.program.n + self.program.m, len(self.arrays["li"])
        scales, pivots, factors = np.empty((batch, size)), np.empty((batch, size)), np.empty((batch, entries))
        symbolic = [self.arrays[name] for name in FACTOR]
        conic_kernels.factor(*symbolic, values, diagonals, scales, factors, pivots)
        return Factored(self, projection, root, (values, diagonals, scales, factors, pivots))

    def _leading_rows(self) -> Array:
        return self.program.A.rows[self.leading]


@dataclass(frozen=True, eq=False)
class Factored:
    """Factors of a batch at the derivatives of `projection`."""

    system: System
    projection: Projection
    root: Array
    factors: tuple[Array, ...]

    def solve(self, top: Array, bottom: Array) -> tuple[Array, Array, Array]:
        """(x, y, residual) of P x + A'y = top, D A x - (I - D) y = D bottom, y in the range of D.

        D is the derivative of the projection; residual (B,) is relative. Where the system is singular:
        the least-squares solution of least norm.
        """
        from convexlearn.solvers import conic_kernels

        right = np.concatenate([top, self.root * self.projection.rotate(bottom)], 1)
        out, residual = np.empty_like(right), np.empty(len(right))
        symbolic = [self.system.arrays[name] for name in SOLVE]
        conic_kernels.solve(*symbolic, *self.factors, right, out, residual)
        n = top.shape[1]
        return out[:, :n], self.projection.back(self.root * out[:, n:]), residual


_systems: "weakref.WeakKeyDictionary[Program, System]" = weakref.WeakKeyDictionary()


def analysis(program: Program) -> System:
    """The symbolic analysis of a program, made once."""
    if program not in _systems:
        _systems[program] = _analyse(program)
    return _systems[program]


def _analyse(program: Program) -> System:
    count, others = groups(program.cones)
    leading = np.flatnonzero(program.A.rows < count)
    blocks, rows, cols = [], [program.P.rows, program.n + program.A.rows[leading]], [program.P.cols]
    cols.append(program.A.cols[leading])
    pattern = sp.csr_array((np.arange(program.A.nnz) + 1, (program.A.rows, program.A.cols)), shape=program.A.shape)
    for group in others:
        block, columns = _block(program, pattern, group.rows)
        blocks.append(block)
        if block is not None:
            shape = block.source.shape
            rows.append(np.broadcast_to(program.n + block.rows[:, :, None], shape).ravel())
            cols.append(np.broadcast_to(columns[:, None, :], shape).ravel())
    i, j = (np.concatenate(v).astype(np.int64) for v in (rows, cols))
    return System(program, leading, tuple(blocks), _symbolic(program.n, program.n + program.m, i, j))


def _block(program: Program, pattern: sp.csr_array, rows: Array) -> tuple[Block | None, Array]:
    """The entries of A that cones (C, size) hold, each padded to the same columns (C, w) with zeros."""
    parts = [pattern[cone] for cone in rows]
    used = [np.unique(part.indices) for part in parts]
    width = max(len(u) for u in used)
    columns = np.zeros((len(rows), width), dtype=np.int64)
    source = np.full((*rows.shape, width), program.A.nnz)
    for c, (part, own) in enumerate(zip(parts, used)):
        columns[c, : len(own)], columns[c, len(own) :] = own, own[0] if len(own) else 0
        entries = part.tocoo()
        source[c, entries.coords[0], np.searchsorted(own, entries.coords[1])] = entries.data - 1
    return (Block(rows, source) if width else None), columns


def _symbolic(n: int, N: int, i: Array, j: Array) -> dict[str, Any]:
    """Elimination order, pattern of L by column and by row, and where entries of the matrix go."""
    from convexlearn.solvers.quadratic.ordering import column_patterns, minimum_degree, postorder

    pattern = sp.csr_array((np.ones(2 * len(i)), (np.r_[i, j], np.r_[j, i])), shape=(N, N))
    order = minimum_degree(pattern)
    order = order[postorder(column_patterns(pattern, order))]
    columns = column_patterns(pattern, order)
    position = np.empty(N, dtype=np.int64)
    position[order] = np.arange(N)
    low, high = np.maximum(position[i], position[j]), np.minimum(position[i], position[j])
    by_column = np.lexsort((low, high))
    lengths = np.array([len(c) for c in columns], dtype=np.int64)
    li = np.concatenate([np.zeros(0, dtype=np.int64), *columns])
    owner = np.repeat(np.arange(N), lengths)
    by_row = np.lexsort((owner, li))
    return {
        "n": n, "ei": i, "ej": j, "perm": order,
        "kp": _pointers(high, N), "ki": low[by_column], "ks": by_column,
        "lp": np.r_[0, np.cumsum(lengths)], "li": li,
        "rp": _pointers(li, N), "rk": owner[by_row], "rx": by_row,
    }  # fmt: skip


def _pointers(keys: Array, count: int) -> Array:
    return np.r_[0, np.cumsum(np.bincount(keys, minlength=count))]
