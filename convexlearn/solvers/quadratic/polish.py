"""Active set polish: solve the KKT system of a guessed active set exactly, correct the guess, certify.

The unknowns that an active set fixes (variables at a bound or at the kink of |x|, multipliers of
inactive rows) are removed from the factorization exactly by a zero pivot; the rest is solved with a
tiny proximal regularization and iterative refinement, so dependent constraints get the multipliers nearest
to the interior point's. Corrections are those of the primal-dual active set method (Hintermueller, Ito,
Kunisch 2003). Acceptance is by the KKT conditions only.
"""

from convexlearn.solvers.quadratic.equilibrate import largest
from convexlearn.solvers.quadratic.layout import (
    ACT,
    BASE,
    DATA_D,
    DATA_P,
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
    PINNED,
    QL,
    REG,
    REG_Y,
    SIZE_D,
    SIZE_P,
    SOL,
    VIOLATION,
    WD,
    C,
    D,
    R,
    S,
    Y,
)
from convexlearn.solvers.quadratic.ldl import factor, solve_factored
from convexlearn.solvers.quadratic.newton import affine_residual
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

REFINEMENTS = 6
ROUNDING = 1e-14  # relative residual at which refinement stops
KINK = 100 * PINNED  # weight of a variable at the kink of |x|; 10 * PINNED: held by a bound
SOLVABLE = 1e-4  # relative residual above which the active set's system is taken for inconsistent
CERTIFIED = 1e-10  # relative violation that is accepted


@helper
def guess(w, I, F):
    """ACT = 1 where z > s relative to their sizes, and Y = SOL, in the lanes that are not done."""
    pairs, act, s, reg, y = index(I, N_PAIR), index(I, ACT), index(I, S), index(I, REG), index(I, Y)
    sol, o = index(I, SOL), index(I, N_X) + index(I, N_EQ)
    done, one = load(w, F, reg + DONE), full(w, 1.0)
    size_p = 1.0 + largest(w, F, sol, index(I, N_X), load(w, F, reg + DATA_P))
    size_d = 1.0 + largest(w, F, sol + index(I, N_X), index(I, N_EQ) + pairs, load(w, F, reg + DATA_D))
    for j in range(pairs):
        z = load(w, F, sol + o + j) * size_p
        active = where_gt(z, load(w, F, s + j) * size_d, one, 0.0)
        store(F, act + j, where_gt(done, 0.5, load(w, F, act + j), active))
    for i in range(o + pairs):
        store(F, y + i, where_gt(done, 0.5, load(w, F, y + i), load(w, F, sol + i)))


@helper
def pin_bounds(w, I, F):
    """WD and Y for equality rows, rows of G and bounds: active bounds and inactive multipliers are pinned."""
    n, N, wd, y, c, act = index(I, N_X), index(I, N_K), index(I, WD), index(I, Y), index(I, C), index(I, ACT)
    inequalities, lower, upper, base, reg = (
        index(I, N_IN),
        index(I, N_LO),
        index(I, N_UP),
        index(I, BASE),
        index(I, REG),
    )
    o = N - inequalities
    shift, pin = load(w, F, reg + REG_Y), full(w, 10 * PINNED)
    for i in range(n):
        store(F, wd + i, load(w, F, base + i))
    for i in range(n, o):
        store(F, wd + i, 0.0 - shift)
    for j in range(inequalities):
        active = load(w, F, act + j)
        store(F, wd + o + j, 0.0 - where_gt(active, 0.5, shift, pin))
        store(F, y + o + j, where_gt(active, 0.5, load(w, F, y + o + j), 0.0))
    for j in range(lower + upper):
        i = index(I, index(I, I_LO) + j) if j < lower else index(I, index(I, I_UP) + j - lower)
        active = load(w, F, act + inequalities + j)
        store(F, wd + i, where_gt(active, 0.5, pin, load(w, F, wd + i)))
        store(F, y + i, where_gt(active, 0.5, load(w, F, c + N + j), load(w, F, y + i)))
    both = index(I, I_BOTH)
    for k in range(index(I, N_BOTH)):
        i, bound = index(I, both + 3 * k), load(w, F, c + N + index(I, both + 3 * k + 1))
        store(F, y + i, where_gt(load(w, F, base + i), PINNED, bound, load(w, F, y + i)))


@helper
def pin_kinks(w, I, F):
    """QL = q + sign w for variables off the kink of |x|; variables on it are pinned at 0."""
    n, N, wd, y, c, act, ql = (
        index(I, N_X),
        index(I, N_K),
        index(I, WD),
        index(I, Y),
        index(I, C),
        index(I, ACT),
        index(I, QL),
    )
    absolute, bounds = index(I, N_ABS), index(I, N_LO) + index(I, N_UP)
    plus = act + index(I, N_IN) + bounds
    minus, zero, one = plus + absolute, full(w, 0.0), full(w, 1.0)
    for i in range(n):
        store(F, ql + i, load(w, F, c + i))
    for j in range(absolute):
        i = index(I, index(I, I_ABS) + j)
        x, weight = load(w, F, y + i), load(w, F, c + N + bounds + j)
        present = where_gt(weight, 0.0, one, 0.0)
        held = where_gt(load(w, F, wd + i), PINNED, one, 0.0)
        p, m = load(w, F, plus + j), load(w, F, minus + j)
        by_sign = where_gt(0.5, p + m, one, held)
        p = where_gt(by_sign, 0.5, where_gt(0.0, x, zero, one), p)
        m = where_gt(by_sign, 0.5, where_gt(x, 0.0, zero, one), m)
        store(F, plus + j, p)
        store(F, minus + j, m)
        kink = where_gt(p + m, 1.5, present, 0.0) * (one - held)
        store(F, wd + i, where_gt(kink, 0.5, KINK, load(w, F, wd + i)))
        store(F, y + i, where_gt(kink, 0.5, 0.0, x))
        store(F, ql + i, load(w, F, ql + i) + (p - m) * weight)


@helper
def polish_residual(w, I, F):
    """R (N) = K Y + (QL, -b, -h), and SIZE_P, SIZE_D of Y."""
    n, N, y, r, c, ql, reg = (
        index(I, N_X),
        index(I, N_K),
        index(I, Y),
        index(I, R),
        index(I, C),
        index(I, QL),
        index(I, REG),
    )
    affine_residual(w, I, F, y, r)
    for i in range(n):
        store(F, r + i, load(w, F, r + i) + (load(w, F, ql + i) - load(w, F, c + i)))
    store(F, reg + SIZE_P, 1.0 + largest(w, F, y, n, load(w, F, reg + DATA_P)))
    store(F, reg + SIZE_D, 1.0 + largest(w, F, y + n, N - n, load(w, F, reg + DATA_D)))


@helper
def refine(w, I, F, repeats):
    """Solve the pinned KKT system for Y by repeated correction; returns the relative residual by lane."""
    n, N, y, r, d, wd, reg = (
        index(I, N_X),
        index(I, N_K),
        index(I, Y),
        index(I, R),
        index(I, D),
        index(I, WD),
        index(I, REG),
    )
    repeat = 0
    while True:
        polish_residual(w, I, F)
        primal, dual = full(w, 0.0), full(w, 0.0)
        for i in range(N):
            x = where_gt(vabs(load(w, F, wd + i)), PINNED, 0.0, load(w, F, r + i))
            store(F, d + i, 0.0 - x)
            if i < n:
                dual = vmax(dual, vabs(x))
            else:
                primal = vmax(primal, vabs(x))
        worst = vmax(primal / load(w, F, reg + SIZE_P), dual / load(w, F, reg + SIZE_D))
        pending = where_gt(load(w, F, reg + DONE), 0.5, 0.0, worst)
        if repeat >= repeats or not any_gt(pending, ROUNDING):
            return worst
        solve_factored(w, I, F, d)
        for i in range(N):  # lanes that have converged stay, so that no lane depends on its neighbours
            x = load(w, F, y + i)
            store(F, y + i, where_gt(pending, ROUNDING, x + load(w, F, d + i), x))
        repeat += 1


@helper
def correct_kinks(w, I, F):
    """Subgradients of the 1-norm into Y (pairs z+, z-) and R; change ACT where they or signs are violated."""
    N, wd, y, c, r, act, reg = (
        index(I, N_K),
        index(I, WD),
        index(I, Y),
        index(I, C),
        index(I, R),
        index(I, ACT),
        index(I, REG),
    )
    absolute, bounds = index(I, N_ABS), index(I, N_LO) + index(I, N_UP)
    plus = act + index(I, N_IN) + bounds
    minus, zero, one = plus + absolute, full(w, 0.0), full(w, 1.0)
    tolerance_p = CERTIFIED * load(w, F, reg + SIZE_P)
    tolerance_d = CERTIFIED * load(w, F, reg + SIZE_D)
    done, violations = load(w, F, reg + DONE), zero
    for j in range(absolute):
        i = index(I, index(I, I_ABS) + j)
        weight, x, pull = load(w, F, c + N + bounds + j), load(w, F, y + i), load(w, F, r + i)
        p, m = load(w, F, plus + j), load(w, F, minus + j)
        present, pinned = where_gt(weight, 0.0, one, 0.0), load(w, F, wd + i)
        held = where_gt(pinned, PINNED, where_gt(0.5 * KINK, pinned, one, 0.0), 0.0)
        kink = where_gt(p + m, 1.5, present, 0.0)
        v = vmax(0.0 - weight, vmin(weight, 0.0 - pull)) * kink
        store(F, r + i, pull + v)
        left = kink * (one - held) * where_gt(vabs(pull + v), tolerance_d, one, 0.0)
        crossed = where_gt((m - p) * x, tolerance_p, present, 0.0) * (one - kink) * (one - held)
        v = v + (one - kink) * (p - m) * weight
        store(F, y + N + bounds + j, 0.5 * (weight + v))
        store(F, y + N + bounds + absolute + j, 0.5 * (weight - v))
        right = where_gt(pull, 0.0, zero, one)  # stationarity asks for v > w: x becomes positive
        new_p = where_gt(left, 0.5, right, where_gt(crossed, 0.5, one, p))
        new_m = where_gt(left, 0.5, one - right, where_gt(crossed, 0.5, one, m))
        store(F, plus + j, where_gt(done, 0.5, p, new_p))
        store(F, minus + j, where_gt(done, 0.5, m, new_m))
        violations = violations + left + crossed
    store(F, reg + VIOLATION, violations)


@helper
def correct_bounds(w, I, F):
    """Multipliers of bounds into Y; change ACT where a multiplier is negative or a constraint violated."""
    N, y, c, r, act, on, reg = (
        index(I, N_K),
        index(I, Y),
        index(I, C),
        index(I, R),
        index(I, ACT),
        index(I, ON),
        index(I, REG),
    )
    inequalities, lower, upper = index(I, N_IN), index(I, N_LO), index(I, N_UP)
    o, zero = N - inequalities, full(w, 0.0)
    tolerance_p = CERTIFIED * load(w, F, reg + SIZE_P)
    tolerance_d = CERTIFIED * load(w, F, reg + SIZE_D)
    done, violations = load(w, F, reg + DONE), load(w, F, reg + VIOLATION)
    for j in range(inequalities + lower + upper):
        active = load(w, F, act + j)
        if j < inequalities:
            z, excess = load(w, F, y + o + j), load(w, F, r + o + j)
        else:
            sign, i = 1.0, j - inequalities
            if i < lower:
                sign, i = -1.0, index(I, index(I, I_LO) + i)
            else:
                i = index(I, index(I, I_UP) + i - lower)
            z = where_gt(active, 0.5, (0.0 - sign) * load(w, F, r + i), 0.0)
            store(F, y + o + j, z)
            excess = sign * (load(w, F, y + i) - load(w, F, c + o + j))
        drop = where_gt(0.0 - z, tolerance_d, active, 0.0)
        add = where_gt(excess, tolerance_p, load(w, F, on + j) - active, 0.0)
        store(F, act + j, where_gt(done, 0.5, active, active - drop + add))
        violations = violations + drop + add
    store(F, reg + VIOLATION, violations)
    both = index(I, I_BOTH)
    for k in range(index(I, N_BOTH)):
        i = index(I, both + 3 * k)
        pull = load(w, F, r + i)
        fixed = load(w, F, index(I, BASE) + i)
        below, above = y + N + index(I, both + 3 * k + 1), y + N + lower + index(I, both + 3 * k + 2)
        store(F, below, where_gt(fixed, PINNED, vmax(pull, zero), load(w, F, below)))
        store(F, above, where_gt(fixed, PINNED, vmax(0.0 - pull, zero), load(w, F, above)))


@stage
def polish(w, I, F, rounds):
    """Up to `rounds` corrected active sets; DONE = 1 where one is certified. True when all lanes are done."""
    reg, one = index(I, REG), full(w, 1.0)
    hopeless = full(w, 0.0)
    for _ in range(rounds):
        pin_bounds(w, I, F)
        pin_kinks(w, I, F)
        factor(w, I, F)
        worst = refine(w, I, F, REFINEMENTS)
        correct_kinks(w, I, F)
        correct_bounds(w, I, F)
        good = where_gt(0.5, load(w, F, reg + VIOLATION), where_gt(CERTIFIED, worst, one, 0.0), 0.0)
        done = where_gt(good, 0.5, 1.0, load(w, F, reg + DONE))
        store(F, reg + DONE, done)
        hopeless = where_gt(SOLVABLE, worst, hopeless, one)  # NaN counts as hopeless
        if not any_gt(one - done, 0.5):
            return True
        if not any_gt((one - done) * (one - hopeless), 0.5):
            return False
    return False
