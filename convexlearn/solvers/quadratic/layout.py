"""Where things lie: the int32 header with index arrays, and the slots of the float64 workspace.

One header array and one workspace with offsets keep compilation and dispatch short. Header words are
named by the constants below; `words` lists them with their values, `slots` in the order of the workspace.
"""

from dataclasses import dataclass

import numpy as np

SIZES = (
    *("N_X", "N_EQ", "N_IN", "N_LO", "N_UP", "N_ABS", "N_K", "N_PAIR", "N_L", "N_ENTRY", "N_P", "N_BOTH"),
    *("N_PLUS", "N_BORDER"),
)
INDICES = (
    *("I_PERM", "I_LP", "I_LI", "I_RP", "I_RK", "I_RD", "I_RC", "I_KP", "I_KI", "I_KS"),
    *("I_CP", "I_CI", "I_CS", "I_EI", "I_EJ", "I_LO", "I_UP", "I_ABS", "I_BOTH", "I_FIELD", "I_PANEL"),
)
STATE = ("LX", "PIVOT", "WD", "SCALE", "COST", "UNIT", "OUT", "KAPPA", "RATIO", "OK")
WORK = (
    *("DATA", "C", "ON", "BASE", "SOL", "S", "R", "D", "DS", "Y", "ACT", "T", "QL", "REG"),
    *("CERT", "BEST", "BEST_S", "END"),
)
NAMES = (*SIZES, *INDICES, *STATE, *WORK)
# sizes; the first N_PLUS unknowns have positive pivots; N_BORDER entries after the first N_ENTRY come from the solver
(N_X, N_EQ, N_IN, N_LO, N_UP, N_ABS, N_K, N_PAIR, N_L, N_ENTRY, N_P, N_BOTH, N_PLUS, N_BORDER) = range(14)
# offsets of index arrays: permutation; L by column; L by row; K by column; K by original column; entries
(I_PERM, I_LP, I_LI, I_RP, I_RK, I_RD, I_RC, I_KP, I_KI, I_KS) = range(14, 24)
(I_CP, I_CI, I_CS, I_EI, I_EJ, I_LO, I_UP, I_ABS, I_BOTH, I_FIELD, I_PANEL) = range(24, 35)
# slots that outlive a solve: factor, pivots, diagonal, scaling, solution, derivative weights
(LX, PIVOT, WD, SCALE, COST, UNIT, OUT, KAPPA, RATIO, OK) = range(35, 45)
# slots of one solve
(DATA, C, ON, BASE, SOL, S, R, D, DS, Y, ACT, T, QL, REG, CERT, BEST, BEST_S, END) = range(45, 63)
HEADER = 63
# lane registers, relative to REG
(CODE, ITERATIONS, RESIDUAL, DONE) = range(4)  # reported in this order
(MU, PRIMAL, DUAL, ACTIVE, ALPHA, BETA, COUNT, REG_X, REG_Y, TARGET) = range(4, 14)
(SIZE_P, SIZE_D, DATA_P, DATA_D, VIOLATION, ERROR, LEAST, STALLED, PENALTY_X, PENALTY_Y) = range(14, 24)
REGISTERS = 24
# options of a solve
(TOLERANCE, LIMIT, SMOOTHING, REGULARIZATION, HAND_OVER, WARM, ROUNDS, QUADRATIC_X, QUADRATIC_Y) = range(9)

PINNED = 1e19  # a diagonal weight from here on removes the unknown from the system exactly
OFF = 1e-30  # multiplier of an absent inequality, whose slack is 1
INFINITE = 1e20  # bounds from here on are absent


@dataclass(frozen=True, eq=False)
class Layout:
    """Header array (int32), its offsets by name, and the lengths of state and workspace in slots."""

    header: np.ndarray
    offset: dict[str, int]
    state: int
    work: int


def arrange(sizes: dict[str, int], indices: dict[str, np.ndarray]) -> Layout:
    """Lay out the header and the slots for these sizes and index arrays."""
    offset = dict(sizes)
    start = HEADER
    for name in INDICES:
        offset[name] = start
        start += len(indices[name])
    start = 0
    for name, length in _slots(sizes).items():
        offset[name] = start
        start += length
    if start >= 2**31:
        raise ValueError(f"workspace of {start} slots is too large for 32-bit offsets")
    words = np.array([offset[name] for name in NAMES], dtype=np.int32)
    header = np.concatenate([words, *(np.asarray(indices[name], dtype=np.int32) for name in INDICES)])
    return Layout(header, offset, state=offset["DATA"], work=start)


def _slots(sizes: dict[str, int]) -> dict[str, int]:
    n, rows, N, pairs = sizes["N_X"], sizes["N_EQ"], sizes["N_K"], sizes["N_PAIR"]
    bounds, absolute = sizes["N_LO"] + sizes["N_UP"], sizes["N_ABS"]
    long = n + rows + pairs
    state = (sizes["N_L"], N, N, N, 1, 1, N + bounds + absolute, absolute, bounds + absolute, 1)
    work = (sizes["N_ENTRY"], N + bounds + absolute, pairs, n, long, pairs, long, long, pairs, long, pairs)
    return dict(zip((*STATE, *WORK), (*state, *work, 2 * N, n, REGISTERS, long, long, pairs, 0), strict=True))
