"""Certificates of infeasibility and unboundedness from diverging iterates of the interior point."""

from convexlearn.solvers.quadratic.equilibrate import largest
from convexlearn.solvers.quadratic.layout import (
    ACTIVE,
    BASE,
    CERT,
    CODE,
    COST,
    DONE,
    I_ABS,
    I_BOTH,
    I_LO,
    I_UP,
    N_ABS,
    N_BOTH,
    N_EQ,
    N_IN,
    N_K,
    N_LO,
    N_PAIR,
    N_UP,
    N_X,
    ON,
    OUT,
    PINNED,
    REG,
    SCALE,
    SOL,
    UNIT,
    C,
    D,
    T,
)
from convexlearn.solvers.quadratic.ldl import multiply
from convexlearn.solvers.quadratic.simd import any_gt, full, helper, index, load, stage, store, vabs, vmax, where_gt

DIVERGED = 1e3  # equilibrated iterates larger than this are tested
CERTIFIED = 1e-8  # largest relative error of a certificate
INFEASIBLE_CODE = 2.0
UNBOUNDED_CODE = 3.0


@helper
def farkas(w, I, F, sol):
    """Error of the duals in `sol` as a Farkas certificate, and -(b'y + h'z - l'lower + u'upper).

    The error is |A'y + G'z - lower + upper| relative to the duals, divided by the value relative to its terms.
    """
    n, N, c, d, on = index(I, N_X), index(I, N_K), index(I, C), index(I, T), index(I, ON)
    inequalities, lower, upper = index(I, N_IN), index(I, N_LO), index(I, N_UP)
    o, v = N - inequalities, index(I, CERT)
    value, terms = full(w, 0.0), full(w, 0.0)
    for i in range(N):
        store(F, d + i, full(w, 0.0))
        dual = load(w, F, sol + i) if i >= n else full(w, 0.0)
        store(F, v + i, dual if i < o else vmax(dual, full(w, 0.0)) * load(w, F, on + i - o))
    multiply(w, I, F, v, d)
    for i in range(n, o + inequalities + lower + upper):
        sign, dual = 1.0, load(w, F, sol + i)
        if i >= o:
            dual = vmax(dual, full(w, 0.0)) * load(w, F, on + i - o)
        if i >= N and i < N + lower:
            sign = -1.0
            k = d + index(I, index(I, I_LO) + i - N)
            store(F, k, load(w, F, k) - dual)
        elif i >= N + lower:
            k = d + index(I, index(I, I_UP) + i - N - lower)
            store(F, k, load(w, F, k) + dual)
        store(F, v + i, dual)
        term = sign * dual * load(w, F, c + i)
        value, terms = value - term, vmax(terms, vabs(term))
    for k in range(index(I, N_BOTH)):
        i, at = index(I, index(I, I_BOTH) + 3 * k), N + index(I, index(I, I_BOTH) + 3 * k + 1)
        pull = where_gt(load(w, F, index(I, BASE) + i), PINNED, load(w, F, d + i), 0.0)
        store(F, d + i, load(w, F, d + i) - pull)
        store(F, v + at, load(w, F, v + at) + vmax(pull, full(w, 0.0)))
        above = v + N + lower + index(I, index(I, I_BOTH) + 3 * k + 2)
        store(F, above, load(w, F, above) + vmax(0.0 - pull, full(w, 0.0)))
        term = pull * load(w, F, c + at)
        value, terms = value + term, vmax(terms, vabs(term))
    # equilibrated, since the caller's units are arbitrary
    size = largest(w, F, v + n, o + inequalities + lower + upper - n, full(w, 0.0))
    error = largest(w, F, d, n, full(w, 0.0)) * terms / (value * size)
    return where_gt(value, 0.0, error, 1e300), value * load(w, F, index(I, UNIT))


@helper
def recession(w, I, F, sol):
    """Error of x in `sol` as a direction of unbounded descent, and -(q'x + w'|x|).

    The error is relative to x, divided by the value relative to its terms.
    """
    n, N, c, d, on = index(I, N_X), index(I, N_K), index(I, C), index(I, T), index(I, ON)
    inequalities, lower, upper = index(I, N_IN), index(I, N_LO), index(I, N_UP)
    o, v = N - inequalities, index(I, CERT)
    zero = full(w, 0.0)
    value, terms, size = zero, zero, zero
    for i in range(N):
        store(F, d + i, zero)
        free = zero
        if i < n:
            free = where_gt(load(w, F, index(I, BASE) + i), PINNED, 0.0, load(w, F, sol + i))
            term = free * load(w, F, c + i)
            value, terms, size = value - term, vmax(terms, vabs(term)), vmax(size, vabs(free))
        store(F, v + i, free)
    for j in range(index(I, N_ABS)):
        x = vabs(load(w, F, v + index(I, index(I, I_ABS) + j)))
        term = x * load(w, F, c + N + lower + upper + j)
        value, terms = value - term, vmax(terms, term)
    multiply(w, I, F, v, d)
    error = largest(w, F, d, o, zero)
    for i in range(o, N):
        error = vmax(error, load(w, F, d + i) * load(w, F, on + i - o))
    for j in range(lower + upper):
        k = index(I, index(I, I_LO) + j) if j < lower else index(I, index(I, I_UP) + j - lower)
        gap = load(w, F, v + k) * load(w, F, on + inequalities + j)
        error = vmax(error, 0.0 - gap if j < lower else gap)
    unit = load(w, F, index(I, UNIT)) / load(w, F, index(I, COST))
    return where_gt(value, 0.0, error * terms / (value * size), 1e300), value * unit


@helper
def record(w, I, F, passed, value, code):
    """Write the certificate in CERT to OUT in the caller's units where `passed`, and stop those lanes."""
    n, N, v, out, scale = index(I, N_X), index(I, N_K), index(I, CERT), index(I, OUT), index(I, SCALE)
    lower, upper, reg = index(I, N_LO), index(I, N_UP), index(I, REG)
    for i in range(N + lower + upper):
        if i < N:
            factor = load(w, F, scale + i) / value
        elif i < N + lower:
            factor = 1.0 / (load(w, F, scale + index(I, index(I, I_LO) + i - N)) * value)
        else:
            factor = 1.0 / (load(w, F, scale + index(I, index(I, I_UP) + i - N - lower)) * value)
        mine = load(w, F, v + i) * factor
        if (i < n) != (code > 2.5):
            mine = full(w, 0.0)
        store(F, out + i, where_gt(passed, 0.5, mine, load(w, F, out + i)))
    for i in range(index(I, N_ABS)):
        k = out + N + lower + upper + i
        store(F, k, where_gt(passed, 0.5, 0.0, load(w, F, k)))
    store(F, reg + CODE, where_gt(passed, 0.5, code, load(w, F, reg + CODE)))
    store(F, reg + ACTIVE, where_gt(passed, 0.5, 0.0, load(w, F, reg + ACTIVE)))
    store(F, reg + DONE, where_gt(passed, 0.5, 1.0, load(w, F, reg + DONE)))


@stage
def certify(w, I, F):
    """Stop active lanes where a diverging iterate, or its step, is a certificate; sets CODE, DONE and OUT."""
    n, sol, reg = index(I, N_X), index(I, SOL), index(I, REG)
    zero, one = full(w, 0.0), full(w, 1.0)
    duals = largest(w, F, sol + n, index(I, N_EQ) + index(I, N_PAIR), zero) * load(w, F, reg + ACTIVE)
    primal = largest(w, F, sol, n, zero) * load(w, F, reg + ACTIVE)
    for kind in range(4):
        point = sol if kind % 2 == 0 else index(I, D)
        size = where_gt(load(w, F, reg + ACTIVE), 0.5, duals if kind < 2 else primal, 0.0)
        if any_gt(size, DIVERGED):
            if kind < 2:
                code, (error, value) = INFEASIBLE_CODE, farkas(w, I, F, point)
            else:
                code, (error, value) = UNBOUNDED_CODE, recession(w, I, F, point)
            passed = where_gt(size, DIVERGED, where_gt(CERTIFIED, error, one, 0.0), 0.0)
            if any_gt(passed, 0.5):
                record(w, I, F, passed, value, code)
