"""Which variables to eliminate: equality rows that define a variable, and epigraph variables at their bound.

The choice depends on the pattern and the fixed values only (Brearley, Mitra, Williams 1975;
Andersen and Andersen, Presolving in linear programming, 1995), so one reduction serves every data.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from convexlearn.program.program import Program

PIVOT_RANGE = (1e-2, 1e2)  # fixed pivots outside may amplify rounding errors
MAX_PRODUCTS = 2_000_000  # multiplications that one group may cost per evaluation of the matrices
ROUNDS = 4


@dataclass(frozen=True, eq=False)
class Pivots:
    """Pairs (rows[p], cols[p]): the row, taken as an equality, defines the variable.

    Ordered so that row p contains, besides variables that stay, only those eliminated before p.
    """

    rows: np.ndarray
    cols: np.ndarray


def choose_pivots(program: Program) -> Pivots:
    """Pivots that shrink the program: fewer unknowns without more stored entries."""
    if program.fixed is None:
        return Pivots(np.zeros(0, np.int32), np.zeros(0, np.int32))
    pattern = _Pattern(program)
    pattern.pin_epigraphs()
    for _ in range(ROUNDS):
        while pattern.eliminate_short_rows():
            pass
        if not pattern.eliminate_groups():
            break
    return _ordered(program, pattern.pivots)


class _Pattern:
    """Patterns of A and P that the elimination of a variable updates."""

    def __init__(self, program: Program) -> None:
        assert program.fixed is not None
        self.program, self.zero = program, program.cones.zero
        self.rows: list[set[int]] = [set() for _ in range(program.m)]
        self.cols: list[set[int]] = [set() for _ in range(program.n)]
        self.neighbours: list[set[int]] = [set() for _ in range(program.n)]
        self.constants: dict[tuple[int, int], float] = {}  # entries that are fixed and still as given
        self.pivots: list[tuple[int, int]] = []
        self.unbounded = np.ones(program.n, dtype=bool)
        A, P = program.A, program.P
        for row, col, value in zip(A.rows.tolist(), A.cols.tolist(), program.fixed[2].tolist()):
            self.rows[row].add(col)
            self.cols[col].add(row)
            if value == value and value != 0:
                self.constants[row, col] = value
            if row >= self.zero:
                self.unbounded[col] = False
        for row, col in zip(P.rows.tolist(), P.cols.tolist()):
            self.neighbours[row].add(col)
            self.neighbours[col].add(row)

    def pin_epigraphs(self) -> None:
        """Pin t, free of charge, with one bound t <= c and otherwise rows that a larger t relaxes, at c.

        The dual of the bound is then the sum of the other duals, which is nonnegative as it must be.
        """
        assert self.program.fixed is not None
        q = self.program.fixed[1]
        for col in range(self.program.n):
            rows = self.cols[col]
            if q[col] != 0 or self.neighbours[col] or len(rows) < 2 or min(rows) < self.zero:
                continue
            values = {row: self.constants.get((row, col), 0.0) for row in rows}
            for sign in (1.0, -1.0):
                bounds = [row for row, value in values.items() if sign * value > 0]
                if len(bounds) == 1 and len(self.rows[bounds[0]]) == 1 and 0.0 not in values.values():
                    self.eliminate(bounds[0], col)
                    break

    def eliminate_short_rows(self) -> bool:
        """Eliminate by rows that fix a variable or tie it to one other; True if there were any."""
        before = len(self.pivots)
        for row in range(self.zero):
            if 1 <= len(self.rows[row]) <= 2:
                col = self.pivot(row)
                if col is not None:
                    self.eliminate(row, col)
        return len(self.pivots) > before

    def eliminate_groups(self) -> bool:
        """Eliminate groups of rows that define variables from the same others, where entries don't grow."""
        groups = defaultdict(list)
        for row in range(self.zero):
            if self.rows[row] and (col := self.pivot(row)) is not None:
                groups[frozenset(self.rows[row] - {col})].append((row, col))
        before = len(self.pivots)
        touched: set[int] = set()
        for support, group in groups.items():
            defined = {col for _, col in group}
            affected = support | defined
            if len(defined) < len(group) or affected & touched or support & defined:
                continue
            if self.growth(support, group, defined) <= 0:
                for row, col in group:
                    self.eliminate(row, col)
                touched |= affected
        return len(self.pivots) > before

    def pivot(self, row: int) -> int | None:
        """The variable that this equality row may define, the one with the fewest other entries."""
        support = self.rows[row]
        short = len(support) <= 2 and all((row, c) in self.constants for c in support)
        largest = max((abs(self.constants.get((row, c), 0.0)) for c in support), default=0.0)
        best, fewest = None, 1 << 60
        for col in support:
            value = abs(self.constants.get((row, col), 0.0))
            usable = PIVOT_RANGE[0] <= value <= PIVOT_RANGE[1] and value >= PIVOT_RANGE[0] * largest
            if not usable or not (self.unbounded[col] or (short and len(support) == 2)):
                continue
            entries = len(self.cols[col]) + len(self.neighbours[col]) + (0 if self.unbounded[col] else 1 << 30)
            if entries < fewest:
                best, fewest = col, entries
        return best

    def growth(self, support: frozenset[int], group: list[tuple[int, int]], defined: set[int]) -> int:
        """Stored entries of A and P after the elimination of a group, minus those before."""
        size = len(support)
        if size * size * len(group) > MAX_PRODUCTS:
            return 1
        own = {row for row, _ in group}
        before = sum(len(self.rows[row]) for row in own)
        after = 0
        for row in set().union(*(self.cols[col] for col in defined)) - own:
            before += len(self.rows[row])
            after += len((self.rows[row] - defined) | support)
        near = set().union(*(self.neighbours[col] for col in defined))
        outside = near - defined
        pairs = {(min(a, b), max(a, b)) for a in defined for b in self.neighbours[a]}
        before += len(pairs)
        if near & defined:
            after += sum(len(support - self.neighbours[a]) for a in support) // 2 + size
        after += sum(len(support - self.neighbours[a]) for a in outside)
        return after - before

    def eliminate(self, row: int, col: int) -> None:
        """Substitute the variable everywhere."""
        support = self.rows[row] - {col}
        for other in self.cols[col] - {row}:
            for j in support:
                self.constants.pop((other, j), None)
                self.cols[j].add(other)
                if other >= self.zero:
                    self.unbounded[j] = False
            self.rows[other].discard(col)
            self.rows[other] |= support
        near = self.neighbours[col] - {col}
        for j in near:
            self.neighbours[j].discard(col)
            self.neighbours[j] |= support
        for j in support:
            self.neighbours[j] |= near
            if col in self.neighbours[col]:
                self.neighbours[j] |= support
            self.cols[j].discard(row)
        self.rows[row], self.cols[col], self.neighbours[col] = set(), set(), set()
        self.pivots.append((row, col))


def _ordered(program: Program, pivots: list[tuple[int, int]]) -> Pivots:
    """Order the pivots by dependence; it is acyclic since a pivot entry was unmodified when chosen."""
    where = {col: p for p, (_, col) in enumerate(pivots)}
    rows = {row: p for p, (row, _) in enumerate(pivots)}
    needs: list[set[int]] = [set() for _ in pivots]
    serves: list[list[int]] = [[] for _ in pivots]
    for row, col in zip(program.A.rows.tolist(), program.A.cols.tolist()):
        p, other = rows.get(row), where.get(col)
        if p is not None and other is not None and p != other:
            needs[p].add(other)
            serves[other].append(p)
    ready = [p for p in range(len(pivots)) if not needs[p]]
    order: list[int] = []
    for p in ready:
        order.append(p)
        for q in serves[p]:
            if p in needs[q]:
                needs[q].discard(p)
                if not needs[q]:
                    ready.append(q)
    assert len(order) == len(pivots)
    chosen = np.array([pivots[p] for p in order], dtype=np.int32).reshape(-1, 2)
    return Pivots(chosen[:, 0].copy(), chosen[:, 1].copy())
