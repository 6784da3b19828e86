"""What each remaining row of a reduced program is: equality, bound, half of a 1-norm epigraph, or general."""

from dataclasses import dataclass, field

import numpy as np

from convexlearn.program.elimination import Pivots
from convexlearn.program.program import Program
from convexlearn.program.substitution import Substituted


@dataclass(frozen=True, eq=False)
class Absolute:
    """Rows a x - c t <= 0 (up) and -a x - c t <= 0 (down) with a, c > 0: t = (a/c) |x| at a weight >= 0."""

    t: int
    x: int
    up: int
    down: int
    a: float
    c: float


@dataclass(eq=False)
class Roles:
    """Rows by role: general equalities and inequalities, and (variable, row, coefficient) of bounds.

    Rows in none of the lists are redundant: their dual is zero.
    """

    equalities: list[int] = field(default_factory=list)
    inequalities: list[int] = field(default_factory=list)
    lower: list[tuple[int, int, float]] = field(default_factory=list)
    upper: list[tuple[int, int, float]] = field(default_factory=list)
    absolute: list[Absolute] = field(default_factory=list)


def classify(program: Program, pivots: Pivots, reduced: Substituted) -> Roles:
    """Sort the rows that the pivots leave by their role, as far as fixed values prove it."""
    A, b = _fixed_entries(program, reduced), _fixed_offsets(program, pivots)
    rows: list[dict[int, float]] = [{} for _ in range(program.m)]
    for row, col, value in zip(reduced.A.rows.tolist(), reduced.A.cols.tolist(), A.tolist()):
        rows[row][col] = value
    roles, gone = Roles(), set(pivots.rows.tolist())
    paired = _absolutes(program, reduced, rows, b, roles)
    sides: dict[tuple[int, bool], list[tuple[int, float]]] = {}
    for row in range(program.m):
        if row in gone or row in paired or _redundant(rows[row], b[row], row < program.cones.zero):
            continue
        if row < program.cones.zero:
            roles.equalities.append(row)
        elif (bound := _single(rows[row])) is not None:
            sides.setdefault((bound[0], bound[1] > 0), []).append((row, bound[1]))
        else:
            roles.inequalities.append(row)
    _bounds(sides, b, roles)
    roles.inequalities.sort()
    return roles


def _fixed_entries(program: Program, reduced: Substituted) -> np.ndarray:
    """Values of the reduced A that no parameter changes, NaN for the others."""
    if program.fixed is None:
        return np.full(reduced.A.nnz, np.nan)
    if reduced.tape is None:
        return program.fixed[2]
    return reduced.tape.run(program.fixed[0], program.fixed[2])[reduced.P.nnz :]


def _fixed_offsets(program: Program, pivots: Pivots) -> np.ndarray:
    """The right-hand sides after the substitution, NaN where parameters change them."""
    if program.fixed is None:
        return np.full(program.m, np.nan)
    values, b = program.fixed[2], program.fixed[3].copy()
    rows, cols = program.A.rows, program.A.cols
    order = np.argsort(rows, kind="stable")
    starts = np.searchsorted(rows[order], np.arange(program.m + 1))
    c, defined = np.zeros(program.n), np.zeros(program.n, dtype=bool)
    defined[pivots.cols] = True
    for row, col in zip(pivots.rows.tolist(), pivots.cols.tolist()):
        own = order[starts[row] : starts[row + 1]]
        pivot = values[own[cols[own] == col][0]]
        others = own[defined[cols[own]] & (cols[own] != col)]
        c[col] = (b[row] - np.sum(values[others] * c[cols[others]])) / pivot
    touched = np.flatnonzero(defined[cols])
    np.subtract.at(b, rows[touched], values[touched] * c[cols[touched]])
    return b


def _redundant(row: dict[int, float], b: float, equality: bool) -> bool:
    """True for 0 == 0 and 0 <= b with a fixed b."""
    return not row and (b == 0 or (b > 0 and not equality))


def _single(row: dict[int, float]) -> tuple[int, float] | None:
    """(variable, coefficient) of a row with one variable and a fixed coefficient."""
    if len(row) != 1:
        return None
    col, value = next(iter(row.items()))
    return (col, value) if value == value and value != 0 else None


def _bounds(sides: dict, b: np.ndarray, roles: Roles) -> None:
    """One bound per variable and side: the tightest if all are fixed, otherwise the first; others stay rows."""
    for (variable, upper), rows in sorted(sides.items()):
        bounds = roles.upper if upper else roles.lower
        limits = [b[row] / abs(value) for row, value in rows]
        if all(limit == limit for limit in limits):
            row, value = rows[int(np.argmin(limits))]
        else:
            row, value = rows[0]
            roles.inequalities += [other for other, _ in rows[1:]]
        bounds.append((variable, row, value))


def _absolutes(program: Program, reduced: Substituted, rows: list[dict], b: np.ndarray, roles: Roles) -> set[int]:
    """Find 1-norm epigraphs of single variables; returns the rows they take."""
    if program.fixed is None:
        return set()
    zero, q = program.cones.zero, program.fixed[1]
    curved = set(reduced.P.rows.tolist()) | set(reduced.P.cols.tolist())
    holds: dict[int, list[int]] = {}
    for row, col in zip(reduced.A.rows.tolist(), reduced.A.cols.tolist()):
        holds.setdefault(col, []).append(row)
    taken: set[int] = set()
    used: set[int] = set()
    for t, pair in sorted(holds.items()):
        if t in curved or t in used or len(pair) != 2 or min(pair) < zero or q[t] < 0:
            continue
        found = _absolute(t, pair, rows, b)
        if found is not None and found.x not in used:
            roles.absolute.append(found)
            taken |= set(pair)
            used |= {t, found.x}
    roles.absolute.sort(key=lambda a: a.x)
    return taken


def _absolute(t: int, pair: list[int], rows: list[dict[int, float]], b: np.ndarray) -> Absolute | None:
    first, second = (rows[row] for row in pair)
    others = (set(first) | set(second)) - {t}
    if len(first) != 2 or len(second) != 2 or len(others) != 1 or b[pair[0]] != 0 or b[pair[1]] != 0:
        return None
    x = others.pop()
    a, c = first[x], -first[t]
    if not (c > 0 and a != 0 and second[t] == -c and second[x] == -a):
        return None
    up, down = pair if a > 0 else pair[::-1]
    return Absolute(t, x, up, down, abs(a), c)
