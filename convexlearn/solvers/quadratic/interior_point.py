"""Mehrotra's predictor-corrector (1992) for a block of box QPs, with proximal regularization.

The regularization is a proximal term around the iterate (Friedlander and Orban 2012; Pougkakiotis and
Gondzio 2021), so it doesn't move the solution, and rank deficient rows, free variables and P = 0 need no
case of their own. Lanes that are finished are frozen by selection, since 0 * NaN is NaN.
"""

from convexlearn.solvers.quadratic.certificates import certify
from convexlearn.solvers.quadratic.equilibrate import largest
from convexlearn.solvers.quadratic.layout import (
    ACTIVE,
    ALPHA,
    BASE,
    BEST,
    BEST_S,
    BETA,
    COUNT,
    DATA_D,
    DATA_P,
    DONE,
    DS,
    ERROR,
    I_ABS,
    I_BOTH,
    I_LO,
    I_UP,
    ITERATIONS,
    LEAST,
    MU,
    N_ABS,
    N_BOTH,
    N_EQ,
    N_IN,
    N_K,
    N_LO,
    N_P,
    N_PAIR,
    N_UP,
    N_X,
    OFF,
    ON,
    PINNED,
    REG,
    REG_Y,
    SIZE_D,
    SIZE_P,
    SOL,
    STALLED,
    TARGET,
    WD,
    C,
    D,
    R,
    S,
)
from convexlearn.solvers.quadratic.ldl import factor, solve_factored
from convexlearn.solvers.quadratic.newton import affine_residual, recover, residuals, right_hand_side, weights
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

TO_BOUNDARY = 0.995
PATIENCE = 40  # iterations without progress


@helper
def measure(w, I, F):
    """MU, the sizes of primal and dual, and ERROR: the largest relative residual or distance from the path."""
    n, rows, pairs, reg = index(I, N_X), index(I, N_EQ), index(I, N_PAIR), index(I, REG)
    sol, s, r, on = index(I, SOL), index(I, S), index(I, R), index(I, ON)
    z = sol + n + rows
    zero = full(w, 0.0)
    mu, off_path = zero, zero
    for j in range(pairs):
        gap = load(w, F, s + j) * load(w, F, z + j) * load(w, F, on + j)
        mu = mu + gap
        off_path = vmax(off_path, vabs(gap - load(w, F, reg + TARGET)) * load(w, F, on + j))
    store(F, reg + MU, mu / load(w, F, reg + COUNT))
    size_p = 1.0 + largest(w, F, sol, n, load(w, F, reg + DATA_P))
    size_d = 1.0 + largest(w, F, sol + n, rows + pairs, load(w, F, reg + DATA_D))
    primal, dual = largest(w, F, r + n, rows + pairs, zero), largest(w, F, r, n, zero)
    store(F, reg + SIZE_P, size_p)
    store(F, reg + SIZE_D, size_d)
    scale = where_gt(load(w, F, reg + TARGET), 0.0, load(w, F, reg + TARGET), size_p * size_d)
    worst = vmax(vmax(primal / size_p, dual / size_d), off_path / scale)
    store(F, reg + ERROR, worst + checksum(w, F, r, n + rows + pairs))


@helper
def checksum(w, F, first, count):
    """NaN or inf where some slot is."""
    total = full(w, 0.0)
    for i in range(count):
        total = total + 0.0 * load(w, F, first + i)
    return total


@helper
def settle(w, I, F, tolerance, limit):
    """Stop lanes at the tolerance, at the iteration limit, with NaN, or without progress; keep the best iterate."""
    pairs, reg, sol, s = index(I, N_PAIR), index(I, REG), index(I, SOL), index(I, S)
    best, best_s, long = index(I, BEST), index(I, BEST_S), index(I, N_X) + index(I, N_EQ) + pairs
    active, error = load(w, F, reg + ACTIVE), load(w, F, reg + ERROR)
    least, one = load(w, F, reg + LEAST), full(w, 1.0)
    better = where_gt(least, error, active, 0.0)
    for i in range(long):
        store(F, best + i, where_gt(better, 0.5, load(w, F, sol + i), load(w, F, best + i)))
    for j in range(pairs):
        store(F, best_s + j, where_gt(better, 0.5, load(w, F, s + j), load(w, F, best_s + j)))
    progress = where_gt(0.9 * least, error, one, 0.0)
    stalled = where_gt(progress, 0.5, 0.0, load(w, F, reg + STALLED) + 1.0)
    store(F, reg + STALLED, stalled)
    store(F, reg + LEAST, where_gt(better, 0.5, error, least))
    active = where_gt(error, tolerance, active, 0.0)
    active = where_gt(limit - 0.5, load(w, F, reg + ITERATIONS), active, 0.0)
    store(F, reg + ACTIVE, where_gt(stalled, PATIENCE, 0.0, active))


@helper
def restore(w, I, F):
    """Go back to the best iterate in the lanes that are not done."""
    pairs, reg, sol, s = index(I, N_PAIR), index(I, REG), index(I, SOL), index(I, S)
    best, best_s, done = index(I, BEST), index(I, BEST_S), load(w, F, reg + DONE)
    for i in range(index(I, N_X) + index(I, N_EQ) + pairs):
        store(F, sol + i, where_gt(done, 0.5, load(w, F, sol + i), load(w, F, best + i)))
    for j in range(pairs):
        store(F, s + j, where_gt(done, 0.5, load(w, F, s + j), load(w, F, best_s + j)))


@helper
def step_lengths(w, I, F):
    """ALPHA (x, s) and BETA (y, z): the longest steps in [0, 1/TO_BOUNDARY] to the boundary; equal for a QP."""
    pairs, reg, s, ds = index(I, N_PAIR), index(I, REG), index(I, S), index(I, DS)
    o = index(I, N_X) + index(I, N_EQ)
    z, dz = index(I, SOL) + o, index(I, D) + o
    limit = full(w, 1.0 / TO_BOUNDARY)
    alpha, beta = limit, limit
    for j in range(pairs):
        e, f = load(w, F, ds + j), load(w, F, dz + j)
        alpha = vmin(alpha, where_gt(0.0, e, (0.0 - load(w, F, s + j)) / e, limit))
        beta = vmin(beta, where_gt(0.0, f, (0.0 - load(w, F, z + j)) / f, limit))
    if index(I, N_P) > 0:
        alpha = vmin(alpha, beta)
        beta = alpha
    store(F, reg + ALPHA, alpha)
    store(F, reg + BETA, beta)


@helper
def aim(w, I, F, corrector):
    """Complementarity targets into DS: TARGET - sz, then sigma mu - sz - ds dz, sigma = (mu_affine / mu)^3."""
    pairs, reg, s, ds, on = index(I, N_PAIR), index(I, REG), index(I, S), index(I, DS), index(I, ON)
    o = index(I, N_X) + index(I, N_EQ)
    z, dz = index(I, SOL) + o, index(I, D) + o
    center = load(w, F, reg + TARGET)
    # towards a target on the central path the second order term can cycle; plain Newton converges
    second_order = where_gt(center, 0.0, 0.0, full(w, 1.0))
    if corrector:
        alpha = vmin(load(w, F, reg + ALPHA), full(w, 1.0))
        beta = vmin(load(w, F, reg + BETA), full(w, 1.0))
        total = full(w, 0.0)
        for j in range(pairs):
            moved = load(w, F, s + j) + alpha * load(w, F, ds + j)
            total = total + moved * (load(w, F, z + j) + beta * load(w, F, dz + j)) * load(w, F, on + j)
        mu = load(w, F, reg + MU)
        ratio = vmin(total / load(w, F, reg + COUNT) / mu, full(w, 1.0))
        center = vmax(ratio * ratio * ratio * mu, load(w, F, reg + TARGET))
    for j in range(pairs):
        c = center - load(w, F, s + j) * load(w, F, z + j)
        if corrector:
            c = c - second_order * load(w, F, ds + j) * load(w, F, dz + j)
        store(F, ds + j, c * load(w, F, on + j))


@helper
def advance(w, I, F):
    """Step the lanes that are active; frozen lanes are kept by selection, since 0 * NaN is NaN."""
    n, pairs, reg, on = index(I, N_X), index(I, N_PAIR), index(I, REG), index(I, ON)
    sol, d, s, ds = index(I, SOL), index(I, D), index(I, S), index(I, DS)
    o = n + index(I, N_EQ)
    active, one = load(w, F, reg + ACTIVE), full(w, 1.0)
    alpha = vmin(TO_BOUNDARY * load(w, F, reg + ALPHA), one)
    beta = vmin(TO_BOUNDARY * load(w, F, reg + BETA), one)
    for i in range(o + pairs):
        step = beta
        if i < n:
            step = alpha
        elif i >= o:
            step = beta * load(w, F, on + i - o)
        x = load(w, F, sol + i)
        store(F, sol + i, where_gt(active, 0.5, x + step * load(w, F, d + i), x))
    for j in range(pairs):
        x = load(w, F, s + j)
        store(F, s + j, where_gt(active, 0.5, x + alpha * load(w, F, ds + j), x))
    store(F, reg + ITERATIONS, load(w, F, reg + ITERATIONS) + active)


@helper
def starting_system(w, I, F):
    """WD and D for min 1/2 x'Px + q'x + 1/2 |slacks|^2 s.t. Ax = b around fixed variables at their values."""
    n, N, wd, d, c = index(I, N_X), index(I, N_K), index(I, WD), index(I, D), index(I, C)
    inequalities, lower, upper, on = index(I, N_IN), index(I, N_LO), index(I, N_UP), index(I, ON)
    o, base, sol = N - inequalities, index(I, BASE), index(I, SOL)
    shift = load(w, F, index(I, REG) + REG_Y)
    for i in range(N):
        store(F, sol + i, full(w, 0.0))
    both = index(I, I_BOTH)
    for k in range(index(I, N_BOTH)):
        i, bound = index(I, both + 3 * k), load(w, F, c + N + index(I, both + 3 * k + 1))
        store(F, sol + i, where_gt(load(w, F, base + i), PINNED, bound, 0.0))
    affine_residual(w, I, F, sol, d)
    for i in range(N):
        store(F, d + i, 0.0 - load(w, F, d + i))
        store(F, wd + i, load(w, F, base + i) if i < n else 0.0 - shift)
    for j in range(inequalities):
        store(F, wd + o + j, where_gt(load(w, F, on + j), 0.5, full(w, -1.0), -10 * PINNED))
    for j in range(inequalities, inequalities + lower + upper):
        if j < inequalities + lower:
            i = index(I, index(I, I_LO) + j - inequalities)
        else:
            i = index(I, index(I, I_UP) + j - inequalities - lower)
        keep = load(w, F, on + j)
        store(F, wd + i, load(w, F, wd + i) + keep)
        store(F, d + i, load(w, F, d + i) + keep * load(w, F, c + o + j))
    first = inequalities + lower + upper
    for j in range(index(I, N_ABS)):
        i = wd + index(I, index(I, I_ABS) + j)
        store(F, i, load(w, F, i) + load(w, F, c + o + first + j))


@helper
def starting_slacks(w, I, F):
    """S and the multipliers of bounds at the x of the starting system; s = -z except for the 1-norm."""
    N, c, sol, s = index(I, N_K), index(I, C), index(I, SOL), index(I, S)
    inequalities, lower, upper, absolute = index(I, N_IN), index(I, N_LO), index(I, N_UP), index(I, N_ABS)
    o = N - inequalities
    z = sol + o
    for j in range(inequalities):
        store(F, s + j, 0.0 - load(w, F, z + j))
    for j in range(inequalities, inequalities + lower):
        x = load(w, F, sol + index(I, index(I, I_LO) + j - inequalities))
        slack = x - load(w, F, c + o + j)
        store(F, s + j, slack)
        store(F, z + j, 0.0 - slack)
    for j in range(inequalities + lower, inequalities + lower + upper):
        x = load(w, F, sol + index(I, index(I, I_UP) + j - inequalities - lower))
        slack = load(w, F, c + o + j) - x
        store(F, s + j, slack)
        store(F, z + j, 0.0 - slack)
    first = inequalities + lower + upper
    for j in range(first, first + absolute):
        x = load(w, F, sol + index(I, index(I, I_ABS) + j - first))
        t = 1.0 + vabs(x)
        store(F, s + j, t - x)
        store(F, s + absolute + j, t + x)
        half = 0.5 * load(w, F, c + o + j)
        store(F, z + j, half)
        store(F, z + absolute + j, half)


@stage
def start(w, I, F):
    """Mehrotra's starting point: the solution of the starting system, slacks and duals shifted to be positive."""
    n, N, sol, d, s, on = index(I, N_X), index(I, N_K), index(I, SOL), index(I, D), index(I, S), index(I, ON)
    o = n + index(I, N_EQ)
    z = sol + o
    starting_system(w, I, F)
    factor(w, I, F)
    solve_factored(w, I, F, d)
    for i in range(N):
        store(F, sol + i, load(w, F, sol + i) + load(w, F, d + i))
    starting_slacks(w, I, F)
    bounds = index(I, N_PAIR) - 2 * index(I, N_ABS)
    worst_s, worst_z = full(w, -1e300), full(w, -1e300)
    for j in range(bounds):
        keep = load(w, F, on + j)
        worst_s = vmax(worst_s, where_gt(keep, 0.5, 0.0 - load(w, F, s + j), worst_s))
        worst_z = vmax(worst_z, where_gt(keep, 0.5, 0.0 - load(w, F, z + j), worst_z))
    worst_s = where_gt(worst_s, -1e-3, 1.0 + worst_s, 0.0)
    worst_z = where_gt(worst_z, -1e-3, 1.0 + worst_z, 0.0)
    for j in range(index(I, N_PAIR)):
        shift_s, shift_z = worst_s, worst_z
        if j >= bounds:
            shift_s, shift_z = 0.0 * worst_s, 0.0 * worst_z
        keep = load(w, F, on + j)
        store(F, s + j, where_gt(keep, 0.5, load(w, F, s + j) + shift_s, 1.0))
        store(F, z + j, where_gt(keep, 0.5, load(w, F, z + j) + shift_z, OFF))


@stage
def interior(w, I, F, tolerance, limit):
    """Iterate until every lane is below the tolerance, certified, or at the iteration limit."""
    reg = index(I, REG)
    store(F, reg + LEAST, full(w, 1e300))
    store(F, reg + STALLED, full(w, 0.0))
    while True:
        residuals(w, I, F)
        measure(w, I, F)
        settle(w, I, F, tolerance, limit)
        if not any_gt(load(w, F, reg + ACTIVE), 0.5):
            return
        weights(w, I, F)
        factor(w, I, F)
        for corrector in range(2):
            aim(w, I, F, corrector)
            right_hand_side(w, I, F)
            solve_factored(w, I, F, index(I, D))
            recover(w, I, F)
            step_lengths(w, I, F)
        certify(w, I, F)
        advance(w, I, F)
