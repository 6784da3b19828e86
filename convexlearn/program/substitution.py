"""Substituting defined variables: the entries of the smaller P and A as sums of products of the given ones."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from convexlearn.program.elimination import Pivots
from convexlearn.program.program import Program, Sparsity

GRAM_PRODUCTS = 4000  # products from which a dense product beats a list of them


@dataclass(frozen=True, eq=False)
class Tape:
    """Straight-line program on one vector: value[out] += scale * value[left] * value[right], in order.

    The vector starts with P's and A's stored entries and a one; the rest starts at zero. The
    results are its last entries: those of the reduced P, then those of the reduced A. The `grams`
    are added to them afterwards.
    """

    out: np.ndarray
    left: np.ndarray
    right: np.ndarray
    scale: np.ndarray
    size: int
    results: int
    grams: tuple["Gram", ...] = ()

    @cached_property
    def ops(self) -> np.ndarray:
        """(out, left, right) as one array (3, len)."""
        return np.ascontiguousarray(np.stack([self.out, self.left, self.right]))

    def run(self, P: np.ndarray, A: np.ndarray) -> np.ndarray:
        """The results (len,) of one sample in plain numpy without the grams; NaN where they depend on NaN."""
        value = np.zeros(self.size)
        value[: len(P) + len(A)] = np.concatenate([P, A])
        value[len(P) + len(A)] = 1.0
        outs = np.flatnonzero(np.diff(self.out, prepend=-1))
        ends = np.append(outs[1:], len(self.out))
        for start, end in zip(outs, ends):
            k = slice(start, end)
            value[self.out[start]] += np.sum(self.scale[k] * value[self.left[k]] * value[self.right[k]])
        return value[self.size - self.results :]


@dataclass(frozen=True, eq=False)
class Gram:
    """Dense products E'DE of rows with one pattern: value[position] += sum_p value[left[p]]' value[right[p]].

    left, right: (rows, size) slots; position: slots of the upper triangle, row by row; scale: (rows,).
    """

    left: np.ndarray
    right: np.ndarray
    position: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True, eq=False)
class Substituted:
    """Patterns of the reduced P and A in the numbering of the given program, and the tape that fills them.

    Without pivots `tape` is None: the entries are the given ones.
    """

    P: Sparsity
    A: Sparsity
    tape: Tape | None


class _Builder:
    """Collects operations section by section; one slot per distinct key of a section."""

    def __init__(self, first: int) -> None:
        self.size = first
        self.parts: list[tuple[np.ndarray, ...]] = []

    def section(self, terms: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
        """Append terms (keys, left, right, scale): the sorted unique keys and their new slots."""
        if not terms:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        keys = np.concatenate([t[0] for t in terms])
        unique, position = np.unique(keys, return_inverse=True)
        order = np.argsort(position, kind="stable")
        columns = [np.concatenate([np.broadcast_to(t[i], t[0].shape) for t in terms]) for i in (1, 2, 3)]
        self.parts.append((self.size + position[order], *(c[order] for c in columns)))
        slots = self.size + np.arange(len(unique))
        self.size += len(unique)
        return unique, slots

    def tape(self, results: int, grams: tuple[Gram, ...]) -> Tape:
        """Everything collected so far."""
        out, left, right = (np.concatenate([p[i] for p in self.parts]).astype(np.int32) for i in range(3))
        return Tape(out, left, right, np.concatenate([p[3] for p in self.parts]), self.size, results, grams)


def substitute(program: Program, pivots: Pivots) -> Substituted:
    """x_v = (b_r - sum a_rj x_j) / a_rv for all pivots (r, v) put into P and A: x = Ey + c.

    The reduced matrices are P_KK + P_KV E + E'P_VK + E'P_VV E and A_KK + A_KV E.
    """
    if not len(pivots.rows):
        return Substituted(program.P, program.A, None)
    one = program.P.nnz + program.A.nnz
    builder = _Builder(one + 1)
    definitions = _definitions(program, pivots, builder, one)
    weighted = _weighted(program, pivots, definitions, builder, one)
    groups = _groups(program, definitions)
    keys, slots = builder.section(_quadratic_terms(program, definitions, weighted, one, groups))
    grams = tuple(_gram(program, definitions, weighted, group, keys, slots) for group in groups)
    P = _pattern(keys, program.n, (program.n, program.n))
    keys, _ = builder.section(_constraint_terms(program, pivots, definitions, one))
    A = _pattern(keys, max(program.m, 1), (program.m, program.n))
    return Substituted(P, A, builder.tape(P.nnz + A.nnz, grams))


Combination = tuple[np.ndarray, np.ndarray]  # variables that stay, and the slots of their coefficients


def _pattern(keys: np.ndarray, height: int, shape: tuple[int, int]) -> Sparsity:
    return Sparsity((keys % height).astype(np.int32), (keys // height).astype(np.int32), shape)


def _rows(program: Program) -> list[np.ndarray]:
    """Stored entries of A by row."""
    order = np.argsort(program.A.rows, kind="stable")
    return np.split(order, np.cumsum(np.bincount(program.A.rows, minlength=program.m))[:-1])


def _definitions(program: Program, pivots: Pivots, builder: _Builder, one: int) -> dict[int, Combination]:
    """E row by row: each eliminated variable as a combination of those that stay."""
    assert program.fixed is not None
    entries, first = _rows(program), program.P.nnz
    definitions: dict[int, Combination] = {}
    for row, col in zip(pivots.rows.tolist(), pivots.cols.tolist()):
        own = entries[row]
        others = program.A.cols[own]
        pivot = program.fixed[2][own[others == col][0]]
        stay = own[[c != col and c not in definitions for c in others.tolist()]]
        terms = [(program.A.cols[stay].astype(np.int64), first + stay, one, -1.0 / pivot)]
        for entry, other in zip(own.tolist(), others.tolist()):
            if other in definitions:
                variables, slots = definitions[other]
                terms.append((variables, slots, first + entry, -1.0 / pivot))
        definitions[col] = builder.section(terms)
    return definitions


def _weighted(
    program: Program, pivots: Pivots, definitions: dict[int, Combination], builder: _Builder, one: int
) -> dict[int, tuple[np.ndarray, float]]:
    """For entries of P between eliminated variables: slots of (the entry) * E[first], and a constant factor."""
    assert program.fixed is not None
    weighted = {}
    for entry, (row, col) in enumerate(zip(program.P.rows.tolist(), program.P.cols.tolist())):
        if row in definitions and col in definitions:
            variables, slots = definitions[row]
            value = float(program.fixed[0][entry])
            if value == value:
                weighted[entry] = slots, value
            else:
                weighted[entry] = builder.section([(variables, slots, entry, 1.0)])[1], 1.0
    return weighted


def _groups(program: Program, definitions: dict[int, Combination]) -> list[list[int]]:
    """Diagonal entries of P whose eliminated variables combine the same others, where a dense product pays."""
    groups: dict[bytes, list[int]] = {}
    for entry, (row, col) in enumerate(zip(program.P.rows.tolist(), program.P.cols.tolist())):
        if row == col and row in definitions:
            groups.setdefault(definitions[row][0].tobytes(), []).append(entry)
    size = {key: len(key) // 8 for key in groups}
    return [group for key, group in groups.items() if len(group) * size[key] ** 2 >= GRAM_PRODUCTS]


def _gram(
    program: Program, definitions: dict, weighted: dict, group: list[int], keys: np.ndarray, slots: np.ndarray
) -> Gram:
    """The dense product of a group; `keys` and `slots` are those of the reduced P."""
    combinations = [definitions[int(program.P.rows[entry])] for entry in group]
    variables = combinations[0][0]
    i, j = np.triu_indices(len(variables))
    position = slots[np.searchsorted(keys, variables[j] * program.n + variables[i])]
    left = np.stack([weighted[entry][0] for entry in group])
    right = np.stack([own for _, own in combinations])
    scale = np.array([weighted[entry][1] for entry in group])
    return Gram(left.astype(np.int32), right.astype(np.int32), position.astype(np.int32), scale)


def _quadratic_terms(
    program: Program, definitions: dict[int, Combination], weighted: dict, one: int, groups: list[list[int]]
) -> list[tuple]:
    """Terms of the upper triangle of the reduced P, keyed col * n + row; those of groups only as places."""
    rows, cols = program.P.rows, program.P.cols
    stays = np.array([r not in definitions and c not in definitions for r, c in zip(rows.tolist(), cols.tolist())])
    keep = np.flatnonzero(stays) if len(rows) else np.zeros(0, np.int64)
    terms: list[tuple] = [(cols[keep].astype(np.int64) * program.n + rows[keep], keep, one, 1.0)]
    for group in groups:
        variables, _ = definitions[int(rows[group[0]])]
        i, j = np.triu_indices(len(variables))
        terms.append((variables[j] * program.n + variables[i], one, one, 0.0))
    grouped = np.array([entry for group in groups for entry in group], dtype=np.int64)
    for entry in np.setdiff1d(np.arange(len(rows)), np.concatenate([keep, grouped])).tolist():
        row, col = int(rows[entry]), int(cols[entry])
        if entry in weighted:
            slots, factor = weighted[entry]
            terms += _products(program.n, definitions, (row, col), slots, factor)
        else:
            inner, outer = (row, col) if row in definitions else (col, row)
            variables, slots = definitions[inner]
            low, high = np.minimum(variables, outer), np.maximum(variables, outer)
            terms.append((high * program.n + low, slots, entry, np.where(low == high, 2.0, 1.0)))
    return terms


def _products(n: int, definitions: dict, pair: tuple[int, int], slots: np.ndarray, factor: float) -> list:
    """Terms of factor * (E_row' E_col + E_col' E_row) / (2 on the diagonal), upper triangle."""
    variables, _ = definitions[pair[0]]
    others, right = definitions[pair[1]]
    a, b = np.meshgrid(np.arange(len(variables)), np.arange(len(others)), indexing="ij")
    a, b = a.ravel(), b.ravel()
    scale = np.full(len(a), factor)
    if pair[0] == pair[1]:
        upper = variables[a] <= others[b]
        a, b, scale = a[upper], b[upper], scale[upper]
    else:
        scale[variables[a] == others[b]] *= 2.0
    low, high = np.minimum(variables[a], others[b]), np.maximum(variables[a], others[b])
    return [(high * n + low, slots[a], right[b], scale)]


def _constraint_terms(program: Program, pivots: Pivots, definitions: dict[int, Combination], one: int) -> list[tuple]:
    """Terms of the reduced A, keyed col * m + row; the rows of the pivots are gone."""
    gone = np.zeros(program.m, dtype=bool)
    gone[pivots.rows] = True
    rows, cols, first = program.A.rows.astype(np.int64), program.A.cols.astype(np.int64), program.P.nnz
    eliminated = np.zeros(program.n, dtype=bool)
    eliminated[pivots.cols] = True
    keep = np.flatnonzero(~gone[rows] & ~eliminated[cols])
    terms: list[tuple] = [(cols[keep] * program.m + rows[keep], first + keep, one, 1.0)]
    for entry in np.flatnonzero(~gone[rows] & eliminated[cols]).tolist():
        variables, slots = definitions[int(cols[entry])]
        terms.append((variables * program.m + rows[entry], slots, first + entry, 1.0))
    return terms
