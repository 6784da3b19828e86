"""Symbolic analysis of a box QP's KKT matrix, once per program: index arrays of its LDL' factorization."""

import numpy as np
import scipy.sparse as sp

from convexlearn.program.reduce import BoxProgram
from convexlearn.solvers.quadratic.layout import SIZES, Layout, arrange
from convexlearn.solvers.quadratic.ldl import BOTH
from convexlearn.solvers.quadratic.ordering import (
    cheapest_order,
    column_patterns,
    minimum_degree,
    postorder,
    symmetric_pattern,
)

NEARLY_FULL = 0.25  # share of L that is filled, from which other orders are tried


def symbolic(box: BoxProgram) -> Layout:
    """Ordering, elimination tree, pattern of L and all index arrays of a BoxProgram's KKT matrix."""
    n, rows, inequalities = box.n, box.A.shape[0], box.G.shape[0]
    N = n + rows + inequalities
    i = np.concatenate([box.P.rows, box.A.rows + n, box.G.rows + n + rows]).astype(np.int64)
    j = np.concatenate([box.P.cols, box.A.cols, box.G.cols]).astype(np.int64)
    indices = matrix_indices(i, j, N, n, elimination_order(symmetric_pattern(i, j, N), inequalities))
    nonzeros = len(indices["I_LI"])
    both, at_lower, at_upper = np.intersect1d(box.lower, box.upper, return_indices=True)
    indices |= {"I_LO": box.lower, "I_UP": box.upper, "I_ABS": box.absolute}
    indices |= {"I_BOTH": np.stack([both, at_lower, at_upper], 1).ravel()}
    lower, upper, absolute = len(box.lower), len(box.upper), len(box.absolute)
    pairs = inequalities + lower + upper + 2 * absolute
    counts = (n, rows, inequalities, lower, upper, absolute, N, pairs, nonzeros, len(i), box.P.nnz, len(both), n, 0)
    nP, nA = box.P.nnz, box.A.nnz
    # slot of each field P, q, w, A, b, G, h, l, u relative to the data entries, then its length
    vectors = len(i) + np.cumsum([0, n, rows, inequalities, lower, upper])
    q, b, h, l, u, w = vectors
    starts = [0, q, w, nP, b, nP + nA, h, l, u]
    lengths = [nP, n, absolute, nA, rows, box.G.nnz, inequalities, lower, upper]
    indices["I_FIELD"] = np.array(starts + lengths)
    return arrange(dict(zip(SIZES, counts, strict=True)), indices)


def elimination_order(pattern: sp.csr_array, inequalities: int) -> np.ndarray:
    """Minimum degree (N,), or with the last unknowns, one per inequality, first where that is cheaper.

    Minimum degree counts unknowns with the same neighbours as one, and takes the variables of a dense program
    before the rows, which costs half as much again as Schur complements of the rows.
    """
    order, N = minimum_degree(pattern), pattern.shape[0]
    if 2 * sum(map(len, column_patterns(pattern, order))) < NEARLY_FULL * N**2:
        return order
    stage = np.ones(N, dtype=np.int64)
    stage[N - inequalities :] = 0
    return cheapest_order(pattern, [None, stage])[0]


def matrix_indices(
    i: np.ndarray,
    j: np.ndarray,
    N: int,
    n: int,
    order: np.ndarray,
    *,
    given: int = 0,
    eliminated: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Index arrays of L and of the symmetric matrix of order N with stored entries (i, j), those of columns < n first.

    order: elimination order (N,). The last `given` entries belong to the factor only: they hold what the
    `eliminated` unknowns (N,) bool contribute to the unknowns below n, so `factor` leaves those updates out.
    """
    pattern = symmetric_pattern(i, j, N)
    columns = column_patterns(pattern, order)
    post = postorder(columns)
    order = order[post]
    columns = column_patterns(pattern, order)
    known = np.zeros(N, dtype=bool) if eliminated is None else eliminated[order]
    indices = {"I_PERM": order, "I_EI": i, "I_EJ": j, **_factor_indices(columns, known, order < n)}
    position = np.empty(N, dtype=np.int64)
    position[order] = np.arange(N)
    low, high = np.maximum(position[i], position[j]), np.minimum(position[i], position[j])
    by_column = np.lexsort((low, high))
    indices |= {"I_KP": _pointers(high, N), "I_KI": low[by_column], "I_KS": by_column}
    own = np.flatnonzero(j[: len(j) - given] < n)
    by_variable = own[np.lexsort((i[own], j[own]))]
    return indices | {"I_CP": _pointers(j[own], n), "I_CI": i[by_variable], "I_CS": by_variable}


def _pointers(columns: np.ndarray, count: int) -> np.ndarray:
    return np.r_[0, np.cumsum(np.bincount(columns, minlength=count))]


def _supernodes(columns: list[np.ndarray], known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """chained (N,): column j has the structure of column j - 1, without j; node (N,): number of its supernode.

    Neighbouring columns with the same structure count as one supernode too, though they are independent.
    """
    lengths = np.array([len(c) for c in columns], dtype=np.int64)
    parent = np.array([c[0] if len(c) else -1 for c in columns], dtype=np.int64)
    chained = np.zeros(len(columns), dtype=bool)
    chained[1:] = (parent[:-1] == np.arange(1, len(columns))) & (lengths[:-1] == lengths[1:] + 1)
    follows = chained.copy()
    for j in np.flatnonzero((parent[:-1] == parent[1:]) & (lengths[:-1] == lengths[1:]) & (parent[1:] >= 0)) + 1:
        follows[j] = follows[j] or np.array_equal(columns[j - 1], columns[j])
    follows[1:] &= known[1:] == known[:-1]
    return chained, np.cumsum(~follows)


def _pairs(chained: np.ndarray, updated: np.ndarray) -> np.ndarray:
    """Columns (N,) that are factored together: 2 for the first of a pair, 0 for the second, 1 for the rest."""
    panel = np.ones(len(chained), dtype=np.int64)
    for j in range(1, len(chained)):
        if chained[j] and panel[j - 1] == 1 and updated[j] == updated[j - 1]:
            panel[j - 1], panel[j] = 2, 0
    return panel


def _factor_indices(columns: list[np.ndarray], known: np.ndarray, updated: np.ndarray) -> dict[str, np.ndarray]:
    """L by column, and by row the groups of 4, 2 or 1 neighbouring columns that update the row.

    A group is (first column, distance of its entries from the end of each column, count). Its columns
    have the same rows from there on: they form a supernode, or are independent with equal structure. Groups
    that update both rows of a pair stand with the first of them, count + BOTH.
    Updates of the rows `updated` (N,) by the columns `known` (N,) are left out.
    """
    N = len(columns)
    chained, node = _supernodes(columns, known)
    panel = _pairs(chained, updated)
    lengths = np.array([len(c) for c in columns], dtype=np.int64)
    rows = np.concatenate([np.zeros(0, dtype=np.int64), *columns])
    cols = np.repeat(np.arange(N), lengths)
    ends = np.cumsum(lengths)
    distance = np.repeat(ends, lengths) - np.arange(len(rows))
    both, second = np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool)
    both[:-1] = (panel[rows[:-1]] == 2) & (rows[1:] == rows[:-1] + 1) & (cols[1:] == cols[:-1])
    second[1:] = both[:-1]
    by_row = np.lexsort((cols, rows))
    by_row = by_row[~(second | (known[cols] & updated[rows]))[by_row]]
    rows_r, cols_r, distance_r, both_r = rows[by_row], cols[by_row], distance[by_row], both[by_row]
    new = np.ones(len(rows_r), dtype=bool)
    changes = (rows_r[1:] != rows_r[:-1]) | (node[cols_r[1:]] != node[cols_r[:-1]]) | (both_r[1:] != both_r[:-1])
    new[1:] = changes | (cols_r[1:] != cols_r[:-1] + 1)
    start = np.flatnonzero(new)
    size = np.diff(np.r_[start, len(rows_r)])
    inside = np.arange(len(rows_r)) - np.repeat(start, size)
    left = np.repeat(size, size) - inside
    tail = np.repeat(size % 4, size)
    count = np.where(left > tail, 4, np.where((left >= 2) & (tail >= 2), 2, 1)) + BOTH * both_r
    begins = np.where(left > tail, inside % 4 == 0, (left == tail) | ((left == 1) & (tail != 2)))
    keep = np.flatnonzero(begins)
    row_pointers = np.r_[0, np.cumsum(np.bincount(rows_r[keep], minlength=N))]
    out = {"I_LP": np.r_[0, ends], "I_LI": rows, "I_RP": row_pointers, "I_PANEL": panel}
    return out | {"I_RK": cols_r[keep], "I_RD": distance_r[keep], "I_RC": count[keep]}
