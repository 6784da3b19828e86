"""Newton steps on the face of the cones that s - z points to (semismooth: Qi and Sun 1993), until they settle.

Each step solves the KKT system that is linear on the face: multipliers vanish where a row or cone is
inactive, and on the boundary of a cone z turns with s. Unknowns that the system leaves open stay at the
interior point's values. Acceptance is by the optimality conditions only.
"""

from convexlearn.solvers.quadratic.equilibrate import largest
from convexlearn.solvers.quadratic.layout import (
    BEST,
    BEST_S,
    DATA_D,
    DATA_P,
    DONE,
    N_EQ,
    N_IN,
    N_K,
    N_PLUS,
    N_X,
    PINNED,
    REG,
    REG_X,
    REG_Y,
    SIZE_D,
    SIZE_P,
    VIOLATION,
    WD,
    C,
    D,
    R,
    Y,
)
from convexlearn.solvers.quadratic.ldl import multiply, solve_factored
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
    vsqrt,
    where_gt,
)
from convexlearn.solvers.second_order.embedding import products
from convexlearn.solvers.second_order.jordan import inner, product
from convexlearn.solvers.second_order.layout import (
    BEST_TAU,
    CONE_WORDS,
    I_CONE,
    N_CONE,
    N_ROW,
    PX,
    RATIO_SD,
    SLACK,
    TEMP,
)
from convexlearn.solvers.second_order.weights import face_weights, factor_weighted

REFINEMENTS = 6
ROUNDING = 1e-14  # relative residual at which refinement stops
EXACT = 1e-13  # relative violation at which there is nothing to gain
CERTIFIED = 1e-10  # relative violation that is accepted when it no longer shrinks
SOLVABLE = 1e-3  # relative residual above which the face's system is taken for inconsistent


@helper
def sizes(w, I, F, v, tau):
    """1 + the largest entries of x and b, and of z and q, at the point v / tau."""
    n, plus, m, reg = index(I, N_X), index(I, N_PLUS), index(I, N_ROW), index(I, REG)
    size_p = 1.0 + largest(w, F, v, n, load(w, F, reg + DATA_P) * tau) / tau
    return size_p, 1.0 + largest(w, F, v + plus, m, load(w, F, reg + DATA_D) * tau) / tau


@helper
def guess(w, I, F):
    """Y and SLACK = the best interior iterate, e = f = 0, in the lanes that are not done."""
    y, best, slack, best_s, reg = index(I, Y), index(I, BEST), index(I, SLACK), index(I, BEST_S), index(I, REG)
    n, plus, m, done = index(I, N_X), index(I, N_PLUS), index(I, N_ROW), load(w, F, reg + DONE)
    tau = load(w, F, reg + BEST_TAU)
    size_p, size_d = sizes(w, I, F, best, tau)
    store(F, reg + RATIO_SD, size_p / size_d)
    for i in range(index(I, N_K)):
        x = load(w, F, best + i) / tau
        if (n <= i and i < plus) or i >= plus + m:
            x = full(w, 0.0)
        store(F, y + i, where_gt(done, 0.5, load(w, F, y + i), x))
    for i in range(m):
        x = load(w, F, slack + i)
        store(F, slack + i, where_gt(done, 0.5, x, load(w, F, best_s + i) / tau))


@helper
def refine(w, I, F):
    """Solve the face's KKT system for Y by repeated correction; returns the relative residual by lane."""
    n, N, plus, y, r, d, wd, c, reg = (
        index(I, N_X),
        index(I, N_K),
        index(I, N_PLUS),
        index(I, Y),
        index(I, R),
        index(I, D),
        index(I, WD),
        index(I, C),
        index(I, REG),
    )
    shift_x, shift_y, before = load(w, F, reg + REG_X), load(w, F, reg + REG_Y), load(w, F, reg + VIOLATION)
    goal = vmax(where_gt(before, 1.0, 1.0, before * before) * 1e-3, full(w, ROUNDING))  # Newton's own error
    repeat = 0
    while True:
        for i in range(N):
            q, weight = load(w, F, c + i), load(w, F, wd + i)
            exact = weight - shift_x if i < plus else weight + shift_y
            start = q if i < plus else 0.0 - q
            store(F, r + i, start + where_gt(vabs(weight), PINNED, 0.0, exact) * load(w, F, y + i))
        multiply(w, I, F, y, r)
        primal, dual = full(w, 0.0), full(w, 0.0)
        for i in range(N):
            x = where_gt(vabs(load(w, F, wd + i)), PINNED, 0.0, load(w, F, r + i))
            store(F, d + i, 0.0 - x)
            if i < n:
                dual = vmax(dual, vabs(x))
            elif i >= plus and i < plus + index(I, N_ROW):
                primal = vmax(primal, vabs(x))
        worst = vmax(primal / load(w, F, reg + SIZE_P), dual / load(w, F, reg + SIZE_D))
        pending = where_gt(load(w, F, reg + DONE), 0.5, 0.0, worst - goal)
        if repeat >= REFINEMENTS or (repeat > 0 and not any_gt(pending, 0.0)):
            return worst
        solve_factored(w, I, F, d)
        done = load(w, F, reg + DONE)
        for i in range(N):
            x = load(w, F, y + i)
            store(F, y + i, where_gt(done, 0.5, x, x + load(w, F, d + i)))
        repeat += 1


@helper
def violation(w, I, F):
    """SLACK = b - A x at Y, and the largest relative violation of cones, signs and complementarity by lane."""
    plus, m, c, y, r, reg = index(I, N_PLUS), index(I, N_ROW), index(I, C), index(I, Y), index(I, R), index(I, REG)
    slack, z, temp, done = index(I, SLACK), index(I, Y) + index(I, N_PLUS), index(I, TEMP), load(w, F, reg + DONE)
    size_p, size_d = sizes(w, I, F, y, full(w, 1.0))
    store(F, reg + SIZE_P, size_p)
    store(F, reg + SIZE_D, size_d)
    products(w, I, F, y, index(I, PX), r)
    for i in range(m):
        x = load(w, F, c + plus + i) - load(w, F, r + plus + i)
        store(F, slack + i, where_gt(done, 0.5, load(w, F, slack + i), x))
    worst = full(w, 0.0)
    for i in range(index(I, N_EQ), index(I, N_EQ) + index(I, N_IN)):
        s, x = load(w, F, slack + i), load(w, F, z + i)
        worst = vmax(worst, vmax((0.0 - s) / size_p, (0.0 - x) / size_d))
        worst = vmax(worst, vabs(s * x) / (size_p * size_d))
    for k in range(index(I, N_CONE)):
        at = index(I, I_CONE) + CONE_WORDS * k
        i, d = index(I, at), index(I, at + 1)
        s, x = slack + i, z + i
        worst = vmax(worst, (vsqrt(inner(w, F, s, s, d)) - load(w, F, s)) / size_p)
        worst = vmax(worst, (vsqrt(inner(w, F, x, x, d)) - load(w, F, x)) / size_d)
        product(w, F, s, x, temp, d)
        worst = vmax(worst, largest(w, F, temp, d, full(w, 0.0)) / (size_p * size_d))
    return worst


@stage
def polish(w, I, F, rounds):
    """Up to `rounds` Newton steps; DONE = 1 where the optimality conditions hold. True when all lanes are done."""
    reg, one = index(I, REG), full(w, 1.0)
    size_p, size_d = sizes(w, I, F, index(I, Y), one)
    store(F, reg + SIZE_P, size_p)
    store(F, reg + SIZE_D, size_d)
    store(F, reg + VIOLATION, full(w, 1e300))
    hopeless = full(w, 0.0)
    for _ in range(rounds):
        face_weights(w, I, F)
        factor_weighted(w, I, F)
        worst = refine(w, I, F)
        error = vmax(worst, violation(w, I, F))
        settled = where_gt(EXACT, error, one, where_gt(error, 0.5 * load(w, F, reg + VIOLATION), one, 0.0))
        good = where_gt(CERTIFIED, error, settled, 0.0)
        store(F, reg + VIOLATION, error)
        done = where_gt(good, 0.5, 1.0, load(w, F, reg + DONE))
        store(F, reg + DONE, done)
        hopeless = where_gt(SOLVABLE, worst, hopeless, one)  # NaN counts as hopeless
        if not any_gt(one - done, 0.5):
            return True
        if not any_gt((one - done) * (one - hopeless), 0.5):
            return False
    return False
