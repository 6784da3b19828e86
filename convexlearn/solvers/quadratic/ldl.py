"""Sparse LDL' of the regularized KKT matrix: symbolic analysis once, numeric factor and solve in lanes.

K = [[P + diag, A', G'], [A, -diag, 0], [G, 0, -diag]] is quasi-definite, so every symmetric ordering
has a factorization with D of known signs (Vanderbei 1995). Stored is X = L D, with the inverse pivots.
"""

import heapq

import numpy as np
import scipy.sparse as sp

from convexlearn.program.reduce import BoxProgram
from convexlearn.solvers.quadratic.layout import (
    DATA,
    I_CI,
    I_CP,
    I_CS,
    I_EI,
    I_EJ,
    I_KI,
    I_KP,
    I_KS,
    I_LI,
    I_LP,
    I_PERM,
    I_RC,
    I_RD,
    I_RK,
    I_RP,
    LX,
    N_BORDER,
    N_ENTRY,
    N_K,
    N_PLUS,
    N_X,
    PINNED,
    PIVOT,
    SIZES,
    WD,
    Layout,
    T,
    arrange,
)
from convexlearn.solvers.quadratic.simd import full, helper, index, load, store, vabs, where_gt

SMALLEST_PIVOT = 1e-13  # below it the pivot's sign is rounding error
REPLACED_PIVOT = 1e-7


def symbolic(box: BoxProgram) -> Layout:
    """Ordering, elimination tree, pattern of L and all index arrays of a BoxProgram's KKT matrix."""
    n, rows, inequalities = box.n, box.A.shape[0], box.G.shape[0]
    N = n + rows + inequalities
    i = np.concatenate([box.P.rows, box.A.rows + n, box.G.rows + n + rows]).astype(np.int64)
    j = np.concatenate([box.P.cols, box.A.cols, box.G.cols]).astype(np.int64)
    indices = matrix_indices(i, j, N, n)
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


def symmetric_pattern(i: np.ndarray, j: np.ndarray, N: int) -> sp.csr_array:
    """The matrix of order N with entries wherever (i, j) or (j, i) is stored."""
    return sp.csr_array((np.ones(2 * len(i)), (np.r_[i, j], np.r_[j, i])), shape=(N, N))


def matrix_indices(
    i: np.ndarray,
    j: np.ndarray,
    N: int,
    n: int,
    order: np.ndarray | None = None,
    *,
    given: int = 0,
    eliminated: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Index arrays of L and of the symmetric matrix of order N with stored entries (i, j), those of columns < n first.

    order: elimination order (N,), None for minimum degree. The last `given` entries belong to the factor only:
    they hold what the `eliminated` unknowns (N,) bool contribute to the unknowns below n, so `factor` leaves
    those updates out.
    """
    pattern = symmetric_pattern(i, j, N)
    order = minimum_degree(pattern) if order is None else order
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


def minimum_degree(pattern: sp.csr_array, stage: np.ndarray | None = None) -> np.ndarray:
    """Elimination order (N,) by approximate minimum degree on the quotient graph (Amestoy, Davis, Duff 1996).

    stage: (N,) integers; unknowns of a lower stage come first.
    """
    N = pattern.shape[0]
    turn = [0] * N if stage is None else stage.tolist()
    graph = _QuotientGraph(pattern, turn)
    heap = [(turn[v], graph.degree[v], v) for v in range(N)]
    heapq.heapify(heap)
    order: list[int] = []
    while heap:
        _, degree, pivot = heapq.heappop(heap)
        if pivot in graph.members and degree == graph.degree[pivot]:
            order += graph.members.pop(pivot)
            for v in graph.eliminate(pivot):
                heapq.heappush(heap, (turn[v], graph.degree[v], v))
    return np.array(order, dtype=np.int64)


class _QuotientGraph:
    """Variables with their adjacent variables and elements; indistinguishable variables of one stage are merged."""

    def __init__(self, pattern: sp.csr_array, stage: list[int]):
        N, self.stage = pattern.shape[0], stage
        rows = np.split(pattern.indices, pattern.indptr[1:-1]) if N else []
        self.variables = [set(row.tolist()) - {v} for v, row in enumerate(rows)]
        self.elements: list[set[int]] = [set() for _ in range(N)]
        self.reach: dict[int, set[int]] = {}  # element -> variables
        self.weight = [1] * N
        self.members = {v: [v] for v in range(N)}
        self.degree = [len(v) for v in self.variables]

    def eliminate(self, pivot: int) -> set[int]:
        """Turn the pivot into an element and return the variables whose degree changed."""
        reach = self.variables[pivot]
        absorbed = self.elements[pivot]
        for e in absorbed:
            reach |= self.reach.pop(e)
        reach.discard(pivot)
        for v in reach:
            self.variables[v] -= reach
            self.variables[v].discard(pivot)
            self.elements[v] -= absorbed
        self._update_degrees(pivot, reach)
        self.reach[pivot] = reach
        self._merge(reach)
        return reach

    def _update_degrees(self, pivot: int, reach: set[int]) -> None:
        outside = {e: len(self.reach[e] - reach) for e in {e for v in reach for e in self.elements[v]}}
        covered = {e for e, count in outside.items() if count == 0}
        for e in covered:
            del self.reach[e]
        total = sum(self.weight[v] for v in reach)
        for v in reach:
            self.elements[v] -= covered
            adjacent = sum(self.weight[u] for u in self.variables[v])
            near = sum(outside[e] for e in self.elements[v])
            self.degree[v] = adjacent + near + total - self.weight[v]
            self.elements[v].add(pivot)

    def _merge(self, reach: set[int]) -> None:
        groups: dict[tuple, list[int]] = {}
        for v in reach:
            key = (self.stage[v], len(self.variables[v]), sum(self.variables[v]), sum(self.elements[v]))
            groups.setdefault(key, []).append(v)
        for group in groups.values():
            while len(group) > 1:
                first = group.pop()
                same = [v for v in group if self._indistinguishable(first, v)]
                for v in same:
                    self._absorb(first, v)
                group[:] = [v for v in group if v not in same]

    def _indistinguishable(self, u: int, v: int) -> bool:
        return self.variables[u] == self.variables[v] and self.elements[u] == self.elements[v]

    def _absorb(self, into: int, v: int) -> None:
        self.weight[into] += self.weight[v]
        self.degree[into] -= self.weight[v]
        self.members[into] += self.members.pop(v)
        for u in self.variables[v]:
            self.variables[u].discard(v)
        for e in self.elements[v]:
            self.reach[e].discard(v)


def column_patterns(pattern: sp.csr_array, order: np.ndarray) -> list[np.ndarray]:
    """Sorted rows below the diagonal of each column of L, for the matrix permuted by `order`."""
    permuted = sp.csc_array(pattern[order][:, order])
    children: list[list[np.ndarray]] = [[] for _ in order]
    columns = []
    for j in range(len(order)):
        own = permuted.indices[permuted.indptr[j] : permuted.indptr[j + 1]]
        parts = [own[own > j], *(child[1:] for child in children[j])]
        column = np.unique(np.concatenate(parts)) if len(parts) > 1 else np.sort(parts[0])
        columns.append(column)
        children[j] = []
        if len(column):
            children[column[0]].append(column)
    return columns


def postorder(columns: list[np.ndarray]) -> np.ndarray:
    """Postorder of the elimination tree: the same fill, and columns of one supernode side by side."""
    N = len(columns)
    children: list[list[int]] = [[] for _ in range(N + 1)]
    for j, column in enumerate(columns):
        children[column[0] if len(column) else N].append(j)
    order: list[int] = []
    stack = [N]
    while stack:
        j = stack.pop()
        order.append(j)
        stack += children[j]
    return np.array(order[:0:-1], dtype=np.int64)


def _pointers(columns: np.ndarray, count: int) -> np.ndarray:
    return np.r_[0, np.cumsum(np.bincount(columns, minlength=count))]


def _factor_indices(columns: list[np.ndarray], known: np.ndarray, updated: np.ndarray) -> dict[str, np.ndarray]:
    """L by column, and by row the groups of 4, 2 or 1 neighbouring columns that update the row.

    A group is (first column, distance of its entries from the end of each column, count). Its columns
    have the same rows from there on: they form a supernode, or are independent with equal structure.
    Updates of the rows `updated` (N,) by the columns `known` (N,) are left out.
    """
    N = len(columns)
    lengths = np.array([len(c) for c in columns], dtype=np.int64)
    parent = np.array([c[0] if len(c) else -1 for c in columns], dtype=np.int64)
    follows = np.zeros(N, dtype=bool)  # column j has the structure of column j - 1, without j
    follows[1:] = (parent[:-1] == np.arange(1, N)) & (lengths[:-1] == lengths[1:] + 1)
    for j in np.flatnonzero((parent[:-1] == parent[1:]) & (lengths[:-1] == lengths[1:]) & (parent[1:] >= 0)) + 1:
        follows[j] = follows[j] or np.array_equal(columns[j - 1], columns[j])
    follows[1:] &= known[1:] == known[:-1]
    node = np.cumsum(~follows)
    rows = np.concatenate([np.zeros(0, dtype=np.int64), *columns])
    cols = np.repeat(np.arange(N), lengths)
    ends = np.cumsum(lengths)
    distance = np.repeat(ends, lengths) - np.arange(len(rows))
    by_row = np.lexsort((cols, rows))
    by_row = by_row[~(known[cols[by_row]] & updated[rows[by_row]])]
    rows_r, cols_r, distance_r = rows[by_row], cols[by_row], distance[by_row]
    new = np.ones(len(rows_r), dtype=bool)
    new[1:] = (rows_r[1:] != rows_r[:-1]) | (node[cols_r[1:]] != node[cols_r[:-1]])
    start = np.flatnonzero(new)
    size = np.diff(np.r_[start, len(rows_r)])
    inside = np.arange(len(rows_r)) - np.repeat(start, size)
    left = np.repeat(size, size) - inside
    tail = np.repeat(size % 4, size)
    count = np.where(left > tail, 4, np.where((left >= 2) & (tail >= 2), 2, 1))
    begins = np.where(left > tail, inside % 4 == 0, (left == tail) | ((left == 1) & (tail != 2)))
    keep = np.flatnonzero(begins)
    row_pointers = np.r_[0, np.cumsum(np.bincount(rows_r[keep], minlength=N))]
    out = {"I_LP": np.r_[0, ends], "I_LI": rows, "I_RP": row_pointers}
    return out | {"I_RK": cols_r[keep], "I_RD": distance_r[keep], "I_RC": count[keep]}


@helper
def subtract(w, I, F, lp, li, lx, pivot, t, k, distance, count):
    """Subtract from the dense column t what `count` columns from k contribute; t is indexed by row."""
    a = index(I, lp + k + 1) - distance
    i0 = li + a
    a += lx
    x0 = load(w, F, a) * load(w, F, pivot + k)
    if count == 1:
        for p in range(distance):
            i = t + index(I, i0 + p)
            store(F, i, load(w, F, i) - x0 * load(w, F, a + p))
        return
    b = lx + index(I, lp + k + 2) - distance
    x1 = load(w, F, b) * load(w, F, pivot + k + 1)
    if count == 2:
        for p in range(distance):
            i = t + index(I, i0 + p)
            store(F, i, load(w, F, i) - (x0 * load(w, F, a + p) + x1 * load(w, F, b + p)))
        return
    c = lx + index(I, lp + k + 3) - distance
    d = lx + index(I, lp + k + 4) - distance
    x2 = load(w, F, c) * load(w, F, pivot + k + 2)
    x3 = load(w, F, d) * load(w, F, pivot + k + 3)
    for p in range(distance):
        i = t + index(I, i0 + p)
        # sums that don't wait for the load of slot i, which was stored a few instructions ago
        first = x0 * load(w, F, a + p) + x1 * load(w, F, b + p)
        second = x2 * load(w, F, c + p) + x3 * load(w, F, d + p)
        store(F, i, load(w, F, i) - (first + second))


@helper
def inverse_pivot(w, F, d, weight, sign):
    """1/d, with a replacement where the known sign is lost, and 0 where the weight pins the unknown."""
    size = sign * d
    size = where_gt(size, SMALLEST_PIVOT, size, REPLACED_PIVOT)
    return where_gt(vabs(weight), PINNED, 0.0, sign / size)


@helper
def factor(w, I, F):
    """Left-looking LDL' of K with diagonal WD (N slots, original order) into LX and PIVOT."""
    plus, N, data, wd, t = index(I, N_PLUS), index(I, N_K), index(I, DATA), index(I, WD), index(I, T)
    lp, li, lx, pivot = index(I, I_LP), index(I, I_LI), index(I, LX), index(I, PIVOT)
    rp, rk, rd, rc = index(I, I_RP), index(I, I_RK), index(I, I_RD), index(I, I_RC)
    kp, ki, ks, perm = index(I, I_KP), index(I, I_KI), index(I, I_KS), index(I, I_PERM)
    zero = full(w, 0.0)
    for j in range(N):
        first, last = index(I, lp + j), index(I, lp + j + 1)
        for p in range(first, last):
            store(F, t + index(I, li + p), zero)
        unknown = index(I, perm + j)
        weight = load(w, F, wd + unknown)
        store(F, t + j, weight)
        for e in range(index(I, kp + j), index(I, kp + j + 1)):
            i = t + index(I, ki + e)
            store(F, i, load(w, F, i) + load(w, F, data + index(I, ks + e)))
        for r in range(index(I, rp + j), index(I, rp + j + 1)):
            subtract(w, I, F, lp, li, lx, pivot, t, index(I, rk + r), index(I, rd + r), index(I, rc + r))
        sign = 1.0 if unknown < plus else -1.0
        store(F, pivot + j, inverse_pivot(w, F, load(w, F, t + j), weight, sign))
        for p in range(first, last):
            store(F, lx + p, load(w, F, t + index(I, li + p)))


@helper
def solve_factored(w, I, F, b):
    """Overwrite the slots b (N, original order) by the solution; pinned unknowns become 0."""
    N, lp, li, lx = index(I, N_K), index(I, I_LP), index(I, I_LI), index(I, LX)
    pivot, perm, t = index(I, PIVOT), index(I, I_PERM), index(I, T)
    for j in range(N):
        store(F, t + j, load(w, F, b + index(I, perm + j)))
    for j in range(N):
        x = load(w, F, t + j) * load(w, F, pivot + j)
        for p in range(index(I, lp + j), index(I, lp + j + 1)):
            i = t + index(I, li + p)
            store(F, i, load(w, F, i) - load(w, F, lx + p) * x)
    for j in range(N - 1, -1, -1):
        x = load(w, F, t + j)
        for p in range(index(I, lp + j), index(I, lp + j + 1)):
            x = x - load(w, F, lx + p) * load(w, F, t + index(I, li + p))
        x = x * load(w, F, pivot + j)
        store(F, t + j, x)
        store(F, b + index(I, perm + j), x)


@helper
def multiply(w, I, F, v, r):
    """Add K v without the diagonal WD to the slots r (both N slots, original order)."""
    n, cp, ci, cs, data = index(I, N_X), index(I, I_CP), index(I, I_CI), index(I, I_CS), index(I, DATA)
    for j in range(n):
        x = load(w, F, v + j)
        total = full(w, 0.0)
        for e in range(index(I, cp + j), index(I, cp + j + 1)):
            i = index(I, ci + e)
            a = load(w, F, data + index(I, cs + e))
            total = total + a * load(w, F, v + i)
            if i != j:
                store(F, r + i, load(w, F, r + i) + a * x)
        store(F, r + j, load(w, F, r + j) + total)
    first = index(I, N_ENTRY)
    for e in range(first, first + index(I, N_BORDER)):
        i, j, a = index(I, index(I, I_EI) + e), index(I, index(I, I_EJ) + e), load(w, F, data + e)
        store(F, r + i, load(w, F, r + i) + a * load(w, F, v + j))
        store(F, r + j, load(w, F, r + j) + a * load(w, F, v + i))
