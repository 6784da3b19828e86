"""Where things lie for programs with second-order cones: the words that ldl.py reads, then those of the cones.

Unknowns of the KKT matrix, in this order: x, one e per cone, the rows of A (zero, nonnegative,
second-order), one f per cone. e and f carry the low-rank part of a cone's weight,

    K = [P, 0, A', 0; 0, 1, U', 0; A, U, -diag, V'; 0, 0, V, -1],

which stands for -(diag + UU' - VV') in the rows, and is quasi-definite when diag > VV' (Domahidi 2013).
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from convexlearn.program.program import Program
from convexlearn.solvers.quadratic.layout import HEADER, INDICES, NAMES, REGISTERS, SIZES, Layout
from convexlearn.solvers.quadratic.ordering import cheapest_order, symmetric_pattern
from convexlearn.solvers.quadratic.symbolic import matrix_indices

# words of its own
(N_ROW, N_CONE, N_HALF, N_PRODUCT, I_CONE, I_PRODUCT, KEPT) = range(HEADER, HEADER + 7)
(PX, FIX, RHS, W, ETA, TEMP, SPARE, SLACK, GRAM) = range(HEADER + 7, HEADER + 16)
OWN = (
    *("N_ROW", "N_CONE", "N_HALF", "N_PRODUCT", "I_CONE", "I_PRODUCT", "KEPT"),
    *("PX", "FIX", "RHS", "W", "ETA", "TEMP", "SPARE", "SLACK", "GRAM"),
)
FIRST_INDEX = HEADER + len(OWN)
# lane registers after those of quadratic.layout
(TAU, KAPPA, DTAU, DKAPPA, GAP_TAU, QX, BZ, XPX, SIGMA, RATIO_SD, VIOLATED, BEST_TAU) = range(REGISTERS, REGISTERS + 12)
# options of a solve
(TOLERANCE, LIMIT, REGULARIZATION, HAND_OVER, WARM, ROUNDS, SMOOTHING) = range(7)
CONE_WORDS = 5  # of a cone: first row, dimension, slot of U relative to DATA, first and number of Gram entries
MOST_PRODUCTS = 300_000


def arrange(program: Program) -> Layout:
    """Symbolic analysis of a program's KKT matrix, header and slots."""
    cones, n, m = program.cones, program.n, program.m
    k, dimensions = len(cones.soc), np.array(cones.soc, dtype=np.int64)
    border, rows = int(dimensions.sum()), n + k
    N, entries = n + m + 2 * k, program.P.nnz + program.A.nnz
    cone = np.repeat(np.arange(k), dimensions)
    own = rows + cones.zero + cones.nonneg + np.arange(border)
    i = np.concatenate([program.P.rows, program.A.rows + rows, own, rows + m + cone]).astype(np.int64)
    j = np.concatenate([program.P.cols, program.A.cols, n + cone, own]).astype(np.int64)
    low_rank = np.r_[n + np.arange(k), rows + m + np.arange(k)]
    order, rows_first = elimination_order(symmetric_pattern(i, j, N), own, low_rank)
    gram = gram_matrices(program) if rows_first else Gram.none(k)
    eliminated = np.zeros(N, dtype=bool)
    eliminated[own] = np.repeat(gram.counts > 0, dimensions)
    i, j = np.r_[i, gram.rows], np.r_[j, gram.cols]
    indices = matrix_indices(i, j, N, n, order, given=len(gram.rows), eliminated=eliminated)
    first = np.r_[0, np.cumsum(dimensions)[:-1]] if k else dimensions
    starts = np.cumsum(gram.counts) - gram.counts
    table = np.stack([cones.zero + cones.nonneg + first, dimensions, entries + first, starts, gram.counts], 1).ravel()
    sizes = dict.fromkeys(SIZES, 0)
    sizes |= {"N_X": n, "N_EQ": cones.zero, "N_IN": cones.nonneg, "N_K": N, "N_L": len(indices["I_LI"])}
    sizes |= {"N_ENTRY": entries, "N_P": program.P.nnz, "N_PLUS": rows, "N_BORDER": 2 * border}
    offset = dict.fromkeys(NAMES, 0) | sizes
    offset |= {"N_ROW": m, "N_CONE": k, "N_HALF": border, "N_PRODUCT": len(gram.products)}
    arrays = [indices.get(name, np.zeros(0)) for name in INDICES] + [table, gram.products.ravel()]
    begins = FIRST_INDEX + np.cumsum([0, *(len(a) for a in arrays)])
    offset |= dict(zip((*INDICES, "I_CONE", "I_PRODUCT"), begins.tolist()))
    work = _slots(offset, m, k, len(gram.rows))
    header = np.array([offset[name] for name in (*NAMES, *OWN)])
    return Layout(np.concatenate([header, *arrays]).astype(np.int32), offset, state=offset["KEPT"], work=work)


@dataclass(frozen=True, eq=False)
class Gram:
    """Entries (rows, cols) of A'A for the rows of some cones; each is a sum of `products` (entry, a, b) of A's entries.

    counts: entries by cone, 0 where the factor eliminates the cone's rows one by one.
    """

    rows: np.ndarray
    cols: np.ndarray
    products: np.ndarray
    counts: np.ndarray

    @staticmethod
    def none(cones: int) -> "Gram":
        """No cone."""
        empty = np.zeros(0, dtype=np.int64)
        return Gram(empty, empty, empty.reshape(0, 3), np.zeros(cones, dtype=np.int64))


def gram_matrices(program: Program) -> Gram:
    """Gram matrices of the cones where they save at least half of the products.

    All rows of a cone have one weight (apart from e and f), so A'A over them is formed once per solve,
    and what eliminating them contributes to x is a multiple of it.
    """
    A, nP, first = program.A, program.P.nnz, program.cones.zero + program.cones.nonneg
    keys: list[tuple[int, int]] = []
    products: list[tuple[int, int, int]] = []
    counts: list[int] = []
    for d in program.cones.soc:
        entries = [np.flatnonzero(A.rows == row).tolist() for row in range(first, first + d)]
        first += d
        total = sum(len(row) * (len(row) + 1) // 2 for row in entries)
        own: dict[tuple[int, int], int] = {}
        pairs: list[tuple[int, int]] = []
        if total <= MOST_PRODUCTS:
            pairs = [(a, b) for row in entries for k, a in enumerate(row) for b in row[k:]]
            for a, b in pairs:
                own.setdefault((int(A.cols[b]), int(A.cols[a])), len(keys) + len(own))
        if 2 * len(own) >= total or total > MOST_PRODUCTS:
            counts.append(0)
            continue
        products += [(own[int(A.cols[b]), int(A.cols[a])], nP + a, nP + b) for a, b in pairs]
        keys += own
        counts.append(len(own))
    rows, cols = np.array(keys, dtype=np.int64).reshape(-1, 2).T
    return Gram(rows, cols, np.array(products, dtype=np.int64).reshape(-1, 3), np.array(counts, dtype=np.int64))


def elimination_order(pattern: sp.csr_array, rows: np.ndarray, low_rank: np.ndarray) -> tuple[np.ndarray, bool]:
    """The cheapest of minimum degree orders (N,), and whether it has the rows of cones, then e and f, first.

    Rows of a large cone are best eliminated before e and f, which would couple them all; for many small
    cones plain minimum degree is better, or e and f at the end.
    """
    stages: list[np.ndarray | None] = [None]
    for turn_rows, turn_low_rank in ((-2, -1), (0, 1)):
        stage = np.zeros(pattern.shape[0], dtype=np.int64)
        stage[rows], stage[low_rank] = turn_rows, turn_low_rank
        stages.append(stage)
    order, best = cheapest_order(pattern, stages)
    return order, best == 1


def _slots(offset: dict[str, int], m: int, k: int, gram: int) -> int:
    """Add the offsets of all slots, those that outlive a solve first; returns their number."""
    n, N, entries = offset["N_X"], offset["N_K"], offset["N_ENTRY"] + offset["N_BORDER"]
    lengths = {"DATA": entries + gram, "GRAM": gram, "WD": N, "SCALE": N, "COST": 1, "UNIT": 1, "KEPT": 0}
    lengths |= {"LX": offset["N_L"], "PIVOT": N, "T": 2 * N, "C": N, "SOL": N, "R": N, "D": N, "Y": N, "RHS": N}
    lengths |= {"SPARE": N, "FIX": N, "BEST": N, "PX": n, "S": m, "DS": m, "BEST_S": m, "W": m}
    lengths |= {"SLACK": m, "TEMP": 2 * m, "ETA": k, "OUT": n + m, "REG": REGISTERS + 12, "END": 0}
    start = 0
    for name, length in lengths.items():
        offset[name] = start
        start += length
    if start >= 2**31:
        raise ValueError(f"workspace of {start} slots is too large for 32-bit offsets")
    return start
