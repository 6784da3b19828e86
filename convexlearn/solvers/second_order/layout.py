"""Where things lie for programs with second-order cones: the words that ldl.py reads, then those of the cones.

Unknowns of the KKT matrix, in this order: x, one e per cone, the rows of A (zero, nonnegative,
second-order), one f per cone. e and f carry the low-rank part of a cone's weight,

    K = [P, 0, A', 0; 0, 1, U', 0; A, U, -diag, V'; 0, 0, V, -1],

which stands for -(diag + UU' - VV') in the rows, and is quasi-definite when diag > VV' (Domahidi 2013).
"""

import numpy as np
import scipy.sparse as sp

from convexlearn.program.program import Program
from convexlearn.solvers.quadratic.layout import HEADER, INDICES, NAMES, REGISTERS, SIZES, Layout
from convexlearn.solvers.quadratic.ldl import column_patterns, matrix_indices, minimum_degree, symmetric_pattern

# words of its own
(N_ROW, N_CONE, N_HALF, I_CONE, KEPT) = range(HEADER, HEADER + 5)
(PX, FIX, RHS, W, ETA, TEMP, SPARE, SLACK) = range(HEADER + 5, HEADER + 13)
OWN = ("N_ROW", "N_CONE", "N_HALF", "I_CONE", "KEPT", "PX", "FIX", "RHS", "W", "ETA", "TEMP", "SPARE", "SLACK")
FIRST_INDEX = HEADER + len(OWN)
# lane registers after those of quadratic.layout
(TAU, KAPPA, DTAU, DKAPPA, GAP_TAU, QX, BZ, XPX, SIGMA, RATIO_SD, VIOLATED, BEST_TAU) = range(REGISTERS, REGISTERS + 12)
# options of a solve
(TOLERANCE, LIMIT, REGULARIZATION, HAND_OVER, WARM, ROUNDS, SMOOTHING) = range(7)
CONE_WORDS = 3  # of a cone in the index array: first row, dimension, slot of U relative to DATA


def arrange(program: Program) -> Layout:
    """Symbolic analysis of a program's KKT matrix, header and slots."""
    cones, n, m = program.cones, program.n, program.m
    k, dimensions = len(cones.soc), np.array(cones.soc, dtype=np.int64)
    border = int(dimensions.sum())
    rows, N, entries = n + k, n + m + 2 * k, program.P.nnz + program.A.nnz
    cone = np.repeat(np.arange(k), dimensions)
    own = rows + cones.zero + cones.nonneg + np.arange(border)
    i = np.concatenate([program.P.rows, program.A.rows + rows, own, rows + m + cone]).astype(np.int64)
    j = np.concatenate([program.P.cols, program.A.cols, n + cone, own]).astype(np.int64)
    low_rank = np.r_[n + np.arange(k), rows + m + np.arange(k)]
    indices = matrix_indices(i, j, N, n, elimination_order(symmetric_pattern(i, j, N), own, low_rank))
    first = np.r_[0, np.cumsum(dimensions)[:-1]] if k else dimensions
    table = np.stack([cones.zero + cones.nonneg + first, dimensions, entries + first], 1).ravel()
    sizes = dict.fromkeys(SIZES, 0)
    sizes |= {"N_X": n, "N_EQ": cones.zero, "N_IN": cones.nonneg, "N_K": N, "N_L": len(indices["I_LI"])}
    sizes |= {"N_ENTRY": entries, "N_P": program.P.nnz, "N_PLUS": rows, "N_BORDER": 2 * border}
    offset = dict.fromkeys(NAMES, 0) | sizes | {"N_ROW": m, "N_CONE": k, "N_HALF": border}
    arrays = [indices.get(name, np.zeros(0)) for name in INDICES] + [table]
    starts = FIRST_INDEX + np.cumsum([0, *(len(a) for a in arrays)])
    offset |= dict(zip((*INDICES, "I_CONE"), starts.tolist()))
    work = _slots(offset, m, k)
    header = np.array([offset[name] for name in (*NAMES, *OWN)])
    return Layout(np.concatenate([header, *arrays]).astype(np.int32), offset, state=offset["KEPT"], work=work)


def elimination_order(pattern: sp.csr_array, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The cheapest of minimum degree orders (N,): plain, with the unknowns `first` first, with those in `last` last.

    Rows of a large cone are best eliminated before e and f, which would couple them all; e and f of many
    small cones are not.
    """
    orders = [minimum_degree(pattern)]
    for group, turn in ((first, -1), (last, 1)):
        stage = np.zeros(pattern.shape[0], dtype=np.int64)
        stage[group] = turn
        orders.append(minimum_degree(pattern, stage))
    costs = [sum(len(c) * (len(c) + 3) for c in column_patterns(pattern, order)) for order in orders]
    return orders[int(np.argmin(costs))]


def _slots(offset: dict[str, int], m: int, k: int) -> int:
    """Add the offsets of all slots, those that outlive a solve first; returns their number."""
    n, N, entries = offset["N_X"], offset["N_K"], offset["N_ENTRY"] + offset["N_BORDER"]
    lengths = {"DATA": entries, "WD": N, "SCALE": N, "COST": 1, "UNIT": 1, "KEPT": 0}
    lengths |= {"LX": offset["N_L"], "PIVOT": N, "T": N, "C": N, "SOL": N, "R": N, "D": N, "Y": N, "RHS": N}
    lengths |= {"SPARE": N, "FIX": N, "BEST": N, "PX": n, "S": m, "DS": m, "BEST_S": m, "W": m}
    lengths |= {"SLACK": m, "TEMP": 2 * m, "ETA": k, "OUT": n + m, "REG": REGISTERS + 12, "END": 0}
    start = 0
    for name, length in lengths.items():
        offset[name] = start
        start += length
    if start >= 2**31:
        raise ValueError(f"workspace of {start} slots is too large for 32-bit offsets")
    return start
