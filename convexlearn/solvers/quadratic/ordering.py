"""Elimination orders of a symmetric matrix, and the fill that they cause."""

import heapq
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp


def symmetric_pattern(i: np.ndarray, j: np.ndarray, N: int) -> sp.csr_array:
    """The matrix of order N with entries wherever (i, j) or (j, i) is stored."""
    return sp.csr_array((np.ones(2 * len(i)), (np.r_[i, j], np.r_[j, i])), shape=(N, N))


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


def cheapest_order(pattern: sp.csr_array, stages: Sequence[np.ndarray | None]) -> tuple[np.ndarray, int]:
    """The cheapest of the minimum degree orders (N,) with each of `stages`, and the number of its stages."""
    orders = [minimum_degree(pattern, stage) for stage in stages]
    costs = [sum(len(c) * (len(c) + 3) for c in column_patterns(pattern, order)) for order in orders]
    best = int(np.argmin(costs))
    return orders[best], best
