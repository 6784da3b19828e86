"""Active sets whose constraints are dependent: move the multipliers to a vertex, and let go of what it does not need.

Where active constraints are dependent (more of them meet at x than fix it), the multipliers are not
unique, and the derivative at all of these constraints together is none of the solution's: a variable that
an equality holds at the kink of |x| would not move with the equality. At a vertex of the set of multipliers
the constraints with a positive one are independent, and the others can be dropped without moving x: what
remains is the derivative of one of the regions of constant active set that meet at the point.
"""

from convexlearn.solvers.quadratic.equilibrate import largest
from convexlearn.solvers.quadratic.layout import (
    ACT,
    BEST,
    BEST_S,
    CERT,
    DONE,
    DS,
    I_ABS,
    I_LO,
    I_UP,
    N_ABS,
    N_EQ,
    N_IN,
    N_K,
    N_LO,
    N_PAIR,
    N_UP,
    N_X,
    PINNED,
    REG,
    WD,
    D,
    R,
    Y,
)
from convexlearn.solvers.quadratic.ldl import multiply, solve_factored
from convexlearn.solvers.quadratic.polish import KINK
from convexlearn.solvers.quadratic.simd import (
    any_gt,
    full,
    helper,
    index,
    load,
    stage,
    store,
    vabs,
    vmax,
    vmin,
    where_gt,
)

PROJECTIONS = 4  # repetitions of the proximal step, each of which removes all but 1e-7 / curvature of the range
SUSPECT = 1e-4  # entry of the projected probe (entries up to 1) that calls for the other repetitions
NULL = 1e-3  # entry that remains where rows are dependent
INVOLVED = 1e-6  # smallest slope of a multiplier along a direction of entries up to 1
DROPS = 30  # constraints that are let go at most,
DROP_ENTRIES = 4_000_000  # or this many entries of L over all of them, since each takes a factorization
ENDLESS = 1e300


@helper
def project(w, I, F, v):
    """v (N slots) minus K (K + shift)^-1 v: what remains is its part in the null space; its largest entry."""
    n, N, d, wd, r = index(I, N_X), index(I, N_K), index(I, D), index(I, WD), index(I, R)
    for i in range(N):
        store(F, d + i, load(w, F, v + i))
        store(F, r + i, full(w, 0.0))
    solve_factored(w, I, F, d)
    multiply(w, I, F, d, r)
    for i in range(N):
        free = where_gt(vabs(load(w, F, wd + i)), PINNED, 0.0, load(w, F, v + i) - load(w, F, r + i))
        store(F, v + i, free)
    for i in range(n):
        store(F, v + i, full(w, 0.0))
    return largest(w, F, v + n, N - n, full(w, 0.0))


@helper
def dependence(w, I, F, lanes):
    """CERT (N): multipliers with A'y + G'z = 0 on the free variables, entries up to 1; 1 in `lanes` that have some."""
    n, N, v = index(I, N_X), index(I, N_K), index(I, CERT)
    for i in range(N):  # a fixed, irregular probe
        probe = 0.0 if i < n else 0.5 + ((i * 2654435761) % 1024) / 2048.0
        if i % 3 == 1:
            probe = 0.0 - probe
        free = where_gt(vabs(load(w, F, index(I, WD) + i)), PINNED, 0.0, probe)
        store(F, v + i, free)
    size = project(w, I, F, v)
    if not any_gt(size * lanes, SUSPECT):
        return full(w, 0.0)
    for _ in range(1, PROJECTIONS):
        size = project(w, I, F, v)
    found = where_gt(size, NULL, lanes, 0.0)
    for i in range(n, N):
        store(F, v + i, where_gt(found, 0.5, load(w, F, v + i) / size, 0.0))
    return found


@helper
def slopes(w, I, F):
    """DS (pairs): change of the multipliers of active rows, bounds and kinks along CERT; 0 where not involved."""
    N, v, r, ds, act, wd = index(I, N_K), index(I, CERT), index(I, R), index(I, DS), index(I, ACT), index(I, WD)
    inequalities, lower, upper, absolute = index(I, N_IN), index(I, N_LO), index(I, N_UP), index(I, N_ABS)
    for i in range(N):
        store(F, r + i, full(w, 0.0))
    multiply(w, I, F, v, r)
    for j in range(inequalities):
        store(F, ds + j, load(w, F, v + N - inequalities + j))
    for j in range(inequalities, inequalities + lower + upper):
        if j < inequalities + lower:
            slope = load(w, F, r + index(I, index(I, I_LO) + j - inequalities))
        else:
            slope = 0.0 - load(w, F, r + index(I, index(I, I_UP) + j - inequalities - lower))
        store(F, ds + j, slope)
    first = inequalities + lower + upper
    for j in range(first, first + absolute):
        i = index(I, index(I, I_ABS) + j - first)
        slope = where_gt(load(w, F, wd + i), 0.5 * KINK, 0.5 * load(w, F, r + i), 0.0)
        store(F, ds + j, 0.0 - slope)
        store(F, ds + absolute + j, slope)
    for j in range(index(I, N_PAIR)):
        slope = load(w, F, ds + j) * load(w, F, act + j)
        store(F, ds + j, where_gt(vabs(slope), INVOLVED, slope, 0.0))


@helper
def drop_one(w, I, F, lanes):
    """Move the multipliers along CERT to the nearest point where one vanishes and drop its pair; lanes that did."""
    pairs, ds, act, y = index(I, N_PAIR), index(I, DS), index(I, ACT), index(I, Y)
    n, o, v = index(I, N_X), index(I, N_X) + index(I, N_EQ), index(I, CERT)
    one, zero = full(w, 1.0), full(w, 0.0)
    ahead, behind = full(w, ENDLESS), full(w, ENDLESS)
    for j in range(pairs):
        slope, z = load(w, F, ds + j), vmax(load(w, F, y + o + j), zero)
        ahead = where_gt(0.0, slope, vmin(ahead, (0.0 - z) / slope), ahead)
        behind = where_gt(slope, 0.0, vmin(behind, z / slope), behind)
    length, sense = vmin(ahead, behind), where_gt(ahead, behind, 0.0 - one, one)
    wanted = where_gt(0.1 * ENDLESS, length, lanes, 0.0)
    step = where_gt(wanted, 0.5, length * sense, 0.0)
    dropped = zero
    for j in range(pairs):
        slope, z = load(w, F, ds + j) * sense, vmax(load(w, F, y + o + j), zero)
        reached = where_gt(1e-12 * z + 1e-300, z + slope * length, wanted, 0.0)
        reached = where_gt(0.0, slope, reached, 0.0) * (one - dropped)
        store(F, act + j, load(w, F, act + j) - reached)
        dropped = dropped + reached
    for i in range(n, index(I, N_K)):
        store(F, y + i, load(w, F, y + i) + step * load(w, F, v + i))
    return dropped


@helper
def copy_where(w, F, lanes, source, target, count):
    """Copy slots in the `lanes`."""
    for i in range(count):
        store(F, target + i, where_gt(lanes, 0.5, load(w, F, source + i), load(w, F, target + i)))


@stage
def let_go(w, I, F, lanes):
    """Drop a dependent constraint in those of the polished `lanes` that have one, and open them for the polish.

    Returns the lanes that were opened. Their active sets and solutions are kept in BEST_S and BEST.
    """
    reg, pairs = index(I, REG), index(I, N_PAIR)
    lanes = dependence(w, I, F, lanes)
    if any_gt(lanes, 0.5):
        every, long = full(w, 1.0), index(I, N_X) + index(I, N_EQ) + pairs
        copy_where(w, F, every, index(I, Y), index(I, BEST), long)
        copy_where(w, F, every, index(I, ACT), index(I, BEST_S), pairs)
        slopes(w, I, F)
        lanes = drop_one(w, I, F, lanes)
        store(F, reg + DONE, load(w, F, reg + DONE) - lanes)
    return lanes


@stage
def take_back(w, I, F, opened):
    """Lanes of `opened` that the polish certified again; the others get back what they had."""
    reg, pairs = index(I, REG), index(I, N_PAIR)
    lost = opened * (1.0 - load(w, F, reg + DONE))
    copy_where(w, F, lost, index(I, BEST), index(I, Y), index(I, N_X) + index(I, N_EQ) + pairs)
    copy_where(w, F, lost, index(I, BEST_S), index(I, ACT), pairs)
    store(F, reg + DONE, load(w, F, reg + DONE) + lost)
    return opened - lost
