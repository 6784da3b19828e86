"""Entry points of the compiled solver: ranges of lane blocks, forward and adjoint."""

from convexlearn.solvers.quadratic.adjoint import adjoint_solve
from convexlearn.solvers.quadratic.equilibrate import load_field
from convexlearn.solvers.quadratic.kernels import unload
from convexlearn.solvers.quadratic.layout import (
    ACTIVE,
    BEST,
    BEST_S,
    CODE,
    COST,
    DATA,
    DONE,
    END,
    ITERATIONS,
    N_BORDER,
    N_ENTRY,
    N_K,
    N_PLUS,
    N_X,
    OUT,
    REG,
    REG_X,
    REG_Y,
    RESIDUAL,
    SCALE,
    SOL,
    UNIT,
    WD,
    C,
    D,
    R,
    S,
    Y,
)
from convexlearn.solvers.quadratic.simd import (
    aligned,
    any_gt,
    full,
    get,
    helper,
    index,
    kernel,
    load,
    stage,
    store,
    where_gt,
)
from convexlearn.solvers.second_order.embedding import products
from convexlearn.solvers.second_order.equilibrate import apply_factors, drop_absent, find_factors, load_data
from convexlearn.solvers.second_order.interior_point import interior, start
from convexlearn.solvers.second_order.layout import (
    BEST_TAU,
    HAND_OVER,
    KEPT,
    LIMIT,
    N_ROW,
    PX,
    RATIO_SD,
    REGULARIZATION,
    ROUNDS,
    SLACK,
    TEMP,
    TOLERANCE,
    WARM,
)
from convexlearn.solvers.second_order.polish import guess, polish
from convexlearn.solvers.second_order.weights import face_weights, factor_weighted, form_gram, interior_weights

FLOOR = 0.1
ENTRIES = 0b0101  # P and A


@helper
def reset(w, I, F, options):
    """Registers of a block before its solve."""
    reg, zero = index(I, REG), full(w, 0.0)
    for name in (ACTIVE, DONE, CODE, ITERATIONS, RESIDUAL):
        store(F, reg + name, zero)
    for i in range(index(I, N_K)):
        store(F, index(I, Y) + i, zero)
        store(F, index(I, SOL) + i, zero)
    store(F, reg + REG_X, full(w, get(options, REGULARIZATION)))
    store(F, reg + REG_Y, full(w, get(options, REGULARIZATION)))


@helper
def load_warm(w, I, F, point, order, block):
    """Y and SLACK (equilibrated) from earlier solutions (B, n + m)."""
    n, N, m, plus, y, out = (
        index(I, N_X),
        index(I, N_K),
        index(I, N_ROW),
        index(I, N_PLUS),
        index(I, Y),
        index(I, OUT),
    )
    unit, cost, scale = load(w, F, index(I, UNIT)), load(w, F, index(I, COST)), index(I, SCALE)
    load_field(w, F, out, n + m, point, 0, order, block)
    for i in range(N):
        store(F, y + i, full(w, 0.0))
    for i in range(n + m):
        j = i if i < n else plus + i - n
        x = load(w, F, out + i) / (unit * load(w, F, scale + j))
        store(F, y + j, x if i < n else x * cost)
    r, c = index(I, R), index(I, C)
    products(w, I, F, y, index(I, PX), r)
    for i in range(m):
        store(F, index(I, SLACK) + i, load(w, F, c + plus + i) - load(w, F, r + plus + i))
    store(F, index(I, REG) + RATIO_SD, full(w, 1.0))


@stage
def solve_block(w, I, F, options):
    """Warm polish, interior point with early hand-over to the polish, interior point to full accuracy."""
    reg, rounds, limit, first = index(I, REG), int(get(options, ROUNDS)), get(options, LIMIT), 1
    if get(options, WARM) > 0.5:
        first = 0
    for attempt in range(first, 3):
        if attempt > 0:
            if attempt == 1:
                start(w, I, F)
            open_lanes = (1.0 - load(w, F, reg + DONE)) * where_gt(load(w, F, reg + CODE), 0.5, 0.0, full(w, 1.0))
            store(F, reg + ACTIVE, open_lanes)
            tolerance = get(options, HAND_OVER) if attempt == 1 else FLOOR * get(options, TOLERANCE)
            interior(w, I, F, tolerance, limit, attempt - 1)
            guess(w, I, F)
        if polish(w, I, F, rounds):
            return


@stage
def finish(w, I, F):
    """Weights and Y for the adjoint: of the face in polished lanes, of the best interior iterate in the others."""
    n, N, m, plus, y, reg = index(I, N_X), index(I, N_K), index(I, N_ROW), index(I, N_PLUS), index(I, Y), index(I, REG)
    wd, kept, border, temp = index(I, WD), index(I, D), index(I, DATA) + index(I, N_ENTRY), index(I, TEMP)
    done, sol, best, s, best_s = load(w, F, reg + DONE), index(I, SOL), index(I, BEST), index(I, S), index(I, BEST_S)
    rough = any_gt(1.0 - done, 0.5)
    if rough:
        for i in range(N):
            store(F, sol + i, load(w, F, best + i))
        for i in range(m):
            store(F, s + i, load(w, F, best_s + i))
        interior_weights(w, I, F)
        for i in range(N):
            store(F, kept + i, load(w, F, wd + i))
        for e in range(index(I, N_BORDER)):
            store(F, temp + e, load(w, F, border + e))
    face_weights(w, I, F)
    if rough:
        tau = load(w, F, reg + BEST_TAU)
        for i in range(N):
            store(F, wd + i, where_gt(done, 0.5, load(w, F, wd + i), load(w, F, kept + i)))
            store(F, y + i, where_gt(done, 0.5, load(w, F, y + i), load(w, F, best + i) / tau))
        for e in range(index(I, N_BORDER)):
            store(F, border + e, where_gt(done, 0.5, load(w, F, border + e), load(w, F, temp + e)))
    unit, cost, code = load(w, F, index(I, UNIT)), load(w, F, index(I, COST)), load(w, F, reg + CODE)
    out, scale = index(I, OUT), index(I, SCALE)
    for i in range(n + m):
        j = i if i < n else plus + i - n
        x = load(w, F, y + j) * load(w, F, scale + j) * unit
        x = x if i < n else x / cost
        store(F, out + i, where_gt(code, 0.5, load(w, F, out + i), x))


@kernel
def solve_range(w, I, fields, shared, order, first, last, options, point, out, info, state):
    """Solve blocks first..last-1: out (B, n + m), info (B, 4), state; `point` is read when options[WARM] is set."""
    F = aligned(index(I, END), len(w))
    kept, length = index(I, KEPT), index(I, N_X) + index(I, N_ROW)
    for block in range(first, last):
        reset(w, I, F, options)
        load_data(w, I, F, fields, shared, order, block)
        drop_absent(w, I, F)
        fresh = block == first or shared & ENTRIES != ENTRIES
        if fresh:
            find_factors(w, I, F)
        apply_factors(w, I, F)
        if fresh:
            form_gram(w, I, F)
        if get(options, WARM) > 0.5:
            load_warm(w, I, F, point, order, block)
        solve_block(w, I, F, options)
        finish(w, I, F)
        unload(w, F, index(I, OUT), length, out, order, block)
        unload(w, F, index(I, REG) + CODE, 4, info, order, block)
        for k in range(kept):
            store(state, block * kept + k, load(w, F, k))


@kernel
def adjoint_range(w, I, order, first, last, options, upper, state, out):
    """Adjoint solutions out (B, n + m) of blocks first..last-1 for upstream gradients `upper` (B, n + m)."""
    F = aligned(index(I, END), len(w))
    n, N, m, plus, kept = index(I, N_X), index(I, N_K), index(I, N_ROW), index(I, N_PLUS), index(I, KEPT)
    c, y, slot, reg, scale = index(I, C), index(I, Y), index(I, OUT), index(I, REG), index(I, SCALE)
    for block in range(first, last):
        for k in range(kept):
            store(F, k, load(w, state, block * kept + k))
        store(F, reg + REG_X, full(w, get(options, REGULARIZATION)))
        store(F, reg + REG_Y, full(w, get(options, REGULARIZATION)))
        load_field(w, F, slot, n + m, upper, 0, order, block)
        cost = load(w, F, index(I, COST))
        for i in range(N):
            store(F, c + i, full(w, 0.0))
            store(F, y + i, full(w, 0.0))
        for i in range(n + m):
            j = i if i < n else plus + i - n
            g = load(w, F, slot + i) * load(w, F, scale + j)
            store(F, c + j, g * cost if i < n else g)
        factor_weighted(w, I, F)
        adjoint_solve(w, I, F)
        for i in range(n + m):
            j = i if i < n else plus + i - n
            x = load(w, F, y + j) * load(w, F, scale + j)
            store(F, slot + i, x if i < n else x / cost)
        unload(w, F, slot, n + m, out, order, block)
