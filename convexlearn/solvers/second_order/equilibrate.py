"""Load a block of samples into lanes and equilibrate by powers of two, one factor per cone (Ruiz 2001)."""

from convexlearn.solvers.quadratic.equilibrate import find_scaling, largest, load_field
from convexlearn.solvers.quadratic.layout import (
    COST,
    DATA,
    DATA_D,
    DATA_P,
    I_EI,
    I_EJ,
    INFINITE,
    N_ENTRY,
    N_EQ,
    N_IN,
    N_K,
    N_P,
    N_PLUS,
    N_X,
    REG,
    SCALE,
    UNIT,
    C,
    R,
)
from convexlearn.solvers.quadratic.simd import full, helper, index, load, power_of_two, store, vmin, where_gt
from convexlearn.solvers.second_order.layout import CONE_WORDS, I_CONE, N_CONE, N_ROW


@helper
def load_data(w, I, F, fields, shared, order, block):
    """P, q, A, b of the samples of a block; bit f of `shared` says that field f has one row."""
    data, c = index(I, DATA), index(I, C)
    nP, entries = index(I, N_P), index(I, N_ENTRY)
    P, q, A, b = fields
    for i in range(index(I, N_K)):
        store(F, c + i, full(w, 0.0))
    load_field(w, F, data, nP, P, shared & 1, order, block)
    load_field(w, F, c, index(I, N_X), q, (shared >> 1) & 1, order, block)
    load_field(w, F, data + nP, entries - nP, A, (shared >> 2) & 1, order, block)
    load_field(w, F, c + index(I, N_PLUS), index(I, N_ROW), b, (shared >> 3) & 1, order, block)


@helper
def drop_absent(w, I, F):
    """Turn inequalities without a limit into 0'x <= 1."""
    data, b, rows = index(I, DATA), index(I, C) + index(I, N_PLUS), index(I, N_PLUS)
    first, last = index(I, N_EQ), index(I, N_EQ) + index(I, N_IN)
    for e in range(index(I, N_P), index(I, N_ENTRY)):
        row = index(I, index(I, I_EI) + e) - rows
        if first <= row and row < last:
            store(F, data + e, where_gt(load(w, F, b + row), 0.999 * INFINITE, 0.0, load(w, F, data + e)))
    for row in range(first, last):
        limit = load(w, F, b + row)
        store(F, b + row, where_gt(limit, 0.999 * INFINITE, 1.0, limit))


@helper
def find_factors(w, I, F):
    """SCALE: powers of two that bring the rows of the KKT matrix close to norm 1; a cone's rows get the smallest."""
    find_scaling(w, I, F)
    scale, norm = index(I, SCALE) + index(I, N_PLUS), index(I, R) + index(I, N_PLUS)
    for k in range(index(I, N_CONE)):
        at = index(I, I_CONE) + CONE_WORDS * k
        first, d = index(I, at), index(I, at + 1)
        least = full(w, 1e300)
        for i in range(first, first + d):  # rows without entries don't count
            least = where_gt(load(w, F, norm + i), 0.0, vmin(least, load(w, F, scale + i)), least)
        for i in range(first, first + d):
            store(F, scale + i, where_gt(least, 1e299, 1.0, least))


@helper
def apply_factors(w, I, F):
    """x = SCALE UNIT x^, z = SCALE UNIT / COST z^, in powers of two, so that undoing it is exact."""
    n, N, scale, data, c = index(I, N_X), index(I, N_K), index(I, SCALE), index(I, DATA), index(I, C)
    nP, reg, one, zero = index(I, N_P), index(I, REG), full(w, 1.0), full(w, 0.0)
    for e in range(index(I, N_ENTRY)):
        a = load(w, F, data + e) * load(w, F, scale + index(I, index(I, I_EI) + e))
        store(F, data + e, a * load(w, F, scale + index(I, index(I, I_EJ) + e)))
    for i in range(N):
        store(F, c + i, load(w, F, c + i) * load(w, F, scale + i))
    unit = largest(w, F, c + n, N - n, zero)
    unit = power_of_two(where_gt(unit, 1.0, one, where_gt(unit, 1e-30, unit, one)))
    store(F, index(I, UNIT), unit)
    for i in range(N):
        store(F, c + i, load(w, F, c + i) / unit)
    size = largest(w, F, c, n, largest(w, F, data, nP, zero))
    cost = power_of_two(1.0 / where_gt(size, 1e-30, size, one))
    store(F, index(I, COST), cost)
    for e in range(nP):
        store(F, data + e, load(w, F, data + e) * cost)
    for i in range(n):
        store(F, c + i, load(w, F, c + i) * cost)
    store(F, reg + DATA_D, largest(w, F, c, n, zero))
    store(F, reg + DATA_P, largest(w, F, c + n, N - n, zero))
