"""Load a block of samples into lanes, mark absent bounds, equilibrate by powers of two (Ruiz 2001)."""

from convexlearn.solvers.quadratic.layout import (
    BASE,
    COST,
    COUNT,
    DATA,
    DATA_D,
    DATA_P,
    I_ABS,
    I_BOTH,
    I_EI,
    I_EJ,
    I_FIELD,
    I_LO,
    I_UP,
    INFINITE,
    N_ABS,
    N_BOTH,
    N_ENTRY,
    N_EQ,
    N_IN,
    N_K,
    N_LO,
    N_P,
    N_PAIR,
    N_UP,
    N_X,
    ON,
    PINNED,
    REG,
    REG_X,
    SCALE,
    UNIT,
    C,
    R,
)
from convexlearn.solvers.quadratic.simd import (
    full,
    get,
    half_power,
    helper,
    index,
    load,
    power_of_two,
    put,
    stage,
    store,
    vabs,
    vmax,
    where_gt,
)

PASSES = 3
FIXED_WIDTH = 1e-12  # bounds closer than this, relative to their size, fix the variable


@helper
def load_field(w, F, slot, count, a, shared, order, block):
    """Copy one field of the samples order[block W : (block + 1) W] to the slots from `slot`."""
    W = len(w)
    if shared:
        for i in range(count):
            store(F, slot + i, full(w, get(a, i)))
        return
    for lane in range(W):
        start = index(order, block * W + lane) * count
        to = slot * W + lane
        for i in range(count):
            put(F, to + i * W, get(a, start + i))


@stage
def load_block(w, I, F, fields, shared, order, block, wanted):
    """Load the wanted ones of the nine fields; bit f of `shared` says that field f has one row."""
    data = index(I, DATA)
    for f in range(9):
        slot, count = data + index(I, index(I, I_FIELD) + f), index(I, index(I, I_FIELD) + 9 + f)
        if (wanted >> f) & 1:
            load_field(w, F, slot, count, fields[f], (shared >> f) & 1, order, block)


@helper
def mark_limits(w, F, first, count, on, sign):
    """ON = 1 and the limit kept where sign * limit < INFINITE, else ON = 0 and the limit 0."""
    for i in range(count):
        limit = sign * load(w, F, first + i)  # a limit that is NaN stays and makes its lane NaN
        store(F, on + i, where_gt(limit, 0.999 * INFINITE, 0.0, full(w, 1.0)))
        limit = where_gt(-INFINITE, limit, -INFINITE, where_gt(limit, 0.999 * INFINITE, 0.0, limit))
        store(F, first + i, sign * limit)


@helper
def mark_absent(w, I, F):
    """Set ON (pairs), BASE (variables) and COUNT: absent bounds, zero weights, fixed variables."""
    n, inequalities, lower, upper = index(I, N_X), index(I, N_IN), index(I, N_LO), index(I, N_UP)
    absolute, on, base, reg = index(I, N_ABS), index(I, ON), index(I, BASE), index(I, REG)
    h = index(I, C) + n + index(I, N_EQ)
    l, u = h + inequalities, h + inequalities + lower
    one = full(w, 1.0)
    mark_limits(w, F, h, inequalities, on, 1.0)
    mark_limits(w, F, l, lower, on + inequalities, -1.0)
    mark_limits(w, F, u, upper, on + inequalities + lower, 1.0)
    first = inequalities + lower + upper
    for i in range(absolute):
        weight = load(w, F, u + upper + i)
        store(F, u + upper + i, where_gt(0.0, weight, 0.0, weight))
        present = where_gt(1e-300, weight, 0.0, one)
        store(F, on + first + i, present)
        store(F, on + first + absolute + i, present)
    for i in range(n):
        store(F, base + i, load(w, F, reg + REG_X))
    both = index(I, I_BOTH)
    for i in range(index(I, N_BOTH)):
        at_lower, at_upper = index(I, both + 3 * i + 1), index(I, both + 3 * i + 2)
        below, above = on + inequalities + at_lower, on + inequalities + lower + at_upper
        bound = load(w, F, l + at_lower)
        wide = vabs(load(w, F, u + at_upper) - bound) - FIXED_WIDTH * (1.0 + vabs(bound))
        wide = where_gt(load(w, F, below) + load(w, F, above), 1.5, wide, 1.0)
        store(F, below, where_gt(1e-300, wide, 0.0, load(w, F, below)))
        store(F, above, where_gt(1e-300, wide, 0.0, load(w, F, above)))
        variable = base + index(I, both + 3 * i)
        store(F, variable, where_gt(1e-300, wide, 10 * PINNED, load(w, F, variable)))
    count = full(w, 1e-300)
    for i in range(index(I, N_PAIR)):
        count = count + load(w, F, on + i)
    store(F, reg + COUNT, count)


@helper
def find_scaling(w, I, F):
    """SCALE (N): powers of two that bring the rows of the KKT matrix close to norm 1."""
    N, scale, norm, entries = index(I, N_K), index(I, SCALE), index(I, R), index(I, N_ENTRY)
    ei, ej, data = index(I, I_EI), index(I, I_EJ), index(I, DATA)
    one, zero = full(w, 1.0), full(w, 0.0)
    for i in range(N):
        store(F, scale + i, one)
    for _ in range(PASSES):
        for i in range(N):
            store(F, norm + i, zero)
        for e in range(entries):
            i, j = index(I, ei + e), index(I, ej + e)
            a = vabs(load(w, F, data + e)) * load(w, F, scale + i) * load(w, F, scale + j)
            store(F, norm + i, vmax(a, load(w, F, norm + i)))
            store(F, norm + j, vmax(a, load(w, F, norm + j)))
        for i in range(N):
            size = load(w, F, norm + i)
            size = where_gt(size, 1e-30, size, one)
            store(F, scale + i, load(w, F, scale + i) * half_power(size))


@helper
def largest(w, F, first, count, start):
    """The largest magnitude in `count` slots, at least `start`."""
    for i in range(count):
        start = vmax(start, vabs(load(w, F, first + i)))
    return start


@helper
def apply_scaling(w, I, F):
    """x = SCALE UNIT x^, y = SCALE UNIT / COST y^, in powers of two, so that undoing it is exact."""
    n, N, scale, data, c = index(I, N_X), index(I, N_K), index(I, SCALE), index(I, DATA), index(I, C)
    ei, ej, entries, nP = index(I, I_EI), index(I, I_EJ), index(I, N_ENTRY), index(I, N_P)
    lower, upper, absolute = index(I, N_LO), index(I, N_UP), index(I, N_ABS)
    reg = index(I, REG)
    one, zero = full(w, 1.0), full(w, 0.0)
    for e in range(entries):
        a = load(w, F, data + e) * load(w, F, scale + index(I, ei + e))
        store(F, data + e, a * load(w, F, scale + index(I, ej + e)))
    for i in range(N):
        store(F, c + i, load(w, F, c + i) * load(w, F, scale + i))
    l, u = c + N, c + N + lower
    for i in range(lower):
        store(F, l + i, load(w, F, l + i) / load(w, F, scale + index(I, index(I, I_LO) + i)))
    for i in range(upper):
        store(F, u + i, load(w, F, u + i) / load(w, F, scale + index(I, index(I, I_UP) + i)))
    weight = u + upper
    for i in range(absolute):
        store(F, weight + i, load(w, F, weight + i) * load(w, F, scale + index(I, index(I, I_ABS) + i)))
    # limits far below 1 would drown in tolerances that are relative to 1 + data: measure x in their unit
    unit = largest(w, F, c + n, N - n + lower + upper, zero)
    unit = power_of_two(where_gt(unit, 1.0, one, where_gt(unit, 1e-30, unit, one)))
    store(F, index(I, UNIT), unit)
    unit = 1.0 / unit
    for i in range(N + lower + upper + absolute):
        store(F, c + i, load(w, F, c + i) * unit)
    size = largest(w, F, weight, absolute, largest(w, F, c, n, largest(w, F, data, nP, zero)))
    cost = power_of_two(1.0 / where_gt(size, 1e-30, size, one))
    store(F, index(I, COST), cost)
    for e in range(nP):
        store(F, data + e, load(w, F, data + e) * cost)
    for i in range(n):
        store(F, c + i, load(w, F, c + i) * cost)
    for i in range(absolute):
        store(F, weight + i, load(w, F, weight + i) * cost)
    store(F, reg + DATA_D, largest(w, F, c, n, zero))
    store(F, reg + DATA_P, largest(w, F, c + n, N - n + lower + upper, zero))
