"""Mehrotra's predictor-corrector (1992) on the homogeneous embedding of a block of programs."""

from convexlearn.solvers.quadratic.equilibrate import largest
from convexlearn.solvers.quadratic.interior_point import checksum
from convexlearn.solvers.quadratic.layout import (
    ACTIVE,
    ALPHA,
    BEST,
    BEST_S,
    CODE,
    COST,
    DATA_D,
    DATA_P,
    DONE,
    DS,
    ERROR,
    ITERATIONS,
    LEAST,
    MU,
    N_EQ,
    N_IN,
    N_K,
    N_PLUS,
    N_X,
    OUT,
    REG,
    SCALE,
    SIZE_D,
    SIZE_P,
    SOL,
    STALLED,
    UNIT,
    C,
    D,
    R,
    S,
)
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
    vsqrt,
    where_gt,
)
from convexlearn.solvers.second_order.embedding import (
    TO_BOUNDARY,
    correct,
    direction,
    direction_to_tau,
    predict,
    products,
    solve_refined,
    step_length,
)
from convexlearn.solvers.second_order.jordan import inner
from convexlearn.solvers.second_order.layout import (
    BEST_TAU,
    BZ,
    CONE_WORDS,
    DKAPPA,
    DTAU,
    GAP_TAU,
    I_CONE,
    KAPPA,
    N_CONE,
    N_ROW,
    PX,
    QX,
    TAU,
    XPX,
)
from convexlearn.solvers.second_order.weights import factor_weighted, interior_weights, unit_weights

PATIENCE = 10  # iterations without progress
CERTIFIED = 1e-8  # largest relative error of a certificate
INFEASIBLE_CODE = 2.0
UNBOUNDED_CODE = 3.0


@helper
def shift_into_cone(w, I, F, v):
    """Add a multiple of the cones' centers to the inequality slots v that brings them inside."""
    worst = full(w, -1e300)
    first, last = index(I, N_EQ), index(I, N_EQ) + index(I, N_IN)
    for i in range(first, last):
        worst = vmax(worst, 0.0 - load(w, F, v + i))
    for k in range(index(I, N_CONE)):
        at = index(I, I_CONE) + CONE_WORDS * k
        i, d = v + index(I, at), index(I, at + 1)
        worst = vmax(worst, vsqrt(inner(w, F, i, i, d)) - load(w, F, i))
    shift = where_gt(worst, -1e-3, 1.0 + worst, 0.0)
    for i in range(first, last):
        store(F, v + i, load(w, F, v + i) + shift)
    for k in range(index(I, N_CONE)):
        i = v + index(I, index(I, I_CONE) + CONE_WORDS * k)
        store(F, i, load(w, F, i) + shift)


@stage
def start(w, I, F):
    """The point that solves the program with squares of slacks as penalty, shifted into the cones."""
    N, plus, m, c = index(I, N_K), index(I, N_PLUS), index(I, N_ROW), index(I, C)
    sol, s, reg = index(I, SOL), index(I, S), index(I, REG)
    unit_weights(w, I, F)
    factor_weighted(w, I, F)
    for i in range(N):
        x = load(w, F, c + i)
        store(F, sol + i, x if i >= plus else 0.0 - x)
    solve_refined(w, I, F, sol, 0)
    for i in range(m):
        x = 0.0 - load(w, F, sol + plus + i)
        store(F, s + i, full(w, 0.0) if i < index(I, N_EQ) else x)
    shift_into_cone(w, I, F, s)
    shift_into_cone(w, I, F, sol + plus)
    store(F, reg + TAU, full(w, 1.0))
    store(F, reg + KAPPA, full(w, 1.0))


@helper
def residuals(w, I, F):
    """R, GAP_TAU, MU, the sizes of primal and dual, ERROR; and the errors of the iterate as a certificate."""
    n, N, plus, m = index(I, N_X), index(I, N_K), index(I, N_PLUS), index(I, N_ROW)
    sol, s, r, c, px, reg = index(I, SOL), index(I, S), index(I, R), index(I, C), index(I, PX), index(I, REG)
    scale, tau, kappa = index(I, SCALE), load(w, F, reg + TAU), load(w, F, reg + KAPPA)
    zero = full(w, 0.0)
    products(w, I, F, sol, px, r)
    qx, bz, xpx, dual, primal, pull, along = zero, zero, zero, zero, zero, zero, zero
    for i in range(n):
        x, q, p, a = load(w, F, sol + i), load(w, F, c + i), load(w, F, px + i), load(w, F, r + i)
        qx, xpx = qx + q * x, xpx + x * p
        pull = vmax(pull, vabs(a) / load(w, F, scale + i))
        along = vmax(along, vabs(p) / (load(w, F, scale + i) * load(w, F, index(I, COST))))
        residual = p + a + q * tau
        dual = vmax(dual, vabs(residual))
        store(F, r + i, 0.0 - residual)
    gap = kappa * tau
    for i in range(m):
        z, b, moved = load(w, F, sol + plus + i), load(w, F, c + plus + i), load(w, F, s + i)
        bz, gap = bz + b * z, gap + z * moved
        moved = moved + load(w, F, r + plus + i)
        along = vmax(along, vabs(moved) / load(w, F, scale + plus + i))
        residual = moved - b * tau
        primal = vmax(primal, vabs(residual))
        store(F, r + plus + i, residual)
    store(F, reg + QX, qx)
    store(F, reg + BZ, bz)
    store(F, reg + XPX, xpx)
    store(F, reg + GAP_TAU, qx + bz + kappa + xpx / tau)
    store(F, reg + MU, gap / (1.0 + index(I, N_IN) + index(I, N_CONE)))
    size_p = 1.0 + largest(w, F, sol, n, load(w, F, reg + DATA_P) * tau) / tau
    size_d = 1.0 + largest(w, F, sol + plus, m, load(w, F, reg + DATA_D) * tau) / tau
    store(F, reg + SIZE_P, size_p)
    store(F, reg + SIZE_D, size_d)
    gap = vabs(gap - kappa * tau) / (tau * tau * size_p * size_d)
    worst = vmax(vmax(primal / (tau * size_p), dual / (tau * size_d)), gap)
    store(F, reg + ERROR, worst + checksum(w, F, r, N))
    return pull, along


@helper
def certify(w, I, F, pull, along):
    """Stop active lanes whose iterate is a certificate: CODE, DONE, and OUT = the iterate over its value."""
    n, plus, m, reg = index(I, N_X), index(I, N_PLUS), index(I, N_ROW), index(I, REG)
    sol, out, scale = index(I, SOL), index(I, OUT), index(I, SCALE)
    diverges = where_gt(load(w, F, reg + KAPPA), load(w, F, reg + TAU), load(w, F, reg + ACTIVE), 0.0)
    if not any_gt(diverges, 0.5):
        return
    unit, cost, one = load(w, F, index(I, UNIT)), load(w, F, index(I, COST)), full(w, 1.0)
    for kind in range(2):
        if kind == 0:
            code, error, value = INFEASIBLE_CODE, pull, (0.0 - load(w, F, reg + BZ)) * unit
        else:
            code, error, value = UNBOUNDED_CODE, along, (0.0 - load(w, F, reg + QX)) * unit / cost
        passed = where_gt(CERTIFIED * value, error, where_gt(value, 0.0, diverges, 0.0), 0.0)
        passed = where_gt(load(w, F, reg + CODE), 0.5, 0.0, passed)
        if any_gt(passed, 0.5):
            for i in range(n + m):
                j = i if i < n else plus + i - n
                mine = load(w, F, sol + j) * load(w, F, scale + j) / value
                if (i < n) == (kind == 0):
                    mine = full(w, 0.0)
                store(F, out + i, where_gt(passed, 0.5, mine, load(w, F, out + i)))
            store(F, reg + CODE, where_gt(passed, 0.5, code, load(w, F, reg + CODE)))
            store(F, reg + ACTIVE, where_gt(passed, 0.5, 0.0, load(w, F, reg + ACTIVE)))
            store(F, reg + DONE, where_gt(passed, 0.5, one, load(w, F, reg + DONE)))


@helper
def settle(w, I, F, tolerance, limit):
    """Stop lanes at the tolerance, at the iteration limit, with NaN, or without progress; keep the best iterate."""
    reg, sol, s, best, best_s = index(I, REG), index(I, SOL), index(I, S), index(I, BEST), index(I, BEST_S)
    active, error = load(w, F, reg + ACTIVE), load(w, F, reg + ERROR)
    least, one = load(w, F, reg + LEAST), full(w, 1.0)
    better = where_gt(least, error, active, 0.0)
    for i in range(index(I, N_K)):
        store(F, best + i, where_gt(better, 0.5, load(w, F, sol + i), load(w, F, best + i)))
    for i in range(index(I, N_ROW)):
        store(F, best_s + i, where_gt(better, 0.5, load(w, F, s + i), load(w, F, best_s + i)))
    store(F, reg + BEST_TAU, where_gt(better, 0.5, load(w, F, reg + TAU), load(w, F, reg + BEST_TAU)))
    progress = where_gt(0.9 * least, error, one, 0.0)
    stalled = where_gt(progress, 0.5, 0.0, load(w, F, reg + STALLED) + 1.0)
    store(F, reg + STALLED, stalled)
    store(F, reg + LEAST, where_gt(better, 0.5, error, least))
    active = where_gt(error, tolerance, active, 0.0)
    active = where_gt(limit - 0.5, load(w, F, reg + ITERATIONS), active, 0.0)
    store(F, reg + ACTIVE, where_gt(stalled, PATIENCE, 0.0, active))


@helper
def advance(w, I, F):
    """Step the lanes that are active; frozen lanes are kept by selection, since 0 * NaN is NaN."""
    sol, d, s, ds, reg = index(I, SOL), index(I, D), index(I, S), index(I, DS), index(I, REG)
    active = load(w, F, reg + ACTIVE)
    alpha = vmin(TO_BOUNDARY * load(w, F, reg + ALPHA), full(w, 1.0))
    for i in range(index(I, N_K)):
        x = load(w, F, sol + i)
        store(F, sol + i, where_gt(active, 0.5, x + alpha * load(w, F, d + i), x))
    for i in range(index(I, N_ROW)):
        x = load(w, F, s + i)
        store(F, s + i, where_gt(active, 0.5, x + alpha * load(w, F, ds + i), x))
    for v, step in ((TAU, DTAU), (KAPPA, DKAPPA)):
        x = load(w, F, reg + v)
        store(F, reg + v, where_gt(active, 0.5, x + alpha * load(w, F, reg + step), x))
    store(F, reg + ITERATIONS, load(w, F, reg + ITERATIONS) + active)


@stage
def interior(w, I, F, tolerance, limit, repeats):
    """Iterate until every lane is below the tolerance, certified, or at the iteration limit."""
    reg = index(I, REG)
    store(F, reg + LEAST, full(w, 1e300))
    store(F, reg + STALLED, full(w, 0.0))
    while True:
        pull, along = residuals(w, I, F)
        settle(w, I, F, tolerance, limit)
        certify(w, I, F, pull, along)
        if not any_gt(load(w, F, reg + ACTIVE), 0.5):
            return
        interior_weights(w, I, F)
        factor_weighted(w, I, F)
        direction_to_tau(w, I, F, repeats)
        predict(w, I, F)
        keep = full(w, 1.0)
        for corrector in range(2):
            direction(w, I, F, keep, repeats)
            alpha = step_length(w, I, F)
            if corrector == 0:
                sigma = (1.0 - alpha) * (1.0 - alpha) * (1.0 - alpha)
                correct(w, I, F, sigma)
                keep = 1.0 - sigma
        advance(w, I, F)
