"""The end of a solve: one factor for polished and unpolished lanes, the caller's units, KKT residuals."""

from convexlearn.solvers.quadratic.layout import (
    ACT,
    BASE,
    CODE,
    COST,
    DATA,
    DONE,
    I_ABS,
    I_BOTH,
    I_EI,
    I_EJ,
    I_LO,
    I_UP,
    KAPPA,
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
    OK,
    ON,
    OUT,
    PINNED,
    RATIO,
    REG,
    RESIDUAL,
    SCALE,
    SOL,
    TARGET,
    UNIT,
    WD,
    C,
    D,
    R,
    S,
    Y,
)
from convexlearn.solvers.quadratic.ldl import factor
from convexlearn.solvers.quadratic.newton import affine_residual, weights
from convexlearn.solvers.quadratic.polish import KINK, pin_bounds, pin_kinks
from convexlearn.solvers.quadratic.simd import full, helper, index, load, stage, store, vabs, vmax, vmin, where_gt

USABLE = 1e-6  # KKT residual up to which a sample has a derivative


@stage
def merge_lanes(w, I, F):
    """Y, WD and the factor: of the active set in polished lanes, of the interior iterate in the others."""
    N, wd, d, y, sol, reg = (
        index(I, N_K),
        index(I, WD),
        index(I, D),
        index(I, Y),
        index(I, SOL),
        index(I, REG),
    )
    long = index(I, N_X) + index(I, N_EQ) + index(I, N_PAIR)
    done = load(w, F, reg + DONE)
    for i in range(long):
        store(F, y + i, where_gt(done, 0.5, load(w, F, y + i), load(w, F, sol + i)))
    pin_bounds(w, I, F)
    pin_kinks(w, I, F)
    for i in range(N):
        store(F, d + i, load(w, F, wd + i))
    weights(w, I, F)
    for i in range(N):
        store(F, wd + i, where_gt(done, 0.5, load(w, F, d + i), load(w, F, wd + i)))
    for i in range(long):
        store(F, y + i, where_gt(done, 0.5, load(w, F, y + i), load(w, F, sol + i)))
    factor(w, I, F)


@helper
def fixed_multipliers(w, I, F):
    """Multipliers of the bounds of fixed variables in unpolished lanes, from stationarity; R is overwritten."""
    n, N, y, r, lower = index(I, N_X), index(I, N_K), index(I, Y), index(I, R), index(I, N_LO)
    absolute, bounds = index(I, N_ABS), lower + index(I, N_UP)
    affine_residual(w, I, F, y, r)
    for j in range(absolute):
        i = r + index(I, index(I, I_ABS) + j)
        v = load(w, F, y + N + bounds + j) - load(w, F, y + N + bounds + absolute + j)
        store(F, i, load(w, F, i) + v)
    both, done = index(I, I_BOTH), load(w, F, index(I, REG) + DONE)
    for k in range(index(I, N_BOTH)):
        i = index(I, both + 3 * k)
        pull = load(w, F, r + i)
        fixed = where_gt(done, 0.5, 0.0, load(w, F, index(I, BASE) + i))
        below, above = y + N + index(I, both + 3 * k + 1), y + N + lower + index(I, both + 3 * k + 2)
        store(F, below, where_gt(fixed, PINNED, vmax(pull, full(w, 0.0)), load(w, F, below)))
        store(F, above, where_gt(fixed, PINNED, vmax(0.0 - pull, full(w, 0.0)), load(w, F, above)))
    for j in range(bounds):
        if j < lower:
            sign, i = -1.0, r + index(I, index(I, I_LO) + j)
        else:
            sign, i = 1.0, r + index(I, index(I, I_UP) + j - lower)
        store(F, i, load(w, F, i) + sign * load(w, F, y + N + j))
    return n


@helper
def derivative_weights(w, I, F):
    """KAPPA = dv/dw of the 1-norm; RATIO = dz/dx of bounds, dv/dx of the 1-norm, 10 PINNED where x is held."""
    N, y, s, act, on = index(I, N_K), index(I, Y), index(I, S), index(I, ACT), index(I, ON)
    inequalities, lower, upper, absolute = index(I, N_IN), index(I, N_LO), index(I, N_UP), index(I, N_ABS)
    z, bounds = y + N - inequalities, lower + upper
    done, zero, pin = load(w, F, index(I, REG) + DONE), full(w, 0.0), full(w, 10 * PINNED)
    for j in range(inequalities, inequalities + bounds):
        smooth = vmin(load(w, F, z + j) / load(w, F, s + j), full(w, 1e18)) * load(w, F, on + j)
        ratio = where_gt(done, 0.5, where_gt(load(w, F, act + j), 0.5, pin, 0.0), smooth)
        store(F, index(I, RATIO) + j - inequalities, ratio)
    both = index(I, I_BOTH)
    for k in range(index(I, N_BOTH)):
        fixed = load(w, F, index(I, BASE) + index(I, both + 3 * k))
        below, above = index(I, both + 3 * k + 1), lower + index(I, both + 3 * k + 2)
        up = where_gt(load(w, F, y + N + above), load(w, F, y + N + below), pin, zero)
        below, above = index(I, RATIO) + below, index(I, RATIO) + above
        store(F, below, where_gt(fixed, PINNED, pin - up, load(w, F, below)))
        store(F, above, where_gt(fixed, PINNED, up, load(w, F, above)))
    first = inequalities + bounds
    for j in range(first, first + absolute):
        k = j + absolute
        a, b = load(w, F, s + k) * load(w, F, z + j), load(w, F, s + j) * load(w, F, z + k)
        p, m = load(w, F, act + j), load(w, F, act + k)
        sign = p - m
        kappa = where_gt(done, 0.5, sign, (a - b) / (a + b)) * load(w, F, on + j)
        store(F, index(I, KAPPA) + j - first, kappa)
        smooth = vmin(4.0 * load(w, F, z + j) * load(w, F, z + k) / (a + b), full(w, 1e18)) * load(w, F, on + j)
        held = load(w, F, index(I, WD) + index(I, index(I, I_ABS) + j - first))
        kink = where_gt(held, 0.5 * KINK, pin, 0.0)
        store(F, index(I, RATIO) + j - inequalities, where_gt(done, 0.5, kink, smooth))


@helper
def unscale(w, I, F):
    """OUT (x, y, z, lower, upper, v) in the caller's units from Y, except where a certificate stands."""
    n, N, y, out, scale, reg = (
        index(I, N_X),
        index(I, N_K),
        index(I, Y),
        index(I, OUT),
        index(I, SCALE),
        index(I, REG),
    )
    lower, bounds, absolute = index(I, N_LO), index(I, N_LO) + index(I, N_UP), index(I, N_ABS)
    cost, unit, code = load(w, F, index(I, COST)), load(w, F, index(I, UNIT)), load(w, F, reg + CODE)
    for i in range(N + bounds + absolute):
        x = load(w, F, y + i) * unit
        if i < n:
            x = x * load(w, F, scale + i)
        elif i < N:
            x = x * load(w, F, scale + i) / cost
        else:
            if i < N + lower:
                k = index(I, index(I, I_LO) + i - N)
            elif i < N + bounds:
                k = index(I, index(I, I_UP) + i - N - lower)
            else:
                k = index(I, index(I, I_ABS) + i - N - bounds)
                x = x - load(w, F, y + i + absolute) * unit
            x = x / (cost * load(w, F, scale + k))
        store(F, out + i, where_gt(code, 0.5, load(w, F, out + i), x))


@helper
def sizes(w, I, F):
    """1 + the largest terms of the primal and dual residual, the caller's but in UNIT; R as of fixed_multipliers."""
    n, N, y, r, d, c, scale = (
        index(I, N_X),
        index(I, N_K),
        index(I, Y),
        index(I, R),
        index(I, D),
        index(I, C),
        index(I, SCALE),
    )
    ei, ej, data, cost = index(I, I_EI), index(I, I_EJ), index(I, DATA), load(w, F, index(I, COST))
    lower, bounds = index(I, N_LO), index(I, N_LO) + index(I, N_UP)
    primal, dual = full(w, 0.0), full(w, 0.0)
    for i in range(n):
        store(F, d + i, full(w, 0.0))
    for e in range(index(I, N_P)):
        i, j, a = index(I, ei + e), index(I, ej + e), load(w, F, data + e)
        store(F, d + i, load(w, F, d + i) + a * load(w, F, y + j))
        if i != j:
            store(F, d + j, load(w, F, d + j) + a * load(w, F, y + i))
    for i in range(n):
        q, px = load(w, F, c + i), load(w, F, d + i)
        rest = vabs(load(w, F, r + i) - q - px)
        dual = vmax(dual, vmax(rest, vmax(vabs(q), vabs(px))) / (cost * load(w, F, scale + i)))
    for i in range(n, N):
        b = load(w, F, c + i)
        primal = vmax(primal, vmax(vabs(b), vabs(b + load(w, F, r + i))) / load(w, F, scale + i))
    for j in range(bounds):
        k = index(I, index(I, I_LO) + j) if j < lower else index(I, index(I, I_UP) + j - lower)
        limit = vmax(vabs(load(w, F, c + N + j)), vabs(load(w, F, y + k)))
        primal = vmax(primal, limit * load(w, F, scale + k))
    unit = load(w, F, index(I, UNIT))
    return 1.0 / unit + primal, 1.0 / unit + dual


@helper
def optimality(w, I, F):
    """RESIDUAL: violation, stationarity, signs and complementarity, relative as in base.polyhedral_residual."""
    n, N, y, r, c, scale, on, reg = (
        index(I, N_X),
        index(I, N_K),
        index(I, Y),
        index(I, R),
        index(I, C),
        index(I, SCALE),
        index(I, ON),
        index(I, REG),
    )
    inequalities, lower, upper = index(I, N_IN), index(I, N_LO), index(I, N_UP)
    o, absolute, cost = N - inequalities, index(I, N_ABS), load(w, F, index(I, COST))
    target = load(w, F, reg + TARGET)
    size_p, size_d = sizes(w, I, F)
    worst, total = full(w, 0.0), full(w, 0.0)
    for i in range(n):
        worst = vmax(worst, vabs(load(w, F, r + i)) / (cost * load(w, F, scale + i) * size_d))
        total = total + 0.0 * load(w, F, r + i)
    for i in range(n, o):
        worst = vmax(worst, vabs(load(w, F, r + i)) / (load(w, F, scale + i) * size_p))
    for j in range(inequalities + lower + upper):
        if j < inequalities:
            excess, unit = load(w, F, r + o + j), 1.0 / load(w, F, scale + o + j)
        else:
            sign, k = 1.0, j - inequalities
            if k < lower:
                sign, k = -1.0, index(I, index(I, I_LO) + k)
            else:
                k = index(I, index(I, I_UP) + k - lower)
            excess, unit = sign * (load(w, F, y + k) - load(w, F, c + o + j)), load(w, F, scale + k)
        z, keep = load(w, F, y + o + j), load(w, F, on + j)
        total = total + 0.0 * z * excess
        worst = vmax(worst, excess * keep * unit / size_p)
        worst = vmax(worst, (0.0 - z) / (cost * unit * size_d))
        gap = vabs(excess * z + target) * keep
        worst = vmax(worst, gap / (cost * where_gt(target, 0.0, target / cost, size_p * size_d)))
    first = inequalities + lower + upper
    for j in range(absolute):
        zp, zm = load(w, F, y + o + first + j), load(w, F, y + o + first + absolute + j)
        x = load(w, F, y + index(I, index(I, I_ABS) + j))
        gap = where_gt(target, 0.0, 0.0, (zp + zm) * vabs(x) - (zp - zm) * x)
        worst = vmax(worst, gap / (cost * size_p * size_d))
    store(F, reg + RESIDUAL, worst + total)


@stage
def finish(w, I, F, fresh):
    """Factor, derivative weights, OUT, RESIDUAL and OK; `fresh` says that the last factor serves all lanes."""
    reg = index(I, REG)
    if not fresh:
        merge_lanes(w, I, F)
    fixed_multipliers(w, I, F)
    derivative_weights(w, I, F)
    optimality(w, I, F)
    unscale(w, I, F)
    usable = where_gt(load(w, F, reg + CODE), 0.5, 0.0, full(w, 1.0))
    usable = where_gt(USABLE, load(w, F, reg + RESIDUAL), usable, 0.0)
    store(F, index(I, OK), usable)
